"""How far training and validation output drift apart at small batches, and what the option batch_renorm does about it.

    python benchmarks/small_batch.py                 # the table of docs/small_batch.md
    python benchmarks/small_batch.py --iterations 50 # a quick look

A small x2 network is trained on random crops of scikit-image's photographs, once per batch size and treatment, and asked twice about
the same held-out crops: in training mode (normalised with their own statistics, as the loss sees it) and in evaluation mode (as
validation and every user sees it). drop_path is 0, so that the norms are the only difference between the two.

    plain      batch statistics to the end (the default)
    renorm     batch_renorm: true from the first iteration
    bounded    batch_renorm: true and bound: 1.0
    frozen     batch statistics, and for the last quarter the running ones, no longer updated
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import List, Tuple

import torch
from skimage import data
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "archs"))
from aether_arch import AetherNet, DeploymentNorm

SCALE, CROP = 2, 24  # LR pixels
TREATMENTS = ("plain", "renorm", "bounded", "frozen")


def photographs() -> Tuple[List[Tensor], List[Tensor]]:
    """Pictures for training and for validation, (3, H, W) in [0, 1]; CC0 or public domain."""

    def read(image: object) -> Tensor:
        return torch.as_tensor(image)[..., :3].permute(2, 0, 1).float() / 255

    seen, held_out = (data.astronaut, data.chelsea, data.immunohistochemistry), (data.coffee, data.rocket)
    return [read(image()) for image in seen], [read(image()) for image in held_out]


def crops(images: List[Tensor], count: int, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """``count`` random pairs (LR, HR), the LR made by antialiased bicubic resizing."""
    size, pairs = SCALE * CROP, []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        y, x = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[1:])
        pairs.append(image[:, y : y + size, x : x + size])
    hr = torch.stack(pairs)
    return F.interpolate(hr, scale_factor=1 / SCALE, mode="bicubic", antialias=True).clamp(0, 1), hr


def psnr(output: Tensor, target: Tensor) -> float:
    return float(-10 * torch.log10(F.mse_loss(output.clamp(0, 1), target)))


@torch.no_grad()
def gap(net: AetherNet, images: List[Tensor], batch: int) -> Tuple[float, float, float]:
    """rms difference between both modes in 1/255, PSNR of training mode minus evaluation mode, and PSNR of evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    tested = copy.deepcopy(net)
    lr, hr = crops(images, 96, generator)
    evaluated = torch.cat([tested.eval()(part) for part in lr.split(16)])
    trained = torch.cat([copy.deepcopy(net)(part) for part in lr.split(batch)])  # as training left it; a copy each, for its statistics move
    return float((trained - evaluated).pow(2).mean().sqrt() * 255), psnr(trained, hr) - psnr(evaluated, hr), psnr(evaluated, hr)


def train(treatment: str, batch: int, iterations: int, rate: float) -> Tuple[AetherNet, float]:
    """The trained network and the largest loss seen, relative to the first."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = photographs()[0]
    net = AetherNet(scale=SCALE, embed_dim=32, depths=(2, 2), drop_path_rate=0.0, batch_renorm=treatment in ("renorm", "bounded"),
                    bound=1.0 if treatment == "bounded" else None).train()  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, rate / 10)
    losses = []
    for iteration in range(iterations):
        if treatment == "frozen" and iteration == iterations * 3 // 4:
            for module in net.modules():
                if isinstance(module, DeploymentNorm):
                    module.eval()
        lr, hr = crops(images, batch, generator)
        loss = (net(lr) - hr).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return net, max(losses) / losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--treatments", nargs="+", default=list(TREATMENTS), choices=TREATMENTS)
    args = parser.parse_args()
    held_out = photographs()[1]
    print(f"{args.iterations} iterations, learning rate {args.rate:g}, {CROP}x{CROP} crops, x{SCALE}\n")
    print("| batch | treatment | gap, rms (1/255) | training minus evaluation mode (dB) | PSNR, evaluation mode (dB) | largest loss / first |")
    print("|---|---|---|---|---|---|", flush=True)
    for batch in args.batches:
        for treatment in args.treatments:
            net, peak = train(treatment, batch, args.iterations, args.rate)
            rms, difference, reached = gap(net, held_out, batch)
            print(f"| {batch} | {treatment} | {rms:.3f} | {difference:+.3f} | {reached:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
