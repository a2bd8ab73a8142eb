"""aether-evaluate: its figures are those of the papers, for every kind of file; errors are one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, List

import cv2
import numpy as np
import pytest
import torch
from aether_arch import AetherNet
from conftest import one_line, randomize
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from aethersr.commands import evaluate
from aethersr.onnx import export_onnx
from aethersr.quality import crop_to_multiple, luma, psnr, quality, resize, resize_matrix, ssim

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"embed_dim": 16, "depths": (1, 1), "scale": 2, "use_channel_attn": False}


def network(path: Path, **options: Any) -> AetherNet:
    net = randomize(AetherNet(**{**OPTIONS, **options})).eval()
    for value in net.parameters():  # small, so that every precision of it gives a picture
        value.data *= 0.3
    torch.save(net.state_dict(), path)
    return net


@pytest.fixture(scope="module")
def hr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures whose sides no 2 divides, and what is none."""
    folder = tmp_path_factory.mktemp("pictures") / "hr"
    folder.mkdir()
    Image.fromarray(photographs.astronaut()[:41, 200:251]).save(folder / "a.png")
    Image.fromarray(photographs.chelsea()[100:143, 100:149]).save(folder / "b.bmp")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._a.png").write_text("what macOS puts beside a.png")
    (folder / "x.png").mkdir()
    return folder


