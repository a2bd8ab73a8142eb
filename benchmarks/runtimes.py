"""The network in other runtimes: difference from PyTorch, and time compared with ONNX Runtime.

    python benchmarks/runtimes.py                   # the shipped weights, to benchmarks/results/runtimes.md
    python benchmarks/runtimes.py mine.safetensors  # yours, printed

Needs requirements-runtimes.txt; a runtime that is not installed gets no figures. One thread each. All are
timed in turn, round after round, so that a slow moment meets all of them alike. Takes less than five minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import load, processor, short, table, today, write

from aethersr.checkpoint import read_checkpoint
from aethersr.errors import UserError
from aethersr.exported import for_export
from aethersr.identify import aether_from_state_dict
from aethersr.ncnn import export_ncnn
from aethersr.ncnn import run as run_ncnn
from aethersr.onnx import export_onnx
from aethersr.timing import interleaved

Runner = Callable[[Any], Any]  # picture (1, C, H, W) in [0, 1] -> picture
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors"
RESULTS = ROOT / "benchmarks" / "results" / "runtimes.md"
# The table of docs/runtimes.md: who uses a runtime, the file, the command that makes it, the precision.
HEAD = ["runtime", "who uses it", "file", "command", "precision"]
HEAD += ["largest difference, steps of 1/255", "ms", "times as long as ONNX Runtime fp32"]
USES = {
    "PyTorch": ("ComfyUI, programs with spandrel", "`2x_mine.safetensors`", "none", "fp32"),
    "ONNX Runtime fp32": ("chaiNNer, vs-mlrt, own programs", "`2x_mine_fp32.onnx`", "`--onnx fp32`", "fp32"),
    "ONNX Runtime fp16": ("the same", "`2x_mine_fp16.onnx`", "`--onnx fp16`", "fp16"),
    "OpenVINO": ("Intel CPUs and GPUs", "`2x_mine_fp32.onnx`", "none, it reads ONNX", "fp32"),
    "OpenCV": ("C++ programs", "`2x_mine_fp32_3x480x640.onnx`", "`--static 3,480,640`", "fp32"),
    "MNN": ("phones", "`2x_mine.mnn`", "`mnnconvert`", "fp32"),
    "NCNN": (
        "Upscayl, chaiNNer, Real-ESRGAN-ncnn-vulkan",
        "`2x_mine.param`, `2x_mine.bin`",
        "`--ncnn`",
        "fp16 storage",
    ),
    "LiteRT": ("Android", "`2x_mine.tflite`", "`litert_torch.convert`", "fp32"),
    "Core ML": ("Mac, iPhone", "`2x_mine.mlpackage`", "`coremltools.convert`", "fp16"),
    "TensorRT": ("NVIDIA", "`2x_mine_fp16.onnx`", "`trtexec`", "fp16"),
}


def onnx_runtime(path: str) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    return lambda image: session.run(None, {"input": image.astype(dtype)})[0]


def openvino(path: str) -> Runner:
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = Core().compile_model(path, "CPU", settings)
    return lambda image: compiled(image)[0]


def opencv(path: str, classic: bool = False) -> Runner:
    """``classic``: of OpenCV 5's engines the older one, which wants a file for one size."""
    import cv2

    cv2.setNumThreads(1)
    engine = {"engine": cv2.dnn.ENGINE_CLASSIC} if classic else {}
    net = cv2.dnn.readNetFromONNX(path, **engine)

    def run(image: Any) -> Any:
        net.setInput(image)
        return net.forward()

    return run


def mnn(path: str) -> Runner:
    import MNN  # noqa: F401  to say that it is missing

    # What mnnconvert calls. The command itself installs a package first, and reports to its maker's server.
    code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    target = str(Path(path).with_suffix(".mnn"))
    files = ["--modelFile", path, "--MNNModel", target, "--bizCode", "aether"]
    subprocess.run([sys.executable, "-c", code, "-f", "ONNX", *files], check=True, capture_output=True)
    return open_mnn(target)


