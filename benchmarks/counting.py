"""What one pass of a network needs, counted instead of timed: memory, multiply-adds, convolutions."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Callable, Dict, List, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class LiveBytes(TorchDispatchMode):
    """The peak number of bytes in tensors created inside and alive at once.

    Weights and a kernel's own scratch memory don't count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: Dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen and key not in taken:
                    self.seen[key] = size
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)


def peak_mebibytes(step: Callable[[], Any], device: str) -> float:
    """Peak memory of ``step``: on a GPU what PyTorch allocated, otherwise the tensors alive at once."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float((torch.cuda.max_memory_allocated() - before) / 2**20)
    with LiveBytes() as live:
        step()
    return live.peak / 2**20


def gigamacs(net: nn.Module, image: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        net(image)
    return float(counter.get_total_flops() / 2e9)


def parameters(net: nn.Module) -> int:
    return sum(value.numel() for value in net.parameters())


class Convolution(NamedTuple):
    macs: float
    moved: float  # bytes that it must at least read and write
    depthwise: bool

    def milliseconds(self, dense: float, depthwise: float, bandwidth: float) -> float:
        """Its shortest time at these peaks, in GMAC/s and GB/s."""
        return max(self.macs / (depthwise if self.depthwise else dense), self.moved / bandwidth) / 1e6


class Convolutions(TorchDispatchMode):
    """Records every convolution of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: List[Convolution] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            macs = out.numel() * args[1][0].numel()
            moved = sum(value.numel() * value.element_size() for value in (args[0], args[1], out))
            self.found.append(Convolution(macs, moved, args[8] > 1))
        return out
