"""upscale.py: a file or a folder; what is skipped is said, and nothing is lost or half written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List

import aether_arch
import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from aethersr import upscaling
from aethersr.commands import upscale
from aethersr.jobs import Job
from aethersr.network import load_network
from aethersr.picture import Picture
from aethersr.upscaling import Upscaler, upscale_picture

CASES = ROOT / "tests" / "cases"
pytestmark = pytest.mark.usefixtures("one_thread")


class Double:
    """A network that repeats every pixel; ``before`` is called first."""

    in_chans, scale, reach, size = 3, 2, 3, None

    def __init__(self, before: Any = lambda image: None) -> None:
        self.before = before

    def __call__(self, image: Tensor) -> Tensor:
        self.before(image)
        return F.interpolate(image, scale_factor=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new network: it starts as an interpolation, so it is known what pictures should become."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "net.pth"
    options: Dict[str, Any] = {"use_channel_attn": False, "use_spatial_attn": False}
    net = aether_arch.AetherNet(scale=2, embed_dim=16, depths=(1, 1), lk_kernel=5, **options).eval()
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


# ----------------------------------------------------------------------------------------------- transparency


def over(pixels: np.ndarray, colour: Any) -> np.ndarray:
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + np.array(colour) * (1 - alpha)


@pytest.mark.parametrize("hidden", ["as it is", "low alpha"])
def test_no_dark_ring_round_what_is_cut_out(model: Path, hidden: str) -> None:
    disc = np.array(Image.open(CASES / "alpha_disc.png"))
    if hidden == "low alpha":  # colours of a hardly visible pixel mean as little
        disc[disc[..., 3] < 10, :3] = 0
        disc[10, 10] = (0, 0, 0, 3)
    net = load_network(model, "cpu", False)
    out = upscale_picture(Picture(disc, True), net, 512, 28).pixels
    darkest = out[out[..., 3] > 8][:, :3].min()
    assert darkest >= 250, f"a visible pixel is as dark as {darkest}"
    for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 0)):
        composite = Picture(over(disc, colour).round().astype(np.uint8))
        difference = np.abs(over(out, colour) - upscale_picture(composite, net, 512, 28).pixels)
        off = difference[4:-4, 4:-4].max()  # at its border a new network darkens what is opaque
        assert off <= 4, f"{off:.1f} steps off over {colour}"


def test_one_alpha_everywhere_stays_and_changes_no_colour(model: Path) -> None:
    net = load_network(model, "cpu", False)
    colours = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    plain = upscale_picture(Picture(colours), net, 512, 28).pixels
    for alpha in (255, 7):
        out = upscale_picture(
            Picture(np.dstack([colours, np.full((20, 24), alpha, np.uint8)]), True), net, 512, 28
        )
        assert np.array_equal(out.pixels[..., :3], plain)
        assert (out.pixels[..., 3] == alpha).all()


# --------------------------------------------------------------------------------------------------- textures


@pytest.mark.parametrize(("wrap", "rows", "columns"), [("xy", 3, 3), ("x", 1, 3), ("y", 3, 1)])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_wrapped_texture_is_the_middle_of_its_tiling(
    tmp_path: Path, wrap: str, rows: int, columns: int, transparent: bool
) -> None:
    net = small_net(2, embed_dim=8, depths=(1,), use_channel_attn=False).float()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    texture = np.array(Image.open(CASES / "tile_texture.png").convert("RGB"))
    if transparent:
        alpha = np.where(np.roll(texture[..., :1], 7, 0) > 128, 255, 0).astype(np.uint8)
        texture = np.concatenate([texture * (alpha > 0), alpha], 2)
    Image.fromarray(texture).save(tmp_path / "in.png")
    Image.fromarray(np.tile(texture, (rows, columns, 1))).save(tmp_path / "many.png")
    assert run(tmp_path / "net.pth", tmp_path / "in.png", tmp_path / "out.png", "--wrap", wrap) == 0
    assert (
        run(tmp_path / "net.pth", tmp_path / "many.png", tmp_path / "many_out.png", "--overlap", "exact") == 0
    )
    out = np.array(Image.open(tmp_path / "out.png")).astype(int)
    many = np.array(Image.open(tmp_path / "many_out.png"))
    top, left = out.shape[0] * (rows // 2), out.shape[1] * (columns // 2)
    off = np.abs(out - many[top : top + out.shape[0], left : left + out.shape[1]]).max()
    assert off <= 1, f"{off} steps off"


# ---------------------------------------------------------------------------------------------------- folders


def test_every_file_that_is_skipped_is_named_with_its_reason(model: Path, tmp_path: Path, capfd: Any) -> None:
    source = tmp_path / "Bilder \u00f6"
    noise(source / "good.PNG")
    noise(source / "inner" / "deep" / "b.jpg")
    (source / "empty.png").touch()
    (source / "notes.txt").write_text("no picture")
    (source / ".hidden").touch()
    (source / "gone.png").symlink_to(source / "nothing")
    (source / "inner" / "circle").symlink_to(source)
    moving = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    moving.save(
        source / "moving.gif",
        save_all=True,
        append_images=[Image.fromarray(np.full((8, 8, 3), 99, np.uint8))],
    )
    assert run(model, source, tmp_path / "out") == 2
    said = lines(capfd)
    reasons = {
        "empty.png": "is empty",
        "notes.txt": "'.txt'",
        "gone.png": "a link to nothing",
        "moving.gif": "2 frames",
        "inner": "--recursive",
    }
    for name, reason in reasons.items():
        assert sum(f"{source / name} " in line and reason in line for line in said) == 1, (name, said)
    assert "5 of 6" in said[-1]
    assert len(said) == 6
    assert files(tmp_path / "out") == ["good.PNG"]
    assert run(model, source, tmp_path / "out", "--recursive", "--skip-existing") == 2
    assert files(tmp_path / "out") == ["good.PNG", "inner/deep/b.jpg"]


def test_a_folder_inside_itself_and_an_interrupted_folder_go_on(
    model: Path, tmp_path: Path, capfd: Any
) -> None:
    noise(tmp_path / "a.png")
    noise(tmp_path / "sub" / "b.png")
    assert run(model, tmp_path, tmp_path / "out", "--recursive") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    (tmp_path / "out" / "sub" / "b.png").unlink()
    assert run(model, tmp_path, tmp_path / "out", "--recursive") == 2
    assert "--overwrite" in lines(capfd)[0]
    assert run(model, tmp_path, tmp_path / "out", "--recursive", "--skip-existing") == 0
    assert files(tmp_path / "out") == ["a.png", "sub/b.png"]
    first = tmp_path / "out" / "a.png"
    assert first.stat().st_mtime_ns == before[first]
    assert run(model, tmp_path, tmp_path / "out", "--recursive", "--skip-existing") == 0
    assert "Nothing to do" in capfd.readouterr().out


def test_names_that_differ_in_their_ends_alone_do_not_meet(model: Path, tmp_path: Path) -> None:
    long = "x" * 60
    names = [f"{long}{number}{ending}" for number in range(6) for ending in (".png", ".bmp")]
    for number, name in enumerate(names):
        noise(tmp_path / "in" / name, 5, 6 + number, 3)
    assert run(model, tmp_path / "in", tmp_path / "out") == 0
    assert files(tmp_path / "out") == sorted(names)
    for number, name in enumerate(names):
        assert Image.open(tmp_path / "out" / name).size == (12 + 2 * number, 10)


def test_a_folder_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Files go, are cut, and come up as output: each is named, the others are written whole."""
    jobs = [Job(noise(tmp_path / "in" / f"{k}.png"), tmp_path / "out" / f"{k}.png") for k in range(12)]

    def change(image: Tensor) -> None:
        if not (tmp_path / "out" / "11.png").exists():
            jobs[8].source.unlink()
            jobs[9].source.write_bytes(jobs[9].source.read_bytes()[:60])
            (tmp_path / "out").mkdir(exist_ok=True)
            jobs[11].target.write_text("mine")

    results = list(Upscaler(Double(change), 512, 3).run(jobs))
    assert [bool(result.problem) for result in results] == [k in (8, 9, 11) for k in range(12)]
    assert jobs[11].target.read_text() == "mine"
    assert files(tmp_path / "out") == sorted(f"{k}.png" for k in range(12) if k not in (8, 9))


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory."),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
)  # fmt: skip
def test_the_tile_is_halved_when_memory_runs_out(tmp_path: Path, error: Exception) -> None:
    def limit(image: Tensor) -> None:
        if image.shape[-1] > 70:
            raise error

    said: List[str] = []
    jobs = [Job(noise(tmp_path / f"{k}.png", 200, 150, 3), tmp_path / f"out{k}.png") for k in range(3)]
    worker = Upscaler(Double(limit), 512, 3, say=said.append)
    assert not [result.problem for result in worker.run(jobs) if result.problem]
    assert worker.tile == 50
    assert said == ["Not enough memory for tiles of 512 pixels; going on with 100.",
                    "Not enough memory for tiles of 100 pixels; going on with 50."]  # fmt: skip
    out = np.array(Image.open(tmp_path / "out0.png"))
    assert np.array_equal(out[::2, ::2], np.array(Image.open(tmp_path / "0.png")))


