"""No file that is handed in hurts: truncated, flipped, hostile, foreign or extreme, each ends in exit code 2 and one plain line with the remedy.

Where the content is at fault. Paths, disks, kills and several runs at once: test_interruption.py.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import aether_arch
import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_checkpoints import older_fused
from torch import Tensor, nn

import fuse_aether
import upscale

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
MIB = 2**20
# The same examples every time, and a failing one as it was found: making it smaller would take minutes.
FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.explicit, Phase.generate])


def tiny_state(**options: Any) -> Dict[str, Tensor]:
    return small_net(2, **{**TINY, **options}).float().state_dict()


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


STATE = tiny_state()
FILES = {
    "net.pth": saved({"params": STATE}),
    "old.pth": saved({"params": STATE}, _use_new_zipfile_serialization=False),  # as before PyTorch 1.6; BasicSR's script to publish writes it
    "net.safetensors": save(STATE),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run measures is not looked at here and takes most of its time."""
    monkeypatch.setattr(fuse_aether, "milliseconds", lambda *arguments: [1.0, 1.0])


def fuse(*arguments: Any) -> int:
    return fuse_aether.main([str(argument) for argument in arguments])


def one_line(error: str, program: str = "fuse_aether.py") -> str:
    """The one line that an error ends in, readable and with its remedy."""
    assert error.count("\n") == 1, error
    assert error.startswith(f"{program}: error: ")
    line = error[:-1]
    assert line.isprintable(), ascii(line)
    assert "Traceback" not in line
    assert "torch.load" not in line, f"PyTorch's advice to let the code run: {line}"
    assert re.search(r"--\w+", line), f"no remedy: {line}"
    assert len(line) < 700
    return line


class Folder:
    """A folder in which one checkpoint after another is refused."""

    def __init__(self, path: Path, capfd: Any) -> None:
        self.path, self.capfd = path, capfd
        self.target = path / "out.pth"

    def run(self, name: str, content: bytes) -> Tuple[int, str, Path]:
        source = self.path / name
        source.write_bytes(content)
        self.capfd.readouterr()
        code = fuse("--model_path", source, "--output_path", self.target, "--overwrite", "--device", "cpu")
        error = self.capfd.readouterr().err  # of the file descriptor: libraries write there too
        assert source.read_bytes() == content, "the input was changed"
        assert {path.name for path in self.path.iterdir()} <= {name, "out.pth"}
        source.unlink()
        return code, error, source

    def refuses(self, name: str, content: bytes, words: str = "") -> str:
        code, error, source = self.run(name, content)
        assert code == 2, error
        assert not self.target.exists()
        line = one_line(error)
        assert str(source) in line
        assert words in line
        return line

    def refuses_or_fuses(self, name: str, content: bytes) -> str:
        """For damage that may leave a whole file: then the output is whole as well, and the verification passed."""
        code, error, _ = self.run(name, content)
        if code == 2:
            assert not self.target.exists()
            one_line(error)
            return "refused"
        assert (code, error) == (0, "")
        aether_arch.aether_from_state_dict(torch.load(self.target, weights_only=True))
        self.target.unlink()
        return "fused"


@pytest.fixture
def folder(tmp_path: Path, capfd: Any) -> Folder:
    return Folder(tmp_path, capfd)


# --------------------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_of_200_places_is_refused(folder: Folder, name: str) -> None:
    whole = FILES[name]
    folder.refuses_or_fuses(name, whole)
    places = {len(whole) * k // 150 for k in range(150)} | set(range(25)) | {len(whole) - k for k in range(1, 26)}
    assert len(places) >= 199
    for place in sorted(places):
        folder.refuses(name, whole[:place])


@pytest.mark.parametrize("name", FILES)
def test_bytes_after_the_end_or_in_place_of_the_file_hurt_nobody(folder: Folder, name: str) -> None:
    whole = FILES[name]
    folder.refuses(name, bytes(len(whole)))
    folder.refuses(name, b"\xff" * len(whole))
    folder.refuses(name, whole[::-1])
    folder.refuses_or_fuses(name, whole + whole)
    folder.refuses_or_fuses(name, whole + bytes(100_000))


FLIPS = st.lists(st.tuples(st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1)), st.integers(0, 7)), min_size=1, max_size=8)


