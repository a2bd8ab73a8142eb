"""The fuse command and the system: odd names, full disks, kills at any line and byte, several runs at once.

The output is absent or whole. A run that is to be killed is a fork of a small server that has imported
PyTorch once (multiprocessing's forkserver): 0.1 seconds instead of 3. What the command asks of the system is
seen with strace: no other program, no connection, no file but the output.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
import torch
from conftest import ROOT, AsNobody, small_net
from safetensors.torch import save_file

from aethersr import checkpoint as checkpoint_files
from aethersr import files, verify
from aethersr.commands import fuse as command
from aethersr.timing import Comparison

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
ENDINGS = (".pth", ".safetensors")
# It takes most of a run and is not looked at here.
verify.compare_times = lambda *arguments: Comparison({"unfused": [2.0], "fused": [1.0]})  # type: ignore[assignment]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"params": small_net(2, **TINY).float().state_dict()}, tmp_path / "in.pth")
    return tmp_path / "in.pth"


def fuse(source: Any, target: Any, *more: str) -> int:
    return command.main(["--model_path", str(source), "--output_path", str(target), "--device", "cpu", *more])


def one_line(capfd: Any) -> str:
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("fuse_aether.py: error: ")
    assert error[:-1].isprintable(), ascii(error)
    assert "--" in error, "no remedy"
    return error


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
    assert fuse(target, folder / "again.pth") == 2  # read back, and refused as fused already
    assert "fused already" in one_line(capfd)


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_the_disk_does_not_take_is_an_error(checkpoint: Path, capfd: Any, length: int) -> None:
    folder, name = checkpoint.parent, "x" * length
    for source, target in (
        (folder / f"{name}.pth", folder / "out.pth"),
        (checkpoint, folder / f"{name}.pth"),
        (checkpoint, folder / name / "out.pth"),
    ):
        assert fuse(source, target) == 2
        one_line(capfd)
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
    assert fuse(model, folder / "out.pth") == 2
    assert str(model) in one_line(capfd)
    if kind in ("fifo", "device"):
        for more in ((), ("--overwrite",)):
            assert fuse(checkpoint, model, *more) == 2
            assert "pipe or a device" in one_line(capfd)
            assert os.path.lexists(model)
    signal.alarm(0)
    assert sorted(os.listdir(folder)) == sorted(["in.pth", model.name])


def test_unreadable_files_and_read_only_folders_are_said(
    open_folder: Path, checkpoint: Path, capfd: Any
) -> None:
    assert (
        fuse(checkpoint, checkpoint.with_name("warm.safetensors")) == 0
    )  # whatever is imported late is imported
    capfd.readouterr()
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
            assert fuse(open_folder / f"secret{ending}", open_folder / "out.pth") == 2
            one_line(capfd)
            assert fuse(model, locked / f"out{ending}") == 2
            assert "Permission denied" in one_line(capfd)
        for source, target in ((model, closed / "out.pth"), (closed / "in.pth", open_folder / "out.pth")):
            assert fuse(source, target) == 2
            one_line(capfd)
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
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(small_disk: Path, checkpoint: Path, capfd: Any) -> None:
    for ending in ENDINGS:
        assert fuse(checkpoint, small_disk / f"out{ending}") == 2
        assert "No space left" in one_line(capfd)
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
    """No process can tidy up after SIGKILL: then a temporary file, named as such, may stay. After the others
    none does."""
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
    done = subprocess.run(
        [sys.executable, str(ROOT / "fuse_aether.py"), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert target.is_file()


def _warm_up() -> None:
    """What PyTorch prepares in the first run, once for all forks; with one thread: threads do not survive a
    fork."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(small_net(2, **TINY).float().state_dict(), folder / "in.pth")
        for ending in ENDINGS:
            fuse(folder / "in.pth", folder / f"out{ending}")


if os.environ.get("AETHER_FORK_SERVER") and __name__ == "test_fuse_system" and "pytest" not in sys.argv[0]:
    _warm_up()


# ----------------------------------------------------------------------------------------------- system calls


CALLS = [
    *("execve", "execveat", "fork", "vfork", "clone", "clone3", "socket"),
    *("connect", "ptrace", "open", "openat", "openat2", "creat", "truncate"),
    *("unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat"),
    *("rmdir", "link", "linkat", "symlink", "symlinkat", "mknod"),
    *("mknodat", "chmod", "fchmodat"),
]
STRACE = [
    "strace",
    "-f",
    "--seccomp-bpf",
    "-qq",
    "-s",
    "9999",
    "-e",
    "trace=" + ",".join(f"?{call}" for call in CALLS),
]


