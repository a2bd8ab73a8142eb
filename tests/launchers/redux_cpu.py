"""training/trainner_redux_cpu.py for tests: losses without downloads, several processes, ONNX, a dump.

python redux_cpu.py train -opt X.yml [--auto_resume] [--launcher pytorch] [--dump FOLDER]
"""

from __future__ import annotations

import os
import sys
from typing import Any

import cpu
import torch


def main() -> None:
    task = sys.argv.pop(1)
    cpu.prepare()
    script = cpu.load(task)
    if task != "convert_to_onnx":
        cpu.run(script, getattr(script, f"{task}_pipeline"))
        return

    def randn(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.randn(*args, **kwargs)

    def autocast(device_type: str = "cpu", **kwargs: Any) -> Any:
        return torch.autocast("cpu", **kwargs)

    session = script.ort.InferenceSession

    def on_cpu(path: str, options: Any = None, providers: Any = None, **kwargs: Any) -> Any:
        return session(path, options, ["CPUExecutionProvider"], **kwargs)

    script.torch = cpu.torch_with_cuda(randn=randn, autocast=autocast)  # the script names the device
    script.ort.InferenceSession = on_cpu
    script.convert_pipeline(os.getcwd())


if __name__ == "__main__":
    main()