@pytest.mark.parametrize("name", FILES)
@settings(FUZZ, max_examples=30)
@given(flips=FLIPS)
def test_flipped_bits_end_in_an_error_or_in_a_verified_file(folder: Folder, name: str, flips: List[Tuple[float, int]]) -> None:
    """Heads and tails, where the structure lies, are hit more often than the weights between them."""
    content = bytearray(FILES[name])
    for place, bit in flips:
        content[int(place * (len(content) - 1))] ^= 1 << bit
    folder.refuses_or_fuses(name, bytes(content))


NAMES = st.sampled_from(list(STATE))
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("remove"), NAMES, st.none()),
        st.tuples(st.just("rename"), NAMES, st.sampled_from(["0", "1", "7", "9999", "10000", "-1", "9" * 30, "a\nb", "\x1b[31m"])),
        st.tuples(st.just("reshape"), NAMES, st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 9, 16, 32, 64]), max_size=5)),
        st.tuples(st.just("claim"), NAMES, st.lists(st.sampled_from([0, 1, 3, 2**20, 2**33, 2**40]), min_size=1, max_size=4)),
    ),
    min_size=1,
    max_size=3,
)
FORMS = {"training": STATE, "fused": small_net(2, **TINY).fused().float().state_dict(), "older fused": older_fused(small_net(2, **TINY).float())}


@pytest.mark.parametrize("form", FORMS)
@settings(FUZZ, max_examples=60)
@given(changes=CHANGES)
def test_a_state_dict_with_missing_surplus_or_misshapen_tensors_raises_a_value_error_at_most(form: str, changes: List[Any]) -> None:
    state = {name: value.float() for name, value in FORMS[form].items()}
    for change, name, detail in changes:
        if name not in state:
            continue
        if change == "remove":
            del state[name]
        elif change == "rename":
            state[re.sub(r"\d+", detail, name, count=1)] = state.pop(name)
        elif change == "reshape":
            state[name] = torch.zeros(detail)
        else:  # terabytes that take no memory, as a file can name them
            tensor = torch.zeros(0 if 0 in detail else 1)
            try:
                state[name] = tensor.new_empty([0, *detail]) if 0 in detail else tensor.expand(detail)
            except RuntimeError:  # more than 2**63 elements: not even PyTorch can name that
                continue
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aether_arch.aether_from_state_dict(state).fused()
    except ValueError as error:
        assert len(str(error)) < 700  # noqa: PT017 - what it says is looked at, whether it comes is not


# --------------------------------------------------------------------------------------------------------------- hostile


class Calls:
    """Pickles as a call of ``function`` on loading."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


WATCHED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "shutil.", "socket.", "ctypes.",
           "pickle.find_class", "compile", "marshal.")  # fmt: skip
events: List[str] = []
watching = False


def _watch(event: str, arguments: Tuple[Any, ...]) -> None:
    if not watching:
        return
    writing = event == "open" and set("wax") & set(str(arguments[1]))
    if event.startswith(WATCHED) or (writing and not os.path.isdir(arguments[0])):  # a folder: pytest's nameless files for the output
        events.append(f"{event} {arguments}")


sys.addaudithook(_watch)  # the interpreter calls it at every such action, in C code too, and nobody can remove it again


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What payloads try to make; outside the folder that is looked at."""
    global watching
    events.clear()
    watching = True
    yield tmp_path.with_name(tmp_path.name + "_ran")
    watching = False


def nothing_ran(marker: Path) -> None:
    """The interpreter did nothing that a payload could want."""
    foreign = [event for event in events if not re.match(r"(open|os.remove|os.rename) .*(net|old|out)\.", event)]
    assert not foreign, foreign
    assert not marker.exists(), "the payload ran"


def test_the_watch_notices_code_that_runs(tmp_path: Path) -> None:
    global watching
    events.clear()
    watching = True
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}")))
    watching = False
    assert (tmp_path / "ran").exists()
    assert {event.split()[0] for event in events} >= {"os.system", "pickle.find_class"}


def payloads(marker: Path) -> Dict[str, Any]:
    import builtins
    import functools
    import importlib
    import operator
    import runpy
    import shutil
    import subprocess

    return {
        "system": Calls(os.system, f"touch {marker}"),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, Path, "unlink"),
        "import": Calls(importlib.import_module, "antigravity"),
        "run": Calls(runpy.run_path, str(marker)),
        "partial": Calls(functools.partial, os.system, f"touch {marker}"),
        "attribute": Calls(operator.methodcaller, "system", f"touch {marker}"),
        "remove": Calls(shutil.rmtree, str(marker.parent)),
        "pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {marker}"))),
        "torch": Calls(torch.load, "nested.pth"),
        "allow": Calls(torch.serialization.add_safe_globals, [os.system]),
        "hub": Calls(torch.hub.load, "nobody/nothing", "x"),
        "input": Calls(builtins.input),
    }


