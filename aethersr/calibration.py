"""Calibrates an int8 network's ranges on pictures, and measures what int8 costs."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from aether_arch import AetherBase, FusedAetherNet
from aether_quant import QuantAetherNet, prepare_qat
from torch import Tensor

from aethersr.errors import UserError, need
from aethersr.folders import pictures_in

PICTURES, SIDE = 32, 128  # pictures at most, and the side of the centre crop in low-resolution pixels
SMALLEST = 8  # least side of a crop

Pairs = List[Tuple[Tensor, Tensor]]


class Calibrated(NamedTuple):
    """An int8 network, its warnings, and what it changes PSNR by, in dB."""

    net: QuantAetherNet
    notes: List[str]
    mean: float
    worst: float


def calibration_pairs(
    folder: Path, net: AetherBase, flag: str = "--calibration", most: int = PICTURES, side: int = SIDE
) -> Pairs:
    """(low resolution, high resolution) of pictures' centres: (1, in_chans, H, W) in [0, 1].

    The first readable one of each of ``most`` equal parts of the folder, reduced by Pillow's bicubic.
    """
    need("numpy PIL tqdm aethersr.quality", flag, "upscale")
    import numpy as np
    from PIL import Image

    from aethersr.quality import read_rgb

    paths = pictures_in(folder, flag, recursive=True).pictures
    scale, mode = net.scale, "RGB" if net.options["in_chans"] == 3 else "L"

    def pair(path: Path) -> Optional[Tuple[Tensor, Tensor]]:
        try:
            image = Image.fromarray(read_rgb(path, flag)).convert(mode)
        except UserError:
            return None
        width, height = (min(side, size // scale) for size in image.size)
        if min(width, height) < SMALLEST:
            return None
        left, top = ((size - part * scale) // 2 for size, part in zip(image.size, (width, height)))
        high = image.crop((left, top, left + width * scale, top + height * scale))
        return tensor(high.resize((width, height), Image.Resampling.BICUBIC)), tensor(high)

    def tensor(image: Any) -> Tensor:
        array = np.atleast_3d(np.asarray(image, dtype=np.float32)) / 255
        return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()

    limits = [len(paths) * k // most for k in range(most + 1)]
    parts = [paths[start:end] for start, end in zip(limits, limits[1:])]
    found = [next((each for each in map(pair, part) if each), None) for part in parts]
    if not any(found):
        raise UserError(f"{flag} {folder} has no picture of {SMALLEST * scale} pixels or more; pass another.")
    return [each for each in found if each]


@torch.no_grad()
def calibrated(net: FusedAetherNet, pairs: Pairs, target: str, reduce_range: bool = False) -> Calibrated:
    """The fused network with int8 weights and ranges from pictures, and what that costs on them.

    Raises:
        ValueError: the network's values are finite on none of the pictures, or weights exceed half precision.
    """
    from tqdm import tqdm

    def shown(doing: str) -> Any:
        return tqdm(pairs, doing, unit="picture", disable=None, leave=False)

    fused = copy.deepcopy(net).cpu().float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantised = prepare_qat(copy.deepcopy(fused), calibration=(low for low, _ in shown("calibrating")))
    stored = quantised.convert_to_quantized()
    written = stored.for_target(target, reduce_range)
    gains = [psnr(written(low), high) - psnr(fused(low), high) for low, high in shown("measuring")]
    return Calibrated(stored, [str(each.message) for each in caught], sum(gains) / len(gains), min(gains))


def psnr(output: Tensor, truth: Tensor) -> float:
    """PSNR of 8-bit pictures in dB; 99 if they are equal."""
    error = float((output.clamp(0, 1).mul(255).round() - truth.mul(255).round()).pow(2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0
