"""What speed.py times. A case takes the Bench; it returns a step, and what else to say given its ms."""

from __future__ import annotations

import copy
import tempfile
from typing import Any, Callable, Iterator, Sequence, Tuple

import networks as others
import torch
from networks import Runner, as_trained, deployed, opened, peer, short
from torch import nn
from torch.nn import functional as F

Case = Tuple[Callable[[], Any], Callable[[float], str]]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # else float32
ON_A_GPU = [("fp32", "contiguous"), ("TF32", "channels_last"), ("bf16", "channels_last")]
ON_A_GPU += [(precision, layout) for precision in ("AMP", "fp16") for layout in LAYOUTS]


def tensor_float(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def parameters_of(net: nn.Module) -> Callable[[float], str]:
    return lambda ms: f"{sum(value.numel() for value in net.parameters()):,} parameters"


def every_size(bench: Any) -> Iterator[Tuple[str, Any]]:
    """Our networks, with what they are and the size of the picture."""
    for variant in bench.args.sizes:
        for scale in bench.args.scales:
            yield f"{variant} x{scale}, {bench.picture}", bench.build(variant, scale)


def in_torch(bench: Any, net: Any, precision: str, layout: str, compiled: str = "") -> Case:
    dtype, order = TYPES.get(precision, torch.float32), LAYOUTS[layout]
    run = copy.deepcopy(net).eval().to(bench.device, dtype).to(memory_format=order)
    x = bench.random(1, 3, bench.args.side).to(dtype).contiguous(memory_format=order)
    run = torch.compile(run) if compiled else run

    @torch.no_grad()
    def step() -> None:
        tensor_float(precision == "TF32")
        with torch.autocast(bench.device, torch.float16, enabled=precision == "AMP"):
            run(x)

    return step, parameters_of(net)


def in_onnx_runtime(bench: Any, net: Any, any_size: bool) -> Case:
    x = bench.random(1, 3, bench.args.side)
    run, array = others.onnx_runtime(others.onnx_bytes(net, x, any_size), bench.args.threads), x.numpy()
    return lambda: run(array), parameters_of(net)


def sizes(bench: Any) -> None:
    """Our sizes on the CPU."""
    for what, net in every_size(bench):
        forms = {"unfused": net, "fused": net.fused()}
        named = {name: (in_torch, form, "fp32", "channels_last") for name, form in forms.items()}
        bench.group(f"{what}, PyTorch", named)
        bench.group(f"{what}, ONNX Runtime", {name: (in_onnx_runtime, forms[name], True) for name in forms})


def networks(bench: Any, ways: Sequence[Tuple[str, ...]] = ON_A_GPU) -> None:
    """Our fused sizes on a GPU, in each precision and layout."""
    for what, net in every_size(bench):
        fused = net.fused()
        bench.group(f"{what}, fused", {", ".join(way): (in_torch, fused, *way) for way in ways})


def peers(bench: Any) -> None:
    """Other networks beside ours: in ONNX Runtime, on a GPU in fp16."""
    if bench.args.checkout is None:
        return print("peers are left out: they need --traiNNer-redux CHECKOUT.", flush=True)
    for scale in bench.args.scales:
        nets = {f"{name} fused": bench.build(name, scale).fused() for name in bench.args.sizes}
        for name in bench.args.peers:
            nets[name] = as_trained(deployed(peer(name, bench.args.checkout)(scale=scale).eval()))
        way: Any = (in_torch, "fp16", "channels_last") if bench.cuda else (in_onnx_runtime,)
        named = {name: (way[0], net, *(way[1:] or [name.endswith(" fused")])) for name, net in nets.items()}
        bench.group(f"x{scale}, {bench.picture}", named)


def in_runtime(bench: Any, opener: Callable[[], Runner], image: Any, reference: Runner) -> Case:
    run = opener()
    difference = 255 * abs(run(image) - reference(image)).max()
    return lambda: run(image), lambda ms: f"differs by {difference:.2g}/255"


def runtimes(bench: Any) -> None:
    """The network of each file in every runtime, one thread, and how far its output is from PyTorch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for path in bench.args.weights:
        net = opened(path, "--weights").fused()
        coarse = bench.random(1, net.options["in_chans"], 1 + bench.args.side // 8)
        image = F.interpolate(coarse, size=(bench.args.side,) * 2, mode="bilinear").numpy()
        with tempfile.TemporaryDirectory() as folder:
            ways = others.openers(net, folder)
            named = {name: (in_runtime, each, image, ways["PyTorch"]()) for name, each in ways.items()}
            bench.group(f"{path.name}, {bench.picture}", named)
    torch.set_num_threads(threads)


def training_step(
    bench: Any, variant: str, batch: int, crop: int, precision: str, layout: str, more: str = ""
) -> Case:
    """A training step at x2 as in the frameworks: autocast, in fp16 a scaled loss.

    ``more``: "compiled", or "memory", to say what it takes of a GPU.
    """
    net = bench.build(variant, 2).train().to(bench.device).to(memory_format=LAYOUTS[layout])
    run = torch.compile(net) if more == "compiled" else net
    x = bench.random(batch, 3, crop).contiguous(memory_format=LAYOUTS[layout])
    target = bench.random(batch, 3, 2 * crop)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    half = torch.float16 if precision == "AMP" and bench.cuda else torch.bfloat16
    scaler = torch.amp.GradScaler("cuda", enabled=half == torch.float16)

    def step() -> None:
        tensor_float(precision == "TF32")
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with torch.autocast(bench.device, half, enabled=precision in ("AMP", "bf16")):
                loss = (run(x) - target).abs().mean()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    def told(ms: float) -> str:
        words = f"{1e3 * batch / ms:.0f} crops/s"
        if more != "memory":
            return words
        bench.tidy()
        torch.cuda.reset_peak_memory_stats()
        bench.seconds(step)
        return f"{words}, {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"

    return step, told


def training(bench: Any, ways: Sequence[Tuple[str, ...]] = ()) -> None:
    """A training step in each precision and layout."""
    batch, crop = bench.crops
    ways = ways or [(precision, layout) for precision in ("AMP", "bf16", "TF32") for layout in LAYOUTS]
    for variant in bench.args.sizes:
        what = f"training step, {variant} x2, {batch} crops of {crop}x{crop}"
        base = (training_step, variant, batch, crop)
        bench.group(what, {", ".join(way): (*base, *way) for way in ways})


def compiled(bench: Any) -> None:
    """torch.compile beside eager."""
    training(bench, [("AMP", "channels_last"), ("AMP", "channels_last", "compiled")])
    networks(bench, [("fp16", "channels_last"), ("fp16", "channels_last", "compiled")])


def memory(bench: Any) -> None:
    """The memory of a GPU that a training step with AMP takes."""
    for variant in bench.args.sizes:
        for batch, crop in [(batch, crop) for crop in (32, 48, 64) for batch in (4, 8, 16, 32)]:
            step = (training_step, variant, batch, crop, "AMP", "channels_last", "memory")
            bench.group(f"training memory, {variant} x2", {f"{batch} crops of {crop}x{crop}": step})


def depthwise(bench: Any) -> None:
    """The 11x11 depthwise convolution alone, beside what the machine's multiply-adds and memory allow."""
    tensor_float(False)
    side, count = (4096, 2**28) if bench.cuda else (1024, 2**24)
    matrix, big = bench.random(1, 1, side)[0, 0], torch.rand(count, device=bench.device)
    other, rates = torch.empty_like(big), {}

    def limit(bench: Any, unit: str, work: float, step: Callable[[], Any]) -> Case:
        def told(ms: float) -> str:
            rates[unit] = work / ms / 1e6
            return f"{rates[unit]:.0f} {unit}"

        return step, told

    def convolution(bench: Any, precision: str, layout: str, channels: int) -> Case:
        dtype = TYPES.get(precision, torch.float32)
        x = bench.random(1, channels, bench.args.side).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        weight = bench.random(channels, 1, 11).to(dtype)
        ms = max(121 * x.numel() / rates["GMAC/s"], 2 * x.numel() * x.element_size() / rates["GB/s"]) / 1e6
        step = lambda: F.conv2d(x, weight, padding=5, groups=channels)  # noqa: E731
        return step, lambda _: f"the machine's limit is {short(ms)} ms"

    multiply_adds = (limit, "GMAC/s", side**3, lambda: torch.mm(matrix, matrix))
    copy_ = (limit, "GB/s", 8 * count, lambda: other.copy_(big))
    bench.group("the machine's limit", {"fp32 multiply-adds": multiply_adds, "memory": copy_})
    precisions = ("fp16", "bf16", "fp32") if bench.cuda else ("fp32",)
    for channels in (96, 128, 180):
        ways = [(precision, layout) for precision in precisions for layout in LAYOUTS]
        named = {", ".join(way): (convolution, *way, channels) for way in ways}
        bench.group(f"depthwise 11x11, {channels} channels, {bench.picture}", named)
