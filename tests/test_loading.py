"""A network takes the form of the file that it loads, whole or not at all; strict=False is torch's own."""

from __future__ import annotations

import copy
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List

import aether_arch
import aether_quant
import pytest
import torch
from aether_arch import (
    AetherNet,
    DeploymentNorm,
    FusedAetherNet,
    aether_medium,
    described,
    differences,
    scale_of,
)
from aether_quant import QuantAetherNet
from conftest import ROOT, randomize, small_net
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(1))
BOUND = 0.75
TAIL = ("upsample.", "conv_last.")


def values(net: nn.Module) -> Dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(net: nn.Module, before: Dict[str, Tensor]) -> bool:
    after = net.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def assert_refused(net: Any, load: Callable[[], Any], match: str) -> None:
    """Loading raises, and changes neither form, tensors nor options."""
    form, before, options = type(net), values(net), copy.deepcopy(getattr(net, "options", None))
    with pytest.raises(RuntimeError, match=match):
        load()
    assert type(net) is form
    assert same(net, before)
    assert getattr(net, "options", None) == options


PLAIN = {"use_channel_attn": False, "use_spatial_attn": False, "embed_dim": 16, "lk_kernel": 3}


def in_form(name: str, **options: Any) -> Any:
    net: Any = small_net(2, **{**PLAIN, **options}).float()
    if name != "training":
        net.fuse_model()
    if name in ("quantised", "int8"):
        net.prepare_qat(calibration=[X])
    return net.eval().convert_to_quantized() if name == "int8" else net.eval()


FORMS = ("training", "fused", "quantised", "int8")


# ------------------------------------------------------------------------------------------- what is taken


def test_fused_weights_load_into_a_new_network_as_the_seed_shows() -> None:
    trained = randomize(aether_medium(scale=4, embed_dim=32, depths=(1, 1))).eval()
    model = aether_medium(scale=4, embed_dim=32, depths=(1, 1))
    model.load_state_dict(trained.fused().state_dict())
    model.eval()
    model.fuse_model()
    with torch.no_grad():
        assert float((model(X) - trained(X)).abs().max()) <= 1e-5 * float(trained(X).abs().max())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_into_every_other(form: str, wrapped: bool, strict: bool) -> None:
    source, prefix = in_form(form), "0." if wrapped else ""
    state = {**source.state_dict(), **({} if strict else {"surplus": X, "step": 3})}
    for target in FORMS:
        net = in_form(target)
        given = {prefix + name: value for name, value in state.items()}
        found = (nn.Sequential(net) if wrapped else net).load_state_dict(given, strict=strict)
        assert not found.missing_keys
        if isinstance(net, QuantAetherNet) and form in ("training", "fused"):
            continue  # a quantised network takes float weights in and stays quantised: test_quant.py
        assert type(net) is type(source)
        torch.testing.assert_close(net.eval()(X), source(X), msg=f"{form} into {target}")


def test_a_file_with_img_range_brings_it_and_an_older_one_leaves_the_option() -> None:
    source = small_net(2, img_range=255.0).float()
    state = source.state_dict()
    assert float(state["img_range"]) == 255
    assert "img_range" not in {**small_net(2).state_dict(), **source.fused().state_dict()}
    older = {name: value for name, value in state.items() if name != "img_range"}
    new, plain = AetherNet(**source.options), AetherNet(**{**source.options, "img_range": 1.0})
    new.map_state_dict(given := dict(older))  # as traiNNer-redux does before it compares names
    assert given.keys() == new.state_dict().keys()
    for other, file in ((plain, state), (source.fused(), state), (new, older)):
        other.load_state_dict(file)
        torch.testing.assert_close(other.eval()(X), source(X))


@pytest.mark.parametrize("batch", [False, True])
def test_a_training_goes_on_with_the_kind_of_norm_that_its_checkpoint_had(batch: bool) -> None:
    source = AetherNet(embed_dim=16, depths=(1,), norm="batch" if batch else "frozen").train()
    source(torch.rand(2, 3, 8, 8))
    for norm in (None, "frozen", "batch"):
        net = AetherNet(embed_dim=16, depths=(1,), norm=norm)
        net.load_state_dict(source.state_dict())
        found = {module.batch for module in net.modules() if isinstance(module, DeploymentNorm)}
        assert found == {norm == "batch" or (norm is None and batch)}


