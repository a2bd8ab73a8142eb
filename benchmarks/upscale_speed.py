"""How close upscaling a folder, with reading and writing, comes to the speed of the network alone.

    python benchmarks/upscale_speed.py                       # PNG, a network that waits 30 ms as for a GPU
    python benchmarks/upscale_speed.py --busy --format .jpg  # one that computes for 30 ms on this processor

Two hundred photographs of 512x384 pixels are read, upscaled by 2 and written. The network takes the same time
for every picture, so the best possible time is that times the number of pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.jobs import Job  # noqa: E402
from aethersr.picture import FORMATS, Picture  # noqa: E402
from aethersr.upscaling import Upscaler  # noqa: E402


class FixedCost:
    """Doubles the pixels and takes ``seconds`` in total, waiting or computing."""

    in_chans, scale, reach, size = 3, 2, 0, None

    def __init__(self, seconds: float, busy: bool) -> None:
        self.seconds, self.busy, self.spent = seconds, busy, 0.0

    def __call__(self, image: Tensor) -> Tensor:
        begin = time.perf_counter()
        result = F.interpolate(image, scale_factor=self.scale, mode="nearest")
        block = torch.ones(256, 256)
        while self.busy and time.perf_counter() - begin < self.seconds:
            block = block @ block / 256
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - begin)))
        self.spent += time.perf_counter() - begin
        return result


def photographs(folder: Path, count: int, ending: str) -> list[Job]:
    """Shifted parts of one photograph, all different."""
    jobs = []
    whole = np.asarray(Image.fromarray(data.coffee()).resize((712, 584), Image.Resampling.BICUBIC))
    (folder / "in").mkdir()
    for number in range(count):
        y, x = number % 200, (number * 7) % 200
        name = f"{number:03}{ending}"
        content = Picture(np.ascontiguousarray(whole[y : y + 384, x : x + 512])).encode(FORMATS[ending])
        (folder / "in" / name).write_bytes(content)
        jobs.append(Job(folder / "in" / name, folder / "out" / name))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--ms", type=float, default=30.0, help="what the network takes for one picture")
    parser.add_argument("--busy", action="store_true", help="the network computes on one core meanwhile")
    parser.add_argument("--format", default=".png", choices=sorted(FORMATS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = FixedCost(args.ms / 1e3, args.busy)
    with tempfile.TemporaryDirectory() as name:
        jobs = photographs(Path(name), args.count, args.format)
        upscaler = Upscaler(network, tile=512, overlap=0)
        begin = time.perf_counter()
        problems = [result.problem for result in upscaler.run(jobs) if result.problem]
        seconds = time.perf_counter() - begin
    if problems:
        sys.exit(problems[0])
    kind = "computes" if args.busy else "waits"
    print(f"{args.count} pictures, {args.format}, a network that {kind} for {args.ms:g} ms:")
    print(f"  {seconds:.2f} s, the network {network.spent:.2f} s: {network.spent / seconds:.3f} of its speed")
    print(
        f"  {args.count / seconds:.1f} pictures/s, {args.count * 1024 * 768 / 1e6 / seconds:.1f} megapixels/s"
    )


if __name__ == "__main__":
    main()
