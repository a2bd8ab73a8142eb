"""A checkpoint that claims more than it holds is refused in about as much memory as it has bytes."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from checkpoints import FILES, OLD, STATE, Calls, Reader, safetensors_of, saved, tied, with_mean

pytestmark = pytest.mark.usefixtures("one_thread")


def repacked(pickled: bytes, compression: int = zipfile.ZIP_STORED, padding: int = 0) -> bytes:
    buffer, good = io.BytesIO(), zipfile.ZipFile(io.BytesIO(FILES["net.pth"]))
    with zipfile.ZipFile(buffer, "w", compression) as bad:
        for name in good.namelist():
            bad.writestr(name, pickled if name.endswith("data.pkl") else good.read(name))
        if padding:
            bad.writestr("archive/data/bomb", bytes(padding))
    return buffer.getvalue()


def good_pickle(offset: bytes = b"", replacement: bytes = b"") -> bytes:
    with zipfile.ZipFile(io.BytesIO(FILES["net.pth"])) as good:
        content = good.read(next(name for name in good.namelist() if name.endswith("data.pkl")))
    assert offset in content
    return content.replace(offset, replacement, 1)


def value(shape: List[int], *offsets: int) -> Dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def long1(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def blown_up_text() -> Any:
    encode = __import__("_codecs").encode
    text: Any = "ab"
    for _ in range(28):  # each doubles it
        text = Calls(encode, text, "utf-16-le") if isinstance(text, str) else Calls(encode, text, "hex")
    return text


def in_itself(width: int) -> Any:
    inner: Dict[str, Any] = {"a": 1}
    for _ in range(3):
        inner = {f"{k}": inner for k in range(width)}
    return inner


def doubling(before: bytes, after: bytes) -> bytes:
    """A pickle of a pair of a pair of ... texts: few bytes, but whoever looks at all of it never ends."""
    pairs = b"".join(b"q%ch%c\x86" % (k, k) for k in range(200))
    return b"\x80\x02" + before + b"X\x01\0\0\0a" + pairs + after


MIB = 2**20
ONE = torch.zeros(1)
KERNEL, MEANS, MANY = "stages.0.0.conv.lk_conv.weight", "stages.0.0.norm.running_mean", ONE.expand(2**28)
COPIES: Any = OrderedDict((f"{k}", k) for k in range(20_000))
REBUILD = torch._tensor._rebuild_from_type_v2  # calls what it is given
BOMBS: Dict[str, Callable[[], bytes]] = {  # each name begins with its file's
    "net.pth: zeros compressed": lambda: repacked(good_pickle(), zipfile.ZIP_DEFLATED, 256 * MIB),
    "net.pth: bytearray": lambda: saved({"params": STATE, "more": Calls(bytearray, 256 * MIB)}),
    "net.pth: bytearray in a tensor": lambda: saved(
        [STATE, Calls(REBUILD, bytearray, 0, (256 * MIB,), None)]
    ),
    "old.pth: bytearray": lambda: saved({"more": Calls(bytearray, 256 * MIB)}, **OLD),
    "net.pth: storage": lambda: saved({"params": STATE, "more": Calls(torch.UntypedStorage, 2**34)}),
    "net.pth: tensor": lambda: saved({"params": STATE, "more": Calls(torch.FloatTensor, 2**17, 2**17)}),
    "net.pth: doubled text": lambda: saved({"more": blown_up_text()}),
    "net.pth: copies": lambda: saved([Calls(OrderedDict, COPIES) for _ in range(300)]),
    "net.pth: sets": lambda: repacked(b"\x80\x02(" + b"\x8f" * 600_000 + b"t."),
    "net.pth: lists": lambda: repacked(b"\x80\x02(" + b"]" * 2_000_000 + b"t."),
    "net.pth: tuples": lambda: repacked(b"\x80\x02(" + b")" + b")\x85" * 600_000 + b"t."),
    "net.pth: nested": lambda: repacked(
        b"\x80\x02" + b"}(X\x01\0\0\0a" * 50_000 + b"N" + b"u" * 50_000 + b"."
    ),
    "net.pth: key that doubles": lambda: repacked(doubling(b"}", b"K\x01s.")),
    "net.pth: function that doubles": lambda: repacked(doubling(b"", b"K\x01\x85R.")),
    "net.pth: in itself": lambda: saved(in_itself(1000)),
    "net.pth: storage of terabytes": lambda: repacked(good_pickle(b"K\x03tq", long1(2**40) + b"tq")),
    "old.pth: storage of gigabytes": lambda: FILES["old.pth"].replace(b"K\x03Ntq", long1(2**31) + b"Ntq", 1),
    "net.pth: tensor of terabytes": lambda: repacked(
        good_pickle(b"(K\x01K\x03K\x01K\x01t", b"(K\x01" + long1(2**40) + b"K\x01K\x01t")
    ),
    "net.pth: expanded tensor": lambda: with_mean(ONE.expand(1, 2**26, 1, 1)),
    "net.pth: averaged statistics": lambda: saved({"params": STATE, "params_ema": {**STATE, MEANS: MANY}}),
    "net.pth: tied": lambda: saved(tied(400)),
    "net.pth: many blocks": lambda: saved({**STATE, **{f"stages.0.{k}.x": ONE.clone() for k in range(3000)}}),
    "net.pth: many networks": lambda: saved({f"{k}.{KERNEL}": ONE.clone() for k in range(3000)}),
    "net.safetensors: terabytes": lambda: safetensors_of({"mean": value([2**40], 0, 2**42)}),
    "net.safetensors: header": lambda: struct.pack("<Q", 2**62) + b"{}",
    "net.safetensors: nested": lambda: struct.pack("<Q", 400_000) + b"{" + b"[" * 399_999,
    "net.safetensors: shared": lambda: safetensors_of({f"{k}": value([1], 0, 4) for k in range(99)}, b"abcd"),
}


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads memory from Linux' /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_claims_more_than_it_holds_is_refused_in_little_memory(reader: Reader, bomb: str) -> None:
    name, content = bomb.split(":")[0], BOMBS[bomb]()
    assert reader.read(name, FILES[name]) == ""  # what the libraries take once is no matter of the file
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = memory("VmRSS")
    reader.refuses(name, content)
    taken = memory("VmHWM") - before
    assert taken <= 64 * MIB + 24 * len(content), f"{taken / MIB:.0f} MiB for {len(content) / MIB:.2f} MiB"
