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
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from aethersr.commands import exit_code
from aethersr.errors import UserError, first_line, missing_package

KINDS = (".png", ".bmp", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of Pillow, 8 bits
TILE = 1024  # largest side of a low-resolution picture that is not cut into tiles; the result is the same
Upscaler = Callable[[Any], Any]  # (H, W, 3) uint8 -> (scale * H, scale * W, 3) uint8
Table = Dict[str, Dict[str, List[Tuple[float, float]]]]  # [row][folder] -> (PSNR, SSIM) of each picture


class Pair(NamedTuple):
    name: str
    hr: Path
    lr: Optional[Path]


def find_pairs(folder: Path, low: Optional[Path], scale: int) -> List[Pair]:
    """A folder's pictures, each with its low-resolution version: the same name or, as in DIV2K, NAMEx2."""
    found = pictures(folder, "--hr")
    if low is None:
        return [Pair(path.name, path, None) for path in found]
    lows = {path.stem: path for path in pictures(low, "--lr")}
    pairs = [Pair(p.name, p, lows.get(p.stem, lows.get(f"{p.stem}x{scale}"))) for p in found]
    lonely = [pair.name for pair in pairs if pair.lr is None]
    if lonely:
        count = f"{len(lonely)} of {len(pairs)} pictures of {folder} have no pair there"
        raise UserError(f"{low} lacks {lonely[0]} ({count}); give both the same names (--lr).")
    return pairs


def pictures(path: Path, flag: str) -> List[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; pass a folder of pictures, or a picture ({flag}).")
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in KINDS)
    if not found:
        raise UserError(f"{path} holds no picture ({', '.join(KINDS)}); pass another folder ({flag}).")
    return found


def read(path: Path, flag: str) -> Any:
    """(H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            mode = picture.mode
            if mode in MODES:
                return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}; leave it out ({flag}).") from None
    raise UserError(f"{path} has pixels of the kind {mode}; pass pictures of 8 bits a channel ({flag}).")


def open_network(path: Path, device: str) -> Tuple[Upscaler, int]:
    """The network in a file as a function from pictures to pictures, and its scale."""
    from aethersr.network import load_network
    from aethersr.tiling import upscale_tiled

    if path.suffix.lower() == ".param":
        run = ncnn_network(path)
        return of_pictures(run, 3), run(torch.zeros(1, 3, 8, 8)).shape[-1] // 8
    try:
        net = load_network(path, device, fp16=False)
    except UserError as error:
        raise UserError(str(error).replace("--model", "FILE")) from None
    if net.in_chans not in (1, 3):
        raise UserError(f"{path} takes {net.in_chans} channels; pass a network for 1 or 3 (FILE).")
    overlap = net.reach if net.size is None else min(net.reach, min(net.size) // 4)  # as aether-upscale
    return of_pictures(lambda x: upscale_tiled(net, x, TILE, overlap, size=net.size), net.in_chans), net.scale


def ncnn_network(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from aethersr.ncnn import run

    try:
        import ncnn
    except ImportError:
        raise UserError(f"{path} needs the package ncnn: pip install ncnn, or leave it out (FILE).") from None
    net = ncnn.Net()
    weights = path.with_suffix(".bin")
    if (
        not (path.is_file() and weights.is_file())
        or net.load_param(str(path))
        or net.load_model(str(weights))
    ):
        raise UserError(
            f"{path} and {weights.name} are not the two files of an NCNN network; pass others (FILE)."
        )
    return lambda x: run(net, x)


def of_pictures(net: Callable[[torch.Tensor], torch.Tensor], channels: int) -> Upscaler:
    def upscale(picture: Any) -> Any:
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        x = x.reshape(-1, channels, *x.shape[2:])  # a greyscale network sees each colour separately
        out = net(x)
        out = out.reshape(3, *out.shape[2:]).permute(1, 2, 0)
        return (out.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    return upscale


def measure(
    upscalers: Dict[str, Upscaler], pairs: List[Pair], scale: int, jpeg: Optional[int] = None
) -> Dict[str, List[Tuple[float, float]]]:
    """PSNR and SSIM of each picture, by row of the table; bicubic comes first."""
    from aethersr.quality import compressed, crop_to_multiple, quality, resize

    found: Dict[str, List[Tuple[float, float]]] = {name: [] for name in ("bicubic", *upscalers)}
    for pair in pairs:
        truth = crop_to_multiple(read(pair.hr, "--hr"), scale)
        height, width = (side // scale for side in truth.shape[:2])
        if pair.lr is None:
            low = resize(truth, height, width)
        else:
            low = read(pair.lr, "--lr")
            if low.shape[:2] != (height, width):
                sizes = f"{low.shape[1]}x{low.shape[0]}; expected {width}x{height}, {pair.hr} by {scale}"
                raise UserError(f"{pair.lr} has {sizes} (--lr).")
        if jpeg is not None:
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
    networks = {name: open_network(path, args.device) for name, path in names(args.files).items()}
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
    if args.jpeg is not None and not 1 <= args.jpeg <= 100:
        raise UserError(f"{args.jpeg} is no JPEG quality; pass 1 to 100 (--jpeg).")
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
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    return exit_code("aether-evaluate", lambda: evaluate(args), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
