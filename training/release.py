"""Write fused weights in half precision: half the size, the same picture.

    python training/release.py CHECKPOINT weights/2x_MyModel_fp16.safetensors

CHECKPOINT is a training checkpoint or fused weights. Values that half precision can't hold are rescaled
inside the network, exactly. For ONNX files use fuse_aether.py, for a table of quality aether-evaluate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from kept import check_target  # noqa: E402
from safetensors.torch import save  # noqa: E402

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.commands import exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.files import Together  # noqa: E402
from aethersr.half_precision import fit_half_precision_  # noqa: E402
from aethersr.identify import add_img_range, aether_from_state_dict, bounded, variant_name  # noqa: E402


def release(checkpoint: Path, target: Path, bound: Optional[float], img_range: Optional[float]) -> None:
    check_target(target, "TARGET", [checkpoint])
    if bound is not None and not 1e-3 <= bound < 6e4:
        raise UserError(f"--bound {bound:g} is not possible in half precision; pass 0.001 to 60000.")
    state = dict(read_checkpoint(checkpoint, "CHECKPOINT").state)
    try:
        if bound is not None:
            state = bounded(state, bound)
        fused = aether_from_state_dict(state, img_range).fused()
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error} Pass the weights of an AetherNet (CHECKPOINT).") from None
    fit = fit_half_precision_(fused)
    if fit.problem:
        raise UserError(f"{checkpoint}: {fit.problem}; nothing was written (CHECKPOINT).")
    for note in fit.notes():
        print(note)
    metadata = {"architecture": variant_name(fused.options), "scale": str(fused.scale), "form": "fused"}
    halves = {name: value.half().contiguous() for name, value in fused.state_dict().items()}
    try:
        with Together() as files:
            files.part(target).write_bytes(save(halves, {"format": "pt", **metadata}))
            files.commit()
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror} (TARGET).") from None
    print(f"Wrote {target}, {target.stat().st_size / 1e6:.2f} MB")


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("target", type=Path, metavar="TARGET", help=".safetensors; replaced if it exists")
    parser.add_argument("--bound", type=float, help="as in fuse_aether.py")
    add_img_range(parser)
    args = parser.parse_args(argv)
    run = (args.checkpoint, args.target, args.bound, args.img_range)
    return exit_code("release.py", lambda: release(*run), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
