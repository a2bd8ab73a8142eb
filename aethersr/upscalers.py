"""What is compared: pictures, and networks in files of every kind as functions from pictures to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List, Tuple

import torch

from aethersr.errors import UserError

KINDS = (".png", ".bmp", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
TILE = 1024  # larger low-resolution pictures are cut into tiles; the result is the same without attention
Upscaler = Callable[[Any], Any]  # (H, W, 3) uint8 -> (scale * H, scale * W, 3) uint8


def find_pictures(path: Path, flag: str) -> List[Path]:
    """The pictures in a folder, by name; a picture's own path is one. Errors name ``flag``."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; pass a folder of pictures, or a picture ({flag}).")
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in KINDS)
    if not found:
        raise UserError(f"{path} holds no picture ({', '.join(KINDS)}); pass another folder ({flag}).")
    return found


def read_rgb(path: Path, flag: str) -> Any:
    """A picture of 8 bits a channel, (H, W, 3) uint8, in front of white. Errors name ``flag``."""
    import numpy as np
    from PIL import Image

    from aethersr.picture import opaque, readable

    with readable(path, flag), Image.open(path) as picture:
        return np.asarray(opaque(picture))


def open_upscaler(path: Path, device: str, flag: str) -> Tuple[Upscaler, int]:
    """The network in a file, and its scale. Errors name ``flag``, with which the file was passed."""
    from aethersr.network import load_network
    from aethersr.tiling import upscale_tiled

    if path.suffix.lower() == ".param":
        run, channels = ncnn_network(path, flag)
        try:
            scale = run(torch.zeros(1, channels, 8, 8)).shape[-1] // 8
        except ValueError as error:
            raise UserError(f"{path}: {error}; pass a file that aether-fuse wrote ({flag}).") from None
        return of_pictures(run, channels), scale
    try:
        net = load_network(path, device, fp16=False)
    except UserError as error:
        raise UserError(str(error).replace("--model", flag)) from None
    if net.in_chans not in (1, 3):
        raise UserError(f"{path} takes {net.in_chans} channels; pass a network for 1 or 3 ({flag}).")
    overlap = net.reach if net.size is None else min(net.reach, min(net.size) // 4)  # as aether-upscale
    return of_pictures(lambda x: upscale_tiled(net, x, TILE, overlap, size=net.size), net.in_chans), net.scale


def ncnn_network(path: Path, flag: str) -> Tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """The network in an NCNN file, and its channels: 1 or 3."""
    from aethersr.ncnn import channels_of, run

    try:
        import ncnn
    except ImportError:
        raise UserError(
            f"{path} needs the package ncnn: pip install ncnn, or leave it out ({flag})."
        ) from None
    net = ncnn.Net()
    weights = path.with_suffix(".bin")
    if (
        not (path.is_file() and weights.is_file())
        or net.load_param(str(path))
        or net.load_model(str(weights))
    ):
        raise UserError(
            f"{path} and {weights.name} are not the two files of an NCNN network; pass others ({flag})."
        )
    channels = channels_of(path)
    if channels not in (1, 3):
        raise UserError(f"{path} takes {channels or 'unknown'} channels; pass a network for 1 or 3 ({flag}).")
    return lambda x: run(net, x), channels


def of_pictures(net: Callable[[torch.Tensor], torch.Tensor], channels: int) -> Upscaler:
    def upscale(picture: Any) -> Any:
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        x = x.reshape(-1, channels, *x.shape[2:])  # a greyscale network sees each colour separately
        out = torch.cat([net(each) for each in x.split(1)])
        out = out.reshape(3, *out.shape[2:]).permute(1, 2, 0)
        return (out.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    return upscale
