"""What the fuse command asks of the system, as strace sees it: no program, no connection, one file."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Tuple

import pytest
import torch
from checkpoints import STATE, Calls
from conftest import ROOT
from safetensors.torch import save_file

CALLS = (
    "execve execveat fork vfork clone clone3 socket connect ptrace open openat openat2 creat truncate unlink "
)
CALLS += (
    "unlinkat rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat mknod mknodat chmod"
)
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "9999", "-e"]
STRACE += ["trace=" + ",".join(f"?{call}" for call in CALLS.split())]


def can_trace() -> bool:
    words = [*STRACE, "-o", os.devnull, "true"]
    return bool(shutil.which("strace")) and not subprocess.run(words, capture_output=True).returncode


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_trace(), reason="needs strace (apt-get install strace), allowed to trace"),
]


def deeds(folder: Path, *command: str) -> Tuple[int, str, List[str]]:
    """Exit code and errors of a program that runs in ``folder``, and its system calls that could do harm."""
    log, scratch = folder.with_name("strace.log"), folder.with_name("scratch")
    scratch.mkdir(exist_ok=True)  # PyTorch tries on import whether it can write temporary files
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # PyTorch would look for it; torch.compile sets it
    words = [*STRACE, "-o", str(log), *command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
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
    relative = re.search(r'(^|, )\d+, "[^/]', arguments)  # to an open folder
    if name.startswith("exec") or name == "ptrace" or relative:
        return False
    found = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    paths = [Path(os.path.normpath(folders[0] / path)) for path in found]
    return all({path, *path.parents} & {*folders, Path(os.devnull)} for path in paths)


@pytest.mark.parametrize(
    ("expected", "payload"),
    [
        ("execve", Calls(os.system, "touch ../ran")),
        ("connect", Calls(exec, "import socket; socket.socket().connect_ex(('127.0.0.1', 9))")),
        ("openat", Calls(open, "../ran", "w")),
    ],
)
def test_a_payload_starts_nothing_writes_nothing_and_calls_nobody(
    tmp_path: Path, expected: str, payload: Any
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "in.pth").write_bytes(pickle.dumps(payload))
    _, _, seen = deeds(folder, sys.executable, "-c", "import pickle; pickle.load(open('in.pth', 'rb'))")
    assert any(re.match(rf"\d+ +{expected}\(", call) for call in seen), "the trace doesn't show it"
    (tmp_path / "ran").unlink(missing_ok=True)
    torch.save({"params": STATE, "more": payload}, folder / "in.pth")
    words = ["--model_path", "in.pth", "--output_path", "out.pth", "--device", "cpu"]
    code, error, seen = deeds(folder, sys.executable, str(ROOT / "fuse_aether.py"), *words)
    assert (code, error.count("\n"), seen) == (2, 1, [])
    assert not (tmp_path / "ran").exists()
    assert [path.name for path in folder.iterdir()] == ["in.pth"]


def test_a_good_checkpoint_needs_no_more_than_its_output(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(STATE, folder / "in.safetensors")
    words = ["--model_path", "in.safetensors", "--output_path", "out.safetensors", "--device", "cpu"]
    assert deeds(folder, sys.executable, str(ROOT / "fuse_aether.py"), *words) == (0, "", [])
    assert sorted(path.name for path in folder.iterdir()) == ["in.safetensors", "out.safetensors"]
