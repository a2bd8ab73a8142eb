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
import aether_quant
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
from aethersr.spandrel import AetherNetArch  # noqa: E402

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
FORMS = ("training", "fused", "older fused", "quantised", "int8")
FLOAT_FORMS = FORMS[:3]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = spandrel.MAIN_REGISTRY.copy()
    for name in ("_architectures", "_ordered", "_by_id"):  # what install() does must not outlive the test
        monkeypatch.setattr(spandrel.MAIN_REGISTRY, name, getattr(registry, name))
    aethersr.spandrel.install()


@functools.lru_cache(None)
def state_of(form: str, residual: float = 1.0, **options: Any) -> Dict[str, Tensor]:
    """State dict of a small network with random statistics. ``residual``: a factor on what blocks add."""
    options = {"scale": 2, "embed_dim": 16, "depths": (1, 2), "lk_kernel": 7, **options}
    net: Any = randomize(AetherNet(**options)).eval()
    with torch.no_grad():  # at 1, sixteen gated products in a row grow as in no trained network
        for block in (module for module in net.modules() if isinstance(module, aether_arch.GatedConvFFN)):
            block.conv_out.weight *= residual
    if form == "older fused":
        return older_fused(net)
    if form == "fused":
        return net.fused().state_dict()
    if form == "training":
        return net.state_dict()
    quantised = net.prepare_qat(calibration=[torch.rand(1, net.options["in_chans"], 16, 16)]).eval()
    return (quantised if form == "quantised" else quantised.convert_to_quantized()).state_dict()


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


@functools.lru_cache(None)
def golden(path: Path) -> Tuple[Dict[str, Dict[str, Tensor]], Tensor, Tensor]:
    """State dicts of the forms, input and output of a network computed elsewhere."""
    with safe_open(path, "pt") as file:
        net = AetherNet(**json.loads(file.metadata()["config"])).eval()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    net.load_state_dict({name[3:]: value for name, value in tensors.items() if name[:3] == "sd/"})
    states = (net.state_dict(), net.fused().state_dict(), older_fused(net))
    return dict(zip(FLOAT_FORMS, states)), tensors["input"], tensors["output"]


# ------------------------------------------------------------------------------------------------------ loads

# No tensor holds them, and they change nothing in evaluation.
UNDETECTABLE = {"drop", "drop_path_rate", "norm"}
NETWORKS: Dict[str, Dict[str, Any]] = {
    "no attention, x1": {"scale": 1, "use_channel_attn": False, "use_spatial_attn": False},
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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", FLOAT_FORMS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_file_of_any_form_gives_the_picture_of_the_network_that_it_was_made_from(
    path: Path, form: str, suffix: str, tmp_path: Path
) -> None:
    states, image, expected = golden(path)
    model = load(tmp_path / f"x{suffix}", states[form])
    error = float((model(image) - expected.clamp(0, 1)).abs().max())
    assert error <= 2e-5 * float(expected.abs().max())
    assert float((expected.clamp(0, 1) == expected).float().mean()) > 0.01, "nothing to compare"


@pytest.mark.parametrize("form", FORMS[3:])
def test_a_quantised_file_keeps_its_rounding(form: str, tmp_path: Path) -> None:
    image = torch.rand(1, 3, 13, 17)
    state = state_of(form)
    model = load(tmp_path / "x.pth", state)
    assert isinstance(model.model, aether_quant.QuantAetherNet)
    with torch.no_grad():
        expected = aether_from_state_dict(state)(image).clamp(0, 1)
    torch.testing.assert_close(model(image), expected)
    assert not torch.equal(model(image), load(tmp_path / "y.safetensors", state_of("fused"))(image))


@pytest.mark.parametrize("form", FORMS)
def test_an_opened_network_can_be_fused_where_it_is(form: str, tmp_path: Path) -> None:
    image = torch.rand(1, 3, 9, 14)
    model = load(tmp_path / "x.safetensors", state_of(form))
    before = model(image)
    model.model.fuse_model()
    assert type(model.model) is aether_arch.FusedAetherNet
    difference = (model(image) - before).abs()
    if form in FLOAT_FORMS:
        assert float(difference.max()) <= 1e-5
    else:  # without the rounding it is another picture, yet near
        assert float(difference.mean()) <= 0.1


# ------------------------------------------------------------------------------------------------- descriptor


@pytest.mark.parametrize(
    ("variant", "form", "tags"),
    [
        ("aether_small", "training", ["aether_small", "96dim", "16nb"]),
        ("aether_medium", "fused", ["aether_medium", "128dim", "24nb"]),
        ("aether_large", "fused", ["aether_large", "180dim", "40nb"]),
    ],
)
def test_a_released_variant_is_described_in_full(variant: str, form: str, tags: Any, tmp_path: Path) -> None:
    net = getattr(aether_arch, variant)(scale=2)
    model = load(tmp_path / "x.safetensors", (net.fused() if form == "fused" else net).state_dict())
    assert (model.architecture.id, model.purpose, model.tags) == ("AetherNet", "SR", [*tags, form])
    assert (model.scale, model.input_channels, model.output_channels) == (2, 3, 3)
    assert (model.supports_half, model.supports_bfloat16, model.size_requirements.none) == (True, True, True)
    assert model.tiling is spandrel.ModelTiling.SUPPORTED


