"""Upscale pictures of any size with an AetherNet: a file, or every picture in a folder.

    python upscale.py --model 4x_MyModel_fused.safetensors --input photo.png --output photo_4x.png
    python upscale.py --model 4x_MyModel_fp16.onnx --input folder --output upscaled --format png

Takes weights of every form and every ONNX file that fuse_aether.py writes. Reads and writes PNG, JPEG, WebP,
TIFF, BMP, AVIF and still GIF, and keeps what they hold.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, List, Optional, Union

import torch

from aethersr.commands import DEVICES, Parser, check_device, exit_code, local_path, program_name
from aethersr.errors import UserError, need
from aethersr.identify import add_img_range
from aethersr.jobs import find_jobs

PROGRAM = program_name("aether-upscale", "upscale.py")
ENDINGS = ("png", "jpg", "webp", "tif", "bmp", "gif", "avif")
_SCALE = "the scale comes from the model, so pass another --model"
HINTS = {**dict.fromkeys(("--scale", "--upscale", "--outscale", "-s"), _SCALE), "-n": "pass --model",
         "-m": "pass --model", "-i": "pass --input", "-o": "pass --output", "-t": "pass --tile",
         **dict.fromkeys(("-f", "--ext"), "pass --format"), "--half": "pass --fp16",
         **dict.fromkeys(("-g", "--gpu", "--gpu-id"), "pass --device cuda"), "--fp32": "leave --fp16 out",
         **dict.fromkeys(("--tta", "--denoise", "--denoise_strength", "-d"), "there is none")}  # fmt: skip


def progress_bar(count: int) -> Any:
    """On a terminal, what is done and the time left: of one picture its tiles, of several the pictures."""
    from tqdm import tqdm

    form = "{percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} {unit}, {remaining} left"
    quiet = None if sys.stderr else True  # None: unless it is a terminal
    kind: Any = {"total": None, "unit": "tiles"} if count == 1 else {"total": count, "unit": "pictures"}
    return tqdm(bar_format=form, disable=quiet, leave=False, **kind)


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


def device_of(network: Any) -> str:
    """Where it runs, in words."""
    if hasattr(network, "session"):
        return f"{network.session.get_providers()[0].replace('ExecutionProvider', '')} (ONNX Runtime)"
    half = " in half precision" if network.like.dtype == torch.float16 else ""
    kind = network.like.device.type
    return {"cuda": "GPU", "mps": "Apple GPU"}.get(kind, kind.upper()) + half


def upscale(args: argparse.Namespace) -> None:
    """What the command does; raises UserError."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if args.fp16 and device == "cpu":
        raise UserError("--fp16 is slower than float32 on a CPU; pass --device cuda, or leave --fp16 out.")
    if args.tile < 1:
        raise UserError(f"--tile {args.tile} is not possible; expected 1 or more pixels.")
    need("tqdm aethersr.upscaling", PROGRAM, "upscale")
    from aethersr.network import load_network
    from aethersr.upscaling import Upscaler

    how = (args.recursive, args.overwrite, args.skip_existing, f".{args.format}" if args.format else "")
    jobs, problems, others = find_jobs(args.input, args.output, *how)
    network = load_network(args.model, args.device, args.fp16, args.img_range)
    overlap = choose_overlap(network, args.overlap)
    if others:
        print(f"Left out: {', '.join(f'{name}: {count}' for name, count in others.items())}.")
    if not jobs and not problems:
        print(f"Nothing to do: every picture of {args.input} is in {args.output} (--skip-existing).")
        return
    count = f"{len(jobs)} picture{'s' * (len(jobs) != 1)}"
    print(f"{args.model.name} upscales {count} x{network.scale} on the {device_of(network)}.", flush=True)
    written, bar = 0, progress_bar(len(jobs))

    def tick(tiles: int, count: int) -> None:
        if len(jobs) == 1:
            bar.total = count
            bar.update(tiles)

    def say(line: str) -> None:
        print(line) if bar.disable else bar.write(line)

    work = Upscaler(network, args.tile, overlap, args.wrap, args.overwrite, say)
    try:
        for number, (job, (width, height), lost, problem) in enumerate(work.run(jobs, tick), 1):
            bar.update(len(jobs) > 1)
            if number == len(jobs):
                bar.close()  # else it would be drawn again below the line
            without = f" without {', '.join(lost)}, not written into {job.target.suffix}" if lost else ""
            if problem:
                problems.append(problem)
            else:
                say(f"Wrote {job.target} ({width}x{height}){without}")
                written += 1
    finally:
        bar.close()
    if problems:
        if os.path.isdir(args.input):
            count = f"{len(problems)} of {len(problems) + written} pictures were skipped"
            count += "; the others are written" * (written > 0)
            problems.append(f"{count}. Mend them and pass --skip-existing.")
        raise UserError(f"\n{PROGRAM}: error: ".join(problems))


def _overlap(text: str) -> Union[int, str]:
    if text == "exact" or text.isdecimal():
        return text if text == "exact" else int(text)
    raise argparse.ArgumentTypeError(f"{text} is not possible; expected 0 or more pixels, or 'exact'")


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__, HINTS)
    add: Any = parser.add_argument
    flag = {"action": "store_true"}
    add("--model", type=local_path, required=True, help="weights (.pth, .safetensors) or a network (.onnx)")
    add("--input", type=local_path, required=True, help="a picture, or a folder of pictures")
    text = "the picture to write, or a folder (names stay the same)"
    add("--output", type=lambda path: local_path(path) and path, required=True, help=text)
    text = "to write (default: as --output ends, in a folder as each is)"
    kind = {"jpeg": "jpg", "tiff": "tif"}
    add("--format", type=lambda word: kind.get(word.lower(), word.lower()), choices=ENDINGS, help=text)
    add("--recursive", **flag, help="also upscale the pictures in subfolders")
    add("--skip-existing", **flag, help="skip pictures whose output exists, to continue a folder")
    add("--overwrite", **flag, help="replace existing files")
    text = "the picture is a tileable texture: horizontally (x), vertically (y), or both (--wrap alone)"
    add("--wrap", nargs="?", choices=("x", "y", "xy"), const="xy", default="", help=text)
    add("--tile", type=int, default=512, help="largest side of a tile in input pixels (default: 512)")
    text = "margin round each tile that the network also sees; 'exact' makes tiles equal to the whole picture"
    add("--overlap", type=_overlap, metavar="PIXELS", help=f"{text} (default: within half a step of 1/255)")
    add("--device", choices=DEVICES, help="default: the GPU, if there is one that can run the file")
    add("--fp16", **flag, help="half precision, on a GPU only")
    add_img_range(parser)
    args = parser.parse(argv)
    if args.overwrite and args.skip_existing:
        parser.error("--overwrite and --skip-existing exclude each other; pass one of them")
    return args


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code(PROGRAM, lambda: upscale(parse_args(argv)), "unfinished pictures were not written.")
