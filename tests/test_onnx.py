"""ONNX files: the network's values at any size in ONNX Runtime, read as upscalers read them, or none."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import aether_arch
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from aether_arch import AetherBase, AetherNet
from checkpoints import FORMS
from conftest import randomize, run_onnx, small_net

from aethersr.onnx import OPSETS, PRECISIONS, TARGETS, export_onnx

# All are in the operator tables of ONNX Runtime (CPU, CUDA, DirectML), TensorRT 10 and 11, and OpenVINO.
FLOAT = {"Conv", "Add", "Sub", "Mul", "Sigmoid", "Relu", "LeakyRelu", "Concat", "DepthToSpace"}
FLOAT |= {"ReduceMean", "ReduceMax", "ReduceSum", "Transpose", "Clip"}
ALLOWED = {"fp32": FLOAT, "fp16": FLOAT, "int8": FLOAT | {"QuantizeLinear", "DequantizeLinear", "Cast"}}
NOT_SIMPLIFIED = {"Constant", "Identity"}
DTYPES: Dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int8": np.float32}
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 5}

pytestmark = pytest.mark.usefixtures("one_thread")


def network(precision: str = "fp32", scale: int = 2, **options: Any) -> AetherBase:
    net: Any = randomize(AetherNet(scale=scale, **{**TINY, **options})).eval()
    return net.prepare_qat().eval() if precision == "int8" else net.fused()


def exported(
    folder: Path, precision: str = "fp32", scale: int = 2, net: Optional[AetherBase] = None, **arguments: Any
) -> onnx.ModelProto:
    net = net or network(precision, scale)
    return onnx.load(export_onnx(net, net.scale, precision, str(folder / "net.onnx"), **arguments))


@torch.no_grad()
def assert_agrees(model: Any, net: AetherBase, image: Any, bound: float = 1e-5) -> None:
    """The session's output is the network's but for ``bound``, relative to the largest value from 1."""
    output, expected = run_onnx(model, image), net(torch.from_numpy(image).float()).numpy()
    assert (output.dtype, output.shape) == (image.dtype, expected.shape)
    assert np.abs(output - expected).max() <= bound * max(1.0, np.abs(expected).max())


def inferred(model: onnx.ModelProto, height: int, width: int) -> List[Any]:
    """The output's shape by ONNX's own inference, with the input's size fixed."""
    model = copy.deepcopy(model)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, None, height, width)):
        if size is not None:
            dim.dim_value = size
    onnx.checker.check_model(model, full_check=True)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shape = model.graph.output[0].type.tensor_type.shape
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in shape.dim]


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_file_is_whole_dynamic_and_agrees(tmp_path: Path, scale: int, precision: str) -> None:
    net = small_net(scale, **{**TINY, "depths": (1, 1)}).float()
    path = export_onnx(net, scale, precision, str(tmp_path / "net.onnx"))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    for shape in ((1, 3, 1, 1), (1, 3, 1, 9), (3, 3, 7, 2), (1, 3, 40, 25)):
        image = torch.rand(shape).numpy().astype(DTYPES[precision])
        assert_agrees(path, net, image, {"fp32": 1e-5, "fp16": 1e-2}[precision])
    model = onnx.load(path)
    for height, width in ((16, 16), (512, 512), (1, 1), (17, 31), (333, 2)):
        assert inferred(model, height, width) == [1, 3, scale * height, scale * width]


