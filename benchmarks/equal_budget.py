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
import ast
import contextlib
import copy
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("archs", "demo", "training"))]
import aether_arch  # noqa: E402
from cpu_speed import speed_up_on_cpu  # noqa: E402
from cuts import Cuts, Validation  # noqa: E402
from kept import check_target, iterations_of, training_form, write_kept  # noqa: E402

from aethersr.errors import UserError, first_line  # noqa: E402

OURS = ("aether_small", "aether_medium", "aether_large", "AetherNet")
DEFAULTS: Dict[str, Any] = {
    "rate": 1e-3,
    "optimizer": "AdamW",
    "batch": 8,
    "patch": 32,
    "loss": "charbonnier",
    "skip": 0,
}
START = ("start", "freeze_at", "pretrained")  # of AetherNet
POINTS = 6  # measurements of a run


def charbonnier(out: Tensor, target: Tensor) -> Tensor:
    return ((out - target).square() + 1e-12).sqrt().mean()


LOSSES: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {"charbonnier": charbonnier, "mse": F.mse_loss}


def positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


VALUES: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "rate": (lambda value: isinstance(value, (int, float)) and value > 0, "a number above 0"),
    "batch": (positive, "1 or more"),
    "patch": (positive, "1 or more"),
    "loss": (lambda value: value in list(LOSSES), " or ".join(LOSSES)),
    "skip": (lambda value: value in (0, 1), "0 or 1"),
    "start": (lambda value: value in ("plain", "quiet"), "plain or quiet"),
    "freeze_at": (positive, "1 or more"),
    "pretrained": (lambda value: Path(str(value)).is_file(), "a file"),
}


class Run(NamedTuple):
    text: str
    network: str
    training: Dict[str, Any]
    options: Dict[str, Any]


def parse_run(text: str, base: Optional[str] = None) -> Run:
    whole = base + text[len("base") :] if base and text.split(",")[0] == "base" else text
    network, *pairs = re.split(r",(?![^()]*\))", whole)  # not inside (2, 2)
    training, options = dict(DEFAULTS), {}  # type: Dict[str, Any], Dict[str, Any]
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"{text!r}: expected NAME,OPTION=VALUE,..., not {pair!r} (--run)")
        with contextlib.suppress(SyntaxError, ValueError):  # a word stays one
            value = ast.literal_eval(value)
        accepts, what = VALUES.get(name, (lambda value: True, ""))
        if not accepts(value):
            raise SystemExit(f"{text!r}: {name} is {value!r}; expected {what} (--run)")
        if name in START and network not in OURS:
            raise SystemExit(f"{text!r}: {name} is for AetherNet alone; leave it out (--run)")
        (training if name in DEFAULTS or name in START else options)[name] = value
    return Run(text, network, training, options)


# ------------------------------------------------------------------------------------------------ training


class WithSkip(nn.Module):
    def __init__(self, net: nn.Module, scale: int) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + F.interpolate(x, scale_factor=self.scale, mode="bicubic")


def made(run: Run, network: Callable[..., nn.Module], scale: int) -> nn.Module:
    try:
        return network(scale=scale, **run.options)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{run.text!r}: {first_line(error)} (--run)") from None


def build(run: Run, scale: int, checkout: Optional[Path]) -> nn.Module:
    if run.network in OURS:
        net = made(run, getattr(aether_arch, run.network), scale)
        blocks = [module for module in net.modules() if isinstance(module, aether_arch.AetherBlock)]
        if run.training.get("start") == "plain":
            restart([conv for conv in net.modules() if isinstance(conv, nn.Conv2d)])
        if run.training.get("start") == "quiet":
            inside = [
                (block.conv.lk_conv, block.conv.sk_conv, block.ffn.conv_gate, block.ffn.conv_main)
                for block in blocks
            ]
            restart([conv for convs in inside for conv in convs])
            nn.init.trunc_normal_(net.conv_first.weight[net.conv_first.in_channels :], std=0.02)
            for block in blocks:
                nn.init.constant_(block.norm.weight, 0.25)
        if "pretrained" in run.training:
            try:
                net.load_state_dict(training_form(Path(run.training["pretrained"]), "--run"))
            except UserError as error:
                raise SystemExit(str(error)) from None
            except RuntimeError as error:  # other options than the file's
                raise SystemExit(f"{run.text!r}: {first_line(error)} (--run)") from None
    else:
        if checkout is None:
            raise SystemExit(f"{run.network} needs a checkout of traiNNer-redux (--traiNNer-redux)")
        net = made(run, registered(run.network, checkout), scale)
    return WithSkip(net, scale) if run.training["skip"] else net


def restart(convs: List[nn.Conv2d]) -> None:
    for conv in convs:
        nn.init.trunc_normal_(conv.weight, std=0.02)


def registered(name: str, checkout: Path) -> Callable[..., nn.Module]:
    from basicsr_train import import_torchvision

    import_torchvision()
    sys.path.insert(0, str(checkout))
    import traiNNer.archs  # noqa: F401
    from traiNNer.utils import registry

    found: Any = registry.SPANDREL_REGISTRY if name in registry.SPANDREL_REGISTRY else registry.ARCH_REGISTRY
    return found.get(name)


