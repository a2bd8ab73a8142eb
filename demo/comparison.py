"""Photographs, made small and large again, and a sheet that compares cuts of them."""

from __future__ import annotations

from typing import Callable, Dict, List

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

SIZE, ZOOM = 96, 3  # of a cut, and how many times it is enlarged on the sheet


def photograph(name: str, scale: int) -> Image.Image:
    """A photograph of scikit-image as RGB, cut to a multiple of the scale."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    return image.crop((0, 0, image.width // scale * scale, image.height // scale * scale))


def reduced(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width // scale, image.height // scale), Image.Resampling.BICUBIC)


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


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
