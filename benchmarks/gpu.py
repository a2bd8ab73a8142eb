"""How fast AetherNet is on a GPU, measured in four minutes.

Usage:
    make gpu                                        # everything, to benchmarks/results/gpu_<card>.md
    python benchmarks/gpu.py --parts training memory --minutes 10
    python benchmarks/gpu.py --device cpu --quick   # try the script without a GPU

The most important parts come first. Every line is printed once it is measured, and measured lines are kept if
you stop. Candidates of one group take turns and figures are medians. Networks are fused (except for training
and memory) and have random weights. Other networks are built by spandrel. ONNX Runtime is measured if
onnxruntime-gpu is installed, Triton if PyTorch includes it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from benchmark import export
from counting import parameters, peak_mebibytes
from depthwise import WAYS
from gpu_kit import LAYOUTS, PRECISIONS, QUICK, WHOLE, Kit, Step, inference, tensor_float
from gpu_report import markdown, plot
from networks import ROOT, peers
from report import processor, software, today, write
from torch import Tensor, nn

from aethersr.errors import first_line


def part_networks(kit: Kit, part: str = "networks", size: int = 0) -> Iterator[None]:
    """Fused networks in every precision and layout."""
    height, width = kit.setting.sizes[size]
    image = kit.image(1, 3, height, width)
    for variant in kit.setting.variants:
        for scale in (2, 4):
            net = kit.fused(variant, scale)
            ways = {
                f"{precision}, {layout}": functools.partial(inference, kit, net, image, precision, layout)
                for precision in PRECISIONS
                for layout in LAYOUTS
            }
            kit.compare(part, f"{variant} x{scale}, {width}x{height}", ways)
            yield


def part_large_pictures(kit: Kit) -> Iterator[None]:
    """The same with 720p pictures."""
    return part_networks(kit, "large pictures", 1)


def part_training(kit: Kit) -> Iterator[None]:
    """A training step with AdamW and AMP in each layout, and its memory."""
    for variant in kit.setting.variants:
        for batch in kit.setting.batches[1:3]:
            ways = {
                f"{precision}, {layout}": functools.partial(
                    training, kit, variant, batch, kit.setting.lq, precision, layout
                )
                for precision in ("fp16", "bf16", "TF32")
                for layout in LAYOUTS
            }
            kit.compare("training", f"{variant} x2, batch {batch}, lq {kit.setting.lq}", ways)
            yield


def training(kit: Kit, variant: str, batch: int, lq: int, precision: str, layout: str) -> Step:
    """A training step as in the frameworks: autocast, a scaled loss in fp16, AdamW."""
    net: Any = kit.build(variant, 2).train().to(kit.device)
    net = net.to(memory_format=LAYOUTS[layout])
    x = kit.image(batch, 3, lq, lq).contiguous(memory_format=LAYOUTS[layout])
    target = kit.image(batch, 3, 2 * lq, 2 * lq)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(kit.device, enabled=precision == "fp16" and kit.device == "cuda")
    dtype = PRECISIONS[precision]

    def step() -> None:
        tensor_float(True)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with torch.autocast(kit.device, dtype=dtype, enabled=dtype != torch.float32):
                loss = (net(x) - target).abs().mean()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def part_optimizers(kit: Kit) -> Iterator[None]:
    """The optimizer's step alone. By default SOAP computes new bases in one step of ten."""
    ways = {"AdamW": None, "SOAP, the bases kept": 10**9, "SOAP, new bases": 1}
    for variant in kit.setting.variants:
        steps = {way: functools.partial(optimizer_step, kit, variant, ways[way]) for way in ways}
        kit.compare("optimizers", variant, steps)
        yield


def optimizer_step(kit: Kit, variant: str, frequency: Optional[int]) -> Step:
    """A step of SOAP with new bases every ``frequency`` steps, or of AdamW."""
    tensor_float(False)  # as in the templates; an earlier part allowed it
    net: Any = kit.build(variant, 2).train().to(kit.device)
    for value in net.parameters():
        value.grad = torch.randn_like(value)
    if frequency is None:
        return torch.optim.AdamW(net.parameters(), lr=1e-9).step
    from pytorch_optimizer import SOAP

    return SOAP(net.parameters(), lr=1e-9, precondition_frequency=frequency).step  # type: ignore[no-any-return]


