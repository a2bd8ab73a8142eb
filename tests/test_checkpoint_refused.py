"""What is no checkpoint of an AetherNet is refused in one line: other files, damaged ones, code.

Nothing in a file runs. Files that are larger than they look: test_checkpoint_bombs.py.
"""

from __future__ import annotations

import argparse
import builtins
import decimal
import functools
import importlib
import io
import itertools
import operator
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from checkpoints import FILES, NET, OLD, STATE, Calls, Reader, safetensors_of, saved, with_mean
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from safetensors.torch import save
from torch import nn

from aethersr.checkpoint import DTYPES, read_checkpoint
from aethersr.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------- other content


def test_a_path_that_is_no_checkpoint_is_named_with_the_option_to_change(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    endings = ".pth, .pt, .ckpt, .bin or .safetensors"
    for name, words in (
        ("no.pth", "does not exist"),
        ("folder.pth", "is not a file"),
        ("empty.pth", "is empty"),
        ("a.onnx", f"ends in '.onnx'; expected a checkpoint that ends in {endings}"),
    ):
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / name, "--model")
        assert f"{tmp_path / name} {words}" in str(error.value)
        assert "--model" in str(error.value)
        assert "--model_path" not in str(error.value)


def test_other_content_is_refused_with_what_it_is(reader: Reader) -> None:
    for content, words in (
        (b"hello", "not a readable checkpoint: it is damaged, or something else; copy it again"),
        (saved(torch.zeros(3)), "holds a Tensor, expected a state dict"),
        (saved([1, 2]), "holds a list, expected a state dict"),
        (saved(nn.Conv2d(3, 3, 3).state_dict()), "Keys at the top: 'weight', 'bias'; known wrappers"),
        (with_mean(torch.zeros(1).expand(2**40)), "claim more than the file holds"),
        (with_mean(3), "missing: 1 (mean)"),
    ):
        reader.refuses("a.pth", content, words)
    reader.refuses("a.safetensors", b"hello there, friend", "is not a whole .safetensors file")


