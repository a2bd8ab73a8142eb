"""The pictures of equal_budget.py: random crops to train on, and others for validation."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from aethersr.errors import UserError
from aethersr.quality import crop_to_multiple, find_pictures, psnr, read_rgb, resize


class Cuts:
    """Random crops of a folder's pairs, rotated and flipped, the same for the same seed."""

    def __init__(self, folder: Path, limit: Optional[int]) -> None:
        names = sorted(path.name for path in (folder / "gt").glob("*.png"))[:limit]
        if not names:
            raise UserError(
                f"{folder / 'gt'} holds no .png; training/prepare_pictures.py writes pairs (--data)."
            )
        self.pairs = [
            (read_rgb(folder / "lq" / name, "--data"), read_rgb(folder / "gt" / name, "--data"))
            for name in names
        ]
        self.side = min(min(low.shape[:2]) for low, _ in self.pairs)  # of the smallest cut, low resolution
        self.scale = self.pairs[0][1].shape[0] // self.pairs[0][0].shape[0]

    def batch(self, count: int, patch: int, random: np.random.Generator) -> Tuple[Tensor, Tensor]:
        lows: List[Tensor] = []
        highs: List[Tensor] = []
        for _ in range(count):
            low, high = self.pairs[random.integers(len(self.pairs))]
            y, x = (int(random.integers(side - patch + 1)) for side in low.shape[:2])
            turns, mirrored = int(random.integers(4)), bool(random.integers(2))
            for picture, scale, kept in ((low, 1, lows), (high, self.scale, highs)):
                crop = picture[y * scale : (y + patch) * scale, x * scale : (x + patch) * scale]
                crop = np.rot90(crop[:, ::-1] if mirrored else crop, turns)
                kept.append(torch.from_numpy(crop.copy()))
        return as_images(lows), as_images(highs)


def as_images(pictures: List[Tensor]) -> Tensor:
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


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
        found = []
        for truth, low in zip(self.truths, self.lows):
            out = net(as_images([torch.from_numpy(low)]).to(device))[0].permute(1, 2, 0).float()
            out = (out.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            found.append(psnr(truth, out, self.scale))
        return statistics.mean(found)

    @torch.no_grad()
    def largest(self, net: nn.Module, device: str) -> float:
        """The largest magnitude of any layer's input or output, also for flat, striped and noisy pictures.

        Infinity if any value is not finite.
        """
        found = 0.0

        def look(module: nn.Module, inputs: Any, out: Any) -> None:
            nonlocal found
            for value in (float(tensor.abs().max()) for tensor in (inputs[0], out)):
                found = max(found, value if math.isfinite(value) else math.inf)

        leaves = [module for module in net.modules() if not list(module.children())]
        hooks = [module.register_forward_hook(look) for module in leaves]
        stripes = (torch.arange(48) // 2 % 2).float().expand(1, 3, 48, 48)
        noise = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        hard = [stripes, stripes.transpose(2, 3), noise, noise.round(), noise * 0, noise * 0 + 1]
        for picture in [as_images([torch.from_numpy(low)]) for low in self.lows] + hard:
            net(picture.to(device))
        for hook in hooks:
            hook.remove()
        return found
