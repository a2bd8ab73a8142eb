"""Makes a smaller network of a trained one, to be fine-tuned: fewer blocks, smaller kernels, fewer channels.

Blocks add to what they get, so a network without one still works. What it loses is measured on pictures, and
the block that it misses least goes first (arxiv.org/abs/1605.06431). Works on state dicts
of the training form; tensors that stay are those of the file, to the bit.
"""

from __future__ import annotations

import functools
import inspect
import re
import statistics
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

import torch
from aether_arch import VARIANTS, FusedAetherNet
from torch import Tensor, nn

from aethersr.calibration import Pairs, psnr
from aethersr.identify import aether_from_state_dict, read_options
from aethersr.timing import Comparison, interleaved

State = Dict[str, Tensor]
BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")
OPTIONS = (
    "embed_dim",
    "depths",
    "mlp_ratio",
    "lk_kernel",
    "sk_kernel",
    "in_chans",
    "use_channel_attn",
    "use_spatial_attn",
)
KERNEL = 7  # what --time crops to: larger ones cost time, and after fine-tuning nothing is lost
SIDE = 96  # of the picture that is timed


class Step(NamedTuple):
    """What went last, the weights without it, and their PSNR on the pictures in dB."""

    what: str
    state: State
    decibels: float


def without_block(state: Mapping[str, Tensor], stage: int, block: int) -> State:
    """The weights without a block; those behind it in its stage move up."""
    kept: State = {}
    for name, value in state.items():
        match = BLOCK.match(name)
        here = match is not None and int(match[1]) == stage
        if match and here and int(match[2]) == block:
            continue
        if match and here and int(match[2]) > block:
            name = f"stages.{stage}.{int(match[2]) - 1}.{name[match.end() :]}"
        kept[name] = value
    return kept


def with_kernel(state: Mapping[str, Tensor], kernel: int) -> State:
    """The weights with the middle of each large kernel. The small kernel's share stays, if it fits in."""

    def cropped(name: str, value: Tensor) -> Tensor:
        border = (
            (value.shape[-1] - kernel) // 2 if name.endswith((".lk_conv.weight", ".sk_conv.weight")) else 0
        )
        return value[:, :, border:-border, border:-border].clone() if border > 0 else value

    return {name: cropped(name, value) for name, value in state.items()}


