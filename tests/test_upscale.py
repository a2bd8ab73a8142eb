"""upscale.py: tiles without seams in bounded memory, and pictures that keep what they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import aether_arch
import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

import upscale

RNG = np.random.default_rng(0)


def picture(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    """Smooth, so that lossy formats stay near it, with a little noise, so that no two pixels are the same."""
    height, width, *channels = shape
    y, x = np.mgrid[:height, :width]
    waves = [0.5 + 0.4 * np.sin(y / (5 + k) + k) * np.cos(x / (4 + k)) for k in range(channels[0] if channels else 1)]
    pixels = np.stack(waves, -1).clip(0, 1) * np.iinfo(dtype).max * 0.98 + RNG.random((height, width, 1))
    return pixels.astype(dtype).reshape(shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new network: it starts as an interpolation, so pictures can be compared with what they should become."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "net.pth"
    net = aether_arch.AetherNet(scale=2, embed_dim=16, depths=(1, 1), lk_kernel=5, use_channel_attn=False, use_spatial_attn=False)
    torch.save(net.fuse_model().state_dict(), path)
    return path


def run(*arguments: Any) -> int:
    return upscale.main([str(argument) for argument in arguments])


def upscaled(model: Path, source: Path, target: Path, *more: Any) -> Image.Image:
    assert run("--model", model, "--input", source, "--output", target, "--tile", 16, "--device", "cpu", *more) == 0
    assert not list(target.parent.glob("*.part*"))
    return Image.open(target)


# ----------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize(("scale", "spatial"), [(2, False), (3, True), (4, False)])
def test_tiles_equal_the_whole_picture_borders_included(scale: int, spatial: bool, form: str) -> None:
    net: Any = small_net(scale, lk_kernel=5, use_channel_attn=False, use_spatial_attn=spatial)
    net = net.fuse_model() if form == "fused" else net
    image = torch.rand(2, 3, 71, 53, dtype=torch.float64)
    whole = net(image).detach()
    for tile in (71, 24, 13):
        difference = float((upscale.upscale_tiled(net, image, tile) - whole).abs().max() / whole.abs().max())
        assert difference < 1e-12, f"tile {tile}: {difference}"
    tiled = upscale.upscale_tiled(net.float(), image.float(), 24)
    assert float((tiled - whole).abs().max() / whole.abs().max()) < 1e-5


@pytest.mark.parametrize("spatial", [False, True])
def test_the_overlap_is_exactly_the_receptive_field(spatial: bool) -> None:
    """One pixel less would show: the output changes with an input pixel that far away, and with none farther."""
    net = small_net(2, lk_kernel=5, use_channel_attn=False, use_spatial_attn=spatial)
    reach = upscale.receptive_field(net)
    image = torch.rand(1, 3, 1, 2 * reach + 5, dtype=torch.float64, requires_grad=True)
    net(image)[..., 2 * (reach + 2) : 2 * (reach + 3)].abs().sum().backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert (int(seen.min()), int(seen.max())) == (2, 2 * reach + 2)


def test_channel_attention_differs_by_little_and_less_with_larger_tiles() -> None:
    net = small_net(2, lk_kernel=5, use_channel_attn=True, use_spatial_attn=False)
    image = torch.from_numpy(picture(96, 96, 3)).permute(2, 0, 1)[None].double() / 255
    whole = net(image).detach()
    small, large = (float((upscale.upscale_tiled(net, image, tile) - whole).abs().max() / whole.abs().max()) for tile in (24, 48))
    print(f"channel attention, random weights: tiles of 24 differ by {small:.2g} of the largest output, of 48 by {large:.2g}")
    assert 0 < large < small < 0.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (37, 2), (16, 16), (17, 33)])
def test_tiles_cover_any_size_once(height: int, width: int) -> None:
    image = torch.rand(1, 1, height, width)

    def count(crop: Tensor) -> Tensor:
        assert max(crop.shape[2:]) <= 16 + 2 * 3
        return crop.repeat_interleave(2, 2).repeat_interleave(2, 3)

    out = torch.full((1, 1, 2 * height, 2 * width), -1.0)
    assert upscale.upscale_tiled(count, image, 16, 3, out) is out
    assert torch.equal(out[..., ::2, ::2], image)
    assert torch.equal(out[..., 1::2, 1::2], image)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_whole_numbers_come_back_rounded_and_clamped(dtype: torch.dtype) -> None:
    levels = upscale.LEVELS[dtype]
    image = torch.tensor([[[[0, 1, levels // 2, levels]]]]).to(dtype)
    out = upscale.upscale_tiled(lambda x: (x - 0.25) * 2, image, 2, 0)
    assert out.dtype == dtype
    assert out.flatten().tolist() == [0, 0, round((levels // 2 / levels - 0.25) * 2 * levels), levels]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"tile": 0}, "tile=0"), ({"overlap": -1}, "overlap=-1"), ({"image": torch.rand(3, 8, 8)}, "(N, C, H, W)"), ({"net": lambda x: x}, "overlap"),
     ({"image": torch.ones(1, 3, 8, 8, dtype=torch.int64)}, "int64"), ({"net": small_net().train()}, "net.eval()"),
     ({"net": lambda x: x / 0, "overlap": 0}, "not finite")],
)  # fmt: skip
def test_impossible_arguments_are_named(arguments: Any, said: str) -> None:
    net: Any = small_net(2, use_channel_attn=False)
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        upscale.upscale_tiled(**{"net": net, "image": torch.rand(1, 3, 8, 8), **arguments})


MEMORY = """
import resource, sys, tempfile, numpy as np, torch
sys.path[:0] = [{root!r}, {archs!r}]
import upscale
from conftest import small_net
torch.set_num_threads(1)
side = int(sys.argv[1])
net = small_net(2, embed_dim=8, depths=(1,), lk_kernel=3, use_channel_attn=False, use_spatial_attn=False).float().fuse_model()
with tempfile.TemporaryFile() as a, tempfile.TemporaryFile() as b:
    # pictures in files: their pages are the system's to drop, so what is left is what tiling itself takes
    image = torch.from_numpy(np.memmap(a, np.uint8, "w+", shape=(1, 3, side, side)))
    out = torch.from_numpy(np.memmap(b, np.uint8, "w+", shape=(1, 3, 2 * side, 2 * side)))
    upscale.upscale_tiled(net, image[..., :200, :200], 128, out=out[..., :400, :400])
    status = lambda: int([line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")][0])
    peak = 0
    def watch(tiles, count):
        global peak
        for tile in tiles:
            yield tile
            peak = max(peak, status())
    begin = status()
    upscale.upscale_tiled(net, image, 128, out=out, progress=watch)
    print((peak - begin) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    def mebibytes(side: int) -> float:
        code = MEMORY.format(root=str(ROOT), archs=str(ROOT / "tests"))
        return float(subprocess.run([sys.executable, "-c", code, str(side)], capture_output=True, text=True, check=True, cwd=tmp_path).stdout)

    small, large = mebibytes(400), mebibytes(2000)  # the larger picture has 12 MB in, 48 MB out: as floats it would be 240 MB
    assert large < small + 8, f"{small:.1f} MiB for 400x400, {large:.1f} MiB for 2000x2000"


# -------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("L", ".png"), ("LA", ".png"), ("RGB", ".png"), ("RGBA", ".png"), ("L", ".jpg"), ("RGB", ".jpeg"), ("RGB", ".webp"), ("RGBA", ".webp"),
     ("L", ".tif"), ("RGB", ".tiff"), ("RGBA", ".tif"), ("L", ".bmp"), ("RGB", ".bmp")],
)  # fmt: skip
def test_formats_keep_their_channels_and_look(model: Path, tmp_path: Path, mode: str, ending: str) -> None:
    pixels = picture(37, 45, len(mode))
    source, target = tmp_path / f"Bild ä 写真{ending}", tmp_path / f"größer{ending}"
    image = Image.fromarray(pixels[..., 0] if len(mode) == 1 else pixels)
    assert image.mode == mode
    image.save(source, **{".webp": {"lossless": True}, ".jpg": {"quality": 95}, ".jpeg": {"quality": 95}}.get(ending, {}))
    out = upscaled(model, source, target)
    assert (out.mode, out.size) == (mode, (90, 74))
    expected = np.asarray(image.resize(out.size, Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(out).astype(float) - expected)[4:-4, 4:-4].mean() < 3


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_stay_sixteen(model: Path, tmp_path: Path, channels: int, ending: str) -> None:
    pixels = picture(21, 30, channels, dtype=np.uint16)
    source, target = tmp_path / f"tief ü{ending}", tmp_path / f"out{ending}"
    source.write_bytes(cv2.imencode(ending, pixels)[1].tobytes())
    upscaled(model, source, target)
    out = cv2.imdecode(np.fromfile(target, np.uint8), cv2.IMREAD_UNCHANGED).reshape(42, 60, channels)
    assert out.dtype == np.uint16
    assert len(np.unique(out % 256)) == 256, "the lower bits hold nothing"
    expected = cv2.resize(pixels, (60, 42), interpolation=cv2.INTER_CUBIC).reshape(out.shape).astype(float)
    assert np.abs(out - expected)[4:-4, 4:-4].mean() < 3 * 257


def test_opaque_stays_opaque_and_palettes_become_colours(model: Path, tmp_path: Path) -> None:
    pixels = np.dstack([picture(20, 24, 3), np.full((20, 24), 255, np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    assert np.asarray(upscaled(model, tmp_path / "opaque.png", tmp_path / "out.png"))[..., 3].min() == 255
    Image.fromarray(pixels).quantize(16).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert upscaled(model, tmp_path / "palette.png", tmp_path / "out2.png").mode in ("RGB", "RGBA")
    Image.fromarray(pixels[..., :3]).quantize(16).save(tmp_path / "clear.png", transparency=3)
    assert upscaled(model, tmp_path / "clear.png", tmp_path / "out3.png").mode == "RGBA"


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_orientation_is_honoured(model: Path, tmp_path: Path, turn: int, deep: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    source, target = tmp_path / "source.png", tmp_path / "out.png"
    corner = np.zeros((12, 20, 3), np.uint8)
    corner[:6, :10] = (255, 0, 0)
    corner[:6, 10:] = (0, 0, 255)
    Image.fromarray(corner).save(source, exif=exif)
    with Image.open(source) as image:
        expected = ImageOps.exif_transpose(image)
    if deep:
        data = np.frombuffer(exif.tobytes()[6:], np.uint8)
        pixels = corner[..., ::-1].astype(np.uint16) * 257
        source.write_bytes(cv2.imencodeWithMetadata(".png", pixels, [cv2.IMAGE_METADATA_EXIF], [data])[1].tobytes())
        with Image.open(source) as image:
            assert image.getexif().get(0x0112, 1) == turn
    out = upscaled(model, source, target)
    assert out.getexif().get(0x0112, 1) == 1
    assert out.size == (expected.width * 2, expected.height * 2)
    shrunk = np.asarray(out.convert("RGB").resize(expected.size, Image.Resampling.BOX)).astype(float)
    assert np.abs(shrunk - np.asarray(expected)).mean() < 12


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_colour_profile_is_kept(model: Path, tmp_path: Path, ending: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(picture(9, 8, 3)).save(tmp_path / f"source{ending}", icc_profile=profile)
    assert upscaled(model, tmp_path / f"source{ending}", tmp_path / f"out{ending}").info["icc_profile"] == profile


def test_colour_profile_is_kept_in_sixteen_bit_png(model: Path, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = picture(9, 8, 3, dtype=np.uint16)
    encoded = cv2.imencodeWithMetadata(".png", pixels, [cv2.IMAGE_METADATA_ICCP], [np.frombuffer(profile, np.uint8)])[1]
    (tmp_path / "source.png").write_bytes(encoded.tobytes())
    out = upscaled(model, tmp_path / "source.png", tmp_path / "out.png")
    assert out.info["icc_profile"] == profile
    assert ";16" in str(out.tile)


def test_an_onnx_file_gives_the_same_picture(model: Path, tmp_path: Path) -> None:
    net = aether_arch.aether_from_state_dict(torch.load(model, weights_only=True))
    path = aether_arch.export_onnx(net, 2, output_path=str(tmp_path / "net.onnx"))
    Image.fromarray(picture(40, 50, 4)).save(tmp_path / "source.png")
    expected = np.asarray(upscaled(model, tmp_path / "source.png", tmp_path / "a.png")).astype(int)
    out = np.asarray(upscaled(Path(path), tmp_path / "source.png", tmp_path / "b.png")).astype(int)
    assert np.abs(out - expected).max() <= 1
    assert upscale.load_network(Path(path), "cpu", False)[1:] == (3, upscale.receptive_field(net))


def test_a_network_for_grey_takes_colours_too(tmp_path: Path) -> None:
    net = aether_arch.AetherNet(scale=2, in_chans=1, embed_dim=8, depths=(1,), lk_kernel=3, use_channel_attn=False, use_spatial_attn=False)
    torch.save(net.fuse_model().state_dict(), tmp_path / "grey.pth")
    Image.fromarray(picture(9, 8, 3)).save(tmp_path / "source.png")
    assert upscaled(tmp_path / "grey.pth", tmp_path / "source.png", tmp_path / "out.png").mode == "RGB"


def test_a_folder_as_a_process(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Bilder ö"
    folder.mkdir()
    Image.fromarray(picture(20, 10, 3)).save(folder / "a.png")
    Image.fromarray(picture(10, 20)).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("no picture")
    command = [sys.executable, str(ROOT / "upscale.py"), "--model", str(model), "--input", str(folder), "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.jpg"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_one_broken_picture_in_a_folder_does_not_stop_the_others(model: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"broken")
    Image.fromarray(picture(6, 5)).save(folder / "b.png")
    assert run("--model", model, "--input", folder, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "a.png" in error
    assert "1 of 2" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": "nothing.png"}, "does not exist"),
        ({"input": "cut.png"}, "not a readable picture"),
        ({"input": "text.png"}, "not a readable picture"),
        ({"input": "empty"}, "holds no picture"),
        ({"input": "moving.webp"}, "holds 2 pictures"),
        ({"input": "float.tif"}, "type F"),
        ({"output": "out.gif"}, "'.gif'"),
        ({"output": "out"}, "nothing"),
        ({"output": "no/out.png"}, "does not exist"),
        ({"output": "good.png", "overwrite": None}, "the input itself"),
        ({"output": "cut.png"}, "--overwrite"),
        ({"output": "out.jpg"}, "transparency"),
        ({"input": "deep.png", "output": "out.webp"}, "16 bits"),
        ({"model": "no.pth"}, "--model."),
        ({"model": "text.pth"}, "not a readable checkpoint"),
        ({"model": "text.onnx"}, "not a readable ONNX"),
        ({"model": "no.onnx"}, "does not exist"),
        ({"model": "other.pth"}, "not an AetherNet"),
        ({"model": "text.png"}, ".onnx"),
        ({"tile": 0}, "--tile 0"),
        ({"overlap": -1}, "--overlap -1"),
        ({"fp16": None}, "--fp16"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_clear_line(model: Path, tmp_path: Path, change: Any, said: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(30, 30, 4)).save("good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-2000])
    for name in ("text.png", "text.pth", "text.onnx"):
        (tmp_path / name).write_text("text")
    (tmp_path / "empty").mkdir()
    frames = [Image.fromarray(picture(8, 8, 3)) for _ in range(2)]
    frames[0].save("moving.webp", save_all=True, append_images=[frames[1].transpose(Image.Transpose.ROTATE_90)])
    Image.fromarray(picture(8, 8).astype(np.float32)).save("float.tif")
    cv2.imwrite("deep.png", picture(8, 8, 3, dtype=np.uint16))
    torch.save({"weight": torch.ones(2)}, "other.pth")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = {"model": model, "input": "good.png", "output": "out.png", "device": "cpu", **change}
    assert run(*(f"--{name}" if value is None else f"--{name}={value}" for name, value in arguments.items())) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("upscale.py: error: ")
    assert said in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_more_pixels_than_the_format_allows_is_said(model: Path, tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(picture(2, 8200, 3)).save(tmp_path / "wide.webp", lossless=True)
    assert run("--model", model, "--input", tmp_path / "wide.webp", "--output", tmp_path / "out.webp", "--device", "cpu") == 2
    assert ".png or .tif" in capsys.readouterr().err
    assert not (tmp_path / "out.webp").exists()
