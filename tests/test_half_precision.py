"""Half precision: what it can't hold is rescaled, exactly; what it loses is told, and doesn't show."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from aether_arch import AetherNet, FusedAetherNet
from checkpoints import fuse
from conftest import ROOT, one_line, run_onnx, small_net
from safetensors import safe_open
from safetensors.torch import load_file

from aethersr import half_precision
from aethersr.checkpoint import read_checkpoint
from aethersr.half_precision import groups, hard_pictures, in_half_precision, loss, rescale_
from aethersr.identify import aether_from_state_dict
from aethersr.quality import psnr, resize

pytestmark = pytest.mark.usefixtures("one_thread")


def with_dead_channel(net: AetherNet, scale: float = 2.7e-5) -> AetherNet:
    """A last norm as in the released x2 weights: one of its scales is next to nothing, its shift is not."""
    with torch.no_grad():
        net.norm.running_mean.zero_()
        net.norm.running_var.fill_(1)
        net.norm.weight[0, 5], net.norm.bias[0, 5] = scale, 1.6e-4
    return net


def blown_up(net: FusedAetherNet, name: str, power: int = 17) -> FusedAetherNet:
    """The same function with a group's values 2^power times as large."""
    groups(net)[name].scale_(power)
    return net


LARGE = ("stream", "stages.0.0 attention", "fusion_convs", "body_norm", "stages.1.1 depthwise")
BOTH = ("stages.0.0 product", "conv_before_upsample")
POWERS = [*((name, 17) for name in (*LARGE, *BOTH)), *((name, -22) for name in BOTH)]
RELEASED = sorted((ROOT / "weights").glob("*_training_fp16.safetensors"))


@torch.no_grad()
@pytest.mark.parametrize(("name", "power"), POWERS)
def test_weights_that_half_precision_does_not_hold_are_fine_once_rescaled(name: str, power: int) -> None:
    net = with_dead_channel(small_net(2)).fused().float()
    other = blown_up(copy.deepcopy(net), name, power)
    pictures = list(hard_pictures(3).values())[::2]
    assert not loss(other, pictures)[0] > 50, "half precision holds it"
    assert rescale_(other, [half_precision.largest_values(other, picture) for picture in pictures])
    for picture in pictures:
        torch.testing.assert_close(other(picture), net(picture))
    assert loss(other, pictures)[0] > loss(net, pictures)[0] - 3


