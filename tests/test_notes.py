"""What stands beside the pixels is kept or named, and nothing is invented."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any, Tuple

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from test_picture import IMAGE, read, saved, tiff, waves, written

from aethersr.notes import for_file
from aethersr.picture import FORMATS, Picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's, of broken tags
KINDS = sorted({*FORMATS.values()})
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6" title="Bild"/></x:xmpmeta>'
PROMPT = b"UNICODE\0" + "eine Katze, Schritte: 20 \u5199".encode("utf-16-be")
EXIF = Image.Exif()
EXPOSURE = {0x829A: 0.01, 0x9003: "2020:01:01 10:11:12", 0x9101: b"\1\2\3\0", 0x9286: PROMPT}
for tag, value in ((0x010E, "Bild"), (0x8769, {**EXPOSURE, 0xA005: 26}), (0x8825, {1: "N"})):
    EXIF[tag] = value
IPTC = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x09\x1c\x02\x19\0\x04eins\0"
GAMMA = (b"gAMA", struct.pack(">I", 100000))
PRIMARIES = (b"cHRM", struct.pack(">8I", *[31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600]))
HDR = (b"cICP", bytes([9, 16, 0, 1]))


def test_an_orientation_in_xmp_turns_nothing_and_is_reset_where_that_of_exif_turns(tmp_path: Path) -> None:
    alone = read(tmp_path, written(tmp_path, Picture(waves(3), notes={"XMP": XMP}), "PNG"))
    assert np.array_equal(alone.pixels, waves(3))
    assert alone.notes == {"XMP": XMP}
    exif = Image.Exif()
    exif[0x0112] = 6
    both = read(tmp_path, saved(IMAGE, "JPEG", exif=exif, xmp=XMP, dpi=(300, 150)))
    assert both.pixels.shape == (20, 12, 3)
    assert both.notes == {"XMP": XMP.replace(b"6", b"1"), "dpi": (150, 300)}
    assert read(tmp_path, saved(IMAGE, "AVIF", exif=exif, xmp=XMP)).notes == {"XMP": XMP.replace(b"6", b"1")}


DEEP = [(kind, np.uint16) for kind in ("PNG", "TIFF", "AVIF")]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, np.uint8) for kind in KINDS), *DEEP])
def test_notes_are_kept_or_named(tmp_path: Path, kind: str, dtype: Any) -> None:
    text = (b"iTXt", b"workflow" + bytes(5) + "{\u00fc}".encode())
    notes = {"colour profile": PROFILE, "EXIF": EXIF.tobytes(), "XMP": XMP, "IPTC": IPTC,
             "dpi": (300, 150), "comment": "Grüße".encode(),
             "chunks": [GAMMA, PRIMARIES, HDR, text]}  # fmt: skip
    lost = set(Picture(waves(3, dtype), False, notes).write(tmp_path / "in.png", kind))
    back = Picture.read(tmp_path / "in.png").notes
    everything = {*notes, "gAMA", "cHRM", "cICP", "text 'workflow'"} - {"chunks"}
    most = {"colour profile", "EXIF", "XMP", "dpi"}
    kept = {"PNG": everything - {"IPTC"}, "JPEG": {*most, "IPTC", "comment"}, "TIFF": {*most, "IPTC"},
            "BMP": {"dpi"}, "GIF": set()}.get(kind, most)  # fmt: skip
    assert everything - lost == kept
    if "EXIF" in kept:
        exif, block = Image.Exif(), back.pop("EXIF")
        exif.load(block)
        assert (exif[0x010E], exif.get_ifd(0x8825)[1]) == ("Bild", "N")
        inner = exif.get_ifd(0x8769)
        assert {tag: inner.get(tag) for tag in EXPOSURE} == EXPOSURE, "text as text: else no date is read"
        assert 0xA005 not in inner, "a place in the old file"
        undefined = b"\x01\x91\x07\0", b"\x86\x92\x07\0", b"\x91\x01\0\x07", b"\x92\x86\0\x07"  # tag, type
        for content in (block, (tmp_path / "in.png").read_bytes() if kind == "TIFF" else block):
            assert sum(entry in content for entry in undefined) == 2
        assert b'title="Bild"' in back.pop("XMP")
    assert back.pop("dpi", None) == (pytest.approx((300, 150), abs=0.05) if "dpi" in kept else None)
    if kind == "PNG":
        inside = (b"iTXt", b"Comment" + bytes(5) + notes["comment"])
        assert back.pop("chunks") == [*notes["chunks"], inside]
    same = kept & {"colour profile", "IPTC", "comment"} - ({"comment"} if kind == "PNG" else set())
    assert back == {name: notes[name] for name in same}
    with Image.open(tmp_path / "in.png") as image:
        image.load()  # another program reads it
        assert kind != "PNG" or image.text["Comment"] == "Grüße"


def png(*chunks: Tuple[bytes, bytes]) -> bytes:
    whole = saved(IMAGE, "PNG")
    for name, data in reversed(chunks):
        check = struct.pack(">I", zlib.crc32(name + data))
        whole = whole[:33] + struct.pack(">I", len(data)) + name + data + check + whole[33:]
    return whole


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
def test_notes_are_read_as_they_are_and_none_is_invented(tmp_path: Path, content: bytes, notes: Any) -> None:
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
            if kind in ("PNG", "TIFF") and "comment" in notes:
                text = image.text["Comment"] if kind == "PNG" else image.tag_v2[270]
                assert text.encode("latin-1") == notes["comment"].replace(b"\0", b" ")
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
    described = read(tmp_path, saved(IMAGE, "JPEG", exif=exif))
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        assert exif[0x010E] in written(tmp_path, described, kind)
    usual = Picture(waves(3), notes={"chunks": [(b"gAMA", struct.pack(">I", 45455))]})
    assert usual.write(tmp_path / "usual.jpg", "JPEG") == [], "every JPEG has these colours"
    assert Image.open(tmp_path / "usual.jpg").quantization[0][0] == 2, "quality 95"
    assert read(tmp_path, tiff(waves(3), t33723=IPTC[26:-1])).notes == {"IPTC": IPTC[:-1]}
    assert for_file({"EXIF": EXIF.tobytes(), "comment": b"a"}, "TIFF", big=True)[2] == ["EXIF", "comment"]
    too_long = Picture(waves(3), notes=dict.fromkeys(("EXIF", "XMP", "comment"), bytes(70000)))
    assert too_long.write(tmp_path / "long.jpg", "JPEG") == ["EXIF", "XMP"], "a comment takes several"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_hurts_nothing(tmp_path: Path, kind: str) -> None:
    directory = ImageFileDirectory_v2()
    directory[0x0112], directory[0x010E] = 1, "Bild"
    whole = b"Exif\0\0II*\0\x08\0\0\0" + directory.tobytes(8)
    for place in range(6, len(whole), 5):
        for broken in (whole[:place], whole[:place] + b"\xff\xff\xff" + whole[place + 3 :]):
            back = read(tmp_path, saved(IMAGE, kind, exif=broken))
            for other in (kind, "TIFF"):
                assert read(tmp_path, written(tmp_path, back, other)).pixels.size == back.pixels.size