LAYOUTS: Dict[str, Callable[[Any], bytes]] = {
    "net.pth": lambda payload: saved({"params": STATE, "more": payload}),
    "net_.pth": lambda payload: saved({"params": {**STATE, "mean": payload}}),
    "old.pth": lambda payload: saved({"params": STATE, "more": payload}, _use_new_zipfile_serialization=False),
    "old_.pth": lambda payload: pickle.dumps(payload, 2),
    "old__.pth": lambda payload: pickle.dumps(payload, 4),
    "net.safetensors": lambda payload: saved(payload),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_payload_runs(folder: Folder, marker: Path, layout: str) -> None:
    global watching
    for name, payload in payloads(marker).items():
        watching = False  # pickling may look up what it names
        content = LAYOUTS[layout](payload)
        watching = True
        line = folder.refuses(layout.replace("_", ""), content)
        assert "Weights only load failed" not in line, name
        nothing_ran(marker)


def test_archives_of_code_are_not_opened(folder: Folder, marker: Path) -> None:
    global watching
    watching = False
    buffer, archive = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8)), buffer)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    watching = True
    folder.refuses("net.pth", buffer.getvalue())
    folder.refuses("net.pth", archive.getvalue())
    nothing_ran(marker)


# ---------------------------------------------------------------------------------------------------- larger than it looks


def repacked(pickled: bytes, compression: int = zipfile.ZIP_STORED, padding: int = 0) -> bytes:
    """The good checkpoint with another pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILES["net.pth"])) as good, zipfile.ZipFile(buffer, "w", compression) as bad:
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


def safetensors_of(header: Dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def value(shape: Any, *offsets: int) -> Dict[str, Any]:
    return {"dtype": "F32", "shape": shape if isinstance(shape, list) else [shape], "data_offsets": offsets}


def archive_of_entries(count: int) -> bytes:
    entries = b"PK\x01\x02".ljust(46, b"\0") * count
    return b"PK\x03\x04" + entries + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(entries), 4, 0)


def long1(number: int) -> bytes:
    """A pickle's opcode for a large number."""
    return b"\x8a\x08" + struct.pack("<q", number)


def blown_up_text() -> Any:
    text: Any = "ab"
    for _ in range(24):  # each doubles it
        text = Calls(__import__("_codecs").encode, text, "utf-16-le") if isinstance(text, str) else Calls(__import__("_codecs").encode, text, "hex")
    return text


