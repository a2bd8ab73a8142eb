"""Finds the pictures to upscale, the file that each becomes, and why other files are skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import List, NamedTuple, Set, Tuple

from aethersr.errors import UserError
from aethersr.files import check_output
from aethersr.picture import FORMATS

_KINDS = ", ".join(FORMATS)
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")  # skipped silently, like names that begin with a dot


class Job(NamedTuple):
    """A picture and the file that it becomes."""

    source: Path
    target: Path


def find_jobs(
    source: Path, target: Path, recursive: bool, overwrite: bool, skip_existing: bool
) -> Tuple[List[Job], List[str]]:
    """The jobs, all checked, and a line for every other file in the folder.

    With ``skip_existing``, jobs whose target exists are left out without a line.

    Raises:
        UserError: there is no picture, or a target can't be written.
    """
    # Not source.exists(): before Python 3.14 it raises for a name that is too long.
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist; pass a picture or a folder with --input.")
    if not (source.is_dir() or source.is_file()):
        raise UserError(f"{source} is neither a file nor a folder; pass a picture or a folder with --input.")
    skipped: List[str] = []
    if source.is_dir():
        if os.path.isfile(target):
            raise UserError(f"{target} is a file, but {source} is a folder; pass a folder with --output.")
        jobs, skipped = _pictures(source, target, recursive)
        if not jobs:
            raise UserError(f"{source} holds no picture; expected files that end in {_KINDS} (--input).")
        folder = target.parent
    else:
        jobs = [Job(source, target / source.name if os.path.isdir(target) else target)]
        name, ending = jobs[0].target, jobs[0].target.suffix
        if ending.lower() not in FORMATS:
            raise UserError(f"{name} ends in {ending or 'nothing'!r}; expected one of {_KINDS} (--output).")
        folder = name.parent
    if not os.path.isdir(folder):
        raise UserError(f"the folder {folder} does not exist; make it or pass another --output.")
    inputs = {_place(job.source): job.source for job in jobs}
    for job in jobs:
        if os.path.isdir(job.target.parent):  # else nothing can be there
            check_output(job.target, [job.source], overwrite or skip_existing, "--output")
            other = inputs.get(_place(job.target))
            if other and overwrite:
                raise UserError(f"{job.source} would replace {other}, an input too; pass another --output.")
    return [job for job in jobs if not (skip_existing and os.path.lexists(job.target))], skipped


def _place(path: Path) -> str:
    """The same for every way to write one path; a link stays itself."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _pictures(source: Path, target: Path, recursive: bool) -> Tuple[List[Job], List[str]]:
    jobs: List[Job] = []
    skipped: List[str] = []
    seen: Set[str] = {os.path.realpath(target)}  # an earlier run's results; a link may lead in a circle
    if os.path.realpath(source) in seen:
        seen.clear()
    links: List[Path] = []
    folders = [source]
    while folders or links:  # links last: what they lead to has its own place, if it lies in the folder too
        folder = folders.pop() if folders else links.pop()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            if folder == source:
                remedy = "pass another folder with --input"
                raise UserError(f"{source} can't be read: {error.strerror}; {remedy}.") from None
            skipped.append(f"{folder} can't be read: {error.strerror}.")
            continue
        inner = []
        for path in (folder / name for name in names):
            if os.path.isdir(path):
                inner.append(path)
            elif path.suffix.lower() not in FORMATS:
                if not (path.name.startswith(".") or path.name.lower() in _OF_THE_SYSTEM):
                    skipped.append(f"{path} ends in {path.suffix or 'nothing'!r}; expected one of {_KINDS}.")
            elif not os.path.isfile(path):
                kind = "neither a file nor a folder" if os.path.exists(path) else "a link to nothing, or gone"
                skipped.append(f"{path} is {kind}; expected a picture.")
            else:
                jobs.append(Job(path, target / path.relative_to(source)))
        if recursive:
            folders += [path for path in inner[::-1] if not path.is_symlink()]
            links += [path for path in inner[::-1] if path.is_symlink()]
        else:
            others = (path for path in inner if os.path.realpath(path) not in seen)
            skipped += [f"{path} is a folder; pass --recursive to upscale what it holds." for path in others]
    return jobs, skipped
