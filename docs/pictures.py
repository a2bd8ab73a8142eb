"""Draw demo.jpg, jpeg.jpg and int8.png of this folder with the shipped weights; reduce photo.png.

    python docs/pictures.py

The photographs are scikit-image's; no network was trained on them. demo/demo.py draws with this, too.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.network import load_network  # noqa: E402

SMALL, JPEG = (f"AetherNet_small_{name}_fp16.safetensors" for name in ("wallpapers", "jpeg"))
INT8 = "AetherNet_small_wallpapers_int8.onnx"
EYE = ("chelsea", 123, 56)  # a photograph, and left and top of its cut
BADGE, HELMET, FACE = (("astronaut", *place) for place in ((116, 337), (125, 340), (205, 60)))
SIZE, ZOOM = 96, 3  # of a cut, and how many times it is enlarged on the sheet


def photograph(name: str, scale: int) -> Image.Image:
    """A photograph of scikit-image as RGB, cut to a multiple of the scale."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    return image.crop((0, 0, image.width // scale * scale, image.height // scale * scale))


def resized(image: Image.Image, times: int, parts: int = 1) -> Image.Image:
    size = (image.width * times // parts, image.height * times // parts)
    return image.resize(size, Image.Resampling.BICUBIC)


def upscaled(network: Callable[[torch.Tensor], torch.Tensor], image: Image.Image) -> np.ndarray:
    """(H, W, 3) from 0 to 255, not rounded, by a network for (N, 3, H, W) from 0 to 1."""
    with torch.no_grad():
        output = network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255)
    return (output[0].permute(1, 2, 0).clamp(0, 1) * 255).numpy()


def sheet(rows: List[Dict[str, np.ndarray]]) -> Image.Image:
    """The rows below one another, each cut (SIZE, SIZE, 3) enlarged below its label."""
    side, gap, header = SIZE * ZOOM, 8, 28
    width, height = max(map(len, rows)) * (side + gap) + gap, len(rows) * (side + header) + gap
    picture = Image.new("RGB", (width, height), "white")
    for y, cuts in enumerate(rows):
        for x, (label, pixels) in enumerate(cuts.items()):
            left, top = gap + x * (side + gap), y * (side + header)
            ImageDraw.Draw(picture).text((left, top + 3), label, "black", ImageFont.load_default(18))
            cut = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
            picture.paste(cut.resize((side, side), Image.Resampling.NEAREST), (left, top + header))
    return picture


def row(place: tuple, scale: int, networks: Dict[str, str], jpeg: int = 0) -> Dict[str, np.ndarray]:
    """Cuts of a photograph, reduced and perhaps saved as JPEG: bicubic, by the networks, original."""
    name, left, top = place
    whole = photograph(name, scale)
    low = resized(whole, 1, scale)
    if jpeg:
        low.save(file := io.BytesIO(), "JPEG", quality=jpeg)
        low = Image.open(file)
    pixels = {"bicubic": np.asarray(resized(low, scale))}
    for label, file_name in networks.items():
        pixels[label] = upscaled(load_network(ROOT / "weights" / f"{scale}x_{file_name}", "cpu"), low)
    pixels["original"] = np.asarray(whole)
    return {label: each[top : top + SIZE, left : left + SIZE] for label, each in pixels.items()}


def main() -> None:
    argparse.ArgumentParser(description="Draw README's and the pages' pictures again.").parse_args()
    torch.set_num_threads(1)
    resized(photograph("chelsea", 1), 1, 2).save(DOCS / "photo.png")

    eye = row(EYE, 4, {"AetherNet small x4": SMALL})
    sheet([eye, row(BADGE, 2, {"AetherNet small x2": SMALL})]).save(DOCS / "demo.jpg", quality=90)

    both = {"for clean pictures": SMALL, "for JPEG": JPEG}
    sheet([row(place, 2, both, 75) for place in (FACE, HELMET)]).save(DOCS / "jpeg.jpg", quality=90)

    sheet([row(EYE, 2, {"float": SMALL, "int8": INT8})]).save(DOCS / "int8.png")
    print(f"Wrote photo.png, demo.jpg, jpeg.jpg and int8.png to {DOCS}")


if __name__ == "__main__":
    main()
