"""What two networks' comparison notices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import small_net

from aethersr.verify import ALLOWED_DIFFERENCE, compare_times, largest_difference

pytestmark = pytest.mark.usefixtures("one_thread")


def shifted(net: Any, by: float, place: str = "conv_last.bias") -> Any:
    """A copy with a bias that is ``by`` larger."""
    other = copy.deepcopy(net)
    other.get_parameter(place).data += by
    return other


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fused_network_does_not_differ_and_both_end_in_float64_and_evaluation_mode(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aethersr.verify.SIDE", 8)
    net = small_net(3, in_chans=channels).float()
    other = net.fused()
    net.train()
    assert largest_difference(net, other) <= 1e-4 < ALLOWED_DIFFERENCE
    assert (net.training, other.training) == (False, False)
    assert {net.mean.dtype, other.mean.dtype} == {torch.float64}
    times = compare_times({"unfused": net, "fused": other}).times
    assert {net.mean.dtype, other.mean.dtype} == {torch.float32}
    assert min(times["unfused"] + times["fused"]) > 0


def test_a_difference_is_told_in_steps_of_an_8_bit_picture_or_relative_to_large_outputs() -> None:
    net = small_net(2)
    fused = net.fused()
    assert largest_difference(fused, shifted(fused, 1 / 255, "tail.bottom_right_bias")) > 0.1, "one pixel"
    net.conv_last.weight.data.zero_()  # outputs are about 0.5, below 1
    assert largest_difference(net, shifted(net, 0.25 / 255)) == pytest.approx(0.25)
    net.conv_last.bias.data.fill_(99.5)
    assert largest_difference(net, shifted(net, 100 / 255)) == pytest.approx(1.0)
    for value in (math.nan, math.inf):
        assert largest_difference(net, shifted(net, value)) == math.inf
        assert largest_difference(shifted(net, value), shifted(net, value)) == math.inf
