"""What every part of gpu.py needs: the setting, the device, and timing."""

from __future__ import annotations

import copy
import functools
import gc
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from counting import peak_mebibytes
from networks import aether_arch
from report import Row, short
from torch import Tensor, nn

from aethersr.errors import first_line
from aethersr.timing import Comparison, interleaved

Step = Callable[[], Any]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"fp32": torch.float32, "TF32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

SLOWEST = 1.0  # seconds of a step: one that takes longer would use up the minutes


class Setting(NamedTuple):
    """What is measured: everything, or with --quick a small part."""

    variants: Dict[str, Dict[str, Any]]
    sizes: Tuple[Tuple[int, int], ...]
    lq: int
    batches: Tuple[int, ...]
    lq_sizes: Tuple[int, ...]
    channels: Tuple[int, ...]
    seconds: float  # for each group


WHOLE = Setting(
    variants={name: {} for name in ("aether_small", "aether_medium", "aether_large")},
    sizes=((256, 256), (720, 1280)),
    lq=64,
    batches=(4, 8, 16, 32),
    lq_sizes=(32, 64, 96),
    channels=(96, 128, 180),
    seconds=1.5,
)
QUICK = Setting(
    variants={
        "aether_small": {"embed_dim": 8, "depths": (1,)},
        "aether_medium": {"embed_dim": 8, "depths": (1,)},
    },
    sizes=((8, 8), (8, 12)),
    lq=8,
    batches=(1, 2),
    lq_sizes=(8, 12),
    channels=(8,),
    seconds=0.01,
)


class Kit:
    """The device, the rows so far, and the time left."""

    def __init__(self, device: str, setting: Setting, minutes: float) -> None:
        self.device, self.setting, self.end = device, setting, time.monotonic() + 60 * minutes
        self.rows: List[Row] = []
        self.wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def build(self, variant: str, scale: int, **options: Any) -> Any:
        torch.manual_seed(0)
        return filled(getattr(aether_arch, variant)(scale=scale, **self.setting.variants[variant], **options))

    @functools.lru_cache(maxsize=None)  # noqa: B019  fusing takes seconds
    def fused(self, variant: str, scale: int) -> Any:
        return filled(self.build(variant, scale).fused())

    def image(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device)

    def add(self, part: str, group: str, way: str, **found: Any) -> None:
        self.rows.append({"part": part, "group": group, "way": way, **found})
        figures = ", ".join(
            f"{name} {value if isinstance(value, str) else short(value)}" for name, value in found.items()
        )
        print(f"{part} | {group} | {way} | {figures}", flush=True)

    def works(self, part: str, group: str, way: str, prepare: Callable[[], Step]) -> Optional[Step]:
        """What ``prepare`` returns, run once; None and a line where it is not possible on this device."""
        try:
            step = prepare()
            step()
            self.wait()
            return step
        except Exception as error:
            self.add(part, group, way, failed=first_line(error))
            self.tidy()
            return None

    def tidy(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def compare(
        self, part: str, group: str, ways: Mapping[str, Callable[[], Step]], **more: Any
    ) -> Optional[Comparison]:
        """Time the ways that work, in turn; a line for each, with how it stands to the first."""
        prepared = {way: self.works(part, group, way, prepare) for way, prepare in ways.items()}
        steps = {way: step for way, step in prepared.items() if step is not None}
        seconds = {way: self.seconds(step) for way, step in steps.items()}
        for way in [way for way in steps if seconds[way] > SLOWEST]:
            self.add(part, group, way, failed=f"{seconds[way]:.1f} s, too slow to compare")
            del steps[way]
        if not steps:
            return None
        times = self.timed(steps, seconds)
        base = next(iter(steps))
        for way, step in steps.items():
            gain = "1" if way == base else str(times.ratio(base, way))
            found: Row = {"ms": times.median(way), "gain": gain, **more}
            if part == "training":
                found["peak MiB"] = peak_mebibytes(step, self.device)
            self.add(part, group, way, **found)
        self.tidy()
        return times

    def timed(self, steps: Mapping[str, Step], about: Optional[Mapping[str, float]] = None) -> Comparison:
        """Repeats short steps, so that waiting for the GPU before reading the clock doesn't count much.

        ``about``: the seconds of each step, if they are known.
        """
        about = about or {name: self.seconds(step) for name, step in steps.items()}
        counts = {name: max(1, min(100, int(0.01 / about[name]))) for name in steps}

        def repeated(step: Step, count: int) -> None:
            for _ in range(count):
                step()

        loops = {name: functools.partial(repeated, step, counts[name]) for name, step in steps.items()}
        seconds = self.setting.seconds * len(steps) / 4
        found = interleaved(loops, rounds=25, seconds=seconds, warmup=1, wait=self.wait)
        return Comparison({name: [ms / counts[name] for ms in times] for name, times in found.times.items()})

    def seconds(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - start

    def on_time(self) -> bool:
        return time.monotonic() < self.end


@torch.no_grad()
def filled(net: Any) -> Any:
    """``net`` without weights that are zero everywhere: a card may calculate faster with those."""
    for value in net.parameters():
        if not value.any():
            value.normal_(std=0.01)
    return net


@torch.no_grad()
def inference(kit: Kit, net: nn.Module, image: Tensor, precision: str, layout: str, run: Any = None) -> Step:
    """A pass of a copy of ``net`` in a precision and layout; ``run`` makes of it what is called."""
    dtype, memory_format = PRECISIONS[precision], LAYOUTS[layout]
    made: Any = copy.deepcopy(net).eval().to(kit.device, dtype)
    made = made.to(memory_format=memory_format)
    x = image.to(dtype).contiguous(memory_format=memory_format)
    call = run(made, x) if run else functools.partial(made, x)

    @torch.no_grad()
    def step() -> Any:
        tensor_float(precision == "TF32")
        return call()

    return step


def tensor_float(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
