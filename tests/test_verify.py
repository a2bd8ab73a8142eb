"""What two networks' comparison notices, and what it counts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import small_net

from aethersr.verify import (
    ALLOWED_DIFFERENCE,
    compare_times,
    count_operations,
    count_parameters,
    largest_difference,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def shifted(net: Any, by: float) -> Any:
    """A copy whose output is ``by`` larger."""
    other = copy.deepcopy(net)
    other.conv_last.bias.data += by
    return other


def test_the_fused_form_of_a_network_does_not_differ_and_both_end_in_float64_and_evaluation_mode() -> None:
    net = small_net(3).float()
    other = net.fused()
    net.train()
    assert largest_difference(net, other) <= 1e-4 < ALLOWED_DIFFERENCE
    for each in (net, other):
        assert not each.training
        assert each.mean.dtype == torch.float64


def test_a_difference_is_told_in_steps_of_an_8_bit_picture() -> None:
    net = small_net(2)
    net.conv_last.weight.data.zero_()  # outputs are about 0.5, below 1
    assert largest_difference(net, shifted(net, 0.25 / 255)) == pytest.approx(0.25)


def test_where_outputs_are_large_a_difference_is_relative_to_them() -> None:
    net = small_net(2)
    net.conv_last.weight.data.zero_()
    net.conv_last.bias.data.fill_(99.5)
    assert largest_difference(net, shifted(net, 100 / 255)) == pytest.approx(1.0)


def test_a_difference_at_one_pixel_of_the_border_is_found() -> None:
    net = small_net(4).fused()
    other = copy.deepcopy(net)
    other.tail.bottom_right_bias.data += 1 / 255
    assert largest_difference(net, other) > 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_differs_infinitely(value: float) -> None:
    net = small_net(2)
    assert largest_difference(net, shifted(net, value)) == math.inf
    assert largest_difference(shifted(net, value), shifted(net, value)) == math.inf


def test_networks_for_grey_pictures_are_compared_and_timed_too() -> None:
    net = small_net(1, in_chans=1)
    assert largest_difference(net, net.fused()) < ALLOWED_DIFFERENCE
    nets = {"unfused": net, "fused": net.fused()}
    times = compare_times(nets, size=8)
    assert {name: each.mean.dtype for name, each in nets.items()} == dict.fromkeys(nets, torch.float32)
    assert set(times.times) == set(nets)
    assert all(time > 0 for series in times.times.values() for time in series)


def test_a_fused_network_has_the_operations_that_its_description_lists() -> None:
    net = small_net(2, depths=(2,), use_channel_attn=False, use_spatial_attn=False).fused()
    convolutions, others = count_operations(net)
    # Head, two blocks of four, the stage's, fusion, body, before the tail, the tail and its borders.
    assert convolutions == 1 + 2 * 4 + 5 + 8
    assert others > 0
    unfused = small_net(2, depths=(2,), use_channel_attn=False, use_spatial_attn=False)
    assert count_operations(unfused)[0] < convolutions  # no border corrections
    assert count_operations(unfused.float())[0] == count_operations(unfused.double())[0]


def test_every_parameter_is_counted() -> None:
    assert count_parameters(torch.nn.Conv2d(3, 5, 3)) == 5 * 3 * 9 + 5  # type: ignore[arg-type]