def table(capsys: Any, *arguments: object) -> List[List[str]]:
    assert evaluate.main([str(word) for word in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = [line.strip("|") for line in lines if line and "---" not in line]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def decibels(capsys: Any, *arguments: object) -> List[float]:
    return [float(row[1].split(" / ")[0]) for row in table(capsys, *arguments)[2:]]


def refused(capsys: Any, *arguments: object) -> str:
    assert evaluate.main([str(word) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return one_line(captured.err, "aether-evaluate") if "FILE" not in captured.err else captured.err


def truths(hr: Path) -> List[np.ndarray]:
    return [crop_to_multiple(np.asarray(Image.open(hr / name)), 2) for name in ("a.png", "b.bmp")]


def test_both_are_measured_on_the_reductions_that_matlab_makes(
    hr: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TILE", 8)  # without seams
    net = network(tmp_path / "net.pth")
    bicubic, ours = [], []
    for truth in truths(hr):
        low = resize(truth, truth.shape[0] // 2, truth.shape[1] // 2)
        with torch.no_grad():
            out = net(torch.from_numpy(low.copy()).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0)
        for found, picture in (
            (bicubic, resize(low, *truth.shape[:2])),
            (ours, (out.clamp(0, 1) * 255).round().to(torch.uint8).numpy()),
        ):
            found.append((psnr(truth, picture, 2), ssim(truth, picture, 2)))
    rows = table(capsys, "--each", "--hr", hr, tmp_path / "net.pth")  # taken for a folder by the option
    assert rows[0] == ["hr: PSNR-Y, dB / SSIM", "bicubic", "net.pth"]
    assert [row[0] for row in rows[1:3]] == ["a.png", "b.bmp"]
    assert rows[1][1:] == [f"{found[0][0]:.2f} / {found[0][1]:.4f}" for found in (bicubic, ours)]
    assert rows[3] == ["PSNR-Y, dB / SSIM", "hr"]
    for row, name, found in zip(rows[4:], ("bicubic", "net.pth"), (bicubic, ours)):
        assert row == [name, "{:.2f} / {:.4f}".format(*np.mean(found, 0))]


def test_every_form_and_file_of_one_network_is_measured(hr: Path, tmp_path: Path, capsys: Any) -> None:
    fused = network(tmp_path / "training.pth").fused()
    stored = copy.deepcopy(fused).prepare_qat("default", [torch.rand(1, 3, 24, 24)])
    half = {name: value.half() for name, value in fused.state_dict().items()}
    save_file(half, tmp_path / "fp16.safetensors")
    export_onnx(fused, 2, "fp32", str(tmp_path / "fp32.onnx"))
    export_onnx(fused, 2, "fp32", str(tmp_path / "static.onnx"), static=[3, 40, 40])
    export_onnx(stored, 2, "int8", str(tmp_path / "int8.onnx"))
    torch.save(stored.convert_to_quantized().state_dict(), tmp_path / "int8.pth")
    names = ["training.pth", "fp16.safetensors", "fp32.onnx", "int8.onnx", "static.onnx", "int8.pth"]
    found = decibels(capsys, *(tmp_path / name for name in names), "--hr", hr)
    assert [*found[1:3], found[4]] == pytest.approx([found[0]] * 3, abs=0.02)
    assert [found[3], found[5]] == pytest.approx([found[0]] * 2, abs=1)


def test_pairs_of_ones_own_are_taken_as_they_are(hr: Path, tmp_path: Path, capsys: Any) -> None:
    lows = []
    for name, truth in zip(("a", "bx2"), truths(hr)):
        lows.append(truth[::2, ::2] // 2)  # no reduction that anyone would make
        Image.fromarray(lows[-1]).save(tmp_path / f"{name}.png")
    expected = [psnr(t, resize(low, *t.shape[:2]), 2) for t, low in zip(truths(hr), lows)]
    arguments = ("--scale", 2, "--hr", hr, "--lr", tmp_path)
    assert table(capsys, *arguments)[1][1].startswith(f"{np.mean(expected):.2f} / ")
    (tmp_path / "bx2.png").unlink()
    assert "lacks b.bmp (1 of 2" in refused(capsys, *arguments)
    Image.fromarray(lows[0]).save(tmp_path / "b.png")
    assert "b.png has 25x20; expected 24x21" in refused(capsys, *arguments)


def test_jpeg_compresses_the_low_resolution_pictures_first(hr: Path, tmp_path: Path, capsys: Any) -> None:
    for name, truth in zip(("a", "b"), truths(hr)):
        low = Image.fromarray(resize(truth, truth.shape[0] // 2, truth.shape[1] // 2))
        low.save(tmp_path / f"{name}.jpg", quality=30)
    arguments = ("--hr", hr, "--scale", 2)
    made = table(capsys, *arguments, "--jpeg", 30)
    assert made == table(capsys, *arguments, "--lr", tmp_path)
    assert made != table(capsys, *arguments, "--jpeg", 90)


def test_pictures_are_read_as_aether_upscale_reads_them(tmp_path: Path, capsys: Any) -> None:
    """Such as all 16 bits: what 8 would round to black differs by 257 times as much, in dB."""
    picture = photographs.astronaut()[:60, 200:260]
    found = []
    for dtype in (np.uint8, np.uint16):
        cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1].astype(dtype))
        found.append(float(table(capsys, "--scale", 2, "--hr", tmp_path / "a.png")[1][1].split(" /")[0]))
    assert found[1] == pytest.approx(48.2 + found[0], abs=0.3)


def test_two_folders_and_two_files_of_one_name_stay_apart(hr: Path, tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / sub / "net.pth" for sub in ("hr", "two")]
    for path in files:
        path.parent.mkdir()
        network(path)
    Image.fromarray(photographs.coffee()[:40, :40]).save(tmp_path / "hr" / "c.png")
    rows = table(capsys, *files, "--hr", hr, tmp_path / "hr")
    assert rows[0][1:] == [str(hr), str(tmp_path / "hr")]
    assert [row[0] for row in rows[1:]] == ["bicubic", *map(str, files)]


def test_what_it_cannot_do_is_said_in_one_line(hr: Path, tmp_path: Path, capsys: Any) -> None:
    x2, x4, none = tmp_path / "x2.pth", tmp_path / "x4.pth", tmp_path / "none"
    network(x2)
    network(x4, scale=4)
    pytest.importorskip("ncnn")
    for name in ("broken.png", "text.param"):
        (tmp_path / name).write_bytes(b"no picture")
    Image.new("RGB", (14, 40)).save(tmp_path / "small.png")
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        (["--hr", hr], "--scale"),
        ([hr, "--hr", hr], f"{hr} is not a file; pass another (FILE)"),
        (["--hr", x2], f"{x2} is a network, expected a folder"),
        (["--model", x2, "--hr", hr], "--model is not an option: pass the networks without an option"),
        ([x2, "--hr", hr, "--upscale", "2"], "--upscale is not an option: the scale comes from the networks"),
        ([x2, "--hr", "https://example.org/Set5"], "https://example.org/Set5 is a web address"),
        ([x2, x4, "--hr", hr], "x2.pth x2, x4.pth x4"),
        ([x2, "--scale", 4, "--hr", hr], "--scale x4"),
        ([tmp_path / "none.pth", "--hr", hr], "none.pth"),
        ([x2, "--hr", none], "none is not a folder; pass one with pictures"),
        ([x2, "--hr", tmp_path / "empty"], "holds no picture"),
        (["--scale", 2, "--hr", tmp_path / "broken.png"], "broken.png is not a readable picture"),
        (["--scale", 2, "--hr", tmp_path / "small.png"], "small.png: 14x40 is too small"),
        (["--scale", 2, "--hr", hr, tmp_path, "--lr", hr], "--lr has 1"),
        (["--scale", 2, "--hr", hr, hr, "--lr", hr, tmp_path], f"{hr} was given twice"),
        (["--scale", 2, "--hr", hr, "--jpeg", 0], "--jpeg: invalid choice: 0 (expected 1 to 100)"),
        ([tmp_path / "text.param", "--hr", hr], "are not the two files of an NCNN network"),
    ):
        error = refused(capsys, *arguments)
        assert part in error, error
        assert "(--model)" not in error
        assert "--input" not in error
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in refused(capsys, x2, "--hr", hr, "--device", "cuda")


def test_a_reduction_is_that_of_matlab() -> None:
    # imresize(uint8(reshape(0:35, 6, 6)' * 7), 0.5), worked out by hand from Keys' kernel of width 8.
    picture = np.repeat((np.arange(36).reshape(6, 6) * 7).astype(np.uint8)[..., None], 3, 2)
    weights = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    assert np.allclose(resize_matrix(16, 8)[3, 3:11], weights)
    rows = np.zeros((3, 6))
    for k in range(3):
        for offset, weight in enumerate(weights):
            index = 2 * k - 3 + offset
            rows[k, -1 - index if index < 0 else 11 - index if index > 5 else index] += weight
    expected = np.floor(rows @ picture[..., 0].astype(float) @ rows.T + 0.5)
    assert np.array_equal(resize(picture, 3, 3)[..., 0], expected)


@pytest.mark.parametrize(("size", "target"), [(7, 7), (12, 4), (4, 12), (5, 9), (3, 1), (1, 8)])
def test_a_flat_picture_keeps_its_values_and_an_edge_does_not_wrap_round(size: int, target: int) -> None:
    assert (resize(np.full((size, 5, 3), 200, np.uint8), target, 5) == 200).all()
    edge = np.repeat(np.array([0, 255], np.uint8), size)[:, None, None].repeat(3, 2)
    found = resize(edge, 4 * size, 1)
    assert found[: 2 * size - 1].max(initial=0) < 128 < found[2 * size + 1 :].min(initial=255)


def test_luma_is_that_of_bt_601_and_not_rounded() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert np.allclose(luma(colours), [[16, 235, 81.481, 144.553, 40.966]])


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    truth = crop_to_multiple(photographs.astronaut()[:200, 100:331], 2)
    output = resize(resize(truth, 100, 115), 200, 230)
    assert truth.shape == output.shape == (200, 230, 3)
    a, b = luma(truth)[2:-2, 2:-2], luma(output)[2:-2, 2:-2]
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = peak_signal_noise_ratio(a, b, data_range=255), structural_similarity(a, b, **settings)
    assert quality(truth, output, 2) == pytest.approx(expected, abs=1e-9)


def test_the_border_does_not_count_and_sizes_that_cannot_be_compared_are_named() -> None:
    truth = photographs.astronaut()[:64, :64]
    output = np.pad(truth[3:-3, 3:-3], ((3, 3), (3, 3), (0, 0)))
    assert quality(truth, output, 3) == (float("inf"), pytest.approx(1))
    assert np.isfinite(psnr(truth, output, 2))
    with pytest.raises(ValueError, match="30x20 can't be compared with one of 20x30"):
        quality(truth[:30, :20], truth[:20, :30], 2)
    with pytest.raises(ValueError, match="14x20 is too small to compare; both sides need 15 pixels"):
        quality(truth[:20, :14], truth[:20, :14], 2)
    assert quality(truth[:20, :15], truth[:20, :15], 2) == (float("inf"), 1.0)
