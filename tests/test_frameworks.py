"""The training frameworks themselves, unedited, on a CPU: templates train, resume, scale out and fuse.

BasicSR and neosr 0.1.0 come from the package index. traiNNer-redux and neosr 1.0.0 have none: they run when
TRAINNER_REDUX_ROOT and NEOSR_ROOT name a checkout, with the Python of TRAINNER_REDUX_PYTHON and NEOSR_PYTHON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import frameworks
import numpy as np
import pytest
import torch
from aether_arch import aether_from_state_dict
from checkpoints import fuse
from conftest import ROOT, run_onnx
from frameworks import IMAGES, ITERATIONS, SAVED_AT, Framework, load, output_of
from PIL import Image

STATISTICS = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures at x2, and in x4/ at x4."""
    folder = tmp_path_factory.mktemp("images")
    frameworks.write_pairs(folder / "x4", 4)
    return frameworks.write_pairs(folder, 2)


@pytest.fixture(scope="module", params=frameworks.FRAMEWORKS)
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    return frameworks.framework_named(request.param, tmp_path_factory.mktemp("framework"))


@pytest.fixture(scope="module")
def trained(framework: Framework, images: Path) -> str:
    """A training of 20 iterations from the fidelity template, uninterrupted; its name."""
    framework.run(framework.options("whole", images))
    return "whole"


@pytest.fixture(scope="module")
def fused(framework: Framework, trained: str) -> Path:
    """What fuse_aether.py makes of it."""
    saved = framework.weights(trained)
    target = framework.root / f"fused{saved.suffix}"
    assert fuse(saved, target) == 0
    return target


def assert_the_same_losses(framework: Framework, whole: str, resumed: str) -> None:
    wanted, found = framework.losses(whole), framework.losses(resumed)
    assert sorted(wanted) == list(range(1, ITERATIONS + 1))
    assert sorted(found) == list(range(SAVED_AT + 1, ITERATIONS + 1))
    allowed = 1.001 if framework.resumes_exactly else 2
    far = {step: loss / wanted[step] for step, loss in found.items()}
    assert all(1 / allowed <= ratio <= allowed for ratio in far.values()), f"resumed / whole: {far}"


def assert_the_same_weights(path: Path, other: Path) -> None:
    state, again = load(path), load(other)
    assert state.keys() == again.keys()
    different = [name for name in state if not torch.allclose(state[name], again[name], rtol=1e-3, atol=1e-5)]
    assert not different, f"{len(different)} of {len(state)} tensors differ after resuming: {different[:4]}"


def test_the_template_trains_and_the_loss_falls(framework: Framework, trained: str) -> None:
    losses = framework.losses(trained)
    assert sorted(losses) == list(range(1, ITERATIONS + 1))
    # The first steps away from the interpolation that a new network is cost something.
    first, last = (float(np.mean([losses[step] for step in steps])) for steps in (range(2, 7), range(16, 21)))
    assert last < 0.95 * first, f"mean loss of iterations 2 to 6 {first:.4f}, of 16 to 20 {last:.4f}"


def test_what_was_validated_is_what_was_saved_and_what_fuse_aether_writes(
    framework: Framework, trained: str, fused: Path, images: Path
) -> None:
    shown = framework.validated(trained)
    image, picture = images / "val_lr" / f"{shown.name[0]}.png", np.array(Image.open(shown))
    for path in (framework.weights(trained, ITERATIONS), fused):
        difference = np.abs(output_of(aether_from_state_dict(load(path)), image) - picture).max()
        assert difference <= 1, f"{path.name} differs from {framework.name}'s validation by {difference}/255"


def test_a_training_that_goes_on_from_a_checkpoint_has_the_losses_of_an_uninterrupted_one(
    framework: Framework, trained: str, images: Path
) -> None:
    framework.rewound(trained, "resumed")
    framework.run(framework.options("resumed", images), "--auto_resume")
    assert_the_same_losses(framework, trained, "resumed")


def test_weights_of_another_scale_start_a_training_with_all_but_their_tail(
    framework: Framework, trained: str, images: Path
) -> None:
    start = framework.weights(trained)
    path = {"pretrain_network_g": str(start), "strict_load_g": False}
    output = framework.run(framework.options("from_x2", images / "x4", scale=4, iterations=1, path=path))
    taken, state = load(start), load(framework.weights("from_x2"))
    body = [name for name in taken if not name.startswith(("upsample.", "conv_last."))]
    far = [name for name in body if (state[name] - taken[name]).abs().max() > 2e-3]
    assert not far, f"{len(far)} of {len(body)} tensors of the body are not those of {start.name}: {far[:4]}"
    assert state["upsample.blocks.0.weight"].any()
    assert "x2" in output
    assert "x4" in output


