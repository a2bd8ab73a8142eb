"""Run an unmodified traiNNer-redux without CUDA: its own train.py or test.py, in its folder.

    python AetherNet/training/trainner_redux_cpu.py train --auto_resume -opt X.yml

Replaces what asks for a card, and makes the steps faster (cpu_speed.py). Nothing in the folder is edited or
copied: AetherNet and SOAP32 come from archs/, unless the folder has copies of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any, List, Optional

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from aethersr.commands import Parser, exit_code  # noqa: E402, I001
import torch  # noqa: E402
from aethersr.errors import UserError  # noqa: E402

_declared: list = []  # a torch.library.Library removes its operators when it is garbage-collected


def import_torchvision() -> types.ModuleType:
    """Import torchvision, even a build for CUDA beside a PyTorch for CPU.

    Its operators don't load there. Trainings don't call them, so declaring the first two is enough.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


def torch_with_cuda() -> Any:
    """torch for scripts that refuse to start without a card."""
    cuda = {"is_available": lambda: True, "set_per_process_memory_fraction": lambda *_, **__: None}
    as_if = types.SimpleNamespace(**{**vars(torch.cuda), **cuda})
    return types.SimpleNamespace(**{**vars(torch), "cuda": as_if})


def no_cuda() -> None:
    """``x.cuda()`` leaves x where it is, the current device is 0, and loss scaling works on the CPU."""
    scaler = importlib.import_module("torch.amp.grad_scaler")
    plain: Any = scaler.GradScaler

    class OnCpu(plain):  # type: ignore[misc]
        """With the device "cuda" it would switch itself off, and fp16 would train without loss scaling."""

        def __init__(self, device: str = "cpu", *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    for owner, name, value in (
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.nn.Module, "cuda", lambda self, *args, **kwargs: self),
        (torch.cuda, "current_device", lambda: 0),
        # Else traiNNer-redux takes fp16 for bf16, which a CPU has no fast kernels for.
        (torch.cuda, "is_bf16_supported", lambda *args: True),
        (scaler, "GradScaler", OnCpu),
        (torch.amp, "GradScaler", OnCpu),
    ):
        setattr(owner, name, value)


def contiguous_filter2d(*modules: str, function: str = "filter2D") -> None:
    """Make what ``filter2D`` gets contiguous: it calls ``view``, and on a CPU some is channels_last."""
    for module in map(importlib.import_module, modules):
        plain: Any = getattr(module, function)
        setattr(module, function, lambda image, kernel, plain=plain: plain(image.contiguous(), kernel))


def load(task: str) -> Any:
    """A script of the traiNNer-redux in the current folder, ready to run on the CPU."""
    sys.path.insert(0, os.getcwd())
    import_torchvision()
    no_cuda()
    script: Any = importlib.import_module(task)
    for package, name in (("traiNNer.archs", "aether_arch"), ("traiNNer.optimizers", "soap32_optim")):
        importlib.import_module(package).__path__.append(str(HERE.parent / "archs"))  # after its own copies
        importlib.import_module(f"{package}.{name}")
    contiguous_filter2d("traiNNer.models.realesrgan_model", function="filter2d")
    sys.path.append(str(HERE))
    importlib.import_module("cpu_speed").speed_up_on_cpu()
    script.torch = torch_with_cuda()
    script.get_env_info = lambda: f"CPU, torch {torch.__version__}"
    return script


def main(argv: Optional[List[str]] = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    parser = Parser("trainner_redux_cpu.py", __doc__)
    parser.add_argument("task", choices=("train", "test"), metavar="train or test", help="its options follow")
    task = parser.parse_args(words[:1]).task
    if not os.path.isdir("traiNNer"):
        raise UserError(f"{os.getcwd()} is no traiNNer-redux; run this in its folder.")
    sys.argv[1:] = words[1:]  # where traiNNer-redux reads its arguments
    getattr(load(task), f"{task}_pipeline")(os.getcwd())


if __name__ == "__main__":
    sys.exit(exit_code("trainner_redux_cpu.py", main, "pass --auto_resume to go on."))
elif __name__ == "__mp_main__":  # a data worker on Windows or macOS, which begins from nothing
    import_torchvision()
