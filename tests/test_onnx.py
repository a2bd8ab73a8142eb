"""ONNX files as those who open them do: runtimes, chaiNNer and vs-mlrt (their rules, as their code reads), and what the command line adds."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import aether_arch
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from aether_arch import AetherBase, export_onnx
from conftest import randomize, small_net
from PIL import Image
from safetensors.torch import save_file
from test_cli import refused, run

import upscale

# Every one is in the tables of operators of ONNX Runtime's CPU, CUDA and DirectML providers, TensorRT 10 and 11, and OpenVINO.
FLOAT = {"Conv", "Add", "Sub", "Mul", "Sigmoid", "Relu", "LeakyRelu", "ReduceMean", "ReduceMax", "Concat", "DepthToSpace", "Slice"}
ALLOWED = {"fp32": FLOAT, "fp16": FLOAT, "int8": FLOAT | {"QuantizeLinear", "DequantizeLinear", "Cast"}}
WITHOUT_LIBRARY = {"Constant", "Identity", "Unsqueeze"}  # of constants: gone where onnxslim was at work
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 5}
LOCAL: Dict[str, Any] = {**TINY, "use_channel_attn": False, "use_spatial_attn": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def network(precision: str = "fp32", scale: int = 2, **options: Any) -> AetherBase:
    net: Any = randomize(aether_arch.AetherNet(scale=scale, **{**TINY, **options})).eval()
    return net.prepare_qat("full").eval() if precision == "int8" else net.fused()


def exported(folder: Path, precision: str = "fp32", scale: int = 2, net: Optional[AetherBase] = None, **arguments: Any) -> onnx.ModelProto:
    net = net or network(precision, scale)
    return onnx.load(export_onnx(net, net.scale, precision, str(folder / "net.onnx"), **arguments))


def inferred(model: onnx.ModelProto, height: int, width: int) -> List[Any]:
    """The output's shape after ONNX's own inference, where the input's is fixed and the output's is what the file says."""
    model = copy.deepcopy(model)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, None, height, width)):
        if size is not None:
            dim.dim_value = size
    onnx.checker.check_model(model, full_check=True)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in model.graph.output[0].type.tensor_type.shape.dim]


def optimised(model: onnx.ModelProto, folder: Path) -> List[str]:
    """Operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


# ------------------------------------------------------------------------------------------------------- shapes and readers


@pytest.mark.parametrize("scale", aether_arch.SCALES)
def test_shape_inference_finds_the_scale_at_every_size(tmp_path: Path, scale: int) -> None:
    net = network(scale=scale)
    for simplify in (False, True):
        model = exported(tmp_path, net=net, simplify=simplify)
        for height, width in ((16, 16), (64, 64), (256, 256), (512, 512), (1, 1), (17, 31), (333, 2)):
            assert inferred(model, height, width) == [1, 3, scale * height, scale * width]


@pytest.mark.parametrize("variant", [variant.__name__ for variant in aether_arch.VARIANTS])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_shape_inference_finds_the_scale_of_every_variant(tmp_path: Path, variant: str, precision: str) -> None:
    net = getattr(aether_arch, variant)(scale=4, embed_dim=10 if variant == "aether_large" else 8).eval()
    net = net.prepare_qat() if precision == "int8" else net
    model = exported(tmp_path, precision, net=net, simplify=True)
    assert [inferred(model, *size) for size in ((64, 64), (17, 31))] == [[1, 3, 256, 256], [1, 3, 68, 124]]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("static", [None, (3, 16, 24)])
def test_upscalers_find_what_they_look_for(tmp_path: Path, precision: str, static: Optional[Tuple[int, ...]]) -> None:
    model = exported(tmp_path, precision, static=static, simplify=True)
    # One picture in, one out. chaiNNer: channels second and no more than 4, else it takes the file for channels-last; height and width both
    # fixed or both not; one floating-point type at both ends. vs-mlrt: 4 dimensions, a batch of 1 or one that it may set to 1, 1 or 3 channels.
    assert (len(model.graph.input), len(model.graph.output)) == (1, 1)
    ends = [value.type.tensor_type for value in (model.graph.input[0], model.graph.output[0])]
    assert {end.elem_type for end in ends} == {onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT}
    shapes = [[dim.dim_value or dim.dim_param for dim in end.shape.dim] for end in ends]
    if static:
        assert shapes == [[1, 3, 16, 24], [1, 3, 32, 48]]
    else:
        assert shapes == [["batch", 3, "height", "width"], ["batch", 3, "out_height", "out_width"]]
        # vs-mlrt fixes batch and size of the input and the batch of the output, and drops all that the file says of shapes in between.
        ends[1].shape.dim[0].dim_value = 1
        assert inferred(model, 48, 64) == [1, 3, 96, 128]
    assert not model.graph.value_info


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_size_fixed_by_its_name_reaches_the_output(tmp_path: Path, precision: str) -> None:
    """As DirectML is told of sizes; input and output must not share a name then."""
    exported(tmp_path, precision)
    options = onnxruntime.SessionOptions()
    for name, size in (("batch", 1), ("height", 12), ("width", 20)):
        options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    image = np.zeros((1, 3, 12, 20), np.float16 if precision == "fp16" else np.float32)
    assert session.run(None, {"input": image})[0].shape == (1, 3, 24, 40)


