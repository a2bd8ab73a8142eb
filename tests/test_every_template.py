"""Every template, trained for real: only paths, sizes and iterations are changed. Slow: run it with -m slow.

For each framework, size and scale: fidelity from scratch, GAN from what that saved, both degraded on the fly,
and quantisation-aware training. aether_small x2 takes 20 iterations, the others very few.

Perceptual losses run on a VGG with random weights: its own are a download of 550 MB. traiNNer-redux's
templates use fp16, slow on a CPU: the first one does so on smaller pictures, the others without AMP.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, Optional

import frameworks
import numpy as np
import pytest
from aether_arch import aether_from_state_dict
from checkpoints import fuse
from conftest import ROOT
from frameworks import BasicSR, Framework, Neosr, Redux, load, output_of
from PIL import Image

pytestmark = pytest.mark.slow
BATCH, SIDE = 4, 32


@pytest.fixture(scope="module", params=frameworks.FRAMEWORKS)
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    framework = frameworks.framework_named(request.param, tmp_path_factory.mktemp("framework"))
    framework.bring("aether_quant.py")
    return framework


@pytest.fixture(scope="module", params=[2, 3, 4])
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures at one scale; the folder's name says which."""
    scale = request.param
    folder = frameworks.write_pairs(tmp_path_factory.mktemp("images") / f"x{scale}", scale, SIDE + 16)
    (folder / "meta_info.txt").write_text("0.png\n1.png\n2.png\n3.png\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_template_of_a_size_and_scale_trains(
    framework: Framework, images: Path, size: str, tmp_path: Path
) -> None:
    scale = int(images.name[1:])
    folder = ROOT / "options" / Path(framework.template).parent
    found = {path.stem.split(f"_x{scale}_")[1]: path for path in folder.glob(f"*{size}_x{scale}_*")}
    kinds = [kind for kind in found if "cpu" not in kind]  # which tests/test_training.py trains
    order = sorted(kinds, key=lambda kind: ("gan" in kind or kind == "qat", "otf" in kind.lower()))
    assert len(order) == (3 if scale == 3 else 5)
    assert order[0] == "fidelity"
    saved: Optional[Path] = None
    for kind in order:
        first = (size, scale, kind) == ("small", 2, "fidelity")
        iterations, name = 20 if first else 2, found[kind].stem
        batch, side = (2, SIDE // 2) if first and isinstance(framework, Redux) else (BATCH, SIDE)
        changes = extra(framework, images, kind, saved if "gan" in kind or kind == "qat" else None, first)
        text = found[kind].read_text(encoding="utf-8")
        options = framework.unedited(name, text, images, batch, side, scale, iterations, **changes)
        output = framework.run(options, timeout=600)
        losses, weights = framework.losses(name), framework.weights(name)
        assert sorted(losses) == list(range(1, iterations + 1)), f"{name}:\n{output[-3000:]}"
        assert all(math.isfinite(loss) for loss in losses.values()), losses
        assert weights.is_file(), output[-3000:]
        # What was saved, fused by the command, is what the framework showed.
        shown, fused = framework.validated(name, iterations), tmp_path / f"{kind}{weights.suffix}"
        assert fuse(weights, fused) == 0
        upscaled = output_of(aether_from_state_dict(load(fused)), images / "val_lr" / f"{shown.name[0]}.png")
        difference = np.abs(upscaled - np.array(Image.open(shown))).max()
        assert difference <= 1, f"{kind}: the validation and the fused network differ by {difference}/255"
        saved = saved or weights


def extra(framework: Framework, images: Path, kind: str, start: Optional[Path], amp: bool) -> Dict[str, Any]:
    """What templates of this kind need besides: further paths, and sizes that must agree with the others."""
    changes: Dict[str, Any] = {"path": {"pretrain_network_g": str(start)}} if start else {}
    if isinstance(framework, Redux) and not amp:
        changes["use_amp"] = False
    if "otf" in kind.lower() and isinstance(framework, Neosr):
        changes["datasets"] = {"train": {"dataroot_lq": None}}
    elif "otf" in kind.lower():
        changes["queue_size"] = BATCH
        if isinstance(framework, BasicSR):
            meta = {"train": {"meta_info": str(images / "meta_info.txt")}}
            changes.update(gt_size=SIDE * int(images.name[1:]), datasets=meta)
    return changes
