"""Tiles without seams in bounded memory, textures that go on at their other side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
import torch
from conftest import ROOT, small_net
from skimage import data
from torch import Tensor
from torch.nn import functional as F

from aethersr.network import load_network
from aethersr.tiling import LEVELS, SHORT_OVERLAP, receptive_field, upscale_tiled

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_net(scale: int = 2, **options: Any) -> Any:
    small: Any = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3, "use_channel_attn": False}
    return small_net(scale, **{**small, "use_spatial_attn": False, **options})


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize(("scale", "spatial"), [(1, False), (2, True), (3, False)])
def test_tiles_equal_the_whole_picture_borders_included(scale: int, spatial: bool, form: str) -> None:
    net = tiny_net(scale, use_spatial_attn=spatial)
    net = net.fused() if form == "fused" else net
    image = torch.rand(2, 3, 41, 33, dtype=torch.float64)
    whole = net(image).detach()
    for tile in (41, 24, 13):
        assert apart(upscale_tiled(net, image, tile), whole) < 1e-12
    assert apart(upscale_tiled(net.float(), image.float(), 24), whole) < 1e-5


@pytest.mark.parametrize("spatial", [False, True])
def test_the_overlap_is_exactly_the_receptive_field(spatial: bool) -> None:
    """The output changes with an input pixel that far away, and with none farther."""
    net = tiny_net(lk_kernel=5, depths=(1, 2), use_spatial_attn=spatial)
    reach = receptive_field(net)
    image = torch.rand(1, 3, 1, 2 * reach + 5, dtype=torch.float64, requires_grad=True)
    net(image)[..., 2 * (reach + 2) : 2 * (reach + 3)].abs().sum().backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert (int(seen.min()), int(seen.max())) == (2, 2 * reach + 2)


def test_the_short_overlap_leaves_no_seams_in_a_trained_network_and_costs_a_quarter_at_most() -> None:
    net = load_network(ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors", "cpu")
    image = torch.from_numpy(data.coffee()[100:204, 200:240].copy()).permute(2, 0, 1)[None].float() / 255
    assert net.reach > SHORT_OVERLAP
    assert (upscale_tiled(net, image, 52, SHORT_OVERLAP) - net(image)).abs().max() < 0.5 / 255
    seen: List[int] = []
    for height, width in ((513, 1025), (3000, 2000), (512, 512)):
        seen.clear()
        zeros = torch.zeros(1, 1, height, width)
        upscale_tiled(lambda crop: seen.append(crop.numel()) or crop, zeros, 512, SHORT_OVERLAP)
        assert sum(seen) / zeros.numel() <= 1.25


@pytest.mark.parametrize("size", [None, (16, 12)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (37, 2), (16, 12), (17, 33), (26, 60)])
def test_the_fewest_tiles_cover_any_size_once(height: int, width: int, size: Any) -> None:
    def repeat(crop: Tensor) -> Tensor:
        """It sees three pixels far."""
        return F.interpolate(F.max_pool2d(crop, 7, 1, 3), scale_factor=2.0)

    def net(crop: Tensor) -> Tensor:
        assert tuple(crop.shape[2:]) == size or (size is None and max(crop.shape[2:]) <= 16 + 2 * 3)
        counts[0] += 1
        return repeat(crop)

    counts, image = [0], torch.rand(1, 1, height, width)
    out = torch.full((1, 1, 2 * height, 2 * width), -1.0)
    told: Any = {"progress": lambda tiles, number: counts.append(number) or tiles, "size": size}
    assert upscale_tiled(net, image, 16, 3, out, **told) is out
    assert torch.equal(out, repeat(image))
    rows, columns = (  # a border of the picture needs no overlap; of tiles of one size it takes three pixels
        next(n for n in range(1, 99) if n * (side - 6) + (6 if size else 0) >= length)
        for length, side in zip((height, width), size or (22, 22))
    )
    assert counts == [rows * columns] * 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_whole_numbers_come_back_rounded_and_clamped(dtype: torch.dtype) -> None:
    levels = LEVELS[dtype]
    image = torch.tensor([[[[0, 1, levels // 2, levels]]]]).to(dtype)
    out = upscale_tiled(lambda x: (x - 0.25) * 2, image, 2, 0)
    assert out.dtype == dtype
    assert out.flatten().tolist() == [0, 0, round((levels // 2 / levels - 0.25) * 2 * levels), levels]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"tile": 0}, "tile=0"), ({"overlap": -1}, "overlap=-1"), ({"wrap": "yx"}, "wrap='yx'"),
     ({"image": torch.rand(3, 8, 8)}, r"\(N, C, H, W\)"), ({"net": lambda x: x}, "overlap"),
     ({"image": torch.ones(1, 3, 8, 8, dtype=torch.int64)}, "int64"),
     ({"net": lambda x: x / 0, "overlap": 0}, "not finite"),
     ({"size": (16, 16), "overlap": 8, "wrap": "x"}, "nothing of tiles of 16x16; expected 7 or less"),
     ({"net": torch.nn.Sequential(tiny_net().fused().train()), "overlap": 4}, r"net\.eval\(\)")],
)  # fmt: skip
def test_impossible_arguments_are_named(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        upscale_tiled(**{"net": tiny_net(), "image": torch.rand(1, 3, 8, 8), **arguments})


@pytest.mark.parametrize("wrap", ["x", "y", "xy"])
@pytest.mark.parametrize("size", [None, (40, 40)])
def test_a_wrapped_picture_is_the_middle_of_its_tiling(wrap: str, size: Any) -> None:
    """Smaller than the overlap too, and through a network of one size."""
    net = tiny_net()
    for height, width, count in ((30, 25, 3), (5, 3, 7)):
        image = torch.rand(1, 3, height, width, dtype=torch.float64)
        rows, columns = count if "y" in wrap else 1, count if "x" in wrap else 1
        if size is not None and wrap != "xy":
            continue  # beyond a border, a network of one size is shown a continuation
        many = net(image.repeat(1, 1, rows, columns)).detach()
        top, left = 2 * height * (rows // 2), 2 * width * (columns // 2)
        middle = many[..., top : top + 2 * height, left : left + 2 * width]
        assert apart(upscale_tiled(net, image, 24, size=size, wrap=wrap), middle) < 1e-12


MEMORY = """
import sys, tempfile, numpy as np, torch
sys.path[:0] = {paths!r}
from aethersr.tiling import upscale_tiled
from test_tiling import tiny_net
torch.set_num_threads(1)
net = tiny_net().float().fused()
now = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])
for side in (256, 896):
    with tempfile.TemporaryFile() as a, tempfile.TemporaryFile() as b:
        # pictures in files: their pages are the system's to drop, so what is left is what tiling itself takes
        image = torch.from_numpy(np.memmap(a, np.uint8, "w+", shape=(1, 3, side, side)))
        out = torch.from_numpy(np.memmap(b, np.uint8, "w+", shape=(1, 3, 2 * side, 2 * side)))
        upscale_tiled(net, image[..., :256, :256], 128, out=out[..., :512, :512])
        begin, peaks = now(), []
        watch = lambda tiles, count: (peaks.append(now()) or tile for tile in tiles)
        upscale_tiled(net, image, 128, out=out, progress=watch)
        print((max(peaks) - begin) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """The larger picture has 2 MB in, 10 MB out: as floats they would be 48 MB."""
    code = MEMORY.format(paths=[str(ROOT), str(ROOT / "archs"), str(ROOT / "tests")])
    command = [sys.executable, "-c", code]
    small, large = map(float, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert large < small + 8, f"{small:.1f} MiB for 256x256, {large:.1f} MiB for 896x896"
