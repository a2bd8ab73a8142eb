"""Other runtimes on our files, each by the command that docs/runtimes.md names, compared at three sizes.

`make test-runtimes` runs these. A runtime that is not installed is skipped.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import aether_arch
import numpy as np
import pytest
import torch
from conftest import ROOT, randomize
from PIL import Image
from safetensors.torch import save_file

from aethersr.exported import for_export
from aethersr.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
Runner = Callable[[Any], Any]  # picture (1, C, H, W) in [0, 1] -> picture
SIZES = ((17, 31), (33, 13), (1, 9))
STEP = 1 / 255


def network(variant: str, scale: int) -> Any:
    """As deep as the real ones where that costs little; narrow, because of the time."""
    large = variant == "aether_large"
    options = {"embed_dim": 20 if large else 16, "depths": (1,) * (5 if large else 4)}
    return randomize(getattr(aether_arch, variant)(scale=scale, **options)).eval().fused()


@torch.no_grad()
def compare(net: Any, run: Runner, allowed: float = 0.1 * STEP, sizes: Any = SIZES) -> None:
    """``run`` on pictures of these sizes; errors are parts of 1, or of the largest output if that is more."""
    for height, width in sizes:
        image = torch.rand(1, net.options["in_chans"], height, width)
        expected, output = net(image).numpy(), np.asarray(run(image.numpy()))
        assert output.shape == expected.shape, f"{height}x{width}"
        error = np.abs(output - expected).max() / max(1.0, np.abs(expected).max())
        assert error <= allowed, f"{error / STEP:.2g} steps of 1/255 at {width}x{height}"


def written(net: Any, folder: Path, **options: Any) -> str:
    return export_onnx(net, net.scale, "fp32", str(folder / "net.onnx"), simplify=True, **options)


LARGE = pytest.param("aether_large", 3, marks=pytest.mark.slow)
VARIANTS = [("aether_small", 2), ("aether_medium", 4), LARGE]
every_variant = pytest.mark.parametrize(("variant", "scale"), VARIANTS)


@every_variant
def test_openvino(variant: str, scale: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    net = network(variant, scale)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(written(net, tmp_path), "CPU", settings)
    compare(net, lambda image: compiled(image)[0])


@every_variant
def test_opencv(variant: str, scale: int, tmp_path: Path) -> None:
    """OpenCV 5.0 fails after a product with a map of one channel, such as spatial attention's: not its older
    engine, which wants a file for one size."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python")
    net = network(variant, scale)
    any_size = cv2.__version__ < "5" or not net.options["use_spatial_attn"]
    for size in SIZES:
        path = written(net, tmp_path, static=None if any_size else (3, *size))
        engine = {} if any_size else {"engine": cv2.dnn.ENGINE_CLASSIC}
        loaded = cv2.dnn.readNetFromONNX(path, **engine)
        compare(net, lambda x, loaded=loaded: (loaded.setInput(x), loaded.forward())[1], sizes=[size])


PAGE = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
FIRST = "Runtimes: which file for which program"


