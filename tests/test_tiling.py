"""Tiles without seams in bounded memory, textures that go on at their other side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_net
from skimage import data
from torch import Tensor
from torch.nn import functional as F

from aethersr.network import load_network
from aethersr.tiling import SHORT_OVERLAP, receptive_field, upscale_tiled

pytestmark = pytest.mark.usefixtures("one_thread")


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize(("scale", "spatial"), [(1, False), (2, True), (3, False)])
def test_tiles_equal_the_whole_picture_and_overlap_by_the_receptive_field(
    scale: int, spatial: bool, form: str
) -> None:
    net = tiny_net(scale, lk_kernel=5, depths=(1, 2), use_spatial_attn=spatial)
    net, reach = net.fused() if form == "fused" else net, receptive_field(net)
    image = torch.rand(2, 3, 17, 2 * reach + 5, dtype=torch.float64, requires_grad=True)
    whole = net(image)
    for tile in (41, 24, 13):
        assert apart(upscale_tiled(net, image, tile), whole.detach()) < 1e-12
    whole[..., scale * (reach + 2) : scale * (reach + 3)].abs().sum().backward()
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"tile": 0}, "tile=0"), ({"overlap": -1}, "overlap=-1"), ({"wrap": "yx"}, "wrap='yx'"),
     ({"image": torch.rand(3, 8, 8)}, r"\(N, C, H, W\)"), ({"net": lambda x: x}, "overlap"),
     ({"image": torch.ones(1, 3, 8, 8, dtype=torch.int64)}, "int64"),
     *[({"net": lambda x, bad=bad: torch.where(x == x.max(), bad, x), "overlap": 0}, "not finite")
       for bad in (math.inf, -math.inf, math.nan)],
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """The larger picture has 2 MB in, 10 MB out: as floats they would be 48 MB."""

    def now() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    def watch(tiles: Any, count: int) -> Any:
        return (peaks.append(now()) or tile for tile in tiles)

    net, taken = tiny_net().float().fused(), []
    for side in (256, 896, 256, 896):  # first only to warm up
        # In files, whose pages are the system's to drop: so what is left is what tiling itself takes.
        shapes = ((1, 3, k * side, k * side) for k in (1, 2))
        a, b = (np.memmap(tmp_path / f"{each}", np.uint8, "w+", shape=each) for each in shapes)
        begin, peaks = now(), [0]
        upscale_tiled(net, torch.from_numpy(a), 128, out=torch.from_numpy(b), progress=watch)
        taken.append((max(peaks) - begin) / 1024)
    assert taken[3] < taken[2] + 8, f"{taken[2]:.1f} MiB for 256x256, {taken[3]:.1f} MiB for 896x896"
