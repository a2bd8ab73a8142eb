"""The fused network in a form that converters accept: every weight is a convolution module's constant."""

from __future__ import annotations

import copy
from typing import Any, List, Optional, Tuple

import torch
from aether_arch import BORDERS
from torch import Tensor, nn
from torch.nn import functional as F


def for_export(network: Any) -> Any:
    """A copy of a fused or quantised network that computes the same but is easier to convert."""
    network = copy.deepcopy(network).eval()
    network.tail = ExportTail(network.tail, network.options["in_chans"])
    network.forward = lambda image: network.tail(network.features(image), image)
    network.tail.to(network.mean.dtype)
    mean = network.mean.flatten().tolist()
    if len({*mean}) == 1:  # always, since it is 0.5
        del network.mean  # a tensor would be a constant layer in ncnn
        network.mean = mean[0]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d  # the class that converters know; subclasses only matter in training
    return network


class ExportTail(nn.Module):
    """aether_arch.CollapsedTail without slices, and without weights that the graph has to rearrange.

    A mask selects the outermost line of features, another places its correction. Rows are transposed, so that
    all border kernels are columns, see aethersr.ncnn. int8 weights stay int8.
    """

    def __init__(self, tail: Any, channels: int) -> None:
        super().__init__()
        self.scale = tail.scale
        keep = stored if hasattr(tail, "top_weight_scale") else lambda conv, int8: conv
        self.conv = keep(convolution(tail.weight, tail.bias), False)
        kernels = {name: along_line(name, *tail.border(name)) for name in BORDERS}
        self.borders = nn.ModuleDict({name: keep(kernel, True) for name, kernel in kernels.items()})
        outputs, features = tail.border("left")[0].shape[:2]
        self.masks = Masks(channels, tail.depth, features, outputs)
        self.to(tail.border("left")[0].device)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        out = self.conv(x)
        rows, columns = self.masks(self.mean(image, 3)), self.masks(turned(self.mean(image, 2)))
        for name, (outermost, mask) in zip(("top", "bottom"), rows):
            line = turned(self.line(x, outermost, 2))
            delta = self.borders[name](line)
            for side, (_, corner) in zip(("left", "right"), columns):
                delta = delta + self.borders[f"{name}_{side}"](line) * corner
            out = out + turned(delta) * mask
        for name, (outermost, mask) in zip(("left", "right"), columns):
            line = self.line(x, [turned(each) for each in outermost], 3)
            out = out + self.borders[name](line) * turned(mask)
        return F.pixel_shuffle(out, self.scale)

    def mean(self, x: Tensor, dim: int) -> Tensor:
        return x.mean(dim, keepdim=True)

    def line(self, x: Tensor, masks: List[Tensor], dim: int) -> Tensor:
        """The rows (dim 2) or columns (dim 3) selected by the masks, concatenated as channels."""
        lines = [(x * mask).sum(dim, keepdim=True) for mask in masks]
        return torch.cat(lines, 1) if len(lines) > 1 else lines[0]


class Masks(nn.Module):
    """Masks of a picture's first and last rows, from one of its columns (N, channels, H, 1).

    For each edge: one (N, features, H, 1) for each of the ``depth`` outermost rows, and one of the outermost
    row (N, outputs, H, 1). They have all channels, because OpenCV 5.0 fails after products with just one.

    In a column of ones padded with zeros, only the first row differs from the pixel before it. The ones are
    made from the picture: zero times an infinite mean of features would be NaN. There are two channels of
    ones and no subtractions, because chaiNNer can't read a layer with an odd number of weights and mistakes
    such a subtraction for a constant.
    """

    def __init__(self, channels: int, depth: int, features: int, outputs: int) -> None:
        super().__init__()
        self.ones = convolution(torch.zeros(2, channels, 1, 1), torch.ones(2))
        self.first, self.last = nn.ModuleList(), nn.ModuleList()
        for line, copies in [*((line, features) for line in range(depth)), (0, outputs)]:
            kernel = torch.zeros(copies, 2, 2 * line + 3, 1)
            kernel[:, 0, :2, 0] = torch.tensor([-1.0, 1.0])
            self.first.append(convolution(kernel))
            self.last.append(convolution(kernel.flip(2)))

    def forward(self, column: Tensor) -> List[Tuple[List[Tensor], Tensor]]:
        ones = self.ones(column)
        found = [[conv(ones) for conv in convs] for convs in (self.first, self.last)]
        return [(masks[:-1], masks[-1]) for masks in found]


def turned(x: Tensor) -> Tensor:
    """Rows and columns swapped."""
    return x.transpose(2, 3)


def along_line(name: str, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """One of CollapsedTail's corrections, as a convolution of a line that is a column."""
    row, column = BORDERS[name]
    dim, side = (2, row) if row else (3, column)
    weight = torch.cat(weight.unbind(dim)[:: -1 if side > 0 else 1], 1).unsqueeze(3)
    if row and column:  # a corner's kernel starts or ends at its pixel: centre it
        missing = weight.shape[2] - 1
        weight = F.pad(weight, (0, 0, missing, 0) if column < 0 else (0, 0, 0, missing))
    return convolution(weight, bias)


def convolution(weight: Tensor, bias: Optional[Tensor] = None) -> nn.Conv2d:
    """A convolution module with this weight, padded to keep the size."""
    outputs, inputs, *kernel = weight.shape
    options: Any = {"padding": [size // 2 for size in kernel], "bias": bias is not None}
    made = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, **options)
    made.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return made


def stored(conv: Any, int8: bool) -> nn.Module:
    """A convolution whose weight is stored as int8 or in half precision."""
    from aether_quant import QuantConv2d, StoredConv2d

    return StoredConv2d(QuantConv2d.like(conv) if int8 else conv)
