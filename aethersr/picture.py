"""Reads and writes pictures: bits, transparency, colour profile, EXIF, XMP and dpi, and what is refused.

Needs numpy and Pillow, and OpenCV to read 16 bits, which Pillow supports only in grey.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError, features

from aethersr.errors import UserError, first_line, missing_package

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".avif": "AVIF",
}
SAVE_OPTIONS: Dict[str, Dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 90, "subsampling": "4:4:4"},
}
_MODES = ("L", "LA", "RGB", "RGBA", "1", "P", "PA", "CMYK", "YCbCr")
_ORIENTATION, _SUB_IFDS, _SIZES = 0x0112, (0x8769, 0x8825, 0xA005), (0xA002, 0xA003)
# In a TIFF, EXIF tags are mixed with those about its pixels: size, bits, strips, resolution, XMP, profile.
_OF_PIXELS = {*range(254, 260), 262, 266, *range(273, 280), 282, 283, 284, 296, 317, *range(318, 348),
              *range(512, 533), 700, 34675}  # fmt: skip


@dataclass
class Picture:
    """Upright pixels (H, W, C) in uint8 or uint16, and the metadata to keep.

    ``alpha``: the last channel is transparency. ``exif`` holds EXIF tags, with nested directories as
    dictionaries.
    """

    pixels: np.ndarray
    alpha: bool = False
    profile: Optional[bytes] = None
    exif: Optional[Dict[int, Any]] = None
    xmp: Optional[bytes] = None
    dpi: Optional[Tuple[float, float]] = None

    def with_pixels(self, pixels: np.ndarray) -> Picture:
        """The same picture with other pixels; the size in EXIF is updated."""
        exif = dict(self.exif or {})
        if isinstance(exif.get(_SUB_IFDS[0]), dict):
            sizes = dict(zip(_SIZES, (pixels.shape[1], pixels.shape[0])))
            inner = exif[_SUB_IFDS[0]]
            exif[_SUB_IFDS[0]] = {tag: sizes.get(tag, value) for tag, value in inner.items()}
        return replace(self, pixels=pixels, exif=exif)

    # ------------------------------------------------------------------------------------------------ reading

    @classmethod
    def read(cls, path: Path) -> Picture:
        """The picture in a file.

        Raises:
            UserError: it can't be read, or is not a still picture with 8 or 16 bits a channel.
        """
        try:
            content = path.read_bytes()  # read once, since the file may change
            if not content:
                raise UserError(f"{path} is empty; expected a picture, so copy it again (--input).")
            _refuse_other_tiffs(path, content)
            with Image.open(io.BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # a phone's JPEG, whose other frames are previews
                    kind = "pages" if image.format == "TIFF" else "frames of an animation"
                    raise UserError(
                        f"{path} holds {frames} {kind}, expected one picture; split it (--input)."
                    )
                tile = str(image.tile)  # what the file stores, before Pillow converts it
                _, turn = _exif(image)
                done = image.format == "TIFF" and _ORIENTATION in image.tag_v2  # by who reads it
                image.load()  # raises where the file is cut or damaged, which OpenCV fills with black
                if ";16" in tile and image.format != "BMP":  # there it means all three channels in 16 bits
                    picture = cls._deep(path, content, image, tile)
                else:
                    picture, done = cls._plain(path, image), image.format == "TIFF"
            return picture._with_notes_of(image, 1 if done else turn)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # Pillow raises many kinds
            unknown = isinstance(error, UnidentifiedImageError)  # Pillow's words name an object of Python
            reason = "of no kind that is known" if unknown else first_line(error)
            if path.suffix.lower() == ".avif" and not features.check("avif"):
                reason = "this Pillow reads no AVIF: pip install --upgrade pillow"
            expected = f"expected one of {', '.join(FORMATS)} (--input)"
            raise UserError(f"{path} is not a readable picture ({reason}); {expected}.") from None

    @classmethod
    def _plain(cls, path: Path, image: Image.Image) -> Picture:
        if image.mode not in _MODES:
            expected = "expected 8 or 16 bits a channel (--input)"
            raise UserError(f"{path} holds pixels of type {image.mode}, {expected}.")
        profile = image.info.get("icc_profile")
        grey = image.mode in ("1", "L", "LA")
        mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
        if image.mode in ("CMYK", "YCbCr"):  # the profile is not one for RGB
            image, profile = _to_srgb(image, profile), None
        pixels = np.array(image.convert(mode))
        return cls(pixels.reshape(*pixels.shape[:2], -1), mode.endswith("A"), profile)

    @classmethod
    def _deep(cls, path: Path, content: bytes, image: Image.Image, tile: str) -> Picture:
        cv2 = _opencv()
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.dtype != np.uint16 or image.mode == "CMYK":
            remedy = "save it as a plain PNG or TIFF (--input)"
            raise UserError(f"{path} is not a 16-bit picture that OpenCV can read; {remedy}.")
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.shape[2] >= 3:
            pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]  # OpenCV has blue first
        if "LA;16" in tile and pixels.shape[2] == 4:
            pixels = pixels[..., [0, 3]]
        clear = image.info.get("transparency")  # in PNG: one colour that is transparent
        if clear is not None and pixels.shape[2] in (1, 3):
            seen = (pixels != np.array(clear, np.uint16)).any(2, keepdims=True)
            pixels = np.concatenate([pixels, seen.astype(np.uint16) * 65535], 2)
        tags = getattr(image, "tag_v2", {})  # of TIFF
        if tags.get(262) == 0:  # white is 0 there
            pixels = 65535 - pixels
        if tags.get(338) == (0,):  # what comes after the colours is not alpha
            pixels = pixels[..., :-1]
        if tags.get(338) == (1,):  # the colours are multiplied by alpha
            alpha = pixels[..., -1:].astype(np.float32)
            colours = pixels[..., :-1] * (65535 / np.maximum(alpha, 1))
            pixels = np.concatenate([colours.clip(0, 65535).round().astype(np.uint16), pixels[..., -1:]], 2)
        profile = image.info.get("icc_profile")
        return cls(np.ascontiguousarray(pixels), pixels.shape[2] in (2, 4), profile)

    def _with_notes_of(self, image: Image.Image, turn: int) -> Picture:
        """Turn upright, and add EXIF, XMP and dpi."""
        self.exif, _ = _exif(image)
        pixels = self.pixels.swapaxes(0, 1) if turn >= 5 else self.pixels
        pixels = pixels[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
        self.pixels = np.ascontiguousarray(pixels)
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        if isinstance(xmp, str):
            xmp = xmp.encode()
        if isinstance(xmp, bytes):
            self.xmp = re.sub(rb'(tiff:Orientation(?:="|>))\d', rb"\g<1>1", xmp)
        try:
            across, down = (float(value) for value in image.info["dpi"])
            self.dpi = (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None
        except Exception:  # missing, or not numbers
            self.dpi = None
        return self

    # ------------------------------------------------------------------------------------------------ writing

    def check_fits(self, source: Path, target: Path) -> None:
        """Raise UserError if the format can't hold the picture."""
        kind = FORMATS[target.suffix.lower()]
        if kind == "AVIF" and not features.check("avif"):
            remedy = "pip install --upgrade pillow, or pass another --output"
            raise UserError(f"{target}: this Pillow writes no AVIF; {remedy}.")
        if self.pixels.dtype == np.uint16 and kind not in ("PNG", "TIFF"):
            remedy = "pass an --output that ends in .png or .tif"
            raise UserError(f"{source} has 16 bits a channel, which {target.name} can't hold; {remedy}.")
        if self.alpha and kind in ("JPEG", "BMP"):
            remedy = "pass an --output that ends in .png, .webp or .tif"
            raise UserError(f"{source} has transparency, which {target.name} can't hold; {remedy}.")

    def encode(self, kind: str) -> bytes:
        """The content of a file of this ``kind``, one of FORMATS' values."""
        if kind == "PNG":
            return self._png()
        if kind == "TIFF":
            return self._tiff()
        image = Image.fromarray(self.pixels[..., 0] if self.pixels.shape[2] == 1 else self.pixels)
        notes = {"icc_profile": self.profile, "exif": self._exif_bytes(), "xmp": self.xmp, "dpi": self.dpi}
        if kind == "JPEG":  # a segment can't be longer
            notes = {
                name: value
                for name, value in notes.items()
                if name == "icc_profile" or len(value or "") < 65000
            }
        if kind == "GIF":
            image, notes = _of_256_colours(image), {}
        buffer = io.BytesIO()
        image.save(buffer, kind, **SAVE_OPTIONS.get(kind, {}), **{k: v for k, v in notes.items() if v})
        return buffer.getvalue()

    def _exif_bytes(self) -> bytes:
        exif = Image.Exif()
        for tag, value in (self.exif or {}).items():
            exif[tag] = value
        return exif.tobytes() if self.exif else b""

    def _png(self) -> bytes:
        """8 or 16 bits. Four times as fast as Pillow's, which would be slower than the network on a card."""
        height, width, channels = self.pixels.shape
        content = b"\x89PNG\r\n\x1a\n"

        def chunk(name: bytes, data: bytes) -> None:
            nonlocal content
            content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        bits = 8 * self.pixels.itemsize
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, (0, 4, 2, 6)[channels - 1], 0, 0, 0))
        if self.profile:
            chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(self.profile))
        if self.dpi:
            chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in self.dpi), 1))
        if self.exif:
            chunk(b"eXIf", self._exif_bytes()[6:])
        if self.xmp:
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + self.xmp)
        rows = (
            self.pixels.astype(self.pixels.dtype.newbyteorder(">"), copy=False)
            .view(np.uint8)
            .reshape(height, -1)
        )
        filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
        filtered[:, 0] = 2  # filter "up": each row minus the one above
        filtered[0, 1:] = rows[0]
        np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
        chunk(b"IDAT", zlib.compress(filtered.data, 1))
        chunk(b"IEND", b"")
        return content

    def _tiff(self) -> bytes:
        """8 or 16 bits, deflated. Pillow can't write 16-bit colours, OpenCV can't write a profile."""
        pixels = self.pixels
        if pixels.shape[2] == 2 and pixels.itemsize == 2:  # few programs read 16-bit grey with alpha
            pixels = pixels[..., [0, 0, 0, 1]]
        height, width, channels = pixels.shape
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        differences = pixels.astype(pixels.dtype.newbyteorder("<"))
        differences[:, 1:] -= pixels[:, :-1]
        step = max(1, 2**23 // (width * channels))  # rows a strip
        strips = [zlib.compress(differences[y : y + step].tobytes(), 1) for y in range(0, height, step)]
        sizes = [len(strip) for strip in strips]
        own: Dict[int, Any] = {
            256: width,
            257: height,
            258: (8 * pixels.itemsize,) * channels,
            259: 8,  # deflate
            262: 1 if channels < 3 else 2,
            273: tuple(sum(sizes[:k]) for k in range(len(sizes))),
            277: channels,
            278: step,
            279: tuple(sizes),
            317: 2,  # predictor: each pixel minus the one to its left
        }
        tags.tagtype[273] = 4  # LONG: Pillow adds the offset of the strips
        if self.alpha:
            own[338] = (2,)  # alpha is not premultiplied
        if self.dpi:
            own.update({282: self.dpi[0], 283: self.dpi[1], 296: 2})
        for tag, value, kind in ((700, self.xmp, 1), (34675, self.profile, 7)):
            if value:
                tags.tagtype[tag] = kind
                own[tag] = value
        for tag, value in {**(self.exif or {}), **own}.items():
            tags[tag] = value
        buffer = io.BytesIO()
        tags.save(buffer)
        content = b"".join([buffer.getvalue(), *strips])
        if len(content) >= 2**32:
            raise ValueError("more than the 4 GiB of a TIFF file")
        return content


def _refuse_other_tiffs(path: Path, content: bytes) -> None:
    """TIFF holds any number in any order; Pillow can't identify most of them, and reads others as noise."""
    if content[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if b"+" in content[:4] else 8])
        stream = io.BytesIO(content)
        stream.seek(tags.next)
        tags.load(stream)
        of_each = tags.get(258, (1,))
        bits, kind = max(of_each), max(tags.get(339, (1,)))
        apart = tags.get(284) == 2 and len(of_each) > 1
    except Exception:
        return  # reading it will report what is wrong
    if bits > 8 and apart:
        remedy = "save it with the colours of a pixel side by side (--input)"
        raise UserError(f"{path} holds {bits}-bit colours one after another, which is not read; {remedy}.")
    if bits > 16 or kind in (2, 3):
        found = f"{bits}-bit {({2: 'signed', 3: 'floating-point'}).get(kind, 'whole')} numbers"
        expected = "expected 8 or 16 bits a channel; save it as a 16-bit TIFF or PNG (--input)"
        raise UserError(f"{path} holds {found}, {expected}.")


