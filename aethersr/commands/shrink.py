"""Take out of a trained network what it misses least, and write a smaller training checkpoint.

    aether-shrink --model_path net_g_ema.pth --output_path small_8.pth --pictures FOLDER --time 0.5
    aether-shrink --model_path net_g_ema.pth --output_path small_8.pth --pictures FOLDER --blocks 8 --kernel 7

Then fine-tune the new file with the printed lines in network_g: it has lost some tenths of a dB or whole ones,
and gets most of it back in minutes. See docs/shrink.md.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from aether_arch import __version__
from torch import Tensor

from aethersr import shrink
from aethersr.calibration import Pairs, calibration_pairs
from aethersr.checkpoint import ENDINGS, read_checkpoint
from aethersr.commands import exit_code
from aethersr.errors import UserError
from aethersr.files import Together, check_output
from aethersr.identify import aether_from_state_dict, form_name, read_options, variant_name

CROPS, SIDE = 16, 48  # pictures at most, and low-resolution pixels of a side, which blocks are chosen on


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    description = "Make a smaller training checkpoint of a trained AetherNet, to be fine-tuned."
    parser = argparse.ArgumentParser(prog="aether-shrink", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="the training checkpoint, .pth or .safetensors")
    add("--output_path", type=Path, required=True, help="the smaller one to write, .pth or .safetensors")
    text = "folder of pictures at the resolution of the output, such as those that the network was trained on"
    add("--pictures", type=Path, required=True, help=text)
    add("--blocks", type=int, metavar="N", help="leave N blocks in all; each stage keeps one")
    add("--kernel", type=int, metavar="K", help="leave the middle KxK of each large kernel")
    add("--hidden", type=int, metavar="H", help="leave H hidden channels in each block")
    text = "choose the number of blocks by measured time, at most T of the network's, for instance 0.5; "
    add(
        "--time",
        type=float,
        metavar="T",
        help=f"{text}with kernels of {shrink.KERNEL} unless --kernel says other",
    )
    text = "the training option of this name, which checkpoints don't record (default: 1.0)"
    add("--img_range", type=float, default=1.0, help=text)
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--version", action="version", version=f"AetherNet {__version__}")
    return parser.parse_args(argv)


def options_of(path: Path, state: Mapping[str, Tensor]) -> Dict[str, Any]:
    """The network's options, after checking that it is a whole training form."""
    form = form_name(state)
    if form not in ("training", ""):
        found = f"{path} is in {form} form, in which nothing can be fine-tuned"
        raise UserError(f"{found}; pass the training checkpoint that it was made from (--model_path).")
    try:
        aether_from_state_dict(state)
        return read_options(state)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass a training checkpoint of AetherNet (--model_path).") from None


def sizes(args: argparse.Namespace, options: Mapping[str, Any]) -> Dict[str, int]:
    """What stays: blocks, kernel and hidden."""
    chosen: Dict[str, int] = {}
    for name, allowed in shrink.limits(options).items():
        given = getattr(args, name)
        if given is not None and given not in allowed:
            odd = "an odd number " if name == "kernel" else ""
            found = f"--{name} {given} is not possible for {args.model_path}"
            raise UserError(f"{found}; expected {odd}from {allowed[0]} to {allowed[-1]} (--{name}).")
        chosen[name] = allowed[-1] if given is None else given
    if args.time is None:
        return chosen
    if not 0 < args.time < 1:
        raise UserError(
            f"--time {args.time:g} is not possible; expected a share below 1, such as 0.5 (--time)."
        )
    if args.blocks is not None:
        raise UserError("--time chooses the number of blocks; leave --blocks out, or --time.")
    if args.kernel is None and shrink.KERNEL in shrink.limits(options)["kernel"]:
        chosen["kernel"] = shrink.KERNEL
    try:
        chosen["blocks"] = shrink.blocks_within(options, chosen["kernel"], chosen["hidden"], args.time)
    except ValueError as error:
        remedy = "pass a larger --time, or a smaller --kernel or --hidden"
        raise UserError(f"--time {args.time:g} can't be reached, {error}; {remedy}.") from None
    return chosen


def read_pictures(folder: Path, net: Any) -> Pairs:
    pairs = calibration_pairs(folder, net, "--pictures")
    pairs = pairs[:: -(-len(pairs) // CROPS)]
    return [
        (low[..., :SIDE, :SIDE], high[..., : SIDE * net.scale, : SIDE * net.scale]) for low, high in pairs
    ]


def content(state: Mapping[str, Tensor], path: Path, metadata: Dict[str, str]) -> bytes:
    """The file, in the tensors' own precision."""
    plain = {name: value.contiguous() for name, value in state.items()}
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        return save(plain, metadata)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def run(args: argparse.Namespace) -> None:
    """What the command does. Raises UserError, and then writes nothing."""
    if args.output_path.suffix.lower() not in ENDINGS:
        found = f"{args.output_path} ends in {args.output_path.suffix or 'nothing'!r}"
        raise UserError(f"{found}; expected .pth or .safetensors (--output_path).")
    if not 1e-6 <= args.img_range < 1e6:
        raise UserError(f"--img_range {args.img_range:g} is not possible; expected 1.0, or what was trained.")
    check_output(args.output_path, [args.model_path], args.overwrite, "--output_path")
    state, chosen = read_checkpoint(args.model_path)
    options = options_of(args.model_path, state)
    before = shrink.fused(state, args.img_range)
    pairs = read_pictures(args.pictures, before)
    left = sizes(args, options)
    print(f"Weights: {chosen}\nOn {len(pairs)} pictures of {args.pictures}, before any training:\n")
    print(f"{'taken out':<32}{'depths':<24}{'PSNR, dB':>8}")
    for step in shrink.steps(state, pairs, **left, img_range=args.img_range):
        depths = " ".join(map(str, read_options(step.state)["depths"]))
        print(f"{step.what:<32}{depths:<24}{step.decibels:>8.2f}", flush=True)
    after = shrink.fused(step.state, args.img_range)
    times = shrink.times({"before": before, "after": after})
    ratio, threads = times.ratio("after", "before"), torch.get_num_threads()
    measured = f"{shrink.SIDE}x{shrink.SIDE} pixels, both fused, {threads} thread{'s' * (threads > 1)}"
    print(f"\nTime: {ratio.value:.2f} of the network's ({ratio.low:.2f} to {ratio.high:.2f}; {measured})")
    smaller = read_options(step.state)
    name = variant_name(smaller)
    metadata = {
        "format": "pt",
        "architecture": name if name.startswith("aether") else "AetherNet",
        "scale": str(before.scale),
        "form": "training",
    }
    try:
        with Together() as files:
            files.part(args.output_path).write_bytes(content(step.state, args.output_path, metadata))
            files.commit()
    except OSError as error:
        found = f"{args.output_path} can't be written: {error.strerror or error}"
        raise UserError(f"{found}; free space or pass another --output_path.") from None
    print(f"Wrote {args.output_path}; to fine-tune it:\n\nnetwork_g:")
    print("".join(f"  {line}\n" for line in shrink.network_lines(smaller)), end="")


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("aether-shrink", lambda: run(parse_args(argv)), "nothing was written.")
