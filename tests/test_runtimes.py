"""Other runtimes on our files, each by the command that docs/runtimes.md names, compared at three sizes.

`make test-runtimes` installs what they need (requirements-runtimes.txt). What is not installed is skipped.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import aether_arch
import numpy as np
import pytest
import runners as runtimes
import torch
from conftest import ROOT, randomize
from PIL import Image
from safetensors.torch import save_file

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
    net = network(variant, scale)
    for precision, allowed in (("fp32", 0.1 * STEP), ("fp16", STEP)):
        compare(net, runtimes.onnx_runtime(written(net, tmp_path, precision)), allowed)


@every_variant
def test_openvino(variant: str, scale: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    net = network(variant, scale)
    compare(net, runtimes.openvino(written(net, tmp_path)))


@every_variant
def test_opencv(variant: str, scale: int, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV: pip install opencv-python")
    net = network(variant, scale)
    if runtimes.opencv_takes_any_size(net):
        compare(net, runtimes.opencv(written(net, tmp_path)))
    else:
        for size in SIZES:
            path = written(net, tmp_path, static=(3, *size))
            compare(net, runtimes.opencv(path, classic=True), sizes=[size])


@pytest.mark.parametrize("variant", VARIANTS)
def test_mnn(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="needs MNN: pip install MNN")
    net = network(variant, 2)
    compare(net, runtimes.mnn(written(net, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_litert_for_one_size(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="needs LiteRT: pip install litert-torch")
    net = network(variant, 2)
    for size in SIZES:
        compare(net, runtimes.litert(net, (1, 3, *size), str(tmp_path / "net.tflite")), sizes=[size])


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


PAGE = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")


def block(heading: str, language: str = "python") -> str:
    """The code under a heading of docs/runtimes.md."""
    start = rf"^#+ {re.escape(heading)}\n(?:(?!^#).)*?^```{language}\n(.*?)^```"
    found = re.search(start, PAGE, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found.group(1)


def type_in(line: str, folder: Path) -> None:
    """A documented line in the shell, in a folder where fuse_aether.py seems to lie."""
    line = re.sub(r"^python(?= )", shlex.quote(sys.executable), line)
    line = line.replace("fuse_aether.py", shlex.quote(str(ROOT / "fuse_aether.py")))
    subprocess.run(line, shell=True, check=True, cwd=folder)


def test_every_block_that_can_run_here_is_run_by_a_test() -> None:
    """Those of languages and programs that are not here are named; test_web.py runs the JavaScript."""
    headings = re.findall(r"^#+ ([^\n]+)\n(?:(?!^#).)*?^```(?:python|sh)", PAGE, re.DOTALL | re.MULTILINE)
    (marker,) = (mark for mark in test_the_documented_code_runs.pytestmark if mark.name == "parametrize")
    run = [each[0] for each in marker.args[1]]
    elsewhere = ["VapourSynth (vs-mlrt)", "TensorRT"]
    assert sorted(headings) == sorted([*run, *elsewhere, "Runtimes: which file for which program", "MNN"])
    assert PAGE.count("```js\n") == 1


def test_the_first_command_makes_the_files_of_the_table(tmp_path: Path) -> None:
    for package in ("ncnn", "pnnx"):
        pytest.importorskip(package, reason=f"needs the package {package}: pip install ncnn pnnx")
    net = randomize(aether_arch.aether_small(scale=2, embed_dim=8, depths=(1, 1))).eval()
    torch.save({"params": net.state_dict()}, tmp_path / "net_g_latest.pth")
    type_in(block("Runtimes: which file for which program", "sh"), tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    named = set(re.findall(r"`(2x_mine[\w.]+)`", "\n".join(" ".join(use) for use in runtimes.USES.values())))
    elsewhere = {"2x_mine_fp32_3x480x640.onnx", "2x_mine.mnn", "2x_mine.tflite", "2x_mine.mlpackage"}
    assert written == (named - elsewhere) | {"net_g_latest.pth"}


def test_the_command_for_mnn_makes_its_file(tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="needs MNN: pip install MNN")
    net = network("aether_small", 2)
    export_onnx(net, 2, output_path=str(tmp_path / "2x_mine_fp32.onnx"))
    type_in(block("MNN", "sh"), tmp_path)
    compare(net, runtimes.open_mnn(str(tmp_path / "2x_mine.mnn")))


@pytest.mark.parametrize(
    ("heading", "package", "converts"),
    [
        ("spandrel, in a program of your own", "spandrel", False),
        ("ONNX Runtime, Python", "onnxruntime", False),
        ("OpenVINO", "openvino", False),
        ("OpenCV", "cv2", False),
        ("LiteRT (TensorFlow Lite)", "litert_torch", True),
        ("Core ML", "coremltools", True),
    ],
)
def test_the_documented_code_runs(
    heading: str, package: str, converts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    if not converts:
        export_onnx(net, 2, output_path="2x_mine_fp32.onnx")
        export_onnx(net, 2, output_path="2x_mine_fp32_3x480x640.onnx", static=(3, 480, 640))
    names: Dict[str, Any] = {"image": image}
    exec(block(heading), names)
    if heading.startswith("spandrel"):
        names["output"] = names["model"](torch.from_numpy(image))[0].permute(1, 2, 0).numpy()
    if not converts:
        output = np.asarray(names["output"])
        output = output[0].transpose(1, 2, 0) if output.ndim == 4 else output
        output = output[:, :, ::-1] if heading == "OpenCV" else output  # which writes BGR
        with torch.no_grad():
            expected = net(torch.from_numpy(image))[0].permute(1, 2, 0).numpy().clip(0, 1)
        assert np.abs(output.clip(0, 1) - expected).max() <= STEP
        if Path("out.png").exists():
            assert np.abs(np.asarray(Image.open("out.png")) / 255 - expected).max() <= STEP
    else:
        assert list(tmp_path.glob("2x_mine.tflite")) or list(tmp_path.glob("2x_mine.mlpackage"))
