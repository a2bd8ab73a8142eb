"""The int8 ONNX file: which convolutions run in integers, and the pattern that each runtime looks for."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from aether_arch import AetherNet
from aether_quant import TARGETS, QuantAetherNet
from conftest import ROOT, randomize
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs

from aethersr.identify import aether_from_state_dict
from aethersr.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")


def float_net(**options: Any) -> AetherNet:
    return randomize(AetherNet(scale=2, embed_dim=16, depths=(1, 2), **options)).eval()  # type: ignore[return-value]


def quantised(placement: str, **options: Any) -> QuantAetherNet:
    images = [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return float_net(**options).prepare_qat(placement, images).eval()


@pytest.fixture(params=["default", "full"])
def placement(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 31, 18, generator=torch.Generator().manual_seed(5))


def exported(
    folder: Path, net: QuantAetherNet, target: str = "onnxruntime", **options: Any
) -> onnx.ModelProto:
    return onnx.load(export_onnx(net, 2, "int8", str(folder / "net.onnx"), target, **options))


def run(model: onnx.ModelProto, image: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"input": image.numpy()})[0]))


def constants(model: onnx.ModelProto) -> Dict[str, Any]:
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return values


def integer_weights(model: onnx.ModelProto) -> List[Any]:
    """The int8 weights that a DequantizeLinear reads: those of integer convolutions."""
    values = constants(model)
    read = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return [values[name] for name in read if name in values and values[name].dtype == np.int8]


@pytest.mark.parametrize("simplify", [False, True])
@pytest.mark.parametrize(("placement", "others"), [("default", 0), ("full", 5)])
def test_onnx_runtime_computes_the_quantised_convolutions_in_integers(
    placement: str, others: int, simplify: bool, tmp_path: Path
) -> None:
    model = exported(tmp_path, quantised(placement), simplify=simplify)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["QLinearConv"] == 3 * 3 + others  # gate, main and out of three blocks
    assert counts["Conv"] >= 3  # the depthwise ones, of which ONNX Runtime would make slow integer ones


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_the_file_agrees_with_the_stored_network(
    target: str, placement: str, tmp_path: Path, image: torch.Tensor
) -> None:
    net = quantised(placement)
    expected = net.convert_to_quantized().for_target(target)(image)
    model = exported(tmp_path, net, target)
    # Random weights: it must be the same function. Some values round to the other side.
    assert float((run(model, image) - expected).abs().mean()) < 0.02 * float(expected.std())
    after = {"default": 0, "full": 5} if target == "onnxruntime" else {"default": 1, "full": 4}
    assert len(integer_weights(model)) == 3 * 3 + after[placement]


def test_tensorrt_gets_what_it_allows(placement: str, tmp_path: Path) -> None:
    model = exported(tmp_path, quantised(placement), "tensorrt")
    values = constants(model)
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero_point = values[node.input[2]]
        assert zero_point.dtype == np.int8, "symmetric int8, and no int32 biases"
        assert not zero_point.any()
        assert bool((values[node.input[1]] > 0).all())
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    weights = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    assert all(name in values or made[name] == "DequantizeLinear" for name in weights), (
        "no weight is computed"
    )
    assert not any(node.op_type == "Cast" for node in model.graph.node)


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", [0.0, 1e-6])
def test_a_channel_that_died_keeps_its_bias_in_the_file(
    weight: float, target: str, placement: str, tmp_path: Path, image: torch.Tensor
) -> None:
    fused = float_net(bound=1.0).fused()
    dead = fused.body_conv.weight[5]  # type: ignore[index]
    dead.copy_(torch.linspace(-weight, weight, dead.numel()).view_as(dead))
    fused.body_conv.bias[5] = 0.3  # type: ignore[index]
    net = copy.deepcopy(fused).prepare_qat(placement, [image]).eval()
    stored = net.convert_to_quantized().for_target(target)
    conv: Any = stored.body_conv
    assert torch.allclose(conv.bias[5], torch.tensor(0.3), rtol=1e-5)
    output = run(exported(tmp_path, net, target), image)
    assert float((output - stored(image)).abs().mean()) < 0.005 * float(fused(image).std())


@torch.no_grad()
def test_weights_of_seven_bits_overflow_no_pair_of_products(tmp_path: Path, image: torch.Tensor) -> None:
    stored = quantised("full").convert_to_quantized()
    model = exported(tmp_path, stored, reduce_range=True)
    weights = integer_weights(model)
    largest = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
    assert 2 * 255 * largest < 2**15, "two products of u8 and s8 fit in 16 bits"
    reduced = stored.for_target("onnxruntime", reduce_range=True)(image)
    assert float((run(model, image) - reduced).abs().mean()) < 0.02 * float(reduced.std())
    assert 0 < float((reduced - stored(image)).abs().mean()) < 0.1 * float(reduced.std())


@torch.no_grad()
def test_the_shipped_weights_give_the_same_picture_as_network_and_as_file(
    placement: str, tmp_path: Path
) -> None:
    net = aether_from_state_dict(
        load_file(ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors")
    )

    def pair(photograph: Any) -> List[torch.Tensor]:
        truth = Image.fromarray(photograph).crop((100, 60, 356, 316))
        small = truth.resize((128, 128), Image.Resampling.BICUBIC)
        arrays = [np.asarray(side, dtype=np.float32) / 255 for side in (small, truth)]
        return [torch.from_numpy(side).permute(2, 0, 1)[None] for side in arrays]

    pictures = [
        pair(photograph)[0]
        for photograph in (photographs.coffee(), photographs.chelsea(), photographs.rocket())
    ]
    stored = net.prepare_qat(placement, pictures).eval().convert_to_quantized()
    low, truth = pair(photographs.astronaut())
    outputs = [stored.for_target("onnxruntime")(low), run(exported(tmp_path, stored), low)]
    steps = [(each.clamp(0, 1) * 255).round() for each in outputs]
    far = float(((steps[0] - steps[1]).abs() > 1).float().mean())
    losses = [float(10 * torch.log10((each - truth * 255).square().mean())) for each in steps]
    # A sum rounded the other way moves some pixels by a few steps, and leaves the quality as it is.
    assert far <= {"default": 0.03, "full": 0.15}[placement], (
        f"{far:.2%} of the values are more than 1/255 apart"
    )
    assert abs(losses[0] - losses[1]) <= 0.01, f"{abs(losses[0] - losses[1]):.4f} dB apart"


@torch.no_grad()
@pytest.mark.parametrize("path", sorted((ROOT / "weights").glob("*_int8.onnx")), ids=lambda path: path.stem)
def test_the_shipped_int8_files_are_as_good_as_the_shipped_weights(path: Path) -> None:
    net = aether_from_state_dict(load_file(str(path).replace("_int8.onnx", "_fp16.safetensors")))
    truth = Image.fromarray(photographs.astronaut()).crop(
        (100, 60, 100 + 64 * net.scale, 60 + 64 * net.scale)
    )
    low = np.asarray(truth.resize((64, 64), Image.Resampling.BICUBIC), np.float32) / 255
    image = torch.from_numpy(low).permute(2, 0, 1)[None]
    wanted = torch.from_numpy(np.array(truth)).permute(2, 0, 1)[None].double()
    weights, file = (
        10 * math.log10(float(((output.clamp(0, 1) * 255).round() - wanted).square().mean()))
        for output in (net.eval()(image), run(onnx.load(path), image))
    )
    assert abs(weights - file) <= 0.05
