"""Which network a state dict holds is read from names and shapes; other and broken layouts are named."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any, Dict, List, Tuple

import aether_arch
import pytest
import torch
from checkpoints import FORMS, FUSED, NET, STATE, older_fused
from conftest import X, small_net
from damage import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st

from aethersr.identify import aether_from_state_dict, form_name, read_options, variant_name

pytestmark = pytest.mark.usefixtures("one_thread")


UNDETECTABLE = {"drop", "drop_path_rate", "norm"}  # no tensor holds them; they change nothing in evaluation
NETWORKS: List[Dict[str, Any]] = [
    {"scale": 1, "depths": [11], "use_channel_attn": False, "use_spatial_attn": False},
    {"scale": 3, "use_spatial_attn": False},
    {"scale": 8, "use_channel_attn": False, "in_chans": 1},
    {"in_chans": 4, "mlp_ratio": 1.5, "lk_kernel": 17, "sk_kernel": 5},
    {"embed_dim": 24, "depths": [1, 2, 2, 3], "mlp_ratio": 0.6667},
    {"lk_kernel": 1, "sk_kernel": 1, "bound": None},
    {"img_range": 255.0, "bound": 4.0},
    {"embed_dim": 22, "mlp_ratio": 0.7045},  # int(22 * 0.6818) is 14
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_every_form_is_built_again_from_its_tensors_alone(options: Dict[str, Any], form: str) -> None:
    net = small_net(**{"embed_dim": 16, "depths": [1], **options}).float()
    if net.scale == 3:  # the last norm is kept
        net.norm.weight.data[0, 3] = 0.0
    made = FORMS[form](copy.deepcopy(net))
    rebuilt = aether_from_state_dict(made.state_dict())
    assert (form_name(made.state_dict()), type(rebuilt), rebuilt.training) == (form, type(made), False)
    ignored = UNDETECTABLE | (set() if form == "training" else {"sk_kernel", "img_range"})
    read, given = ({k: v for k, v in each.options.items() if k not in ignored} for each in (rebuilt, net))
    assert read == given
    assert len(read) >= 8
    image = X.mean(1, keepdim=True).expand(-1, net.mean.numel(), -1, -1)
    torch.testing.assert_close(rebuilt(image), made(image))


@pytest.mark.parametrize("stale_statistics", [True, False])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_an_older_fused_file_is_not_normalised_twice(stale_statistics: bool, wrapper: str) -> None:
    net = small_net(2)
    state = {wrapper + name: value for name, value in older_fused(net, stale_statistics).items()}
    assert form_name(state) == "older fused"
    built = aether_from_state_dict({"params": state})
    with torch.no_grad():
        expected = net(X.double())
        for other in (built.double(), built.double().fused()):
            assert float((other(X.double()) - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("variant", aether_arch.VARIANTS, ids=lambda variant: variant.__name__)
def test_variant_and_scale_are_read_from_the_weights(variant: Any, scale: int) -> None:
    with torch.device("meta"):
        options = read_options(variant(scale=scale, bound=None).state_dict())
    assert (variant_name(options), options["scale"]) == (variant.__name__, scale)


def test_img_range_is_read_where_it_is_recorded_and_given_for_older_training_files() -> None:
    net = small_net(2, img_range=255.0).float()
    recorded = net.state_dict()
    older = {name: value for name, value in recorded.items() if name != "img_range"}
    assert len(older) < len(recorded)
    for state, value in ((older, 255.0), (recorded, None), (recorded, 255.0)):
        torch.testing.assert_close(aether_from_state_dict(state, value)(X), net(X))
    fused = net.fused()
    torch.testing.assert_close(aether_from_state_dict(fused.state_dict())(X), fused(X))
    assert not torch.allclose(aether_from_state_dict(older)(X), net(X), atol=0.01)
    for state, value, words in (
        (recorded, 1.0, "trained with img_range 255, which it records; leave --img_range 1 out"),
        (fused.state_dict(), 255.0, "its weights hold img_range; leave --img_range 255 out"),
        (older, 0.0, "--img_range 0 is not possible"),
        (older, float("nan"), "--img_range nan is not possible"),
        ({**older, "img_range": torch.zeros(1)}, None, "'img_range' is not one number from 1e-06 to 1e6"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            aether_from_state_dict(state, value)


WIDE = (
    "AetherNet of depths [1, 2] x2 (24 wide, channel attention, spatial attention), but not whole; tensors "
)
NO_SCALE = "the upsampling tensors fit none of the scales"
ONE, UPSAMPLE = torch.zeros(1), "upsample.blocks.0.weight"
NAN = float("nan")
BROKEN: List[Tuple[str, Dict[str, Any]]] = [  # what is said, and what is changed in a training form
    ("not an AetherNet: no tensor", dict.fromkeys(small_net(2).state_dict())),  # None: removed
    ("'conv_first.weight' is missing", {"conv_first.weight": None}),
    (NO_SCALE, {UPSAMPLE: None}),
    (NO_SCALE, {UPSAMPLE: torch.zeros(25 * 32, 24, 3, 3)}),
    (NO_SCALE, {f"upsample.blocks.{k}.weight": torch.zeros(1, 1, 1, 1) for k in range(4)}),
    (f"{WIDE}missing: 1 (mean)", {"mean": None}),
    (f"{WIDE}unexpected: 4 ({'a' * 80}, b, c, ...)", {"a" * 99: ONE, "b": ONE, "c": ONE, "d": ONE}),
    (f"{WIDE}of another shape: 1 (conv_last.bias)", {"conv_last.bias": torch.zeros(5)}),
    ("has 5 dimensions, expected 4", {"conv_first.weight": torch.zeros(24, 3, 3, 3, 1)}),
    ("has 1 dimensions, expected 4", {UPSAMPLE: torch.zeros(24)}),
    ("AetherNet v3 or v4 (", {"norm.num_batches_tracked": ONE}),
    ("AetherNet 1.1.0 (", {"conv_first.scale": ONE}),
    ("AetherNet 3.x (", {"scale_tensor": torch.tensor(2)}),
    ("'mean' holds no value; its shape is (1, 0, 1, 1)", {"mean": torch.zeros(1, 0, 1, 1)}),
    ("gaps: 4 in 3 stages", {"stages.7.0.norm.weight": ONE}),
    ("gaps: 4 in 2 stages", {"stages.0.2.norm.weight": ONE}),
    ("tensors for 202 blocks", {f"stages.0.{k}.norm.weight": ONE for k in range(200)}),
    *(("'bound' is not one number", {"bound": torch.tensor(x)}) for x in ([1e6], [5e-4], [NAN], [1.0, 1.0])),
]
if hasattr(torch.device, "__enter__"):  # a network of this width would take terabytes
    BROKEN.append(("(1048576 wide", {"conv_first.weight": torch.zeros(1).expand(2**20, 3, 3, 3)}))


@pytest.mark.parametrize(("words", "changes"), BROKEN, ids=[words[:40] for words, _ in BROKEN])
def test_a_broken_state_dict_is_refused_with_what_is_wrong(words: str, changes: Dict[str, Any]) -> None:
    state = {**small_net(2).float().state_dict(), **changes}
    with pytest.raises(ValueError, match=re.escape(words)):
        aether_from_state_dict({name: value for name, value in state.items() if value is not None})


def test_other_networks_are_named() -> None:
    with pytest.raises(ValueError, match=r"first layout \(v1, tensors 'layers\.\*'\): another network"):
        aether_from_state_dict({"params": {"layers.0.blocks.0.conv.lk_conv.bias": torch.zeros(3)}})
    with pytest.raises(ValueError, match=r"tail.weight.* has 1 dimensions, expected 4"):
        aether_from_state_dict({**FUSED, "tail.weight": torch.zeros(24)})
    quantised = {**DAMAGED["quantised"], "fusion.quant_in.range_sum": ONE, "tail.weight": ONE}
    with pytest.raises(ValueError, match=r"placement 'full' .*0\.2\.0"):
        aether_from_state_dict(quantised)


DAMAGED = {
    "training": STATE,
    "fused": FUSED,
    "older fused": older_fused(NET),
    "quantised": NET.fused().prepare_qat().state_dict(),
}
WHICH = st.integers(0, 2**16)  # of its tensors
SIZES = st.sampled_from([0, 1, 2, 3, 8, 9, 64, 2**20, 2**33, 2**40])
NUMBERS = st.sampled_from(["0", "1", "7", "9999", "10000", "-1", "9" * 30, "a\nb", "\x1b[31m"])
CHANGE = st.tuples(WHICH, st.one_of(st.none(), NUMBERS, st.lists(SIZES, max_size=5)))


@pytest.mark.parametrize("form", DAMAGED)
@settings(FUZZ, max_examples=40)
@given(changes=st.lists(CHANGE, min_size=1, max_size=3))
def test_missing_renamed_or_misshapen_tensors_raise_value_errors(form: str, changes: List[Any]) -> None:
    state = dict(DAMAGED[form])
    for which, change in changes:
        name = [*state][which % len(state)]
        value = state.pop(name)
        if isinstance(change, str):
            state[re.sub(r"\d+", change, name, count=1)] = value
        elif isinstance(change, list) and math.prod(side or 1 for side in change) < 2**62:
            state[name] = torch.zeros([min(side, 1) for side in change]).expand(change)  # takes no memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aether_from_state_dict(state)
    except ValueError as error:
        assert len(str(error)) < 700  # noqa: PT017 - what it says is looked at, whether it comes is not
