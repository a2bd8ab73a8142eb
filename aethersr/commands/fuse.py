"""Turn a training checkpoint of AetherNet into fused release weights, and into files for other runtimes.

    python fuse_aether.py --model_path net_g_latest.pth --output_path 2x_MyModel_fused.safetensors

Needs only PyTorch, and safetensors for .safetensors files; --onnx and --ncnn need what runs their files. The
options: docs/fuse.md.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from aether_arch import AetherBase, FusedAetherNet
from aether_quant import QuantAetherNet
from torch import Tensor

from aethersr import calibration, half_precision, ncnn, verify
from aethersr.checkpoint import read_checkpoint, write_state
from aethersr.commands import exit_code, fuse_options
from aethersr.commands.fuse_options import PROGRAM
from aethersr.errors import UserError, first_line, is_out_of_memory, naming
from aethersr.files import Together, check_output, unwritable
from aethersr.identify import aether_from_state_dict, bounded, form_name, variant_name
from aethersr.onnx import export_onnx

OTHER_CHECKPOINT = "pass another checkpoint (--model_path)"


def build(path: Path, state: Mapping[str, Tensor], args: argparse.Namespace) -> AetherBase:
    """The unfused network in float64, after checking that it is what the user says it is."""
    form = form_name(state)
    remedy = ""
    if form == "int8":
        remedy = "export it"
    elif form == "older fused" and not args.accept_older_fused:
        remedy = "pass --accept_older_fused to fuse the rest of it"
    elif form == "fused" and not (args.onnx or args.ncnn or args.half or args.bound):
        remedy = "it can be used as it is; --half writes it in half precision, --onnx or --ncnn exports it"
    if remedy:
        found = f"{path} is fused already ({form} form), expected a training checkpoint"
        raise UserError(f"{found}; {remedy}, or pass another (--model_path).")
    with naming(path, "--model_path"):
        net = aether_from_state_dict(bounded(state, args.bound) if args.bound else state, args.img_range)
    held: Dict[str, Any] = {"model_type": variant_name(net.options), "upscale": net.scale}
    for option in held:
        given = getattr(args, option)
        if given not in (None, held[option]):
            what = f"{path} holds {held['model_type']} x{net.scale}, but --{option} {given} was given"
            raise UserError(f"{what}; pass what it holds, or leave --{option} out.")
    return net.double()


def check_difference(unfused: AetherBase, net: FusedAetherNet, source: Path, device: str) -> float:
    """Largest difference of the fused network in float32, in steps of 1/255. UserError: it is too large."""
    rounded = copy.deepcopy(net).float()
    # The fused weights have no rounding, so compare them with the trained weights without rounding.
    like = unfused.fused() if isinstance(unfused, QuantAetherNet) else unfused
    difference = verify.largest_difference(like, rounded, device)
    if not difference <= verify.ALLOWED_DIFFERENCE:
        found = f"{source}: the fused network differs by {difference:.2g} steps of 1/255"
        why = f"allowed {verify.ALLOWED_DIFFERENCE:g}; these weights are damaged or too extreme for float32"
        raise UserError(f"{found}, {why}. Nothing was written; {OTHER_CHECKPOINT}.")
    return difference


def quantise(
    trained: Any, net: FusedAetherNet, powers: Mapping[str, int], pairs: Any, args: argparse.Namespace
) -> QuantAetherNet:
    """The network with int8 weights, its ranges those of the trained one (if any) or found on ``pairs``."""
    if trained is None or pairs:
        instead = ", in place of the ranges that training found" if trained else ""
        print(f"Calibrating on {len(pairs)} pictures{instead}")
        found = calibration.calibrated(net, pairs, args.target, args.reduce_range)
        for note in found.notes:
            print(f"Note: {note}")
        loss = f"PSNR {found.mean:+.3f} dB in the mean, {found.worst:+.3f} dB at worst"
        print(f"int8 against float, on these pictures: {loss}")
        return found.net
    return half_precision.rescaled(trained, powers).cpu().convert_to_quantized()


def write_weights(net: FusedAetherNet, part: Path, half: bool) -> AetherBase:
    """Write ``part`` and return the network in it."""
    name = variant_name(net.options)
    architecture = name if name.startswith("aether") else "AetherNet"
    described = {"format": "pt", "architecture": architecture, "scale": str(net.scale), "form": "fused"}
    state = {name: value.cpu().float() for name, value in net.state_dict().items()}
    if half:  # biases are few, and rounding them would shift the whole picture
        state = {name: value.half() if value.dim() > 1 else value for name, value in state.items()}
    write_state(state, part, described)
    return aether_from_state_dict(read_checkpoint(part, "--output_path").state)


def write_onnx(net: AetherBase, precision: str, part: Path, target: Path, options: Dict[str, Any]) -> None:
    """Write ``part``, which becomes ``target``. ``options``: those of export_onnx."""
    try:
        export_onnx(net, net.scale, precision, str(part), **options)
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        found = f"{target} can't be made: {first_line(error)}"
        raise UserError(f"{found} Pass other weights, or leave --onnx out.") from None


def table(nets: Dict[str, AetherBase], sizes: List[int], args: argparse.Namespace) -> str:
    """Sizes and, on request, times of the unfused and the fused network."""
    numbers = [f"{sum(value.numel() for value in net.parameters()):,}" for net in nets.values()]
    rows = [("", [*nets]), ("parameters", numbers), ("file, MiB", [f"{size / 2**20:.2f}" for size in sizes])]
    words = ""
    if args.measure:
        times = verify.compare_times(nets, args.device)
        side = verify.TIMED
        rows.append((f"ms, {side}x{side}, {args.device}", [f"{times.median(name):.1f}" for name in nets]))
        words = f"\ntimes as fast: {times.ratio('unfused', 'fused').words()}"
    return "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>12}" for cell in row[1]) for row in rows) + words


def fuse(args: argparse.Namespace) -> None:
    """What the command does. Raises UserError, and then writes nothing."""
    source, target = args.model_path, args.output_path
    print(f"Reading {source}")
    state, chosen = read_checkpoint(source)
    unfused = build(source, state, args)
    static = fuse_options.static_shape(args, unfused)
    onnx_files, ncnn_files = fuse_options.onnx_and_ncnn_paths(args, unfused.scale, static)
    written = (target, *onnx_files, *ncnn_files)

    def check_outputs() -> None:
        for path in written:
            check_output(path, [source], args.overwrite, "--output_path")

    check_outputs()
    trained = unfused if isinstance(unfused, QuantAetherNet) and unfused.has_ranges() else None
    pairs = calibration.calibration_pairs(args.calibration, unfused) if args.calibration else []
    if "int8" in args.onnx and not (trained or pairs):
        problem = "was not trained with qat: true, or for no step, so int8 needs pictures to find its ranges"
        raise UserError(f"{source} {problem}: pass --calibration FOLDER.")
    options = {key: vars(args)[key] for key in ("target", "reduce_range", "opset")}
    options.update(static=static, simplify=True)
    if args.onnx:
        options["metadata"] = fuse_options.onnx_metadata(source, args)
    print(f"Weights: {chosen}")
    print("Fusing in float64, and comparing with the unfused network")
    net = unfused.fused()
    fit = half_precision.fit_half_precision_(net, args.device)
    for note in fit.notes:
        print(note)
    if fit.problem and (args.half or args.ncnn or "fp16" in args.onnx):
        raise UserError(f"{source}: {fit.problem}; leave --half, fp16 and --ncnn out, or {OTHER_CHECKPOINT}.")
    difference, int8 = check_difference(unfused, net, source, args.device), None
    if "int8" in args.onnx:
        try:
            int8 = quantise(trained, net, fit.powers, pairs, args)
        except ValueError as error:
            found = f"{source} as int8: {first_line(error)}"
            raise UserError(f"{found} Pass other weights or pictures, or leave int8 out.") from None
    try:
        with Together() as files:
            part = files.part(target)
            fused = write_weights(net, part, args.half)
            sizes = [path.stat().st_size for path in (source, part)]
            if args.onnx:
                print(f"Exporting {', '.join(args.onnx)}")
            for path, precision in onnx_files.items():
                exported = int8 if int8 and precision == "int8" else fused
                write_onnx(exported, precision, files.part(path), path, options)
            if args.ncnn:
                print("Converting for NCNN")
                for path, content in zip(ncnn_files, ncnn.convert(fused)):
                    files.part(path).write_bytes(content)
            rows = table({"unfused": unfused, "fused": fused}, sizes, args)
            check_outputs()  # again, since another program may have written them by now
            files.commit()
    except OSError as error:
        raise unwritable(target, error, "--output_path") from None
    print(f"\n{variant_name(unfused.options)} x{unfused.scale}\n{rows}")
    found = f"within {difference:.1e} steps of 1/255 of the unfused network"
    print(f"Fused: {found} ({verify.ALLOWED_DIFFERENCE:g} allowed)")
    half = f"{fit.decibels:.1f} dB from float32, within {fit.steps:.2g} steps of 1/255"
    print(f"Half precision: {f'{fit.problem}; use float32' if fit.problem else half}")
    for path in written:
        print(f"Wrote {path}")


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code(PROGRAM, lambda: fuse(fuse_options.parse_args(argv)), "nothing was written.")