def test_a_whole_file_decides_about_the_bound_and_a_log_says_when_it_takes_it_away(caplog: Any) -> None:
    sources = {bound: small_net(2, bound=bound) for bound in (None, BOUND)}
    for bound, source in sources.items():
        for built in (None, BOUND, 4.0):
            for form in (source, source.fused()):
                caplog.clear()
                net = small_net(2, bound=built)
                net.map_state_dict(dict(form.state_dict()))  # as traiNNer-redux does first
                assert net.state_dict().keys() == form.state_dict().keys()
                net.load_state_dict(form.state_dict(), strict=True)
                assert net.options["bound"] == bound
                assert float((net.eval()(X.double()) - source(X.double())).detach().abs().max()) <= 1e-9
                gone = built is not None and bound is None and form is source
                assert (f"no bound; the option's, {built}, goes" in caplog.text) == gone


def test_loading_leaves_every_parameter_the_object_that_an_optimizer_holds() -> None:
    for form in ("training", "fused"):
        net = in_form(form, bound=4.0)
        before = dict(net.named_parameters())
        net.load_state_dict(in_form(form).state_dict(), strict=True)
        assert [*before] == [name for name, value in net.named_parameters() if value is before[name]]


def test_the_order_of_the_parameters_is_the_one_that_optimizer_states_were_saved_in() -> None:
    block = "conv.lk_bias conv.sk_bias conv.lk_conv.weight conv.sk_conv.weight norm.weight norm.bias"
    block += " ffn.temperature ffn.conv_gate ffn.conv_main ffn.conv_out"
    block += " channel_attn.fc.0.weight channel_attn.fc.2.weight spatial_attn.conv.weight"
    names = "conv_first " + " ".join(f"stages.0.0.{name}" for name in block.split())
    names += " fusion_convs.0 quant_fusion_layer.error_comp quant_fusion_layer.fusion_conv"
    names += " norm.weight norm.bias conv_after_body conv_before_upsample.0 upsample.blocks.0 conv_last"
    expected: List[str] = []
    for name in names.split():
        alone = name.endswith(("weight", "bias", "temperature", "error_comp"))
        expected += [name] if alone else [f"{name}.weight", f"{name}.bias"]
    assert [name for name, _ in small_net(2, depths=(1,)).named_parameters()] == expected


# ---------------------------------------------------------------------------------- what is refused, and how

BROKEN: Dict[str, Dict[str, Any]] = {
    "another scale": {"scale": 4},
    "another width": {"embed_dim": 48},
    "more blocks": {"depths": (2, 2)},
    "attention": {"use_spatial_attn": False},
}


@pytest.mark.parametrize("target", ["training", "fused", "quantised"])
@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_load_that_does_not_fit_changes_nothing(broken: str, form: str, target: str) -> None:
    other = small_net(**{"scale": 2, **BROKEN[broken]}).float()  # type: ignore[arg-type]
    state = (other if form == "training" else other.fused()).state_dict()
    net: Any = small_net(2, bound=BOUND).float()
    if target != "training":
        net = net.fused() if target == "fused" else net.prepare_qat(calibration=[X])
    for load in (net.load_state_dict, net.map_state_dict):
        assert_refused(net, lambda load=load: load(dict(state)), "stays as it was: the file is")


OPTIONS = "Build the network with the options that the file was trained with."
STRICT = "To take only the body, pass strict=False; in a template, set strict_load_g: false"


SMALL, MEDIUM, OWN = (96, (4, 4, 4, 4)), (128, (6, 6, 6, 6)), (96, (1, 2, 2, 3))


@pytest.mark.parametrize(
    ("scale", "shape", "words", "remedy"),
    [
        (2, SMALL, "aether_small x2 (96 wide)", OPTIONS),
        (4, MEDIUM, "aether_medium x4 (128 wide)", STRICT),
        (2, OWN, "AetherNet of depths [1, 2, 2, 3] x2 (96 wide)", OPTIONS),
    ],
)
def test_a_refusal_says_what_the_file_is_what_the_network_is_and_what_mends_it(
    scale: int, shape: Any, words: str, remedy: str
) -> None:
    with torch.device("meta"):
        state = AetherNet(scale=scale, lk_kernel=3, embed_dim=shape[0], depths=shape[1]).state_dict()
        net = aether_medium(scale=2, lk_kernel=3)
    with pytest.raises(RuntimeError) as error:
        net.load_state_dict({**state, "bound": torch.ones(1)})
    expected = f"the file is {words}, the network aether_medium x2 (128 wide); tensors "
    assert expected in str(error.value)
    assert str(error.value).endswith(remedy)


