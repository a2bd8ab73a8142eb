"""A network takes the form of the file that it loads, whole or not at all; strict=False is torch's own."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List

import pytest
import torch
from aether_arch import AetherNet, DeploymentNorm, aether_medium
from aether_quant import QuantAetherNet
from conftest import PLAIN, X, in_form, randomize, small_net
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("training", "fused", "quantised", "int8")
BOUND = 0.75
TAIL = ("upsample.", "conv_last.")


def values(net: nn.Module) -> Dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(net: nn.Module, before: Dict[str, Tensor]) -> bool:
    after = net.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def assert_refused(net: Any, load: Callable[[], Any], match: str) -> None:
    """Loading raises, and changes neither form, tensors nor options."""
    form, before, options = type(net), values(net), copy.deepcopy(getattr(net, "options", None))
    with pytest.raises(RuntimeError, match=match):
        load()
    assert type(net) is form
    assert same(net, before)
    assert getattr(net, "options", None) == options


# ------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_into_every_other(form: str, strict: bool) -> None:
    source, wrapped = in_form(form), strict
    prefix = "0." if wrapped else ""
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


@pytest.mark.parametrize("value", [255.0, 0.7, 1e5])
def test_a_file_with_img_range_brings_it_and_an_older_one_leaves_the_option(value: float) -> None:
    source = in_form("training", img_range=value, bound=value)
    state = source.state_dict()
    for name in ("img_range", "bound"):
        assert float(state[name]) == pytest.approx(value, rel=1e-7)
        # half precision rounds 0.7, and 1e5 is beyond it
        assert float(copy.deepcopy(source).half().state_dict()[name]) == pytest.approx(value, rel=1e-7)
    assert "img_range" not in {**in_form("training").state_dict(), **source.fused().state_dict()}
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
    sources = {bound: in_form("training", bound=bound) for bound in (None, BOUND)}
    for bound, source in sources.items():
        for built in (None, BOUND, 4.0):
            for form in (source, source.fused()):
                caplog.clear()
                net = in_form("training", bound=built)
                net.map_state_dict(dict(form.state_dict()))  # as traiNNer-redux does first
                assert net.state_dict().keys() == form.state_dict().keys()
                net.load_state_dict(form.state_dict(), strict=True)
                assert net.options["bound"] == bound
                torch.testing.assert_close(net.eval()(X), source(X))
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

KINDS = {"training": "", "fused": "fused ", "quantised": "quantised "}
OTHERS: Any = ({"scale": 4}, {"embed_dim": 32}, {"depths": (2, 2)}, {"use_spatial_attn": True})


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_load_that_does_not_fit_changes_nothing(other: Dict[str, Any], target: str) -> None:
    net = in_form(target, bound=BOUND)
    for form in ("training", "fused"):
        state = in_form(form, **other).state_dict()
        words = f"as it was: the file is {KINDS[form]}AetherNet .*, the network {KINDS[target]}AetherNet "
        for load in (net.load_state_dict, net.map_state_dict):
            assert_refused(net, lambda load=load: load(dict(state)), words)  # noqa: B023


OPTIONS = "Build the network with the options that the file was trained with."
STRICT = "To take only the body, pass strict=False; in a template, set strict_load_g: false"


MEDIUM = "128 wide, channel attention, spatial attention"
ELEVEN: Any = {**PLAIN, "embed_dim": 99, "depths": (1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 3)}
SMALL: Any = {**PLAIN, "embed_dim": 96, "depths": (4, 4, 4, 4)}


@pytest.mark.parametrize(
    ("options", "words", "remedy"),
    [
        (SMALL, "aether_small x2 (96 wide)", OPTIONS),
        ({"scale": 4}, f"aether_medium x4 ({MEDIUM})", STRICT),
        (ELEVEN, "AetherNet of depths [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 3] x2 (99 wide)", OPTIONS),
        (
            {"in_chans": 1},
            "aether_medium x2 (128 wide, in_chans 1, channel attention, spatial attention)",
            OPTIONS,
        ),
        ({"use_spatial_attn": False}, "aether_medium x2 (128 wide, channel attention)", OPTIONS),
    ],
)
def test_a_refusal_says_what_the_file_is_what_the_network_is_and_what_mends_it(
    options: Dict[str, Any], words: str, remedy: str
) -> None:
    network = f"aether_medium x2 ({MEDIUM})"
    with torch.device("meta"):
        state = AetherNet(**{"scale": 2, "lk_kernel": 3, **options}).state_dict()
        net = aether_medium(scale=2, lk_kernel=3)
    with pytest.raises(RuntimeError) as error:
        net.load_state_dict({**state, "bound": torch.ones(1)})
    assert f"the file is {words}, the network {network}; tensors " in str(error.value)
    assert str(error.value).endswith(remedy)


WEIGHT = "fusion_convs.0.weight"
# A tensor's name, what the file holds for it, and whether strict=False takes that.
DAMAGED: Dict[str, Any] = {
    "missing": (WEIGHT, None, True),
    "unexpected": ("surplus", X, True),
    "like a recorded option": ("bound_x", X, True),
    "another shape": (WEIGHT, X[0], False),
    "sparse": ("head.weight", torch.zeros(16, 3, 3, 3).to_sparse(), False),
    "no tensor": ("head.weight", torch.zeros(16, 3, 3, 3).numpy(), False),
    "a number": ("head.weight", 3, False),
    "a tensor without dimensions": ("head.weight", torch.tensor(3.0), False),
    "two bounds": ("bound", torch.ones(2), False),
    "no number": ("bound", "one", False),
    "a weight on the meta device": (WEIGHT, torch.zeros(8, 16, 1, 1, device="meta"), False),
    "a number on the meta device": ("bound", torch.ones(1, device="meta"), False),
}


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_of_either_form_changes_nothing_and_is_named(damage: str, form: str) -> None:
    source, (name, value, takes) = in_form(form), DAMAGED[damage]
    name = name.replace("head", "conv_first") if form == "training" else name
    state = {**source.state_dict(), name: value}
    if value is None:
        del state[name]
    prefixed = {f"0.{key}": value for key, value in state.items()}
    words = f"{name}' is on the meta device" if "meta" in damage else name
    for net in (AetherNet(**source.options), in_form(form)):
        assert_refused(net, lambda net=net: net.load_state_dict(dict(state)), words)
        assert_refused(net, lambda net=net: nn.Sequential(net).load_state_dict(prefixed), words)
    if takes:
        del state["mean"]  # which makes it a part of a file
        left = net.load_state_dict(dict(state), strict=False)
        assert [*left.missing_keys, *left.unexpected_keys] == ["mean", name]
    else:
        assert_refused(net, lambda: net.load_state_dict(dict(state), strict=False), words)


def test_weights_of_another_network_are_refused_without_a_change() -> None:
    net = small_net(2)
    for state in (nn.Conv2d(3, 3, 3).state_dict(), {}, {"conv_first.weight": net.conv_first.weight * 2}):
        match = r"the file is no AetherNet.*fuse_aether\.py reads other"
        assert_refused(net, lambda state=state: net.load_state_dict(state), match)


# ----------------------------------------------------------------------------------------------- strict=False


def loaded_by_torch(net: AetherNet, state: Dict[str, Any]) -> Dict[str, Tensor]:
    """What a network without a loader of its own has after loading ``state`` with strict=False."""
    plain = nn.Module()
    plain.__dict__.update({key: value for key, value in vars(copy.deepcopy(net)).items() if key[0] == "_"})
    plain.load_state_dict(state, strict=False)
    return {**net.state_dict(), **plain.state_dict()}


def misfits_renamed(net: nn.Module, state: Dict[str, Any]) -> Dict[str, Any]:
    """As BasicSR and traiNNer-redux do it without strict."""
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    fits = {name: shapes.get(name, value.shape) == value.shape for name, value in state.items()}
    return {name if fits[name] else f"{name}.ignore": value for name, value in state.items()}


@pytest.mark.parametrize("part", ["stages", "extra int", "damaged fused", "in_chans", "embed_dim"])
@pytest.mark.parametrize("wrapper", [nn.Identity, nn.Sequential, nn.DataParallel, torch.compile])
def test_strict_false_means_what_it_means_in_torch(part: str, wrapper: Any) -> None:
    net: Any = randomize(in_form("training", bound=BOUND), 1)
    other = {"in_chans": {"in_chans": 1}, "embed_dim": {"embed_dim": 32}}.get(part, {})
    source = in_form("training", **other)
    state: Dict[str, Any] = misfits_renamed(net, source.state_dict())
    if part == "stages":
        state = {name: value for name, value in state.items() if name.startswith("stages.")}
    elif part == "extra int":
        state = {"global_step": 7, **{name: value for name, value in state.items() if "norm" not in name}}
    elif part == "damaged fused":
        fused = source.fused().state_dict()
        state = {name: fused[name] for name in ("fusion_convs.0.bias", "body_conv.weight")}
    before, expected = values(net), loaded_by_torch(net, state)
    whole = net if wrapper is nn.Identity else wrapper(net)
    prefix = next(iter(whole.state_dict()))[: -len(next(iter(before)))]
    given = {prefix + name: value for name, value in state.items()}
    assert_refused(whole, lambda: whole.load_state_dict(dict(given)), "stays as it was")
    whole.load_state_dict(given, strict=False)
    assert same(net, expected)
    assert net.options["bound"] == BOUND
    assert not same(net, before)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("scales", [(2, 4), (2, 3), (4, 2), (1, 8)])
def test_another_scale_takes_the_body_and_says_so(scales: Any, ignored: bool, caplog: Any) -> None:
    source, net = in_form("training", scales[0]), randomize(in_form("training", scales[1], bound=BOUND), 1)
    before, state = values(net), source.state_dict()
    net.load_state_dict(misfits_renamed(net, state) if ignored else dict(state), strict=False)
    assert f"x{scales[1]} takes only the body of x{scales[0]} weights; its tail is new" in caplog.text
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(TAIL) else state[name]), name
    assert net.options["bound"] is None, "the body's"  # type: ignore[index]


@pytest.mark.parametrize("target", ["fused", "quantised", "int8"])
def test_another_form_takes_the_body_of_another_scale_with_a_new_tail(target: str, caplog: Any) -> None:
    source, net = in_form("training", 4), in_form(target)
    assert_refused(net, lambda: net.load_state_dict(source.state_dict()), "set strict_load_g: false")
    net.load_state_dict(source.state_dict(), strict=False)
    assert type(net) is (AetherNet if target == "fused" else QuantAetherNet)
    assert "x2 takes only the body of x4 weights; its tail is new" in caplog.text
    body = source.fused().state_dict()
    for name, value in net.fused().state_dict().items():
        assert not name.startswith("stages.") or torch.allclose(value, body[name], rtol=1e-5), name
    assert net(X).shape == (1, 3, 18, 26)


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
