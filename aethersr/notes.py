"""What a picture's file says beside its pixels.

libvips keeps colour profile, EXIF, XMP and IPTC. Done here: dots per inch, which it invents where there are
none, PNG's chunks, a JPEG's comment, EXIF in TIFF; and the names of what isn't written.
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

FIELDS = {"colour profile": "icc-profile-data", "EXIF": "exif-data", "XMP": "xmp-data", "IPTC": "iptc-data"}
_MOST = {"colour profile", "EXIF", "XMP", "dpi"}
_WRITTEN = {"PNG": {*_MOST, "comment", "chunks"}, "JPEG": {*_MOST, "IPTC", "comment"}, "WEBP": _MOST,
            "TIFF": {*_MOST, "IPTC", "comment"}, "AVIF": _MOST, "BMP": {"dpi"}, "GIF": set()}  # fmt: skip
_SEGMENT = 65000  # bytes that a JPEG's segment holds at most, with a margin for its name
_COLOURS = {b"gAMA": 4, b"cHRM": 32, b"cICP": 4, b"mDCV": 24, b"cLLI": 8}  # bytes
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_OF_SRGB = {  # what a file without them means too
    (b"gAMA", struct.pack(">I", 45455)),
    (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
    (b"cICP", bytes([1, 13, 0, 1])),
}
_PNG, _TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG, _APP0, _COM, _SOS = b"\xff\xd8", b"\xff\xe0", b"\xff\xfe", b"\xff\xda"
_PHOTOSHOP, _EXIF = b"Photoshop 3.0\0", b"Exif\0\0"  # a JPEG's IPTC and EXIF begin with them, others' don't
_SUB_IFDS, _INTEROP = (0x8769, 0x8825), 0xA005
_DESCRIPTION, _DPI, _UNIT = 270, (282, 283), 296  # tags
_UNDEFINED = {27, 28, 0x8828, 0x9000, 0x9101, 0x927C, 0x9286, 0xA000, 0xA20C, *range(0xA300, 0xA303), 0xA40B}
# In a TIFF, EXIF tags are mixed with those about its pixels: size, bits, strips, resolution, XMP, profile.
_OF_PIXELS = {*range(254, 260), 262, 266, *range(273, 280), *_DPI, 284, _UNIT, 317,
              *range(318, 348), *range(512, 533), 700, 33723, 34377, 34675}  # fmt: skip


def read(content: bytes, found: Notes, orientation: Optional[int]) -> Tuple[Notes, int, bool]:
    """All notes, the pixels' EXIF orientation, and whether the last channel is no alpha.

    ``found``: what libvips read; values may be None.
    """
    if orientation and found["XMP"]:  # alone it stays, and so what a program makes of it
        found["XMP"] = re.sub(rb'(tiff:Orientation(?:="|>))[1-8]', rb"\g<1>1", found["XMP"])
    turn, tiff = orientation or 1, content.startswith(_TIFF)
    tags = _tags(content if tiff else found["EXIF"] or b"")
    if tiff:
        if tags.get(262) == 6 and tags.get(259) != 7:  # libvips turns only JPEG's into RGB
            raise ValueError("its colours are YCbCr without JPEG")
        records, resources = tags.get(33723), tags.get(34377)
        if isinstance(records, bytes) and not resources:
            resources = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records
        found["IPTC"] = _PHOTOSHOP + resources if isinstance(resources, bytes) else None
    parts = [part for part in _segments(content) if not part[1].startswith(b"XML:com.adobe.xmp")]
    dpi = _dpi(tags, parts, tiff)
    found["EXIF"], found["dpi"] = _clean(tags), dpi[::-1] if turn >= 5 else dpi
    found["comment"] = b"\n".join(data.rstrip(b"\0") for name, data in parts if name == _COM and data)
    colours = {name: data for name, data in reversed(parts) if len(data) == _COLOURS.get(name)}
    texts = [part for part in parts if part[0] in _TEXTS and 0 < part[1].find(b"\0") < 80]
    found["chunks"] = [(name, colours[name]) for name in _COLOURS if name in colours] + texts
    return {name: value for name, value in found.items() if value}, turn, tiff and tags.get(338) in (0, (0,))


def _dpi(tags: Image.Exif, parts: List[Chunk], tiff: bool) -> Tuple[float, ...]:
    """Dots per inch across and down, or nothing if the file doesn't say."""
    found: Tuple[float, ...] = ()
    with contextlib.suppress(Exception):  # broken EXIF raises many kinds
        unit = {2: 1, 3: 2.54}[tags.get(_UNIT, 2)]
        found = tuple(float(tags[tag]) * unit for tag in _DPI)
    if not tiff and found in ((), (72, 72)):  # by EXIF's standard: unknown
        found = ()
        for name, data in parts:
            if name == b"pHYs" and data[8:] == b"\1":
                found = tuple(dots * 0.0254 for dots in struct.unpack(">II", data[:8]))
            elif name == _APP0 and data[:5] == b"JFIF\0" and len(data) > 11 and data[7] in (1, 2):
                found = tuple(dots * (1, 2.54)[data[7] - 1] for dots in struct.unpack_from(">HH", data, 8))
    return found if all(0 < dots < 1e6 for dots in found) else ()


