"""A network in other runtimes on a CPU, in one thread: functions from pictures (N, C, H, W) to pictures."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from networks import aether_arch

Runner = Callable[[Any], Any]


@torch.no_grad()
def onnx_bytes(net: Any, image: Any, dynamic: bool = True) -> bytes:
    """An ONNX file of any network; ``dynamic``: for pictures of any size."""
    if isinstance(net, aether_arch.FusedAetherNet):
        from aethersr.exported import for_export

        net = for_export(net)
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("input", "output")} if dynamic else None
    names: Any = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": axes}
    file, silence = io.BytesIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (image,), file, opset_version=17, dynamo=False, **names)
    return file.getvalue()


def onnx_runtime(path: Any, threads: int = 1) -> Runner:
    """``path``: a file's name or its bytes."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Otherwise its waiting threads take the cores from the network whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    dtype = np.float16 if "float16" in source.type else np.float32
    return lambda image: session.run(None, {source.name: image.astype(dtype)})[0]


def openvino(path: str, precision: str = "f32") -> Runner:
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    compiled = Core().compile_model(path, "CPU", settings)
    return lambda image: compiled(image)[0]


def ncnn(param: str) -> Runner:
    import ncnn as package

    from aethersr.ncnn import run

    net = package.Net()
    net.opt.num_threads = 1
    net.load_param(param)
    net.load_model(str(Path(param).with_suffix(".bin")))
    return lambda image: run(net, torch.from_numpy(image)).numpy()


def openers(net: Any, folder: str) -> Dict[str, Callable[[], Runner]]:
    """For each runtime, what exports a fused network into ``folder`` and opens it there."""
    from aethersr.ncnn import export_ncnn
    from aethersr.onnx import export_onnx

    def onnx(precision: str, **options: Any) -> str:
        path = f"{folder}/{precision}_{options.get('target')}.onnx"
        if not Path(path).exists():
            made = copy.deepcopy(net).prepare_qat() if precision == "int8" else net
            export_onnx(made, net.scale, precision, path, simplify=precision != "int8", **options)
        return path

    @torch.no_grad()
    def in_torch(picture: Any) -> Any:
        return net(torch.from_numpy(picture)).numpy()

    return {
        "ONNX Runtime fp32": lambda: onnx_runtime(onnx("fp32")),
        "ONNX Runtime fp16": lambda: onnx_runtime(onnx("fp16")),
        "ONNX Runtime int8": lambda: onnx_runtime(onnx("int8", target="onnxruntime")),
        "PyTorch": lambda: in_torch,
        "OpenVINO fp32": lambda: openvino(onnx("fp32")),
        "OpenVINO bf16": lambda: openvino(onnx("fp32"), "bf16"),
        "OpenVINO int8": lambda: openvino(onnx("int8", target="openvino")),
        "NCNN": lambda: ncnn(export_ncnn(net, net.scale, f"{folder}/net.param")[0]),
    }
