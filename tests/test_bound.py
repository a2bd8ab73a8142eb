"""The option bound: no picture makes the network run away, in any form; and it is a part of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from aether_arch import AetherBase, AetherNet, DeploymentNorm, Quantizer, aether_from_state_dict, aether_small, export_onnx
from conftest import randomize, small_net
from reference import reference

import fuse_aether

BOUND = 0.75  # small enough that random networks reach it


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def runaway(**options: Any) -> AetherNet:
    """A network whose products square what they are given, block by block."""
    net = AetherNet(scale=2, embed_dim=16, depths=(4, 4), use_channel_attn=False, use_spatial_attn=False, **options)
    randomize(net)
    for name, value in net.named_parameters():
        if "ffn.conv_out.weight" in name:
            value.mul_(6)
    return net.eval()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_bounded_network_is_the_written_out_one(training: bool) -> None:
    net = small_net(2, bound=BOUND, drop_path_rate=0.0).train(training)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(2, 3, 9, 14, dtype=torch.float64)
    expected = reference(state, x, training=training)[0]
    assert relative(net(x), expected) <= 1e-12
    unbounded = {name: value for name, value in state.items() if name != "bound"}
    assert relative(expected, reference(unbounded, x, training=training)[0]) > 1e-3, "the bound is never reached: nothing is tested"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 8), (17, 6)])
@torch.no_grad()
def test_fusing_keeps_it(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net(4, bound=BOUND)
    fused = net.fused()
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    assert relative(fused(x), net(x)) <= 1e-12
    monkeypatch.setattr(type(fused.stages[0][0]), "STRIP", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert relative(fused(x), net(x)) <= 1e-12


@torch.no_grad()
def test_what_runs_away_without_it_stays_finite_in_every_form(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 24, 24).round()
    assert not bool(runaway()(image).isfinite().all())
    net = runaway(bound=1.0)
    assert float(net(image).abs().max()) < 100
    forms = {"fused": net.fused(), "quantised": net.fused().prepare_qat("full", [image])}
    forms["int8"] = forms["quantised"].eval().convert_to_quantized()  # type: ignore[operator, union-attr]
    for name, form in forms.items():
        assert bool(form.eval()(image).isfinite().all()), name
    session = onnxruntime.InferenceSession(export_onnx(net, 2, "fp32", str(tmp_path / "net.onnx")), providers=["CPUExecutionProvider"])
    output = torch.from_numpy(np.asarray(session.run(None, {"input": image.numpy()})[0]))
    assert relative(output, net(image)) <= 1e-4


def test_with_batch_renorm_it_limits_training_and_evaluation_alike() -> None:
    x = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    net = small_net(2, drop_path_rate=0.0, batch_renorm=True, bound=BOUND).train()
    output = net(x)
    assert relative(net.eval()(x), output) <= 1e-12


def test_the_file_decides_whether_a_network_is_bounded() -> None:
    sources = {bound: small_net(2, bound=bound) for bound in (None, BOUND)}
    x = torch.rand(1, 3, 9, 14, dtype=torch.float64)
    for bound, source in sources.items():
        for built in (None, BOUND, 4.0):
            for form in (source, source.fused()):
                net = small_net(2, bound=built)
                net.map_state_dict(dict(form.state_dict()))  # as traiNNer-redux does first
                assert net.state_dict().keys() == form.state_dict().keys()
                net.load_state_dict(form.state_dict(), strict=True)
                assert net.options["bound"] == bound
                assert relative(net.eval()(x), source(x)) <= 1e-12
                assert relative(aether_from_state_dict(form.state_dict()).double()(x), source(x)) <= 1e-5


def test_loading_another_bound_leaves_every_parameter_the_object_that_an_optimizer_or_an_average_holds() -> None:
    net = small_net(2, bound=4.0)
    for module in net.modules():
        if isinstance(module, DeploymentNorm):
            module.statistics_to_parameters()  # as for BasicSR, whose average visits parameters only
    before = dict(net.named_parameters())
    net.load_state_dict(small_net(2, bound=None).state_dict(), strict=True)
    after = dict(net.named_parameters())
    assert any(name.endswith("running_var") for name in after)
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in after)


@pytest.mark.parametrize("placement", [True, "full"])
def test_a_quantised_network_takes_it_from_a_float_checkpoint_and_no_range_goes_beyond(placement: Any) -> None:
    source = small_net(2, bound=BOUND, use_channel_attn=False, use_spatial_attn=False).float()
    net: AetherBase = aether_small(scale=2, embed_dim=24, depths=(1, 2), qat=placement)
    net.load_state_dict(source.state_dict(), strict=True)
    net.train()(torch.rand(2, 3, 16, 16))
    ranges = {name: float(module.largest) for name, module in net.named_modules() if isinstance(module, Quantizer)}
    bounded = [largest for name, largest in ranges.items() if name.endswith("reparam_conv.quant_out")]
    assert len(bounded) == 3
    assert max(bounded) == pytest.approx(BOUND)
    assert float(aether_from_state_dict(net.state_dict()).fuse_model().state_dict()["bound"]) == BOUND


@pytest.mark.parametrize("placement", [True, "full"])
@torch.no_grad()
def test_a_quantised_network_is_bounded_before_its_ranges_are_known_and_where_a_quantiser_is_off(placement: Any) -> None:
    net: AetherBase = aether_small(scale=2, embed_dim=16, depths=(4, 4), bound=1.0, qat=placement)
    net.load_state_dict(runaway(bound=1.0).state_dict(), strict=True)
    image = torch.rand(1, 3, 24, 24).round()
    assert float(net.eval()(image).abs().max()) < 100
    net.train()(image)
    for module in net.modules():
        if isinstance(module, Quantizer):
            module.enabled = False
    assert float(net.eval()(image).abs().max()) < 100


@torch.no_grad()
def test_the_command_keeps_it_in_the_weights_and_in_half_precision(tmp_path: Path) -> None:
    net, image = small_net(2, bound=BOUND).float(), torch.rand(1, 3, 24, 24).round()
    torch.save({"params": net.state_dict()}, tmp_path / "net.pth")
    arguments = ["--model_path", tmp_path / "net.pth", "--output_path", tmp_path / "out.pth", "--onnx", "fp16", "--device", "cpu"]
    assert fuse_aether.main([str(argument) for argument in arguments]) == 0
    assert float(torch.load(tmp_path / "out.pth", weights_only=True)["bound"]) == BOUND
    session = onnxruntime.InferenceSession(str(tmp_path / "out_fp16.onnx"), providers=["CPUExecutionProvider"])
    output = torch.from_numpy(np.asarray(session.run(None, {"input": image.half().numpy()})[0])).float()
    assert relative(output, net(image)) <= 0.02


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), True, "4"])
def test_an_impossible_bound_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="bound"):
        AetherNet(bound=value)


@pytest.mark.parametrize("value", [torch.tensor([float("nan")]), torch.tensor([-1.0]), torch.ones(2), torch.ones(0)])
def test_a_file_with_an_impossible_bound_is_named(value: torch.Tensor) -> None:
    state = {**small_net(2).state_dict(), "bound": value}
    with pytest.raises(ValueError, match="'bound'"):
        aether_from_state_dict(state)


@pytest.mark.parametrize("form", ["training", "fused"])
@torch.no_grad()
def test_the_command_gives_a_bound_to_weights_that_run_away(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = runaway()
    torch.save((net if form == "training" else net.fused()).state_dict(), tmp_path / "net.pth")

    def run(*extra: str) -> int:
        files = ["--model_path", str(tmp_path / "net.pth"), "--output_path", str(tmp_path / "out.pth")]
        return fuse_aether.main([*files, "--device", "cpu", *extra])

    assert run("--bound", "1") == 0
    assert "Bound 1: changes the output for" in capsys.readouterr().out
    bounded = aether_from_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
    expected = AetherNet(**{**net.options, "bound": 1.0})
    expected.load_state_dict({**net.state_dict(), "bound": torch.ones(1)})
    image = torch.rand(1, 3, 24, 24).round()
    assert relative(bounded(image), expected.eval()(image)) <= 1e-4
    assert run("--bound", "0", "--overwrite") == 2
    assert "--bound 0 is not possible" in capsys.readouterr().err


def test_a_quantised_checkpoint_has_bounds_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small_net(2).float().prepare_qat().state_dict(), tmp_path / "net.pth")
    arguments = ["--model_path", tmp_path / "net.pth", "--output_path", tmp_path / "out.pth", "--bound", "4", "--device", "cpu"]
    assert fuse_aether.main([str(argument) for argument in arguments]) == 2
    assert "leave --bound out" in capsys.readouterr().err