def part_depthwise(kit: Kit) -> Iterator[None]:
    """The 11x11 depthwise convolution alone: every precision and layout, other ways, and the GPU's limit."""
    peak, bandwidth = limits(kit)
    yield
    height, width = kit.setting.sizes[0]
    for channels in kit.setting.channels:
        group = f"{channels} channels, {width}x{height}"
        work = channels * height * width
        x, weight = kit.image(1, channels, height, width), kit.image(channels, 1, 11, 11)

        def prepare(way: str, precision: str, layout: str, x: Tensor = x, weight: Tensor = weight) -> Step:
            given = x.to(PRECISIONS[precision]).contiguous(memory_format=LAYOUTS[layout])
            convolve = WAYS[way](weight.to(given.dtype))

            def step() -> Any:
                tensor_float(precision == "TF32")
                return convolve(given)

            return step

        for precision in ("fp16", "bf16", "fp32"):
            size = PRECISIONS[precision].itemsize
            floor = max(work * 121 / peak, 2 * work * size / bandwidth) / 1e6
            ways = {
                f"{way}, {precision}, {layout}": functools.partial(prepare, way, precision, layout)
                for way in (WAYS if precision == "fp16" else ["own"])
                for layout in LAYOUTS
            }
            kit.compare("depthwise", group, ways, limit=floor)
            yield


def limits(kit: Kit) -> Tuple[float, float]:
    """Multiply-adds outside tensor cores in GMAC/s and memory in GB/s, measured."""
    side, count = (4096, 2**28) if kit.device == "cuda" else (64, 2**16)
    matrix, big = kit.image(side, side), kit.image(count)
    other = torch.empty_like(big)

    def multiply() -> None:
        tensor_float(False)
        torch.mm(matrix, matrix)

    times = kit.timed({"multiply": multiply, "copy": lambda: other.copy_(big)})
    peak, bandwidth = side**3 / times.median("multiply") / 1e6, 8 * count / times.median("copy") / 1e6
    kit.add("depthwise", "limits", "fp32 multiply-adds, GMAC/s", measured=peak)
    kit.add("depthwise", "limits", "memory, GB/s", measured=bandwidth)
    return peak, bandwidth


def part_peers(kit: Kit) -> Iterator[None]:
    """Other networks beside ours, fp16, in the layout that suits each."""
    image = kit.image(1, 3, *kit.setting.sizes[0])
    size = "{1}x{0}".format(*kit.setting.sizes[0])
    for scale in (2, 4):
        nets = {variant: kit.fused(variant, scale) for variant in kit.setting.variants}
        for name, build in peers().items():
            if kit.setting is WHOLE or name in ("Compact", "SPAN"):
                nets[name] = build(scale)
        counts = {name: parameters(net) for name, net in nets.items()}
        ways = {
            f"{name}, {layout}": functools.partial(inference, kit, net, image, "fp16", layout)
            for name, net in nets.items()
            for layout in LAYOUTS
        }
        times = kit.compare("peers", f"x{scale}, {size}, fp16", ways)
        for row in kit.rows:
            if row["part"] == "peers" and times:
                row.setdefault("parameters", counts.get(row["way"].split(",")[0]))
        yield


def part_graphs(kit: Kit) -> Iterator[None]:
    """torch.compile and CUDA graphs, beside eager."""
    image = kit.image(1, 3, *kit.setting.sizes[0])

    def compiled(net: nn.Module, x: Tensor) -> Step:
        return functools.partial(
            torch.compile(net, backend="inductor" if kit.device == "cuda" else "eager"), x
        )

    def graphed(net: nn.Module, x: Tensor) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # whatever is set up once must not be recorded
            for _ in range(3):
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            net(x)
        return lambda: (graph.replay(), net, x)  # the graph itself keeps neither alive

    for variant in kit.setting.variants:
        net = kit.fused(variant, 2)
        ways = {
            f"{name}, {layout}": functools.partial(inference, kit, net, image, "fp16", layout, run)
            for name, run in (("eager", None), ("CUDA graph", graphed), ("torch.compile", compiled))
            for layout in LAYOUTS
        }
        kit.compare("graphs", f"{variant} x2, {image.shape[3]}x{image.shape[2]}, fp16", ways)
        torch.compiler.reset()
        yield


