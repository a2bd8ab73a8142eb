"""A network takes the form of the file that it loads, whole or not at all."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import aether_arch
import aether_quant
import pytest
import torch
from aether_arch import (
    AetherNet,
    DeploymentNorm,
    FusedAetherNet,
    aether_medium,
    aether_small,
    differences,
    scale_of,
)
from aether_quant import QuantAetherNet
from conftest import ROOT, randomize, small_net
from torch import Tensor, nn

from aethersr.identify import aether_from_state_dict
from aethersr.onnx import export_onnx

X = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(1))
BOUND = 0.75


def values(net: nn.Module) -> Dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_unchanged(net: nn.Module, form: type, before: Dict[str, Tensor]) -> None:
    assert type(net) is form
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_fused_weights_load_into_a_new_network_as_the_seed_shows() -> None:
    trained = randomize(aether_medium(scale=4, embed_dim=32, depths=(1, 1))).eval()
    model = aether_medium(scale=4, embed_dim=32, depths=(1, 1))
    model.load_state_dict(trained.fused().state_dict())
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
    torch.testing.assert_close(other.eval()(X), fused(X))
    other.load_state_dict(net.state_dict(), strict=strict)
    assert type(other) is AetherNet
    torch.testing.assert_close(other.eval()(X), net(X))


def test_a_network_built_fused_takes_a_training_checkpoint() -> None:
    net = small_net(2, img_range=255.0).float()
    fused = FusedAetherNet(scale=2, embed_dim=24, depths=(1, 2), img_range=255.0)
    fused.load_state_dict(net.state_dict())
    assert type(fused) is AetherNet
    torch.testing.assert_close(fused.eval()(X), net(X))


def test_a_container_loads_either_form_too() -> None:
    net = small_net(2).float()
    container = nn.Sequential(AetherNet(**net.options))
    container.load_state_dict({f"0.{name}": value for name, value in net.fused().state_dict().items()})
    torch.testing.assert_close(container.eval()(X), net.fused()(X))


@pytest.mark.parametrize("form", ["training", "fused", "quantised", "int8"])
def test_every_form_loads_into_every_other(form: str) -> None:
    def built(name: str) -> Any:
        net: Any = small_net(2, use_channel_attn=False, use_spatial_attn=False).float()
        if name != "training":
            net.fuse_model()
        if name in ("quantised", "int8"):
            net.prepare_qat(calibration=[X])
        return net.eval().convert_to_quantized() if name == "int8" else net.eval()

    source = built(form)
    for target in ("training", "fused", "quantised", "int8"):
        net = built(target)
        net.load_state_dict(source.state_dict())
        if isinstance(net, QuantAetherNet) and form in ("training", "fused"):
            continue  # a quantised network takes float weights in and stays quantised: test_quant.py
        assert type(net) is type(source)
        torch.testing.assert_close(net.eval()(X), source(X), msg=f"{form} into {target}")


BROKEN: Dict[str, Dict[str, Any]] = {
    "another scale": {"scale": 4},
    "another width": {"embed_dim": 48},
    "more blocks": {"depths": (2, 2)},
    "attention": {"use_spatial_attn": False},
}


@pytest.mark.parametrize("target", ["training", "fused"])
@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_load_that_does_not_fit_changes_nothing(broken: str, form: str, target: str) -> None:
    other = small_net(**{"scale": 2, **BROKEN[broken]}).float()  # type: ignore[arg-type]
    state = (other if form == "training" else other.fused()).state_dict()
    net: Any = small_net(2, bound=BOUND).float()
    if target == "fused":
        net.fuse_model()
    kind, before = type(net), values(net)
    with pytest.raises(RuntimeError, match="stays as it was") as error:
        net.load_state_dict(state)
    assert_unchanged(net, kind, before)
    assert net.options["bound"] == BOUND
    if broken == "another scale":
        assert "x2 stays" in str(error.value)
        assert "x4 does not fit" in str(error.value)
        assert ".weight" in str(error.value)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_damaged_file_of_either_form_changes_nothing_and_is_named(change: str) -> None:
    for source in (small_net(2).float(), small_net(2).float().fused()):
        state = dict(source.state_dict())
        name = "fusion_convs.0.weight"
        if change == "missing":
            del state[name]
        elif change == "unexpected":
            name = "surplus"
        state.update(
            {"shape": {name: torch.zeros(1, 2)}, "unexpected": {name: torch.zeros(1)}}.get(change, {})
        )
        net = AetherNet(**source.options)
        before = values(net)
        with pytest.raises(RuntimeError, match=name):
            net.load_state_dict(state)
        assert_unchanged(net, AetherNet, before)


def test_weights_of_another_network_are_refused_without_a_change() -> None:
    net = small_net(2)
    before = values(net)
    for state in (nn.Conv2d(3, 3, 3).state_dict(), {}, {"conv_first.weight": net.conv_first.weight * 2}):
        with pytest.raises(RuntimeError, match=r"fuse_aether\.py reads other layouts"):
            net.load_state_dict(state)
        assert_unchanged(net, AetherNet, before)


def test_what_does_not_fit_is_counted_and_the_first_three_names_are_said() -> None:
    net, long = small_net(2), "a" * 99
    state = {name: value for name, value in net.state_dict().items() if "1.1.conv." not in name}
    state = {**state, long: X, "b": X, "c": X, "conv_last.bias": X}
    assert differences(net, state) == (
        "missing: 4 (stages.1.1.conv.lk_bias, stages.1.1.conv.lk_conv.weight, stages.1.1.conv.sk_bias, ...); "
        f"of another shape: 1 (conv_last.bias); unexpected: 3 ({long[:80]}, b, c)"
    )
    assert differences(net, state, strict=False) == "of another shape: 1 (conv_last.bias)"
    assert differences(net, {**net.state_dict(), "bound": X}) == "", "a bound may come and go"


def test_the_scale_is_read_from_the_tensors_that_upsample() -> None:
    options: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
    for scale in aether_arch.SCALES:
        for form in (AetherNet, FusedAetherNet):
            assert scale_of(form(scale=scale, **options).state_dict()) == scale
    state = small_net(2).state_dict()
    assert scale_of({}) is None
    assert scale_of({**state, "upsample.blocks.0.weight": torch.zeros(25 * 32, 24, 3, 3)}) is None
    assert scale_of({**state, **{f"upsample.blocks.{2 * k}.weight": X for k in range(4)}}) is None


@pytest.mark.parametrize("scales", [(2, 4), (2, 3), (4, 2), (1, 8)])
def test_another_scale_takes_the_body_where_strict_is_off_and_says_so(scales: Any) -> None:
    source, net = small_net(scales[0]), small_net(scales[1])
    randomize(net, 1)
    before = values(net)
    with pytest.warns(UserWarning, match=f"x{scales[1]} loads only the body of x{scales[0]} weights"):
        net.load_state_dict(source.state_dict(), strict=False)
    for name, value in net.state_dict().items():
        tail = name.startswith(("upsample.", "conv_last."))
        assert torch.equal(value, before[name] if tail else source.state_dict()[name]), name


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.nn.Sequential])
def test_strict_is_what_was_asked_for_inside_a_wrapper_too(wrapper: Any) -> None:
    source, wrapped = wrapper(small_net(2)), wrapper(randomize(small_net(4), 1))
    before = values(wrapped)
    with pytest.raises(RuntimeError, match="x2 does not fit"):
        wrapped.load_state_dict(source.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in values(wrapped).items())
    with pytest.warns(UserWarning, match="x4 loads only the body of x2 weights"):
        wrapped.load_state_dict(source.state_dict(), strict=False)
    assert any(not torch.equal(value, before[name]) for name, value in values(wrapped).items())
    state = source.state_dict()
    (gone,) = [name for name in state if name.endswith("conv_last.bias")]
    del state[gone]
    assert source.load_state_dict(state, strict=False).missing_keys == [gone]


def test_traiNNer_redux_finds_the_names_it_compares_after_map_state_dict() -> None:
    net = small_net(2).float()
    other, state = AetherNet(**net.options), dict(net.fused().state_dict())
    assert other.map_state_dict(state) is state
    assert state.keys() == other.state_dict().keys()
    body = dict(small_net(4).state_dict())
    with pytest.warns(UserWarning, match="its tail is new"):
        AetherNet(**net.options).map_state_dict(body)
    assert not any(name.startswith(("upsample.", "conv_last.")) for name in body)
    with pytest.raises(RuntimeError, match="x4 does not fit"):
        AetherNet(**net.options).map_state_dict(dict(small_net(4).fused().state_dict()))


@pytest.mark.parametrize("lost", ["mean", "fusion.bias", "tail.weight"])
def test_an_incomplete_file_of_another_form_leaves_the_network_as_it_was(lost: str) -> None:
    net = small_net(2).float()
    before, state = values(net), dict(net.fused().state_dict())
    del state[lost]
    for load in (net.map_state_dict, net.load_state_dict):
        with pytest.raises(RuntimeError, match=f"stays as it was: .*missing: 1 \\({lost}\\)"):
            load(dict(state))
        assert type(net) is AetherNet
        assert all(torch.equal(value, before[name]) for name, value in values(net).items())


@pytest.mark.parametrize("batch", [False, True])
def test_a_training_goes_on_with_the_kind_of_norm_that_its_checkpoint_had(batch: bool) -> None:
    source = AetherNet(embed_dim=16, depths=(1,), norm="batch" if batch else "frozen").train()
    source(torch.rand(2, 3, 8, 8))
    for norm in (None, "frozen", "batch"):
        net = AetherNet(embed_dim=16, depths=(1,), norm=norm)
        net.load_state_dict(source.state_dict())
        found = {module.batch for module in net.modules() if isinstance(module, DeploymentNorm)}
        assert found == {norm == "batch" or (norm is None and batch)}


def test_the_file_decides_whether_a_network_is_bounded() -> None:
    sources = {bound: small_net(2, bound=bound) for bound in (None, BOUND)}
    x = X.double()
    for bound, source in sources.items():
        for built in (None, BOUND, 4.0):
            for form in (source, source.fused()):
                net = small_net(2, bound=built)
                net.map_state_dict(dict(form.state_dict()))  # as traiNNer-redux does first
                assert net.state_dict().keys() == form.state_dict().keys()
                net.load_state_dict(form.state_dict(), strict=True)
                assert net.options["bound"] == bound
                assert float((net.eval()(x) - source(x)).detach().abs().max()) <= 1e-9


def test_loading_leaves_every_parameter_the_object_that_an_optimizer_holds() -> None:
    forms: Tuple[Callable[..., Any], ...] = (lambda net: net, lambda net: net.fused())
    for form in forms:
        net = form(small_net(2, bound=4.0))
        before = dict(net.named_parameters())
        net.load_state_dict(form(small_net(2, bound=None)).state_dict(), strict=True)
        after = dict(net.named_parameters())
        assert list(before) == list(after)
        assert all(after[name] is before[name] for name in after)


def test_the_order_of_the_parameters_is_the_one_that_optimizer_states_were_saved_in() -> None:
    names = [name for name, _ in small_net(2, depths=(1,)).named_parameters()]
    block = [
        "conv.lk_bias",
        "conv.sk_bias",
        "conv.lk_conv.weight",
        "conv.sk_conv.weight",
        "norm.weight",
        "norm.bias",
    ]
    block += ["ffn.temperature"]
    block += [f"ffn.conv_{part}.{kind}" for part in ("gate", "main", "out") for kind in ("weight", "bias")]
    block += ["channel_attn.fc.0.weight", "channel_attn.fc.2.weight", "spatial_attn.conv.weight"]
    rest = ["fusion_convs.0.weight", "fusion_convs.0.bias", "quant_fusion_layer.error_comp"]
    rest += [
        "quant_fusion_layer.fusion_conv.weight",
        "quant_fusion_layer.fusion_conv.bias",
        "norm.weight",
        "norm.bias",
    ]
    layers = ("conv_after_body", "conv_before_upsample.0", "upsample.blocks.0", "conv_last")
    rest += [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert names == ["conv_first.weight", "conv_first.bias", *(f"stages.0.0.{name}" for name in block), *rest]


def test_training_the_fused_form_is_said_once() -> None:
    net = small_net(2).float()
    other = AetherNet(**net.options)
    other.load_state_dict(net.fused().state_dict())
    with pytest.warns(UserWarning, match="fused form"):
        other.train()(X).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(X).sum().backward()
        net.fused()(X)


def test_forward_hooks_and_foreign_attributes_survive_a_change_of_form() -> None:
    net, seen = small_net(2).float(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    net.hyperparameters = {"scale": 2}
    net.fuse_model()(X)
    assert seen == [FusedAetherNet]
    assert net.hyperparameters == {"scale": 2}
    assert not hasattr(copy.deepcopy(net), "placement")


def test_a_form_leaves_nothing_of_its_own_behind() -> None:
    net: Any = small_net(2).float()
    net.norm.weight.data[0, 3] = 0.0
    net.fuse_model()
    assert net.keep_norm
    net.prepare_qat(placement="full", calibration=[X])
    assert (net.placement, net.is_int8) == ("full", False)
    net.load_state_dict(net.convert_to_quantized().state_dict())
    assert net.is_int8
    net.fuse_model()
    assert not hasattr(net, "placement")
    assert not hasattr(net, "is_int8")
    state = small_net(2).state_dict()
    net.load_state_dict(state)
    assert not hasattr(net, "keep_norm")


@pytest.mark.parametrize("placement", aether_quant.PLACEMENTS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_quantised_file_with_one_range_for_all_channels_loads_into_every_form(
    placement: str, wrapped: bool
) -> None:
    source: Any = small_net(2).float().fused().prepare_qat(placement, [X])
    widest = source.body_conv.quant_out.range_sum
    widest.data.fill_(float(widest.max()))
    state = {**source.state_dict(), "body_conv.quant_out.range_sum": widest[:1].clone()}
    for net in (small_net(2).float(), small_net(2).float().fused(), small_net(2).float().prepare_qat()):
        container = nn.Sequential(net)
        if wrapped:
            container.load_state_dict({f"0.{name}": value for name, value in state.items()})
        else:
            net.load_state_dict(dict(state))
        assert type(net) is QuantAetherNet
        torch.testing.assert_close(net.eval()(X), source.eval()(X))


@pytest.mark.parametrize("call", ["aether_small(qat=True)", "aether_small().prepare_qat()", "load(int8)"])
def test_without_aether_quant_one_line_names_the_file(call: str, tmp_path: Path) -> None:
    (tmp_path / "aether_arch.py").write_bytes((ROOT / "archs" / "aether_arch.py").read_bytes())
    state = {"stages.0.0.reparam_conv.weight": X, "stages.0.0.reparam_conv.quant_out.range_sum": X}
    torch.save(state, tmp_path / "int8.pth")
    code = f"""