def build_optimizer(net: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    if name in ("AdamW", "NAdam"):
        return getattr(torch.optim, name)(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
    import pytorch_optimizer

    if not hasattr(pytorch_optimizer, name):
        raise SystemExit(f"pytorch-optimizer has no {name}; pass another optimizer (--run)")
    options: Dict[str, Any] = {}
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
    optimizer = build_optimizer(net, options["optimizer"], options["rate"])
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


# ------------------------------------------------------------------------------------------------ results


def table(result: Dict[str, Any]) -> str:
    """Markdown: a row for each run, the mean of its seeds."""
    names = ("run", "seeds", "iterations", "seconds", "PSNR-Y, dB", "each seed", "not averaged", "largest")
    lines = [result["title"], "", f"| {' | '.join(names)} |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for text in dict.fromkeys(row["run"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["run"] == text]
        last = [row["points"][-1] for row in rows]
        iterations, seconds, decibels = (statistics.mean(values) for values in zip(*last))
        each = ", ".join(f"{point[2]:.2f}" for point in last)
        raw = ""
        if all("last" in row for row in rows):  # files of earlier versions lack it
            raw = f"{statistics.mean(row['last'] for row in rows):.2f}"
        largest = max(row["largest"] for row in rows)
        budget = f"{len(rows)} | {iterations:.0f} | {seconds:.0f}"
        lines.append(f"| {text} | {budget} | {decibels:.2f} | {each} | {raw} | {largest:.3g} |")
    return "\n".join(lines) + "\n"


def plotting() -> Any:
    """matplotlib.pyplot for drawing into files. If it is not installed: None, and a message."""
    try:
        import matplotlib
    except ImportError:
        print("no picture without matplotlib: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw(result: Dict[str, Any], path: Path) -> None:
    pyplot = plotting()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for number, text in enumerate(dict.fromkeys(row["run"] for row in result["rows"])):
        for row in (row for row in result["rows"] if row["run"] == text):
            for axis, column in zip(axes, (0, 1)):
                x, y = [point[column] for point in row["points"]], [point[2] for point in row["points"]]
                label = text if row["seed"] == result["rows"][0]["seed"] else None
                axis.plot(x, y, f"C{number % 10}", marker=".", label=label)
    axes[0].set(xlabel="iterations", ylabel="PSNR-Y, dB")
    lowest = min(row["points"][-1][2] for row in result["rows"])
    axes[0].set_ylim(bottom=max(lowest - 0.3, axes[0].get_ylim()[0]))  # a breakdown would flatten the others
    axes[1].set(xlabel="seconds of training steps")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def write(result: Dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table(result))):
        part = output.with_name(f"{output.name}{suffix}.part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, output.with_name(output.name + suffix))


def finished(result: Dict[str, Any], run: Run, seed: int) -> bool:
    return any(row["run"] == run.text and row["seed"] == seed for row in result["rows"])


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="what training/prepare_pictures.py wrote")
    parser.add_argument("--validation", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--run", action="append", required=True, metavar="NAME,OPTION=VALUE,...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", metavar="NAME,OPTION=VALUE,...", help="what base means in --run")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--iterations", type=int, help="budget of each run")
    budget.add_argument("--seconds", type=float, help="budget of each run")
    parser.add_argument("--traiNNer-redux", dest="checkout", type=Path, help="a checkout, for other networks")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", type=int, default=192, help="validation pixels a side")
    parser.add_argument("--limit", type=int, help="read so many cuts only")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="where to keep one run's weights")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "equal_budget")
    args = parser.parse_args(argv)
    args.run = [parse_run(text, args.base) for text in args.run]
    if args.weights:
        only = args.run[0]
        if len(args.run) * len(args.seeds) > 1 or only.network not in OURS or only.training["skip"]:
            raise SystemExit("--weights keeps one AetherNet without a skip; pass one --run and one seed")
        try:
            check_target(args.weights, "--weights")
        except UserError as error:
            raise SystemExit(str(error)) from None
    torch.set_num_threads(args.threads)
    speed_up_on_cpu()
    cuts = Cuts(args.data, args.limit)
    side = min(min(low.shape[:2]) for low, _ in cuts.pairs)
    for run in args.run:
        if run.training["patch"] > side:
            raise SystemExit(f"{run.text!r}: a cut has {side} pixels a side; pass a smaller patch (--run)")
    validation = Validation(args.validation, args.side, cuts.scale)
    wanted = f"{args.iterations} iterations" if args.iterations else f"{args.seconds:g} seconds"
    precision = "bfloat16" if args.bf16 else "float32"
    title = f"x{cuts.scale}, {wanted} a run, {precision}, {len(cuts.pairs)} cuts; measured on "
    title += f"{len(validation.truths)} pictures of {args.side} pixels a side, "
    title += f"bicubic {validation.bicubic():.2f} dB"
    title += f"; base: {args.base}" if args.base else ""
    result: Dict[str, Any] = {"title": title, "rows": []}
    saved = args.output.with_name(args.output.name + ".json")
    if saved.exists():
        result = json.loads(saved.read_text(encoding="utf-8"))
        if result["title"] != title:
            raise SystemExit(f"{saved} holds another comparison ({result['title']}); name another --output")
        if args.weights and finished(result, args.run[0], args.seeds[0]):
            raise SystemExit(f"{saved} holds this run; pass another seed (--seeds) or another --output")
        if result["rows"]:
            print(f"{saved} holds {len(result['rows'])} runs, which are not repeated")
    for seed in args.seeds:
        for run in args.run:
            if not finished(result, run, seed):
                result["rows"].append(train(run, seed, cuts, validation, args))
                write(result, args.output)
    draw(result, args.output.with_name(args.output.name + ".png"))
    print("\n" + table(result))


if __name__ == "__main__":
    main()
