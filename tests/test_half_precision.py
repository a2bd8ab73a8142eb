"""Half precision: what it can't hold is rescaled, exactly; what it loses is told, and doesn't show."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict

import aether_arch
import numpy as np
import onnxruntime
import pytest
import torch
from aether_arch import AetherNet
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
BIG, SMALL = 2.0**17, 2.0**-22


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


@pytest.mark.parametrize("name", NETWORKS)
def test_every_value_of_a_group_shrinks_by_its_power_of_two_and_no_other(name: str) -> None:
    net = trained_net(name).fused()
    picture = pictures_of(net)["noise"]
    before = largest_values(net, picture)
    powers = rescale_(net, everything_too_large())
    after = largest_values(net, picture)
    for group, members in groups(net).items():
        for key in members.values:
            assert after[key] == before[key] * 2.0 ** powers[group], key
    kept = [key for key in before if key.endswith("gate_conv.out")] + ["tail.out", ".out"]
    assert [after[key] for key in kept] == [before[key] for key in kept]
    scaled = {key for members in groups(net).values() for key in members.values}
    convolutions = {f"{name}.out" for name, each in net.named_modules() if isinstance(each, torch.nn.Conv2d)}
    fixed = ("gate_conv.out", "fc.2.out", "spatial_attn.conv.out", "body_norm.out")
    fixed += ("reparam_conv.out",) if name == "bounded" else ()
    assert not [key for key in convolutions - scaled if not key.endswith(fixed)]


@torch.no_grad()
def scale_stream(net: AetherNet, by: float) -> None:
    """The same function (but for eps) with a stream of thousands."""
    for tensor in (
        *net.conv_first.parameters(),
        net.norm.weight,
        net.norm.bias,
        net.norm.running_mean,
        net.conv_after_body.bias,
    ):
        tensor.mul_(by)
    for tensor in (
        net.quant_fusion_layer.error_comp,
        net.quant_fusion_layer.fusion_conv.bias,
        *(conv.bias for conv in net.fusion_convs),
    ):
        tensor.mul_(by)
    net.norm.running_var.mul_(by**2)
    net.conv_before_upsample[0].weight.div_(by)
    for stage in net.stages:
        for block in stage:
            block.norm.running_mean.mul_(by).sub_(
                (by - 1) * (block.conv.lk_bias + block.conv.sk_bias).view(1, -1, 1, 1)
            )
            block.norm.running_var.mul_(by**2)
            block.ffn.conv_out.weight.mul_(by)
            block.ffn.conv_out.bias.mul_(by)
            block.channel_attn.fc[0].weight.div_(by)
            block.spatial_attn.conv.weight.div_(by)


@torch.no_grad()
def scale_last_block(net: AetherNet, by: float) -> None:
    """One block adds thousands to a stream that only the last fusion convolution reads."""
    block = net.stages[-1][-1]
    block.ffn.conv_out.weight.mul_(by)
    block.channel_attn.fc[0].weight.div_(by)
    block.spatial_attn.conv.weight.div_(by)
    net.fusion_convs[-1].weight.div_(by)


@torch.no_grad()
def scale_products(net: AetherNet, by: float) -> None:
    for stage in net.stages:
        for block in stage:
            block.ffn.conv_main.weight.mul_(by)
            block.ffn.conv_main.bias.mul_(by)
            block.ffn.conv_out.weight.div_(by)


@torch.no_grad()
def scale_norms(net: AetherNet, by: float) -> None:
    for stage in net.stages:
        for block in stage:
            block.norm.weight.mul_(by)
            block.norm.bias.mul_(by)
            block.ffn.conv_gate.weight.div_(by)
            block.ffn.conv_main.weight.div_(by)


@torch.no_grad()
def scale_tail(net: AetherNet, by: float) -> None:
    net.conv_before_upsample[0].weight.mul_(by)
    net.conv_before_upsample[0].bias.mul_(by)
    net.upsample.blocks[0].weight.div_(by)


ADVERSARIES = [
    (action, BIG) for action in (scale_stream, scale_last_block, scale_products, scale_norms, scale_tail)
]
ADVERSARIES += [(action, SMALL) for action in (scale_products, scale_norms, scale_tail)]


def adversary(action: Callable[[AetherNet, float], None], by: float = BIG) -> AetherNet:
    net = small_net(2)
    action(net, by)
    return net


@pytest.mark.parametrize(("action", "by"), ADVERSARIES)
def test_weights_that_half_precision_does_not_hold_are_fine_once_rescaled(
    action: Callable[[AetherNet, float], None], by: float
) -> None:
    net, rescaled = (adversary(action, by).fused().float() for _ in range(2))
    pictures = list(pictures_of(net).values())
    assert math.isnan(loss(net, pictures)[0]), "it is not finite"
    assert rescale_(rescaled, largest_of([largest_values(net, picture) for picture in pictures]))
    with torch.no_grad():
        for picture in pictures:
            expected = net(picture)
            torch.testing.assert_close(rescaled(picture), expected)
            error = (in_half_precision(rescaled, picture) - expected).abs().max()
            assert float(error / expected.abs().max().clamp(min=1)) <= 4e-3


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
        expected, rounded = net(picture), in_half_precision(net, picture)
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
    fused, half = net.fused(), net.fused()
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
    source, target = saved(adversary(scale_stream), tmp_path / "a.pth"), tmp_path / "2x_a.safetensors"
    assert run("--model_path", source, "--output_path", target, "--onnx", "fp16") == 0
    assert "Rescaled for half precision, the same function: stream 2^-" in capsys.readouterr().out
    picture = hard_pictures(3)["noise"]
    with torch.no_grad():
        expected = adversary(scale_stream).fused().float()(picture)
    outputs = [in_half_precision(aether_from_state_dict(load_file(str(target))), picture)]
    session = onnxruntime.InferenceSession(
        str(tmp_path / "2x_a_fp16.onnx"), providers=["CPUExecutionProvider"]
    )
    outputs.append(torch.from_numpy(session.run(["output"], {"input": picture.half().numpy()})[0]).float())
    for output in outputs:
        assert float((output - expected).abs().max()) <= 4e-3 * float(expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_headroom_is_written_byte_for_byte_as_it_is(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    options = NETWORKS[name]
    source = saved(trained_net(name), tmp_path / "a.pth")
    arguments = ["--img_range", options["img_range"]] if "img_range" in options else []
    assert run("--model_path", source, "--output_path", tmp_path / "b.pth", *arguments) == 0
    assert "Rescaled" not in capsys.readouterr().out
    state = torch.load(source, weights_only=True)["params"]
    net = aether_from_state_dict(state, options.get("img_range", 1.0))
    expected = net.double().fused().float().state_dict()
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert {key for key in expected if not torch.equal(expected[key], written[key])} == set()


@torch.no_grad()
def open_gate_too_far(net: AetherNet, by: float) -> None:
    """A gate beyond half precision in a block that adds next to nothing: float32 is content."""
    net.stages[0][0].ffn.conv_gate.bias.fill_(by)
    net.stages[0][0].ffn.conv_out.weight.div_(10 * by)


def test_what_no_rescaling_helps_is_an_error_where_half_precision_is_asked_for_and_else_said(
    tmp_path: Path, capsys: Any
) -> None:
    source, target = saved(adversary(open_gate_too_far, 1e6), tmp_path / "a.pth"), tmp_path / "b.pth"
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
