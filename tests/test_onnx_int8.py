"""The int8 ONNX file: which convolutions run in integers, and the pattern that each runtime looks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from aether_quant import TARGETS, QuantAetherNet
from conftest import ROOT, run_onnx, small_net
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs

from aethersr import calibration
from aethersr.calibration import calibrated, calibration_pairs, psnr
from aethersr.identify import aether_from_state_dict
from aethersr.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = torch.rand(1, 3, 31, 18, generator=torch.Generator().manual_seed(5))
BLOCKS, INTEGER = 3, 3  # and how many of a block's convolutions are integer ones


def quantised(**options: Any) -> QuantAetherNet:
    images = [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    net = small_net(2, embed_dim=16, **options).float()
    return net.prepare_qat(calibration=images).eval()  # type: ignore[return-value]


def exported(folder: Path, net: QuantAetherNet, target: str, **options: Any) -> onnx.ModelProto:
    return onnx.load(export_onnx(net, net.scale, "int8", str(folder / "net.onnx"), target, **options))


def run(model: onnx.ModelProto, image: torch.Tensor = IMAGE) -> torch.Tensor:
    return torch.from_numpy(run_onnx(model, image.numpy()))


def constants(model: onnx.ModelProto) -> Dict[str, Any]:
    nodes = [node for node in model.graph.node if node.op_type == "Constant"]
    values = {node.output[0]: node.attribute[0].t for node in nodes}
    values.update({tensor.name: tensor for tensor in model.graph.initializer})
    return {name: onnx.numpy_helper.to_array(value) for name, value in values.items()}


def integer_weights(model: onnx.ModelProto) -> List[Any]:
    """The int8 weights that a DequantizeLinear reads: those of integer convolutions."""
    values = constants(model)
    read = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return [values[name] for name in read if name in values and values[name].dtype == np.int8]


@pytest.mark.parametrize("simplify", [False, True])
def test_onnx_runtime_computes_the_quantised_convolutions_in_integers(simplify: bool, tmp_path: Path) -> None:
    model = exported(tmp_path, quantised(), "onnxruntime", simplify=simplify)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["QLinearConv"] == BLOCKS * INTEGER
    assert counts["Conv"] >= BLOCKS  # the depthwise ones, of which ONNX Runtime would make slow integer ones


@torch.no_grad()
@pytest.mark.parametrize(("dead", "bound"), [(None, None), (1e-6, 0.5)])
@pytest.mark.parametrize("target", TARGETS)
def test_the_file_computes_what_the_stored_network_does(
    target: str, dead: Any, bound: Any, tmp_path: Path
) -> None:
    net: Any = quantised(bound=bound)
    if dead is not None:  # a channel that died keeps its bias
        weight = net.body_conv.weight[5]
        weight.copy_(torch.linspace(-dead, dead, weight.numel()).view_as(weight))
        net.body_conv.bias[5] = 0.3
    stored: Any = net.convert_to_quantized().for_target(target)
    model, expected = exported(tmp_path, net, target), stored(IMAGE)
    # Random weights: it must be the same function. Some values round to the other side.
    assert float((run(model) - expected).abs().mean()) < 0.02 * float(expected.std())
    assert len(integer_weights(model)) == BLOCKS * INTEGER + (target != "onnxruntime")  # body_conv
    assert dead is None or float(stored.body_conv.bias[5]) == pytest.approx(0.3, rel=1e-5)
    assert bound is None or float(stored.stages[1][1].reparam_conv.quant_out.largest) <= bound


def test_tensorrt_gets_what_it_allows(tmp_path: Path) -> None:
    model = exported(tmp_path, quantised(), "tensorrt")
    values = constants(model)
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for _, scale, zero_point in (node.input for node in pairs):
        assert values[zero_point].dtype == np.int8, "symmetric int8, and no int32 biases"
        assert not values[zero_point].any()
        assert bool((values[scale] > 0).all())
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    weights = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    assert all(name in values or made[name] == "DequantizeLinear" for name in weights), "one is computed"
    assert "Cast" not in made.values()


@torch.no_grad()
def test_weights_of_seven_bits_overflow_no_pair_of_products(tmp_path: Path) -> None:
    stored = quantised().convert_to_quantized()
    model = exported(tmp_path, stored, "onnxruntime", reduce_range=True)
    largest = max(int(np.abs(weight.astype(int)).max()) for weight in integer_weights(model))
    assert 2 * 255 * largest < 2**15, "two products of u8 and s8 fit in 16 bits"
    reduced = stored.for_target("onnxruntime", reduce_range=True)(IMAGE)
    assert float((run(model) - reduced).abs().mean()) < 0.02 * float(reduced.std())
    assert 0 < float((reduced - stored(IMAGE)).abs().mean()) < 0.1 * float(reduced.std())


@torch.no_grad()
@pytest.mark.parametrize("path", sorted((ROOT / "weights").glob("*_int8.onnx")), ids=lambda path: path.stem)
def test_int8_loses_little_of_the_released_weights(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(calibration, "SIDE", 80)
    for name in ("coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(tmp_path / f"{name}.png")
    net: Any = aether_from_state_dict(load_file(str(path).replace("_int8.onnx", "_fp16.safetensors"))).eval()
    pairs = calibration_pairs(tmp_path, net)
    low, truth = pairs[0]
    loss = {"shipped": psnr(run(onnx.load(path), low), truth) - psnr(net(low), truth)}
    if path.name.startswith("2x_AetherNet_small_wallpapers"):
        found = calibrated(net.fused(), pairs, "onnxruntime")
        loss["network"] = found.worst
        network = found.net.for_target("onnxruntime")(low)
        file = run(exported(tmp_path, found.net, "onnxruntime"), low)
        assert psnr(file, truth) == pytest.approx(psnr(network, truth), abs=0.02)
        far = ((file.clamp(0, 1) - network.clamp(0, 1)).abs() > 1.5 / 255).float().mean()
        assert float(far) <= 0.03, "a sum rounded the other way moves some pixels by a few steps"
    assert min(loss.values()) >= -0.05, loss
