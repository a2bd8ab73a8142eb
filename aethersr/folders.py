"""Which pictures a folder holds."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from aethersr.errors import UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".tif": "TIFF",
           ".tiff": "TIFF", ".bmp": "BMP", ".gif": "GIF", ".avif": "AVIF"}  # fmt: skip
KINDS = ", ".join(FORMATS)


class Held(NamedTuple):
    """What a folder holds. Hidden files and folders, and those of Windows, are no part of it."""

    pictures: List[Path]
    problems: List[str]  # a line for each picture that can't be read
    others: Dict[str, int]  # counts of what is no picture, by its name


def pictures_in(folder: Path, flag: str, recursive: bool = False, besides: Optional[Path] = None) -> Held:
    """The pictures in a folder, by name. Links to other folders aren't followed.

    ``besides``: a folder inside that is passed over, such as an earlier run's results.
    UserError, as are problems, with the folder's ``flag``: it is no folder, or holds no picture.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is not a folder; pass one with pictures.")
    held, results = Held([], [], Counter()), os.path.realpath(besides) if besides else ""

    def failed(error: OSError) -> None:
        held.problems.append(f"{error.filename} can't be read: {error.strerror}; pass another ({flag}).")

    for name, inner, files in os.walk(folder, onerror=failed):
        here = Path(name)
        for path in (here / each for each in sorted(files) if not each.startswith(".")):
            if path.suffix.lower() not in FORMATS:
                is_of_windows = path.name.lower() in ("thumbs.db", "desktop.ini")
                held.others["files that are no pictures"] += not is_of_windows
            elif os.path.isfile(path):
                held.pictures.append(path)
            else:
                is_there = os.path.exists(path)
                kind = "neither a file nor a folder" if is_there else "a link to nothing, or gone"
                held.problems.append(f"{path} is {kind}; expected a picture ({flag}).")
        visible = (here / each for each in sorted(inner) if not each.startswith("."))
        folders = [path for path in visible if os.path.realpath(path) != results]
        inner[:] = [path.name for path in folders if recursive and not path.is_symlink()]
        kind = "links to folders" if recursive else "folders, without --recursive"
        held.others[kind] += len(folders) - len(inner)
    if not held.pictures:
        none = f"{folder} holds no picture; expected files that end in {KINDS} ({flag})."
        raise UserError(held.problems[0] if held.problems else none)
    return held._replace(others={name: count for name, count in held.others.items() if count})


def find_pictures(path: Path, flag: str) -> List[Path]:
    """The same without the folders inside, or a picture's own path. UserError for one that can't be read."""
    if os.path.isfile(path):
        return [path]
    pictures, problems, _ = pictures_in(path, flag)
    if problems:
        raise UserError(problems[0])
    return pictures