# ------------------------------------------------------------------------------------------------------ opsets and operators


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_opsets_from_first_to_last_work_with_allowed_operators(tmp_path: Path, precision: str) -> None:
    net = network(precision)
    first, last = aether_arch.OPSETS[precision]
    for opset in (first, 17, 20, last):
        for target in aether_arch.TARGETS if precision == "int8" and opset <= 20 else ("onnxruntime",):
            model = exported(tmp_path, precision, net=net, target=target, opset=opset, simplify=True)
            assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
            assert {node.op_type for node in model.graph.node} <= ALLOWED[precision]
    plain = exported(tmp_path, precision, net=net)
    assert {node.op_type for node in plain.graph.node} <= ALLOWED[precision] | WITHOUT_LIBRARY
    for opset in (first - 1, last + 1, "17"):
        with pytest.raises(ValueError, match=f"opset={opset!r} is not possible for {precision}; allowed: {first} to {last}"):
            exported(tmp_path, precision, net=net, opset=opset)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("scale", [3, 4])
def test_simplifying_halves_the_nodes_and_keeps_the_output_and_the_int8_weights(tmp_path: Path, precision: str, scale: int) -> None:
    net = network(precision, scale)
    plain, simple = (exported(tmp_path, precision, net=net, simplify=simplify) for simplify in (False, True))
    print(f"{precision} x{scale}: {len(plain.graph.node)} nodes, simplified {len(simple.graph.node)}")
    assert len(simple.graph.node) < 0.5 * len(plain.graph.node)
    assert simple.ByteSize() < 1.1 * plain.ByteSize()
    image = np.random.default_rng(0).random((2, 3, 9, 14)).astype(np.float16 if precision == "fp16" else np.float32)
    outputs = []
    for model in (plain, simple):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"input": image})[0])
    # ONNX Runtime computes parts of an fp16 graph in float32 on a CPU, and not the same parts of both.
    assert np.abs(outputs[0] - outputs[1]).max() <= (1e-2 if precision == "fp16" else 1e-6) * np.abs(outputs[0]).max()
    int8 = [[t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4] for model in (plain, simple)]
    assert len(int8[0]) == len(int8[1])
    assert bool(int8[0]) == (precision == "int8")
    assert optimised(plain, tmp_path).count("QLinearConv") == optimised(simple, tmp_path).count("QLinearConv")


# ------------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net_g_latest.pth"
    torch.save({"params": small_net(2, **LOCAL).float().state_dict()}, path)
    os.utime(path, (86400 * 365, 86400 * 365))
    return path


def test_a_file_says_what_it_is(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model_path", checkpoint, "--output_path", checkpoint.with_name("2x_a.pth"), "--onnx", "fp32", "--overwrite"]

    def said() -> Dict[str, str]:
        return {entry.key: entry.value for entry in onnx.load(checkpoint.with_name("2x_a_fp32.onnx")).metadata_props}

    assert run(*arguments) == 0
    first = said()
    assert set(first) == {"architecture", "variant", "scale", "precision", "date", "source_sha256"}
    assert (first["architecture"], first["scale"], first["precision"], first["date"]) == ("AetherNet", "2", "fp32", "1971-01-01")
    assert "embed_dim=8" in first["variant"]
    sums = os.popen(f"sha256sum {checkpoint}").read()
    assert not sums or first["source_sha256"] == sums.split()[0]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert run(*arguments, "--license", "CC-BY-4.0", "--author", "Änne") == 0
    assert said() == {**first, "date": "1970-01-01", "license": "CC-BY-4.0", "author": "Änne"}


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path) -> None:
    for name in ("a", "b"):
        assert run("--model_path", checkpoint, "--output_path", checkpoint.with_name(f"2x_{name}.pth"), "--onnx", "fp32,fp16") == 0
    for precision in ("fp32", "fp16"):
        first, second = (checkpoint.with_name(f"2x_{name}_{precision}.onnx").read_bytes() for name in ("a", "b"))
        assert first == second


