"""How much each block of a network contributes: the rms of what it adds relative to its input.

    python benchmarks/blocks.py FILE [FILE ...] --picture datasets/photographs/astronaut.png

If all blocks of a trained network add about a hundredth, they have learned next to nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, List

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]
from aether_arch import AetherBlock, FusedAetherBlock  # noqa: E402
from cuts import as_images  # noqa: E402

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.commands import exit_code  # noqa: E402
from aethersr.identify import aether_from_state_dict  # noqa: E402
from aethersr.quality import read_rgb  # noqa: E402


@torch.no_grad()
def contributions(net: torch.nn.Module, image: torch.Tensor) -> List[float]:
    """Of each block, from first to last."""
    found: List[float] = []

    def look(block: Any, inputs: Any, out: torch.Tensor) -> None:
        found.append(float((out - inputs[0]).square().mean().sqrt() / inputs[0].square().mean().sqrt()))

    blocks = [part for part in net.modules() if isinstance(part, (AetherBlock, FusedAetherBlock))]
    hooks = [block.register_forward_hook(look) for block in blocks]
    net(image)
    for hook in hooks:
        hook.remove()
    return found


def print_contributions(files: List[Path], picture: Path) -> None:
    pixels = read_rgb(picture, "--picture")
    top, left = (max(0, side - 128) // 2 for side in pixels.shape[:2])
    image = as_images([torch.from_numpy(pixels[top : top + 128, left : left + 128].copy())])
    for file in files:
        net = aether_from_state_dict(read_checkpoint(file, "FILE").state)
        print(file.name, " ".join(f"{value:.3f}" for value in contributions(net, image)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="weights")
    parser.add_argument("--picture", type=Path, required=True, help="its middle, 128x128, goes through")
    args = parser.parse_args()
    return exit_code(
        "blocks.py", lambda: print_contributions(args.files, args.picture), "no file was changed."
    )


if __name__ == "__main__":
    sys.exit(main())
