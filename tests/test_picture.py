"""Pictures keep what they were: bits, transparency, notes beside the pixels, and the right way up."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Tuple

import cv2
import numpy as np
import pytest
from conftest import ROOT
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from aethersr.errors import UserError
from aethersr.picture import FORMATS, Picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's, of broken tags
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6" title="Bild"/></x:xmpmeta>'
PROMPT = b"UNICODE\0" + "eine Katze, Schritte: 20 \u5199".encode("utf-16-be")
EXIF = Image.Exif()
for tag, value in ((0x010E, "Bild"), (0x8769, {0x829A: 0.01, 0x9286: PROMPT}), (0x8825, {1: "N"})):
    EXIF[tag] = value
IPTC = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x09\x1c\x02\x19\0\x04eins\0"
GAMMA = (b"gAMA", struct.pack(">I", 100000))
PRIMARIES = (b"cHRM", struct.pack(">8I", *[31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600]))
HDR = (b"cICP", bytes([9, 16, 0, 1]))
KINDS = sorted(set(FORMATS.values()))


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


# ----------------------------------------------------------------------------------------------------- pixels


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
@pytest.mark.parametrize(("profile", "most"), [(b"", 6), (b"broken", 25)])
def test_printing_colours_become_rgb(tmp_path: Path, kind: str, profile: bytes, most: int) -> None:
    options = {"quality": 95} if kind == "JPEG" else {}
    back = read(tmp_path, saved(IMAGE.convert("CMYK"), kind, icc_profile=profile, **options))
    assert np.abs(back.pixels.astype(int) - waves(3)).mean() < most
    assert back.notes == {}


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
    pixels[..., 3] = 255
    pixels[:6, :, 3] = 0
    back = read(tmp_path, written(tmp_path, Picture(pixels, True), "GIF"), "in.gif")
    assert np.array_equal(back.pixels[..., 3], pixels[..., 3])
    assert np.abs(back.pixels[6:, :, :3].astype(int) - pixels[6:, :, :3]).mean() < 6


# ------------------------------------------------------------------------------------------------------ notes


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


def test_an_orientation_in_xmp_alone_turns_once(tmp_path: Path) -> None:
    back = read(tmp_path, written(tmp_path, Picture(waves(3), notes={"XMP": XMP}), "PNG"))
    assert np.array_equal(back.pixels, waves(3)[::-1].swapaxes(0, 1))
    assert read(tmp_path, written(tmp_path, back, "PNG")).pixels.shape == back.pixels.shape


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, np.uint8) for kind in KINDS), ("PNG", np.uint16), ("TIFF", np.uint16), ("AVIF", np.uint16)],
)
def test_notes_are_kept_or_named(tmp_path: Path, kind: str, dtype: Any) -> None:
    text = (b"iTXt", b"workflow" + bytes(5) + "{\u00fc}".encode())
    notes = {"colour profile": PROFILE, "EXIF": EXIF.tobytes(), "XMP": XMP.replace(b"6", b"1"), "IPTC": IPTC,
             "dpi": (300, 150), "comment": "Grüße".encode(),
             "chunks": [GAMMA, PRIMARIES, HDR, text]}  # fmt: skip
    lost = set(Picture(waves(3, dtype), False, notes).write(tmp_path / "in.png", kind))
    back = Picture.read(tmp_path / "in.png").notes
    everything = {*notes, "gAMA", "cHRM", "cICP", "text 'workflow'"} - {"chunks"}
    kept = {"PNG": everything - {"IPTC"}, "BMP": {"dpi"}, "GIF": set(),
            "JPEG": {"colour profile", "EXIF", "XMP", "IPTC", "dpi", "comment"},
            "TIFF": {"colour profile", "EXIF", "XMP", "IPTC", "dpi"}}  # fmt: skip
    assert everything - lost == kept.get(kind, {"colour profile", "EXIF", "XMP", "dpi"})
    for name in everything - lost - {"gAMA", "cHRM", "cICP", "text 'workflow'", "comment"}:
        if name == "EXIF":
            exif = Image.Exif()
            exif.load(back["EXIF"])
            assert (exif[0x010E], exif.get_ifd(0x8825)[1]) == ("Bild", "N")
            assert (exif.get_ifd(0x8769)[0x829A], exif.get_ifd(0x8769)[0x9286]) == (0.01, PROMPT)
        elif name == "dpi":
            assert back["dpi"] == pytest.approx((300, 150), abs=0.05)
        elif name == "XMP":
            assert b'title="Bild"' in back["XMP"]
        else:
            assert back[name] == notes[name]
    if kind == "JPEG":
        assert back["comment"] == notes["comment"]
    if kind == "PNG":
        comment = (b"iTXt", b"Comment" + bytes(5) + notes["comment"])
        assert back["chunks"] == [*notes["chunks"], comment]
        assert Image.open(tmp_path / "in.png").text["Comment"] == "Grüße"
    with Image.open(tmp_path / "in.png") as image:
        image.load()  # another program reads it


def png(*chunks: Tuple[bytes, bytes]) -> bytes:
    """A picture with these chunks after the head."""
    whole = saved(IMAGE, "PNG")
    checked = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in map(b"".join, chunks)
    )
    return whole[:33] + b"".join(checked) + whole[33:]


def jpeg(*segments: bytes) -> bytes:
    """A picture that begins with these instead of JFIF's segment."""
    whole = saved(IMAGE, "JPEG")
    return whole[:2] + b"".join(segments) + whole[20:]


