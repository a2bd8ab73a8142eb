"""What the training frameworks need to run where there is no CUDA. Nothing of theirs is edited."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, List, Optional

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "demo"))
from basicsr_train import import_torchvision, register_aether

__all__ = [
    "Torch",
    "contiguous_filter2d",
    "dump",
    "import_torchvision",
    "no_cuda",
    "option",
    "register_aether",
    "remember_model",
    "use_gloo",
    "without_downloads",
]


class Cuda:
    """torch.cuda as the training scripts see it: they refuse to start without."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def set_per_process_memory_fraction(*args: Any, **kwargs: Any) -> None:
        pass


class Torch:
    """torch as the training scripts see it."""

    cuda = Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def randn(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.randn(*args, **kwargs)

    @staticmethod
    def autocast(device_type: str = "cpu", **kwargs: Any) -> Any:
        return torch.autocast("cpu", **kwargs)


def no_cuda() -> None:
    """``x.cuda()`` leaves x where it is, and the current device is 0."""
    setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010
    setattr(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010
    torch.cuda.current_device = lambda: 0
    setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # noqa: B010  else traiNNer-redux takes fp16, which a CPU has no fast kernels for


def use_gloo() -> None:
    """Let ``--launcher pytorch`` use gloo on the CPU. Call it before the framework is imported."""
    initialize = torch.distributed.init_process_group

    def start(backend: Any = None, **kwargs: Any) -> None:
        if not torch.distributed.is_initialized():  # neosr starts it each time that it reads its options
            initialize("gloo")

    class OnCpu(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, net: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
            super().__init__(net, **kwargs)

    # A spawned data worker would run none of these preparations.
    torch.multiprocessing.set_start_method("fork", force=True)
    for owner, name, value in (
        (torch.distributed, "init_process_group", start),
        (torch.nn.parallel, "DistributedDataParallel", OnCpu),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "device_count", lambda: 1),
    ):
        setattr(owner, name, value)


def without_downloads() -> None:
    """Give perceptual losses a VGG with random weights, since its own are a download.

    Every step of the loss runs, its value means nothing.
    """
    import_torchvision()
    models: Any = importlib.import_module("torchvision.models")

    def random_weights(weights: Any, *args: Any, **kwargs: Any) -> Any:
        return models.get_model(weights.url.split("/")[-1].split("-")[0]).state_dict()

    models._api.WeightsEnum.get_state_dict = random_weights


def contiguous_filter2d(*modules: str, function: str = "filter2D") -> None:
    """Make what ``filter2D`` gets contiguous: it calls ``view``, and on a CPU some is channels_last."""
    for module in map(importlib.import_module, modules):
        plain: Any = getattr(module, function)
        setattr(module, function, lambda image, kernel, plain=plain: plain(image.contiguous(), kernel))


def option(name: str) -> Optional[str]:
    """Take ``name VALUE`` off the command line."""
    if name not in sys.argv:
        return None
    place = sys.argv.index(name)
    value = sys.argv[place + 1]
    del sys.argv[place : place + 2]
    return value


def remember_model(pipeline: Any) -> List[Any]:
    """A list that will hold what ``pipeline.build_model`` builds."""
    built: List[Any] = []
    build = pipeline.build_model

    def build_model(*args: Any, **kwargs: Any) -> Any:
        built.append(build(*args, **kwargs))
        return built[-1]

    pipeline.build_model = build_model
    return built


def dump(folder: Optional[str], models: List[Any]) -> None:
    """Save what this rank's network holds at the end, for a test that compares ranks."""
    if folder:
        net = models[-1].net_g
        while hasattr(net, "module"):
            net = net.module
        torch.save(net.state_dict(), os.path.join(folder, f"rank{os.environ.get('RANK', '0')}.pth"))
