"""Calibrates an int8 network's ranges on pictures, and measures what int8 costs. Needs numpy and Pillow."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import List, NamedTuple, Tuple

import torch
from aether_arch import AetherBase, FusedAetherNet
from aether_quant import QuantAetherNet, prepare_qat
from torch import Tensor

from aethersr.errors import UserError, missing_package

PICTURES, SIDE = 32, 128  # pictures at most, and the side of the centre crop in low-resolution pixels
SMALLEST = 8  # least side of a crop

Pairs = List[Tuple[Tensor, Tensor]]


class Calibrated(NamedTuple):
    """An int8 network, its warnings, and the mean and worst change of PSNR from the float network in dB."""

    net: QuantAetherNet
    notes: List[str]
    mean: float
    worst: float


def calibration_pairs(folder: Path, net: AetherBase, flag: str = "--calibration") -> Pairs:
    """(low resolution, high resolution) of each picture's centre: (1, in_chans, H, W) in [0, 1].

    Reduced with Pillow's bicubic. Skips files that are not pictures, broken or too small.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise missing_package(error, flag, "upscale") from None
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder; pass one with pictures.")
    pairs: Pairs = []
    scale, mode = net.scale, "RGB" if net.options["in_chans"] == 3 else "L"
    for path in sorted(folder.rglob("*")):
        if len(pairs) == PICTURES or not path.is_file():
            continue
        try:
            with Image.open(path) as opened:
                if opened.mode == "F":  # no known range
                    continue
                if opened.mode.startswith("I"):  # 16 bits; Pillow would clip everything above 255
                    deep = np.asarray(opened).clip(0, 65535)
                    image = Image.fromarray((deep // 257).astype(np.uint8)).convert(mode)
                else:
                    image = opened.convert(mode)
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ):  # what Pillow raises for broken files
            continue
        width, height = (min(SIDE, size // scale) for size in image.size)
        if min(width, height) < SMALLEST:
            continue
        left, top = ((size - part * scale) // 2 for size, part in zip(image.size, (width, height)))
        image = image.crop((left, top, left + width * scale, top + height * scale))
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        arrays = [np.atleast_3d(np.asarray(each, dtype=np.float32)) / 255 for each in (small, image)]
        low, high = (torch.from_numpy(array).permute(2, 0, 1)[None].contiguous() for array in arrays)
        pairs.append((low, high))
    if not pairs:
        least = f"holds no picture of {SMALLEST * scale} pixels or more that Pillow reads"
        raise UserError(f"{flag} {folder} {least}; pass another folder.")
    return pairs


@torch.no_grad()
def calibrated(
    net: FusedAetherNet, placement: str, pairs: Pairs, target: str, reduce_range: bool = False
) -> Calibrated:
    """The fused network with int8 weights and ranges from pictures, and what that costs on them.

    Raises:
        ValueError: the network's values are finite on none of the pictures, or weights exceed half precision.
    """
    fused = copy.deepcopy(net).cpu().float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = prepare_qat(
            copy.deepcopy(fused), placement, [low for low, _ in pairs]
        ).convert_to_quantized()
    written = stored.for_target(target, reduce_range)
    gains = [psnr(written(low), high) - psnr(fused(low), high) for low, high in pairs]
    return Calibrated(stored, [str(each.message) for each in caught], sum(gains) / len(gains), min(gains))


def psnr(output: Tensor, truth: Tensor) -> float:
    """PSNR of 8-bit pictures in dB; 99 if they are equal."""
    error = float((output.clamp(0, 1).mul(255).round() - truth.mul(255).round()).pow(2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0
