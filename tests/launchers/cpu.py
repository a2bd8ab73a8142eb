"""What the training frameworks need to run where there is no CUDA. Nothing of theirs is edited."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, Callable, List

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "training"), str(ROOT / "demo")]
from basicsr_train import register_aether  # noqa: E402, F401
from trainner_redux_cpu import (  # noqa: E402, F401
    contiguous_filter2d,
    import_torchvision,
    load,
    no_cuda,
    torch_with_cuda,
)

_place = sys.argv.index("--dump") if "--dump" in sys.argv else len(sys.argv)
DUMP = sys.argv[_place + 1 : _place + 2]  # taken out at once: neosr reads the arguments when it is imported
del sys.argv[_place : _place + 2]


def replace(*replacements: Any) -> None:
    """Set attributes, each given as owner, name and value."""
    for owner, name, value in replacements:
        setattr(owner, name, value)


def prepare() -> None:
    """Random weights for VGG, since its own are a download; gloo for ``--launcher pytorch``.

    Every step of a perceptual loss runs then, its value means nothing. Call it before the framework is
    imported.
    """
    import_torchvision()
    models: Any = importlib.import_module("torchvision.models")

    def random_weights(weights: Any, *args: Any, **kwargs: Any) -> Any:
        return models.get_model(weights.url.split("/")[-1].split("-")[0]).state_dict()

    models._api.WeightsEnum.get_state_dict = random_weights
    if "--launcher" not in sys.argv:
        return
    initialize = torch.distributed.init_process_group

    def start(backend: Any = None, **kwargs: Any) -> None:
        if not torch.distributed.is_initialized():  # neosr starts it each time that it reads its options
            initialize("gloo")

    class OnCpu(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, net: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
            super().__init__(net, **kwargs)

    # A spawned data worker would run none of these preparations.
    torch.multiprocessing.set_start_method("fork", force=True)
    replace(
        (torch.distributed, "init_process_group", start),
        (torch.nn.parallel, "DistributedDataParallel", OnCpu),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "device_count", lambda: 1),
    )


def run(module: Any, pipeline: Callable[[str], Any]) -> None:
    """Run a pipeline that calls ``module.build_model``.

    With ``--dump FOLDER`` save what this rank's network holds at the end, for a test that compares ranks.
    """
    built: List[Any] = []
    build = module.build_model

    def build_model(*args: Any, **kwargs: Any) -> Any:
        built.append(build(*args, **kwargs))
        return built[-1]

    module.build_model = build_model
    pipeline(os.getcwd())
    if DUMP:
        net = built[-1].net_g
        while hasattr(net, "module"):
            net = net.module
        torch.save(net.state_dict(), os.path.join(DUMP[0], f"rank{os.environ.get('RANK', '0')}.pth"))
