"""Train the released weights in traiNNer-redux, from the template in options/, with one command; again to go on where it stopped.

    python training/train.py --traiNNer-redux CHECKOUT --data FOLDER [--iterations N] [--stage float|qat|qat_full]

FOLDER is what training/prepare_pictures.py wrote. The options are those of the template of that stage with the changes listed in
CHANGES; both end up in CHECKOUT/experiments/NAME. archs/aether_arch.py is copied into the checkout. Without CUDA traiNNer-redux is
started through tests/launchers/trainner_redux_cpu.py, which is all that a CPU needs (bfloat16 autocast pays on CPUs with AVX512-BF16 or AMX).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import yaml

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "options" / "traiNNer-redux" / "train" / "AetherNet"
# What a release trained on two CPU cores for some hours needs different from two days on a card.
CHANGES: Dict[str, Any] = {
    "lq_size": 32,
    "batch_size_per_gpu": 8,
}
CPU: Dict[str, Any] = {"num_gpu": 0, "amp_bf16": True}  # fast on CPUs with AVX512-BF16 or AMX; fp16 is fast on none


def schedule(iterations: int, scheduler: Dict[str, Any]) -> Dict[str, Any]:
    """The template's schedule, shortened."""
    return {"total_iter": iterations, "scheduler": {**scheduler, "total_iters": iterations, "warmup_iters": iterations // 50}}


def options(stage: str, data: Path, iterations: int, pretrained: Path | None) -> Dict[str, Any]:
    suffix = "fidelity" if stage == "float" else "qat"
    result = yaml.safe_load((TEMPLATES / f"AetherNet_small_x2_{suffix}.yml").read_text(encoding="utf-8"))
    result["name"] = f"2x_AetherNet_small_wallpapers_{stage}"
    result["manual_seed"] = 0
    result["datasets"]["train"].update(CHANGES, dataroot_gt=[str(data / "gt")], dataroot_lq=[str(data / "lq")], num_worker_per_gpu=1)
    if CHANGES["batch_size_per_gpu"] <= 8 and stage == "float":
        result["network_g"]["batch_renorm"] = True
    if stage != "float":
        result["network_g"]["qat"] = "full" if stage == "qat_full" else True
    if pretrained:
        result["path"]["pretrain_network_g"] = str(pretrained)
    result["train"].update(schedule(iterations, result["train"]["scheduler"]))
    result["logger"].update(save_checkpoint_freq=max(1, iterations // 20), use_tb_logger=False)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--traiNNer-redux", dest="checkout", type=Path, required=True, help="a checkout of traiNNer-redux")
    parser.add_argument("--python", default=sys.executable, help="the Python that has what traiNNer-redux needs (default: this one)")
    parser.add_argument("--data", type=Path, required=True, help="folder that training/prepare_pictures.py wrote")
    parser.add_argument("--stage", choices=("float", "qat", "qat_full"), default="float")
    parser.add_argument("--iterations", type=int, default=10000)
    parser.add_argument("--pretrained", type=Path, help="weights to start from; the qat stage needs them")
    args = parser.parse_args()
    if not (args.data / "gt").is_dir():
        parser.error(f"there is no {args.data / 'gt'}; training/prepare_pictures.py writes it")
    if args.stage != "float" and not args.pretrained:
        parser.error("--stage qat and qat_full need --pretrained: the float training's net_g_ema_latest.safetensors")
    shutil.copy(ROOT / "archs" / "aether_arch.py", args.checkout / "traiNNer" / "archs")
    result = options(args.stage, args.data.resolve(), args.iterations, args.pretrained and args.pretrained.resolve())
    path = args.checkout / f"{result['name']}.yml"
    path.write_text(yaml.safe_dump(result, sort_keys=False), encoding="utf-8")
    cuda = subprocess.run([args.python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"], check=False).returncode == 0
    script = ["train.py"] if cuda else [str(ROOT / "tests" / "launchers" / "trainner_redux_cpu.py"), "train"]
    if not cuda:
        path.write_text(yaml.safe_dump({**result, **CPU}, sort_keys=False), encoding="utf-8")
    os.chdir(args.checkout)
    raise SystemExit(subprocess.run([args.python, *script, "--auto_resume", "-opt", path.name], check=False).returncode)


if __name__ == "__main__":
    main()
