"""Draw demo.jpg, jpeg.jpg and int8.png of this folder with the shipped weights; reduce photo.png.

    python docs/pictures.py

The photographs are scikit-image's; no network was trained on them.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Dict, List

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "archs")]

from aethersr import aether_from_state_dict, read_checkpoint, upscale_tiled  # noqa: E402

WEIGHTS = DOCS.parent / "weights"
SIZE, ZOOM = 96, 3
Row = Dict[str, np.ndarray]  # label -> pixels (H, W, 3) from 0 to 255


def upscaled(name: str, low: Image.Image) -> np.ndarray:
    """By the shipped network of this name, weights or ONNX."""
    planes = torch.from_numpy(np.array(low)).permute(2, 0, 1)[None].float() / 255
    if name.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(WEIGHTS / name), providers=["CPUExecutionProvider"])
        output = torch.from_numpy(session.run(None, {"input": planes.numpy()})[0])
    else:
        network = aether_from_state_dict(read_checkpoint(WEIGHTS / name).state)
        with torch.no_grad():
            output = upscale_tiled(network, planes, 128, 28)
    return (output[0].permute(1, 2, 0).clamp(0, 1) * 255).numpy()


def row(photograph: str, left: int, top: int, scale: int, networks: Dict[str, str], jpeg: int = 0) -> Row:
    """Cuts of a photograph, reduced and perhaps saved as JPEG: bicubic, by the networks, original."""
    whole = Image.fromarray(getattr(data, photograph)())
    whole = whole.crop((0, 0, whole.width // scale * scale, whole.height // scale * scale))
    low = whole.resize((whole.width // scale, whole.height // scale), Image.Resampling.BICUBIC)
    if jpeg:
        file = io.BytesIO()
        low.save(file, "JPEG", quality=jpeg)
        low = Image.open(file)
    pixels: Row = {"bicubic": np.asarray(low.resize(whole.size, Image.Resampling.BICUBIC))}
    pixels.update({label: upscaled(name, low) for label, name in networks.items()})
    pixels["original"] = np.asarray(whole)
    return {label: each[top : top + SIZE, left : left + SIZE] for label, each in pixels.items()}


def sheet(rows: List[Row]) -> Image.Image:
    """The rows below one another, each cut enlarged below its label."""
    side, gap, header = SIZE * ZOOM, 8, 28
    width, height = max(map(len, rows)) * (side + gap) + gap, len(rows) * (side + header) + gap
    picture = Image.new("RGB", (width, height), "white")
    for y, cuts in enumerate(rows):
        for x, (label, pixels) in enumerate(cuts.items()):
            place = (gap + x * (side + gap), y * (side + header))
            ImageDraw.Draw(picture).text((place[0], place[1] + 3), label, "black", ImageFont.load_default(18))
            cut = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
            enlarged = cut.resize((side, side), Image.Resampling.NEAREST)
            picture.paste(enlarged, (place[0], place[1] + header))
    return picture


def main() -> None:
    torch.set_num_threads(1)
    photo = Image.fromarray(data.chelsea())
    photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BICUBIC).save(DOCS / "photo.png")

    small = "AetherNet_small_wallpapers_fp16.safetensors"
    eye = row("chelsea", 123, 56, 4, {"AetherNet small x4": f"4x_{small}"})
    badge = row("astronaut", 116, 337, 2, {"AetherNet small x2": f"2x_{small}"})
    sheet([eye, badge]).save(DOCS / "demo.jpg", quality=90)

    for_jpeg = "2x_AetherNet_small_jpeg_fp16.safetensors"
    both = {"for clean pictures": f"2x_{small}", "for JPEG": for_jpeg}
    sheet([row("astronaut", *place, 2, both, 75) for place in ((205, 60), (125, 340))]).save(
        DOCS / "jpeg.jpg", quality=90
    )

    floats = f"2x_{small}"
    cuts = row(
        "chelsea", 123, 56, 2, {"float": floats, "int8": floats.replace("_fp16.safetensors", "_int8.onnx")}
    )
    difference = 128 + 32 * (cuts["int8"] - cuts["float"])
    picture = sheet(
        [{name: cuts[name] for name in ("float", "int8")} | {"32 times the difference": difference}]
    )
    picture.save(DOCS / "int8.png")
    print(f"Wrote photo.png, demo.jpg, jpeg.jpg and int8.png to {DOCS}")


if __name__ == "__main__":
    main()