def part_runtimes(kit: Kit) -> Iterator[None]:
    """ONNX Runtime on the GPU, and with TensorRT if its build includes it."""
    try:
        import onnxruntime
    except ImportError as error:
        kit.add("runtimes", "ONNX Runtime", "-", failed=first_line(error))
        return
    wanted = (
        ("CUDAExecutionProvider", "TensorrtExecutionProvider")
        if kit.device == "cuda"
        else ("CPUExecutionProvider",)
    )
    image = kit.image(1, 3, *kit.setting.sizes[0])
    for variant in kit.setting.variants:
        net = kit.fused(variant, 2)
        with tempfile.TemporaryDirectory() as folder:

            def prepare(precision: str, provider: str, net: Any = net, folder: str = folder) -> Step:
                if provider not in onnxruntime.get_available_providers():
                    raise ImportError(f"this build of ONNX Runtime has no {provider}")
                path, x = Path(folder, f"{precision}.onnx"), image.to(PRECISIONS[precision])
                if not path.exists():
                    export(copy.deepcopy(net).to(kit.device, x.dtype), x, path, dynamic=False)
                more = {"trt_fp16_enable": precision == "fp16"} if provider.startswith("Tensorrt") else {}
                session = onnxruntime.InferenceSession(str(path), providers=[(provider, more)])
                if session.get_providers()[0] != provider:  # it falls back with no more than a warning
                    raise ImportError(f"ONNX Runtime could not load {provider}")
                binding, kind = session.io_binding(), "float16" if precision == "fp16" else "float32"
                out = torch.empty(1, 3, *(2 * side for side in x.shape[2:]), dtype=x.dtype, device=kit.device)
                for bind, name, value in (
                    (binding.bind_input, "input", x),
                    (binding.bind_output, "output", out),
                ):
                    bind(name, kit.device, 0, kind, tuple(value.shape), value.data_ptr())
                return lambda: (session.run_with_iobinding(binding), x, out)

            ways = {
                "PyTorch, fp16, channels_last": functools.partial(
                    inference, kit, net, image, "fp16", "channels_last"
                )
            }
            for provider in wanted:
                for precision in ("fp16", "fp32"):
                    ways[f"{provider[:-17]}, {precision}"] = functools.partial(prepare, precision, provider)
            kit.compare("runtimes", f"{variant} x2, {image.shape[3]}x{image.shape[2]}", ways)
        yield


def part_memory(kit: Kit) -> Iterator[None]:
    """Memory and speed of a training step for each batch and size of its pictures."""
    for variant in kit.setting.variants:
        for lq in kit.setting.lq_sizes:
            for batch in kit.setting.batches:
                group, way = f"{variant} x2, lq {lq}", f"batch {batch}"
                kit.tidy()
                step = kit.works(
                    "memory",
                    group,
                    way,
                    functools.partial(training, kit, variant, batch, lq, "fp16", "channels_last"),
                )
                if step is None:
                    break
                ms = kit.timed({"step": step}).median("step")
                kit.add(
                    "memory",
                    group,
                    way,
                    ms=ms,
                    **{"pictures/s": 1e3 * batch / ms, "peak MiB": taken(kit, step)},
                )
                yield


def taken(kit: Kit, step: Step) -> float:
    """All GPU memory that PyTorch holds during a step, including weights and optimizer."""
    if kit.device != "cuda":
        return peak_mebibytes(step, kit.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    kit.wait()
    return torch.cuda.max_memory_reserved() / 2**20


PARTS: Dict[str, Callable[[Kit], Iterator[None]]] = {  # in order of importance
    "networks": part_networks,
    "training": part_training,
    "optimizers": part_optimizers,
    "depthwise": part_depthwise,
    "peers": part_peers,
    "memory": part_memory,
    "large pictures": part_large_pictures,
    "runtimes": part_runtimes,
    "graphs": part_graphs,  # compiling takes longest
}


def save(kit: Kit, title: str, folder: Path, stem: str) -> None:
    told = {part: (measure.__doc__ or "").split("\n")[0] for part, measure in PARTS.items()}
    write(folder / f"{stem}.md", markdown(kit.rows, title, told))
    write(folder / f"{stem}.json", json.dumps({"title": title, "rows": kit.rows}, indent=1))


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks: whether everything runs")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=4.0, help="begin nothing after these (default: 4)")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results; none with --quick)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch finds no GPU; install its CUDA build, or pass --device cpu --quick")
    kit = Kit(args.device, QUICK if args.quick else WHOLE, args.minutes)
    card = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    title = f"{card}, {today()}, {software()}"
    stem = "gpu_" + re.sub(r"\W+", "_", card.lower()).strip("_")
    folder = args.output or (None if args.quick else ROOT / "benchmarks" / "results")
    print(title, flush=True)
    if folder is not None and (folder / f"{stem}.json").is_file():
        kit.rows += json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))["rows"]
    measured: List[str] = []
    for part in args.parts:
        kit.rows[:] = [row for row in kit.rows if row["part"] != part]  # of an earlier call
        measured.append(part)
        try:
            for _ in PARTS[part](kit):
                if folder is not None:
                    save(kit, title, folder, stem)
                if not kit.on_time():
                    break
        except Exception as error:  # the other parts may work
            kit.add(part, "-", "-", failed=first_line(error))
        if not kit.on_time():
            print(f"{args.minutes:g} minutes are over; --parts and --minutes measure the rest", flush=True)
            break
    if folder is not None:
        save(kit, title, folder, stem)
        try:
            plot(kit.rows, folder / f"{stem}.png")
        except ImportError as error:
            print(f"no plot: {error}; pip install -r benchmarks/requirements.txt", file=sys.stderr)
    return int(all("failed" in row for row in kit.rows if row["part"] in measured))


if __name__ == "__main__":
    raise SystemExit(main())