def block(heading: str, language: str = "python") -> str:
    start = rf"^#+ {re.escape(heading)}\n(?:(?!^#).)*?^```{language}\n(.*?)^```"
    found = re.search(start, PAGE, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found.group(1)


def type_in(line: str, folder: Path) -> None:
    """A documented line in the shell, in a folder where fuse_aether.py seems to lie."""
    line = re.sub(r"^python(?= )", shlex.quote(sys.executable), line)
    line = line.replace("fuse_aether.py", shlex.quote(str(ROOT / "fuse_aether.py")))
    subprocess.run(line, shell=True, check=True, cwd=folder)


def test_the_first_command_makes_the_files_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("ncnn", reason="needs ncnn: pip install ncnn pnnx")
    net = randomize(aether_arch.aether_small(scale=2, embed_dim=8, depths=(1, 1))).eval()
    torch.save({"params": net.state_dict()}, tmp_path / "net_g_latest.pth")
    type_in(block(FIRST, "sh"), tmp_path)
    named = {name for name in re.findall(r"`(2x_mine[\w.]+)`", PAGE) if "480" not in name}
    by_others = {"2x_mine.mnn", "2x_mine.tflite", "2x_mine.mlpackage"}
    assert {path.name for path in tmp_path.iterdir()} == (named - by_others) | {"net_g_latest.pth"}


def test_mnn(tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="needs MNN: pip install MNN")
    import MNN.expr as expr
    import MNN.nn as nn

    net = network("aether_medium", 2)
    export_onnx(net, 2, output_path=str(tmp_path / "2x_mine_fp32.onnx"))
    type_in(block("MNN", "sh"), tmp_path)
    manager = nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
    manager.set_hint(3, 0)  # WINOGRAD_MEMORY_LEVEL, see the page
    path = str(tmp_path / "2x_mine.mnn")
    module = nn.load_module_from_file(path, ["input"], ["output"], runtime_manager=manager)

    def run(image: Any) -> Any:
        variable = expr.placeholder(list(image.shape), expr.NCHW)
        variable.write(image.copy())
        output = expr.convert(module.forward(variable), expr.NCHW)
        return np.array(output.read()).reshape(output.shape)

    compare(net, run)


DOCUMENTED = [
    ("ComfyUI", "spandrel"),
    ("ONNX Runtime, Python", "onnxruntime"),
    ("OpenVINO", "openvino"),
    ("OpenCV", "cv2"),
    ("LiteRT (TensorFlow Lite)", "litert_torch"),
    ("Core ML", "coremltools"),
]


def test_every_block_that_can_run_here_is_run_by_a_test() -> None:
    """Those of languages and programs that are not here are named; test_web.py runs the JavaScript."""
    headings = re.findall(r"^#+ ([^\n]+)\n(?:(?!^#).)*?^```(?:python|sh)", PAGE, re.DOTALL | re.MULTILINE)
    assert sorted(headings) == sorted([*(heading for heading, _ in DOCUMENTED), "TensorRT", FIRST, "MNN"])
    assert PAGE.count("```js\n") == 1


@pytest.mark.parametrize(("heading", "package"), DOCUMENTED)
def test_the_documented_code_runs(heading: str, package: str, tmp_path: Path, monkeypatch: Any) -> None:
    sys.path.insert(0, str(ROOT / "demo"))
    from basicsr_train import import_torchvision

    import_torchvision()  # spandrel and others import it
    pytest.importorskip(package, reason=f"needs the package {package}")
    monkeypatch.chdir(tmp_path)
    net = network("aether_small", 2)
    save_file(net.state_dict(), "2x_mine.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(pixels).save("in.png")
    image = pixels.astype(np.float32).transpose(2, 0, 1)[None] / 255
    if package in ("onnxruntime", "openvino", "cv2"):
        export_onnx(net, 2, output_path="2x_mine_fp32.onnx")
        export_onnx(net, 2, output_path="2x_mine_fp32_3x480x640.onnx", static=(3, 480, 640))
    names: Any = {"image": image, "net": for_export(net)}
    exec(block(heading), names)
    if package == "litert_torch":
        from ai_edge_litert.interpreter import Interpreter

        runs, image = Interpreter("2x_mine.tflite", num_threads=1), image[..., :256, :256]
        runs.allocate_tensors()
        runs.set_tensor(runs.get_input_details()[0]["index"], np.ascontiguousarray(image))
        runs.invoke()
        names["output"] = runs.get_tensor(runs.get_output_details()[0]["index"])
    if package == "coremltools":  # described; it runs on a Mac only
        described = names["model"].get_spec().description
        ranges = described.input[0].type.multiArrayType.shapeRange.sizeRanges
        assert [(r.lowerBound, r.upperBound) for r in ranges] == [(1, 1), (3, 3), (1, 4096), (1, 4096)]
        assert [described.input[0].name, described.output[0].name] == ["input", "output"]
        return
    if package == "spandrel":
        names["output"] = names["model"](torch.from_numpy(image))[0].permute(1, 2, 0).numpy()
    output = np.asarray(names["output"])
    output = output[0].transpose(1, 2, 0) if output.ndim == 4 else output
    output = output[:, :, ::-1] if heading == "OpenCV" else output  # which writes BGR
    with torch.no_grad():
        expected = net(torch.from_numpy(image))[0].permute(1, 2, 0).numpy().clip(0, 1)
    assert np.abs(output.clip(0, 1) - expected).max() <= STEP
    if Path("out.png").exists():
        assert np.abs(np.asarray(Image.open("out.png")) / 255 - expected).max() <= STEP
