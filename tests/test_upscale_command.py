"""aether-upscale: what it says, how it ends, that options do what their help says; broken files, full disks.

Whatever is wrong ends in exit code 2 and one plain line with the remedy; the output is absent or whole.
"""

from __future__ import annotations

import io
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from functools import partialmethod
from itertools import zip_longest
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch
from conftest import ROOT, AsNobody, noise, one_line, tiny_net
from damage import DAMAGE, FUZZ, damaged
from hypothesis import given, settings
from PIL import Image
from tqdm import tqdm

from aethersr.commands import upscale
from aethersr.folders import pictures_in
from aethersr.onnx import export_onnx
from aethersr.tiling import SHORT_OVERLAP

pytestmark = pytest.mark.usefixtures("one_thread")
FREE = [1, 3, "h", "w"]


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny_net().float().fused()


@pytest.fixture
def folder(tmp_path: Path, net: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a network, net.pth, and a picture, in.png."""
    torch.save(net.state_dict(), tmp_path / "net.pth")
    noise(tmp_path / "in.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: Any, source: Any, target: Any, *more: Any) -> int:
    words = ["--model", model, "--input", source, "--output", target, "--device", "cpu", *more]
    return upscale.main([str(word) for word in words])


def refused(capfd: Any, *arguments: Any) -> str:
    assert run(*arguments) == 2
    return one_line(capfd.readouterr().err, "upscale.py")


def files(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_a_folder_holds_besides_pictures_is_counted_or_named(folder: Path, capfd: Any) -> None:
    source = noise(folder / "Bilder \u00f6" / "good.PNG").parent
    noise(source / "deep" / "b.jpg")
    for name in ("a.txt", "b.txt", "c.txt", "Thumbs.db", "Desktop.ini", ".DS_Store"):
        (source / name).write_text("no picture")
    out = source / "out"  # no input of a later run
    assert run("net.pth", source, out) == 0
    said = capfd.readouterr()
    assert (said.err + said.out).splitlines() == [
        "Left out: files that are no pictures: 3, folders, without --recursive: 1.",
        "net.pth upscales 1 picture x2 on the CPU.",
        f"Wrote {out / 'good.PNG'} (22x18)",
    ]
    error = refused(capfd, "net.pth", source, out, "--recursive")
    assert "pass --skip-existing to go on with the others, --overwrite to" in error
    assert run("net.pth", source, out, "--skip-existing") == 0
    assert f"Nothing to do: every picture of {source} is in {out}" in capfd.readouterr().out
    for name in ("empty.png", "._a.png", ".thumbnails/a.png"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    (source / "gone.png").symlink_to(source / "nothing")
    os.mkfifo(source / "pipe.png")
    (source / "deep" / "circle").symlink_to(source)
    still = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    still.save(source / "moving.gif", save_all=True, append_images=[still.rotate(90), still.point([9] * 768)])
    assert run("net.pth", source, out, "--recursive", "--skip-existing") == 2
    said = capfd.readouterr()
    assert said.out.startswith("Left out: files that are no pictures: 3, links to folders: 1.\n")
    words = ["gone.png is a link to nothing", "pipe.png is neither a file nor a folder", "empty.png is empty",
             "of an animation", "4 of 5 pictures were skipped"]  # fmt: skip
    for line, part in zip_longest(said.err.splitlines(), words):
        assert re.match(f"upscale.py: error: .*{part}", line)
    assert files(out) == ["deep/b.jpg", "good.PNG"]
    assert run("net.pth", source, out, "--skip-existing") == 2
    assert "4 of 4 pictures were skipped. Mend them" in capfd.readouterr().err


def test_a_folder_of_jpegs_becomes_pngs(folder: Path, capfd: Any) -> None:
    noise(folder / "in" / "a.jpg", comment=b"hello")
    noise(folder / "in" / "b.JFIF")
    assert run("net.pth", "in", "out", "--format", "PNG") == 0
    assert files(folder / "out") == ["a.png", "b.png"]
    assert Image.open(folder / "out" / "a.png").text == {"Comment": "hello"}
    for kind, ending in {"WEBP": "webp", "AVIF": "avif", "TIFF": "tif", "BMP": "bmp", "GIF": "gif"}.items():
        assert run("net.pth", folder / "in" / "a.jpg", "new/", "--format", kind) == 0
        assert Image.open(f"new/a.{ending}").format == kind
        without = f" without comment, not written into .{ending}\n" if ending != "tif" else ")\n"
        assert capfd.readouterr().out.endswith(without)
    noise(folder / "in" / "a.png")
    assert "would both become" in refused(capfd, "net.pth", "in", "other", "--format", "png")
    assert not (folder / "other").exists()


def test_wrap_joins_the_sides_of_a_texture(folder: Path) -> None:
    """Turned by half its length, a texture with holes becomes the turned result."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    pixels[:6, :, 3] = pixels[:, :9, 3] = 0
    Image.fromarray(pixels).save("in.png")
    Image.fromarray(np.roll(pixels, (10, 15), (0, 1))).save("turned.png")
    for name in ("in", "turned"):
        assert run("net.pth", f"{name}.png", f"{name}_out.png", "--wrap") == 0
    expected = np.roll(Image.open("in_out.png"), (20, 30), (0, 1)).astype(int)
    assert np.abs(expected - np.array(Image.open("turned_out.png"))).max() <= 1


@pytest.mark.parametrize(
    ("reach", "size", "wanted", "overlap"),
    [(85, None, None, SHORT_OVERLAP), (12, None, None, 12), (85, None, "exact", 85), (85, None, 3, 3),
     (85, (64, 96), None, 16), (85, (256, 256), None, SHORT_OVERLAP), (85, (128, 128), "exact", 32)],
)  # fmt: skip
def test_the_overlap_is_short_unless_it_is_asked_for(
    reach: int, size: Any, wanted: Any, overlap: int, capsys: Any
) -> None:
    network: Any = type("Network", (), {"reach": reach, "size": size})
    assert upscale.choose_overlap(network, wanted) == overlap
    told = size is not None and overlap == min(size) // 4
    assert ("--static" in capsys.readouterr().out) == told


def test_an_onnx_file_gives_the_same_picture_and_runs_on_the_cpu_if_only_pytorch_has_cuda(
    folder: Path, net: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    path = export_onnx(net, 2, output_path=str(folder / "net.onnx"))
    source = noise(folder / "in.png", 40, 50, 4)
    for model, target in (("net.pth", "a.png"), (path, "b.png")):
        assert run(model, source, target) == 0
    assert np.abs(np.array(Image.open("a.png")).astype(int) - np.array(Image.open("b.png"))).max() <= 1
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # pip install onnxruntime gives this
        capfd.readouterr()
        assert upscale.main(["--model", path, "--input", "in.png", "--output", "c.png"]) == 0
        assert "upscales 1 picture x2 on the CPU (ONNX Runtime)." in capfd.readouterr().out
        assert "pip install onnxruntime-gpu" in refused(capfd, path, source, "d.png", "--device", "cuda")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--overlap", "abc"], "--overlap: abc is not possible; expected 0 or more pixels, or 'exact'"),
        (["--overlap=-1"], "-1 is not possible"),
        (["--scale", "2"], "--scale is not an option: the scale comes from the model"),
        (["--half"], "--half is not an option: pass --fp16"),
        (["-dn", "0.5"], "-d is not an option: there is none"),
        (["--tile=0"], "--tile 0"),
        (["--fp16"], "--fp16"),
        (["--overwrite", "--skip-existing"], "exclude each other"),
        (["--device", "mps"], "PyTorch finds no Apple GPU"),
        (["--input", "https://example.org/a.png"], "https://example.org/a.png is a web address"),
        (["--output", "https://example.org/a.png"], "--output: https://example.org/a.png is a web address"),
        (["--input", "cut.png"], "not a readable picture"),
        (["--output", "out.jpg"], "transparency"),
        (["--input", "wide.png", "--output", "out.webp"], ".png or .tif"),
        (["--model", "no.pth"], "--model"),
        (["--model", "text.onnx"], "not a readable ONNX"),
        (["--model", "cut.pth"], "cut.pth is"),
        (["--model", f"{'x' * 256}.pth"], "--model"),
        (["--model", f"{'x' * 256}.onnx"], "--model"),
        (["--input", f"{'x' * 256}.png"], "--input"),
        (["--output", f"{'x' * 256}.png"], "--output"),
    ],
)
def test_bad_input_ends_in_one_clear_line(folder: Path, words: Any, said: str, capfd: Any) -> None:
    if "mps" in words and torch.backends.mps.is_available():
        pytest.skip("needs a machine without an Apple GPU")
    good = noise(folder / "good.png", 30, 30, 4)
    noise(folder / "wide.png", 1, 8200, 3)
    (folder / "cut.png").write_bytes(good.read_bytes()[:-2000])
    (folder / "text.onnx").write_text("text")
    (folder / "cut.pth").write_bytes((folder / "net.pth").read_bytes()[:1000])
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    assert said in refused(capfd, "net.pth", "good.png", "out.png", *words)
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_missing_package_is_one_line(folder: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("picture", "jobs", "upscaling"):
        monkeypatch.delitem(sys.modules, f"aethersr.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    assert run("net.pth", "in.png", "out.png") == 2
    assert "needs the package pyvips pyvips-binary: pip install" in capfd.readouterr().err


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_cut_onnx_file_is_refused_and_a_damaged_one_is_refused_or_upscales(
    folder: Path, net: Any, capfd: Any, count: int
) -> None:
    onnx = pytest.importorskip("onnx")
    model, outcomes = folder / "net.onnx", []
    whole = Path(export_onnx(net, 2, output_path=str(model))).read_bytes()
    # The metadata come last: cut there, between two of them, the network is whole.
    properties = onnx.load_model_from_string(whole).metadata_props
    end = len(whole) - onnx.ModelProto(metadata_props=properties).ByteSize()
    for place in sorted({end * k // 20 for k in range(20)} | {1, 2, 8, end - 9, end - 2, end - 1}):
        model.write_bytes(whole[:place])
        assert str(model) in refused(capfd, model, "in.png", "out.png")

    @settings(FUZZ, max_examples=count)
    @given(damage=DAMAGE)
    def damage_it(damage: Any) -> None:
        model.write_bytes(damaged(whole, damage))
        outcomes.append(run(model, "in.png", "out.png", "--overwrite"))
        error = capfd.readouterr().err
        if outcomes[-1] == 2:
            one_line(error, "upscale.py")

    damage_it()
    assert set(outcomes) == {0, 2}


@pytest.mark.parametrize(
    ("shape", "out", "operation", "names"),
    [([2, 3, 224, 224], [2, 3, 224, 224], "Identity", ["input"]), ([1, 3], [1, 3], "Identity", ["input"]),
     ([1, 3, 224, "w"], [1, 3, 224, "w"], "Identity", ["input"]), ([], [], "Identity", ["input"]),
     (FREE, FREE, "Identity", ["integers"]), (FREE, FREE, "Identity", ["nothing"]),
     (FREE, FREE, "Add", ["input", "second"]), (FREE, [1, 3, 1, 1], "GlobalAveragePool", ["input"]),
     (FREE, ["n"], "Shape", ["input"]), (FREE, FREE, "NoSuchOperation", ["input"])],
)  # fmt: skip
def test_onnx_files_of_other_networks_are_refused(
    folder: Path, capfd: Any, shape: Any, out: Any, operation: str, names: List[str]
) -> None:
    helper = pytest.importorskip("onnx").helper
    kinds = {"input": 1, "second": 1, "integers": 7}  # ONNX' numbers for float and int64
    given_ = names if names[0] in kinds else ["input"]
    inputs = [helper.make_tensor_value_info(name, kinds[name], shape) for name in given_]
    outputs = [helper.make_tensor_value_info("output", kinds[given_[0]], out)]
    graph = helper.make_graph([helper.make_node(operation, names, ["output"])], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    assert "net.onnx" in refused(capfd, "net.onnx", "in.png", "out.png")
    assert not Path("out.png").exists()


@pytest.mark.parametrize("name", ["写真 '\"", "-é" * 80, "a.b\nc", "esc\x1b[31mbytes\udcff"], ids=ascii)
def test_any_name_that_the_disk_takes_is_read_and_written(folder: Path, capfd: Any, name: str) -> None:
    inner = folder / name
    inner.mkdir()
    (folder / "net.pth").rename(inner / f"{name}.pth")
    (folder / "in.png").rename(inner / f"{name}.png")
    assert run(inner / f"{name}.pth", inner / f"{name}.png", inner / f"x{name[1:]}.webp") == 0
    assert run(inner / f"{name}.pth", inner, folder / f"{name}2") == 0, capfd.readouterr().err
    assert sorted(os.listdir(folder / f"{name}2")) == sorted([f"{name}.png", f"x{name[1:]}.webp"])


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "dangling", "device"])
def test_what_is_no_file_is_refused_and_never_waited_for(folder: Path, capfd: Any, kind: str) -> None:
    signal.alarm(60)  # a run that waits for ever ends the tests
    for name in ("a.pth", "a.safetensors", "a.onnx", "a.png"):
        if kind == "folder":
            Path(name).mkdir()
        elif kind == "fifo":
            os.mkfifo(name)
        else:
            Path(name).symlink_to({"loop": name, "dangling": "nothing", "device": "/dev/zero"}[kind])
        words = ["net.pth", name] if name == "a.png" else [name, "in.png"]
        assert name in refused(capfd, *words, "out.png")
    signal.alarm(0)
    assert not Path("out.png").exists()


def test_unreadable_files_and_read_only_folders_are_said_before_the_work(
    open_folder: Path, folder: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever is imported late is imported: without root's rights it may not be found.
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    assert run("net.pth", "in.png", "net.png") == 0
    capfd.readouterr()
    for name in ("net.pth", "in.png"):
        shutil.copy(name, open_folder)
    for name in ("secret.pth", "secret.onnx", "secret.png"):
        (open_folder / name).touch(0)
    monkeypatch.chdir(open_folder)
    Path("locked").mkdir(0o555)
    Path("closed").mkdir(0)
    with AsNobody():
        for model, source in (("secret.pth", "in.png"), ("secret.onnx", "in.png"), ("net.pth", "secret.png"),
                              ("net.pth", "closed"), ("net.pth", "closed/in.png")):  # fmt: skip
            refused(capfd, model, source, "out.png" if "." in source else "folder")
        assert "closed can't be read: Permission" in pictures_in(Path("."), "--input", True).problems[0]
        monkeypatch.setattr("aethersr.network.load_network", None)  # nothing may have begun
        for source, name in (("in.png", "out.png"), (".", "folder"), ("in.png", "new/inner/")):
            line = refused(capfd, "net.pth", source, f"locked/{name}")
            assert "locked can't be written: Permission denied; pass another --output" in line
    assert not os.listdir("locked")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp"])
def test_a_disk_that_fills_up_leaves_nothing(folder: Path, capfd: Any, ending: str) -> None:
    """A limit to the size of files stands for the disk: writing fails at the same byte, in C code too."""
    source = noise(folder / "in.png", 60, 60, 3)
    content, old = source.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        code = run("net.pth", source, f"out{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    line = one_line(capfd.readouterr().err, "upscale.py")
    assert (code, f"out{ending} can't be written: File too large; free space" in line) == (2, True), line
    assert sorted(os.listdir(folder)) == ["in.png", "net.pth"]
    assert source.read_bytes() == content


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads memory from Linux' /proc")
def test_a_picture_that_claims_gigapixels_is_refused_in_little_memory(folder: Path, capfd: Any) -> None:
    def mebibytes(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) // 1024

    whole = noise(folder / "claim.png").read_bytes()
    black = b"IDAT" + zlib.compress(bytes(400 * 2**20), 1)  # so much would be unpacked of the last one
    body = struct.pack(">I", len(black) - 4) + black + struct.pack(">I", zlib.crc32(black))
    for width, height, rest in ((2**31 - 1, 1, b""), (30_000, 30_000, b""), (40_000, 40_000, body)):
        head = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
        head += struct.pack(">I", zlib.crc32(head))
        Path("claim.png").write_bytes(whole[:12] + head + rest + whole[33:])
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to VmRSS, what is now
        before = mebibytes("VmRSS")
        assert "claim.png" in refused(capfd, "net.pth", "claim.png", "out.png")
        assert mebibytes("VmHWM") - before < 200


def test_progress_shows_tiles_of_one_picture_and_pictures_of_several(folder: Path, monkeypatch: Any) -> None:
    def shown(*words: str) -> str:
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, terminal)
        monkeypatch.setenv("COLUMNS", "100")
        assert run("net.pth", *words) == 0
        return terminal.getvalue()

    at_once = partialmethod(tqdm.__init__, mininterval=0)
    monkeypatch.setattr(tqdm, "__init__", at_once)
    noise(folder / "in.png", 30, 30, 3)
    one = shown("in.png", "out.png", "--tile", "3")
    assert one.startswith("net.pth upscales 1 picture x2 on the ")
    assert re.search(r"\| [1-9]\d* of 100 tiles, \d\d:\d\d left", one)
    assert one.endswith("Wrote out.png (60x60)\n"), "a bar is drawn again"
    noise(folder / "in" / "a.png")
    noise(folder / "in" / "b.jpg")
    several = shown("in", "out")
    assert "1 of 2 pictures, " in several
    assert several.endswith("Wrote out/b.jpg (22x18)\n"), "a bar is drawn again"


def test_runs_at_once_with_closed_streams_leave_one_whole_output_and_no_warning(folder: Path) -> None:
    noise(folder / "in.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x0e\x01")  # Pillow warns of it
    assert run("net.pth", "in.jpg", "out.png") == 0
    whole = (folder / "out.png").read_bytes()
    (folder / "out.png").unlink()
    words = "--model net.pth --input in.jpg --output out.png --overwrite --device cpu <&- >&-"
    line = f"{shlex.join([sys.executable, str(ROOT / 'upscale.py')])} {words}"
    processes = [subprocess.Popen(["sh", "-c", f"{line} {end}"], cwd=folder) for end in ("2>&-", "2>said")]
    assert [process.wait() for process in processes] == [0, 0]
    assert (folder / "out.png").read_bytes() == whole
    assert (folder / "said").read_text() == ""
    assert files(folder) == ["in.jpg", "in.png", "net.pth", "out.png", "said"]
