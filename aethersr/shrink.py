"""Makes a smaller network of a trained one, to be fine-tuned: fewer blocks, smaller kernels, fewer channels.

Blocks add to what they get, so a network works without any of them (arxiv.org/abs/1605.06431). Works on state
dicts of the training form; what stays is that of the file, to the bit.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import torch
from aether_arch import VARIANTS, FusedAetherNet
from torch import Tensor, nn

from aethersr.calibration import Pairs, psnr
from aethersr.identify import aether_from_state_dict
from aethersr.verify import compare_times

State = Dict[str, Tensor]
BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")
OPTIONS = ["embed_dim", "depths", "mlp_ratio", "lk_kernel", "sk_kernel", "in_chans", "img_range"]
OPTIONS += ["use_channel_attn", "use_spatial_attn"]


class Step(NamedTuple):
    """What went last, the weights without it, and their PSNR on the pictures in dB."""

    what: str
    state: State
    decibels: float


class Size(NamedTuple):
    """How many blocks there are in all, the side of the large kernels, and the hidden channels of a block."""

    blocks: int
    kernel: int
    hidden: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Size:
        hidden = int(options["embed_dim"] * options["mlp_ratio"])
        return cls(sum(options["depths"]), options["lk_kernel"], hidden)

    def within(self, options: Mapping[str, Any]) -> Dict[str, Any]:
        """Options of a network of this size. All stages but the last have one block."""
        ones = [1] * (len(options["depths"]) - 1)
        ratio = (self.hidden + 0.5) / options["embed_dim"]
        depths = [*ones, self.blocks - len(ones)]
        return {**options, "depths": depths, "lk_kernel": self.kernel, "mlp_ratio": ratio}


def without_block(state: Mapping[str, Tensor], stage: int, block: int) -> State:
    """The weights without a block; those behind it in its stage move up."""
    kept: State = {}
    for name, value in state.items():
        match = BLOCK.match(name)
        behind = int(match[2]) - block if match and int(match[1]) == stage else -1
        if match and behind > 0:
            name = f"stages.{stage}.{int(match[2]) - 1}.{name[match.end() :]}"
        if behind:
            kept[name] = value
    return kept


def with_kernel(state: Mapping[str, Tensor], kernel: int) -> State:
    """The weights with the middle of each large kernel. The small ones stay."""
    kept = dict(state)
    for name, value in state.items():
        if name.endswith(".lk_conv.weight"):
            border = (value.shape[-1] - kernel) // 2
            kept[name] = value[:, :, border : border + kernel, border : border + kernel].clone()
    return kept


def with_hidden(state: Mapping[str, Tensor], channels: Mapping[str, Tensor]) -> State:
    """The weights with some hidden channels of each block: their indices, by "stages.i.j."."""
    kept = dict(state)
    for block, indices in channels.items():
        for part in ("gate.weight", "gate.bias", "main.weight", "main.bias"):
            name = f"{block}ffn.conv_{part}"
            kept[name] = state[name][indices]
        out = f"{block}ffn.conv_out.weight"
        kept[out] = state[out][:, indices].clone()
    return kept


@torch.no_grad()
def decibels(net: nn.Module, pairs: Pairs) -> float:
    """The mean PSNR over pairs of a small and a large picture."""
    return statistics.mean(psnr(net(low), high) for low, high in pairs)


def least_missed(net: Any, pairs: Pairs) -> Tuple[int, int]:
    """Stage and index of the fused block without which most is left. A stage keeps one block."""
    found: List[Tuple[float, int, int]] = []
    for stage, blocks in enumerate(net.stages):
        for index, block in enumerate(blocks if len(blocks) > 1 else []):
            blocks[index] = nn.Identity()
            found.append((decibels(net, pairs), stage, index))
            blocks[index] = block
    return max(found)[1:]


def strongest_channels(net: FusedAetherNet, pairs: Pairs, hidden: int) -> Dict[str, Tensor]:
    """The hidden channels of each fused block that add most to its output, in their order."""
    shares: Dict[str, Tensor] = {}

    def watch(name: str, out_conv: nn.Conv2d) -> Callable[..., None]:
        norms = out_conv.weight.detach().flatten(1).norm(dim=0)

        def hook(module: nn.Module, inputs: Tuple[Tensor]) -> None:
            shares[name] = shares.get(name, 0.0) + inputs[0].square().sum((0, 2, 3)) * norms.square()

        return hook

    for name, module in net.stages.named_modules(prefix="stages"):
        if name.endswith("out_conv"):
            module.register_forward_pre_hook(watch(name[: -len("out_conv")], module))
    decibels(net, pairs)
    return {name: share.topk(hidden).indices.sort().values for name, share in shares.items()}


def steps(state: State, pairs: Pairs, left: Size) -> Iterator[Step]:
    """The weights as they are, then after each block that goes, after the kernels and after the channels.

    Args:
        state: a training form without wrappers.
        pairs: small and large pictures, (1, in_chans, H, W) in [0, 1].
        left: the size to reach. A stage keeps one block.
    """
    net = aether_from_state_dict(state).fused()
    size = Size.of(net.options)
    yield Step("nothing", state, decibels(net, pairs))
    for _ in range(size.blocks - left.blocks):
        stage, block = least_missed(net, pairs)
        state = without_block(state, stage, block)
        net = aether_from_state_dict(state).fused()
        yield Step(f"block {stage}.{block}", state, decibels(net, pairs))
    if left.kernel < size.kernel:
        state = with_kernel(state, left.kernel)
        net = aether_from_state_dict(state).fused()
        yield Step(f"kernels outside {left.kernel}x{left.kernel}", state, decibels(net, pairs))
    if left.hidden < size.hidden:
        state = with_hidden(state, strongest_channels(net, pairs, left.hidden))
        what = f"{size.hidden - left.hidden} of {size.hidden} channels"
        yield Step(what, state, decibels(aether_from_state_dict(state).fused(), pairs))


def size_within(share: float, options: Mapping[str, Any], most: Size, least: Size) -> Size:
    """The largest size between two that takes at most this share of the network's time, by measurement.

    Channels go first, then blocks. Raises ValueError if ``least`` takes longer.
    """
    middle = most._replace(hidden=least.hidden)
    sizes = {"most": most, "middle": middle, "least": least}
    nets = {name: FusedAetherNet(**size.within(options)) for name, size in sizes.items()}
    measured = compare_times({"all": FusedAetherNet(**options), **nets})
    high, mid, low = (measured.ratio(name, "all").value for name in sizes)

    def between(first: int, last: int, start: float, end: float) -> int:
        return first + int((last - first) * (share - start) / max(end - start, 1e-6))

    if high <= share:
        return most
    if mid <= share:
        hidden = between(least.hidden, most.hidden, mid, high)
        return most._replace(hidden=max(least.hidden, hidden // 8 * 8))
    if low <= share:
        return middle._replace(blocks=between(least.blocks, most.blocks, low, mid))
    raise ValueError(f"one block in each stage takes {low:.2f} of the network's time")


def network_lines(options: Mapping[str, Any]) -> List[str]:
    """The lines of a template's network_g: the nearest variant and every option in which it differs."""

    own = {**options, "depths": tuple(options["depths"])}

    def lines(variant: Callable[..., Any]) -> List[str]:
        defaults = inspect.signature(variant).parameters
        names = [name for name in OPTIONS if own[name] != defaults[name].default]
        return [f"type: {variant.__name__}", *(f"{name}: {json.dumps(options[name])}" for name in names)]

    return min(map(lines, VARIANTS), key=len)
