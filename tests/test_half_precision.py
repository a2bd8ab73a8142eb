"""Half precision: what it can't hold is rescaled, exactly; what it loses is told, and doesn't show."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict

import aether_arch
import numpy as np
import onnxruntime
import pytest
import torch
from aether_arch import AetherNet, FusedAetherNet
from conftest import ROOT, one_line, small_net
from safetensors import safe_open
from safetensors.torch import load_file

from aethersr import half_precision
from aethersr.checkpoint import read_checkpoint
from aethersr.commands import fuse
from aethersr.half_precision import (
    HALF_MAX,
    SPARE_BITS,
    groups,
    hard_pictures,
    in_half_precision,
    largest_of,
    largest_values,
    loss,
    rescale_,
    with_ranges_of,
)
from aethersr.identify import aether_from_state_dict
from aethersr.quality import psnr, resize

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORKS: Dict[str, Dict[str, Any]] = {
    "attention": {"scale": 2},
    "plain": {"scale": 3, "use_channel_attn": False, "use_spatial_attn": False},
    "grey": {"scale": 1, "use_spatial_attn": False, "in_chans": 1, "lk_kernel": 7},
    "wide": {"scale": 4, "use_channel_attn": False, "img_range": 255.0, "depths": (1, 1, 2)},
    "norm kept": {"scale": 2},
    "bounded": {"scale": 2, "bound": 2.0},
}


def with_dead_channel(net: AetherNet, scale: float = 2.7e-5) -> AetherNet:
    """A last norm as in the released x2 weights: one of its scales is next to nothing, its shift is not."""
    with torch.no_grad():
        net.norm.running_mean.zero_()
        net.norm.running_var.fill_(1)
        net.norm.weight[0, 5], net.norm.bias[0, 5] = scale, 1.6e-4
    return net


def trained_net(name: str) -> AetherNet:
    net = small_net(**NETWORKS[name])
    return with_dead_channel(net) if name == "norm kept" else net


def everything_too_large() -> Dict[str, float]:
    return defaultdict(lambda: 40 * HALF_MAX)


def pictures_of(net: aether_arch.AetherBase) -> Dict[str, torch.Tensor]:
    return {name: each.to(net.mean.dtype) for name, each in hard_pictures(net.options["in_chans"]).items()}


# -------------------------------------------------------------------------------------------------- rescaling


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rescaled_network_gives_the_same_bits(name: str) -> None:
    net = trained_net(name).fused().float()
    assert net.keep_norm or name != "norm kept"
    other = copy.deepcopy(net)
    powers = rescale_(other, everything_too_large())
    assert list(powers) == list(groups(net))
    assert max(powers.values()) <= -5 - SPARE_BITS
    with torch.no_grad():
        for title, picture in pictures_of(net).items():
            torch.testing.assert_close(net(picture), other(picture), msg=title)


@torch.no_grad()
def blown_up(net: FusedAetherNet, name: str, power: int = 17) -> FusedAetherNet:
    """The same function with a group's values 2^power times as large."""
    tensors, group = dict(net.named_parameters()), groups(net)[name]
    for key, by in [*((key, power) for key in group.made_by), *((key, -power) for key in group.used_by)]:
        tensors[key].mul_(2.0**by)
    return net


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "power"),
    [
        *((name, 17) for name in ("stream", "stages.0.0 attention", "fusion_convs", "body_norm")),
        *(
            (name, power)
            for name in ("stages.0.0 product", "stages.1.1 depthwise", "conv_before_upsample")
            for power in (17, -22)
        ),
    ],
)
def test_weights_that_half_precision_does_not_hold_are_fine_once_rescaled(name: str, power: int) -> None:
    net = trained_net("norm kept").fused().float()
    other = blown_up(copy.deepcopy(net), name, power)
    pictures = list(pictures_of(net).values())
    decibels, _ = loss(other, pictures)
    assert not decibels > 50, "half precision holds it"
    assert rescale_(other, largest_of([largest_values(other, picture) for picture in pictures]))
    for picture in pictures:
        torch.testing.assert_close(other(picture), net(picture))
    assert loss(other, pictures)[0] > loss(net, pictures)[0] - 3


