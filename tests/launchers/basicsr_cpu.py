"""Run BasicSR's own train.py or test.py without CUDA, from a checkout or as pip installed it.

python basicsr_cpu.py train -opt X.yml [--auto_resume] [--launcher pytorch] [--dump FOLDER]
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import cpu
import torch


def main() -> None:
    which = sys.argv.pop(1)
    cpu.prepare()
    cpu.no_cuda()
    sys.path.insert(0, os.getcwd())
    cpu.register_aether()
    if os.path.isdir("basicsr"):  # a checkout: only files that were copied into it count
        del sys.modules["basicsr.archs"].__path__[1:]
    cpu.contiguous_filter2d("basicsr.models.realesrnet_model", "basicsr.models.realesrgan_model")
    load: Any = torch.load

    def load_on_cpu(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return load(file, map_location="cpu", **kwargs)  # resuming asks for a card

    cpu.replace((torch, "load", load_on_cpu))
    script: Any = importlib.import_module(f"basicsr.{which}")
    cpu.run(script, getattr(script, f"{which}_pipeline"))


if __name__ == "__main__":
    main()