def test_too_little_memory_for_any_tile_is_said_and_other_faults_are_raised(tmp_path: Path) -> None:
    def broken(error: Exception) -> Any:
        def fail(image: Tensor) -> None:
            raise error

        return fail

    job = Job(noise(tmp_path / "a.png", 99, 99, 3), tmp_path / "out.png")
    (result,) = Upscaler(Double(broken(MemoryError())), 512, 3, say=lambda line: None).run([job])
    assert "not enough memory" in result.problem
    for words in ("CUDA error: an illegal memory access was encountered", "unsupported memory format option"):
        with pytest.raises(RuntimeError, match=words):
            list(Upscaler(Double(broken(RuntimeError(words))), 512, 3).run([job]))
    assert not job.target.exists()


# ------------------------------------------------------------------------------------------------------ speed


def test_reading_network_and_writing_overlap(tmp_path: Path, monkeypatch: Any) -> None:
    """Each sleeps, so that a slow machine does not matter: 12 pictures one after another would take 2 s."""
    monkeypatch.setattr(
        upscaling.Picture, "read", lambda path: time.sleep(0.05) or Picture(np.zeros((4, 4, 3), np.uint8))
    )
    monkeypatch.setattr(upscaling, "_write", lambda *arguments: time.sleep(0.05))
    at_once: List[int] = []
    busy = threading.Lock()

    def work(image: Tensor) -> None:
        assert busy.acquire(blocking=False), "the network is asked twice at once"
        at_once.append(threading.active_count())
        time.sleep(0.06)
        busy.release()

    begin = time.monotonic()
    results = list(
        Upscaler(Double(work), 512, 3).run([Job(Path(f"{k}"), Path(f"{k}.png")) for k in range(12)])
    )
    seconds = time.monotonic() - begin
    assert [result.job.source.name for result in results] == [str(k) for k in range(12)]
    assert seconds < 1.4, f"{seconds:.2f} s"


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