def test_quantisation_aware_training_resumes_and_its_int8_file_is_what_was_validated(
    framework: Framework, trained: str, images: Path, tmp_path: Path
) -> None:
    framework.bring("aether_quant.py")
    pretrained: Dict[str, Any] = {"path": {"pretrain_network_g": str(framework.weights(trained))}}
    text = framework.template_text("qat")
    framework.run(framework.options("qat", images, text, **pretrained))
    framework.rewound("qat", "qat_resumed")
    framework.run(framework.options("qat_resumed", images, text, **pretrained), "--auto_resume")
    assert_the_same_losses(framework, "qat", "qat_resumed")
    first, before = framework.losses("qat")[1], framework.losses(trained)[ITERATIONS]
    assert first < 1.5 * before, "the float weights were not taken"
    if framework.resumes_exactly:
        assert_the_same_weights(framework.weights("qat"), framework.weights("qat_resumed"))
    saved, shown = framework.weights("qat", ITERATIONS), framework.validated("qat")
    sums = {name: value for name, value in load(saved).items() if name.endswith("range_sum")}
    assert sums
    assert all(bool((value.isfinite() & (value > 0)).all()) for value in sums.values())
    net = tmp_path / "net.safetensors"
    assert fuse(saved, net, "--onnx", "fp32,fp16,int8") == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["net.safetensors", "net_fp16.onnx", "net_fp32.onnx", "net_int8.onnx"]
    pixels = frameworks.pixels_of(images / "val_lr" / f"{shown.name[0]}.png").numpy()
    output = run_onnx(tmp_path / "net_int8.onnx", pixels)[0].clip(0, 1).transpose(1, 2, 0)
    far = float((np.abs((output * 255).round() - np.array(Image.open(shown))) > 1).mean())
    assert far <= 0.01, f"{far:.2%} of the int8 file's pixels are over 1/255 from {framework.name}'s"


@pytest.mark.parametrize("kind", ["fidelity", "qat"])
def test_two_processes_end_with_the_same_weights(
    framework: Framework, images: Path, kind: str, tmp_path: Path
) -> None:
    framework.bring("aether_quant.py")
    # No validation: neosr's runs on rank 0 alone, through a wrapper that then waits for the other ranks.
    extra: Dict[str, Any] = {"val": None, "path": {"pretrain_network_g": None}}
    text = framework.template_text(kind)
    options = framework.options(f"two_{kind}", images, text, batch=IMAGES // 2, **extra)
    framework.run(options, "--launcher", "pytorch", "--dump", str(tmp_path), processes=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2))
    # Not bit by bit: to save, rank 0 of neosr swaps to averaged weights and back, which rounds.
    # Nor the norms' statistics: each rank has those of its own pictures, and rank 0's are saved.
    shared = [name for name in first if not name.endswith(STATISTICS)]
    far = [name for name in shared if not torch.allclose(first[name], second[name], rtol=0, atol=1e-6)]
    assert not far, f"{len(far)} of {len(first)} tensors differ between the ranks: {far[:4]}"


@pytest.mark.parametrize("framework", ["BasicSR"], indirect=True)  # the others read a flat file as it is
def test_basicsr_runs_its_test_template_on_the_file_that_fuse_aether_writes(
    framework: Framework, fused: Path, images: Path
) -> None:
    text = (ROOT / "options/basicsr/test/AetherNet/test_aether_small_x2.yml").read_text(encoding="utf-8")
    assert "param_key_g: ~" in text, "the template no longer says what this file needs"
    changes = {
        "num_gpu": 0,
        "datasets": {"test_1": {"dataroot_lq": str(images / "val_lr")}},
        "network_g": frameworks.TINY,
        "path": {"pretrain_network_g": str(fused), "param_key_g": None},
    }
    framework.run(framework.written("tested", text, changes), task="test")
    shown = next((framework.root / "results" / "tested").rglob("0_*.png"))
    expected = output_of(aether_from_state_dict(load(fused)), images / "val_lr" / "0.png")
    assert np.abs(expected - np.array(Image.open(shown))).max() <= 1
