"""Half precision: what a network loses in it, and an exact rescaling of the values that it can't hold.

Many values in a fused network can be rescaled: the convolution before them is multiplied by 2^-k and the one
after by 2^k. In float32 not a bit of the result changes.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
from functools import partial
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

import torch
from aether_arch import AetherBase, FusedAetherBlock, FusedAetherNet
from aether_quant import QuantAetherNet, Quantizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF_MAX = torch.finfo(torch.float16).max
SPARE_BITS = 3  # rescale below this headroom: pictures may drive a layer further than the hard ones do
TINY = 2.0**-10  # if the largest value is smaller, most others are below fp16's smallest normal number
RUNAWAY = 10.0  # a picture runs away if its output is this many times as large as for most pictures


class Fit(NamedTuple):
    """What fit_half_precision_ did and found."""

    powers: Dict[str, int]  # powers of two, by group
    notes: List[str]  # what the user should be told
    problem: str  # what rescaling can't solve; "" if half precision holds everything
    decibels: float  # PSNR of half precision against float32; not finite with a problem
    steps: float  # largest difference there, in steps of 1/255


@torch.no_grad()
def fit_half_precision_(net: FusedAetherNet, device: str = "cpu") -> Fit:
    """Rescale the network, in place, until half precision holds its values on hard pictures; compare both.

    Pictures on which it runs away are ignored: a scale for them would make the others' values too small.
    """
    pictures = {name: picture.to(device) for name, picture in hard_pictures(net.options["in_chans"]).items()}
    plain = copy.deepcopy(net).float().to(device)
    measured = {name: largest_values(plain, picture) for name, picture in pictures.items()}
    outputs = {name: found[".out"] for name, found in measured.items()}
    bound = min(HALF_MAX, RUNAWAY * max(1.0, statistics.median(outputs.values())))
    lost = [name for name, output in outputs.items() if not output <= bound]
    sound = [name for name in pictures if name not in lost]
    notes = []
    if lost:
        found = f"on {len(lost)} of {len(pictures)} hard pictures the network runs away, in float32 too"
        notes.append(f"Note: {found}: {', '.join(lost)}")
        if net.options["bound"] is None:
            notes.append("--bound 1, with the training checkpoint, prevents it")
    if not sound:
        problem = f"on no hard picture is the output below {HALF_MAX:g}, half precision's largest number"
        return Fit({}, notes, problem, math.nan, math.nan)
    powers = rescale_(net, [measured[name] for name in sound])
    if powers:
        notes.append(f"Rescaled for half precision, the same function: {', '.join(powers)}")
    decibels, steps = loss(copy.deepcopy(net).float().to(device), [pictures[name] for name in sound])
    fails = "half precision can't hold its values, and no rescaling helps"
    return Fit(powers, notes, "" if math.isfinite(decibels) else fails, decibels, steps)


class _Rounding(TorchFunctionMode):
    """Rounds every operation's result to half precision: a GPU adds up in float32 and stores that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            out.copy_(out.half())  # in place, as the operation itself may have been
        return out


@torch.no_grad()
def in_half_precision(net: AetherBase, picture: Tensor) -> Tensor:
    """The output with all weights and values rounded; PyTorch's own half precision is slow on a CPU."""
    low = copy.deepcopy(net).half().float()
    with _Rounding():
        return low(picture.half().float())


@torch.no_grad()
def loss(net: AetherBase, pictures: Iterable[Tensor]) -> Tuple[float, float]:
    """PSNR of half precision against float32, and the largest difference in steps of 1/255."""
    errors = [(in_half_precision(net, picture) - net(picture)).abs() for picture in pictures]
    mean = statistics.mean(float(error.pow(2).mean()) for error in errors)
    return -10 * math.log10(max(mean, 1e-12)), 255 * max(float(error.max()) for error in errors)


