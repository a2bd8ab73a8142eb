"""What networks learn in the same time on a CPU core; their quality against their time for a picture.

    python training/prepare_pictures.py datasets/wallpapers_textures --textures
    python training/photographs.py datasets/photographs
    python benchmarks/quality.py train benchmarks/results/peers.json --seconds 1800 --bf16 \\
        --data datasets/wallpapers_textures --validation datasets/photographs --traiNNer-redux CHECKOUT \\
        --run aether_small,optimizer=SOAP --run compact,rate=2e-3,optimizer=SOAP
    python benchmarks/quality.py table benchmarks/results/peers.json
    python benchmarks/quality.py draw benchmarks/results/peers.json --output benchmarks/results/quality \\
        --validation datasets/photographs --traiNNer-redux CHECKOUT --weights weights/2x*training*.safetensors

A run is a network of this project or of traiNNer-redux, NAME[,OPTION=VALUE]..., or a training checkpoint of
this project, FILE[,OPTION=VALUE]... Options of the training are rate=1e-3 (a short warm-up, then cosine down
to a fiftieth), optimizer=AdamW (or one of pytorch-optimizer), batch=8, patch=32 (low-resolution pixels),
skip=1 (adds a bicubic enlargement of the input), iterations=N (its own budget) and teacher=FILE (a network
whose output is the target in half of the loss); the others go to the network. The loss is Charbonnier's.
PSNR-Y is that of the weights' moving average, the mean over the pictures' centres. Seconds are those that a
CPU core computed in the training steps. A run is never repeated.

``draw`` writes OUTPUT.md and OUTPUT.png: the runs and finished weights with their times in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aethersr.commands import Parser, exit_code  # noqa: I001
import numpy as np
import torch
import networks
from networks import OURS, positive, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from aethersr.checkpoint import ENDINGS
from aethersr.errors import UserError, first_line, need
from aethersr.files import Together
from aethersr.folders import find_pictures
from aethersr.quality import crop_to_multiple, psnr, read_rgb, resize
from aethersr.timing import interleaved

POINTS = 6  # measurements of a run
SIDE = 192  # pixels of a validation picture's centre
DEFAULTS: Dict[str, Any] = {"rate": 1e-3, "optimizer": "AdamW", "batch": 8, "patch": 32, "skip": 0}
DEFAULTS.update(iterations=0, teacher="")
KINDS = ("AetherNet, all from one training", "AetherNet, from scratch", "others, from scratch")


def as_images(pictures: List[Any]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


class Cuts:
    """Random crops of a folder's pairs, rotated and flipped, the same for the same seed."""

    def __init__(self, folder: Path) -> None:
        names = sorted(path.name for path in (folder / "gt").glob("*.png"))
        if not names:
            raise UserError(f"{folder}/gt holds no .png; training/prepare_pictures.py writes pairs (--data).")
        self.pairs = [[read_rgb(folder / sub / name, "--data") for sub in ("lq", "gt")] for name in names]
        self.side = min(min(low.shape[:2]) for low, _ in self.pairs)  # of the smallest cut, low resolution
        self.scale = self.pairs[0][1].shape[0] // self.pairs[0][0].shape[0]

    def batch(self, count: int, patch: int, random: np.random.Generator) -> Tuple[Tensor, Tensor]:
        crops: Dict[int, List[Any]] = {1: [], self.scale: []}
        for _ in range(count):
            low, high = self.pairs[random.integers(len(self.pairs))]
            y, x = (int(random.integers(side - patch + 1)) for side in low.shape[:2])
            turns, mirrored = int(random.integers(4)), bool(random.integers(2))
            for picture, scale in ((low, 1), (high, self.scale)):
                crop = picture[y * scale : (y + patch) * scale, x * scale : (x + patch) * scale]
                crops[scale].append(np.rot90(crop[:, ::-1] if mirrored else crop, turns))
        return as_images(crops[1]), as_images(crops[self.scale])


