"""Make training pairs from free pictures in Debian packages or from your own pictures.

    python training/prepare_pictures.py FOLDER [--scale 2] [--textures] [--packages DIR]
    python training/prepare_pictures.py FOLDER --pictures MINE [--reductions 1 2]

Writes FOLDER/gt and FOLDER/lq (PNG pairs with the same names), FOLDER/sources.csv (source, reduction and
bicubic PSNR-Y of every pair) and, for the packages, FOLDER/copyright (their authors and licences). The
packages need Debian or Ubuntu: apt-get downloads them into FOLDER/packages and dpkg-deb unpacks them;
nothing is installed. ``--packages`` names a folder that already has them. ``--pictures`` uses your own
folder instead, with its subfolders; transparent pictures stand on white, and pictures that can't be read are
left out and named. Nothing that exists is changed or deleted.

A soft crop teaches nothing, because bicubic reproduces it. So pictures are first reduced to 1/2, 1/3, 1/4 and
1/6 (``--reductions``; 1 leaves them as they are), and only crops on which bicubic interpolation reaches 20 to
37 dB are kept. Low-resolution pictures are Pillow's bicubic reductions of whole pictures, cropped afterwards.
``--textures`` adds the last two packages, textures of games (1 GB), reduced to 1/2 and 1/3.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aethersr.commands import Parser, exit_code
from aethersr.errors import UserError
from aethersr.picture import opaque, readable
from aethersr.quality import KINDS

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
)
NO_PICTURE = re.compile(r"_(nm|norm|normal|n|s|sm|gm|rm)$|[Nn]ormal")  # directions and gloss of a surface
SHORTEST = 1000  # smaller ones are thumbnails of the same pictures
REDUCTIONS, OF_TEXTURES = (2, 3, 4, 6), (2, 3)
SIZE = 192  # of a crop in high-resolution pixels
PER_PICTURE = 60
BICUBIC_DB = (20.0, 37.0)  # PSNR-Y of bicubic interpolation: below is noise, above nothing to learn
BICUBIC = Image.Resampling.BICUBIC


class Cut(NamedTuple):
    bicubic_db: float
    reduction: int
    gt: Image.Image
    lq: Image.Image


def unpack(names: Sequence[str], packages: Path, folder: Path) -> None:
    """Unpack each from ``packages`` into ``folder``/NAME; download those that are missing."""
    for each in (packages, folder):
        each.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list(packages.glob(f"{name}_*.deb"))]
    if missing:
        if not shutil.which("apt-get"):
            raise UserError(
                f"no apt-get here to download {', '.join(missing)}; pass a folder that has them (--packages)."
            )
        if subprocess.run(["apt-get", "download", *missing], cwd=packages).returncode:
            raise UserError(f"apt-get could not download all of {', '.join(missing)} (--packages).")
    for name in names:
        package = str(next(packages.glob(f"{name}_*.deb")))
        if subprocess.run(["dpkg-deb", "-x", package, str(folder / name)], check=False).returncode:
            raise UserError(f"{package} is damaged; remove it, or pass another folder (--packages).")
        for archive in (folder / name).rglob("*.pk3"):  # a game's files
            shutil.unpack_archive(archive, archive.with_suffix(""), "zip")


def pictures(folder: Path, shortest: int, packages: bool, unreadable: Dict[Path, str]) -> List[Path]:
    """Every picture once: no links, and only the largest if a package has it in several sizes."""
    best: Dict[Path, Tuple[int, Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in KINDS or path.is_symlink():
            continue
        if folder.name in TEXTURES and NO_PICTURE.search(path.stem):
            continue
        try:
            with readable(path, "--pictures"), Image.open(path) as image:
                width, height = image.size
        except UserError as error:
            unreadable[path] = str(error)
            continue
        if min(width, height) < shortest:
            continue
        key = path
        if packages:  # Plasma has a picture's sizes in one folder, others have the size in the name
            alone = not path.parent.name.startswith("images")
            key = path.with_name(re.sub(r"_\d+x\d+$", "", path.stem)) if alone else path.parent
        if key not in best or width > best[key][0]:
            best[key] = (width, path)
    return [path for _, path in best.values()]


def luma(image: Image.Image) -> np.ndarray:
    """Y of JPEG's YCbCr, (H, W) float, 0 to 255."""
    return np.asarray(image.convert("L"), dtype=np.float64)


