"""Make training pairs from free pictures in Debian packages or from your own pictures.

    python training/prepare_pictures.py FOLDER [--scale 2] [--textures]
    python training/prepare_pictures.py FOLDER --pictures MINE [--reductions 1 2]

Writes FOLDER/gt and FOLDER/lq (PNG pairs with the same names), FOLDER/sources.csv (where each is from) and,
for the packages, FOLDER/copyright. The packages need Debian or Ubuntu; those that aren't in FOLDER/packages
are downloaded there. Your own pictures (``--pictures``, with subfolders) stand on white where they are
transparent; one that can't be read is left out and named. Nothing that exists is changed or deleted.

A soft crop teaches nothing, because bicubic reproduces it. So pictures are first reduced to 1/2, 1/3, 1/4 and
1/6 (``--reductions``; 1 leaves them as they are), and only crops on which bicubic interpolation reaches 20 to
37 dB are kept. Low-resolution pictures are Pillow's bicubic reductions of whole pictures, cropped afterwards.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aethersr.commands import Parser, exit_code  # noqa: I001
import numpy as np
from PIL import Image
from tqdm import tqdm
from aethersr.errors import UserError
from aethersr.folders import KINDS, pictures_in
from aethersr.quality import read_rgb

# Their authors and licences; several require attribution.
WALLPAPERS = (
    "gnome-backgrounds",  # authors named in copyright/gnome-backgrounds; CC-BY-SA-3.0/4.0
    "lomiri-wallpapers-16.04",  # photographers named in the files' names; CC-BY-SA-3.0/4.0, CC-BY-4.0
    "lomiri-wallpapers-20.04",  # photographers named in the files' names; CC-BY-SA-4.0, CC-BY-4.0
    "mate-backgrounds",  # authors named in copyright/mate-backgrounds; GPL-2+, CC-BY-SA-4.0
    "plasma-workspace-wallpapers",  # KDE Visual Design Group and those it names; GPL-2+
    "ukui-wallpapers",  # Ubuntu Kylin community; CC-BY-SA-3.0
)
TEXTURES = (
    "supertuxkart-data",  # authors named in copyright/supertuxkart-data; CC-BY-SA, CC-BY, GPL, CC0
    "ufoai-textures",  # authors named in copyright/ufoai-textures; GPL-2+, CC-BY-SA, CC0
    "endless-sky-high-dpi",  # authors named in copyright/endless-sky-high-dpi; CC-BY-SA, CC-BY, GPL, CC0
)
# Directions and gloss of a surface; of Endless Sky all but its landscapes.
NO_PICTURE = re.compile(r"_(n|s|[gnrs]m|norm)\.\w+$|[Nn]ormal[^/]*$|/endless-sky/.*images/(?!land/)")
SHORTEST = 1000  # smaller ones are thumbnails of the same pictures
REDUCTIONS, OF_TEXTURES = (2, 3, 4, 6), (1.5, 2, 3)
SIZE = 192  # of a crop in high-resolution pixels
PER_PICTURE = 60
BICUBIC_DB = (20.0, 37.0)  # PSNR-Y of bicubic interpolation: below is noise, above nothing to learn
BICUBIC = Image.Resampling.BICUBIC


class Cut(NamedTuple):
    bicubic_db: float
    reduction: float
    gt: Image.Image
    lq: Image.Image


def unpack(names: Sequence[str], packages: Path, folder: Path) -> None:
    """Unpack each from ``packages`` into ``folder``/NAME; download those that are missing."""
    packages.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list(packages.glob(f"{name}_*.deb"))]
    if missing:
        command = ["apt-get", "download", *missing]
        if not shutil.which("apt-get") or subprocess.run(command, cwd=packages, check=False).returncode:
            text = f"apt-get could not download {', '.join(missing)}; put the .deb files into {packages}"
            raise UserError(f"{text}, or take your own pictures (--pictures).")
    for name in names:
        package = str(next(packages.glob(f"{name}_*.deb")))
        (folder / name).mkdir(parents=True)
        if subprocess.run(["dpkg-deb", "-x", package, str(folder / name)], check=False).returncode:
            raise UserError(f"{package} is damaged; remove it, and it is downloaded again (FOLDER).")
        for archive in (folder / name).rglob("*.pk3"):  # a game's files
            shutil.unpack_archive(archive, archive.with_suffix(""), "zip")


def pictures(folder: Path, shortest: int, packages: bool) -> List[Path]:
    """Every picture once: no links, and only the largest if a package has it in several sizes."""
    best: Dict[Path, Tuple[int, Path]] = {}
    for path in pictures_in(folder, "--pictures", recursive=True).pictures:
        if path.is_symlink() or (folder.name in TEXTURES and NO_PICTURE.search(path.as_posix())):
            continue
        try:
            with Image.open(path) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            best[path] = (0, path)  # cuts() fails on it, too
            continue
        key = path
        if packages:  # Plasma has a picture's sizes in one folder, others have the size in the name
            alone = not path.parent.name.startswith("images")
            key = path.with_name(re.sub(r"_\d+x\d+$", "", path.stem)) if alone else path.parent
        if min(width, height) >= shortest and width > best.get(key, (0, path))[0]:
            best[key] = (width, path)
    return [path for _, path in best.values()]


def cuts(path: Path, scale: int, reductions: Sequence[float]) -> List[Cut]:
    """At most PER_PICTURE crops of a picture: those on which bicubic interpolation does worst."""
    whole = Image.fromarray(read_rgb(path, "--pictures"))
    found = []
    for reduction in reductions:
        width, height = (int(side / reduction / scale) for side in whole.size)
        picture = whole.crop((0, 0, *(round(side * reduction * scale) for side in (width, height))))
        gt = picture.resize((width * scale, height * scale), BICUBIC)
        lq = gt.resize((width, height), BICUBIC)
        luma, bicubic = (np.asarray(x.convert("L"), float) for x in (gt, lq.resize(gt.size, BICUBIC)))
        error = (luma - bicubic) ** 2
        for top, left in itertools.product(*(range(0, side - SIZE + 1, SIZE) for side in error.shape)):
            decibels = 10 * np.log10(255**2 / max(error[top : top + SIZE, left : left + SIZE].mean(), 1e-9))
            if BICUBIC_DB[0] <= decibels <= BICUBIC_DB[1]:
                box: Any = (left, top, left + SIZE, top + SIZE)
                found.append(Cut(decibels, reduction, gt.crop(box), lq.crop(tuple(x // scale for x in box))))
    return sorted(found, key=lambda cut: cut.bicubic_db)[:PER_PICTURE]


def write_pairs(args: argparse.Namespace, pairs: Path, unpacked: Path) -> List[Tuple[str, ...]]:
    """Write into ``pairs`` what belongs in FOLDER, and return the rows of its sources.csv."""
    for sub in ("gt", "lq"):
        (pairs / sub).mkdir(parents=True)
    source, kinds = args.pictures or unpacked, {args.pictures: (SIZE, args.reductions)}
    if not args.pictures:
        kinds = {unpacked / name: (SHORTEST, args.reductions) for name in WALLPAPERS}
        kinds.update({unpacked / name: (2 * SIZE, OF_TEXTURES) for name in TEXTURES if args.textures})
        unpack([folder.name for folder in kinds], args.folder / "packages", unpacked)
        (pairs / "copyright").mkdir()
        for folder in kinds:
            shutil.copy(folder / f"usr/share/doc/{folder.name}/copyright", pairs / "copyright" / folder.name)
    found: Dict[Path, Sequence[float]] = {}
    for folder, (shortest, reductions) in kinds.items():
        found.update(dict.fromkeys(pictures(folder, shortest, not args.pictures), reductions))
    rows: List[Tuple[str, ...]] = []
    left_out = 0
    for path, reductions in tqdm(found.items(), unit="picture", disable=None):
        try:
            chosen = cuts(path, args.scale, reductions)
        except UserError as error:
            left_out += 1
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        for cut in chosen:
            name = f"{len(rows):05d}.png"
            cut.gt.save(pairs / "gt" / name, compress_level=1)
            cut.lq.save(pairs / "lq" / name, compress_level=1)
            rows.append((name, str(path.relative_to(source)), f"{cut.reduction:g}", f"{cut.bicubic_db:.2f}"))
    if len(found) == left_out:
        needed = f"of {SIZE} pixels or more a side that can be read ({KINDS})"
        raise UserError(f"{source} holds no pictures {needed}; pass another folder (--pictures).")
    if not rows:
        raise UserError(f"no crop of {source} is sharp enough; try others (--reductions).")
    with open(pairs / "sources.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("cut", "picture", "reduction", "bicubic_db"), *rows])
    return rows


def prepare(args: argparse.Namespace) -> None:
    for name in ("gt", "lq", "sources.csv", "copyright"):
        if (args.folder / name).exists():
            raise UserError(f"{args.folder / name} exists; name another folder, or remove it (FOLDER).")
    if args.pictures:
        pictures_in(args.pictures, "--pictures", recursive=True)  # before FOLDER is made
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=args.folder) as unfinished:
            pairs = Path(unfinished, "pairs")
            rows = write_pairs(args, pairs, Path(unfinished, "unpacked"))
            for path in sorted(pairs.iterdir(), key=lambda path: path.name == "gt"):
                path.rename(args.folder / path.name)  # gt last: once it exists, all is complete
    except OSError as error:
        where = error.filename or args.folder
        raise UserError(f"{where}: {error.strerror}; pass another folder (FOLDER).") from None
    print(f"{len(rows)} pairs from {len({row[1] for row in rows})} pictures in {args.folder}")
    print(f"bicubic x{args.scale}: median {np.median([float(row[3]) for row in rows]):.1f} dB")


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("prepare_pictures.py", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="for gt/, lq/, sources.csv, copyright/ and packages/")
    add("--scale", type=int, choices=(2, 3, 4), default=2)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pictures", type=Path, help="folder with your own pictures, instead of packages")
    source.add_argument("--textures", action="store_true", help="add textures and landscapes of games, 2 GB")
    factors = {"type": float, "choices": (1, 1.5, *range(2, 13)), "nargs": "+", "metavar": "N"}
    add("--reductions", default=REDUCTIONS, help="reduce to 1/N before cutting (default: 2 3 4 6)", **factors)
    return exit_code("prepare_pictures.py", lambda: prepare(parser.parse(argv)), "FOLDER is not complete.")


if __name__ == "__main__":
    sys.exit(main())
