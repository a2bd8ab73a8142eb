"""Start or continue the training of the released weights in traiNNer-redux, in the background.

    python training/train.py --traiNNer-redux CHECKOUT --data FOLDER   # start, continue, or see how far it is
    python training/train.py --traiNNer-redux CHECKOUT --status        # and --pause, --resume, --stop
    python training/train.py --traiNNer-redux CHECKOUT --keep          # newest averaged weights to weights/
    python training/train.py --traiNNer-redux CHECKOUT --data FOLDER_X4 --scale 4 --pretrained X2_WEIGHTS

FOLDER is what training/prepare_pictures.py wrote. The environment variables AETHER_TRAINNER_REDUX,
AETHER_TRAINING_DATA and AETHER_TRAINING_PYTHON replace ``--traiNNer-redux``, ``--data`` and ``--python``, for
``make train``.

The options are those of the template in options/, with smaller crops and batches. A training continues from
its newest state, with the options it began with. If there is none, it starts from ``--pretrained``; or,
without ``--name``, continues from the weights in weights/ that ``--keep`` wrote, with a short warm-up and the
learning rate of that iteration; or from scratch. It runs in one thread at the lowest priority and writes
NAME.yml, NAME.json, NAME.log, NAME.pid and experiments/NAME in CHECKOUT. Without CUDA it starts
traiNNer-redux through tests/launchers/trainner_redux_cpu.py. Needs ``pip install ".[train]"``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

import psutil  # noqa: E402
import yaml  # noqa: E402
from aether_arch import scale_of  # noqa: E402
from kept import check_target, iterations_of, training_form, write_kept  # noqa: E402

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.commands import exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402

TEMPLATES = ROOT / "options" / "traiNNer-redux" / "train" / "AetherNet"
KEPT = "weights/{scale}x_AetherNet_small{stage}_training_fp16.safetensors"
CROP, BATCH = 32, 8
# Degraded on the fly, for the model that repairs pictures: mildly, so that sharp pictures stay sharp.
DEGRADATIONS: Dict[str, Any] = {
    "blur_prob": 0.2, "resize_prob": [0, 0, 1], "gaussian_noise_prob": 0.3, "noise_range": [1, 6],
    "jpeg_prob": 0, "blur_prob2": 0, "resize_prob2": [0, 0, 1], "jpeg_prob2": 0.9, "jpeg_range2": [50, 95],
    "resize_mode_list3": ["bicubic"], "resize_mode_prob3": [1],
}  # fmt: skip
CPU: Dict[str, Any] = {"num_gpu": 0, "amp_bf16": True}  # fast with AVX512-BF16 or AMX, unlike fp16
STAGES = {"float": "fidelity", "otf": "OTF_fidelity", "qat": "qat", "qat_full": "qat"}
WARMUP = 200  # iterations
WINDOWS_FLAGS = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW", "IDLE_PRIORITY_CLASS")
AT_ONCE = 5.0  # seconds: a missing package shows by then


class Training:
    """A named training in a checkout, and its files."""

    def __init__(self, checkout: Path, name: str) -> None:
        self.checkout, self.name = checkout, name
        self.options, self.log, self.pid_file = (checkout / f"{name}.{end}" for end in ("yml", "log", "pid"))
        self.begun = checkout / f"{name}.json"  # its stage, and the iterations behind what it started from
        self.folder = checkout / "experiments" / name

    def process(self) -> Optional[psutil.Process]:
        """The running training, or None. A process of another program may have its number by now."""
        try:
            process = psutil.Process(int(self.pid_file.read_text(encoding="utf-8")))
            ended = process.status() == psutil.STATUS_ZOMBIE
            return None if ended or self.options.name not in process.cmdline() else process
        except (OSError, ValueError, psutil.Error):
            return None

    def act(self, action: str) -> None:
        """Suspend, resume or terminate the training and its data workers."""
        process = self.process()
        if process is None:
            raise UserError(f"{self.name} does not run ({self.pid_file}); start it without this option.")
        everything = [process, *process.children(recursive=True)]
        for each in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(each, action)()
                if action == "terminate" and os.name == "posix":
                    each.resume()  # a paused process would only end later
        if action == "terminate":
            psutil.wait_procs(everything, timeout=20)

    def newest(self, pattern: str) -> Optional[Tuple[int, Path]]:
        """Iteration and path of the newest of the numbered files that match."""
        paths = [path for path in self.folder.glob(pattern) if re.search(r"\d+$", path.stem)]  # not _latest
        return max(((int(re.findall(r"\d+", path.stem)[-1]), path) for path in paths), default=None)

    def status(self) -> str:
        """Whether it runs, and the last iteration, loss and PSNR in its log."""
        process = self.process()
        lines = [f"{self.name}: {f'runs, pid {process.pid}' if process else 'does not run'}"]
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("train_*.log")))
        steps = re.findall(r"iter:\s*([\d,]+),.*?([\d.]+) it/s.*?l_g_total: (\S+)", text)
        if steps:
            iteration, speed, loss = steps[-1]
            lines.append(f"iteration {iteration}, loss {float(loss):.5f}, {speed} iterations a second")
        measured = re.findall(r"psnr: ([\d.]+)", text)
        if measured:
            lines.append(f"PSNR of the last validation: {measured[-1]} dB")
        weights = self.newest("models/net_g_ema_*.safetensors")
        if weights:
            lines.append(f"newest averaged weights: {weights[1]}")
        last = "" if process else self.last_line()
        if last:
            lines.append(f"last line of {self.log.name}: {last}")
        return "\n".join(lines)

    def last_line(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return (text.strip().splitlines() or [""])[-1]


def options(stage: str, scale: int, data: Path, iterations: int, crop: int, batch: int) -> Dict[str, Any]:
    path = TEMPLATES / f"AetherNet_small_x{scale}_{STAGES[stage]}.yml"
    if not path.is_file():
        raise UserError(f"there is no template {path.name}: --stage {stage} is for x2 and x4 (--scale).")
    result: Dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    train = pictures(result)
    train.update(lq_size=crop, batch_size_per_gpu=batch)
    for kind in ("gt", "lq"):
        if f"dataroot_{kind}" in train:  # degraded on the fly: gt alone
            train[f"dataroot_{kind}"] = [str(data / kind)]
    result["manual_seed"] = 0
    if stage == "otf":
        result.update(DEGRADATIONS)
    if stage.startswith("qat"):
        result["network_g"]["qat"] = "full" if stage == "qat_full" else True
    schedule = {"total_iters": iterations, "warmup_iters": min(WARMUP, iterations // 10)}
    result["train"]["scheduler"].update(schedule)
    result["train"]["total_iter"] = iterations
    result["logger"].update(save_checkpoint_freq=max(1, min(500, iterations // 10)), use_tb_logger=False)
    return result


def pictures(settings: Dict[str, Any]) -> Dict[str, Any]:
    return settings["datasets"]["train"]  # type: ignore[no-any-return]


def go_on_from(weights: Path, done: int, settings: Dict[str, Any]) -> None:
    """Continue without the optimizer's state: do the remaining iterations, from the rate it had."""
    train = settings["train"]
    schedule, rate = train["scheduler"], train["optim_g"]["lr"]
    total, lowest = train["total_iter"], schedule["eta_min_ratio"]
    now = lowest + (1 - lowest) * (1 + math.cos(math.pi * min(1.0, done / total))) / 2
    rest = max(total - done, total // 100, 1)
    schedule.update(total_iters=rest, warmup_iters=min(WARMUP, rest // 10), eta_min_ratio=lowest / now)
    train["optim_g"]["lr"] = rate * now
    train["total_iter"] = rest
    settings["path"]["pretrain_network_g"] = str(weights)


def keep(training: Training, target: Path) -> None:
    """Write the newest averaged weights in half precision, training form, with the number of iterations."""
    check_target(target, "--kept")
    newest = training.newest("models/net_g_ema_*.safetensors")
    if newest is None:
        raise UserError(f"{training.folder / 'models'} holds no net_g_ema_*.safetensors; train first.")
    iteration, path = newest
    begun = {"stage": "float", "before": 0}
    if training.begun.is_file():
        begun = json.loads(training.begun.read_text(encoding="utf-8"))
    stage, before = begun["stage"], begun["before"]
    write_kept(target, read_checkpoint(path).state, stage, before + iteration, str(path))


def start(training: Training, args: argparse.Namespace) -> None:
    if args.data is None or not (args.data / "gt").is_dir():
        where = args.data and args.data / "gt"
        raise UserError(f"there is no {where}; training/prepare_pictures.py writes it (--data).")
    if args.stage.startswith("qat") and not args.pretrained:
        raise UserError(
            f"--stage {args.stage} needs float weights to start from; pass them with --pretrained."
        )
    chosen = options(args.stage, args.scale, args.data.resolve(), args.iterations, args.crop, args.batch)
    settings = {**chosen, "name": training.name}
    if args.rate:
        settings["train"]["optim_g"]["lr"] = args.rate
    kept = None if args.pretrained else args.kept
    before = 0
    going_on = training.newest("training_states/*.state") is not None
    if going_on:
        begins = "continues from its newest state, with the options it began with"
        if training.options.is_file():  # as it began; perhaps with other folders and another device
            settings = yaml.safe_load(training.options.read_text(encoding="utf-8"))
            settings.update({name: chosen[name] for name in CPU if name in chosen})
            for name, value in pictures(chosen).items():
                if name.startswith("dataroot") or name == "num_worker_per_gpu":
                    pictures(settings)[name] = value
    elif args.pretrained:
        begins = f"starts from {args.pretrained}"
        if args.stage.startswith("qat"):  # which fused weights can go through, too
            state = read_checkpoint(args.pretrained, "--pretrained").state
        else:
            state = training_form(args.pretrained, "--pretrained")
        other = scale_of(state) != args.scale  # a new tail on the body
        settings["path"].update(pretrain_network_g=str(args.pretrained.resolve()), strict_load_g=not other)
        if not other:  # another scale's iterations don't count
            before = iterations_of(args.pretrained, args.stage)
    elif kept and kept.is_file():
        before = iterations_of(kept, args.stage)
        begins = f"continues from {kept} ({before} iterations), with a warm-up"
        go_on_from(kept.resolve(), before, settings)
    else:
        begins = "starts from scratch"
    python = shutil.which(args.python)
    if python is None:
        raise UserError(f"there is no program {args.python}; pass traiNNer-redux's Python (--python).")
    python = os.path.abspath(python)  # it starts in another folder
    probe = "import torch; print(torch.cuda.is_available())"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f"{python} has no PyTorch; pass the Python that runs traiNNer-redux (--python).")
    device, launcher = "on the GPU", ["train.py"]
    if found.stdout.strip() != "True":
        settings.update(CPU)
        pictures(settings)["num_worker_per_gpu"] = 1
        device = "on the CPU, since PyTorch finds no CUDA"
        launcher = [str(ROOT / "tests" / "launchers" / "trainner_redux_cpu.py"), "train"]
    quant = ["aether_quant.py"] if args.stage.startswith("qat") else []
    for name in ("aether_arch.py", "soap32_optim.py", *quant):
        folder = "optimizers" if name.endswith("_optim.py") else "archs"
        shutil.copy(ROOT / "archs" / name, training.checkout / "traiNNer" / folder / name)
    training.options.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    if not going_on:
        training.begun.write_text(json.dumps({"stage": args.stage, "before": before}), encoding="utf-8")
    command = [python, *launcher, "--auto_resume", "-opt", training.options.name]
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    begin = time.time() - 2  # file systems round times
    with open(training.log, "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=training.checkout,
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives this terminal, as the flags make it on Windows
            creationflags=sum(getattr(subprocess, flag, 0) for flag in WINDOWS_FLAGS),
        )
    if os.name == "posix":
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).nice(19)
    training.pid_file.write_text(str(process.pid), encoding="utf-8")
    print(f"{training.name} {begins}, {device}; pid {process.pid}, log {training.log}", flush=True)
    try:
        code = process.wait(None if args.wait else AT_ONCE)
    except subprocess.TimeoutExpired:
        return
    complete = training.folder / "models" / "net_g_ema_latest.safetensors"
    # traiNNer-redux's code is 0 after most errors, too.
    if code or not complete.is_file() or complete.stat().st_mtime < begin:
        text = f"{training.name} ended with {code} ({training.last_line()[:160]})"
        raise UserError(f"{text}; the reason is in {training.log}.")


def run(args: argparse.Namespace) -> None:
    if args.checkout is None or not (args.checkout / "traiNNer" / "archs").is_dir():
        raise UserError(f"{args.checkout} is no checkout of traiNNer-redux; pass one (--traiNNer-redux).")
    training = Training(args.checkout.resolve(), args.name or f"{args.scale}x_AetherNet_small_{args.stage}")
    if args.keep and args.name and args.kept is None:
        raise UserError(f"say where to write the weights of {args.name}; pass a file (--kept).")
    if args.kept is None and not args.name:
        stage = "" if args.stage == "float" else f"_{args.stage}"
        args.kept = ROOT / KEPT.format(scale=args.scale, stage=stage)
    actions = {"pause": "suspend", "resume": "resume", "stop": "terminate"}
    for option, action in actions.items():
        if getattr(args, option):
            training.act(action)
    if args.keep:
        keep(training, args.kept)
    elif not any(getattr(args, each) for each in (*actions, "status")) and training.process() is None:
        start(training, args)
    else:
        print(training.status())


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    def from_environment(name: str) -> Optional[Path]:
        return Path(os.environ[name]) if os.environ.get(name) else None

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    checkout, data = (from_environment(name) for name in ("AETHER_TRAINNER_REDUX", "AETHER_TRAINING_DATA"))
    parser.add_argument("--traiNNer-redux", dest="checkout", type=Path, default=checkout, metavar="CHECKOUT")
    parser.add_argument(
        "--data", type=Path, default=data, metavar="FOLDER", help="pairs in FOLDER/gt and /lq"
    )
    python = os.environ.get("AETHER_TRAINING_PYTHON") or sys.executable
    parser.add_argument("--python", default=python, help="one with traiNNer-redux's packages (default: this)")
    parser.add_argument("--name", help="the training's name (default: SCALEx_AetherNet_small_STAGE)")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=2)
    text = "float (default), otf: degraded on the fly, qat or qat_full: int8 (placement default or full)"
    parser.add_argument("--stage", choices=tuple(STAGES), default="float", help=text)
    parser.add_argument("--iterations", type=int, default=100000)
    parser.add_argument("--pretrained", type=Path, help="weights to start from; the qat stages need them")
    parser.add_argument("--rate", type=float, help="learning rate (default: the template's)")
    parser.add_argument("--crop", type=int, default=CROP, help="side in low-resolution pixels")
    parser.add_argument("--batch", type=int, default=BATCH, help="crops a step")
    parser.add_argument(
        "--kept", type=Path, help="weights that --keep writes and a training without --name continues from"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wait", action="store_true", help="return only when the training ends")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--status", action="store_true", help="say how far it is, start nothing")
    action.add_argument("--pause", action="store_true", help="stop computing, for instance to measure times")
    action.add_argument("--resume", action="store_true", help="continue after --pause")
    action.add_argument(
        "--stop", action="store_true", help="end it; the next start continues from the newest state"
    )
    action.add_argument("--keep", action="store_true", help="write the newest averaged weights to --kept")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    return exit_code("train.py", lambda: run(args), "the training itself continues.")


if __name__ == "__main__":
    sys.exit(main())
