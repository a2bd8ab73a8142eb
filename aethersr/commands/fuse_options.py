"""The fuse command's options, which of them go together, and the names of its files."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from aether_arch import SCALES, VARIANTS, AetherBase
from aether_quant import TARGETS

from aethersr import ncnn
from aethersr.checkpoint import ENDINGS
from aethersr.commands import Parser, check_device, local_path, program_name
from aethersr.errors import UserError, need
from aethersr.identify import add_img_range
from aethersr.onnx import OPSETS, PRECISIONS

PROGRAM = program_name("aether-fuse", "fuse_aether.py")
LARGEST_STATIC = 16384  # largest side of a picture in pixels
# What people type who know another command, or version 0.2 of this one.
HINTS = {
    "--scale": "the scale is read from the weights, and --upscale fails if it is another",
    **dict.fromkeys(("--input", "-i", "--model"), "pass --model_path"),
    "--int8": "it is --onnx int8",
    "--placement": "there is one placement, so leave it out",
    "--fp16": "--half writes the weights in half precision, --onnx fp16 an ONNX file",
    "--check-fp16": "what half precision costs is always printed, so leave it out",
}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(PROGRAM, "Turn a training checkpoint of AetherNet into fused release weights.", HINTS)
    add = parser.add_argument
    file: Any = {"type": local_path, "required": True, "metavar": "FILE"}
    add("--model_path", help="the checkpoint, .pth or .safetensors", **file)
    add("--output_path", help="the weights to write, .pth or .safetensors", **file)
    names = [variant.__name__ for variant in VARIANTS]
    add("--model_type", choices=names, help="fail unless the weights are of this variant")
    add("--upscale", type=int, choices=SCALES, help="fail unless the weights have this scale")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "cpu"), default=device, help="where to verify (default: %(default)s)")
    add_img_range(parser)
    add("--bound", type=float, metavar="B", help="limit each block's norm to -B..B, if the network runs away")
    add("--half", action="store_true", help="write the weights in half precision, half the size")
    text = f"ONNX files as well, some of {', '.join(PRECISIONS)}"
    add("--onnx", nargs="+", default=[], metavar="LIST", help=text)
    text = "pictures for int8 without quantisation-aware training"
    add("--calibration", type=Path, metavar="FOLDER", help=text)
    text = "runtime to optimise the int8 file for (default: %(default)s)"
    add("--target", choices=TARGETS, default=TARGETS[0], help=text)
    add("--reduce_range", action="store_true", help="7-bit weights in the int8 file, for CPUs without VNNI")
    add("--ncnn", action="store_true", help="NCNN files beside it, for Upscayl, chaiNNer and others")
    add("--static", metavar="C,H,W", help="ONNX files for pictures of one size only, for instance 3,256,256")
    opset: Any = {"type": int, "choices": OPSETS, "default": 17, "metavar": "N"}
    add("--opset", help="ONNX opset, 11 to 23; 17 works in every runtime (default: %(default)s)", **opset)
    add("--license", metavar="NAME", help="licence to write into the ONNX files, for instance CC-BY-4.0")
    add("--author", metavar="NAME", help="author to write into the ONNX files")
    add("--measure", action="store_true", help="also measure how much faster the fused network is")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--accept_older_fused", action="store_true", help="take a file that an older tool fused in part")
    args = parser.parse(argv)
    # With commas, spaces or both between them, and each once.
    args.onnx = list(dict.fromkeys(name.strip() for text in args.onnx for name in text.split(",")))
    check_options(args)
    return args


def check_options(args: argparse.Namespace) -> None:
    """All checks that need no weights. Raises UserError."""
    check_ending(args.output_path)
    check_device(args.device)
    if args.bound is not None and not 1e-3 <= args.bound < 1e6:
        raise UserError(f"--bound {args.bound:g} is not possible; expected 1e-3 to 1e6, such as 1.")
    for option in ("calibration", "reduce_range"):
        if getattr(args, option) and "int8" not in args.onnx:
            raise UserError(f"--{option} needs --onnx int8; pass both, or leave it out.")
    if args.static is not None and not args.onnx:
        raise UserError("--static needs --onnx; pass both, or leave it out.")
    for name in args.onnx:
        if name not in PRECISIONS:
            raise UserError(f"--onnx {name!r} is not known; allowed: {', '.join(PRECISIONS)}.")
    if "int8" in args.onnx and args.opset < 13:  # the first with a scale for each channel
        raise UserError(f"--opset {args.opset} can't hold int8; pass 13 to {OPSETS[-1]}.")
    need("ncnn pnnx" if args.ncnn else "", "--ncnn", "ncnn")
    need("onnx onnxruntime onnxslim" if args.onnx else "", "--onnx", "onnx")


def static_shape(args: argparse.Namespace, net: AetherBase) -> Optional[List[int]]:
    """--static as numbers: channels, height and width of the pictures that the ONNX files will take."""
    if args.static is None:
        return None
    shape = [int(number) if re.fullmatch(r"\d{1,5}", number) else 0 for number in args.static.split(",")]
    chans = net.options["in_chans"]
    if len(shape) != 3 or shape[0] != chans or not all(0 < side <= LARGEST_STATIC for side in shape):
        allowed = f"expected {chans},H,W with a height and width of 1 to {LARGEST_STATIC}"
        raise UserError(f"--static {args.static} does not fit; {allowed}.")
    return shape


def check_ending(path: Path, exports: bool = True) -> None:
    """Raise UserError if no weights can be written under this name."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        held = f"ends in {path.suffix!r}" if ending else "has no ending"
        found = f"{path} {held}, expected .pth or .safetensors"
        option = {".onnx": "--onnx fp32", ".param": "--ncnn", ".bin": "--ncnn"}.get(ending, "")
        beside = f", and {option} for files beside it" if option and exports else ""
        raise UserError(f"{found}; pass --output_path {path.with_suffix('.safetensors')}{beside}.")
    if ending == ".safetensors":
        need("safetensors.torch", f"--output_path {path}, unlike a .pth file,")


def onnx_and_ncnn_paths(
    args: argparse.Namespace, scale: int, static: Optional[List[int]]
) -> Tuple[Dict[Path, str], List[Path]]:
    """ONNX files by name, each with its precision, and NCNN files. For 2x_NAME_fused.pth: 2x_NAME_fp16.onnx
    (or 2x_NAME_fp16_3x48x64.onnx), 2x_NAME.param and 2x_NAME.bin, with 2x_ added if it is missing."""
    target = args.output_path
    stem = re.sub("_(fused|fp16)$", "", target.stem)
    size = "_" + "x".join(map(str, static)) if static else ""
    onnx_files = {target.with_name(f"{stem}_{kind}{size}.onnx"): kind for kind in args.onnx}
    named = ncnn.named_for_upscayl(stem, scale)
    endings = ("param", "bin") if args.ncnn else ()
    return onnx_files, [target.with_name(f"{named}.{ending}") for ending in endings]


def onnx_metadata(source: Path, args: argparse.Namespace) -> Dict[str, str]:
    """An ONNX file's metadata. The date is the checkpoint's, so that the same input gives the same bytes."""
    date = datetime.datetime.fromtimestamp(source.stat().st_mtime, datetime.timezone.utc).date().isoformat()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    given = {"license": args.license, "author": args.author, "date": date, "source_sha256": digest}
    return {key: value for key, value in given.items() if value}
