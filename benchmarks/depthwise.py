"""Other ways to compute the 11x11 depthwise convolution, for GPUs on which the library's own is slow."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Dict

import torch
from torch import Tensor
from torch.nn import functional as F

Convolve = Callable[[Tensor], Tensor]  # (N, C, H, W) -> (N, C, H, W)


def own(weight: Tensor) -> Convolve:
    """PyTorch's."""
    return lambda x: F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))


def small_dense_groups(weight: Tensor) -> Convolve:
    """Groups of up to eight channels with zeros between them: wasteful, but tensor cores can do it."""
    channels, _, *size = weight.shape
    together = math.gcd(channels, 8)
    dense = weight.new_zeros(channels, together, *size)
    index = torch.arange(channels, device=weight.device)
    dense[index, index % together] = weight[:, 0]
    return lambda x: F.conv2d(x, dense, padding=size[0] // 2, groups=channels // together)


def rows(weight: Tensor) -> Convolve:
    """A sum over the kernel's rows: eleven 1x11 convolutions of shifted pictures."""
    half = weight.shape[-1] // 2
    kernels = [weight[:, :, k : k + 1].contiguous() for k in range(weight.shape[-1])]

    def convolve(x: Tensor) -> Tensor:
        padded, out = F.pad(x, (0, 0, half, half)), torch.zeros_like(x)
        for k, kernel in enumerate(kernels):
            shifted = padded[:, :, k : k + x.shape[2]]
            out += F.conv2d(shifted, kernel, padding=(0, half), groups=len(kernel))
        return out

    return convolve


def fourier(weight: Tensor) -> Convolve:
    """In the frequency domain, in float32."""
    half, flipped = weight.shape[-1] // 2, weight[:, 0].float().flip(1, 2)

    def convolve(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        size = [height + 2 * half, width + 2 * half]
        spectrum = torch.fft.rfft2(x.float(), s=size) * torch.fft.rfft2(flipped, s=size)
        out = torch.fft.irfft2(spectrum, s=size)
        return out[:, :, half : half + height, half : half + width].to(x.dtype)

    return convolve


@functools.lru_cache(maxsize=None)
def _triton_kernel() -> Any:
    """For channels_last: neighbouring threads compute neighbouring channels, so they read whole lines.

    Raises:
        ImportError: triton is not installed.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        x, weight, out, height, width, channels,
        K: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)  # of all images, one under the other
        column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        image, y = row // height, row % height
        alive = channel < channels
        total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
        for i in range(K):
            source_y = y + i - K // 2 + tl.zeros((PIXELS,), dtype=tl.int32)
            inside_y = (source_y >= 0) & (source_y < height)
            line = (image * height + source_y) * width
            for j in range(K):
                source_x = column + j - K // 2
                inside = inside_y & (source_x >= 0) & (source_x < width)
                at = (line + source_x)[:, None] * channels + channel[None, :]
                value = tl.load(x + at, mask=inside[:, None] & alive[None, :], other=0.0)
                tap = tl.load(weight + (i * K + j) * channels + channel, mask=alive, other=0.0)
                total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
        at = (row * width + column)[:, None] * channels + channel[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(column < width)[:, None] & alive[None, :])

    return kernel


def triton_channels_last(weight: Tensor) -> Convolve:
    """Our own kernel, which computes in channels_last whatever the input's layout."""
    kernel, taps = _triton_kernel(), weight.flatten(1).t().contiguous()
    pixels, together = 16, 32  # of one program

    def convolve(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        grid = (batch * height, -(-width // pixels), -(-channels // together))
        sizes = {"K": weight.shape[-1], "PIXELS": pixels, "CHANNELS": together}
        kernel[grid](x, taps, out, height, width, channels, **sizes)
        return out

    return convolve


WAYS: Dict[str, Callable[[Tensor], Convolve]] = {
    "own": own,
    "small dense groups": small_dense_groups,
    "rows": rows,
    "Fourier": fourier,
    "Triton": triton_channels_last,
}
