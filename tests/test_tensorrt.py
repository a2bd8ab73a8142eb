"""TensorRT's own parser and builder take the files, and see integers where they count.

TensorRT for RTX builds without a GPU. Its licence is NVIDIA's own, so no requirements file names it:
pip install tensorrt-rtx, or these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Tuple

import pytest
from conftest import small_net
from test_onnx_int8 import quantised

from aethersr.onnx import export_onnx

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install tensorrt-rtx")


def build(path: str, *options: Tuple[int, ...]) -> Tuple[Any, List[str], Any]:
    """TensorRT's network, its errors, and the engine; ``options``: smallest, usual and largest shape."""
    errors: List[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.Logger.ERROR:
                errors.append(message)

    builder = trt.Builder(Logger())
    network = builder.create_network(0)
    if not trt.OnnxParser(network, builder.logger).parse_from_file(path):
        return network, errors, None
    config = builder.create_builder_config()
    if options:
        profile = builder.create_optimization_profile()
        profile.set_shape("input", *options)
        config.add_optimization_profile(profile)
    return network, errors, builder.build_serialized_network(network, config)


ANY_SIZE = ((1, 3, 16, 16), (1, 3, 64, 64), (2, 3, 256, 320))


def integer_convolutions(network: Any) -> int:
    """Convolutions of a dequantised input and kernel: TensorRT fuses those into integer ones."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    dequantised = {name for name, layer in made.items() if layer.type == trt.LayerType.DEQUANTIZE}
    convolutions = [layer for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    inputs = [[layer.get_input(index).name for index in range(layer.num_inputs)] for layer in convolutions]
    return sum(len(names) > 1 and dequantised.issuperset(names[:2]) for names in inputs)


@pytest.mark.parametrize(("precision", "static"), [("fp32", None), ("fp16", None), ("fp16", (3, 32, 48))])
def test_it_builds_the_float_files(precision: str, static: Any, tmp_path: Path) -> None:
    net = small_net(bound=1.0).float().fused()
    path = export_onnx(net, 2, precision, str(tmp_path / "net.onnx"), static=static)
    _, errors, engine = build(path, *([] if static else ANY_SIZE))
    assert engine is not None, errors


def test_it_builds_the_integer_files(tmp_path: Path) -> None:
    path = export_onnx(quantised(bound=1.0), 2, "int8", str(tmp_path / "net.onnx"), "tensorrt")
    network, errors, engine = build(path, *ANY_SIZE)
    assert engine is not None, errors
    assert integer_convolutions(network) == 3 * 3 + 1  # gate, main and out of three blocks; body_conv