def cuts_of_reduction(picture: Image.Image, reduction: int, scale: int) -> Iterator[Cut]:
    step = reduction * scale
    picture = picture.crop((0, 0, picture.width // step * step, picture.height // step * step))
    gt = picture.resize((picture.width // reduction, picture.height // reduction), BICUBIC)
    lq = gt.resize((gt.width // scale, gt.height // scale), BICUBIC)
    error = (luma(gt) - luma(lq.resize(gt.size, BICUBIC))) ** 2
    for top in range(0, gt.height - SIZE + 1, SIZE):
        for left in range(0, gt.width - SIZE + 1, SIZE):
            mean = float(error[top : top + SIZE, left : left + SIZE].mean())
            decibels = 10 * np.log10(255**2 / max(mean, 1e-9))
            if BICUBIC_DB[0] <= decibels <= BICUBIC_DB[1]:
                box = (left, top, left + SIZE, top + SIZE)
                small = tuple(side // scale for side in box)
                yield Cut(decibels, reduction, gt.crop(box), lq.crop(small))  # type: ignore[arg-type]


def cuts(path: Path, scale: int, reductions: Sequence[int]) -> List[Cut]:
    """At most PER_PICTURE crops of a picture: those on which bicubic interpolation does worst."""
    with readable(path, "--pictures"), Image.open(path) as opened:
        picture = opaque(opened)
    found = [cut for reduction in reductions for cut in cuts_of_reduction(picture, reduction, scale)]
    return sorted(found, key=lambda cut: cut.bicubic_db)[:PER_PICTURE]


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("prepare_pictures.py", __doc__)
    text = "for gt/, lq/, sources.csv and copyright/"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--packages", type=Path, help="folder with .deb files (default: FOLDER/packages)")
    parser.add_argument("--pictures", type=Path, help="folder with your own pictures, instead of packages")
    parser.add_argument("--textures", action="store_true", help="also textures of games, 1 GB to download")
    text = f"reduce pictures to 1/N before cropping (default: {' '.join(map(str, REDUCTIONS))})"
    parser.add_argument("--reductions", type=int, choices=range(1, 13), nargs="+", metavar="N", help=text)
    return exit_code("prepare_pictures.py", lambda: prepare(parser.parse(argv)), "FOLDER is not complete.")


def prepare(args: argparse.Namespace) -> None:
    for name in ("gt", "lq", "sources.csv", "copyright"):
        if (args.folder / name).exists():
            raise UserError(f"{args.folder / name} exists; name another folder, or remove it (FOLDER).")
    if args.pictures and (args.textures or args.packages):
        flag = "--textures" if args.textures else "--packages"
        raise UserError(f"{flag} is about the packages, which --pictures replaces; leave one of them out.")
    if args.pictures and not args.pictures.is_dir():
        raise UserError(f"there is no folder {args.pictures}; pass one with pictures (--pictures).")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=args.folder) as unfinished:
            rows = write_pairs(args, Path(unfinished))
            written = sorted(Path(unfinished, "pairs").iterdir(), key=lambda path: path.name == "gt")
            for path in written:  # gt last: once it exists, all is complete
                path.rename(args.folder / path.name)
    except OSError as error:
        text = f"{error.filename or args.folder}: {error.strerror}"
        raise UserError(f"{text}; pass another folder (FOLDER).") from None
    print(f"{len(rows)} pairs from {len({row[1] for row in rows})} pictures in {args.folder}")
    print(f"bicubic x{args.scale}: median {np.median([float(row[3]) for row in rows]):.1f} dB")


def write_pairs(args: argparse.Namespace, unfinished: Path) -> List[Tuple[str, str, int, str]]:
    """Write ``unfinished``/pairs, what belongs in FOLDER, and return the rows of its sources.csv."""
    pairs, unpacked = unfinished / "pairs", unfinished / "unpacked"
    for sub in ("gt", "lq"):
        (pairs / sub).mkdir(parents=True)
    if args.pictures:
        kinds = {args.pictures: (SIZE, args.reductions or REDUCTIONS)}
    else:
        kinds = {unpacked / name: (SHORTEST, args.reductions or REDUCTIONS) for name in WALLPAPERS}
        kinds.update({unpacked / name: (2 * SIZE, OF_TEXTURES) for name in TEXTURES if args.textures})
        unpack([folder.name for folder in kinds], args.packages or args.folder / "packages", unpacked)
        (pairs / "copyright").mkdir()
        for folder in kinds:
            documents = folder / "usr/share/doc" / folder.name
            shutil.copy(documents / "copyright", pairs / "copyright" / folder.name)
    source = args.pictures or unpacked
    unreadable: Dict[Path, str] = {}
    found = {
        path: reductions
        for folder, (shortest, reductions) in kinds.items()
        for path in pictures(folder, shortest, not args.pictures, unreadable)
    }
    if not found and not unreadable:
        needed = f"pictures of {SIZE} pixels or more a side ({', '.join(KINDS)})"
        raise UserError(f"{source} holds none; expected {needed} (--pictures).")
    rows: List[Tuple[str, str, int, str]] = []
    for path, reductions in tqdm(found.items(), unit="picture", disable=None):
        try:
            chosen = cuts(path, args.scale, reductions)
        except UserError as error:
            unreadable[path] = str(error)
            continue
        for cut in chosen:
            name = f"{len(rows):05d}.png"
            cut.gt.save(pairs / "gt" / name, compress_level=1)
            cut.lq.save(pairs / "lq" / name, compress_level=1)
            rows.append((name, str(path.relative_to(source)), cut.reduction, f"{cut.bicubic_db:.2f}"))
    for text in unreadable.values():
        print(f"left out: {text}", file=sys.stderr)
    if not found.keys() - unreadable.keys():
        raise UserError(f"no picture of {source} can be read; pass another folder (--pictures).")
    if not rows:
        raise UserError(f"no crop of {source} is sharp enough; try others (--reductions).")
    with open(pairs / "sources.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("cut", "picture", "reduction", "bicubic_db"), *rows])
    return rows


if __name__ == "__main__":
    sys.exit(main())
