"""Training pairs from free pictures that Debian packages carry: fetch, cut, reduce.

    python training/prepare_pictures.py FOLDER [--scale 2] [--packages DIR]
    python training/prepare_pictures.py FOLDER --drawn 500 [--scale 2]        # drawn pairs only, for training pictures of your own

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

Every tenth pair is drawn here: stripes, checkerboards, dots, discs, coarse noise, flat colour and letters, half of them in black and white.
Photographs hold none of these, and a network that never saw them may run away on them: each block squares what it is given.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers", "ukui-wallpapers")
KINDS = {".jpg", ".jpeg", ".png", ".webp"}
SHORTEST = 1000  # below are thumbnails of the same pictures
HALVED = 3000  # pictures this wide are soft at full size (JPEG, upscaled renderings): half of it is sharp
SIZE = 192  # of a cut, high-resolution pixels
PER_PICTURE = 60
DRAWN = 1 / 9  # as many pairs as this part of those from photographs
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


def drawing(random: np.random.Generator, size: int) -> Image.Image:
    """A regular pattern or letters in two colours, as screens, comics and test charts hold them, (size, size)."""
    colours = np.array([[0, 0, 0], [255, 255, 255]]) if random.random() < 0.5 else random.integers(0, 256, (2, 3))
    colours = random.permutation(colours)
    kind = random.choice(["stripes", "checks", "dots", "discs", "noise", "letters", "flat"])
    step = float(np.exp(random.uniform(0, np.log(64))))  # pixels
    if kind == "letters":
        image = Image.new("RGB", (size, size), tuple(int(value) for value in colours[0]))
        font = ImageFont.load_default(max(8.0, step))
        lines = ["".join(map(chr, random.integers(33, 127, 80))) for _ in range(40)]
        ImageDraw.Draw(image).multiline_text((0, 0), "\n".join(lines), tuple(int(value) for value in colours[1]), font)
        return image
    y, x = np.mgrid[:size, :size].astype(np.float64)
    if random.random() < 0.5:
        step = float(round(step))
        u, v = random.permutation([x, y])
    else:
        angle = random.uniform(0, np.pi)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    row, column = np.floor(u / step).astype(int), np.floor(v / step).astype(int)
    cells = random.integers(0, 2, (4 * size, 4 * size))
    second = {
        "stripes": row % 2,
        "checks": (row + column) % 2,
        "dots": (row % 2) * (column % 2),
        "discs": np.hypot(u % step - step / 2, v % step - step / 2) < 0.35 * step,
        "noise": cells[row % len(cells), column % len(cells)],
        "flat": row * 0,
    }[kind]
    return Image.fromarray(colours[second.astype(int)].astype(np.uint8))


def drawn_pairs(count: int, scale: int) -> Iterator[Tuple[Image.Image, Image.Image]]:
    """Pairs of ``drawing``, always the same ones: (gt, lq)."""
    random, border = np.random.default_rng(0), 8 * scale
    for _ in range(count):
        gt = drawing(random, SIZE + 2 * border)
        lq = gt.resize((gt.width // scale, gt.height // scale), Image.Resampling.BICUBIC)
        yield gt.crop((border, border, border + SIZE, border + SIZE)), lq.crop((8, 8, 8 + SIZE // scale, 8 + SIZE // scale))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where gt/, lq/, sources.csv and copyright/ go")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--packages", type=Path, help="folder with the .deb files (default: FOLDER/packages)")
    parser.add_argument("--drawn", type=int, metavar="COUNT", help="only drawn pairs, so many, to be mixed into pictures of your own; no packages")
    args = parser.parse_args()
    if (args.folder / "gt").exists():
        sys.exit(f"prepare_pictures: {args.folder / 'gt'} is already there; remove it, or name another folder")
    rows: List[Tuple[str, str, str]] = []
    for sub in ("gt", "lq"):
        (args.folder / f"{sub}.partial").mkdir(parents=True)

    def save(gt: Image.Image, lq: Image.Image, source: str, lively: str) -> None:
        name = f"{'drawn' if args.drawn else ''}{len(rows):05d}.png"
        gt.save(args.folder / "gt.partial" / name, compress_level=1)
        lq.save(args.folder / "lq.partial" / name, compress_level=1)
        rows.append((name, source, lively))

    if args.drawn is None:
        unpacked = args.folder / "unpacked"
        unpacked.mkdir()
        unpack(args.packages or args.folder / "packages", unpacked)
        for name in PACKAGES:
            (args.folder / "copyright").mkdir(exist_ok=True)
            shutil.copy(unpacked / name / "usr" / "share" / "doc" / name / "copyright", args.folder / "copyright" / name)
        for path in tqdm(pictures(unpacked), unit="picture"):
            for lively, gt, lq in cuts(path, args.scale):
                save(gt, lq, str(path.relative_to(unpacked)), f"{lively:.2f}")
        shutil.rmtree(unpacked)
    for gt, lq in drawn_pairs(args.drawn or round(len(rows) * DRAWN), args.scale):
        save(gt, lq, "drawn", "")
    with open(args.folder / "sources.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("cut", "picture", "liveliness"), *rows])
    for sub in ("lq", "gt"):  # gt last: it says that all is there
        (args.folder / f"{sub}.partial").rename(args.folder / sub)
    print(f"{len(rows)} pairs, of {len({row[1] for row in rows} - {'drawn'})} pictures and drawn, in {args.folder}")


if __name__ == "__main__":
    main()
