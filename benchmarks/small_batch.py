"""What batch statistics cost: networks trained with norm "frozen" and "batch" at several batch sizes.

Usage:
    python benchmarks/small_batch.py                  # a table
    python benchmarks/small_batch.py --iterations 50  # a quick look

A small x2 network is trained on random crops of scikit-image's photographs and then tested twice on held-out
ones: in training mode, as the loss sees it, and in evaluation mode, as users do. With batch statistics the
two differ. Stochastic depth is off, so the norms are the only difference.
"""

from __future__ import annotations

import argparse
import copy
from typing import List, Tuple

import torch
from networks import AetherNet
from skimage import data
from torch import Tensor
from torch.nn import functional as F

SCALE, CROP = 2, 24  # LR pixels
NORMS = ("frozen", "batch")


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
    """Rms difference of the two modes in 1/255, PSNR of training minus evaluation, PSNR of evaluation."""
    generator = torch.Generator().manual_seed(1)
    tested = copy.deepcopy(net)
    lr, hr = crops(images, 96, generator)
    evaluated = torch.cat([tested.eval()(part) for part in lr.split(16)])
    # As training left it; a copy for each batch, since batch statistics move.
    trained = torch.cat([copy.deepcopy(net)(part) for part in lr.split(batch)])
    return (
        float((trained - evaluated).pow(2).mean().sqrt() * 255),
        psnr(trained, hr) - psnr(evaluated, hr),
        psnr(evaluated, hr),
    )


def train(norm: str, batch: int, iterations: int, rate: float) -> Tuple[AetherNet, float]:
    """The trained network and the largest loss seen, relative to the first."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = photographs()[0]
    net = AetherNet(scale=SCALE, embed_dim=32, depths=(2, 2), drop_path_rate=0.0, norm=norm).train()
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, rate / 10)
    losses = []
    for _ in range(iterations):
        lr, hr = crops(images, batch, generator)
        loss = (net(lr) - hr).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return net, max(losses) / losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--norms", nargs="+", default=list(NORMS), choices=NORMS)
    args = parser.parse_args()
    held_out = photographs()[1]
    print(f"{args.iterations} iterations, learning rate {args.rate:g}, {CROP}x{CROP} crops, x{SCALE}\n")
    head = (
        "batch",
        "norm",
        "gap, rms (1/255)",
        "training minus evaluation, dB",
        "PSNR, dB",
        "largest loss / first",
    )
    print("| " + " | ".join(head) + " |")
    print("|---|---|---|---|---|---|", flush=True)
    for batch in args.batches:
        for norm in args.norms:
            net, peak = train(norm, batch, args.iterations, args.rate)
            rms, difference, reached = gap(net, held_out, batch)
            cells = [str(batch), norm, f"{rms:.3f}", f"{difference:+.3f}", f"{reached:.2f}", f"{peak:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
