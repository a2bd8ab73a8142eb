"""What is no checkpoint of an AetherNet is refused in one line that says what it is; nothing in a file runs.

Files that are larger than they look: test_checkpoint_bombs.py.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from checkpoints import FILES, NET, OLD, STATE, Calls, Reader, saved, with_mean
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from safetensors.torch import save
from torch import nn

from aethersr.checkpoint import read_checkpoint
from aethersr.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def in_memory(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def script(file: io.BytesIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8)), file)


SETTINGS = {"state_dict": STATE, "hyper_parameters": argparse.Namespace(rate=1)}
MEAN = STATE["mean"]
OTHERS: Dict[str, Callable[[], bytes]] = {
    "is empty": lambda: b"",
    "is a git-lfs pointer, not the file itself; git lfs pull": lambda: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6251340\n"
    ),
    "is a web page; download the file itself": lambda: b"\n\n<!DOCTYPE html>\n<html lang='en'>",
    "is a git-lfs pointer": lambda: "version https://git-lfs.github.com/spec/v1".encode("utf-16"),
    "is a picture; expected": lambda: b"\x89PNG\r\n\x1a\n\0\0\0",
    "is a web page": lambda: b"\xef\xbb\xbf<html>",
    "is text that begins with 'Entry not found'; download": lambda: b"Entry not found",
    "is TorchScript, a program; expected weights": lambda: in_memory(script),
    "holds a whole module (aether_arch.AetherNet), not its weights; torch.save(": lambda: saved(NET),
    "asks to run code on loading ('argparse.Namespace'), which is refused": lambda: saved(SETTINGS),
    "was saved with pickle_protocol=4": lambda: saved(STATE, pickle_protocol=4),
    "was saved with pickle_protocol=3": lambda: saved([STATE, b"abc"], pickle_protocol=3),
    "saved with pickle_protocol=3": lambda: saved([STATE, b"abc"], pickle_protocol=3, **OLD),
    "is a pickle that torch.save didn't write": lambda: pickle.dumps(STATE, 4),
    "is an archive; unpack it first": lambda: gzip.compress(FILES["net.pth"]),
    "is an archive; unpack": lambda: tarfile.TarInfo("net.pth").tobuf(),
    "is a zip archive of 'net.pth'; unpack it first": lambda: in_memory(
        lambda file: zipfile.ZipFile(file, "w").writestr("net.pth", FILES["net.pth"])
    ),
    "is an ONNX file": lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0",
    "is not a readable checkpoint: it is damaged, or something else; copy": lambda: bytes(range(256)),
    "is not a whole .safetensors file": lambda: FILES["net.safetensors"][:-9],
    "holds a Tensor, expected a state dict": lambda: saved(torch.zeros(3)),
    "Keys at the top: 'weight', 'bias'; known wrappers": lambda: saved(nn.Conv2d(3, 3, 3).state_dict()),
    "missing: 1 (mean)": lambda: with_mean(3),
    "'mean', which is sparse; expected dense": lambda: with_mean(MEAN.to_sparse()),
    "'mean', which is quantised": lambda: with_mean(torch.quantize_per_tensor(MEAN, 1, 0, torch.qint8)),
    "'mean' is on the meta device, without values": lambda: with_mean(MEAN.to("meta")),
    "'mean', which is nested": lambda: with_mean(
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    ),
    "'mean', which is torch.int64; expected dense": lambda: with_mean(MEAN.long()),
    "'mean', which is torch.int8; expected dense": lambda: with_mean(MEAN.to(torch.int8)),
    "'mean', which is torch.complex64": lambda: with_mean(MEAN.to(torch.complex64)),
    "'mean' holds no value; its shape is (1, 0, 1, 1)": lambda: with_mean(torch.zeros(1, 0, 1, 1)),
    "of another shape: 1 (mean)": lambda: with_mean(torch.zeros(())),
    "claim more than the file holds": lambda: with_mean(torch.zeros(1).expand(2**40)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("words", OTHERS)
def test_other_content_is_refused_with_what_it_is_under_any_name(reader: Reader, words: str) -> None:
    content = OTHERS[words]()
    for name in ("a.pth", "a.safetensors"):
        reader.refuses(name, content, words)


def test_one_value_that_is_not_finite_is_found_in_any_tensor_of_the_chosen_weights(reader: Reader) -> None:
    for (name, value), bad in zip(STATE.items(), itertools.cycle(map(float, ("nan", "inf", "-inf")))):
        broken = value.clone()
        broken.view(-1)[-1] = bad
        assert name in reader.refuses("a.safetensors", save({**STATE, name: broken}), "NaN or Inf")
    everywhere = {name: value * float("nan") for name, value in STATE.items()}
    reader.refuses("a.pth", saved({"params": everywhere}), "NaN or Inf")
    assert reader.read("a.pth", saved({"params": everywhere, "params_ema": STATE})) == ""


def test_without_safetensors_its_files_say_what_to_install(reader: Reader, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    reader.refuses("a.pth", FILES["net.safetensors"], "pip install safetensors, or pass a .pth file")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a" * 100_000, "\u202egnp.exe", "", "\0"])
def test_names_of_tensors_make_no_long_lines(tmp_path: Path, name: str) -> None:
    for content in ({**STATE, f"{name}.": torch.full((1,), float("nan"))}, {name: torch.zeros(1)}):
        (tmp_path / "a.pth").write_bytes(saved(content))
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / "a.pth")
        assert len(str(error.value)) < 700
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", FILES)
@settings(FUZZ, max_examples=80)
@given(damage=DAMAGE)
def test_damage_ends_in_an_error_or_in_a_whole_network(reader: Reader, name: str, damage: Any) -> None:
    reader.read(name, damaged(FILES[name], damage))


CODE = "asks to run code on loading"
LAYOUTS: Dict[str, Tuple[str, Callable[[Any], bytes]]] = {
    "beside the weights": (CODE, lambda payload: saved({"params": STATE, "more": payload})),
    "in place of a tensor": (CODE, lambda payload: saved({"params": {**STATE, "mean": payload}})),
    "old": (CODE, lambda payload: saved({"params": STATE, "more": payload}, **OLD)),
    "a pickle": ("torch.save didn't write", lambda payload: pickle.dumps(payload, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_payload_runs(reader: Reader, layout: str) -> None:
    marker, (words, make) = reader.folder.with_name("ran"), LAYOUTS[layout]
    touch = f"touch {marker}"
    for payload in (
        Calls(os.system, touch),
        Calls(subprocess.Popen, ["touch", str(marker)]),
        Calls(eval, f"open({str(marker)!r}, 'w')"),
        Calls(open, str(marker), "w"),
        Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        Calls(shutil.rmtree, str(reader.folder)),
        Calls(getattr, Path, "unlink"),
        Calls(functools.partial, os.system, touch),
        Calls(torch.load, "nested.pth"),
    ):
        reader.refuses("a.pth", make(payload), words)
        assert not marker.exists(), payload.call
