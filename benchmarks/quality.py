"""What networks learn from the same cuts in the same time; their quality against their time for a picture.

    python training/prepare_pictures.py datasets/wallpapers_textures --textures
    python training/photographs.py datasets/photographs
    python benchmarks/quality.py train benchmarks/results/peers.json --seconds 1800 --bf16 \\
        --data datasets/wallpapers_textures --validation datasets/photographs --traiNNer-redux CHECKOUT \\
        --run aether_small,optimizer=SOAP --run compact,rate=2e-3,optimizer=SOAP
    python benchmarks/quality.py table benchmarks/results/peers.json
    python benchmarks/quality.py draw benchmarks/results/peers.json --output benchmarks/results/quality \\
        --validation datasets/photographs --traiNNer-redux CHECKOUT --weights weights/2x*training*.safetensors

A run is a network and its options, NAME[,OPTION=VALUE]...: one of this project or of traiNNer-redux. Options
of the training are rate=1e-3 (a short warm-up, then cosine down to a fiftieth), optimizer=AdamW (or one of
pytorch-optimizer, such as SOAP), batch=8, patch=32 (low-resolution pixels) and skip=1 (adds a bicubic
enlargement of the input); the others go to the network. The loss is Charbonnier's. What is measured is the
moving average of the weights: PSNR-Y, the mean over the pictures' centres. Seconds count only the training
steps, on a CPU their computing time. Runs that the file holds are not repeated.

``draw`` writes OUTPUT.md and OUTPUT.png: those runs and finished weights, each with its time in ONNX Runtime,
all measured in turns. A line joins the weights, which are ours.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from networks import OURS, above_zero, aether_arch, deployed, machine, opened, peer, short, table, typed
from pairs import Cuts, Validation
from runtimes import onnx_bytes, onnx_runtime
from torch import Tensor, nn
from torch.nn import functional as F

from aethersr.commands import check_device, exit_code
from aethersr.errors import UserError, first_line
from aethersr.files import Together
from aethersr.timing import interleaved

POINTS = 6  # measurements of a run
DEFAULTS = {"rate": 1e-3, "optimizer": "AdamW", "batch": 8, "patch": 32, "skip": 0}
KINDS = ("AetherNet, all from one training", "AetherNet, from scratch", "others, from scratch")


class Run(NamedTuple):
    text: str
    network: str
    training: Dict[str, Any]
    options: Dict[str, Any]


def parse_run(text: str) -> Run:
    network, *pairs = re.split(r",(?![^()]*\))", text)  # not inside (2, 2)
    training, options = dict(DEFAULTS), {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{text!r}: expected NAME,OPTION=VALUE,..., not {pair!r} (--run).")
        with contextlib.suppress(SyntaxError, ValueError):  # a word stays one
            value = ast.literal_eval(value)
        default = DEFAULTS.get(name)
        if isinstance(default, (int, float)):
            number = isinstance(value, (int, type(default))) and value >= (0 if name == "skip" else 1e-9)
            if not number:
                raise UserError(f"{text!r}: {name} is {value!r}; expected a number like {default} (--run).")
        (training if name in DEFAULTS else options)[name] = value
    return Run(text, network, training, options)


class WithSkip(nn.Module):
    def __init__(self, net: nn.Module, scale: int) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + F.interpolate(x, scale_factor=self.scale, mode="bicubic")


def build(run: Run, scale: int, checkout: Optional[Path]) -> nn.Module:
    builder = getattr(aether_arch, run.network) if run.network in OURS else peer(run.network, checkout)
    try:
        net = builder(scale=scale, **run.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.text!r}: {first_line(error)} (--run)") from None
    return WithSkip(net, scale) if run.training["skip"] else net


def build_optimizer(net: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
    import pytorch_optimizer

    if not isinstance(getattr(pytorch_optimizer, str(name), None), type):
        raise UserError(f"pytorch-optimizer has no {name}; pass another optimizer (--run).")
    return getattr(pytorch_optimizer, name)(net.parameters(), lr=rate, weight_decay=0)


@torch.no_grad()
def average(averaged: nn.Module, net: nn.Module, iteration: int) -> None:
    """Exponential moving average of 0.999, shorter at the start, as in traiNNer-redux."""
    kept = min(0.999, 1 - (1 + iteration) ** -0.75)
    for mean, value in zip(averaged.state_dict().values(), net.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - kept)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize()
    return time.perf_counter()


def train_one(run: Run, seed: int, cuts: Cuts, validation: Validation, args: Any) -> Dict[str, Any]:
    torch.manual_seed(seed)
    random, options, device = np.random.default_rng(seed), run.training, args.device
    net: Any = build(run, cuts.scale, args.checkout).train()
    net = net.to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(net).eval()
    optimizer = build_optimizer(net, options["optimizer"], options["rate"])
    points: List[List[float]] = []
    iteration, seconds, done = 0, 0.0, 0.0  # done: of the budget
    while done < 1:
        begin = clock(device)
        rate = options["rate"] * min(1, (iteration + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        low, high = (x.to(device) for x in cuts.batch(options["batch"], options["patch"], random))
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            out = net(low.contiguous(memory_format=torch.channels_last))
        loss = ((out.float() - high).square() + 1e-12).sqrt().mean()  # Charbonnier's
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average(averaged, net, iteration)
        seconds += clock(device) - begin
        iteration += 1
        done = seconds / args.seconds if args.seconds else iteration / args.iterations
        if done >= (len(points) + 1) / POINTS:
            points.append([iteration, round(seconds, 1), round(validation.measure(averaged, device), 5)])
            told = f"{iteration} iterations, {seconds:.0f} s, {points[-1][2]:.2f} dB"
            print(f"{run.text}, seed {seed}: {told}", flush=True)
    return {"run": run.text, "seed": seed, "machine": machine(device), "points": points}


def train(args: argparse.Namespace) -> None:
    runs = [parse_run(text) for text in args.run]
    check_device(args.device)
    torch.set_num_threads(args.threads)
    from cpu_speed import speed_up_on_cpu

    speed_up_on_cpu()
    cuts = Cuts(args.data)
    for run in runs:
        if run.training["patch"] > cuts.side:
            found = f"{run.text!r}: a cut has {cuts.side} pixels a side"
            raise UserError(f"{found}; pass a smaller patch (--run).")
    validation = Validation(args.validation, args.side, cuts.scale)
    title = f"x{cuts.scale}, {len(cuts.pairs)} cuts; measured on {len(validation.truths)} pictures of "
    title += f"{args.side} pixels a side, bicubic {validation.bicubic():.2f} dB"
    budget = ["--iterations", str(args.iterations)] if args.iterations else ["--seconds", f"{args.seconds:g}"]
    result: Any = {"title": title, "setting": budget + ["--bf16"] * args.bf16, "rows": []}
    if args.file.exists():
        held = read_results(args.file)
        if (held["title"], held["setting"]) != (title, result["setting"]):
            found = f"{args.file} holds another comparison ({held['title']}, {' '.join(held['setting'])})"
            raise UserError(f"{found}; name another FILE.")
        result = held
        print(f"{args.file} holds {len(result['rows'])} runs, which are not repeated")
    for run, seed in [(run, seed) for seed in args.seeds for run in runs]:
        if not any((row["run"], row["seed"]) == (run.text, seed) for row in result["rows"]):
            result["rows"].append(train_one(run, seed, cuts, validation, args))
            with Together() as files:
                text = json.dumps(result, indent=1) + "\n"
                files.part(args.file).write_text(text, encoding="utf-8")
                files.commit()
    print("\n" + runs_table(result))


def read_results(path: Path) -> Dict[str, Any]:
    """A comparison: its title, its setting in words of the command line, and its rows."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {name: result[name] for name in ("title", "setting", "rows")}
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); quality.py train writes it (FILE)."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is no results file of quality.py; pass another (FILE).") from None


