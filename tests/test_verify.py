"""What two networks' comparison notices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from conftest import small_net

from aethersr.verify import ALLOWED_DIFFERENCE, largest_difference

pytestmark = pytest.mark.usefixtures("one_thread")


def shifted(net: Any, by: float, place: str = "conv_last.bias") -> Any:
    other = copy.deepcopy(net)
    other.get_parameter(place).data += by
    return other


def test_a_difference_is_told_in_steps_of_an_8_bit_picture_or_relative_to_large_outputs() -> None:
    grey = small_net(3, in_chans=1)
    assert largest_difference(grey, grey.fused()) <= 1e-4 < ALLOWED_DIFFERENCE
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
