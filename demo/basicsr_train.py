"""Train an AetherNet with BasicSR as pip installed it: nothing is copied into BasicSR and nothing in it is changed.

    python demo/basicsr_train.py [--root DIR] -opt options/basicsr/X.yml [BasicSR's own flags, such as --force_yml or --launcher pytorch]

Registers archs/aether_arch.py in BasicSR and runs BasicSR's own train_pipeline. ``--root`` (default: the current folder) is the folder
for experiments/ and the one that relative paths in the options file start from. For BasicSR 1.4.2 and the kept-up fork
animesisr-basicsr; from a checkout of BasicSR it is as good to copy archs/aether_arch.py into basicsr/archs/ and use its own train.py.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import List, Optional

ARCH_FILE = Path(__file__).resolve().parents[1] / "archs" / "aether_arch.py"
MODULE = "basicsr.archs.aether_arch"
_declared: list = []  # a torch.library.Library takes its operators away when it is collected


def import_torchvision() -> types.ModuleType:
    """Import torchvision, a build for CUDA beside a PyTorch for CPU too.

    That build's operators don't load then, and the import stops at the first one missing. BasicSR needs none of them to train, so
    declaring their names is enough.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


def register_aether() -> types.ModuleType:
    """Import BasicSR with the AetherNet variants in its registry and return the module that registered them."""
    import_torchvision()
    functional_tensor = "torchvision.transforms.functional_tensor"  # BasicSR 1.4.2 imports it; torchvision 0.17 dropped it
    if functional_tensor not in sys.modules and importlib.util.find_spec(functional_tensor) is None:
        shim = types.ModuleType(functional_tensor)
        shim.rgb_to_grayscale = importlib.import_module("torchvision.transforms.functional").rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[shim.__name__] = shim
    importlib.import_module("basicsr.archs")
    if MODULE not in sys.modules:  # else somebody copied the file into basicsr/archs, and importing that folder registered it
        spec = importlib.util.spec_from_file_location(MODULE, ARCH_FILE)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[MODULE])
    return sys.modules[MODULE]


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--root", default=".", help="folder for experiments/ (default: the current one)")
    parser.add_argument("-opt", required=True, help="BasicSR options file")
    args, flags = parser.parse_known_args(argv)
    options = os.path.abspath(args.opt)
    if not os.path.isfile(options):
        parser.error(f"there is no options file {args.opt}")
    if importlib.util.find_spec("basicsr") is None:
        parser.error("BasicSR is not installed; see requirements-basicsr.txt")
    register_aether()
    os.makedirs(args.root, exist_ok=True)
    os.chdir(args.root)
    sys.argv = [sys.argv[0], "-opt", options, *flags]  # where BasicSR looks for its arguments
    importlib.import_module("basicsr.train").train_pipeline(os.getcwd())


if __name__ == "__main__":
    main()
