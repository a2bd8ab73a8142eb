"""The fuse command as a user runs it: the published examples, what it reads and writes, one line otherwise.

What it reads: test_checkpoint.py. Half precision: test_half_precision.py. Its ONNX files: test_fuse_onnx.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import aether_arch
import pytest
import torch
from checkpoints import FUSED, NET, STATE, older_fused
from checkpoints import fuse as run
from conftest import ROOT, one_line, randomize
from safetensors.torch import load_file
from torch import Tensor

from aethersr.checkpoint import read_checkpoint
from aethersr.commands import fuse
from aethersr.identify import aether_from_state_dict

X = torch.rand(1, 3, 11, 15, generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(path: Path, state: Dict[str, Tensor]) -> None:
    written = load_file(str(path)) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    with torch.no_grad():
        expected, output = (aether_from_state_dict(each)(X) for each in (state, written))
    assert float((output - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.fixture
def refused(tmp_path: Path, capsys: Any) -> Callable[..., str]:
    """Runs the command and returns its line; expects exit code 2, and that no file appeared or changed."""

    def refusal(*arguments: Any) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert run(*arguments) == 2
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return one_line(capsys.readouterr().err)

    return refusal


LARGE = pytest.param("aether_large", 3, marks=pytest.mark.slow)


@pytest.mark.parametrize(("variant", "scale"), [("aether_medium", 4), ("aether_small", 2), LARGE])
def test_the_three_published_examples(tmp_path: Path, variant: str, scale: int) -> None:
    """As a process, from another folder, words as in the seed."""
    state = randomize(getattr(aether_arch, variant)(scale=scale)).state_dict()
    torch.save({"params": state}, tmp_path / "trained.pth")
    words = ["--model_path", "trained.pth", "--output_path", "./fused.pth", "--model_type", variant]
    words += ["--upscale", str(scale)] + (["--device", "cpu"] if scale == 2 else [])
    command = [sys.executable, str(ROOT / "fuse_aether.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{variant} x{scale}" in done.stdout
    assert_same(tmp_path / "fused.pth", state)
    plain = getattr(aether_arch, variant)(scale=scale)
    plain.load_state_dict(torch.load(tmp_path / "fused.pth"), strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused.pth", "trained.pth"]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_type_and_scale_may_be_left_out_and_times_are_told_on_request(
    checkpoint: Path, ending: str, capsys: Any
) -> None:
    target = checkpoint.with_name("fused" + ending)
    assert run(checkpoint, target) == 0
    assert_same(target, STATE)
    plain = capsys.readouterr().out
    assert "Weights: 'params', not averaged\n" in plain
    for words in ("parameters ", "file, MiB ", "Fused: within ", "Half precision: ", f"Wrote {target}\n"):
        assert words in plain
    assert "ms, 96x96" not in plain
    assert run(checkpoint, target, "--measure", "--overwrite", "--bound", 0.5) == 0
    measured = capsys.readouterr().out
    assert "ms, 96x96, cpu " in measured
    assert re.search(r"times as fast: \d", measured)
    assert float(read_checkpoint(target).state["bound"]) == 0.5


def test_an_older_fused_file_is_refused_unless_asked_for(tmp_path: Path, refused: Any) -> None:
    torch.save(older_fused(NET), tmp_path / "a.pth")
    arguments = [tmp_path / "a.pth", tmp_path / "b.pth"]
    assert "--accept_older_fused" in refused(*arguments)
    assert run(*arguments, "--accept_older_fused") == 0
    assert_same(tmp_path / "b.pth", STATE)


OPTIONS = [
    ("--img_range 0", "img_range 0 is not possible"),
    ("--bound 0", "--bound 0 is not possible"),
    ("--onnx fp32,fp8", "--onnx 'fp8' is not known; allowed: fp32, fp16, int8"),
    ("--static 3,8,8", "--static needs --onnx"),
    ("--static 1,8,8 --onnx fp32", "--static 1,8,8 does not fit; expected 3,H,W"),
    ("--calibration x", "--calibration needs --onnx int8"),
    ("--reduce_range --onnx fp16", "--reduce_range needs --onnx int8"),
    ("--opset 9 --onnx fp32", "argument --opset: invalid choice: 9 (expected 11 to 23)"),
    ("--opset 12 --onnx int8 --calibration x", "--opset 12 can't hold int8; pass 13 to 23"),
    ("--model_type aether_medium", "embed_dim=8"),
    ("--output_path o.onnx", "pass --output_path o.safetensors, and --onnx fp32 for files beside it"),
    ("--output_path o.param", "pass --output_path o.safetensors, and --ncnn for files beside it"),
    ("--output_path o", "has no ending, expected .pth or .safetensors; pass --output_path o.safe"),
    ("--onnx int8 --calibration nope", "--calibration nope is not a folder; pass one with pictures"),
    ("--model_type aether_tiny", "aether_large"),
    ("--upscale 4", "x2, but --upscale 4 was given; pass what it holds, or leave --upscale out"),
    ("--upscale 5", "choose from"),
    ("--int8", "it is --onnx int8"),
    ("--input a.pth", "--input is not an option: pass --model_path"),
    ("--model a.pth", "--model is not an option: pass --model_path"),
    ("--denoise 1", "unrecognized arguments: --denoise 1"),
    ("--model_path https://a.b/c.pth", "https://a.b/c.pth is a web address"),
    ("--check-fp16", "what half precision costs is always printed"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS)
def test_an_option_that_does_not_fit_ends_in_one_line(
    checkpoint: Path, refused: Any, monkeypatch: Any, options: str, words: str
) -> None:
    monkeypatch.setattr(aether_arch.AetherNet, "fused", None)  # before the work
    assert words in refused(checkpoint, checkpoint.with_name("b.pth"), *options.split())


def test_what_every_run_needs_is_asked_for_before_anything_is_written(
    checkpoint: Path, refused: Any, capsys: Any
) -> None:
    """Each kind of path: test_files.py."""
    (checkpoint.parent / "taken.pth").write_text("mine")
    assert "input itself" in refused(checkpoint, checkpoint, "--overwrite")
    assert "--overwrite" in refused(checkpoint, checkpoint.with_name("taken.pth"))
    for arguments, words in (([], "--model_path, --output_path"), (["--model_path", "a"], "--output_path")):
        assert fuse.main(arguments) == 2
        assert f"required: {words}" in one_line(capsys.readouterr().err)
    if not torch.cuda.is_available():
        paths = ["--model_path", str(checkpoint), "--output_path", str(checkpoint.with_name("b.pth"))]
        assert fuse.main([*paths, "--device", "cuda"]) == 2
        assert "--device cpu" in capsys.readouterr().err


def test_weights_that_are_not_fused_end_in_one_line_that_names_the_file(tmp_path: Path, refused: Any) -> None:
    """Reading has its own tests; these are the command's own checks."""
    qat = NET.fused().prepare_qat().state_dict()
    int8 = NET.fused().prepare_qat().convert_to_quantized().state_dict()
    new = {name: torch.zeros_like(value) for name, value in qat.items() if name.endswith("watched")}
    for words, content, *arguments in (
        ("Keys at the top: 'iter'", {"iter": 3}),
        ("fused already (fused form)", FUSED),
        ("fused already (int8 form)", int8),
        ("differs by inf steps", {**STATE, "norm.running_var": -STATE["norm.running_var"]}),
        ("was trained with 8-bit ranges", qat, "--bound", "1"),
        ("fused weights can't get a bound", FUSED, "--bound", "1"),
        ("its ranges: pass --calibration FOLDER", STATE, "--onnx", "int8"),
        ("or for no step, so int8 needs pictures", {**qat, **new}, "--onnx", "int8"),
    ):
        torch.save(content, tmp_path / "a.pth")
        line = refused(tmp_path / "a.pth", tmp_path / "b.pth", *arguments)
        assert words in line, line
        assert str(tmp_path / "a.pth") in line


def test_a_written_file_that_is_not_whole_is_not_kept(
    checkpoint: Path, refused: Any, monkeypatch: Any
) -> None:
    written = fuse.write_state

    def cut(state: Dict[str, Tensor], path: Path, metadata: Dict[str, str]) -> None:
        written(state, path, metadata)
        path.write_bytes(path.read_bytes()[:-50])

    monkeypatch.setattr(fuse, "write_state", cut)
    assert "is not a readable checkpoint" in refused(checkpoint, checkpoint.with_name("b.pth"))


def test_the_script_without_its_folders_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "fuse_aether.py", tmp_path)
    command = [sys.executable, "-S", "fuse_aether.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    expected = "aethersr is missing; keep this file beside the folders archs and aethersr."
    assert done.stderr.strip() == f"fuse_aether.py: error: {expected}"
