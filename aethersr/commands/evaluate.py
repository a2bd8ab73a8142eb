"""Measure PSNR and SSIM of networks on your own pictures, beside bicubic interpolation.

    aether-evaluate 2x_net.safetensors 2x_net_int8.onnx --hr Set5 Set14
    aether-evaluate 2x_net.pth --hr pictures/hr --lr pictures/lr --each
    aether-evaluate --scale 2 --hr Set5                       # bicubic alone
    aether-evaluate 2x_net.pth --hr pictures --jpeg 75        # what it makes of compressed pictures

Takes every form and file: training and fused weights, half precision, int8, ONNX, NCNN (.param). With
``--hr`` alone the low-resolution pictures are made as in papers (MATLAB's bicubic reduction); with ``--lr``
they are yours, with the same names. PSNR and SSIM are computed on the luma, without a border of ``scale``
pixels.
"""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from aethersr.commands import check_device, exit_code
from aethersr.errors import UserError, missing_package
from aethersr.identify import add_img_range
from aethersr.network import open_upscaler
from aethersr.quality import find_pictures, read_rgb

Table = Dict[str, Dict[str, List[Tuple[float, float]]]]  # [row][folder] -> (PSNR, SSIM) of each picture


class Pair(NamedTuple):
    name: str
    hr: Path
    lr: Optional[Path]


def find_pairs(folder: Path, low: Optional[Path], scale: int) -> List[Pair]:
    """A folder's pictures, each with its low-resolution version: the same name or, as in DIV2K, NAMEx2."""
    found = find_pictures(folder, "--hr")
    if low is None:
        return [Pair(path.name, path, None) for path in found]
    lows = {path.stem: path for path in find_pictures(low, "--lr")}
    pairs = [Pair(p.name, p, lows.get(p.stem, lows.get(f"{p.stem}x{scale}"))) for p in found]
    lonely = [pair.name for pair in pairs if pair.lr is None]
    if lonely:
        count = f"{len(lonely)} of {len(pairs)} pictures of {folder} have no pair there"
        raise UserError(f"{low} lacks {lonely[0]} ({count}); give both the same names (--lr).")
    return pairs


def measure(
    upscalers: Dict[str, Callable[[Any], Any]], pairs: List[Pair], scale: int, jpeg: Optional[int] = None
) -> Dict[str, List[Tuple[float, float]]]:
    """PSNR and SSIM of each picture, by row of the table; bicubic comes first."""
    from aethersr.quality import compressed, crop_to_multiple, quality, resize

    found: Dict[str, List[Tuple[float, float]]] = {name: [] for name in ("bicubic", *upscalers)}
    for pair in pairs:
        truth = crop_to_multiple(read_rgb(pair.hr, "--hr"), scale)
        height, width = (side // scale for side in truth.shape[:2])
        if pair.lr is None:
            low = resize(truth, height, width)
        else:
            low = read_rgb(pair.lr, "--lr")
            if low.shape[:2] != (height, width):
                sizes = f"{low.shape[1]}x{low.shape[0]}; expected {width}x{height}, {pair.hr} by {scale}"
                raise UserError(f"{pair.lr} has {sizes} (--lr).")
        low = compressed(low, jpeg)
        rows = {"bicubic": lambda x: resize(x, x.shape[0] * scale, x.shape[1] * scale), **upscalers}
        for name, upscale in rows.items():
            try:
                found[name].append(quality(truth, upscale(low), scale))
            except ValueError as error:
                raise UserError(f"{pair.hr}: {error} (--hr).") from None
    return found


def markdown(table: Table, folders: Dict[str, List[Pair]], each: bool) -> str:
    """A row for each network and a column for each folder; with ``each``, first a row for each picture."""
    lines = []
    if each:
        for folder, pairs in folders.items():
            lines += [row(f"{folder}: PSNR-Y, dB / SSIM", list(table)), "|---|" + "---:|" * len(table)]
            for k, pair in enumerate(pairs):
                lines.append(row(pair.name, [figures([cells[folder][k]]) for cells in table.values()]))
            lines.append("")
    lines += [row("PSNR-Y, dB / SSIM", list(folders)), "|---|" + "---:|" * len(folders)]
    lines += [row(name, [figures(cells[folder]) for folder in folders]) for name, cells in table.items()]
    return "\n".join(lines)


def row(name: str, cells: List[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def figures(values: List[Tuple[float, float]]) -> str:
    decibels, likeness = (sum(value) / len(value) for value in zip(*values))
    return f"{decibels:.2f} / {likeness:.4f}"


def matching(pattern: Path) -> List[Path]:
    """The files that ``pattern`` matches: shells on Windows leave that to the program."""
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [pattern]
    return [Path(name) for name in sorted(glob.glob(str(pattern)))] or [pattern]


def names(paths: List[Path]) -> Dict[str, Path]:
    """Short names: the file's name, or the whole path if two files share it."""
    short = [path.name for path in paths]
    return {str(path) if short.count(path.name) > 1 else path.name: path for path in paths}


def evaluate(args: argparse.Namespace) -> None:
    try:
        import numpy  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise missing_package(error, "aether-evaluate", "upscale") from None
    check_device(args.device)
    files = [path for pattern in args.files for path in matching(pattern)]
    networks = {
        name: open_upscaler(path, args.device, "FILE", args.img_range) for name, path in names(files).items()
    }
    scales = {name: scale for name, (_, scale) in networks.items()}
    if args.scale:
        scales["--scale"] = args.scale
    if not scales:
        raise UserError(
            "neither FILE nor --scale was given; pass a network, or the scale for bicubic alone (--scale)."
        )
    if len(set(scales.values())) > 1:
        each = ", ".join(f"{name} x{scale}" for name, scale in scales.items())
        raise UserError(f"the scales differ ({each}); pass networks of one scale (FILE).")
    scale = next(iter(scales.values()))
    for path in args.hr:
        if [each.resolve() for each in args.hr].count(path.resolve()) > 1:
            raise UserError(f"{path} was given twice; pass each folder once (--hr).")
    if args.lr and len(args.lr) != len(args.hr):
        raise UserError(f"--lr has {len(args.lr)} folders and --hr {len(args.hr)}; pass one for each (--lr).")
    lows = args.lr or [None] * len(args.hr)
    folders = {name: find_pairs(path, low, scale) for (name, path), low in zip(names(args.hr).items(), lows)}
    table: Table = {name: {} for name in ("bicubic", *networks)}
    upscalers = {name: upscale for name, (upscale, _) in networks.items()}
    for folder, pairs in folders.items():
        for name, values in measure(upscalers, pairs, scale, args.jpeg).items():
            table[name][folder] = values
    print(markdown(table, folders, args.each))


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="aether-evaluate", description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="networks: .safetensors, .pth, .onnx or .param"
    )
    parser.add_argument(
        "--hr", nargs="+", type=Path, required=True, metavar="FOLDER", help="folders with the ground truth"
    )
    parser.add_argument(
        "--lr",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="low-resolution versions with the same names (default: made from --hr, bicubic)",
    )
    text = "scale for bicubic alone, without FILE"
    parser.add_argument("--scale", type=int, choices=(1, 2, 3, 4, 8), help=text)
    text = "compress the low-resolution pictures first: quality 1 to 100"
    parser.add_argument("--jpeg", type=int, metavar="QUALITY", help=text)
    parser.add_argument("--each", action="store_true", help="also print a row for each picture")
    add_img_range(parser)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    return exit_code("aether-evaluate", lambda: evaluate(args), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
