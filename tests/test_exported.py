"""The network that converters get. That it computes what the network does: test_onnx.py."""

from __future__ import annotations

import warnings
from typing import Any, Dict, List

import pytest
import torch
from conftest import small_net

from aethersr.exported import ExportTail, for_export

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 5}


def test_all_of_it_is_on_the_networks_device() -> None:
    net = small_net(2, **TINY).fused().to("meta")
    assert {value.device.type for value in ExportTail(net.tail, 3).state_dict().values()} == {"meta"}


@torch.no_grad()
@pytest.mark.parametrize("scale", [2, 4])
def test_int8_weights_stay_int8_and_compute_the_same(scale: int) -> None:
    net: Any = small_net(scale, **TINY).float().prepare_qat()
    stored = net.convert_to_quantized()
    exported, image = for_export(stored), torch.rand(1, 3, 7, 12)
    assert float((exported(image) - stored(image)).abs().max()) <= 1e-5 * float(stored(image).abs().max())
    borders = [v for name, v in exported.tail.named_buffers() if name.startswith("borders") and v.dim() == 4]
    assert sum(value.dtype == torch.int8 for value in borders) == 8


@torch.no_grad()
def test_half_precision_is_finite_on_a_long_narrow_picture_with_features_near_its_limit() -> None:
    net = small_net(2, **TINY).float().fused()
    image = torch.rand(1, 3, 3, 5000)
    largest: List[float] = []
    net.tail.register_forward_pre_hook(lambda tail, inputs: largest.append(float(inputs[0].abs().max())))
    net(image)
    factor = 3e4 / largest[0]  # what comes into the tail; what goes out stays as it is
    net.conv_before_upsample[0].weight.mul_(factor)
    net.conv_before_upsample[0].bias.mul_(factor)
    for name, value in net.tail.named_parameters():
        if name.endswith("weight"):
            value.div_(factor)
    expected = net(image)
    half = for_export(net).half()(image.half()).float()
    assert bool(half.isfinite().all())
    assert float((half - expected).abs().max()) <= 0.02 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("scale", [2, 4])
def test_tracing_warns_of_nothing(scale: int) -> None:
    net = small_net(scale, **TINY).float().fused()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        for network in (net, for_export(net)):
            torch.jit.trace(network, torch.rand(1, 3, 9, 11), check_trace=False)
