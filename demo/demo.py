"""Go from photographs to a finished network in one run: train, fuse, export, measure, compare.

    python demo/demo.py [--output DIR] [--quick]

Cuts training pairs from scikit-image's photographs, all but one, and trains aether_small x2 on them in the
loop of benchmarks/quality.py. aether-fuse fuses it, exports it to ONNX and checks that all compute the same.
aether-evaluate measures the files on the remaining photograph. Ends with its table and comparison.png.
Exit code 2 if bicubic is better.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any, List, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "archs", "benchmarks", "docs", "training")]

from aethersr.commands import Parser, evaluate, exit_code, fuse  # noqa: E402, I001
import numpy as np  # noqa: E402
import prepare_pictures  # noqa: E402
import quality  # noqa: E402
import torch  # noqa: E402
from cpu_speed import speed_up_on_cpu  # noqa: E402
from pictures import SIZE, photograph, resized, sheet, upscaled  # noqa: E402

from aethersr.errors import UserError  # noqa: E402
from aethersr.files import unwritable  # noqa: E402
from aethersr.network import load_network  # noqa: E402

SCALE = 2
RECIPE = "aether_small,batch=4,patch=24,rate=1e-3"
ITERATIONS = 100
HELD_OUT = "astronaut"
CUTS = ((200, 60), (300, 330), (125, 340))  # left and top of its face, helmet and badge
# Part of the package, so nothing is downloaded. All are CC0, public domain or without known restrictions.
TRAINING = ["chelsea", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field"]
TRAINING += ["camera", "coins", "brick", "grass", "gravel"]


def train(pairs: Path, held_out: Path, iterations: int) -> torch.nn.Module:
    """The average of the weights; what it reaches on the way is printed."""
    speed_up_on_cpu()
    budget = argparse.Namespace(iterations=iterations, seconds=None, bf16=False, checkout=None)
    validation = quality.Validation(held_out, SCALE)
    print(f"  bicubic has {validation.bicubic():.2f} dB", flush=True)
    return quality.train_one(quality.parse_run(RECIPE), 0, quality.Cuts(pairs), validation, budget)[1]


def check(bicubic: float, networks: List[float]) -> None:
    if not all(each > bicubic for each in networks):
        raise UserError(f"the networks have {networks} dB, bicubic {bicubic}; train longer.")


def is_free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def demo(args: argparse.Namespace) -> None:
    places = (ROOT / f"demo_output{'_' * (count > 0)}{count or ''}" for count in itertools.count())
    output = (args.output or next(path for path in places if is_free(path))).resolve()
    if not is_free(output):
        raise UserError(f"{output} is not an empty folder; name another (--output).")
    photographs, held_out, pairs = (output / name for name in ("photographs", "held_out", "pairs"))
    try:
        for folder in (photographs, held_out):
            folder.mkdir(parents=True)
        print(f"All results go into {output}.")
    except OSError as error:
        raise unwritable(output, error, "folder (--output)") from error
    torch.set_num_threads(1)  # more help little, and wait for each other on a busy machine
    start = time.perf_counter()

    def step(text: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    names = TRAINING[:2] if args.quick else TRAINING
    takes = "" if args.quick else "; all takes up to three minutes (--quick: under one)"
    step(f"cutting training pairs from {len(names)} photographs ({HELD_OUT} stays out){takes}")
    for name in names:
        photograph(name, SCALE).save(photographs / f"{name}.png")
    truth, cuts = photograph(HELD_OUT, SCALE), CUTS
    if args.quick:
        truth, cuts = truth.crop((200, 60, 328, 188)), ((0, 0),)
    truth.save(held_out / f"{HELD_OUT}.png")
    if prepare_pictures.main([str(pairs), "--pictures", str(photographs), "--reductions", "1"]):
        raise UserError("cutting failed, for the reason above; start again (--output).")
    step(f"training aether_small x{SCALE}; each line has the PSNR in the middle of {HELD_OUT}")
    checkpoint, fused = output / "aether_small_x2_training.pth", output / "aether_small_x2.pth"
    torch.save(train(pairs, held_out, 6 if args.quick else ITERATIONS).state_dict(), checkpoint)
    step("fusing and exporting to ONNX")
    paths = ["--model_path", str(checkpoint), "--output_path", str(fused)]
    if fuse.main([*paths, "--onnx", "fp32", "--device", "cpu", "--measure"]):
        raise UserError("fusing failed, for the reason above; start again (--output).")
    step(f"measuring on {HELD_OUT}, which was not trained on")
    files = {path.name: load_network(path, "cpu") for path in (fused, *output.glob("*.onnx"))}
    high: Any = {HELD_OUT: [(held_out / f"{HELD_OUT}.png", None)]}
    figures = evaluate.measure(files, high[HELD_OUT], SCALE, None)
    low = resized(truth, 1, SCALE)
    shown = {"bicubic": resized(low, SCALE), "AetherNet": upscaled(files[fused.name], low), HELD_OUT: truth}
    whole = {name: np.asarray(picture) for name, picture in shown.items()}
    rows = [{k: v[top : top + SIZE, left : left + SIZE] for k, v in whole.items()} for left, top in cuts]
    sheet(rows).save(output / "comparison.png")
    step(f"done\n\n{evaluate.markdown({HELD_OUT: figures}, high, False)}\n")
    print(f"picture: {output / 'comparison.png'}")
    bicubic, *networks = (psnr for ((psnr, _),) in figures.values())
    if not args.quick:
        check(bicubic, networks)


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("demo.py", __doc__)
    parser.add_argument("--output", type=Path, help="new folder (default: demo_output, demo_output_1, ...)")
    parser.add_argument("--quick", action="store_true", help="see that every step runs; bicubic may win")
    stopped = "start it again, or with --quick, which takes less than a minute."
    return exit_code("demo.py", lambda: demo(parser.parse(argv)), stopped)


if __name__ == "__main__":
    sys.exit(main())