def test_networks_are_described_in_words() -> None:
    net = small_net(2)
    assert described(net.fused().state_dict()) == "fused AetherNet of depths [1, 2] x2 (24 wide)"
    assert described(in_form("int8").state_dict()).startswith("quantised AetherNet of depths [1, 2] x2")
    assert described({}) == described({"conv_first.weight": X}) == "no AetherNet"


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "number", "bound"])
@pytest.mark.parametrize("form", ["training", "fused"])
def test_a_damaged_file_of_either_form_changes_nothing_and_is_named(change: str, form: str) -> None:
    source = in_form(form)
    name = {"unexpected": "surplus", "bound": "bound"}.get(change, "fusion_convs.0.weight")
    changed: Dict[str, Any] = {"unexpected": X, "shape": X[0], "number": 3, "bound": torch.ones(2)}
    state = {key: value for key, value in source.state_dict().items() if key != name}
    if change in changed:
        state[name] = changed[change]
    net = AetherNet(**source.options)
    assert_refused(net, lambda: net.load_state_dict(dict(state)), name)
    prefixed = {f"0.{key}": value for key, value in state.items()}
    assert_refused(net, lambda: nn.Sequential(net).load_state_dict(prefixed), name)


def test_weights_of_another_network_are_refused_without_a_change() -> None:
    net = small_net(2)
    for state in (nn.Conv2d(3, 3, 3).state_dict(), {}, {"conv_first.weight": net.conv_first.weight * 2}):
        match = r"the file is no AetherNet.*fuse_aether\.py reads other"
        assert_refused(net, lambda state=state: net.load_state_dict(state), match)


def test_what_does_not_fit_is_counted_and_the_first_three_names_are_said() -> None:
    net, long = small_net(2), "a" * 99
    state = {name: value for name, value in net.state_dict().items() if "1.1.conv." not in name}
    state = {**state, long: X, "b": X, "c": X, "conv_last.bias": X}
    assert differences(net, state) == (
        "missing: 4 (stages.1.1.conv.lk_bias, stages.1.1.conv.lk_conv.weight, stages.1.1.conv.sk_bias, ...); "
        f"of another shape: 1 (conv_last.bias); unexpected: 3 ({long[:80]}, b, c)"
    )
    assert differences(net, state, ("missing", "unexpected")) == "of another shape: 1 (conv_last.bias)"
    assert differences(net, {**net.state_dict(), "bound": X}) == "", "a bound may come and go"


def test_the_scale_is_read_from_the_tensors_that_upsample() -> None:
    for scale in aether_arch.SCALES:
        for form in (AetherNet, FusedAetherNet):
            net = form(scale=scale, embed_dim=8, depths=(1,), lk_kernel=3)
            assert scale_of(net.state_dict()) == scale
    state = small_net(2).state_dict()
    fifth = {"upsample.blocks.0.weight": torch.zeros(25 * 32, 24, 3, 3)}
    sixteenth = {f"upsample.blocks.{2 * k}.weight": X for k in range(4)}
    assert {scale_of({}), scale_of({**state, **fifth}), scale_of({**state, **sixteenth})} == {None}


# ----------------------------------------------------------------------------------------------- strict=False


def loaded_by_torch(net: AetherNet, state: Dict[str, Any]) -> Dict[str, Tensor]:
    """What a network without a loader of its own has after loading ``state`` with strict=False."""
    plain = nn.Module()
    plain.__dict__.update({key: value for key, value in vars(copy.deepcopy(net)).items() if key[0] == "_"})
    plain.load_state_dict(state, strict=False)
    return plain.state_dict()


def misfits_renamed(net: nn.Module, state: Dict[str, Any]) -> Dict[str, Any]:
    """As BasicSR and traiNNer-redux do it without strict."""
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    fits = {name: shapes.get(name, value.shape) == value.shape for name, value in state.items()}
    return {name if fits[name] else f"{name}.ignore": value for name, value in state.items()}


