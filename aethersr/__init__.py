"""Tools for AetherNet, the network in aether_arch: checkpoint files, export, upscaling, spandrel.

Names are imported on first use, so ``import aethersr`` needs only PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("aether_arch") is None:  # a checkout whose archs/ is not on the path yet
    sys.path.append(str(Path(__file__).resolve().parents[1] / "archs"))

_HOME = {
    "__version__": "aether_arch",
    "aether_from_state_dict": "aethersr.identify",
    "export_onnx": "aethersr.onnx",
    "install_spandrel": "aethersr.spandrel",
    "read_checkpoint": "aethersr.checkpoint",
    "upscale_tiled": "aethersr.tiling",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return getattr(module, "install" if name == "install_spandrel" else name)
