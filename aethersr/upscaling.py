"""Whole pictures, and many of them: transparency, textures, too little memory, reading and writing.

While the network computes one picture, the next is read and the last are written.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Iterable, Iterator, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aethersr.errors import UserError, first_line, is_out_of_memory
from aethersr.files import Together
from aethersr.jobs import Job
from aethersr.network import Network
from aethersr.picture import FORMATS, Picture
from aethersr.tiling import upscale_tiled

_RADII = (1, 2, 4, 8, 16, 32, 64)
_VISIBLE = 16 / 255  # colours of a lower alpha are not trusted: few of their bits mean anything
_IN_WORK = 2**28  # bytes that may wait to be written
_SMALLEST_TILE = 32


def _planes(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)[None]


def _spread(image: Tensor) -> Tensor:
    """Colours of what is hidden become those of what is visible near by; alpha, the last channel, stays.

    Else what lies under transparency, most often black, would bleed into the visible edge. Every step is the
    same at each pixel, so tiles and wrapped pictures come out alike.
    """
    colours, alpha = image[:, :-1], image[:, -1:]
    trust = (alpha / _VISIBLE).clamp(max=1)
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


def spread_colours(pixels: np.ndarray, wrap: str = "") -> np.ndarray:
    """Pixels (H, W, C) whose last channel is alpha, with colours for what is fully or nearly transparent."""
    return upscale_tiled(_spread, _planes(pixels), 1024, sum(_RADII), wrap=wrap)[0].permute(1, 2, 0).numpy()


def of_any_channels(
    net: Callable[[Tensor], Tensor], in_chans: int, alpha: bool
) -> Callable[[Tensor], Tensor]:
    """``net`` for pictures with other channels: each of those goes through alone, as a grey picture.

    Transparency too, so that its edges are as sharp as those of the colours beside it.
    """

    def alone(x: Tensor) -> Tensor:
        grey = x.reshape(-1, 1, *x.shape[2:]).expand(-1, in_chans, -1, -1)
        out = net(grey).mean(1)
        return out.view(*x.shape[:2], *out.shape[1:])

    def run(x: Tensor) -> Tensor:
        colours = x.shape[1] - alpha
        out = (net if colours == in_chans else alone)(x[:, :colours])
        return torch.cat([out, alone(x[:, colours:])], 1) if alpha else out

    return run


def upscale_picture(
    picture: Picture,
    network: Network,
    tile: int,
    overlap: int,
    wrap: str = "",
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda tiles, count: tiles,
) -> Picture:
    """A picture of any size and channels, upscaled. Opaque ones cost no work for their transparency."""
    pixels, even = picture.pixels, None
    if picture.alpha and pixels[..., -1].min() == pixels[..., -1].max():
        pixels, even = pixels[..., :-1], pixels[0, 0, -1]
    see_through = picture.alpha and even is None
    if see_through:
        pixels = spread_colours(pixels, wrap)
    height, width, channels = pixels.shape
    shape = (height * network.scale, width * network.scale, channels + (even is not None))
    upscaled = np.empty(shape, pixels.dtype)
    if even is not None:
        upscaled[..., -1] = even
    run = of_any_channels(network, network.in_chans, see_through)
    out = _planes(upscaled[..., :channels])
    upscale_tiled(run, _planes(pixels), tile, overlap, out, progress, network.size, wrap)
    return picture.with_pixels(upscaled)


class Result(NamedTuple):
    """What became of a job: the upscaled (width, height), or why there is none."""

    job: Job
    size: Tuple[int, int]
    problem: str = ""


class Upscaler:
    """Upscales files. ``tile`` becomes smaller where memory runs out."""

    def __init__(
        self,
        network: Network,
        tile: int,
        overlap: int,
        wrap: str = "",
        overwrite: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.network, self.tile, self.overlap, self.wrap = network, tile, overlap, wrap
        self.overwrite, self.say = overwrite, say

    def run(self, jobs: Iterable[Job], tick: Callable[[float], None] = lambda part: None) -> Iterator[Result]:
        """The jobs' results in their order.

        ``tick`` is told which part of the picture in work is done. When the caller stops early, what is being
        written is finished first.
        """
        waiting = iter(jobs)
        reading: Deque[Tuple[Job, Future[Picture]]] = deque()
        writing: Deque[Tuple[Result, Future[None], int]] = deque()
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(2) as writer:
            while True:
                while len(reading) < 2:
                    job = next(waiting, None)
                    if job is None:
                        break
                    reading.append((job, reader.submit(_read, job)))
                if not reading:
                    break
                job, future = reading.popleft()
                try:
                    upscaled = self._upscale(future.result(), writing, tick)
                except Exception as error:
                    writing.append((Result(job, (0, 0), self._reason(job, error)), _done(), 0))
                else:
                    height, width, _ = upscaled.pixels.shape
                    done = writer.submit(_write, job, upscaled, self.overwrite)
                    writing.append((Result(job, (width, height)), done, upscaled.pixels.nbytes))
                while writing and (writing[0][1].done() or _too_much(writing)):
                    yield self._finished(*writing.popleft())
            while writing:
                yield self._finished(*writing.popleft())

    def _upscale(
        self,
        picture: Picture,
        writing: Deque[Tuple[Result, Future[None], int]],
        tick: Callable[[float], None],
    ) -> Picture:
        """Halves the tile and tries again while memory is short and that may help."""

        def ticking(tiles: Iterator[Any], count: int) -> Iterator[Any]:
            for number, tile in enumerate(tiles):
                tick(number / count)
                yield tile

        while True:
            try:
                return upscale_picture(picture, self.network, self.tile, self.overlap, self.wrap, ticking)
            except Exception as error:
                smaller = min(self.tile, max(picture.pixels.shape[:2])) // 2
                if not is_out_of_memory(error) or self.network.size or smaller < _SMALLEST_TILE:
                    raise
            for _, future, _ in writing:  # their pictures' memory too
                future.exception()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.say(f"Not enough memory for tiles of {self.tile} pixels; going on with {smaller}.")
            self.tile = smaller

    def _finished(self, result: Result, future: Future[None], _: int) -> Result:
        error = future.exception()
        return result if error is None else result._replace(problem=self._reason(result.job, error))

    def _reason(self, job: Job, error: BaseException) -> str:
        """What to say of an error that concerns one picture; others are raised."""
        if is_out_of_memory(error):
            remedy = f"pass a smaller --tile than {self.tile}, or a smaller picture"
            return f"{job.source}: there is not enough memory; {remedy}."
        if isinstance(error, ValueError):
            return f"{job.source}: {error}"
        if isinstance(error, UserError):
            return str(error)
        raise error


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _too_much(writing: Deque[Tuple[Result, Future[None], int]]) -> bool:
    return len(writing) > 4 or sum(size for _, _, size in writing) > _IN_WORK


def _read(job: Job) -> Picture:
    picture = Picture.read(job.source)
    picture.check_fits(job.source, job.target)  # before the network's work
    return picture


def _write(job: Job, picture: Picture, overwrite: bool) -> None:
    target = job.target
    try:
        content = picture.encode(FORMATS[target.suffix.lower()])
        target.parent.mkdir(parents=True, exist_ok=True)
        with Together() as files:
            files.part(target).write_bytes(content)
            if os.path.lexists(target) and not overwrite:  # since the start
                raise UserError(f"{target} exists; pass --overwrite to replace it, or another --output.")
            files.commit()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{target} can't be written: {reason}; free space or pass another --output."
        ) from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # most often more pixels than the format allows
        remedy = "try an --output that ends in .png or .tif"
        raise UserError(f"{target} can't be written: {first_line(error)}; {remedy}.") from None