# ---------------------------------------------------------------------------- nothing lost, nothing half done


STOP = """
import os, signal, sys, threading, time
sys.path[:0] = [{root!r}, {archs!r}]
from aethersr.commands import upscale
import torch
torch.set_num_threads(1)
moment, how = float(sys.argv[1]), getattr(signal, sys.argv[2])
threading.Timer(moment, lambda: os.kill(os.getpid(), how)).start()
code = upscale.main(sys.argv[3:])
os._exit(code)
"""


def kill_at(moment: float, how: str, model: Path, folder: Path) -> int:
    code = STOP.format(root=str(ROOT), archs=str(ROOT / "archs"))
    words = [
        "--model",
        model,
        "--input",
        folder / "in",
        "--output",
        folder / "out",
        "--overwrite",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, str(moment), how, *map(str, words)], capture_output=True
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_kill_at_any_moment_leaves_old_or_whole_new_files(model: Path, tmp_path: Path, how: str) -> None:
    for k in range(30):
        noise(tmp_path / "in" / f"{k}.png", 40, 50, 3)
    assert run(model, tmp_path / "in", tmp_path / "whole") == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    (tmp_path / "out").mkdir()
    rng = np.random.default_rng(0)
    for _ in range(17):
        for name in whole:
            (tmp_path / "out" / name).write_bytes(b"old")
        assert kill_at(rng.uniform(0.0, 0.6), how, model, tmp_path) in (0, 130, -getattr(signal, how))
        for path in (tmp_path / "out").iterdir():
            if ".part" in path.name and how == "SIGKILL":  # no process can tidy up after it
                path.unlink()
            else:
                assert path.read_bytes() in (b"old", whole[path.name]), path.name
    assert {path.name: path.stat().st_size for path in (tmp_path / "in").iterdir()}.keys() == whole.keys()


