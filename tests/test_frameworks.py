"""The training frameworks themselves, unedited, on the CPU: the generated template trains, resumes, averages, scales out and fuses.

BasicSR and neosr's released package come from the package index. traiNNer-redux and newer neosr have no package: they run when
TRAINNER_REDUX_ROOT or NEOSR_ROOT names a checkout (with TRAINNER_REDUX_PYTHON or NEOSR_PYTHON, the Python that has what it needs).
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch
import yaml
from aether_arch import DeploymentNorm, aether_from_state_dict
from conftest import ROOT
from PIL import Image
from skimage import data as photographs

LAUNCHERS = ROOT / "tests" / "launchers"
SCALE, SIDE, IMAGES = 2, 24, 4  # LR pixels of a training image, which is one crop: every iteration sees all images whole
TINY = {"embed_dim": 16, "depths": [1, 1], "drop_path_rate": 0.0}
ITERATIONS, SAVED_AT = 20, 10


# ----------------------------------------------------------------------------------------------------------------- frameworks


def toml(table: Dict[str, Any], name: str = "") -> str:
    """A nested dict as TOML: all that neosr reads, and Python can read but not write."""
    lines = [f"[{name}]"] if name else []
    for key, value in table.items():
        if not isinstance(value, dict) and value is not None:
            text = str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)
            lines.append(f"{key} = {text}")
    tables = [toml(value, f"{name}.{key}".lstrip(".")) for key, value in table.items() if isinstance(value, dict)]
    return "\n".join([*lines, *tables])


def merged(options: Dict[str, Any], changes: Dict[str, Any]) -> Dict[str, Any]:
    for key, value in changes.items():
        options[key] = merged(options[key], value) if isinstance(value, dict) and isinstance(options.get(key), dict) else value
    return options


class Framework:
    """Where a framework lies, and how its names differ from the others'."""

    name: str
    template: str
    launcher: str
    package: str
    python = sys.executable
    arguments: Tuple[str, ...] = ()
    resumes_exactly = True

    def __init__(self, root: Path) -> None:
        self.root = root  # the folder it runs in

    def changes(self, folder: Path, batch: int) -> Dict[str, Any]:
        """Paths, sizes and iterations: all that differs from the template."""
        raise NotImplementedError

    def longer(self, iterations: int, decay: float) -> Dict[str, Any]:
        """Options of a longer training with a short average."""
        train = {"total_iter": iterations, "ema_decay": decay}
        return {"train": train, "logger": {"save_checkpoint_freq": iterations}, "val": {"val_freq": iterations}}

    def options(self, name: str, images: Path, batch: int = IMAGES, **extra: Any) -> Path:
        changes = merged({"name": name, "manual_seed": 1, **self.changes(images, batch)}, extra)
        text = (ROOT / "options" / self.template).read_text(encoding="utf-8")
        if self.template.endswith(".toml"):
            import tomllib

            path = self.root / f"{name}.toml"
            path.write_text(toml(merged(tomllib.loads(text), changes)), encoding="utf-8")
        else:
            path = self.root / f"{name}.yml"
            path.write_text(yaml.safe_dump(merged(yaml.safe_load(text), changes), sort_keys=False), encoding="utf-8")
        return path

    def command(self, options: Path, *extra: str, processes: int = 1) -> List[str]:
        launch = [self.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else [self.python]
        return [*launch, str(LAUNCHERS / self.launcher), *self.arguments, "-opt", str(options), *extra]

    def start(self, *args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
        return subprocess.Popen(
            self.command(*args, **kwargs),
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *args: Any, **kwargs: Any) -> str:
        process = self.start(*args, **kwargs)
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, f"{self.name} ended with {process.returncode}:\n{output[-3000:]}"
        return output

    def experiment(self, name: str) -> Path:
        return self.root / "experiments" / name

    def losses(self, name: str) -> Dict[int, float]:
        """Loss of each iteration, from the framework's own log."""
        found = {}
        for log in sorted(self.experiment(name).rglob("train_*.log"), key=lambda path: path.stat().st_mtime):
            for line in log.read_text(encoding="utf-8").splitlines():
                match = re.search(r"iter: *([\d,]+).*? l_\w+: ([\d.e+-]+)", line)
                if match:
                    found[int(match[1].replace(",", ""))] = float(match[2])
        return found

    def weights(self, name: str, iteration: Any = "latest") -> Path:
        """What was validated and saved: the averaged network."""
        return self.experiment(name) / "models" / f"net_g_{iteration}.pth"


    def validated(self, name: str, iteration: int = ITERATIONS) -> Path:
        return next(self.experiment(name).rglob(f"*_{iteration}.png"))


class BasicSR(Framework):
    name, package, launcher = "BasicSR", "basicsr", "basicsr_cpu.py"
    template = "basicsr/train/AetherNet/train_aether_small_x2_fidelity.yml"

    def changes(self, folder: Path, batch: int) -> Dict[str, Any]:
        train = {"dataroot_gt": str(folder / "hr"), "dataroot_lq": str(folder / "lr"), "gt_size": SIDE * SCALE, "use_hflip": False, "use_rot": False}
        return {
            "num_gpu": 0,
            "datasets": {
                "train": {**train, "num_worker_per_gpu": 0, "batch_size_per_gpu": batch},
                "val": {"dataroot_gt": str(folder / "val_hr"), "dataroot_lq": str(folder / "val_lr")},
            },
            "network_g": TINY,
            "train": {"total_iter": ITERATIONS, "warmup_iter": 5},
            "val": {"val_freq": SAVED_AT},
            "logger": {"print_freq": 1, "save_checkpoint_freq": SAVED_AT, "use_tb_logger": False},
        }



class Redux(Framework):
    name, package, launcher = "traiNNer-redux", "traiNNer", "trainner_redux_cpu.py"
    template = "traiNNer-redux/train/AetherNet/AetherNet_small_x2_fidelity.yml"
    arguments = ("train",)
    python = os.environ.get("TRAINNER_REDUX_PYTHON", sys.executable)

    def changes(self, folder: Path, batch: int) -> Dict[str, Any]:
        train = {"dataroot_gt": [str(folder / "hr")], "dataroot_lq": [str(folder / "lr")], "lq_size": SIDE, "use_hflip": False, "use_rot": False}
        return {
            "use_amp": False,
            "num_gpu": 0,
            "datasets": {
                "train": {**train, "num_worker_per_gpu": 1, "batch_size_per_gpu": batch, "dataset_enlarge_ratio": 1},
                "val": {"dataroot_gt": [str(folder / "val_hr")], "dataroot_lq": [str(folder / "val_lr")]},
            },
            "network_g": TINY,
            "train": {"total_iter": ITERATIONS, "warmup_iter": 5},
            "val": {"val_enabled": True, "val_freq": SAVED_AT},
            "logger": {"print_freq": 1, "save_checkpoint_freq": SAVED_AT, "use_tb_logger": False},
        }

    def weights(self, name: str, iteration: Any = "latest") -> Path:
        return self.experiment(name) / "models" / f"net_g_ema_{iteration}.safetensors"


    def validated(self, name: str, iteration: int = ITERATIONS) -> Path:
        return next(self.experiment(name).rglob(f"*_{iteration:06d}.png"))


class Neosr(Framework):
    name, package, launcher = "neosr", "neosr", "neosr_cpu.py"
    template = "neosr/train_aether_small_x2_fidelity.toml"
    python = os.environ.get("NEOSR_PYTHON", sys.executable)
    resumes_exactly = False  # it saves the averaged weights alone, and goes on from these

    def changes(self, folder: Path, batch: int) -> Dict[str, Any]:
        train = {"dataroot_gt": str(folder / "hr"), "dataroot_lq": str(folder / "lr"), "patch_size": SIDE, "use_hflip": False, "use_rot": False}
        return {
            "use_amp": False,
            "bfloat16": False,
            "datasets": {
                "train": {**train, "num_worker_per_gpu": 1, "batch_size": batch, "pin_memory": False},
                "val": {"dataroot_gt": str(folder / "val_hr"), "dataroot_lq": str(folder / "val_lr"), "pin_memory": False},
            },
            "network_g": TINY,
            "train": {"warmup_iter": 5},
            "val": {"val_freq": SAVED_AT},
            "logger": {"total_iter": ITERATIONS, "print_freq": 1, "save_checkpoint_freq": SAVED_AT, "use_tb_logger": False},
        }


    def longer(self, iterations: int, decay: float) -> Dict[str, Any]:
        return {"train": {"ema": decay}, "logger": {"total_iter": iterations, "save_checkpoint_freq": iterations}, "val": {"val_freq": iterations}}


class ReleasedNeosr(Neosr):
    name = "neosr 0.1.0"
    python = sys.executable


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


def checkout(kind: type, variable: str, folder: Path) -> Framework:
    """A copy of the checkout that an environment variable names, with the drop-in file in its place."""
    source = os.environ.get(variable)
    if not source:
        pytest.skip(f"{kind.name} has no package: set {variable} to a checkout to run this with it")
    root = folder / kind.package
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".git", "experiments", "datasets"))
    shutil.copy(ROOT / "archs" / "aether_arch.py", root / kind.package / "archs")
    return kind(root)