class Validation:
    """The centres of a folder's pictures, and their reductions, made as in MATLAB."""

    def __init__(self, folder: Path, scale: int) -> None:
        self.pairs, self.scale = [], scale
        for path in find_pictures(folder, "--validation"):
            picture = read_rgb(path, "--validation")
            top, left = (max(0, length - SIDE) // 2 for length in picture.shape[:2])
            truth = crop_to_multiple(picture[top : top + SIDE, left : left + SIDE], scale)
            self.pairs.append((truth, resize(truth, truth.shape[0] // scale, truth.shape[1] // scale)))

    def bicubic(self) -> float:
        return mean(psnr(truth, resize(low, *truth.shape[:2]), self.scale) for truth, low in self.pairs)

    @torch.no_grad()
    def measure(self, net: nn.Module) -> float:
        """The mean PSNR-Y, in dB."""
        found = []
        for truth, low in self.pairs:
            out = net(as_images([low]))[0].permute(1, 2, 0).nan_to_num().clamp(0, 1)
            found.append(psnr(truth, (out * 255).round().to(torch.uint8).numpy(), self.scale))
        return mean(found)


class Run(NamedTuple):
    text: str
    network: str
    training: Dict[str, Any]
    options: Dict[str, Any]


def parse_run(text: str) -> Run:
    network, *pairs = re.split(r",(?![^()]*\))", text)  # not inside (2, 2)
    training, options = dict(DEFAULTS), {}
    for name, equals, value in (pair.partition("=") for pair in pairs):
        if not equals:
            raise UserError(f"{text!r}: expected NAME,OPTION=VALUE,..., not {name!r} (--run).")
        try:
            if name in DEFAULTS:
                training[name] = type(DEFAULTS[name])(value)
                if not (isinstance(training[name], str) or training[name] > 0):
                    raise ValueError
            else:
                options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{text!r}: {name} can't be {value!r}; pass another value (--run).") from None
    return Run(text, network, training, options)


class WithSkip(nn.Module):
    def __init__(self, net: nn.Module, scale: int) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + F.interpolate(x, scale_factor=self.scale, mode="bicubic")


def opened(path: Path, flag: str, scale: int) -> Any:
    net = networks.opened(path, flag)
    if (net.scale, net.options["in_chans"]) != (scale, 3):
        found = f"{path} is x{net.scale} for {net.options['in_chans']} channels"
        raise UserError(f"{found}; expected x{scale} for 3, as the others ({flag}).")
    return net


def build(run: Run, scale: int, checkout: Optional[Path]) -> Tuple[Any, Any]:
    """The network to train, and its teacher or None."""
    builder: Any = partial(opened, Path(run.network), "--run")
    if not run.network.endswith(ENDINGS):
        ours = run.network in OURS
        builder = getattr(networks.aether_arch, run.network) if ours else networks.peer(run.network, checkout)
    try:
        net = builder(scale=scale, **run.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.text!r}: {first_line(error)} (--run)") from None
    if isinstance(net, networks.aether_arch.FusedAetherNet):
        raise UserError(f"{run.network} can't be trained; pass its training form (--run).")
    path = run.training["teacher"]
    teacher = opened(Path(path), "--run", scale).fused() if path else None
    return WithSkip(net, scale) if run.training["skip"] else net, teacher


def build_optimizer(net: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=0)
    import pytorch_optimizer

    made: Any = getattr(pytorch_optimizer, name, None)
    if not isinstance(made, type):
        raise UserError(f"pytorch-optimizer has no {name}; pass another optimizer (--run).")
    return made(net.parameters(), lr=rate, weight_decay=0)  # type: ignore[no-any-return]


def moving(average: Tensor, new: Tensor, count: Any) -> Tensor:
    """Exponential moving average of 0.999, shorter at the start, as in traiNNer-redux."""
    return average.lerp(new, max(0.001, (1 + float(count)) ** -0.75)) if new.is_floating_point() else new


def train_one(run: Run, seed: int, cuts: Cuts, validation: Validation, args: Any) -> Tuple[Any, Any]:
    """A row of the results, and the averaged network."""
    torch.manual_seed(seed)
    random, options = np.random.default_rng(seed), run.training
    net, teacher = build(run, cuts.scale, args.checkout)
    net = net.train().to(memory_format=torch.channels_last)
    averaged = AveragedModel(net, avg_fn=moving, use_buffers=True).eval()
    optimizer = build_optimizer(net, options["optimizer"], options["rate"])
    iterations = options["iterations"] or args.iterations
    points: List[List[float]] = []
    iteration, seconds, done = 0, 0.0, 0.0  # done: of the budget
    while done < 1:
        begin = time.process_time()
        rate = options["rate"] * min(1, (iteration + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        low, high = cuts.batch(options["batch"], options["patch"], random)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            out = net(low.contiguous(memory_format=torch.channels_last))
            with torch.no_grad():
                targets = [high] if teacher is None else [high, teacher(low).float()]
        # Charbonnier's
        loss = sum(((out.float() - each).square() + 1e-12).sqrt().mean() for each in targets) / len(targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(net)
        seconds += time.process_time() - begin
        iteration += 1
        done = iteration / iterations if iterations else seconds / args.seconds
        if done >= (len(points) + 1) / POINTS:
            points.append([iteration, round(seconds, 1), round(validation.measure(averaged), 5)])
            told = f"{iteration} iterations, {seconds:.0f} s of computing, {points[-1][2]:.2f} dB"
            print(f"{run.text}, seed {seed}: {told}", flush=True)
    return {"run": run.text, "seed": seed, "machine": networks.machine(), "points": points}, averaged.module


def train(args: argparse.Namespace) -> None:
    runs = [parse_run(text) for text in args.run]
    from cpu_speed import speed_up_on_cpu

    speed_up_on_cpu()
    cuts = Cuts(args.data)
    for run in runs:  # a mistake in the last one is found before the first one trains
        build(run, cuts.scale, args.checkout)
        if run.training["patch"] > cuts.side:
            raise UserError(f"{run.text!r}: a cut has {cuts.side} pixels a side; pass another patch (--run).")
    validation = Validation(args.validation, cuts.scale)
    title = f"x{cuts.scale}, {len(cuts.pairs)} cuts; measured on {len(validation.pairs)} pictures of "
    title += f"{SIDE} pixels a side, bicubic {validation.bicubic():.2f} dB"
    budget = f"--seconds {args.seconds:g}" if args.seconds else f"--iterations {args.iterations}"
    setting = [*budget.split(), *["--bf16"] * args.bf16]
    result: Any = read_results(args.file) if args.file.exists() else {"rows": []}
    if result.setdefault("title", title) != title or result.setdefault("setting", setting) != setting:
        held = f"{result['title']}, {' '.join(result['setting'])}"
        raise UserError(f"{args.file} holds another comparison ({held}); name another FILE.")
    print(f"{args.file} holds {len(result['rows'])} runs, which are not repeated")
    for run, seed in [(run, seed) for seed in args.seeds for run in runs]:
        if not any((row["run"], row["seed"]) == (run.text, seed) for row in result["rows"]):
            result["rows"].append(train_one(run, seed, cuts, validation, args)[0])
            with Together() as files:
                files.part(args.file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                files.commit()
    show(args)


def read_results(path: Path) -> Dict[str, Any]:
    """A comparison: its title, its setting in words of the command line, and its rows."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {name: result[name] for name in ("title", "setting", "rows")}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; pass another (FILE).") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} holds no runs; quality.py train writes such a file (FILE).") from None


def show(args: argparse.Namespace) -> None:
    """Print a row for each run, the mean of its seeds."""
    result = read_results(args.file)
    of_run: Dict[str, Any] = {}
    for row in result["rows"]:
        of_run.setdefault(row["run"], []).append(row)
    lines = []
    for text, rows in of_run.items():
        iterations, seconds, decibels = zip(*(row["points"][-1] for row in rows))
        each = ", ".join(f"{value:.2f}" for value in decibels)
        means = f"{mean(iterations):.0f}", f"{mean(seconds):.0f}", f"{mean(decibels):.2f}"
        lines.append([text, *means, each])
    words = ["train", "FILE", "--data", "CUTS", "--validation", "PICTURES", *result["setting"], "--seeds"]
    words += sorted({str(row["seed"]) for row in result["rows"]})
    words += [word for text in of_run for word in ("--run", text)]
    head = ["run", "iterations", "seconds", "dB at the end", "each seed"]
    machines = dict.fromkeys(f"Measured {row['machine']}." for row in result["rows"])
    command = f"`{networks.typed('quality.py', words, {})}`"
    print("\n".join([result["title"], "", command, "", *table(head, lines), "", *machines]))


Point = Tuple[str, str, float, nn.Module]  # name, kind, PSNR in dB, network


def points_of(result: Dict[str, Any], args: argparse.Namespace) -> List[Point]:
    scale = int(result["title"].split(",")[0].lstrip("x"))
    validation, found = Validation(args.validation, scale), []
    for path in args.weights:
        net = opened(path, "--weights", scale)
        found.append((path.stem, KINDS[0], validation.measure(net), net))
    for text in dict.fromkeys(row["run"] for row in result["rows"]):
        run = parse_run(text)
        decibels = mean(row["points"][-1][2] for row in result["rows"] if row["run"] == text)
        kind = KINDS[0 if run.network.endswith(ENDINGS) else 1 if run.network in OURS else 2]
        found.append((text, kind, decibels, build(run, scale, args.checkout)[0].eval()))
    return found


def draw(args: argparse.Namespace) -> None:
    need("matplotlib", "quality.py draw")
    result, image, calls = read_results(args.file), torch.rand(1, 3, 128, 128), {}
    points = points_of(result, args)
    for name, _, _, net in points:
        file = networks.onnx_bytes(networks.deployed(net), image, False)
        calls[name] = partial(networks.onnx_runtime(file), image.numpy())
    times = interleaved(calls, rounds=15, seconds=120, clock=time.process_time)
    first, ms = points[0][0], {name: times.median(name) for name in calls}
    rows = []
    for name, kind, decibels, _ in sorted(points, key=lambda point: ms[point[0]]):
        ratio = f"{times.ratio(name, first).value:.2f}"
        rows.append([name, kind, networks.short(ms[name]), ratio, f"{decibels:.2f}"])
    head = ["network", "what", "ms", f"of {first}'s time", "PSNR-Y, dB"]
    what, amount = result["setting"][:2]
    each = f"{float(amount) / 60:g} minutes" if what == "--seconds" else f"{amount} iterations"
    budget = f"from scratch: {each} of training each"
    told = f"{result['title']}; {budget}. Time: 128x128 in ONNX Runtime, one thread."
    text = "\n".join([f"{networks.machine()}.", "", f"`{args.typed}`", "", told, "", *table(head, rows)])
    print(text)
    with Together() as files:
        files.part(args.output.with_suffix(".md")).write_text(text + "\n", encoding="utf-8")
        figure = scatter(points, ms, budget)
        figure.savefig(files.part(args.output.with_suffix(".png")), dpi=110, format="png")
        files.commit()


def scatter(points: List[Point], ms: Dict[str, float], budget: str) -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for kind, style in zip(KINDS, ("C3o-", "C3s", "C0o")):
        shown = sorted((ms[name], decibels, name) for name, its, decibels, _ in points if its == kind)
        axis.plot([each[0] for each in shown], [each[1] for each in shown], style, label=kind)
        for *place, name in shown:
            name = name.split(",")[0].replace("_training_fp16", "")
            axis.annotate(name, place, (6, -12), textcoords="offset points", fontsize=9)
    axis.set(xscale="log", xlabel="time for a picture, ms (ONNX Runtime, CPU)", ylabel="quality: PSNR-Y, dB")
    axis.set(title=f"Quality against time: up and left is better\n{budget}", xmargin=0.3)
    axis.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    return figure


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser("quality.py", __doc__)
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(
        required=True, metavar="train, table or draw", parser_class=lambda prog: Parser(prog, None)
    )
    for name, action in (("train", train), ("table", show), ("draw", draw)):
        command = commands.add_parser(name)
        command.set_defaults(action=action, checkout=None, validation=None)
        add = command.add_argument
        add("file", type=Path, metavar="FILE", help="of the runs: train writes it")
        if action is show:
            continue
        add("--validation", type=Path, required=True, help="folder of pictures")
        add("--traiNNer-redux", dest="checkout", type=Path, help="a checkout, for other networks")
        if action is draw:
            add("--weights", type=Path, nargs="+", default=[], help="AetherNets in any form")
            add("--output", type=Path, required=True, help="of OUTPUT.md and OUTPUT.png")
            continue
        add("--data", type=Path, required=True, help="what training/prepare_pictures.py wrote")
        add("--run", action="append", required=True, metavar="NAME,OPTION=VALUE,...")
        add("--seeds", type=int, nargs="+", default=[0])
        add("--bf16", action="store_true", help="bfloat16 autocast")
        budget = command.add_mutually_exclusive_group(required=True)
        budget.add_argument("--iterations", type=positive, help="budget of each run")
        budget.add_argument("--seconds", type=positive, help="budget of each run")
    return parser.parse(argv)


def run(argv: Optional[List[str]]) -> None:
    args = parse_args(argv)
    args.typed = networks.typed("quality.py", argv, {"CHECKOUT": args.checkout, "PICTURES": args.validation})
    torch.set_num_threads(1)  # on a CPU the computing time counts, which other work hardly changes
    args.action(args)


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("quality.py", lambda: run(argv), "finished runs are kept.")


if __name__ == "__main__":
    sys.exit(main())
