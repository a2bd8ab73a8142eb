"""The quantised form: fake quantisation, its ranges and state, calibration and int8 weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Callable, Dict, List
from unittest import mock

import pytest
import torch
from aether_arch import AetherBase, AetherNet, FusedAetherNet, aether_small
from aether_quant import QuantAetherNet, QuantConv2d, Quantizer, StoredConv2d, insert_quantizers
from conftest import randomize
from torch import Tensor
from torch.nn.functional import conv2d

from aethersr.identify import aether_from_state_dict

TINY: Dict[str, Any] = {"embed_dim": 16, "depths": (1, 2), "scale": 2, "lk_kernel": 5}
NO_ATTENTION: Dict[str, Any] = {"use_channel_attn": False, "use_spatial_attn": False}

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(3))


def float_net(**options: Any) -> AetherNet:
    return randomize(AetherNet(**{**TINY, **options})).eval()  # type: ignore[return-value]


def pictures(count: int = 3) -> List[Tensor]:
    return [torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def quantised(**options: Any) -> QuantAetherNet:
    return float_net(**options).prepare_qat(calibration=pictures()).eval()  # type: ignore[return-value]


def same_state(net: AetherBase, state: Dict[str, Tensor]) -> bool:
    own = net.state_dict()
    return own.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in own.items())


@torch.no_grad()
def test_rounding_changes_the_output_a_little_and_fusing_takes_it_out() -> None:
    fused, net = float_net().fused(), quantised()
    scale = float(fused(IMAGE).std())
    assert 1e-4 * scale < float((net(IMAGE) - fused(IMAGE)).abs().mean()) < 0.2 * scale
    back = copy.deepcopy(net).fuse_model()
    assert type(back) is FusedAetherNet
    assert torch.allclose(back(IMAGE), fused(IMAGE), atol=1e-5 * scale)


def test_a_quantiser_holds_256_values_and_passes_gradients_inside_its_range() -> None:
    quantizer, x = Quantizer(), torch.linspace(-1, 1, 2001)[None].requires_grad_()
    quantizer(x)
    out = quantizer.eval()(2 * x)
    assert len(out.detach().unique()) <= 256
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert (float(gradient[0, 1000]), float(gradient[0, 0])) == (2, 0)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_computes_with_exactly_the_weights_that_are_released(groups: int) -> None:
    conv = QuantConv2d.like(torch.nn.Conv2d(4, 8, 3, padding=1, groups=groups))
    conv.weight.data[0] = 0  # a dead channel
    stored, x = StoredConv2d(conv), torch.randn(2, 4, 6, 6)
    assert stored.weight_scale is not None
    assert int(stored.weight.abs().max()) == 127
    released = (stored.weight.float() * stored.weight_scale).requires_grad_()
    expected, out = conv2d(x, released, conv.bias, padding=1, groups=groups), conv(x)
    assert torch.equal(out, expected)
    assert torch.equal(out, stored(x))
    step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    assert bool(((released - conv.weight).abs() <= 0.501 * step).all()), "rounded to the nearest step"
    (gradient,) = torch.autograd.grad(out.square().sum(), conv.weight)
    assert torch.equal(gradient, torch.autograd.grad(expected.square().sum(), released)[0])


@pytest.mark.parametrize(
    ("low", "batches", "expected"),
    [
        (None, [[[-3.0, 1.0]]], 3.0),
        (0.0, [[[-3.0, 1.0]]], 1.0),  # a function with a minimum
        (None, [[[0.5], [0.6], [0.7], [0.6], [100.0]]], 0.6),  # an image that runs away
        (None, [[[0.0, 0.0]]] * 99 + [[[0.0, 2.0]]], 2.0),  # blocks that start at zero
        (None, [[[0.5, math.inf]], [[0.5, 1.0]], [[0.5, math.nan]], [[0.0, 0.0]]], 1.0),
        (None, [[[1.0]], [[50.0]]], 1.1),  # a batch counts as twice the range at most
        (None, [[[1.0]]] * Quantizer.WATCH + [[[50.0]]], 1.0),  # the range is fixed then
    ],
)
def test_a_range_is_what_usual_batches_need(low: Any, batches: Any, expected: float) -> None:
    quantizer = Quantizer(low)
    for batch in batches:
        quantizer(torch.tensor(batch))
    assert float(quantizer.largest) == pytest.approx(expected * Quantizer.margin, rel=0.01)


def test_what_never_held_anything_but_zero_stays_finite() -> None:
    net: Any = AetherNet(**TINY).prepare_qat().convert_to_quantized()
    assert bool(net(IMAGE).isfinite().all())


def distributed_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    real, calls, found = torch.distributed.all_reduce, [], []
    net: Any = insert_quantizers(float_net(embed_dim=8, depths=(1,)))
    conv = net.stages[0][0].out_conv.requires_grad_(False)
    for value in (conv.weight, conv.bias):
        value.zero_()
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    with mock.patch.object(Quantizer, "WATCH", 6), mock.patch("torch.distributed.all_reduce") as reduce:
        reduce.side_effect = lambda *given: calls.append(1) or real(*given)
        for step in range(30):
            conv.bias += step == 14  # a layer that was zero for longer than ranges are watched
            batch = torch.rand(1, 3, 8, 8)
            broken = step == 0 or (rank == 1 and step < 3)
            parallel.train()(batch * math.inf if broken else batch).mean().backward()
            found.append((len(calls), {name: value.clone() for name, value in net.state_dict().items()}))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_equal_ranges_and_exchange_none_once_they_are_fixed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for (calls, state), (other_calls, other) in zip(*ranks):
        assert calls == other_calls
        assert all(torch.equal(value, other[name]) for name, value in state.items())
    counts = [calls for calls, _ in ranks[0]]
    assert counts[:6] == [1, 2, 3, 4, 5, 6]
    assert counts[13] - counts[9] <= 1, "a layer that stays zero is looked at once in a while"
    assert counts[-1] == counts[-3] <= 18
    assert all(float(value) >= 6 for name, value in ranks[0][-1][1].items() if name.endswith("watched"))


@torch.no_grad()
def test_calibration_measures_the_middle_picture_without_a_margin() -> None:
    net, seen = quantised(), []
    net.body_conv.quant_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    endless = torch.full((1, 3, 16, 16), math.inf)
    with pytest.warns(UserWarning, match="not finite on 1 of 4 images"):
        net.calibrate([pictures()[0] * 0.1, pictures()[1], endless, pictures()[2] * 3])
    each = sorted(float(values.abs().max()) for values in seen if values.isfinite().all())
    assert float(net.body_conv.quant_in.largest) == pytest.approx(each[1])
    assert all(quantizer.margin == Quantizer.margin for quantizer in net.quantizers().values())


@pytest.mark.parametrize("form", ["training", "quantised", "int8"])
@pytest.mark.parametrize(
    ("images", "error"),
    [([], "finite"), ([torch.ones(1, 3, 8, 8) / 0], "finite"), ([torch.rand(1, 4, 8, 8)], "must match")],
)
def test_a_preparation_or_calibration_that_fails_changes_nothing(form: str, images: Any, error: str) -> None:
    net: Any = float_net() if form == "training" else quantised()
    net = net.convert_to_quantized() if form == "int8" else net
    state, before = copy.deepcopy(net.state_dict()), type(net)
    with pytest.raises((ValueError, RuntimeError), match=error):
        net.prepare_qat(calibration=images)
    assert (type(net), net.training) == (before, False)
    assert same_state(net, state)


def test_a_second_preparation_keeps_ranges_and_weights_unless_pictures_are_given() -> None:
    net = quantised().train()
    net(IMAGE)
    state, weight = copy.deepcopy(net.state_dict()), net.head.weight
    net.prepare_qat()
    assert same_state(net, state)
    assert net.head.weight is weight, "an optimizer's parameters stay"
    stored: Any = net.convert_to_quantized()
    largest = stored.body_conv.quant_in.largest
    assert torch.equal(stored.prepare_qat().body_conv.quant_in.largest, largest)
    assert all(value.requires_grad for name, value in stored.named_parameters() if "weight" in name)
    net.prepare_qat(calibration=pictures(1))
    assert not same_state(net, state)


def loaded(**changes: Any) -> QuantAetherNet:
    net = quantised()
    net.load_state_dict({**net.state_dict(), **changes})
    return net


FULL = r"placement '?full.* AetherNet 0\.2\.0 is the last version"
LARGE = {"head.weight": torch.full((16, 3, 3, 3), 1e5)}
OLD_RANGE = {"fusion.quant_in.range_sum": torch.ones(1)}  # as 0.2.0 wrote it of placement "full"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: float_net().convert_to_quantized(), "prepare_qat"),
        (lambda: aether_small(**TINY, qat=True).convert_to_quantized(), "ranges are unknown"),
        (lambda: quantised().convert_to_quantized().calibrate(pictures()), "int8 weights already"),
        (lambda: loaded(**LARGE).convert_to_quantized(), r"head\.weight is beyond half precision"),
        (lambda: aether_small(**TINY, qat="yes"), "qat='yes' is not possible"),
        (lambda: aether_small(**TINY, qat="full"), FULL),
        (lambda: float_net().prepare_qat("full"), FULL),
        (lambda: loaded(**OLD_RANGE), FULL),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_training_moves_ranges_too_and_its_state_survives_a_file(tmp_path: Path) -> None:
    net = quantised().train()
    before = copy.deepcopy(net.state_dict())
    trained = [value for value in net.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(IMAGE).square().mean().backward()
        assert all(value.grad is not None for value in trained), "DDP stops there"
        optimizer.step()
    state = net.state_dict()
    moved = {name.split(".")[-1] for name, value in state.items() if not torch.equal(value, before[name])}
    assert moved >= {"weight", "bias", "range_sum", "watched"}
    assert [name for name, _ in net.named_buffers()] == ["mean"], "BasicSR's EMA copies no buffers"
    assert all(value.is_floating_point() and value.numel() for value in state.values())
    torch.save(state, tmp_path / "qat.pth")
    saved = torch.load(tmp_path / "qat.pth", weights_only=True)
    resumed = insert_quantizers(float_net())
    resumed.load_state_dict(saved)
    for each in (aether_from_state_dict(saved), resumed):
        torch.testing.assert_close(each.eval()(IMAGE), net.eval()(IMAGE))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_quantiser_hides_neither_values_nor_gradients_that_are_not_finite(value: float) -> None:
    quantizer = Quantizer()
    quantizer(torch.ones(1, 4))
    x = torch.tensor([[0.5, value]], requires_grad=True)
    out = quantizer(x)
    assert not bool(out[0, 1].isfinite())
    loss = (out.nan_to_num() * torch.tensor([[value, 1.0]])).sum()
    assert not bool(torch.autograd.grad(loss, x)[0][0, 0].isfinite())


@torch.no_grad()
@pytest.mark.parametrize("form", ["training", "fused", "fused, fp16"])
def test_a_float_checkpoint_loads_strictly_into_a_network_made_with_qat(form: str) -> None:
    source = float_net(**NO_ATTENTION, bound=0.75)
    state = source.state_dict() if form == "training" else source.fused().state_dict()
    if form == "fused, fp16":  # as released
        state = {name: value.half() for name, value in state.items()}
    net: Any = aether_small(**TINY, qat=True)
    net._settle(True)  # as after a training; new weights have other ranges
    net.load_state_dict(state, strict=True)
    assert isinstance(net, QuantAetherNet)
    error = (net.eval()(IMAGE) - source(IMAGE)).abs().mean() / source(IMAGE).std()
    assert error < 0.02, "before the first batch only weights are rounded"
    net.train()(IMAGE)
    assert float(net.stages[1][1].reparam_conv.quant_out.largest) == pytest.approx(0.75)
    assert float(aether_from_state_dict(net.state_dict()).fuse_model().state_dict()["bound"]) == 0.75


@torch.no_grad()
def test_the_bound_holds_whether_a_range_is_known_or_not_and_when_it_changes() -> None:
    net: Any = insert_quantizers(float_net(bound=0.01))
    seen: List[float] = []
    conv = net.stages[0][0].reparam_conv
    conv.register_forward_hook(lambda *call: seen.append(float(call[-1].abs().max())))
    net(IMAGE)
    net.train()(IMAGE)
    net.set_bound(0.005)
    net.eval()(IMAGE)
    conv.quant_out.enabled = False
    net(IMAGE)
    assert seen == pytest.approx([0.01, 0.01, 0.005, 0.005], rel=0.01)


@torch.no_grad()
def test_int8_weights_compute_what_fake_quantisation_does_and_take_a_third() -> None:
    net = quantised(embed_dim=32)
    stored, fused = net.convert_to_quantized(), net.fused()
    # Half precision moves some weights over to the next of 256 steps: the two differ, neither is further off.
    assert (stored(IMAGE) - fused(IMAGE)).abs().mean() < 1.2 * (net(IMAGE) - fused(IMAGE)).abs().mean()
    stored_size, size = (sum(v.nbytes for v in each.state_dict().values()) for each in (stored, fused))
    assert stored_size < 0.45 * size, "a real width is nearer to a quarter"
    assert {value.dtype for value in stored.state_dict().values()} == {torch.int8, torch.half, torch.float}
    assert stored.convert_to_quantized() is stored
    features = torch.randn(1, 32, 20, 24)
    for each in (net, stored):
        assert len(each.body_conv(features).unique()) > 256, "8 bits are too few for the picture in it"
    again, loaded = aether_from_state_dict(stored.state_dict()), insert_quantizers(float_net(embed_dim=32))
    loaded.load_state_dict(stored.state_dict())
    for each in (again, loaded):
        torch.testing.assert_close(each.eval()(IMAGE), stored(IMAGE))
        each.train()(IMAGE * 3)
        assert same_state(each, stored.state_dict()), "ranges moved"
        assert not any(value.requires_grad for value in each.parameters())
        each.load_state_dict(float_net(embed_dim=32).state_dict())
        assert all(value.requires_grad for name, value in each.named_parameters() if "weight" in name)
