"""Turn a training checkpoint of AetherNet into fused release weights, and into ONNX files.

    python fuse_aether.py --model_path net_g_latest.pth --output_path 2x_MyModel_fused.safetensors

Reads checkpoints of neosr, traiNNer-redux, BasicSR and others (EMA weights preferred), fuses in float64,
writes float32, reads the file back and compares it with the unfused network. Needs only PyTorch, and
safetensors for .safetensors files.

``--onnx fp32,fp16,int8`` writes ONNX files beside the weights (needs onnx, onnxruntime and onnxslim). int8
needs a checkpoint from quantisation-aware training, or ``--calibration FOLDER`` (pictures at the resolution
of the network's output; needs Pillow). ``--ncnn`` writes NCNN's .param and .bin (needs ncnn and pnnx). With
these, --model_path can also be fused weights.

Values that half precision can't hold are rescaled inside the network, exactly. ``--check-fp16`` prints every
layer's headroom, and compares fp16 and bf16 with fp32. Without --output_path it writes nothing, and takes
fused weights too:

    python fuse_aether.py --model_path 2x_MyModel_fused.safetensors --check-fp16
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from aether_arch import AetherBase, FusedAetherNet
from aether_quant import QuantAetherNet
from torch import Tensor

from aethersr import calibration, ncnn, verify
from aethersr.checkpoint import read_checkpoint, write_state
from aethersr.commands import exit_code
from aethersr.commands.fuse_options import (
    PROGRAM,
    check_ending,
    check_numbers,
    exports,
    ncnn_paths,
    onnx_metadata,
    onnx_path,
    parse_args,
    precisions,
    static_shape,
)
from aethersr.errors import UserError, first_line, is_out_of_memory
from aethersr.files import Together, check_output
from aethersr.half_precision import changed_by_bound, fit_half_precision_, with_ranges_of
from aethersr.identify import aether_from_state_dict, bounded, form_name, variant_name
from aethersr.onnx import export_onnx

OTHER_CHECKPOINT = "pass another checkpoint (--model_path)"

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------- network


def build(path: Path, state: Mapping[str, Tensor], args: argparse.Namespace) -> AetherBase:
    """The unfused network in float64, after checking that it is what the user says it is."""
    form = form_name(state)
    if form == "int8":
        found = f"{path} holds int8 weights already, expected a training checkpoint"
        raise UserError(f"{found}; export it, or pass another (--model_path).")
    nothing_to_do = args.output_path and args.bound is None and not exports(args)
    if (form == "fused" and nothing_to_do) or (form == "older fused" and not args.accept_older_fused):
        remedy = "it can be used as it is, and --onnx or --ncnn exports it"
        if form == "older fused":
            remedy = "pass --accept_older_fused to fuse the rest of it"
        found = f"{path} is fused already ({form} form), expected a training checkpoint"
        raise UserError(f"{found}; {remedy}, or pass another (--model_path).")
    try:
        if args.bound is not None:
            state = bounded(state, args.bound)
        net = aether_from_state_dict(state, img_range=args.img_range)
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
    negative = [
        key for key, value in state.items() if key.endswith("running_var") and bool((value < 0).any())
    ]
    if negative:
        found = f"{path}: tensor {negative[0]!r} holds a negative variance"
        raise UserError(f"{found}; the file is damaged, so pass another (--model_path).")
    return net.double()


def fit(net: FusedAetherNet, source: Path, args: argparse.Namespace, say: Say, asked: bool) -> Dict[str, int]:
    """Rescale the fused network where half precision needs it, report that, and return the powers of two."""
    fitted = fit_half_precision_(net, args.device)
    for line in fitted.notes() + (fitted.table() if args.check_fp16 else []):
        say(line)
    if fitted.problem and asked:
        raise UserError(f"{source}: {fitted.problem}; leave fp16 out, or {OTHER_CHECKPOINT}.")
    if fitted.problem and fitted.pictures:
        say(f"Note: {fitted.problem}; use these weights in float32 or bfloat16")
    return fitted.powers


def report_bound(
    state: Mapping[str, Tensor], net: FusedAetherNet, args: argparse.Namespace, say: Say
) -> None:
    unbounded = {name: value for name, value in state.items() if name != "bound"}
    free = aether_from_state_dict(unbounded, args.img_range).fused()
    changed, lost, count = changed_by_bound(net, free)
    found = f"changes the output for {changed} of {count} hard pictures"
    say(f"Bound {net.options['bound']:g}: {found}; without it {lost} of them are not finite")


def quantise(
    unfused: AetherBase,
    net: FusedAetherNet,
    powers: Mapping[str, int],
    source: Path,
    args: argparse.Namespace,
    say: Say,
) -> QuantAetherNet:
    """The fused network with int8 weights, its ranges from training or calibrated on pictures."""
    if args.calibration is None:
        assert isinstance(unfused, QuantAetherNet)  # check_int8
        if powers:
            unfused = with_ranges_of(net, unfused, powers)
        return copy.deepcopy(unfused).cpu().float().convert_to_quantized()
    pairs = calibration.calibration_pairs(Path(args.calibration), net)
    say(
        f"Calibrating on {len(pairs)} pictures"
        + (", in place of the ranges that training found" if isinstance(unfused, QuantAetherNet) else "")
    )
    found = calibration.calibrated(net, pairs, args.target, args.reduce_range)
    for note in found.notes:
        say(f"Note: {note}")
    loss = f"PSNR {found.mean:+.3f} dB in the mean, {found.worst:+.3f} dB at worst"
    say(f"int8 against float, on these pictures: {loss}")
    return found.net


def check_int8(unfused: AetherBase, source: Path, args: argparse.Namespace) -> None:
    """Raise UserError if there are neither pictures for the ranges nor ranges from training."""
    if args.calibration is not None:
        return
    remedy = "pass --calibration FOLDER"
    if not isinstance(unfused, QuantAetherNet):
        found = f"{source} was not trained with qat: true, so int8 needs pictures to find its ranges"
        raise UserError(f"{found}: {remedy}.")
    if not unfused.has_ranges():
        found = f"{source} was saved before its first training step, so its ranges are unknown"
        raise UserError(f"{found}; {remedy}.")


# ---------------------------------------------------------------------------------------------------- writing


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


def read_back(part: Path, target: Path) -> AetherBase:
    """The network in the file just written; ``part`` is its name until it is known to be right."""
    try:
        return aether_from_state_dict(read_checkpoint(part, "--output_path").state)
    except (UserError, ValueError) as error:
        reason = str(error).replace(str(part), "it")
        raise UserError(f"{target} was not written: reading it back failed, {reason}") from None


def check_finite(net: FusedAetherNet, source: Path) -> None:
    if not all(bool(value.float().isfinite().all()) for value in net.state_dict().values()):
        found = f"{source}: the fused weights are not finite in float32, because the weights are too extreme"
        raise UserError(f"{found}. Nothing was written; {OTHER_CHECKPOINT}.")


def measure(unfused: AetherBase, fused: AetherBase, sizes: Tuple[int, int], device: str) -> List[str]:
    """A table of what fusing gained. Afterwards both networks are in float32."""
    before, after = (verify.count_operations(net.cpu()) for net in (unfused, fused))
    counts = [verify.count_parameters(net) for net in (unfused, fused)]
    times = verify.compare_times({"unfused": unfused, "fused": fused}, device)
    rows = (
        ("parameters", "{:>12,}", counts),
        ("convolutions", "{:>12}", (before[0], after[0])),
        ("other operations", "{:>12}", (before[1], after[1])),
        ("file, MiB", "{:>12.2f}", [size / 2**20 for size in sizes]),
        (f"ms, 64x64, {device}", "{:>12.1f}", [times.median(name) for name in ("unfused", "fused")]),
    )
    lines = [f"{'':<20}{'unfused':>12}{'fused':>12}"]
    lines += [f"{label:<20}" + "".join(map(form.format, values)) for label, form, values in rows]
    return [*lines, times.ratio("unfused", "fused").words("times as fast")]


def fuse(args: argparse.Namespace, say: Say = print) -> None:
    """What the command does. Raises UserError, and then writes nothing."""
    source = Path(args.model_path)
    check_numbers(args)
    wanted = precisions(args)
    say(f"Reading {source}")
    state, chosen = read_checkpoint(source)
    if args.output_path is None:
        net = build(source, state, args).fused()
        say(f"Weights: {chosen}")
        fit(net, source, args, say, asked=True)
        return
    target = Path(args.output_path)
    check_ending(target)
    check_output(target, [source], args.overwrite, "--output_path")
    unfused = build(source, state, args)
    static = static_shape(args, unfused)
    targets = {onnx_path(target, precision, static): precision for precision in wanted}
    ncnn_files = ncnn_paths(target, unfused.scale) if args.ncnn else ()
    written = (target, *targets, *ncnn_files)
    for path in written[1:]:
        check_output(path, [source], args.overwrite, "--output_path")
    metadata = onnx_metadata(source, args) if wanted else {}
    say(f"Weights: {chosen}")
    if "int8" in wanted:
        check_int8(unfused, source, args)
    say("Fusing in float64")
    net = unfused.fused()
    if args.bound is not None:
        report_bound(state, net, args, say)
    powers = fit(net, source, args, say, args.check_fp16 or args.ncnn or "fp16" in wanted)
    check_finite(net, source)
    int8 = None
    if "int8" in wanted:
        try:
            int8 = quantise(unfused, net, powers, source, args, say)
        except ValueError as error:
            found = f"{source} as int8: {first_line(error)}"
            raise UserError(f"{found} Pass other weights or pictures, or leave int8 out.") from None
    name, scale = variant_name(unfused.options), unfused.scale
    described = {
        "format": "pt",
        "architecture": name if name.startswith("aether") else "AetherNet",
        "scale": str(scale),
        "form": "fused",
    }
    try:
        with Together() as files:
            part = files.part(target)
            write_state(net.state_dict(), part, described)
            say("Verifying: the written file against the unfused network, in float64")
            fused = read_back(part, target)
            # The float file has no rounding, so compare it with the trained weights without rounding.
            like = unfused.fused() if isinstance(unfused, QuantAetherNet) else unfused
            difference = verify.largest_difference(like, fused, args.device)
            if not difference <= verify.ALLOWED_DIFFERENCE:
                found = f"{source}: the fused network differs by {difference:.2g} steps of 1/255"
                why = f"allowed {verify.ALLOWED_DIFFERENCE:g}; these weights are too extreme for float32"
                raise UserError(f"{found}, {why}. Nothing was written; {OTHER_CHECKPOINT}.")
            say("Measuring")
            table = measure(unfused, fused, (source.stat().st_size, part.stat().st_size), args.device)
            if wanted:
                say(f"Exporting {', '.join(wanted)}")
            plain = fused.cpu().float()
            nets = {
                path: (kind, int8 or plain if kind == "int8" else plain) for path, kind in targets.items()
            }
            write_onnx(files, nets, args, static, metadata)
            if args.ncnn:
                say("Converting for NCNN")
                for path, content in zip(ncnn_files, ncnn.convert(plain)):
                    files.part(path).write_bytes(content)
            for path in written:  # again, since another program may have written them by now
                check_output(path, [source], args.overwrite, "--output_path")
            files.commit()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{target} can't be written: {reason}; free space or pass another --output_path."
        ) from None
    say("")
    say(f"{name} x{scale}")
    *rows, speed = table
    for row in rows:
        say(row)
    say(
        f"{speed}; largest difference {difference:.1e} steps of 1/255 (allowed {verify.ALLOWED_DIFFERENCE:g})"
    )
    for path in written:
        say(f"Wrote {path}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    return exit_code(PROGRAM, lambda: fuse(parse_args(argv)), "nothing was written.")
