"""Draw demo.jpg, jpeg.jpg and int8.png of this folder with the shipped weights; reduce photo.png.

    python docs/pictures.py

The photographs are scikit-image's; no network was trained on them.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Dict

import numpy as np
import torch
from PIL import Image

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "archs"), str(ROOT / "demo")]

from comparison import SIZE, enlarged, photograph, reduced, sheet, upscaled  # noqa: E402

from aethersr.network import load_network  # noqa: E402

SMALL, JPEG = (f"AetherNet_small_{name}_fp16.safetensors" for name in ("wallpapers", "jpeg"))
INT8 = "AetherNet_small_wallpapers_int8.onnx"
EYE = ("chelsea", 123, 56)  # a photograph, and left and top of its cut
BADGE, HELMET, FACE = (("astronaut", *place) for place in ((116, 337), (125, 340), (205, 60)))


def row(place: tuple, scale: int, networks: Dict[str, str], jpeg: int = 0) -> Dict[str, np.ndarray]:
    """Cuts of a photograph, reduced and perhaps saved as JPEG: bicubic, by the networks, original."""
    name, left, top = place
    whole = photograph(name, scale)
    low = reduced(whole, scale)
    if jpeg:
        low.save(file := io.BytesIO(), "JPEG", quality=jpeg)
        low = Image.open(file)
    pixels = {"bicubic": np.asarray(enlarged(low, scale))}
    for label, file_name in networks.items():
        pixels[label] = upscaled(load_network(ROOT / "weights" / f"{scale}x_{file_name}", "cpu"), low)
    pixels["original"] = np.asarray(whole)
    return {label: each[top : top + SIZE, left : left + SIZE] for label, each in pixels.items()}


def main() -> None:
    torch.set_num_threads(1)
    reduced(photograph("chelsea", 1), 2).save(DOCS / "photo.png")

    eye = row(EYE, 4, {"AetherNet small x4": SMALL})
    sheet([eye, row(BADGE, 2, {"AetherNet small x2": SMALL})]).save(DOCS / "demo.jpg", quality=90)

    both = {"for clean pictures": SMALL, "for JPEG": JPEG}
    sheet([row(place, 2, both, 75) for place in (FACE, HELMET)]).save(DOCS / "jpeg.jpg", quality=90)

    sheet([row(EYE, 2, {"float": SMALL, "int8": INT8})]).save(DOCS / "int8.png")
    print(f"Wrote photo.png, demo.jpg, jpeg.jpg and int8.png to {DOCS}")


if __name__ == "__main__":
    main()
