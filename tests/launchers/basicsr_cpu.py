"""Run BasicSR's own training pipeline without CUDA, in the current folder.

    python basicsr_cpu.py -opt X.yml [--auto_resume] [--launcher pytorch] [--dump FOLDER]
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import cpu
import torch


def main() -> None:
    folder = cpu.option("--dump")
    cpu.without_downloads()
    cpu.no_cuda()
    if "--launcher" in sys.argv:
        cpu.use_gloo()
    cpu.register_aether()
    cpu.contiguous_filter2d("basicsr.models.realesrnet_model", "basicsr.models.realesrgan_model")
    pipeline: Any = importlib.import_module("basicsr.train")
    models = cpu.remember_model(pipeline)
    load: Any = torch.load
    setattr(torch, "load", lambda file, map_location=None, **kwargs: load(file, map_location="cpu", **kwargs))  # noqa: B010  resume asks for a card
    pipeline.train_pipeline(os.getcwd())
    cpu.dump(folder, models)


if __name__ == "__main__":
    main()
