"""Release files of trained weights, and their model card.

    python training/release.py CHECKPOINT FOLDER --calibration PICTURES [--bound 1]

Writes FOLDER/NAME_fp16.safetensors (fused, half precision), and prints the card's table: PSNR-Y on photographs held out from training for
bicubic, the fused network in fp32, the fp16 file, and both int8 placements of ``prepare_qat`` calibrated on PICTURES, in ONNX Runtime.
CHECKPOINT may be fused weights; ``--bound`` is for those trained without one.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs"), str(ROOT / "training")]

import torch  # noqa: E402
from aether_arch import PLACEMENTS, aether_from_state_dict, export_onnx, variant_name  # noqa: E402
from evaluate import evaluate, markdown, upscaler  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fuse_aether import calibration_pairs, fit_half_precision, read_state  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="2x_AetherNet_small_wallpapers")
    parser.add_argument("--calibration", type=Path, required=True, help="pictures, such as the gt folder of training/prepare_pictures.py")
    parser.add_argument("--bound", type=float, help="as in fuse_aether.py")
    args = parser.parse_args()
    state = dict(read_state(args.checkpoint)[0])
    if args.bound is not None:
        state["bound"] = torch.tensor([args.bound])
    fused = aether_from_state_dict(state).fused()
    fit_half_precision(fused, args.checkpoint, print)
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"{args.name}_fp16.safetensors"
    state = {name: value.half().contiguous() for name, value in fused.state_dict().items()}
    metadata = {"format": "pt", "architecture": variant_name(fused.options), "scale": str(fused.scale), "form": "fused"}
    save_file(state, f"{path}.part", metadata)
    os.replace(f"{path}.part", path)
    lows = [low for low, _ in calibration_pairs(args.calibration, fused)]
    with tempfile.TemporaryDirectory() as scratch:
        columns = {"fp32": Path(export_onnx(fused, fused.scale, "fp32", f"{scratch}/fp32.onnx")), "fp16 file": path}
        for placement in PLACEMENTS:
            net = copy.deepcopy(fused).prepare_qat(placement, lows)
            columns[f"int8 {placement}"] = Path(export_onnx(net, fused.scale, "int8", f"{scratch}/{placement}.onnx"))
        print(markdown(evaluate({name: upscaler(file) for name, file in columns.items()}, fused.scale)))
    print(f"\nWrote {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
