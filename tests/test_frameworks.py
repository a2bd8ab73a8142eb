"""The training frameworks themselves, unedited, on the CPU: the generated template trains, resumes, averages, scales out and fuses.

BasicSR and neosr's released package come from the package index. traiNNer-redux and newer neosr have no package: they run when
TRAINNER_REDUX_ROOT or NEOSR_ROOT names a checkout (with TRAINNER_REDUX_PYTHON or NEOSR_PYTHON, the Python that has what it needs).
"""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from aether_arch import DeploymentNorm, aether_from_state_dict
from conftest import ROOT
from frameworks import (
    FRAMEWORKS,
    IMAGES,
    ITERATIONS,
    SAVED_AT,
    SCALE,
    SIDE,
    Framework,
    framework_named,
    load,
    merged,
    output_of,
    pixels_of,
)
from PIL import Image
from skimage import data as photographs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures: four for training, each as large as a crop, and two of other sizes for validation."""
    folder = tmp_path_factory.mktemp("images")
    picture = np.concatenate([photographs.astronaut(), photographs.coffee()[:, :512].repeat(2, 0)[:512]], 1)

    def pair(kind: str, number: int, height: int, width: int) -> None:
        y, x = 60 * number + 40, 70 * number + 150
        hr = Image.fromarray(picture[y : y + height * SCALE, x : x + width * SCALE])
        for name, image in ((f"{kind}hr", hr), (f"{kind}lr", hr.resize((width, height), Image.Resampling.BICUBIC))):
            (folder / name).mkdir(exist_ok=True)
            image.save(folder / name / f"{number}.png")

    for number in range(IMAGES):
        pair("", number, SIDE, SIDE)
    for number, (height, width) in enumerate([(25, 38), (32, 27)]):
        pair("val_", number, height, width)
    return folder


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    return framework_named(request.param, tmp_path_factory.mktemp("framework"))


@pytest.fixture(scope="module")
def trained(framework: Framework, images: Path) -> str:
    """A training of 20 iterations from the fidelity template, uninterrupted; its name."""
    framework.run(framework.options("whole", images))
    return "whole"


# ---------------------------------------------------------------------------------------------------------------------- tests


def test_the_template_trains_and_the_loss_falls(framework: Framework, trained: str) -> None:
    losses = framework.losses(trained)
    assert sorted(losses) == list(range(1, ITERATIONS + 1))
    # The first steps away from the interpolation that a new network is cost something, so the very first loss is not the measure.
    first, last = (float(np.mean([losses[step] for step in steps])) for steps in (range(2, 7), range(16, 21)))
    assert last < 0.95 * first, f"mean loss of iterations 2 to 6 {first:.4f}, of 16 to 20 {last:.4f}"


def test_what_was_validated_is_what_was_saved_and_what_fuse_aether_writes(framework: Framework, trained: str, images: Path, tmp_path: Path) -> None:
    saved, shown = framework.weights(trained, ITERATIONS), framework.validated(trained)
    fused = tmp_path / f"fused{saved.suffix}"
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", str(saved), "--output_path", str(fused), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    image = images / "val_lr" / f"{shown.name[0]}.png"
    for path in (saved, fused):
        difference = np.abs(output_of(aether_from_state_dict(load(path)), image) - np.array(Image.open(shown))).max()
        assert difference <= 1, f"{path.name} differs from {framework.name}'s own validation by {difference}/255"


def test_the_averaged_network_has_the_statistics_that_its_weights_have(framework: Framework, images: Path) -> None:
    # To the end of a schedule: weights, their average and the running statistics have all come to rest, and must agree.
    framework.run(framework.options("averaged", images, **framework.longer(iterations=150, decay=0.9)))
    net = aether_from_state_dict(load(framework.weights("averaged")))
    renewed = copy.deepcopy(net)
    batch = torch.cat([pixels_of(path) for path in sorted((images / "lr").iterdir())])
    for module in renewed.modules():
        if isinstance(module, DeploymentNorm):
            module.momentum = 1.0  # the statistics of this one batch, which is all that the training saw
    with torch.no_grad():
        renewed.train()(batch)
    image = images / "val_lr" / "0.png"
    difference = np.abs(output_of(net, image) - output_of(renewed.eval(), image)).mean()
    assert difference <= 0.5, f"mean difference {difference:.2f}/255 between the saved statistics and those of the averaged weights"


def test_a_killed_training_resumes_with_the_losses_of_an_uninterrupted_one(framework: Framework, trained: str, images: Path) -> None:
    options = framework.options("killed", images)
    process = framework.start(options)
    try:
        for _ in range(1200):
            if process.poll() is not None or max(framework.losses("killed"), default=0) > SAVED_AT:
                break
            time.sleep(0.05)
        assert process.poll() is None, f"{framework.name} ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert max(framework.losses("killed")) < ITERATIONS
    framework.run(options, "--auto_resume")
    whole, resumed = framework.losses(trained), framework.losses("killed")
    assert sorted(resumed) == sorted(whole)
    for step in range(1, ITERATIONS + 1):
        allowed = 1.001 if framework.resumes_exactly or step <= SAVED_AT else 2
        ratio = resumed[step] / whole[step]
        assert 1 / allowed <= ratio <= allowed, f"iteration {step}: loss {resumed[step]:.4g} resumed, {whole[step]:.4g} uninterrupted"


def test_quantisation_aware_training_resumes_and_its_int8_file_is_what_was_validated(
    framework: Framework, trained: str, images: Path, tmp_path: Path
) -> None:
    pretrained = {"path": {"pretrain_network_g": str(framework.weights(trained))}}
    framework.run(framework.options("qat", images, kind="qat", **pretrained))
    framework.run(framework.options("qat_resumed", images, kind="qat", **merged(framework.stopped(SAVED_AT), pretrained)))
    framework.run(framework.options("qat_resumed", images, kind="qat", **pretrained), "--auto_resume")
    whole, resumed = framework.losses("qat"), framework.losses("qat_resumed")
    assert sorted(whole) == sorted(resumed) == list(range(1, ITERATIONS + 1))
    assert whole[1] < 1.5 * framework.losses(trained)[ITERATIONS], "the float weights were not taken"
    for step in range(1, ITERATIONS + 1):
        allowed = 1.001 if framework.resumes_exactly or step <= SAVED_AT else 2
        assert 1 / allowed <= resumed[step] / whole[step] <= allowed, f"iteration {step}: loss {resumed[step]:.4g} resumed, {whole[step]:.4g} not"
    saved, shown = framework.weights("qat", ITERATIONS), framework.validated("qat")
    state, again = load(saved), load(framework.weights("qat_resumed", ITERATIONS))
    assert state.keys() == again.keys()
    ranges = {name: float(state[name] / state[name.replace("range_sum", "watched")]) for name in state if name.endswith("range_sum")}
    assert ranges
    assert all(math.isfinite(largest) and largest > 0 for largest in ranges.values()), ranges
    if framework.resumes_exactly:
        different = [name for name in state if not torch.allclose(state[name], again[name], rtol=1e-3, atol=1e-5)]
        assert not different, f"{len(different)} of {len(state)} tensors are others after resuming: {different[:4]}"
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--model_path", str(saved), "--output_path", str(tmp_path / "net.safetensors")]
    done = subprocess.run([*command, "--onnx", "fp32,fp16,int8", "--device", "cpu"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors", *(f"net_{kind}.onnx" for kind in ("fp16", "fp32", "int8"))]
    pixels = pixels_of(images / "val_lr" / f"{shown.name[0]}.png").numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "net_int8.onnx"), providers=["CPUExecutionProvider"])
    output = np.asarray(session.run(None, {"input": pixels})[0])[0].clip(0, 1).transpose(1, 2, 0)
    difference = np.abs((output * 255).round() - np.array(Image.open(shown)))
    far = float((difference > 1).mean())
    assert far <= 0.01, f"{far:.2%} of the pixels of the int8 file and of {framework.name}'s own validation are more than 1/255 apart"


@pytest.mark.parametrize("kind", ["fidelity", "qat"])
def test_two_processes_end_with_the_same_weights_and_statistics(framework: Framework, images: Path, kind: str, tmp_path: Path) -> None:
    # No validation: neosr's runs on rank 0 alone, through a wrapper that then waits for the other ranks.
    options = framework.options(f"two_{kind}", images, batch=IMAGES // 2, kind=kind, val=None, path={"pretrain_network_g": None})
    framework.run(options, "--launcher", "pytorch", "--dump", str(tmp_path), processes=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ between the ranks: {different[:4]}"
