"""The pictures of quality.py: random crops to train on, and others for validation."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from aethersr.errors import UserError
from aethersr.quality import crop_to_multiple, find_pictures, psnr, read_rgb, resize


def as_images(pictures: List[Any]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


class Cuts:
    """Random crops of a folder's pairs, rotated and flipped, the same for the same seed."""

    def __init__(self, folder: Path) -> None:
        names = sorted(path.name for path in (folder / "gt").glob("*.png"))
        if not names:
            told = "training/prepare_pictures.py writes pairs (--data)."
            raise UserError(f"{folder / 'gt'} holds no .png; {told}")
        self.pairs = [
            tuple(read_rgb(folder / sub / name, "--data") for sub in ("lq", "gt")) for name in names
        ]
        self.side = min(min(low.shape[:2]) for low, _ in self.pairs)  # of the smallest cut, low resolution
        self.scale = self.pairs[0][1].shape[0] // self.pairs[0][0].shape[0]

    def batch(self, count: int, patch: int, random: np.random.Generator) -> Tuple[Tensor, Tensor]:
        lows: List[Any] = []
        highs: List[Any] = []
        for _ in range(count):
            low, high = self.pairs[random.integers(len(self.pairs))]
            y, x = (int(random.integers(side - patch + 1)) for side in low.shape[:2])
            turns, mirrored = int(random.integers(4)), bool(random.integers(2))
            for picture, scale, kept in ((low, 1, lows), (high, self.scale, highs)):
                crop = picture[y * scale : (y + patch) * scale, x * scale : (x + patch) * scale]
                kept.append(np.rot90(crop[:, ::-1] if mirrored else crop, turns))
        return as_images(lows), as_images(highs)


class Validation:
    """The centres of a folder's pictures, and their reductions, made as in MATLAB."""

    def __init__(self, folder: Path, side: int, scale: int) -> None:
        self.truths, self.scale = [], scale
        for path in find_pictures(folder, "--validation"):
            picture = read_rgb(path, "--validation")
            top, left = (max(0, length - side) // 2 for length in picture.shape[:2])
            self.truths.append(crop_to_multiple(picture[top : top + side, left : left + side], scale))
        self.lows = [resize(x, x.shape[0] // scale, x.shape[1] // scale) for x in self.truths]

    def bicubic(self) -> float:
        pairs = zip(self.truths, self.lows)
        return statistics.mean(psnr(x, resize(low, *x.shape[:2]), self.scale) for x, low in pairs)

    @torch.no_grad()
    def measure(self, net: nn.Module, device: str) -> float:
        """The mean PSNR-Y, in dB."""
        found = []
        for truth, low in zip(self.truths, self.lows):
            out = net(as_images([low]).to(device))[0].permute(1, 2, 0).float()
            out = (out.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            found.append(psnr(truth, out, self.scale))
        return statistics.mean(found)
