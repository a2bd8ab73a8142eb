"""A kill at a random moment of every command that writes: each output is the old one or the whole new one.

    AETHER_KILLS=50 .venv/bin/pytest -m slow tests/test_kills.py   # 50 kills of each command; default: 6

A run that is to be killed is a fork of a process that has imported everything: tenths of a second instead of
seconds, so most kills meet the work itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
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

from aethersr import checkpoint, files
from aethersr.commands import fuse as fuse_command

KILLS = int(os.environ.get("AETHER_KILLS", "6"))
SERVER = """
import contextlib, importlib, json, os, signal, sys, tempfile
sys.path[:0] = {paths!r}
import torch, onnx, onnxruntime, cv2, PIL.Image
from aethersr import calibration, ncnn, onnx_int8, upscaling
from aethersr.commands import fuse, upscale
from conftest import small_net
torch.set_num_threads(1)  # threads don't survive a fork
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
        os._exit(importlib.import_module(f"aethersr.commands.{{name}}").main(arguments))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Case = Tuple[List[str], List[Path]]  # a command's words, and what it writes


@pytest.fixture
def server() -> Iterator[Any]:
    code = SERVER.format(paths=[str(ROOT), str(ROOT / "archs"), str(ROOT / "tests")])
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


def shrink(folder: Path) -> Case:
    pytest.importorskip("aethersr.commands.shrink")
    target = folder / "out" / "small.safetensors"
    words = ["shrink", "--model_path", weights(folder), "--output_path", target, "--overwrite"]
    words += ["--pictures", pictures(folder / "pictures", 2, 96), "--hidden", "8"]
    return [*map(str, words)], [target]


COMMANDS: Dict[str, Callable[[Path], Case]] = {
    "fuse": fuse,
    "onnx": onnx,
    "ncnn": ncnn,
    "upscale": upscale,
    "shrink": shrink,
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
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
        for path in targets:
            path.write_bytes(b"old")
        code = run(server, words, rng.uniform(0, 1.1 * seconds), how)
        ends.append(code)
        # 2: safetensors takes an interruption for a damaged file. -how: the command had not begun.
        assert code in ((0, -how) if how == signal.SIGKILL else (0, 2, 128 + how, -how)), code
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


# --------------------------------------------------------------------------------- one line after another


@contextlib.contextmanager
def at_each_line(act: Callable[[int], None]) -> Iterator[None]:
    """Calls ``act`` with the number of each line that runs in what fuses and writes."""
    functions = (fuse_command.fuse, fuse_command.write_weights, checkpoint.write_state)
    functions += (files.Together.commit, files.Together._tidy, files.Together.part)
    codes, count, old = {function.__code__ for function in functions}, itertools.count(1), sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        if event == "line":
            act(next(count))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(old)


def test_at_any_line_the_output_is_old_or_whole_and_an_interruption_leaves_no_other_file(
    tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    (_, *words), (target,) = fuse(tmp_path)
    assert fuse_command.main(words) == 0
    whole, seen = target.read_bytes(), []
    target.write_bytes(b"old")
    with at_each_line(lambda number: seen.append(target.read_bytes())):
        assert fuse_command.main(words) == 0
    assert len(seen) > 50
    assert {*seen} == {b"old", whole}
    for last in range(2, len(seen), 5):

        def stop(number: int, last: int = last) -> None:
            if number == last:
                raise KeyboardInterrupt

        target.write_bytes(b"old")
        with at_each_line(stop):
            assert fuse_command.main(words) == 130, f"line {last}"
        assert capsys.readouterr().err.endswith(": stopped; nothing was written.\n")
        assert target.read_bytes() in (b"old", whole)
        assert [path.name for path in target.parent.iterdir()] == [target.name], f"line {last}"
