"""fuse_aether.py as a user runs it: the seed's examples, the frameworks' files, and a plain line with exit code 2 for everything else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import aether_arch
import pytest
import torch
from conftest import ROOT, randomize, small_net
from safetensors.torch import load_file, save_file
from test_checkpoints import older_fused
from torch import Tensor

import fuse_aether

X = torch.rand(1, 3, 11, 15, generator=torch.Generator().manual_seed(2))


def run(*arguments: Any) -> int:
    return fuse_aether.main([str(argument) for argument in arguments])


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
        return aether_arch.aether_from_state_dict(state)(X)


def assert_same(path: Path, state: Dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = aether_arch.aether_from_state_dict(state)(X)
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
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", "trained.pth", "--output_path", "./fused.pth"]
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
def test_type_and_scale_may_be_left_out_and_the_ending_chooses_the_format(checkpoint: Path, ending: str, capsys: Any) -> None:
    target = checkpoint.with_name("fused" + ending)
    assert run("--model_path", checkpoint, "--output_path", target, "--device", "cpu") == 0
    assert_same(target, state_of(scale=2))
    report = capsys.readouterr().out
    for word in ("parameters", "convolutions", "other operations", "file, MiB", "ms, 64x64", "largest difference", "times as fast"):
        assert word in report


@pytest.mark.parametrize("scale", [1, 8])
def test_scales_beyond_the_choices_are_read_from_the_weights(tmp_path: Path, scale: int) -> None:
    torch.save(state_of(scale=scale), tmp_path / "a.pth")
    assert run("--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth") == 0
    assert_same(tmp_path / "b.pth", state_of(scale=scale))


def test_every_framework_layout_is_read_and_averaged_weights_win(tmp_path: Path, capsys: Any) -> None:
    online, averaged = state_of(), randomize(small_net(), seed=5).float().state_dict()
    layouts: List[Any] = [
        (averaged, {"params": online, "params_ema": averaged}, "params_ema"),
        (averaged, {"params": online, "params-ema": averaged}, "params-ema"),
        (averaged, {"metadata": {"scale": 2}, "params_ema": averaged}, "params_ema"),
        (online, {"params": online}, "not averaged"),
        (online, online, "the only ones"),
        (online, {f"module.{name}": value for name, value in online.items()}, "the only ones"),
        (online, {"params": {f"_orig_mod.{name}": value for name, value in online.items()}}, "not averaged"),
    ]
    for expected, content, words in layouts:
        torch.save(content, tmp_path / "a.pth")
        assert run("--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth", "--overwrite") == 0
        assert words in capsys.readouterr().out
        assert_same(tmp_path / "b.pth", expected)
    save_file({name: value.contiguous() for name, value in online.items()}, str(tmp_path / "a.safetensors"), {"format": "pt"})
    assert run("--model_path", tmp_path / "a.safetensors", "--output_path", tmp_path / "b.pth", "--overwrite") == 0
    assert_same(tmp_path / "b.pth", online)


def test_averaged_weights_whose_statistics_never_moved_take_the_online_ones(tmp_path: Path, capsys: Any) -> None:
    online, averaged = state_of(), randomize(small_net(), seed=5).float().state_dict()
    statistics = [name for name in online if name.endswith(("running_mean", "running_var"))]
    never = {**averaged, **{name: torch.full_like(online[name], float(name.endswith("var"))) for name in statistics}}
    torch.save({"params": online, "params_ema": never}, tmp_path / "a.pth")
    assert run("--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth") == 0
    assert "never updated" in capsys.readouterr().out
    assert_same(tmp_path / "b.pth", {**averaged, **{name: online[name] for name in statistics}})


def test_half_precision_checkpoints_are_written_as_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in state_of().items()}
    torch.save(state, tmp_path / "a.pth")
    assert run("--model_path", tmp_path / "a.pth", "--output_path", tmp_path / "b.pth") == 0
    assert {value.dtype for value in torch.load(tmp_path / "b.pth", weights_only=True).values()} == {torch.float32}
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


def test_bad_inputs_end_in_one_line(checkpoint: Path, capsys: Any) -> None:
    folder, good, state = checkpoint.parent, checkpoint.read_bytes(), state_of()
    target = folder / "b.pth"

    def bad(name: str, content: Any, words: str) -> None:
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        line = refused(capsys, folder, "--model_path", path, "--output_path", target)
        assert words in line, line
        assert str(path) in line

    bad("empty.pth", b"", "empty")
    bad("empty.safetensors", b"", "empty")
    bad("text.pth", b"hello", "not a readable checkpoint")
    bad("half.pth", good[: len(good) // 2], "not a readable checkpoint")
    bad("cut.pth", good[:-7], "not a readable checkpoint")
    bad("text.safetensors", b"hello there, friend", "not a whole .safetensors")
    bad("tensor.pth", torch.zeros(3), "holds a Tensor")
    bad("list.pth", [1, 2], "holds a list")
    bad("number.pth", {"iter": 3}, "entry 'iter' is a int")
    bad("foreign.pth", torch.nn.Conv2d(3, 3, 3).state_dict(), "not an AetherNet")
    bad("nan.pth", {**state, "mean": torch.full((1, 3, 1, 1), float("nan"))}, "'mean' holds NaN or Inf")
    bad("inf.pth", {"params": {**state, "mean": torch.full((1, 3, 1, 1), float("inf"))}}, "NaN or Inf")
    bad("fused.pth", small_net().fused().float().state_dict(), "fused already")
    bad("missing.pth", {name: value for name, value in state.items() if name != "conv_last.bias"}, "conv_last.bias")
    bad("integer.pth", {**state, "mean": torch.zeros(1, 3, 1, 1, dtype=torch.int32)}, "torch.int32")
    bad("claim.pth", {**state, "mean": torch.zeros(1).expand(2**40)}, "claim more than the file holds")
    bad("variance.pth", {**state, "norm.running_var": -state["norm.running_var"]}, "negative variance")
    bad("name.onnx", b"x", "ends in '.onnx'")
    assert "does not exist" in refused(capsys, folder, "--model_path", folder / "no.pth", "--output_path", target)
    assert "not a file" in refused(capsys, folder, "--model_path", folder, "--output_path", target)


class _Evil:
    def __reduce__(self) -> Any:
        return (open, ("ran.txt", "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params": _Evil()}, tmp_path / "evil.pth")
    line = refused(capsys, tmp_path, "--model_path", "evil.pth", "--output_path", "b.pth")
    assert "asks to run code" in line
    assert not (tmp_path / "ran.txt").exists()


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
        assert "--device cpu" in refused(capsys, folder, *source, folder / "b.pth", "--device", "cuda")


def test_a_wrong_fused_file_is_noticed_and_not_kept(checkpoint: Path, capsys: Any, monkeypatch: Any) -> None:
    written = fuse_aether.write_state

    def wrong(state: Dict[str, Tensor], path: Path, metadata: Dict[str, str]) -> None:
        written({**state, "head.bias": state["head.bias"] + 1e-5}, path, metadata)

    monkeypatch.setattr(fuse_aether, "write_state", wrong)
    line = refused(capsys, checkpoint.parent, "--model_path", checkpoint, "--output_path", checkpoint.with_name("b.pth"))
    assert "differs by" in line


def test_torch_alone_is_enough(tmp_path: Path, checkpoint: Path) -> None:
    """Other packages are hidden; the script is copied beside the architecture, as users do."""
    for name in ("fuse_aether.py", "archs/aether_arch.py"):
        shutil.copy(ROOT / name, tmp_path)
    hidden = "import sys; [sys.modules.__setitem__(n, None) for n in ('safetensors', 'onnx', 'onnxruntime', 'yaml', 'tqdm', 'PIL', 'basicsr')]; "
    code = hidden + "import fuse_aether; sys.exit(fuse_aether.main(sys.argv[1:]))"
    for ending, expected in ((".pth", 0), (".safetensors", 2)):
        command = [sys.executable, "-c", code, "--model_path", str(checkpoint), "--output_path", "out" + ending]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
    assert "pip install safetensors" in done.stderr