def released_neosr(folder: Path) -> Framework:
    """neosr 0.1.0 as the package index has it, beside its two dependencies that no other test needs."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-requires-python"]
    packages = ["neosr==0.1.0", "einops==0.8.2", "PyWavelets==1.9.0"]
    done = subprocess.run([*install, "--target", str(folder), *packages], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"neosr 0.1.0 can't be had from the package index here: {done.stderr.strip().splitlines()[-1]}")
    shutil.copy(ROOT / "archs" / "aether_arch.py", folder / "neosr" / "archs")
    return ReleasedNeosr(folder)


@pytest.fixture(scope="module", params=["BasicSR", "neosr 0.1.0", "traiNNer-redux", "neosr"])
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    folder = tmp_path_factory.mktemp("framework")
    if request.param == "BasicSR":
        return BasicSR(folder)
    if request.param == "neosr 0.1.0":
        return released_neosr(folder)
    if request.param == "neosr":
        return checkout(Neosr, "NEOSR_ROOT", folder)
    return checkout(Redux, "TRAINNER_REDUX_ROOT", folder)


@pytest.fixture(scope="module")
def trained(framework: Framework, images: Path) -> str:
    """A training of 20 iterations from the fidelity template, uninterrupted; its name."""
    framework.run(framework.options("whole", images))
    return "whole"


# ---------------------------------------------------------------------------------------------------------------------- tests


def load(path: Path) -> Dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, weights_only=True)
    return state.get("params_ema", state.get("params", state))


def pixels_of(image: Path) -> torch.Tensor:
    return torch.as_tensor(np.array(Image.open(image))).permute(2, 0, 1)[None].float() / 255


def output_of(net: torch.nn.Module, image: Path) -> np.ndarray:
    """8-bit output, as frameworks write it."""
    with torch.no_grad():
        return net(pixels_of(image))[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()


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
    schedule = {"train": {"scheduler": {"milestones": [60, 90], "gamma": 0.1}}}
    framework.run(framework.options("averaged", images, **merged(framework.longer(iterations=150, decay=0.9), schedule)))
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


def test_two_processes_end_with_the_same_weights_and_statistics(framework: Framework, images: Path, tmp_path: Path) -> None:
    # No validation: neosr's runs on rank 0 alone, through a wrapper that then waits for the other ranks.
    options = framework.options("two", images, batch=IMAGES // 2, val=None)
    framework.run(options, "--launcher", "pytorch", "--dump", str(tmp_path), processes=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ between the ranks: {different[:4]}"
