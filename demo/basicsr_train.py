"""Train an AetherNet in an unmodified BasicSR, as installed by pip.

    python demo/basicsr_train.py -opt options/basicsr/X.yml [BasicSR's own flags]

BasicSR's own train_pipeline runs, with archs/aether_arch.py in its registry. The current folder gets
experiments/, and relative paths start there. For BasicSR 1.4.2 and animesisr-basicsr.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import List, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "training")]

from aethersr.commands import Parser, exit_code  # noqa: E402, I001
from cpu_speed import speed_up_on_cpu  # noqa: E402
from trainner_redux_cpu import import_torchvision  # noqa: E402

from aethersr.errors import UserError  # noqa: E402


def register_aether() -> ModuleType:
    """Import BasicSR with AetherNet in its registry, and return the module that registered it."""
    import_torchvision()
    name = "torchvision.transforms.functional_tensor"  # BasicSR 1.4.2 imports it; torchvision 0.17 dropped it
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        functional = importlib.import_module("torchvision.transforms.functional")
        sys.modules[name] = shim = ModuleType(name)
        shim.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    package = importlib.import_module("basicsr.archs")
    package.__path__.append(str(ROOT / "archs"))  # searched last: a copy inside BasicSR comes first
    return importlib.import_module("basicsr.archs.aether_arch")


def train(argv: Optional[List[str]]) -> None:
    parser = Parser("basicsr_train.py", __doc__)
    parser.add_argument("-opt", required=True, help="BasicSR options file")
    args, flags = parser.parse_known_args(argv)
    if not os.path.isfile(args.opt):
        raise UserError(f"there is no options file {args.opt}; pass another (-opt).")
    if importlib.util.find_spec("basicsr") is None:
        raise UserError("BasicSR is not installed; see requirements-basicsr.txt.")
    register_aether()
    speed_up_on_cpu()
    sys.argv = [sys.argv[0], "-opt", args.opt, *flags]  # where BasicSR reads its arguments
    importlib.import_module("basicsr.train").train_pipeline(os.getcwd())


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("basicsr_train.py", lambda: train(argv), "the same command with --auto_resume goes on.")


if __name__ == "__main__":
    sys.exit(main())