def test_static_files_carry_their_size_in_the_name_and_take_no_other(checkpoint: Path) -> None:
    assert run("--model_path", checkpoint, "--output_path", checkpoint.with_name("2x_a.pth"), "--onnx", "fp32,fp16", "--static", "3,9,14") == 0
    assert sorted(path.name for path in checkpoint.parent.glob("*.onnx")) == ["2x_a_fp16_3x9x14.onnx", "2x_a_fp32_3x9x14.onnx"]
    session = onnxruntime.InferenceSession(str(checkpoint.with_name("2x_a_fp32_3x9x14.onnx")), providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        expected = small_net(2, **LOCAL).float()(image)
    assert torch.allclose(torch.from_numpy(session.run(None, {"input": image.numpy()})[0]), expected, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {"input": np.zeros((1, 3, 9, 15), np.float32)})


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--static", "3,9"], "3,H,W"), (["--static", "3,0,9"], "1 to 16384"), (["--static", "1,9,9"], "expected 3,H,W"),
     (["--static", "3,9,99999"], "16384"), (["--static", "3,9,-9"], "3,H,W"), (["--opset", "10"], "11 to 23"), (["--opset", "24"], "11 to 23"),
     (["--onnx", "int8", "--opset", "12"], "13 to 23"),
     (["--onnx", "int8", "--target", "tensorrt", "--opset", "21"], "int8 tensorrt; pass one from 13 to 20"),
     (["--calibration", "x"], "--int8"), (["--placement", "full"], "--int8"), (["--reduce_range"], "--int8")],
)  # fmt: skip
def test_what_can_not_be_exported_is_said_in_one_line(checkpoint: Path, capsys: Any, more: List[str], words: str) -> None:
    line = refused(capsys, checkpoint.parent, "--model_path", checkpoint, "--output_path", checkpoint.with_name("a.pth"), "--onnx", "fp32", *more)
    assert words in line


