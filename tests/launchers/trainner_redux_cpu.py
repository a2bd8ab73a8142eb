"""Run traiNNer-redux's own train.py, test.py or convert_to_onnx.py without CUDA, in its checkout.

Usage:
    python trainner_redux_cpu.py train -opt X.yml [--auto_resume] [--launcher pytorch] [--dump FOLDER]
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import cpu
import torch


def main() -> None:
    which = sys.argv.pop(1)
    folder = cpu.option("--dump")
    cpu.without_downloads()
    sys.path.insert(0, os.getcwd())
    cpu.import_torchvision()
    cpu.no_cuda()
    if "--launcher" in sys.argv:
        cpu.use_gloo()
    cpu.contiguous_filter2d("traiNNer.models.realesrgan_model", function="filter2d")
    script: Any = importlib.import_module(which)
    sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))
    importlib.import_module("cpu_speed").speed_up_on_cpu()
    script.torch = cpu.Torch()
    if which == "convert_to_onnx":
        session = script.ort.InferenceSession
        script.ort.InferenceSession = lambda path, options=None, providers=None, **kwargs: session(
            path, options, ["CPUExecutionProvider"], **kwargs
        )
        script.convert_pipeline(os.getcwd())
        return
    script.get_env_info = lambda: f"CPU, torch {torch.__version__}"
    models = cpu.remember_model(script)
    getattr(script, f"{which}_pipeline")(os.getcwd())
    cpu.dump(folder, models)


if __name__ == "__main__":
    main()