def _exif(image: Image.Image) -> Tuple[Dict[int, Any], int]:
    """EXIF's tags without the orientation, and the orientation. Leaves out tags that can't be written."""

    def writable(tag: int, value: Any) -> bool:
        try:
            directory = TiffImagePlugin.ImageFileDirectory_v2()
            directory[tag] = value
            directory.tobytes()
        except Exception:
            return False
        return True

    kept: Dict[int, Any] = {}
    try:
        exif = image.getexif()
        turn = exif.get(_ORIENTATION, 1)
        for tag, value in exif.items():
            if tag in _SUB_IFDS:
                value = {key: inner for key, inner in exif.get_ifd(tag).items() if writable(key, inner)}
            if tag != _ORIENTATION and tag not in _OF_PIXELS and writable(tag, value):
                kept[tag] = value
    except Exception:  # some broken EXIF is too broken for Pillow
        return kept, 1
    return kept, turn if turn in range(1, 9) else 1


def _to_srgb(image: Image.Image, profile: Optional[bytes]) -> Image.Image:
    """Convert printing colours to sRGB, with their profile if it is valid."""
    if image.mode == "CMYK" and profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            return converted or image
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


@contextlib.contextmanager
def readable(path: Path, flag: str) -> Iterator[None]:
    """Raises UserError if the picture opened inside can't be read; ``flag`` is what passed the path."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}; leave it out ({flag}).") from None


def opaque(image: Image.Image) -> Image.Image:
    """``image`` in RGB, in front of white: what transparent pixels hide is often rubbish.

    ValueError if it has more than 8 bits a channel, which Pillow would clip.
    """
    if image.mode not in _MODES:
        raise ValueError(f"its pixels are of the kind {image.mode}, expected 8 bits a channel")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _of_256_colours(image: Image.Image) -> Image.Image:
    """For GIF: 256 colours, or 255 and a transparent one where alpha is below half."""
    if image.mode in ("L", "RGB"):
        return image if image.mode == "L" else image.quantize(256, Image.Quantize.MEDIANCUT)
    hidden = np.asarray(image)[..., -1] < 128
    colours = image.convert("RGB").quantize(255, Image.Quantize.MEDIANCUT)
    indices = np.where(hidden, 255, np.asarray(colours)).astype(np.uint8)
    result = Image.fromarray(indices, "P")
    palette: List[int] = colours.getpalette() or []
    result.putpalette((palette + [0] * 768)[:768])
    result.info["transparency"] = 255
    return result


def _opencv() -> Any:
    try:
        import cv2

        cv2.utils.logging.setLogLevel(0)  # it prints messages even about valid files
    except ImportError as error:
        raise missing_package(error, "a 16-bit picture", "upscale") from None
    return cv2