def runs_table(result: Dict[str, Any]) -> str:
    """Markdown: a row for each run, the mean of its seeds."""
    of_run: Dict[str, Any] = {}
    for row in result["rows"]:
        of_run.setdefault(row["run"], []).append(row)
    lines = []
    for text, rows in of_run.items():
        iterations, seconds, decibels = zip(*(row["points"][-1] for row in rows))
        means = [f"{statistics.mean(values):.0f}" for values in (iterations, seconds)]
        half = statistics.mean(row["points"][len(row["points"]) // 2 - 1][2] for row in rows)
        each = ", ".join(f"{value:.2f}" for value in decibels)
        lines.append([text, *means, f"{half:.2f}", f"{statistics.mean(decibels):.2f}", each])
    words = ["train", "FILE", "--data", "CUTS", "--validation", "PICTURES", *result["setting"]]
    words += ["--seeds", *sorted({str(row["seed"]) for row in result["rows"]})]
    words += [word for text in of_run for word in ("--run", text)]
    head = ["run", "iterations", "seconds", "dB halfway", "dB at the end", "each seed"]
    machines = "\n".join(dict.fromkeys(f"Measured {row['machine']}." for row in result["rows"]))
    command = f"`{typed('quality.py', words, {})}`"
    return "\n".join([result["title"], "", command, "", *table(head, lines), "", machines])


class Point(NamedTuple):
    name: str
    kind: str
    decibels: List[float]  # of each seed
    call: Any  # what upscales a picture in ONNX Runtime


def points_of(result: Dict[str, Any], args: argparse.Namespace) -> List[Point]:
    scale = int(result["title"].split(",")[0].lstrip("x"))
    validation, image = Validation(args.validation, args.side, scale), torch.rand(1, 3, 128, 128)

    def point(name: str, kind: str, decibels: List[float], net: nn.Module) -> Point:
        run = onnx_runtime(onnx_bytes(deployed(net.eval()), image, False), args.threads)
        return Point(name, kind, decibels, lambda: run(image.numpy()))

    found = []
    for path in args.weights:
        net = opened(path, "--weights")
        if net.scale != scale:
            raise UserError(f"{path} is x{net.scale}; expected x{scale}, as in {args.file} (--weights).")
        found.append(point(path.stem, KINDS[0], [validation.measure(net, "cpu")], net))
    for text in dict.fromkeys(row["run"] for row in result["rows"]):
        run = parse_run(text)
        kind = KINDS[1] if run.network in OURS else KINDS[2]
        decibels = [row["points"][-1][2] for row in result["rows"] if row["run"] == text]
        found.append(point(text, kind, decibels, build(run, scale, args.checkout)))
    return found


def draw(args: argparse.Namespace) -> None:
    result = read_results(args.file)
    torch.set_num_threads(args.threads)
    points = points_of(result, args)
    times = interleaved({point.name: point.call for point in points}, rounds=15, seconds=120)
    first, ms = points[0].name, {point.name: times.median(point.name) for point in points}
    points.sort(key=lambda point: ms[point.name])
    rows = []
    for point in points:
        ratio, mean = times.ratio(point.name, first).value, statistics.mean(point.decibels)
        rows.append([point.name, point.kind, short(ms[point.name]), f"{ratio:.2f}", f"{mean:.2f}"])
    head = ["network", "what", "ms", f"of {first}'s time", "PSNR-Y, dB"]
    budget = f"from scratch: {' '.join(result['setting']).replace('--', '')} each"
    told = f"{result['title']}; {budget}. Time: 128x128 in ONNX Runtime, {args.threads} thread(s)."
    text = "\n".join([f"{machine()}.", "", f"`{args.typed}`", "", told, "", *table(head, rows)])
    print(text)
    with Together() as files:
        files.part(args.output.with_suffix(".md")).write_text(text + "\n", encoding="utf-8")
        try:
            figure = scatter(points, ms, budget)
            figure.savefig(files.part(args.output.with_suffix(".png")), dpi=110, format="png")
        except ImportError:
            print("no picture without matplotlib: pip install matplotlib", file=sys.stderr)
        files.commit()


def scatter(points: List[Point], ms: Dict[str, float], budget: str) -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for kind, style in zip(KINDS, ("C3o-", "C3s", "C0o")):
        of_kind = [(ms[point.name], statistics.mean(point.decibels), point) for point in points]
        of_kind = [(x, y, point) for x, y, point in of_kind if point.kind == kind]
        axis.plot([x for x, *_ in of_kind], [y for _, y, _ in of_kind], style, label=kind)
        for x, y, point in of_kind:
            name = point.name.split(",")[0]
            axis.annotate(name, (x, y), (6, 4), textcoords="offset points", fontsize=9)
    axis.set(
        xlabel="time for a picture, ms (ONNX Runtime on a CPU)", ylabel="quality, dB (PSNR-Y)", xscale="log"
    )
    axis.set_title(f"Quality against time: up and left is better\n{budget}", fontsize=11)
    axis.margins(x=0.2)
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    return figure


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="train, table or draw")
    parsers = {}
    for action in (train, show, draw):
        parsers[action] = commands.add_parser(
            "table" if action == show else action.__name__, allow_abbrev=False
        )
        parsers[action].add_argument("file", type=Path, metavar="FILE", help="of the runs: train writes it")
        parsers[action].set_defaults(action=action, checkout=None, validation=None)
    for each in (parsers[train], parsers[draw]):
        each.add_argument("--validation", type=Path, required=True, help="folder of pictures")
        each.add_argument("--side", type=above_zero(int), default=192, help="validation pixels a side")
        each.add_argument("--traiNNer-redux", dest="checkout", type=Path, help="a checkout, for others")
        each.add_argument("--threads", type=above_zero(int), default=1)
    add = parsers[train].add_argument
    add("--data", type=Path, required=True, help="what training/prepare_pictures.py wrote")
    add("--run", action="append", required=True, metavar="NAME,OPTION=VALUE,...")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    budget = parsers[train].add_mutually_exclusive_group(required=True)
    budget.add_argument("--iterations", type=above_zero(int), help="budget of each run")
    budget.add_argument("--seconds", type=above_zero(float), help="budget of each run")
    parsers[draw].add_argument("--weights", type=Path, nargs="+", default=[], help="AetherNets in any form")
    parsers[draw].add_argument("--output", type=Path, required=True, help="of OUTPUT.md and OUTPUT.png")
    args = parser.parse_args(argv)
    args.typed = typed("quality.py", argv, {"CHECKOUT": args.checkout, "PICTURES": args.validation})
    return args


def show(args: argparse.Namespace) -> None:
    print(runs_table(read_results(args.file)))


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    return exit_code("quality.py", lambda: args.action(args), "finished runs are kept.")


if __name__ == "__main__":
    sys.exit(main())
