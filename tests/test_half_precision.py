"""Half precision holds every layer: what would overflow is rescaled inside, exactly; what needs nothing is
untouched."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict

import aether_arch
import onnxruntime
import pytest
import torch
from aether_arch import AetherNet, FusedAetherNet
from conftest import ROOT, small_net
from safetensors.torch import load_file

from aethersr import half_precision
from aethersr.commands import fuse
from aethersr.half_precision import (
    HALF_MAX,
    SPARE_BITS,
    agreement,
    groups,
    hard_pictures,
    largest_of,
    largest_values,
    layers,
    rescale_,
    with_ranges_of,
)

NETWORKS: Dict[str, Dict[str, Any]] = {
    "attention": {"scale": 2},
    "plain": {"scale": 3, "use_channel_attn": False, "use_spatial_attn": False},
    "channel": {"scale": 1, "use_spatial_attn": False, "in_chans": 1, "lk_kernel": 7},
    "spatial": {"scale": 4, "use_channel_attn": False, "img_range": 255.0, "depths": (1, 1, 2)},
    "norm kept": {"scale": 2},
    "bounded": {"scale": 2, "bound": 2.0},
}
BIG, SMALL = 2.0**17, 2.0**-22


def fused_net(name: str) -> FusedAetherNet:
    net = small_net(**NETWORKS[name])
    if name == "norm kept":
        with torch.no_grad():
            net.norm.weight[0, 3] = 0.0
    return net.fused()


def everything_too_large() -> Dict[str, float]:
    return defaultdict(lambda: 40 * HALF_MAX)


def pictures_of(net: aether_arch.AetherBase) -> Dict[str, torch.Tensor]:
    return {
        name: picture.to(net.mean.dtype) for name, picture in hard_pictures(net.options["in_chans"]).items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_rescaled_network_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    net = fused_net(name).to(dtype)
    other = fused_net(name).to(dtype)
    powers = rescale_(other, everything_too_large())
    assert list(powers) == list(groups(net))
    assert max(powers.values()) <= -5 - SPARE_BITS
    with torch.no_grad():
        for title, picture in pictures_of(net).items():
            torch.testing.assert_close(net(picture), other(picture), msg=title)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_value_of_a_group_shrinks_by_its_power_of_two_and_no_other(name: str) -> None:
    net = fused_net(name)
    picture = pictures_of(net)["noise"]
    before = largest_values(net, picture)
    powers = rescale_(net, everything_too_large())
    after = largest_values(net, picture)
    expected = {key: group for group, members in groups(net).items() for key in members.values}
    for module, part, key in layers(net):
        assert after[key] == before[key] * 2.0 ** powers.get(expected.get(key, ""), 0), (module, part)
    fixed = {"gate", "output"} if name != "bounded" else {"gate", "output", "depthwise"}
    assert {part for _, part, key in layers(net) if key not in expected} == fixed
    assert [module for module, part, key in layers(net) if key not in expected and part == "output"] == [
        "tail"
    ]


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
    plain = agreement(net, net, torch.float16, pictures)
    assert plain.startswith("not finite"), plain
    assert rescale_(rescaled, largest_of([largest_values(net, picture) for picture in pictures]))
    half, brain = copy.deepcopy(rescaled).half(), copy.deepcopy(rescaled).bfloat16()
    with torch.no_grad():
        for picture in pictures:
            expected = net(picture)
            torch.testing.assert_close(rescaled(picture), expected)
            for low, bound in ((half, 4e-3), (brain, 3e-2)):
                error = float(
                    (low(picture.to(low.mean.dtype)).float() - expected).abs().max()
                    / expected.abs().max().clamp(min=1)
                )
                assert error <= bound, (low.mean.dtype, error)


def run(*arguments: Any) -> int:
    return fuse.main([str(argument) for argument in (*arguments, "--device", "cpu")])


def saved(net: torch.nn.Module, path: Path) -> Path:
    torch.save({"params": {name: value.float() for name, value in net.state_dict().items()}}, path)
    return path


def test_the_released_files_hold_the_rescaled_network(tmp_path: Path, capsys: Any) -> None:
    """Weights for float32 too, since upscalers run them in half precision; and the ONNX file."""
    source, target = saved(adversary(scale_stream), tmp_path / "a.pth"), tmp_path / "2x_a.safetensors"
    assert run("--model_path", source, "--output_path", target, "--onnx", "fp16") == 0
    assert "Rescaled for half precision, the same function: stream 2^-" in capsys.readouterr().out
    picture = hard_pictures(3)["noise"]
    with torch.no_grad():
        expected = adversary(scale_stream).fused().float()(picture)
        half = aether_arch.aether_from_state_dict(load_file(str(target))).half()
        outputs = [half(picture.half()).float()]
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
    source = saved(small_net(**options), tmp_path / "a.pth")
    arguments = ["--img_range", options["img_range"]] if "img_range" in options else []
    assert run("--model_path", source, "--output_path", tmp_path / "b.pth", *arguments) == 0
    assert "Rescaled" not in capsys.readouterr().out
    state = torch.load(source, weights_only=True)["params"]
    expected = (
        aether_arch.aether_from_state_dict(state, options.get("img_range", 1.0))
        .double()
        .fused()
        .float()
        .state_dict()
    )
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert {key for key in expected if not torch.equal(expected[key], written[key])} == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "weights").glob("*_wallpapers_fp16.safetensors")), ids=lambda path: path.name
)
def test_the_weights_of_this_repository_need_no_rescaling(path: Path, capsys: Any) -> None:
    assert run("--model_path", path, "--check-fp16") == 0
    report = capsys.readouterr().out
    assert "Rescaled" not in report
    assert "fp16, as it is" in report


def test_check_fp16_prints_every_layer_and_the_agreement_and_writes_nothing(
    tmp_path: Path, capsys: Any
) -> None:
    source = saved(adversary(scale_products), tmp_path / "a.pth")
    assert run("--model_path", source, "--check-fp16") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    report = capsys.readouterr().out
    before, after = report.split("fp16, before rescaling")[1].split("fp16, rescaled")
    for table, fits in ((before, False), (after, True)):
        headrooms = {
            line.split()[0]: float(line.split()[2])
            for line in table.splitlines()[1:]
            if line and " against " not in line
        }
        assert list(headrooms) == [
            "head",
            "stages.0.0",
            "stages.1.0",
            "stages.1.1",
            "fusion_convs.0",
            "fusion_convs.1",
            "fusion",
            "body_conv",
            "conv_before_upsample",
            "tail",
        ]
        assert (min(headrooms.values()) >= SPARE_BITS) == fits
        assert (headrooms["stages.0.0"] < 0) != fits
        for part in ("depthwise", "gate", "main", "product", "output", "attention", "sum"):
            assert f"  {part} " in table
    assert "fp16 against fp32, before rescaling: not finite on " in after
    for kind in ("fp16", "bf16"):
        line = next(line for line in after.splitlines() if line.startswith(f"{kind} against fp32: "))
        assert float(line.split()[3]) > {"fp16": 55, "bf16": 35}[kind]


@torch.no_grad()
def open_gate_too_far(net: AetherNet, by: float) -> None:
    """A gate beyond half precision in a block that adds next to nothing: float32 is content."""
    net.stages[0][0].ffn.conv_gate.bias.fill_(by)
    net.stages[0][0].ffn.conv_out.weight.div_(10 * by)


def test_what_no_rescaling_helps_is_an_error_where_half_precision_is_asked_for_and_else_a_note(
    tmp_path: Path, capsys: Any
) -> None:
    source, target = saved(adversary(open_gate_too_far, 1e6), tmp_path / "a.pth"), tmp_path / "b.pth"
    assert run("--model_path", source, "--output_path", target) == 0
    assert "Note: half precision holds 65504 at most, stages.0.0 gate reaches 1" in capsys.readouterr().out
    target.unlink()
    for arguments in (["--check-fp16"], ["--output_path", target, "--onnx", "fp32,fp16"]):
        assert run("--model_path", source, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "stages.0.0 gate reaches 1.01e+06, and no rescaling helps; leave fp16 out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_picture_on_which_the_network_itself_runs_away_is_named_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pictures = hard_pictures(3)
    monkeypatch.setattr(
        half_precision,
        "hard_pictures",
        lambda channels: {**pictures, "glare": torch.full((1, channels, 9, 9), 1e4)},
    )
    assert run("--model_path", saved(small_net(2), tmp_path / "a.pth"), "--check-fp16") == 0
    report = capsys.readouterr().out
    assert (
        f"Note: on 1 of {len(pictures) + 1} hard pictures the network runs away, in float32 too: glare; "
        "--bound 1, with the training checkpoint, prevents it\n" in report
    )
    assert "Rescaled" not in report
    assert f" dB over {len(pictures)} hard pictures" in report


def test_a_network_that_runs_away_on_every_picture_is_an_error_where_half_precision_is_asked_for(
    tmp_path: Path, capsys: Any
) -> None:
    net = small_net(2)
    with torch.no_grad():
        net.conv_last.weight.mul_(1e7)
    source = saved(net, tmp_path / "a.pth")
    assert run("--model_path", source, "--output_path", tmp_path / "b.pth") == 0
    assert "hard pictures the network runs away" in capsys.readouterr().out
    assert run("--model_path", source, "--check-fp16") == 2
    assert "on no hard picture is the output below 65504" in capsys.readouterr().err


def test_an_attention_that_float32_itself_saturates_is_a_note(tmp_path: Path, capsys: Any) -> None:
    net = small_net(2)
    with torch.no_grad():
        squeeze, _, excite, _ = net.stages[0][0].channel_attn.fc
        squeeze.weight.fill_(3e38)
        excite.weight.fill_(1.0)
        net.stages[0][0].ffn.conv_out.bias.fill_(9.0)
    assert run("--model_path", saved(net, tmp_path / "a.pth"), "--output_path", tmp_path / "b.pth") == 0
    assert (
        "stages.0.0 attention reaches inf, and no rescaling helps; use these weights in float32"
        in capsys.readouterr().out
    )


def test_without_an_output_only_the_check_runs(tmp_path: Path, capsys: Any) -> None:
    source = saved(small_net(2), tmp_path / "a.pth")
    for arguments in ([], ["--check-fp16", "--onnx", "fp16"], ["--check-fp16", "--int8"]):
        with pytest.raises(SystemExit) as stop:
            run("--model_path", source, *arguments)
        assert stop.value.code == 2
        assert "--output_path" in capsys.readouterr().err


def test_an_older_pytorch_that_lacks_half_precision_on_a_cpu_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    convolve = torch.nn.functional.conv2d

    def old(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")
        return convolve(x, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", old)
    assert run("--model_path", saved(small_net(2), tmp_path / "a.pth"), "--check-fp16") == 0
    report = capsys.readouterr().out
    assert "fp16 against fp32: not compared, this PyTorch does not compute it on a CPU" in report
    assert "headroom, bits" in report


@pytest.mark.parametrize("placement", ["default", "full"])
@pytest.mark.parametrize("bound", [None, 2.0])
def test_a_quantised_network_is_rescaled_with_its_ranges(placement: str, bound: Any) -> None:
    """Powers of two: every rounding happens at the same place, so the network gives the same picture."""
    trained = small_net(2, depths=(1, 1), bound=bound).float().prepare_qat(placement).eval()
    net = trained.fused()
    powers = rescale_(net, everything_too_large())
    assert set(powers.values()) != {0}
    rescaled = with_ranges_of(net, trained, powers)
    assert rescaled.placement == placement
    with torch.no_grad():
        for title, picture in pictures_of(net).items():
            assert float((rescaled(picture) - trained(picture)).abs().max()) <= 1e-5, title
