"""Measure PSNR and SSIM of networks on your own pictures, beside bicubic interpolation.

    aether-evaluate 2x_net.safetensors 2x_net_int8.onnx --hr Set5 Set14
    aether-evaluate 2x_net.pth --hr pictures/hr --lr pictures/lr --each

Takes weights of every form, ONNX and NCNN (.param).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from aethersr.commands import DEVICES, Parser, check_device, exit_code, local_path
from aethersr.errors import UserError, need
from aethersr.folders import find_pictures
from aethersr.identify import add_img_range

Pair = Tuple[Path, Optional[Path]]  # high resolution, low resolution
Figures = List[Tuple[float, float]]  # PSNR and SSIM of each picture
TILE = 1024  # larger low-resolution pictures are cut into tiles; the result is the same without attention
NETWORKS = (".safetensors", ".pth", ".pt", ".ckpt", ".onnx", ".param")
HINTS = {
    "--model": "pass the networks without an option",
    "--upscale": "the scale comes from the networks",
    **dict.fromkeys(("--input", "--gt"), "pass --hr"),
}


def find_pairs(folder: Path, low: Optional[Path], scale: int) -> List[Pair]:
    """A folder's pictures, each with its low-resolution version: the same name or, as in DIV2K, NAMEx2."""
    found = find_pictures(folder, "--hr")
    if low is None:
        return [(path, None) for path in found]
    lows = {path.stem: path for path in find_pictures(low, "--lr")}
    pairs = [(path, lows.get(path.stem, lows.get(f"{path.stem}x{scale}"))) for path in found]
    lonely = [path.name for path, lr in pairs if lr is None]
    if lonely:
        count = f"{len(lonely)} of {len(pairs)} pictures of {folder} have no pair there"
        raise UserError(f"{low} lacks {lonely[0]} ({count}); give both the same names (--lr).")
    return pairs


