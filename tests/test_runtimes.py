"""Other runtimes on our files, each by the command that docs/runtimes.md names, compared at three sizes.

`make test-runtimes` installs what they need (requirements-runtimes.txt). What is not installed is skipped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import aether_arch
import numpy as np
import pytest
import torch
from conftest import randomize

from aethersr.exported import for_export
from aethersr.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ((17, 31), (33, 13), (1, 9))
STEP = 1 / 255
# As deep as the real ones where that costs little; narrow, because of the time.
VARIANTS = [variant.__name__ for variant in aether_arch.VARIANTS]
SCALES = (2, 3, 4)


def network(variant: str, scale: int) -> Any:
    width = 20 if variant == "aether_large" else 16
    depths = (1,) * (5 if variant == "aether_large" else 4)
    return (
        randomize(getattr(aether_arch, variant)(scale=scale, embed_dim=width, depths=depths)).eval().fused()
    )


@torch.no_grad()
def compare(net: Any, run: Callable[[Any], Any], allowed: float = 0.1 * STEP, sizes: Any = SIZES) -> None:
    """``run`` on pictures of these sizes; errors are parts of 1, or of the largest output if that is more."""
    for height, width in sizes:
        image = torch.rand(1, net.options["in_chans"], height, width)
        expected, output = net(image).numpy(), np.asarray(run(image.numpy()))
        assert output.shape == expected.shape, f"{height}x{width}"
        error = np.abs(output - expected).max() / max(1.0, np.abs(expected).max())
        assert error <= allowed, f"{error / STEP:.2g} steps of 1/255 at {width}x{height}"


def written(net: Any, folder: Path, precision: str = "fp32", **options: Any) -> str:
    return export_onnx(net, net.scale, precision, str(folder / "net.onnx"), simplify=True, **options)


every_variant = pytest.mark.parametrize(
    ("variant", "scale"),
    [
        pytest.param(
            variant,
            scale,
            marks=[] if (variant, scale) in (("aether_small", 2), ("aether_medium", 4)) else pytest.mark.slow,
        )
        for variant in VARIANTS
        for scale in SCALES
    ],
)


@every_variant
def test_onnx_runtime(variant: str, scale: int, tmp_path: Path) -> None:
    import onnxruntime

    net = network(variant, scale)
    for precision, allowed, dtype in (("fp32", 0.1 * STEP, np.float32), ("fp16", 2 * STEP, np.float16)):
        session = onnxruntime.InferenceSession(written(net, tmp_path, precision))
        compare(net, lambda image, s=session, d=dtype: s.run(None, {"input": image.astype(d)})[0], allowed)  # type: ignore[misc]


@every_variant
def test_openvino(variant: str, scale: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    net = network(variant, scale)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(written(net, tmp_path), "CPU", hint)
    compare(net, lambda image: compiled(image)[0])


@every_variant
def test_opencv_with_a_file_of_one_size(variant: str, scale: int, tmp_path: Path) -> None:
    """OpenCV's classic engine works out all shapes when it reads a file; 5.0's new one stops at Reduce."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python")
    net = network(variant, scale)
    engine = {"engine": cv2.dnn.ENGINE_CLASSIC} if hasattr(cv2.dnn, "ENGINE_CLASSIC") else {}
    for height, width in SIZES:
        read = cv2.dnn.readNetFromONNX(written(net, tmp_path, static=(3, height, width)), **engine)

        def run(image: Any, read: Any = read) -> Any:
            read.setInput(image)
            return read.forward()

        compare(net, run, sizes=[(height, width)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_mnn(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="needs MNN: pip install MNN")
    net = network(variant, 2)
    # What mnnconvert calls; the command itself first installs a package and reports to its maker's server.
    code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    files = [
        "--modelFile",
        written(net, tmp_path),
        "--MNNModel",
        str(tmp_path / "net.mnn"),
        "--bizCode",
        "aether",
    ]
    subprocess.run([sys.executable, "-c", code, "-f", "ONNX", *files], check=True, capture_output=True)
    import MNN.expr as expr
    import MNN.nn as nn

    module = nn.load_module_from_file(str(tmp_path / "net.mnn"), ["input"], ["output"])

    def run(image: Any) -> Any:
        variable = expr.placeholder(list(image.shape), expr.NCHW)
        variable.write(image.copy())
        output = expr.convert(module.forward(variable), expr.NCHW)
        return np.array(output.read()).reshape(output.shape)

    compare(net, run)


def test_coreml_describes_pictures_of_any_size(tmp_path: Path) -> None:
    """Converted and described; it runs on a Mac only."""
    coremltools = pytest.importorskip("coremltools", reason="needs coremltools: pip install coremltools")
    net = network("aether_medium", 4)
    with torch.no_grad():
        traced = torch.jit.trace(for_export(net), torch.rand(1, 3, 64, 64), check_trace=False)
    side = coremltools.RangeDim(1, 4096, default=256)
    model = coremltools.convert(
        traced,
        inputs=[coremltools.TensorType(name="input", shape=(1, 3, side, side))],
        outputs=[coremltools.TensorType(name="output")],
        minimum_deployment_target=coremltools.target.iOS16,
    )
    model.save(str(tmp_path / "net.mlpackage"))
    described = model.get_spec().description
    ranges = described.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert [(each.lowerBound, each.upperBound) for each in ranges] == [(1, 1), (3, 3), (1, 4096), (1, 4096)]
    assert [described.input[0].name, described.output[0].name] == ["input", "output"]
