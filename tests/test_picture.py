"""Pictures keep what they were: bits, transparency, notes beside the pixels, and the right way up."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import pyvips
from conftest import ROOT
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from aethersr.errors import UserError
from aethersr.picture import FORMATS, Picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's, of broken tags


def waves(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    y, x = np.mgrid[:12, :20]
    planes = [np.sin(y / 5 + k) * np.cos(x / (4 + k)) for k in range(channels)]
    return ((np.stack(planes, -1) * 0.45 + 0.5) * np.iinfo(dtype).max).astype(dtype)


def read(tmp_path: Path, content: bytes, name: str = "in.png") -> Picture:
    (tmp_path / name).write_bytes(content)
    return Picture.read(tmp_path / name)


def written(tmp_path: Path, picture: Picture, kind: str) -> bytes:
    picture.write(tmp_path / "written", kind)
    return (tmp_path / "written").read_bytes()


def saved(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **tags: Any) -> bytes:
    """An uncompressed TIFF with tags (t338=...) besides those that it needs."""
    (height, width, channels), size = pixels.shape, pixels.nbytes
    bits = (8 * pixels.itemsize,) * channels
    own = {256: width, 257: height, 258: bits, 259: 1, 262: 2 if channels > 2 else 1, 273: 0}
    directory = ImageFileDirectory_v2()
    more = {int(name[1:]): value for name, value in tags.items()}
    for tag, value in {**own, 277: channels, 278: height, 279: size, **more}.items():
        directory[tag] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + pixels.tobytes()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_png_and_tiff_give_back_every_bit(tmp_path: Path, kind: str, dtype: Any, channels: int) -> None:
    pixels = waves(channels, dtype)
    content = written(tmp_path, Picture(pixels, channels in (2, 4)), kind)
    back = read(tmp_path, content)
    assert (back.pixels.dtype, back.alpha, back.notes) == (dtype, channels in (2, 4), {})
    assert np.array_equal(back.pixels, pixels)
    if channels == 3 or (channels == 4 and dtype == np.uint16):  # OpenCV multiplies 8 bits by alpha
        seen = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(seen[..., [2, 1, 0, 3][:channels]], pixels)


IMAGE = Image.fromarray(waves(3))
BMP_OF_16_BITS = struct.pack("<2sIHHI", b"BM", 74, 0, 0, 66)
BMP_OF_16_BITS += struct.pack("<IiiHHIIiiII3I4H", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0, 0xF800, 0x07E0, 0x001F,
                              0xF800, 0x07E0, 0x1F, 0xFFFF)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "channels"),
    [
        (saved(IMAGE.convert("1"), "PNG"), 1),
        (saved(IMAGE.convert("1"), "TIFF", compression="group4"), 1),
        (saved(IMAGE.quantize(16), "PNG"), 3),
        (saved(IMAGE.quantize(16), "PNG", transparency=3), 4),
        (saved(IMAGE.quantize(16), "PNG", transparency=bytes(range(0, 160, 10))), 4),
        (saved(IMAGE.quantize(16), "TIFF"), 3),
        (saved(IMAGE.convert("L"), "PNG", transparency=100), 2),
        (saved(IMAGE, "PNG", transparency=(1, 2, 3)), 4),
        (saved(IMAGE.convert("L"), "BMP"), 1),
        (BMP_OF_16_BITS, 3),
        (saved(IMAGE, "MPO", save_all=True, append_images=[IMAGE.resize((10, 6))]), 3),  # a telephone's JPEG
    ],
)
def test_palettes_and_bits_and_transparent_colours_become_channels(
    tmp_path: Path, content: bytes, channels: int
) -> None:
    back = read(tmp_path, content)
    assert (back.pixels.shape[2], back.alpha) == (channels, channels in (2, 4))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("profile", [b"", b"broken"])
def test_printing_colours_become_rgb(tmp_path: Path, kind: str, profile: bytes) -> None:
    options = {"quality": 95} if kind == "JPEG" else {}
    back = read(tmp_path, saved(IMAGE.convert("CMYK"), kind, icc_profile=profile, **options))
    assert np.abs(back.pixels.astype(int) - waves(3)).mean() < 25
    assert back.notes == {}


@pytest.mark.parametrize("bits", [8, 16])
def test_printing_colours_keep_their_bits_and_mean_what_their_own_profile_says(
    tmp_path: Path, bits: int
) -> None:
    pixels = waves(3, np.dtype(f"uint{bits}")) // 2 + 2 ** (bits - 2)  # no colours that ink lacks
    image = pyvips.Image.new_from_array(pixels, interpretation="rgb16" if bits == 16 else "srgb")
    inks, found = image.icc_transform("cmyk", input_profile="srgb", depth=bits), []
    for table in (None, bytes(40000)):  # the same inks by a profile in which they are other colours
        profile = bytearray(inks.get("icc-profile-data"))
        profile[10000:50000] = table or profile[10000:50000]
        inks = inks.copy()
        inks.set_type(pyvips.GValue.blob_type, "icc-profile-data", bytes(profile))
        found.append(read(tmp_path, inks.tiffsave_buffer()).pixels)
    clear = read(tmp_path, inks.bandjoin(99).tiffsave_buffer())
    assert (clear.pixels[..., 3] == 99).all()
    assert found[0].dtype == pixels.dtype
    assert np.abs(found[0].astype(float) - pixels).max() < 0.05 * 2**bits
    assert np.abs(found[0].astype(float) - found[1]).max() > 0.1 * 2**bits


def test_a_tiff_means_what_its_tags_say(tmp_path: Path) -> None:
    grey, colours = waves(1, np.uint16), waves(4, np.uint16)
    assert np.array_equal(read(tmp_path, tiff(grey)).pixels, grey)
    assert np.array_equal(read(tmp_path, tiff(grey, t262=0)).pixels, 65535 - grey), "white is 0"
    back = read(tmp_path, tiff(colours, t338=0))
    assert not back.alpha, "what is beside the colours is no alpha"
    assert np.array_equal(back.pixels, colours[..., :3])
    half = np.full((4, 4, 4), 16384, np.uint16) + np.array([0, 0, 0, 16384], np.uint16)
    multiplied = read(tmp_path, tiff(half, t338=1)).pixels[0, 0]
    assert np.abs(multiplied - [32768] * 4).max() <= 1


def test_a_gif_keeps_what_is_transparent(tmp_path: Path) -> None:
    pixels = waves(4)
    pixels[:6, :, 3], pixels[6:, :, 3] = 0, 255
    back = read(tmp_path, written(tmp_path, Picture(pixels, True), "GIF"), "in.gif")
    assert np.array_equal(back.pixels[..., 3], pixels[..., 3])
    assert np.abs(back.pixels[6:, :, :3].astype(int) - pixels[6:, :, :3]).mean() < 6


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_upright_once(tmp_path: Path, kind: str, turn: int) -> None:
    corner = np.zeros((32, 48, 3), np.uint8)
    corner[:16, :24], corner[:16, 24:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = turn
    with Image.open(io.BytesIO(saved(corner, "PNG", exif=exif))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    back = read(tmp_path, saved(corner, kind, exif=exif))
    again = read(tmp_path, written(tmp_path, back, kind))
    for pixels in (back.pixels, again.pixels):
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() < 12


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("float.tif", tiff(np.zeros((4, 4, 1), np.float32), t339=(3,)), "32-bit floating-point"),
        ("half.tif", tiff(np.zeros((4, 4, 3), np.float16), t339=(3, 3, 3)), "16-bit floating-point"),
        ("signed.tif", tiff(np.zeros((4, 4, 3), np.int16), t339=(2, 2, 2)), "16-bit signed"),
        ("ycc.tif", saved(IMAGE.convert("YCbCr"), "TIFF"), "YCbCr without JPEG"),
        ("five.tif", tiff(np.zeros((4, 4, 5), np.uint8)), "5 channels"),
        ("empty.png", b"", "is empty"),
        ("text.png", b"text", "not in a known format"),
        ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>", "it is svg"),
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
        other = Image.fromarray(waves(3)[::-1])
        content = saved(IMAGE, FORMATS[Path(name).suffix], save_all=True, append_images=[other])
    with pytest.raises(UserError, match=rf"{name}.*{words}.*--input"):
        read(tmp_path, content, name)


def test_a_format_that_cannot_hold_the_picture_is_refused(tmp_path: Path) -> None:
    opaque = Picture(np.full((4, 4, 2), 255, np.uint8), True)
    opaque.check_fits(Path("in.png"), Path("out.bmp"))
    assert read(tmp_path, written(tmp_path, opaque, "BMP")).pixels.shape == (4, 4, 1)
    for picture, target, words in (
        (Picture(waves(4), True), "out.jpg", "transparency"),
        (Picture(waves(2), True), "out.bmp", "transparency"),
        (Picture(waves(4), True), "out.gif", "half transparency"),
        (Picture(waves(3, np.uint16)), "out.webp", "16 bits"),
        (Picture(waves(3, np.uint16)), "out.jpg", "16 bits"),
    ):
        with pytest.raises(UserError, match=words):
            picture.check_fits(Path("in.png"), Path(target))


FILES = [*((ending, False) for ending in (".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".avif")),
         (".png", True), (".tif", True)]  # fmt: skip


def encoded(tmp_path: Path, ending: str, deep: bool) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (23, 31, 3), np.uint8)
    return written(tmp_path, Picture(pixels.astype(np.uint16) * 251 if deep else pixels), FORMATS[ending])


@pytest.mark.parametrize(("ending", "deep"), FILES)
def test_a_cut_picture_is_refused_or_whole(tmp_path: Path, ending: str, deep: bool) -> None:
    """Whole: where only the end mark is missing, every pixel is there."""
    whole = encoded(tmp_path, ending, deep)
    expected, refused = read(tmp_path, whole, f"in{ending}").pixels, 0
    for place in {len(whole) * k // 75 for k in range(75)} | {len(whole) - k for k in range(1, 26)}:
        try:
            assert np.array_equal(read(tmp_path, whole[:place], f"in{ending}").pixels, expected), place
        except UserError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ending", "deep"), FILES)
def test_a_damaged_picture_is_refused_or_read(tmp_path: Path, ending: str, deep: bool, count: int) -> None:
    whole = encoded(tmp_path, ending, deep)

    @settings(FUZZ, max_examples=count)
    @given(damage=DAMAGE)
    def run(damage: Any) -> None:
        try:
            picture = read(tmp_path, damaged(whole, damage), f"in{ending}")
        except UserError as error:
            assert re.search(rf"in{ending}.*--input", str(error))  # noqa: PT017
        else:
            picture.write(tmp_path / "out.tif", "TIFF")
            assert np.array_equal(Picture.read(tmp_path / "out.tif").pixels, picture.pixels)

    run()


LARGE = """
import os, resource, sys
from pathlib import Path
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(2**40)
sys.path[:0] = sys.argv[2:]
import cv2, numpy as np
from aethersr.picture import Picture
side, rng = int(sys.argv[1]), np.random.default_rng(0)
# In a file, whose pages don't count: so the limit is for what the writer itself takes.
pixels = np.memmap("pixels", np.uint8, "w+", shape=(side, side, 3))
for y in range(0, side, 500):
    pixels[y : y + 500] = rng.integers(0, 256, pixels[y : y + 500].shape, np.uint8)
now = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
before = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (now + 500 * 2**20, before[1]))
Picture(pixels).write(Path("out.png"), "PNG")
resource.setrlimit(resource.RLIMIT_DATA, before)
found = cv2.imread("out.png")
assert all((found[y, :, ::-1] == pixels[y]).all() for y in range(0, side, 97))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_27500_times_27500_pixels_are_written_in_little_memory_and_read_by_opencv(tmp_path: Path) -> None:
    """As one IDAT chunk, as which it was written once, no other program could read it: it has over 2 GiB."""
    side = os.environ.get("AETHER_SIDE", "27500")
    words = [sys.executable, "-c", LARGE, side, str(ROOT), str(ROOT / "archs")]
    subprocess.run(words, check=True, cwd=tmp_path)
