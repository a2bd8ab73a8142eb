"""aether-evaluate: the table is right for every kind of file, and what it can't do it says in one line."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aether_arch import AetherNet
from conftest import randomize
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs

from aethersr.commands import evaluate
from aethersr.onnx import export_onnx
from aethersr.quality import crop_to_multiple, psnr, resize, ssim

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"embed_dim": 16, "depths": (1, 1), "scale": 2, "use_channel_attn": False}


def network(**options: Any) -> AetherNet:
    net = randomize(AetherNet(**{**OPTIONS, **options})).eval()
    for value in net.parameters():  # small, so that every precision of it gives a picture
        value.data *= 0.3
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hr: two pictures whose sides no 2 divides, and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "hr").mkdir()
    Image.fromarray(photographs.astronaut()[:41, 200:251]).save(folder / "hr" / "a.png")
    Image.fromarray(photographs.chelsea()[100:143, 100:149]).save(folder / "hr" / "b.bmp")
    (folder / "hr" / "notes.txt").write_text("not a picture")
    return folder


def table(capsys: Any, *arguments: object) -> list[list[str]]:
    assert evaluate.main([str(word) for word in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line and "---" not in line
    ]


def refused(capsys: Any, *arguments: object) -> str:
    assert evaluate.main([str(word) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return str(captured.err)


def truths(folder: Path) -> list[np.ndarray]:
    paths = (folder / "hr" / "a.png", folder / "hr" / "b.bmp")
    return [crop_to_multiple(np.asarray(Image.open(path)), 2) for path in paths]


def test_bicubic_and_a_network_are_measured_on_the_reductions_that_matlab_makes(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    bicubic, ours = [], []
    for truth in truths(folder):
        low = resize(truth, truth.shape[0] // 2, truth.shape[1] // 2)
        with torch.no_grad():
            out = net(torch.from_numpy(low.copy()).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0)
        for found, picture in (
            (bicubic, resize(low, *truth.shape[:2])),
            (ours, (out.clamp(0, 1) * 255).round().to(torch.uint8).numpy()),
        ):
            found.append((psnr(truth, picture, 2), ssim(truth, picture, 2)))
    rows = table(capsys, tmp_path / "net.pth", "--hr", folder / "hr", "--each")
    assert rows[0] == ["hr: PSNR-Y, dB / SSIM", "bicubic", "net.pth"]
    assert [row[0] for row in rows[1:3]] == ["a.png", "b.bmp"]
    assert rows[1][1:] == [f"{found[0][0]:.2f} / {found[0][1]:.4f}" for found in (bicubic, ours)]
    assert rows[3] == ["PSNR-Y, dB / SSIM", "hr"]
    for row, name, found in zip(rows[4:], ("bicubic", "net.pth"), (bicubic, ours)):
        decibels, likeness = np.mean(found, 0)
        assert row == [name, f"{decibels:.2f} / {likeness:.4f}"]


def test_every_form_and_file_of_one_network_is_measured(folder: Path, tmp_path: Path, capsys: Any) -> None:
    net = network()
    fused = net.fused()
    stored = copy.deepcopy(fused).prepare_qat("default", [torch.rand(1, 3, 24, 24)])
    torch.save(net.state_dict(), tmp_path / "training.pth")
    save_file(
        {name: value.half() for name, value in fused.state_dict().items()}, tmp_path / "fp16.safetensors"
    )
    export_onnx(fused, 2, "fp32", str(tmp_path / "fp32.onnx"))
    export_onnx(fused, 2, "fp32", str(tmp_path / "static.onnx"), static=[3, 40, 40])
    export_onnx(stored, 2, "int8", str(tmp_path / "int8.onnx"))
    torch.save(stored.convert_to_quantized().state_dict(), tmp_path / "int8.pth")
    names = ["training.pth", "fp16.safetensors", "fp32.onnx", "int8.onnx", "static.onnx", "int8.pth"]
    files = ["training.pth", "fp16.safetensors", "*.onnx", "int8.pth"]  # no shell expands *.onnx on Windows
    rows = table(capsys, *(tmp_path / name for name in files), "--hr", folder / "hr")
    assert [row[0] for row in rows[2:]] == names
    decibels = [float(row[1].split(" / ")[0]) for row in rows[2:]]
    same = [*decibels[:3], decibels[4]]
    assert same == pytest.approx([decibels[0]] * 4, abs=0.02)
    assert [decibels[3], decibels[5]] == pytest.approx([decibels[0]] * 2, abs=1)


def test_ncnn_files_are_measured(folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("ncnn")
    pytest.importorskip("pnnx")
    from aethersr.ncnn import export_ncnn

    net = network()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    param, weights = export_ncnn(net, 2, str(tmp_path / "net.param"))
    rows = table(capsys, tmp_path / "net.pth", param, "--hr", folder / "hr")
    decibels = [float(row[1].split(" / ")[0]) for row in rows[2:]]
    assert decibels[1] == pytest.approx(decibels[0], abs=0.05)
    renamed = Path(param).read_text(encoding="utf-8").replace(" data", " in0")
    Path(param).with_name("other.param").write_text(renamed, encoding="utf-8")
    shutil.copy(weights, Path(param).with_name("other.bin"))
    message = refused(capsys, Path(param).with_name("other.param"), "--hr", folder / "hr")
    assert "ncnn finds no blobs named data and output" in message
    Path(weights).unlink()
    assert "net.bin are not the two files" in refused(capsys, param, "--hr", folder / "hr")


def test_ncnn_files_for_grey_pictures_see_each_colour(folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("ncnn")
    pytest.importorskip("pnnx")
    from aethersr.ncnn import export_ncnn

    net = network(in_chans=1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    param, _ = export_ncnn(net, 2, str(tmp_path / "net.param"))
    rows = table(capsys, tmp_path / "net.pth", param, "--hr", folder / "hr")
    decibels = [float(row[1].split(" / ")[0]) for row in rows[2:]]
    assert decibels[1] == pytest.approx(decibels[0], abs=0.05)


def test_pairs_of_ones_own_are_taken_as_they_are(folder: Path, tmp_path: Path, capsys: Any) -> None:
    lows = []
    for name, truth in zip(("a", "bx2"), truths(folder)):
        lows.append(truth[::2, ::2] // 2)  # no reduction that anyone would make
        Image.fromarray(lows[-1]).save(tmp_path / f"{name}.png")
    expected = [psnr(t, resize(low, *t.shape[:2]), 2) for t, low in zip(truths(folder), lows)]
    rows = table(capsys, "--scale", 2, "--hr", folder / "hr", "--lr", tmp_path)
    assert rows[1][0] == "bicubic"
    assert rows[1][1].startswith(f"{np.mean(expected):.2f} / ")
    (tmp_path / "bx2.png").unlink()
    assert "lacks b.bmp (1 of 2" in refused(capsys, "--scale", 2, "--hr", folder / "hr", "--lr", tmp_path)
    Image.fromarray(lows[0]).save(tmp_path / "b.png")
    message = refused(capsys, "--scale", 2, "--hr", folder / "hr", "--lr", tmp_path)
    assert "b.png has 25x20; expected 24x21" in message


def test_jpeg_compresses_the_low_resolution_pictures_first(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "lr").mkdir()
    for name, truth in zip(("a", "b"), truths(folder)):
        low = Image.fromarray(resize(truth, truth.shape[0] // 2, truth.shape[1] // 2))
        low.save(tmp_path / "lr" / f"{name}.jpg", quality=30)
    arguments = ("--hr", folder / "hr", "--scale", 2)
    made = table(capsys, *arguments, "--jpeg", 30)
    assert made == table(capsys, *arguments, "--lr", tmp_path / "lr")
    assert made != table(capsys, *arguments, "--jpeg", 90)
    assert "pass 1 to 100 (--jpeg)" in refused(capsys, *arguments, "--jpeg", 0)


def test_two_folders_and_two_files_of_one_name_stay_apart(folder: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "hr"
    other.mkdir()
    Image.fromarray(photographs.coffee()[:40, :40]).save(other / "c.png")
    for sub in ("one", "two"):
        (tmp_path / sub).mkdir()
        torch.save(network().state_dict(), tmp_path / sub / "net.pth")
    files = [tmp_path / "one" / "net.pth", tmp_path / "two" / "net.pth"]
    rows = table(capsys, *files, "--hr", folder / "hr", other)
    assert rows[0] == ["PSNR-Y, dB / SSIM", str(folder / "hr"), str(other)]
    assert [row[0] for row in rows[1:]] == ["bicubic", *map(str, files)]
    assert rows[1][1] != rows[1][2]


def test_transparent_pictures_stand_on_white(tmp_path: Path, capsys: Any) -> None:
    picture = photographs.astronaut()[:60, 200:260]
    shown = picture.copy()
    shown[20:30] = 255
    alpha = np.where((shown == 255).all(2), 0, 255).astype(np.uint8)
    Image.fromarray(shown).save(tmp_path / "shown.png")
    Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / "clear.png")
    tables = [table(capsys, "--scale", 2, "--hr", tmp_path / name)[1] for name in ("shown.png", "clear.png")]
    assert tables[0] == tables[1]


def test_grey_pictures_and_grey_networks_work(folder: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(network(in_chans=1).state_dict(), tmp_path / "grey.pth")
    Image.fromarray(photographs.camera()[:40, :44]).save(tmp_path / "grey.png")
    rows = table(capsys, tmp_path / "grey.pth", "--hr", tmp_path / "grey.png", folder / "hr" / "a.png")
    assert rows[0][1:] == ["grey.png", "a.png"]
    assert all(float(cell.split(" / ")[0]) > 5 for cell in rows[2][1:])


def test_what_it_cannot_do_is_said_in_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    if not torch.cuda.is_available():
        torch.save(network().state_dict(), tmp_path / "cuda.pth")
        message = refused(capsys, tmp_path / "cuda.pth", "--hr", folder / "hr", "--device", "cuda")
        assert "finds no CUDA device" in message
    hr = folder / "hr"
    torch.save(network().state_dict(), tmp_path / "x2.pth")
    torch.save(network(scale=4).state_dict(), tmp_path / "x4.pth")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (14, 40)).save(tmp_path / "small.png")
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        (["--hr", hr], "--scale"),
        ([tmp_path / "x2.pth", tmp_path / "x4.pth", "--hr", hr], "x2.pth x2, x4.pth x4"),
        ([tmp_path / "x2.pth", "--scale", 4, "--hr", hr], "--scale x4"),
        ([tmp_path / "none.pth", "--hr", hr], "none.pth"),
        ([tmp_path / "x2.pth", "--hr", tmp_path / "none"], "none does not exist"),
        ([tmp_path / "x2.pth", "--hr", tmp_path / "empty"], "holds no picture"),
        (["--scale", 2, "--hr", tmp_path / "broken.png"], "broken.png can't be read"),
        (["--scale", 2, "--hr", tmp_path / "deep.png"], "8 bits"),
        (["--scale", 2, "--hr", tmp_path / "small.png"], "small.png: 14x40 is too small"),
        (["--scale", 2, "--hr", hr, tmp_path, "--lr", hr], "--lr has 1"),
        (["--scale", 2, "--hr", hr, hr, "--lr", hr, tmp_path], f"{hr} was given twice"),
    ):
        error = refused(capsys, *arguments)
        assert part in error, error
        assert "--model" not in error