def hard_pictures(channels: int, side: int = 24) -> Dict[str, Tensor]:
    """Pictures that cause extreme values: flat, saturated, periodic, ramps, noise. (1, C, H, W) in [0, 1]."""
    y, x = torch.arange(side).view(-1, 1), torch.arange(side)
    noise = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0))
    pictures = {"black": noise * 0, "white": noise * 0 + 1, "noise": noise, "coarse noise": noise.round()}
    pictures.update({"ramp": x / (side - 1), "falling ramp": 1 - (x + y) / (2 * side - 2)})
    for channel in range(channels if channels > 1 else 0):
        only = (torch.arange(channels) == channel).float().view(-1, 1, 1)
        pictures.update({f"channel {channel} alone": only, f"all but channel {channel}": 1 - only})
    for pixels in (1, 2, 4, 8):
        pictures[f"{pixels} px stripes"] = (x // pixels % 2).float()
        pictures[f"{pixels} px checkerboard"] = ((x // pixels + y // pixels) % 2).float()
    pictures = {name: picture.expand(1, channels, side, side) for name, picture in pictures.items()}
    return {**pictures, "noise, 1x1": noise[None, :, :1, :1], "noise, 21x3": noise[None, :, :3, :21]}


@torch.no_grad()
def largest_values(net: AetherBase, picture: Tensor) -> Dict[str, float]:
    """Largest magnitude of every module's input ("NAME.in") and output ("NAME.out"); NaN is infinity."""
    found = {}

    def measure(name: str, _: Any, inputs: Any, output: Any) -> None:
        for key, value in ((f"{name}.in", inputs[0]), (f"{name}.out", output)):
            found[key] = float(value.abs().max().nan_to_num(math.inf, math.inf))

    hooks = [module.register_forward_hook(partial(measure, name)) for name, module in net.named_modules()]
    net(picture)
    for hook in hooks:
        hook.remove()
    return found


class Group(NamedTuple):
    """Values inside the network that have one scale, and the tensors that make and use them."""

    values: List[str]  # names as in largest_values
    made_by: List[Tensor]  # and the ranges of a quantised network
    used_by: List[Tensor]

    @torch.no_grad()
    def scale_(self, power: int) -> None:
        """Multiply the values by 2^power; the network's output stays."""
        for tensors, factor in ((self.made_by, 2.0**power), (self.used_by, 2.0**-power)):
            for tensor in tensors:
                tensor.mul_(factor)


# A block's modules: those that make values of one scale, and those that use them.
IN_BLOCK = {
    "depthwise": (["reparam_conv"], ["gate_conv", "main_conv"]),
    "product": (["main_conv"], ["out_conv"]),
    "attention": (["channel_attn.fc.0"], ["channel_attn.fc.2"]),
}
READS_STREAM = ("reparam_conv", "channel_attn.fc.0", "spatial_attn.conv")


def groups(net: FusedAetherNet) -> Dict[str, Group]:
    """All that can be rescaled: not the gate, since SiLU(2x) is not 2 SiLU(x), and not the picture.

    The stream that the blocks add to has one scale from the first convolution to the last sum.
    """
    known: Dict[str, Any] = dict(net.named_modules())
    found = {}

    def add(title: str, made_by: List[str], used_by: List[str]) -> None:
        values = [f"{name}.out" for name in made_by] + [f"{name}.in" for name in used_by]
        quantizers = [known.get(re.sub(r"\.(in|out)$", r".quant_\1", value)) for value in values]
        made: List[Tensor] = [each.range_sum for each in quantizers if isinstance(each, Quantizer)]
        made += [value for name in made_by for value in known[name].parameters(recurse=False)]
        used = [item for name in used_by for item in known[name].named_parameters(recurse=False)]
        found[title] = Group(values, made, [value for name, value in used if name.endswith("weight")])

    fusions = [name for name in known if re.fullmatch(r"fusion_convs\.\d+", name)]
    last = "body_norm" if net.keep_norm else "body_conv"
    makers, readers = ["head", "fusion", "body_conv"], [*fusions, last, "conv_before_upsample.0"]
    for name, block in known.items():
        if isinstance(block, FusedAetherBlock):
            makers.append(f"{name}.out_conv")
            readers += [f"{name}.{part}" for part in READS_STREAM if f"{name}.{part}" in known]
            for title, parts in IN_BLOCK.items():
                made_by, used_by = ([f"{name}.{part}" for part in each] for each in parts)
                if made_by[0] in known and (title != "depthwise" or block.bound is None):
                    add(f"{name} {title}", made_by, used_by)
    add("stream", makers, readers)
    add("fusion_convs", fusions, ["fusion"])
    if net.keep_norm:
        add("body_norm", ["body_norm"], ["body_conv"])
    add("conv_before_upsample", ["conv_before_upsample.0"], ["tail"])
    return found


@torch.no_grad()
def rescale_(net: FusedAetherNet, measured: Sequence[Mapping[str, float]]) -> Dict[str, int]:
    """Rescale by powers of two, in place, what half precision can't hold. Returns the powers by group.

    Values near its largest number are scaled down; up are tiny ones, and those whose users have huge weights.
    """
    powers: Dict[str, int] = {}
    for name, group in groups(net).items():
        value = max(found[key] for found in measured for key in group.values)
        made, used = (max(float(each.abs().max()) for each in part) for part in group[1:])
        filled = max(value * 2**SPARE_BITS, made) / HALF_MAX
        wanted = max(used / HALF_MAX, 1 / value if 0 < value < TINY else 0.0)
        if 1 < filled < math.inf:
            powers[name] = -math.ceil(math.log2(filled))
        elif wanted > 1 and 0 < filled <= 0.5:
            powers[name] = min(math.ceil(math.log2(wanted)), math.floor(-math.log2(filled)))
        group.scale_(powers.get(name, 0))
    return powers


def rescaled(trained: QuantAetherNet, powers: Mapping[str, int]) -> QuantAetherNet:
    """A copy in float32, rescaled with its ranges. ``powers``: what rescale_ did to the fused network."""
    net = copy.deepcopy(trained).float()
    found = groups(net)
    for name, power in powers.items():
        found[name].scale_(power)
    return net
