"""The training frameworks as the tests run them: where each lies, what it calls things, how it starts."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple, Type

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from skimage import data as photographs

LAUNCHERS = ROOT / "tests" / "launchers"
SCALE, SIDE, IMAGES = 2, 24, 4  # each training picture is one crop: every iteration sees all of them whole
TINY = {"embed_dim": 16, "depths": [1, 1]}
ITERATIONS, SAVED_AT = 20, 10
# What lets two runs be compared step by step, in seconds: a tiny network, nothing random or rounded.
COMPARABLE = {"network_g": TINY, "datasets": {"train": {"use_hflip": False, "use_rot": False}}}
DELETED = "(no such option)"  # as a change: takes the option out of the file


def toml(table: Dict[str, Any], name: str = "") -> str:
    """A nested dict as TOML: all that neosr reads, and Python can read but not write."""
    lines, tables = [f"[{name}]"] if name else [], []
    for key, value in table.items():
        if isinstance(value, dict):
            tables.append(toml(value, f"{name}.{key}".lstrip(".")))
        elif value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{key} = '{value}'" if isinstance(value, str) else f"{key} = {text}")
    return "\n".join([*lines, *tables])


def merged(options: Dict[str, Any], changes: Dict[str, Any]) -> Dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, str) and value == DELETED:
            options.pop(key, None)
        elif isinstance(value, dict) and isinstance(options.get(key), dict):
            merged(options[key], value)
        else:
            options[key] = value
    return options


class Run(NamedTuple):
    """A training: the folder of its pictures, and its sizes."""

    folder: Path
    batch: int
    side: int
    scale: int
    iterations: int
    saved_at: int

    def pictures(self, kind: str, wrap: Any) -> Dict[str, Any]:
        hr, lr = (wrap(str(self.folder / f"{kind}{name}")) for name in ("hr", "lr"))
        return {"dataroot_gt": hr, "dataroot_lq": lr}


class Framework:
    """Where a framework lies, and how its names differ from the others'."""

    name: str
    template: str
    launcher: str
    package: str
    python = sys.executable
    tasks: Tuple[str, ...] = ()  # what the launcher can start, where that is more than a training
    resumes_exactly = True
    wrap: Any = str  # how the option for one folder is written
    saved, shown = "net_g_{}.pth", "*_{}.png"
    comparable: ClassVar[Dict[str, Any]] = {}  # besides COMPARABLE

    def __init__(self, root: Path) -> None:
        self.root = root  # the folder it runs in

    @property
    def archs(self) -> Path:
        return self.root / self.package / "archs"

    def bring(self, *files: str) -> None:
        """Copy files of archs/ to where the framework looks for architectures and optimizers."""
        for file in files:
            folder = "optimizers" if file.endswith("_optim.py") else "archs"
            shutil.copy(ROOT / "archs" / file, self.root / self.package / folder)

    def changes(self, run: Run) -> Dict[str, Any]:
        """Paths, sizes and iterations: all that differs from the template in an unedited run."""
        common = {
            "datasets": {"train": run.pictures("", self.wrap), "val": run.pictures("val_", self.wrap)},
            "val": {"val_freq": run.saved_at},
            "logger": {"print_freq": 1, "save_checkpoint_freq": run.saved_at, "use_tb_logger": False},
        }
        return merged(common, self.own_changes(run))

    def own_changes(self, run: Run) -> Dict[str, Any]:
        raise NotImplementedError

    def template_text(self, kind: str = "fidelity", scale: int = SCALE) -> str:
        path = self.template.replace("fidelity", kind).replace("x2", f"x{scale}")
        return (ROOT / "options" / path).read_text(encoding="utf-8")

    def options(
        self, name: str, images: Path, text: Optional[str] = None, scale: int = SCALE, batch: int = IMAGES,
        iterations: int = ITERATIONS, **extra: Any,
    ) -> Path:  # fmt: skip
        """Options for a run that can be compared with others, from ``text`` or the fidelity template."""
        run = Run(images, batch, SIDE, scale, iterations, min(SAVED_AT, iterations))
        text = text or self.template_text(scale=scale)
        return self.written(name, text, self.changes(run), COMPARABLE, self.comparable, extra)

    def unedited(self, name: str, text: str, images: Path, *sizes: int, **extra: Any) -> Path:
        """Options that differ from the template in paths and Run's sizes alone, and in ``extra``."""
        return self.written(name, text, self.changes(Run(images, *sizes, sizes[-1])), extra)

    def written(self, name: str, text: str, *changes: Dict[str, Any]) -> Path:
        path = self.root / f"{name}{Path(self.template).suffix}"
        if path.suffix == ".toml":
            import tomllib

            options = tomllib.loads(text)
        else:
            options = yaml.safe_load(text)
        for change in ({"name": name, "manual_seed": 1}, *changes):
            merged(options, copy.deepcopy(change))
        text = toml(options) if path.suffix == ".toml" else yaml.safe_dump(options, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    def command(self, options: Path, *extra: str, processes: int = 1, task: str = "train") -> List[str]:
        launch = [self.python]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        which = [task] if task in self.tasks else []
        return [*launch, str(LAUNCHERS / self.launcher), *which, "-opt", str(options), *extra]

    def run(self, *args: Any, timeout: float = 150, **kwargs: Any) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
        pipes: Dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = self.command(*args, **kwargs)
        process = subprocess.Popen(command, cwd=self.root, env=environment, start_new_session=True, **pipes)
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

    def rewound(self, name: str, to: str) -> str:
        """Copy a finished experiment as it was at its first checkpoint: a training can go on from there."""
        pattern = re.compile(rf"(.*_)?{SAVED_AT}\.(state|pth|safetensors)")
        for file in sorted(self.experiment(name).rglob("*")):
            if pattern.fullmatch(file.name):
                target = self.experiment(to) / file.relative_to(self.experiment(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return to

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
        return self.experiment(name) / "models" / self.saved.format(iteration)

    def validated(self, name: str, iteration: int = ITERATIONS) -> Path:
        return next(self.experiment(name).rglob(self.shown.format(iteration)))


class BasicSR(Framework):
    name, package, launcher = "BasicSR", "basicsr", "basicsr_cpu.py"
    template = "basicsr/train/AetherNet/train_aether_small_x2_fidelity.yml"
    tasks = ("train", "test")
    comparable: ClassVar[Dict[str, Any]] = {"train": {"warmup_iter": 5}}

    def own_changes(self, run: Run) -> Dict[str, Any]:
        train = {"gt_size": run.side * run.scale, "num_worker_per_gpu": 0, "batch_size_per_gpu": run.batch}
        return {"num_gpu": 0, "datasets": {"train": train}, "train": {"total_iter": run.iterations}}


class Redux(Framework):
    name, package, launcher = "traiNNer-redux", "traiNNer", "redux_cpu.py"
    template = "traiNNer-redux/train/AetherNet/AetherNet_small_x2_fidelity.yml"
    tasks = ("train", "test")
    python = os.environ.get("TRAINNER_REDUX_PYTHON", sys.executable)
    wrap = staticmethod(lambda path: [path])
    saved, shown = "net_g_ema_{}.safetensors", "*_{:06d}.png"
    comparable: ClassVar[Dict[str, Any]] = {
        "use_amp": False, "train": {"scheduler": {"warmup_iters": 5, "eta_min_ratio": 1.0}},
    }  # fmt: skip

    def own_changes(self, run: Run) -> Dict[str, Any]:
        train = {"lq_size": run.side, "batch_size_per_gpu": run.batch}
        train.update(num_worker_per_gpu=1, dataset_enlarge_ratio=1)
        steps = {"total_iter": run.iterations, "scheduler": {"total_iters": run.iterations}}
        return {"num_gpu": 0, "datasets": {"train": train}, "train": steps, "val": {"val_enabled": True}}


class Neosr(Framework):
    name, package, launcher = "neosr", "neosr", "neosr_cpu.py"
    template = "neosr/train_aether_small_x2_fidelity.toml"
    python = os.environ.get("NEOSR_PYTHON", sys.executable)
    resumes_exactly = False  # it saves the averaged weights alone, and goes on from these
    comparable: ClassVar[Dict[str, Any]] = {
        "use_amp": False, "bfloat16": False, "train": {"optim_g": {"warmup_steps": 5}},
    }  # fmt: skip

    def own_changes(self, run: Run) -> Dict[str, Any]:
        train = {"patch_size": run.side, "batch_size": run.batch}
        train.update(num_worker_per_gpu=1, pin_memory=False)
        datasets = {"train": train, "val": {"pin_memory": False}}
        return {"datasets": datasets, "logger": {"total_iter": run.iterations}}


class ReleasedNeosr(Neosr):
    name = "neosr 0.1.0"
    python = sys.executable


FRAMEWORKS = ("BasicSR", "neosr 0.1.0", "traiNNer-redux", "neosr")


def framework_named(name: str, folder: Path) -> Framework:
    """A copy of one of FRAMEWORKS with aether_arch.py in it; skips the test where it can't be had."""
    framework = {
        "BasicSR": installed_basicsr,
        "neosr 0.1.0": released_neosr,
        "traiNNer-redux": lambda folder: checkout(Redux, "TRAINNER_REDUX_ROOT", folder),
        "neosr": lambda folder: checkout(Neosr, "NEOSR_ROOT", folder),
    }[name](folder)
    framework.bring("aether_arch.py", *(["soap32_optim.py"] if isinstance(framework, Redux) else []))
    return framework


def installed_basicsr(folder: Path) -> Framework:
    spec = importlib.util.find_spec("basicsr")
    if spec is None or not spec.origin:
        pytest.skip("BasicSR is not installed: see requirements-basicsr.txt")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, folder / "basicsr", ignore=ignored)
    return BasicSR(folder)


def released_neosr(folder: Path) -> Framework:
    """neosr 0.1.0 as the package index has it, with its two dependencies that no other test needs."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = ["neosr==0.1.0", "einops==0.8.2", "PyWavelets==1.9.0"]
    install = [*pip, "--no-deps", "--ignore-requires-python", "--target", str(folder), *packages]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        pytest.skip(f"neosr 0.1.0 can't be had from the package index: {reason}")
    return ReleasedNeosr(folder)


def checkout(kind: Type[Framework], variable: str, folder: Path) -> Framework:
    """A copy of the checkout that an environment variable names."""
    source = os.environ.get(variable)
    if not source:
        pytest.skip(f"{kind.name} has no package: set {variable} to a checkout to run this with it")
    ignored = shutil.ignore_patterns(".git", "experiments", "datasets", "__pycache__")
    return kind(Path(shutil.copytree(source, folder / kind.package, ignore=ignored)))


def write_pairs(folder: Path, scale: int, side: int = SIDE) -> Path:
    """Pairs of pictures: IMAGES in hr/ and lr/, each one crop, two in val_hr/ and val_lr/."""
    picture = np.concatenate([photographs.astronaut(), photographs.coffee()[:, :512].repeat(2, 0)[:512]], 1)
    for kind, sizes in (("", [(side, side)] * IMAGES), ("val_", [(25, 38), (32, 27)])):
        for number, (height, width) in enumerate(sizes):
            y, x = 60 * number + 40, 70 * number + 150
            hr = Image.fromarray(picture[y : y + height * scale, x : x + width * scale])
            lr = hr.resize((width, height), Image.Resampling.BICUBIC)
            for name, image in ((f"{kind}hr", hr), (f"{kind}lr", lr)):
                (folder / name).mkdir(exist_ok=True, parents=True)
                image.save(folder / name / f"{number}.png")
    return folder


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
