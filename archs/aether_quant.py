"""AetherNet's quantised form: fake quantisation for training, calibration, and int8 weights.

Needed beside aether_arch.py for quantisation-aware training (``qat: true``) and int8 files. Needs only torch.
``prepare_qat(net)`` turns any AetherNet into a QuantAetherNet, whose ``convert_to_quantized()`` returns a
network with int8 weights.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING or not __package__:  # installed, or on the path
    import aether_arch as arch
else:  # copied into a framework
    from . import aether_arch as arch

PLACEMENTS = ("default", "full")  # where quantisers go, see QuantAetherNet
TARGETS = ("onnxruntime", "tensorrt", "openvino")  # runtimes to optimise for, see for_target


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # for the type checker
    return conv.bias


def prepare_qat(
    net: arch.AetherBase, placement: str = "default", calibration: Optional[Iterable[Tensor]] = None
) -> QuantAetherNet:
    """Fuse a network and insert fake quantisation for fine-tuning, in place. Make the optimizer afterwards.

    Args:
        placement: "default" or "full", see QuantAetherNet.
        calibration: pictures for the initial ranges, each (N, in_chans, H, W) in [0, 1]. Default: synthetic
            ones. Training replaces the ranges.
    """
    quantised = insert_quantizers(net, placement)
    quantised.calibrate(_test_pictures(net.options["in_chans"]) if calibration is None else calibration)
    return quantised


@torch.inference_mode(False)
@torch.random.fork_rng(devices=[])
def insert_quantizers(net: arch.AetherBase, placement: Union[bool, str] = "default") -> QuantAetherNet:
    """prepare_qat without calibration: nothing is rounded until the first training batch sets the ranges.

    Raises:
        ValueError: unknown placement; True means "default".
    """
    if placement is not True and placement not in PLACEMENTS:
        allowed = f"true, false, {', '.join(PLACEMENTS)}"
        raise ValueError(f"AetherNet: qat={placement!r} is not possible; allowed: {allowed}.")
    net.become(_quantised(net.fused(), "default" if placement is True else str(placement)))
    return net  # type: ignore[return-value]


def _quantised(fused: arch.FusedAetherNet, placement: str) -> QuantAetherNet:
    """A quantised network with a fused one's weights and unknown ranges."""
    weights = fused.state_dict()
    if placement == "full":
        before = "conv_before_upsample.0."
        parts = SplitConv2d.split(weights.pop(before + "weight"), weights.pop(before + "bias"))
        weights.update({before + name: value for name, value in parts.items()})
        weights.update({f"tail.conv.{name}": weights.pop(f"tail.{name}") for name in ("weight", "bias")})
    net = QuantAetherNet(placement, keep_norm=fused.keep_norm, **fused.options).to(fused.mean.dtype)
    for name, quantizer in net.quantizers().items():
        weights.update({f"{name}.{key}": value for key, value in quantizer.state_dict().items()})
    net.load_state_dict(weights)
    return net


