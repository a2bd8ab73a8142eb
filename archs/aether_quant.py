"""AetherNet's quantised form: fake quantisation for training, calibration, and int8 weights.

Needed beside aether_arch.py for quantisation-aware training (``qat: true``) and int8 files. Needs only torch.
``prepare_qat(net)`` turns any AetherNet into a QuantAetherNet, whose ``convert_to_quantized()`` returns a
network with int8 weights.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING or not __package__:  # installed, or on the path
    import aether_arch as arch
else:  # copied into a framework
    from . import aether_arch as arch

TARGETS = ("onnxruntime", "tensorrt", "openvino")  # runtimes to optimise for, see for_target
FULL = "placement 'full' was removed; AetherNet 0.2.0 is the last version to read it"
RANGES = (".range_sum", ".watched")  # how names of a quantiser's tensors end


def prepare_qat(
    net: arch.AetherBase, placement: str = "default", calibration: Optional[Iterable[Tensor]] = None
) -> QuantAetherNet:
    """Fuse a network and insert fake quantisation for fine-tuning, in place. Make the optimizer afterwards.

    ``calibration``: pictures for the initial ranges, each (N, in_chans, H, W) in [0, 1]; training replaces
    these ranges. Default: the ranges that the network has, otherwise those of synthetic pictures.

    Raises ValueError for a placement other than "default", the only one left, or without a usable picture;
    the network stays as it was.
    """
    if calibration is None and not (isinstance(net, QuantAetherNet) and net.has_ranges()):
        calibration = _test_pictures(net.options["in_chans"])
    return insert_quantizers(net, placement, calibration)


@torch.inference_mode(False)
@torch.random.fork_rng(devices=[])
def insert_quantizers(
    net: arch.AetherBase,
    placement: Union[bool, str] = "default",
    calibration: Optional[Iterable[Tensor]] = None,
) -> QuantAetherNet:
    """prepare_qat, but without ``calibration`` nothing is rounded until training sets the ranges."""
    if placement not in (True, "default"):
        remedy = f"{FULL}; use true" if placement == "full" else "allowed: true, false, default"
        raise ValueError(f"AetherNet: qat={placement!r} is not possible; {remedy}.")
    made = net
    if not isinstance(made, QuantAetherNet) or made.is_int8:
        fused = net.as_fused()
        made = QuantAetherNet(keep_norm=fused.keep_norm, **fused.options).to(net.mean)
        ranges = {name: value for name, value in net.state_dict().items() if name.endswith(RANGES)}
        made.load_state_dict({**made.state_dict(), **fused.state_dict(), **ranges})
    if calibration is not None:
        made.calibrate(calibration)
    if made is not net:
        net.become(made)
    return net  # type: ignore[return-value]


class Quantizer(nn.Module):
    """Fake quantisation: rounds a tensor (N, ...) to 256 values on one scale. arxiv.org/abs/1712.05877

    The values start at ``low``, if the function has a minimum (sigmoid, SiLU); otherwise they are symmetric.
    The range follows the first ``WATCH`` training batches, then stays fixed. Nothing is rounded before. It is
    a moving average of the largest value in each batch's median image: some networks run away on one image in
    ten, and a range for that one leaves no steps for the rest. Batches of zeros or infinities don't count.

    The state is float parameters without gradient, because frameworks' EMA copies those but not every buffer.
    It is a sum and a count, because the quotient of their averages is right even if they start at zero.
    """

    WATCH = 100
    limit: Optional[float] = None  # the network's bound, which no range exceeds
    margin = 1.2  # training crops reach fewer extremes than the pictures for calibrate
    enabled = True
    signed = False  # int8 about zero instead of uint8 about 128: the same values, faster in some runtimes
    settled = False  # all ranges are fixed, on every process

    def __init__(self, low: Optional[float] = None) -> None:
        super().__init__()
        self.low = low
        self.range_sum = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.watched = nn.Parameter(torch.zeros(1), requires_grad=False)  # training batches, up to WATCH

    @property
    def largest(self) -> Tensor:
        """The largest value (in a symmetric range, magnitude) that can be represented: (1,)."""
        return (self.range_sum / self.watched.clamp_min(1e-9)).clamp(max=self.limit or math.inf)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        largest = (x.abs() if self.low is None else x).flatten(1).amax(1).float()
        seen = _median(largest) * self.margin
        counts = (self.watched < self.WATCH) & seen.isfinite() & (seen > 0)
        seen = seen.clamp(max=self.limit or math.inf)
        # In a small batch even the median image may be extreme: it counts as twice the range at most.
        later = self.largest.lerp(torch.minimum(seen, 2 * self.largest), 0.1)
        average = torch.where(self.watched > 0, later, seen)
        self.range_sum.copy_(torch.where(counts, average * (self.watched + 1), self.range_sum))
        self.watched.add_(counts)

    def scale_and_zero_point(self) -> Tuple[Tensor, Tensor]:
        if self.signed or self.low is None:
            middle = 0 if self.signed else 128
            return self.largest / 127, torch.full_like(self.range_sum, middle, dtype=torch.int32)
        scale = (self.largest - self.low) / 255
        return scale, (-self.low / scale).round().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.settled:
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
        rounds = self.watched > 0
        if self.training:  # the loss, and with it a GradScaler, must see what is not finite
            rounds = rounds & limited.isfinite()
        return torch.where(rounds, rounded.to(x.dtype), limited)


class QuantConv2d(nn.Conv2d):
    """Convolution with an 8-bit weight, a scale per output channel, and quantisers before and after."""

    quant_in: nn.Module
    quant_out: nn.Module

    @classmethod
    def like(
        cls, conv: nn.Conv2d, quant_in: Optional[Quantizer] = None, quant_out: Optional[Quantizer] = None
    ) -> QuantConv2d:
        """``conv`` itself, turned into one of these."""
        conv.__class__ = cls
        conv.quant_in, conv.quant_out = quant_in or nn.Identity(), quant_out or nn.Identity()
        return conv  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_out(self._conv_forward(self.quant_in(x), _rounded(self.weight), self.bias))


class StorableTail(arch.CollapsedTail):
    """CollapsedTail whose border corrections can be stored as int8: exact enough for a line of pixels."""

    def border(self, name: str) -> Tuple[Tensor, Tensor]:
        weight, bias = super().border(name)
        scale: Optional[Tensor] = getattr(self, f"{name}_weight_scale", None)
        return (weight, bias) if scale is None else (weight * scale, bias.to(scale.dtype))

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=2)

    def to_int8_(self) -> None:
        """Store the corrections as int8, and the convolution in half precision."""
        for name in arch.BORDERS:
            _store_int8(self, f"{name}_weight", getattr(self, f"{name}_weight"))
        for value in self.parameters(recurse=False):
            value.data = value.data.half()


class StoredConv2d(nn.Module):
    """A convolution as it is released: an int8 weight with its scales, or a half-precision weight."""

    bias: Tensor
    weight: Tensor
    weight_scale: Optional[Tensor]

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.padding, self.groups = conv.padding, conv.groups
        self.quant_in: nn.Module = getattr(conv, "quant_in", nn.Identity())
        self.quant_out: nn.Module = getattr(conv, "quant_out", nn.Identity())
        self.register_buffer("bias", conv.bias.detach().float())  # type: ignore[union-attr]
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

    The depthwise convolution stays float, because integer 11x11 kernels are slower. The sum stays float too,
    because rounding errors would add up from block to block.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.reparam_conv = QuantConv2d.like(self.reparam_conv, quant_out=Quantizer())
        self.gate_conv = QuantConv2d.like(self.gate_conv, quant_out=Quantizer())
        self.main_conv = QuantConv2d.like(self.main_conv, quant_out=Quantizer())
        self.out_conv = QuantConv2d.like(self.out_conv, quant_in=Quantizer(), quant_out=Quantizer())
        self.quant_sigmoid = Quantizer(low=0.0)
        self.quant_silu = Quantizer(low=-0.2785)  # the minimum of SiLU

    def forward(self, x: Tensor) -> Tensor:
        out = self.reparam_conv(x)
        gate = self.gate_conv(out)
        gate = self.quant_silu(gate * self.quant_sigmoid(torch.sigmoid(gate)))  # as the integer kernels do it
        out = self.out_conv(gate * self.main_conv(out))
        return self.spatial_attn(self.channel_attn(out)) + x


class QuantAetherNet(arch.FusedAetherNet):
    """FusedAetherNet with fake quantisation, for quantisation-aware training. Made by prepare_qat.

    The blocks' 1x1 convolutions and everything between them are 8-bit, for some targets also ``body_conv``.
    With ``is_int8`` weights are int8, or half precision if not quantised, and can't be trained.
    """

    block = QuantAetherBlock
    warns_in_training = False
    idle = 0  # training batches since all ranges were fixed but those of tensors that were always zero

    def __init__(self, *, is_int8: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.is_int8 = False
        self.body_conv = QuantConv2d.like(self.body_conv, quant_in=Quantizer(), quant_out=Quantizer())
        # A few channels of its output carry the picture itself, which 8 bits are too few for. 0.1 rounded it.
        self.body_conv.quant_out.enabled = False  # type: ignore[assignment]
        self.tail = StorableTail(self.options["embed_dim"], self.options["in_chans"], self.scale)
        self.set_bound(self.options["bound"])
        if is_int8:
            self.to_int8_()

    @classmethod
    def options_from_names(cls, names: Iterable[str]) -> Dict[str, Any]:
        names = list(names)
        refuse_full(names)
        is_int8 = any(name.endswith(".reparam_conv.weight_scale") for name in names)
        return {**super().options_from_names(names), "is_int8": is_int8}

    def set_bound(self, bound: Optional[float]) -> None:
        super().set_bound(bound)
        for block in self.modules():
            if isinstance(block, QuantAetherBlock):
                block.reparam_conv.quant_out.limit = bound  # type: ignore[union-attr]

    def take(self, other: arch.AetherBase, file: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Stay quantised, and take a float network's weights in; the ranges are unknown then."""
        if not isinstance(other, QuantAetherNet):
            other.load_state_dict(file, strict=False)
            other = insert_quantizers(other.eval())
            file = other.state_dict()
        if self.is_int8 or other.is_int8 or other.keep_norm != self.keep_norm:
            self.become(other)
        return file

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._settle(self.is_int8)

    def quantizers(self) -> Dict[str, Quantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    def has_ranges(self) -> bool:
        """Whether training or calibrate has set ranges. Where a tensor is always zero, none is ever set."""
        return any(bool(each.watched > 0) for each in self.quantizers().values())

    @torch.no_grad()
    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Set every range from ``images``, each (N, in_chans, H, W) in [0, 1], without training.

        The range is the median image's, and values beyond it are clipped, as in Quantizer. Raises ValueError
        without an image on which all values are finite; the ranges stay as they were.
        """
        if self.is_int8:
            raise ValueError("calibrate: this network holds int8 weights already; calibrate the float one.")
        watching, found = copy.deepcopy(self).train(), []
        quantizers = watching.quantizers().values()
        for image in images:
            for each in quantizers:
                each.margin, each.settled = 1.0, False
                each.range_sum.zero_()
                each.watched.zero_()
            output = arch.FusedAetherNet.forward(watching, image.to(self.mean))
            # Some networks run away on an extreme picture.
            found.append((bool(output.isfinite().all()), torch.cat([each.range_sum for each in quantizers])))
        largest = [values for finite, values in found if finite]
        if not largest:
            raise ValueError("calibrate: on none of the images are all of the network's values finite.")
        if len(largest) < len(found):
            skipped = f"{len(found) - len(largest)} of {len(found)} images, which were skipped"
            warnings.warn(f"calibrate: values are not finite on {skipped}.", stacklevel=2)
        for values, each in zip(torch.stack(largest, 1), self.quantizers().values()):
            values = values[values > 0]
            each.watched.fill_(float(len(values) > 0))
            each.range_sum.copy_(_median(values) if len(values) else each.watched)
        self._settle(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.idle:
            self.idle += 1
            for each in self.quantizers().values() if self.idle > Quantizer.WATCH else ():
                each.settled = bool(each.watched > 0)  # may no longer be zero; not asked in every batch
        out = super().forward(x)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.training and distributed and not all(each.settled for each in self.quantizers().values()):
            self._average_ranges()
        return out

    @torch.no_grad()
    def _average_ranges(self) -> None:
        """Give every process the mean of all processes' ranges, since each saw different images."""
        quantizers = self.quantizers().values()
        values: List[Tensor] = [value for each in quantizers for value in (each.range_sum, each.watched)]
        mean = torch.cat(values)
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
        for value, new in zip(values, mean):
            value.copy_(new)
        fixed, zero = mean[1::2] >= Quantizer.WATCH, mean[1::2] == 0
        self._settle(bool((fixed | zero).all() and fixed.any()), bool(zero.any()))

    def _settle(self, settled: bool, some_are_zero: bool = False) -> None:
        for each in self.quantizers().values():
            each.settled = settled
        self.idle = int(settled and some_are_zero)

    @torch.inference_mode(False)
    @torch.no_grad()
    @torch.random.fork_rng(devices=[])
    def as_fused(self) -> arch.FusedAetherNet:
        """A new FusedAetherNet with these weights, without the quantisers."""
        state = self.state_dict()
        weights = {name: value.float() for name, value in state.items() if not name.endswith(RANGES)}
        for name in [name for name in weights if name.endswith("weight_scale")]:
            weights[name[: -len("_scale")]] *= weights.pop(name)
        other = arch.FusedAetherNet(**self.options, keep_norm=self.keep_norm)
        other.load_state_dict(weights)
        return other

    def for_target(self, target: str, reduce_range: bool = False) -> QuantAetherNet:
        """A copy of a network with int8 weights, optimised for one of TARGETS.

        ONNX Runtime on a CPU is fast in uint8, and only if a convolution's output is rounded as well.
        TensorRT and OpenVINO fuse better with float in between, and need int8 about zero. ``reduce_range``
        makes 7-bit weights: CPUs without VNNI add pairs of products in 16 bits, where 8-bit ones overflow.
        """
        other = copy.deepcopy(self)
        for conv in other.modules() if reduce_range else ():
            if isinstance(conv, StoredConv2d) and conv.weight_scale is not None and conv.groups == 1:
                conv.weight = (conv.weight.float() / 2).round().to(torch.int8)
                conv.weight_scale = conv.weight_scale * 2
        for name, quantizer in other.quantizers().items():
            quantizer.signed = target != "onnxruntime"
            before = name.endswith(("quant_in", "reparam_conv.quant_out"))
            # body_conv's output is not rounded, so rounding its input would gain ONNX Runtime nothing.
            wanted = name != "body_conv.quant_in" if target == "onnxruntime" else before
            quantizer.enabled = quantizer.enabled and wanted
        other._round_biases()
        return other

    def _round_biases(self) -> None:
        """Round biases as integer kernels hold them: multiples of input scale times weight scale, in 32 bits.

        Otherwise one value in two hundred, in every block, would round to another code than in the exported
        file. If weights are nearly zero (a dead channel), 32 bits are too few and they get a larger step.
        """
        sources: List[Tuple[Any, Any]] = [(self.body_conv, self.body_conv.quant_in)]
        for block in self.modules():
            if isinstance(block, QuantAetherBlock):
                sources.append((block.gate_conv, block.reparam_conv.quant_out))
                sources.append((block.main_conv, block.reparam_conv.quant_out))
                sources.append((block.out_conv, block.out_conv.quant_in))
        for conv, source in sources:
            if source.enabled:
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
        self.tail.to_int8_()  # type: ignore[operator]
        self.requires_grad_(False)
        self.is_int8 = True
        self._settle(True)

    def convert_to_quantized(self) -> QuantAetherNet:
        """A copy in evaluation mode with int8 weights: a third of the float file's size, not trainable.

        A network that has int8 weights already is returned itself. Raises ValueError if ranges are unknown
        (no training, no calibrate) or weights are beyond half precision.
        """
        if self.is_int8:
            return self
        if not self.has_ranges():
            raise ValueError("convert_to_quantized: the ranges are unknown; train, or calibrate(images).")
        other = copy.deepcopy(self).eval().float()
        for quantizer in other.quantizers().values():
            # A sum over a hundred may exceed half precision; a tensor that is always zero has no range yet.
            quantizer.range_sum.copy_(quantizer.largest.clamp_min(1e-6))
            quantizer.watched.fill_(1)
        other.to_int8_()
        for name, value in other.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                text = "is beyond half precision; fuse_aether.py rescales float weights to prevent that"
                raise ValueError(f"convert_to_quantized: {name} {text}.")
        return other


def refuse_full(names: Iterable[str]) -> None:
    """Raises ValueError if the tensors are those of placement "full"."""
    if "fusion.quant_in.range_sum" in names:
        raise ValueError(f"{FULL}; quantise the float network again.")


def _median(values: Tensor) -> Tensor:
    return values.sort().values[len(values) // 2]


def _step(weight: Tensor) -> Tensor:
    """The step of each output channel, (outputs, 1, 1, 1), with which codes reach from -127 to 127."""
    return weight.detach().float().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / 127


def _rounded(weight: Tensor) -> Tensor:
    """``weight`` as int8 weights will be. The gradient passes straight through."""
    scale = _step(weight).flatten()
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(weight.float(), scale, zero_point, 0, -128, 127)
    return rounded.to(weight.dtype)


def _store_int8(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give ``module`` the buffers ``name`` (int8) and ``name``_scale."""
    scale = _step(weight)
    codes = (weight.detach().float() * scale.reciprocal()).round()  # as _rounded's kernel does it
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
