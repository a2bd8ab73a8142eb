"""The quantised form: fake quantisation, its state, int8 weights and the int8 ONNX file, with real ONNX Runtime sessions."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import aether_arch
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from aether_arch import (
    AetherNet,
    FusedAetherNet,
    QuantAetherNet,
    Quantizer,
    _to_int8,
    aether_from_state_dict,
    aether_medium,
    aether_small,
    export_onnx,
)
from conftest import ROOT, randomize
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from torch.nn import functional as F

TINY: Dict[str, Any] = {"embed_dim": 16, "depths": (1, 2), "scale": 2}


def float_net(**options: Any) -> AetherNet:
    return randomize(AetherNet(**{**TINY, **options})).eval()  # type: ignore[return-value]


@pytest.fixture(params=["default", "full"])
def placement(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(3))


def quantised(placement: str, **options: Any) -> QuantAetherNet:
    images = [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    net = float_net(**options)
    net.prepare_qat(placement, images)
    assert isinstance(net, QuantAetherNet)
    return net.eval()


@torch.no_grad()
def test_rounding_changes_the_output_a_little_and_taking_it_out_changes_nothing(placement: str, image: torch.Tensor) -> None:
    fused = float_net().fused()
    net = quantised(placement)
    scale = float(fused(image).std())
    low, high = (0, 1) if placement == "full" else (-99, 99)  # full writes a picture of 8 bits
    difference = net(image).clamp(low, high) - fused(image).clamp(low, high)
    assert 1e-4 * scale < float(difference.abs().mean()) < 0.2 * scale
    back = copy.deepcopy(net).fuse_model()
    assert type(back) is FusedAetherNet
    assert torch.allclose(back(image), fused(image), atol=1e-5 * scale)


def test_a_quantiser_holds_256_values_and_passes_gradients_inside_its_range() -> None:
    quantizer = Quantizer()
    x = torch.linspace(-1, 1, 2001)[None].requires_grad_()
    quantizer(x)
    out = quantizer.eval()(2 * x)
    assert len(out.detach().unique()) <= 256
    out.sum().backward()
    assert x.grad is not None
    assert float(x.grad[0, 1000]) == 2
    assert float(x.grad[0, 0]) == 0


def test_an_unknown_range_rounds_nothing_and_an_average_of_the_state_keeps_the_range() -> None:
    quantizer = Quantizer()
    x = torch.randn(2, 100)
    assert torch.equal(quantizer.eval()(x), x)
    averaged = copy.deepcopy(quantizer)
    quantizer.train()
    for _ in range(5):  # as BasicSR averages: parameters, from zero on
        quantizer(x)
        for kept, value in zip(averaged.parameters(), quantizer.parameters()):
            kept.data.mul_(0.9).add_(value.data, alpha=0.1)
    assert torch.allclose(averaged.largest, quantizer.largest)


@torch.no_grad()
def test_rounded_weights_keep_the_value_of_flat_areas() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 8, 5, bias=False, dtype=torch.float64)
    codes, scale = _to_int8(conv.weight)
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().max()) <= 127
    shift = (codes * scale - conv.weight).sum((2, 3))
    step = scale.double().view(-1, 1)
    assert bool((shift.abs() <= 0.51 * step).all()), "each input channel's flat part within half a step"
    plain = ((conv.weight / scale).round() * scale - conv.weight).sum((2, 3))
    assert float(shift.pow(2).mean()) < 0.2 * float(plain.pow(2).mean())


@torch.no_grad()
def test_saturated_colours_are_held_where_the_picture_itself_runs_through_and_wild_ones_are_not(image: torch.Tensor) -> None:
    quantizer, finer = Quantizer(spread=1.25), Quantizer()
    assert Quantizer.margin > 1, "crops show less than pictures"
    for each in (quantizer, finer):
        each(torch.tensor([[0.5], [0.6], [0.7], [0.6], [100.0]]))
    assert float(quantizer.largest) == pytest.approx(0.7 * Quantizer.margin)
    assert float(finer.largest) == pytest.approx(0.6 * Quantizer.margin)
    net = quantised("full")
    assert {name for name, each in net.quantizers().items() if each.spread > 1} == {"conv_before_upsample.0.quant_in", "tail.quant_in"}
    images, each_alone = [image[:1] * factor for factor in (1.0, 0.9, 0.4)], []
    for each in images:
        net.calibrate([each])
        each_alone.append(torch.cat([quantizer.largest for quantizer in net.quantizers().values()]))
    net.calibrate(images)
    for quantizer, values in zip(net.quantizers().values(), torch.stack(each_alone).unbind(1)):
        assert torch.allclose(quantizer.largest, quantizer.usual(values))


def test_the_range_stands_still_after_the_first_batches() -> None:
    quantizer = Quantizer()
    for _ in range(Quantizer.WATCH):
        quantizer(torch.ones(1, 3))
    quantizer(torch.full((1, 3), 50.0))
    assert float(quantizer.largest) == pytest.approx(Quantizer.margin)


@pytest.mark.parametrize(("batch", "wild", "expected"), [(8, 0.11, 1.0), (4, 0.11, 1.0), (1, 0.11, 1.2)])
def test_the_range_is_what_usual_images_need_where_some_drive_a_layer_a_thousand_times_as_far(batch: int, wild: float, expected: float) -> None:
    quantizer, random = Quantizer(), torch.Generator().manual_seed(0)
    for _ in range(Quantizer.WATCH):
        factors = torch.where(torch.rand(batch, 1, generator=random) < wild, 1000.0, 1.0)
        quantizer(torch.cat([torch.ones(batch, 1), torch.zeros(batch, 3)], 1) * factors)
    assert expected * 0.99 <= float(quantizer.largest) / Quantizer.margin < expected * 1.5


@torch.no_grad()
def test_int8_weights_compute_what_fake_quantisation_does_and_take_a_third(placement: str, image: torch.Tensor) -> None:
    net = quantised(placement, embed_dim=32)
    stored, fused = net.convert_to_quantized(), net.fused()
    # Half-precision weights move some values over to the next of 256 steps, so the two differ; neither is further from the float network.
    assert (stored(image) - fused(image)).abs().mean() < 1.2 * (net(image) - fused(image)).abs().mean()
    size = [sum(value.numel() * value.element_size() for value in each.state_dict().values()) for each in (stored, fused)]
    assert size[0] < 0.45 * size[1], "a real width is nearer to a quarter"
    assert {value.dtype for value in stored.state_dict().values()} == {torch.int8, torch.float16, torch.float32}
    again = aether_from_state_dict(stored.state_dict())
    assert torch.equal(again(image), stored(image))


@torch.no_grad()
@pytest.mark.parametrize("form", ["training", "fused", "fused, fp16"])
def test_a_float_checkpoint_loads_strictly_into_a_network_made_with_qat(form: str, placement: str, image: torch.Tensor) -> None:
    options = {**TINY, "qat": True if placement == "default" else "full"}
    source = float_net(use_channel_attn=False, use_spatial_attn=False)
    state = source.state_dict() if form == "training" else source.fused().state_dict()
    if form == "fused, fp16":  # as released
        state = {name: value.half() for name, value in state.items()}
    net = aether_small(**options)
    net.load_state_dict(state, strict=True)
    assert isinstance(net, QuantAetherNet)
    error = (net.eval()(image) - source(image)).abs().mean() / source(image).std()
    assert error < 0.02, "before the first batch only weights are rounded"


def test_traiNNer_redux_finds_the_keys_it_compares_after_map_state_dict() -> None:
    net, state = aether_small(**TINY, qat=True), dict(float_net(use_channel_attn=False, use_spatial_attn=False).state_dict())
    net.map_state_dict(state)
    assert set(state) == set(net.state_dict())


def test_training_moves_weights_and_ranges_and_the_state_survives_a_file(placement: str, image: torch.Tensor, tmp_path: Path) -> None:
    net = quantised(placement).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam([value for value in net.parameters() if value.requires_grad], 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(image).square().mean().backward()
        assert all(value.grad is not None for value in net.parameters() if value.requires_grad), "DDP stops at parameters without gradient"
        optimizer.step()
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("gate_conv.weight") for name in moved)
    assert any(name.endswith("range_sum") for name in moved)
    torch.save({"params_ema": net.state_dict()}, tmp_path / "qat.pth")
    again = aether_from_state_dict(torch.load(tmp_path / "qat.pth", weights_only=True)["params_ema"])
    assert isinstance(again, QuantAetherNet)
    assert again.placement == placement
    with torch.no_grad():
        assert torch.equal(again(image), net.eval()(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_under_autocast_is_finite_and_close(dtype: torch.dtype, image: torch.Tensor) -> None:
    net = quantised("default").train()
    expected = net(image)
    with torch.autocast("cpu", dtype):
        output = net(image)
    output.float().square().mean().backward()
    assert all(bool(value.grad.isfinite().all()) for value in net.parameters() if value.grad is not None)
    assert float((output.float() - expected).abs().mean()) < 0.1 * float(expected.std())


def test_it_compiles_without_graph_breaks() -> None:
    net = quantised("full", depths=(1, 1)).train()
    explained = torch._dynamo.explain(net)(torch.rand(2, 3, 12, 12))
    assert explained.graph_break_count == 0


def optimised(path: Path, folder: Path) -> List[str]:
    """Operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize(("placement", "each", "others"), [("default", 3, 1), ("full", 3, 6)])
