"""Every template, trained for real: only paths, sizes and iterations are changed. Slow: run it with -m slow.

For each framework, size and scale: fidelity from scratch, GAN from what that saved, both degraded on the fly,
and quantisation-aware training (``-k qat``). aether_small x2 takes 20 iterations, the others very few.

Perceptual losses run on a VGG with random weights: its own are a download of 550 MB. traiNNer-redux's
templates use fp16, slow on a CPU: the first one does so on smaller pictures, the others without AMP.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import aether_arch
import numpy as np
import pytest
import torch
from aether_arch import aether_from_state_dict
from conftest import ROOT
from frameworks import FRAMEWORKS, BasicSR, Framework, Neosr, Redux, framework_named, load, output_of
from PIL import Image
from skimage import data as photographs

pytestmark = pytest.mark.slow
BATCH, SIDE, LARGEST = 4, 32, 4


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    framework = framework_named(request.param, tmp_path_factory.mktemp("framework"))
    framework.bring("aether_quant.py")
    return framework


@pytest.fixture(scope="module", params=[2, 3, 4])
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures at one scale; the folder's name says which."""
    scale, folder = request.param, tmp_path_factory.mktemp("images")
    for kind, height, width in (("", SIDE + 16, SIDE + 16), ("val_", 25, 38)):
        for sub in ("hr", "lr"):
            (folder / f"x{scale}" / f"{kind}{sub}").mkdir(parents=True)
        for number in range(BATCH):
            y, x = 40 * number, 60 * number
            hr = Image.fromarray(photographs.astronaut()[y : y + height * scale, x : x + width * scale])
            hr.save(folder / f"x{scale}" / f"{kind}hr" / f"{number}.png")
            hr.resize((width, height), Image.Resampling.BICUBIC).save(
                folder / f"x{scale}" / f"{kind}lr" / f"{number}.png"
            )
    (folder / f"x{scale}" / "meta_info.txt").write_text(
        "".join(f"{number}.png\n" for number in range(BATCH)), encoding="utf-8"
    )
    return folder / f"x{scale}"


def extra(
    framework: Framework, images: Path, kind: str, scale: int, pretrained: Path | None, amp: bool
) -> Dict[str, Any]:
    """What templates of this kind need besides: further paths, and sizes that must agree with the others."""
    changes: Dict[str, Any] = {"path": {"pretrain_network_g": str(pretrained)}} if pretrained else {}
    if isinstance(framework, Redux) and not amp:
        changes["use_amp"] = False
    if "otf" in kind.lower() and not isinstance(framework, Neosr):
        changes["queue_size"] = BATCH
    if "otf" in kind.lower() and isinstance(framework, Neosr):
        changes["datasets"] = {"train": {"dataroot_lq": None}}
    if "otf" in kind.lower() and isinstance(framework, BasicSR):
        changes.update(gt_size=SIDE * scale, datasets={"train": {"meta_info": str(images / "meta_info.txt")}})
    return changes


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_template_of_a_size_and_scale_trains(
    framework: Framework, images: Path, size: str, tmp_path: Path
) -> None:
    kinds = templates(framework, size, int(images.name[1:]))
    order = sorted(kinds, key=lambda kind: ("gan" in kind, "otf" in kind.lower()))
    order.remove("qat")
    assert len(order) == (2 if images.name == "x3" else 4)
    assert order[0] == "fidelity"
    saved = None
    for kind in order:
        first = (size, images.name, kind) == ("small", "x2", "fidelity")
        weights = train(
            framework, kinds[kind], kind, images, saved if "gan" in kind else None, first, tmp_path
        )
        saved = saved or weights


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_qat_template_of_a_size_and_scale_trains(
    framework: Framework, images: Path, size: str, tmp_path: Path
) -> None:
    scale = int(images.name[1:])
    pretrained = tmp_path / "float.pth"
    torch.manual_seed(0)
    torch.save({"params": getattr(aether_arch, f"aether_{size}")(scale=scale).state_dict()}, pretrained)
    train(framework, templates(framework, size, scale)["qat"], "qat", images, pretrained, False, tmp_path)


def templates(framework: Framework, size: str, scale: int) -> Dict[str, Path]:
    """Training templates by kind."""
    folder = ROOT / "options" / Path(framework.template).parent
    found = (path for path in folder.glob(f"*{size}_x{scale}_*") if path.stem.lower() not in ("test", "onnx"))
    return {path.stem.split(f"_x{scale}_")[1]: path for path in found}


def train(
    framework: Framework,
    template: Path,
    kind: str,
    images: Path,
    pretrained: Path | None,
    first: bool,
    folder: Path,
) -> Path:
    """Train from a template and compare what was saved with what was shown; returns the saved weights."""
    scale, iterations = int(images.name[1:]), 20 if first else 2
    batch, side = (2, SIDE // 2) if first and isinstance(framework, Redux) else (BATCH, SIDE)
    name = template.stem
    changes = extra(framework, images, kind, scale, pretrained, amp=first)
    options = framework.unedited(
        name, template.read_text(encoding="utf-8"), images, batch, side, scale, iterations, **changes
    )
    output = framework.run(options, timeout=600)
    losses = framework.losses(name)
    assert sorted(losses) == list(range(1, iterations + 1)), f"{name}:\n{output[-3000:]}"
    assert all(math.isfinite(loss) for loss in losses.values()), losses
    weights = framework.weights(name)
    assert weights.is_file(), output[-3000:]
    # What was saved, fused by the command, is what the framework showed.
    shown, fused = framework.validated(name, iterations), folder / f"{kind}{weights.suffix}"
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", str(weights), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--output_path", str(fused)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    upscaled = output_of(aether_from_state_dict(load(fused)), images / "val_lr" / f"{shown.name[0]}.png")
    difference = np.abs(upscaled - np.array(Image.open(shown))).max()
    assert difference <= 1, (
        f"{kind}: {framework.name}'s validation and the fused network differ by {difference}/255"
    )
    fell = f"loss {losses[1]:.4g} to {losses[iterations]:.4g}"
    print(f"{framework.name} {name}: {iterations} iterations, {fell}, difference {difference:.0f}/255")
    return weights
