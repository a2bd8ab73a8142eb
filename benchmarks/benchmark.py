"""Speed of AetherNet before and after fusing, against real peers, on this machine.

    make bench                                   # everything, to benchmarks/results/
    python benchmarks/benchmark.py --quick       # small pictures and few runs: two minutes
    python benchmarks/benchmark.py --networks aether --parts networks   # only the rows whose name holds "aether"

Peers are built by the package spandrel (pip install -r benchmarks/requirements.txt). All networks of one column take turns, and a figure is
the median of its turns: what else the machine does hits all alike. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import gc
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "archs"), str(ROOT / "demo"), str(ROOT / "benchmarks")]
import aether_arch  # noqa: E402
from aether_arch import AetherNet  # noqa: E402
from published import keep_contiguous, kernels_merged, two_branches  # noqa: E402

BASE = "aether_small fused"
FORMS = ("unfused", "kernels merged", "fused")
Row = Dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- networks


def aether(variant: str, form: str, scale: int) -> nn.Module:
    net = getattr(aether_arch, variant)(scale=scale).eval()
    for name, value in net.state_dict().items():  # as after training: ONNX Runtime drops a new network's multiplications by one
        if name.endswith("temperature") or "norm." in name:
            value.uniform_(0.5, 1.5)
    return {"unfused": two_branches, "kernels merged": kernels_merged, "fused": AetherNet.fused}[form](net).eval()


def peers() -> Dict[str, Callable[[int], nn.Module]]:
    """Peers as published, by name. Empty without spandrel."""
    try:
        from basicsr_train import import_torchvision

        import_torchvision()
        from spandrel.architectures.Compact import Compact
        from spandrel.architectures.DAT import DAT
        from spandrel.architectures.ESRGAN import ESRGAN
        from spandrel.architectures.MoSR import MoSR
        from spandrel.architectures.OmniSR import OmniSR
        from spandrel.architectures.PLKSR import PLKSR, RealPLKSR
        from spandrel.architectures.SAFMN import SAFMN
        from spandrel.architectures.SPAN import SPAN
        from spandrel.architectures.SwinIR import SwinIR
    except ImportError as error:
        print(f"without peers: {error}; pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return {}
    swin: Any = {"embed_dim": 60, "num_heads": [6, 6, 6, 6], "mlp_ratio": 2, "window_size": 8, "upsampler": "pixelshuffledirect"}
    dat: Any = {"embed_dim": 60, "depth": [18], "num_heads": [6], "expansion_factor": 2, "split_size": [8, 32], "resi_connection": "3conv"}
    return {
        "Compact": lambda s: Compact(num_feat=64, num_conv=16, upscale=s),
        "SPAN": lambda s: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=s),
        "SAFMN": lambda s: SAFMN(dim=36, n_blocks=8, upscaling_factor=s),
        "OmniSR": lambda s: OmniSR(num_feat=64, res_num=5, block_num=1, window_size=8, up_scale=s),
        "SwinIR-S": lambda s: SwinIR(depths=[6, 6, 6, 6], upscale=s, **swin),
        "DAT light": lambda s: DAT(upscale=s, upsampler="pixelshuffledirect", **dat),
        "PLKSR tiny": lambda s: PLKSR(n_blocks=12, kernel_size=13, ccm_type="DCCM", use_ea=False, upscaling_factor=s),
        "RealPLKSR": lambda s: RealPLKSR(upscaling_factor=s),
        "MoSR": lambda s: MoSR(upscale=s),
        "ESRGAN lite": lambda s: ESRGAN(num_filters=32, num_blocks=12, scale=s),
    }


def networks(words: Sequence[str], quick: bool) -> Dict[str, Callable[[int], nn.Module]]:
    found: Dict[str, Callable[[int], nn.Module]] = {}
    for variant in ("aether_small", "aether_medium", "aether_large"):
        for form in FORMS:
            found[f"{variant} {form}"] = lambda scale, variant=variant, form=form: aether(variant, form, scale)  # type: ignore[misc]
    found.update(peers())
    if quick:
        found = {name: build for name, build in found.items() if name.split()[0] in ("aether_small", "Compact", "SPAN", "PLKSR", "SAFMN")}
    return {name: build for name, build in found.items() if not words or any(word.lower() in name.lower() for word in words)}


# -------------------------------------------------------------------------------------------------------------- counting


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at once, at their peak. Weights and a kernel's own scratch don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: Dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen and not any(isinstance(x, Tensor) and x.untyped_storage()._cdata == key for x in args):
                    self.seen[key] = size
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)


def peak_mebibytes(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float((torch.cuda.max_memory_allocated() - before) / 2**20)
    gc.collect()
    with LiveBytes() as live:
        step()
    return live.peak / 2**20


def gigamacs(net: nn.Module, image: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        net(image)
    return float(counter.get_total_flops() / 2e9)


def parameters(net: nn.Module) -> int:
    return sum(value.numel() for value in net.parameters())


# ---------------------------------------------------------------------------------------------------------------- timing


def export(net: nn.Module, image: Tensor, path: Path, dynamic: bool) -> int:
    """Write an ONNX file and return how many weights it holds."""
    import onnx
    from onnx import numpy_helper

    axes = {"input": {0: "n", 2: "h", 3: "w"}, "output": {0: "n", 2: "h", 3: "w"}} if dynamic else None
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (image,), str(path), input_names=["input"], output_names=["output"], opset_version=17, dynamic_axes=axes, dynamo=False)
    values = (numpy_helper.to_array(value) for value in onnx.load(str(path)).graph.initializer)
    return sum(value.size for value in values if value.dtype.kind == "f")


def session(path: Path, image: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it takes the cores from the network whose turn it is next
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {made.get_inputs()[0].name: image.numpy()}
    return lambda: made.run(None, feed)


def milliseconds(steps: Dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> Dict[str, float]:
    """Median time of each step; they take turns, and the first round is not counted."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10 if device == "cuda" and turn else 1):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3 / (10 if device == "cuda" else 1))
    return {name: statistics.median(kept) for name, kept in times.items()}


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def measure(builders: Dict[str, Callable[[int], nn.Module]], scale: int, size: int, rounds: int, threads: Sequence[int], device: str) -> List[Row]:
    image = torch.rand(1, 3, size, size)
    rows: Dict[str, Row] = {}
    nets: Dict[str, nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        files: Dict[str, Path] = {}
        for name, build in builders.items():
            torch.manual_seed(0)
            net = build(scale).eval()
            training = parameters(aether(name.split()[0], "unfused", scale)) if name.startswith("aether") else parameters(net)
            row: Row = {"network": name, "scale": scale, "parameters_training": training, "ms": {}}
            row["gigamacs"] = gigamacs(net, image)
            if device == "cpu":
                path = Path(folder, f"{len(files)}.onnx")
                try:
                    held = export(net, image, path, name.endswith((" merged", " fused")))
                    row["parameters_deploy"] = min(held, parameters(net))  # constants that are no weights, such as masks, lie in the file too
                    files[name] = path
                except Exception as error:
                    print(f"{name}: no ONNX file: {str(error).strip().splitlines()[0][:120]}", file=sys.stderr)
            if name.startswith("aether") or "parameters_deploy" not in row:
                row["parameters_deploy"] = parameters(net)
            to: Any = net.to
            nets[name] = to(device, memory_format=torch.channels_last)
            row["peak_mib"] = peak_mebibytes(functools.partial(net, image.to(device, memory_format=torch.channels_last)), device)
            rows[name] = row
            print(f"x{scale} {name}: built", file=sys.stderr)
        if device == "cpu":
            channels_last = image.contiguous(memory_format=torch.channels_last)
            for runtime in ("eager", "ORT"):
                for count in threads:
                    if runtime == "eager":
                        steps = {name: functools.partial(net, channels_last) for name, net in nets.items()}
                    else:
                        steps = {name: session(path, image, count) for name, path in files.items()}
                    column = f"{runtime}, {count} thread" + "s" * (count > 1)
                    with threads_of_torch(count):
                        for name, ms in milliseconds(steps, rounds).items():
                            rows[name]["ms"][column] = ms
                    print(f"x{scale} {column}: measured", file=sys.stderr)
        else:
            measure_cuda(nets, rows, image.to(device, memory_format=torch.channels_last), rounds)
    return list(rows.values())


@torch.no_grad()
def measure_cuda(nets: Dict[str, nn.Module], rows: Dict[str, Row], image: Tensor, rounds: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for compiled in (False, True):
            steps: Dict[str, Callable[[], Any]] = {}
            column = f"{'compiled' if compiled else 'eager'} {str(dtype)[6:]}"
            for name, net in nets.items():
                try:
                    cast = copy.deepcopy(net).to(dtype)
                    run: Any = torch.compile(cast) if compiled else cast
                    run(image.to(dtype))
                    steps[name] = functools.partial(run, image.to(dtype))
                except Exception as error:
                    print(f"{name}: not {column}: {str(error).strip().splitlines()[0][:120]}", file=sys.stderr)
            for name, ms in milliseconds(steps, rounds, "cuda").items():
                rows[name]["ms"][column] = ms
            torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------ the machine's limit


class Convolutions(TorchDispatchMode):
    """Every convolution of a pass: multiply-adds, bytes that it must at least move, and whether it is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: List[Tuple[float, float, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            macs = out.numel() * args[1][0].numel()
            moved = sum(value.numel() * value.element_size() for value in (args[0], args[1], out))
            self.found.append((macs, moved, args[8] > 1))
        return out


def roofline(size: int, rounds: int, threads: int, device: str, scale: int = 4) -> Row:
    """Measured peaks, and the time that the fused aether_small would take if every convolution reached them and nothing else took any."""
    channels = 96
    image = torch.rand(1, channels, size, size, device=device).to(memory_format=torch.channels_last)
    dense = nn.Conv2d(channels, channels, 3, padding=1).to(device, memory_format=torch.channels_last)
    depthwise = nn.Conv2d(channels, channels, 11, padding=5, groups=channels).to(device, memory_format=torch.channels_last)
    big, copy_ = (torch.rand(2**26, device=device) for _ in range(2))
    with threads_of_torch(threads), torch.no_grad():
        steps = {"dense": lambda: dense(image), "depthwise": lambda: depthwise(image), "copy": lambda: copy_.copy_(big)}
        ms = milliseconds(steps, rounds * 4, device)
        pixels = size**2 * channels
        dense_peak, depthwise_peak = (pixels * macs / ms[name] / 1e6 for name, macs in (("dense", channels * 9), ("depthwise", 121)))
        bandwidth = 2 * 4 * 2**26 / ms["copy"] / 1e6
        net = aether("aether_small", "fused", scale).to(device, memory_format=torch.channels_last)
        x = torch.rand(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
        with Convolutions() as convolutions:
            net(x)
        reached = milliseconds({"net": lambda: net(x)}, rounds, device)["net"]
    floor = sum(max(macs / dense_peak, moved / bandwidth) for macs, moved, _ in convolutions.found) / 1e6
    reachable = sum(max(macs / (depthwise_peak if thin else dense_peak), moved / bandwidth) for macs, moved, thin in convolutions.found) / 1e6
    return {
        "network": f"{BASE} x{scale}", "threads": threads, "dense_gigamacs_per_s": dense_peak, "depthwise_gigamacs_per_s": depthwise_peak,
        "bandwidth_gigabytes_per_s": bandwidth, "floor_ms": floor, "floor_with_depthwise_peak_ms": reachable, "reached_ms": reached,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- training


def train_step(net: nn.Module, x: Tensor, target: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    (net(x) - target).abs().mean().backward()


def training(size: int, batch: int, rounds: int, threads: int, device: str) -> List[Row]:
    """Forward and backward pass of aether_small x2, against the published two branches with a norm written by hand."""
    torch.manual_seed(0)
    net = aether_arch.aether_small(scale=2).train()
    steps: Dict[str, Callable[[], Any]] = {}
    lr, hr = torch.rand(batch, 3, size, size, device=device), torch.rand(batch, 3, 2 * size, 2 * size, device=device)
    for name, make in (("two branches", two_branches), ("AetherNet", copy.deepcopy)):
        for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            made: Any = make(net).to(device)
            made, x = made.to(memory_format=memory_format), lr.to(memory_format=memory_format)
            if layout == "contiguous":
                keep_contiguous(made)
            steps[f"{name}, {layout}"] = functools.partial(train_step, made, x, hr)
    with threads_of_torch(threads), torch.enable_grad():
        ms = milliseconds(steps, rounds, device)
        return [{"form": name, "ms": ms[name], "peak_mib": peak_mebibytes(step, device)} for name, step in steps.items()]


# ---------------------------------------------------------------------------------------------------------------- output


def table(head: Sequence[str], rows: List[List[str]]) -> List[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [list(head), ["---"] * len(head), *rows]] + [""]


def short(ms: Optional[float]) -> str:
    return "-" if ms is None else f"{ms:.0f}" if ms >= 20 else f"{ms:.2f}"


def markdown(result: Row) -> str:
    machine = result["machine"]
    where = "CUDA" if result["device"] == "cuda" else "CPU only"
    lines = [f"{where}, {machine['date']}: {machine['processor']}, {machine['software']}; load average {machine['load']}.", ""]
    for scale in sorted({row["scale"] for row in result["networks"]}):
        rows = [row for row in result["networks"] if row["scale"] == scale]
        columns = list(dict.fromkeys(column for row in rows for column in row["ms"]))
        base = next((row["ms"].get(columns[-1]) for row in rows if row["network"] == BASE), None)
        lines += [f"x{scale}, {result['size']}x{result['size']} input, ms." + (f" Ratio: {columns[-1]}, relative to {BASE}." if base else ""), ""]
        cells = []
        for row in rows:
            ratio = f"{row['ms'][columns[-1]] / base:.2f}" if base and columns[-1] in row["ms"] else "-"
            counts = [f"{row['parameters_training']:,}", f"{row['parameters_deploy']:,}", f"{row['gigamacs']:.1f}", f"{row['peak_mib']:.0f}"]
            cells.append([row["network"], *counts, *(short(row["ms"].get(column)) for column in columns), ratio])
        lines += table(["network", "params, training", "params, deploy", "GMAC", "peak MiB", *columns, "ratio"], cells)
    if result["targets"]:
        columns = list(result["targets"][0]["gain"])
        cells = [[f"{row['network']} x{row['scale']}", *(f"{row['gain'][column]:.2f}" for column in columns)] for row in result["targets"]]
        lines += ["Fused, times as fast as with only the kernels merged (the published way), same run:", "", *table(["network", *columns], cells)]
    if result["roofline"]:
        row = result["roofline"]
        names = {
            "dense_gigamacs_per_s": "dense 3x3 convolution, GMAC/s",
            "depthwise_gigamacs_per_s": "depthwise 11x11 convolution, GMAC/s",
            "bandwidth_gigabytes_per_s": "memory, GB/s",
            "floor_ms": f"{row['network']}, floor at the dense peak, ms",
            "floor_with_depthwise_peak_ms": "floor with depthwise ones at the depthwise peak, ms",
            "reached_ms": "reached, ms",
        }
        cells = [[label, f"{row[key]:.1f}"] for key, label in names.items()]
        cells += [["reached / floor", f"{row['reached_ms'] / row['floor_ms']:.2f}"]]
        cells += [["reached / floor with the depthwise peak", f"{row['reached_ms'] / row['floor_with_depthwise_peak_ms']:.2f}"]]
        lines += [f"The machine's limit, eager, fp32, {row['threads']} threads:", "", *table(["measured here", ""], cells)]
    if result["training"]:
        first = result["training"][0]["ms"]
        cells = [[row["form"], f"{row['ms']:.0f}", f"{first / row['ms']:.2f}", f"{row['peak_mib']:.0f}"] for row in result["training"]]
        setting = "batch {batch}, lq {size}".format(**result["training_setting"])
        lines += [
            f"Training step (forward and backward), aether_small x2, {setting}, fp32:",
            "",
            *table(["form", "ms", "times as fast", "peak MiB"], cells),
        ]
    return "\n".join(lines)


def targets(rows: List[Row]) -> List[Row]:
    """How many times as fast fused is as kernel-merged, for each variant, scale and column."""
    found = []
    for row in rows:
        name = row["network"]
        merged = next(
            (other for other in rows if other["scale"] == row["scale"] and other["network"] == name.replace("fused", "kernels merged")), None
        )
        if name.endswith(" fused") and merged is not None:
            gain = {column: merged["ms"][column] / ms for column, ms in row["ms"].items() if column in merged["ms"]}
            found.append({"network": name.split()[0], "scale": row["scale"], "gain": gain})
    return found


def plot(result: Row, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    scale = max(row["scale"] for row in result["networks"])
    rows = [row for row in result["networks"] if row["scale"] == scale and row["ms"]]
    column = list(rows[0]["ms"])[-1]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        name, ours = row["network"], row["network"].startswith("aether")
        if column not in row["ms"] or (ours and not name.endswith(" fused")):
            continue
        at = (row["parameters_deploy"] / 1e6, row["ms"][column])
        axes.scatter(*at, color="tab:red" if ours else "tab:gray")
        axes.annotate(name.replace(" fused", ""), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="parameters in use, million")
    axes.set(ylabel=f"ms ({column}, {result['size']}x{result['size']} input, x{scale})")
    axes.grid(which="both", alpha=0.2)
    figure.savefig(str(path), dpi=120)


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(argv: Optional[List[str]] = None) -> Row:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64x64 input, x4, aether_small and four peers, two threads, three rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=[], help="parts of names; only these rows")
    parser.add_argument("--parts", nargs="+", choices=("networks", "roofline", "training"), default=["networks", "roofline", "training"])
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 3, 4, 8))
    parser.add_argument("--size", type=int, help="height and width of the input (default: 128)")
    parser.add_argument("--rounds", type=int, help="turns of each network in each column (default: 7)")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results; nothing is written with --quick)")
    args = parser.parse_args(argv)
    size, rounds = args.size or (64 if args.quick else 128), args.rounds or (3 if args.quick else 7)
    threads = args.threads or ([2] if args.quick else [1, 2])
    load = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),)
    result: Row = {"device": args.device, "size": size, "rounds": rounds, "networks": [], "roofline": None, "training": []}
    if "networks" in args.parts:
        builders = networks(args.networks, args.quick)
        for scale in args.scales or ([4] if args.quick else [2, 4]):
            result["networks"] += measure(builders, scale, size, rounds, threads, args.device)
    if "roofline" in args.parts:
        result["roofline"] = roofline(size, rounds, max(threads), args.device)
    if "training" in args.parts:
        result["training_setting"] = {"batch": 2 if args.quick else 4, "size": 24 if args.quick else 48}
        setting = result["training_setting"]
        result["training"] = training(setting["size"], setting["batch"], rounds, max(threads), args.device)
    software = f"PyTorch {torch.__version__}"
    with contextlib.suppress(ImportError):
        import onnxruntime

        software += f", ONNX Runtime {onnxruntime.__version__}"
    after = os.getloadavg() if hasattr(os, "getloadavg") else (float("nan"),)
    result["machine"] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "software": software, "cores": os.cpu_count(),
        "processor": torch.cuda.get_device_name() if args.device == "cuda" else f"{processor()}, {os.cpu_count()} cores",
        "load": f"{load[0]:.1f} before, {after[0]:.1f} after",
    }  # fmt: skip
    result["targets"] = targets(result["networks"])
    text = markdown(result)
    print(text)
    folder = args.output or (None if args.quick else ROOT / "benchmarks" / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{args.device}.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / f"{args.device}.md").write_text(text)
        if result["networks"]:
            try:
                plot(result, folder / f"{args.device}.png")
            except ImportError as error:
                print(f"no plot: {error}; pip install -r benchmarks/requirements.txt", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