def for_file(notes: Notes, kind: str, big: bool) -> Tuple[Dict[str, bytes], bytes, List[str]]:
    """For a file of this ``kind``: fields for libvips, what put_in adds, and names of what isn't written.

    ``big``: a TIFF may need more than 4 GiB, where nothing is added.
    """
    lost = notes.keys() - _WRITTEN[kind]
    # libvips writes no EXIF into TIFF, and IPTC so that nobody can read it: see add_to_tiff.
    added = {"TIFF": {"EXIF", "IPTC", "comment"}, "PNG": {*FIELDS}}.get(kind, set())
    if kind == "JPEG":
        lost |= {n for n in ("EXIF", "XMP", "IPTC") if len(notes.get(n, b"")) > _SEGMENT}
    elif kind == "TIFF":
        has_other = _DESCRIPTION in _tags(notes.get("EXIF", b""))
        lost |= notes.keys() & (added if big else {"comment"} if has_other else set())
    fields = {FIELDS[name]: notes[name] for name in notes.keys() & FIELDS.keys() - lost - added}
    chunks, words = notes.get("chunks", []), sorted(lost - {"chunks"})
    if "chunks" in lost:
        words += [name.decode() for name, data in chunks if name in _COLOURS and (name, data) not in _OF_SRGB]
        texts = (data.split(b"\0")[0] for name, data in chunks if name in _TEXTS)
        words += [f"text {keyword.decode('latin-1')!r}" for keyword in texts]
    extra = {"PNG": _png_chunks, "JPEG": _jpeg_segments}.get(kind, lambda notes: b"")(notes)
    return fields, extra, words


def _png_chunks(notes: Notes) -> bytes:
    chunks: List[Chunk] = list(notes.get("chunks", []))
    if "colour profile" in notes:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(notes["colour profile"])))
    if "EXIF" in notes:
        chunks.append((b"eXIf", notes["EXIF"][len(_EXIF) :]))
    if "XMP" in notes:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + notes["XMP"]))
    if "dpi" in notes:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(dots / 0.0254) for dots in notes["dpi"]), 1)))
    comment = notes.get("comment", b"").replace(b"\0", b" ")  # which ends a text
    if comment:
        is_utf8 = comment.decode(errors="ignore").encode() == comment
        latin = (b"tEXt", b"Comment\0" + comment)
        chunks.append((b"iTXt", b"Comment" + bytes(5) + comment) if is_utf8 else latin)
    checked = ((name + data, struct.pack(">I", zlib.crc32(name + data))) for name, data in chunks)
    return b"".join(struct.pack(">I", len(chunk) - 4) + chunk + check for chunk, check in checked)


def _jpeg_segments(notes: Notes) -> bytes:
    dots = [min(max(round(dots), 1), 65535) for dots in notes.get("dpi", (1, 1))]
    segments = [(_APP0, b"JFIF\0\1\1" + struct.pack(">BHHBB", "dpi" in notes, *dots, 0, 0))]
    comment = notes.get("comment", b"")
    places = range(0, len(comment), _SEGMENT)
    segments += [(_COM, comment[place : place + _SEGMENT]) for place in places]
    return b"".join(name + struct.pack(">H", len(data) + 2) + data for name, data in segments)


def put_in(extra: bytes, begin: bytes) -> bytes:
    """The first bytes of a file as libvips writes it; ``extra`` replaces a PNG's or JPEG's dots per inch."""
    place, size = (len(_PNG) + 25, 21) if begin.startswith(_PNG) else (len(_JPEG), 18)
    is_there = begin[place:].startswith((b"\0\0\0\x09pHYs", _APP0 + b"\0\x10"))
    return begin[:place] + extra + begin[place + size * is_there :]


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


class _Text(str):
    """Text that Pillow writes as it stood, whatever its encoding: it decodes Latin-1, but encodes ASCII.

    It would give bytes another type, and few programs read a date that isn't of type ASCII.
    """

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        return super().encode("latin-1")


def _raw(tag: int, value: Any) -> Any:
    if tag in _UNDEFINED and isinstance(value, bytes):  # of bytes Pillow makes the type BYTE
        return (bytearray(value),)
    return _Text(value) if isinstance(value, str) else value


def _clean(tags: Image.Exif) -> bytes:
    """EXIF without orientation, thumbnail and tags that can't be written."""

    def writable(some: Dict[int, Any]) -> Dict[int, Any]:
        found = {}
        some.pop(_INTEROP, None)  # a place in the old file
        for tag, value in some.items():
            with contextlib.suppress(Exception):
                directory = ImageFileDirectory_v2()
                directory[tag] = _raw(tag, value)
                directory.tobytes()
                found[tag] = _raw(tag, value)
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
        inner = source.get_ifd(tag).items() if tag in _SUB_IFDS else ()
        tags[tag] = {key: _raw(key, each) for key, each in inner} or _raw(tag, value)
    if notes.get("IPTC", b"").startswith(_PHOTOSHOP):
        tags[34377] = notes["IPTC"][len(_PHOTOSHOP) :]
    if "comment" in notes and _DESCRIPTION not in tags:
        tags[_DESCRIPTION] = notes["comment"].replace(b"\0", b" ")
    if "dpi" not in notes:
        tags[_UNIT] = 1  # none
    if tags:
        own = append(tags.tobytes(append(b"")))
        file.seek(4)
        merged = {**entries(*struct.unpack("<I", file.read(4))), **entries(own)}
        directory = b"".join(merged[tag] for tag in sorted(merged))
        place = append(struct.pack("<H", len(merged)) + directory + bytes(4))
        file.seek(4)
        file.write(struct.pack("<I", place))