def test_an_interruption_ends_threads_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    jobs = [Job(noise(tmp_path / "in" / f"{k}.png"), tmp_path / "out" / f"{k}.png") for k in range(20)]
    before = threading.active_count()
    results = Upscaler(Double(lambda image: time.sleep(0.01)), 512, 3).run(jobs)
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())
    assert threading.active_count() == before
    left = list((tmp_path / "out").iterdir())
    assert 1 <= len(left) < 12
    assert all(Image.open(path).size == (22, 18) for path in left)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp"])
def test_a_disk_that_fills_up_leaves_nothing(model: Path, tmp_path: Path, capfd: Any, ending: str) -> None:
    """A limit to the size of files stands for the disk: writing fails at the same byte, in C code too."""
    source = noise(tmp_path / "in.png", 60, 60, 3)
    content, old = source.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        code = run(model, source, tmp_path / f"out{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 2
    assert f"out{ending} can't be written" in lines(capfd)[0]
    assert files(tmp_path) == ["in.png"]
    assert source.read_bytes() == content


def test_the_input_is_never_the_output(model: Path, tmp_path: Path, capfd: Any) -> None:
    source = noise(tmp_path / "in" / "a.png")
    content = source.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.link(source, tmp_path / "second.png")
    (tmp_path / "third.png").symlink_to(source)
    outputs = [(source, name) for name in ("in/a.png", "second.png", "third.png")]
    outputs += [(source.parent, name) for name in ("in", "link")]
    for inputs, name in outputs:
        assert run(model, inputs, tmp_path / name, "--overwrite") == 2
        assert "input itself" in lines(capfd)[0]
    assert source.read_bytes() == content


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": "nothing.png"}, "does not exist"),
        ({"input": "cut.png"}, "not a readable picture"),
        ({"input": "empty"}, "holds no picture"),
        ({"output": "out.xyz"}, "'.xyz'"),
        ({"output": "out"}, "nothing"),
        ({"output": "no/out.png"}, "does not exist"),
        ({"output": "cut.png"}, "--overwrite"),
        ({"output": "out.jpg"}, "transparency"),
        ({"output": "pipe.png"}, "pipe or a device"),
        ({"input": "pipe.png"}, "neither a file nor a folder"),
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
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "text.onnx").write_text("text")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    torch.save({"weight": torch.ones(2)}, "other.pth")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = {"model": model, "input": "good.png", "output": "out.png", "device": "cpu", **change}
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in arguments.items()]
    assert upscale.main(words) == 2
    (error,) = lines(capfd)
    assert said in error
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_it_runs_from_any_folder_as_a_process(model: Path, tmp_path: Path) -> None:
    noise(tmp_path / "Bilder ö" / "a.png")
    command = [
        sys.executable,
        ROOT / "upscale.py",
        "--model",
        model,
        "--input",
        "Bilder ö",
        "--output",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Wrote out/a.png (22x18)\n"


def test_an_onnx_file_gives_the_same_picture(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = aether_arch.aether_from_state_dict(torch.load(model, weights_only=True))
    path = aether_arch.export_onnx(net, 2, output_path=str(tmp_path / "net.onnx"))
    source = noise(tmp_path / "in.png", 40, 50, 4)
    assert run(model, source, tmp_path / "a.png") == 0
    assert run(Path(path), source, tmp_path / "b.png") == 0
    off = np.array(Image.open(tmp_path / "a.png")).astype(int) - np.array(Image.open(tmp_path / "b.png"))
    assert np.abs(off).max() <= 1
    assert load_network(Path(path), "cpu", False).reach == load_network(model, "cpu", False).reach


def test_a_network_for_grey_takes_colours_too(tmp_path: Path) -> None:
    net = small_net(2, in_chans=1, embed_dim=8, depths=(1,), lk_kernel=3).float()
    torch.save(net.state_dict(), tmp_path / "grey.pth")
    assert run(tmp_path / "grey.pth", noise(tmp_path / "in.png"), tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").mode == "RGB"


def test_more_pixels_than_the_format_allows_is_said(model: Path, tmp_path: Path, capfd: Any) -> None:
    assert run(model, noise(tmp_path / "in.png", 2, 8200, 3), tmp_path / "out.webp") == 2
    assert ".png or .tif" in lines(capfd)[0]
    assert not (tmp_path / "out.webp").exists()
