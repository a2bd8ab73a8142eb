"""Upscale pictures of any size with an AetherNet: a file, or every picture in a folder.

    python upscale.py --model 4x_MyModel_fused.safetensors --input photo.png --output photo_4x.png
    python upscale.py --model 4x_MyModel_fp16.onnx --input folder --output upscaled

Takes weights of every form (.pth, .safetensors) and every ONNX file that fuse_aether.py writes, also those of
fixed size. Reads and writes PNG, JPEG, WebP, TIFF, BMP, AVIF and still GIF, and keeps 16 bits, transparency,
greyscale, colour profile, EXIF, XMP and dpi. The network sees one tile at a time, so its memory doesn't grow
with the picture. From Python: ``aethersr.upscale_tiled(net, image)``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple, Union

import torch

from aethersr.commands import check_device, exit_code, program_name
from aethersr.errors import UserError, missing_package
from aethersr.identify import add_img_range

PROGRAM = program_name("aether-upscale", "upscale.py")


class Progress:
    """Shows pictures, megapixels a second and the time left, if the standard error is a terminal."""

    FORMAT = "{percentage:3.0f}% |{bar}| {desc}{remaining} left"

    def __init__(self, count: int) -> None:
        from tqdm import tqdm

        self.count, self.done, self.pixels, self.begin = count, 0, 0, time.monotonic()
        quiet = None if sys.stderr else True  # None: unless it is a terminal
        self.bar: Any = tqdm(total=count, bar_format=self.FORMAT, disable=quiet, miniters=0)
        self.tick(0)

    def tick(self, part: float) -> None:
        """Another ``part`` of a picture is done."""
        speed = self.pixels / 1e6 / max(time.monotonic() - self.begin, 1e-3)
        words = f"{self.done} of {self.count} pictures, {speed:.2f} megapixels/s, "
        self.bar.set_description_str(words, refresh=False)
        self.bar.n = min(self.count, max(self.done, self.bar.n + part))
        self.bar.update(0)

    def finish(self, size: Tuple[int, int]) -> None:
        """A picture of this size was written or skipped."""
        self.done += 1
        self.pixels += size[0] * size[1]
        self.tick(0)

    def say(self, line: str) -> None:
        """Print a line to the standard output without breaking the bar."""
        print(line) if self.bar.disable else self.bar.write(line)


@contextmanager
def large_pictures_allowed() -> Iterator[None]:
    """Lift Pillow's limit, which is for untrusted pictures, and hide its warnings about harmless defects."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2**29  # it refuses twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def choose_overlap(network: Any, wanted: Union[int, str, None]) -> int:
    """The overlap of tiles in pixels. Says so if a network of fixed size has too little room for it."""
    from aethersr.tiling import SHORT_OVERLAP

    if isinstance(wanted, int):
        return wanted
    overlap = network.reach if wanted == "exact" else min(network.reach, SHORT_OVERLAP)
    # A larger one would take over a dozen times the work of the picture itself.
    if network.size is not None and 8 * overlap > 3 * min(network.size):
        overlap = min(network.size) // 4
        few = f"The network takes {network.size[1]}x{network.size[0]} pixels, too few for tiles without seams"
        print(f"{few}; export it with a larger --static.")
    return overlap


def upscale(args: argparse.Namespace) -> None:
    """What the command does; raises UserError."""
    if args.device:
        check_device(args.device)
    if args.fp16 and (args.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("--fp16 is slower than float32 on a CPU; pass --device cuda, or leave --fp16 out.")
    if args.tile < 1:
        raise UserError(f"--tile {args.tile} is not possible; expected 1 or more pixels.")
    if isinstance(args.overlap, int) and args.overlap < 0:
        raise UserError(f"--overlap {args.overlap} is not possible; expected 0 or more pixels, or 'exact'.")
    try:
        import tqdm  # noqa: F401

        from aethersr.jobs import find_jobs
        from aethersr.network import load_network
        from aethersr.upscaling import Upscaler
    except ImportError as error:
        raise missing_package(error, PROGRAM, "upscale") from None
    source, target = Path(args.input), Path(args.output)
    jobs, problems = find_jobs(source, target, args.recursive, args.overwrite, args.skip_existing)
    network = load_network(Path(args.model), args.device, args.fp16, args.img_range)
    overlap = choose_overlap(network, args.overlap)
    if source.is_dir():
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} can't be made: {error.strerror}; pass another --output.") from None
    written = 0
    progress = Progress(len(jobs))
    work = Upscaler(network, args.tile, overlap, args.wrap, args.overwrite, progress.say)
    try:
        with large_pictures_allowed():
            for result in work.run(jobs, progress.tick):
                progress.finish(result.size)
                if result.problem:
                    problems.append(result.problem)
                else:
                    written += 1
                    progress.say(f"Wrote {result.job.target} ({result.size[0]}x{result.size[1]})")
    finally:
        progress.bar.close()
    if problems:
        if source.is_dir():
            count = len(problems)
            problems.append(
                f"{count} of {count + written} files were skipped, for the reasons above; "
                f"the others are written. Fix them and pass --skip-existing."
            )
        raise UserError(f"\n{PROGRAM}: error: ".join(problems))
    if not jobs:
        print(f"Nothing to do: every picture of {source} is in {target} (--skip-existing).")


def _overlap(text: str) -> Union[int, str]:
    return text if text == "exact" else int(text)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="weights (.pth, .safetensors; fused or not) or an exported network (.onnx)",
    )
    add("--input", required=True, help="a picture, or a folder of pictures")
    add("--output", required=True, help="the picture to write, or a folder (names and formats stay the same)")
    add("--recursive", action="store_true", help="also upscale the pictures in subfolders")
    add(
        "--skip-existing",
        action="store_true",
        help="skip pictures whose output exists, to continue a folder",
    )
    add("--overwrite", action="store_true", help="replace existing files")
    add("--wrap", nargs="?", choices=("x", "y", "xy"), const="xy", default="",
        help="the picture is a tileable texture: horizontally (x), vertically (y), or both "
        "(xy, the default of --wrap alone)")  # fmt: skip
    add("--tile", type=int, default=512, help="largest side of a tile in input pixels; smaller tiles need "
        "less memory (default: 512). Ignored for an ONNX file of fixed size")  # fmt: skip
    add("--overlap", type=_overlap, metavar="PIXELS", help="margin round each tile that the network also "
        "sees; 'exact' makes tiles equal to the whole picture (default: less, and within half a step of "
        "1/255)")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one that can run the file")
    add("--fp16", action="store_true", help="half precision, on CUDA only")
    add_img_range(parser)
    args = parser.parse_args(argv)
    if args.overwrite and args.skip_existing:
        parser.error("--overwrite and --skip-existing exclude each other; pass one of them")
    return args


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code(PROGRAM, lambda: upscale(parse_args(argv)), "unfinished pictures were not written.")
