"""Times ways to compute a fused block, and its depthwise convolution's weight gradient.

Usage:
    python benchmarks/variants.py [--size 128] [--rounds 15] [--threads 2]   # the figures of docs/speed.md
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import types
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from benchmark import export, session, timed
from networks import aether, aether_arch
from report import table
from torch import Tensor, nn
from torch.nn import functional as F


def attention(block: Any, out: Tensor) -> Tensor:
    return block.spatial_attn(block.channel_attn(out))


def plain(block: Any, x: Tensor) -> Tensor:
    out = block.reparam_conv(x)
    return x + attention(block, block.out_conv(F.silu(block.gate_conv(out)) * block.main_conv(out)))


def in_place(block: Any, x: Tensor) -> Tensor:
    """Overwrites every large tensor that is no longer needed."""
    out = block.reparam_conv(x)
    hidden = F.silu(block.gate_conv(out), inplace=True)
    hidden *= block.main_conv(out)
    out = block.out_conv(hidden)
    if isinstance(block.channel_attn, nn.Identity):
        out += x
        return out
    out *= block.channel_attn.fc(out.mean((2, 3), keepdim=True))
    pooled = torch.cat([out.amax(1, keepdim=True), out.mean(1, keepdim=True)], 1)
    return torch.addcmul(x, out, torch.sigmoid(block.spatial_attn.conv(pooled)))


def in_strips(block: Any, x: Tensor) -> Tensor:
    """As in FusedAetherBlock: the same, and in eager mode a few rows at a time."""
    return aether_arch.FusedAetherBlock.forward(block, x)


def one_convolution(block: Any, x: Tensor) -> Tensor:
    """Gate and main in one 1x1 convolution, split afterwards."""
    gate, main = F.conv2d(block.reparam_conv(x), block.both_weight, block.both_bias).chunk(2, 1)
    return x + attention(block, block.out_conv(F.silu(gate) * main))


def pooled_mean(block: Any, x: Tensor) -> Tensor:
    """The channel attention's mean as a pooling, which ONNX Runtime computes in its blocked layout."""
    out = block.reparam_conv(x)
    out = block.out_conv(F.silu(block.gate_conv(out)) * block.main_conv(out))
    if isinstance(block.channel_attn, nn.Identity):
        return x + out
    return x + block.spatial_attn(out * block.channel_attn.fc(F.adaptive_avg_pool2d(out, 1)))


VARIANTS = {
    "plain": plain,
    "in place": in_place,
    "in place, in strips": in_strips,
    "gate and main in one convolution": one_convolution,
    "mean as pooling": pooled_mean,
}


@torch.no_grad()
def blocks(variant: str, size: int, rounds: int, threads: int) -> None:
    stage: Any = aether(variant, "fused", 4).stages[0]
    steps: Dict[str, Dict[str, Callable[[], Any]]] = {"eager": {}, "ORT": {}}
    x = torch.rand(1, stage[0].reparam_conv.in_channels, size, size)
    with tempfile.TemporaryDirectory() as folder:
        for name, forward in VARIANTS.items():
            made = copy.deepcopy(stage)
            for block in made:
                for part in ("weight", "bias"):
                    both = torch.cat([getattr(block.gate_conv, part), getattr(block.main_conv, part)])
                    setattr(block, f"both_{part}", nn.Parameter(both))
                block.forward = types.MethodType(forward, block)
            assert torch.allclose(made(x), stage(x), atol=1e-5)
            export(made, x, Path(folder, "block.onnx"), True)
            steps["ORT"][name] = session(Path(folder, "block.onnx"), x, threads)
            memory_format = torch.channels_last
            steps["eager"][name] = functools.partial(
                made.to(memory_format=memory_format), x.to(memory_format=memory_format)
            )
    print(f"{variant}, {len(stage)} blocks, {size}x{size}, {threads} threads: ms, and beside plain\n")
    found = [timed(each, rounds, threads) for each in steps.values()]
    cells = [
        [name, *(f"{ms.median(name):.1f} ({ms.ratio('plain', name)})" for ms in found)] for name in VARIANTS
    ]
    print("\n".join(table(["block", "eager, channels_last", "ONNX Runtime"], cells)))


def weight_gradient(rounds: int, threads: int) -> None:
    """PyTorch's own against a depthwise convolution of inputs by output gradients."""
    cells = []
    for channels, batch, size in ((96, 4, 24), (96, 4, 48), (96, 8, 64), (180, 4, 48)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x, grad = (
                torch.rand(batch, channels, size, size).to(memory_format=memory_format) for _ in range(2)
            )
            weight = torch.rand(channels, 1, 11, 11)

            def own(x: Tensor = x, grad: Tensor = grad, weight: Tensor = weight) -> Tensor:
                options: Any = (
                    None,
                    [1, 1],
                    [5, 5],
                    [1, 1],
                    False,
                    [0, 0],
                    len(weight),
                    [False, True, False],
                )
                return torch.ops.aten.convolution_backward(grad, x, weight, *options)[1]

            def as_convolution(x: Tensor = x, grad: Tensor = grad, weight: Tensor = weight) -> Tensor:
                planes, kernels = x.reshape(1, -1, *x.shape[2:]), grad.reshape(-1, 1, *x.shape[2:])
                return (
                    F.conv2d(planes, kernels, padding=5, groups=len(kernels))
                    .view(len(x), *weight.shape)
                    .sum(0)
                )

            assert torch.allclose(own(), as_convolution(), rtol=1e-3)
            ms = timed({"own": own, "as convolution": as_convolution}, rounds, threads)
            figures = [f"{ms.median(name):.1f}" for name in ms.times] + [
                str(ms.ratio("own", "as convolution"))
            ]
            cells.append([f"({batch}, {channels}, {size}, {size})", str(memory_format)[6:], *figures])
    print("Weight gradient of the 11x11 depthwise convolution, ms\n")
    print("\n".join(table(["input", "layout", "PyTorch's own", "as a convolution", "gain"], cells)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for variant in ("aether_small", "aether_medium"):
        blocks(variant, args.size, args.rounds, args.threads)
    weight_gradient(args.rounds, args.threads)


if __name__ == "__main__":
    main()