@pytest.mark.parametrize("keep_norm", [False, True])
@torch.inference_mode()
def test_a_network_with_every_option_exports_under_inference_mode(tmp_path: Path, keep_norm: bool) -> None:
    options: Dict[str, Any] = {"in_chans": 1, "sk_kernel": 1, "img_range": 255.0, "bound": 2.0}
    net: Any = randomize(AetherNet(scale=3, use_channel_attn=False, **options, **TINY)).eval()
    if keep_norm:
        net.norm.weight.data[0, 3] = 0
    assert net.fused().keep_norm == keep_norm
    assert_agrees(exported(tmp_path, net=net), net, np.zeros((1, 1, 4, 5), np.float32))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_and_the_random_generator_are_left_as_they_were(tmp_path: Path, precision: str) -> None:
    net: Any = (small_net(2, **TINY) if precision == "fp32" else network(precision)).train()
    kind, seed, before = type(net), torch.get_rng_state(), copy.deepcopy(net.state_dict())
    export_onnx(net, 2, precision, str(tmp_path / "net.onnx"))
    assert (type(net), net.training) == (kind, True)
    assert torch.equal(torch.get_rng_state(), seed)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_the_file_says_what_it_is_and_its_bytes_are_always_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    net, metadata = network(), {"author": "Änne"}
    paths = [export_onnx(net, 2, output_path=str(tmp_path / name), metadata=metadata) for name in ("a", "b")]
    assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
    said = {entry.key: entry.value for entry in onnx.load(paths[0]).metadata_props}
    assert "embed_dim=8" in said.pop("variant")
    assert said == {"architecture": "AetherNet", "scale": "2", "precision": "fp32", "author": "Änne"}
    monkeypatch.chdir(tmp_path)
    assert export_onnx(net, 2, "fp16") == "aether_x2_fp16.onnx"
    assert Path("aether_x2_fp16.onnx").is_file()


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 14), (True, 20)])
def test_other_programs_own_export_works(tmp_path: Path, form: str, dynamo: bool, opset: int) -> None:
    """As traiNNer-redux, neosr and chaiNNer call it, with both exporters: any size, under inference mode."""
    if dynamo:
        pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")
    net, path = FORMS[form](small_net(2, **TINY).float()), str(tmp_path / "net.onnx")
    axes = {end: {0: "batch", 2: "height", 3: "width"} for end in ("input", "output")}
    arguments: Dict[str, Any] = {"opset_version": opset, "dynamic_axes": axes, "dynamo": dynamo}
    names = {"input_names": ["input"], "output_names": ["output"]}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.rand(1, 3, 16, 16),), path, verbose=False, **names, **arguments)
    for shape in ((1, 3, 1, 1), (1, 3, 7, 5), (2, 3, 32, 48)):
        assert_agrees(path, net, torch.rand(shape).numpy())
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert dynamo or not operators & {"ScatterND", "Shape", "Loop", "If"}, "few runtimes take these"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("static", [None, (3, 16, 24)])
def test_upscalers_find_what_they_look_for(
    tmp_path: Path, precision: str, static: Optional[Tuple[int, ...]]
) -> None:
    model = exported(tmp_path, precision, static=static, simplify=True)
    # chaiNNer: one picture in, one out, one float type at both ends; channels second and no more than 4, else
    # it takes the file for channels-last; height and width both fixed or neither. vs-mlrt: 4 dimensions, 1 or
    # 3 channels, a batch of 1 or one that it may set to 1.
    assert (len(model.graph.input), len(model.graph.output)) == (1, 1)
    ends = [value.type.tensor_type for value in (model.graph.input[0], model.graph.output[0])]
    kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
    assert {end.elem_type for end in ends} == {kind}
    shapes = [[dim.dim_value or dim.dim_param for dim in end.shape.dim] for end in ends]
    assert not model.graph.value_info
    if static:
        assert shapes == [[1, 3, 16, 24], [1, 3, 32, 48]]
        with pytest.raises(Exception, match="invalid dimensions"):
            run_onnx(model, np.zeros((1, 3, 16, 25), DTYPES[precision]))
        return
    # DirectML is told of sizes by their names, so input and output must not share one.
    assert shapes == [["batch", 3, "height", "width"], ["batch", 3, "out_height", "out_width"]]
    # vs-mlrt fixes the input's batch and size and the output's batch, and drops all shapes in between.
    ends[1].shape.dim[0].dim_value = 1
    assert inferred(model, 48, 64) == [1, 3, 96, 128]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_opsets_from_first_to_last_work_with_allowed_operators(tmp_path: Path, precision: str) -> None:
    net = network(precision)
    for opset in (13 if precision == "int8" else OPSETS[0], 17, 20, OPSETS[-1]):
        for target in TARGETS if precision == "int8" and opset <= 20 else ("onnxruntime",):
            model = exported(tmp_path, precision, net=net, target=target, opset=opset, simplify=True)
            assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
            assert {node.op_type for node in model.graph.node} <= ALLOWED[precision]
    plain, simple = (exported(tmp_path, precision, net=net, simplify=simplify) for simplify in (False, True))
    assert {node.op_type for node in plain.graph.node} <= ALLOWED[precision] | NOT_SIMPLIFIED
    assert len(simple.graph.node) < len(plain.graph.node)
    assert simple.ByteSize() < 1.1 * plain.ByteSize()


REFUSED: List[Tuple[Dict[str, Any], str]] = [
    ({"scale": 4}, "scale=4 was asked for, the model has scale=2"),
    ({"precision": "fp8"}, "precision='fp8' is not known; allowed: fp32, fp16, int8"),
    ({"precision": "int8"}, "needs a quantised network: prepare_qat"),
    ({"target": "cpu"}, "target='cpu' is not known; allowed: onnxruntime"),
    ({"static": (1, 8, 8)}, r"static=\(1, 8, 8\) is not possible; expected \(3, height, width\)"),
    ({"precision": "fp16", "opset": 10}, "opset=10 is not possible; allowed: 11 to 23"),
    ({"opset": "17"}, "opset='17' is not possible"),
]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for arguments, words in REFUSED:
        with pytest.raises(ValueError, match=words):
            export_onnx(network(), **{"scale": 2, "output_path": str(tmp_path / "net.onnx"), **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_session_that_disagrees_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: Any, value: float
) -> None:
    (tmp_path / "net.onnx").write_text("of an earlier run")
    wrong = np.full((2, 3, 1, 1), value, np.float32)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda self, names, feed: [wrong])
    with pytest.raises(RuntimeError, match="ONNX Runtime differs"):
        exported(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["of an earlier run"]
