"""Can half precision hold every value in the network? Each layer's headroom, and rescaling where it can't.

Many values in a fused network can be rescaled: the convolution before them is multiplied by 2^-k and the one
after by 2^k. In float32 not a bit of the result changes.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple

import torch
from aether_arch import AetherBase, ChannelAttention, FusedAetherBlock, FusedAetherNet, SpatialAttention
from aether_quant import QuantAetherNet, insert_quantizers
from torch import Tensor

HALF_MAX = torch.finfo(torch.float16).max
SPARE_BITS = 3  # rescale below this headroom: pictures may drive a layer further than the hard ones do
TINY = 2.0**-10  # if the largest value is smaller, most others are below fp16's smallest normal number
RUNAWAY = 10.0  # a picture runs away if its output is this many times as large as for most pictures


class Group(NamedTuple):
    """Values inside the network that are scaled together, and the tensors that make and use them."""

    values: List[str]  # names as in largest_values
    made_by: List[str]
    used_by: List[str]


class Fit(NamedTuple):
    """What fit_half_precision_ did and found."""

    plain: FusedAetherNet  # float32, before rescaling
    rescaled: FusedAetherNet  # float32
    pictures: Dict[str, Tensor]  # on which the network does not run away
    lost: List[str]  # on which it does
    powers: Dict[str, int]  # powers of two, by group
    before: Dict[str, float]  # largest values; empty if no picture is left
    after: Dict[str, float]
    problem: str  # what rescaling can't solve; "" if half precision holds everything

    def notes(self) -> List[str]:
        """What the user should always be told."""
        lines = []
        if self.lost:
            first = ", ".join(self.lost[:3]) + (", ..." if len(self.lost) > 3 else "")
            bounded = self.plain.options.get("bound") is not None
            remedy = "" if bounded else "; --bound 1, with the training checkpoint, prevents it"
            count = f"{len(self.lost)} of {len(self.lost) + len(self.pictures)}"
            found = "hard pictures the network runs away, in float32 too"
            lines.append(f"Note: on {count} {found}: {first}{remedy}")
        if self.powers:
            first = ", ".join(f"{name} 2^{power}" for name, power in list(self.powers.items())[:3])
            more = f" and {len(self.powers) - 3} more" if len(self.powers) > 3 else ""
            lines.append(f"Rescaled for half precision, the same function: {first}{more}")
        return lines

    def table(self) -> List[str]:
        """Each layer's headroom, and how well the lower precisions agree with float32."""
        if not self.pictures:
            return []
        lines = headroom(self.plain, "before rescaling", self.before) if self.powers else []
        lines += [*headroom(self.plain, "rescaled" if self.powers else "as it is", self.after), ""]
        pictures = list(self.pictures.values())
        if self.powers:
            agreed = agreement(self.plain, self.plain, torch.float16, pictures)
            lines.append(f"fp16 against fp32, before rescaling: {agreed}")
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            lines.append(f"{name} against fp32: {agreement(self.plain, self.rescaled, dtype, pictures)}")
        return lines


@torch.no_grad()
def fit_half_precision_(net: FusedAetherNet, device: str = "cpu") -> Fit:
    """Rescale the network, in place, until half precision holds every layer's values on hard pictures.

    Pictures on which the network runs away are ignored: a scale that fits them would make the others' values
    too small. A network that needs no rescaling stays untouched.
    """
    pictures = {name: picture.to(device) for name, picture in hard_pictures(net.options["in_chans"]).items()}
    plain = rescaled = copy.deepcopy(net).float().to(device)
    measured = {name: largest_values(plain, picture) for name, picture in pictures.items()}
    outputs = {name: found[".out"] for name, found in measured.items()}
    bound = min(HALF_MAX, RUNAWAY * max(1.0, statistics.median(outputs.values())))
    lost = [name for name, output in outputs.items() if not output <= bound]
    sound = {name: picture for name, picture in pictures.items() if name not in lost}
    if not sound:
        problem = f"on no hard picture is the output below {HALF_MAX:g}, half precision's largest number"
        return Fit(plain, plain, {}, lost, {}, {}, {}, problem)
    before = after = largest_of([measured[name] for name in sound])
    powers = rescale_(net, before)
    if powers:
        rescaled = copy.deepcopy(net).float().to(device)
        after = largest_of([largest_values(rescaled, picture) for picture in sound.values()])
    reached = {f"{module} {part}": after[key] for module, part, key in layers(net)}
    reached.update({name: float(value.abs().max()) for name, value in net.named_parameters()})
    beyond = [(name, value) for name, value in reached.items() if not value <= HALF_MAX]
    problem = ""
    if beyond:
        name, value = beyond[0]
        problem = (
            f"half precision holds {HALF_MAX:g} at most, {name} reaches {value:.3g}, and no rescaling helps"
        )
    return Fit(plain, rescaled, sound, lost, powers, before, after, problem)


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


