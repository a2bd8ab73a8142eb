"""Quality against time: what networks learned in equal_budget.py, and how long each takes for a picture.

    python benchmarks/promise.py benchmarks/results/equal_budget_peers.json --traiNNer-redux CHECKOUT

The quality is that of the comparison's last measurement, the mean of its seeds. The time is ONNX Runtime's on
this CPU, all networks in turn in one run; ours are fused. Writes promise.md and promise.png beside the JSON;
in the picture a line through a point spans its seeds.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from budget_results import plotting, read_results
from runs import OURS, build, parse_run

from aethersr.commands import exit_code
from aethersr.timing import interleaved


class Point(NamedTuple):
    name: str
    decibels: List[float]  # of each seed
    ms: float
    relative: str  # to the first network


def runner(text: str, scale: int, side: int, threads: int, checkout: Optional[Path]) -> Callable[[], Any]:
    """What upscales a picture of ``side`` pixels with the network of a run, in ONNX Runtime."""
    import onnxruntime

    net: Any = build(parse_run(text), scale, checkout).eval()
    net = net.fused() if hasattr(net, "fused") else net
    image, file = torch.rand(1, 3, side, side), io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(net, (image,), file, opset_version=17, dynamo=False, input_names=["input"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": image.numpy()})


def points(result: Dict[str, Any], args: argparse.Namespace) -> List[Point]:
    last: Dict[str, List[float]] = {}
    for row in result["rows"]:
        last.setdefault(row["run"], []).append(row["points"][-1][2])
    scale = int(result["title"].split(",")[0].lstrip("x"))
    runners = {text: runner(text, scale, args.side, args.threads, args.checkout) for text in last}
    times = interleaved(runners, rounds=args.rounds, seconds=args.seconds)
    first = next(iter(last))
    return [
        Point(
            text,
            found,
            times.median(text),
            f"{np.round(times.ratio(text, first).value, 2):.2f}",
        )
        for text, found in last.items()
    ]


def table(title: str, found: List[Point]) -> str:
    lines = [title, "", "| network | ms | relative | PSNR-Y, dB | each seed |"]
    lines.append("| --- | ---: | ---: | ---: | --- |")
    for point in sorted(found, key=lambda point: point.ms):
        mean, each = statistics.mean(point.decibels), ", ".join(f"{value:.2f}" for value in point.decibels)
        lines.append(f"| {point.name} | {point.ms:.0f} | {point.relative} | {mean:.2f} | {each} |")
    return "\n".join(lines) + "\n"


def draw(title: str, found: List[Point], path: Path) -> None:
    pyplot = plotting()
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for point in found:
        name, *options = point.name.split(",")
        color, mean = "C3" if name in OURS else "C0", statistics.mean(point.decibels)
        axis.vlines(point.ms, min(point.decibels), max(point.decibels), color)
        axis.plot(point.ms, mean, "o", color=color)
        label = " ".join([name, *(each for each in options if each.startswith("embed_dim"))])
        axis.annotate(label, (point.ms, mean), (6, 4), textcoords="offset points")
    axis.set(xlabel="ms a picture, ONNX Runtime", ylabel="PSNR-Y, dB", xscale="log")
    axis.set_title(title, fontsize=7, wrap=True)
    axis.margins(x=0.2)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("result", type=Path, help="the JSON file that equal_budget.py wrote")
    parser.add_argument("--traiNNer-redux", dest="checkout", type=Path, help="a checkout, for other networks")
    parser.add_argument("--side", type=int, default=128, help="pixels of the picture (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=120)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> None:
    result = read_results(args.result, "RESULT")
    found = points(result, args)
    title = f"{result['title']}; {args.side}x{args.side} in ONNX Runtime, {args.threads} thread(s)"
    text = table(title, found)
    args.result.with_name("promise.md").write_text(text, encoding="utf-8")
    draw(title, found, args.result.with_name("promise.png"))
    print(text)


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("promise.py", lambda: measure(parse_args(argv)), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
