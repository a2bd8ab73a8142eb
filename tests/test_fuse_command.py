"""The fuse command as a user runs it: the published examples, every file it reads and writes, one plain line
otherwise."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import aether_arch
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import older_fused
from conftest import ROOT, randomize, small_net
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from test_half_precision import adversary, scale_stream
from torch import Tensor

from aethersr import files, verify
from aethersr.commands import fuse
from aethersr.identify import aether_from_state_dict
from aethersr.timing import Comparison

X = torch.rand(1, 3, 11, 15, generator=torch.Generator().manual_seed(2))
SMALL: Dict[str, Any] = {
    "embed_dim": 16,
    "depths": (1, 1),
    "use_channel_attn": False,
    "use_spatial_attn": False,
}
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run measures takes most of its time."""
    times = Comparison({"unfused": [2.0], "fused": [1.0]})
    monkeypatch.setattr(verify, "compare_times", lambda *arguments: times)


def run(*arguments: Any) -> int:
    return fuse.main([str(argument) for argument in (*arguments, "--device", "cpu")])


def state_of(**options: Any) -> Dict[str, Tensor]:
    return small_net(**options).float().state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net_g_latest.pth"
    torch.save({"params": state_of(scale=2)}, path)
    return path


def output_of(path: Path) -> Tensor:
    state = load_file(str(path)) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    with torch.no_grad():
        return aether_from_state_dict(state)(X)


