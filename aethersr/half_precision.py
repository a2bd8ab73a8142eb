"""Half precision: what a network loses in it, and an exact rescaling of the values that it can't hold.

Many values in a fused network can be rescaled: the convolution before them is multiplied by 2^-k and the one
after by 2^k. In float32 not a bit of the result changes.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Tuple

import torch
from aether_arch import AetherBase, ChannelAttention, FusedAetherBlock, FusedAetherNet, SpatialAttention
from aether_quant import QuantAetherNet, insert_quantizers
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF_MAX = torch.finfo(torch.float16).max
SPARE_BITS = 3  # rescale below this headroom: pictures may drive a layer further than the hard ones do
TINY = 2.0**-10  # if the largest value is smaller, most others are below fp16's smallest normal number
RUNAWAY = 10.0  # a picture runs away if its output is this many times as large as for most pictures


class Fit(NamedTuple):
    """What fit_half_precision_ did and found."""

    powers: Dict[str, int]  # powers of two, by group
    lost: List[str]  # pictures on which the network runs away, in float32 too
    tried: int  # pictures, all together
    problem: str  # what rescaling can't solve; "" if half precision holds everything
    decibels: float  # PSNR of half precision against float32, over the other pictures; NaN with a problem
    steps: float  # largest difference there, in steps of 1/255

    def notes(self, bounded: bool) -> List[str]:
        """What the user should be told. ``bounded``: the network has a bound already."""
        lines = []
        if self.lost:
            first = ", ".join(self.lost[:3]) + (", ..." if len(self.lost) > 3 else "")
            remedy = "" if bounded else "; --bound 1, with the training checkpoint, prevents it"
            found = f"on {len(self.lost)} of {self.tried} hard pictures the network runs away, in float32 too"
            lines.append(f"Note: {found}: {first}{remedy}")
        if self.powers:
            first = ", ".join(f"{name} 2^{power}" for name, power in list(self.powers.items())[:3])
            more = f" and {len(self.powers) - 3} more" if len(self.powers) > 3 else ""
            lines.append(f"Rescaled for half precision, the same function: {first}{more}")
        return lines


@torch.no_grad()
def fit_half_precision_(net: FusedAetherNet, device: str = "cpu") -> Fit:
    """Rescale the network, in place, until half precision holds its values on hard pictures; compare both.

    Pictures on which the network runs away are ignored: a scale that fits them would make the others' values
    too small. A network that needs no rescaling stays untouched.
    """
    pictures = {name: picture.to(device) for name, picture in hard_pictures(net.options["in_chans"]).items()}
    plain = copy.deepcopy(net).float().to(device)
    measured = {name: largest_values(plain, picture) for name, picture in pictures.items()}
    outputs = {name: found[".out"] for name, found in measured.items()}
    bound = min(HALF_MAX, RUNAWAY * max(1.0, statistics.median(outputs.values())))
    lost = [name for name, output in outputs.items() if not output <= bound]
    sound = [name for name in pictures if name not in lost]
    if not sound:
        problem = f"on no hard picture is the output below {HALF_MAX:g}, half precision's largest number"
        return Fit({}, lost, len(pictures), problem, math.nan, math.nan)
    powers = rescale_(net, largest_of([measured[name] for name in sound]))
    decibels, steps = loss(copy.deepcopy(net).float().to(device), [pictures[name] for name in sound])
    problem = "half precision can't hold its values, and no rescaling helps" if math.isnan(decibels) else ""
    return Fit(powers, lost, len(pictures), problem, decibels, steps)


class _Rounding(TorchFunctionMode):
    """Rounds every operation's result to half precision: a GPU adds up in float32 and stores that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            out.copy_(out.half())  # in place, as the operation itself may have been
        return out


@torch.no_grad()
def in_half_precision(net: AetherBase, pictures: Iterable[Tensor]) -> List[Tensor]:
    """The outputs of a network whose weights and values are rounded to half precision, in float32.

    Computed in float32: PyTorch's own half precision is slow on a CPU, and older versions lack it.
    """
    low = copy.deepcopy(net).half().float()
    with _Rounding():
        return [low(picture.half().float()) for picture in pictures]


@torch.no_grad()
def loss(net: AetherBase, pictures: List[Tensor]) -> Tuple[float, float]:
    """What half precision loses: PSNR against float32 in dB (peak 1), and the largest difference in steps.

    NaN if a value is not finite.
    """
    outputs = in_half_precision(net, pictures)
    errors = [(output - net(picture)).abs() for output, picture in zip(outputs, pictures)]
    mean = statistics.mean(float(error.pow(2).mean()) for error in errors)
    if not math.isfinite(mean):
        return math.nan, math.nan
    return -10 * math.log10(max(mean, 1e-12)), 255 * max(float(error.max()) for error in errors)


# ------------------------------------------------------------------------------------- pictures and measuring


def hard_pictures(channels: int, side: int = 24) -> Dict[str, Tensor]:
    """Pictures that cause extreme values: flat, saturated, periodic, ramps, noise. (1, C, H, W) in [0, 1]."""
    y, x = torch.arange(side).view(-1, 1), torch.arange(side)
    noise = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0))
    pictures = {
        "black": noise * 0,
        "white": noise * 0 + 1,
        "noise": noise,
        "black and white noise": noise.round(),
    }
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
    found: Dict[str, float] = {}

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            for key, value in ((f"{name}.in", inputs[0]), (f"{name}.out", output)):
                largest = float(value.abs().max())
                found[key] = max(found.get(key, 0.0), math.inf if math.isnan(largest) else largest)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in net.named_modules()]
    try:
        net(picture)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def largest_of(measured: List[Dict[str, float]]) -> Dict[str, float]:
    """The largest of several measurements."""
    return {key: max(found[key] for found in measured) for key in measured[0]}


