"""How much upscaling in tiles differs from upscaling the whole picture, and what the overlap costs.

    python benchmarks/tiles.py                     # aether_medium's width and attention, eight blocks
    python benchmarks/tiles.py --embed_dim 180     # aether_large's
    python benchmarks/tiles.py --model FILE        # weights of your own, .pth or .safetensors, x2

Without --model the network is first trained for some minutes, since random weights say nothing. Then it
upscales a photograph it was not trained on, whole and in tiles, with its receptive field as overlap and with
upscale.py's shorter default. With the former, only networks with channel attention differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from benchmark import ROOT, table
from small_batch import SCALE, crops, photographs, psnr
from torch.nn import functional as F

sys.path[:0] = [str(ROOT), str(ROOT / "archs")]
from aether_arch import AetherNet  # noqa: E402

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.identify import aether_from_state_dict  # noqa: E402
from aethersr.tiling import SHORT_OVERLAP, receptive_field, upscale_tiled  # noqa: E402


def trained(embed_dim: int, depths: list[int], iterations: int) -> AetherNet:
    torch.manual_seed(0)
    generator, images = torch.Generator().manual_seed(0), photographs()[0]
    net = AetherNet(
        scale=SCALE, embed_dim=embed_dim, depths=depths, drop_path_rate=0.0, norm="batch", bound=1.0
    ).train()
    optimizer = torch.optim.AdamW(net.parameters(), 5e-4, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, iterations)
    for _ in range(iterations):
        lr, hr = crops(images, 8, generator)
        optimizer.zero_grad()
        (net(lr) - hr).abs().mean().backward()
        optimizer.step()
        scheduler.step()
    return net.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--embed_dim", type=int, default=128)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 2, 2, 2])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--model", type=Path, help="weights to measure with, instead of a training")
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 128, 256])
    args = parser.parse_args()
    if args.model:
        try:
            fused, title = aether_from_state_dict(read_checkpoint(args.model).state).fused(), args.model.name
        except UserError as error:
            parser.error(str(error))
        if fused.scale != SCALE:
            parser.error(f"{args.model} is x{fused.scale}; pass weights that are x{SCALE}")
    else:
        with torch.enable_grad():
            fused = trained(args.embed_dim, args.depths, args.iterations).fused()
        depths = ", ".join(map(str, args.depths))
        title = f"x{SCALE}, width {args.embed_dim}, blocks {depths}, attention, {args.iterations} iterations"
    cells = []
    truth = photographs()[1][0][None]  # coffee, 400x600
    image = F.interpolate(truth, scale_factor=1 / SCALE, mode="bicubic", antialias=True).clamp(0, 1)
    for name, picture, gt in (("coffee, reduced", image, truth), ("coffee, as it is", truth, None)):
        whole = fused(picture)
        for tile in args.tiles:
            if tile >= max(picture.shape[2:]):
                continue
            for overlap in sorted({SHORT_OVERLAP, receptive_field(fused)}):
                sizes: list[int] = []

                def counting(crop: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
                    sizes.append(crop.shape[2] * crop.shape[3])
                    return fused(crop)

                tiled = upscale_tiled(counting, picture, tile, overlap)
                steps = (tiled - whole).abs() * 255
                change = "-" if gt is None else f"{psnr(tiled, gt) - psnr(whole, gt):+.4f}"
                work = f"{sum(sizes) / picture[0, 0].numel():.2f}"
                size = f"{picture.shape[3]}x{picture.shape[2]}"
                row = [f"{name}, {size}", str(tile), str(overlap), work]
                cells.append([*row, f"{steps.mean():.2g}", f"{steps.max():.2g}", change])
    print(f"{title}\n")
    print(
        "\n".join(
            table(["picture", "tile", "overlap", "work", "mean, 1/255", "largest, 1/255", "PSNR, dB"], cells)
        )
    )


if __name__ == "__main__":
    main()
