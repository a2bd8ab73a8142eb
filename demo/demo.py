"""Go from photographs to a finished network in one run: train, fuse, export, upscale, compare.

    python demo/demo.py [--output DIR] [--quick]

1. crops a small data set from scikit-image's photographs, all but one;
2. trains aether_small x2 with BasicSR and options/basicsr/demo_aether_small_x2.yml, on a GPU if there is one;
3. fuses the checkpoint with fuse_aether.py, which also writes an ONNX file;
4. upscales the remaining photograph: bicubic, network unfused, fused and in ONNX Runtime;
5. writes comparison.png.

Exit code 1: the three networks disagree, or bicubic is better. Low-resolution pictures are Pillow's bicubic
reductions of whole photographs, cropped afterwards, so that crops have no borders of their own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import yaml
from PIL import Image
from skimage import data

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from sheet import side_by_side  # noqa: E402

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.commands import Parser, exit_code, fuse  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.identify import aether_from_state_dict  # noqa: E402
from aethersr.quality import quality  # noqa: E402
from aethersr.timing import interleaved  # noqa: E402

SCALE = 2
OPTIONS = ROOT / "options" / "basicsr" / "demo_aether_small_x2.yml"
TRAINER = ROOT / "demo" / "basicsr_train.py"
EXPERIMENT = "demo_aether_small_x2"
MARKER = ".aether_demo"  # only folders with this file are ever emptied
HELD_OUT = "astronaut"
# Part of the package, so nothing is downloaded. All are CC0, public domain or without known restrictions.
TRAINING = (
    *("chelsea", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field"),
    *("camera", "coins", "brick", "grass", "gravel"),
)
AGREEMENT = 0.01  # dB between the networks: more than rounding can do, less than an eye could see
TIMED = 64  # side of the low-resolution picture on which times are measured
MOST_THREADS = 4  # crops are too small for more


Way = Callable[[Image.Image], Image.Image]  # low-resolution picture -> upscaled


class Result(NamedTuple):
    name: str
    image: Image.Image
    psnr: float
    ssim: float
    milliseconds: float


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image as RGB, cut to a multiple of the scale."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    return image.crop((0, 0, image.width // SCALE * SCALE, image.height // SCALE * SCALE))


def reduced(image: Image.Image) -> Image.Image:
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.BICUBIC)


def prepare_data(folder: Path, names: Sequence[str] = TRAINING, size: int = 96) -> int:
    """Write pairs of crops to ``folder``/gt and ``folder``/lq and return how many.

    Flat ones, such as sky and black borders, are left out, because they teach nothing.
    """
    for sub in ("gt", "lq"):
        (folder / sub).mkdir(parents=True)
    count = 0
    for name in names:
        gt = photograph(name)
        lq = reduced(gt)
        for top in range(0, gt.height - size + 1, size):
            for left in range(0, gt.width - size + 1, size):
                cut = gt.crop((left, top, left + size, top + size))
                if np.asarray(cut.convert("L")).std() < 8:
                    continue
                box = tuple(side // SCALE for side in (left, top, left + size, top + size))
                cut.save(folder / "gt" / f"{name}_{count:04d}.png", compress_level=1)
                lq.crop(box).save(folder / "lq" / f"{name}_{count:04d}.png", compress_level=1)
                count += 1
    return count


def free_cores() -> int:
    """How many threads have a core of their own: each step would wait for a thread without one."""
    cores = os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else cores / 2
    return max(1, min(MOST_THREADS, round(cores - busy)))


def train(root: Path, iterations: Optional[int]) -> Path:
    """Train with BasicSR in a process of its own, print its progress, and return the checkpoint."""
    values = {"num_gpu": int(torch.cuda.is_available())}  # "auto" would multiply the batch by several GPUs
    if iterations:
        values.update({"train:total_iter": iterations, "logger:print_freq": 1})
    total = iterations or yaml.safe_load(OPTIONS.read_text(encoding="utf-8"))["train"]["total_iter"]
    command = [sys.executable, str(TRAINER), "--root", str(root), "-opt", str(OPTIONS), "--force_yml"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [*command, *(f"{name}={value}" for name, value in values.items())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **threads, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
    )
    lines: List[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line)
            found = re.search(r"iter: *([\d,]*\d).* l_pix: (\S+)", line)
            if found:
                print(f"  iteration {found[1]} of {total}, loss {float(found[2]):.4f}", flush=True)
        code = process.wait()
    finally:
        process.kill()  # after Ctrl-C
    checkpoint = root / "experiments" / EXPERIMENT / "models" / "net_g_latest.pth"
    if code or not checkpoint.is_file():
        print("".join(lines[-30:]), file=sys.stderr)
        raise UserError(f"{TRAINER.name} ended with exit code {code}; its last lines stand above.")
    return checkpoint


def to_array(image: Image.Image) -> np.ndarray:
    """8-bit image -> (1, 3, H, W) float32 in [0, 1]."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255)


