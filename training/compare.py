"""A picture that shows what networks make of a photograph, side by side with details.

    python training/compare.py photo.png shown.jpg --jpeg 75 "clean pictures"=A.safetensors JPEG=B.safetensors

The photograph is reduced by the networks' scale, compressed if --jpeg says so, and upscaled. The first column
is bicubic interpolation, the last the photograph itself; each says its PSNR-Y.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs"), str(ROOT / "demo")]

from sheet import CROPS, side_by_side  # noqa: E402

from aethersr.commands import exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.files import Together, check_output  # noqa: E402
from aethersr.network import open_upscaler  # noqa: E402
from aethersr.quality import compressed, crop_to_multiple, psnr, read_rgb, resize  # noqa: E402


def columns(photograph: Path, networks: Dict[str, Path], jpeg: Optional[int]) -> Dict[str, Image.Image]:
    """Label -> picture."""
    found = {label: open_upscaler(path, "cpu", "LABEL=FILE") for label, path in networks.items()}
    scales = {scale for _, scale in found.values()}
    if len(scales) != 1:
        raise UserError(
            f"the networks' scales are {sorted(scales)}; pass networks of one scale (LABEL=FILE)."
        )
    scale = scales.pop()
    truth = crop_to_multiple(read_rgb(photograph, "PHOTOGRAPH"), scale)
    low = compressed(resize(truth, truth.shape[0] // scale, truth.shape[1] // scale), jpeg)
    shown = {"bicubic": resize(low, *truth.shape[:2])}
    shown.update((label, upscale(low)) for label, (upscale, _) in found.items())
    labelled = {f"{label} {psnr(truth, each, scale):.2f} dB": each for label, each in shown.items()}
    return {label: Image.fromarray(each) for label, each in {**labelled, "photograph": truth}.items()}


def compare(args: argparse.Namespace) -> None:
    networks = dict(tuple(each.split("=", 1)) for each in args.networks if "=" in each)
    if len(networks) != len(args.networks) or "bicubic" in networks:
        raise UserError("give each network a label of its own other than bicubic (LABEL=FILE).")
    check_output(args.output, [args.photograph], True, "OUTPUT")
    pictures = columns(args.photograph, {label: Path(file) for label, file in networks.items()}, args.jpeg)
    with Together() as files:
        side_by_side(pictures, args.details, zoom=3).save(files.part(args.output), "JPEG", quality=92)
        files.commit()
    print(f"Wrote {args.output}: {', '.join(pictures)}")


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    def corner(text: str) -> Tuple[int, int]:
        x, y = map(int, text.split(","))
        return x, y

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("photograph", type=Path, metavar="PHOTOGRAPH")
    parser.add_argument("output", type=Path, metavar="OUTPUT.jpg")
    parser.add_argument("networks", nargs="+", metavar="LABEL=FILE")
    parser.add_argument(
        "--jpeg", type=int, metavar="QUALITY", help="compress the reduced photograph, 1 to 100"
    )
    text = "corners of what is enlarged (default: details of scikit-image's astronaut)"
    parser.add_argument("--details", type=corner, nargs="+", metavar="X,Y", default=CROPS, help=text)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    return exit_code("compare.py", lambda: compare(args), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
