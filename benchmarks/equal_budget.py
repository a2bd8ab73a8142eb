"""Train networks on the same crops with the same budget, and compare what they have learned.

    python training/prepare_pictures.py datasets/wallpapers
    python training/photographs.py datasets/photographs
    python benchmarks/equal_budget.py --data datasets/wallpapers --validation datasets/photographs \\
        --iterations 600 --seeds 0 1 --run aether_small --run aether_small,rate=5e-4

A run is a network and its options, NAME[,OPTION=VALUE]... Names other than this project's are networks of
traiNNer-redux (plksr_tiny, span, compact, artcnn_r8f64, realplksr_tiny, ...) and need ``--traiNNer-redux``;
"base" stands for what ``--base`` says. Training options are

    rate=1e-3      learning rate; a short warm-up, then cosine down to a fiftieth
    optimizer=AdamW  torch's, or one of pytorch-optimizer (SOAP, Muon, StableAdamW, ...)
    precondition_frequency=10  SOAP: steps between new bases
    batch=8        crops a step
    patch=32       side of a crop in low-resolution pixels
    loss=mse       squared error instead of Charbonnier's loss (almost l1)
    skip=1         add a bicubic enlargement of the input to the output
    start=plain    AetherNet: random weights instead of an interpolation
    start=quiet    AetherNet: small weights inside the blocks, as before version 0.2
    freeze_at=N    AetherNet: keep the norms' statistics fixed from iteration N on
    pretrained=FILE  AetherNet: weights in training form to start from

and every other option goes to the network (drop_path_rate=0.1, bound=1.0, ...). The moving average of the
weights is measured: PSNR-Y, the mean over the folder's pictures (the centre of each, ``--side`` pixels), and
the largest magnitude inside, see cuts.py; at the end the last weights, too. Seconds count only the training
steps, on a CPU their computing time, so that other work matters less.

With ``--weights FILE`` one run's averaged weights are kept, in half precision, and the next run may start
from them: so it trains for some minutes at a time on a borrowed GPU, see docs/training.md.

Writes OUTPUT.json, .md and .png. Runs that the JSON file already holds are not repeated, so a table can grow
and an interruption costs only one run.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import BASES, LOSSES, OURS, ROOT, Run, aether_arch, build, parse_run  # isort: skip: it knows the folders
from budget_results import Results
from cpu_speed import speed_up_on_cpu
from cuts import Cuts, Validation
from kept import check_target, iterations_of, write_kept

from aethersr.commands import check_device, exit_code
from aethersr.errors import UserError

POINTS = 6  # measurements of a run


def build_optimizer(net: nn.Module, training: Dict[str, Any]) -> torch.optim.Optimizer:
    name, rate = training["optimizer"], training["rate"]
    if name in ("AdamW", "NAdam"):
        return getattr(torch.optim, name)(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
    import pytorch_optimizer

    if not isinstance(getattr(pytorch_optimizer, name, None), type):
        raise UserError(f"pytorch-optimizer has no {name}; pass another optimizer (--run).")
    options = {BASES: training[BASES]} if BASES in training else {}
    params: Any = list(net.parameters())
    if name == "Muon":  # for matrices only; vectors get AdamW's steps
        params = [
            {
                "params": [p for p in params if (p.dim() > 1 and p.numel() > p.shape[0]) == matrix],
                "use_muon": matrix,
            }
            for matrix in (True, False)
        ]
        options = {"use_adjusted_lr": True}
    return getattr(pytorch_optimizer, name)(params, lr=rate, weight_decay=0, **options)


def freeze_statistics(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, aether_arch.DeploymentNorm):
            module.eval()


@torch.no_grad()
def average(averaged: nn.Module, net: nn.Module, iteration: int) -> None:
    """Exponential moving average of 0.999, shorter at the start, as in traiNNer-redux."""
    kept = min(0.999, 1 - (1 + iteration) ** -0.75)
    for mean, value in zip(averaged.state_dict().values(), net.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - kept)


def train(
    run: Run, seed: int, cuts: Cuts, validation: Validation, args: argparse.Namespace
) -> Dict[str, Any]:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    options, device = run.training, args.device
    net: Any = build(run, cuts.scale, args.checkout).train()
    net = net.to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(net).eval()
    optimizer = build_optimizer(net, options)
    clock = CLOCKS[device]
    points: List[Tuple[int, float, float]] = []
    iteration, seconds, done = 0, 0.0, 0.0  # done: of the budget
    while done < 1:
        if iteration == options.get("freeze_at"):
            freeze_statistics(net)
        begin = clock()
        cosine = 0.51 + 0.49 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = options["rate"] * min(1, (iteration + 1) / 50) * cosine
        low, high = (x.to(device) for x in cuts.batch(options["batch"], options["patch"], random))
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            out = net(low.contiguous(memory_format=torch.channels_last))
        loss = LOSSES[options["loss"]](out.float(), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average(averaged, net, iteration)
        seconds += clock() - begin
        iteration += 1
        done = seconds / args.seconds if args.seconds else iteration / args.iterations
        if done >= (len(points) + 1) / POINTS:
            points.append((iteration, seconds, validation.measure(averaged, device)))
            text = f"{run.text}, seed {seed}: {iteration} iterations, {seconds:.0f} s, {points[-1][2]:.3f} dB"
            print(text, flush=True)
    if args.weights:
        before = iterations_of(Path(options["pretrained"]), "float") if "pretrained" in options else 0
        write_kept(args.weights, averaged.state_dict(), "float", before + iteration, run.text)
    return {
        "run": run.text,
        "seed": seed,
        "points": points,
        "last": validation.measure(net.eval(), device),
        "largest": validation.largest(averaged, device),
    }


def cpu_seconds() -> float:
    return time.process_time() / torch.get_num_threads()


def cuda_seconds() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: Dict[str, Callable[[], float]] = {"cpu": cpu_seconds, "cuda": cuda_seconds}


def above_zero(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = "positive number"  # argparse's messages say "invalid positive number value"
    return parse


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="what training/prepare_pictures.py wrote")
    parser.add_argument("--validation", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--run", action="append", required=True, metavar="NAME,OPTION=VALUE,...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", metavar="NAME,OPTION=VALUE,...", help="what base means in --run")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--iterations", type=above_zero(int), help="budget of each run")
    budget.add_argument("--seconds", type=above_zero(float), help="budget of each run")
    parser.add_argument("--traiNNer-redux", dest="checkout", type=Path, help="a checkout, for other networks")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--threads", type=above_zero(int), default=1)
    parser.add_argument("--side", type=above_zero(int), default=192, help="validation pixels a side")
    parser.add_argument("--limit", type=above_zero(int), help="read so many cuts only")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="where to keep one run's weights")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "equal_budget")
    return parser.parse_args(argv)


def title_of(args: argparse.Namespace, cuts: Cuts, validation: Validation) -> str:
    wanted = f"{args.iterations} iterations" if args.iterations else f"{args.seconds:g} seconds"
    precision = "bfloat16" if args.bf16 else "float32"
    title = f"x{cuts.scale}, {wanted} a run, {precision}, {len(cuts.pairs)} cuts; measured on "
    title += f"{len(validation.truths)} pictures of {args.side} pixels a side, "
    title += f"bicubic {validation.bicubic():.2f} dB"
    return title + (f"; base: {args.base}" if args.base else "")


def compare(args: argparse.Namespace) -> None:
    runs = [parse_run(text, args.base) for text in args.run]
    check_device(args.device)
    if args.weights:
        if len(runs) * len(args.seeds) > 1 or runs[0].network not in OURS or runs[0].training["skip"]:
            raise UserError("--weights keeps one AetherNet without a skip; pass one --run and one seed.")
        check_target(args.weights, "--weights")
    torch.set_num_threads(args.threads)
    speed_up_on_cpu()
    cuts = Cuts(args.data, args.limit)
    for run in runs:
        if run.training["patch"] > cuts.side:
            raise UserError(
                f"{run.text!r}: a cut has {cuts.side} pixels a side; pass a smaller patch (--run)."
            )
    validation = Validation(args.validation, args.side, cuts.scale)
    results = Results(args.output, title_of(args, cuts, validation))
    if args.weights and results.hold(runs[0].text, args.seeds[0]):
        raise UserError(
            f"{args.output}.json holds this run; pass another seed (--seeds), or another --output."
        )
    if results.rows:
        print(f"{args.output}.json holds {len(results.rows)} runs, which are not repeated")
    for seed in args.seeds:
        for run in runs:
            if not results.hold(run.text, seed):
                results.add(train(run, seed, cuts, validation, args))
    results.draw()
    print("\n" + results.table())


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code(
        "equal_budget.py", lambda: compare(parse_args(argv)), "finished runs are kept, and not repeated."
    )


if __name__ == "__main__":
    sys.exit(main())