def assert_same(path: Path, state: Dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = aether_from_state_dict(state)(X)
    assert float((output_of(path) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def refused(capsys: pytest.CaptureFixture, folder: Path, *arguments: Any) -> str:
    """Run, expect exit code 2 and one line, and that no file appeared; return the line."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        code = run(*arguments)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("variant", "scale", "device"),
    [("aether_medium", 4, None), ("aether_small", 2, "cpu"), ("aether_large", 3, None)],
)
def test_the_three_published_examples(tmp_path: Path, variant: str, scale: int, device: str) -> None:
    """As a process, from another folder, words as in the seed."""
    state = randomize(getattr(aether_arch, variant)(scale=scale)).state_dict()
    torch.save({"params": state}, tmp_path / "trained.pth")
    command = [
        sys.executable,
        str(ROOT / "fuse_aether.py"),
        "--model_path",
        "trained.pth",
        "--output_path",
        "./fused.pth",
    ]
    command += ["--model_type", variant, "--upscale", str(scale)] + (["--device", device] if device else [])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert f"{variant} x{scale}" in done.stdout
    assert_same(tmp_path / "fused.pth", state)
    plain = getattr(aether_arch, variant)(scale=scale)
    plain.load_state_dict(torch.load(tmp_path / "fused.pth"), strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused.pth", "trained.pth"]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_type_and_scale_may_be_left_out_and_the_ending_chooses_the_format(
    checkpoint: Path, ending: str, capsys: Any
) -> None:
    target = checkpoint.with_name("fused" + ending)
    assert run("--model_path", checkpoint, "--output_path", target, "--device", "cpu") == 0
    assert_same(target, state_of(scale=2))
    report = capsys.readouterr().out
    for word in (
        "parameters",
        "convolutions",
        "other operations",
        "file, MiB",
        "ms, 64x64",
        "largest difference",
        "times as fast",
    ):
        assert word in report


@pytest.mark.parametrize("scale", [1, 8])
def test_scales_beyond_the_choices_are_read_from_the_weights(tmp_path: Path, scale: int) -> None:
    torch.save(state_of(scale=scale), tmp_path / "a.pth")
    assert run("--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth") == 0
    assert_same(tmp_path / "b.pth", state_of(scale=scale))


def test_half_precision_checkpoints_are_written_as_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in state_of().items()}
    torch.save(state, tmp_path / "a.pth")
    assert run("--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth") == 0
    assert {value.dtype for value in torch.load(tmp_path / "b.pth", weights_only=True).values()} == {
        torch.float32
    }
    assert_same(tmp_path / "b.pth", state)


def test_an_older_fused_file_is_refused_unless_asked_for(tmp_path: Path, capsys: Any) -> None:
    net = small_net().float()
    torch.save(older_fused(net), tmp_path / "a.pth")
    arguments = ["--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth"]
    assert "--accept_older_fused" in refused(capsys, tmp_path, *arguments)
    assert run(*arguments, "--accept_older_fused") == 0
    assert_same(tmp_path / "b.pth", net.state_dict())


def test_contradictions_are_errors_that_name_both(tmp_path: Path, capsys: Any) -> None:
    torch.save(aether_arch.aether_small(scale=2).state_dict(), tmp_path / "a.pth")
    arguments = ["--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth"]
    line = refused(capsys, tmp_path, *arguments, "--model_type", "aether_medium")
    assert "aether_small" in line
    assert "aether_medium" in line
    line = refused(capsys, tmp_path, *arguments, "--upscale", "4")
    assert "x2" in line
    assert "--upscale 4" in line
    torch.save(state_of(), tmp_path / "a.pth")
    assert "embed_dim=24" in refused(capsys, tmp_path, *arguments, "--model_type", "aether_small")
    refused(capsys, tmp_path, *arguments, "--upscale", "5")
    refused(capsys, tmp_path, *arguments, "--model_type", "aether_tiny")


def test_outputs_are_checked_before_anything_is_written(checkpoint: Path, capsys: Any) -> None:
    folder = checkpoint.parent
    source = ["--model_path", checkpoint, "--output_path"]
    assert "input itself" in refused(capsys, folder, *source, checkpoint, "--overwrite")
    (folder / "link.pth").symlink_to(checkpoint)
    assert "input itself" in refused(capsys, folder, *source, folder / "link.pth", "--overwrite")
    assert "ends in '.onnx'" in refused(capsys, folder, *source, folder / "a.onnx")
    assert "does not exist" in refused(capsys, folder, *source, folder / "no" / "a.pth")
    (folder / "folder.pth").mkdir()
    assert "is a folder" in refused(capsys, folder, *source, folder / "folder.pth")
    target = folder / "taken.pth"
    target.write_text("mine")
    assert "--overwrite" in refused(capsys, folder, *source, target)
    assert target.read_text() == "mine"
    assert run(*source, target, "--overwrite") == 0
    assert_same(target, state_of())
    if not torch.cuda.is_available():
        arguments = [*map(str, source), str(folder / "b.pth"), "--device", "cuda"]
        assert fuse.main(arguments) == 2
        assert "--device cpu" in capsys.readouterr().err


def test_a_wrong_fused_file_is_noticed_and_not_kept(checkpoint: Path, capsys: Any, monkeypatch: Any) -> None:
    written = fuse.write_state

    def wrong(state: Dict[str, Tensor], path: Path, metadata: Dict[str, str]) -> None:
        written({**state, "head.bias": state["head.bias"] + 1e-5}, path, metadata)

    monkeypatch.setattr(fuse, "write_state", wrong)
    line = refused(
        capsys, checkpoint.parent, "--model_path", checkpoint, "--output_path", checkpoint.with_name("b.pth")
    )
    assert "differs by" in line


def test_every_scale_of_the_network_may_be_named(tmp_path: Path) -> None:
    for scale in aether_arch.SCALES:
        torch.save(small_net(scale, **TINY).float().state_dict(), tmp_path / "a.pth")
        arguments = ["--model_path", tmp_path / "a.pth", "--output_path", tmp_path / f"{scale}.pth"]
        assert run(*arguments, "--upscale", scale) == 0


def test_what_the_file_holds_is_said_and_wrappers_of_any_kind_are_read(tmp_path: Path, capsys: Any) -> None:
    """Which ones: test_checkpoint.py."""
    online, averaged = state_of(), randomize(small_net(), seed=5).float().state_dict()
    layouts: List[Any] = [
        (averaged, {"params": online, "params_ema": averaged}, "Weights: the averaged ones, 'params_ema'"),
        (online, {"params": online}, "Weights: 'params', not averaged"),
        (online, online, "Weights: the only ones in the file"),
        (averaged, {"state_dict": {**under("g.", online), **under("ema.", averaged)}}, "names under 'ema.'"),
    ]
    for expected, content, words in layouts:
        torch.save(content, tmp_path / "a.ckpt")
        assert (
            run("--model_path", tmp_path / "a.ckpt", "--output_path", tmp_path / "b.pth", "--overwrite") == 0
        )
        assert words in capsys.readouterr().out
        assert_same(tmp_path / "b.pth", expected)
    save_file({name: value.contiguous() for name, value in online.items()}, str(tmp_path / "a.safetensors"))
    assert (
        run("--model_path", tmp_path / "a.safetensors", "--output_path", tmp_path / "b.pth", "--overwrite")
        == 0
    )
    assert_same(tmp_path / "b.pth", online)


def under(prefix: str, state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def test_bad_inputs_end_in_one_line(tmp_path: Path, capsys: Any) -> None:
    """Reading has its own tests; these are the command's own checks, and that a file's name stands before
    each."""
    state = small_net(2, **TINY).float().state_dict()
    fused = small_net(2, **TINY).fused().float()
    int8 = copy.deepcopy(fused).prepare_qat().convert_to_quantized().state_dict()
    qat = copy.deepcopy(fused).prepare_qat().state_dict()

    def bad(content: Any, words: str, *arguments: Any) -> None:
        torch.save(content, tmp_path / "a.pth")
        common = ["--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth"]
        line = refused(capsys, tmp_path, *common, *arguments)
        assert words in line, line
        assert str(tmp_path / "a.pth") in line

    bad({"iter": 3}, "Keys at the top: 'iter'")
    bad({**state, "mean": torch.full((1, 3, 1, 1), float("nan"))}, "'mean' holds NaN or Inf")
    bad(fused.state_dict(), "fused already (fused form)")
    bad(int8, "holds int8 weights already")
    bad({name: value for name, value in state.items() if name != "conv_last.bias"}, "conv_last.bias")
    bad({**state, "norm.running_var": -state["norm.running_var"]}, "negative variance")
    bad(qat, "was trained with 8-bit ranges", "--bound", "1")
    bad(state, "needs pictures to find its ranges: pass --calibration FOLDER", "--int8")
    fresh = {
        name: torch.zeros_like(value) if name.endswith("watched") else value for name, value in qat.items()
    }
    bad(fresh, "before its first training step", "--int8")


def test_options_that_do_not_fit_end_in_one_line(tmp_path: Path, capsys: Any) -> None:
    torch.save(small_net(2, **TINY).float().state_dict(), tmp_path / "a.pth")
    common = ["--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth"]
    for words, *arguments in (
        ("--img_range 0.0 is not possible", "--img_range", "0"),
        ("--bound 0 is not possible", "--bound", "0"),
        ("--onnx 'fp8' is not known; allowed, with commas between: fp32, fp16, int8", "--onnx", "fp32,fp8"),
        ("--static is about ONNX files", "--static", "3,8,8"),
        ("--static 1,8,8 does not fit; expected 3,H,W", "--static", "1,8,8", "--onnx", "fp32"),
        ("--static 3,x is not possible", "--static", "3,x", "--onnx", "fp32"),
        ("--calibration is about the int8 file", "--calibration", "x"),
        ("--placement is about the int8 file", "--placement", "full", "--onnx", "fp16"),
        ("--opset 9 is not possible for fp32; pass one from 11 to", "--opset", "9", "--onnx", "fp32"),
        ("for int8 tensorrt; pass one from 13 to 20", "--opset", "21", "--int8", "--target", "tensorrt"),
    ):
        assert words in refused(capsys, tmp_path, *common, *arguments)


def test_a_file_that_does_not_read_back_is_not_kept_and_the_reason_is_its_own(
    checkpoint: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Not "not finite in float32", which was said of every error."""
    written, target = fuse.write_state, checkpoint.with_name("b.pth")

    def cut(state: Dict[str, Tensor], path: Path, metadata: Dict[str, str]) -> None:
        written(state, path, metadata)
        path.write_bytes(path.read_bytes()[:-50])

    monkeypatch.setattr(fuse, "write_state", cut)
    line = refused(capsys, checkpoint.parent, "--model_path", checkpoint, "--output_path", target)
    assert (
        f"{target} was not kept, what was written does not read back: it is not a readable checkpoint" in line
    )
    assert "finite" not in line
    assert ".part" not in line

    def short(state: Dict[str, Tensor], path: Path, metadata: Dict[str, str]) -> None:
        written({name: value for name, value in state.items() if name != "head.bias"}, path, metadata)

    monkeypatch.setattr(fuse, "write_state", short)
    assert "missing: 1 (head.bias)" in refused(
        capsys, checkpoint.parent, "--model_path", checkpoint, "--output_path", target
    )
    monkeypatch.undo()
    state = small_net(2, **TINY).float().state_dict()
    state["stages.0.0.norm.weight"].fill_(3e38)
    state["stages.0.0.conv.lk_conv.weight"].fill_(3e38)
    torch.save(state, checkpoint)
    line = refused(capsys, checkpoint.parent, "--model_path", checkpoint, "--output_path", target)
    assert "the fused weights are not finite in float32" in line


def test_the_speed_is_a_median_with_its_spread_or_no_claim(
    checkpoint: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.undo()
    arguments = ["--model_path", checkpoint, "--output_path", checkpoint.with_name("b.pth"), "--overwrite"]
    assert run(*arguments) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "; largest difference" in line)
    assert "times as fast" in line
    for times, words in (
        (
            {"unfused": [3.0, 3.1, 2.9], "fused": [2.0, 2.0, 2.0]},
            "1.50 times as fast (1.48 to 1.52); largest",
        ),
        (
            {"unfused": [3.0, 1.0, 2.0], "fused": [2.0, 2.0, 2.0]},
            "no measurable difference (0.75 to 1.25 times as fast)",
        ),
    ):
        monkeypatch.setattr(fuse.verify, "compare_times", lambda *_, _times=times: Comparison(_times))
        assert run(*arguments) == 0
        assert words in capsys.readouterr().out


def test_what_the_command_loads_needs_torch_alone(tmp_path: Path, checkpoint: Path) -> None:
    """Other packages are hidden, and the run starts in another folder."""
    names = (
        "safetensors",
        "onnx",
        "onnxruntime",
        "onnxslim",
        "numpy",
        "yaml",
        "tqdm",
        "PIL",
        "cv2",
        "basicsr",
        "spandrel",
    )
    code = f"""
import runpy, sys
for name in {names}:
    sys.modules[name] = None
sys.argv[0] = "fuse_aether.py"
runpy.run_path({str(ROOT / "fuse_aether.py")!r}, run_name="__main__")
"""
    for arguments, expected, words in (
        (["--output_path", "out.pth"], 0, ""),
        (["--check-fp16"], 0, ""),
        (["--output_path", "out.safetensors"], 2, "pip install safetensors"),
        (
            ["--output_path", "other.pth", "--onnx", "fp32"],
            2,
            "pip install onnx (or pip install 'aethersr[onnx]')",
        ),
    ):
        command = [sys.executable, "-c", code, "--model_path", str(checkpoint), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == (expected == 2)


def test_the_script_without_its_folders_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "fuse_aether.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "fuse_aether.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.strip() == (
        "fuse_aether.py: error: aethersr is missing; keep this file beside the folders archs and aethersr."
    )


# ------------------------------------------------------------------------------------------------------- ONNX


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


def test_the_placement_is_that_of_the_training_unless_another_is_asked_for(
    full: Path, pictures: Path, capsys: Any
) -> None:
    common = ["--model_path", full, "--output_path", full.with_name("a.pth"), "--int8", "--overwrite"]
    assert run(*common) == 0
    assert placement(full.with_name("a_int8.onnx")) == "full"
    assert run(*common, "--calibration", pictures) == 0
    assert "in place of the ranges that training found" in capsys.readouterr().out
    assert placement(full.with_name("a_int8.onnx")) == "full"
    assert run(*common, "--calibration", pictures, "--placement", "default") == 0
    assert placement(full.with_name("a_int8.onnx")) == "default"
    assert "trained with placement full" in refused(capsys, full.parent, *common, "--placement", "default")


def test_the_first_of_two_exports_is_not_there_when_the_second_fails(
    full: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [
        "--model_path",
        full,
        "--output_path",
        full.with_name("a.pth"),
        "--onnx",
        "fp32,int8",
        "--overwrite",
    ]
    assert run(*common) == 0
    real = onnx.checker.check_model
    count = iter(range(9))

    def check(*arguments: Any, **options: Any) -> None:
        if next(count) == 1:
            raise RuntimeError("the second file is broken.")
        real(*arguments, **options)

    monkeypatch.setattr(onnx.checker, "check_model", check)
    assert "second file is broken" in refused(capsys, full.parent, *common)


def test_finished_weights_become_onnx_files_too(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    net = small_net(2, **SMALL).float()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.save(net.fused().half().state_dict(), tmp_path / "fused.pth")
    options = ["--onnx", "fp32,int8", "--calibration", pictures]
    for name in ("net", "fused"):
        assert (
            run(
                "--model_path",
                tmp_path / f"{name}.pth",
                "--output_path",
                tmp_path / f"{name}_out.pth",
                *options,
            )
            == 0
        )
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(1)).numpy()
    for precision in ("fp32", "int8"):
        sessions = [
            onnxruntime.InferenceSession(str(tmp_path / f"{name}_out_{precision}.onnx"))
            for name in ("net", "fused")
        ]
        first, second = (session.run(None, {"input": image})[0] for session in sessions)
        assert np.abs(first - second).mean() < 0.01 * first.std(), precision
    assert placement(tmp_path / "fused_out_int8.onnx") == "default"
    line = refused(
        capsys, tmp_path, "--model_path", tmp_path / "fused.pth", "--output_path", tmp_path / "b.pth"
    )
    assert "fused already" in line
    assert "--onnx or --ncnn exports it" in line


def test_files_of_an_earlier_run_stay_where_a_later_one_fails(
    full: Path, pictures: Path, capsys: Any
) -> None:
    target = full.with_name("a.pth")
    assert run("--model_path", full, "--output_path", target, "--onnx", "fp32,int8") == 0
    net = small_net(2, **SMALL).float()
    net.conv_first.weight.data.fill_(3e38)  # type: ignore[union-attr, operator]
    torch.save(net.state_dict(), full.with_name("wild.pth"))
    common = ["--output_path", target, "--onnx", "fp32,int8", "--calibration", pictures, "--overwrite"]
    assert "no image on which" in refused(
        capsys, full.parent, "--model_path", full.with_name("wild.pth"), *common
    )


def test_a_second_move_that_fails_leaves_the_old_files(
    full: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [
        "--model_path",
        full,
        "--output_path",
        full.with_name("a.pth"),
        "--onnx",
        "fp32,fp16",
        "--overwrite",
    ]
    names = ("a.pth", "a_fp32.onnx", "a_fp16.onnx")
    for name in names[:2]:
        full.with_name(name).write_text(f"old {name}")
    real = files.os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "a_fp16.onnx" and ".part" in str(source):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    assert run(*common) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in full.parent.iterdir()} == {"full.pth", *names[:2]}
    assert all(full.with_name(name).read_text() == f"old {name}" for name in names[:2])


def test_an_output_that_appears_while_the_run_works_is_not_overwritten_unasked(
    full: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.pth", "a_fp32.onnx", "a_fp16.onnx"):
        monkeypatch.setattr(
            verify,
            "count_operations",
            lambda net, _name=name: full.with_name(_name).write_text("mine") and (1, 1),
        )
        assert run("--model_path", full, "--output_path", full.with_name("a.pth"), "--onnx", "fp32,fp16") == 2
        assert f"{name} exists; pass --overwrite" in capsys.readouterr().err
        assert {path.name for path in full.parent.iterdir()} == {"full.pth", name}
        assert full.with_name(name).read_text() == "mine"
        full.with_name(name).unlink()


@pytest.mark.parametrize("source", ["trained", "calibrated"])
def test_int8_is_made_from_the_rescaled_weights(full: Path, pictures: Path, capsys: Any, source: str) -> None:
    """Else its first layer, which is held in half precision, is infinite, and the file was refused."""
    path, net = full.with_name("large.pth"), adversary(scale_stream).float()
    torch.save((net.prepare_qat("full") if source == "trained" else net).state_dict(), path)
    arguments = [] if source == "trained" else ["--calibration", pictures]
    common = ["--output_path", full.with_name("a.pth"), "--int8", *arguments]
    assert run("--model_path", path, *common) == 0, capsys.readouterr().err
    assert "Rescaled for half precision" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(full.with_name("a_int8.onnx")))
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    (output,) = session.run(None, {"input": image.numpy()})
    expected = adversary(scale_stream).fused()(image.double()).detach().numpy()
    assert np.abs(output - expected).mean() < 0.2 * expected.std()


def test_onnx_files_have_any_name_in_a_terminal_without_its_letters(tmp_path: Path) -> None:
    folder = tmp_path / "Модель 写真"
    folder.mkdir()
    torch.save(small_net(2, **SMALL).float().state_dict(), folder / "é.pth")
    environment = {**files.os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", str(folder / "é.pth")]
    command += ["--output_path", str(folder / "é_fused.safetensors"), "--onnx", "fp32", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert {path.name for path in folder.iterdir()} == {"é.pth", "é_fused.safetensors", "é_fp32.onnx"}
