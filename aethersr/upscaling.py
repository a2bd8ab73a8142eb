"""Upscales picture files. While the network computes one, others are read and written."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Callable, Deque, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aethersr.errors import UserError, first_line, is_out_of_memory
from aethersr.files import Together, unwritable
from aethersr.jobs import Job
from aethersr.network import Network
from aethersr.picture import FORMATS, OTHER_FORMAT, Picture
from aethersr.tiling import upscale_tiled

_RADII = (1, 2, 4, 8, 16, 32, 64)
_FAINT = 8 / 255  # colours below this alpha are not trusted; trust grows up to twice this alpha
_SMALLEST_TILE = 32
WORKERS = 4  # pictures in progress at once; the network computes one of them
_LARGE = 2**24  # values; at most two larger pictures are upscaled and written at once


def _planes(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)[None]


def _spread(image: Tensor) -> Tensor:
    """Give hidden pixels the colours of visible ones nearby; alpha, the last channel, stays the same.

    Otherwise the hidden colour, usually black, would bleed into the visible edge.
    """
    colours, alpha = image[:, :-1], image[:, -1:]
    trust = (alpha / _FAINT - 1).clamp(0, 1)
    known, given = trust, trust * colours
    for radius in _RADII:
        side = 2 * radius + 1
        near = torch.cat([given, known], 1)
        near = F.avg_pool2d(near, (side, 1), 1, (radius, 0))
        near = F.avg_pool2d(near, (1, side), 1, (0, radius))
        weight = near[:, -1:]
        found = (weight > 1e-6) & (known < 1)
        filled = given + (1 - known) * near[:, :-1] / weight.clamp(min=1e-6)
        given = torch.where(found, filled, given)
        known = torch.where(found, torch.ones_like(known), known)
    return torch.cat([torch.where(known > 0, given, colours), alpha], 1)


def _range(x: Tensor, scale: int) -> Tuple[Tensor, Tensor]:
    """The lowest and highest of the 5x5 pixels round each pixel, enlarged by ``scale``."""
    lowest, highest = -F.max_pool2d(-x, 5, 1, 2), F.max_pool2d(x, 5, 1, 2)
    return F.interpolate(lowest, scale_factor=float(scale)), F.interpolate(highest, scale_factor=float(scale))


def through_transparency(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``net`` for pictures (N, C + 1, H, W) whose last channel is alpha.

    The network sees the picture over black and over white. Of all pictures with transparency, the result is
    the one that comes nearest to both at its worst channel (Smith and Blinn, Blue Screen Matting, 1996, for
    a network's outputs, which fit no alpha exactly). Alpha stays within that of the 5x5 pixels round it: none
    can darken or brighten a background by a part of its difference from the object, as rings do.
    """

    def run(image: Tensor) -> Tensor:
        colours, clear = image[:, :-1] * image[:, -1:], 1 - image[:, -1:]
        black, white = (net(colours + shade * clear).float() for shade in (0, 1))
        checked = 0 * (black + white)  # NaN where an output is not finite, which clamping would hide
        black, white, image = black.clamp(0, 1), white.clamp(0, 1), image.to(black)
        lowest, highest = _range(image, black.shape[-1] // image.shape[-1])
        least, most = lowest[:, -1:], highest[:, -1:]
        # With more alpha, the channel with the largest difference gets worse. The one with the smallest gets
        # better, and the one that needs a colour beyond 0 or 1. The least error is where the lines cross.
        difference = white - black
        smallest, largest = difference.amin(1, keepdim=True), difference.amax(1, keepdim=True)
        needed = torch.maximum(black, 1 - white).amax(1, keepdim=True)
        alpha = torch.maximum(1 - (smallest + largest) / 2, (2 * needed + 1 - largest) / 3).clamp(0, 1)
        alpha = alpha.clamp(least, most)
        # Where alpha is small, a small error of the network would become a large error of the colour.
        given = (black + white - 1 + alpha) / (2 * alpha).clamp(min=1e-4)
        given = given.clamp(lowest[:, :-1] - least, highest[:, :-1] + least)
        return torch.cat([given + checked, alpha], 1)

    return run


def upscale_picture(
    picture: Picture,
    network: Network,
    tile: int,
    overlap: int,
    wrap: str = "",
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda tiles, count: tiles,
    compute: Optional[Callable[[Tensor], Tensor]] = None,
) -> Picture:
    """A picture of any size and channels, upscaled, by ``compute`` if it is given. Constant alpha is free."""
    pixels, even, net = picture.pixels, None, compute or network
    if pixels.dtype == np.uint16 and not hasattr(torch, "uint16"):
        raise UserError("pictures of 16 bits need PyTorch 2.3 or newer; update it, or pass 8 bits (--input).")

    def of_any_channels(x: Tensor) -> Tensor:
        if x.shape[1] == network.in_chans:
            return net(x)
        grey = x.reshape(-1, 1, *x.shape[2:]).expand(-1, network.in_chans, -1, -1)  # each channel alone
        out = net(grey).mean(1)
        return out.view(*x.shape[:2], *out.shape[1:])

    if picture.alpha and pixels[..., -1].min() == pixels[..., -1].max():
        pixels, even = pixels[..., :-1], pixels[0, 0, -1]
    planes, see_through = _planes(pixels), picture.alpha and even is None
    if see_through:
        planes = upscale_tiled(_spread, planes, 1024, sum(_RADII), wrap=wrap)
    run = through_transparency(of_any_channels) if see_through else of_any_channels
    height, width, channels = pixels.shape
    shape = (height * network.scale, width * network.scale, channels + (even is not None))
    upscaled = np.empty(shape, pixels.dtype)
    if even is not None:
        upscaled[..., -1] = even
    upscale_tiled(run, planes, tile, overlap, _planes(upscaled[..., :channels]), progress, network.size, wrap)
    return replace(picture, pixels=upscaled)


class Result(NamedTuple):
    """A job's result: the upscaled (width, height) and what its file lacks of the notes; or the problem."""

    job: Job
    size: Tuple[int, int] = (0, 0)
    lost: Sequence[str] = ()
    problem: str = ""


Tick = Callable[[int, int], None]


@dataclass
class Upscaler:
    """Upscales files. Makes ``tile`` smaller when memory runs out."""

    network: Network
    tile: int
    overlap: int
    wrap: str = ""
    overwrite: bool = False
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._large = threading.Semaphore(2)

    def run(self, jobs: Iterable[Job], tick: Tick = lambda tiles, count: None) -> Iterator[Result]:
        """The jobs' results, in order. If the caller stops early, what is in progress is finished first.

        ``tick`` is called with how many more of a picture's tiles are done, and their number.
        """
        waiting, stopped = iter(jobs), threading.Event()
        working: Deque[Tuple[Job, Future[Result]]] = deque()

        def unless_stopped(image: Tensor) -> Tensor:
            if stopped.is_set():
                raise InterruptedError
            return self.network(image)

        def compute(image: Tensor) -> Tensor:
            # In the network's own thread. Not with a lock: on busy processors, handing a lock to the next
            # thread takes time in which the network is idle.
            return thread.submit(unless_stopped, image).result()

        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(WORKERS) as pool:
            try:
                while True:
                    for job in islice(waiting, 2 * WORKERS - len(working)):  # the first one may take longest
                        working.append((job, pool.submit(self._work, job, compute, tick)))
                    if not working:
                        return
                    job, future = working.popleft()
                    yield self._result(job, future)
            finally:
                stopped.set()
                for _, future in working:
                    future.cancel()

    def _work(self, job: Job, compute: Callable[[Tensor], Tensor], tick: Tick) -> Result:
        """Read, upscale and write one picture."""
        picture = Picture.read(job.source)
        picture.check_fits(job.source, job.target)  # before the network's work
        with self._large if picture.pixels.size > _LARGE else nullcontext():
            picture = self._upscale(picture, compute, tick)
            lost = _write(job, picture, self.overwrite)
        return Result(job, (picture.pixels.shape[1], picture.pixels.shape[0]), lost)

    def _upscale(self, picture: Picture, compute: Callable[[Tensor], Tensor], tick: Tick) -> Picture:
        """Halve the tile and try again as long as memory runs out and that may help."""
        done = count = 0

        def ticking(tiles: Iterator[Any], number: int) -> Iterator[Any]:
            nonlocal done, count
            done, count = 0, number
            for each in tiles:
                yield each
                done += 1
                tick(1, count)

        while True:
            tile = self.tile
            try:
                return upscale_picture(picture, self.network, tile, self.overlap, self.wrap, ticking, compute)
            except Exception as error:
                smaller = min(tile, max(picture.pixels.shape[:2])) // 2
                if not is_out_of_memory(error) or self.network.size or smaller < _SMALLEST_TILE:
                    raise
            tick(-done, count)
            with self._lock:
                torch.cuda.empty_cache()
                if smaller < self.tile:  # otherwise another thread has done it
                    self.say(f"Not enough memory for tiles of {tile} pixels; going on with {smaller}.")
                    self.tile = smaller

    def _result(self, job: Job, future: Future[Result]) -> Result:
        """Report an error that concerns one picture, raise any other."""
        try:
            return future.result()
        except UserError as error:
            return Result(job, problem=str(error))
        except Exception as error:
            problem = str(error).rstrip(".")
            remedy = "another --model, --tile or --overlap"
            if is_out_of_memory(error):
                problem = "there is not enough memory"
                remedy = f"a smaller --tile than {self.tile}, or a smaller picture"
            elif not isinstance(error, ValueError):
                raise
            return Result(job, problem=f"{job.source}: {problem}; pass {remedy}.")


def _write(job: Job, picture: Picture, overwrite: bool) -> List[str]:
    """Write the picture; names of the notes that its file can't hold."""
    target = job.target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with Together() as files:
            lost = picture.write(files.part(target), FORMATS[target.suffix.lower()])
            if os.path.lexists(target) and not overwrite:  # appeared since the start
                raise UserError(f"{target} exists; pass --overwrite to replace it, or another --output.")
            files.commit()
    except OSError as error:
        raise unwritable(target, error, "--output") from None
    except ValueError as error:  # most often more pixels than the format allows
        raise UserError(f"{target} can't be written: {first_line(error)}; {OTHER_FORMAT}.") from None
    return lost