class Quantizer(nn.Module):
    """Fake quantisation: rounds a tensor (N, ...) to 256 values on one scale.

    Reference: https://arxiv.org/abs/1712.05877. The range follows the first ``WATCH`` training batches, then
    stays fixed. Nothing is rounded before the first. The range is a moving average of the largest value in
    each batch's median image: one image in ten may reach a hundred times as far as the others, and a range
    for that image would leave no steps for the rest.

    The state is float parameters without gradient, because frameworks' EMA copies those but not every buffer.
    It is a sum and a count, because the quotient of their averages is right even if they start at zero.

    Args:
        low: smallest value, if the function has one (sigmoid, SiLU). None: symmetric, as TensorRT needs it.
        low_ratio: instead of ``low``, the smallest value as a fraction of the largest (LeakyReLU).
        high: largest value, if known (a picture); otherwise it is observed.
        spread: images up to this many times the median one are not clipped. More than 1 where the picture
            itself passes through and saturated colours matter; elsewhere finer steps matter more.
    """

    WATCH = 100
    limit: Optional[float] = None  # the network's bound, which no range exceeds
    margin = 1.2  # training crops reach fewer extremes than the pictures for calibrate
    enabled = True
    signed = False  # int8 about zero instead of uint8 about 128: the same values, faster in some runtimes

    def __init__(self, low: Any = None, low_ratio: Any = None, high: Any = None, spread: float = 1.0) -> None:
        super().__init__()
        self.low, self.low_ratio, self.high, self.spread = low, low_ratio, high, spread
        self.range_sum = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.watched = nn.Parameter(torch.zeros(1), requires_grad=False)  # training batches, up to WATCH

    @property
    def largest(self) -> Tensor:
        """The largest value (in a symmetric range, magnitude) that can be represented: (1,)."""
        return (self.range_sum / self.watched.clamp_min(1e-9)).clamp(max=self.limit or math.inf)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        largest = (x.abs() if self.low is None else x).flatten(1).amax(1).float()
        seen = (self.typical_largest(largest) * self.margin).clamp(1e-6, self.limit)
        if self.high is not None:
            seen = torch.full_like(seen, self.high)
        # In a small batch even the median image may be extreme: it counts as twice the range at most.
        later = self.largest.lerp(torch.minimum(seen, 2 * self.largest), 0.1)
        average = torch.where(self.watched > 0, later, seen)
        # An infinite batch would ruin the range.
        counts = (self.watched < self.WATCH) & seen.isfinite().all()
        self.range_sum.copy_(torch.where(counts, average * (self.watched + 1), self.range_sum))
        self.watched.add_(counts)

    def typical_largest(self, largest: Tensor) -> Tensor:
        """The median of the images' largest values (N, ...), or the largest within ``spread`` times it."""
        middle = largest.sort(0).values[len(largest) // 2]
        return torch.where(largest <= middle * self.spread, largest, middle).amax(0)

    def scale_and_zero_point(self) -> Tuple[Tensor, Tensor]:
        if self.signed or (self.low is None and self.low_ratio is None):
            middle = 0 if self.signed else 128
            return self.largest / 127, torch.full_like(self.range_sum, middle, dtype=torch.int32)
        low = torch.full_like(self.watched, self.low or 0.0)
        if self.low_ratio is not None:
            low = self.largest * self.low_ratio
        scale = (self.largest - low) / 255
        return scale, (-low / scale).round().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x)
        limited = x if self.limit is None else x.clamp(-self.limit, self.limit)
        if not self.enabled:
            return limited
        scale, zero_point = self.scale_and_zero_point()
        low, high = (-128, 127) if self.signed else (0, 255)
        fake_quantize = torch.fake_quantize_per_tensor_affine
        if torch.onnx.is_in_onnx_export():  # runtimes accept only constants as scale and zero point
            return fake_quantize(x, float(scale), int(zero_point), low, high)
        with torch.autocast(x.device.type, enabled=False):  # rounding to 256 values needs float32
            rounded = fake_quantize(x.float(), scale.float().clamp_min(1e-12), zero_point, low, high)
        return torch.where(self.watched > 0, rounded.to(x.dtype), limited)


class QuantConv2d(nn.Conv2d):
    """Convolution with an 8-bit weight, a scale per output channel, and quantisers before and after."""

    quant_in: nn.Module
    quant_out: nn.Module

    @classmethod
    def like(
        cls, conv: nn.Conv2d, quant_in: Optional[Quantizer] = None, quant_out: Optional[Quantizer] = None
    ) -> QuantConv2d:
        kernel: Any = conv.kernel_size
        padding: Any = conv.padding
        made = cls(conv.in_channels, conv.out_channels, kernel, padding=padding, groups=conv.groups)
        made.quant_in = quant_in or nn.Identity()
        made.quant_out = quant_out or nn.Identity()
        return made

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            codes, scale = _to_int8(self.weight)
            rounding = (codes * scale - self.weight).to(self.weight.dtype)
        x, weight = self.quant_in(x), self.weight + rounding  # the gradient passes straight through
        depthwise = self.groups > 1 and self.groups == self.in_channels
        convolve = arch.depthwise_conv if depthwise else self._conv_forward
        return self.quant_out(convolve(x, weight, _bias(self)))


