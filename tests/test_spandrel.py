"""spandrel opens AetherNet files of every form, reads every option from them, and knows them from others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import aether_arch
import pytest
import torch
from aether_arch import AetherNet
from checkpoints import older_fused
from conftest import ROOT, randomize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aethersr.identify import aether_from_state_dict

sys.path.insert(0, str(ROOT / "demo"))
from basicsr_train import import_torchvision

if importlib.util.find_spec("spandrel") is None:
    pytest.skip("spandrel is not installed: pip install spandrel", allow_module_level=True)
import_torchvision()  # spandrel imports it

import spandrel  # noqa: E402
from spandrel import ImageModelDescriptor, ModelLoader  # noqa: E402

import aethersr.spandrel  # noqa: E402

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
FORMS = ("training", "fused", "older fused", "quantised", "int8")
FLOAT_FORMS = FORMS[:3]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = spandrel.MAIN_REGISTRY.copy()
    for name in ("_architectures", "_ordered", "_by_id"):  # what install() does must not outlive the test
        monkeypatch.setattr(spandrel.MAIN_REGISTRY, name, getattr(registry, name))
    aethersr.spandrel.install()


def in_form(net: Any, form: str) -> Dict[str, Tensor]:
    if form == "older fused":
        return older_fused(net)
    if form in FLOAT_FORMS:
        return (net.fused() if form == "fused" else net).state_dict()
    net = net.prepare_qat(calibration=[torch.rand(1, net.options["in_chans"], 16, 16)]).eval()
    return (net if form == "quantised" else net.convert_to_quantized()).state_dict()


@functools.lru_cache(None)
def state_of(form: str, residual: float = 1.0, **options: Any) -> Dict[str, Tensor]:
    """State dict of a small network with random statistics. ``residual``: a factor on what blocks add."""
    options = {"scale": 2, "embed_dim": 16, "depths": (1, 2), "lk_kernel": 7, **options}
    net = randomize(AetherNet(**options)).eval()
    with torch.no_grad():  # at 1, sixteen gated products in a row grow as in no trained network
        for block in (module for module in net.modules() if isinstance(module, aether_arch.GatedConvFFN)):
            block.conv_out.weight *= residual
    return in_form(net, form)


def write(path: Path, state: Dict[str, Tensor]) -> Path:
    """As people share files: safetensors of the weights alone, .pth as BasicSR writes it."""
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"params": {"wrong": torch.zeros(1)}, "params_ema": wrapped}, path)
    return path


def load(path: Path, state: Dict[str, Tensor]) -> ImageModelDescriptor[Any]:
    model = ModelLoader().load_from_file(write(path, state))
    assert isinstance(model, ImageModelDescriptor)
    return model


UNDETECTABLE = {"drop", "drop_path_rate", "norm"}  # no tensor holds them; they change nothing in evaluation
NETWORKS: Dict[str, Dict[str, Any]] = {
    "deep": {"scale": 1, "depths": [60], "use_channel_attn": False, "use_spatial_attn": False},
    "x3, channel attention": {"scale": 3, "use_spatial_attn": False},
    "x8, spatial attention": {"scale": 8, "use_channel_attn": False},
    "grey": {"in_chans": 1},
    "four channels, another ratio": {"in_chans": 4, "mlp_ratio": 1.5},
    "uneven stages": {"embed_dim": 24, "depths": [1, 2, 2, 3]},
    "large kernels": {"lk_kernel": 17, "sk_kernel": 5},
    "kernels of one, no bound": {"lk_kernel": 1, "sk_kernel": 1, "bound": None},
    "another range and bound": {"img_range": 255.0, "bound": 4.0},
}


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_option_is_read_from_the_weights(name: str, form: str, tmp_path: Path) -> None:
    net: Any = AetherNet(**{"embed_dim": 16, "depths": [1], **NETWORKS[name]})
    net = net.fused() if form == "fused" else net  # its names and shapes are what is read
    loaded = load(tmp_path / "x.safetensors", net.state_dict()).model
    ignored = UNDETECTABLE | ({"sk_kernel", "img_range"} if form == "fused" else set())
    options = (net.options, loaded.hyperparameters)
    expected, found = ({key: value for key, value in each.items() if key not in ignored} for each in options)
    assert found == expected
    assert len(found) >= 8
    assert type(loaded) is type(net)


@functools.lru_cache(None)
def golden(path: Path) -> Tuple[AetherNet, Tensor, Tensor]:
    """A network, input and output, computed elsewhere."""
    with safe_open(path, "pt") as file:
        net = AetherNet(**json.loads(file.metadata()["config"])).eval()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    net.load_state_dict({name[3:]: value for name, value in tensors.items() if name[:3] == "sd/"})
    return net, tensors["input"], tensors["output"]


@pytest.mark.parametrize("form", FLOAT_FORMS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_file_gives_the_picture_of_the_network_that_it_was_made_from(
    path: Path, form: str, tmp_path: Path
) -> None:
    net, image, expected = golden(path)
    for suffix in (".pth", ".safetensors"):
        model = load(tmp_path / f"x{suffix}", in_form(net, form))
        error = float((model(image) - expected.clamp(0, 1)).abs().max())
        assert error <= 2e-5 * float(expected.abs().max())
    assert float((expected.clamp(0, 1) == expected).float().mean()) > 0.01, "nothing to compare"


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_each_form_is_described_runs_and_is_no_others(form: str, tmp_path: Path) -> None:
    state = state_of(form, in_chans=1, scale=1)
    model = load(tmp_path / "x.safetensors", state)
    assert (model.tags, model.purpose, model.scale) == (["16dim", "3nb", form], "Restoration", 1)
    assert (model.input_channels, model.output_channels, model.dtype) == (1, 1, torch.float32)
    assert {model.supports_half, model.supports_bfloat16} == {form in FLOAT_FORMS}
    if form not in FLOAT_FORMS:
        with pytest.raises(spandrel.UnsupportedDtypeError, match="AetherNet"):
            model.half()
    net = aether_from_state_dict(state)
    for height, width in ((1, 1), (3, 4), (9, 31), (64, 33)):
        image = torch.rand(1, 1, height, width)
        torch.testing.assert_close(model(image), net(image).clamp(0, 1))
        assert model.size_requirements.check(width, height)
    for attention in (True, False):
        state = state_of(form, use_channel_attn=attention, use_spatial_attn=attention)
        found = [support.architecture.id for support in spandrel.MAIN_REGISTRY if support.detect(state)]
        assert found == ["AetherNet"]  # so the order of the registry does not matter
    assert len(spandrel.MAIN_REGISTRY) > 40


@pytest.mark.parametrize(("size", "form"), [("small_96dim_16nb", "training"), ("medium_128dim_24nb", "fused"),
                                            ("large_180dim_40nb", "fused")])  # fmt: skip
def test_a_released_variant_is_described_in_full(size: str, form: str, tmp_path: Path) -> None:
    variant, *tags = size.split("_")
    net = getattr(aether_arch, f"aether_{variant}")(scale=2)
    model = load(tmp_path / "x.safetensors", (net.fused() if form == "fused" else net).state_dict())
    assert (model.architecture.id, model.tags) == ("AetherNet", [f"aether_{variant}", *tags, form])
    assert (model.scale, model.purpose, model.input_channels, model.output_channels) == (2, "SR", 3, 3)
    assert (model.supports_half, model.supports_bfloat16, model.size_requirements.none) == (True, True, True)
    assert model.tiling is spandrel.ModelTiling.SUPPORTED


@pytest.mark.parametrize("form", FLOAT_FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.002), (torch.bfloat16, 0.012)])
def test_half_and_bfloat16_give_the_picture_of_float32(
    dtype: torch.dtype, bound: float, form: str, tmp_path: Path
) -> None:
    """In half to half a level of 255, in bfloat16 to three: as deep as aether_small, and narrower."""
    state = state_of(form, residual=0.5, embed_dim=20, depths=(4, 4, 4, 4), lk_kernel=11)
    model = load(tmp_path / "x.safetensors", state)
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = model(image)
    output = model.to(dtype)(image.to(dtype))
    assert (model.dtype, output.dtype) == (dtype, dtype)
    assert float((output.float() - expected).square().mean().sqrt()) <= bound
    assert float(expected.std()) > 0.05, "nothing to compare"
    stored = load(tmp_path / "y.pth", {name: value.to(dtype) for name, value in state.items()})
    assert stored.dtype == torch.float32
    assert float((stored(image) - expected).square().mean().sqrt()) <= bound


PEERS: Dict[str, Dict[str, Any]] = {
    "Compact": {"num_feat": 8, "num_conv": 2, "upscale": 2},
    "ESRGAN": {"num_filters": 8, "num_blocks": 1, "scale": 2},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 12, "upscale": 2},
    "PLKSR.RealPLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "FDAT": {"embed_dim": 24, "num_groups": 1, "depth_per_group": 1, "num_heads": 2, "scale": 2},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PEERS)
def test_another_architectures_file_is_not_taken_for_an_aethernet(name: str, tmp_path: Path) -> None:
    module, _, network = name.partition(".")
    build = getattr(importlib.import_module(f"spandrel.architectures.{module}"), network or module)
    assert load(tmp_path / "x.pth", build(**PEERS[name]).state_dict()).architecture.id == module


def test_installing_twice_is_once_and_without_it_spandrel_does_not_know_the_file(tmp_path: Path) -> None:
    count = len(spandrel.MAIN_REGISTRY)
    aethersr.spandrel.install()
    assert len(spandrel.MAIN_REGISTRY) == count
    registry = spandrel.ArchRegistry()
    registry.add(*(support for support in spandrel.MAIN_REGISTRY if support.architecture.id != "AetherNet"))
    with pytest.raises(spandrel.UnsupportedModelError):
        ModelLoader(registry=registry).load_from_file(write(tmp_path / "x.pth", state_of("fused")))


def test_a_file_that_is_no_whole_aethernet_is_refused_in_words(tmp_path: Path) -> None:
    state = {name: value for name, value in state_of("training").items() if name != "conv_last.bias"}
    with pytest.raises(ValueError, match=r"the file is AetherNet .* x2 \(16 wide\), .* missing: 1"):
        load(tmp_path / "x.safetensors", state)
