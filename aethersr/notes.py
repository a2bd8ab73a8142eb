"""What a picture's file says beside its pixels.

libvips keeps colour profile, EXIF, XMP, IPTC and dpi. Added here: PNG chunks about colours and with text, a
JPEG's comment, EXIF in TIFF; and the names of what a format can't hold.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Tuple

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# By the names that a user is shown: "dpi" (across, down), "chunks" of a PNG, all others as bytes.
Notes = Dict[str, Any]
Chunk = Tuple[bytes, bytes]  # name and content
Extra = Tuple[int, bytes]  # what to put into a file that libvips writes, and after how many bytes

FIELDS = {"colour profile": "icc-profile-data", "EXIF": "exif-data", "XMP": "xmp-data", "IPTC": "iptc-data"}
_MOST = {"colour profile", "EXIF", "XMP", "dpi"}
_HELD = {"PNG": {*_MOST, "comment", "chunks"}, "JPEG": {*_MOST, "IPTC", "comment"}, "TIFF": {*_MOST, "IPTC"},
         "WEBP": _MOST, "AVIF": _MOST, "BMP": {"dpi"}, "GIF": set()}  # fmt: skip
_SEGMENT = 65000  # bytes that a JPEG's segment holds at most, with a margin for its name
_COLOURS = {b"gAMA": 4, b"cHRM": 32, b"cICP": 4, b"mDCV": 24, b"cLLI": 8}  # bytes
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_OF_SRGB = {  # what a file without them means too
    (b"gAMA", struct.pack(">I", 45455)),
    (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
    (b"cICP", bytes([1, 13, 0, 1])),
}
_PNG, _TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG, _COM, _SOS = b"\xff\xd8", b"\xff\xfe", b"\xff\xda"
_PHOTOSHOP = b"Photoshop 3.0\0"  # a JPEG's IPTC begins with it, a TIFF's does not
_SUB_IFDS = (0x8769, 0x8825, 0xA005)
# In a TIFF, EXIF tags are mixed with those about its pixels: size, bits, strips, resolution, XMP, profile.
_OF_PIXELS = {*range(254, 260), 262, 266, *range(273, 280), 282, 283, 284, 296, 317,
              *range(318, 348), *range(512, 533), 700, 33723, 34377, 34675}  # fmt: skip


def read(content: bytes, found: Notes, orientation: Optional[int]) -> Tuple[Notes, int, bool]:
    """All notes, the pixels' EXIF orientation, and whether the last channel is no alpha.

    ``found``: what libvips read; values may be None.
    """
    xmp = found["XMP"]
    if xmp:
        pattern = rb'(tiff:Orientation(?:="|>))([1-8])'
        written = re.search(pattern, xmp)
        orientation = orientation or (int(written.group(2)) if written else None)
        xmp = re.sub(pattern, rb"\g<1>1", xmp)
    turn, tiff = orientation or 1, content.startswith(_TIFF)
    tags = _tags(content if tiff else found["EXIF"] or b"")
    dpi = found["dpi"]
    if _is_unknown(dpi):
        with contextlib.suppress(Exception):  # broken EXIF raises many kinds
            unit = 2.54 if tags.get(296) == 3 else 1
            dpi = float(tags[282]) * unit, float(tags[283]) * unit
    if tiff:
        records, resources = tags.get(33723), tags.get(34377)
        if isinstance(records, bytes) and not resources:
            resources = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records
        found["IPTC"] = _PHOTOSHOP + resources if isinstance(resources, bytes) else None
    parts = [part for part in _segments(content) if not part[1].startswith(b"XML:com.adobe.xmp")]
    found["EXIF"], found["XMP"] = _clean(tags), xmp
    found["dpi"] = None if _is_unknown(dpi) else dpi if turn < 5 else dpi[::-1]
    found["comment"] = b"\n".join(data.rstrip(b"\0") for name, data in parts if name == _COM)
    colours = {name: data for name, data in reversed(parts) if len(data) == _COLOURS.get(name)}
    texts = [part for part in parts if part[0] in _TEXTS and 0 < part[1].find(b"\0") < 80]
    found["chunks"] = [(name, colours[name]) for name in _COLOURS if name in colours] + texts
    notes = {name: value for name, value in found.items() if value}
    return notes, turn, tiff and tags.get(338) in (0, (0,))


def for_file(notes: Notes, kind: str, big: bool) -> Tuple[Dict[str, bytes], Extra, List[str]]:
    """For a file of this ``kind``: fields that libvips writes, what to put in, names of what it can't hold.

    ``big``: a TIFF may need more than 4 GiB, where nothing is put in.
    """
    lost = {name for name in notes if name not in _HELD[kind]}
    if kind == "JPEG":
        lost |= {n for n in ("EXIF", "XMP", "IPTC") if len(notes.get(n, b"")) > _SEGMENT}
    # libvips writes no EXIF into TIFF, and IPTC so that nobody can read it: see add_to_tiff.
    added = {"EXIF", "IPTC"} if kind == "TIFF" else set()
    lost |= added & notes.keys() if big else set()
    fields = {FIELDS[name]: notes[name] for name in notes.keys() & FIELDS.keys() - lost - added}
    chunks, comment, extra = list(notes.get("chunks", [])), notes.get("comment"), b""
    words = sorted(lost - {"chunks"})
    if "chunks" in lost:
        words += [name.decode() for name, data in chunks if name in _COLOURS and (name, data) not in _OF_SRGB]
        texts = (data.split(b"\0")[0] for name, data in chunks if name in _TEXTS)
        words += [f"text {keyword.decode('latin-1')!r}" for keyword in texts]
    if kind == "PNG":
        if comment:
            is_utf8 = comment.decode(errors="ignore").encode() == comment
            latin = (b"tEXt", b"Comment\0" + comment)
            chunks.append((b"iTXt", b"Comment" + bytes(5) + comment) if is_utf8 else latin)
        for name, data in chunks:
            extra += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        return fields, (len(_PNG) + 25, extra), words
    if comment and "comment" not in lost:
        for start in range(0, len(comment), _SEGMENT):
            part = comment[start : start + _SEGMENT]
            extra += _COM + struct.pack(">H", len(part) + 2) + part
    return fields, (len(_JPEG), extra), words


def frames_of_png(content: bytes) -> int:
    """The number of frames of an animated PNG, 0 for other files."""
    return next((int.from_bytes(data[:4], "big") for name, data in _segments(content) if name == b"acTL"), 0)


def _segments(content: bytes) -> Iterator[Chunk]:
    """A PNG's chunks except pixels, or a JPEG's segments before its pixels: name and content."""
    place = len(_PNG) if content.startswith(_PNG) else len(_JPEG)
    with contextlib.suppress(struct.error):  # at the end
        while content.startswith(_PNG):
            size, name = struct.unpack_from(">I4s", content, place)
            if name != b"IDAT":
                yield name, content[place + 8 : place + 8 + size]
            place += size + 12
        while content.startswith(_JPEG):
            while content[place : place + 2] == b"\xff\xff":  # fill bytes
                place += 1
            name, size = struct.unpack_from(">2sH", content, place)
            if name == _SOS or name[:1] != b"\xff":
                return
            yield name, content[place + 4 : place + 2 + size]
            place += size + 2


def _tags(block: bytes) -> Image.Exif:
    tags = Image.Exif()
    with contextlib.suppress(Exception):  # some broken EXIF is too broken for Pillow
        tags.load(block)
    return tags


def _is_unknown(dpi: Tuple[float, float]) -> bool:
    """Whether it is impossible, or what libvips says where it finds none."""
    return {round(value) for value in dpi} <= {25, 72} or not all(0 < value < 1e6 for value in dpi)


def _clean(tags: Image.Exif) -> bytes:
    """EXIF without orientation, thumbnail and tags that can't be written."""

    def writable(some: Dict[int, Any]) -> Dict[int, Any]:
        found = {}
        for tag, value in some.items():
            with contextlib.suppress(Exception):
                directory = ImageFileDirectory_v2()
                directory[tag] = value
                directory.tobytes()
                found[tag] = value
        return found

    kept = Image.Exif()
    with contextlib.suppress(Exception):
        inner = {tag: writable(tags.get_ifd(tag)) for tag in _SUB_IFDS if tag in tags}
        kept.update(writable({tag: tags[tag] for tag in tags.keys() - _OF_PIXELS - inner.keys()}))
        kept.update(inner)
    return kept.tobytes() if len(kept) else b""