def without(state: Dict[str, Any], *words: str) -> Dict[str, Any]:
    return {name: value for name, value in state.items() if not any(word in name for word in words)}


OTHERS: Dict[str, Dict[str, Any]] = {"in_chans": {"in_chans": 1}, "small into medium": {"embed_dim": 32}}


@pytest.mark.parametrize("part", ["stages", "extra int", "damaged fused", *OTHERS])
@pytest.mark.parametrize("wrapper", [nn.Identity, nn.Sequential, nn.DataParallel, torch.compile])
def test_strict_false_means_what_it_means_in_torch(part: str, wrapper: Any) -> None:
    net, source = (
        randomize(small_net(2, bound=BOUND).float(), 1),
        small_net(2, **OTHERS.get(part, {})).float(),
    )
    state: Dict[str, Any] = misfits_renamed(net, source.state_dict())
    if part == "stages":
        state = {name: value for name, value in state.items() if name.startswith("stages.")}
    elif part == "extra int":
        state = {"global_step": 7, **without(state, "norm")}
    elif part == "damaged fused":
        state = without(source.fused().state_dict(), "head.weight", "fusion.bias", "tail.", "stages.")
    before, expected = values(net), loaded_by_torch(net, state)
    whole = net if wrapper is nn.Identity else wrapper(net)
    prefix = next(iter(whole.state_dict()))[: -len(next(iter(before)))]
    whole.load_state_dict({prefix + name: value for name, value in state.items()}, strict=False)
    assert same(net, expected)
    assert net.options["bound"] == BOUND
    assert not same(net, before)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("scales", [(2, 4), (2, 3), (4, 2), (1, 8)])
def test_another_scale_takes_the_body_and_says_so(scales: Any, ignored: bool, caplog: Any) -> None:
    source, net = small_net(scales[0]), randomize(small_net(scales[1], bound=BOUND), 1)
    before, state = values(net), source.state_dict()
    net.load_state_dict(misfits_renamed(net, state) if ignored else dict(state), strict=False)
    assert f"x{scales[1]} takes only the body of x{scales[0]} weights; its tail is new" in caplog.text
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(TAIL) else state[name]), name
    assert net.options["bound"] is None, "the body's"


@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.Sequential, torch.compile])
def test_strict_is_what_was_asked_for_inside_a_wrapper_too(wrapper: Any, caplog: Any) -> None:
    source, wrapped = wrapper(small_net(2)), wrapper(randomize(small_net(4), 1))
    before, state = values(wrapped), source.state_dict()
    assert_refused(wrapped, lambda: wrapped.load_state_dict(source.state_dict()), "set strict_load_g: false")
    assert not caplog.text, "nothing is announced that is then refused"
    wrapped.load_state_dict(source.state_dict(), strict=False)
    assert not same(wrapped, before)
    (gone,) = [name for name in state if name.endswith("conv_last.bias")]
    del state[gone]
    assert source.load_state_dict(state, strict=False).missing_keys == [gone]


def test_traiNNer_redux_finds_the_names_it_compares_after_map_state_dict(caplog: Any) -> None:
    def compare_names(state: Dict[str, Tensor], strict: bool) -> AetherNet:
        net = AetherNet(**options)  # it has a variable `strict`, and passes it to load_state_dict
        assert net.map_state_dict(state) is state
        return net

    options = small_net(2).options
    fused, body = small_net(2).fused().state_dict(), dict(small_net(4).state_dict())
    assert compare_names(fused, True).state_dict().keys() == fused.keys()
    compare_names(body, False)
    assert "its tail is new" in caplog.text
    assert not any(name.startswith(TAIL) for name in body)
    caplog.clear()
    for source, strict in ((small_net(4), True), (small_net(4).fused(), True), (small_net(4).fused(), False)):
        # Without strict, only the few tensors that a fused file has in common would be taken.
        with pytest.raises(RuntimeError, match=r"stays as it was: .* x4 .*, the network AetherNet .* x2"):
            compare_names(dict(source.state_dict()), strict)
    assert not caplog.text


# ------------------------------------------------------------------------------------------- a change of form


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


