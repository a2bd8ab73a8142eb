"""Pictures keep what they were: bits, transparency, colour profile, EXIF, XMP, dpi, and the right way up."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from PIL import Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from aethersr.errors import UserError
from aethersr.picture import FORMATS, Picture

# Pillow's, of broken tags; the command says none of them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6" title="Bild"/></x:xmpmeta>'
EXIF = {0x010E: "Bild", 0x8769: {0x829A: 0.01, 0xA002: 20, 0xA003: 12}, 0x8825: {1: "N"}}


def waves(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    y, x = np.mgrid[:12, :20]
    planes = [np.sin(y / 5 + k) * np.cos(x / (4 + k)) for k in range(channels)]
    return ((np.stack(planes, -1) * 0.45 + 0.5) * np.iinfo(dtype).max).astype(dtype)


def read(tmp_path: Path, content: bytes, name: str = "in.png") -> Picture:
    (tmp_path / name).write_bytes(content)
    return Picture.read(tmp_path / name)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_png_and_tiff_give_back_every_bit(tmp_path: Path, kind: str, dtype: Any, channels: int) -> None:
    pixels = waves(channels, dtype)
    back = read(tmp_path, Picture(pixels, channels in (2, 4)).encode(kind))
    if (kind, dtype, channels) == ("TIFF", np.uint16, 2):  # few programs read grey with transparency there
        pixels = pixels[..., [0, 0, 0, 1]]
    assert back.pixels.dtype == dtype
    assert back.alpha == (channels in (2, 4))
    assert np.array_equal(back.pixels, pixels)


@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint8), (3, np.uint16), (4, np.uint16)])
def test_a_tiff_of_several_strips_is_read_by_another_program(channels: int, dtype: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (900, 4000, channels)).astype(dtype)
    back = cv2.imdecode(np.frombuffer(Picture(pixels, channels == 4).encode("TIFF"), np.uint8), -1)
    assert np.array_equal(back[..., [2, 1, 0, 3][:channels]], pixels)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_written_and_read_again(tmp_path: Path, ending: str) -> None:
    pixels = waves(3)
    back = read(tmp_path, Picture(pixels).encode(FORMATS[ending]), f"in{ending.upper()}")
    assert back.pixels.shape == pixels.shape
    assert np.abs(back.pixels.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, np.uint8) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")),
        ("PNG", np.uint16),
        ("TIFF", np.uint16),
    ],
)
def test_notes_are_kept_and_the_size_in_them_follows(tmp_path: Path, kind: str, dtype: Any) -> None:
    written = Picture(waves(3, dtype), False, PROFILE, EXIF, XMP.replace(b'"6"', b'"1"'), (300, 150))
    larger = written.with_pixels(waves(3, dtype).repeat(2, 0).repeat(2, 1))
    back = read(tmp_path, larger.encode(kind))
    assert back.profile == PROFILE
    assert back.exif is not None
    assert back.exif[0x010E] == "Bild"
    assert back.exif[0x8825] == {1: "N"}
    assert (back.exif[0x8769][0xA002], back.exif[0x8769][0xA003]) == (40, 24)
    assert back.xmp is not None
    assert b'title="Bild"' in back.xmp
    if kind in ("PNG", "JPEG", "TIFF"):
        assert back.dpi == pytest.approx((300, 150), abs=0.05)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "PNG 16", "TIFF 16"])
def test_pictures_are_turned_upright_once(tmp_path: Path, kind: str, turn: int) -> None:
    corner = np.zeros((32, 48, 3), np.uint8)
    corner[:16, :24] = (255, 0, 0)
    corner[:16, 24:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = turn
    with Image.open(io.BytesIO(saved(Image.fromarray(corner), "PNG", exif=exif))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    name, *deep = kind.split()
    if deep:
        written = Picture(corner.astype(np.uint16) * 257, exif={0x0112: turn})
        back = read(tmp_path, written.encode(name))
        pixels = back.pixels // 257
    else:
        back = read(tmp_path, saved(Image.fromarray(corner), name, exif=exif))
        pixels = back.pixels
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 12
    again = read(tmp_path, back.encode(name))
    assert again.pixels.shape == back.pixels.shape, "turned twice"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_orientation_in_xmp_alone_turns_once(tmp_path: Path, kind: str, dtype: Any) -> None:
    back = read(tmp_path, Picture(waves(3, dtype), xmp=XMP).encode(kind))
    assert np.array_equal(back.pixels, waves(3, dtype)[::-1].swapaxes(0, 1))
    assert read(tmp_path, back.encode(kind)).pixels.shape == back.pixels.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_hurts_nothing(tmp_path: Path, kind: str) -> None:
    directory = ImageFileDirectory_v2()
    directory[0x0112], directory[0x010E] = 1, "Bild"
    whole = b"Exif\0\0II*\0\x08\0\0\0" + directory.tobytes(8)
    for place in range(6, len(whole), 3):
        for broken in (whole[:place], whole[:place] + b"\xff\xff\xff" + whole[place + 3 :]):
            content = saved(Image.fromarray(waves(3)), kind, exif=broken)
            back = read(tmp_path, content)
            assert read(tmp_path, back.encode(kind)).pixels.shape == back.pixels.shape


@pytest.mark.parametrize(
    ("image", "options", "channels"),
    [
        (Image.fromarray(waves(3)).convert("1"), {}, 1),
        (Image.fromarray(waves(3)).quantize(16), {}, 3),
        (Image.fromarray(waves(3)).quantize(16), {"transparency": 3}, 4),
        (Image.fromarray(waves(3)).quantize(16), {"transparency": bytes(range(0, 160, 10))}, 4),
        (Image.fromarray(waves(1)[..., 0]), {"transparency": 100}, 2),
        (Image.fromarray(waves(3)), {"transparency": (1, 2, 3)}, 4),
    ],
)
def test_palettes_and_bits_and_transparent_colours_become_channels(
    tmp_path: Path, image: Image.Image, options: Any, channels: int
) -> None:
    back = read(tmp_path, saved(image, "PNG", **options))
    assert (back.pixels.shape[2], back.alpha) == (channels, channels in (2, 4))


def test_a_bmp_with_all_three_channels_in_16_bits_is_read(tmp_path: Path) -> None:
    pixels = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2")  # red, green; blue, white; from below
    head = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, pixels.nbytes, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    content = struct.pack("<2sIHHI", b"BM", 66 + pixels.nbytes, 0, 0, 66) + head + masks + pixels.tobytes()
    back = read(tmp_path, content, "in.bmp")
    assert back.pixels.tolist() == [[[0, 0, 255], [255] * 3], [[255, 0, 0], [0, 255, 0]]]


def test_one_transparent_colour_of_16_bits_becomes_alpha(tmp_path: Path) -> None:
    content = Picture(waves(3, np.uint16)).encode("PNG")
    clear = waves(3, np.uint16)[3, 4]
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (20, 12)
    import zlib

    data = b"tRNS" + struct.pack(">HHH", *clear)
    chunk = struct.pack(">I", 6) + data + struct.pack(">I", zlib.crc32(data))
    place = content.index(b"IDAT") - 4
    back = read(tmp_path, content[:place] + chunk + content[place:])
    assert back.alpha
    assert back.pixels[3, 4, 3] == 0
    assert back.pixels[..., 3].max() == 65535


def test_printing_colours_become_rgb(tmp_path: Path) -> None:
    back = read(tmp_path, saved(Image.fromarray(waves(3)).convert("CMYK"), "JPEG", quality=95), "in.jpg")
    assert np.abs(back.pixels.astype(int) - waves(3)).mean() < 6
    assert back.profile is None


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_printing_colours_with_a_broken_profile_become_rgb_too(tmp_path: Path, kind: str) -> None:
    back = read(tmp_path, saved(Image.fromarray(waves(3)).convert("CMYK"), kind, icc_profile=b"broken"))
    assert back.pixels.shape == (12, 20, 3)
    assert back.profile is None


def deep_tiff(pixels: np.ndarray, tags: Any) -> bytes:
    """An uncompressed TIFF of 16 bits a channel, with ``tags`` besides those that it needs."""
    (height, width, channels), size = pixels.shape, pixels.nbytes
    own = {256: width, 257: height, 258: (16,) * channels, 259: 1, 262: 2 if channels > 2 else 1}
    directory = ImageFileDirectory_v2()
    for tag, value in {**own, 273: 0, 277: channels, 278: height, 279: size, **tags}.items():
        directory[tag] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + pixels.astype("<u2").tobytes()


def test_16_bits_are_what_the_tiff_says_that_they_are(tmp_path: Path) -> None:
    grey, colours = waves(1, np.uint16), waves(4, np.uint16)
    assert np.array_equal(read(tmp_path, deep_tiff(grey, {}), "in.tif").pixels, grey)
    assert np.array_equal(read(tmp_path, deep_tiff(grey, {262: 0}), "in.tif").pixels, 65535 - grey)
    back = read(tmp_path, deep_tiff(colours, {338: 0}), "in.tif")
    assert not back.alpha, "what is beside the colours is no alpha"
    assert np.array_equal(back.pixels, colours[..., :3])
    with pytest.raises(UserError, match="16-bit colours one after another"):  # would be read as noise
        read(tmp_path, deep_tiff(colours[..., :3], {284: 2}), "in.tif")


def test_a_telephones_jpeg_with_a_preview_in_it_is_one_picture(tmp_path: Path) -> None:
    image = Image.fromarray(waves(3))
    content = saved(image, "MPO", save_all=True, append_images=[image.resize((10, 6))])
    assert read(tmp_path, content, "in.jpg").pixels.shape == (12, 20, 3)


def test_a_gif_keeps_what_is_transparent(tmp_path: Path) -> None:
    pixels = waves(4)
    pixels[..., 3] = 255
    pixels[:6, :, 3] = 0
    back = read(tmp_path, Picture(pixels, True).encode("GIF"), "in.gif")
    assert np.array_equal(back.pixels[..., 3], pixels[..., 3])
    assert np.abs(back.pixels[6:, :, :3].astype(int) - pixels[6:, :, :3]).mean() < 6


def _float_tiff(channels: int, bits: int = 32) -> bytes:
    directory = ImageFileDirectory_v2()
    tags = {256: 4, 257: 4, 258: (bits,) * channels, 259: 1, 262: 2 if channels > 1 else 1, 273: 0}
    tags.update({277: channels, 278: 4, 279: 2 * bits * channels, 339: (3,) * channels})
    for tag, value in tags.items():
        directory[tag] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + bytes(2 * bits * channels)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("float.tif", _float_tiff(1), "32-bit floating-point"),
        ("float.tif", _float_tiff(3), "32-bit floating-point"),
        ("half.tif", _float_tiff(3, 16), "16-bit floating-point"),
        ("empty.png", b"", "is empty"),
        ("text.png", b"text", r"not a readable picture \(of no kind that is known\)"),
        ("moving.gif", None, "2 frames of an animation"),
        ("moving.png", None, "2 frames of an animation"),
        ("moving.webp", None, "2 frames of an animation"),
        ("pages.tif", None, "2 pages"),
    ],
)
def test_what_is_no_still_picture_is_refused_by_name(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    if content is None:
        image, other = Image.fromarray(waves(3)), Image.fromarray(waves(3)[::-1])
        content = saved(image, FORMATS[Path(name).suffix], save_all=True, append_images=[other])
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, content, name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("picture", "target", "words"),
    [
        (Picture(waves(4), True), "out.jpg", "transparency"),
        (Picture(waves(2), True), "out.bmp", "transparency"),
        (Picture(waves(3, np.uint16)), "out.webp", "16 bits"),
    ],
)
def test_a_format_that_cannot_hold_the_picture_is_refused(picture: Picture, target: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        picture.check_fits(Path("in.png"), Path(target))


def encoded(ending: str, deep: bool = False) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (23, 31, 3), np.uint8)
    return Picture(pixels.astype(np.uint16) * 251 if deep else pixels).encode(FORMATS[ending])


KINDS = [
    *((ending, False) for ending in (".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".avif")),
    (".png", True),
    (".tif", True),
]


@pytest.mark.parametrize(("ending", "deep"), KINDS)
def test_a_cut_picture_is_refused_or_whole(tmp_path: Path, ending: str, deep: bool) -> None:
    """Whole: where only the end mark is missing, every pixel is there."""
    whole = encoded(ending, deep)
    expected = read(tmp_path, whole, f"in{ending}").pixels
    refused = 0
    for place in sorted({len(whole) * k // 75 for k in range(75)} | {len(whole) - k for k in range(1, 26)}):
        try:
            pixels = read(tmp_path, whole[:place], f"in{ending}").pixels
        except UserError as error:
            assert f"in{ending}" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert np.array_equal(pixels, expected), (
                f"cut at {place} of {len(whole)}, read as if it were whole"
            )
    assert refused > 50


def read_damaged(tmp_path: Path, ending: str, deep: bool, damage: Any) -> None:
    content = damaged(encoded(ending, deep), damage)
    try:
        pixels = read(tmp_path, content, f"in{ending}").pixels
    except UserError as error:
        assert f"in{ending}" in str(error)  # noqa: PT017
        assert "--" in str(error), f"no remedy: {error}"  # noqa: PT017
    else:
        assert pixels.ndim == 3
        assert pixels.dtype in (np.uint8, np.uint16)


@pytest.mark.parametrize(("ending", "deep"), KINDS)
@settings(FUZZ, max_examples=60)
@given(damage=DAMAGE)
def test_a_damaged_picture_is_refused_or_read(tmp_path: Path, ending: str, deep: bool, damage: Any) -> None:
    read_damaged(tmp_path, ending, deep, damage)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "deep"), KINDS)
@settings(FUZZ, max_examples=250)
@given(damage=DAMAGE, more=DAMAGE)
def test_thousands_of_damaged_pictures_are_refused_or_read(
    tmp_path: Path, ending: str, deep: bool, damage: Any, more: Any
) -> None:
    read_damaged(tmp_path, ending, deep, damage + more)
