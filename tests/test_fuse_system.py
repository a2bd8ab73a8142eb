"""The fuse command and the system: odd names, full disks, kills at any line and byte, several runs at once.

The output is absent or whole. A run that is to be killed is a fork of a small server that has imported
PyTorch once (multiprocessing's forkserver): 0.1 seconds instead of 3.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Optional

import pytest
import torch
from checkpoints import STATE
from conftest import ROOT, AsNobody, one_line

from aethersr import checkpoint as checkpoint_files
from aethersr import files
from aethersr.checkpoint import ENDINGS
from aethersr.commands import fuse as command

pytestmark = pytest.mark.usefixtures("one_thread", "no_timing")


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


# ------------------------------------------------------------------------------------------------------ paths


NAMES = [
    "Модель ä 写真 😀",
    "space 'quotes' \"\"",
    "-leading",
    "a" * 237,
    "é" * 100,
    "dots.in",
    "new\nline",
    "esc\x1b[31mbytes\udcff\udc80",
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_the_disk_takes_is_read_and_written(
    checkpoint: Path, capfd: Any, name: str, ending: str
) -> None:
    if ending == ".safetensors" and "\udcff" in name:
        pytest.skip("the safetensors library takes no path that is not Unicode")
    folder = checkpoint.parent / name
    folder.mkdir()
    source, target = folder / f"{name}.pth", folder / f"{name[1:]}{ending}"
    checkpoint.rename(source)
    assert fuse(source, target) == 0, capfd.readouterr().err
    assert sorted(os.listdir(folder)) == sorted([source.name, target.name])
    assert "fused already" in refused(capfd, target, folder / "again.pth")  # it was read back


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_the_disk_does_not_take_is_an_error(checkpoint: Path, capfd: Any, length: int) -> None:
    folder, name = checkpoint.parent, "x" * length
    for source, target in (
        (folder / f"{name}.pth", folder / "out.pth"),
        (checkpoint, folder / f"{name}.pth"),
        (checkpoint, folder / name / "out.pth"),
    ):
        refused(capfd, source, target)
    assert os.listdir(folder) == ["in.pth"]


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "loop", "dangling", "device"])
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
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            old = os.getcwd()
            os.chdir(folder)  # the system allows about 100 characters
            server.bind(model.name)
            os.chdir(old)
    else:
        model.symlink_to({"loop": model, "dangling": folder / "nothing", "device": "/dev/zero"}[kind])
    signal.alarm(20)  # a run that waits for ever ends the tests
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
    model.write_bytes(checkpoint.read_bytes())
    locked.mkdir()
    closed.mkdir()
    for ending in ENDINGS:
        (open_folder / f"secret{ending}").write_bytes(model.read_bytes())
        (open_folder / f"secret{ending}").chmod(0)
    locked.chmod(0o555)
    closed.chmod(0)
    with AsNobody():
        for ending in ENDINGS:
            refused(capfd, open_folder / f"secret{ending}", open_folder / "out.pth")
            assert "Permission denied" in refused(capfd, model, locked / f"out{ending}")
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


# ------------------------------------------------------------------------------------------------------ disks


@pytest.mark.parametrize("room", [2000, 20_000, 30_000])
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


# ---------------------------------------------------------------------------------------------- own processes


def _child(arguments: List[str], stop: Optional[str], number: int, threads: int, log: str) -> None:
    """One run in a process of its own.

    ``stop`` names a signal at the ``number``-th line, or "byte": a kill when that many are written.
    """
    torch.set_num_threads(threads)
    lines = 0
    functions = (command.fuse, checkpoint_files.write_state, files.Together.commit, files.Together._tidy)
    codes = {function.__code__ for function in functions}

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code not in codes:
            return None
        if event == "line":
            lines += 1
            if lines == number and stop is not None:
                os.kill(os.getpid(), getattr(signal, stop))
        return trace

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if stop == "byte":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif stop == "closed":
        for k in range(3):
            os.close(k)
        sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as the interpreter starts then
    else:
        sys.settrace(trace)
    code = command.main(arguments)
    sys.settrace(None)
    if stop is None and number:
        Path(log).write_text(str(lines))
    os._exit(code)


@pytest.fixture(scope="module")
def server() -> Any:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(ROOT / "tests"), str(ROOT / "archs"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("AETHER_FORK_SERVER", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_fuse_system"])
        yield context


class Runs:
    def __init__(self, context: Any, log: Path) -> None:
        self.context, self.log = context, log

    def start(self, *arguments: Any, stop: Optional[str] = None, number: int = 0, threads: int = 1) -> Any:
        self.log.unlink(missing_ok=True)
        words = [*map(str, arguments), "--device", "cpu", "--overwrite"]
        process = self.context.Process(target=_child, args=(words, stop, number, threads, str(self.log)))
        process.start()
        return process

    def __call__(self, *arguments: Any, **options: Any) -> int:
        process = self.start(*arguments, **options)
        process.join(60)
        return process.exitcode


@pytest.fixture
def run(server: Any, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path.with_name(tmp_path.name + ".log"))


@pytest.fixture
def words(checkpoint: Path) -> List[Any]:
    return ["--model_path", checkpoint, "--output_path", checkpoint.with_name("out.pth")]


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_kill_at_any_line_leaves_the_old_output_or_a_whole_new_one(
    run: Runs, words: List[Any], stop: str
) -> None:
    """No process can tidy up after SIGKILL: then a temporary file, named as such, may stay."""
    source, target = words[1], words[3]
    assert run(*words, number=10**9) == 0
    whole, lines, content = target.read_bytes(), int(run.log.read_text()), source.read_bytes()
    assert lines > 50
    seen = set()
    for number in range(1, lines + 1, 2):
        target.write_text("old")
        code = run(*words, stop=stop, number=number)
        expected = -signal.SIGKILL if stop == "SIGKILL" else 130
        assert code == expected, f"line {number}: {code}, {run.log.read_text()}"
        if stop != "SIGKILL":
            assert run.log.read_text() == "fuse_aether.py: stopped; nothing was written.\n"
        seen.add(target.read_bytes())
        left = {path.name for path in target.parent.iterdir()} - {"in.pth", target.name}
        assert all(".part" in name for name in left)
        assert stop == "SIGKILL" or not left, f"line {number}: {left}"
        for name in left:
            target.with_name(name).unlink()
        assert source.read_bytes() == content
    assert seen == {b"old", whole}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_kill_at_any_byte_that_is_written_leaves_no_output(
    run: Runs, checkpoint: Path, ending: str
) -> None:
    target = checkpoint.with_name(f"out{ending}")
    for number in (1, 64, 5000, 30_000):
        words = ["--model_path", checkpoint, "--output_path", target]
        assert run(*words, stop="byte", number=number) == -signal.SIGXFSZ
        assert not target.exists()
        for path in checkpoint.parent.glob("*.part*"):
            assert path.stat().st_size <= number
            path.unlink()


def test_runs_at_once_onto_one_output_leave_one_whole_output(run: Runs, words: List[Any]) -> None:
    target = words[3]
    assert run(*words) == 0
    whole = target.read_bytes()
    target.unlink()
    processes = [run.start(*words) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert target.read_bytes() == whole
    assert sorted(os.listdir(target.parent)) == ["in.pth", "out.pth"]


def test_the_same_input_gives_the_same_bytes_in_any_run_with_any_threads(run: Runs, words: List[Any]) -> None:
    for ending in ENDINGS:
        contents = set()
        for threads in (1, 2, 1):
            target = words[3].with_suffix(ending)
            assert run(*words[:3], target, threads=threads) == 0
            contents.add(target.read_bytes())
        assert len(contents) == 1


def test_closed_streams_do_not_matter(run: Runs, words: List[Any]) -> None:
    assert run(*words, stop="closed") == 0
    assert words[3].exists()


def test_a_terminal_that_lacks_a_letter_does_not_matter(checkpoint: Path) -> None:
    target = checkpoint.with_name("写真\udcff.pth")
    arguments = ["--model_path", str(checkpoint), "--output_path", str(target), "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "fuse_aether.py")]
    done = subprocess.run(
        [*program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert target.is_file()


def _warm_up() -> None:
    """What PyTorch prepares in the first run, once for all forks. One thread: none survives a fork."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(STATE, folder / "in.pth")
        for ending in ENDINGS:
            fuse(folder / "in.pth", folder / f"out{ending}")


if os.environ.get("AETHER_FORK_SERVER") and __name__ == "test_fuse_system" and "pytest" not in sys.argv[0]:
    _warm_up()
