"""aether-shrink takes out what a network misses least and keeps the rest; every tool opens its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import aether_arch
import pytest
import torch
import yaml
from checkpoints import fuse
from conftest import one_line, randomize
from safetensors.torch import load_file, save_file
from torch import nn

from aethersr import shrink
from aethersr.commands import shrink as shrink_command
from aethersr.identify import aether_from_state_dict, read_options
from aethersr.timing import Comparison

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {"use_channel_attn": False, "use_spatial_attn": False}
CHOSEN = [(0.95, 0.84, (8, 7, 32)), (0.8, 0.76, (8, 7, 24)), (0.7, 0.68, (8, 7, 16))]
CHOSEN += [(0.6, 0.56, (6, 7, 16)), (0.33, 0.32, (2, 7, 16))]
KINDS: Dict[str, Dict[str, Any]] = {
    "x2": PLAIN,
    "x3, no bound": {"scale": 3, "bound": None, **PLAIN},
    "x4, attention": {"scale": 4, "depths": (2, 1, 3), "embed_dim": 12},
    "batch statistics": {"norm": "batch", "sk_kernel": 5, "mlp_ratio": 1.5, **PLAIN},
    "grey, img_range": {"in_chans": 1, "img_range": 255.0, **PLAIN},
}


def network(**options: Any) -> Any:
    options = {"scale": 2, "embed_dim": 8, "depths": (3, 2), "lk_kernel": 7, **options}
    return randomize(aether_arch.AetherNet(**options)).eval()


def run(tmp_path: Path, *options: Any, source: str = "net.pth", target: str = "small.pth") -> int:
    given = ("--model_path", tmp_path / source, "--output_path", tmp_path / target)
    return shrink_command.main(
        [str(each) for each in (*given, "--pictures", tmp_path / "pictures", *options)]
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_weights_compute_what_the_network_does_without_the_parts(kind: str) -> None:
    net, image = network(**KINDS[kind]), torch.rand(1, KINDS[kind].get("in_chans", 3), 9, 14)
    state = shrink.with_kernel(shrink.without_block(net.state_dict(), 0, 0), 5)
    net.stages[0][0], channels = nn.Identity(), {}
    for name, module in net.named_modules():
        if isinstance(module, aether_arch.ReparamLargeKernelConv):
            for side in (0, -1):
                module.lk_conv.weight[:, :, side] = module.lk_conv.weight[:, :, :, side] = 0
        if isinstance(module, aether_arch.GatedConvFFN):
            stage, block = name.split(".")[1:3]
            name = f"stages.{stage}.{int(block) - (stage == '0')}."
            channels[name] = torch.arange(1, module.conv_out.in_channels, 2)
            module.conv_out.weight[:, ::2] = 0
    smaller = aether_from_state_dict(shrink.with_hidden(state, channels))
    size = (sum(net.options["depths"]) - 1, 5, len(channels["stages.1.0."]))
    assert shrink.Size.of(smaller.options) == size
    torch.testing.assert_close(smaller(image), net(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_taken_out_every_tensor_is_equal(
    tmp_path: Path, pictures: Path, kind: str, capsys: Any
) -> None:
    state = network(**KINDS[kind]).half().state_dict()
    torch.save(state, tmp_path / "net.pth")
    save_file(state, str(tmp_path / "net.safetensors"))
    assert run(tmp_path) == 0
    assert "Nothing is to be taken out; --time 0.5, --blocks" in capsys.readouterr().out
    everything = ("--blocks", sum(network(**KINDS[kind]).options["depths"]))
    assert run(tmp_path, *everything, source="net.safetensors", target="small.safetensors") == 0
    written = torch.load(tmp_path / "small.pth", weights_only=True)
    for found in (written, load_file(str(tmp_path / "small.safetensors"))):
        assert sorted(found) == sorted(state)
        assert all(found[name].dtype == torch.half for name in state)
        assert all(torch.equal(found[name], value) for name, value in state.items())


def test_img_range_of_an_older_file_is_recorded(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    state = network(img_range=255.0, **PLAIN).state_dict()
    torch.save({name: value for name, value in state.items() if name != "img_range"}, tmp_path / "net.pth")
    assert run(tmp_path, "--img_range", 255) == 0
    assert torch.load(tmp_path / "small.pth", weights_only=True)["img_range"].equal(state["img_range"])
    assert "img_range: 255.0" in capsys.readouterr().out


@torch.no_grad()
def test_what_the_network_does_not_need_goes_first() -> None:
    net = network(embed_dim=9, depths=(3, 2, 1), **PLAIN)
    for block in (net.stages[0][1], net.stages[1][1], net.stages[2][0]):  # the last is alone in its stage
        nn.init.zeros_(block.ffn.conv_out.weight)
        nn.init.zeros_(block.ffn.conv_out.bias)
    for module in net.modules():
        if isinstance(module, aether_arch.GatedConvFFN):
            module.conv_out.weight[:, [0, 5, 6]] = 0
        if isinstance(module, aether_arch.ReparamLargeKernelConv):
            module.lk_conv.weight[:, :, [0, -1]] = module.lk_conv.weight[:, :, :, [0, -1]] = 0
    images = torch.rand(3, 1, 3, 11, 8)
    pairs = [(image, net(image).clamp(0, 1)) for image in images]
    found = list(shrink.steps(net.state_dict(), pairs, shrink.Size(4, 5, 15)))
    assert sorted(step.what for step in found[1:3]) == ["block 0.1", "block 1.1"]
    assert [step.decibels > 75 for step in found] == [True] * 5  # rounding may move a value by one level
    smaller = aether_from_state_dict(found[-1].state)
    torch.testing.assert_close(smaller(images[0]), net(images[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("time", "reached", "size"), CHOSEN)
def test_time_chooses_channels_then_blocks(
    tmp_path: Path, pictures: Path, capsys: Any, monkeypatch: Any, time: float, reached: float, size: Any
) -> None:
    def measured(nets: Any) -> Comparison:
        """10 ms, 4 each block, and 4 for all channels; a kernel of 9: 2 more."""
        sizes = {name: shrink.Size.of(net.options) for name, net in nets.items()}
        of = {k: 10 + each.blocks * (2 + each.hidden / 16 + (each.kernel == 9)) for k, each in sizes.items()}
        return Comparison({name: [value] for name, value in of.items()})

    for module in (shrink, shrink_command):
        monkeypatch.setattr(module, "compare_times", measured)
    torch.save(network(embed_dim=16, depths=(4, 4), lk_kernel=9, **PLAIN).state_dict(), tmp_path / "net.pth")
    assert run(tmp_path, "--time", time) == 0
    assert shrink.Size.of(read_options(torch.load(tmp_path / "small.pth", weights_only=True))) == size
    assert f"Time: {reached} (" in capsys.readouterr().out


REFUSED = {
    "--scale 2": "comes from the checkpoint",
    "--time 50%": "--time",
    "--blocks 1": "from 2 to 5",
    "--blocks 6": "from 2 to 5",
    "--kernel 4": "odd number from 3 to 7",
    "--hidden 17": "from 1 to 16",
    "--time 0": "below 1",
    "--time 0.001": "can't be reached",
    "--time 0.5 --blocks 3": "leave out --blocks",
    "--time 0.5 --img_range 0": "--img_range",
    "--time 0.5 --pictures missing": "--pictures missing",
    "--time 0.5 --output_path small.onnx": "expected .pth or .safetensors",
    "--time 0.5 --output_path net.pth": "the input itself",
    "--time 0.5 --model_path fused.pth": "fused form",
    "--time 0.5 --model_path int8.pth": "int8 form",
    "--time 0.5 --model_path other.pth": "not an AetherNet",
    "--time 0.5 --model_path https://a.b/c.pth": "https://a.b/c.pth is a web address",
}


@pytest.mark.parametrize("options", REFUSED)
def test_refused_in_one_line(
    tmp_path: Path, pictures: Path, capsys: Any, monkeypatch: Any, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    net = network(**PLAIN)
    torch.save(net.state_dict(), "net.pth")
    torch.save(net.fused().state_dict(), "fused.pth")
    quantised = net.fused().prepare_qat("default", [torch.rand(1, 3, 9, 9)])
    torch.save(quantised.convert_to_quantized().state_dict(), "int8.pth")
    torch.save({"head.weight": torch.zeros(3, 3)}, "other.pth")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert run(tmp_path, *options.split()) == 2
    assert REFUSED[options] in one_line(capsys.readouterr().err, "aether-shrink")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_the_printed_options_and_the_fuse_command_open_uneven_depths(
    tmp_path: Path, pictures: Path, capsys: Any
) -> None:
    """ONNX files of uneven depths: test_onnx_int8.py; NCNN: test_ncnn.py."""
    torch.save(network(depths=(2, 3, 2, 2), **PLAIN).state_dict(), tmp_path / "net.pth")
    assert run(tmp_path, "--blocks", 6, "--kernel", 5, "--hidden", 9) == 0
    lines = yaml.safe_load(capsys.readouterr().out.partition("to fine-tune it:")[2])["network_g"]
    smaller = getattr(aether_arch, lines.pop("type"))(scale=2, **lines).eval()
    smaller.load_state_dict(torch.load(tmp_path / "small.pth", weights_only=True))
    assert fuse(tmp_path / "small.pth", tmp_path / "fused.pth") == 0
    image = torch.rand(1, 3, 13, 8)
    fused = aether_from_state_dict(torch.load(tmp_path / "fused.pth", weights_only=True))
    torch.testing.assert_close(fused(image), smaller(image), atol=1e-5, rtol=1e-5)
