"""training/trainner_redux_cpu.py for tests: losses without downloads, several processes, ONNX, a dump.

Usage:
    python redux_cpu.py train -opt X.yml [--auto_resume] [--launcher pytorch] [--dump FOLDER]
"""

from __future__ import annotations

import os
import sys
from typing import Any

import cpu
import torch


class OnCpu(cpu.Torch):
    """For convert_to_onnx.py, which names the device."""

    @staticmethod
    def randn(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.randn(*args, **kwargs)

    @staticmethod
    def autocast(device_type: str = "cpu", **kwargs: Any) -> Any:
        return torch.autocast("cpu", **kwargs)


def main() -> None:
    task = sys.argv.pop(1)
    folder = cpu.option("--dump")
    cpu.without_downloads()
    if "--launcher" in sys.argv:
        cpu.use_gloo()
    script = cpu.load(task)
    if task == "convert_to_onnx":
        script.torch = OnCpu()
        session = script.ort.InferenceSession
        script.ort.InferenceSession = lambda path, options=None, providers=None, **kwargs: session(
            path, options, ["CPUExecutionProvider"], **kwargs
        )
        script.convert_pipeline(os.getcwd())
        return
    models = cpu.remember_model(script)
    getattr(script, f"{task}_pipeline")(os.getcwd())
    cpu.dump(folder, models)


if __name__ == "__main__":
    main()