def open_mnn(path: str) -> Runner:
    import MNN.expr as expr
    import MNN.nn as nn

    runtime = nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
    runtime.set_hint(3, 0)  # WINOGRAD_MEMORY_LEVEL: its largest Winograd tiles cost 0.15 steps of 1/255
    module = nn.load_module_from_file(path, ["input"], ["output"], runtime_manager=runtime)

    def run(image: Any) -> Any:
        variable = expr.placeholder(list(image.shape), expr.NCHW)
        variable.write(image.copy())
        output = expr.convert(module.forward(variable), expr.NCHW)
        return np.array(output.read()).reshape(output.shape)

    return run


def ncnn(param: str) -> Runner:
    import ncnn as package

    net = package.Net()
    net.opt.num_threads = 1
    net.load_param(param)
    net.load_model(str(Path(param).with_suffix(".bin")))
    return lambda image: run_ncnn(net, torch.from_numpy(image)).numpy()


def litert(net: Any, shape: Sequence[int], path: str) -> Runner:
    """For one size, from PyTorch."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    litert_torch.convert(for_export(net), (torch.zeros(*shape),)).export(path)
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(image: Any) -> Any:
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return run


def opencv_takes_any_size(net: Any) -> bool:
    """OpenCV 5.0 fails after a product with a map of one channel, such as spatial attention's."""
    import cv2

    return int(cv2.__version__.split(".")[0]) < 5 or not net.options["use_spatial_attn"]


@torch.no_grad()
def measure(net: Any, image: Any, rounds: int) -> List[List[str]]:
    """The table's rows, for one picture (1, C, H, W) in float32."""
    with tempfile.TemporaryDirectory() as folder:

        def onnx(name: str, precision: str = "fp32", **options: Any) -> str:
            return export_onnx(net, net.scale, precision, f"{folder}/{name}.onnx", simplify=True, **options)

        reference = "ONNX Runtime fp32"
        makers: Dict[str, Callable[[], Runner]] = {
            reference: lambda: onnx_runtime(onnx("any")),
            "ONNX Runtime fp16": lambda: onnx_runtime(onnx("half", "fp16")),
            "PyTorch": lambda: lambda image: net(torch.from_numpy(image)).numpy(),
            "OpenVINO": lambda: openvino(onnx("any")),
            "OpenCV": lambda: opencv(onnx("fixed", static=image.shape[1:]), classic=True),
            "MNN": lambda: mnn(onnx("any")),
            "NCNN": lambda: ncnn(export_ncnn(net, net.scale, f"{folder}/net.param")[0]),
            "LiteRT": lambda: litert(net, image.shape, f"{folder}/net.tflite"),
        }
        runners: Dict[str, Runner] = {}
        for name, make in makers.items():
            try:
                runners[name] = make()
            except (ImportError, UserError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        outputs = {name: run(image) for name, run in runners.items()}
        calls = {name: lambda run=run: run(image) for name, run in runners.items()}
        times = interleaved(calls, rounds, seconds=120)
    rows = []
    for name, output in outputs.items():
        steps = float(np.abs(output - outputs["PyTorch"]).max()) * 255
        ratio = times.ratio(name, reference)
        beside = "1" if name == reference else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        rows.append([name, f"{steps:.2g}", short(times.median(name)), beside])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("weights", type=Path, nargs="?", help="(default: the shipped ones)")
    parser.add_argument("--size", type=int, default=128, help="side of the picture (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="times each is called (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights, before = args.weights or SHIPPED, load()
    net: Any = aether_from_state_dict(read_checkpoint(weights).state).fused()
    image = np.random.default_rng(0).random((1, net.options["in_chans"], args.size, args.size), np.float32)
    found = {name: figures for name, *figures in measure(net, image, args.rounds)}
    lines = table(HEAD, [[name, *use, *found.get(name, ["not run"] * 3)] for name, use in USES.items()])
    about = f"{today()}: {weights.name}, noise of {args.size}x{args.size}, one thread of {processor()}"
    text = "\n".join([f"{about}, load average before {before}.", "", *lines])
    print(text)
    if not args.weights:
        write(RESULTS, text)


if __name__ == "__main__":
    main()
