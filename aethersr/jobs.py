"""The pictures to upscale, and the file that each becomes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from aethersr.errors import UserError, missing
from aethersr.files import check_file, check_folder
from aethersr.folders import FORMATS, KINDS, Held, pictures_in


class Job(NamedTuple):
    """A picture and the file that it becomes."""

    source: Path
    target: Path


def find_jobs(
    source: Path,
    output: str,
    recursive: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    ending: str = "",
) -> Tuple[List[Job], List[str], Dict[str, int]]:
    """The jobs, all checked; with ``skip_existing`` those alone whose target doesn't exist.

    And what folders.Held has: lines about pictures that can't be read, counts of what is no picture.

    ``ending``: of the files to write, such as ".png"; without it that of each picture or of ``output``.
    UserError: there is no picture, or a target can't be written.
    """
    target = Path(output)
    kind, is_folder = target.suffix.lower(), os.path.isdir(target)
    jobs, held = [Job(source, target)], Held([], [], {})
    # Not source.exists(): before Python 3.14 it raises for a name that is too long.
    if os.path.isdir(source):
        if os.path.isfile(target) or (kind in FORMATS and not is_folder):
            words = "is a file" if os.path.isfile(target) else "is a picture's name"
            raise UserError(f"{target} {words}, but {source} is a folder; pass a folder with --output.")
        held = pictures_in(source, "--input", recursive, target)
        jobs = [Job(path, target / path.relative_to(source)) for path in held.pictures]
    elif not os.path.isfile(source):
        words = missing(source, "is neither a file nor a folder")
        raise UserError(f"{source} {words}; pass a picture or a folder with --input.")
    elif is_folder or output.endswith(("/", os.sep)):
        jobs = [Job(source, target / source.name)]
    elif kind not in FORMATS:
        words = f"{target} ends in {target.suffix or 'nothing'!r}; expected one of {KINDS}, or a folder"
        raise UserError(f"{words}: {target}{os.sep} (--output).")
    elif ending and FORMATS[ending] != FORMATS[kind]:
        raise UserError(f"{target} contradicts --format {ending[1:]}; leave one of them out (--output).")
    else:
        ending = ""
        check_folder(target.parent, "--output")
    jobs = [Job(job.source, job.target.with_suffix(ending)) if ending else job for job in jobs]
    return _checked(jobs, overwrite, skip_existing), held.problems, held.others


def _checked(jobs: List[Job], overwrite: bool, skip_existing: bool) -> List[Job]:
    """Those that are to be done."""
    inputs = {_place(job.source): job.source for job in jobs}
    sources: Dict[str, Path] = {}
    others = "--skip-existing to go on with the others, " if len(jobs) > 1 else ""
    kept = []
    for job in jobs:
        other = sources.setdefault(_place(job.target), job.source)
        if other != job.source:
            remedy = "leave out --format, or rename one of them (--input)"
            raise UserError(f"{other} and {job.source} would both become {job.target}; {remedy}.")
        if skip_existing and os.path.lexists(job.target):
            continue
        check_file(job.target, [job.source], overwrite, "--output", others)
        other = inputs.get(_place(job.target), job.source)
        if other != job.source:
            raise UserError(f"{job.source} would replace {other}, an input too; pass another --output.")
        kept.append(job)
    for folder in {job.target.parent for job in kept}:
        while not os.path.lexists(folder):  # it is made later
            folder = folder.parent
        check_folder(folder, "--output")
    return kept


def _place(path: Path) -> str:
    """The same for every way to write one path; a link stays itself."""
    return os.path.join(os.path.realpath(path.parent), path.name)
