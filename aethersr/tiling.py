"""Pictures of any size through a network that sees one tile at a time."""

from __future__ import annotations

import math
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
from aether_arch import AetherBase
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = {torch.uint8: 255, getattr(torch, "uint16", None): 65535}  # PyTorch before 2.3 has no uint16
# With tiles of 512 it costs at most 1.25 times the work. Trained networks without channel attention stay
# within half a step of 1/255 of a single call (tests/test_tiling.py).
SHORT_OVERLAP = 28
Network = Callable[[Tensor], Tensor]
Cut = Tuple[int, int, int, int]  # begin and end of a tile, then of the part that the network sees


def receptive_field(net: AetherBase) -> int:
    """How far an input pixel may lie and still change an output pixel, channel attention aside."""
    block = net.options["lk_kernel"] // 2 + (3 if net.options["use_spatial_attn"] else 0)
    # The first and the two last 3x3, the blocks between them, the upsampling as one 5x5.
    return 1 + sum(net.options["depths"]) * block + 1 + 1 + 2


def _cuts(length: int, tile: int, overlap: int, wrap: bool = False) -> List[Cut]:
    """Cut into equal parts of at most ``tile``. Unless it wraps, a picture's border stays a border."""
    count = math.ceil(length / tile)
    edges = [length * k // count for k in range(count + 1)]
    cuts = [(begin, end, begin - overlap, end + overlap) for begin, end in zip(edges, edges[1:])]
    return cuts if wrap else [(a, b, max(0, begin), min(length, end)) for a, b, begin, end in cuts]


def _fixed_cuts(length: int, tile: int, overlap: int, wrap: bool = False) -> List[Cut]:
    """The same for a network that takes exactly ``tile`` pixels: tiles lie inside, unless it wraps."""
    if wrap:
        cuts = _cuts(length, tile - 2 * overlap, overlap, wrap)
        return [(begin, end, seen, seen + tile) for begin, end, seen, _ in cuts]
    if length <= tile:
        return [(0, length, 0, length)]
    count = math.ceil((length - 2 * overlap) / (tile - 2 * overlap))
    begins = [(length - tile) * k // (count - 1) for k in range(count)]
    middles = [(begin + tile + after) // 2 for begin, after in zip(begins, begins[1:])]  # of what two share
    edges = [0, *middles, length]
    return [(edge, end, begin, begin + tile) for edge, end, begin in zip(edges, edges[1:], begins)]


def _part(image: Tensor, dim: int, begin: int, end: int) -> Tensor:
    """A part along one axis; beyond its ends the picture repeats."""
    length = image.shape[dim]
    if begin >= 0 and end <= length:
        return image.narrow(dim, begin, end - begin)
    return image.index_select(dim, torch.arange(begin, end, device=image.device) % length)


@torch.no_grad()
def upscale_tiled(
    net: Network,
    image: Tensor,
    tile: int = 512,
    overlap: Optional[int] = None,
    out: Optional[Tensor] = None,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda tiles, count: tiles,
    size: Optional[Tuple[int, int]] = None,
    wrap: str = "",
) -> Tensor:
    """Upscale a picture of any size tile by tile: (N, C, H, W) -> (N, C, scale * H, scale * W).

    With the default overlap there are no seams: the result equals a single call, up to rounding. With channel
    attention (aether_medium, aether_large), which averages over each tile, it differs slightly.

    Args:
        net: an AetherNet of any form in evaluation mode, or any function from a batch to its upscaled batch.
        image: floats in [0, 1], or uint8 or uint16 over their whole range, on any device.
        tile: largest height and width of a tile in input pixels, without overlap.
        overlap: margin round each tile that the network also sees, in input pixels. Default: the receptive
            field of an AetherNet. Less is faster and may leave seams, invisible ones with SHORT_OVERLAP.
        out: tensor to write to and return, for instance over a numpy.memmap, with image's dtype. Default: a
            new one. Integers are rounded.
        progress: wraps the iterator over tiles; its second argument is their number.
        size: (height, width) of the only input that the network takes; ``tile`` is ignored then. Smaller
            pictures are padded to the right and below with their edge pixels.
        wrap: "x", "y" or "xy": the picture is a texture that repeats along these axes.

    Raises:
        ValueError: an argument is impossible, the network is in training mode, or its output is not finite.
    """
    parts = net.modules() if isinstance(net, nn.Module) else ()
    if any(isinstance(part, AetherBase) and part.training for part in parts):
        raise ValueError("the network is in training mode, where tiles would change it; call net.eval().")
    if overlap is None:
        if not isinstance(net, AetherBase):
            raise ValueError("the network is no AetherNet; pass its receptive field as the overlap.")
        overlap = receptive_field(net)
    if tile < 1 or overlap < 0 or wrap not in ("", "x", "y", "xy"):
        found = f"tile={tile}, overlap={overlap} and wrap={wrap!r} are not possible"
        raise ValueError(f"{found}; expected tile >= 1, overlap >= 0 and wrap '', 'x', 'y' or 'xy'.")
    if image.dim() != 4 or image.numel() == 0 or not (image.is_floating_point() or image.dtype in LEVELS):
        found = f"image {tuple(image.shape)} {image.dtype} is not possible"
        raise ValueError(f"{found}; expected (N, C, H, W), floats, uint8 or uint16.")
    axes = list(zip(image.shape[2:], size or (0, 0), ("y" in wrap, "x" in wrap)))  # rows, then columns
    if size is not None and any(2 * overlap >= side and (side < length or on) for length, side, on in axes):
        found = f"overlap={overlap} leaves nothing of tiles of {size[1]}x{size[0]}"
        raise ValueError(f"{found}; expected {(min(size) - 1) // 2} or less.")
    rows, columns = (
        _cuts(length, tile, overlap, on) if size is None else _fixed_cuts(length, side, overlap, on)
        for length, side, on in axes
    )
    like = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    tiles = ((row, column) for row in rows for column in columns)
    for (top, bottom, y0, y1), (left, right, x0, x1) in progress(tiles, len(rows) * len(columns)):
        crop = _part(_part(image, 2, y0, y1), 3, x0, x1)
        crop = crop if like is None else crop.to(like.device)
        if image.dtype in LEVELS:
            crop = crop.float() / LEVELS[image.dtype]
        if size is not None:
            crop = F.pad(crop, (0, size[1] - crop.shape[3], 0, size[0] - crop.shape[2]), "replicate")
        result = net(crop if like is None else crop.to(like.dtype))
        scale = result.shape[-1] // crop.shape[-1]
        result = result[..., (top - y0) * scale : (bottom - y0) * scale, :]
        result = result[..., (left - x0) * scale : (right - x0) * scale]
        if not all(bool(value.isfinite()) for value in torch.aminmax(result)):  # faster than isfinite on all
            words = "half precision is too coarse for it, or its weights are broken"
            raise ValueError(f"the network's output is not finite ({words}).")
        if image.dtype in LEVELS:
            result = (result.float() * LEVELS[image.dtype]).clamp_(0, LEVELS[image.dtype]).round_()
        if out is None:
            shape = (*result.shape[:2], image.shape[2] * scale, image.shape[3] * scale)
            out = torch.empty(shape, dtype=image.dtype, device=image.device)
        place = out[:, :, top * scale : bottom * scale, left * scale : right * scale]
        place.copy_(result.to(out.device, out.dtype))
    assert out is not None  # there is at least one tile
    return out