import torch
from aether_arch import aether_small
def load(name): aether_small().load_state_dict(torch.load("int8.pth", weights_only=True))
int8 = "int8"
try: {call}
except ImportError as error: print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (
        run.stdout.strip()
        == f"aether_quant is missing: copy aether_quant.py beside {tmp_path / 'aether_arch.py'}."
    )


def test_alone_the_file_imports_no_other_package_and_names_aethersr_where_it_is_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "aether_arch.py").write_bytes((ROOT / "archs" / "aether_arch.py").read_bytes())
    code = """
import sys, aether_arch
names = {'basicsr', 'neosr', 'traiNNer', 'onnx', 'onnxruntime', 'safetensors', 'aethersr', 'aether_quant'}
print(names & set(sys.modules))
try: from aether_arch import export_onnx
except ImportError as error: print(error)
"""
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}){code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert lines == ["set()", "aethersr.onnx is missing: pip install . in AetherNet's folder."]


def test_what_lives_in_another_file_is_found_under_its_name() -> None:
    for name in ("QuantAetherNet", "Quantizer", "PLACEMENTS", "TARGETS"):
        assert getattr(aether_arch, name) is getattr(aether_quant, name)
    assert aether_arch.aether_from_state_dict is aether_from_state_dict
    assert aether_arch.export_onnx is export_onnx
    with pytest.raises(AttributeError, match="has no attribute 'aether_tiny'"):
        _ = aether_arch.aether_tiny


def test_qat_may_name_what_is_quantised() -> None:
    for qat, placement in ((True, "default"), ("full", "full")):
        net = aether_small(scale=2, embed_dim=24, depths=(1,), qat=qat)
        assert (type(net), net.placement) == (QuantAetherNet, placement)


def test_a_quantised_network_is_refused_what_does_not_fit_and_stays_as_it_was() -> None:
    net = aether_small(scale=2, embed_dim=24, depths=(1, 2), qat=True)
    before = values(net)
    for state in (small_net(4).state_dict(), small_net(2).fused().state_dict()):
        with pytest.raises(RuntimeError, match="stays as it was"):
            net.load_state_dict(state)
        assert_unchanged(net, QuantAetherNet, before)
