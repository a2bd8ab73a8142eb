"""Finds the pictures to upscale, the file that each becomes, and why other files are skipped."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Set

from aethersr.errors import UserError
from aethersr.files import check_file, check_folder
from aethersr.picture import FORMATS

_KINDS = ", ".join(FORMATS)
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")  # like names that begin with a dot, not worth a word


class Job(NamedTuple):
    """A picture and the file that it becomes."""

    source: Path
    target: Path


class Found(NamedTuple):
    """What is to do; a line for each picture that can't be read; counts of what is left out, by its name."""

    jobs: List[Job]
    problems: List[str]
    others: Dict[str, int]


def find_jobs(
    source: Path,
    output: str,
    recursive: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    ending: str = "",
) -> Found:
    """The jobs, all checked.

    With ``skip_existing``, jobs whose target exists are left out without a word. ``ending``: of the files to
    write, such as ".png"; without it that of each picture or of ``output``.

    Raises:
        UserError: there is no picture, or a target can't be written.
    """
    target = Path(output)
    # Not source.exists(): before Python 3.14 it raises for a name that is too long.
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist; pass a picture or a folder with --input.")
    if not (os.path.isdir(source) or os.path.isfile(source)):
        raise UserError(f"{source} is neither a file nor a folder; pass a picture or a folder with --input.")
    found, folder = Found([Job(source, target)], [], {}), target.parent
    if os.path.isdir(source):
        if os.path.isfile(target) or (target.suffix.lower() in FORMATS and not os.path.isdir(target)):
            kind = "is a file" if os.path.isfile(target) else "is a picture's name"
            raise UserError(f"{target} {kind}, but {source} is a folder; pass a folder with --output.")
        found = _pictures(source, target, recursive)
        if not found.jobs:
            raise UserError(f"{source} holds no picture; expected files that end in {_KINDS} (--input).")
    elif os.path.isdir(target) or output.endswith(("/", os.sep)):
        found.jobs[:] = [Job(source, target / source.name)]
    elif target.suffix.lower() not in FORMATS:
        words = f"{target} ends in {target.suffix or 'nothing'!r}; expected one of {_KINDS}, or a folder"
        raise UserError(f"{words}: {target}{os.sep} (--output).")
    elif ending and FORMATS[ending] != FORMATS[target.suffix.lower()]:
        raise UserError(f"{target} contradicts --format {ending[1:]}; leave one of them out (--output).")
    else:
        ending = ""
    if not os.path.isdir(folder):
        raise UserError(f"the folder {folder} does not exist; make it or pass another --output.")
    jobs = [Job(job.source, job.target.with_suffix(ending)) if ending else job for job in found.jobs]
    _check_targets(jobs, overwrite, skip_existing)
    todo = [job for job in jobs if not (skip_existing and os.path.lexists(job.target))]
    return found._replace(jobs=todo)


def _check_targets(jobs: List[Job], overwrite: bool, skip_existing: bool) -> None:
    inputs = {_place(job.source): job.source for job in jobs}
    sources: Dict[str, Path] = {}
    for job in jobs:
        other = sources.setdefault(_place(job.target), job.source)
        if other != job.source:
            remedy = "leave out --format, or rename one of them (--input)"
            raise UserError(f"{other} and {job.source} would both become {job.target}; {remedy}.")
        if os.path.isdir(job.target.parent):  # else nothing can be there
            check_file(job.target, [job.source], True, "--output")
            if os.path.lexists(job.target) and not (overwrite or skip_existing):
                remedy = "--skip-existing to go on with the others, " if len(jobs) > 1 else ""
                remedy += "--overwrite to replace it, or another --output"
                raise UserError(f"{job.target} exists; pass {remedy}.")
            other = inputs.get(_place(job.target), job.source)
            if other != job.source and overwrite:
                raise UserError(f"{job.source} would replace {other}, an input too; pass another --output.")
    for folder in {job.target.parent for job in jobs}:
        while not os.path.lexists(folder):  # it is made later
            folder = folder.parent
        check_folder(folder, "--output")


def _place(path: Path) -> str:
    """The same for every way to write one path; a link stays itself."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _pictures(source: Path, target: Path, recursive: bool) -> Found:
    jobs: List[Job] = []
    problems: List[str] = []
    others: Dict[str, int] = Counter()
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
            problems.append(f"{folder} can't be read: {error.strerror}.")
            continue
        inner = []
        for path in (folder / name for name in names):
            if os.path.isdir(path):
                inner.append(path)
            elif path.suffix.lower() not in FORMATS:
                if not (path.name.startswith(".") or path.name.lower() in _OF_THE_SYSTEM):
                    others["files that are no pictures"] += 1
            elif not os.path.isfile(path):
                kind = "neither a file nor a folder" if os.path.exists(path) else "a link to nothing, or gone"
                problems.append(f"{path} is {kind}; expected a picture (--input).")
            else:
                jobs.append(Job(path, target / path.relative_to(source)))
        if recursive:
            folders += [path for path in inner[::-1] if not path.is_symlink()]
            links += [path for path in inner[::-1] if path.is_symlink()]
        else:
            others["folders, without --recursive"] += sum(
                os.path.realpath(path) not in seen for path in inner
            )
    return Found(jobs, problems, {name: count for name, count in others.items() if count})
