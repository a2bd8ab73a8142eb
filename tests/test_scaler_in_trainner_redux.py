"""The fp16 GAN template in the real traiNNer-redux: its GradScaler sees what overflows, and weights move."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from frameworks import TINY, framework_named, load
from PIL import Image

# Its backward pass overflows in fp16: the scaled gradient times 5e4, before 1e-3 makes it small again.
LOSS = """
import torch
from traiNNer.utils.registry import LOSS_REGISTRY

@LOSS_REGISTRY.register()
class OverflowLoss(torch.nn.Module):
    def __init__(self, loss_weight):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, output, target):
        half = (output - target).half()
        return ((half * 1e-3) * 5e4).float().abs().mean()
"""


def test_a_loss_that_overflows_lowers_the_scale_and_the_training_learns(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for kind, side in (("hr", 64), ("lr", 32), ("val_hr", 64), ("val_lr", 32)):
        (tmp_path / kind).mkdir()
        Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / kind / "0.png")
    framework = framework_named("traiNNer-redux", tmp_path)
    (framework.root / "traiNNer" / "losses" / "overflow_loss.py").write_text(LOSS, encoding="utf-8")
    gan = {"type": "ganloss", "gan_type": "vanilla", "loss_weight": 0.1}
    changes = {
        "network_g": TINY,
        "network_d": {"num_feat": 8},
        "path": {"pretrain_network_g": None},
        "train": {"losses": [{"type": "overflowloss", "loss_weight": 1.0}, gan]},
        "logger": {"save_checkpoint_freq": 8},
    }
    text = framework.template_text("gan")
    assert "use_amp: true\namp_bf16: false" in text
    framework.run(framework.unedited("scaler", text, tmp_path, 1, 24, 2, 16, **changes), timeout=400)
    log = next(framework.experiment("scaler").rglob("train_*.log")).read_text(encoding="utf-8")
    scales = [float(scale) for scale in re.findall(r"scale_g: (\S+)", log)]
    assert len(scales) == 16, log[-2000:]
    assert 1 < scales[-1] < 65536, f"the scale that a disabled scaler says is 1: {scales}"
    assert scales[-1] == scales[-4], f"still falling after 16 iterations: {scales}"
    before, after = (load(framework.weights("scaler", number)) for number in (8, 16))
    assert any(not torch.equal(before[name], after[name]) for name in before)
