"""ONNX files of the fused or quantised network, checked in ONNX Runtime before they are kept."""

from __future__ import annotations

import inspect
import io
import warnings
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import torch
from aether_arch import AetherBase
from aether_quant import TARGETS
from torch import Tensor

from aethersr.exported import for_export
from aethersr.files import Together
from aethersr.identify import variant_name
from aethersr.onnx_int8 import integer_convolutions

PRECISIONS = ("fp32", "fp16", "int8")
OPSETS = range(11, 24)  # from the first with this pixel shuffle to the last that PyTorch writes
# How far ONNX Runtime's output may be from the network's, relative to the largest value.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 1e-2}  # on noise, where one code of a product goes far


def export_onnx(
    model: Any,
    scale: int,
    precision: str = "fp32",
    output_path: Optional[str] = None,
    target: str = "onnxruntime",
    *,
    reduce_range: bool = False,
    static: Optional[Sequence[int]] = None,
    opset: int = 17,
    simplify: bool = False,
    metadata: Optional[Mapping[str, str]] = None,
) -> str:
    """Write the fused network as one ONNX file and return its path. The model stays as it was.

    The input ``input`` is (N, in_chans, H, W) in [0, 1], the output ``output`` (N, in_chans, scale * H,
    scale * W), both in the given precision, or float32 for "int8"; N, H and W are dynamic. The file is
    checked in ONNX Runtime on two odd sizes. Needs the packages onnx and onnxruntime.

    Args:
        scale: the model's, repeated to catch mistakes.
        precision: "fp32", "fp16", or "int8" for a network from prepare_qat.
        output_path: default ``aether_x{scale}_{precision}.onnx`` in the current folder.
        target: for "int8", the runtime to optimise for: "onnxruntime" (on a CPU: uint8, also between
            convolutions), "tensorrt" or "openvino" (int8 about zero, only at the input of convolutions).
        reduce_range: for "int8", 7-bit weights: integer kernels of CPUs without VNNI overflow with 8.
        static: (in_chans, height, width) for a file that takes one picture of this size.
        opset: 11 to 23, for int8 from 13 and what ONNX Runtime opens. Every runtime takes 17.
        simplify: remove duplicates and constants with the package onnxslim. The function stays the same.
        metadata: to write beside architecture, variant, scale and precision, for instance license.

    Raises:
        ValueError: scale, precision, target, static or opset don't fit.
        RuntimeError: ONNX Runtime's output differs from the network's. Nothing is written then.
    """
    _check_arguments(model, scale, precision, target, static, opset)
    import onnx

    variant = variant_name(model.options)
    described = dict(architecture="AetherNet", variant=variant, scale=str(scale), precision=precision)
    # The tracer can't follow inference tensors, and creating modules draws random numbers.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        if precision == "int8":
            reference = model.convert_to_quantized().for_target(target, reduce_range).cpu()
            described.update(target=target)
        else:
            reference = model.fused().cpu().float()
        network = for_export(reference)
        file = trace(network.half() if precision == "fp16" else network, opset, fold=precision != "int8")
        if precision == "int8":
            integer_convolutions(file, target)
        if simplify:
            import onnxslim

            # Don't fold larger constants (in bytes), so that int8 weights stay int8.
            file = onnxslim.slim(file, size_threshold=64)
        del file.graph.value_info[:]  # shapes between layers; every runtime infers them for its own size
        onnx.helper.set_model_props(file, {**described, **(metadata or {})})
        onnx.checker.check_model(file, full_check=True)
        compare(file.SerializeToString(), reference, precision)
    if static is not None:  # no node holds a size, so the nodes stay
        for value, factor in ((file.graph.input[0], 1), (file.graph.output[0], scale)):
            sizes = (1, static[0], static[1] * factor, static[2] * factor)
            for dim, size in zip(value.type.tensor_type.shape.dim, sizes):
                dim.dim_value = size
        onnx.checker.check_model(file, full_check=True)  # infers the output's size and compares
    path = output_path or f"aether_x{scale}_{precision}.onnx"
    with Together() as files:  # not written by onnx, which can't handle every file name
        files.part(Path(path)).write_bytes(file.SerializeToString())
        files.commit()
    return path


def _check_arguments(
    model: AetherBase, scale: int, precision: str, target: str, static: Optional[Sequence[int]], opset: int
) -> None:
    problem = ""
    if scale != model.scale:
        problem = f"scale={scale} was asked for, the model has scale={model.scale}"
    elif precision not in PRECISIONS:
        problem = f"precision={precision!r} is not known; allowed: {', '.join(PRECISIONS)}"
    elif precision == "int8" and not hasattr(model, "is_int8"):
        problem = "precision='int8' needs a quantised network: prepare_qat(), train, convert_to_quantized()"
    elif target not in TARGETS:
        problem = f"target={target!r} is not known; allowed: {', '.join(TARGETS)}"
    elif opset not in OPSETS:
        problem = f"opset={opset!r} is not possible; allowed: {OPSETS[0]} to {OPSETS[-1]}"
    elif static is not None:
        chans = model.options["in_chans"]
        if len(static) != 3 or static[0] != chans or not all(type(n) is int and n > 0 for n in static):
            problem = f"static={static!r} is not possible; expected ({chans}, height, width)"
    if problem:
        raise ValueError(f"export_onnx: {problem}.")


def picture(dtype: torch.dtype, *shape: int) -> Tensor:
    """Noise in [0, 1], always the same; the global random generator is not touched."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def trace(network: AetherBase, opset: int, fold: bool) -> Any:
    """The network as an ONNX model for any batch, height and width. ``fold``: fold constants."""
    import onnx

    image = picture(next(network.parameters()).dtype, 1, network.options["in_chans"], 19, 23)
    # The output's sizes have other names, because DirectML and ONNX Runtime fix all sizes of one name alike.
    ends = {"input": ("height", "width"), "output": ("out_height", "out_width")}
    axes = {end: {0: "batch", 2: height, 3: width} for end, (height, width) in ends.items()}
    more: Dict[str, Any] = {"opset_version": opset, "do_constant_folding": fold, "dynamic_axes": axes}
    more.update(input_names=["input"], output_names=["output"])
    # The tracing exporter is deprecated, but in every PyTorch since 1.13 it writes one small file.
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        more["dynamo"] = False
    written: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (image,), written, **more)
    return onnx.load_model_from_string(written.getvalue())


def compare(file: bytes, reference: AetherBase, precision: str) -> None:
    """Run an ONNX file on two sizes. Raises RuntimeError if ONNX Runtime and the network disagree."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    dtype = torch.float16 if precision == "fp16" else torch.float32
    for height, width in ((17, 31), (33, 13)):
        image = picture(dtype, 2, reference.options["in_chans"], height, width)
        expected = reference(image.float())
        output = torch.from_numpy(np.asarray(session.run(["output"], {"input": image.numpy()})[0])).float()
        error = (output - expected).abs()
        # Integer kernels may round a value to the next code, but the mean must agree.
        largest = float(error.mean() if precision == "int8" else error.max())
        allowed = TOLERANCE[precision] * max(1.0, float(expected.abs().max()))
        if not largest <= allowed:
            found = f"ONNX Runtime differs from the network by {largest:.3g} at {width}x{height}"
            raise RuntimeError(f"export_onnx: {found}, allowed {allowed:.3g}.")
