"""Compares two networks that should compute the same: the largest difference and, on request, the time."""

from __future__ import annotations

import functools
import math
import time
from typing import Mapping

import torch
from aether_arch import AetherBase

from aethersr.timing import Comparison, interleaved

ALLOWED_DIFFERENCE = 1e-3  # of one step of 1/255
TIMED = 96  # pixels of a side of the picture that is timed


@torch.no_grad()
def largest_difference(net: AetherBase, other: AetherBase, device: str = "cpu") -> float:
    """Largest difference in float64, in steps of 1/255 (relative to the largest output if that is above 1).

    Infinity if any value is not finite. Afterwards both networks are in float64 and evaluation mode on
    ``device``.
    """
    chans = net.options["in_chans"]
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 1), (3, 2), (17, 31), (25, 12))
    images = [torch.rand(1, chans, *size, generator=generator, dtype=torch.float64) for size in sizes]
    ramp = torch.linspace(0, 1, 21).view(-1, 1) * torch.linspace(0, 1, 19)
    images.append(ramp.double().expand(1, chans, 21, 19))
    net, other = net.double().eval().to(device), other.double().eval().to(device)
    worst = 0.0
    for image in images:
        expected, output = net(image.to(device)), other(image.to(device))
        difference = float((output - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference * 255)
    return worst


@torch.no_grad()
def compare_times(nets: Mapping[str, AetherBase], device: str = "cpu") -> Comparison:
    """Times for one float32 picture of TIMED x TIMED pixels; on a CPU the computing time of one thread.

    Afterwards the networks are in float32 and channels_last on ``device``.
    """
    image = torch.rand(1, next(iter(nets.values())).options["in_chans"], TIMED, TIMED, device=device)
    for net in nets.values():
        net.float().eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls = {name: functools.partial(net, image) for name, net in nets.items()}
    if device == "cuda":
        return interleaved(calls, wait=torch.cuda.synchronize)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return interleaved(calls, clock=time.process_time)  # so that other work hardly counts
    finally:
        torch.set_num_threads(threads)