def test_every_number_type_but_plain_floats_is_refused_by_name(reader: Reader) -> None:
    types = {value for value in vars(torch).values() if isinstance(value, torch.dtype)} - {*DTYPES}
    tried = set()
    for dtype in types:
        scale = {} if dtype == torch.int8 else {"mean_scale": torch.zeros(1)}  # with one, int8 is that form's
        try:
            mean = torch.zeros(3 * 16, dtype=torch.uint8).view(dtype)[:3].view(1, 3, 1, 1)
            content = saved({**STATE, "mean": mean, **scale})
        except Exception:  # quantised types and those of less than a byte cannot be made or saved
            continue
        line = reader.refuses("a.pth", content)
        assert f"'mean' is {dtype} " in line or "_rebuild_tensor_v3" in line  # as PyTorch saves the newest
        tried.add(dtype)
    assert len(tried) >= 10
    assert torch.int8 in tried
    for dtype, size in (("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8), ("U16", 2), ("BOOL", 1)):
        header = {"mean": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
        reader.refuses("a.safetensors", safetensors_of(header, bytes(size)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
def test_tensors_that_hold_no_plain_values_are_refused(reader: Reader) -> None:
    for value in (
        torch.zeros(1, 3, 1, 1).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.zeros(1, 3, 1, 1, device="meta"),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.zeros(1, 0, 1, 1),
        torch.zeros(()),
    ):
        reader.refuses("a.pth", with_mean(value))


def test_one_value_that_is_not_finite_is_found_in_any_tensor(reader: Reader) -> None:
    for (name, value), bad in zip(STATE.items(), itertools.cycle(map(float, ("nan", "inf", "-inf")))):
        broken = value.clone()
        broken.view(-1)[-1] = bad
        assert name in reader.refuses("a.pth", saved({"params": {**STATE, name: broken}}), "NaN or Inf")
        assert name in reader.refuses("a.safetensors", save({**STATE, name: broken}), "NaN or Inf")


def test_values_that_are_not_finite_beside_the_chosen_weights_do_not_matter(reader: Reader) -> None:
    broken = {name: value * float("nan") for name, value in STATE.items()}
    content = {"params": broken, "params_ema": STATE, "optimizer": {"state": {0: broken}}}
    assert reader.read("a.pth", saved(content)) == ""


@pytest.mark.parametrize(
    ("package", "named"),
    [("raise ImportError", "safetensors"), ("import lacking.part", "lacking"), (None, "safetensors")],
)
def test_without_safetensors_its_files_are_named_with_what_to_install(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any, package: Any, named: str
) -> None:
    content, folder = save(STATE), tmp_path_factory.mktemp("packages")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    if package is None:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    else:
        (folder / "safetensors.py").write_text(package)
        monkeypatch.syspath_prepend(folder)
    reader.refuses("net.safetensors", content, f"pip install {named}, or pass a .pth file")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a" * 100_000, "\u202egnp.exe", "", "\0"])
def test_names_of_tensors_make_no_long_lines(tmp_path: Path, name: str) -> None:
    for content in (
        {**STATE, name: torch.full((1,), float("nan"))},
        {name: torch.zeros(1)},
        {name: {name: 1}},
    ):
        (tmp_path / "a.pth").write_bytes(saved(content))
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / "a.pth")
        assert len(str(error.value)) < 700
        assert str(error.value).isprintable()


# ---------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_of_200_places_is_refused(reader: Reader, name: str) -> None:
    whole = FILES[name]
    assert reader.read(name, whole) == ""
    size = len(whole)
    places = {*(size * k // 150 for k in range(150)), *range(25), *range(size - 25, size)}
    assert len(places) >= 199
    for place in sorted(places):
        reader.refuses(name, whole[:place])


@pytest.mark.parametrize("name", FILES)
def test_bytes_after_the_end_or_in_place_of_the_file_hurt_nobody(reader: Reader, name: str) -> None:
    whole = FILES[name]
    for content in (bytes(len(whole)), b"\xff" * len(whole), whole[::-1]):
        reader.refuses(name, content)
    for content in (whole + whole, whole + bytes(100_000)):
        reader.read(name, content)


@pytest.mark.parametrize("name", FILES)
@settings(FUZZ, max_examples=80)
@given(damage=DAMAGE)
def test_damage_ends_in_an_error_or_in_a_whole_network(reader: Reader, name: str, damage: Any) -> None:
    reader.read(name, damaged(FILES[name], damage))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(FUZZ, max_examples=1000)
@given(damage=DAMAGE)
def test_damage_of_a_thousand_kinds_does_too(reader: Reader, name: str, damage: Any) -> None:
    reader.read(name, damaged(FILES[name], damage))


# ------------------------------------------------------------------------------------------------------- code


class Watch:
    """While it is on, notes what a payload could want; each such action is an event of the interpreter."""

    WATCHED = (
        *("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename"),
        *("shutil.", "socket.", "ctypes.", "pickle.find_class", "compile", "marshal."),
    )

    def __init__(self) -> None:
        self.on, self.events = False, []  # type: Tuple[bool, List[str]]
        sys.addaudithook(self.note)  # C code raises events too; nobody can remove it again

    def note(self, event: str, arguments: Tuple[Any, ...]) -> None:
        if not self.on:
            return
        writing = event == "open" and {*"wax"} & {*str(arguments[1])}
        # A folder that is opened to write: pytest's nameless files.
        if event.startswith(self.WATCHED) or (writing and not os.path.isdir(arguments[0])):
            self.events.append(f"{event} {arguments}")

    def __enter__(self) -> None:
        self.events.clear()
        self.on = True

    def __exit__(self, *_: Any) -> None:
        self.on = False


WATCH = Watch()


def reads_without_running(reader: Reader, name: str, content: bytes) -> str:
    """The error; none of the interpreter's events but the reader's own files."""
    with WATCH:
        line = reader.read(name, content)
    own = re.compile(rf"(open|os.remove) .*{re.escape(name)}")
    foreign = [event for event in WATCH.events if not own.match(event)]
    assert not foreign, foreign
    return line


def test_the_watch_notices_code_that_runs(tmp_path: Path) -> None:
    with WATCH:
        pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}")))
    assert (tmp_path / "ran").exists()
    assert {event.split()[0] for event in WATCH.events} >= {"os.system", "pickle.find_class"}


@pytest.mark.parametrize("name", FILES)
def test_a_good_file_is_read_without_pythons_own_unpickler(reader: Reader, name: str) -> None:
    assert reads_without_running(reader, name, FILES[name]) == ""


def payloads(marker: Path) -> Dict[str, Calls]:
    """Each would make ``marker``, or do something else that the watch notices."""
    touch = f"touch {marker}"
    return {
        "system": Calls(os.system, touch),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, Path, "unlink"),
        "import": Calls(importlib.import_module, "antigravity"),
        "run": Calls(runpy.run_path, str(marker)),
        "partial": Calls(functools.partial, os.system, touch),
        "attribute": Calls(operator.methodcaller, "system", touch),
        "remove": Calls(shutil.rmtree, str(marker.parent)),
        "pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "torch": Calls(torch.load, "nested.pth"),
        "hub": Calls(torch.hub.load, "nobody/nothing", "x"),
        "input": Calls(builtins.input),
    }


CODE = "asks to run code on loading"
LAYOUTS: Dict[str, Tuple[str, str, Callable[[Any], bytes]]] = {
    "beside the weights": ("net.pth", CODE, lambda payload: saved({"params": STATE, "more": payload})),
    "in place of a tensor": ("net.pth", CODE, lambda payload: saved({"params": {**STATE, "mean": payload}})),
    "old": ("old.pth", CODE, lambda payload: saved({"params": STATE, "more": payload}, **OLD)),
    "a pickle": ("old.pth", CODE, lambda payload: pickle.dumps(payload, 2)),
    "a new pickle": ("old.pth", CODE, lambda payload: pickle.dumps(payload, 4)),
    "safetensors": ("net.safetensors", "", saved),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_payload_runs(reader: Reader, layout: str) -> None:
    marker, (name, words, make) = reader.folder.with_name("ran"), LAYOUTS[layout]
    for kind, payload in payloads(marker).items():
        line = reads_without_running(reader, name, make(payload))
        assert line, kind
        assert words in line, kind
        assert not marker.exists(), kind


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_class_that_is_refused_is_named_with_the_way_to_save_the_weights_alone(
    reader: Reader, protocol: int
) -> None:
    twice = [argparse.ArgumentError, argparse.Namespace(rate=1)]  # the second names the module by reference
    for content, name in (
        (argparse.Namespace(rate=1), "argparse.Namespace"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (NET, "aether_arch.AetherNet"),
        (twice, "argparse.ArgumentError"),
    ):
        checkpoint = saved({"state_dict": STATE, "hyper_parameters": content}, pickle_protocol=protocol)
        line = reader.refuses("a.pth", checkpoint, repr(name))
        assert "save the weights alone, torch.save(model.state_dict(), 'weights.pth')" in line


def test_archives_of_code_are_not_opened(reader: Reader) -> None:
    script, archive = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8)), script)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    for content in (script, archive):
        assert reads_without_running(reader, "net.pth", content.getvalue())
