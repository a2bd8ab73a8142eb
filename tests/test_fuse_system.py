"""The fuse command and the system: odd names, links, rights, full disks, several runs at once."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from checkpoints import STATE
from conftest import ROOT, AsNobody, one_line

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


NAMES = ["Модель ä 写真 😀", "space 'quotes' \"\"", "-leading", "a" * 237, "new\nline", "esc\x1b[31m\udcff"]


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


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_the_disk_does_not_take_is_an_error(checkpoint: Path, capfd: Any, length: int) -> None:
    folder, name = checkpoint.parent, "x" * length
    refused(capfd, folder / f"{name}.pth", folder / "out.pth")
    for target in (folder / f"{name}.pth", folder / name / "out.pth"):
        refused(capfd, checkpoint, target)
    assert os.listdir(folder) == ["in.pth"]


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "dangling", "device"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_no_file_is_refused_and_never_waited_for(
    checkpoint: Path, capfd: Any, kind: str, ending: str
) -> None:
    folder = checkpoint.parent
    model = folder / f"model{ending}"
    if kind == "folder":
        model.mkdir()
    elif kind == "fifo":
        os.mkfifo(model)
    else:
        model.symlink_to({"loop": model, "dangling": folder / "nothing", "device": "/dev/zero"}[kind])
    signal.alarm(60)  # a run that waits for ever ends the tests
    assert str(model) in refused(capfd, model, folder / "out.pth")
    if kind in ("fifo", "device"):
        for more in ((), ("--overwrite",)):
            assert "pipe or a device" in refused(capfd, checkpoint, model, *more)
            assert os.path.lexists(model)
    signal.alarm(0)
    assert sorted(os.listdir(folder)) == sorted(["in.pth", model.name])


def test_unreadable_files_and_read_only_folders_are_said(
    open_folder: Path, checkpoint: Path, capfd: Any
) -> None:
    assert fuse(checkpoint, checkpoint.with_name("warm.safetensors")) == 0  # late imports need rights too
    model, locked, closed = open_folder / "in.pth", open_folder / "locked", open_folder / "closed"
    secrets = [open_folder / f"secret{ending}" for ending in ENDINGS]
    for path in (model, *secrets):
        path.write_bytes(checkpoint.read_bytes())
    for path, mode in ((locked, 0o555), (closed, 0)):
        path.mkdir()
        path.chmod(mode)
    for path in secrets:
        path.chmod(0)
    with AsNobody():
        for secret in secrets:
            refused(capfd, secret, open_folder / "out.pth")
            assert "Permission denied" in refused(capfd, model, locked / f"out{secret.suffix}")
        for source, target in ((model, closed / "out.pth"), (closed / "in.pth", open_folder / "out.pth")):
            refused(capfd, source, target)
    assert not list(locked.iterdir())
    assert not list(open_folder.glob("out*"))


def test_a_link_as_output_is_replaced_and_what_it_points_to_stays(checkpoint: Path, capfd: Any) -> None:
    folder = checkpoint.parent
    (folder / "mine.txt").write_text("mine")
    for name, points_to in (("link.pth", folder / "mine.txt"), ("dangling.pth", folder / "nothing")):
        (folder / name).symlink_to(points_to)
        assert "--overwrite" in refused(capfd, checkpoint, folder / name)
        assert fuse(checkpoint, folder / name, "--overwrite") == 0
        assert not (folder / name).is_symlink()
    assert (folder / "mine.txt").read_text() == "mine"
    assert not (folder / "nothing").exists()


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(small_disk: Path, checkpoint: Path, capfd: Any) -> None:
    for ending in ENDINGS:
        assert "No space left" in refused(capfd, checkpoint, small_disk / f"out{ending}")
    assert os.listdir(small_disk) == []


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
        closed = lambda: [os.close(k) for k in range(3)]  # noqa: E731
        runs.append(subprocess.Popen(words, env=environment, preexec_fn=closed))
    errors = [process.communicate(timeout=120)[1] for process in runs]
    assert [process.returncode for process in runs] == [0] * 4
    assert set(errors) <= {b"", None}
    assert sorted(os.listdir(target.parent)) == sorted(["in.pth", target.name])
    whole = target.read_bytes()
    assert fuse(checkpoint, target, "--overwrite") == 0
    assert target.read_bytes() == whole, "the same input gives the same bytes"
