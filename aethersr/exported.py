"""The fused network as converters want it: every weight is the constant of a convolution module."""

from __future__ import annotations

import copy
from typing import Any, List, Optional

import torch
from aether_arch import BORDERS
from torch import Tensor, nn
from torch.nn import functional as F


def for_export(network: Any) -> Any:
    """A copy of a fused or quantised network that computes the same and is easier to convert."""
    network = copy.deepcopy(network).eval()
    network.tail = ExportTail(network.tail, network.options["in_chans"])
    mean = network.mean
    if mean.dtype != torch.float32:
        network.tail.to(mean.dtype)
    if bool((mean == mean.flatten()[0]).all()):  # always: it is 0.5
        del network.mean
        network.mean = float(mean.flatten()[0])  # a tensor would be a constant layer in ncnn
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d  # converters know it by this name; what it adds is about training
    return network


class ExportTail(nn.Module):
    """aether_arch.CollapsedTail without slices, and without weights that the graph would have to rearrange.

    The outermost line of features is taken under a mask, and its correction added under one. int8 stays int8.
    """

    def __init__(self, tail: Any, channels: int) -> None:
        super().__init__()
        self.scale = tail.scale
        self.quant_in = getattr(tail, "quant_in", nn.Identity())
        self.conv = tail.conv if hasattr(tail, "conv") else convolution(tail.weight, tail.bias)
        self.borders = nn.ModuleDict({name: along_line(name, *tail.border(name)) for name in BORDERS})
        self.rows, self.columns = (Masks(channels, dim, tail.depth) for dim in (2, 3))
        if hasattr(tail, "top_weight_scale"):  # int8 storage
            self.borders = nn.ModuleDict({name: stored(conv, True) for name, conv in self.borders.items()})
            self.conv = tail.conv if hasattr(tail, "conv") else stored(self.conv, False)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = self.quant_in(x)
        out = self.conv(x)
        top, bottom = self.rows(image)
        left, right = self.columns(image)
        for name, masks in (("top", top), ("bottom", bottom)):
            line = outermost(x, masks, 2)
            delta = self.borders[name](line)
            delta = delta + self.borders[f"{name}_left"](line) * left[0]
            delta = delta + self.borders[f"{name}_right"](line) * right[0]
            out = out + delta * masks[0]
        for name, masks in (("left", left), ("right", right)):
            out = out + self.borders[name](outermost(x, masks, 3)) * masks[0]
        return F.pixel_shuffle(out, self.scale)


class Masks(nn.Module):
    """Masks of a picture's first and last ``depth`` rows (dim 2: (N, 1, H, 1)) or columns, outermost first.

    In a column of ones with zeros around it, a pixel differs from the one before it in the first row only.
    The ones are made from the picture, whose values are small: zero times an infinite mean of features would
    be NaN.

    Two channels of ones, and no subtractions, for chaiNNer. It can't read an NCNN file in which a layer has
    an odd number of weights, and its optimiser takes such a subtraction for a constant.
    """

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.across = 5 - dim
        self.ones = convolution(torch.zeros(2, channels, 1, 1), torch.ones(2))
        self.first, self.last = nn.ModuleList(), nn.ModuleList()
        for line in range(depth):
            kernel = torch.zeros(1, 2, 2 * line + 3)
            kernel[0, 0, :2] = torch.tensor([-1.0, 1.0])
            for convs, each in ((self.first, kernel), (self.last, kernel.flip(2))):
                convs.append(convolution(each.unsqueeze(5 - dim)))

    def forward(self, image: Tensor) -> List[List[Tensor]]:
        ones = self.ones(image.mean(self.across, keepdim=True))
        return [[conv(ones) for conv in convs] for convs in (self.first, self.last)]


def outermost(x: Tensor, masks: List[Tensor], dim: int) -> Tensor:
    """The rows (dim 2) or columns (dim 3) under the masks, side by side as channels."""
    lines = [(x * mask).sum(dim, keepdim=True) for mask in masks]
    return torch.cat(lines, 1) if len(lines) > 1 else lines[0]


def along_line(name: str, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """One of CollapsedTail's corrections as a convolution of what ``outermost`` gives."""
    row, column = BORDERS[name]
    dim, side = (2, row) if row else (3, column)
    lines = weight.unbind(dim)
    weight = torch.cat(lines if side < 0 else lines[::-1], 1).unsqueeze(dim)
    if row and column:  # a corner's kernel begins or ends at its pixel: centre it
        missing = weight.shape[3] - 1
        weight = F.pad(weight, (missing, 0) if column < 0 else (0, missing))
    return convolution(weight, bias)


def convolution(weight: Tensor, bias: Optional[Tensor] = None) -> nn.Conv2d:
    """A module of this weight that keeps the size."""
    outputs, inputs, *kernel = weight.shape
    options: Any = {"padding": [size // 2 for size in kernel], "bias": bias is not None}
    made = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, **options)
    made.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return made


def stored(conv: nn.Module, int8: bool) -> nn.Module:
    """A convolution with its weight held as int8 or in half precision."""
    from aether_quant import QuantConv2d, StoredConv2d

    assert isinstance(conv, nn.Conv2d)
    if int8:
        quantised = QuantConv2d.like(conv)
        quantised.load_state_dict(conv.state_dict())
        conv = quantised
    return StoredConv2d(conv)
