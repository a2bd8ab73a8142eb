"""PSNR and SSIM as papers on super-resolution report them, of (H, W, 3) arrays of uint8 or uint16.

Papers reduce a picture with MATLAB's ``imresize`` and compare the luma. Another reduction or luma changes the
figures by tenths of a dB, so both are implemented here.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Tuple

import numpy as np
from PIL import Image

from aethersr.picture import Picture

LUMA = np.array([65.481, 128.553, 24.966]) / 255  # ITU-R BT.601, as in MATLAB's rgb2ycbcr


def read_rgb(path: Path, flag: str) -> np.ndarray:
    """A picture in front of white, (H, W, 3) uint8. Errors name ``flag``."""
    return to_8_bits(Picture.read(path, flag).rgb_on_white())


def to_8_bits(picture: np.ndarray) -> np.ndarray:
    return picture if picture.dtype == np.uint8 else (picture / 257).round().astype(np.uint8)


def luma(picture: np.ndarray, crop: int = 0) -> np.ndarray:
    """Y of YCbCr without a border, (H, W) float64 from 16 to 235, not rounded."""
    picture = picture[crop : picture.shape[0] - crop, crop : picture.shape[1] - crop]
    return 16 + picture.astype(np.float64) @ LUMA * (255 / np.iinfo(picture.dtype).max)


def crop_to_multiple(picture: np.ndarray, scale: int) -> np.ndarray:
    """``picture`` without the last rows and columns that ``scale`` doesn't divide."""
    height, width = picture.shape[:2]
    return picture[: height // scale * scale, : width // scale * scale]


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """As MATLAB's ``imresize(picture, [height, width], 'bicubic')``, but rounded once: it changes 0.01 dB."""
    rows, columns = resize_matrix(picture.shape[0], height), resize_matrix(picture.shape[1], width)
    out = np.stack([rows @ plane @ columns.T for plane in np.moveaxis(picture.astype(np.float64), 2, 0)], 2)
    return np.clip(np.floor(out + 0.5), 0, np.iinfo(picture.dtype).max).astype(picture.dtype)


def compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    """What a JPEG file of this quality (1 to 100) leaves of ``picture``."""
    file = io.BytesIO()
    Image.fromarray(to_8_bits(picture)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resize_matrix(size: int, target: int) -> np.ndarray:
    """(target, size) matrix: the weight of each old pixel in each new pixel. Borders are mirrored."""
    scale = target / size
    stretch = min(scale, 1.0)  # a reduction widens the kernel: that is the antialiasing
    centres = (np.arange(target) + 0.5) / scale - 0.5
    taps = int(np.ceil(4 / stretch)) + 2
    index = (np.floor(centres - 2 / stretch)[:, None] + np.arange(taps)).astype(int)
    # Keys' kernel with a = -0.5: https://doi.org/10.1109/TASSP.1981.1163711
    x = np.abs(stretch * (centres[:, None] - index))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weight = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    weight /= weight.sum(1, keepdims=True)
    mirrored = np.minimum(index % (2 * size), (-1 - index) % (2 * size))
    matrix = np.zeros((target, size))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), weight)
    return matrix


def psnr(truth: np.ndarray, output: np.ndarray, crop: int) -> float:
    """PSNR of the luma in dB, without a border of ``crop`` pixels; infinity for equal pictures."""
    error = float(np.mean((luma(truth, crop) - luma(output, crop)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


WINDOW = 11
_GAUSSIAN = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * 1.5**2))
_GAUSSIAN /= _GAUSSIAN.sum()


def ssim(truth: np.ndarray, output: np.ndarray, crop: int) -> float:
    """SSIM of the luma, without a border of ``crop`` pixels: 11x11 Gaussian windows inside the picture.

    Reference: https://doi.org/10.1109/TIP.2003.819861
    """

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            length = x.shape[axis] - WINDOW + 1
            x = sum(w * x.take(np.arange(k, k + length), axis) for k, w in enumerate(_GAUSSIAN))
        return x

    a, b = luma(truth, crop), luma(output, crop)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def quality(truth: np.ndarray, output: np.ndarray, crop: int) -> Tuple[float, float]:
    """PSNR in dB, and SSIM. ValueError: the sizes differ, or are too small to compare."""
    (height, width), (other_height, other_width) = truth.shape[:2], output.shape[:2]
    if truth.shape != output.shape:
        words = "a picture of {}x{} can't be compared with one of {}x{}"
        raise ValueError(words.format(other_width, other_height, width, height))
    least = WINDOW + 2 * crop
    if min(height, width) < least:
        raise ValueError(f"{width}x{height} is too small to compare; both sides need {least} pixels")
    return psnr(truth, output, crop), ssim(truth, output, crop)
