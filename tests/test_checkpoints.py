"""A network takes the form of the file that it loads; nothing is ever normalised twice; unknown layouts are refused by name."""

from __future__ import annotations

from typing import Dict

import aether_arch
import pytest
import torch
from aether_arch import AetherNet, FusedAetherNet, aether_from_state_dict, aether_medium, aether_small
from conftest import randomize, small_net
from torch import Tensor, nn

X = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(1))


def older_fused(net: AetherNet, stale_statistics: bool = True) -> Dict[str, Tensor]:
    """What the published tools wrote: kernels merged, norms turned into scale and shift, stale statistics beside them."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name, module in net.named_modules():
        if isinstance(module, aether_arch.ReparamLargeKernelConv):
            weight, bias = module.reparameterize()
            for part in ("lk_conv.weight", "sk_conv.weight", "lk_bias", "sk_bias"):
                del state[f"{name}.{part}"]
            state[f"{name}.fused_conv.weight"], state[f"{name}.fused_conv.bias"] = weight.detach(), bias.detach()
        if isinstance(module, aether_arch.DeploymentNorm):
            scale, shift = (value.detach().view(1, -1, 1, 1) for value in module.scale_and_shift())
            state[f"{name}.weight"], state[f"{name}.bias"] = scale, shift
            if not stale_statistics:
                del state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return state


def test_the_published_way_of_step_c_works_strictly() -> None:
    trained = randomize(aether_medium(scale=4)).eval()
    fused = trained.fused().state_dict()
    model = aether_medium(scale=4)
    model.load_state_dict(fused)
    model.eval()
    model.fuse_model()
    with torch.no_grad():
        assert float((model(X) - trained(X)).abs().max()) <= 1e-5 * float(trained(X).abs().max())


@pytest.mark.parametrize("strict", [True, False])
def test_a_network_takes_the_form_of_the_file_there_and_back(strict: bool) -> None:
    net = small_net(2).float()
    fused = net.fused()
    other = AetherNet(**net.options)
    other.load_state_dict(fused.state_dict(), strict=strict)
    assert type(other) is FusedAetherNet
    assert torch.equal(other.eval()(X), fused(X))
    other.load_state_dict(net.state_dict(), strict=strict)
    assert type(other) is AetherNet
    assert torch.equal(other.eval()(X), net(X))


@pytest.mark.parametrize("stale_statistics", [True, False])
def test_an_older_fused_file_is_not_normalised_twice(stale_statistics: bool) -> None:
    net = small_net(2)
    state = older_fused(net, stale_statistics)
    loaded = AetherNet(**net.options).double().eval()
    loaded.load_state_dict(state, strict=True)
    built = aether_from_state_dict(state)
    x = X.double()
    with torch.no_grad():
        for other in (loaded, loaded.fused(), built.double(), built.double().fused()):
            assert float((other(x) - net(x)).abs().max()) <= 2e-6 * float(net(x).abs().max())


def test_a_container_loads_either_form_too() -> None:
    net = small_net(2).float()
    container = nn.Sequential(AetherNet(**net.options))
    container.load_state_dict({f"0.{name}": value for name, value in net.fused().state_dict().items()}, strict=True)
    assert torch.equal(container.eval()(X), net.fused()(X))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(prefix: str) -> None:
    net = small_net(2).float()
    for form in (net, net.fused()):
        rebuilt = aether_from_state_dict({prefix + name: value for name, value in form.state_dict().items()})
        assert torch.equal(rebuilt(X), form(X))


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("variant", aether_arch.VARIANTS, ids=lambda variant: variant.__name__)
def test_variant_and_scale_are_read_from_the_weights(variant: type, scale: int) -> None:
    state = variant(scale=scale).state_dict()
    options = aether_arch._read_options(state, "training")
    assert (aether_arch.variant_name({**options, "depths": tuple(options["depths"])}), options["scale"]) == (variant.__name__, scale)


def test_every_option_that_changes_the_function_is_read_back() -> None:
    options = {"scale": 3, "in_chans": 1, "embed_dim": 40, "depths": [2, 1], "mlp_ratio": 1.7, "lk_kernel": 9, "sk_kernel": 5}
    options.update(use_channel_attn=True, use_spatial_attn=False)
    net = AetherNet(**options)
    rebuilt = aether_from_state_dict(net.state_dict())
    assert {name: rebuilt.options[name] for name in options if name != "mlp_ratio"} == {n: v for n, v in options.items() if n != "mlp_ratio"}
    assert int(40 * rebuilt.options["mlp_ratio"]) == int(40 * 1.7)


def test_img_range_is_assumed_for_a_training_form_and_lies_in_the_weights_of_a_fused_one() -> None:
    net = small_net(2, img_range=255.0).float()
    training, fused = net.state_dict(), net.fused().state_dict()
    assert torch.equal(aether_from_state_dict(training, img_range=255.0)(X), net(X))
    assert torch.equal(aether_from_state_dict(fused)(X), net.fused()(X))


def test_a_foreign_or_broken_state_dict_is_refused_with_what_is_wrong() -> None:
    state = small_net(2).float().state_dict()

    def refused(words: str, **changes: Tensor) -> None:
        with pytest.raises(ValueError) as error:
            aether_from_state_dict({**state, **changes})
        assert words in str(error.value), error.value

    with pytest.raises(ValueError, match="not an AetherNet"):
        aether_from_state_dict(nn.Conv2d(3, 3, 3).state_dict())
    with pytest.raises(ValueError, match="not an AetherNet"):
        aether_from_state_dict({})
    with pytest.raises(ValueError, match=r"first layout \(v1"):
        aether_from_state_dict({"layers.0.blocks.0.conv.lk_conv.bias": torch.zeros(3)})
    for missing in ("conv_first.weight", "conv_last.weight", "norm.running_var", "stages.1.0.ffn.conv_out.bias", "mean"):
        with pytest.raises(ValueError, match=missing):
            aether_from_state_dict({name: value for name, value in state.items() if name != missing})
    refused("unexpected: 1 (surplus)", surplus=torch.zeros(1))
    refused("of another shape: 1 (conv_after_body.weight)", **{"conv_after_body.weight": torch.zeros(24, 24, 1, 1)})
    refused("has 1 dimensions, expected 4", **{"conv_first.weight": torch.zeros(24)})
    refused("v3 or v4", **{"norm.num_batches_tracked": torch.zeros(1)})
    refused("3.x", scale_tensor=torch.zeros(1))
    refused("gaps", **{"stages.7.0.norm.weight": torch.zeros(1, 24, 1, 1)})
    refused("none of the scales", **{"upsample.blocks.0.weight": torch.zeros(25 * 32, 24, 3, 3)})


def test_a_claim_of_terabytes_takes_no_memory() -> None:
    state = dict(small_net(2).float().state_dict())
    state["conv_first.weight"] = torch.zeros(1).expand(2**22, 3, 3, 3)
    with pytest.raises(ValueError, match="of another shape"):
        aether_from_state_dict(state)


def test_a_framework_that_compares_names_first_can_ask_for_the_form() -> None:
    net = small_net(2).float()
    for state in (net.fused().state_dict(), older_fused(net)):
        other = AetherNet(**net.options)
        mapped = other.map_state_dict(state)
        assert mapped is state
        assert set(mapped) == set(other.state_dict())


def test_imported_alone_the_file_imports_no_framework() -> None:
    assert aether_small.__module__ == "aether_arch"
    import subprocess
    import sys

    code = "import sys, aether_arch; print({'basicsr', 'neosr', 'traiNNer', 'onnx', 'onnxruntime', 'safetensors'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=str(aether_arch.__file__).rsplit("aether_arch", 1)[0], capture_output=True, text=True)
    assert run.stdout.strip() == "set()"
