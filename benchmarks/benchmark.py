"""How fast AetherNet is on this machine's CPU: before and after fusing, and beside other networks.

Usage:
    make bench                                   # everything, to benchmarks/results/
    python benchmarks/benchmark.py --quick       # small pictures, few networks: two minutes
    python benchmarks/benchmark.py --networks aether --parts networks   # only those named "aether..."

The other networks are built by spandrel (pip install -r benchmarks/requirements.txt). All networks of a
column take turns and figures are medians, so that other load on the machine affects all alike. Weights are
random. benchmarks/gpu.py measures GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence
from unittest import mock

import torch
from counting import Convolutions, gigamacs, parameters, peak_mebibytes
from networks import FORMS, ROOT, Builder, aether, aether_arch, networks
from published import two_branches
from report import Row, load, processor, scatter, short, software, table, today, write
from torch import Tensor, nn

from aethersr.exported import for_export
from aethersr.timing import Comparison, interleaved

BASE = "aether_small fused"
PARTS = ("networks", "limit", "training")
Step = Callable[[], Any]


# --------------------------------------------------------------------------------------------------- runtimes


def export(net: nn.Module, image: Tensor, path: Path, dynamic: bool) -> int:
    """Write an ONNX file and return how many weights it holds."""
    import onnx
    from onnx import numpy_helper

    if isinstance(net, aether_arch.FusedAetherNet):
        net = for_export(net)
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("input", "output")} if dynamic else None
    names: Dict[str, Any] = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": axes}
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (image,), str(path), opset_version=17, dynamo=False, **names)
    values = (numpy_helper.to_array(value) for value in onnx.load(str(path)).graph.initializer)
    return sum(value.size for value in values if value.dtype.kind == "f")


def session(path: Path, image: Tensor, threads: int) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Otherwise its waiting threads take the cores from the network whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {made.get_inputs()[0].name: image.numpy()}
    return lambda: made.run(None, feed)


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(steps: Mapping[str, Step], rounds: int, threads: int = 1) -> Comparison:
    """Time candidates for all ``rounds``, however long they take."""
    with threads_of_torch(threads):
        return interleaved(steps, rounds=rounds, seconds=float("inf"))


def plural(threads: int) -> str:
    return f"{threads} thread" + "s" * (threads > 1)


# --------------------------------------------------------------------------------------------------- networks


@torch.no_grad()
def measure(
    builders: Mapping[str, Builder], scale: int, size: int, rounds: int, threads: Sequence[int]
) -> List[Row]:
    image = torch.rand(1, 3, size, size)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    rows: Dict[str, Row] = {}
    nets: Dict[str, nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        files: Dict[str, Path] = {}
        for name, build in builders.items():
            torch.manual_seed(0)
            net = build(scale).eval()
            ours = name.startswith("aether")
            before = aether(name.split()[0], "unfused", scale) if ours else net
            row = rows[name] = {
                "network": name,
                "scale": scale,
                "parameters_training": parameters(before),
                "ms": {},
            }
            row["parameters_deploy"], row["gigamacs"] = parameters(net), gigamacs(net, image)
            path = Path(folder, f"{len(files)}.onnx")
            try:
                held = export(net, image, path, name.endswith((" merged", " fused")))
                if not ours:  # constants that are no weights, such as masks, lie in the file too
                    row["parameters_deploy"] = min(held, parameters(net))
                files[name] = path
            except Exception as error:
                print(f"{name}: no ONNX file: {str(error).strip().splitlines()[0][:120]}", file=sys.stderr)
            nets[name] = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            row["peak_mib"] = peak_mebibytes(functools.partial(net, channels_last), "cpu")
            print(f"x{scale} {name}: built", file=sys.stderr)
        for runtime in ("eager", "ORT"):
            for count in threads:
                if runtime == "eager":
                    steps: Dict[str, Step] = {
                        name: functools.partial(net, channels_last) for name, net in nets.items()
                    }
                else:
                    steps = {name: session(path, image, count) for name, path in files.items()}
                column = f"{runtime}, {plural(count)}"
                comparison = timed(steps, rounds, count)
                for name in steps:
                    rows[name]["ms"][column] = comparison.median(name)
                    merged = name.replace(" fused", " kernels merged")
                    if merged != name and merged in steps:
                        rows[name].setdefault("gain", {})[column] = str(comparison.ratio(merged, name))
                print(f"x{scale} {column}: measured", file=sys.stderr)
    return list(rows.values())


# ---------------------------------------------------------------------------------------- the machine's limit


def limit(size: int, rounds: int, threads: int, scale: int) -> Row:
    """The time of fused aether_small, and what its convolutions alone would take at the machine's peak."""
    channels = 96
    image = torch.rand(1, channels, size, size).to(memory_format=torch.channels_last)
    kinds: Dict[str, Any] = {
        "dense": {"kernel_size": 3},
        "depthwise": {"kernel_size": 11, "groups": channels},
    }
    convolutions: Dict[str, nn.Module] = {}
    for name, kind in kinds.items():
        conv: Any = nn.Conv2d(channels, channels, padding="same", **kind)
        convolutions[name] = conv.to(memory_format=torch.channels_last)
    big, copied = (torch.rand(2**26) for _ in range(2))
    net = aether("aether_small", "fused", scale)
    x = torch.rand(1, 3, size, size)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        export(net, x, Path(folder, "net.onnx"), True)
        in_order = session(Path(folder, "net.onnx"), x, threads)
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # type: ignore
        with Convolutions() as counted:
            net(x)
        steps: Dict[str, Step] = {name: functools.partial(conv, image) for name, conv in convolutions.items()}
        steps.update(copy=lambda: copied.copy_(big), eager=lambda: net(x), ORT=in_order)
        ms = timed(steps, rounds * 2, threads)
    work = size**2 * channels
    dense = work * channels * 9 / ms.median("dense") / 1e6
    depthwise = work * 121 / ms.median("depthwise") / 1e6
    bandwidth = 2 * 4 * 2**26 / ms.median("copy") / 1e6
    floor = sum(each.milliseconds(dense, dense, bandwidth) for each in counted.found)
    reachable = sum(each.milliseconds(dense, depthwise, bandwidth) for each in counted.found)
    row: Row = {"scale": scale, "threads": threads, "floor_ms": floor, "reachable_ms": reachable}
    row.update(dense=dense, depthwise=depthwise, bandwidth=bandwidth)
    for runtime in ("eager", "ORT"):
        row[f"{runtime}_ms"] = ms.median(runtime)
        row[f"{runtime} / floor"] = ms.median(runtime) / floor
        row[f"{runtime} / reachable"] = ms.median(runtime) / reachable
    return row


