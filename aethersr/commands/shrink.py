"""Take out of a trained network what it misses least, and write a smaller training checkpoint.

    aether-shrink --model_path net_g_ema.pth --output_path small_8.pth --pictures FOLDER --time 0.5
    aether-shrink --model_path net_g_ema.pth --output_path small_8.pth --pictures FOLDER --blocks 8 --kernel 7

Fine-tune the new file afterwards, with the printed lines in network_g. See docs/shrink.md.
"""

from __future__ import annotations

import argparse
from typing import Any, List, Mapping, Optional

import torch

from aethersr import shrink
from aethersr.calibration import calibration_pairs
from aethersr.checkpoint import read_checkpoint, write_state
from aethersr.commands import Parser, exit_code, local_path
from aethersr.commands.fuse_options import check_ending
from aethersr.errors import UserError, naming
from aethersr.files import Together, check_output, unwritable
from aethersr.identify import add_img_range, aether_from_state_dict, form_name, read_options, variant_name
from aethersr.verify import TIMED, compare_times

PICTURES, SIDE = 16, 48  # pictures at most, and low-resolution pixels of a side, to choose on
KERNEL = 7  # with --time: the borders of larger ones take time and hardly help

HINTS = {
    "--input": "pass the checkpoint as --model_path FILE",
    **dict.fromkeys(("--calibration", "--hr"), "pass the pictures as --pictures FOLDER"),
    "--scale": "the scale comes from the checkpoint",
}


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    description = "Make a smaller training checkpoint of a trained AetherNet, to be fine-tuned."
    parser = Parser("aether-shrink", description, HINTS)
    add = parser.add_argument
    path: Any = {"type": local_path, "required": True}
    add("--model_path", help="the training checkpoint, .pth or .safetensors", **path)
    add("--output_path", help="the smaller one to write, .pth or .safetensors", **path)
    add("--pictures", help="folder with large pictures, such as the training's", **path)
    add("--blocks", type=int, metavar="N", help="leave N blocks in all; each stage keeps one")
    add("--kernel", type=int, metavar="K", help="leave the middle KxK of each large kernel")
    add("--hidden", type=int, metavar="H", help="leave H hidden channels in each block")
    text = "leave as much as takes at most T of the time, such as 0.5"
    add("--time", type=float, metavar="T", help=text)
    add_img_range(parser)
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse(argv)
    if args.time is not None and not 0 < args.time < 1:
        raise UserError(f"--time {args.time:g} is not possible; expected a share below 1, such as 0.5.")
    if args.time is not None and args.blocks is not None:
        raise UserError("--time chooses the number of blocks; leave out --blocks, or --time.")
    return args


def training_form(args: argparse.Namespace) -> shrink.State:
    """The checkpoint's weights, with the img_range that the user says."""
    state, chosen = read_checkpoint(args.model_path)
    print(f"Weights: {chosen}")
    form = form_name(state)
    if form not in ("training", ""):
        found = f"{args.model_path} is in {form} form, which can't be fine-tuned"
        raise UserError(f"{found}; pass the training form that it was made from (--model_path).")
    with naming(args.model_path, "--model_path"):
        aether_from_state_dict(state, args.img_range)
    recorded = {} if args.img_range in (None, 1) else {"img_range": torch.tensor([args.img_range])}
    return {**state, **recorded}


def size_left(args: argparse.Namespace, options: Mapping[str, Any]) -> shrink.Size:
    """The size that the user wants."""
    size, stages = shrink.Size.of(options), len(options["depths"])
    least = shrink.Size(stages, options["sk_kernel"], 1)
    for name, low, high in zip(size._fields, least, size):
        given, odd = getattr(args, name), "an odd number " if name == "kernel" else ""
        if given is not None:
            if not low <= given <= high or (odd and given % 2 == 0):
                raise UserError(f"--{name} {given} is not possible; expected {odd}from {low} to {high}.")
            size = size._replace(**{name: given})
    if args.time is None:
        return size
    if args.kernel is None:
        size = size._replace(kernel=max(least.kernel, min(KERNEL, size.kernel)))
    print(f"Looking for a size that takes at most {args.time:g} of the time", flush=True)
    least = size._replace(blocks=stages, hidden=size.hidden if args.hidden else -(-size.hidden // 2))
    try:
        return shrink.size_within(args.time, options, size, least)
    except ValueError as error:
        remedy = "pass a larger --time, or a smaller --kernel or --hidden"
        raise UserError(f"--time {args.time:g} can't be reached: {error}; {remedy}.") from None


def run(args: argparse.Namespace) -> None:
    """What the command does. Raises UserError, and then writes nothing."""
    target = args.output_path
    check_ending(target, exports=False)
    check_output(target, [args.model_path], args.overwrite, "--output_path")
    state = training_form(args)
    before = aether_from_state_dict(state).fused()
    pairs = calibration_pairs(args.pictures, before, "--pictures", PICTURES, SIDE)
    options = read_options(state)
    left = size_left(args, options)
    if left == shrink.Size.of(options):
        print("Nothing is to be taken out; --time 0.5, --blocks, --kernel or --hidden say what.")
    print(f"On {len(pairs)} pictures of {args.pictures}, before any training:\n")
    print(f"{'taken out':<24}{'blocks in each stage':<24}{'PSNR-RGB, dB':>12}")
    for step in shrink.steps(state, pairs, left):
        depths = ", ".join(map(str, read_options(step.state)["depths"]))
        print(f"{step.what:<24}{depths:<24}{step.decibels:>12.2f}", flush=True)
    options = read_options(step.state)
    times = compare_times({"before": before, "after": aether_from_state_dict(step.state).fused()})
    measured = f"{TIMED}x{TIMED} pixels in PyTorch, one thread"
    print(f"\nTime: {times.ratio('after', 'before').words()} of the network's; {measured}")
    name, metadata = variant_name(options), {"format": "pt", "form": "training", "scale": str(before.scale)}
    metadata["architecture"] = name if name.startswith("aether") else "AetherNet"
    try:
        with Together() as files:
            write_state(step.state, files.part(target), metadata)
            files.commit()
    except OSError as error:
        raise unwritable(target, error, "--output_path") from None
    print(f"Wrote {target}; to fine-tune it:\n\nnetwork_g:")
    print("\n".join(f"  {line}" for line in shrink.network_lines(options)))


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("aether-shrink", lambda: run(parse_args(argv)), "nothing was written.")