def test_onnx_runtime_computes_the_quantised_convolutions_in_integers(placement: str, each: int, others: int, tmp_path: Path) -> None:
    net = quantised(placement)
    path = Path(export_onnx(net, 2, "int8", str(tmp_path / "net.onnx")))
    counts = Counter(optimised(path, tmp_path))
    assert counts["QLinearConv"] == 3 * each + others  # of three blocks gate, main and out; the 3x3 after them
    assert counts["Conv"] >= 3  # the depthwise ones: not left to ONNX Runtime, which would make slow integer ones of them


@torch.no_grad()
@pytest.mark.parametrize("target", aether_arch.TARGETS)
def test_the_int8_file_agrees_with_the_stored_network(target: str, placement: str, tmp_path: Path) -> None:
    net = quantised(placement)
    stored = net.convert_to_quantized().for_target(target)
    path = export_onnx(net, 2, "int8", str(tmp_path / "net.onnx"), target)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 31, 18, generator=torch.Generator().manual_seed(5))
    output = np.asarray(session.run(["output"], {"input": image.numpy()})[0])
    expected = stored(image).numpy()
    # Random weights: what counts is that it is the same function, not how often two roundings fall to different sides.
    assert np.abs(output - expected).mean() < 0.02 * expected.std()
    weights = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4]
    assert len(weights) >= (10 if target == "tensorrt" else 12)  # TensorRT has only those that it computes with in integers