BOMBS: Dict[str, Callable[[], Tuple[str, bytes]]] = {
    "zeros compressed": lambda: ("net.pth", repacked(good_pickle(), zipfile.ZIP_DEFLATED, 256 * MIB)),
    "bytearray": lambda: ("net.pth", saved({"params": STATE, "more": Calls(bytearray, 256 * MIB)})),
    "bytearray of terabytes": lambda: ("net.pth", saved({"params": STATE, "more": Calls(bytearray, 2**44)})),
    "bytearray, old": lambda: ("old.pth", saved({"more": Calls(bytearray, 256 * MIB)}, _use_new_zipfile_serialization=False)),
    "doubled text": lambda: ("net.pth", saved({"more": blown_up_text()})),
    "sets": lambda: ("net.pth", repacked(b"\x80\x02(" + b"\x8f" * 600_000 + b"t.")),
    "lists": lambda: ("net.pth", repacked(b"\x80\x02(" + b"]" * 2_000_000 + b"t.")),
    "storage of terabytes": lambda: ("net.pth", repacked(good_pickle(b"K\x03tq", long1(2**40) + b"tq"))),
    "storage of gigabytes, old": lambda: ("old.pth", FILES["old.pth"].replace(b"K\x03Ntq", long1(2**31) + b"Ntq", 1)),
    "tensor of terabytes": lambda: ("net.pth", repacked(good_pickle(b"(K\x01K\x03K\x01K\x01t", b"(K\x01" + long1(2**40) + b"K\x01K\x01t"))),
    "expanded tensor": lambda: ("net.pth", saved({**STATE, "mean": torch.zeros(1).expand(1, 2**40, 1, 1)})),
    "empty tensor of many": lambda: ("net.pth", saved({**STATE, "stages.0.0.conv.lk_conv.weight": torch.zeros(0, 1, 2**31 + 1, 1)})),
    "many blocks": lambda: ("net.pth", saved({**STATE, **{f"stages.0.{k}.x": torch.zeros(1) for k in range(3000)}})),
    "many entries": lambda: ("net.pth", archive_of_entries(9000)),
    "safetensors, terabytes": lambda: ("net.safetensors", safetensors_of({"mean": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
    "safetensors, header": lambda: ("net.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "safetensors, nested": lambda: ("net.safetensors", struct.pack("<Q", 400_000) + b"[" * 400_000),
    "safetensors, shared": lambda: ("net.safetensors", safetensors_of({str(k): value(1, 0, 4) for k in range(99)}, bytes(4))),
    "safetensors, empty of many": lambda: ("net.safetensors", safetensors_of({"stages.0.0.conv.lk_conv.weight": value([0, 2**60], 0, 0)})),
}  # fmt: skip


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]


def can_measure_memory() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        return memory("VmHWM") > 0
    except (OSError, AttributeError):
        return False


@pytest.mark.skipif(not can_measure_memory(), reason="reads memory from Linux' /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_claims_more_than_it_holds_is_refused_in_little_memory(folder: Folder, bomb: str) -> None:
    name, content = BOMBS[bomb]()
    folder.refuses_or_fuses(name, FILES[name])  # what the libraries take once is no matter of the file
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    folder.refuses(name, content)
    taken = memory("VmHWM") - before
    assert taken <= 48 * MIB + 8 * len(content), f"{taken / MIB:.0f} MiB for a file of {len(content) / MIB:.2f} MiB"


# ----------------------------------------------------------------------------------------------------------- wrong content


def test_every_number_type_but_plain_floats_is_refused_by_name(folder: Folder) -> None:
    fit = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    types = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    tried = 0
    for dtype in sorted(types - set(fit), key=str):
        try:
            content = saved({**STATE, "mean": torch.zeros(12, dtype=torch.uint8).view(dtype)})
        except Exception:  # quantised types and those of less than a byte cannot be made or saved
            continue
        folder.refuses("net.pth", content)
        tried += 1
    assert tried >= 10
    for dtype in ("F8_E4M3", "F8_E5M2", "I64", "U16", "BOOL"):
        size = {"I64": 8, "U16": 2}.get(dtype, 1)
        folder.refuses("net.safetensors", safetensors_of({"mean": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}, bytes(size)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_hold_no_plain_values_are_refused(folder: Folder) -> None:
    odd: Dict[str, Tensor] = {
        "sparse": torch.zeros(1, 3, 1, 1).to_sparse(),
        "sparse rows": torch.eye(3).to_sparse_csr(),
        "meta": torch.zeros(1, 3, 1, 1, device="meta"),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "empty": torch.zeros(1, 0, 1, 1),
        "scalar": torch.zeros(()),
    }
    for value in odd.values():
        folder.refuses("net.pth", saved({**STATE, "mean": value}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_in_any_tensor(folder: Folder, bad: float) -> None:
    for name, value in STATE.items():
        broken = value.clone()
        broken.view(-1)[-1] = bad
        assert name in folder.refuses("net.pth", saved({**STATE, name: broken}), "NaN or Inf")
        assert name in folder.refuses("net.safetensors", save({**STATE, name: broken}), "NaN or Inf")


def test_a_negative_variance_is_refused_in_any_norm(folder: Folder) -> None:
    for name in [name for name in STATE if name.endswith("running_var")]:
        for bad in (-1e-45, -1e-5, -1.0):
            broken = STATE[name].clone()
            broken[0, -1] = bad
            assert name in folder.refuses("net.pth", saved({**STATE, name: broken}), "negative variance")


def test_every_missing_tensor_is_named_and_every_surplus_one(folder: Folder) -> None:
    for name in [name for name in STATE if "spatial_attn" not in name]:  # its only tensor: without it the file is that of a network without
        line = folder.refuses("net.pth", saved({key: value for key, value in STATE.items() if key != name}))
        assert name in line or ("attn" in name and "attn" in line)  # without one of two tensors of an attention the other is surplus
    assert "surplus" in folder.refuses("net.pth", saved({**STATE, "surplus": torch.zeros(1)}))
    assert "bias" in folder.refuses("net.pth", saved({name: value for name, value in STATE.items() if "bias" not in name}))
    for name, value in STATE.items():
        folder.refuses("net.pth", saved({**STATE, name: torch.zeros(3, *value.shape)}))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a" * 100_000, "\u202egnp.exe", "", "\0"])
def test_names_of_tensors_cannot_write_to_the_terminal(folder: Folder, name: str) -> None:
    folder.refuses("net.pth", saved({**STATE, name: torch.zeros(1)}))
    folder.refuses("net.pth", saved({**STATE, name: torch.full((1,), float("nan"))}))
    folder.refuses("net.pth", saved({name: torch.zeros(1)}))


OTHERS: Dict[str, Callable[[Any], nn.Module]] = {  # checkpoints as their authors' code writes them
    "SPAN": lambda a: a.SPAN.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8),
    "PLKSR": lambda a: a.PLKSR.PLKSR(dim=8, n_blocks=1),
    "RealPLKSR": lambda a: a.PLKSR.RealPLKSR(dim=8, n_blocks=1),
    "SwinIR": lambda a: a.SwinIR.SwinIR(embed_dim=12, depths=[1], num_heads=[2]),
    "OmniSR": lambda a: a.OmniSR.OmniSR(num_feat=8, res_num=1, window_size=8),
    "SAFMN": lambda a: a.SAFMN.SAFMN(dim=8, n_blocks=1),
    "DAT": lambda a: a.DAT.DAT(embed_dim=12, depth=[1], num_heads=[2], split_size=[2, 4]),
    "ATD": lambda a: a.ATD.ATD(embed_dim=12, depths=[1], num_heads=[2]),
    "HAT": lambda a: a.HAT.HAT(embed_dim=12, depths=[1], num_heads=[2]),
    "RealCUGAN": lambda a: a.RealCUGAN.UpCunet2x(),
}


@pytest.mark.skipif(importlib.util.find_spec("spandrel") is None, reason="the package spandrel builds them: pip install spandrel")
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_ten_other_architectures_are_refused(folder: Folder) -> None:
    sys.path.insert(0, str(ROOT / "demo"))
    from basicsr_train import import_torchvision

    import_torchvision()  # spandrel imports it
    for name, build in OTHERS.items():
        module = "PLKSR" if name == "RealPLKSR" else name
        importlib.import_module(f"spandrel.architectures.{module}")
        state = {key: value.float().contiguous() for key, value in build(sys.modules["spandrel.architectures"]).state_dict().items()}
        for content in (saved({"params_ema": state}), saved(state)):
            folder.refuses("net.pth", content, "AetherNet")


# ----------------------------------------------------------------------------------------------------------------- extreme


def changed(ending: str, value: float, dtype: torch.dtype = torch.float32) -> Dict[str, Tensor]:
    state = {name: torch.full_like(tensor, value) if name.endswith(ending) else tensor for name, tensor in STATE.items()}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 1e-12, 1e-5, 1e5, 1e12, 1e30])
def test_norms_of_any_weight_and_variance_fuse_or_are_refused(folder: Folder, value: float) -> None:
    """The verification stands in between: what is written equals what was trained."""
    for ending in ("norm.weight", "norm.running_var", "norm.running_mean", "norm.bias"):
        for part in (ending, "." + ending):  # the last norm too, or those of the blocks alone
            outcome = folder.refuses_or_fuses("net.pth", saved(changed(part, value)))
            if value < 1:
                assert outcome == "fused", f"{part} = {value} is no reason to refuse"


def test_denormals_are_kept(folder: Folder) -> None:
    for scale in (1e-40, 1e-44):
        state = {name: value * scale if name.endswith("weight") else value for name, value in STATE.items()}
        assert folder.refuses_or_fuses("net.pth", saved(state)) == "fused"


@pytest.mark.parametrize("ending", ["weight", "conv_last.weight", "temperature", "error_comp", "lk_bias", "running_mean"])
def test_what_overflows_float32_is_refused_with_the_name_of_the_input(folder: Folder, ending: str) -> None:
    for value in (1e20, 3e38):
        code, error, source = folder.run("net.pth", saved(changed(ending, value)))
        if code == 2:
            assert str(source) in one_line(error)
            assert ".part" not in error, "the name of a file that is gone"
        folder.target.unlink(missing_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read_with_their_extremes(folder: Folder, dtype: torch.dtype) -> None:
    smallest, largest = float(torch.finfo(dtype).smallest_normal) / 4, 6e4
    for state in (changed("-", 0, dtype), changed("running_var", smallest, dtype), changed("norm.running_var", largest, dtype),
                  changed(".norm.weight", smallest, dtype)):  # fmt: skip
        assert folder.refuses_or_fuses("net.pth", saved(state)) == "fused"
        assert folder.refuses_or_fuses("net.safetensors", save(state)) == "fused"


@settings(FUZZ, max_examples=30)
@given(data=st.lists(st.tuples(NAMES, st.integers(-149, 127), st.booleans()), min_size=1, max_size=4))
def test_weights_of_any_magnitude_fuse_or_are_refused(folder: Folder, data: List[Tuple[str, int, bool]]) -> None:
    state = dict(STATE)
    for name, exponent, single in data:
        value = state[name].clone()
        part = value.view(-1)[-1:] if single else value
        part.copy_(part.sign() * 2.0**exponent if "running_var" not in name else torch.full_like(part, 2.0**exponent))
        state[name] = value
    folder.refuses_or_fuses("net.pth", saved(state))


# ----------------------------------------------------------------------------------------------------------- upscale.py


class Pictures(Folder):
    """The same for upscale.py: a model or a picture is refused."""

    def upscale(self, *arguments: Any) -> Tuple[int, str]:
        self.capfd.readouterr()
        code = upscale.main([*map(str, arguments), "--output", str(self.path / "out.png"), "--device", "cpu", "--overwrite"])
        return code, self.capfd.readouterr().err

    def refuses_model(self, name: str, content: bytes) -> str:
        (self.path / name).write_bytes(content)
        code, error = self.upscale("--model", self.path / name, "--input", self.path / "in.png")
        assert code == 2, error
        assert not (self.path / "out.png").exists()
        return one_line(error, "upscale.py")


@pytest.fixture
def pictures(tmp_path: Path, capfd: Any) -> Pictures:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    torch.save(FORMS["fused"], tmp_path / "model.pth")
    return Pictures(tmp_path, capfd)


def test_the_upscaler_refuses_broken_models_alike(pictures: Pictures, marker: Path) -> None:
    global watching
    for name, whole in FILES.items():
        for place in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            pictures.refuses_model(name, whole[:place])
    watching = False
    content = saved(Calls(os.system, f"touch {marker}"))
    watching = True
    assert "run code" in pictures.refuses_model("net.pth", content)
    nothing_ran(marker)
    watching = False
    pictures.refuses_model("net.pth", saved({**STATE, "mean": STATE["mean"] * float("nan")}))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    net = small_net(2, use_channel_attn=False, use_spatial_attn=False, **TINY).float()
    return Path(aether_arch.export_onnx(net, 2, output_path=str(tmp_path_factory.mktemp("onnx") / "net.onnx"))).read_bytes()


def test_a_cut_or_flipped_onnx_file_is_refused_or_upscales(pictures: Pictures, onnx_file: bytes) -> None:
    import onnx

    model = pictures.path / "net.onnx"
    # The metadata come last: cut there, between two of them, the network is whole.
    whole = len(onnx_file) - onnx.ModelProto(metadata_props=onnx.load_model_from_string(onnx_file).metadata_props).ByteSize()
    for place in sorted({whole * k // 150 for k in range(150)} | set(range(25)) | {whole - k for k in range(1, 26)}):
        pictures.refuses_model("net.onnx", onnx_file[:place])
    rng = np.random.default_rng(0)
    outcomes = set()
    for k in range(100):
        content = bytearray(onnx_file)
        for place in rng.integers(0, len(content) if k % 2 else 400, 1 + k % 5):  # the head, where names and shapes lie, or anywhere
            content[place] ^= 1 << rng.integers(0, 8)
        model.write_bytes(content)
        code, error = pictures.upscale("--model", model, "--input", pictures.path / "in.png")
        assert code in (0, 2)
        if code == 2:
            one_line(error, "upscale.py")
        outcomes.add(code)
    assert outcomes == {0, 2}


def test_onnx_files_of_other_networks_are_refused(pictures: Pictures) -> None:
    import onnx
    from onnx import TensorProto, helper

    def model(shape: List[Any], out: List[Any], *nodes: Any, dtype: int = TensorProto.FLOAT, more: Any = ()) -> bytes:
        inputs = [helper.make_tensor_value_info("input", dtype, shape), *more]
        graph = helper.make_graph(list(nodes), "g", inputs, [helper.make_tensor_value_info("output", dtype, out)])
        return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()

    free: List[Any] = [1, 3, "h", "w"]
    identity = helper.make_node("Identity", ["input"], ["output"])
    second = [helper.make_tensor_value_info("second", TensorProto.FLOAT, [1])]
    pool = helper.make_node("GlobalAveragePool", ["input"], ["output"])
    flatten = helper.make_node("Flatten", ["input"], ["output"])
    shape = helper.make_node("Shape", ["input"], ["output"])
    for content in (
        model([2, 3, 224, 224], [2, 3, 224, 224], identity),
        model([1, 3, 224, "w"], [1, 3, 224, "w"], identity),
        model([1, 3], [1, 3], identity),
        model([], [], identity),
        model(free, free, identity, dtype=TensorProto.INT64),
        model(free, free, helper.make_node("Add", ["input", "second"], ["output"]), more=second),
        model(free, [1, 3, 1, 1], pool),
        model(free, ["n", "m"], flatten),
        model(free, ["n"], shape),
        model(free, free, helper.make_node("NoSuchOperation", ["input"], ["output"])),
        model(free, free, helper.make_node("Identity", ["nothing"], ["output"])),
    ):
        assert "net.onnx" in pictures.refuses_model("net.onnx", content)


KINDS = [*((ending, False) for ending in (".png", ".jpg", ".webp", ".tif", ".bmp")), (".png", True), (".tif", True)]


def encoded(ending: str, deep: bool = False) -> bytes:
    import cv2

    pixels = np.random.default_rng(1).integers(0, 256, (23, 31, 3), np.uint8)
    if deep:
        return cv2.imencode(ending, pixels.astype(np.uint16) * 251)[1].tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, upscale.FORMATS[ending], **upscale.SAVE_OPTIONS.get(upscale.FORMATS[ending], {}))
    return buffer.getvalue()


@pytest.mark.parametrize(("ending", "deep"), KINDS)
def test_a_picture_cut_at_any_of_200_places_is_refused_or_whole(tmp_path: Path, capfd: Any, ending: str, deep: bool) -> None:
    """Whole: where only the end mark is missing, every pixel is there."""
    whole, source = encoded(ending, deep), tmp_path / f"in{ending}"
    source.write_bytes(whole)
    expected = upscale.Picture.read(source).pixels
    refused = 0
    for place in sorted({len(whole) * k // 175 for k in range(175)} | {len(whole) - k for k in range(1, 26)}):
        source.write_bytes(whole[:place])
        try:
            pixels = upscale.Picture.read(source).pixels
            assert np.array_equal(pixels, expected), f"cut at {place} of {len(whole)}, read as if it were whole"
        except upscale.UserError as error:
            assert str(source) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 150
    if ending != ".tif" and not deep:  # libtiff, and OpenCV's libpng, write lines of their own
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("ending", "deep"), KINDS)
@settings(FUZZ, max_examples=30)
@given(flips=FLIPS)
def test_a_flipped_picture_is_refused_or_read(tmp_path: Path, capfd: Any, ending: str, deep: bool, flips: List[Tuple[float, int]]) -> None:
    content = bytearray(encoded(ending, deep))
    for place, bit in flips:
        content[int(place * (len(content) - 1))] ^= 1 << bit
    source = tmp_path / f"in{ending}"
    source.write_bytes(bytes(content))
    try:
        upscale.Picture.read(source)
    except upscale.UserError as error:
        assert str(source) in str(error)  # noqa: PT017
    if ending != ".tif" and not deep:  # libtiff, and OpenCV's libpng, write lines of their own
        assert capfd.readouterr().err == ""


@pytest.mark.skipif(not can_measure_memory(), reason="reads memory from Linux' /proc")
def test_a_picture_that_claims_gigapixels_is_refused_in_little_memory(pictures: Pictures) -> None:
    import zlib

    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

    source = pictures.path / "claim.png"
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (2**31 - 1, 1)):
        source.write_bytes(png(width, height))
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        code, error = pictures.upscale("--model", pictures.path / "model.pth", "--input", source)
        assert code == 2, error
        assert "claim.png" in one_line(error, "upscale.py")
        assert memory("VmHWM") - before < 200 * MIB
