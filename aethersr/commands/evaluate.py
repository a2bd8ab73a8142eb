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

from aethersr.commands import DEVICES, Parser, check_device, exit_code, local_path
from aethersr.errors import UserError, missing_package
from aethersr.identify import add_img_range

Table = Dict[str, Dict[str, List[Tuple[float, float]]]]  # [row][folder] -> (PSNR, SSIM) of each picture
TILE = 1024  # larger low-resolution pictures are cut into tiles; the result is the same without attention
NETWORKS = (".safetensors", ".pth", ".pt", ".ckpt", ".onnx", ".param")
HINTS = {"--model": "pass the networks without an option", "--input": "pass --hr", "--gt": "pass --hr"}


class Pair(NamedTuple):
    name: str
    hr: Path
    lr: Optional[Path]


def find_pairs(folder: Path, low: Optional[Path], scale: int) -> List[Pair]:
    """A folder's pictures, each with its low-resolution version: the same name or, as in DIV2K, NAMEx2."""
    from aethersr.quality import find_pictures

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


def upscaler(network: Any) -> Callable[[Any], Any]:
    """A function from pixels (H, W, 3) to upscaled ones, as aether-upscale computes them."""
    from aethersr.picture import Picture
    from aethersr.upscaling import upscale_picture

    overlap = network.reach if network.size is None else min(network.reach, min(network.size) // 4)
    return lambda pixels: upscale_picture(Picture(pixels), network, TILE, overlap).pixels


def measure(
    networks: Dict[str, Any], pairs: List[Pair], scale: int, jpeg: Optional[int] = None
) -> Dict[str, List[Tuple[float, float]]]:
    """PSNR and SSIM of each picture, by row of the table; bicubic comes first."""
    from aethersr.picture import Picture
    from aethersr.quality import compressed, crop_to_multiple, quality, resize

    rows = {"bicubic": lambda x: resize(x, x.shape[0] * scale, x.shape[1] * scale)}
    rows.update({name: upscaler(network) for name, network in networks.items()})
    found: Dict[str, List[Tuple[float, float]]] = {name: [] for name in rows}
    for pair in pairs:
        truth = crop_to_multiple(Picture.read(pair.hr, "--hr").rgb_on_white(), scale)
        height, width = (side // scale for side in truth.shape[:2])
        if pair.lr is None:
            low = resize(truth, height, width)
        else:
            low = Picture.read(pair.lr, "--lr").rgb_on_white()
            if low.shape[:2] != (height, width):
                sizes = f"{low.shape[1]}x{low.shape[0]}; expected {width}x{height}, {pair.hr} by {scale}"
                raise UserError(f"{pair.lr} has {sizes} (--lr).")
        low = compressed(low, jpeg)
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
        from aethersr.network import load_network
        from aethersr.quality import find_pictures  # noqa: F401
    except ImportError as error:
        raise missing_package(error, "aether-evaluate", "upscale") from None
    check_device(args.device)
    for folders in (args.hr, args.lr):  # an option takes all words that follow it
        args.files += [path for path in folders or () if path.suffix.lower() in NETWORKS]
    args.hr, lows = ([p for p in each or () if p not in args.files] for each in (args.hr, args.lr))
    if not args.hr:
        raise UserError("no folder with the ground truth was given; pass one (--hr).")
    files = [path for pattern in args.files for path in matching(pattern)]
    networks = {
        name: load_network(path, args.device, img_range=args.img_range, flag="FILE")
        for name, path in names(files).items()
    }
    scales = {name: network.scale for name, network in networks.items()}
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
    if lows and len(lows) != len(args.hr):
        raise UserError(f"--lr has {len(lows)} folders and --hr {len(args.hr)}; pass one for each (--lr).")
    found = {
        name: find_pairs(path, low, scale)
        for (name, path), low in zip(names(args.hr).items(), lows or [None] * len(args.hr))
    }
    table: Table = {name: {} for name in ("bicubic", *networks)}
    for folder, pairs in found.items():
        for name, values in measure(networks, pairs, scale, args.jpeg).items():
            table[name][folder] = values
    print(markdown(table, found, args.each))


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser("aether-evaluate", __doc__, HINTS)
    add = parser.add_argument
    text = "networks: .safetensors, .pth, .onnx or .param"
    add("files", nargs="*", type=local_path, metavar="FILE", help=text)
    several: Any = {"nargs": "+", "type": local_path, "metavar": "FOLDER"}
    add("--hr", required=True, help="folders with the ground truth", **several)
    text = "low-resolution versions with the same names (default: made from --hr, bicubic)"
    add("--lr", help=text, **several)
    add("--scale", type=int, choices=(1, 2, 3, 4, 8), help="scale for bicubic alone, without FILE")
    text = "compress the low-resolution pictures first: quality 1 to 100"
    add("--jpeg", type=int, choices=range(1, 101), metavar="QUALITY", help=text)
    add("--each", action="store_true", help="also print a row for each picture")
    add_img_range(parser)
    add("--device", default="cpu", choices=DEVICES, help="default: cpu")
    return parser.parse(argv)


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("aether-evaluate", lambda: evaluate(parse_args(argv)), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