LIMIT = {
    "dense": "dense 3x3 convolution, GMAC/s",
    "depthwise": "depthwise 11x11 convolution, GMAC/s",
    "bandwidth": "memory, GB/s",
    "floor_ms": "floor, ms: every convolution at the dense peak",
    "reachable_ms": "reachable, ms: depthwise ones at the depthwise peak",
    "eager_ms": "eager, ms",
    "ORT_ms": "ONNX Runtime, ms",
    "eager / floor": "eager / floor",
    "eager / reachable": "eager / reachable",
    "ORT / floor": "ONNX Runtime / floor",
    "ORT / reachable": "ONNX Runtime / reachable",
}


# --------------------------------------------------------------------------------------------------- training


def train_step(net: nn.Module, x: Tensor, target: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    (net(x) - target).abs().mean().backward()


def training(size: int, batch: int, rounds: int, threads: int) -> List[Row]:
    """Forward and backward pass of aether_small x2: the published two branches, ours, and ours sped up."""
    sys.path.append(str(ROOT / "training"))
    import cpu_speed

    torch.manual_seed(0)
    net = aether_arch.aether_small(scale=2).train()
    x, target = torch.rand(batch, 3, size, size), torch.rand(batch, 3, 2 * size, 2 * size)
    plain = {"two branches": two_branches(net).train(), "AetherNet": copy.deepcopy(net)}
    steps: Dict[str, Step] = {
        name: functools.partial(train_step, each, x, target) for name, each in plain.items()
    }
    fast = net.to(memory_format=torch.channels_last)
    laid_out = x.to(memory_format=torch.channels_last)

    def sped_up() -> None:
        with mock.patch.object(aether_arch, "depthwise_conv", cpu_speed.depthwise_conv):
            train_step(fast, laid_out, target)

    steps["AetherNet, training/cpu_speed.py"] = sped_up
    ms = timed(steps, rounds, threads)
    with threads_of_torch(threads):
        peaks = {name: peak_mebibytes(step, "cpu") for name, step in steps.items()}
    return [
        {
            "form": name,
            "ms": ms.median(name),
            "gain": str(ms.ratio("two branches", name)),
            "peak_mib": peaks[name],
        }
        for name in steps
    ]


# ----------------------------------------------------------------------------------------------------- output


def markdown(result: Row) -> str:
    machine = result["machine"]
    lines = ["CPU, {date}: {processor}, {software}; load average {load}.".format(**machine), ""]
    for scale in sorted({row["scale"] for row in result["networks"]}):
        rows = [row for row in result["networks"] if row["scale"] == scale]
        columns = list(dict.fromkeys(column for row in rows for column in row["ms"]))
        base = next((row["ms"].get(columns[-1]) for row in rows if row["network"] == BASE), None)
        size = f"{result['size']}x{result['size']}"
        lines += [f"x{scale}, {size} input, ms." + f" Ratio: {columns[-1]}, to {BASE}." * bool(base), ""]
        cells = []
        for row in rows:
            ratio = f"{row['ms'][columns[-1]] / base:.2f}" if base and columns[-1] in row["ms"] else "-"
            counts = [
                f"{row['parameters_training']:,}",
                f"{row['parameters_deploy']:,}",
                f"{row['gigamacs']:.1f}",
            ]
            times = [short(row["ms"].get(column)) for column in columns]
            cells.append([row["network"], *counts, f"{row['peak_mib']:.0f}", *times, ratio])
        head = ["network", "params, training", "params, deploy", "GMAC", "peak MiB", *columns, "ratio"]
        lines += table(head, cells)
    gains = [row for row in result["networks"] if "gain" in row]
    if gains:
        columns = list(gains[0]["gain"])
        cells = [[f"{row['network'].split()[0]} x{row['scale']}", *row["gain"].values()] for row in gains]
        lines += [
            "Fused, beside only the kernels merged (the published way), and the middle half of the rounds:",
            "",
        ]
        lines += table(["network", *columns], cells)
    if result["limit"]:
        cells = [[label, *(f"{row[key]:.2f}" for row in result["limit"])] for key, label in LIMIT.items()]
        lines += [f"The machine's limit, fp32, and {BASE}:", ""]
        lines += table(
            ["", *(f"x{row['scale']}, {plural(row['threads'])}" for row in result["limit"])], cells
        )
    if result["training"]:
        setting = "batch {batch}, lq {size}".format(**result["training_setting"])
        lines += [f"Training step (forward and backward), aether_small x2, {setting}, fp32:", ""]
        cells = [[r["form"], f"{r['ms']:.0f}", r["gain"], f"{r['peak_mib']:.0f}"] for r in result["training"]]
        lines += table(["form", "ms", "beside the first", "peak MiB"], cells)
    return "\n".join(lines)


def plot(result: Row, path: Path) -> None:
    scale = max(row["scale"] for row in result["networks"])
    rows = [row for row in result["networks"] if row["scale"] == scale and row["ms"]]
    column = list(rows[0]["ms"])[-1]
    shown = [row for row in rows if column in row["ms"]]
    points = {
        row["network"].replace(" fused", ""): (row["parameters_deploy"] / 1e6, row["ms"][column])
        for row in shown
        if not row["network"].endswith(tuple(FORMS)[:2])
    }
    size = f"{result['size']}x{result['size']}"
    scatter(points, ["parameters in use, million", f"ms ({column}, {size} input, x{scale})"], path)


def main(argv: Optional[List[str]] = None) -> Row:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="64x64 input, x4, five networks, two threads")
    parser.add_argument("--networks", nargs="+", default=[], help="parts of names; only these networks")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 3, 4, 8))
    parser.add_argument("--size", type=int, help="height and width of the input (default: 128)")
    parser.add_argument("--rounds", type=int, help="turns of each network in each column (default: 7)")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results; none with --quick)")
    args = parser.parse_args(argv)
    size, rounds = args.size or (64 if args.quick else 128), args.rounds or (3 if args.quick else 7)
    threads, scales = (
        args.threads or ([2] if args.quick else [1, 2]),
        args.scales or ([4] if args.quick else [2, 4]),
    )
    before = load()
    result: Row = {"size": size, "rounds": rounds, "networks": [], "limit": [], "training": []}
    if "networks" in args.parts:
        for scale in scales:
            result["networks"] += measure(networks(args.networks, args.quick), scale, size, rounds, threads)
    if "limit" in args.parts:
        result["limit"] = [limit(size, rounds, count, scale) for scale in scales for count in threads]
    if "training" in args.parts:
        result["training_setting"] = {"batch": 2 if args.quick else 4, "size": 24 if args.quick else 48}
        result["training"] = training(rounds=rounds, threads=max(threads), **result["training_setting"])
    result["machine"] = {"date": today(), "software": software(), "load": f"{before} before, {load()} after"}
    result["machine"]["processor"] = f"{processor()}, {os.cpu_count()} cores"
    text = markdown(result)
    print(text)
    folder = args.output or (None if args.quick else ROOT / "benchmarks" / "results")
    if folder is not None:
        write(folder / "cpu.json", json.dumps(result, indent=1))
        write(folder / "cpu.md", text)
        if result["networks"]:
            try:
                plot(result, folder / "cpu.png")
            except ImportError as error:
                print(f"no plot: {error}; pip install -r benchmarks/requirements.txt", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
