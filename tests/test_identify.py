"""Which network a state dict belongs to is read from names and shapes; older, other and broken layouts are
named."""

from __future__ import annotations

import re
import warnings
from typing import Any, Dict, List, Tuple

import aether_arch
import pytest
import torch
from aether_arch import AetherNet
from checkpoints import FUSED, NET, STATE, older_fused
from conftest import small_net
from damage import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aethersr.identify import aether_from_state_dict, form_name, read_options, variant_name

X = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(1))
FORMS: Dict[str, Any] = {
    "training": lambda net: net,
    "fused": lambda net: net.fused(),
    "quantised": lambda net: net.fused().prepare_qat().eval(),
    "quantised full": lambda net: net.fused().prepare_qat("full").eval(),
    "int8": lambda net: net.fused().prepare_qat().convert_to_quantized(),
    "int8 full": lambda net: net.fused().prepare_qat("full").convert_to_quantized(),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kept", [False, True], ids=["", "norm kept"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_built_again_from_its_tensors_alone(form: str, kept: bool) -> None:
    net = small_net(3, use_spatial_attn=False, bound=2.0).float()
    if kept:
        net.norm.weight.data[0, 3] = 0.0
    made = FORMS[form](net)
    state = made.state_dict()
    assert form_name(state) == form.split()[0]
    rebuilt = aether_from_state_dict(state)
    assert type(rebuilt) is type(made)
    assert not rebuilt.training
    torch.testing.assert_close(rebuilt(X), made(X))
    assert rebuilt.options["bound"] == 2.0
    for name in ("scale", "in_chans", "embed_dim", "lk_kernel", "use_channel_attn", "use_spatial_attn"):
        assert rebuilt.options[name] == made.options[name], name
    assert variant_name(rebuilt.options).startswith(
        "a network of its own (embed_dim=24, depths=[1, 2], lk_kernel=11"
    )


@pytest.mark.parametrize(
    "wrap", [lambda state: {"params_ema": state}, lambda state: {f"a.{n}": v for n, v in state.items()}]
)
def test_what_wraps_a_state_dict_is_taken_off_as_for_a_file(wrap: Any) -> None:
    net = small_net(2).float()
    torch.testing.assert_close(aether_from_state_dict(wrap(net.state_dict()))(X), net(X))


@pytest.mark.parametrize("stale_statistics", [True, False])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_an_older_fused_file_is_not_normalised_twice(stale_statistics: bool, wrapper: str) -> None:
    net = small_net(2)
    state = {wrapper + name: value for name, value in older_fused(net, stale_statistics).items()}
    assert form_name(state) == "older fused"
    built = aether_from_state_dict(state)
    with torch.no_grad():
        expected = net(X.double())
        for other in (built.double(), built.double().fused()):
            assert float((other(X.double()) - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("missing", ["stages.0.0.conv.fused_conv.bias", "norm.bias"])
def test_an_older_fused_file_without_a_bias_is_named(missing: str) -> None:
    state = older_fused(small_net(2))
    del state[missing]
    with pytest.raises(ValueError, match=rf"missing.*{missing}|'{missing}' is missing"):
        aether_from_state_dict(state)


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("variant", aether_arch.VARIANTS, ids=lambda variant: variant.__name__)
def test_variant_and_scale_are_read_from_the_weights(variant: type, scale: int) -> None:
    state = variant(scale=scale).state_dict()
    options = read_options(state)
    assert (variant_name(options), options["scale"]) == (variant.__name__, scale)


def test_every_option_that_changes_the_function_is_read_back() -> None:
    options = {"scale": 3, "in_chans": 1, "embed_dim": 40, "depths": [2, 1], "mlp_ratio": 1.7}
    options.update(lk_kernel=9, sk_kernel=5, use_channel_attn=True, use_spatial_attn=False)
    net = AetherNet(**options)
    rebuilt = aether_from_state_dict(net.state_dict())
    found = {name: rebuilt.options[name] for name in options}
    assert int(40 * found.pop("mlp_ratio")) == int(40 * options.pop("mlp_ratio"))
    assert found == options


def test_a_hidden_width_that_no_quotient_gives_is_read_back() -> None:
    """int(22 * (15 / 22)) is 14."""
    net = AetherNet(scale=1, embed_dim=22, depths=[1], mlp_ratio=15.5 / 22)
    rebuilt = aether_from_state_dict(net.state_dict())
    assert rebuilt.stages[0][0].ffn.conv_gate.out_channels == 15


def test_img_range_is_assumed_for_a_training_form_and_lies_in_the_weights_of_a_fused_one() -> None:
    net = small_net(2, img_range=255.0).float()
    training, fused = net.state_dict(), net.fused().state_dict()
    torch.testing.assert_close(aether_from_state_dict(training, img_range=255.0)(X), net(X))
    torch.testing.assert_close(aether_from_state_dict(fused)(X), net.fused()(X))


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
    for missing in ("conv_first.weight", "conv_last.weight", "norm.running_var", "mean"):
        with pytest.raises(ValueError, match=missing):
            aether_from_state_dict({name: value for name, value in state.items() if name != missing})
    refused("unexpected: 1 (surplus)", surplus=torch.zeros(1))
    refused(
        "of another shape: 1 (conv_after_body.weight)",
        **{"conv_after_body.weight": torch.zeros(24, 24, 1, 1)},
    )
    for name in ("conv_first.weight", "upsample.blocks.0.weight"):
        refused("has 1 dimensions, expected 4", **{name: torch.zeros(24)})
    refused("AetherNet v3 or v4 (", **{"norm.num_batches_tracked": torch.zeros(1)})
    refused("AetherNet 1.1.0 (", **{"conv_first.scale": torch.zeros(1)})
    refused("AetherNet 3.x (", scale_tensor=torch.zeros(1))
    refused("'mean' holds no value; its shape is (1, 0, 1, 1)", mean=torch.zeros(1, 0, 1, 1))
    for name, found in (
        ("stages.7.0.norm.weight", "4 in 3 stages"),
        ("stages.0.2.norm.weight", "4 in 2 stages"),
    ):
        refused(f"the blocks 'stages.i.j' have gaps: {found}", **{name: torch.zeros(1, 24, 1, 1)})
    refused("none of the scales", **{"upsample.blocks.0.weight": torch.zeros(25 * 32, 24, 3, 3)})
    for bound in ([1e6], [5e-4], [float("nan")], [1.0, 1.0]):
        refused("'bound' is not one number", bound=torch.tensor(bound))


@pytest.mark.parametrize(("placement", "name"), [(None, "tail.weight"), ("full", "tail.conv.weight")])
def test_a_tail_of_another_kind_is_named(placement: str | None, name: str) -> None:
    net = small_net(2).float().fused()
    state = (net.prepare_qat(placement) if placement else net).state_dict()
    with pytest.raises(ValueError, match=rf"{name}.* has 1 dimensions, expected 4"):
        aether_from_state_dict({**state, name: torch.zeros(24)})


def test_a_deep_network_of_few_tensors_is_one_too() -> None:
    options = {"use_channel_attn": False, "use_spatial_attn": False}
    net = small_net(1, embed_dim=4, depths=(60,), lk_kernel=3, **options).float().fused()
    assert aether_from_state_dict(net.state_dict()).options["depths"] == [60]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv_first.weight", (2**22, 3, 3, 3)),
        ("norm.weight", (1, 2**40, 1, 1)),
        ("stages.0.0.conv.fused_conv.weight", (2**40, 1, 3, 3)),
        ("stages.0.0.conv.fused_conv.bias", (2**40,)),
    ],
)
def test_a_claim_of_terabytes_takes_no_memory(name: str, shape: Tuple[int, ...]) -> None:
    states = [STATE] if name in STATE else []
    for state in [*states, older_fused(NET)]:
        with pytest.raises(ValueError, match="of another shape"):
            aether_from_state_dict({**state, name: torch.zeros(1).expand(shape)})


def test_more_blocks_than_tensors_are_refused_before_any_is_made() -> None:
    blocks = {f"stages.0.{k}.norm.weight": torch.zeros(1, 24, 1, 1) for k in range(200)}
    with pytest.raises(ValueError, match=r"not a whole AetherNet: \d+ tensors for 202 blocks"):
        aether_from_state_dict({**small_net(2).float().state_dict(), **blocks})


def test_a_state_dict_of_another_network_has_no_form() -> None:
    state = {"weight": torch.zeros(1)}
    assert form_name(state) == ""
    with pytest.raises(ValueError, match=r"not an AetherNet: no tensor .* among 1; the first is 'weight'"):
        read_options(state)


DAMAGED = {
    "training": STATE,
    "fused": FUSED,
    "older fused": older_fused(NET),
    "quantised": NET.fused().prepare_qat("full").state_dict(),
}
WHICH = st.integers(0, 2**16)  # of its tensors
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 9, 16, 32, 64])
NUMBERS = st.sampled_from(["0", "1", "7", "9999", "10000", "-1", "9" * 30, "a\nb", "\x1b[31m"])
CLAIMED = st.sampled_from([0, 1, 3, 2**20, 2**33, 2**40])
CHANGE = st.one_of(
    st.tuples(st.just("remove"), WHICH, st.none()),
    st.tuples(st.just("rename"), WHICH, NUMBERS),
    st.tuples(st.just("reshape"), WHICH, st.lists(SIZES, max_size=5)),
    st.tuples(st.just("claim"), WHICH, st.lists(CLAIMED, min_size=1, max_size=4)),
)


@pytest.mark.parametrize("form", DAMAGED)
@settings(FUZZ, max_examples=40)
@given(changes=st.lists(CHANGE, min_size=1, max_size=3))
def test_a_state_dict_with_missing_surplus_or_misshapen_tensors_raises_a_value_error_at_most(
    form: str, changes: List[Any]
) -> None:
    state = dict(DAMAGED[form])
    for change, which, detail in changes:
        name = [*state][which % len(state)]
        if change == "remove":
            del state[name]
        elif change == "rename":
            state[re.sub(r"\d+", detail, name, count=1)] = state.pop(name)
        elif change == "reshape":
            state[name] = torch.zeros(detail)
        else:  # terabytes that take no memory, as a file can name them
            tensor = torch.zeros(0 if 0 in detail else 1)
            try:
                state[name] = tensor.new_empty([0, *detail]) if 0 in detail else tensor.expand(detail)
            except RuntimeError:  # more than 2**63 elements: not even PyTorch can name that
                continue
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aether_from_state_dict(state)
    except ValueError as error:
        assert len(str(error)) < 700  # noqa: PT017 - what it says is looked at, whether it comes is not
