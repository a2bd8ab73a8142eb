"""At whatever line a command is killed or interrupted, each output is the old one or the whole new one.

A kill leaves the files as they are at that moment, so they are looked at before every line of what writes.
"""

from __future__ import annotations

import importlib
import itertools
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, List

import pytest
import torch
from conftest import ROOT, noise, small_net

from aethersr import checkpoint, files, upscaling
from aethersr.picture import Picture

FUSE = "fuse --model_path in.pth --output_path out/2x_net.safetensors --overwrite --device cpu"
COMMANDS = {
    "fuse": (FUSE, 1),
    "upscale": ("upscale --model in.pth --input pictures --output out --overwrite --device cpu", 3),
    "onnx": (f"{FUSE} --onnx fp32,fp16,int8 --calibration pictures", 4),
    "ncnn": (f"{FUSE} --ncnn", 3),
    "shrink": (f"{FUSE.replace('fuse', 'shrink')[:-13]} --pictures pictures --hidden 8", 1),
}
WRITERS: List[Any] = [files.Together.commit, files.Together._tidy, files.Together.part]
WRITERS += [checkpoint.write_state, upscaling._write, Picture.write]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save(small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().state_dict(), tmp_path / "in.pth")
    (tmp_path / "out").mkdir()
    for k in range(3):
        noise(tmp_path / "pictures" / f"{k}.png", 48, 48, 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: str, act: Callable[[int], None]) -> int:
    """Exit code of a command; ``act`` is called with the number of each line that runs in one of WRITERS."""
    codes, count = {function.__code__ for function in WRITERS}, itertools.count(1)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            act(next(count))
        return trace if frame.f_code in codes else None

    command, *arguments = words.split()
    main, old = importlib.import_module(f"aethersr.commands.{command}").main, sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        return int(main(arguments))
    finally:
        sys.settrace(old)
        threading.settrace(old)  # type: ignore[arg-type]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "ncnn", "shrink")]


@pytest.mark.parametrize("name", ["fuse", "upscale", *SLOW])
def test_at_any_line_each_output_is_old_or_whole_and_an_interruption_leaves_no_other_file(
    folder: Path, name: str
) -> None:
    for package in ("ncnn", "pnnx") if name == "ncnn" else ():
        pytest.importorskip(package)
    words, number = COMMANDS[name]

    assert run(words, lambda line: None) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = {path: content for path, content in before.items() if path.parent.name == "out"}
    assert len(whole) == number
    states: List[List[bytes]] = []

    def look(line: int = 0) -> None:
        states.append([path.read_bytes() for path in whole])

    def attempt(act: Callable[[int], None], code: int) -> None:
        for path in whole:
            path.write_bytes(b"old")
        assert run(words, act) == code
        assert {path for path in folder.rglob("*") if path.is_file()} == {*before}
        look()

    attempt(look, 0)
    for last in range(2, len(states), len(states) // 6):

        def stop(line: int, last: int = last) -> None:
            if line == last:
                raise KeyboardInterrupt

        attempt(stop, 130)
        together = len({now == b"old" for now in states[-1]}) == 1
        assert together or name == "upscale", "some of what comes together"
    assert all(now in (b"old", new) for state in states for now, new in zip(state, whole.values()))
    inputs = before.keys() - whole.keys()
    assert all(path.read_bytes() == before[path] for path in inputs), "an input has changed"


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_without_a_trace(folder: Path, how: int, code: int) -> None:
    command = [sys.executable, str(ROOT / "upscale.py"), *COMMANDS["upscale"][0].split()[1:]]
    command += ["--tile", "1", "--overlap", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "upscales 3 pictures" in process.stdout.readline()
    process.send_signal(how)
    _, error = process.communicate()
    assert process.returncode == code
    assert error == "upscale.py: stopped; unfinished pictures were not written.\n"
    assert not list((folder / "out").iterdir())