@torch.no_grad()
def changed_by_bound(bounded: FusedAetherNet, free: FusedAetherNet) -> Tuple[int, int, int]:
    """Number of hard pictures that the bound changes, that are not finite without it, and in total."""
    pictures = list(hard_pictures(bounded.options["in_chans"]).values())
    bounded, free = (copy.deepcopy(net).float().cpu() for net in (bounded, free))
    expected = [free(picture) for picture in pictures]
    same = [
        torch.allclose(bounded(each), output, rtol=1e-4, atol=1e-5)
        for each, output in zip(pictures, expected)
    ]
    return same.count(False), sum(not bool(output.isfinite().all()) for output in expected), len(pictures)


def headroom(net: FusedAetherNet, title: str, largest: Mapping[str, float]) -> List[str]:
    """A line for every block and other layer: its largest value, and how many times that may double."""

    def bits(value: float) -> float:
        return math.log2(HALF_MAX / max(value, 2.0**-24))

    rows: Dict[str, Dict[str, float]] = {}
    for module, part, key in layers(net):
        rows.setdefault(module, {})[part] = largest[key]
    lines = ["", f"{'fp16, ' + title:<22}{'largest':>10}{'headroom, bits':>16}"]
    for module, parts in rows.items():
        most = max(parts.values())
        each = (
            "".join(f"  {part} {bits(value):.1f}" for part, value in parts.items()) if len(parts) > 1 else ""
        )
        lines.append(f"{module:<22}{most:>10.4g}{bits(most):>16.1f}{each}")
    return lines


@torch.no_grad()
def agreement(net: AetherBase, other: AetherBase, dtype: torch.dtype, pictures: List[Tensor]) -> str:
    """PSNR (peak 1) of ``other`` in ``dtype`` against ``net`` in float32, in words."""
    low = copy.deepcopy(other).to(dtype)
    expected = [net(picture) for picture in pictures]
    try:
        outputs = [low(picture.to(dtype)).float() for picture in pictures]
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return "not compared, this PyTorch does not compute it on a CPU (newer ones do): pass --device cuda"
    errors = [float((output - picture).pow(2).mean()) for output, picture in zip(outputs, expected)]
    lost = sum(not math.isfinite(error) for error in errors)
    if lost:
        return f"not finite on {lost} of {len(pictures)} hard pictures"
    mean, worst = (-10 * math.log10(max(error, 1e-12)) for error in (statistics.mean(errors), max(errors)))
    return f"{mean:.1f} dB over {len(pictures)} hard pictures, {worst:.1f} dB on the worst"


# ------------------------------------------------------------------------------------ the values in a network


def layers(net: FusedAetherNet) -> List[Tuple[str, str, str]]:
    """(module, part, name in largest_values) of all that half precision must hold, in data order.

    The input of a sigmoid is left out: infinity is as good as 20 there.
    """
    rows = [("head", "output", "head.out")]
    for name, block in net.named_modules():
        if isinstance(block, FusedAetherBlock):
            # With a bound, even infinity is clamped to it.
            parts = {"depthwise": "reparam_conv.out" if block.bound is None else "gate_conv.in"}
            parts.update(
                gate="gate_conv.out", main="main_conv.out", product="out_conv.in", output="out_conv.out"
            )
            if isinstance(block.channel_attn, ChannelAttention):
                parts["attention"] = "channel_attn.fc.0.out"
            rows += [(name, part, f"{name}.{key}") for part, key in {**parts, "sum": "out"}.items()]
    rows += [(f"fusion_convs.{k}", "output", f"fusion_convs.{k}.out") for k in range(len(net.fusion_convs))]
    rows += [("fusion", "output", "fusion.out"), ("fusion", "sum", "body_norm.in")]
    rows += [("body_norm", "output", "body_norm.out")] if net.keep_norm else []
    rows += [("body_conv", "output", "body_conv.out"), ("body_conv", "sum", "conv_before_upsample.in")]
    return rows + [
        ("conv_before_upsample", "output", "conv_before_upsample.0.out"),
        ("tail", "output", "tail.out"),
    ]


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
