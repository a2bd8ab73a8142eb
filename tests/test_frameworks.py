"""The training frameworks themselves, unedited, on a CPU: templates train, resume, scale out and fuse.

BasicSR and neosr 0.1.0 come from the package index. traiNNer-redux and neosr 1.0.0 have none: they run when
TRAINNER_REDUX_ROOT and NEOSR_ROOT name a checkout, with the Python of TRAINNER_REDUX_PYTHON and NEOSR_PYTHON.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import numpy as np
import onnxruntime
import pytest
import torch
from aether_arch import aether_from_state_dict
from conftest import ROOT
from frameworks import (
    FRAMEWORKS,
    IMAGES,
    ITERATIONS,
    SAVED_AT,
    SIDE,
    TINY,
    Framework,
    framework_named,
    load,
    output_of,
    pixels_of,
)
from PIL import Image
from skimage import data as photographs

BEFORE_NORM = "8ffda8c"  # the last commit whose networks had no option `norm`; trainings begun with it go on
STATISTICS = {"running_mean": 0.0, "running_var": 1.0}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures at x2, and in x4/ at x4: four for training, each one crop, and two for validation."""
    folder = tmp_path_factory.mktemp("images")
    picture = np.concatenate([photographs.astronaut(), photographs.coffee()[:, :512].repeat(2, 0)[:512]], 1)
    for scale, target in ((2, folder), (4, folder / "x4")):
        for kind, sizes in (("", [(SIDE, SIDE)] * IMAGES), ("val_", [(25, 38), (32, 27)])):
            for number, (height, width) in enumerate(sizes):
                y, x = 60 * number + 40, 70 * number + 150
                hr = Image.fromarray(picture[y : y + height * scale, x : x + width * scale])
                lr = hr.resize((width, height), Image.Resampling.BICUBIC)
                for name, image in ((f"{kind}hr", hr), (f"{kind}lr", lr)):
                    (target / name).mkdir(exist_ok=True, parents=True)
                    image.save(target / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    return framework_named(request.param, tmp_path_factory.mktemp("framework"))


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
    command(ROOT / "fuse_aether.py", "--model_path", saved, "--output_path", target, "--device", "cpu")
    return target


@pytest.fixture(scope="module")
def fused_start(framework: Framework, fused: Path) -> Path:
    """The same as a training can be started with: BasicSR, which averages, looks for "params" then."""
    if framework.name != "BasicSR":
        return fused
    torch.save({"params": load(fused)}, framework.root / "fused_params.pth")
    return framework.root / "fused_params.pth"


def command(script: Path, *arguments: Any, timeout: float = 300) -> None:
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_the_same_losses(framework: Framework, whole: str, resumed: str, close: float = 1.001) -> None:
    wanted, found = framework.losses(whole), framework.losses(resumed)
    assert sorted(wanted) == list(range(1, ITERATIONS + 1))
    assert sorted(found) == list(range(SAVED_AT + 1, ITERATIONS + 1))
    allowed = close if framework.resumes_exactly else 2
    for step, loss in found.items():
        ratio = loss / wanted[step]
        assert 1 / allowed <= ratio <= allowed, (
            f"iteration {step}: {loss:.4g} resumed, {wanted[step]:.4g} whole"
        )


def assert_the_same_weights(path: Path, other: Path) -> None:
    state, again = load(path), load(other)
    assert state.keys() == again.keys()
    different = [name for name in state if not torch.allclose(state[name], again[name], rtol=1e-3, atol=1e-5)]
    assert not different, f"{len(different)} of {len(state)} tensors differ after resuming: {different[:4]}"


# ------------------------------------------------------------------------------------------------------ tests


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
    image = images / "val_lr" / f"{shown.name[0]}.png"
    for path in (framework.weights(trained, ITERATIONS), fused):
        difference = np.abs(
            output_of(aether_from_state_dict(load(path)), image) - np.array(Image.open(shown))
        ).max()
        assert difference <= 1, (
            f"{path.name} differs from {framework.name}'s own validation by {difference}/255"
        )


def test_the_averaged_weights_hold_statistics_that_stand_still(framework: Framework, trained: str) -> None:
    state = load(framework.weights(trained))
    found = {name: value for name, value in state.items() if name.endswith(tuple(STATISTICS))}
    assert found
    for name, value in found.items():
        assert torch.equal(value, torch.full_like(value, STATISTICS[name.split(".")[-1]])), name


def test_a_training_that_goes_on_from_a_checkpoint_has_the_losses_of_an_uninterrupted_one(
    framework: Framework, trained: str, images: Path
) -> None:
    framework.rewound(trained, "resumed")
    framework.run(framework.options("resumed", images), "--auto_resume")
    assert_the_same_losses(framework, trained, "resumed")


@pytest.mark.parametrize("batch_renorm", [False, True])
def test_a_training_begun_before_the_option_norm_goes_on_with_the_same_losses(
    framework: Framework, images: Path, batch_renorm: bool
) -> None:
    def at_that_commit(path: str) -> str:
        show = ["git", "-C", str(ROOT), "show", f"{BEFORE_NORM}:{path}"]
        done = subprocess.run(show, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"needs the history of the repository: {done.stderr.strip()}")
        return done.stdout

    def options(name: str) -> Path:
        network = {"batch_renorm": batch_renorm, "drop_path_rate": 0.0}
        changes = {**framework.comparable_before_norm, "network_g": network}
        return framework.options(name, images, at_that_commit(f"options/{framework.template}"), **changes)

    whole, resumed = (f"before_norm_{batch_renorm}_{part}".lower() for part in ("whole", "resumed"))
    try:
        (framework.archs / "aether_arch.py").write_text(
            at_that_commit("archs/aether_arch.py"), encoding="utf-8"
        )
        framework.run(options(whole))
    finally:
        framework.bring("aether_arch.py")
    framework.rewound(whole, resumed)
    framework.run(options(resumed), "--auto_resume")
    # Batch renormalisation goes on as frozen statistics, which is nearly the same.
    close = 1.02 if batch_renorm else 1.001
    assert_the_same_losses(framework, whole, resumed, close=close)
    if framework.resumes_exactly and not batch_renorm:
        assert_the_same_weights(framework.weights(whole), framework.weights(resumed))


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


def test_fused_weights_of_another_scale_are_refused_by_name(
    framework: Framework, fused_start: Path, images: Path
) -> None:
    path = {"pretrain_network_g": str(fused_start), "strict_load_g": False}
    options = framework.options("from_fused_x2", images / "x4", scale=4, iterations=1, path=path)
    output = framework.run(options, succeeds=False)
    assert not framework.weights("from_fused_x2").exists(), output[-3000:]
    assert "x2" in output
    assert "x4" in output


def test_fused_weights_as_the_start_of_a_float_training_are_named(
    framework: Framework, fused_start: Path, images: Path
) -> None:
    path = {"pretrain_network_g": str(fused_start)}
    output = framework.run(framework.options("from_fused", images, iterations=1, path=path))
    assert "this trains the fused form" in " ".join(output.split())


def test_qat_without_aether_quant_ends_with_one_line_that_names_the_file(
    framework: Framework, images: Path
) -> None:
    (framework.archs / "aether_quant.py").unlink(missing_ok=True)
    text = framework.template_text("qat")
    output = framework.run(
        framework.options("qat_alone", images, text, path={"pretrain_network_g": None}), succeeds=False
    )
    assert not framework.weights("qat_alone").exists()
    assert "copy aether_quant.py beside" in " ".join(output.split()), output[-3000:]


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
    state = load(saved)
    sums = [name for name in state if name.endswith("range_sum")]
    ranges = {name: state[name] / state[name.replace("range_sum", "watched")] for name in sums}
    assert ranges
    assert all(bool((largest.isfinite() & (largest > 0)).all()) for largest in ranges.values()), ranges
    net = tmp_path / "net.safetensors"
    arguments = ("--model_path", saved, "--output_path", net, "--onnx", "fp32,fp16,int8", "--device", "cpu")
    command(ROOT / "fuse_aether.py", *arguments)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["net.safetensors", "net_fp16.onnx", "net_fp32.onnx", "net_int8.onnx"]
    pixels = pixels_of(images / "val_lr" / f"{shown.name[0]}.png").numpy()
    session = onnxruntime.InferenceSession(
        str(tmp_path / "net_int8.onnx"), providers=["CPUExecutionProvider"]
    )
    output = np.asarray(session.run(None, {"input": pixels})[0])[0].clip(0, 1).transpose(1, 2, 0)
    difference = np.abs((output * 255).round() - np.array(Image.open(shown)))
    far = float((difference > 1).mean())
    assert far <= 0.01, (
        f"{far:.2%} of the pixels of the int8 file are more than 1/255 from {framework.name}'s"
    )


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
    shared = [name for name in first if not name.endswith(tuple(STATISTICS))]
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
        "network_g": TINY,
        "path": {"pretrain_network_g": str(fused), "param_key_g": None},
    }
    framework.run(framework.written("tested", text, changes), task="test")
    shown = next((framework.root / "results" / "tested").rglob("0_*.png"))
    expected = output_of(aether_from_state_dict(load(fused)), images / "val_lr" / "0.png")
    assert np.abs(expected - np.array(Image.open(shown))).max() <= 1
