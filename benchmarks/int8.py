"""INT8 against float on a CPU: speed and file size in ONNX Runtime and OpenVINO; and what each choice costs in dB.

    python benchmarks/int8.py                       # speed, to benchmarks/results/int8.md (OpenVINO's columns with the package openvino)
    python benchmarks/int8.py --kernels             # speed of each kind of convolution alone: why some of them stay float
    python benchmarks/int8.py --quality FOLDER      # quality, calibrated on FOLDER, the gt of training/prepare_pictures.py
    python benchmarks/int8.py --picture FOLDER      # docs/int8.png: a photograph in fp32 and int8, and 32 times their difference

Speed is that of one thread, every network of a column takes turns, a figure is the median. The base is our own fused fp32 ONNX file.
x2 has the weights of this repository, x4 random ones: speed does not depend on them. With other --scales, --sizes or --photographs than the
default it only prints, and keeps the table in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from benchmark import ROOT, milliseconds, processor, session, table
from PIL import Image
from torch import Tensor

sys.path[:0] = [str(ROOT), str(ROOT / "training")]
import aether_arch  # noqa: E402
from aether_arch import PLACEMENTS, AetherBase, Quantizer, aether_from_state_dict, aether_small, export_onnx  # noqa: E402
from evaluate import evaluate, markdown, pair  # noqa: E402

from fuse_aether import calibration_pairs, read_state  # noqa: E402

WEIGHTS = ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors"
RESULTS = ROOT / "benchmarks" / "results"


def float_network(scale: int) -> AetherBase:
    if scale == 2:
        return aether_from_state_dict(read_state(WEIGHTS)[0])
    torch.manual_seed(0)
    net = aether_small(scale=scale).eval()
    with torch.no_grad():  # a new network's zeros are easy to compress
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.005)
    return net


# ----------------------------------------------------------------------------------------------------------------- speed


def files(scale: int, folder: Path) -> Dict[str, Path]:
    net = float_network(scale)
    found = {"fp32": folder / "fp32.onnx"}
    export_onnx(net, scale, "fp32", str(found["fp32"]))
    for placement in PLACEMENTS:
        quantised = net.fused().prepare_qat(placement)
        for target in ("onnxruntime", "openvino"):
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
        version = ", without OpenVINO (pip install -r benchmarks/requirements.txt)"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{date}: {processor()}, one thread, ONNX Runtime {onnxruntime.__version__}{version}"


def speed(scales: List[int], sizes: List[int], rounds: int) -> List[str]:
    lines = [f"{machine()}; aether_small; ms, and times as fast as fp32 in ONNX Runtime.", ""]
    cells: Dict[str, List[str]] = {}
    head = ["file"]
    for scale in scales:
        with tempfile.TemporaryDirectory() as folder:
            found = files(scale, Path(folder))
            head += [f"x{scale}, of fp32's size", *(f"x{scale}, {size}x{size}" for size in sizes)]
            columns: List[Dict[str, float]] = []
            for size in sizes:
                image = torch.rand(1, 3, size, size)
                steps = {f"{name}, ONNX Runtime": session(path, image, 1) for name, path in found.items() if "openvino" not in name}
                if "without" not in lines[0]:
                    for precision in ("f32", "bf16"):
                        steps[f"fp32 file, OpenVINO {precision}"] = openvino(found["fp32"], image, precision)
                    for placement in PLACEMENTS:
                        for precision in ("f32", "bf16"):
                            path = found[f"{placement} openvino"]
                            steps[f"{placement} openvino, OpenVINO {precision}"] = openvino(path, image, precision)
                columns.append(milliseconds(steps, rounds))
                print(f"x{scale}, {size}x{size}: measured", file=sys.stderr)
            base = found["fp32"].stat().st_size
            for row in columns[0]:
                name = row.split(",")[0].replace(" file", "")
                cells.setdefault(row, []).append(f"{found[name].stat().st_size / base:.3f}")
                cells[row] += [f"{ms[row]:.0f} ({ms['fp32, ONNX Runtime'] / ms[row]:.2f})" for ms in columns]
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
    attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": groups}
    kind = onnx.TensorProto.UINT8 if integer else onnx.TensorProto.FLOAT
    bias = random.integers(-1000, 1000, outputs).astype(np.int32)
    values: Dict[str, np.ndarray] = {"weight": weight.astype(np.float32) * step, "bias": bias.astype(np.float32) * step / 255}
    nodes = [onnx.helper.make_node("Conv", ["input", "weight", "bias"], ["output"], **attributes)]
    if integer:
        values = {
            "codes": weight, "step": np.full(outputs, step, np.float32), "zero": np.zeros(outputs, np.int8), "bias_codes": bias,
            "bias_step": np.full(outputs, step / 255, np.float32), "bias_zero": np.zeros(outputs, np.int32),
            "scale": np.float32(1 / 255), "middle": np.uint8(128),
        }  # fmt: skip
        nodes = [
            onnx.helper.make_node("DequantizeLinear", ["input", "scale", "middle"], ["x"]),
            onnx.helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["weight"], axis=0),
            onnx.helper.make_node("DequantizeLinear", ["bias_codes", "bias_step", "bias_zero"], ["bias"], axis=0),
            onnx.helper.make_node("Conv", ["x", "weight", "bias"], ["y"], **attributes),
            onnx.helper.make_node("QuantizeLinear", ["y", "scale", "middle"], ["output"]),
        ]
    sides = [onnx.helper.make_tensor_value_info(name, kind, [1, c, "h", "w"]) for name, c in (("input", channels), ("output", outputs))]
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "convolution", sides[:1], sides[1:], tensors)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


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
                steps["OpenVINO"], steps["OpenVINO bf16"] = (openvino(paths[False], image, precision) for precision in ("f32", "bf16"))
                steps["OpenVINO int8"] = openvino(paths[True], codes, "f32")
            ms = milliseconds(steps, rounds)
            cells.append([name, *(f"{value:.2f}" + (f" ({ms[key.split()[0]] / value:.2f})" if " " in key else "") for key, value in ms.items())])
    head = ["convolution", "ONNX Runtime, fp32", "uint8", "OpenVINO, f32", "bf16", "uint8"]
    title = f"{machine()}; one convolution of {size}x{size} pixels, ms, and times as fast as float in the same runtime."
    return [title, "", *table(head[: len(cells[0])], cells)]


# --------------------------------------------------------------------------------------------------------------- quality


# Of the pictures that training/prepare_pictures.py cuts: smooth and of saturated colours, which a range too small or a shifted area spoils.
SMOOTH = ("01060.png", "00780.png")


def quality(folder: Path, names: tuple[str, ...]) -> str:
    """PSNR-Y of ways to choose the ranges, and of rounding one part of the network at a time, all in the placement "full"."""
    names += tuple(str(folder / name) for name in SMOOTH if (folder / name).is_file())
    net = float_network(2)
    images = [low for low, _ in calibration_pairs(folder, net)]
    nets: Dict[str, AetherBase] = {"fp32": net, "default": copy.deepcopy(net).prepare_qat("default", images)}
    full = copy.deepcopy(net).prepare_qat("full", images)
    nets["full"] = full
    seen: Dict[str, List[List[float]]] = {name: [] for name in full.quantizers()}

    def look(name: str) -> Callable[..., None]:
        def hook(quantizer: Quantizer, inputs: Any, _: Any) -> None:
            values = inputs[0].abs() if quantizer.low is None else inputs[0]
            some = values.flatten()[:: max(1, values.numel() // 10**5)]
            quantile = some.kthvalue(max(1, round(some.numel() * 0.9999))).values
            seen[name].append([float(values.max()), float(quantile)])

        return hook

    watching = copy.deepcopy(full).eval()
    for name, quantizer in watching.quantizers().items():
        quantizer.enabled = False
        quantizer.register_forward_hook(look(name))
    with torch.no_grad():
        for image in images:
            watching(image)
    ways: Dict[str, Callable[[np.ndarray], float]] = {
        "largest of all": lambda values: float(values[:, 0].max()),
        "mean of largest": lambda values: float(values[:, 0].mean()),
        "middle one's": lambda values: float(np.sort(values[:, 0])[len(values) // 2]),
        "99.99%, largest": lambda values: float(values[:, 1].max()),
        "99.99%, median": lambda values: float(np.median(values[:, 1])),
    }
    for way, choose in ways.items():
        nets[f"full, {way}"] = copy.deepcopy(full)
        for name, quantizer in nets[f"full, {way}"].quantizers().items():  # type: ignore[operator, union-attr]
            if quantizer.high is None:
                quantizer.range_sum.data.fill_(choose(np.array(seen[name])))
    stream = re.compile(r"quant_(start|sum)$")
    parts = {
        "blocks": lambda name: name.startswith("stages") and not stream.search(name),
        "stream": stream.search,
        "after the blocks": lambda name: not name.startswith(("stages", "tail")),
        "tail": lambda name: name.startswith("tail"),
    }
    for part, belongs in parts.items():
        nets[f"only {part}"] = copy.deepcopy(full)
        for name, quantizer in nets[f"only {part}"].quantizers().items():  # type: ignore[operator, union-attr]
            quantizer.enabled = bool(belongs(name))

    def run(each: AetherBase, round_taps: Callable[[Tensor], Tensor] = aether_arch._round_taps) -> Callable[[np.ndarray], np.ndarray]:
        each.eval()

        @torch.no_grad()
        def upscale(image: np.ndarray) -> np.ndarray:
            with mock.patch.object(aether_arch, "_round_taps", round_taps):
                return each(torch.from_numpy(image)).numpy()

        return upscale

    upscalers = {name: run(each) for name, each in nets.items()}
    return markdown(evaluate({**upscalers, "full, taps rounded one by one": run(full, torch.round)}, 2, names))


def picture(folder: Path, path: Path, gain: int = 32) -> str:
    """fp32, default, full in the upper row; below, 128 and ``gain`` times what the two differ from fp32 by."""
    net = float_network(2)
    images = [low for low, _ in calibration_pairs(folder, net)][::4]
    _, small = pair("chelsea", 2)
    crop = small.crop((40, 20, 150, 130))
    image = torch.from_numpy(np.asarray(crop, dtype=np.float32).transpose(2, 0, 1)[None] / 255)
    rows: List[List[np.ndarray]] = [[], []]
    with torch.no_grad():
        for each in (net, *(net.fused().prepare_qat(placement, images).eval() for placement in PLACEMENTS)):
            rows[0].append((each(image)[0].clamp(0, 1) * 255).round().numpy().transpose(1, 2, 0))
            rows[1].append(128 + gain * (rows[0][-1] - rows[0][0]))
    pixels = np.concatenate([np.concatenate(row, 1) for row in rows]).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, optimize=True)
    differences = [np.abs(each - rows[0][0]) for each in rows[0][1:]]
    return "\n".join(f"{name}: mean {each.mean():.2f}, largest {each.max():.0f} of 255" for name, each in zip(PLACEMENTS, differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 3, 4), default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--quality", type=Path, metavar="FOLDER")
    parser.add_argument("--picture", type=Path, metavar="FOLDER")
    parser.add_argument("--photographs", nargs="+", default=["chelsea", "coins", "brick"], help="also a file of a folder gt beside lq")
    args = parser.parse_args()
    if args.picture:
        print(picture(args.picture, ROOT / "docs" / "int8.png"))
        return
    if args.quality:
        name, text = "int8_quality.md", quality(args.quality, tuple(args.photographs))
    elif args.kernels:
        name, text = "int8_kernels.md", "\n".join(kernels(args.sizes[0], args.rounds))
    else:
        name, text = "int8.md", "\n".join(speed(args.scales, args.sizes, args.rounds))
    print(text)
    if any(getattr(args, option) != parser.get_default(option) for option in ("scales", "sizes", "photographs")):
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    part = path.with_name(f"{path.name}.part")
    part.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