def to_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray((array[0].transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8))


def compare(unfused: Path, fused: Path, onnx: Path, truth: Image.Image) -> List[Result]:
    """Picture and quality of each way to upscale ``truth`` from its low-resolution version, and its time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])

    def with_torch(path: Path) -> Way:
        net = torch.no_grad()(aether_from_state_dict(read_checkpoint(path).state))
        return lambda lq: to_image(net(torch.from_numpy(to_array(lq))).numpy())

    ways: Dict[str, Way] = {
        "bicubic": lambda lq: lq.resize((lq.width * SCALE, lq.height * SCALE), Image.Resampling.BICUBIC),
        "AetherNet unfused": with_torch(unfused),
        "AetherNet fused": with_torch(fused),
        "AetherNet ONNX fp32": lambda lq: to_image(session.run(["output"], {"input": to_array(lq)})[0]),
    }
    whole = reduced(truth)
    part = whole.crop((0, 0, TIMED, TIMED))
    times = interleaved({name: partial(way, part) for name, way in ways.items()}, rounds=3)
    results = []
    for name, way in ways.items():
        image = way(whole)
        psnr, ssim = quality(np.asarray(truth), np.asarray(image), SCALE)
        results.append(Result(name, image, psnr, ssim, times.median(name)))
    return results


def table(results: Sequence[Result]) -> str:
    rows = [f"{'':<20} {'PSNR-Y dB':>10} {'SSIM':>8} {f'ms, {TIMED}x{TIMED}':>10}"]
    rows += [
        f"{result.name:<20} {result.psnr:>10.3f} {result.ssim:>8.4f} {result.milliseconds:>10.0f}"
        for result in results
    ]
    return "\n".join(rows)


def complaint(results: Sequence[Result]) -> Optional[str]:
    """What is wrong with the results (bicubic first, then the networks), or None."""
    bicubic, networks = results[0], results[1:]
    values = [network.psnr for network in networks]
    if not max(values) - min(values) <= AGREEMENT:
        return f"the networks differ by {max(values) - min(values):.3f} dB, allowed {AGREEMENT}"
    if not min(values) > bicubic.psnr:
        return f"the network has {min(values):.3f} dB, bicubic {bicubic.psnr:.3f} dB"
    return None


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("demo.py", __doc__)
    text = "folder for what is written; emptied first (default: demo_output)"
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help=text)
    text = "two iterations and a small picture, to see that every step runs; bicubic may win"
    parser.add_argument("--quick", action="store_true", help=text)
    failed: List[bool] = []
    stopped = "start it again, or with --quick, which takes less than a minute."
    return exit_code("demo.py", lambda: failed.append(demo(parser.parse(argv))), stopped) or int(failed[0])


def demo(args: argparse.Namespace) -> bool:
    """All steps. Returns whether something is wrong with the result."""
    output = args.output.resolve()
    if output.exists() and not (output / MARKER).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} is not from an earlier demo and not empty; name another folder (--output)."
        )
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    torch.set_num_threads(free_cores())
    start = time.perf_counter()

    def step(text: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    takes = "quick" if args.quick else "takes up to three minutes (--quick: under one)"
    step(f"uses {torch.get_num_threads()} of {os.cpu_count()} cores; {takes}")
    names = TRAINING[:2] if args.quick else TRAINING
    step(f"cutting training pairs from {len(names)} photographs ({HELD_OUT} stays out)")
    count = prepare_data(output / "data" / "train", names)
    step(f"training aether_small x{SCALE} on {count} pairs with BasicSR and {OPTIONS.name}")
    checkpoint = train(output, 2 if args.quick else None)
    step("fusing and exporting to ONNX")
    fused = output / "aether_small_x2_fused.pth"
    paths = ["--model_path", str(checkpoint), "--output_path", str(fused)]
    if fuse.main([*paths, "--onnx", "fp32", "--device", "cpu"]):
        raise UserError("fusing failed, for the reason above; start again (--output).")
    step(f"upscaling {HELD_OUT}, which was not trained on")
    truth = photograph(HELD_OUT)
    if args.quick:
        truth = truth.crop((190, 50, 318, 178))
    results = compare(checkpoint, fused, output / "aether_small_x2_fp32.onnx", truth)
    shown = {f"{each.name.split()[0]}: {each.psnr:.2f} dB": each.image for each in (results[0], results[3])}
    side_by_side({**shown, "ground truth": truth}).save(output / "comparison.png")
    size = f"{truth.width}x{truth.height}"
    step(f"done: {HELD_OUT} {size}, luma, {SCALE} border pixels left out\n\n{table(results)}\n")
    print(f"picture: {output / 'comparison.png'}")
    wrong = complaint(results)
    if wrong and not (args.quick and "bicubic" in wrong):
        print(f"demo.py: {wrong}", file=sys.stderr)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
