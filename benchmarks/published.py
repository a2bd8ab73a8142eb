"""AetherNet as first published, for comparison: with two depthwise branches, or only their kernels merged.

Both compute the same as the given AetherNet. Norms are written out; temperature and error_comp are separate
operations over pixels.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "archs"))
from aether_arch import AetherBlock, AetherNet, DeploymentNorm, GatedConvFFN, ReparamLargeKernelConv


class TwoBranches(nn.Module):
    def __init__(self, conv: ReparamLargeKernelConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        large = self.conv.lk_conv(x) + self.conv.lk_bias.view(1, -1, 1, 1)
        return large + (self.conv.sk_conv(x) + self.conv.sk_bias.view(1, -1, 1, 1))


class HandWrittenNorm(nn.Module):
    def __init__(self, norm: DeploymentNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        mean, var = norm.running_mean, norm.running_var
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = x.var((0, 2, 3), keepdim=True, unbiased=False)
            with torch.no_grad():
                norm.running_mean.lerp_(mean, norm.momentum)
                norm.running_var.lerp_(var, norm.momentum)
        return (x - mean) / torch.sqrt(var + norm.eps) * norm.weight + norm.bias


class ScaleAndShift(nn.Module):
    def __init__(self, norm: DeploymentNorm) -> None:
        super().__init__()
        scale, shift = norm.scale_and_shift()
        self.weight, self.bias = (nn.Parameter(value.view(1, -1, 1, 1).clone()) for value in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class TemperedFFN(nn.Module):
    def __init__(self, ffn: GatedConvFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn.conv_out(F.silu(self.ffn.conv_gate(x) * self.ffn.temperature) * self.ffn.conv_main(x))


def _merge(conv: ReparamLargeKernelConv) -> nn.Module:
    weight, bias = conv.reparameterize()
    channels, _, size, _ = weight.shape
    merged = nn.Conv2d(
        channels, channels, size, padding=size // 2, groups=channels, dtype=weight.dtype, device=weight.device
    )
    merged.load_state_dict({"weight": weight, "bias": bias})
    return merged


def _rewritten(net: AetherNet, conv: Callable[..., nn.Module], norm: Callable[..., nn.Module]) -> nn.Module:
    net = copy.deepcopy(net)
    with torch.no_grad():
        for block in [module for module in net.modules() if isinstance(module, AetherBlock)]:
            block.conv, block.norm, block.ffn = conv(block.conv), norm(block.norm), TemperedFFN(block.ffn)
        net.norm = norm(net.norm)
    return net


def two_branches(net: AetherNet) -> nn.Module:
    """A copy to train, with two depthwise branches."""
    return _rewritten(net, TwoBranches, HandWrittenNorm)


def kernels_merged(net: AetherNet) -> nn.Module:
    """A copy for evaluation, with only the kernels merged."""
    return _rewritten(net, _merge, ScaleAndShift).eval()
