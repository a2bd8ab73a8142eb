"""Reads and writes pictures: bits, transparency, and the notes beside the pixels, such as colour profiles.

libvips does it. Done here: what it drops of the notes (aethersr.notes), and BMP, with Pillow.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List

os.environ.setdefault("VIPS_WARNING", "0")  # else libvips prints lines about harmless defects

import numpy as np
from PIL import BmpImagePlugin, Image

from aethersr import notes
from aethersr.errors import UserError, first_line
from aethersr.folders import FORMATS, KINDS

try:
    import pyvips
except (ImportError, OSError):  # OSError: libvips itself is missing
    raise ImportError(name="pyvips pyvips-binary") from None

SAVE_OPTIONS: Dict[str, Dict[str, Any]] = {
    "PNG": {"compression": 2, "filter": "up"},  # a network on a card must not wait for it
    "JPEG": {"Q": 95, "subsample_mode": "off"},
    "WEBP": {"Q": 95},
    "TIFF": {"compression": "deflate", "predictor": "horizontal", "resunit": "inch"},
    "AVIF": {"Q": 90, "subsample_mode": "off", "effort": 0},  # more effort takes minutes
}
OTHER_FORMAT = "pass --format png, or an --output that ends in .png or .tif"
MOST_PIXELS = 2**30
_BIG = 2**32 - 2**27  # bytes that may not fit into a TIFF of 4 GiB
pyvips.cache_set_max(0)  # else a file that has changed is not read again


@dataclass
class Picture:
    """Upright pixels (H, W, C) in uint8 or uint16; ``alpha``: the last channel is transparency."""

    pixels: np.ndarray
    alpha: bool = False
    notes: notes.Notes = field(default_factory=dict)

    def rgb_on_white(self) -> np.ndarray:
        """(H, W, 3) with as many bits, in front of white."""
        colours = self.pixels
        if self.alpha:
            top = np.iinfo(colours.dtype).max
            share = colours[..., -1:] / top
            colours = (colours[..., :-1] * share + top * (1 - share)).round().astype(colours.dtype)
        return np.broadcast_to(colours, (*colours.shape[:2], 3))

    @classmethod
    def read(cls, path: Path, flag: str = "--input") -> Picture:
        """The picture in a file. UserError, with the path's ``flag``: it is no still one of 8 or 16 bits."""
        try:
            content = path.read_bytes()  # read once, since the file may change
            if not content:
                raise UserError(f"{path} is empty; expected a picture, so copy it again ({flag}).")
            return cls._bmp(content) if content.startswith(b"BM") else cls._decoded(path, content, flag)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # Pillow raises many kinds
            known = path.suffix.lower() in FORMATS
            expected = f"{'copy it again, or pass another' if known else f'expected one of {KINDS}'} ({flag})"
            raise UserError(f"{path} is not a readable picture ({_reason(error)}); {expected}.") from None

    @classmethod
    def _bmp(cls, content: bytes) -> Picture:
        image = BmpImagePlugin.BmpImageFile(io.BytesIO(content))
        _check_size(*image.size)
        grey, clear = image.mode in ("1", "L"), image.has_transparency_data
        pixels = np.array(image.convert("L" if grey else "RGBA" if clear else "RGB"))
        dpi = image.info.get("dpi", (0, 0))
        return cls(pixels.reshape(*pixels.shape[:2], -1), clear, {"dpi": dpi} if min(dpi) > 0 else {})

    @classmethod
    def _decoded(cls, path: Path, content: bytes, flag: str) -> Picture:
        image = pyvips.Image.new_from_buffer(content, "", access="sequential", fail_on="error")
        kind = image.get("vips-loader").split("load")[0]
        if kind not in ("png", "jpeg", "webp", "tiff", "gif", "heif"):
            raise ValueError(f"it is {kind}")
        _check_size(image.width, image.height)
        frames = notes.frames_of_png(content) or _get(image, "n-pages", 1)
        if frames > 1:
            found = f"{path} holds {frames} {'pages' if kind == 'tiff' else 'frames of an animation'}"
            raise UserError(f"{found}, expected one picture; split it ({flag}).")
        if image.format not in ("uchar", "ushort"):
            words = {"float": "floating-point", "double": "floating-point", "short": "signed"}
            found = f"{_get(image, 'bits-per-sample', '')}-bit {words.get(image.format, image.format)}"
            expected = f"expected 8 or 16 bits a channel; save it as a 16-bit TIFF or PNG ({flag})"
            raise UserError(f"{path} holds {found} numbers, {expected}.")
        said = {name: _get(image, field) for name, field in notes.FIELDS.items()}
        if image.interpretation == "cmyk":
            ways = {"embedded": True, "input_profile": "cmyk", "depth": 16 if image.format == "ushort" else 8}
            alpha, image = image[4:] if image.bands > 4 else None, image[:4].icc_transform("srgb", **ways)
            image, said["colour profile"] = image.bandjoin(alpha) if alpha else image, None
        if image.bands > 4:
            raise ValueError(f"it has {image.bands} channels")
        upright = 1 if kind == "heif" else None  # libheif turns by itself
        kept, turn, spare = notes.read(content, said, _get(image, "orientation", upright))
        pixels = image.numpy().reshape(image.height, image.width, -1)
        pixels = pixels[..., :-1] if spare else pixels
        pixels = pixels.swapaxes(0, 1) if turn >= 5 else pixels
        pixels = pixels[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
        return cls(np.ascontiguousarray(pixels), pixels.shape[2] in (2, 4), kept)

    def check_fits(self, source: Path, target: Path) -> None:
        """Raise UserError if the format can't hold the pixels."""
        kind, found = FORMATS[target.suffix.lower()], ""
        if self.pixels.dtype == np.uint16 and kind not in ("PNG", "TIFF", "AVIF"):
            found = "16 bits a channel"
        elif self.alpha and kind in ("JPEG", "BMP") and self.pixels[..., -1].min() < 255:
            found = "transparency"
        elif self.alpha and kind == "GIF" and not np.isin(self.pixels[..., -1], (0, 255)).all():
            found = "half transparency"
        if found:
            raise UserError(f"{source} has {found}, which {target.name} can't hold; {OTHER_FORMAT}.")

    def write(self, path: Path, kind: str) -> List[str]:
        """Write a file of this ``kind``, one of FORMATS' values, in little memory.

        Returns the names of the notes that it can't hold. ValueError: it can't hold so many pixels.
        """
        height, width, channels = self.pixels.shape
        big = self.pixels.nbytes > _BIG
        fields, extra, lost = notes.for_file(self.notes, kind, big)
        if kind == "BMP":
            image = Image.fromarray(self.pixels[..., 0] if channels < 3 else self.pixels)
            image.save(buffer := io.BytesIO(), kind, dpi=self.notes.get("dpi", (0, 0)))
            path.write_bytes(buffer.getvalue())  # Pillow doesn't see that a disk is full
            return lost
        deep = self.pixels.dtype == np.uint16
        values = np.ascontiguousarray(self.pixels)
        image = pyvips.Image.new_from_memory(values, width, height, channels, "ushort" if deep else "uchar")
        across, down = self.notes.get("dpi", (72, 72))
        colours = ("grey16" if deep else "b-w") if channels < 3 else "rgb16" if deep else "srgb"
        image = image.copy(interpretation=colours, xres=across / 25.4, yres=down / 25.4)
        image.set_type(pyvips.GValue.gint_type, "orientation", 1)
        for name, value in fields.items():
            image.set_type(pyvips.GValue.blob_type, name, value)
        # Unless there is something to write into it, libvips would add EXIF of its own.
        exif = "exif-data" in fields or ("dpi" in self.notes and kind in ("WEBP", "AVIF"))
        options = {**SAVE_OPTIONS.get(kind, {}), "keep": "exif|xmp|iptc|icc" if exif else "xmp|iptc|icc"}
        if kind == "TIFF":
            options["bigtiff"] = big
        with path.open("w+b") as file:
            _save(image, file, f".{kind.lower()}", options, extra)
            if kind == "TIFF" and not big:
                notes.add_to_tiff(file, self.notes)
        return lost


def _save(image: Any, file: BinaryIO, ending: str, options: Dict[str, Any], extra: bytes) -> None:
    """Let libvips write to the file, with something put in at its beginning."""
    failed: List[OSError] = []

    def write(data: Any) -> int:
        data = bytes(data)
        file.write(notes.put_in(extra, data) if ending in (".png", ".jpeg") and not file.tell() else data)
        return len(data)

    def safely(action: Callable[..., int]) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            try:
                return action(*arguments)
            except OSError as error:  # no exception passes through C
                failed.append(error)
                return -1

        return run

    target = pyvips.TargetCustom()
    target.on_write(safely(write))
    target.on_read(file.read)  # TIFF goes back to what it wrote
    target.on_seek(safely(file.seek))
    try:
        image.write_to_target(target, ending, **options)
        file.flush()
    except pyvips.Error as error:
        raise failed[0] if failed else ValueError(_reason(error)) from None


def _get(image: Any, name: str, default: Any = None) -> Any:
    return image.get(name) if image.get_typeof(name) else default


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:  # a small file may claim any size
        raise ValueError(f"it claims {width}x{height} pixels, more than 2^30")


def _reason(error: Exception) -> str:
    """What went wrong: libvips' first line only says in which function."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return first_line(Exception(lines[1]) if isinstance(error, pyvips.Error) and lines[1:] else error)
