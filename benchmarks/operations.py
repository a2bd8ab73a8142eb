"""Where the time of aether_small goes in ONNX Runtime: each kind of operation, in fp32 and in int8.

Usage: python benchmarks/operations.py     # to benchmarks/results/operations.md

One thread; the files take turns, and each operation counts with its median. The last row is a limit for
whatever could be done about rounding, layout and sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import onnxruntime
from int8 import RESULTS, files
from report import processor, table, today, write

CONVOLUTIONS = DEPTHWISE, DENSE = "depthwise 11x11", "other convolutions"
GATING, SUMS, LAYOUT = "SiLU and product", "sums", "layout and rounding"
REST = "border correction and the rest"
KINDS = (*CONVOLUTIONS, GATING, SUMS, LAYOUT, REST)


def kind_of(operation: str, shapes: List[List[int]]) -> str:
    """The row of an operation, by its name and its inputs' shapes."""
    if operation in ("Conv", "QLinearConv"):
        depthwise = len(shapes[1]) == 4 and shapes[1][1:] == [1, 11, 11]  # integer ones are dense
        return DEPTHWISE if depthwise else DENSE
    whole = [shape for shape in shapes if len(shape) == 4]  # without scales and zero points
    same = len(whole) == 2 and whole[0] == whole[1]
    if operation in ("QuickGelu", "Sigmoid", "QLinearSigmoid") or (same and operation.endswith("Mul")):
        return GATING
    if same and operation.endswith("Add") and whole[0][1] > 48:  # not the tail's outputs
        return SUMS
    if operation in ("ReorderInput", "ReorderOutput", "Transpose", "QuantizeLinear", "DequantizeLinear"):
        return LAYOUT
    return REST


def milliseconds(profile: Path) -> Dict[str, float]:
    """Kind -> ms of one run, from a profile that ONNX Runtime wrote."""
    runs: Dict[str, List[float]] = defaultdict(list)
    kinds: Dict[str, str] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            details = event["args"]
            shapes = [next(iter(each.values())) for each in details["input_type_shape"]]
            kinds[event["name"]] = kind_of(details["op_name"], shapes)
            runs[event["name"]].append(event["dur"] / 1000)
    found = dict.fromkeys(KINDS, 0.0)
    for name, times in runs.items():
        found[kinds[name]] += statistics.median(times)
    return found


def measure(scale: int, size: int, rounds: int) -> Dict[str, Dict[str, float]]:
    """File -> kind -> ms."""
    image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        sessions: Dict[str, Any] = {}
        for name, path in files(scale, Path(folder), ["onnxruntime"]).items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, name.split()[0]))
            sessions[name] = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        for _ in range(rounds):
            for each in sessions.values():
                each.run(None, {each.get_inputs()[0].name: image})
        return {name: milliseconds(Path(each.end_profiling())) for name, each in sessions.items()}


def report(scale: int, size: int, found: Dict[str, Dict[str, float]]) -> List[str]:
    totals = {name: sum(kinds.values()) for name, kinds in found.items()}
    base = totals["fp32"]
    bare = {name: sum(kinds[each] for each in CONVOLUTIONS) for name, kinds in found.items()}
    gated = {name: bare[name] + found[name][GATING] for name in found}
    rows = [[kind, *(f"{found[name][kind]:.0f}" for name in found)] for kind in KINDS]
    rows.append(["all", *(f"{totals[name]:.0f} ({base / totals[name]:.2f})" for name in found)])
    rows.append(["all, over its convolutions", *(f"{totals[name] / bare[name]:.2f}" for name in found)])
    limits = [f"{gated[name]:.0f} ({base / gated[name]:.2f})" for name in found]
    rows.append(["limit: convolutions, SiLU and product alone", *limits])
    return [f"x{scale}, {size}x{size}, ms (times as fast as fp32):", "", *table(["operation", *found], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 3, 4), default=[2, 4])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    lines = [f"{today()}: {processor()}, one thread, ONNX Runtime {onnxruntime.__version__}.", ""]
    for scale in args.scales:
        lines += report(scale, args.size, measure(scale, args.size, args.rounds))
    text = "\n".join(lines)
    print(text)
    if all(getattr(args, option) == parser.get_default(option) for option in ("scales", "size")):
        write(RESULTS / "operations.md", text)


if __name__ == "__main__":
    main()