def with_hidden(state: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> State:
    """The weights with some hidden channels of each block; ``kept``: their indices, by "stages.i.j."."""

    def chosen(name: str, value: Tensor) -> Tensor:
        match = BLOCK.match(name)
        part = name[match.end() :] if match else ""
        if match and part.startswith(("ffn.conv_gate.", "ffn.conv_main.")):
            return value[kept[match[0]]]
        return value[:, kept[match[0]]].clone() if match and part == "ffn.conv_out.weight" else value

    return {name: chosen(name, value) for name, value in state.items()}


def fused(state: Mapping[str, Tensor], img_range: float) -> FusedAetherNet:
    """The network to measure, in float32."""
    return aether_from_state_dict(state, img_range).fused()


@torch.no_grad()
def decibels(net: nn.Module, pairs: Pairs) -> float:
    """The mean PSNR over pairs of a small and a large picture."""
    return statistics.mean(psnr(net(low), high) for low, high in pairs)


def without_least_missed(state: State, pairs: Pairs, img_range: float) -> Step:
    """The weights without the block whose loss costs least. At least one stage must have more than one."""
    net: Any = fused(state, img_range)
    found: List[Tuple[float, int, int]] = []
    for stage, blocks in enumerate(net.stages):
        for index, block in enumerate(blocks if len(blocks) > 1 else []):
            blocks[index] = nn.Identity()
            found.append((decibels(net, pairs), stage, index))
            blocks[index] = block
    left, stage, index = max(found)
    return Step(f"block {stage}.{index}", without_block(state, stage, index), left)


def strongest_channels(state: State, pairs: Pairs, hidden: int, img_range: float) -> Dict[str, Tensor]:
    """The hidden channels of each block that add most to its output, in their order, by "stages.i.j."."""
    net = fused(state, img_range)
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


def steps(
    state: State, pairs: Pairs, blocks: int, kernel: int, hidden: int, img_range: float = 1.0
) -> Iterator[Step]:
    """The weights as they are, then after each block that goes, after the kernels and after the channels.

    Args:
        state: a training form without wrappers.
        pairs: small and large pictures.
        blocks, kernel, hidden: what stays: blocks in all, sides of large kernels, hidden channels of a block.
        img_range: the training option of this name.
    """
    options = read_options(state)
    yield Step("nothing", state, decibels(fused(state, img_range), pairs))
    for _ in range(sum(options["depths"]) - blocks):
        step = without_least_missed(state, pairs, img_range)
        state = step.state
        yield step
    if kernel < options["lk_kernel"]:
        state = with_kernel(state, kernel)
        yield Step(
            f"kernels' border, {kernel}x{kernel} stay", state, decibels(fused(state, img_range), pairs)
        )
    if hidden < hidden_channels(options):
        state = with_hidden(state, strongest_channels(state, pairs, hidden, img_range))
        yield Step(f"channels, {hidden} stay", state, decibels(fused(state, img_range), pairs))


def hidden_channels(options: Mapping[str, Any]) -> int:
    return int(options["embed_dim"] * options["mlp_ratio"])


def limits(options: Mapping[str, Any]) -> Dict[str, range]:
    """What blocks, kernel and hidden can be."""
    return {
        "blocks": range(len(options["depths"]), sum(options["depths"]) + 1),
        "kernel": range(options["sk_kernel"], options["lk_kernel"] + 1, 2),
        "hidden": range(1, hidden_channels(options) + 1),
    }


def resized(options: Mapping[str, Any], blocks: int, kernel: int, hidden: int) -> Dict[str, Any]:
    """Options of a network of this size, with one block in each stage but the last."""
    width, stages = options["embed_dim"], len(options["depths"])
    depths = [1] * (stages - 1) + [blocks - stages + 1]
    return {**options, "depths": depths, "lk_kernel": kernel, "mlp_ratio": (hidden + 0.5) / width}


def times(nets: Mapping[str, FusedAetherNet]) -> Comparison:
    """Times of fused networks, in turns, for a picture of SIDE x SIDE."""
    image = torch.rand(1, next(iter(nets.values())).options["in_chans"], SIDE, SIDE)
    with torch.no_grad():
        return interleaved({name: functools.partial(net.eval(), image) for name, net in nets.items()})


def blocks_within(options: Mapping[str, Any], kernel: int, hidden: int, share: float) -> int:
    """How many blocks take at most this share of the network's time, by measurement.

    Raises:
        ValueError: even one block in each stage takes longer.
    """
    sizes = limits(options)["blocks"]
    small, large = (FusedAetherNet(**resized(options, n, kernel, hidden)) for n in (sizes[0], sizes[-1]))
    measured = times({"all": FusedAetherNet(**options), "small": small, "large": large})
    low, high = (measured.ratio(name, "all").value for name in ("small", "large"))
    if low > share:
        raise ValueError(f"one block in each stage takes {low:.2f} of the network's time")
    return min(sizes[-1], sizes[0] + int((share - low) / max(high - low, 1e-6) * (len(sizes) - 1)))


def network_lines(options: Mapping[str, Any]) -> List[str]:
    """The lines of a template's network_g: the nearest variant and every option in which it differs."""

    def lines(variant: Callable[..., Any]) -> List[str]:
        defaults = {name: option.default for name, option in inspect.signature(variant).parameters.items()}
        own = {**options, "depths": tuple(options["depths"])}
        names = [name for name in OPTIONS if own[name] != defaults[name]]
        return [f"type: {variant.__name__}", *(f"{name}: {as_yaml(options[name])}" for name in names)]

    return min(map(lines, VARIANTS), key=len)


def as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
