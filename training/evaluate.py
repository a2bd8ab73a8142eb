"""PSNR-Y of networks on photographs that they were not trained on: scikit-image's own, which no training script here of 2x weights reads.

    python training/evaluate.py FILE [FILE ...] [--bound B [B ...]] [--data FOLDER [--every N]]

FILE: .pth or .safetensors in any form, or .onnx. With ``--data`` on pairs of your own instead, FOLDER/gt and FOLDER/lq as
training/prepare_pictures.py writes them, every Nth. With ``--bound`` a column for each of these bounds in place of the file's own, to see
which one costs least. Prints a row per photograph and a column per file, after bicubic. Luma of 8-bit images,
without a border of ``scale`` pixels; low-resolution images are Pillow's bicubic reductions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import torch
from PIL import Image
from skimage import data
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "archs")]

from aether_arch import aether_from_state_dict  # noqa: E402

from fuse_aether import UserError, read_state  # noqa: E402

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "brick", "grass", "gravel")
Upscaler = Callable[[np.ndarray], np.ndarray]


def upscaler(path: Path, bound: float | None = None) -> Upscaler:
    """A function from (1, 3, H, W) to (1, 3, scale * H, scale * W), both float32 in [0, 1]."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
        return lambda image: np.asarray(session.run(["output"], {"input": image.astype(dtype)})[0], dtype=np.float32)
    net = aether_from_state_dict(read_state(path)[0])
    if bound is not None:
        net.set_bound(bound)

    @torch.no_grad()
    def run(image: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(image)).numpy()

    return run


def pair(name: str, scale: int) -> tuple[Image.Image, Image.Image]:
    """``name``: one of PHOTOGRAPHS, or the file of a high-resolution picture in a folder gt beside a folder lq."""
    if name not in PHOTOGRAPHS:
        path = Path(name)
        with Image.open(path) as high, Image.open(path.parents[1] / "lq" / path.name) as low:
            return high.convert("RGB"), low.convert("RGB")
    gt = Image.fromarray(getattr(data, name)()).convert("RGB")
    gt = gt.crop((0, 0, gt.width // scale * scale, gt.height // scale * scale))
    return gt, gt.resize((gt.width // scale, gt.height // scale), Image.Resampling.BICUBIC)


def psnr_y(gt: Image.Image, image: np.ndarray, scale: int) -> float:
    """``image``: (H, W, 3) uint8."""
    luma = [rgb2ycbcr(np.asarray(each))[scale:-scale, scale:-scale, 0] for each in (gt, image)]
    return float(peak_signal_noise_ratio(*luma, data_range=255))


def evaluate(upscalers: Dict[str, Upscaler], scale: int = 2, names: tuple[str, ...] = PHOTOGRAPHS) -> Dict[str, Dict[str, float]]:
    """{photograph: {column: dB}}; bicubic is the first column."""
    table: Dict[str, Dict[str, float]] = {}
    for name in names:
        gt, lq = pair(name, scale)
        array = np.ascontiguousarray(np.asarray(lq, dtype=np.float32).transpose(2, 0, 1)[None] / 255)
        table[name] = {"bicubic": psnr_y(gt, np.asarray(lq.resize(gt.size, Image.Resampling.BICUBIC)), scale)}
        for column, run in upscalers.items():
            out = run(array)[0].transpose(1, 2, 0)
            table[name][column] = psnr_y(gt, (out.clip(0, 1) * 255).round().astype(np.uint8), scale)
    return table


def markdown(table: Dict[str, Dict[str, float]]) -> str:
    columns = list(next(iter(table.values())))
    rows: List[List[str]] = [["PSNR-Y, dB", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[Path(name).name, *(f"{row[column]:.3f}" for column in columns)] for name, row in table.items()]
    rows.append(["mean", *(f"{np.mean([row[column] for row in table.values()]):.3f}" for column in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--bound", type=float, nargs="+", help="for float weights")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="pairs in FOLDER/gt and FOLDER/lq")
    parser.add_argument("--every", type=int, default=1, help="take every so many of them")
    args = parser.parse_args()
    for path in args.files:
        if not path.is_file():
            parser.error(f"there is no {path}")
    names = PHOTOGRAPHS
    if args.data:
        names = tuple(str(path) for path in sorted((args.data / "gt").glob("*.png"))[:: max(1, args.every)])
        if not names:
            parser.error(f"there is no .png in {args.data / 'gt'}")
        lonely = [Path(name).name for name in names if not (args.data / "lq" / Path(name).name).is_file()]
        if lonely:
            parser.error(f"{args.data / 'lq'} lacks {lonely[0]} ({len(lonely)} of {len(names)} pictures of gt have no pair there)")
    columns: Dict[str, tuple[Path, float | None]] = {path.name: (path, None) for path in args.files}
    if args.bound:
        columns = {f"{path.name}, bound {bound:g}": (path, bound) for path in args.files for bound in args.bound}
    try:
        upscalers = {name: upscaler(*column) for name, column in columns.items()}
    except UserError as error:
        parser.error(str(error))
    print(markdown(evaluate(upscalers, args.scale, names)))


if __name__ == "__main__":
    main()
