"""What the training frameworks need to run where there is no CUDA. Nothing of theirs is edited."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, List, Optional

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "training"), str(ROOT / "demo")]
from basicsr_train import register_aether  # noqa: E402
from trainner_redux_cpu import Torch, contiguous_filter2d, import_torchvision, load, no_cuda  # noqa: E402

__all__ = [
    "Torch",
    "contiguous_filter2d",
    "dump",
    "import_torchvision",
    "load",
    "no_cuda",
    "option",
    "register_aether",
    "remember_model",
    "use_gloo",
    "without_downloads",
]


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
