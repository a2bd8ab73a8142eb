"""What is compared: AetherNet, networks of traiNNer-redux; and what runs them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import io
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs"), str(ROOT / "training")]
import aether_arch  # noqa: E402

from aethersr.errors import UserError  # noqa: E402
from aethersr.identify import read_network as opened  # noqa: E402, F401

Runner = Callable[[Any], Any]  # pictures (N, C, H, W) as numpy arrays
OURS = ("aether_small", "aether_medium", "aether_large", "AetherNet")
PEERS = ("compact", "span", "safmn", "artcnn_r8f64", "plksr_tiny", "swinir_s", "realplksr")
SHIPPED = ROOT / "weights" / "2x_AetherNet_small_training_fp16.safetensors"


@torch.no_grad()
def as_trained(net: Any) -> Any:
    """``net`` with values that a new one lacks: zeros and ones may be calculated faster."""
    for name, value in net.state_dict().items():
        if name.endswith("temperature") or "norm." in name:
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and not value.any() and name != "mean":
            value.normal_(std=0.01)
    return net


def peer(name: str, checkout: Optional[Path]) -> Callable[..., nn.Module]:
    """The builder of a network that traiNNer-redux has. UserError: there is no such checkout or network."""
    if checkout is None:
        raise UserError(f"{name} needs a checkout of traiNNer-redux (--traiNNer-redux).")
    from trainner_redux_cpu import import_torchvision

    import_torchvision()
    sys.path.insert(0, str(checkout))
    try:
        import traiNNer.archs  # noqa: F401
        from traiNNer.utils import registry
    except ImportError as error:
        remedy = "pass a checkout and install what it needs (--traiNNer-redux)"
        raise UserError(f"{checkout} can't be imported ({error}); {remedy}.") from None
    finally:
        sys.path.remove(str(checkout))
    for found in (registry.SPANDREL_REGISTRY, registry.ARCH_REGISTRY):
        if name in found:
            return found.get(name)  # type: ignore[no-any-return]
    raise UserError(f"{checkout} has no network {name}; pass one of its names.")


def deployed(net: Any) -> Any:
    """``net`` as it is released: ours fused, SPAN with its branches merged once instead of in every pass."""
    if hasattr(net, "fused"):
        return net.fused()
    for module in net.eval().modules():
        if hasattr(module, "update_params"):
            module.update_params()
            module.update_params = lambda: None
    return net


@torch.no_grad()
def onnx_bytes(net: Any, image: Tensor, any_size: bool = True) -> bytes:
    """An ONNX file of any network."""
    if isinstance(net, aether_arch.FusedAetherNet):
        from aethersr.exported import for_export

        net = for_export(net)
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("input", "output")} if any_size else None
    names: Any = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": axes}
    file, silence = io.BytesIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (image,), file, opset_version=17, dynamo=False, **names)
    return file.getvalue()


def onnx_runtime(file: Any, threads: int = 1) -> Runner:
    """``file``: its name or its bytes."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Otherwise its waiting threads take the cores from the network whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    return lambda image: session.run(None, {"input": image.astype(dtype)})[0]


def openvino(path: str, precision: str = "f32") -> Runner:
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    compiled = Core().compile_model(path, "CPU", settings)
    return lambda image: compiled(image)[0]


def ncnn(net: Any, folder: str) -> Runner:
    from aethersr.ncnn import convert, run

    files = [f"{folder}/net.{ending}" for ending in ("param", "bin")]
    for file, content in zip(files, convert(net)):
        Path(file).write_bytes(content)
    import ncnn as package

    net = package.Net()
    net.opt.num_threads = 1
    net.load_param(files[0]), net.load_model(files[1])
    return lambda image: run(net, torch.from_numpy(image)).numpy()


def openers(net: Any, folder: str) -> Dict[str, Callable[[], Runner]]:
    """For each runtime, what exports a fused network into ``folder`` and opens it there with one thread."""
    from aethersr.onnx import export_onnx

    def onnx(precision: str, target: str = "onnxruntime") -> str:
        made = copy.deepcopy(net).prepare_qat() if precision == "int8" else net
        path = f"{folder}/{precision}_{target}.onnx"
        export_onnx(made, net.scale, precision, path, target, simplify=precision != "int8")
        return path

    run = torch.no_grad()(lambda image: net(torch.from_numpy(image)).numpy())
    return {
        "ONNX Runtime fp32": lambda: onnx_runtime(onnx("fp32")),
        "ONNX Runtime fp16": lambda: onnx_runtime(onnx("fp16")),
        "ONNX Runtime int8": lambda: onnx_runtime(onnx("int8")),
        "PyTorch": lambda: run,
        "OpenVINO fp32": lambda: openvino(onnx("fp32")),
        "OpenVINO bf16": lambda: openvino(onnx("fp32"), "bf16"),
        "OpenVINO int8": lambda: openvino(onnx("int8", "openvino")),
        "NCNN": lambda: ncnn(net, folder),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [list(head), ["---"] * len(head), *rows]]


def typed(script: str, argv: Optional[Sequence[str]], hidden: Mapping[str, Any]) -> str:
    """The command line, with names for paths that mean something on this machine alone."""
    names = {str(path): name for name, path in hidden.items()}
    words = [names.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    return shlex.join(["python", f"benchmarks/{script}", *words])


def machine(device: str = "cpu") -> str:
    """The date, the processor or the card, and versions, in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    words = [torch.cuda.get_device_name() if device == "cuda" else name, f"PyTorch {torch.__version__}"]
    for title, module in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        with contextlib.suppress(ImportError):
            words.append(f"{title} {__import__(module).__version__.split('-')[0]}")
    load = f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    return f"{datetime.date.today().isoformat()}: {', '.join([*words, load])} before"


def short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 20 else f"{ms:.2f}"


def positive(text: str) -> Any:
    """A number above 0, whole where it is written so, for argparse."""
    value = float(text) if set(text) & set(".e") else int(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
