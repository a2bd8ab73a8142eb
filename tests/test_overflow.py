"""What is not finite reaches those who must see it: fp16's GradScaler, the frameworks, the user."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, List

import pytest
import torch
from aether_arch import AetherNet
from frameworks import DELETED, TINY, framework_named, load, write_pairs
from torch import Tensor, nn

from aethersr.commands.fuse import main

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 65536.0


class Overflowing(nn.Module):
    """A loss network whose own backward pass overflows in fp16: small weights before large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)
        self.first.weight.data.fill_(1e-3)
        self.second.weight.data.fill_(1e5 / 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x.half(), self.first.weight.half())
        return nn.functional.conv2d(hidden.float(), self.second.weight).abs().mean()


def tiny(**options: Any) -> AetherNet:
    torch.manual_seed(0)
    return AetherNet(scale=2, embed_dim=8, depths=(1, 1), lk_kernel=5, **options)


def trained(net: nn.Module) -> List[float]:
    """Train under fp16 autocast with a real scaler; its scale after each step."""
    loss = Overflowing()
    optimizer = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    x, scales = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for _ in range(16):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            output = net(x)
        scaler.scale(loss(output)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("form", ["training", "batch statistics", "fused", "quantised", "compiled"])
def test_the_scaler_sees_an_overflow_lowers_its_scale_and_the_network_learns(form: str) -> None:
    net: Any = tiny(norm="batch" if form == "batch statistics" else None).train()
    if form == "fused":
        net.fuse_model()
    elif form == "quantised":
        net.prepare_qat(calibration=[torch.rand(1, 3, 8, 8)])
    before = copy.deepcopy(net.state_dict())
    scales = trained(torch.compile(net, backend="aot_eager") if form == "compiled" else net)
    assert scales[0] < SCALE, "the overflow was hidden"
    assert scales[-1] == scales[-4] <= SCALE / 8, scales
    after = net.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items() if "conv" in name)


@pytest.mark.parametrize("where", ["input", "target"])
def test_a_broken_pixel_shows_in_the_loss_and_in_the_gradients(where: str) -> None:
    net, x, target = tiny().train(), torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    (x if where == "input" else target)[0, 0, 2, 3] = float("nan")
    loss = (net(x) - target).square().mean()
    loss.backward()
    assert bool(loss.isnan()), "a framework stops at this"
    assert any(bool(value.grad.isnan().any()) for value in net.parameters() if value.grad is not None)


BREAKS_LATE = """
import torch
from torch import nn
from basicsr.utils.registry import LOSS_REGISTRY

@LOSS_REGISTRY.register()
class BreaksLate(nn.Module):
    calls = 0

    def forward(self, output, target, weight=None):
        self.calls += 1
        return (output - target).abs().mean() * (float("nan") if self.calls > 5 else 1.0)
"""


def test_basicsr_trains_on_through_a_nan_and_its_last_finite_checkpoint_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    framework = framework_named("BasicSR", write_pairs(tmp_path, 2))
    (framework.root / "basicsr" / "losses" / "breaks_late_loss.py").write_text(BREAKS_LATE, encoding="utf-8")
    options = framework.unedited(
        "late", framework.template_text(), tmp_path, 1, 24, 2, 8, network_g=TINY,
        train={"pixel_opt": {"type": "BreaksLate", "loss_weight": DELETED, "reduction": DELETED}},
        val=None, logger={"save_checkpoint_freq": 4},
    )  # fmt: skip
    framework.run(options)
    finite = {}
    for name in (4, 8, "latest"):
        state = load(framework.weights("late", name))
        finite[name] = all(bool(value.isfinite().all()) for value in state.values())
    assert finite == {4: True, 8: False, "latest": False}
    target = tmp_path / "out.safetensors"
    assert main(["--model_path", str(framework.weights("late")), "--output_path", str(target)]) == 2
    assert "diverged training: 'conv_first.weight' holds NaN or Inf" in capsys.readouterr().err
    assert not target.exists()