def comment(text: bytes) -> bytes:
    return b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text


JFIF = b"\xff\xe0\0\x10JFIF\0\1\1%c%c%c%c%c\0\0"


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (png(GAMMA, (b"gAMA", bytes(4)), PRIMARIES, HDR), {"chunks": [GAMMA, PRIMARIES, HDR]}),
        (png((b"gAMA", bytes(3)), (b"cICP", bytes(5)), GAMMA), {"chunks": [GAMMA]}),
        (png((b"tEXt", b"no end of a name"), (b"tEXt", b"\0no name")), {}),
        (png((b"pHYs", struct.pack(">IIB", 11811, 5906, 1))), {"dpi": (300, 150)}),
        (png((b"pHYs", struct.pack(">IIB", 2835, 2835, 1))), {"dpi": (72, 72)}),
        (png((b"pHYs", struct.pack(">IIB", 3, 2, 0))), {}),
        (png((b"pHYs", bytes(9)), (b"pHYs", b"short")), {}),
        (jpeg(JFIF % (1, 1, 44, 0, 150)), {"dpi": (300, 150)}),
        (jpeg(JFIF % (2, 0, 100, 0, 200)), {"dpi": (254, 508)}),
        (jpeg(JFIF % (0, 0, 1, 0, 1), b"\xff\xe0\0\x0aJFIF\0\1\1\1"), {}),
        (jpeg(comment(b"a"), b"\xff\xff\xff", comment(b"b\0")), {"comment": b"a\nb"}),  # fill bytes between
        (jpeg(comment(b"a\0b"), b"\xff\xfe\0\0"), {"comment": b"a\0b"}),
        (jpeg(comment(b"Gr\xfc\xdfe")), {"comment": b"Gr\xfc\xdfe"}),
        (saved(IMAGE, "BMP", dpi=(0, 0)), {}),
        (saved(IMAGE, "TIFF"), {}),
    ],
)
def test_notes_are_read_as_they_stand_and_none_is_invented(
    tmp_path: Path, content: bytes, notes: Any
) -> None:
    """Malformed and second ones are no notes. Each format gives back what it was given, and nothing more."""
    picture = read(tmp_path, content)
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "AVIF"):
        lost = set(picture.write(tmp_path / "again", kind))
        back = {"dpi": None, **Picture.read(tmp_path / "again").notes}
        assert back["dpi"] == (pytest.approx(notes["dpi"], abs=0.05) if "dpi" in notes else None), kind
        assert lost <= ({"comment"} if "comment" in notes else {"gAMA", "cHRM", "cICP"})
        with Image.open(tmp_path / "again") as image:
            image.load()  # another program reads it
            if kind in ("PNG", "BMP"):
                assert ("dpi" in image.info and min(image.info["dpi"]) > 0) == ("dpi" in notes)
            if kind == "PNG" and "comment" in notes:
                text = notes["comment"].replace(b"\0", b" ")
                assert image.text == {"Comment": text.decode("latin-1")}
            if kind == "TIFF" and "comment" in notes:
                assert image.tag_v2[270].encode("latin-1") == notes["comment"].replace(b"\0", b" ")
        if kind == ("JPEG" if content.startswith(b"\xff") else "PNG"):
            assert {**back, "dpi": 0} == {**notes, "dpi": 0}