@pytest.mark.parametrize("bound", [None, 2.0])
def test_a_quantised_network_is_rescaled_with_its_ranges(bound: Any) -> None:
    """Powers of two: every rounding happens at the same place, so the network gives the same picture."""
    trained = small_net(2, depths=(1, 1), bound=bound).float().prepare_qat().eval()
    net = trained.fused()
    powers = rescale_(net, everything_too_large())
    assert set(powers.values()) != {0}
    rescaled = with_ranges_of(net, trained, powers)
    with torch.no_grad():
        for title, picture in pictures_of(net).items():
            assert float((rescaled(picture) - trained(picture)).abs().max()) <= 1e-5, title


# --------------------------------------------------------------------------------------------- what it costs


@torch.no_grad()
def test_the_rounding_is_that_of_half_precision_itself() -> None:
    """Compared with PyTorch's own half precision on a CPU, which is slow."""
    net = small_net(2).fused().float()
    for title, picture in list(pictures_of(net).items())[:6]:
        try:
            real = copy.deepcopy(net).half()(picture.half()).float()
        except RuntimeError as error:  # older versions
            pytest.skip(str(error))
        expected, rounded = net(picture), in_half_precision(net, [picture])[0]
        errors = [float((each - expected).pow(2).mean().sqrt()) for each in (real, rounded)]
        assert 0.7 < errors[1] / errors[0] < 1.4, (title, errors)
        assert rounded.half().float().equal(rounded)


@pytest.mark.parametrize("scale", [2.7e-5, 0.0])
def test_a_last_norm_whose_merging_would_show_in_half_precision_is_kept(scale: float) -> None:
    merged, other = small_net(2).fused(), with_dead_channel(small_net(2), scale).fused()
    assert not merged.keep_norm
    assert other.keep_norm
    for fused in (merged, other):
        _, steps = loss(fused.float(), [hard_pictures(3)["ramp"]])
        assert steps < 1


def test_what_shows_is_measured_in_the_picture_not_in_the_stream() -> None:
    """Offsets that the later layers ignore may be large; with large gains small ones may not."""
    net = with_dead_channel(small_net(2))
    assert net.fused().keep_norm
    with torch.no_grad():
        net.conv_before_upsample[0].weight[:, 5] *= 1e-4  # type: ignore[index, operator]
        assert not net.fused().keep_norm
        net.conv_last.weight.mul_(1e3)
    assert net.fused().keep_norm