@pytest.mark.parametrize("form", FORMS)
def test_a_network_of_ones_own_is_described_by_its_size_and_form(form: str, tmp_path: Path) -> None:
    model = load(tmp_path / "x.safetensors", state_of(form, scale=1, in_chans=1))
    assert model.tags == ["16dim", "3nb", form]
    assert (model.purpose, model.scale) == ("Restoration", 1)
    assert (model.input_channels, model.output_channels) == (1, 1)
    assert {model.supports_half, model.supports_bfloat16} == {form in FLOAT_FORMS}
    assert model.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_of_any_size_is_upscaled(form: str, device: str, tmp_path: Path) -> None:
    model = load(tmp_path / "x.safetensors", state_of(form)).to(device)
    for height, width in ((1, 1), (2, 1), (3, 4), (9, 31), (64, 33)):
        image = torch.rand(1, 3, height, width, device=device)
        output = model(image)
        assert output.shape == (1, 3, 2 * height, 2 * width)
        assert bool(output.isfinite().all())
        assert model.size_requirements.check(width, height)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FLOAT_FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.002), (torch.bfloat16, 0.012)])
def test_half_and_bfloat16_give_the_picture_of_float32(
    dtype: torch.dtype, bound: float, form: str, device: str, tmp_path: Path
) -> None:
    """In half to half a level of 255, in bfloat16 to three: as deep as aether_small, and narrower."""
    state = state_of(form, residual=0.5, embed_dim=20, depths=(4, 4, 4, 4), lk_kernel=11)
    model = load(tmp_path / "x.safetensors", state).to(device)
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).to(device)
    expected = model(image)
    output = model.to(dtype)(image.to(dtype))
    assert (model.dtype, output.dtype) == (dtype, dtype)
    assert float((output.float() - expected).square().mean().sqrt()) <= bound
    assert float(expected.std()) > 0.05, "nothing to compare"
    stored = {name: value.to(dtype) for name, value in state.items()}
    opened = load(tmp_path / "y.pth", stored).to(device)  # a file in half precision opens as float32
    assert opened.dtype == torch.float32
    assert float((opened(image) - expected).square().mean().sqrt()) <= bound


@pytest.mark.parametrize("form", FORMS[3:])
def test_a_quantised_network_refuses_half_precision(form: str, tmp_path: Path) -> None:
    model = load(tmp_path / "x.safetensors", state_of(form))
    with pytest.raises(spandrel.UnsupportedDtypeError, match="AetherNet"):
        model.half()
    assert model.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- detection

SWIN: Dict[str, Any] = {"embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 4}
SWIN.update(upscale=2, img_size=8)
DAT = {"embed_dim": 12, "depth": [2], "num_heads": [2], "split_size": [2, 4], "upscale": 2, "img_size": 8}
PEERS: Dict[str, Dict[str, Any]] = {
    "Compact": {"num_feat": 8, "num_conv": 2, "upscale": 2},
    "ESRGAN": {"num_filters": 8, "num_blocks": 1, "scale": 2},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 12, "upscale": 2},
    "SwinIR": {**SWIN, "upsampler": "pixelshuffledirect"},
    "Swin2SR": {**SWIN, "upsampler": "pixelshuffle"},
    "DAT": DAT,
    "PLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "PLKSR.RealPLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "SAFMN": {"dim": 12, "n_blocks": 2, "upscaling_factor": 2},
    "OmniSR": {"num_feat": 16, "res_num": 1, "up_scale": 2},
    "MoSR": {"dim": 16, "n_block": 2, "upscale": 2},
    "RCAN": {"n_feats": 16, "n_resblocks": 1, "n_resgroups": 1, "scale": 2},
    "FDAT": {"embed_dim": 24, "num_groups": 1, "depth_per_group": 1, "num_heads": 2, "scale": 2},
    "NAFNet": {"width": 8, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PEERS)
def test_another_architectures_file_is_not_taken_for_an_aethernet(name: str, tmp_path: Path) -> None:
    module, _, network = name.partition(".")
    build = getattr(importlib.import_module(f"spandrel.architectures.{module}"), network or module)
    net = build(**PEERS[name])
    model = load(tmp_path / "x.pth", net.state_dict())
    assert model.architecture.id == module
    assert not AetherNetArch().detect(net.state_dict())


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_no_other_architecture_takes_an_aethernet_for_its_own(form: str, attention: bool) -> None:
    state = state_of(form, use_channel_attn=attention, use_spatial_attn=attention)
    found = [support.architecture.id for support in spandrel.MAIN_REGISTRY if support.detect(state)]
    assert found == ["AetherNet"]  # so the order of the registry does not matter
    assert len(spandrel.MAIN_REGISTRY) > 40


def test_installing_twice_is_once_and_without_it_spandrel_does_not_know_the_file(tmp_path: Path) -> None:
    count = len(spandrel.MAIN_REGISTRY)
    aethersr.spandrel.install()
    assert len(spandrel.MAIN_REGISTRY) == count
    registry = spandrel.ArchRegistry()
    registry.add(*(support for support in spandrel.MAIN_REGISTRY if support.architecture.id != "AetherNet"))
    with pytest.raises(spandrel.UnsupportedModelError):
        ModelLoader(registry=registry).load_from_file(write(tmp_path / "x.pth", state_of("fused")))


def test_a_file_that_is_no_whole_aethernet_is_refused_in_words(tmp_path: Path) -> None:
    state = dict(state_of("training"))
    del state["conv_before_upsample.0.bias"]
    with pytest.raises(ValueError, match=r"the file is AetherNet .* x2 \(16 wide\), .* missing: 1"):
        load(tmp_path / "x.safetensors", state)