def test_hooks_and_foreign_attributes_survive_a_change_of_form() -> None:
    net, seen = small_net(2).float(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    net.register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    net.hyperparameters = {"scale": 2}
    net.fuse_model()(X.requires_grad_()).sum().backward()
    X.requires_grad_(False)
    assert seen == [FusedAetherNet, "backward"]
    assert net.hyperparameters == {"scale": 2}
    assert not hasattr(copy.deepcopy(net), "is_int8")


@pytest.mark.parametrize("change", ["fuse", "prepare_qat", "load"])
def test_what_is_frozen_stays_frozen_in_another_form(change: str, caplog: Any) -> None:
    net: Any = small_net(2).float()
    for part in (net.stages, net.conv_first.bias, net.upsample):  # conv_last, which joins it, is trained
        part.requires_grad_(False)
    fused = small_net(2).float().fused().state_dict()
    changes = {"fuse": net.fuse_model, "prepare_qat": net.prepare_qat}
    changes.get(change, lambda: net.load_state_dict(fused))()
    for name, value in net.named_parameters():
        state = name.endswith((".range_sum", ".watched"))
        assert value.requires_grad != (state or name == "head.bias" or name.startswith("stages.")), name
    assert "merged with others, no longer frozen: tail.weight." in caplog.text
    if change == "fuse":
        net.load_state_dict(small_net(2).state_dict())
        for name, value in net.named_parameters():
            assert value.requires_grad != name.startswith(("stages.", "conv_first.bias")), name


def test_a_form_leaves_nothing_of_its_own_behind() -> None:
    net: Any = small_net(2).float()
    net.norm.weight.data[0, 3] = 0.0
    net.fuse_model()
    assert net.keep_norm
    net.prepare_qat(calibration=[X])
    assert not net.is_int8
    net.load_state_dict(net.convert_to_quantized().state_dict())
    assert net.is_int8
    net.fuse_model()
    assert not hasattr(net, "is_int8")
    assert all(value.requires_grad for value in net.parameters())
    net.load_state_dict(small_net(2).state_dict())
    assert not hasattr(net, "keep_norm")


def test_arguments_of_the_other_forms_have_names() -> None:
    with pytest.raises(TypeError):
        FusedAetherNet(2)  # type: ignore[misc]


# -------------------------------------------------------------------------------------------- other files

BESIDE = "aether_quant is missing: copy aether_quant.py beside {folder}/aether_arch.py."
ALONE = {
    "aether_small(qat=True)": BESIDE,
    "aether_small().prepare_qat()": BESIDE,
    "aether_small().load_state_dict(torch.load('int8.pth', weights_only=True))": BESIDE,
    "aether_arch.export_onnx": "aethersr.onnx is missing: pip install . in AetherNet's folder.",
}


def test_alone_the_file_imports_no_other_package_and_names_what_it_is_asked_for(tmp_path: Path) -> None:
    shutil.copy(ROOT / "archs" / "aether_arch.py", tmp_path)
    state = {"stages.0.0.reparam_conv.weight": X, "stages.0.0.reparam_conv.quant_out.range_sum": X}
    torch.save(state, tmp_path / "int8.pth")
    code = """
import sys; sys.path.insert(0, '.')
import aether_arch, torch; from aether_arch import aether_small
names = {'basicsr', 'neosr', 'traiNNer', 'onnx', 'onnxruntime', 'safetensors', 'aethersr', 'aether_quant'}
print(names & set(sys.modules))
"""
    for call in ALONE:
        code += f"try: {call}\nexcept ImportError as error: print(error)\n"
    printed = subprocess.check_output([sys.executable, "-I", "-c", code], cwd=tmp_path, text=True)
    expected = [text.format(folder=tmp_path) for text in ALONE.values()]
    assert printed.replace("/./", "/").splitlines() == ["set()", *expected]


def test_what_lives_in_another_file_is_found_under_its_name() -> None:
    from aethersr.identify import aether_from_state_dict
    from aethersr.onnx import export_onnx

    for name in ("QuantAetherNet", "Quantizer"):
        assert getattr(aether_arch, name) is getattr(aether_quant, name)
    assert aether_arch.aether_from_state_dict is aether_from_state_dict
    assert aether_arch.export_onnx is export_onnx
    with pytest.raises(AttributeError, match="has no attribute 'aether_tiny'"):
        _ = aether_arch.aether_tiny


def test_messages_go_to_the_frameworks_own_log() -> None:
    assert aether_arch.log is logging.getLogger("aether_arch")
