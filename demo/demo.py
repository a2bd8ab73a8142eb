"""Go from photographs to a finished network in one run: train, fuse, export, measure, compare.

    python demo/demo.py [--output DIR] [--quick]

Cuts training pairs from scikit-image's photographs, all but one, and trains aether_small x2 on them with
BasicSR (on a GPU if there is one). aether-fuse fuses it, exports it to ONNX and checks that all compute the
same; aether-evaluate measures the files on the remaining photograph. Ends with its table and comparison.png.
Exit code 2 if bicubic is better.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List, Optional

import numpy as np
import torch
import yaml
from comparison import SIZE, enlarged, photograph, reduced, sheet, upscaled

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs"), str(ROOT / "training")]

import prepare_pictures  # noqa: E402

from aethersr.commands import Parser, evaluate, exit_code, fuse  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.network import load_network  # noqa: E402

SCALE = 2
OPTIONS = ROOT / "options" / "basicsr" / "demo_aether_small_x2.yml"
TRAINER = ROOT / "demo" / "basicsr_train.py"
HELD_OUT = "astronaut"
CUTS = ((200, 60), (300, 330), (125, 340))  # left and top of its face, helmet and badge
# Part of the package, so nothing is downloaded. All are CC0, public domain or without known restrictions.
TRAINING = ["chelsea", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field"]
TRAINING += ["camera", "coins", "brick", "grass", "gravel"]


def train(root: Path, iterations: Optional[int]) -> Path:
    """Train with BasicSR in a process of its own, print its progress, and return the checkpoint."""
    options = yaml.safe_load(OPTIONS.read_text(encoding="utf-8"))
    values = {"num_gpu": int(torch.cuda.is_available())}  # "auto" would multiply the batch by several GPUs
    if iterations:
        values.update({"train:total_iter": iterations, "logger:print_freq": 1})
    command = [sys.executable, "-u", str(TRAINER), "--root", str(root), "-opt", str(OPTIONS), "--force_yml"]
    command += [f"{name}={value}" for name, value in values.items()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process: Any = subprocess.Popen(command, env=one_thread, **pipe)
    lines: List[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            found = re.search(r"iter: *([\d,]*\d).* l_pix: (\S+)", line)
            if found:
                total = iterations or options["train"]["total_iter"]
                print(f"  iteration {found[1]} of {total}, loss {float(found[2]):.4f}", flush=True)
        code = process.wait()
    finally:
        process.kill()  # after Ctrl-C
    checkpoint = root / "experiments" / options["name"] / "models" / "net_g_latest.pth"
    if code or not checkpoint.is_file():
        print("".join(lines[-30:]), file=sys.stderr)
        raise UserError(f"{TRAINER.name} ended with exit code {code}; its last lines stand above.")
    return checkpoint


def check(bicubic: float, networks: List[float]) -> None:
    if not all(each > bicubic for each in networks):
        raise UserError(f"the networks have {networks} dB, bicubic {bicubic}; train longer ({OPTIONS.name}).")


def is_free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def demo(args: argparse.Namespace) -> None:
    places = (ROOT / f"demo_output{'_' * (count > 0)}{count or ''}" for count in itertools.count())
    output = (args.output or next(path for path in places if is_free(path))).resolve()
    if not is_free(output):
        raise UserError(f"{output} is not an empty folder; name another (--output).")
    photographs = output / "photographs"
    photographs.mkdir(parents=True)
    torch.set_num_threads(1)  # more help little, and wait for each other on a busy machine
    start = time.perf_counter()

    def step(text: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    names = TRAINING[:2] if args.quick else TRAINING
    takes = "" if args.quick else "; all takes up to three minutes (--quick: under one)"
    step(f"cutting training pairs from {len(names)} photographs ({HELD_OUT} stays out){takes}")
    for name in names:
        photograph(name, SCALE).save(photographs / f"{name}.png")
    cut = [str(output / "data" / "train"), "--pictures", str(photographs), "--reductions", "1"]
    if prepare_pictures.main(cut):
        raise UserError("cutting failed, for the reason above; start again (--output).")
    step(f"training aether_small x{SCALE} with BasicSR and {OPTIONS.name}")
    checkpoint = train(output, 2 if args.quick else None)
    step("fusing and exporting to ONNX")
    fused = output / "aether_small_x2_fused.pth"
    paths = ["--model_path", str(checkpoint), "--output_path", str(fused)]
    if fuse.main([*paths, "--onnx", "fp32", "--device", "cpu", "--measure"]):
        raise UserError("fusing failed, for the reason above; start again (--output).")
    step(f"measuring on {HELD_OUT}, which was not trained on")
    truth, cuts = photograph(HELD_OUT, SCALE), CUTS
    if args.quick:
        truth, cuts = truth.crop((200, 60, 328, 188)), ((0, 0),)
    truth.save(output / f"{HELD_OUT}.png")
    files = {path.name: load_network(path, "cpu") for path in (fused, *output.glob("*.onnx"))}
    pairs: Any = {HELD_OUT: [(output / f"{HELD_OUT}.png", None)]}
    figures = evaluate.measure(files, pairs[HELD_OUT], SCALE, None)
    low = reduced(truth, SCALE)
    shown = {"bicubic": enlarged(low, SCALE), "AetherNet": upscaled(files[fused.name], low), HELD_OUT: truth}
    whole = {name: np.asarray(picture) for name, picture in shown.items()}
    rows = [{k: v[top : top + SIZE, left : left + SIZE] for k, v in whole.items()} for left, top in cuts]
    sheet(rows).save(output / "comparison.png")
    step(f"done\n\n{evaluate.markdown({HELD_OUT: figures}, pairs, False)}\n")
    print(f"picture: {output / 'comparison.png'}")
    bicubic, *networks = (psnr for ((psnr, _),) in figures.values())
    if not args.quick:
        check(bicubic, networks)


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("demo.py", __doc__)
    text = "new folder for what is written (default: demo_output, then demo_output_1 and so on)"
    parser.add_argument("--output", type=Path, help=text)
    text = "two iterations and a small picture, to see that every step runs; bicubic may win"
    parser.add_argument("--quick", action="store_true", help=text)
    stopped = "start it again, or with --quick, which takes less than a minute."
    return exit_code("demo.py", lambda: demo(parser.parse(argv)), stopped)


if __name__ == "__main__":
    sys.exit(main())