def can_trace() -> bool:
    return (
        shutil.which("strace") is not None
        and subprocess.run([*STRACE, "-o", os.devnull, "true"], capture_output=True).returncode == 0
    )


TRACED = pytest.mark.skipif(not can_trace(), reason="needs strace (apt-get install strace), allowed to trace")


def deeds(folder: Path, *command: str) -> Tuple[int, str, List[str]]:
    """Exit code and errors of a program that runs in ``folder``, and its system calls that could do harm
    elsewhere, failed ones too."""
    log, scratch = folder.with_name("strace.log"), folder.with_name("scratch")
    scratch.mkdir(
        exist_ok=True
    )  # PyTorch tries on import whether it can write to the folder for temporary files
    environment = {
        **os.environ,
        "TMPDIR": str(scratch),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop(
        "TORCHINDUCTOR_CACHE_DIR", None
    )  # torch.compile in another test puts it there, and PyTorch would look for that folder
    done = subprocess.run(
        [*STRACE, "-o", str(log), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    _, *calls = log.read_text(encoding="utf-8").splitlines()  # the first is strace's own start of the command
    return done.returncode, done.stderr, [call for call in calls if not harmless(call, folder, scratch)]


def harmless(line: str, *folders: Path) -> bool:
    call = re.match(r"\d+ +(\w+)\((.*)", line)
    if not call:  # the end of a call that stands further up, or of a process
        return True
    name, arguments = call.groups()
    if name.startswith("open") and not re.search("O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)", arguments):
        return True
    if name.startswith(("clone", "fork", "vfork")):
        return "CLONE_THREAD" in arguments
    if name in ("socket", "connect"):  # glibc asks for the user's name on this machine
        return re.search("AF_(UNIX|LOCAL)", arguments) is not None
    if (
        name.startswith("exec") or name == "ptrace" or re.search(r'(^|, )\d+, "[^/]', arguments)
    ):  # the last: relative to an open folder
        return False
    paths = [
        Path(os.path.normpath(folders[0] / path)) for path in re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    ]
    return all(
        str(path) == os.devnull or any(folder in path.parents or folder == path for folder in folders)
        for path in paths
    )


class Call:
    """Pickles as a call of ``function`` on loading."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


PAYLOADS: Dict[str, Callable[[Path], Call]] = {
    "os.system": lambda marker: Call(os.system, f"touch '{marker}'"),
    "subprocess": lambda marker: Call(subprocess.Popen, ["touch", str(marker)]),
    "exec": lambda marker: Call(builtins.exec, "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"),
    "write": lambda marker: Call(open, str(marker), "w"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def state() -> Dict[str, torch.Tensor]:
    return small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().state_dict()


def traced(folder: Path, source: str, target: str) -> Tuple[int, str, List[str]]:
    command = [
        sys.executable,
        str(ROOT / "fuse_aether.py"),
        "--model_path",
        source,
        "--output_path",
        target,
        "--device",
        "cpu",
    ]
    return deeds(folder, *command)


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_trace_shows_a_payload_that_runs(folder: Path, payload: str) -> None:
    (folder / "in.pth").write_bytes(pickle.dumps(PAYLOADS[payload](folder.with_name("ran"))))
    _, _, seen = deeds(folder, sys.executable, "-c", "import pickle; pickle.load(open('in.pth', 'rb'))")
    expected = {"os.system": "execve", "subprocess": "execve", "exec": "connect", "write": "openat"}[payload]
    assert any(re.match(rf"\d+ +{expected}\(", call) for call in seen), seen


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("layout", ["archive", "pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_starts_nothing_writes_nothing_and_calls_nobody(
    folder: Path, payload: str, layout: str
) -> None:
    marker = folder.with_name("ran")
    content = {"params": state(), "more": PAYLOADS[payload](marker)}
    torch.save(content, folder / "in.pth", _use_new_zipfile_serialization=layout == "archive")
    code, error, seen = traced(folder, "in.pth", "out.pth")
    assert (code, error.count("\n")) == (2, 1), error
    assert "asks to run code" in error
    assert not seen
    assert not marker.exists()
    assert [path.name for path in folder.iterdir()] == ["in.pth"]


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_good_checkpoint_needs_no_more_than_its_output(folder: Path, ending: str) -> None:
    torch.save(state(), folder / "in.pth")
    save_file(state(), folder / "in.safetensors")
    code, error, seen = traced(folder, f"in{ending}", f"out{ending}")
    assert (code, error) == (0, "")
    assert not seen
    assert sorted(path.name for path in folder.iterdir()) == ["in.pth", "in.safetensors", f"out{ending}"]
