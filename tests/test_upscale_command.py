"""upscale.py: what it says, how it ends, and that each option does what its help says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image

from aethersr.commands import upscale
from aethersr.identify import aether_from_state_dict
from aethersr.network import load_network
from aethersr.onnx import export_onnx
from aethersr.tiling import SHORT_OVERLAP

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.pth"
    options: Any = {"use_channel_attn": False, "use_spatial_attn": False}
    net = small_net(2, embed_dim=8, depths=(1,), lk_kernel=3, **options).float()
    torch.save(net.fused().state_dict(), path)
    return path


def run(model: Path, source: Any, target: Any, *more: Any) -> int:
    words = ["--model", model, "--input", source, "--output", target, "--device", "cpu", *more]
    return upscale.main([str(word) for word in words])


def noise(path: Path, *shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, shape or (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def files(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def lines(capfd: Any) -> List[str]:
    found = capfd.readouterr().err.splitlines()
    assert all(line.startswith("upscale.py: error: ") and line.isprintable() for line in found), found
    return found


# ---------------------------------------------------------------------------------------------------- folders


def test_what_is_skipped_in_a_folder_is_said_and_the_rest_is_written(
    model: Path, tmp_path: Path, capfd: Any
) -> None:
    source = tmp_path / "Bilder \u00f6"
    noise(source / "good.PNG")
    noise(source / "inner" / "deep" / "b.jpg")
    (source / "empty.png").touch()
    (source / "notes.txt").write_text("no picture")
    still = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    still.save(source / "moving.gif", save_all=True, append_images=[still.rotate(90), still.point([9] * 768)])
    assert run(model, source, tmp_path / "out") == 2
    said = lines(capfd)
    for name, reason in (("empty.png", "is empty"), ("notes.txt", "'.txt'"), ("moving.gif", "frames"),
                         ("inner", "--recursive")):  # fmt: skip
        assert sum(f"{source / name} " in line and reason in line for line in said) == 1, (name, said)
    assert "4 of 5" in said[-1]
    assert len(said) == 5
    assert files(tmp_path / "out") == ["good.PNG"]
    assert run(model, source, tmp_path / "out", "--recursive", "--skip-existing") == 2
    assert files(tmp_path / "out") == ["good.PNG", "inner/deep/b.jpg"]


def test_an_interrupted_folder_goes_on(model: Path, tmp_path: Path, capfd: Any) -> None:
    noise(tmp_path / "a.png")
    noise(tmp_path / "sub" / "b.png")
    out = tmp_path / "out"
    assert run(model, tmp_path, out, "--recursive") == 0
    before = (out / "a.png").stat().st_mtime_ns
    (out / "sub" / "b.png").unlink()
    assert run(model, tmp_path, out, "--recursive") == 2
    assert "--overwrite" in lines(capfd)[0]
    assert run(model, tmp_path, out, "--recursive", "--skip-existing") == 0
    assert files(out) == ["a.png", "sub/b.png"]
    assert (out / "a.png").stat().st_mtime_ns == before
    assert run(model, tmp_path, out, "--recursive", "--skip-existing") == 0
    assert "Nothing to do" in capfd.readouterr().out
    assert run(model, tmp_path, out, "--recursive", "--overwrite") == 0
    assert (out / "a.png").stat().st_mtime_ns != before


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("wrap", ["x", "y", None])
def test_wrap_joins_the_sides_of_a_texture(model: Path, tmp_path: Path, wrap: Any) -> None:
    """Turned by half its length, a texture becomes the turned result."""
    pixels = np.array(Image.open(noise(tmp_path / "in.png", 20, 30, 3)))
    axes = {"x": (1,), "y": (0,), None: (0, 1)}[wrap]
    turned = np.roll(pixels, [pixels.shape[axis] // 2 for axis in axes], axes)
    Image.fromarray(turned).save(tmp_path / "turned.png")
    for name in ("in", "turned"):
        more = ["--wrap", *([wrap] if wrap else [])]
        assert run(model, tmp_path / f"{name}.png", tmp_path / f"{name}_out.png", *more) == 0
    out = np.array(Image.open(tmp_path / "in_out.png"))
    expected = np.roll(out, [pixels.shape[axis] for axis in axes], axes).astype(int)
    assert np.abs(expected - np.array(Image.open(tmp_path / "turned_out.png"))).max() <= 1


@pytest.mark.parametrize(
    ("reach", "size", "wanted", "overlap"),
    [
        (85, None, None, SHORT_OVERLAP),
        (12, None, None, 12),
        (85, None, "exact", 85),
        (85, None, 3, 3),
        (85, (64, 96), None, 16),
        (85, (256, 256), None, SHORT_OVERLAP),
        (85, (128, 128), "exact", 32),
    ],
)
def test_the_overlap_is_short_unless_it_is_asked_for(
    reach: int, size: Any, wanted: Any, overlap: int, capsys: Any
) -> None:
    class Network:
        pass

    network: Any = Network()
    network.reach, network.size = reach, size
    assert upscale.choose_overlap(network, wanted) == overlap
    told = size is not None and overlap == min(size) // 4
    assert ("--static" in capsys.readouterr().out) == told


def test_an_onnx_file_gives_the_same_picture(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = aether_from_state_dict(torch.load(model, weights_only=True))
    path = Path(export_onnx(net, 2, output_path=str(tmp_path / "net.onnx")))
    source = noise(tmp_path / "in.png", 40, 50, 4)
    assert run(model, source, tmp_path / "a.png") == 0
    assert run(path, source, tmp_path / "b.png") == 0
    off = np.array(Image.open(tmp_path / "a.png")).astype(int) - np.array(Image.open(tmp_path / "b.png"))
    assert np.abs(off).max() <= 1
    assert load_network(path, "cpu", False).reach == load_network(model, "cpu", False).reach


def test_an_onnx_file_runs_on_the_cpu_if_only_pytorch_has_cuda(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """What `pip install onnxruntime` gives people with a GPU."""
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    net = aether_from_state_dict(torch.load(model, weights_only=True))
    path = export_onnx(net, 2, output_path=str(tmp_path / "net.onnx"))
    source = noise(tmp_path / "in.png", 20, 30, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["--model", path, "--input", str(source), "--output", str(tmp_path / "out.png")]
    assert upscale.main(words) == 0
    assert Image.open(tmp_path / "out.png").size == (60, 40)
    assert upscale.main([*words, "--overwrite", "--device", "cuda"]) == 2
    assert "pip install onnxruntime-gpu" in lines(capfd)[-1]


def test_progress_shows_pictures_speed_and_time(model: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    noise(tmp_path / "in" / "a.png")
    noise(tmp_path / "in" / "b.png")
    main, child = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, ROOT / "upscale.py", "--model", model, "--input", "in", "--output", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=child)
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert b"2 of 2 pictures" in shown
    assert b"megapixels/s" in shown
    assert b"left" in shown


def test_it_runs_from_any_folder_as_a_process(model: Path, tmp_path: Path) -> None:
    noise(tmp_path / "Bilder ö" / "a.png")
    words = ["--model", model, "--input", "Bilder ö", "--output", "out"]
    done = subprocess.run(
        [sys.executable, ROOT / "upscale.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Wrote out/a.png (22x18)\n"


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": "nothing.png"}, "does not exist"),
        ({"input": "cut.png"}, "not a readable picture"),
        ({"output": "out.xyz"}, "'.xyz'"),
        ({"output": "cut.png"}, "--overwrite"),
        ({"output": "out.jpg"}, "transparency"),
        ({"input": "wide.png", "output": "out.webp"}, ".png or .tif"),
        ({"model": "no.pth"}, "--model"),
        ({"model": "text.onnx"}, "not a readable ONNX"),
        ({"model": "no.onnx"}, "does not exist"),
        ({"model": "other.pth"}, "not an AetherNet"),
        ({"tile": 0}, "--tile 0"),
        ({"overlap": -1}, "--overlap -1"),
        ({"fp16": None}, "--fp16"),
    ],
)
def test_bad_input_ends_in_one_clear_line(
    model: Path, tmp_path: Path, change: Any, said: str, capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    good = noise(tmp_path / "good.png", 30, 30, 4)
    noise(tmp_path / "wide.png", 1, 8200, 3)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "text.onnx").write_text("text")
    torch.save({"weight": torch.ones(2)}, "other.pth")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = {"model": model, "input": "good.png", "output": "out.png", "device": "cpu", **change}
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in arguments.items()]
    assert upscale.main(words) == 2
    (error,) = lines(capfd)
    assert said in error
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error_before_anything_is_read(capfd: Any) -> None:
    assert run(Path("no.pth"), "no.png", "out.png", "--device", "cuda") == 2
    assert "--device cpu" in lines(capfd)[0]
