"""Whatever happens around a run: odd paths, full disks, kills at any line and byte, several runs at once. The output is absent or whole.

A run that is to be killed is a fork of a small server that has imported PyTorch once (multiprocessing's forkserver): 0.1 seconds instead of 3.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image

import fuse_aether
import upscale

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
ENDINGS = (".pth", ".safetensors")
MAINS = {"fuse_aether.py": fuse_aether.main, "upscale.py": upscale.main}
fuse_aether.milliseconds = lambda *arguments: [1.0, 1.0]  # type: ignore[assignment]  # takes most of a run and is not looked at here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"params": small_net(2, **TINY).float().state_dict()}, tmp_path / "in.pth")
    return tmp_path / "in.pth"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def fuse(source: Any, target: Any, *more: str) -> int:
    return fuse_aether.main(["--model_path", str(source), "--output_path", str(target), "--device", "cpu", *more])


def upscaled(model: Any, source: Any, target: Any, *more: str) -> int:
    return upscale.main(["--model", str(model), "--input", str(source), "--output", str(target), "--device", "cpu", *more])


def one_line(capfd: Any, program: str = "fuse_aether.py") -> str:
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith(f"{program}: error: ")
    assert error[:-1].isprintable(), ascii(error)
    assert "--" in error, "no remedy"
    return error


# ----------------------------------------------------------------------------------------------------------------- paths


NAMES = ["Модель ä 写真 😀", "space 'quotes' \"\"", "-leading", "a" * 237, "é" * 100, "dots.in", "new\nline", "esc\x1b[31m", "bytes\udcff\udc80"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_the_disk_takes_is_read_and_written(checkpoint: Path, capfd: Any, name: str, ending: str) -> None:
    if ending == ".safetensors" and "\udcff" in name:
        pytest.skip("the safetensors library takes no path that is not Unicode")
    folder = checkpoint.parent / name
    folder.mkdir()
    source, target = folder / f"{name}.pth", folder / f"{name[1:]}{ending}"
    checkpoint.rename(source)
    assert fuse(source, target) == 0, capfd.readouterr().err
    assert sorted(os.listdir(folder)) == sorted([source.name, target.name])
    assert fuse(target, folder / "again.pth") == 2  # read back, and refused as fused already
    assert "fused already" in one_line(capfd)


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_the_disk_does_not_take_is_an_error(checkpoint: Path, picture: Path, capfd: Any, length: int) -> None:
    folder, name = checkpoint.parent, "x" * length
    assert fuse(folder / f"{name}.pth", folder / "out.pth") == 2
    one_line(capfd)
    assert fuse(checkpoint, folder / f"{name}.pth") == 2
    one_line(capfd)
    assert fuse(checkpoint, folder / name / "out.pth") == 2
    one_line(capfd)
    for arguments in ((folder / f"{name}.pth", picture, folder / "out.png"), (folder / f"{name}.onnx", picture, folder / "out.png"),
                      (checkpoint, folder / f"{name}.png", folder / "out.png"), (checkpoint, picture, folder / f"{name}.png")):  # fmt: skip
        assert upscaled(*arguments) == 2
        one_line(capfd, "upscale.py")
    assert sorted(os.listdir(folder)) == ["in.png", "in.pth"]


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "loop", "dangling", "device"])
@pytest.mark.parametrize("ending", [*ENDINGS, ".onnx"])
def test_what_is_no_file_is_refused_and_never_waited_for(checkpoint: Path, picture: Path, capfd: Any, kind: str, ending: str) -> None:
    folder = checkpoint.parent

    def make(path: Path) -> Path:
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            import socket

            with socket.socket(socket.AF_UNIX) as server:
                old = os.getcwd()
                os.chdir(path.parent)  # the system allows about 100 characters
                server.bind(path.name)
                os.chdir(old)
        else:
            path.symlink_to({"loop": path, "dangling": folder / "nothing", "device": "/dev/zero"}[kind])
        return path

    model = make(folder / f"model{ending}")
    signal.alarm(20)  # a run that waits for ever ends the tests
    if ending != ".onnx":
        assert fuse(model, folder / "out.pth") == 2
        one_line(capfd)
    assert upscaled(model, picture, folder / "out.png") == 2
    assert str(model) in one_line(capfd, "upscale.py")
    source = make(folder / "source.png")
    assert upscaled(checkpoint, source, folder / "out.png") == 2
    assert str(source) in one_line(capfd, "upscale.py")
    signal.alarm(0)
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_pipe_or_a_device_as_output_is_refused_stays_and_is_never_waited_for(checkpoint: Path, picture: Path, capfd: Any, kind: str) -> None:
    folder = checkpoint.parent
    targets = [folder / f"out{ending}" for ending in (*ENDINGS, ".png")]
    for target in targets:
        os.mkfifo(target) if kind == "fifo" else target.symlink_to(os.devnull)
    signal.alarm(20)  # a run that waits for ever ends the tests
    for more in ((), ("--overwrite",)):
        for target in targets[:2]:
            assert fuse(checkpoint, target, *more) == 2
            assert "pipe or a device" in one_line(capfd)
        assert upscaled(checkpoint, picture, targets[2], *more) == 2
        assert "pipe or a device" in one_line(capfd, "upscale.py")
    signal.alarm(0)
    assert not any(target.is_file() for target in targets)
    assert sorted(os.listdir(folder)) == sorted(["in.png", "in.pth", *(target.name for target in targets)])


class _AsNobody:
    """Inside, files are seen with the rights of another user than root, whom every permission is open to."""

    def __enter__(self) -> None:
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *_: Any) -> None:
        if self.root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's are the user's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_unreadable_files_and_read_only_folders_are_said(open_folder: Path, checkpoint: Path, picture: Path, capfd: Any) -> None:
    assert fuse(checkpoint, checkpoint.with_name("warm.safetensors")) == 0  # whatever is imported late is imported
    assert upscaled(checkpoint, picture, picture.with_name("warm.png")) == 0
    capfd.readouterr()
    model, source = open_folder / "in.pth", open_folder / "in.png"
    model.write_bytes(checkpoint.read_bytes())
    source.write_bytes(picture.read_bytes())
    locked, closed = open_folder / "locked", open_folder / "closed"
    locked.mkdir()
    closed.mkdir()
    for name in ("secret.pth", "secret.safetensors", "secret.onnx", "secret.png"):
        (open_folder / name).write_bytes(model.read_bytes())
        (open_folder / name).chmod(0)
    locked.chmod(0o555)
    closed.chmod(0)
    with _AsNobody():
        for name in ("secret.pth", "secret.safetensors"):
            assert fuse(open_folder / name, open_folder / "out.pth") == 2
            one_line(capfd)
        for name in ("secret.pth", "secret.onnx"):
            assert upscaled(open_folder / name, source, open_folder / "out.png") == 2
            one_line(capfd, "upscale.py")
        assert upscaled(model, open_folder / "secret.png", open_folder / "out.png") == 2
        one_line(capfd, "upscale.py")
        for ending in ENDINGS:
            assert fuse(model, locked / f"out{ending}") == 2
            assert "Permission denied" in one_line(capfd)
        assert upscaled(model, source, locked / "out.png") == 2
        assert "Permission denied" in one_line(capfd, "upscale.py")
        assert upscaled(model, open_folder, locked / "folder") == 2
        assert "Permission denied" in one_line(capfd, "upscale.py")
        for target in (closed / "out.pth",):
            assert fuse(model, target) == 2
            one_line(capfd)
            assert fuse(closed / "in.pth", open_folder / "out.pth") == 2
            one_line(capfd)
        assert upscaled(model, closed, open_folder / "folder") == 2
        one_line(capfd, "upscale.py")
        assert upscaled(model, closed / "in.png", open_folder / "out.png") == 2
        one_line(capfd, "upscale.py")
    assert not list(locked.iterdir())
    assert not list(open_folder.glob("out*"))


def test_a_link_as_output_is_replaced_and_what_it_points_to_stays(checkpoint: Path, capfd: Any) -> None:
    folder = checkpoint.parent
    (folder / "mine.txt").write_text("mine")
    for name, points_to in (("link.pth", folder / "mine.txt"), ("dangling.pth", folder / "nothing")):
        (folder / name).symlink_to(points_to)
        assert fuse(checkpoint, folder / name) == 2
        assert "--overwrite" in one_line(capfd)
        assert fuse(checkpoint, folder / name, "--overwrite") == 0
        assert not (folder / name).is_symlink()
    assert (folder / "mine.txt").read_text() == "mine"
    assert not (folder / "nothing").exists()


def test_a_link_or_a_second_name_of_the_input_is_the_input(checkpoint: Path, picture: Path, capfd: Any) -> None:
    content = checkpoint.read_bytes()
    os.link(checkpoint, checkpoint.with_name("second.pth"))
    checkpoint.with_name("folder").symlink_to(checkpoint.parent)
    os.link(picture, picture.with_name("second.png"))
    for name in ("second.pth", "folder/in.pth", "folder/second.pth"):
        assert fuse(checkpoint, checkpoint.parent / name, "--overwrite") == 2
        assert "input itself" in one_line(capfd)
    assert upscaled(checkpoint, picture, picture.with_name("second.png"), "--overwrite") == 2
    assert "input itself" in one_line(capfd, "upscale.py")
    assert checkpoint.read_bytes() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error_before_anything_is_read(tmp_path: Path, capfd: Any) -> None:
    assert fuse_aether.main(["--model_path", "no.pth", "--output_path", "out.pth", "--device", "cuda"]) == 2
    assert "--device cpu" in one_line(capfd)
    assert upscale.main(["--model", "no.pth", "--input", "no.png", "--output", "out.png", "--device", "cuda"]) == 2
    assert "--device cpu" in one_line(capfd, "upscale.py")


# ------------------------------------------------------------------------------------------------------------------ disks


@pytest.mark.parametrize("room", [2000, 20_000, 30_000])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_that_fills_up_at_any_byte_leaves_nothing(checkpoint: Path, capfd: Any, ending: str, room: int) -> None:
    """A limit to the size of files stands for the disk: writing fails at the same byte, in C code too."""
    target = checkpoint.with_name(f"out{ending}")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        code = fuse(checkpoint, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 2
    assert str(target) in one_line(capfd)
    assert os.listdir(checkpoint.parent) == ["in.pth"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(small_disk: Path, checkpoint: Path, picture: Path, capfd: Any) -> None:
    for ending in ENDINGS:
        assert fuse(checkpoint, small_disk / f"out{ending}") == 2
        assert "No space left" in one_line(capfd)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(picture)
    assert upscaled(checkpoint, picture, small_disk / "out.bmp") == 2
    assert "No space left" in one_line(capfd, "upscale.py")
    assert os.listdir(small_disk) == []


# ---------------------------------------------------------------------------------------------------------- own processes


def _lines_of(*functions: Any) -> Any:
    return {function.__code__ for function in functions}


def _child(program: str, arguments: List[str], stop: Optional[str], number: int, threads: int, log: str) -> None:
    """One run in a process of its own; ``stop`` names a signal at the ``number``-th line, or "byte" a kill when that many are written."""
    torch.set_num_threads(threads)
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code not in codes:
            return None
        if event == "line":
            lines += 1
            if lines == number and stop is not None:
                os.kill(os.getpid(), getattr(signal, stop))
        return trace

    codes = _lines_of(fuse_aether.fuse, fuse_aether.write_state, upscale.upscale_file, upscale.upscale)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if stop == "byte":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif stop == "closed":
        for k in range(3):
            os.close(k)
        sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as the interpreter starts then
    elif stop == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        sys.settrace(trace)
    code = MAINS[program](arguments)
    sys.settrace(None)
    if stop is None and number:
        Path(log).write_text(str(lines))
    os._exit(code)


@pytest.fixture(scope="module")
def server() -> Any:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "archs"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("AETHER_FORK_SERVER", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_interruption"])
        yield context


class Runs:
    def __init__(self, context: Any, log: Path) -> None:
        self.context, self.log = context, log

    def start(self, program: str, *arguments: Any, stop: Optional[str] = None, number: int = 0, threads: int = 1) -> Any:
        self.log.unlink(missing_ok=True)
        words = [*map(str, arguments), "--device", "cpu", "--overwrite"]
        process = self.context.Process(target=_child, args=(program, words, stop, number, threads, str(self.log)))
        process.start()
        return process

    def __call__(self, *arguments: Any, **options: Any) -> int:
        process = self.start(*arguments, **options)
        process.join(60)
        return process.exitcode


@pytest.fixture
def run(server: Any, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path.with_name(tmp_path.name + ".log"))


def commands(checkpoint: Path, picture: Path) -> Dict[str, List[Any]]:
    folder = checkpoint.parent
    return {
        "fuse_aether.py": ["--model_path", checkpoint, "--output_path", folder / "out.pth"],
        "upscale.py": ["--model", checkpoint, "--input", picture, "--output", folder / "out.png"],
    }


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("program", MAINS)
def test_a_kill_at_any_line_leaves_the_old_output_or_a_whole_new_one(run: Runs, checkpoint: Path, picture: Path, program: str, stop: str) -> None:
    """No process can tidy up after SIGKILL: then a temporary file, named as such, may stay. After the others nothing does."""
    command, folder = commands(checkpoint, picture)[program], checkpoint.parent
    target = command[-1]
    assert run(program, *command, number=10**9) == 0
    whole, lines = target.read_bytes(), int(run.log.read_text())
    assert lines > 15
    inputs = {path: path.read_bytes() for path in (checkpoint, picture)}
    seen = set()
    for number in range(1, lines + 1, 2 if stop == "SIGKILL" else 3):
        target.write_text("old")
        code = run(program, *command, stop=stop, number=number)
        assert code in (-getattr(signal, stop), 130, 0), (code, run.log.read_text())
        if stop != "SIGKILL":
            assert code == 130, f"line {number}: a run that could tidy up ended with {code}"
            assert run.log.read_text().count("\n") == 1
        seen.add(target.read_bytes())
        left = {path.name for path in folder.iterdir()} - {"in.pth", "in.png", target.name}
        if stop == "SIGKILL":
            assert all(".part" in name for name in left)
            for name in left:
                (folder / name).unlink()
        else:
            assert not left, f"line {number}: {left}"
        assert {path: path.read_bytes() for path in inputs} == inputs
    assert seen == {b"old", whole}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_kill_at_any_byte_that_is_written_leaves_no_output(run: Runs, checkpoint: Path, ending: str) -> None:
    target = checkpoint.with_name(f"out{ending}")
    for number in (1, 64, 5000, 30_000):
        assert run("fuse_aether.py", "--model_path", checkpoint, "--output_path", target, stop="byte", number=number) == -signal.SIGXFSZ
        assert not target.exists()
        for path in checkpoint.parent.glob("*.part*"):
            assert path.stat().st_size <= number
            path.unlink()


@pytest.mark.parametrize("program", MAINS)
def test_runs_at_once_onto_one_output_leave_one_whole_output(run: Runs, checkpoint: Path, picture: Path, program: str) -> None:
    command = commands(checkpoint, picture)[program]
    assert run(program, *command) == 0
    whole = command[-1].read_bytes()
    command[-1].unlink()
    processes = [run.start(program, *command) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert command[-1].read_bytes() == whole
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == sorted(["in.pth", "in.png", command[-1].name])


@pytest.mark.parametrize("program", MAINS)
def test_the_same_input_gives_the_same_bytes_in_any_run_with_any_threads(run: Runs, checkpoint: Path, picture: Path, program: str) -> None:
    command, contents = commands(checkpoint, picture)[program], {}
    for ending in ENDINGS if program == "fuse_aether.py" else (".png", ".webp", ".jpg", ".tif"):
        for threads in (1, 2, 1):
            target = command[-1].with_suffix(ending)
            assert run(program, *command[:-1], target, threads=threads) == 0
            contents.setdefault(ending, set()).add(target.read_bytes())
    assert {ending: len(kinds) for ending, kinds in contents.items()} == dict.fromkeys(contents, 1)


@pytest.mark.parametrize("program", MAINS)
def test_closed_streams_do_not_matter(run: Runs, checkpoint: Path, picture: Path, program: str) -> None:
    command = commands(checkpoint, picture)[program]
    assert run(program, *command, stop="closed") == 0
    assert command[-1].exists()


def test_an_output_that_appears_while_the_run_works_is_not_overwritten_unasked(checkpoint: Path, capfd: Any, monkeypatch: Any) -> None:
    target = checkpoint.with_name("out.pth")
    monkeypatch.setattr(fuse_aether, "count_operations", lambda net: target.write_text("mine") and (1, 1))
    assert fuse(checkpoint, target) == 2
    assert "--overwrite" in one_line(capfd)
    assert target.read_text() == "mine"
    assert sorted(os.listdir(checkpoint.parent)) == ["in.pth", "out.pth"]


def test_a_terminal_that_lacks_a_letter_does_not_matter(checkpoint: Path) -> None:
    """As a process: a path beyond the encoding, no standard input, and the reader of the output gone. The only slow start in this file."""
    target = checkpoint.with_name("写真\udcff.pth")
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", str(checkpoint), "--output_path", str(target), "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert target.exists()
    assert stat.S_ISREG(target.stat().st_mode)


def _warm_up() -> None:
    """What PyTorch imports and prepares in the first run, once for all forks; with one thread, since threads do not survive a fork."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(small_net(2, **TINY).float().state_dict(), folder / "in.pth")
        Image.fromarray(np.zeros((9, 11, 3), np.uint8)).save(folder / "in.png")
        for ending in ENDINGS:
            fuse(folder / "in.pth", folder / f"out{ending}")
        upscaled(folder / "in.pth", folder / "in.png", folder / "out.png")


if os.environ.get("AETHER_FORK_SERVER") and __name__ == "test_interruption" and "pytest" not in sys.argv[0]:
    _warm_up()
