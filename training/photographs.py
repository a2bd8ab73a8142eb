"""Write scikit-image's photographs to a folder, to validate on: python training/photographs.py FOLDER

Choose recipes on these, or on your own pictures; keep Set5, Set14 and the like for the final measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

try:
    from skimage import data
except ImportError:
    sys.exit("photographs.py: error: the package scikit-image is missing: pip install scikit-image.")

# All are public domain or CC0, see skimage/data/README.txt.
NAMES = ("astronaut", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "rocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / f"{name}.png")
    print(f"Wrote {len(NAMES)} photographs to {folder}")


if __name__ == "__main__":
    main()