@torch.no_grad()
def test_a_quantised_network_is_rescaled_with_its_ranges() -> None:
    """By powers of two, so every rounding happens at the same place."""
    trained, picture = small_net(2).float().prepare_qat().eval(), hard_pictures(3)["noise"]
    other = half_precision.rescaled(trained, dict.fromkeys(groups(trained), -5))
    torch.testing.assert_close(other(picture), trained(picture), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_rounding_is_that_of_half_precision_itself() -> None:
    """Compared with PyTorch's own half precision on a CPU, which is slow."""
    net, picture = small_net(2).fused().float(), hard_pictures(3)["noise"]
    expected, real = net(picture), copy.deepcopy(net).half()(picture.half()).float()
    errors = [(each - expected).square().mean().sqrt() for each in (real, in_half_precision(net, picture))]
    assert 0.7 < float(errors[1] / errors[0]) < 1.4


@torch.no_grad()
def test_a_last_norm_whose_merging_would_show_in_the_picture_is_kept() -> None:
    """Offsets that the later layers ignore may be large; with large gains small ones may not."""
    nets = [small_net(2), with_dead_channel(small_net(2), 0), with_dead_channel(small_net(2))]
    for net in nets:
        assert net.fused().keep_norm == (net is not nets[0])
        assert loss(net.fused().float(), [hard_pictures(3)["ramp"]])[1] < 1
    net.conv_before_upsample[0].weight[:, 5] *= 1e-4  # type: ignore[index, operator]
    assert not net.fused().keep_norm
    net.conv_last.weight.mul_(1e3)
    assert net.fused().keep_norm


@torch.no_grad()
@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.name)
def test_the_released_weights_lose_nothing_that_shows(path: Path) -> None:
    """Beside float32, on a photograph: kernels stored in half precision, and everything computed in it."""
    from skimage import data

    net = aether_from_state_dict(read_checkpoint(path).state)
    fused = net.fused()
    half = copy.deepcopy(fused)
    for value in half.parameters():
        if value.dim() > 1:
            value.copy_(value.half())
    side = 40 * net.scale
    truth = data.astronaut()[60 : 60 + side, 180 : 180 + side]
    low = torch.from_numpy(resize(truth, 40, 40)).permute(2, 0, 1)[None].float() / 255
    outputs = [fused(low), half(low), in_half_precision(half, low)]
    shown = [(each[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy() for each in outputs]
    plain, stored, computed = (psnr(truth, each.astype(np.uint8), net.scale) for each in shown)
    assert abs(stored - plain) <= 0.003
    assert abs(computed - plain) <= 0.01  # within 0.003 on Set5, which is 50 times as large


class Folder:
    def __init__(self, path: Path, capsys: Any) -> None:
        self.path, self.capsys, self.target = path, capsys, path / "2x_b.safetensors"

    def fuse(self, net: Any, *more: str, code: int = 0) -> str:
        """What the command prints, for an error its line."""
        state = {name: value.float() for name, value in net.state_dict().items()}
        torch.save({"params": state}, self.path / "a.pth")
        assert fuse(self.path / "a.pth", self.target, "--overwrite", *more) == code
        printed = self.capsys.readouterr()
        return one_line(printed.err) if code else printed.out


@pytest.fixture
def folder(tmp_path: Path, capsys: Any) -> Folder:
    return Folder(tmp_path, capsys)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_half_file_is_the_network_with_its_kernels_in_half_precision(folder: Folder, ending: str) -> None:
    net = small_net(2, bound=1.3).float()
    folder.target = target = folder.target.with_suffix(ending)
    folder.fuse(net, "--half")
    state, expected = read_checkpoint(target).state, net.double().fused().state_dict()
    for name, value in expected.items():
        kind = torch.float16 if value.dim() > 1 else torch.float32
        assert state[name].dtype == kind, name
        assert torch.equal(state[name], value.float().to(kind)), name
    if ending == ".safetensors":
        with safe_open(str(target), "pt") as file:
            assert {"scale": "2", "form": "fused"}.items() <= file.metadata().items()
    torch.save(state, folder.path / "half.pth")  # fused weights are taken too, and nothing is rounded twice
    assert fuse(folder.path / "half.pth", target, "--half", "--overwrite") == 0
    again = read_checkpoint(target).state
    assert all(torch.equal(again[name], value) for name, value in state.items())


@torch.no_grad()
def test_the_released_files_hold_the_rescaled_network(folder: Folder) -> None:
    """Weights for float32 too, since upscalers run them in half precision; and the ONNX file."""
    net = small_net(2).fused()
    printed = folder.fuse(blown_up(copy.deepcopy(net), "stream"), "--onnx", "fp16")
    assert "Rescaled for half precision, the same function: stream\n" in printed
    picture = hard_pictures(3)["noise"]
    expected = net.float()(picture)
    found = torch.from_numpy(run_onnx(folder.path / "2x_b_fp16.onnx", picture.half().numpy())).float()
    for output in (found, in_half_precision(aether_from_state_dict(load_file(folder.target)), picture)):
        assert float((output - expected).abs().max()) <= 4e-3 * float(expected.abs().max().clamp(min=1))


@torch.no_grad()
def test_what_no_rescaling_helps_is_an_error_for_half_precision_else_said(folder: Folder) -> None:
    """A gate beyond half precision in a block that adds next to nothing, and an output that runs away."""
    gate, huge = (cast(Any, small_net(2, embed_dim=8, depths=(1,), lk_kernel=3)) for _ in range(2))
    gate.stages[0][0].ffn.conv_gate.bias.fill_(1e6)
    gate.stages[0][0].ffn.conv_out.weight.div_(1e7)
    huge.conv_last.weight.mul_(1e7)
    for net, words in (
        (gate, "half precision can't hold its values, and no rescaling helps"),
        (huge, "on no hard picture is the output below 65504"),
    ):
        assert f"Half precision: {words}" in folder.fuse(net)
        folder.target.unlink()
        for arguments in (["--half"], ["--onnx", "fp32,fp16"]):
            line = folder.fuse(net, *arguments, code=2)
            assert words in line
            assert "leave --half, fp16 and --ncnn out" in line
        assert [path.name for path in folder.path.iterdir()] == ["a.pth"]


def test_a_picture_on_which_the_network_runs_away_is_named_and_does_not_count(
    folder: Folder, monkeypatch: Any
) -> None:
    pictures = {**hard_pictures(3), "glare": torch.full((1, 3, 9, 9), 1e4)}
    monkeypatch.setattr(half_precision, "hard_pictures", lambda channels: pictures)
    printed = folder.fuse(small_net(2))
    found = f"on 1 of {len(pictures)} hard pictures the network runs away, in float32 too: glare\n"
    assert f"Note: {found}--bound 1, with the training checkpoint, prevents it\n" in printed
    assert "Rescaled" not in printed


@torch.no_grad()
def test_what_a_sigmoid_or_a_bound_makes_of_infinity_is_no_problem(folder: Folder) -> None:
    net: Any = small_net(2, bound=1.0)
    net.stages[0][0].channel_attn.fc[2].weight.fill_(3e4)
    net.stages[0][0].norm.weight.mul_(1e5)
    folder.fuse(net, "--half")
