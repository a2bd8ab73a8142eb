"""Between a stranger's file and PyTorch: what kind of file it is, and how much memory its pickles ask for."""

from __future__ import annotations

import io
import pickletools
import re
import sys
import warnings
import zipfile
from typing import Any, BinaryIO, Dict, List

import torch

from aethersr.errors import Refused

ROOM = 2**25  # bytes that a file may take beyond what its size accounts for
_OBJECTS = 24  # Python's objects take up to so many bytes for one in a pickle
_COSTS = {"MARK": 64, "EMPTY_SET": 216, "EMPTY_DICT": 96, "EMPTY_LIST": 96}  # of opcodes, where fixed

_KINDS = {
    rb"\x89PNG|\xff\xd8\xff|RIFF.{4}WEBP|GIF8|II\*\0|MM\0\*": "a picture; expected a network's weights",
    rb"version https://git-lfs": "a git-lfs pointer, not the file itself; git lfs pull, or download it again",
    rb"\s*<(!doctype|html|head|body|\?xml|!--)": (
        "a web page; download the file itself (on GitHub with its Raw link)"
    ),
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|.{257}ustar": "an archive; unpack it first",
    rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]": "an ONNX file; expected the weights that it was made from",
}
_ALONE = "torch.save(model.state_dict(), 'weights.pth')"
_PROTOCOL = "was saved with pickle_protocol={}, which PyTorch loads only with code; use 2"
_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def check_kind(head: bytes, weights: bool = True) -> None:
    """Raise Refused if a file that begins with ``head`` is known to be no weights, or at least no network."""
    if not head:
        raise Refused("is empty; copy it again")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):  # Windows' editors save text with a byte order mark
        head = head.decode("utf-16", "ignore").encode()
    head = head[3:] if head.startswith(b"\xef\xbb\xbf") else head
    for pattern, kind in list(_KINDS.items())[: None if weights else 3]:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise Refused(f"is {kind}")
    text = head.decode("utf-8", "ignore").strip() if weights else ""
    if text and all(character.isprintable() or character.isspace() for character in text):
        raise Refused(f"is text that begins with {text.splitlines()[0][:60]!r}; download the file again")


def load_pickled(content: bytes) -> Any:
    """What torch.save wrote, without running code. Raises Refused, or MemoryError."""
    pickles = [content]
    try:
        if content.startswith(b"PK\x03\x04"):
            pickles = _pickles(content)
            for pickled in pickles:
                _follow(io.BytesIO(pickled), len(content))
        elif content.startswith(b"\x80") and _MAGIC not in content[:32]:
            raise Refused(f"is a pickle that torch.save didn't write; write it with {_ALONE}")
        else:  # before PyTorch 1.6: five pickles, of which the first is a number, and then the raw weights
            stream = io.BytesIO(content)
            for _ in range(5):
                _follow(stream, len(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (Refused, MemoryError):
        raise
    except Exception as error:
        # Not PyTorch's own message, which is about its internals and advises running the code.
        asked = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        why = "is not a readable checkpoint: it is damaged, or something else; copy it again"
        if asked and b"_modules" in content:
            why = f"holds a whole module ({asked[1][:80]}), not its weights; {_ALONE}"
        elif asked:
            why = f"asks to run code on loading ({asked[1][:80]!r}), which is refused; save weights, {_ALONE}"
        elif any(pickled.startswith(b"\x80\x03") for pickled in pickles):
            why = _PROTOCOL.format(3)  # which PyTorch opens as long as there are no bytes in it
        raise Refused(why) from None


def _pickles(content: bytes) -> List[bytes]:
    """The pickles in torch.save's archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") for name in names):
            raise Refused(f"is TorchScript, a program; expected weights, {_ALONE}")
        if not any(name.endswith("/data.pkl") for name in names):
            raise Refused(f"is a zip archive of {names[0][:60]!r}; unpack it first")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > len(content) + ROOM:
            raise Refused("is a compressed archive of far more bytes; expected what torch.save writes")
        return [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]


def _follow(stream: BinaryIO, file_size: int) -> None:
    """Follow a pickle with sizes in place of objects. Refused if they are too large.

    Without running any code, PyTorch still makes what a pickle asks for: bytearray(2**40), a set of 216 bytes
    for each byte, a copy of a long dictionary for every few, the hash of a tuple that doubles forty times.
    """
    room = ROOM + _OBJECTS * file_size
    stack: List[Any] = []  # texts, numbers, tuples of a size and items, lists of one other object's size
    marks: List[int] = []
    memo: Dict[Any, Any] = {}
    made: Any
    for opcode, made, _ in pickletools.genops(stream):
        name, before = opcode.name, opcode.stack_before
        marked = pickletools.markobject in before
        begin = marks.pop() - before.index(pickletools.markobject) if marked else len(stack) - len(before)
        taken = stack[begin:]
        del stack[begin:]
        cost = _COSTS.get(name, sys.getsizeof(made))
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("GET"):
            made, cost = memo[made], 8
        elif name.endswith("PUT"):
            memo[made], cost = stack[-1], 96
        elif name.startswith("EMPTY_"):
            made = (64,) if name == "EMPTY_TUPLE" else [64]
        elif name.startswith("TUPLE"):
            cost = sys.getsizeof(taken) + sum(each[0] for each in taken if isinstance(each, tuple))
            made = (cost, *taken)  # with all in it, as if nothing were shared: a hash visits all
        elif name in ("REDUCE", "NEWOBJ"):
            cost = _size_of_call(*taken)
            made = [cost]
        elif name.startswith(("APPEND", "SETITEM", "BUILD")):
            made = taken[0]
            made[0] += 64 * len(taken)
            cost = _size(taken[1]) if name == "BUILD" else len(taken) * (8 if name[0] == "A" else 64)
        elif name == "PROTO" and made > 3:
            raise Refused(_PROTOCOL.format(made))
        room -= cost
        if room < 0:
            raise Refused("asks for far more memory than it has bytes; pass a plain checkpoint")
        if name != "MARK":
            stack += [made] * len(opcode.stack_after)


def _size(value: Any) -> int:
    """The bytes of a copy."""
    if isinstance(value, list):
        return int(value[0])
    each = 64 if isinstance(value, tuple) else 1
    return each * len(value) if isinstance(value, (tuple, str, bytes)) else 0


def _size_of_call(function: Any, arguments: Any) -> int:
    """The bytes of what a call makes at most. Refused for what no torch.save writes: it could be any size."""
    kind, (_, *given) = function.split()[-1] if isinstance(function, str) else "", arguments
    size = sum(map(_size, given))
    if kind == "_rebuild_from_type_v2":  # calls its first argument with its third
        return size + _size_of_call(given[0], given[2])
    if kind == "bytearray" and given and isinstance(given[0], int):
        return int(given[0])
    allocates = kind.endswith(("Tensor", "Storage")) and given
    if allocates or (kind == "encode" and given[1:] not in (["latin1"], ["latin-1"])):
        raise Refused(f"asks for memory by calling {kind}; pass a plain checkpoint")
    return size
