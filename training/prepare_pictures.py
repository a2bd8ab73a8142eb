"""Training pairs from free pictures that Debian packages carry: fetch, cut, reduce.

    python training/prepare_pictures.py FOLDER [--scale 2] [--packages DIR]

Writes FOLDER/gt and FOLDER/lq (PNG pairs of one name), FOLDER/sources.csv (the picture each pair was cut from) and FOLDER/copyright
(what each package says about authors and licences; several of these licences ask for attribution). Needs Debian or Ubuntu: apt-get
downloads the packages into FOLDER/packages, dpkg-deb unpacks them, nothing is installed. With ``--packages`` they are taken from there.

=============================  =====================================================  =============================
package                        authors                                                licence
=============================  =====================================================  =============================
lomiri-wallpapers-16.04        photographers named in the files' names                CC-BY-SA-3.0/4.0, CC-BY-4.0
lomiri-wallpapers-20.04        photographers named in the files' names                CC-BY-SA-4.0, CC-BY-4.0
mate-backgrounds               authors named in copyright/mate-backgrounds            GPL-2+, CC-BY-SA-4.0
plasma-workspace-wallpapers    KDE Visual Design Group and the authors it names       GPL-2+
ukui-wallpapers                Ubuntu Kylin community                                 CC-BY-SA-3.0
=============================  =====================================================  =============================

A low-resolution picture is Pillow's bicubic reduction of the whole picture, cut afterwards: no cut has a border of its own.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers", "ukui-wallpapers")
KINDS = {".jpg", ".jpeg", ".png", ".webp"}
SHORTEST = 1000  # below are thumbnails of the same pictures
HALVED = 3000  # pictures this wide are soft at full size (JPEG, upscaled renderings): half of it is sharp
SIZE = 192  # of a cut, high-resolution pixels
PER_PICTURE = 60
FLAT = 1.5  # mean difference of neighbouring pixels, steps of 1/255: sky and blur below it teach nothing


def unpack(packages: Path, folder: Path) -> None:
    """Unpack each package of PACKAGES found in ``packages`` into ``folder``/NAME, downloading those that are missing."""
    packages.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not list(packages.glob(f"{name}_*.deb"))]
    if missing:
        if not shutil.which("apt-get"):
            sys.exit(f"prepare_pictures: no apt-get here to download {', '.join(missing)}; --packages names a folder that has them")
        subprocess.run(["apt-get", "download", *missing], cwd=packages, check=True)
    for name in PACKAGES:
        subprocess.run(["dpkg-deb", "-x", str(next(packages.glob(f"{name}_*.deb"))), str(folder / name)], check=True)


def pictures(folder: Path) -> List[Path]:
    """Every picture once: no links, and of one picture in several sizes the largest."""
    best: Dict[Path, Tuple[int, Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in KINDS or path.is_symlink():
            continue
        with Image.open(path) as image:
            width, height = image.size
        if min(width, height) < SHORTEST:
            continue
        # Plasma keeps the sizes of a picture in one folder; the others have one folder for all, or the size in the name.
        key = path.parent if path.parent.name.startswith("images") else path.with_name(re.sub(r"_\d+x\d+$", "", path.stem))
        if key not in best or width > best[key][0]:
            best[key] = (width, path)
    return [path for _, path in best.values()]


def cuts(path: Path, scale: int) -> List[Tuple[float, Image.Image, Image.Image]]:
    """The liveliest cuts of a picture: (liveliness, gt, lq)."""
    with Image.open(path) as opened:
        gt = opened.convert("RGB")
    if gt.width >= HALVED:
        gt = gt.resize((gt.width // 2, gt.height // 2), Image.Resampling.LANCZOS)
    gt = gt.crop((0, 0, gt.width // scale * scale, gt.height // scale * scale))
    lq = gt.resize((gt.width // scale, gt.height // scale), Image.Resampling.BICUBIC)
    luma = np.asarray(gt.convert("L"), dtype=np.float32)
    found = []
    for top in range(0, gt.height - SIZE + 1, SIZE):
        for left in range(0, gt.width - SIZE + 1, SIZE):
            cut = luma[top : top + SIZE, left : left + SIZE]
            lively = float(np.abs(np.diff(cut, axis=0)).mean() + np.abs(np.diff(cut, axis=1)).mean()) / 2
            if lively > FLAT:
                box = (left, top, left + SIZE, top + SIZE)
                found.append((lively, gt.crop(box), lq.crop((box[0] // scale, box[1] // scale, box[2] // scale, box[3] // scale))))
    found.sort(key=lambda item: -item[0])
    return found[:PER_PICTURE]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where gt/, lq/, sources.csv and copyright/ go")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--packages", type=Path, help="folder with the .deb files (default: FOLDER/packages)")
    args = parser.parse_args()
    if (args.folder / "gt").exists():
        sys.exit(f"prepare_pictures: {args.folder / 'gt'} is already there; remove it, or name another folder")
    unpacked = args.folder / "unpacked"
    unpacked.mkdir(parents=True, exist_ok=True)
    unpack(args.packages or args.folder / "packages", unpacked)
    for name in PACKAGES:
        (args.folder / "copyright").mkdir(exist_ok=True)
        shutil.copy(unpacked / name / "usr" / "share" / "doc" / name / "copyright", args.folder / "copyright" / name)
    rows = []
    for sub in ("gt", "lq"):
        (args.folder / f"{sub}.partial").mkdir()
    for path in tqdm(pictures(unpacked), unit="picture"):
        for lively, gt, lq in cuts(path, args.scale):
            name = f"{len(rows):05d}.png"
            gt.save(args.folder / "gt.partial" / name, compress_level=1)
            lq.save(args.folder / "lq.partial" / name, compress_level=1)
            rows.append((name, str(path.relative_to(unpacked)), f"{lively:.2f}"))
    with open(args.folder / "sources.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("cut", "picture", "liveliness"), *rows])
    for sub in ("lq", "gt"):  # gt last: it says that all is there
        (args.folder / f"{sub}.partial").rename(args.folder / sub)
    shutil.rmtree(unpacked)
    print(f"{len(rows)} pairs of {len({row[1] for row in rows})} pictures in {args.folder}")


if __name__ == "__main__":
    main()
