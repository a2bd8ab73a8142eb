"""A kill at a random moment of every command that writes: each output is the old one or the whole new one.

AETHER_KILLS=50 .venv/bin/pytest -m slow tests/test_kills.py   # 50 kills of each command; default: 6
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, List

import cv2  # noqa: F401  imported before a run begins, so that most kills meet the work itself
import numpy as np
import onnxruntime  # noqa: F401
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image

from aethersr import calibration, checkpoint, files, onnx_int8, upscaling  # noqa: F401
from aethersr.commands import fuse, shrink, upscale  # noqa: F401

KILLS = int(os.environ.get("AETHER_KILLS", "6"))


def child(command: str, words: List[str]) -> None:
    """A run in a process of its own."""
    signal.alarm(300)  # one that waits for ever ends the test
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.exit(importlib.import_module(f"aethersr.commands.{command}").main(words))


def run(command: str, words: List[str], moment: float = 1e9, how: int = signal.SIGKILL) -> int:
    """Exit code of a run that gets a signal after ``moment`` seconds; -number where that ended it."""
    process = multiprocessing.get_context("forkserver").Process(target=child, args=(command, words))
    process.start()
    process.join(min(moment, 300))
    if process.is_alive():
        os.kill(process.pid or 0, how)
    process.join()
    return int(process.exitcode or 0)


FUSE = "fuse --model_path in.pth --output_path out/2x_net.safetensors --overwrite --device cpu"
COMMANDS = {
    "fuse": FUSE,
    "onnx": f"{FUSE} --onnx fp32,fp16,int8 --calibration pictures",
    "ncnn": f"{FUSE} --ncnn",
    "upscale": "upscale --model in.pth --input pictures --output out --overwrite --device cpu",
    "shrink": "shrink --model_path in.pth --output_path out/a.pth --overwrite --pictures pictures --hidden 8",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save(small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().state_dict(), tmp_path / "in.pth")
    for name in ("out", "pictures"):
        (tmp_path / name).mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 96, 96, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_moment_leaves_old_or_whole_new_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No process can tidy up after SIGKILL: then a temporary file, named as such, may stay."""
    for package in ("ncnn", "pnnx") if name == "ncnn" else ():
        pytest.importorskip(package)
    command, *words = COMMANDS[name].split()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in ("", "archs", "tests")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["test_kills"])
    begin = time.monotonic()
    assert run(command, words) == 0
    seconds = time.monotonic() - begin
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    targets = [path for path in before if path.parent.name == "out"]
    assert len(targets) == {"onnx": 4, "ncnn": 3, "upscale": 12}.get(name, 1)
    rng, ends = np.random.default_rng(0), []
    for how in itertools.islice(itertools.cycle(("KILL", "TERM", "KILL", "INT")), KILLS):
        number = int(getattr(signal, f"SIG{how}"))
        for path in targets:
            path.write_bytes(b"old")
        ends.append(run(command, words, rng.uniform(0, 1.1 * seconds), number))
        # 1, -number: the command had not begun. 2: safetensors takes an interruption for a damaged file.
        assert ends[-1] in ((0, -number) if how == "KILL" else (0, 1, 2, 128 + number, -number))
        new = [path for path in targets if path.read_bytes() != b"old"]
        assert all(path.read_bytes() == before[path] for path in new)
        assert ends[-1] != 0 or len(new) == len(targets)
        if how != "KILL" and name != "upscale":
            assert len(new) in (0, len(targets)), "some of the files that come together"
        left = {path for path in folder.rglob("*") if path.is_file()} - {*before}
        assert all(".part" in path.name for path in left), left
        assert how == "KILL" or not left, left
        for path in left:
            path.unlink()
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert not {*changed} - {*targets}, "an input has changed"
    assert any(code != 0 for code in ends), "every run ended before its kill"


def at_each_line(act: Callable[[int], None]) -> Any:
    """For sys.settrace: calls ``act`` with the number of each line that runs in what writes."""
    functions: List[Any] = [fuse.write_weights, checkpoint.write_state]
    functions += [files.Together.commit, files.Together._tidy, files.Together.part]
    codes, count = {function.__code__ for function in functions}, itertools.count(1)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            act(next(count))
        return trace if frame.f_code in codes else None

    return trace


def test_at_any_line_the_output_is_old_or_whole_and_an_interruption_leaves_no_other_file(
    folder: Path, capsys: Any
) -> None:
    words, target = FUSE.split()[1:], folder / "out" / "2x_net.safetensors"

    def written(act: Callable[[int], None], code: int) -> bytes:
        target.write_bytes(b"old")
        old = sys.gettrace()
        sys.settrace(at_each_line(act))
        try:
            assert fuse.main(words) == code
        finally:
            sys.settrace(old)
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        return target.read_bytes()

    seen: List[bytes] = []
    whole = written(lambda number: seen.append(target.read_bytes()), 0)
    assert len(seen) > 30
    assert {*seen} == {b"old", whole}
    for last in range(2, len(seen), 7):

        def stop(number: int, last: int = last) -> None:
            if number == last:
                raise KeyboardInterrupt

        assert written(stop, 130) in (b"old", whole), f"line {last}"
        assert capsys.readouterr().err.endswith(": stopped; nothing was written.\n")