# ------------------------------------------------------------------------------------ the values in a network


class Group(NamedTuple):
    """Values inside the network that are scaled together, and the tensors that make and use them."""

    values: List[str]  # names as in largest_values
    made_by: List[str]
    used_by: List[str]


def groups(net: FusedAetherNet) -> Dict[str, Group]:
    """All groups that can be rescaled, in data order.

    The gate can't, since SiLU(2x) is not 2 SiLU(x), nor can the output, which is the picture. The stream that
    the blocks add to has one scale from the first convolution to the last sum.
    """

    def both(*convs: str) -> List[str]:
        return [f"{conv}.{tensor}" for conv in convs for tensor in ("weight", "bias")]

    fusions = [f"fusion_convs.{k}" for k in range(len(net.fusion_convs))]
    reader = "body_norm" if net.keep_norm else "body_conv"
    values = ["head.out", "fusion.out", f"{reader}.in", "body_norm.in", "body_conv.out"]
    values += ["conv_before_upsample.in", "conv_before_upsample.0.in"]
    users = [f"{user}.weight" for user in (*fusions, reader, "conv_before_upsample.0")]
    stream = Group(values, both("head", "fusion", "body_conv"), users)
    found = {"stream": stream}
    for name, block in net.named_modules():
        if not isinstance(block, FusedAetherBlock):
            continue
        reparam, gate, main, out = (f"{name}.{conv}_conv" for conv in ("reparam", "gate", "main", "out"))
        stream.values.extend([f"{name}.in", f"{out}.out", f"{name}.out"])
        stream.made_by.extend(both(out))
        stream.used_by.append(f"{reparam}.weight")
        if block.bound is None:
            users = [f"{gate}.weight", f"{main}.weight"]
            found[f"{name} depthwise"] = Group([f"{reparam}.out"], both(reparam), users)
        found[f"{name} product"] = Group([f"{main}.out", f"{out}.in"], both(main), [f"{out}.weight"])
        if isinstance(block.channel_attn, ChannelAttention):
            squeeze, excite = (f"{name}.channel_attn.fc.{layer}" for layer in (0, 2))
            stream.used_by.append(f"{squeeze}.weight")
            found[f"{name} attention"] = Group(
                [f"{squeeze}.out"], [f"{squeeze}.weight"], [f"{excite}.weight"]
            )
        if isinstance(block.spatial_attn, SpatialAttention):
            stream.used_by.append(f"{name}.spatial_attn.conv.weight")
    values = [*(f"{conv}.out" for conv in fusions), "fusion.in"]
    found["fusion_convs"] = Group(values, both(*fusions), ["fusion.weight"])
    if net.keep_norm:
        found["body_norm"] = Group(["body_norm.out", "body_conv.in"], both("body_norm"), ["body_conv.weight"])
    values = ["conv_before_upsample.0.out", "tail.in"]
    tail = [f"tail.{name}" for name, _ in net.tail.named_parameters() if name.endswith("weight")]
    found["conv_before_upsample"] = Group(values, both("conv_before_upsample.0"), tail)
    return found


# -------------------------------------------------------------------------------------------------- rescaling


@torch.no_grad()
def rescale_(net: FusedAetherNet, largest: Mapping[str, float]) -> Dict[str, int]:
    """Rescale by powers of two, in place, what half precision can't hold. In float32 no bit changes.

    Values near its largest number are scaled down. Tiny ones are scaled up, and so are those whose users have
    weights beyond its largest. Returns the powers by group; a network that needs none stays untouched.
    """
    tensors, powers = dict(net.named_parameters()), {}
    for name, group in groups(net).items():
        value = max(largest[key] for key in group.values)
        made, used = (
            max(float(tensors[key].abs().max()) for key in part) for part in (group.made_by, group.used_by)
        )
        filled = max(value * 2**SPARE_BITS, made) / HALF_MAX
        wanted = max(used / HALF_MAX, 1 / value if 0 < value < TINY else 0.0)
        power = 0
        if 1 < filled < math.inf:
            power = -math.ceil(math.log2(filled))
        elif wanted > 1 and 0 < filled <= 1:
            power = min(math.ceil(math.log2(wanted)), math.floor(-math.log2(filled)))
        if power:
            powers[name] = power
            for key in group.made_by:
                tensors[key].mul_(2.0**power)
            for key in group.used_by:
                tensors[key].mul_(2.0**-power)
    return powers


@torch.no_grad()
def with_ranges_of(net: FusedAetherNet, trained: QuantAetherNet, powers: Mapping[str, int]) -> QuantAetherNet:
    """The rescaled ``net`` quantised, with the ranges of ``trained``, which is the network before fusing.

    ``powers`` are those of the rescaling; each range is scaled like its values.
    """
    power_of = {value: powers.get(name, 0) for name, group in groups(net).items() for value in group.values}
    quantised = insert_quantizers(copy.deepcopy(net).float())
    ranges = trained.quantizers()
    for name, quantizer in quantised.quantizers().items():
        value = re.sub(r"\.quant_(in|out)$", r".\1", name)
        quantizer.range_sum.copy_(ranges[name].range_sum.float() * 2.0 ** power_of.get(value, 0))
        quantizer.watched.copy_(ranges[name].watched)
    return quantised.eval()
