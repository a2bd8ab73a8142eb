"""Fusing changes the form and not the function, and only an explicit call fuses.

In float64, with random statistics, at every scale, down to pictures of one pixel.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List

import aether_arch
import pytest
import torch
from aether_arch import AetherNet, CollapsedTail, FusedAetherBlock, FusedAetherNet
from conftest import ROOT, X, in_form, randomize, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = 1 / 255
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}  # quick to trace
SIZES = ((1, 1), (1, 2), (2, 1), (1, 9), (2, 2), (3, 3), (3, 8), (4, 5), (17, 6))


def difference(net: nn.Module, other: nn.Module, height: int, width: int, chans: int = 3) -> float:
    """In steps of 1/255 of the largest output."""
    x = torch.rand(2, chans, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        return float((other(x) - expected).abs().max() / expected.abs().max().clamp(min=1)) / STEP


KINDS: Dict[str, Dict[str, Any]] = {
    "attention": {},
    "plain": {"use_channel_attn": False, "use_spatial_attn": False, "bound": 0.7},
    "channel": {"use_spatial_attn": False, "mlp_ratio": 1.3, "sk_kernel": 11, "img_range": 255.0},
    "spatial": {"use_channel_attn": False, "in_chans": 1, "lk_kernel": 13, "depths": (1, 1, 2)},
}


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_network_is_the_same_function(scale: int, kind: str) -> None:
    # One channel at x8 is enough, and three times as fast.
    options = {"in_chans": 1 if scale == 8 else 3, **KINDS[kind]}
    net = small_net(scale, **options)
    fused = net.fused()
    for height, width in SIZES:
        assert difference(net, fused, height, width, options["in_chans"]) <= 1e-8


@pytest.mark.parametrize(("height", "width", "attention"), [(16, 5, True), (17, 5, False), (9, 130, True)])
def test_rows_at_a_time_are_the_same_function_and_a_gradient_sees_all_of_them(
    height: int, width: int, attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_net(2, use_channel_attn=attention, use_spatial_attn=attention)
    fused = net.fused()
    heights: List[int] = []
    for block in fused.modules():
        if isinstance(block, FusedAetherBlock):
            block.gate_conv.register_forward_hook(lambda *call: heights.append(call[2].shape[2]))
    monkeypatch.setattr(FusedAetherBlock, "STRIP", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert difference(net, fused, height, width) <= 1e-8
    assert max(heights) == max(1, 64 // (2 * width)) < height, "whole pictures went through"
    heights.clear()
    x = torch.rand(1, 3, height, width, dtype=torch.float64, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        fused(x)
    assert set(heights) == {height}, "a gradient and a compiler see all of it"


@st.composite
def networks(draw: Any) -> AetherNet:
    stages = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    kernels, flag = sorted(2 * draw(st.integers(0, 4)) + 1 for _ in range(2)), st.booleans()
    options = {"embed_dim": 8 * draw(st.integers(1, 2)) * len(stages), "depths": stages}
    options.update(sk_kernel=kernels[0], lk_kernel=kernels[1], mlp_ratio=draw(st.floats(0.4, 3)))
    options.update(use_channel_attn=draw(flag), use_spatial_attn=draw(flag))
    net = AetherNet(scale=draw(st.sampled_from(aether_arch.SCALES)), **options)
    return randomize(net, draw(st.integers(0, 2**16))).double().eval()  # type: ignore[return-value]


@settings(max_examples=6, deadline=None)
@given(net=networks(), size=st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_any_network_fuses_and_is_rebuilt_from_either_state_dict(net: AetherNet, size: Any) -> None:
    for form in (net, net.fused()):
        rebuilt = aether_arch.aether_from_state_dict(form.state_dict()).double()
        rebuilt.load_state_dict(form.state_dict())  # the float64 values
        assert type(rebuilt) is type(form)
        assert not rebuilt.training
        assert difference(net, rebuilt, *size) <= 1e-8


def test_nothing_but_convolutions_activations_attention_and_additions_is_left() -> None:
    net = small_net(2)
    fused = net.fused()
    leaves = {type(module).__name__ for module in fused.modules() if not list(module.children())}
    assert leaves <= {"Conv2d", "ReLU", "LeakyReLU", "Sigmoid", "Identity", "CollapsedTail"}
    for word in ("norm", "running", "temperature", "error_comp", "lk_", "sk_", "bias_comp"):
        assert not [name for name in fused.state_dict() if word in name]
    for name, value in fused.state_dict().items():  # none that changed keeps its name
        assert torch.equal(net.state_dict().get(name, value), value), name


def test_only_an_explicit_call_fuses_and_it_may_be_repeated() -> None:
    net, x = small_net(2, drop=0.5, drop_path_rate=0.5), X.double()
    fused = net.fused()
    assert type(net.eval()) is type(net.train()) is AetherNet
    assert net.fuse_model().fuse_model() is net
    assert type(net) is type(fused) is FusedAetherNet
    assert net.training
    torch.testing.assert_close(net(x), fused(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fusing_keeps_precision_mode_layout_and_random_numbers(dtype: torch.dtype) -> None:
    net, last = small_net(2, **TINY).to(dtype).train(), {"memory_format": torch.channels_last}
    random = torch.random.get_rng_state()
    fused = [copy.deepcopy(net).fuse_model(), copy.deepcopy(net).to(**last).fuse_model()]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert fused[0].training
    assert {value.dtype for value in fused[0].state_dict().values()} == {dtype}
    assert fused[0].body_conv.weight.is_contiguous()
    assert fused[1].body_conv.weight.is_contiguous(**last)


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


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("scale", aether_arch.SCALES)
def test_the_collapsed_tail_is_exact_at_every_pixel_and_so_is_its_gradient(scale: int, traced: bool) -> None:
    torch.manual_seed(0)
    upsample = aether_arch.AdaptiveUpsample(6, scale)
    tail = nn.Sequential(upsample, nn.Conv2d(upsample.out_channels, 2, 3, padding=1)).double()
    collapsed: Any = CollapsedTail(6, 2, scale).double()
    lines = 1 if scale < 4 else 2  # in files that are released
    assert collapsed.top_left_weight.shape == (2 * scale**2, 6, lines, lines)
    with torch.no_grad():
        collapsed.load_state_dict(CollapsedTail.collapse(tail, scale))
        if traced:
            collapsed = torch.jit.trace(collapsed, torch.randn(1, 6, 6, 7, dtype=torch.float64))
        for height, width in (*SIZES, (23, 31)):
            x = torch.randn(2, 6, height, width, dtype=torch.float64)
            assert float((collapsed(x) - tail(x)).abs().max()) <= 1e-13
    x = torch.randn(1, 6, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(collapsed, x)


def test_fusing_under_inference_mode_gives_a_network_that_can_be_trained_and_saved(tmp_path: Path) -> None:
    with torch.inference_mode():
        copies = [small_net(2).fused(), small_net(2).fuse_model().fused()]
        loaded = AetherNet(**copies[0].options)
        loaded.load_state_dict(copies[0].state_dict())
    x = torch.rand(1, 3, 5, 6, dtype=torch.float64)
    for net in (*copies, loaded.double()):
        assert not any(value.is_inference() for value in net.parameters())
        net(x).sum().backward()
        torch.save(net.state_dict(), tmp_path / "net.pth")


@pytest.mark.slow
def test_the_largest_network_fuses_at_x8_in_seconds_and_two_gigabytes() -> None:
    code = (
        "import resource, time, aether_arch; net = aether_arch.aether_large(scale=8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; begin = time.time(); net.fuse_model()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, time.time() - begin)"
    )
    gigabytes, seconds = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT / "archs").split()
    assert float(gigabytes) < 2
    assert float(seconds) < 30


# ------------------------------------------------------------------------------------------- a change of form


def test_training_the_fused_form_is_said_once() -> None:
    net = in_form("fused")
    with pytest.warns(UserWarning, match="fused form"):
        net.train()(X).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X).sum().backward()
        in_form("fused")(X)


def test_hooks_and_foreign_attributes_survive_a_change_of_form_and_lost_ones_are_named(caplog: Any) -> None:
    net, seen = in_form("training"), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    net.register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    net.hyperparameters = {"scale": 2}
    net.fuse_model()(X.clone().requires_grad_()).sum().backward()
    assert seen == [FusedAetherNet, "backward"]
    assert net.hyperparameters == {"scale": 2}
    assert not caplog.text
    net.head.register_forward_hook(lambda *call: None)
    net.fusion.register_forward_pre_hook(lambda *call: None)
    net.stages[0][0].register_full_backward_hook(lambda *call: None)
    net.body_conv.register_full_backward_pre_hook(lambda *call: None)
    net.fusion.weight.register_hook(lambda gradient: None)
    net.prepare_qat(calibration=[X])
    names = "head, stages.0.0, fusion, body_conv, fusion.weight"
    assert f"hooks on these are gone with the old form: {names}." in caplog.text


# Parts, which of the fused form's tensors are frozen then, and which are named because they no longer are.
FROZEN: Dict[str, Any] = {
    "all": ("", "", ""),
    "one to one": ("stages conv_first.bias", "stages. head.bias", ""),
    "a part of the tail": ("upsample", "none", "tail.weight"),
    "neighbours": ("norm conv_after quant_fusion_layer.f", "body_conv. body_norm. fusion.w", "fusion.bias"),
    "the last norm": ("norm", "body_norm.", "body_conv.bias, body_conv.weight"),
    "temperature": ("stages.0.0.ffn.temp", "none", "stages.0.0.gate_conv.weight"),
}
CHANGES = [(kind, change) for kind in FROZEN for change in ("fuse", "load")] + [
    (kind, "prepare_qat") for kind in ("one to one", "temperature")
]


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_what_is_frozen_stays_frozen_in_another_form(
    kind: str, change: str, keep_norm: bool, caplog: Any
) -> None:
    (parts, frozen, mixed), net = FROZEN[kind], in_form("training")
    net.norm.weight.data[0, 3] *= 0 if keep_norm else 1
    for name, value in net.named_parameters():
        value.requires_grad_(not name.startswith(tuple(parts.split(" "))))
    before, fused = {name: value.requires_grad for name, value in net.named_parameters()}, net.fused()
    caplog.clear()
    changes = {"fuse": net.fuse_model, "prepare_qat": lambda: net.prepare_qat(calibration=[X])}
    changes.get(change, lambda: net.load_state_dict(fused.state_dict()))()
    for name, value in net.named_parameters():
        state = name.endswith((".range_sum", ".watched"))
        assert value.requires_grad != (state or name.startswith(tuple(frozen.split(" ")))), name
    mixed = "" if keep_norm and kind == "the last norm" else mixed
    said = [record.message for record in caplog.records if "no longer frozen" in record.message]
    assert said == ([f"AetherNet: merged with others, no longer frozen: {mixed}."] if mixed else [])
    if kind in ("all", "one to one") and change != "prepare_qat":
        net.load_state_dict(in_form("training").state_dict())
        assert {name: value.requires_grad for name, value in net.named_parameters()} == before


def test_a_form_leaves_nothing_of_its_own_behind() -> None:
    net = in_form("training")
    net.norm.weight.data[0, 3] = 0.0
    net.fuse_model()
    assert net.keep_norm
    net.prepare_qat(calibration=[X])
    assert not net.is_int8
    net.load_state_dict(net.convert_to_quantized().state_dict())
    assert net.is_int8
    net.fuse_model()
    assert not hasattr(net, "is_int8")
    assert all(value.requires_grad for value in net.parameters())
    net.load_state_dict(in_form("training").state_dict())
    assert not hasattr(net, "keep_norm")


def test_arguments_of_the_other_forms_have_names() -> None:
    with pytest.raises(TypeError):
        FusedAetherNet(2)  # type: ignore[misc]
