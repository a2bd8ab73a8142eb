"""Draw training pairs with hard edges: text, pixel art, screens and shapes.

    python training/draw_graphics.py FOLDER [--count 900] [--scale 2] [--fonts DIR]

Adds FOLDER/gt/graphics_00000.png and FOLDER/lq/graphics_00000.png, ...: FOLDER may hold the pairs of
training/prepare_pictures.py. A network that has seen only photographs reduced by bicubic interpolation takes a
hard edge for a strong reduction and overshoots it. So each picture is drawn once, at eight times the resolution,
and both pictures of a pair are sampled from that: at pixel centres (hard) or as mean of the area (smooth); the
small one also from the large one, by Lanczos or bicubic interpolation. Their pixel grids fit exactly.

Fonts are those of ``--fonts``, and Pillow's own. Nothing is downloaded, and the same seed draws the same pairs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aethersr.commands import exit_code
from aethersr.errors import UserError

SIZE, FINE = 192, 8  # pixels of a large picture's side, and of the canvas to each of them
SIDE = SIZE * FINE
LETTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz0123456789.,:;!?()+-=%&@#"
)
Colour = Tuple[int, ...]


class Pen(NamedTuple):
    """What a drawing needs: a canvas, its random numbers, the smallest width of a line and fonts."""

    draw: ImageDraw.ImageDraw
    random: np.random.Generator
    scale: int
    fonts: List[Path]
    grey: bool

    def colour(self) -> Colour:
        if self.random.random() < 0.4:  # black and white, and what screens are made of
            return (int(self.random.choice([0, 0, 64, 128, 192, 240, 255, 255])),) * 3
        if self.grey:
            return (int(self.random.integers(256)),) * 3
        return tuple(self.random.integers(256, size=3).tolist())

    def length(self, low: float, high: float) -> int:
        """A random length, in canvas pixels; low and high are in pixels of the large picture."""
        return round(float(np.exp(self.random.uniform(np.log(low), np.log(high)))) * FINE)

    def place(self) -> Tuple[int, int]:
        """A corner from which most of a drawing is seen."""
        x, y = self.random.integers(-SIDE // 4, SIDE * 7 // 8, 2).tolist()
        return x, y

    def font(self, size: int) -> Any:
        if self.fonts and self.random.random() < 0.9:
            return ImageFont.truetype(str(self.fonts[self.random.integers(len(self.fonts))]), size)
        return ImageFont.load_default(size)

    def words(self) -> str:
        sizes = self.random.integers(1, 9, self.random.integers(1, 9))
        return " ".join("".join(self.random.choice(list(LETTERS), size)) for size in sizes)


def shapes(pen: Pen) -> None:
    """Ellipses, bars, lines, arcs and polygons, filled or as outlines, turned anyhow."""
    for _ in range(pen.random.integers(8, 40)):
        (x, y), width, height, colour = pen.place(), pen.length(3, 90), pen.length(3, 90), pen.colour()
        outline = pen.length(1, 8) if pen.random.random() < 0.3 else 0
        box = (x, y, x + width, y + (width if pen.random.random() < 0.4 else height))
        kind, angle = pen.random.integers(6), pen.random.uniform(0, 2 * np.pi)
        if kind < 2:
            pen.draw.ellipse(box, None if outline else colour, colour, outline or 1)
        elif kind == 2:
            pen.draw.rectangle(box, None if outline else colour, colour, outline or 1)
        elif kind == 3:  # a bar or a line
            along = np.array([np.cos(angle), np.sin(angle)]) * max(width, height) * 2
            pen.draw.line((x, y, x + along[0], y + along[1]), colour, pen.length(pen.scale * 0.7, 16))
        elif kind == 4:
            start = float(np.degrees(angle))
            pen.draw.arc(box, start, start + pen.random.uniform(40, 300), colour, pen.length(pen.scale, 10))
        else:
            turns = np.sort(pen.random.uniform(0, 2 * np.pi, pen.random.integers(3, 8)))
            points = [(x + width * np.cos(turn), y + height * np.sin(turn)) for turn in turns]
            pen.draw.polygon(points, colour)


def text(pen: Pen) -> None:
    """Lines of letters in several sizes."""
    y = -int(pen.random.integers(4 * FINE))
    while y < SIDE:
        size, colour = pen.length(4 * pen.scale, 22 * pen.scale), pen.colour()
        for _ in range(pen.random.integers(1, 4)):
            pen.draw.text(
                (pen.random.integers(-SIDE // 4, SIDE // 8), y), pen.words() * 3, colour, pen.font(size)
            )
            y += round(size * 1.25)


def pixel_art(pen: Pen) -> None:
    """Mirrored figures of squares, each square of one or more pixels of the small picture."""
    square = int(pen.random.integers(1, 5)) * pen.scale * FINE
    if pen.random.random() < 0.3:  # squares that fit the large picture's grid alone
        square = int(pen.random.integers(2, 8)) * FINE
    for _ in range(pen.random.integers(6, 25)):
        side = int(pen.random.integers(4, 17))
        left, top = (value // square * square for value in pen.place())
        palette = [pen.colour() for _ in range(pen.random.integers(1, 5))]
        half = pen.random.integers(-1, len(palette), (side, (side + 1) // 2))
        if pen.random.random() < 0.5:  # larger areas of a colour
            half = np.where(pen.random.random(half.shape) < 0.5, np.roll(half, 1, 0), half)
        for row, line in enumerate(np.concatenate([half, half[:, ::-1]], 1)):
            for column, index in enumerate(line):
                x, y = left + column * square, top + row * square
                if index >= 0:
                    pen.draw.rectangle((x, y, x + square - 1, y + square - 1), palette[index])


def screen(pen: Pen) -> None:
    """Windows with a frame, a title, buttons, lines of text and a bar of progress."""
    line = pen.scale * FINE  # a pixel of the small picture
    for _ in range(pen.random.integers(2, 6)):
        x, y = (value // line * line for value in pen.place())
        width, height = (int(pen.random.integers(30, 100)) * line for _ in range(2))
        frame, ground, ink, accent = (pen.colour() for _ in range(4))
        radius, size = int(pen.random.integers(0, 6)) * line, int(pen.random.integers(6, 12)) * line
        pen.draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius, ground, frame, line)
        pen.draw.rectangle((x, y, x + width - 1, y + 2 * size - 1), accent, frame, line)
        pen.draw.text((x + size // 2, y + size // 2), pen.words(), ink, pen.font(size))
        for row in range(y + 3 * size, y + height - 2 * size, 2 * size):
            kind, left, end = (
                pen.random.integers(4),
                x + size // 2,
                x + int(pen.random.uniform(0.2, 1) * width),
            )
            end = max(end, left + size)
            if kind == 0:  # a button
                pen.draw.rounded_rectangle(
                    (left, row, end, row + 3 * size // 2), radius // 2, accent, frame, line
                )
            elif kind == 1:  # progress
                pen.draw.rectangle((left, row, end, row + size - 1), ground, frame, line)
                pen.draw.rectangle((left, row, (left + end) // 2, row + size - 1), frame)
            elif kind == 2:  # a round button before its text
                pen.draw.ellipse((left, row, left + size, row + size), accent, frame, line)
                pen.draw.text((left + 3 * size // 2, row), pen.words(), ink, pen.font(size))
            else:
                pen.draw.text((left, row), pen.words(), ink, pen.font(size))


DRAWINGS: Tuple[Callable[[Pen], None], ...] = (shapes, shapes, text, pixel_art, screen)


def canvas(
    random: np.random.Generator, drawing: Callable[[Pen], None], scale: int, fonts: List[Path]
) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE))
    pen = Pen(ImageDraw.Draw(image), random, scale, fonts, bool(random.random() < 0.35))
    pen.draw.fontmode = "1"  # the canvas has hard edges: sampling makes them smooth
    pen.draw.rectangle((0, 0, SIDE, SIDE), pen.colour())
    drawing(pen)
    return image


def hard(image: Image.Image, step: int) -> Image.Image:
    """The colours at pixel centres. A centre lies between four canvas pixels: always the one below right."""
    return Image.fromarray(np.asarray(image)[step // 2 :: step, step // 2 :: step])


def pair(image: Image.Image, random: np.random.Generator, scale: int) -> Tuple[Image.Image, Image.Image]:
    """The large and the small picture."""
    gt = hard(image, FINE) if random.random() < 0.4 else image.reduce(FINE)
    kind, side = random.random(), SIZE // scale
    if kind < 0.5:
        return gt, hard(image, FINE * scale)
    if kind < 0.75:
        return gt, image.reduce(FINE * scale)
    method = Image.Resampling.LANCZOS if kind < 0.85 else Image.Resampling.BICUBIC
    return gt, gt.resize((side, side), method)


def draw(args: argparse.Namespace) -> None:
    fonts = sorted(path for path in args.fonts.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    existing = next(args.folder.glob("gt/graphics_*.png"), None)
    if existing:
        raise UserError(f"{existing} exists; remove the drawn pairs or name another folder (FOLDER).")
    for sub in ("gt", "lq"):
        (args.folder / sub).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(args.count), unit="pair"):
        random = np.random.default_rng([args.seed, index])
        image = canvas(random, DRAWINGS[index % len(DRAWINGS)], args.scale, fonts)
        for sub, picture in zip(("gt", "lq"), pair(image, random, args.scale)):
            picture.save(args.folder / sub / f"graphics_{index:05d}.png")
    print(f"{args.count} drawn pairs with {len(fonts)} fonts in {args.folder}")


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pairs are added to its gt/ and lq/")
    parser.add_argument("--count", type=int, default=900)
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument(
        "--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of .ttf and .otf files"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return exit_code("draw_graphics.py", lambda: draw(args), "pairs drawn before it are kept.")


if __name__ == "__main__":
    sys.exit(main())
