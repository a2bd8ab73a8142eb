"""Write scikit-image's photographs to a folder, to validate on: python training/photographs.py FOLDER

Choose recipes on these, or on your own pictures; keep Set5, Set14 and the like for the final measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aethersr.commands import Parser, exit_code  # noqa: I001
from PIL import Image
from aethersr.errors import UserError, need

# All are public domain or CC0, see skimage/data/README.txt.
NAMES = ("astronaut", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "rocket")


def write(args: argparse.Namespace) -> None:
    need("skimage", "photographs.py", "train")
    from skimage import data

    for path in (args.folder / f"{name}.png" for name in NAMES):
        if path.exists():
            raise UserError(f"{path} exists; name another folder, or remove it (FOLDER).")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            Image.fromarray(getattr(data, name)()).convert("RGB").save(args.folder / f"{name}.png")
    except OSError as error:
        raise UserError(f"{args.folder} can't be written: {error.strerror}; pass another (FOLDER).") from None
    print(f"Wrote {len(NAMES)} photographs to {args.folder}")


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("photographs.py", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them")
    return exit_code("photographs.py", lambda: write(parser.parse(argv)), "not all are written.")


if __name__ == "__main__":
    sys.exit(main())
