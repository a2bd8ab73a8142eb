"""Upscale pictures with an AetherNet: python upscale.py --help.

The command is in aethersr/commands/upscale.py. AetherNet by Philip Hofmann, https://github.com/phhofm. MIT.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

try:
    from aethersr.commands.upscale import main
except ModuleNotFoundError as error:
    missing = (error.name or "").split(".")[0]
    if missing not in ("aethersr", "aether_arch", "aether_quant"):
        raise
    sys.exit(
        f"upscale.py: error: {missing} is missing; keep this file beside the folders archs and aethersr."
    )

if __name__ == "__main__":
    sys.exit(main())
