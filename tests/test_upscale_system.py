"""The upscale command and the system: broken networks and pictures, odd names, full disks, kills.

Each ends in exit code 2 and one plain line with the remedy; the output is absent or whole.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
from conftest import ROOT, AsNobody, small_net
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from PIL import Image
from safetensors.torch import save_file

from aethersr.commands import upscale
from aethersr.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3, "use_channel_attn": False}


@pytest.fixture(scope="module")
def net() -> Any:
    return small_net(2, use_spatial_attn=False, **TINY).float().fused()


@pytest.fixture
def folder(tmp_path: Path, net: Any) -> Path:
    """A network, net.pth, and a picture, in.png."""
    torch.save(net.state_dict(), tmp_path / "net.pth")
    noise(tmp_path / "in.png")
    return tmp_path


def noise(path: Path, *shape: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, shape or (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def upscaled(model: Any, source: Any, target: Any, *more: str) -> int:
    words = ["--model", model, "--input", source, "--output", target, "--device", "cpu", *more]
    return upscale.main([str(word) for word in words])


def one_line(capfd: Any) -> str:
    out, error = capfd.readouterr()  # of the file descriptors: libraries write there too
    assert "Error" not in out, out
    assert error.count("\n") == 1, error
    assert error.startswith("upscale.py: error: ")
    assert error[:-1].isprintable(), ascii(error)
    assert re.search(r"--\w+", error), f"no remedy: {error}"
    return error


# --------------------------------------------------------------------------------------------------- networks


def refuses_model(model: Path, capfd: Any) -> str:
    folder = model.parent
    assert upscaled(model, folder / "in.png", folder / "out.png") == 2
    assert not (folder / "out.png").exists()
    line = one_line(capfd)
    assert str(model) in line
    return line


def test_cut_or_hostile_weights_are_refused(folder: Path, net: Any, capfd: Any) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "ran"),)

    state = net.state_dict()
    save_file(state, folder / "net.safetensors")
    for name in ("net.pth", "net.safetensors"):
        whole = (folder / name).read_bytes()
        for place in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:place])
            refuses_model(folder / name, capfd)
    torch.save({"params": state, "more": Runs()}, folder / "net.pth")
    assert "mkdir" in refuses_model(folder / "net.pth", capfd)
    assert not (folder / "ran").exists()
    torch.save({**state, "tail.bias": state["tail.bias"] * float("nan")}, folder / "net.pth")
    assert "tail.bias" in refuses_model(folder / "net.pth", capfd)


def test_a_cut_onnx_file_is_refused(folder: Path, net: Any, capfd: Any) -> None:
    onnx = pytest.importorskip("onnx")
    model = folder / "net.onnx"
    onnx_file = Path(export_onnx(net, 2, output_path=str(model))).read_bytes()
    # The metadata come last: cut there, between two of them, the network is whole.
    properties = onnx.load_model_from_string(onnx_file).metadata_props
    whole = len(onnx_file) - onnx.ModelProto(metadata_props=properties).ByteSize()
    for place in sorted(
        {whole * k // 40 for k in range(40)} | set(range(9)) | {whole - k for k in (1, 2, 9)}
    ):
        model.write_bytes(onnx_file[:place])
        refuses_model(model, capfd)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_onnx_file_is_refused_or_upscales(folder: Path, net: Any, capfd: Any, count: int) -> None:
    pytest.importorskip("onnx")
    model, outcomes = folder / "net.onnx", []
    whole = Path(export_onnx(net, 2, output_path=str(model))).read_bytes()

    @settings(FUZZ, max_examples=count)
    @given(damage=DAMAGE)
    def run(damage: Any) -> None:
        model.write_bytes(damaged(whole, damage))
        code = upscaled(model, folder / "in.png", folder / "out.png", "--overwrite")
        assert code in (0, 2)
        if code == 2:
            one_line(capfd)
        capfd.readouterr()
        outcomes.append(code)

    run()
    assert len(outcomes) >= count
    assert set(outcomes) == {0, 2}


def test_onnx_files_of_other_networks_are_refused(folder: Path, capfd: Any) -> None:
    onnx = pytest.importorskip("onnx")
    values, free = onnx.helper.make_tensor_value_info, [1, 3, "h", "w"]
    floats, others = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    opsets = [onnx.helper.make_opsetid("", 17)]
    for shape, out, operation, *names in (
        ([2, 3, 224, 224], [2, 3, 224, 224], "Identity"),
        ([1, 3, 224, "w"], [1, 3, 224, "w"], "Identity"),
        ([1, 3], [1, 3], "Identity"),
        ([], [], "Identity"),
        (free, free, "Identity", "integers"),
        (free, free, "Identity", "nothing"),
        (free, free, "Add", "input", "second"),
        (free, [1, 3, 1, 1], "GlobalAveragePool"),
        (free, ["n", "m"], "Flatten"),
        (free, ["n"], "Shape"),
        (free, free, "NoSuchOperation"),
    ):
        kind = others if "integers" in names else floats
        inputs = [values("integers" if kind == others else "input", kind, shape)]
        inputs += [values("second", floats, [1])] if "second" in names else []
        node = onnx.helper.make_node(operation, names or ["input"], ["output"])
        graph = onnx.helper.make_graph([node], "g", inputs, [values("output", kind, out)])
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        (folder / "net.onnx").write_bytes(model.SerializeToString())
        refuses_model(folder / "net.onnx", capfd)


# --------------------------------------------------------------------------------------------------- pictures


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def can_measure_memory() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        return memory("VmHWM") > 0
    except OSError:
        return False


@pytest.mark.skipif(not can_measure_memory(), reason="reads memory from Linux' /proc")
def test_a_picture_that_claims_gigapixels_is_refused_in_little_memory(folder: Path, capfd: Any) -> None:
    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")

    source = folder / "claim.png"
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (2**31 - 1, 1)):
        source.write_bytes(png(width, height))
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        assert upscaled(folder / "net.pth", source, folder / "out.png") == 2
        assert "claim.png" in one_line(capfd)
        assert memory("VmHWM") - before < 200 * 2**20


# ------------------------------------------------------------------------------------------------------ paths


NAMES = ["Bild ä 写真 😀", "space 'quotes' \"\"", "-leading", "a" * 230, "é" * 100, "dots.in",
         "new\nline", "esc\x1b[31mbytes\udcff\udc80"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_the_disk_takes_is_read_and_written(folder: Path, capfd: Any, name: str) -> None:
    inner = folder / name
    inner.mkdir()
    model, source = inner / f"{name}.pth", inner / f"{name}.png"
    (folder / "net.pth").rename(model)
    (folder / "in.png").rename(source)
    target = inner / f"{name[1:]}.webp"
    assert upscaled(model, source, target) == 0, capfd.readouterr().err
    assert sorted(os.listdir(inner)) == sorted([model.name, source.name, target.name])
    assert upscaled(model, inner, folder / f"{name}2") == 2  # the weights are no picture
    capfd.readouterr()
    assert sorted(os.listdir(folder / f"{name}2")) == sorted([source.name, target.name])


@pytest.mark.parametrize("length", [256, 5000])
def test_a_name_that_the_disk_does_not_take_is_an_error(folder: Path, capfd: Any, length: int) -> None:
    model, source, long = folder / "net.pth", folder / "in.png", folder / ("x" * length)
    for arguments in (
        (f"{long}.pth", source, folder / "out.png"),
        (f"{long}.onnx", source, folder / "out.png"),
        (model, f"{long}.png", folder / "out.png"),
        (model, source, f"{long}.png"),
    ):
        assert upscaled(*arguments) == 2
        one_line(capfd)
    assert sorted(os.listdir(folder)) == ["in.png", "net.pth"]


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "loop", "dangling", "device"])
def test_what_is_no_file_is_refused_and_never_waited_for(folder: Path, capfd: Any, kind: str) -> None:
    def make(path: Path) -> Path:
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            import socket

            with socket.socket(socket.AF_UNIX) as server:
                old = os.getcwd()
                os.chdir(path.parent)  # the system allows about 100 characters
                server.bind(path.name)
                os.chdir(old)
        else:
            path.symlink_to({"loop": path, "dangling": folder / "nothing", "device": "/dev/zero"}[kind])
        return path

    signal.alarm(60)  # a run that waits for ever ends the tests
    for ending in (".pth", ".safetensors", ".onnx"):
        refuses_model(make(folder / f"model{ending}"), capfd)
    source = make(folder / "source.png")
    assert upscaled(folder / "net.pth", source, folder / "out.png") == 2
    assert str(source) in one_line(capfd)
    assert not (folder / "out.png").exists()
    if kind in ("fifo", "device"):
        for more in ((), ("--overwrite",)):
            assert upscaled(folder / "net.pth", folder / "in.png", source, *more) == 2
            assert "pipe or a device" in one_line(capfd)
    signal.alarm(0)


def test_unreadable_files_and_read_only_folders_are_said(open_folder: Path, folder: Path, capfd: Any) -> None:
    # Whatever is imported late is imported: without root's rights it may not be found.
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    assert upscaled(folder / "net.pth", folder / "in.png", folder / "warm.png") == 0
    capfd.readouterr()
    model, source = open_folder / "net.pth", open_folder / "in.png"
    model.write_bytes((folder / "net.pth").read_bytes())
    source.write_bytes((folder / "in.png").read_bytes())
    locked, closed = open_folder / "locked", open_folder / "closed"
    locked.mkdir()
    closed.mkdir()
    for name in ("secret.pth", "secret.onnx", "secret.png"):
        (open_folder / name).write_bytes(model.read_bytes())
        (open_folder / name).chmod(0)
    locked.chmod(0o555)
    closed.chmod(0)
    with AsNobody():
        for arguments in (
            (open_folder / "secret.pth", source, open_folder / "out.png"),
            (open_folder / "secret.onnx", source, open_folder / "out.png"),
            (model, open_folder / "secret.png", open_folder / "out.png"),
            (model, closed, open_folder / "folder"),
            (model, closed / "in.png", open_folder / "out.png"),
        ):
            assert upscaled(*arguments) == 2
            one_line(capfd)
        for given, name in ((source, "out.png"), (open_folder, "folder")):
            assert upscaled(model, given, locked / name) == 2
            assert "Permission denied" in one_line(capfd)
    assert not list(locked.iterdir())
    assert not list(open_folder.glob("out*"))


# ------------------------------------------------------------------------------------------------------ disks


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp"])
def test_a_disk_that_fills_up_leaves_nothing(folder: Path, capfd: Any, ending: str) -> None:
    """A limit to the size of files stands for the disk: writing fails at the same byte, in C code too."""
    source = noise(folder / "in.png", 60, 60, 3)
    content, old = source.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        code = upscaled(folder / "net.pth", source, folder / f"out{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 2
    assert f"out{ending} can't be written" in one_line(capfd)
    assert sorted(os.listdir(folder)) == ["in.png", "net.pth"]
    assert source.read_bytes() == content


# -------------------------------------------------------------------------------------------------- processes


def test_runs_at_once_with_closed_streams_leave_one_whole_output(folder: Path) -> None:
    assert upscaled(folder / "net.pth", folder / "in.png", folder / "out.png") == 0
    whole = (folder / "out.png").read_bytes()
    (folder / "out.png").unlink()
    words = "--model net.pth --input in.png --output out.png --overwrite --device cpu <&- >&- 2>&-"
    command = f"'{sys.executable}' '{ROOT / 'upscale.py'}' {words}"
    processes = [subprocess.Popen(["sh", "-c", command], cwd=folder) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (folder / "out.png").read_bytes() == whole
    assert sorted(os.listdir(folder)) == ["in.png", "net.pth", "out.png"]


@pytest.mark.parametrize("ending", [".png", ".webp", ".jpg", ".tif"])
def test_the_same_input_gives_the_same_bytes_with_any_threads(folder: Path, ending: str) -> None:
    contents = set()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        assert upscaled(folder / "net.pth", folder / "in.png", folder / f"out{ending}", "--overwrite") == 0
        contents.add((folder / f"out{ending}").read_bytes())
    torch.set_num_threads(1)
    assert len(contents) == 1
