"""Compares int8 with float on a CPU, in ONNX Runtime and OpenVINO: speed and file size.

Usage:
    python benchmarks/int8.py             # to benchmarks/results/int8.md; OpenVINO if it is installed
    python benchmarks/int8.py --kernels   # each kind of convolution alone: why some of them stay float

Uses one thread. All networks of a column take turns and figures are medians. The base is our own fused fp32
ONNX file. x2 has this repository's weights, x4 random ones; speed doesn't depend on them. With other --scales
or --sizes it only prints. benchmarks/int8_quality.py measures what int8 costs in dB.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import onnx
import onnxruntime
import torch
from benchmark import session, timed
from networks import ROOT, aether_arch, aether_quant
from report import processor, table, today, write
from torch import Tensor

from aethersr.checkpoint import read_checkpoint
from aethersr.identify import aether_from_state_dict
from aethersr.onnx import export_onnx
from aethersr.timing import Comparison

PLACEMENTS = aether_quant.PLACEMENTS
WEIGHTS = ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors"
RESULTS = ROOT / "benchmarks" / "results"


def float_network(scale: int) -> aether_arch.AetherBase:
    if scale == 2:
        return aether_from_state_dict(read_checkpoint(WEIGHTS).state)
    torch.manual_seed(0)
    net = aether_arch.aether_small(scale=scale).eval()
    with torch.no_grad():  # a new network's zeros are easy to compress
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.005)
    return net


# ------------------------------------------------------------------------------------------------------ speed


def files(scale: int, folder: Path, targets: Sequence[str] = ("onnxruntime", "openvino")) -> Dict[str, Path]:
    net = float_network(scale)
    found = {"fp32": folder / "fp32.onnx"}
    export_onnx(net, scale, "fp32", str(found["fp32"]))
    for placement in PLACEMENTS:
        quantised = aether_quant.prepare_qat(net.fused(), placement)
        for target in targets:
            found[f"{placement} {target}"] = folder / f"{placement}_{target}.onnx"
            export_onnx(quantised, scale, "int8", str(found[f"{placement} {target}"]), target)
    return found


def openvino(path: Path, image: Tensor, precision: str) -> Callable[[], Any]:
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": precision}
    request = ov.Core().compile_model(str(path), "CPU", options).create_infer_request()
    array = image.numpy()
    return lambda: request.infer([array])


def machine() -> str:
    """Date, processor and versions, in words."""
    try:
        import openvino as ov

        version = f", OpenVINO {ov.__version__.split('-')[0]}"
    except ImportError:
        version = ", without OpenVINO (pip install openvino)"
    return f"{today()}: {processor()}, one thread, ONNX Runtime {onnxruntime.__version__}{version}"


def times_as_fast(times: Comparison, base: str, name: str, digits: int) -> str:
    """The median in ms, and how many times as fast as the base."""
    text = f"{times.median(name):.{digits}f}"
    return text if name == base else f"{text} ({times.ratio(base, name).value:.2f})"


def speed(scales: List[int], sizes: List[int], rounds: int) -> List[str]:
    lines = [f"{machine()}; aether_small; ms, and times as fast as fp32 in ONNX Runtime.", ""]
    cells: Dict[str, List[str]] = {}
    head = ["file"]
    for scale in scales:
        with tempfile.TemporaryDirectory() as folder:
            found = files(scale, Path(folder))
            head += [f"x{scale}, of fp32's size", *(f"x{scale}, {size}x{size}" for size in sizes)]
            columns: List[Comparison] = []
            for size in sizes:
                image = torch.rand(1, 3, size, size)
                steps = {
                    f"{name}, ONNX Runtime": session(path, image, 1)
                    for name, path in found.items()
                    if "openvino" not in name
                }
                if "without" not in lines[0]:
                    for precision in ("f32", "bf16"):
                        steps[f"fp32 file, OpenVINO {precision}"] = openvino(found["fp32"], image, precision)
                    for placement in PLACEMENTS:
                        for precision in ("f32", "bf16"):
                            path = found[f"{placement} openvino"]
                            steps[f"{placement} openvino, OpenVINO {precision}"] = openvino(
                                path, image, precision
                            )
                columns.append(timed(steps, rounds))
                print(f"x{scale}, {size}x{size}: measured", file=sys.stderr)
            base = found["fp32"].stat().st_size
            for row in columns[0].times:
                name = row.split(",")[0].replace(" file", "")
                cells.setdefault(row, []).append(f"{found[name].stat().st_size / base:.3f}")
                cells[row] += [times_as_fast(each, "fp32, ONNX Runtime", row, 0) for each in columns]
    return lines + table(head, [[name, *row] for name, row in cells.items()])


# name: channels in, out, kernel, groups
CONVOLUTIONS = {
    "gate, main: 1x1, 96 to 192": (96, 192, 1, 1),
    "out: 1x1, 192 to 96": (192, 96, 1, 1),
    "depthwise 11x11, 96": (96, 96, 11, 96),
    "depthwise 11x11, 180": (180, 180, 11, 180),
    "first: 3x3, 3 to 96": (3, 96, 3, 1),
    "body: 3x3, 96 to 96": (96, 96, 3, 1),
    "tail x2: 5x5, 96 to 12": (96, 12, 5, 1),
    "tail x4: 5x5, 96 to 48": (96, 48, 5, 1),
}


def convolution_file(path: Path, shape: Tuple[int, int, int, int], integer: bool) -> None:
    """One convolution as an ONNX file: float, or from uint8 to uint8 with int8 weights."""
    channels, outputs, kernel, groups = shape
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (outputs, channels // groups, kernel, kernel)).astype(np.int8)
    step = 1 / (20 * kernel * (channels // groups) ** 0.5)
    attributes: Dict[str, Any] = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": groups}
    kind = onnx.TensorProto.UINT8 if integer else onnx.TensorProto.FLOAT
    bias = random.integers(-1000, 1000, outputs).astype(np.int32)
    values: Dict[str, np.ndarray] = {
        "weight": weight.astype(np.float32) * step,
        "bias": bias.astype(np.float32) * step / 255,
    }
    nodes = [onnx.helper.make_node("Conv", ["input", "weight", "bias"], ["output"], **attributes)]
    if integer:
        values = {
            **{
                "codes": weight,
                "step": np.full(outputs, step, np.float32),
                "zero": np.zeros(outputs, np.int8),
            },
            "bias_codes": bias,
            "bias_step": np.full(outputs, step / 255, np.float32),
            "bias_zero": np.zeros(outputs, np.int32),
            **{"scale": np.float32(1 / 255), "middle": np.uint8(128)},
        }
        nodes = [
            onnx.helper.make_node("DequantizeLinear", ["input", "scale", "middle"], ["x"]),
            onnx.helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["weight"], axis=0),
            onnx.helper.make_node(
                "DequantizeLinear", ["bias_codes", "bias_step", "bias_zero"], ["bias"], axis=0
            ),
            onnx.helper.make_node("Conv", ["x", "weight", "bias"], ["y"], **attributes),
            onnx.helper.make_node("QuantizeLinear", ["y", "scale", "middle"], ["output"]),
        ]
    sides = [
        onnx.helper.make_tensor_value_info(name, kind, [1, c, "h", "w"])
        for name, c in (("input", channels), ("output", outputs))
    ]
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "convolution", sides[:1], sides[1:], tensors)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path
    )


def kernels(size: int, rounds: int) -> List[str]:
    cells: List[List[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in CONVOLUTIONS.items():
            paths = {integer: Path(folder, f"{integer}.onnx") for integer in (False, True)}
            for integer, path in paths.items():
                convolution_file(path, shape, integer)
            image = torch.rand(1, shape[0], size, size)
            codes = (image * 255).to(torch.uint8)
            steps = {"ORT": session(paths[False], image, 1), "ORT int8": session(paths[True], codes, 1)}
            with contextlib.suppress(ImportError):
                steps["OpenVINO"], steps["OpenVINO bf16"] = (
                    openvino(paths[False], image, precision) for precision in ("f32", "bf16")
                )
                steps["OpenVINO int8"] = openvino(paths[True], codes, "f32")
            times = timed(steps, rounds)
            cells.append([name, *(times_as_fast(times, key.split()[0], key, 2) for key in steps)])
    head = ["convolution", "ONNX Runtime, fp32", "uint8", "OpenVINO, f32", "bf16", "uint8"]
    title = (
        f"{machine()}; one convolution of {size}x{size} pixels, ms, and times as fast as the runtime's float."
    )
    return [title, "", *table(head[: len(cells[0])], cells)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 3, 4), default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", action="store_true")
    args = parser.parse_args()
    if args.kernels:
        name, text = "int8_kernels.md", "\n".join(kernels(args.sizes[0], args.rounds))
    else:
        name, text = "int8.md", "\n".join(speed(args.scales, args.sizes, args.rounds))
    print(text)
    if all(getattr(args, option) == parser.get_default(option) for option in ("scales", "sizes")):
        write(RESULTS / name, text)


if __name__ == "__main__":
    main()