def test_what_other_programs_write_is_kept_in_place(tmp_path: Path) -> None:
    """Texts after the pixels, and one that is compressed; a description in UTF-8; too long segments."""
    info = PngInfo()
    for name, data in (GAMMA, PRIMARIES, HDR):
        info.add(name, data)
    info.add_text("parameters", "a cat, Steps: 20", zip=True)
    info.add(b"tEXt", b"date\x002020", after_idat=True)
    content = saved(IMAGE, "PNG", pnginfo=info)
    again = written(tmp_path, read(tmp_path, content), "PNG")
    assert read(tmp_path, again).notes == read(tmp_path, content).notes
    with Image.open(io.BytesIO(again)) as image:
        image.load()
        assert image.text == {"parameters": "a cat, Steps: 20", "date": "2020"}
        assert image.info["gamma"] == 1.0
    exif = Image.Exif()
    exif[0x010E] = "Gr\u00fc\u00dfe".encode()
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        assert "Gr\u00fc\u00dfe".encode() in written(
            tmp_path, read(tmp_path, saved(IMAGE, "JPEG", exif=exif)), kind
        )
    usual = Picture(waves(3), notes={"chunks": [(b"gAMA", struct.pack(">I", 45455))]})
    assert usual.write(tmp_path / "usual.jpg", "JPEG") == [], "every JPEG has these colours"
    too_long = Picture(waves(3), notes={"XMP": bytes(70000), "comment": bytes(70000)})
    assert too_long.write(tmp_path / "long.jpg", "JPEG") == ["XMP"], "a comment takes several segments"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_hurts_nothing(tmp_path: Path, kind: str) -> None:
    directory = ImageFileDirectory_v2()
    directory[0x0112], directory[0x010E] = 1, "Bild"
    whole = b"Exif\0\0II*\0\x08\0\0\0" + directory.tobytes(8)
    for place in range(6, len(whole), 3):
        for broken in (whole[:place], whole[:place] + b"\xff\xff\xff" + whole[place + 3 :]):
            back = read(tmp_path, saved(IMAGE, kind, exif=broken))
            for other in (kind, "TIFF"):
                assert read(tmp_path, written(tmp_path, back, other)).pixels.size == back.pixels.size


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("float.tif", tiff(np.zeros((4, 4, 1), np.float32), t339=(3,)), "32-bit floating-point"),
        ("half.tif", tiff(np.zeros((4, 4, 3), np.float16), t339=(3, 3, 3)), "16-bit floating-point"),
        ("signed.tif", tiff(np.zeros((4, 4, 3), np.int16), t339=(2, 2, 2)), "16-bit signed"),
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
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, content, name)
    assert name in str(caught.value)
    assert "--input" in str(caught.value)


def test_a_format_that_cannot_hold_the_picture_is_refused() -> None:
    for picture, target, words in (
        (Picture(waves(4), True), "out.jpg", "transparency"),
        (Picture(waves(2), True), "out.bmp", "transparency"),
        (Picture(waves(3, np.uint16)), "out.webp", "16 bits"),
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
            assert f"in{ending}" in str(error)  # noqa: PT017
            assert "--input" in str(error), f"no remedy: {error}"  # noqa: PT017
        else:
            picture.write(tmp_path / "out.tif", "TIFF")
            assert np.array_equal(Picture.read(tmp_path / "out.tif").pixels, picture.pixels)

    run()


# --------------------------------------------------------------------------------------------- large pictures

LARGE = """
import resource, sys, numpy as np
from pathlib import Path
sys.path[:0] = {paths!r}
from aethersr.picture import Picture
side, folder, rng = int(sys.argv[1]), Path(sys.argv[2]), np.random.default_rng(0)
# In a file, whose pages don't count: so the limit is for what the writer itself takes.
pixels = np.memmap(folder / "pixels", np.uint8, "w+", shape=(side, side, 3))
for y in range(0, side, 500):
    pixels[y : y + 500] = rng.integers(0, 256, pixels[y : y + 500].shape, np.uint8)
now = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 500 * 2**20,) * 2)
Picture(pixels).write(folder / "out.png", "PNG")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_27500_times_27500_pixels_are_written_in_little_memory_and_read_by_opencv(tmp_path: Path) -> None:
    """As one IDAT chunk, as which it was written once, no other program could read it: it has over 2 GiB."""
    side = int(os.environ.get("AETHER_SIDE", "27500"))
    large = LARGE.format(paths=[str(ROOT), str(ROOT / "archs")])
    subprocess.run([sys.executable, "-c", large, str(side), tmp_path], check=True)
    if shutil.which("pngcheck"):
        subprocess.run(["pngcheck", "-q", tmp_path / "out.png"], check=True)
    code = "import cv2, numpy as np, sys; found = cv2.imread(sys.argv[1]);" \
        "true = np.memmap(sys.argv[2], np.uint8, 'r', shape=found.shape);" \
        "print(all((found[y, :, ::-1] == true[y]).all() for y in range(0, len(true), 97)))"  # fmt: skip
    env = {**os.environ, "OPENCV_IO_MAX_IMAGE_PIXELS": str(2**40)}
    words = [sys.executable, "-c", code, tmp_path / "out.png", tmp_path / "pixels"]
    assert subprocess.run(words, capture_output=True, check=True, env=env, text=True).stdout == "True\n"