def add_to_tiff(file: BinaryIO, notes: Notes) -> None:
    """Write a second directory at the end of a TIFF: the tags of the first, EXIF's and IPTC."""

    def append(data: bytes) -> int:
        place = file.seek(0, io.SEEK_END) + 1 & ~1
        file.seek(place)
        file.write(data)
        return place

    def entries(place: int) -> Dict[bytes, bytes]:
        file.seek(place)
        (count,) = struct.unpack("<H", file.read(2))
        found = (file.read(12) for _ in range(count))
        return {entry[1::-1]: entry for entry in found}

    source, tags = _tags(notes.get("EXIF", b"")), ImageFileDirectory_v2()
    for tag, value in source.items():
        tags[tag] = source.get_ifd(tag) if tag in _SUB_IFDS else value
    if notes.get("IPTC", b"").startswith(_PHOTOSHOP):
        tags[34377] = notes["IPTC"][len(_PHOTOSHOP) :]
    if tags:
        merged = entries(append(tags.tobytes(append(b""))))
        file.seek(4)
        merged.update(entries(*struct.unpack("<I", file.read(4))))
        directory = b"".join(merged[tag] for tag in sorted(merged))
        place = append(struct.pack("<H", len(merged)) + directory + bytes(4))
        file.seek(4)
        file.write(struct.pack("<I", place))