class SplitConv2d(nn.Module):
    """A 3x3 convolution in two parts: float 1x1 for the few large central weights, 8-bit for the rest.

    Where the image passes through the network, some weights are near 1 and the rest near 1/50. A shared 8-bit
    scale would round the small ones away (arxiv.org/abs/2208.07339), and the image itself would be rounded.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.quant_in = Quantizer(spread=1.25)
        self.fine = QuantConv2d.like(conv, quant_out=Quantizer())
        self.coarse = nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    @staticmethod
    def split(weight: Tensor, bias: Tensor) -> Dict[str, Tensor]:
        middle = (slice(None), slice(None), slice(1, 2), slice(1, 2))
        usual = (
            weight.abs().flatten(1).float().quantile(0.99, dim=1).view(-1, 1, 1, 1)
        )  # not in half precision
        coarse = weight[middle] * (weight[middle].abs() > 4 * usual)
        fine = {"fine.weight": weight - F.pad(coarse, (1, 1, 1, 1)), "fine.bias": bias}
        return {**fine, "coarse.weight": coarse, "coarse.bias": torch.zeros_like(bias)}

    @staticmethod
    def join(parts: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        weight = F.pad(parts["coarse.weight"], (1, 1, 1, 1)) + parts["fine.weight"]
        return {"weight": weight, "bias": parts["fine.bias"] + parts["coarse.bias"]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant_in(x)
        return self.fine(x) + self.coarse(x)


class StorableTail(arch.CollapsedTail):
    """CollapsedTail whose border corrections can be stored as int8: exact enough for a line of pixels."""

    def border(self, name: str) -> Tuple[Tensor, Tensor]:
        weight, bias = super().border(name)
        scale: Optional[Tensor] = getattr(self, f"{name}_weight_scale", None)
        return (weight, bias) if scale is None else (weight * scale, bias.to(scale.dtype))

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=2)

    def to_int8_(self) -> None:
        """Store the corrections as int8, and the convolution, if it is a float one, in half precision."""
        for name in arch.BORDERS:
            _store_int8(self, f"{name}_weight", getattr(self, f"{name}_weight"))
        for value in self.parameters(recurse=False):
            value.data = value.data.half()


class QuantTail(StorableTail):
    """CollapsedTail with an 8-bit convolution whose output has steps of 1/255. Its borders are float."""

    def __init__(self, channels: int, out_channels: int, scale: int) -> None:
        super().__init__(channels, out_channels, scale)
        del self.weight, self.bias
        self.quant_in = Quantizer(low_ratio=-0.01, spread=1.25)  # LeakyReLU's slope below zero
        conv = nn.Conv2d(channels, out_channels * scale**2, 5, padding=2)
        self.conv = QuantConv2d.like(conv, quant_out=Quantizer(low=0.0, high=1.0))

    def convolve(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.quant_in(x))


class StoredConv2d(nn.Module):
    """A convolution as it is released: an int8 weight with its scales, or a half-precision weight."""

    bias: Tensor
    weight: Tensor
    weight_scale: Optional[Tensor]

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.padding: Any = conv.padding
        self.groups = conv.groups
        self.quant_in: nn.Module = getattr(conv, "quant_in", nn.Identity())
        self.quant_out: nn.Module = getattr(conv, "quant_out", nn.Identity())
        self.register_buffer("bias", _bias(conv).detach().float())
        self.register_buffer("weight_scale", None)
        if isinstance(conv, QuantConv2d):
            _store_int8(self, "weight", conv.weight)
        else:
            self.register_buffer("weight", conv.weight.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(self.bias.dtype)
        if self.weight_scale is not None:
            weight = weight * self.weight_scale
        out = F.conv2d(self.quant_in(x), weight, self.bias, padding=self.padding, groups=self.groups)
        return self.quant_out(out)


class QuantAetherBlock(arch.FusedAetherBlock):
    """FusedAetherBlock with 8-bit 1x1 convolutions and everything between: (N, C, H, W) -> (N, C, H, W).

    The depthwise convolution stays float, because integer 11x11 kernels are slower. In the default placement
    the sum stays float too, because rounding errors would add up from block to block.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.reparam_conv = QuantConv2d.like(self.reparam_conv, quant_out=Quantizer())
        self.gate_conv = QuantConv2d.like(self.gate_conv, quant_out=Quantizer())
        self.main_conv = QuantConv2d.like(self.main_conv, quant_out=Quantizer())
        self.out_conv = QuantConv2d.like(self.out_conv, quant_in=Quantizer(), quant_out=Quantizer())
        self.quant_sigmoid = Quantizer(low=0.0)
        self.quant_silu = Quantizer(low=-0.2785)  # the minimum of SiLU
        self.quant_start: nn.Module = nn.Identity()  # in "full": the first block's input, and
        self.quant_sum: nn.Module = nn.Identity()  # each block's sum

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant_start(x)
        out = self.reparam_conv(x)
        gate = self.gate_conv(out)
        gate = self.quant_silu(gate * self.quant_sigmoid(torch.sigmoid(gate)))  # as the integer kernels do it
        out = self.out_conv(gate * self.main_conv(out))
        return self.quant_sum(self.spatial_attn(self.channel_attn(out)) + x)


