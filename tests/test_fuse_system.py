"""The fuse command and the system: odd names, full disks, several runs at once. Paths: test_files.py."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STATE
from conftest import ROOT, one_line

from aethersr.checkpoint import ENDINGS
from aethersr.commands import fuse as command

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"params": STATE}, tmp_path / "in.pth")
    return tmp_path / "in.pth"


def fuse(source: Any, target: Any, *more: str) -> int:
    return command.main(["--model_path", str(source), "--output_path", str(target), "--device", "cpu", *more])


def refused(capfd: Any, source: Any, target: Any, *more: str) -> str:
    """The one line that a run ends in."""
    capfd.readouterr()
    assert fuse(source, target, *more) == 2
    return one_line(capfd.readouterr().err)  # of the file descriptor: libraries write there too


NAMES = ["Модель ä '写真' \"😀", "-leading", "a" * 237, "new\nline\x1b[31m\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_the_disk_takes_is_read_and_written(checkpoint: Path, capfd: Any, name: str) -> None:
    folder = checkpoint.parent / name
    folder.mkdir()
    source = folder / f"{name}.pth"
    checkpoint.rename(source)
    for ending in ENDINGS:
        if ending == ".safetensors" and "\udcff" in name:
            continue  # the library takes no path that is not Unicode
        target = folder / f"{name[1:]}{ending}"
        assert fuse(source, target) == 0, capfd.readouterr().err
        assert sorted(os.listdir(folder)) == sorted([source.name, target.name])
        assert "fused already" in refused(capfd, target, folder / "again.pth")  # it was read back
        target.unlink()


@pytest.mark.parametrize("room", [2000, 30_000])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_that_fills_up_at_any_byte_leaves_nothing(
    checkpoint: Path, capfd: Any, ending: str, room: int
) -> None:
    """A limit to the size of files stands for the disk: writing fails at the same byte, in C code too."""
    target = checkpoint.with_name(f"out{ending}")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        line = refused(capfd, checkpoint, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert str(target) in line
    assert os.listdir(checkpoint.parent) == ["in.pth"]


def test_processes_without_streams_letters_or_company(checkpoint: Path) -> None:
    """Several at once onto one output, with closed streams, other threads and an ASCII terminal: one file."""
    target = checkpoint.with_name("写真\udcff.pth")
    words = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", str(checkpoint)]
    words += ["--output_path", str(target), "--device", "cpu", "--overwrite"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    runs = []
    for threads in ("1", "2"):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": threads}
        runs.append(subprocess.Popen(words, env=environment, **streams))
        runs.append(subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], env=environment))
    errors = [process.communicate(timeout=600)[1] for process in runs]
    assert [process.returncode for process in runs] == [0] * 4
    assert set(errors) <= {b"", None}
    assert sorted(os.listdir(target.parent)) == sorted(["in.pth", target.name])
    whole = target.read_bytes()
    assert fuse(checkpoint, target, "--overwrite") == 0
    assert target.read_bytes() == whole, "the same input gives the same bytes"