def test_tensorrt_gets_what_it_allows(placement: str, tmp_path: Path) -> None:
    model = onnx.load(export_onnx(quantised(placement), 2, "int8", str(tmp_path / "net.onnx"), "tensorrt"))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constants.update({n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"})
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.dtype == np.int8, "symmetric int8, and no int32 biases"
        assert not zero_point.any()
        assert bool((constants[node.input[1]] > 0).all())
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert node.input[1] in constants or made[node.input[1]] == "DequantizeLinear", "no weight is computed"
    assert not any(node.op_type == "Cast" for node in model.graph.node)


def test_the_seeds_block_for_quantisation_runs_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = aether_medium(scale=4, embed_dim=16, depths=(1, 1))
    model.prepare_qat()
    model.eval()
    quantized_model = model.convert_to_quantized()
    path = export_onnx(quantized_model, scale=4, precision="int8")
    assert (tmp_path / path).is_file()


def test_calibration_passes_over_images_that_a_network_can_not_compute() -> None:
    image, endless = torch.rand(1, 3, 16, 16), torch.full((1, 3, 16, 16), math.inf)
    expected, net = quantised("full"), quantised("full")
    expected.calibrate([image])
    with pytest.warns(UserWarning, match="not finite"):
        net.calibrate([endless, image])
    assert all(torch.equal(value, other) for value, other in zip(net.state_dict().values(), expected.state_dict().values()))
    for images in ([], [endless]):
        with pytest.raises(ValueError, match="finite"):
            net.calibrate(images)
    assert not net.training
    assert all(torch.equal(value, other) for value, other in zip(net.state_dict().values(), expected.state_dict().values()))


def test_calibration_that_stops_at_an_image_leaves_the_network_as_it_was(image: torch.Tensor) -> None:
    net = quantised("full")
    expected = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError):
        net.calibrate([image, torch.rand(1, 4, 20, 24)])
    assert not net.training
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    assert {quantizer.margin for quantizer in net.quantizers().values()} == {Quantizer.margin}


def test_a_range_follows_no_batch_that_ran_away() -> None:
    quantizer, other = Quantizer(), Quantizer()
    for value in (math.inf, 1.0, math.nan, 2.0):
        quantizer(torch.tensor([[0.5, value]]))
        if math.isfinite(value):
            other(torch.tensor([[0.5, value]]))
    assert float(quantizer.watched) == 2
    assert torch.equal(quantizer.largest, other.largest)


@torch.no_grad()
def test_a_bound_set_afterwards_clips_what_ranges_hold_already(image: torch.Tensor) -> None:
    net, seen = quantised("default"), []
    net.stages[0][0].reparam_conv.register_forward_hook(lambda *each: seen.append(float(each[-1].abs().max())))  # type: ignore[index, union-attr]
    net(image)
    net.set_bound(seen[0] / 4)
    net(image)
    assert seen[1] == pytest.approx(seen[0] / 4, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("target", aether_arch.TARGETS)
@pytest.mark.parametrize("weight", [0.0, 1e-6])
def test_a_channel_that_died_keeps_its_bias_in_the_file(weight: float, target: str, placement: str, tmp_path: Path, image: torch.Tensor) -> None:
    fused = float_net(bound=1.0).fused()
    dead = fused.body_conv.weight[5]  # type: ignore[index]
    dead.copy_(torch.linspace(-weight, weight, dead.numel()).view_as(dead))
    fused.body_conv.bias[5] = 0.3  # type: ignore[index]
    net = copy.deepcopy(fused).prepare_qat(placement, [image]).eval()
    stored = net.convert_to_quantized().for_target(target)
    assert torch.allclose(stored.body_conv.bias[5], torch.tensor(0.3), rtol=1e-5)  # type: ignore[index]
    path = export_onnx(net, 2, "int8", str(tmp_path / "net.onnx"), target)
    output = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": image.numpy()})[0]
    assert float((torch.from_numpy(np.asarray(output)) - stored(image)).abs().mean()) < 0.005 * float(fused(image).std())


@torch.no_grad()
def test_stored_weights_stay_in_evaluation_mode_and_survive_half_precision(image: torch.Tensor) -> None:
    net = quantised("default", use_channel_attn=False, use_spatial_attn=False).train()
    net.body_conv.quant_in.watched.data.zero_()  # type: ignore[union-attr, operator]
    for _ in range(Quantizer.WATCH):
        net.body_conv.quant_in(torch.full((1, 1), 700.0))  # type: ignore[operator, union-attr]
    stored = net.convert_to_quantized()
    again = aether_small(**TINY, qat=True)
    again.load_state_dict(stored.state_dict())
    for each in (stored, again):
        state = {name: value.clone() for name, value in each.state_dict().items()}
        each.train()(image * 3)
        assert not any(module.training for module in each.modules())
        assert all(torch.equal(value, state[name]) for name, value in each.state_dict().items())
    assert float(stored.half().body_conv.quant_in.largest) == pytest.approx(700 * Quantizer.margin, rel=1e-3)  # type: ignore[arg-type, union-attr]


def test_weights_beyond_half_precision_are_refused() -> None:
    net = quantised("full")
    net.head.weight.data[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"head\.weight is beyond half precision"):
        net.convert_to_quantized()


def test_calibration_warns_of_an_image_that_drives_the_network_far_beyond_the_others() -> None:
    net = quantised("default")
    images = [torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.calibrate(images)
    with pytest.warns(UserWarning, match=r"drives stages\S+ \S+ times as far"):
        net.calibrate([*images, images[0] * 1000])
    with pytest.warns(UserWarning, match="not finite on 1 of 6"):
        net.calibrate([*images, torch.full((1, 3, 16, 16), math.inf)])


@torch.no_grad()
def test_weights_of_seven_bits_compute_almost_the_same_and_no_pair_of_products_overflows_16_bits(tmp_path: Path) -> None:
    stored = quantised("full", embed_dim=32).convert_to_quantized()
    image = torch.rand(1, 3, 31, 18, generator=torch.Generator().manual_seed(5))
    path = export_onnx(stored, 2, "int8", str(tmp_path / "net.onnx"), reduce_range=True)
    model = onnx.load(path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [constants[node.input[0]] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    weights = [weight for weight in weights if weight.dtype == np.int8]
    assert weights
    assert max(2 * 255 * int(np.abs(weight.astype(int)).max()) for weight in weights) < 2**15, "two products of u8 and s8"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    output = np.asarray(session.run(["output"], {"input": image.numpy()})[0])
    reduced = stored.for_target("onnxruntime", reduce_range=True)(image).numpy()
    assert np.abs(output - reduced).mean() < 0.02 * reduced.std()
    assert 0 < np.abs(reduced - stored(image).numpy()).mean() < 0.1 * reduced.std()


@torch.no_grad()
def test_the_shipped_weights_give_the_same_picture_as_int8_network_and_as_int8_file(placement: str, tmp_path: Path) -> None:
    net = aether_from_state_dict(load_file(ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors"))

    def pair(photograph: np.ndarray) -> List[torch.Tensor]:
        gt = Image.fromarray(photograph).crop((100, 60, 356, 316))
        sides = [np.asarray(each, dtype=np.float32) / 255 for each in (gt.resize((128, 128), Image.Resampling.BICUBIC), gt)]
        return [torch.from_numpy(side).permute(2, 0, 1)[None] for side in sides]

    image, gt = pair(photographs.astronaut())
    net.prepare_qat(placement, [pair(photograph)[0] for photograph in (photographs.coffee(), photographs.chelsea(), photographs.rocket())])
    quantized = net.eval().convert_to_quantized()
    session = onnxruntime.InferenceSession(export_onnx(quantized, 2, "int8", str(tmp_path / "net.onnx")), providers=["CPUExecutionProvider"])
    output = torch.from_numpy(np.asarray(session.run(None, {"input": image.numpy()})[0]))
    steps = [(each.clamp(0, 1) * 255).round() for each in (quantized(image), output)]
    far = float(((steps[0] - steps[1]).abs() > 1).float().mean())
    losses = [float(10 * torch.log10((each - gt * 255).square().mean())) for each in steps]
    assert far <= 0.01, f"{far:.2%} of the pixels are more than 1/255 apart"
    assert abs(losses[0] - losses[1]) <= 0.01, f"{abs(losses[0] - losses[1]):.4f} dB apart"


def test_gradients_of_the_depthwise_weights_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    net = quantised("full").train()
    plain, image = copy.deepcopy(net), torch.rand(2, 3, 14, 15)
    net(image).square().sum().backward()
    monkeypatch.setattr(aether_arch._DepthwiseConv, "apply", lambda x, weight, bias: F.conv2d(x, weight, bias, padding=5, groups=len(weight)))
    plain(image).square().sum().backward()
    for (name, parameter), other in zip(net.named_parameters(), plain.parameters()):
        if "reparam_conv" in name and parameter.requires_grad:
            assert parameter.grad is not None
            assert other.grad is not None
            assert float((parameter.grad - other.grad).abs().max() / other.grad.abs().max()) < 1e-3, name


def test_what_can_not_be_quantised_is_said() -> None:
    with pytest.raises(ValueError, match="prepare_qat"):
        export_onnx(float_net(), 2, "int8")
    with pytest.raises(ValueError, match="prepare_qat"):
        float_net().convert_to_quantized()
    with pytest.raises(ValueError, match="ranges are unknown"):
        aether_small(**TINY, qat=True).convert_to_quantized()
    with pytest.raises(ValueError, match="target='cpu'"):
        export_onnx(quantised("default"), 2, "int8", target="cpu")
    with pytest.raises(ValueError, match="qat='yes'"):
        aether_small(**TINY, qat="yes")
