"""Atomic writing of one or several files, and checks of an output path before anything is computed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Dict, Iterable, List

from aethersr.errors import UserError

MASK = os.umask(0o022)  # the only way to read it
os.umask(MASK)


def check_output(path: Path, sources: Iterable[Path], overwrite: bool, flag: str) -> None:
    """Raise UserError if an output path, which ``flag`` passed, can't be written, is an input, or exists."""
    check_folder(path.parent, flag)
    check_file(path, sources, overwrite, flag)


def check_folder(folder: Path, flag: str) -> None:
    """Raise UserError if no file can be made in the folder."""
    if not os.path.isdir(folder):
        missing = f"the folder {folder} does not exist; make it or"
        found = f"{folder} is a file, where a folder is needed;" if os.path.lexists(folder) else missing
        raise UserError(f"{found} pass another {flag}.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error, flag) from None


def check_file(path: Path, sources: Iterable[Path], overwrite: bool, flag: str, others: str = "") -> None:
    """Raise UserError if the path is an input, exists, or is read-only. ``others``: other ways out."""
    there = os.path.exists(path)
    if there and any(os.path.exists(each) and os.path.samefile(path, each) for each in sources):
        found = "is the input itself, which is never overwritten; pass"
    elif os.path.isdir(path):
        found = "is a folder, expected a file name; pass"
    elif there and not os.path.isfile(path):
        found = "is a pipe or a device, expected a file name; pass"
    elif os.path.lexists(path) and not overwrite:  # not exists: a dangling link is there too
        found = f"exists; pass {others}--overwrite to replace it, or"
    elif there and not os.stat(path).st_mode & 0o222:  # replacing it would need the folder's rights alone
        found = "is read-only; make it writable, or pass"
    else:
        return
    raise UserError(f"{path} {found} another {flag}.")


def unwritable(path: Path, error: OSError, flag: str) -> UserError:
    """One line about what the system refused to write."""
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    remedy = f"free space or pass another {flag}" if full else f"pass another {flag}"
    return UserError(f"{path} can't be written: {error.strerror or error}; {remedy}.")


class Together:
    """Files that appear together or not at all. Until commit, and after a failure, existing files stay.

    SIGKILL between two moves can leave some files old and some new, but each one complete.
    """

    def __init__(self) -> None:
        self._parts: Dict[Path, Path] = {}
        self._kept: Dict[Path, Path] = {}  # by part: the old file, in case a later move fails

    def part(self, target: Path) -> Path:
        """A temporary name beside ``target``, with its ending, to write to."""
        target = Path(target)
        # Short, because a name longer than the target's may exceed the system's limit.
        unique = f"{os.getpid()}.{threading.get_ident()}.{len(self._parts)}"
        part = target.with_name(f"{target.stem[:40]}.{unique}.part{target.suffix}")
        self._parts[part] = target
        return part

    def commit(self) -> None:
        """Move every part to its target."""
        for part in self._parts:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.chmod(0o666 & ~MASK)  # safetensors writes files that only their owner may read
        moved: List[Path] = []
        try:
            for part, target in self._parts.items():
                if os.path.lexists(target):
                    self._kept[part] = part.with_name(f"{part.name}.old")
                    _keep(target, self._kept[part])
                moved.append(part)
                os.replace(part, target)
        except BaseException:
            for part in reversed(moved):
                if part in self._kept and not os.path.lexists(part):  # else this is the move that failed
                    os.replace(self._kept[part], self._parts[part])
                elif not os.path.lexists(part):
                    self._parts[part].unlink()
            raise
        self._tidy()

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._tidy()
        except KeyboardInterrupt:  # a second Ctrl+C must not leave temporary files either
            self._tidy()
            raise

    def _tidy(self) -> None:
        for path in (*self._parts, *self._kept.values()):
            path.unlink(missing_ok=True)


def _keep(path: Path, other: Path) -> None:
    """Give a file, or a link itself, a second name."""
    try:
        os.link(path, other, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not every file system has hard links
        shutil.copy2(path, other, follow_symlinks=False)
