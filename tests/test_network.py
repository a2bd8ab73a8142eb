"""The network computes what its description says, in evaluation and in training.

Its gradients are those of the two-branch form.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any, Dict, Optional

import aether_arch
import pytest
import torch
from aether_arch import AetherNet, DeploymentNorm
from conftest import randomize, small_net
from reference import reference
from safetensors import safe_open
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
assert len(GOLDEN) == 5
BOTH = {"use_channel_attn": True, "use_spatial_attn": True}
NEITHER = {"use_channel_attn": False, "use_spatial_attn": False}
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}  # quick to trace
BOUND = 0.75  # small enough that random networks reach it


@torch.no_grad()
def runaway(bound: Optional[float] = None) -> AetherNet:
    """A network whose products square what they are given, block by block."""
    net = AetherNet(scale=2, embed_dim=16, depths=(4, 4), **NEITHER, bound=bound)
    randomize(net)
    for name, value in net.named_parameters():
        if "ffn.conv_out.weight" in name:
            value.mul_(6)
    return net.eval()


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_golden_vectors_are_met_in_eval_fused_and_train(path: Path) -> None:
    with safe_open(str(path), "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    sd, after = ({n[len(p) :]: v for n, v in tensors.items() if n.startswith(p)} for p in ("sd/", "after/"))
    net = AetherNet(**config, drop_path_rate=0.0).eval()
    net.load_state_dict(sd, strict=True)
    with torch.no_grad():
        assert relative(net(tensors["input"]), tensors["output"]) <= 1e-5
        assert relative(net.fused()(tensors["input"]), tensors["output"]) <= 1e-5
        assert relative(net.train()(tensors["input"]), tensors["train_output"]) <= 1e-5
    assert after
    for name, value in after.items():
        assert relative(net.state_dict()[name], value) <= 1e-5, name


@pytest.mark.parametrize("scale", aether_arch.SCALES)
@pytest.mark.parametrize("options", [BOTH, {**NEITHER, "bound": BOUND}], ids=["attention", "bounded"])
def test_evaluation_equals_the_written_out_network(scale: int, options: Dict[str, Any]) -> None:
    net = small_net(scale, img_range=2.0, **options)
    for height, width in ((1, 1), (7, 12)):
        x = torch.rand(2, 3, height, width, dtype=torch.float64)
        expected = reference(net.state_dict(), x, img_range=2.0)[0]
        assert relative(net(x), expected) <= 1e-12
    if net.options["bound"]:
        net.set_bound(None)
        assert "bound" not in net.state_dict()
        unbounded = reference(net.state_dict(), x, img_range=2.0)[0]
        assert relative(net(x), unbounded) <= 1e-12 < 1e-3 < relative(expected, unbounded)


@pytest.mark.parametrize("options", [BOTH, NEITHER, {"bound": BOUND}], ids=["attention", "plain", "bounded"])
def test_training_output_statistics_and_gradients_equal_the_two_branch_form(options: Dict[str, Any]) -> None:
    net = small_net(2, drop_path_rate=0.0, norm="batch", **options).train()
    state = {name: value.clone().requires_grad_() for name, value in net.state_dict().items()}
    x = torch.rand(3, 3, 9, 11, dtype=torch.float64)
    expected, after = reference(state, x, training=True)
    output = net(x)
    assert relative(output, expected) <= 1e-12
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in net.parameters())
    for name, parameter in net.named_parameters():
        # relative to the network's largest gradient: a bias before a norm has one of nothing but rounding
        assert float((parameter.grad - state[name].grad).abs().max()) <= 1e-12 * largest, name
    for name, value in after.items():
        assert relative(net.state_dict()[name], value) <= 1e-12, name


COUNTS = {
    "aether_small": (96, (4,) * 4, False, (1_371_571, 1_620_691, 2_035_891, 1_536_451, 1_522_227)),
    "aether_medium": (128, (6,) * 4, True, (3_370_187, 3_812_939, 4_550_859, 3_663_755, 3_626_027)),
    "aether_large": (180, (8,) * 5, True, (10_048_503, 10_923_843, 12_382_743, 10_629_813, 10_555_698)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_variants_are_those_that_weights_were_trained_for(name: str) -> None:
    width, depths, attention, counts = COUNTS[name]
    own = {"embed_dim": width, "depths": depths, "use_channel_attn": attention, "use_spatial_attn": attention}
    own.update(scale=4, in_chans=3, lk_kernel=11, sk_kernel=3, mlp_ratio=2.0, img_range=1.0)
    build = getattr(aether_arch, name)
    options = inspect.signature(build).parameters
    assert {key: options[key].default for key in own} == own
    if name == "aether_medium":  # what AetherNet() alone is
        assert [*inspect.signature(AetherNet).parameters.values()] == [*options.values()][:-1]
    with torch.device("meta") if hasattr(torch.device, "__enter__") else contextlib.nullcontext():
        nets = [build(scale=scale) for scale in aether_arch.SCALES]
    assert tuple(sum(value.numel() for value in net.parameters()) for net in nets) == counts
    assert build.__doc__.endswith(f" {counts[3] / 1e6:.1f} million parameters at x4.")


NAN = float("nan")
IMPOSSIBLE = [
    ("scale", 5), ("scale", 2.0), ("scale", True), ("in_chans", 0), ("depths", []), ("depths", [4, 0]),
    ("depths", 4), ("embed_dim", 98), ("embed_dim", 0), ("mlp_ratio", 0.0), ("mlp_ratio", NAN),
    ("mlp_ratio", 1e6), ("lk_kernel", 10), ("sk_kernel", 13), ("sk_kernel", 2), ("drop", 1.0),
    ("drop_path_rate", -0.1), ("img_range", 0), ("img_range", 1e6), ("use_spatial_attn", "yes"),
    ("norm", "layer"), *(("bound", value) for value in (0.0, -1.0, NAN, float("inf"), True, "4")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_option_is_named_with_its_value_and_a_bound_stays(name: str, value: Any) -> None:
    begin = f"AetherNet: {name}={value!r} is not possible; allowed: "
    with pytest.raises(ValueError) as error:
        aether_arch.aether_small(**{"scale": 4, name: value})
    assert str(error.value).startswith(begin)
    if name == "bound":
        net = small_net(2, bound=BOUND)
        with pytest.raises(ValueError) as error:
            net.set_bound(value)
        assert str(error.value) == begin + "a number above 0 (1e-3 to 1e6), or nothing."
        assert net.options["bound"] == net.stages[0][0].bound == float(net.state_dict()["bound"]) == BOUND


def test_what_is_allowed_depends_on_the_other_options() -> None:
    for options, allowed in (
        ({"embed_dim": 98}, "a multiple of 4, the number of stages in depths, 2 or more"),
        ({"embed_dim": 4, "use_channel_attn": True}, "8 or more"),
        ({"sk_kernel": 13}, "an odd number from 1 to lk_kernel=11"),
        ({"mlp_ratio": 0.001}, "0.0104 (one hidden channel) or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{allowed}.") + "$"):
            aether_arch.aether_small(**{"scale": 4, **options})  # type: ignore[arg-type]


def test_the_least_of_every_option_is_possible() -> None:
    least = {"in_chans": 1, "embed_dim": 1, "depths": [1], "mlp_ratio": 1, "lk_kernel": 1, "sk_kernel": 1}
    net = AetherNet(scale=1, bound=1e-3, img_range=1e-6, **least, **NEITHER).eval()
    assert net.fused()(torch.rand(1, 1, 1, 1)).shape == net(torch.rand(1, 1, 1, 1)).shape == (1, 1, 1, 1)


NARROWEST = {"embed_dim": 6, "depths": (1,)}  # that an image of three channels fits through, up to x4


@pytest.mark.parametrize(
    ("scale", "options"), [*((scale, {}) for scale in aether_arch.SCALES), (2, NARROWEST), (4, NARROWEST)]
)
def test_a_new_network_is_an_interpolation(scale: int, options: Dict[str, Any]) -> None:
    slope = torch.linspace(0, 1, 16)[:, None] + torch.linspace(0, 1, 16)
    image, inside = slope.expand(1, 3, 16, 16) / 2, slice(2 * scale, -2 * scale)
    with torch.no_grad():
        output = aether_arch.aether_small(scale=scale, **options).eval()(image)
    expected = torch.nn.functional.interpolate(image, scale_factor=scale, mode="bilinear")
    assert float((output - expected)[..., inside, inside].abs().max()) <= 1e-5


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_under_autocast_keeps_its_statistics_in_float32(
    dtype: torch.dtype, norm: str
) -> None:
    x = torch.rand(4, 3, 16, 16)
    nets = [small_net(2, drop_path_rate=0.0, norm=norm).float().train() for _ in range(2)]
    expected = nets[0](x)
    with torch.autocast("cpu", dtype):
        output = nets[1](x)
        output.float().pow(2).mean().backward()
    assert float((output - expected).detach().abs().max()) <= 0.05 * float(expected.detach().abs().max())
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in nets[1].parameters())
    for name, value in nets[1].state_dict().items():
        assert value.dtype == torch.float32
        if name.endswith("running_var"):
            assert relative(value, nets[0].state_dict()[name]) <= 0.02, name


def test_statistics_stand_still_by_default_and_for_older_options(caplog: Any) -> None:
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    gap = {}
    for norm in (None, "frozen", "batch"):
        net = small_net(2, drop_path_rate=0.0, norm=norm).train()
        before = {name: value.clone() for name, value in net.named_buffers()}
        output = net(x)
        moved = any(not torch.equal(value, before[name]) for name, value in net.named_buffers())
        assert moved == (norm == "batch")
        gap[norm] = relative(net.eval()(x), output)
    assert gap[None] == gap["frozen"] <= 1e-12
    assert gap["batch"] > 1e-3
    assert AetherNet(embed_dim=16, depths=(1,), batch_renorm=True).options["norm"] == "frozen"
    assert "batch_renorm was removed" in caplog.text


def test_statistics_skip_a_batch_whose_features_overflow() -> None:
    norm = DeploymentNorm(4, batch=True).train()
    norm(torch.full((1, 4, 2, 2), float("inf")))
    assert torch.equal(norm.running_mean, torch.zeros(1, 4, 1, 1))
    assert torch.equal(norm.running_var, torch.ones(1, 4, 1, 1))


def test_an_empty_batch_gives_an_empty_picture() -> None:
    net = small_net(2).float()
    for form in (net, net.fused()):
        assert form(torch.rand(0, 3, 5, 7)).shape == (0, 3, 10, 14)
        with torch.no_grad():
            assert form(torch.rand(0, 3, 5, 7)).shape == (0, 3, 10, 14)


@torch.no_grad()
def test_a_bound_keeps_every_form_of_a_runaway_network_finite() -> None:
    image = torch.rand(1, 3, 24, 24).round()
    assert not bool(runaway()(image).isfinite().all())
    net = runaway(bound=1.0)
    forms = {"training": net, "fused": net.fused(), "quantised": net.fused().prepare_qat(calibration=[image])}
    forms["int8"] = forms["quantised"].eval().convert_to_quantized()
    for name, form in forms.items():
        assert float(form.eval()(image).abs().max()) < 100, name


def test_layout_copy_and_pickle_change_nothing() -> None:
    net = small_net(2)
    x = torch.rand(1, 3, 9, 14, dtype=torch.float64)
    for form in (net, net.fused()):
        expected = form(x)
        last = copy.deepcopy(form).to(memory_format=torch.channels_last)
        assert relative(last(x.to(memory_format=torch.channels_last)), expected) <= 1e-12
        torch.testing.assert_close(pickle.loads(pickle.dumps(form))(x), expected)


def test_torch_compile_sees_one_graph_in_every_form() -> None:
    net = small_net(2, **TINY).float()
    x = torch.rand(2, 3, 8, 8)
    for form in (net.train(), net.fused(), net.fused().prepare_qat(calibration=[x]).train()):
        torch._dynamo.reset()
        compiled = torch.compile(form, backend="eager", fullgraph=True)  # breaks are errors
        assert compiled(x).shape == (2, 3, 16, 16)


def test_drop_path_grows_from_nothing_to_the_last_block_and_drops_whole_samples_in_training() -> None:
    torch.manual_seed(0)
    for depths, rates in (((1,), [0.0]), ((1, 1), [0.0, 0.25]), ((1, 2), [0.0, 0.125, 0.25])):
        stages = small_net(2, depths=depths, drop_path_rate=0.25).stages
        assert [block.drop_path for stage in stages for block in stage] == rates
    x, block = torch.rand(64, 24, 3, 3, dtype=torch.float64), stages[1][1]
    branch, dropped = block.eval()(x) - x, block.train()(x) - x
    kept = dropped.abs().amax((1, 2, 3)) > 0
    assert 36 < int(kept.sum()) < 60
    assert relative(dropped[kept], branch[kept] / 0.75) <= 1e-12


def test_dropout_falls_on_the_hidden_and_on_the_output_features() -> None:
    ffn, seen = aether_arch.GatedConvFFN(4, 12, 0.5), []
    ffn.drop.register_forward_hook(lambda module, inputs, output: seen.append((output == 0).float()))
    ffn(torch.rand(64, 4, 3, 3))
    assert [zeros.shape[1] for zeros in seen] == [12, 4]
    assert all(0.4 < float(zeros.mean()) < 0.6 for zeros in seen)


@torch.no_grad()
def test_the_blocks_of_a_new_network_keep_the_size_of_what_they_get_and_add_nothing_yet() -> None:
    torch.manual_seed(0)
    net = AetherNet(scale=2, embed_dim=64, depths=(1, 1)).eval()
    block, x = net.stages[1][0], torch.randn(1, 64, 40, 40)
    for part in (lambda x: block.norm(block.conv(x)), block.ffn.conv_gate, block.ffn.conv_main):
        assert 0.8 < float(part(x).std()) < 1.6
    torch.testing.assert_close(block(x), x)
    sees = net.conv_first(torch.rand(1, 3, 40, 40)).std((2, 3))
    assert sees.min() > 0.1, "all channels see the picture"