@torch.no_grad()
@pytest.mark.parametrize(
    "path", sorted((ROOT / "weights").glob("*_training_fp16.safetensors")), ids=lambda path: path.name
)
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
    outputs = [fused(low), half(low), *in_half_precision(half, [low])]
    shown = [(each[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy() for each in outputs]
    plain, stored, computed = (psnr(truth, each.astype(np.uint8), net.scale) for each in shown)
    assert abs(stored - plain) <= 0.003
    assert abs(computed - plain) <= 0.01  # within 0.003 on Set5, which is 50 times as large


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments: Any) -> int:
    return fuse.main([str(argument) for argument in (*arguments, "--device", "cpu")])


def saved(net: torch.nn.Module, path: Path) -> Path:
    torch.save({"params": {name: value.float() for name, value in net.state_dict().items()}}, path)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_half_file_is_the_network_with_its_kernels_in_half_precision(
    tmp_path: Path, capsys: Any, ending: str
) -> None:
    net, target = small_net(2, bound=1.3).float(), tmp_path / f"half{ending}"
    assert run("--model_path", saved(net, tmp_path / "a.pth"), "--output_path", target, "--half") == 0
    assert f"Wrote {target}" in capsys.readouterr().out
    state, expected = read_checkpoint(target).state, net.double().fused().state_dict()
    for name, value in expected.items():
        kind = torch.float16 if value.dim() > 1 else torch.float32
        assert state[name].dtype == kind, name
        assert torch.equal(state[name], value.float().to(kind)), name
    if ending == ".safetensors":
        with safe_open(str(target), "pt") as file:
            said = {name: file.metadata()[name] for name in ("scale", "form")}
        assert said == {"scale": "2", "form": "fused"}
    x = torch.rand(1, 3, 12, 15)
    with torch.no_grad():
        output = aether_from_state_dict(state)(x)
        torch.testing.assert_close(output, net.float()(x), atol=4e-3, rtol=0)
    again = tmp_path / "again.safetensors"  # fused weights are taken too, and nothing is rounded twice
    assert run("--model_path", target, "--output_path", again, "--half") == 0
    second = read_checkpoint(again).state
    assert all(torch.equal(second[name], value) for name, value in state.items())


def test_the_released_files_hold_the_rescaled_network(tmp_path: Path, capsys: Any) -> None:
    """Weights for float32 too, since upscalers run them in half precision; and the ONNX file."""
    net = small_net(2).fused()
    source, target = (
        saved(blown_up(copy.deepcopy(net), "stream"), tmp_path / "a.pth"),
        tmp_path / "2x_a.safetensors",
    )
    assert run("--model_path", source, "--output_path", target, "--onnx", "fp16") == 0
    assert "Rescaled for half precision, the same function: stream 2^-" in capsys.readouterr().out
    picture = hard_pictures(3)["noise"]
    with torch.no_grad():
        expected = net.float()(picture)
    outputs = in_half_precision(aether_from_state_dict(load_file(str(target))), [picture])
    session = onnxruntime.InferenceSession(
        str(tmp_path / "2x_a_fp16.onnx"), providers=["CPUExecutionProvider"]
    )
    outputs.append(torch.from_numpy(session.run(["output"], {"input": picture.half().numpy()})[0]).float())
    for output in outputs:
        assert float((output - expected).abs().max()) <= 4e-3 * float(expected.abs().max().clamp(min=1))


def test_a_network_with_headroom_is_written_byte_for_byte_as_it_is(tmp_path: Path, capsys: Any) -> None:
    source = saved(trained_net("norm kept"), tmp_path / "a.pth")
    assert run("--model_path", source, "--output_path", tmp_path / "b.pth") == 0
    assert "Rescaled" not in capsys.readouterr().out
    net = aether_from_state_dict(torch.load(source, weights_only=True)["params"])
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    for name, value in net.double().fused().float().state_dict().items():
        assert torch.equal(value, written[name]), name


@torch.no_grad()
def with_open_gate(net: AetherNet, by: float) -> AetherNet:
    """A gate beyond half precision in a block that adds next to nothing: float32 is content."""
    net.stages[0][0].ffn.conv_gate.bias.fill_(by)
    net.stages[0][0].ffn.conv_out.weight.div_(10 * by)
    return net


def test_what_no_rescaling_helps_is_an_error_where_half_precision_is_asked_for_and_else_said(
    tmp_path: Path, capsys: Any
) -> None:
    source, target = saved(with_open_gate(small_net(2), 1e6), tmp_path / "a.pth"), tmp_path / "b.pth"
    assert run("--model_path", source, "--output_path", target) == 0
    words = "half precision can't hold its values, and no rescaling helps; "
    assert f"Half precision: {words}use float32" in capsys.readouterr().out
    target.unlink()
    for arguments in (["--half"], ["--onnx", "fp32,fp16"]):
        assert run("--model_path", source, "--output_path", target, *arguments) == 2
        assert f"{words}leave --half, fp16 and --ncnn out" in one_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_picture_on_which_the_network_itself_runs_away_is_named_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pictures = hard_pictures(3)
    glare = torch.full((1, 3, 9, 9), 1e4)
    monkeypatch.setattr(half_precision, "hard_pictures", lambda channels: {**pictures, "glare": glare})
    source = saved(small_net(2), tmp_path / "a.pth")
    assert run("--model_path", source, "--output_path", tmp_path / "b.pth") == 0
    report = capsys.readouterr().out
    assert (
        f"Note: on 1 of {len(pictures) + 1} hard pictures the network runs away, in float32 too: glare; "
        in report
    )
    assert "--bound 1, with the training checkpoint, prevents it\n" in report
    assert "Rescaled" not in report


def test_a_network_that_runs_away_on_every_picture_has_no_half_precision(tmp_path: Path, capsys: Any) -> None:
    net = small_net(2)
    with torch.no_grad():
        net.conv_last.weight.mul_(1e7)
    arguments = ["--model_path", saved(net, tmp_path / "a.pth"), "--output_path", tmp_path / "b.pth"]
    assert run(*arguments) == 0
    assert "Half precision: on no hard picture is the output below 65504" in capsys.readouterr().out
    assert run(*arguments, "--half", "--overwrite") == 2
    assert "on no hard picture" in one_line(capsys.readouterr().err)


def test_what_a_sigmoid_or_a_bound_makes_of_infinity_is_no_problem(tmp_path: Path) -> None:
    net = small_net(2, bound=1.0)
    with torch.no_grad():
        net.stages[0][0].channel_attn.fc[2].weight.fill_(3e4)
        net.stages[0][0].norm.weight.mul_(1e5)
    assert (
        run("--model_path", saved(net, tmp_path / "a.pth"), "--output_path", tmp_path / "b.pth", "--half")
        == 0
    )