def test_options_that_would_do_nothing_are_refused(checkpoint: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model_path", checkpoint, "--output_path", checkpoint.with_name("a.pth")]
    assert "pass --onnx too" in refused(capsys, checkpoint.parent, *arguments, "--static", "3,9,9")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    assert "SOURCE_DATE_EPOCH" in refused(capsys, checkpoint.parent, *arguments, "--onnx", "fp32")


# --------------------------------------------------------------------------------------------------------------- upscale.py


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [0.5 + 0.4 * np.sin(y / (3 + k)) * np.cos(x / (4 + k)) for k in range(channels)]
    return (np.stack(waves, -1) * 255).astype(np.uint8)


@pytest.fixture
def local() -> AetherBase:
    """Without attention over the whole picture, and with values near a picture's."""
    torch.manual_seed(0)
    net = aether_arch.AetherNet(scale=2, **{**LOCAL, "embed_dim": 16, "depths": (1, 1)})
    for value in net.stages.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return net.eval()


def result(model: Path, folder: Path, pixels: np.ndarray, *more: Any) -> np.ndarray:
    Image.fromarray(pixels).save(folder / "source.png")
    arguments = ["--model", model, "--input", folder / "source.png", "--output", folder / "out.png", "--device", "cpu", "--overwrite", *more]
    assert upscale.main([str(argument) for argument in arguments]) == 0
    return np.asarray(Image.open(folder / "out.png")).astype(int)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("static", [(3, 32, 32), (3, 40, 24)])
def test_a_fixed_size_upscales_as_any_size_does(tmp_path: Path, local: AetherBase, precision: str, static: Tuple[int, int, int]) -> None:
    net = local.prepare_qat().eval() if precision == "int8" else local
    export_onnx(net, 2, precision, str(tmp_path / "any.onnx"), simplify=True)
    export_onnx(net, 2, precision, str(tmp_path / "fixed.onnx"), static=static, simplify=True)
    reach = upscale.receptive_field(net)
    assert upscale.load_network(tmp_path / "any.onnx", "cpu", False)[1:] == (3, reach)
    assert upscale.load_network(tmp_path / "fixed.onnx", "cpu", False)[1:] == (3, reach)
    for pixels in (picture(75, 53), picture(*static[1:]), picture(41, 40, 4)):
        expected = result(tmp_path / "any.onnx", tmp_path, pixels)
        out = result(tmp_path / "fixed.onnx", tmp_path, pixels)
        assert out.shape == expected.shape == (2 * pixels.shape[0], 2 * pixels.shape[1], pixels.shape[2])
        assert np.abs(out - expected).max() <= 1, "of 255; the border included"


def test_a_picture_smaller_than_the_fixed_size_differs_at_the_far_border_only(tmp_path: Path, local: AetherBase) -> None:
    export_onnx(local, 2, output_path=str(tmp_path / "any.onnx"))
    export_onnx(local, 2, output_path=str(tmp_path / "fixed.onnx"), static=(3, 32, 40))
    for height, width in ((20, 31), (1, 1), (20, 90)):
        expected, out = (result(tmp_path / name, tmp_path, picture(height, width)) for name in ("any.onnx", "fixed.onnx"))
        assert out.shape == expected.shape
        inside = 2 * (height - upscale.receptive_field(local)), 2 * (width if width > 40 else width - upscale.receptive_field(local))
        if min(inside) > 0:
            assert np.abs(out - expected)[: inside[0], : inside[1]].max() <= 1


def test_a_fixed_size_too_small_for_no_seams_is_said_and_works(tmp_path: Path, local: AetherBase, capsys: Any) -> None:
    export_onnx(local, 2, output_path=str(tmp_path / "any.onnx"))
    export_onnx(local, 2, output_path=str(tmp_path / "fixed.onnx"), static=(3, 12, 16))
    expected = result(tmp_path / "any.onnx", tmp_path, picture(50, 61))
    assert "larger --static" not in capsys.readouterr().out
    out = result(tmp_path / "fixed.onnx", tmp_path, picture(50, 61))
    assert "larger --static" in capsys.readouterr().out
    assert np.abs(out - expected).mean() < 3
    arguments = ["--model", tmp_path / "fixed.onnx", "--input", tmp_path / "source.png", "--output", tmp_path / "no.png", "--overlap", 6]
    assert upscale.main([str(argument) for argument in arguments]) == 2
    assert "overlap=6 leaves nothing of tiles of 16x12; expected 5 or less" in capsys.readouterr().err


@pytest.mark.parametrize("length", range(1, 60))
def test_fixed_tiles_lie_inside_and_cover_once(length: int) -> None:
    for tile, overlap in ((16, 4), (16, 7), (7, 0), (1, 0)):
        cuts = upscale._fixed_cuts(length, tile, overlap)
        assert [cuts[0][0], *(end for _, end, _, _ in cuts)] == [*(begin for begin, _, _, _ in cuts), length]
        for begin, end, first, last in cuts:
            assert last - first == min(tile, length)
            assert begin < end
            assert first == 0 or begin - first >= overlap
            assert last == length or last - end >= overlap


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_int8_weights_upscale_as_their_onnx_file(tmp_path: Path, local: AetherBase, ending: str, capsys: Any) -> None:
    stored = local.prepare_qat().convert_to_quantized()
    weights = tmp_path / f"int8{ending}"
    state = {name: value.contiguous() for name, value in stored.state_dict().items()}
    save_file(state, str(weights)) if ending == ".safetensors" else torch.save(state, weights)
    export_onnx(stored, 2, "int8", str(tmp_path / "net.onnx"))
    outputs = [result(path, tmp_path, picture(30, 26)) for path in (weights, tmp_path / "net.onnx")]
    assert np.abs(outputs[0] - outputs[1]).max() <= 2
    assert np.abs(outputs[0] - outputs[1]).mean() < 0.1
    with pytest.raises(upscale.UserError, match="leave --fp16 out"):
        upscale.load_network(weights, "cpu", True)
    # fuse_aether.py knows what it is, and int8 where it belongs to nothing is still no weight.
    assert "int8 weights already" in refused(capsys, tmp_path, "--model_path", weights, "--output_path", tmp_path / "b.pth")
    torch.save({**small_net().float().state_dict(), "mean": torch.zeros(1, 3, 1, 1, dtype=torch.int8)}, tmp_path / "bad.pth")
    assert "torch.int8" in refused(capsys, tmp_path, "--model_path", tmp_path / "bad.pth", "--output_path", tmp_path / "b.pth")
