"""A kill at a random moment of every command that writes: each output is the old one or the whole new one.

    AETHER_KILLS=50 .venv/bin/pytest -m slow tests/test_kills.py   # 50 kills of each command; default: 6

A run that is to be killed is a fork of a process that has imported everything: tenths of a second instead of
seconds, so most kills meet the work itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
KILLS = int(os.environ.get("AETHER_KILLS", "6"))
SERVER = """
import contextlib, json, os, runpy, signal, sys, tempfile
sys.path[:0] = {paths!r}
import torch, onnx, onnxruntime, cv2, PIL.Image, yaml, jinja2
from aethersr import calibration, ncnn, onnx_int8, upscaling, verify
from aethersr.commands import fuse, upscale
from aethersr.timing import Comparison
from conftest import small_net
import train
torch.set_num_threads(1)  # threads don't survive a fork
verify.compare_times = lambda *nets: Comparison({{"unfused": [2.0], "fused": [1.0]}})  # most of a run's time
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # what is imported late
    torch.save(small_net(2, embed_dim=8, depths=(1,)).float().state_dict(), folder + "/in.pth")
    words = ["--model_path", folder + "/in.pth", "--output_path", folder + "/out.safetensors"]
    assert fuse.main([*words, "--device", "cpu"]) == 0
print("ready", flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a run that waits for ever ends the test
        for stream in (0, 1):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        if name.endswith(".py"):
            sys.argv = [name, *arguments]
            try:
                runpy.run_path(name, run_name="__main__")
            except SystemExit as end:
                os._exit(end.code)
        os._exit({{"fuse": fuse, "upscale": upscale, "train": train}}[name].main(arguments))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Case = Tuple[List[str], List[Path]]  # a command's words, and what it writes


@pytest.fixture
def server() -> Iterator[Any]:
    code = SERVER.format(paths=[str(ROOT), str(ROOT / "archs"), str(ROOT / "training"), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: Dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def run(server: Any, words: List[str], moment: float = 1e9, how: int = signal.SIGKILL) -> int:
    """Exit code of a run that gets a signal after ``moment`` seconds; -number where that ended it."""
    server.stdin.write(json.dumps(words) + "\n")
    server.stdin.flush()
    child, until = int(server.stdout.readline()), time.monotonic() + moment
    if moment < 1e9:
        time.sleep(max(0.0, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child, how)
    status = int(server.stdout.readline())
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def weights(folder: Path) -> Path:
    torch.save(small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().state_dict(), folder / "in.pth")
    return folder / "in.pth"


def pictures(folder: Path, count: int, size: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{k}.png")
    return folder


def fuse(folder: Path, *more: str, names: Tuple[str, ...] = ()) -> Case:
    target = folder / "out" / "2x_net.safetensors"
    words = ["fuse", "--model_path", weights(folder), "--output_path", target, "--overwrite", *more]
    return [*map(str, words), "--device", "cpu"], [target, *(target.with_name(name) for name in names)]


def onnx(folder: Path) -> Case:
    calibration = str(pictures(folder / "pictures", 2, 48))
    names = tuple(f"2x_net_{kind}.onnx" for kind in ("fp32", "fp16", "int8"))
    return fuse(folder, "--onnx", "fp32,fp16,int8", "--calibration", calibration, names=names)


def ncnn(folder: Path) -> Case:
    for package in ("ncnn", "pnnx"):
        pytest.importorskip(package)
    return fuse(folder, "--ncnn", names=("2x_net.param", "2x_net.bin"))


def upscale(folder: Path) -> Case:
    source = pictures(folder / "in", 30, 40)
    words = ["upscale", "--model", weights(folder), "--input", source, "--output", folder / "out"]
    targets = [folder / "out" / path.name for path in source.iterdir()]
    return [*map(str, words), "--overwrite", "--device", "cpu"], targets


def keep(folder: Path) -> Case:
    (folder / "traiNNer" / "archs").mkdir(parents=True)
    models = folder / "experiments" / "2x_AetherNet_small_float" / "models"
    models.mkdir(parents=True)
    save_file(small_net(2, embed_dim=64).float().state_dict(), str(models / "net_g_ema_7.safetensors"))
    target = folder / "out" / "kept.safetensors"
    return ["train", "--traiNNer-redux", str(folder), "--keep", "--kept", str(target)], [target]


def templates(folder: Path) -> Case:
    shutil.copytree(ROOT / "options", folder / "out" / "options")
    written = [path for path in (folder / "out" / "options").rglob("*.*") if path.parent.name == "AetherNet"]
    return [str(folder / "out" / "options" / "generate_options.py")], written


COMMANDS: Dict[str, Callable[[Path], Case]] = {
    "fuse": fuse, "onnx": onnx, "ncnn": ncnn, "upscale": upscale, "keep": keep, "templates": templates,
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_moment_leaves_old_or_whole_new_files(server: Any, tmp_path: Path, name: str) -> None:
    """No process can tidy up after SIGKILL: then a temporary file, named as such, may stay."""
    (tmp_path / "out").mkdir()
    words, targets = COMMANDS[name](tmp_path)
    assert targets
    begin = time.monotonic()
    assert run(server, words) == 0
    seconds = time.monotonic() - begin
    whole = {path: path.read_bytes() for path in targets}
    others = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in whole}
    rng, ends = np.random.default_rng(0), []
    for k in range(KILLS):
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[k % 4]
        if name == "templates":  # it has no files that must come together, and asks for no signal
            how = signal.SIGKILL
        for path in targets:
            path.write_bytes(b"old")
        code = run(server, words, rng.uniform(0, 1.1 * seconds), how)
        ends.append(code)
        # 2: safetensors takes an interruption for a damaged file. -how: the command had not begun.
        assert code in ((0, -how) if how == signal.SIGKILL else (0, 2, 130, -how)), code
        new = [path for path in targets if path.read_bytes() != b"old"]
        assert all(path.read_bytes() == whole[path] for path in new)
        assert code != 0 or len(new) == len(targets)
        if how != signal.SIGKILL and name != "upscale":
            assert len(new) in (0, len(targets)), "some of the files that come together"
        left = {path for path in tmp_path.rglob("*") if path.is_file()} - {*whole, *others}
        assert all(".part" in path.name for path in left), left
        assert how == signal.SIGKILL or not left, left
        for path in left:
            path.unlink()
    assert all(path.read_bytes() == content for path, content in others.items()), "an input has changed"
    assert any(code != 0 for code in ends), "every run ended before its kill"
    print(f"{name}: {KILLS} kills in up to {1.1 * seconds:.2f} s, {sum(map(bool, ends))} met a run at work")
