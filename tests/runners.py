"""Runtimes that only tests/test_runtimes.py runs: functions from pictures (N, C, H, W) to pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Sequence

import torch
from conftest import ROOT

from aethersr.exported import for_export

sys.path.insert(0, str(ROOT / "benchmarks"))
from networks import Runner, ncnn, onnx_runtime, openvino  # noqa: F401


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


def opencv_takes_any_size(net: Any) -> bool:
    """OpenCV 5.0 fails after a product with a map of one channel, such as spatial attention's."""
    import cv2

    return int(cv2.__version__.split(".")[0]) < 5 or not net.options["use_spatial_attn"]


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
    import numpy as np

    runtime = nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
    runtime.set_hint(3, 0)  # WINOGRAD_MEMORY_LEVEL: its largest Winograd tiles cost 0.15 steps of 1/255
    module = nn.load_module_from_file(path, ["input"], ["output"], runtime_manager=runtime)

    def run(image: Any) -> Any:
        variable = expr.placeholder(list(image.shape), expr.NCHW)
        variable.write(image.copy())
        output = expr.convert(module.forward(variable), expr.NCHW)
        return np.array(output.read()).reshape(output.shape)

    return run


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
