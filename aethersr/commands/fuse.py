"""Turn a training checkpoint of AetherNet into fused release weights, and into files for other runtimes.

    python fuse_aether.py --model_path net_g_latest.pth --output_path 2x_MyModel_fused.safetensors

Reads checkpoints of neosr, traiNNer-redux, BasicSR and others (EMA weights preferred), fuses in float64,
reads back what it wrote and compares. Needs only PyTorch, and safetensors for .safetensors files; --onnx and
--ncnn need what runs their files. The options: docs/fuse.md.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple

import torch
from aether_arch import AetherBase, FusedAetherNet
from aether_quant import QuantAetherNet
from torch import Tensor

from aethersr import calibration, half_precision, ncnn, verify
from aethersr.checkpoint import read_checkpoint, write_state
from aethersr.commands import exit_code
from aethersr.commands.fuse_options import (
    PROGRAM,
    check_ending,
    check_options,
    ncnn_paths,
    onnx_metadata,
    onnx_path,
    parse_args,
    static_shape,
)
from aethersr.errors import UserError, first_line, is_out_of_memory
from aethersr.files import Together, check_output
from aethersr.identify import aether_from_state_dict, bounded, form_name, variant_name
from aethersr.onnx import export_onnx

OTHER_CHECKPOINT = "pass another checkpoint (--model_path)"
Say = Callable[[str], None]


def build(path: Path, state: Mapping[str, Tensor], args: argparse.Namespace) -> AetherBase:
    """The unfused network in float64, after checking that it is what the user says it is."""
    form = form_name(state)
    if form == "int8":
        found = f"{path} holds int8 weights already, expected a training checkpoint"
        raise UserError(f"{found}; export it, or pass another (--model_path).")
    nothing_to_do = not (args.onnx or args.ncnn or args.half or args.bound)
    if (form == "fused" and nothing_to_do) or (form == "older fused" and not args.accept_older_fused):
        remedy = "it can be used as it is; --half writes it in half precision, --onnx or --ncnn exports it"
        if form == "older fused":
            remedy = "pass --accept_older_fused to fuse the rest of it"
        found = f"{path} is fused already ({form} form), expected a training checkpoint"
        raise UserError(f"{found}; {remedy}, or pass another (--model_path).")
    try:
        if args.bound is not None:
            state = bounded(state, args.bound)
        net = aether_from_state_dict(state, args.img_range)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass a training checkpoint of AetherNet (--model_path).") from None
    name = variant_name(net.options)
    if args.model_type and args.model_type != name:
        found = f"{path} holds {name}, but --model_type {args.model_type} was given"
        remedy = f"pass --model_type {name} or leave it out"
        raise UserError(f"{found}; {remedy if name.startswith('aether') else 'leave --model_type out'}.")
    if args.upscale and args.upscale != net.scale:
        found = f"{path} holds a x{net.scale} network, but --upscale {args.upscale} was given"
        raise UserError(f"{found}; pass --upscale {net.scale} or leave it out.")
    for key, value in state.items():
        if key.endswith("running_var") and bool((value < 0).any()):
            found = f"{path}: tensor {key!r} holds a negative variance"
            raise UserError(f"{found}; the file is damaged, so pass another (--model_path).")
    return net.double()


# ----------------------------------------------------------------------------------------------------- export


def check_int8(unfused: AetherBase, source: Path, args: argparse.Namespace) -> None:
    """Raise UserError if there are neither pictures for the ranges nor ranges from training."""
    if args.calibration is not None:
        return
    remedy = "pass --calibration FOLDER"
    if not isinstance(unfused, QuantAetherNet):
        found = f"{source} was not trained with qat: true, so int8 needs pictures to find its ranges"
        raise UserError(f"{found}: {remedy}.")
    if any(bool(quantizer.watched == 0) for quantizer in unfused.quantizers().values()):
        found = f"{source} was saved before its first training step, so its ranges are unknown"
        raise UserError(f"{found}; {remedy}.")


def quantise(
    unfused: AetherBase, net: FusedAetherNet, powers: Mapping[str, int], args: argparse.Namespace, say: Say
) -> QuantAetherNet:
    """The fused network with int8 weights, its ranges from training or calibrated on pictures."""
    if args.calibration is None:
        assert isinstance(unfused, QuantAetherNet)  # check_int8
        if powers:
            unfused = half_precision.with_ranges_of(net, unfused, powers)
        return copy.deepcopy(unfused).cpu().float().convert_to_quantized()
    pairs = calibration.calibration_pairs(Path(args.calibration), net)
    instead = ", in place of the ranges that training found" if isinstance(unfused, QuantAetherNet) else ""
    say(f"Calibrating on {len(pairs)} pictures{instead}")
    found = calibration.calibrated(net, pairs, args.target, args.reduce_range)
    for note in found.notes:
        say(f"Note: {note}")
    loss = f"PSNR {found.mean:+.3f} dB in the mean, {found.worst:+.3f} dB at worst"
    say(f"int8 against float, on these pictures: {loss}")
    return found.net


def write_onnx(
    files: Together,
    nets: Mapping[Path, Tuple[str, AetherBase]],
    args: argparse.Namespace,
    static: Optional[List[int]],
    metadata: Dict[str, str],
) -> None:
    """Export networks to parts of ``files``. ``nets``: by target, each with its precision."""
    for target, (precision, net) in nets.items():
        try:
            export_onnx(
                net,
                net.scale,
                precision,
                str(files.part(target)),
                args.target,
                reduce_range=args.reduce_range,
                static=static,
                opset=args.opset,
                simplify=True,
                metadata=metadata,
            )
        except OSError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            found = f"{target} can't be made: {first_line(error)}"
            raise UserError(f"{found} Pass other weights, or leave --onnx out.") from None


# ---------------------------------------------------------------------------------------------------- weights


def write_weights(net: FusedAetherNet, part: Path, target: Path, half: bool) -> AetherBase:
    """Write ``part`` and return the network in it. Raises UserError if that is another than ``net``."""
    name = variant_name(net.options)
    architecture = name if name.startswith("aether") else "AetherNet"
    described = {"format": "pt", "architecture": architecture, "scale": str(net.scale), "form": "fused"}
    state = {name: value.cpu().float() for name, value in net.state_dict().items()}
    if half:  # biases are few, and rounding them would shift the whole picture
        state = {name: value.half() if value.dim() > 1 else value for name, value in state.items()}
    write_state(state, part, described)
    try:
        written = read_checkpoint(part, "--output_path").state
        fused = aether_from_state_dict(written)
        wrong = [name for name, value in state.items() if not torch.equal(written[name], value)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} has other values.")
    except (UserError, ValueError) as error:
        reason = str(error).replace(str(part), "it").replace(" (--output_path).", ".")
        found = f"{target} was not written: reading it back failed, {reason}"
        raise UserError(f"{found} Is the disk sound? Pass another --output_path.") from None
    return fused


def check_difference(unfused: AetherBase, net: FusedAetherNet, source: Path, device: str) -> float:
    """Largest difference of the fused network in float32, in steps of 1/255. UserError: it is too large."""
    rounded = copy.deepcopy(net).float()
    if not all(bool(value.isfinite().all()) for value in rounded.state_dict().values()):
        found = f"{source}: the fused weights are not finite in float32, because the weights are too extreme"
        raise UserError(f"{found}. Nothing was written; {OTHER_CHECKPOINT}.")
    # The fused weights have no rounding, so compare them with the trained weights without rounding.
    like = unfused.fused() if isinstance(unfused, QuantAetherNet) else unfused
    difference = verify.largest_difference(like, rounded, device)
    if not difference <= verify.ALLOWED_DIFFERENCE:
        found = f"{source}: the fused network differs by {difference:.2g} steps of 1/255"
        why = f"allowed {verify.ALLOWED_DIFFERENCE:g}; these weights are too extreme for float32"
        raise UserError(f"{found}, {why}. Nothing was written; {OTHER_CHECKPOINT}.")
    return difference


def table(nets: Dict[str, AetherBase], sizes: List[int], args: argparse.Namespace) -> List[str]:
    """Sizes and, on request, times of the unfused and the fused network."""
    rows = [
        ("parameters", [f"{sum(value.numel() for value in net.parameters()):,}" for net in nets.values()]),
        ("file, MiB", [f"{size / 2**20:.2f}" for size in sizes]),
    ]
    lines = []
    if args.measure:
        times = verify.compare_times(nets, args.device)
        rows.append((f"ms, 64x64, {args.device}", [f"{times.median(name):.1f}" for name in nets]))
        lines.append(times.ratio("unfused", "fused").words("times as fast"))
    return [
        f"{label:<20}" + "".join(f"{cell:>12}" for cell in cells) for label, cells in [("", nets), *rows]
    ] + lines


# ------------------------------------------------------------------------------------------------ the command


def fuse(args: argparse.Namespace, say: Say = print) -> None:
    """What the command does. Raises UserError, and then writes nothing."""
    source, target = Path(args.model_path), Path(args.output_path)
    check_options(args)
    check_ending(target)
    say(f"Reading {source}")
    state, chosen = read_checkpoint(source)
    check_output(target, [source], args.overwrite, "--output_path")
    unfused = build(source, state, args)
    static = static_shape(args, unfused)
    targets = {onnx_path(target, precision, static): precision for precision in args.onnx}
    ncnn_files = ncnn_paths(target, unfused.scale) if args.ncnn else ()
    written = (target, *targets, *ncnn_files)
    for path in written[1:]:
        check_output(path, [source], args.overwrite, "--output_path")
    metadata = onnx_metadata(source, args) if args.onnx else {}
    say(f"Weights: {chosen}")
    if "int8" in args.onnx:
        check_int8(unfused, source, args)
    say("Fusing in float64, and comparing with the unfused network")
    net = unfused.fused()
    fit = half_precision.fit_half_precision_(net, args.device)
    for note in fit.notes(net.options["bound"] is not None):
        say(note)
    if fit.problem and (args.half or args.ncnn or "fp16" in args.onnx):
        raise UserError(f"{source}: {fit.problem}; leave --half, fp16 and --ncnn out, or {OTHER_CHECKPOINT}.")
    difference = check_difference(unfused, net, source, args.device)
    int8 = None
    if "int8" in args.onnx:
        try:
            int8 = quantise(unfused, net, fit.powers, args, say)
        except ValueError as error:
            found = f"{source} as int8: {first_line(error)}"
            raise UserError(f"{found} Pass other weights or pictures, or leave int8 out.") from None
    try:
        with Together() as files:
            part = files.part(target)
            fused = write_weights(net, part, target, args.half)
            sizes = [path.stat().st_size for path in (source, part)]
            if args.onnx:
                say(f"Exporting {', '.join(args.onnx)}")
            nets = {
                path: (kind, int8 if int8 and kind == "int8" else fused) for path, kind in targets.items()
            }
            write_onnx(files, nets, args, static, metadata)
            if args.ncnn:
                say("Converting for NCNN")
                for path, content in zip(ncnn_files, ncnn.convert(fused)):
                    files.part(path).write_bytes(content)
            rows = table({"unfused": unfused, "fused": fused}, sizes, args)
            for path in written:  # again, since another program may have written them by now
                check_output(path, [source], args.overwrite, "--output_path")
            files.commit()
    except OSError as error:
        reason = error.strerror or error
        remedy = "free space or pass another --output_path"
        raise UserError(f"{target} can't be written: {reason}; {remedy}.") from None
    say(f"\n{variant_name(unfused.options)} x{unfused.scale}")
    for row in rows:
        say(row)
    limit = f"{verify.ALLOWED_DIFFERENCE:g} allowed"
    say(f"Fused: within {difference:.1e} steps of 1/255 of the unfused network ({limit})")
    half = f"{fit.decibels:.1f} dB from float32, within {fit.steps:.2g} steps of 1/255"
    say(f"Half precision: {half if not fit.problem else f'{fit.problem}; use float32'}")
    for path in written:
        say(f"Wrote {path}")


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code(PROGRAM, lambda: fuse(parse_args(argv)), "nothing was written.")
