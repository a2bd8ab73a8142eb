"""NCNN files: right in the real ncnn at any size, named as their readers expect, and never half written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from aether_arch import AetherNet
from checkpoints import fuse
from conftest import randomize

from aethersr.errors import UserError
from aethersr.ncnn import convert, named_for_upscayl, run

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "lk_kernel": 5}
pytestmark = pytest.mark.usefixtures("one_thread")


def network(scale: int = 2, **options: Any) -> AetherNet:
    return randomize(AetherNet(scale=scale, **{**TINY, **options})).eval()  # type: ignore[return-value]


def export(net: Any, folder: Path) -> str:
    for ending, content in zip(("param", "bin"), convert(net)):
        (folder / f"net.{ending}").write_bytes(content)
    return str(folder / "net.param")


@torch.no_grad()
def differs_by(net: Any, param: str, *sizes: Any) -> float:
    """The largest difference from the network, in steps of 1/255 of its largest output, or of 1 if less."""
    import ncnn

    opened, found = ncnn.Net(), []
    assert opened.load_param(param) == opened.load_model(str(Path(param).with_suffix(".bin"))) == 0
    for height, width in sizes:
        image = torch.rand(1, net.options["in_chans"], height, width)
        expected, output = net(image), run(opened, image)
        assert output.shape == expected.shape
        found.append(float((output - expected).abs().max() / expected.abs().max().clamp_min(1)) * 255)
    return max(found)


@pytest.fixture
def converter() -> None:
    for name in ("ncnn", "pnnx"):
        pytest.importorskip(name, reason=f"needs the package {name}: pip install ncnn pnnx")


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1},
        {"scale": 2, "bound": 1.0, "depths": (2, 1, 3), "embed_dim": 12},
        {"scale": 3, "in_chans": 1, "use_channel_attn": False},
        {"scale": 4, "use_spatial_attn": False},
        pytest.param({"scale": 8, "use_spatial_attn": False}, marks=pytest.mark.slow),
    ],
    ids=lambda options: f"x{options['scale']}",
)
def test_every_scale_is_right_at_sizes_of_its_own(options: Dict[str, Any], tmp_path: Path) -> None:
    net = network(**options)
    param, weights = export(net, tmp_path), tmp_path / "net.bin"
    assert differs_by(net, param, (1, 1), (1, 9), (8, 3), (40, 31)) <= 1
    numbers = sum(value.numel() for value in net.fused().parameters())
    assert weights.stat().st_size < 2.6 * numbers, "two bytes a weight, four a bias"
    # chaiNNer's reader takes no bare constants, and none of ncnn's own layers has them here.
    layers = [line.split() for line in Path(param).read_text().splitlines()[2:]]
    assert "MemoryData" not in {layer[0] for layer in layers}
    assert (layers[0][4], layers[-1][5]) == ("data", "output")
    # And its writer leaves out what these need: "not all axes", and a pad_top of 0 beside a pad_left.
    assert "Reduction" not in {layer[0] for layer in layers}
    assert not [line for line in layers if "14=0" in line and "4=0" not in line]


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize(
    ("place", "broken", "words"),
    [
        ("aethersr.ncnn.run", lambda *_: torch.zeros(1, 3, 34, 62), "expected at most .* leave --ncnn out"),
        ("aethersr.ncnn.run", lambda *_: torch.zeros(1, 3, 8, 8), "differs .* by inf"),
        ("pnnx.EXEC_PATH", sys.executable, "pnnx stopped with code"),
    ],
)
def test_a_conversion_that_fails_is_said(place: str, broken: Any, words: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(place, broken)
    with pytest.raises(UserError, match=words):
        convert(network())


def test_a_missing_converter_is_one_line_with_the_command(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(UserError, match=r"NCNN file needs the package ncnn: pip install ncnn \(or"):
        convert(network())


def test_upscayl_finds_the_scale_in_the_name() -> None:
    """Its program takes 4 for granted; on Linux it looks for it."""
    for stem, scale in (("2x_mine", 2), ("mine-x4", 4), ("MINE_X3", 3)):
        assert named_for_upscayl(stem, scale) == stem
    for stem, scale in (("mine", 2), ("mine", 4), ("x4_mine", 2)):
        assert named_for_upscayl(stem, scale) == f"{scale}x_{stem}"


@pytest.mark.usefixtures("converter")
def test_the_command_writes_both_files_beside_the_weights(tmp_path: Path) -> None:
    net, words = network(), (tmp_path / "in.pth", tmp_path / "mine_fused.pth", "--ncnn", "--half")
    torch.save({"params": net.state_dict()}, tmp_path / "in.pth")
    assert fuse(*words) == 0
    assert sorted(os.listdir(tmp_path)) == ["2x_mine.bin", "2x_mine.param", "in.pth", "mine_fused.pth"]
    assert differs_by(net, str(tmp_path / "2x_mine.param"), (5, 7)) <= 1
    (tmp_path / "mine_fused.pth").unlink()
    assert fuse(*words) == 2, "--overwrite is asked for, because the NCNN files are there"
