"""export_onnx writes one dynamic file that a real ONNX Runtime session agrees with, and leaves the caller's model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aether_arch
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from aether_arch import AetherNet, export_onnx
from conftest import small_net


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_file_is_whole_dynamic_and_agrees(tmp_path: Path, scale: int, precision: str) -> None:
    net = small_net(scale).float()
    path = export_onnx(net, scale=scale, precision=precision, output_path=str(tmp_path / "net.onnx"))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["input", "output"]
    assert session.get_inputs()[0].type == {"fp32": "tensor(float)", "fp16": "tensor(float16)"}[precision]
    for shape in ((1, 3, 1, 1), (1, 3, 1, 9), (3, 3, 7, 2), (1, 3, 40, 25)):
        image = torch.rand(shape).numpy().astype({"fp32": np.float32, "fp16": np.float16}[precision])
        output = session.run(["output"], {"input": image})[0]
        assert output.dtype == image.dtype
        with torch.no_grad():
            expected = net(torch.from_numpy(image).float()).numpy()
        bound = {"fp32": 1e-5, "fp16": 1e-2}[precision] * max(1.0, np.abs(expected).max())
        assert np.abs(output - expected).max() <= bound


def test_the_graph_holds_no_norm_and_no_training_form(tmp_path: Path) -> None:
    path = export_onnx(small_net(2).float(), 2, output_path=str(tmp_path / "net.onnx"))
    operations = {node.op_type for node in onnx.load(path).graph.node}
    allowed = {"Conv", "Add", "Sub", "Mul", "Sigmoid", "Relu", "LeakyRelu", "ReduceMean", "ReduceMax", "Concat", "DepthToSpace", "Slice"}
    assert operations - allowed <= {"Constant", "Identity", "Pad"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_model_is_left_as_it_was(tmp_path: Path, precision: str) -> None:
    for net in (small_net(2).train(), small_net(2).float().eval(), small_net(2).float().fused().train()):
        kind, training = type(net), net.training
        before = {name: value.clone() for name, value in net.state_dict().items()}
        export_onnx(net, 2, precision, str(tmp_path / "net.onnx"))
        assert type(net) is kind
        assert net.training is training
        after = net.state_dict()
        assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_the_default_name_says_scale_and_precision(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_onnx(small_net(2), 2, "fp16") == "aether_x2_fp16.onnx"
    assert Path("aether_x2_fp16.onnx").is_file()


@pytest.mark.parametrize(
    ("scale", "precision", "words"),
    [(4, "fp32", "scale=4 was asked for, the model has scale=2"), (2, "int8", "quantised"), (2, "fp8", "'fp8' is not known")],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, scale: int, precision: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export_onnx(small_net(2), scale, precision, str(tmp_path / "net.onnx"))
    assert not list(tmp_path.iterdir())


def test_a_session_that_disagrees_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda self, names, feed: [np.zeros((2, 3, 1, 1), np.float32)])
    with pytest.raises(RuntimeError, match="ONNX Runtime differs"):
        export_onnx(small_net(2), 2, output_path=str(tmp_path / "net.onnx"))
    assert not list(tmp_path.iterdir())


def test_a_network_with_every_option_exports(tmp_path: Path) -> None:
    net = AetherNet(scale=3, in_chans=1, embed_dim=16, depths=[1], lk_kernel=5, sk_kernel=1, img_range=255.0)
    assert export_onnx(net, 3, output_path=str(tmp_path / "a.onnx")) == str(tmp_path / "a.onnx")
