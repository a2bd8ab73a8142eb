"""training/cpu_speed.py: the same gradients, and the layout that makes them fast."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "training"))
import cpu_speed


@pytest.mark.parametrize(("batch", "size", "kernel"), [(3, (9, 7), 5), (1, (4, 12), 11), (2, (1, 1), 7)])
def test_gradients_are_those_of_the_plain_convolution(batch: int, size: tuple[int, int], kernel: int) -> None:
    values = [torch.randn(batch, 6, *size), torch.randn(6, 1, kernel, kernel), torch.randn(6)]
    ours, plain = ([value.double().requires_grad_() for value in values] for _ in range(2))
    cpu_speed.depthwise_conv(*ours).square().sum().backward()
    F.conv2d(*plain, padding=kernel // 2, groups=6).square().sum().backward()
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_under_autocast_gradients_have_the_precision_of_the_parameters() -> None:
    x, weight, bias = torch.randn(2, 4, 9, 9), torch.randn(4, 1, 5, 5, requires_grad=True), torch.zeros(4)
    expected = weight.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cpu_speed.depthwise_conv(x, weight, bias).float().square().sum().backward()
    F.conv2d(x, expected, padding=2, groups=4).square().sum().backward()
    assert weight.grad.dtype == torch.float32
    # Picture, weights, output and its gradient are rounded once each.
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    assert float((weight.grad - expected.grad).norm() / expected.grad.norm()) < rounding


def test_a_network_trains_in_channels_last_with_the_same_gradients() -> None:
    """In a process of its own, since it changes the class for good."""
    code = f"""
import sys; sys.path[:0] = {[str(ROOT / "archs"), str(ROOT / "training")]!r}
import torch, aether_arch, cpu_speed
net = aether_arch.AetherNet(scale=2, embed_dim=8, depths=(1, 1)).double()
x = torch.rand(2, 3, 12, 10, dtype=torch.float64)
layouts = []
hook = lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
net.stages[0][0].register_forward_pre_hook(hook)
def step():
    net.zero_grad()
    net(x).square().mean().backward()
    return [value.grad.clone() for value in net.parameters()]
before = step()
assert cpu_speed.speed_up_on_cpu() == 1 == cpu_speed.speed_up_on_cpu()
assert all(torch.allclose(one, two, rtol=1e-9, atol=1e-14) for one, two in zip(before, step()))
net.eval()(x)
assert layouts == [False, True, False], layouts
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
