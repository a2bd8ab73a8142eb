"""The ONNX files that the fuse command writes: which ones, from which weights, all of them or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict

import numpy as np
import onnx
import pytest
import torch
from checkpoints import fuse as run
from conftest import PLAIN, one_line, run_onnx, small_net
from test_half_precision import blown_up

IMAGE = np.random.default_rng(1).random((1, 3, 20, 24), np.float32)

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> Dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    torch.save({"params": small_net(2, **PLAIN).float().prepare_qat().state_dict()}, tmp_path / "qat.pth")
    return tmp_path / "qat.pth"


def test_ranges_are_those_of_the_training_unless_pictures_are_given(
    trained: Path, pictures: Path, capsys: Any
) -> None:
    words = [trained, trained.with_name("a.pth"), "--onnx", "int8", "--license", "CC0-1.0", "--overwrite"]
    os.utime(trained, (1e9, 1e9))
    assert run(*words) == 0
    said = {entry.key: entry.value for entry in onnx.load(trained.with_name("a_int8.onnx")).metadata_props}
    assert (said["target"], said["license"]) == ("onnxruntime", "CC0-1.0")
    assert (said["date"], len(said["source_sha256"])) == ("2001-09-09", 64), "the checkpoint's"
    first = contents(trained.parent)["a_int8.onnx"]
    assert "Calibrating" not in capsys.readouterr().out
    assert run(*words, "--calibration", pictures) == 0
    assert "Calibrating on 2 pictures, in place of the ranges that training found" in capsys.readouterr().out
    assert contents(trained.parent)["a_int8.onnx"] != first


def test_finished_weights_become_onnx_files_too(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    net = small_net(2, **PLAIN).float()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.save(net.fused().half().state_dict(), tmp_path / "fused.pth")
    options = ["--onnx", "fp32,int8,fp32", "--calibration", pictures]
    for name, target in (("net", "first_fused.pth"), ("fused", "second_fp16.pth")):
        assert run(tmp_path / f"{name}.pth", tmp_path / target, *options) == 0
    for precision in ("fp32", "int8"):
        files = [tmp_path / f"{name}_{precision}.onnx" for name in ("first", "second")]
        first, second = (run_onnx(file, IMAGE) for file in files)
        assert np.abs(first - second).mean() < 0.01 * first.std(), precision
    capsys.readouterr()
    assert run(tmp_path / "fused.pth", tmp_path / "b.pth") == 2
    assert "--onnx or --ncnn exports it" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("source", ["trained", "calibrated"])
def test_int8_is_made_from_the_rescaled_weights(
    tmp_path: Path, pictures: Path, capsys: Any, source: str
) -> None:
    """Else its first layer, which is held in half precision, is infinite, and the file was refused."""
    path, net = tmp_path / "large.pth", blown_up(small_net(2).fused().float(), "stream")
    torch.save((net.prepare_qat() if source == "trained" else net).state_dict(), path)
    arguments = [] if source == "trained" else ["--calibration", pictures]
    assert run(path, tmp_path / "a.pth", "--onnx", "int8", *arguments) == 0, capsys.readouterr().err
    assert "Rescaled for half precision" in capsys.readouterr().out
    expected = small_net(2)(torch.from_numpy(IMAGE).double()).detach().numpy()
    assert np.abs(run_onnx(tmp_path / "a_int8.onnx", IMAGE) - expected).mean() < 0.2 * expected.std()


@pytest.mark.parametrize("broken", [False, True])
def test_if_the_last_file_fails_or_appears_meanwhile_none_is_written(
    trained: Path, capsys: Any, monkeypatch: Any, broken: bool
) -> None:
    """How they come and go together: test_files.py."""
    before, last = contents(trained.parent), trained.with_name("a_int8.onnx")
    check, count = onnx.checker.check_model, iter(range(9))

    def check_second(*arguments: Any, **options: Any) -> None:
        check(*arguments, **options)
        if next(count) == 1 and broken:
            raise RuntimeError("the second file is broken.")
        last.write_text("mine")

    monkeypatch.setattr(onnx.checker, "check_model", check_second)
    assert run(trained, trained.with_name("a.pth"), "--onnx", "fp32", "int8,fp32") == 2
    words = "second file is broken" if broken else "a_int8.onnx exists; pass --overwrite"
    assert words in one_line(capsys.readouterr().err)
    assert contents(trained.parent) == {**before, last.name: b"mine"}
