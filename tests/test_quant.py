"""The quantised form: fake quantisation, its ranges and state, calibration and int8 weights."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from aether_arch import AetherBase, AetherNet, FusedAetherNet, aether_small
from aether_quant import TARGETS, QuantAetherNet, QuantConv2d, Quantizer, StoredConv2d, _to_int8
from conftest import randomize, small_net

from aethersr.identify import aether_from_state_dict

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
def test_rounding_changes_the_output_a_little_and_taking_it_out_changes_nothing(
    placement: str, image: torch.Tensor
) -> None:
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


@torch.no_grad()
def test_a_range_is_the_largest_magnitude_or_for_functions_with_a_minimum_the_largest_value() -> None:
    x = torch.tensor([[-3.0, 1.0]])
    for low, largest in ((None, 3.0), (0.0, 1.0)):
        quantizer = Quantizer(low=low)
        quantizer(x)
        assert float(quantizer.largest) == pytest.approx(largest * Quantizer.margin)


@torch.no_grad()
def test_calibration_measures_pictures_and_adds_no_margin(image: torch.Tensor) -> None:
    net, seen = quantised("default"), []
    net.body_conv.quant_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.calibrate([image[:1]])
    assert float(net.body_conv.quant_in.largest) == pytest.approx(float(seen[0].abs().max()))
    assert all(each.margin == Quantizer.margin for each in net.quantizers().values())


@torch.no_grad()
def test_a_convolution_computes_with_the_weights_that_are_released(image: torch.Tensor) -> None:
    for groups in (1, 3):
        conv = torch.nn.Conv2d(3, 6 // min(2, groups), 3, padding=1, groups=groups)
        quantised_conv = QuantConv2d.like(conv)
        quantised_conv.load_state_dict(conv.state_dict())
        codes, scale = _to_int8(conv.weight)
        expected = torch.nn.functional.conv2d(image, codes * scale, conv.bias, padding=1, groups=groups)
        assert torch.allclose(quantised_conv(image), expected, atol=1e-6)
        assert torch.allclose(StoredConv2d(quantised_conv)(image), expected, atol=1e-6)
        assert not torch.allclose(conv(image), expected, atol=1e-6)


def test_a_reduced_range_makes_7_bit_weights_except_of_depthwise_kernels_which_stay_float() -> None:
    stored = quantised("full").convert_to_quantized()
    reduced = stored.for_target("onnxruntime", reduce_range=True)
    for before, after in zip(stored.modules(), reduced.modules()):
        if isinstance(before, StoredConv2d) and before.weight.dtype == torch.int8:
            same = torch.equal(before.weight, after.weight)
            assert same if before.groups > 1 else int(after.weight.abs().max()) <= 64


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
def test_saturated_colours_are_held_where_the_picture_itself_runs_through_and_wild_ones_are_not(
    image: torch.Tensor,
) -> None:
    quantizer, finer = Quantizer(spread=1.25), Quantizer()
    assert Quantizer.margin > 1, "crops show less than pictures"
    for each in (quantizer, finer):
        each(torch.tensor([[0.5], [0.6], [0.7], [0.6], [100.0]]))
    assert float(quantizer.largest) == pytest.approx(0.7 * Quantizer.margin)
    assert float(finer.largest) == pytest.approx(0.6 * Quantizer.margin)
    net = quantised("full")
    assert {name for name, each in net.quantizers().items() if each.spread > 1} == {
        "conv_before_upsample.0.quant_in",
        "tail.quant_in",
    }
    images, each_alone = [image[:1] * factor for factor in (1.0, 0.9, 0.4)], []
    for each in images:
        net.calibrate([each])
        each_alone.append([quantizer.largest for quantizer in net.quantizers().values()])
    net.calibrate(images)
    for quantizer, values in zip(net.quantizers().values(), zip(*each_alone)):
        assert torch.allclose(quantizer.largest, quantizer.typical_largest(torch.stack(values)))


@torch.no_grad()
def test_the_picture_that_body_conv_passes_on_is_not_rounded(placement: str, image: torch.Tensor) -> None:
    net = quantised(placement)
    stored = net.convert_to_quantized()
    for each in (net, stored, *(stored.for_target(target) for target in TARGETS)):
        values: List[torch.Tensor] = []
        hook = each.body_conv.register_forward_hook(
            lambda module, inputs, out, values=values: values.append(out)
        )
        each(image)
        hook.remove()
        assert len(values[0].unique()) > 0.9 * values[0].numel()


def test_the_range_stands_still_after_the_first_batches() -> None:
    quantizer = Quantizer()
    for _ in range(Quantizer.WATCH):
        quantizer(torch.ones(1, 3))
    quantizer(torch.full((1, 3), 50.0))
    assert float(quantizer.largest) == pytest.approx(Quantizer.margin)


@pytest.mark.parametrize(("batch", "wild", "expected"), [(8, 0.11, 1.0), (4, 0.11, 1.0), (1, 0.11, 1.2)])
def test_the_range_is_what_usual_images_need_where_some_drive_a_layer_a_thousand_times_as_far(
    batch: int, wild: float, expected: float
) -> None:
    quantizer, random = Quantizer(), torch.Generator().manual_seed(0)
    for _ in range(Quantizer.WATCH):
        factors = torch.where(torch.rand(batch, 1, generator=random) < wild, 1000.0, 1.0)
        quantizer(torch.cat([torch.ones(batch, 1), torch.zeros(batch, 3)], 1) * factors)
    assert expected * 0.99 <= float(quantizer.largest) / Quantizer.margin < expected * 1.5


@torch.no_grad()
def test_int8_weights_compute_what_fake_quantisation_does_and_take_a_third(
    placement: str, image: torch.Tensor
) -> None:
    net = quantised(placement, embed_dim=32)
    stored, fused = net.convert_to_quantized(), net.fused()
    # Half precision moves some weights over to the next of 256 steps: the two differ, neither is further off.
    assert (stored(image) - fused(image)).abs().mean() < 1.2 * (net(image) - fused(image)).abs().mean()
    size = [
        sum(value.numel() * value.element_size() for value in each.state_dict().values())
        for each in (stored, fused)
    ]
    assert size[0] < 0.45 * size[1], "a real width is nearer to a quarter"
    assert {value.dtype for value in stored.state_dict().values()} == {
        torch.int8,
        torch.float16,
        torch.float32,
    }
    again = aether_from_state_dict(stored.state_dict())
    torch.testing.assert_close(again(image), stored(image))


@torch.no_grad()
@pytest.mark.parametrize("form", ["training", "fused", "fused, fp16"])
def test_a_float_checkpoint_loads_strictly_into_a_network_made_with_qat(
    form: str, placement: str, image: torch.Tensor
) -> None:
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


def test_training_moves_weights_and_ranges_and_the_state_survives_a_file(
    placement: str, image: torch.Tensor, tmp_path: Path
) -> None:
    net = quantised(placement).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam([value for value in net.parameters() if value.requires_grad], 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(image).square().mean().backward()
        assert all(value.grad is not None for value in net.parameters() if value.requires_grad), (
            "DDP stops at parameters without gradient"
        )
        optimizer.step()
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("gate_conv.weight") for name in moved)
    assert any(name.endswith("range_sum") for name in moved)
    torch.save({"params_ema": net.state_dict()}, tmp_path / "qat.pth")
    again = aether_from_state_dict(torch.load(tmp_path / "qat.pth", weights_only=True)["params_ema"])
    assert isinstance(again, QuantAetherNet)
    assert again.placement == placement
    with torch.no_grad():
        torch.testing.assert_close(again(image), net.eval()(image))


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


def test_calibration_passes_over_images_that_a_network_can_not_compute() -> None:
    image, endless = torch.rand(1, 3, 16, 16), torch.full((1, 3, 16, 16), math.inf)
    expected, net = quantised("full"), quantised("full")
    expected.calibrate([image])
    with pytest.warns(UserWarning, match="not finite"):
        net.calibrate([endless, image])
    assert all(
        torch.equal(value, other)
        for value, other in zip(net.state_dict().values(), expected.state_dict().values())
    )
    for images in ([], [endless]):
        with pytest.raises(ValueError, match="finite"):
            net.calibrate(images)
    assert not net.training
    assert all(
        torch.equal(value, other)
        for value, other in zip(net.state_dict().values(), expected.state_dict().values())
    )


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
    net.stages[0][0].reparam_conv.register_forward_hook(
        lambda *each: seen.append(float(each[-1].abs().max()))
    )  # type: ignore[index, union-attr]
    net(image)
    net.set_bound(seen[0] / 4)
    net(image)
    assert seen[1] == pytest.approx(seen[0] / 4, rel=0.02)


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


@pytest.mark.parametrize("way", ["prepare_qat", "fused", "load"])
def test_int8_weights_become_trainable_again_but_not_what_a_user_froze(way: str, image: torch.Tensor) -> None:
    def changed(net: Any) -> Any:
        if way == "load":
            net.load_state_dict(float_net().state_dict())
            return net
        return net.prepare_qat() if way == "prepare_qat" else net.fused()

    net = changed(quantised("default").convert_to_quantized()).train()
    weights = [value for name, value in net.named_parameters() if name.endswith(("weight", "bias"))]
    assert weights
    assert all(value.requires_grad for value in weights)
    net(image).mean().backward()
    frozen = changed(quantised("default").requires_grad_(False))
    assert not any(value.requires_grad for value in frozen.parameters())


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
    with pytest.warns(UserWarning, match=r"drives body_conv\S+ \S+ times as far"):
        net.calibrate([*images, images[0] * 1000])
    with pytest.warns(UserWarning, match="not finite on 1 of 6"):
        net.calibrate([*images, torch.full((1, 3, 16, 16), math.inf)])


def test_what_can_not_be_quantised_is_said() -> None:
    with pytest.raises(ValueError, match="prepare_qat"):
        float_net().convert_to_quantized()
    with pytest.raises(ValueError, match="ranges are unknown"):
        aether_small(**TINY, qat=True).convert_to_quantized()
    with pytest.raises(ValueError, match="qat='yes'"):
        aether_small(**TINY, qat="yes")
    with pytest.raises(ValueError, match="qat='most'"):
        float_net().prepare_qat("most")


def test_calibrating_int8_weights_says_that_they_are_stored_already(image: torch.Tensor) -> None:
    stored = quantised("default").convert_to_quantized()
    with pytest.raises(ValueError, match="int8 weights already"):
        stored.calibrate([image])


@pytest.mark.parametrize("qat", [True, "full"])
def test_a_quantised_network_takes_the_bound_of_a_float_checkpoint_and_no_range_goes_beyond(qat: Any) -> None:
    source = small_net(2, bound=0.75, use_channel_attn=False, use_spatial_attn=False).float()
    net: AetherBase = aether_small(scale=2, embed_dim=24, depths=(1, 2), qat=qat)
    net.load_state_dict(source.state_dict(), strict=True)
    net.train()(torch.rand(2, 3, 16, 16))
    ranges = {
        name: float(each.largest.max()) for name, each in net.named_modules() if isinstance(each, Quantizer)
    }
    bounded = [largest for name, largest in ranges.items() if name.endswith("reparam_conv.quant_out")]
    assert len(bounded) == 3
    assert max(bounded) == pytest.approx(0.75)
    assert float(aether_from_state_dict(net.state_dict()).fuse_model().state_dict()["bound"]) == 0.75


@torch.no_grad()
@pytest.mark.parametrize("qat", [True, "full"])
def test_it_is_bounded_before_its_ranges_are_known_and_where_a_quantiser_is_off(qat: Any) -> None:
    net: Any = aether_small(scale=2, embed_dim=24, depths=(1, 2), bound=0.01, qat=qat)
    net.load_state_dict(
        float_net(embed_dim=24, use_channel_attn=False, use_spatial_attn=False, bound=0.01).state_dict()
    )
    seen, image = [], torch.rand(1, 3, 24, 24).round()
    net.stages[0][0].reparam_conv.register_forward_hook(
        lambda *each: seen.append(float(each[-1].abs().max()))
    )
    net.eval()(image)
    net.train()(image)
    for quantizer in net.quantizers().values():
        quantizer.enabled = False
    net.eval()(image)
    assert all(0.0099 <= largest <= 0.0101 for largest in seen)