def measure(
    networks: Dict[str, Any], pairs: List[Pair], scale: int, jpeg: Optional[int]
) -> Dict[str, Figures]:
    """The figures by row of the table; bicubic comes first."""
    from tqdm import tqdm

    from aethersr.picture import Picture
    from aethersr.quality import compressed, crop_to_multiple, quality, resize
    from aethersr.upscaling import upscale_picture

    def upscaled(pixels: Any, network: Any) -> Any:
        """(H, W, 3), as aether-upscale computes it."""
        overlap = network.reach if network.size is None else min(network.reach, min(network.size) // 4)
        return upscale_picture(Picture(pixels), network, TILE, overlap).pixels

    rows: Any = {"bicubic": lambda x: resize(x, x.shape[0] * scale, x.shape[1] * scale)}
    rows.update({name: partial(upscaled, network=network) for name, network in networks.items()})
    found: Dict[str, Figures] = {name: [] for name in rows}
    for hr, lr in tqdm(pairs, unit="picture", disable=None, leave=False):
        truth = crop_to_multiple(Picture.read(hr, "--hr").rgb_on_white(), scale)
        height, width = (side // scale for side in truth.shape[:2])
        low = Picture.read(lr, "--lr").rgb_on_white() if lr else resize(truth, height, width)
        if low.shape[:2] != (height, width):
            sizes = f"{low.shape[1]}x{low.shape[0]}; expected {width}x{height}, {hr} by {scale}"
            raise UserError(f"{lr} has {sizes} (--lr).")
        low = low if jpeg is None else compressed(low, jpeg)
        for name, upscale in rows.items():
            try:
                found[name].append(quality(truth, upscale(low), scale))
            except ValueError as error:
                raise UserError(f"{hr}: {error} (--hr).") from None
    return found


def markdown(tables: Dict[str, Dict[str, Figures]], folders: Dict[str, List[Pair]], each: bool) -> str:
    """A row for each network and a column for each folder; with ``each``, first a row for each picture."""

    def row(name: str, cells: Iterable[str]) -> str:
        return f"| {' | '.join([name, *cells])} |"

    def figures(values: Figures) -> str:
        decibels, likeness = (sum(value) / len(value) for value in zip(*values))
        return f"{decibels:.2f} / {likeness:.4f}"

    rows = list(next(iter(tables.values())))
    lines = []
    for folder, pairs in folders.items() if each else ():
        lines += [row(f"{folder}: PSNR-Y, dB / SSIM", rows), "|---|" + "---:|" * len(rows)]
        for k, (path, _) in enumerate(pairs):
            lines.append(row(path.name, [figures([tables[folder][name][k]]) for name in rows]))
        lines.append("")
    lines += [row("PSNR-Y, dB / SSIM", folders), "|---|" + "---:|" * len(folders)]
    lines += [row(name, [figures(tables[folder][name]) for folder in folders]) for name in rows]
    return "\n".join(lines)


def names(paths: List[Path]) -> Dict[str, Path]:
    """Short names: the file's name, or the whole path if two files share it."""
    short = [path.name for path in paths]
    return {str(path) if short.count(path.name) > 1 else path.name: path for path in paths}


def evaluate(args: argparse.Namespace) -> None:
    need("aethersr.quality", "aether-evaluate", "upscale")
    from aethersr.network import load_network

    check_device(args.device)
    words = [*args.hr, *(args.lr or ())]  # an option takes all words that follow it
    args.files += [path for path in words if path.suffix.lower() in NETWORKS]
    highs, lows = ([p for p in each or () if p.suffix.lower() not in NETWORKS] for each in (args.hr, args.lr))
    if not highs:
        raise UserError(f"{args.hr[0]} is a network, expected a folder of pictures; pass one (--hr).")
    opened = {"img_range": args.img_range, "flag": "FILE"}
    networks = {name: load_network(path, args.device, **opened) for name, path in names(args.files).items()}
    scales = {name: network.scale for name, network in networks.items()}
    if args.scale:
        scales["--scale"] = args.scale
    if len({*scales.values()}) != 1:
        each = ", ".join(f"{name} x{scale}" for name, scale in scales.items())
        found = f"the scales differ ({each})" if each else "neither FILE nor --scale was given"
        raise UserError(f"{found}; pass networks of one scale, or the scale for bicubic alone (--scale).")
    scale = next(iter(scales.values()))
    for path in highs:
        if [each.resolve() for each in highs].count(path.resolve()) > 1:
            raise UserError(f"{path} was given twice; pass each folder once (--hr).")
    if lows and len(lows) != len(highs):
        raise UserError(f"--lr has {len(lows)} folders and --hr {len(highs)}; pass one for each (--lr).")
    pairs = zip(names(highs).items(), lows or [None] * len(highs))
    folders = {name: find_pairs(path, low, scale) for (name, path), low in pairs}
    tables = {name: measure(networks, pairs, scale, args.jpeg) for name, pairs in folders.items()}
    print(markdown(tables, folders, args.each))


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser("aether-evaluate", __doc__, HINTS)
    add = parser.add_argument
    add("files", nargs="*", type=local_path, metavar="FILE", help=f"networks: {', '.join(NETWORKS)}")
    several: Any = {"nargs": "+", "type": local_path, "metavar": "FOLDER"}
    add("--hr", required=True, help="folders with the ground truth", **several)
    add("--lr", help="low-resolution versions with the same names (default: made from --hr)", **several)
    add("--scale", type=int, choices=(1, 2, 3, 4, 8), help="scale for bicubic alone, without FILE")
    add("--jpeg", type=int, choices=range(1, 101), metavar="QUALITY", help="compress them first: 1 to 100")
    add("--each", action="store_true", help="also print a row for each picture")
    add_img_range(parser)
    add("--device", default="cpu", choices=DEVICES, help="default: cpu")
    return parser.parse(argv)


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("aether-evaluate", lambda: evaluate(parse_args(argv)), "nothing was written.")
