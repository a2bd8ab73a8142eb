"""What fuse_aether.py asks of the system, seen from outside with strace: no other program, no connection, no file but the output.

test_robustness.py watches many more hostile files from inside the interpreter; this is the same claim without trust in the interpreter.
"""

from __future__ import annotations

import builtins
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from conftest import ROOT, small_net
from safetensors.torch import save_file

CALLS = ["execve", "execveat", "fork", "vfork", "clone", "clone3", "socket", "connect", "ptrace", "open", "openat", "openat2", "creat", "truncate",
         "unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "link", "linkat", "symlink", "symlinkat", "mknod",
         "mknodat", "chmod", "fchmodat"]  # fmt: skip
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "9999", "-e", "trace=" + ",".join(f"?{call}" for call in CALLS)]


def can_trace() -> bool:
    return shutil.which("strace") is not None and subprocess.run([*STRACE, "-o", os.devnull, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_trace(), reason="needs strace (apt-get install strace), allowed to trace")


def deeds(folder: Path, *command: str) -> tuple[int, str, list[str]]:
    """Exit code and errors of a program that runs in ``folder``, and its system calls that could do harm elsewhere, failed ones too."""
    log, scratch = folder.with_name("strace.log"), folder.with_name("scratch")
    scratch.mkdir(exist_ok=True)  # PyTorch tries on import whether it can write to the folder for temporary files
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch.compile in another test puts it there, and PyTorch would look for that folder
    done = subprocess.run([*STRACE, "-o", str(log), *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
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
    if name.startswith("exec") or name == "ptrace" or re.search(r'(^|, )\d+, "[^/]', arguments):  # the last: relative to an open folder
        return False
    paths = [Path(os.path.normpath(folders[0] / path)) for path in re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)]
    return all(str(path) == os.devnull or any(folder in path.parents or folder == path for folder in folders) for path in paths)


class Call:
    """Pickles as a call of ``function`` on loading."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


PAYLOADS: dict[str, Callable[[Path], Call]] = {
    "os.system": lambda marker: Call(os.system, f"touch '{marker}'"),
    "subprocess": lambda marker: Call(subprocess.Popen, ["touch", str(marker)]),
    "exec": lambda marker: Call(builtins.exec, "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"),
    "write": lambda marker: Call(open, str(marker), "w"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def state() -> dict[str, torch.Tensor]:
    return small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().state_dict()


def fuse(folder: Path, source: str, target: str) -> tuple[int, str, list[str]]:
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", source, "--output_path", target, "--device", "cpu"]
    return deeds(folder, *command)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_trace_shows_a_payload_that_runs(folder: Path, payload: str) -> None:
    (folder / "in.pth").write_bytes(pickle.dumps(PAYLOADS[payload](folder.with_name("ran"))))
    _, _, seen = deeds(folder, sys.executable, "-c", "import pickle; pickle.load(open('in.pth', 'rb'))")
    expected = {"os.system": "execve", "subprocess": "execve", "exec": "connect", "write": "openat"}[payload]
    assert any(re.match(rf"\d+ +{expected}\(", call) for call in seen), seen


@pytest.mark.parametrize("layout", ["archive", "pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_starts_nothing_writes_nothing_and_calls_nobody(folder: Path, payload: str, layout: str) -> None:
    marker = folder.with_name("ran")
    content = {"params": state(), "more": PAYLOADS[payload](marker)}
    torch.save(content, folder / "in.pth", _use_new_zipfile_serialization=layout == "archive")
    code, error, seen = fuse(folder, "in.pth", "out.pth")
    assert (code, error.count("\n")) == (2, 1), error
    assert "asks to run code" in error
    assert not seen
    assert not marker.exists()
    assert [path.name for path in folder.iterdir()] == ["in.pth"]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_good_checkpoint_needs_no_more_than_its_output(folder: Path, ending: str) -> None:
    torch.save(state(), folder / "in.pth")
    save_file(state(), folder / "in.safetensors")
    code, error, seen = fuse(folder, f"in{ending}", f"out{ending}")
    assert (code, error) == (0, "")
    assert not seen
    assert sorted(path.name for path in folder.iterdir()) == ["in.pth", "in.safetensors", f"out{ending}"]
