"""The three training frameworks as the tests run them: where each lies, what its options call things, how it is started without CUDA."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Tuple

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

LAUNCHERS = ROOT / "tests" / "launchers"
SCALE, SIDE, IMAGES = 2, 24, 4  # LR pixels of a training image, which is one crop: every iteration sees all images whole
TINY = {"embed_dim": 16, "depths": [1, 1], "drop_path_rate": 0.0}
ITERATIONS, SAVED_AT = 20, 10


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
    # What lets two runs be compared step by step, in minutes: a tiny network, and nothing random or rounded in its training.
    comparable: ClassVar[Dict[str, Any]] = {}

    def __init__(self, root: Path) -> None:
        self.root = root  # the folder it runs in

    def changes(self, folder: Path, batch: int, side: int, scale: int, iterations: int, saved_at: int) -> Dict[str, Any]:
        """Paths, sizes and iterations: all that differs from the template in an unedited run."""
        raise NotImplementedError

    def longer(self, iterations: int, decay: float) -> Dict[str, Any]:
        """Options of a longer training with a short average, to the end of a schedule."""
        train = {"total_iter": iterations, "ema_decay": decay, "scheduler": self.rest(iterations)}
        return {"train": train, "logger": {"save_checkpoint_freq": iterations}, "val": {"val_freq": iterations}}

    def stopped(self, iteration: int) -> Dict[str, Any]:
        """What ends a training earlier than its schedule does."""
        return {"train": {"total_iter": iteration}}

    def rest(self, iterations: int) -> Dict[str, Any]:
        """A schedule at whose end the weights have come to rest."""
        return {"milestones": [iterations * 2 // 5, iterations * 3 // 5], "gamma": 0.1}

    def options(self, name: str, images: Path, batch: int = IMAGES, kind: str = "fidelity", **extra: Any) -> Path:
        """Options for runs that are compared with each other, from the template of aether_small x2."""
        changes = self.changes(images, batch, SIDE, SCALE, ITERATIONS, SAVED_AT)
        return self.written(name, self.template.replace("fidelity", kind), merged(merged(changes, copy.deepcopy(self.comparable)), extra))

    def unedited(self, name: str, template: str, images: Path, batch: int, side: int, scale: int, iterations: int, **extra: Any) -> Path:
        """Options that differ from the template in paths, sizes and iterations alone, and in ``extra``."""
        return self.written(name, template, merged(self.changes(images, batch, side, scale, iterations, iterations), extra))

    def written(self, name: str, template: str, changes: Dict[str, Any]) -> Path:
        changes = {"name": name, "manual_seed": 1, **changes}
        text = (ROOT / "options" / template).read_text(encoding="utf-8")
        if template.endswith(".toml"):
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

    def run(self, *args: Any, timeout: float = 150, **kwargs: Any) -> str:
        process = self.start(*args, **kwargs)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its data workers
            output, _ = process.communicate()
            raise AssertionError(f"{self.name} took longer than {timeout} s:\n{output[-3000:]}") from None
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

    comparable: ClassVar[Dict[str, Any]] = {
        "datasets": {"train": {"use_hflip": False, "use_rot": False}},
        "network_g": TINY,
        "train": {"warmup_iter": 5},
    }

    def changes(self, folder: Path, batch: int, side: int, scale: int, iterations: int, saved_at: int) -> Dict[str, Any]:
        train = {"dataroot_gt": str(folder / "hr"), "dataroot_lq": str(folder / "lr"), "gt_size": side * scale}
        return {
            "num_gpu": 0,
            "datasets": {
                "train": {**train, "num_worker_per_gpu": 0, "batch_size_per_gpu": batch},
                "val": {"dataroot_gt": str(folder / "val_hr"), "dataroot_lq": str(folder / "val_lr")},
            },
            "train": {"total_iter": iterations},
            "val": {"val_freq": saved_at},
            "logger": {"print_freq": 1, "save_checkpoint_freq": saved_at, "use_tb_logger": False},
        }


class Redux(Framework):
    name, package, launcher = "traiNNer-redux", "traiNNer", "trainner_redux_cpu.py"
    template = "traiNNer-redux/train/AetherNet/AetherNet_small_x2_fidelity.yml"
    arguments = ("train",)
    python = os.environ.get("TRAINNER_REDUX_PYTHON", sys.executable)

    comparable: ClassVar[Dict[str, Any]] = {
        "use_amp": False,
        "datasets": {"train": {"use_hflip": False, "use_rot": False}},
        "network_g": TINY,
        "train": {"scheduler": {"warmup_iters": 5, "eta_min_ratio": 1.0}},
    }

    def changes(self, folder: Path, batch: int, side: int, scale: int, iterations: int, saved_at: int) -> Dict[str, Any]:
        train = {"dataroot_gt": [str(folder / "hr")], "dataroot_lq": [str(folder / "lr")], "lq_size": side}
        return {
            "num_gpu": 0,
            "datasets": {
                "train": {**train, "num_worker_per_gpu": 1, "batch_size_per_gpu": batch, "dataset_enlarge_ratio": 1},
                "val": {"dataroot_gt": [str(folder / "val_hr")], "dataroot_lq": [str(folder / "val_lr")]},
            },
            "train": {"total_iter": iterations, "scheduler": {"total_iters": iterations}},
            "val": {"val_enabled": True, "val_freq": saved_at},
            "logger": {"print_freq": 1, "save_checkpoint_freq": saved_at, "use_tb_logger": False},
        }

    def rest(self, iterations: int) -> Dict[str, Any]:
        return {"total_iters": iterations, "eta_min_ratio": 0.001}

    def weights(self, name: str, iteration: Any = "latest") -> Path:
        return self.experiment(name) / "models" / f"net_g_ema_{iteration}.safetensors"

    def validated(self, name: str, iteration: int = ITERATIONS) -> Path:
        return next(self.experiment(name).rglob(f"*_{iteration:06d}.png"))


class Neosr(Framework):
    name, package, launcher = "neosr", "neosr", "neosr_cpu.py"
    template = "neosr/train_aether_small_x2_fidelity.toml"
    python = os.environ.get("NEOSR_PYTHON", sys.executable)
    resumes_exactly = False  # it saves the averaged weights alone, and goes on from these

    comparable: ClassVar[Dict[str, Any]] = {
        "use_amp": False,
        "bfloat16": False,
        "datasets": {"train": {"use_hflip": False, "use_rot": False}},
        "network_g": TINY,
        "train": {"optim_g": {"lr": 2e-4}},
    }

    def changes(self, folder: Path, batch: int, side: int, scale: int, iterations: int, saved_at: int) -> Dict[str, Any]:
        train = {"dataroot_gt": str(folder / "hr"), "dataroot_lq": str(folder / "lr"), "patch_size": side}
        return {
            "datasets": {
                "train": {**train, "num_worker_per_gpu": 1, "batch_size": batch, "pin_memory": False},
                "val": {"dataroot_gt": str(folder / "val_hr"), "dataroot_lq": str(folder / "val_lr"), "pin_memory": False},
            },
            "train": {"scheduler": {"T_max": iterations // 2}},
            "val": {"val_freq": saved_at},
            "logger": {"total_iter": iterations, "print_freq": 1, "save_checkpoint_freq": saved_at, "use_tb_logger": False},
        }

    def rest(self, iterations: int) -> Dict[str, Any]:
        return {"T_max": iterations // 2}

    def stopped(self, iteration: int) -> Dict[str, Any]:
        return {"logger": {"total_iter": iteration}}

    def longer(self, iterations: int, decay: float) -> Dict[str, Any]:
        train = {"ema": decay, "scheduler": self.rest(iterations)}
        return {"train": train, "logger": {"total_iter": iterations, "save_checkpoint_freq": iterations}, "val": {"val_freq": iterations}}


class ReleasedNeosr(Neosr):
    name = "neosr 0.1.0"
    python = sys.executable


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


FRAMEWORKS = ("BasicSR", "neosr 0.1.0", "traiNNer-redux", "neosr")


def framework_named(name: str, folder: Path) -> Framework:
    """One of FRAMEWORKS, ready to run in ``folder``; skips the test where it can't be had."""
    if name == "BasicSR":
        return BasicSR(folder)
    if name == "neosr 0.1.0":
        return released_neosr(folder)
    if name == "neosr":
        return checkout(Neosr, "NEOSR_ROOT", folder)
    return checkout(Redux, "TRAINNER_REDUX_ROOT", folder)


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
