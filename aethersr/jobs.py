"""Finds the pictures to upscale, the file that each becomes, and why other files are skipped."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple

from aethersr.errors import UserError
from aethersr.files import check_file, check_folder
from aethersr.picture import FORMATS

_KINDS = ", ".join(FORMATS)


class Job(NamedTuple):
    """A picture and the file that it becomes."""

    source: Path
    target: Path


class Found(NamedTuple):
    jobs: List[Job]
    problems: List[str]  # a line for each picture that can't be read
    others: Dict[str, int]  # counts of what is left out, by its name


def find_jobs(
    source: Path,
    output: str,
    recursive: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    ending: str = "",
) -> Found:
    """The jobs, all checked; with ``skip_existing`` those alone whose target doesn't exist.

    ``ending``: of the files to write, such as ".png"; without it that of each picture or of ``output``.
    UserError: there is no picture, or a target can't be written.
    """
    target = Path(output)
    kind, is_folder = target.suffix.lower(), os.path.isdir(target)
    found, folder = Found([Job(source, target)], [], {}), target.parent
    # Not source.exists(): before Python 3.14 it raises for a name that is too long.
    if os.path.isdir(source):
        if os.path.isfile(target) or (kind in FORMATS and not is_folder):
            words = "is a file" if os.path.isfile(target) else "is a picture's name"
            raise UserError(f"{target} {words}, but {source} is a folder; pass a folder with --output.")
        found = _pictures(source, target, recursive)
        if not found.jobs:
            none = f"{source} holds no picture; expected files that end in {_KINDS} (--input)."
            raise UserError(found.problems[0] if found.problems else none)
    elif not os.path.isfile(source):
        words = "is neither a file nor a folder" if os.path.exists(source) else "does not exist"
        raise UserError(f"{source} {words}; pass a picture or a folder with --input.")
    elif is_folder or output.endswith(("/", os.sep)):
        found.jobs[:] = [Job(source, target / source.name)]
    elif kind not in FORMATS:
        words = f"{target} ends in {target.suffix or 'nothing'!r}; expected one of {_KINDS}, or a folder"
        raise UserError(f"{words}: {target}{os.sep} (--output).")
    elif ending and FORMATS[ending] != FORMATS[kind]:
        raise UserError(f"{target} contradicts --format {ending[1:]}; leave one of them out (--output).")
    else:
        ending = ""
    if not os.path.isdir(folder):
        raise UserError(f"the folder {folder} does not exist; make it or pass another --output.")
    jobs = [Job(job.source, job.target.with_suffix(ending)) if ending else job for job in found.jobs]
    _check_targets(jobs, overwrite, skip_existing)
    return found._replace(jobs=[job for job in jobs if not (skip_existing and os.path.lexists(job.target))])


def _check_targets(jobs: List[Job], overwrite: bool, skip_existing: bool) -> None:
    inputs = {_place(job.source): job.source for job in jobs}
    sources: Dict[str, Path] = {}
    for job in jobs:
        other = sources.setdefault(_place(job.target), job.source)
        if other != job.source:
            remedy = "leave out --format, or rename one of them (--input)"
            raise UserError(f"{other} and {job.source} would both become {job.target}; {remedy}.")
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
    found = Found([], [], Counter())
    seen = {os.path.realpath(target)} - {os.path.realpath(source)}  # an earlier run's results
    roots = [source]

    def failed(error: OSError) -> None:
        found.problems.append(f"{error.filename} can't be read: {error.strerror}; pass another --input.")

    while roots:  # links last: what they lead to has its own place, if it lies in the folder too
        for name, inner, names in os.walk(roots.pop(0), onerror=failed):
            folder, place = Path(name), os.path.realpath(name)
            inner.sort()
            if place in seen:  # a link may lead in a circle
                inner.clear()
                continue
            seen.add(place)
            for path in (folder / each for each in sorted(names) if not each.startswith("._")):  # macOS'
                if path.suffix.lower() not in FORMATS:
                    of_system = path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini")
                    found.others["files that are no pictures"] += not of_system
                elif not os.path.isfile(path):
                    kind = (
                        "neither a file nor a folder"
                        if os.path.exists(path)
                        else "a link to nothing, or gone"
                    )
                    found.problems.append(f"{path} is {kind}; expected a picture (--input).")
                else:
                    found.jobs.append(Job(path, target / path.relative_to(source)))
            inner_folders = [folder / each for each in inner if os.path.realpath(folder / each) not in seen]
            if recursive:
                roots += [path for path in inner_folders if path.is_symlink()]
            else:
                found.others["folders, without --recursive"] += len(inner_folders)
                inner.clear()
    return found._replace(others={name: count for name, count in found.others.items() if count})
