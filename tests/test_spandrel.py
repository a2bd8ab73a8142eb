"""spandrel opens AetherNet files of every form, reads every option from them, and knows them from others."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Dict

import aether_arch
import pytest
import torch
from checkpoints import FORMS, older_fused
from conftest import ROOT, small_net
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

FLOAT_FORMS = ("training", "fused", "older fused")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: Any) -> None:
    registry = spandrel.MAIN_REGISTRY.copy()
    for name in ("_architectures", "_ordered", "_by_id"):  # what install() does must not outlive the test
        monkeypatch.setattr(spandrel.MAIN_REGISTRY, name, getattr(registry, name))
    for _ in range(2):  # the second time changes nothing
        aethersr.spandrel.install()


def state_of(form: str, **options: Any) -> Dict[str, Tensor]:
    net = small_net(**{"embed_dim": 16, "lk_kernel": 7, **options}).float()
    return older_fused(net) if form == "older fused" else FORMS[form](net).state_dict()


def load(path: Path, state: Dict[str, Tensor]) -> ImageModelDescriptor[Any]:
    """Open the state as people share it: safetensors of the weights alone, .pth as BasicSR writes it."""
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"params": {"wrong": torch.zeros(1)}, "params_ema": wrapped}, path)
    model = ModelLoader().load_from_file(path)
    assert isinstance(model, ImageModelDescriptor)
    return model


@pytest.mark.parametrize("form", [*FORMS, "older fused"])
def test_a_file_of_each_form_is_described_runs_and_is_no_others(form: str, tmp_path: Path) -> None:
    state = state_of(form, in_chans=1, scale=1)
    model = load(tmp_path / ("x.pth" if form in FLOAT_FORMS else "x.safetensors"), state)
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


SIZES = [("small_96dim_16nb", "training"), ("medium_128dim_24nb", "fused")]


@pytest.mark.parametrize(("size", "form"), SIZES)
def test_a_released_variant_is_described_in_full(size: str, form: str, tmp_path: Path) -> None:
    variant, *tags = size.split("_")
    net = getattr(aether_arch, f"aether_{variant}")(scale=2)
    model = load(tmp_path / "x.safetensors", (net.fused() if form == "fused" else net).state_dict())
    assert (model.architecture.id, model.tags) == ("AetherNet", [f"aether_{variant}", *tags, form])
    assert (model.scale, model.purpose, model.input_channels, model.output_channels) == (2, "SR", 3, 3)
    assert (model.supports_half, model.supports_bfloat16, model.size_requirements.none) == (True, True, True)
    assert model.tiling is spandrel.ModelTiling.SUPPORTED


PEERS: Dict[str, Dict[str, Any]] = {
    "Compact": {"num_feat": 8, "num_conv": 2, "upscale": 2},
    "PLKSR.RealPLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "FDAT": {"embed_dim": 24, "num_groups": 1, "depth_per_group": 1, "num_heads": 2, "scale": 2},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PEERS)
def test_another_architectures_file_is_not_taken_for_an_aethernet(name: str, tmp_path: Path) -> None:
    module, network = f"{name}.{name}".split(".")[:2]
    build = getattr(importlib.import_module(f"spandrel.architectures.{module}"), network)
    assert load(tmp_path / "x.pth", build(**PEERS[name]).state_dict()).architecture.id == module


def test_a_file_that_is_no_whole_aethernet_is_refused_in_words(tmp_path: Path) -> None:
    state = {name: value for name, value in state_of("training").items() if name != "conv_last.bias"}
    with pytest.raises(ValueError, match=r"the file is AetherNet .* x2 \(16 wide.*\), .* missing: 1"):
        load(tmp_path / "x.safetensors", state)
