"""int8 in fuse_aether.py: which ranges, which placement, which pictures, and that no mistake costs a file that was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import small_net
from PIL import Image
from skimage import data as photographs
from test_cli import refused, run

from fuse_aether import calibration_pairs

SMALL: Dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "use_channel_attn": False, "use_spatial_attn": False}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("coffee", "chelsea"):
        Image.fromarray(getattr(photographs, name)()[:96, :96]).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A checkpoint of quantisation-aware training."""
    net = small_net(2, **SMALL).float().prepare_qat("full")
    torch.save({"params": net.state_dict()}, tmp_path / "full.pth")
    return tmp_path / "full.pth"


def placement(path: Path) -> str:
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert said["target"] == "onnxruntime"
    return said["placement"]


def test_the_placement_is_that_of_the_training_unless_another_is_asked_for(full: Path, pictures: Path, capsys: Any) -> None:
    common = ["--model_path", full, "--output_path", full.with_name("a.pth"), "--int8", "--overwrite"]
    assert run(*common) == 0
    assert placement(full.with_name("a_int8.onnx")) == "full"
    assert run(*common, "--calibration", pictures) == 0
    assert "in place of the ranges that training found" in capsys.readouterr().out
    assert placement(full.with_name("a_int8.onnx")) == "full"
    assert run(*common, "--calibration", pictures, "--placement", "default") == 0
    assert placement(full.with_name("a_int8.onnx")) == "default"
    assert "trained with placement full" in refused(capsys, full.parent, *common, "--placement", "default")


def test_files_of_an_earlier_run_stay_where_a_later_one_fails(full: Path, pictures: Path, capsys: Any) -> None:
    assert run("--model_path", full, "--output_path", full.with_name("a.pth"), "--onnx", "fp32,int8") == 0
    net = small_net(2, **SMALL).float()
    net.conv_first.weight.data.fill_(3e38)  # type: ignore[union-attr, operator]
    torch.save(net.state_dict(), full.with_name("wild.pth"))
    common = ["--output_path", full.with_name("a.pth"), "--onnx", "fp32,int8", "--calibration", pictures, "--overwrite"]
    assert "no image on which" in refused(capsys, full.parent, "--model_path", full.with_name("wild.pth"), *common)
    # A file that can't be made after the first one was: int8 of weights whose first layer is not finite in half precision.
    state = small_net(2, **SMALL).float().prepare_qat("full").state_dict()
    state["head.weight"] *= 1e5 / float(state["head.weight"].abs().max())
    torch.save(state, full.with_name("large.pth"))
    assert "head.weight is beyond half" in refused(capsys, full.parent, "--model_path", full.with_name("large.pth"), *common[:4], "--overwrite")


def test_the_first_of_two_exports_is_not_there_when_the_second_fails(full: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--model_path", full, "--output_path", full.with_name("a.pth"), "--onnx", "fp32,int8", "--overwrite"]
    assert run(*common) == 0
    real = onnx.checker.check_model
    count = iter(range(9))

    def check(*arguments: Any, **options: Any) -> None:
        if next(count) == 1:
            raise RuntimeError("the second file is broken.")
        real(*arguments, **options)

    monkeypatch.setattr(onnx.checker, "check_model", check)
    assert "second file is broken" in refused(capsys, full.parent, *common)


def test_pictures_that_are_broken_are_passed_over_and_16_bits_are_not_cut_off(pictures: Path) -> None:
    net = small_net(2, **SMALL).float()
    before = calibration_pairs(pictures, net)
    content = bytearray((pictures / "coffee.png").read_bytes())
    at = content.index(b"IDAT")
    content[at : at + 4] = b"\0\0\0\0"
    (pictures / "broken.png").write_bytes(content)
    (pictures / "broken.ppm").write_bytes(b"P6 12 x 255\n")
    (pictures / "notes.txt").write_text("no picture")
    assert len(calibration_pairs(pictures, net)) == len(before) == 2
    grey = photographs.camera()[:96, :96].astype(np.uint16) * 257
    Image.fromarray(grey).save(pictures / "a16.png")
    (_, picture), *_ = calibration_pairs(pictures, net)
    assert np.array_equal((picture[0, 0] * 255).round().numpy(), grey // 257)


def test_finished_weights_become_onnx_files_too(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    net = small_net(2, **SMALL).float()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.save(net.fused().half().state_dict(), tmp_path / "fused.pth")
    options = ["--onnx", "fp32,int8", "--calibration", pictures]
    for name in ("net", "fused"):
        assert run("--model_path", tmp_path / f"{name}.pth", "--output_path", tmp_path / f"{name}_out.pth", *options) == 0
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(1)).numpy()
    for precision in ("fp32", "int8"):
        sessions = [onnxruntime.InferenceSession(str(tmp_path / f"{name}_out_{precision}.onnx")) for name in ("net", "fused")]
        first, second = (session.run(None, {"input": image})[0] for session in sessions)
        assert np.abs(first - second).mean() < 0.01 * first.std(), precision
    assert placement(tmp_path / "fused_out_int8.onnx") == "default"
    line = refused(capsys, tmp_path, "--model_path", tmp_path / "fused.pth", "--output_path", tmp_path / "b.pth")
    assert "fused already" in line
    assert "--onnx exports it" in line