class QuantAetherNet(arch.FusedAetherNet):
    """FusedAetherNet with fake quantisation, for quantisation-aware training. Made by prepare_qat.

    Args: those of FusedAetherNet, and
        placement: "default" quantises the blocks' 1x1 convolutions and everything between them. "full" leaves
            only the first, the depthwise and (in ONNX Runtime) the 3x3 convolution after the blocks float:
            faster, less exact.
        is_int8: weights are int8, or half precision if not quantised, and can't be trained.
    """

    WILD = 20.0  # calibrate warns about an image that goes this many times as far as the median one
    block = QuantAetherBlock
    warns_in_training = False

    def __init__(self, placement: str = "default", is_int8: bool = False, **options: Any) -> None:
        if placement not in PLACEMENTS:
            allowed = ", ".join(PLACEMENTS)
            raise ValueError(f"AetherNet: placement={placement!r} is not possible; allowed: {allowed}.")
        super().__init__(**options)
        self.placement, self.is_int8 = placement, False
        full = placement == "full"
        self.body_conv = QuantConv2d.like(self.body_conv, quant_in=Quantizer(), quant_out=Quantizer())
        # A few channels of its output carry the picture itself, which 8 bits are too few for. 0.1 rounded it.
        self.body_conv.quant_out.enabled = False  # type: ignore[assignment]
        if full:
            blocks = [block for block in self.stages.modules() if isinstance(block, QuantAetherBlock)]
            blocks[0].quant_start = Quantizer()
            for block in blocks:
                block.quant_sum = Quantizer()
            before, activation = self.conv_before_upsample
            assert isinstance(before, nn.Conv2d)
            convs: Any = self.fusion_convs
            self.fusion_convs = nn.ModuleList(QuantConv2d.like(conv, None, Quantizer()) for conv in convs)
            self.fusion = QuantConv2d.like(self.fusion, quant_in=Quantizer(), quant_out=Quantizer())
            self.conv_before_upsample = nn.Sequential(SplitConv2d(before), activation)
        tail = QuantTail if full else StorableTail
        self.tail = tail(self.options["embed_dim"], self.options["in_chans"], self.scale)
        self.set_bound(self.options["bound"])
        if is_int8:
            self.to_int8_()

    @classmethod
    def options_from_names(cls, names: Iterable[str]) -> Dict[str, Any]:
        names = list(names)
        return {
            **super().options_from_names(names),
            "placement": "full" if "fusion.quant_in.range_sum" in names else "default",
            "is_int8": any(name.endswith(".reparam_conv.weight_scale") for name in names),
        }

    def set_bound(self, bound: Optional[float]) -> None:
        super().set_bound(bound)
        for block in self.modules():
            if isinstance(block, QuantAetherBlock):
                block.reparam_conv.quant_out.limit = bound  # type: ignore[union-attr]

    @torch.inference_mode(False)
    @torch.random.fork_rng(devices=[])
    def _take_form_of(self, state_dict: Dict[str, Tensor], prefix: str, strict: bool) -> None:
        """Also takes a float network's weights; the ranges are unknown then."""
        own = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        form = arch.form_of(own)
        if form in (arch.AetherNet, arch.FusedAetherNet):
            net = form(**self.options, **form.options_from_names(own))
            if not arch.differences(net, own, () if strict else ("unexpected",)):  # else it is refused below
                net.load_state_dict(own, strict=False)
                state = _quantised(net.eval().fuse_model(), self.placement).state_dict()
                for name in own:
                    del state_dict[prefix + name]
                state_dict.update({prefix + name: value for name, value in state.items()})
        super()._take_form_of(state_dict, prefix, strict)

    def train(self, mode: bool = True) -> QuantAetherNet:
        """As torch's, but int8 weights stay in evaluation mode, since their ranges can't change."""
        return super().train(mode and not self.is_int8)

    def quantizers(self) -> Dict[str, Quantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    @torch.no_grad()
    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Set every range from ``images``, each (N, in_chans, H, W) in [0, 1], without training.

        The range is the median image's, see Quantizer.typical_largest; values beyond it are clipped. A range
        for the one picture that drives a layer ten times as far would leave few steps for the others.

        Raises:
            ValueError: no image, or none on which all values are finite; the ranges stay as they were.
        """
        if self.is_int8:
            raise ValueError("calibrate: this network holds int8 weights already; calibrate the float one.")
        training, quantizers, largest = self.training, list(self.quantizers().values()), []
        before = [(each.range_sum.clone(), each.watched.clone()) for each in quantizers]
        self.train()
        for each in quantizers:
            each.margin = 1.0
        try:
            for image in images:
                for each in quantizers:
                    each.watched.zero_()
                super().forward(image.to(self.mean))
                largest.append([torch.where(each.watched > 0, each.largest, math.inf) for each in quantizers])
        finally:
            self.train(training)
            for each, (range_sum, watched) in zip(quantizers, before):
                each.margin = Quantizer.margin
                each.range_sum.copy_(range_sum)
                each.watched.copy_(watched)
        # Some networks run away on an extreme picture.
        finite = [values for values in largest if bool(torch.cat(values).isfinite().all())]
        if not finite:
            raise ValueError("calibrate: on none of the images are all of the network's values finite.")
        values = [torch.stack(images) for images in zip(*finite)]  # of each quantiser, (images, channels)
        ranges = [each.typical_largest(images) for each, images in zip(quantizers, values)]
        if len(finite) < len(largest):
            skipped = f"{len(largest) - len(finite)} of {len(largest)} images"
            text = f"calibrate: values are not finite on {skipped}, which were skipped."
            warnings.warn(text, stacklevel=2)
        beyond, worst = torch.stack([(v / r).amax() for v, r in zip(values, ranges)]).max(0)
        if beyond > self.WILD:
            far = f"{list(self.quantizers())[worst]} {beyond:.3g} times as far as the median one"
            warnings.warn(f"calibrate: one image drives {far} does, and is clipped there.", stacklevel=2)
        for value, each in zip(ranges, quantizers):
            each.range_sum.copy_(value)
            each.watched.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            with torch.no_grad():  # every process saw different images; average their ranges
                ranges: List[Tensor] = [quantizer.range_sum for quantizer in self.quantizers().values()]
                mean = torch.cat(ranges)
                torch.distributed.all_reduce(mean)
                for value, new in zip(ranges, mean / torch.distributed.get_world_size()):
                    value.copy_(new)
        return out

    @torch.inference_mode(False)
    @torch.no_grad()
    @torch.random.fork_rng(devices=[])
    def fuse_model(self) -> arch.FusedAetherNet:
        """Remove the quantisers: turn into a FusedAetherNet with these weights, in place."""
        weights = {name: value.float() for name, value in self.state_dict().items()}
        for name in [name for name in weights if name.endswith((".range_sum", ".watched"))]:
            del weights[name]
        for name in [name for name in weights if name.endswith("weight_scale")]:
            weights[name[: -len("_scale")]] *= weights.pop(name)
        if self.placement == "full":
            before = "conv_before_upsample.0."
            names = [name for name in weights if name.startswith(before)]
            parts = {name[len(before) :]: weights.pop(name) for name in names}
            weights.update({before + name: value for name, value in SplitConv2d.join(parts).items()})
            weights.update({f"tail.{name}": weights.pop(f"tail.conv.{name}") for name in ("weight", "bias")})
        other = arch.FusedAetherNet(**self.options, keep_norm=self.keep_norm)
        other.load_state_dict(weights)
        self.become(other)
        return self

    def for_target(self, target: str, reduce_range: bool = False) -> QuantAetherNet:
        """A copy of a network with int8 weights, optimised for one of TARGETS.

        ONNX Runtime on a CPU is fast in uint8, and only if a convolution's output is rounded as well.
        TensorRT and OpenVINO fuse better with float in between, and need int8 about zero. ``reduce_range``
        makes 7-bit weights: CPUs without VNNI add pairs of products in 16 bits, where 8-bit ones overflow.
        """
        other = copy.deepcopy(self)
        for conv in other.modules() if reduce_range else ():
            if isinstance(conv, StoredConv2d) and conv.weight_scale is not None and conv.groups == 1:
                conv.weight = _round_taps(conv.weight.float() / 2).to(torch.int8)
                conv.weight_scale = conv.weight_scale * 2
        for name, quantizer in other.quantizers().items():
            quantizer.signed = target != "onnxruntime"
            before = name.endswith(("quant_in", "reparam_conv.quant_out"))
            # body_conv's output is not rounded, so rounding its input would gain ONNX Runtime nothing.
            wanted = name != "body_conv.quant_in" if target == "onnxruntime" else before
            quantizer.enabled = quantizer.enabled and wanted
        other._round_biases()
        return other

    def _sources(self) -> Iterator[Tuple[nn.Module, Any]]:
        """The convolutions that may be 8-bit, each with its input's quantiser or the module in its place."""
        for stage, fusion_conv in zip(self.stages, self.fusion_convs):
            for block in stage.modules():
                if isinstance(block, QuantAetherBlock):
                    yield block.gate_conv, block.reparam_conv.quant_out
                    yield block.main_conv, block.reparam_conv.quant_out
                    yield block.out_conv, block.out_conv.quant_in
                    stream = block.quant_sum
            yield fusion_conv, stream
        yield self.fusion, getattr(self.fusion, "quant_in", self.fusion)
        yield self.body_conv, self.body_conv.quant_in
        for module in self.modules():
            if isinstance(module, SplitConv2d):
                yield module.fine, module.quant_in
            if isinstance(module, QuantTail):
                yield module.conv, module.quant_in

    def _round_biases(self) -> None:
        """Round biases as integer kernels hold them: multiples of input scale times weight scale, in 32 bits.

        Otherwise one value in two hundred, in every block, would round to another code than in the exported
        file. If weights are nearly zero (a dead channel), 32 bits are too few and they get a larger step.
        """
        for conv, source in self._sources():
            if not (isinstance(conv, StoredConv2d) and isinstance(source, Quantizer) and source.enabled):
                continue
            if conv.weight_scale is not None:
                scale = source.scale_and_zero_point()[0]
                least = (conv.bias.abs() / (scale * 2**30)).view(-1, 1, 1, 1)
                wide = torch.maximum(conv.weight_scale, least)
                conv.weight = (conv.weight.float() * (conv.weight_scale / wide)).round().to(torch.int8)
                conv.weight_scale, step = wide, wide.flatten() * scale
                conv.bias = (conv.bias / step).round() * step

    def to_int8_(self) -> None:
        """Store the weights as they are released: int8 with scales, or half precision if not quantised."""
        for path, conv in list(self.named_modules()):
            if isinstance(conv, nn.Conv2d) and "_attn." not in path:  # attention is small
                parent, _, name = path.rpartition(".")
                setattr(self.get_submodule(parent), name, StoredConv2d(conv))
        tail: Any = self.tail
        tail.to_int8_()
        self.requires_grad_(False)
        self.is_int8 = True
        self.eval()

    def convert_to_quantized(self) -> QuantAetherNet:
        """A copy in evaluation mode with int8 weights: a third of the float file's size, not trainable.

        A network that has int8 weights already is returned itself.

        Raises:
            ValueError: ranges are unknown (no training, no calibrate), or weights are beyond half precision.
        """
        if self.is_int8:
            return self
        known = [each.watched > 0 and each.largest.isfinite().all() for each in self.quantizers().values()]
        if not all(known):
            text = "the ranges are unknown; train a batch, or call calibrate(images)."
            raise ValueError(f"convert_to_quantized: {text}")
        other = copy.deepcopy(self).eval().float()
        for quantizer in other.quantizers().values():
            quantizer.range_sum.copy_(quantizer.largest)  # a sum over a hundred may exceed half precision
            quantizer.watched.fill_(1)
        other.to_int8_()
        for name, value in other.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                remedy = "fuse_aether.py rescales float weights to prevent that."
                raise ValueError(f"convert_to_quantized: {name} is beyond half precision; {remedy}")
        other._round_biases()
        return other


def _to_int8(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """A weight's codes from -127 to 127, still float, and a step per output channel, (outputs, 1, 1, 1).

    In a dense kernel each tap takes over the rounding error of the taps before it (error diffusion), so that
    a flat area keeps its value. Rounded separately, the last convolution's 25 taps shift flat areas by 1/255.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / 127
    return _round_taps(weight / scale), scale


def _round_taps(codes: Tensor) -> Tensor:
    if codes.shape[1] == 1:  # depthwise: 121 taps in sequence would slow down training
        return codes.round()
    rounded, lost = [], torch.zeros_like(codes[:, :, 0, 0])
    for tap in codes.flatten(2).unbind(2):
        rounded.append((tap + lost).round().clamp(-127, 127))
        lost = lost + tap - rounded[-1]
    return torch.stack(rounded, 2).view_as(codes)


def _store_int8(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give ``module`` the buffers ``name`` (int8) and ``name``_scale."""
    codes, scale = _to_int8(weight)
    for key, value in ((name, codes.to(torch.int8)), (f"{name}_scale", scale)):
        module._parameters.pop(key, None)
        module.register_buffer(key, value)


def _test_pictures(channels: int) -> Iterable[Tensor]:
    """Noise, edges, gradients, flat black and white: each (1, channels, 64, 64) in [0, 1]."""
    ramp = torch.linspace(0, 1, 64).expand(64, 64)
    checks = (torch.arange(64).view(-1, 1) // 4 + torch.arange(64) // 4) % 2
    noise = torch.rand(channels, 64, 64, generator=torch.Generator().manual_seed(0))
    for picture in (ramp, ramp.t(), checks.float(), noise, noise.round(), ramp * 0, ramp * 0 + 1):
        yield picture.expand(1, channels, 64, 64)
