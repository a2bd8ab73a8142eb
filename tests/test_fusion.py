"""Fusing changes the form and not the function: float64, random statistics, every scale, images down to one pixel. Only an explicit call fuses."""

from __future__ import annotations

from typing import Any, Dict

import aether_arch
import pytest
import torch
from aether_arch import AetherNet, CollapsedTail, FusedAetherBlock, FusedAetherNet
from conftest import randomize, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference
from torch import nn

STEP = 1 / 255
SIZES = ((1, 1), (1, 2), (2, 1), (1, 9), (2, 2), (3, 3), (3, 8), (4, 5), (17, 6))


def difference(net: nn.Module, other: nn.Module, height: int, width: int, chans: int = 3) -> float:
    """In steps of 1/255 of the largest output."""
    x = torch.rand(2, chans, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        return float((other(x) - expected).abs().max() / expected.abs().max().clamp(min=1)) / STEP


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize(
    "options",
    [
        {"use_channel_attn": True, "use_spatial_attn": True},
        {"use_channel_attn": False, "use_spatial_attn": False},
        {"use_channel_attn": True, "use_spatial_attn": False, "mlp_ratio": 1.3, "lk_kernel": 7, "sk_kernel": 7, "img_range": 255.0},
        {"use_channel_attn": False, "use_spatial_attn": True, "in_chans": 1, "lk_kernel": 13, "sk_kernel": 5, "depths": (1, 1, 2)},
    ],
    ids=["attention", "plain", "channel", "spatial"],
)
def test_the_fused_network_is_the_same_function(scale: int, options: Dict[str, Any]) -> None:
    net = small_net(scale, **options)
    fused = net.fused()
    for height, width in SIZES:
        assert difference(net, fused, height, width, options.get("in_chans", 3)) <= 1e-8


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 5), (17, 5), (9, 130)])
def test_rows_at_a_time_are_the_same_function_and_a_gradient_sees_all_of_them(
    attention: bool, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_net(2, use_channel_attn=attention, use_spatial_attn=attention)
    fused = net.fused()
    heights = []
    for block in fused.modules():
        if isinstance(block, FusedAetherBlock):
            block.gate_conv.register_forward_hook(lambda module, inputs, output: heights.append(output.shape[2]))
    monkeypatch.setattr(FusedAetherBlock, "STRIP", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert difference(net, fused, height, width) <= 1e-8
    assert max(heights) == max(1, 64 // (2 * width)) < height, "whole pictures went through"
    heights.clear()
    x = torch.rand(1, 3, height, width, dtype=torch.float64, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None
    assert set(heights) == {height}


@settings(max_examples=15, deadline=None)
@given(
    scale=st.sampled_from(aether_arch.SCALES),
    stages=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    width=st.integers(1, 5),
    mlp_ratio=st.floats(0.4, 3),
    kernels=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    attention=st.tuples(st.booleans(), st.booleans()),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**16),
)
def test_any_network_fuses_and_is_rebuilt_from_either_state_dict(
    scale: int, stages: list, width: int, mlp_ratio: float, kernels: tuple, attention: tuple, size: tuple, seed: int
) -> None:
    large, small = max(kernels) * 2 + 1, min(kernels) * 2 + 1
    options: Dict[str, Any] = {"embed_dim": 8 * width * len(stages), "depths": stages, "mlp_ratio": mlp_ratio, "lk_kernel": large, "sk_kernel": small}
    options.update(use_channel_attn=attention[0], use_spatial_attn=attention[1])
    net = randomize(AetherNet(scale=scale, **options), seed).double().eval()
    fused = net.fused()
    for form in (net, fused):
        rebuilt = aether_arch.aether_from_state_dict(form.state_dict()).double()
        rebuilt.load_state_dict(form.state_dict())  # the float64 values
        assert type(rebuilt) is type(form)
        assert not rebuilt.training
        assert difference(net, rebuilt, *size) <= 1e-8


def test_nothing_but_convolutions_activations_attention_and_additions_is_left() -> None:
    fused = small_net(2).fused()
    leaves = {type(module).__name__ for module in fused.modules() if not list(module.children())}
    assert leaves <= {"Conv2d", "ReLU", "LeakyReLU", "Sigmoid", "Identity", "CollapsedTail"}
    for word in ("norm", "running", "temperature", "error_comp", "lk_", "sk_", "bias_comp"):
        assert not [name for name in fused.state_dict() if word in name]


def test_no_tensor_that_changed_keeps_its_name() -> None:
    net = small_net(2)
    training, fused = net.state_dict(), net.fused().state_dict()
    for name in set(training) & set(fused):
        assert torch.equal(training[name], fused[name]), name


def test_only_an_explicit_call_fuses_and_it_may_be_repeated() -> None:
    net = small_net(2)
    for form in (net.eval(), net.train(), net.eval()):
        assert type(form) is AetherNet
    assert type(net.fused()) is FusedAetherNet
    assert type(net) is AetherNet
    assert net.fuse_model() is net
    assert type(net) is FusedAetherNet
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train().fuse_model()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fusing_keeps_precision_and_mode(dtype: torch.dtype) -> None:
    net = small_net(2).to(dtype).train().fuse_model()
    assert net.training
    assert {value.dtype for value in net.state_dict().values()} == {dtype}


def test_fusing_keeps_channels_last() -> None:
    fused = small_net(2).to(memory_format=torch.channels_last).fuse_model()
    assert fused.body_conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert small_net(2).fuse_model().body_conv.weight.is_contiguous()


def test_the_fused_form_ignores_train_mode() -> None:
    fused = small_net(2, drop=0.5, drop_path_rate=0.5).fused()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(fused.eval()(x), fused.train()(x))


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e-4], ids=str)
def test_a_last_norm_with_a_vanishing_weight_stays_as_a_depthwise_convolution(weight: float) -> None:
    net = small_net(2)
    with torch.no_grad():
        net.norm.weight[0, 3] = weight
    fused = net.fused()
    assert isinstance(fused.body_norm, nn.Conv2d)
    assert difference(net, fused, 7, 9) <= 1e-8
    rebuilt = AetherNet(**net.options).double()
    rebuilt.load_state_dict(fused.state_dict(), strict=True)
    assert difference(net, rebuilt, 7, 9) <= 1e-8
    with torch.no_grad():
        net.norm.bias[0, 3] = 0.0
    assert isinstance(net.fused().body_norm, nn.Identity)
    assert difference(net, net.fused(), 7, 9) <= 1e-8


@pytest.mark.parametrize("scale", aether_arch.SCALES)
def test_the_collapsed_tail_is_exact_at_every_pixel_of_a_larger_image(scale: int) -> None:
    torch.manual_seed(0)
    upsample = aether_arch.AdaptiveUpsample(10, scale)
    tail = nn.Sequential(upsample, nn.Conv2d(upsample.out_channels, 3, 3, padding=1)).double()
    collapsed = CollapsedTail(10, 3, scale).double()
    with torch.no_grad():
        collapsed.load_state_dict(CollapsedTail.collapse(tail, scale))
        for height, width in (*SIZES, (23, 31)):
            x = torch.randn(1, 10, height, width, dtype=torch.float64)
            assert float((collapsed(x) - tail(x)).abs().max()) <= 1e-13


def test_the_merged_kernels_are_part_of_the_fused_ones() -> None:
    """The state dict, not only the output: lk + padded sk, scaled by the norm."""
    net = small_net(2)
    block = net.stages[0][0]
    merged = block.conv.lk_conv.weight.clone()
    merged[:, :, 4:7, 4:7] += block.conv.sk_conv.weight
    scale = block.norm.weight / torch.sqrt(block.norm.running_var + 1e-5)
    expected = merged * scale.view(-1, 1, 1, 1)
    assert torch.allclose(net.fused().state_dict()["stages.0.0.reparam_conv.weight"], expected, rtol=1e-12)


def test_the_full_size_variants_fuse_exactly() -> None:
    for variant in aether_arch.VARIANTS:
        net = randomize(variant(scale=3)).double().eval()
        x = torch.rand(1, 3, 5, 7, dtype=torch.float64)
        with torch.no_grad():
            expected, output = reference(net.state_dict(), x)[0], net.fused()(x)
        assert float((output - expected).abs().max()) <= 1e-8 * STEP * max(1.0, float(expected.abs().max()))
