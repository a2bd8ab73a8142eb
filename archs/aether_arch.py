"""AetherNet: single-image super-resolution built to be fused, exported and quantised.

Needs only torch (1.13+, Python 3.8+). Copied into the archs folder of traiNNer-redux, neosr or BasicSR, it
registers ``aether_small``, ``aether_medium`` and ``aether_large`` there. A network has one of three forms:

    AetherNet       the training form: two depthwise branches, norms, separate reconstruction layers
    FusedAetherNet  the same function as plain convolutions, activations, attention and additions
    QuantAetherNet  the fused form with fake quantisation, for INT8 (aether_quant.py)

``fuse_model()`` and ``prepare_qat()`` change the form, and ``load_state_dict`` takes the form of the file.

Source: https://github.com/phhofm (AetherNet by Philip Hofmann). Licence: MIT.
"""

from __future__ import annotations

import collections
import copy
import functools
import importlib
import inspect
import logging
import math
import re
import warnings
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__version__ = "0.3.0"
SCALES = (1, 2, 3, 4, 8)
RECORDED = {"bound": None, "img_range": 1.0}  # options that a file holds where they aren't these
TAIL = ("upsample.", "conv_last.")  # the training form's layers that another scale has others of
log = logging.getLogger(__name__.split(".")[0])  # in a framework, the framework's own


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One kernel per channel, zero-padded to keep the size: (N, C, H, W) -> (N, C, H, W)."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class ReparamLargeKernelConv(nn.Module):
    """A large and a small depthwise kernel in parallel, (N, C, H, W) kept. arxiv.org/abs/2203.06717

    Both are linear, so one convolution with the sum of the kernels has the same output and gradients.
    """

    def __init__(self, channels: int, lk_kernel: int, sk_kernel: int) -> None:
        super().__init__()
        depthwise = functools.partial(nn.Conv2d, channels, channels, groups=channels, bias=False)
        self.lk_conv = depthwise(kernel_size=lk_kernel, padding=lk_kernel // 2)
        self.sk_conv = depthwise(kernel_size=sk_kernel, padding=sk_kernel // 2)
        self.lk_bias = nn.Parameter(torch.zeros(channels))
        self.sk_bias = nn.Parameter(torch.zeros(channels))

    def reparameterize(self) -> Tuple[Tensor, Tensor]:
        """Weight (C, 1, K, K) and bias (C,) of the single convolution that equals both branches."""
        border = (self.lk_conv.kernel_size[0] - self.sk_conv.kernel_size[0]) // 2
        return self.lk_conv.weight + F.pad(self.sk_conv.weight, [border] * 4), self.lk_bias + self.sk_bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # the ONNX exporter can't handle a kernel computed in the graph
            return self.lk_conv(x) + self.sk_conv(x) + (self.lk_bias + self.sk_bias).view(1, -1, 1, 1)
        return depthwise_conv(x, *self.reparameterize())


class DeploymentNorm(nn.Module):
    """``(x - running_mean) / sqrt(running_var + eps) * weight + bias``, per channel.

    The statistics stay fixed, at 0 and 1 or at a loaded file's values: batch statistics hold back
    super-resolution (EDSR, arxiv.org/abs/1707.02921). With ``batch`` set, training normalises over (N, H, W)
    like BatchNorm, but keeps a running average of the biased variance.
    """

    eps = 1e-5
    momentum = 0.1
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, batch: bool = False) -> None:
        super().__init__()
        self.batch = batch
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        """The evaluation form ``x * scale + shift``, both (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale.flatten(), (self.bias - self.running_mean * scale).flatten()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if not (self.training and self.batch):
            mean, var = self.running_mean.flatten(), self.running_var.flatten()
            return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)
        out, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, self.eps)
        with torch.no_grad():
            var = invstd.pow(-2) - self.eps
            finite = (mean + var).isfinite().all()  # stays a tensor: reading its value would sync the device
            for running, value in ((self.running_mean, mean), (self.running_var, var)):
                moved = running.lerp(value.to(running.dtype).view_as(running), self.momentum)
                running.copy_(torch.where(finite, moved, running))
        return out


class GatedConvFFN(nn.Module):
    """``conv_out(SiLU(conv_gate(x) * temperature) * conv_main(x))``, all 1x1. arxiv.org/abs/2002.05202"""

    def __init__(self, channels: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.conv_gate = nn.Conv2d(channels, hidden, 1)
        self.conv_main = nn.Conv2d(channels, hidden, 1)
        self.conv_out = nn.Conv2d(hidden, channels, 1)
        self.temperature = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(drop)

    def reparameterize(self) -> Tuple[Tensor, Tensor]:
        """Weight and bias of the gate, multiplied by the temperature: cheaper than multiplying pixels."""
        weight, bias = self.conv_gate.weight, self.conv_gate.bias
        return weight * self.temperature, bias * self.temperature  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        gate = F.conv2d(x, *self.reparameterize())
        return self.drop(self.conv_out(self.drop(F.silu(gate) * self.conv_main(x))))


def _is_traced() -> bool:
    """Whether an exporter or a compiler is recording the operations instead of just running them."""
    compiling = getattr(getattr(torch, "compiler", None), "is_compiling", bool)
    return torch.jit.is_tracing() or compiling()


def multiply_if_free_(x: Tensor, weights: Tensor) -> Tensor:
    """``x * weights``, in place if nothing else needs x: allocating memory takes as long as the product."""
    return x * weights if torch.is_grad_enabled() or _is_traced() else x.mul_(weights)


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation over the global average. arxiv.org/abs/1709.01507"""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        squeeze = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        excite = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        self.fc = nn.Sequential(squeeze, nn.ReLU(), excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return multiply_if_free_(x, self.fc(x.mean((2, 3), keepdim=True)))


class SpatialAttention(nn.Module):
    """Attention over pixels, from the maximum and mean over channels. arxiv.org/abs/1807.06521"""

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return multiply_if_free_(x, torch.sigmoid(self.conv(pooled)))


class QuantFusion(nn.Module):
    """1x1 fusion of the stages' features, with a learned offset: ``fusion_conv(x + error_comp)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.error_comp = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.fusion_conv = nn.Conv2d(channels, channels, 1)

    def reparameterize(self) -> Tuple[Tensor, Tensor]:
        """Weight and bias of the 1x1 convolution that equals this layer."""
        weight, bias = self.fusion_conv.weight, self.fusion_conv.bias
        return weight, bias + weight.flatten(1) @ self.error_comp.flatten()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion_conv(x + self.error_comp)


class AdaptiveUpsample(nn.Module):
    """Convolutions and pixel shuffles: (N, C, H, W) -> (N, out, sH, sW). arxiv.org/abs/1609.05158"""

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.out_channels = max(32, channels // max(1, scale // 2))
        self.step, count = (scale, 1) if scale in (1, 3) else (2, int(math.log2(scale)))
        blocks: List[nn.Module] = []
        for k in range(count):
            width = channels // 2 if k < count - 1 else self.out_channels
            blocks.append(nn.Conv2d(channels, self.step**2 * width, 3, padding=1))
            if scale > 1:
                blocks.append(nn.PixelShuffle(self.step))
            channels = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class AetherBlock(nn.Module):
    """``x + drop_path(attention(ffn(norm(conv(x)))))``, (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, options: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        channels, self.bound = options["embed_dim"], options["bound"]
        self.conv = ReparamLargeKernelConv(channels, options["lk_kernel"], options["sk_kernel"])
        self.norm = DeploymentNorm(channels, options["norm"] == "batch")
        self.ffn = GatedConvFFN(channels, int(channels * options["mlp_ratio"]), options["drop"])
        self.channel_attn = ChannelAttention(channels) if options["use_channel_attn"] else nn.Identity()
        self.spatial_attn = SpatialAttention() if options["use_spatial_attn"] else nn.Identity()
        self.drop_path = drop_path

    def reparameterize(self) -> Dict[str, Tensor]:
        """What fusing changes, by the FusedAetherBlock's names: norm and temperature go into convolutions."""
        (weight, bias), (scale, shift) = self.conv.reparameterize(), self.norm.scale_and_shift()
        state = {"reparam_conv.weight": weight * scale.view(-1, 1, 1, 1)}
        state["reparam_conv.bias"] = bias * scale + shift
        state["gate_conv.weight"], state["gate_conv.bias"] = self.ffn.reparameterize()
        return state

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.bound is not None:
            out = F.hardtanh(out, -self.bound, self.bound)  # its gradient costs a third of clamp's
        out = self.spatial_attn(self.channel_attn(self.ffn(out)))
        if self.training and self.drop_path:  # drops whole samples: https://arxiv.org/abs/1603.09382
            out = out * F.dropout(out.new_ones(len(out), 1, 1, 1), self.drop_path)
        return x + out


class AetherBase(nn.Module):
    """What all forms share: options, stages, changing form, loading."""

    mean: Tensor

    @classmethod
    def options_from_names(cls, names: Iterable[str]) -> Dict[str, Any]:
        """Constructor arguments besides the options, read from tensor names."""
        return {}

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        defaults = {name: option.default for name, option in inspect.signature(AetherNet).parameters.items()}
        self.options: Dict[str, Any] = {**defaults, **options}
        _check_options(self.options)
        if self.options.pop("batch_renorm"):
            log.warning("AetherNet: batch_renorm was removed; using norm='frozen' instead.")
            self.options["norm"] = self.options["norm"] or "frozen"
        self.scale: int = self.options["scale"]
        self.register_buffer("mean", torch.full((1, self.options["in_chans"], 1, 1), 0.5))

    def add_stages(self, block: Callable[[], nn.Module]) -> None:
        """Build the stages and the 1x1 convolutions after them."""
        channels, depths = self.options["embed_dim"], self.options["depths"]
        self.stages = nn.ModuleList(nn.Sequential(*(block() for _ in range(depth))) for depth in depths)
        self.fusion_convs = nn.ModuleList(nn.Conv2d(channels, channels // len(depths), 1) for _ in depths)

    def all_stages(self, out: Tensor) -> Tensor:
        """Every stage's output through its 1x1 convolution, concatenated: (N, C, H, W) -> (N, C, H, W)."""
        features = []
        for stage, fusion_conv in zip(self.stages, self.fusion_convs):
            out = stage(out)
            features.append(fusion_conv(out))
        return torch.cat(features, 1)

    def set_bound(self, bound: Optional[float]) -> None:
        """Clamp every block's norm to [-bound, bound], 1e-3 to 1e6 (else ValueError); None: no limit.

        Before fusing: fused values may be rescaled for half precision. A file that is loaded decides anew.
        """
        _check_options({**self.options, "bound": bound})
        self.options["bound"] = bound
        for block in self.modules():
            if isinstance(block, (AetherBlock, FusedAetherBlock)):
                block.bound = bound

    def fused(self) -> FusedAetherNet:
        """A fused deep copy in evaluation mode; this network stays unchanged."""
        with torch.inference_mode(False):
            return copy.deepcopy(self).eval().fuse_model()

    def fuse_model(self) -> FusedAetherNet:
        """Turn this network into a FusedAetherNet in place. An earlier optimizer keeps the old parameters."""
        other = self.as_fused()
        if other is not self:
            self.become(other)
        return self  # type: ignore[return-value]

    def as_fused(self) -> FusedAetherNet:
        """A new FusedAetherNet that computes the same, or this network itself if it is one."""
        return self  # type: ignore[return-value]

    def prepare_qat(self, *args: Any, **options: Any) -> AetherBase:
        """Turn this network into a QuantAetherNet in place: see aether_quant.prepare_qat."""
        return __getattr__("prepare_qat")(self, *args, **options)

    def convert_to_quantized(self) -> AetherBase:
        raise ValueError("convert_to_quantized: call prepare_qat() first, and fine-tune.")

    def become(self, other: AetherBase) -> None:
        """Take ``other``'s form and tensors in place; device, precision, layout, mode and hooks stay."""
        other.to(device=self.mean.device, dtype=self.mean.dtype).train(self.training)
        if any(value.dim() == 4 and not value.is_contiguous() for value in self.parameters()):
            other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not getattr(self, "is_int8", False):  # which can't be trained anyway
            _freeze_alike(self, other)
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        parts: List[Any] = [*self.named_modules(), *self.named_parameters()]
        hooked = [name for name, part in parts if name and any(getattr(part, kind, None) for kind in kinds)]
        if hooked:
            log.warning("AetherNet: hooks on these are gone with the old form: %s.", ", ".join(hooked))
        self.__class__ = type(other)  # as torch.nn.utils.parametrize does: forward belongs to the class
        for name in ("_parameters", "_buffers", "_modules", "options", "keep_norm", "is_int8", "idle"):
            self.__dict__.pop(name, None)
            if name in vars(other):  # some forms have it, others don't
                self.__dict__[name] = vars(other)[name]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Also records options, each of shape (1,), in single precision where half doesn't hold them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        like: Any = self._buffers.get("mean", torch.empty(0))  # which an exporter may have made a constant
        for name in RECORDED if isinstance(self, AetherNet) else ("bound",):  # others' weights hold img_range
            option = self.options[name]
            if option != RECORDED[name]:
                held = float(torch.tensor(option, dtype=like.dtype, device="cpu")) == option
                precision = like.dtype if held else torch.promote_types(like.dtype, torch.float32)
                destination[prefix + name] = torch.full((1,), option, dtype=precision, device=like.device)

    def map_state_dict(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Take the form of ``state_dict``. traiNNer-redux calls this before it compares names."""
        _take_form_of(self, state_dict, "")
        return state_dict

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Runs before any value is copied, so a file loads completely or the network stays unchanged."""
        _take_form_of(self, state_dict, prefix)
        own = {name: value for name, value in state_dict.items() if name[len(prefix) :] not in RECORDED}
        super()._load_from_state_dict(own, prefix, *args)

    def take(self, other: AetherBase, file: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Become ``other``, a network without values yet, to load ``file``; returns what to load then."""
        self.become(other)
        return file

    def take_options(self, recorded: Mapping[str, Any], file: Mapping[str, Tensor]) -> None:
        """The bound and img_range that a file records, and the kind of norms that it was trained with."""
        bound = recorded.get("bound")
        if bound is None and self.options["bound"] is not None:
            log.warning("AetherNet: the file has no bound; the option's, %s, goes.", self.options["bound"])
        self.set_bound(bound)
        self.options["img_range"] = recorded.get("img_range", self.options["img_range"])
        means = [value for name, value in file.items() if name.endswith(".running_mean")]
        for module in self.modules() if self.options["norm"] is None else ():
            if isinstance(module, DeploymentNorm):
                module.batch = any(bool(value.any()) for value in means)


class AetherNet(AetherBase):
    """AetherNet in its training form: (N, in_chans, H, W) in [0, 1] -> (N, in_chans, scale * H, scale * W).

    Args:
        scale: 1, 2, 3, 4 or 8.
        embed_dim, depths: width C of the body, divisible by the number of stages; blocks in each stage.
        mlp_ratio: a block's feed-forward layer has int(C * mlp_ratio) hidden channels.
        lk_kernel, sk_kernel: sizes of the two depthwise kernels, odd, sk_kernel <= lk_kernel.
        drop, drop_path_rate: dropout, and the last block's stochastic depth, both in [0, 1).
        img_range: the network works on (x - mean) * img_range.
        batch_renorm: from earlier versions; means norm="frozen".
        bound: clamps every block's norm, so that no picture makes the network run away: see set_bound.
        norm: "frozen" keeps the norms' statistics, "batch" uses each batch's. None: frozen, or batch after
            loading a file trained with batch statistics, so that its training can continue.

    Raises ValueError if an option is impossible; the message says what is allowed.
    """

    def __init__(
        self, scale: int = 4, in_chans: int = 3, embed_dim: int = 128, depths: Sequence[int] = (6, 6, 6, 6),
        mlp_ratio: float = 2.0, lk_kernel: int = 11, sk_kernel: int = 3, drop: float = 0.0,
        drop_path_rate: float = 0.0, img_range: float = 1.0, use_channel_attn: bool = True,
        use_spatial_attn: bool = True, batch_renorm: bool = False, bound: Optional[float] = 1.0,
        norm: Optional[str] = None,
    ) -> None:  # fmt: skip
        super().__init__({k: option for k, option in locals().items() if k not in ("self", "__class__")})
        rates = iter([drop_path_rate * k / max(1, sum(depths) - 1) for k in range(sum(depths))])
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.add_stages(lambda: AetherBlock(self.options, next(rates)))
        self.quant_fusion_layer = QuantFusion(embed_dim)
        self.norm = DeploymentNorm(embed_dim, self.options["norm"] == "batch")
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        before = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(before, nn.LeakyReLU(0.01))
        self.upsample = AdaptiveUpsample(embed_dim, scale)
        self.conv_last = nn.Conv2d(self.upsample.out_channels, in_chans, 3, padding=1)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        img_range = self.options["img_range"]
        shallow = self.conv_first((x - self.mean) * img_range)
        body = self.quant_fusion_layer(self.all_stages(shallow)) + shallow
        body = self.conv_after_body(self.norm(body)) + body
        return self.conv_last(self.upsample(self.conv_before_upsample(body))) / img_range + self.mean

    @torch.inference_mode(False)
    @torch.no_grad()
    @torch.random.fork_rng(devices=[])
    def as_fused(self) -> FusedAetherNet:
        state = copy.deepcopy(self).cpu().double().reparameterize()
        other = FusedAetherNet(**self.options, **FusedAetherNet.options_from_names(state))
        other.double().load_state_dict({name: state[name] for name in other.state_dict()})
        return other

    def reparameterize(self) -> Dict[str, Tensor]:
        """The equivalent FusedAetherNet's tensors, and others that it doesn't have; in this precision."""
        state = {fused_name(name): value for name, value in self.state_dict().items()}
        for name, block in self.stages.named_modules():
            if isinstance(block, AetherBlock):
                state.update({f"stages.{name}.{key}": value for key, value in block.reparameterize().items()})
        state["fusion.weight"], state["fusion.bias"] = self.quant_fusion_layer.reparameterize()
        img_range = self.options["img_range"]  # becomes part of the first and the last weights
        state["head.weight"] = self.conv_first.weight * img_range
        tail = CollapsedTail.collapse(nn.Sequential(self.upsample, self.conv_last), self.scale)
        state.update({f"tail.{name}": value / img_range for name, value in tail.items()})
        scale, shift = self.norm.scale_and_shift()
        # conv(s * b + t) + b = conv'(b') + b' - t/s with b' = b + t/s, which half precision rounds by up to
        # t/s * 2^-11. If of this noise more than 1/16 of a step of 1/255 arrived in the picture (0.001 dB at
        # 40 dB), the norm stays, as a depthwise 1x1 convolution.
        offset = torch.where((scale == 0) & (shift == 0), shift, shift / scale)
        noise = (offset * 2.0**-11) ** 2
        for name in ("conv_before_upsample.0.weight", "tail.weight"):
            noise = state[name].pow(2).sum((2, 3)) @ noise
        state["body_norm.weight"], state["body_norm.bias"] = scale.view(-1, 1, 1, 1), shift
        if bool(noise.sqrt().max() * 255 <= 1 / 16):  # not where it is NaN
            del state["body_norm.weight"], state["body_norm.bias"]
            state["fusion.bias"] = state["fusion.bias"] + offset
            state["body_conv.weight"] = state["body_conv.weight"] * scale.view(1, -1, 1, 1)
            state["body_conv.bias"] = state["body_conv.bias"] - offset
        state["tail.bias"] = state["tail.bias"] + self.mean.flatten().repeat_interleave(self.scale**2)
        return state


class FusedAetherBlock(nn.Module):
    """AetherBlock as plain convolutions: (N, C, H, W) -> (N, C, H, W)."""

    STRIP = 1536  # pixels per thread, see forward

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        channels, kernel, self.bound = options["embed_dim"], options["lk_kernel"], options["bound"]
        hidden = int(channels * options["mlp_ratio"])
        self.reparam_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.gate_conv = nn.Conv2d(channels, hidden, 1)
        self.main_conv = nn.Conv2d(channels, hidden, 1)
        self.out_conv = nn.Conv2d(hidden, channels, 1)
        self.channel_attn = ChannelAttention(channels) if options["use_channel_attn"] else nn.Identity()
        self.spatial_attn = SpatialAttention() if options["use_spatial_attn"] else nn.Identity()

    def feed_forward(self, x: Tensor) -> Tensor:
        # In place, because allocating memory costs as much as the operation itself.
        if self.bound is not None:
            x.clamp_(-self.bound, self.bound)
        hidden = F.silu(self.gate_conv(x), inplace=True)
        hidden *= self.main_conv(x)
        return self.out_conv(hidden)

    def forward(self, x: Tensor) -> Tensor:
        out, rows = self.reparam_conv(x), 0
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not _is_traced():
            # The hidden tensor is the widest. Strip by strip, it stays in each core's cache.
            rows = max(1, self.STRIP * torch.get_num_threads() // max(1, x.shape[0] * x.shape[3]))
        if 0 < rows < x.shape[2]:
            for strip in out.split(rows, 2):
                strip.copy_(self.feed_forward(strip))
        else:
            out = self.feed_forward(out)
        out = self.spatial_attn(self.channel_attn(out))
        out += x
        return out


# Where each border correction of the tail applies, as (row, column): -1 the first, 1 the last, 0 all.
BORDERS = {
    "top": (-1, 0), "bottom": (1, 0), "left": (0, -1), "right": (0, 1),
    "top_left": (-1, -1), "top_right": (-1, 1), "bottom_left": (1, -1), "bottom_right": (1, 1),
}  # fmt: skip
BORDER_LINES = {1: 1, 2: 1, 3: 1, 4: 2, 8: 2}  # by scale: how many lines of pixels a correction sees


def outermost(x: Tensor, sides: Tuple[int, int], count: int) -> Tensor:
    """The ``count`` first or last rows and columns at BORDERS' ``sides``; zeros for those beyond ``x``."""
    lines = {-1: slice(count), 0: slice(None), 1: slice(-count, None)}
    place = (..., lines[sides[0]], lines[sides[1]])
    missing = [(count - 1) * (side == end) for side in reversed(sides) for end in (1, -1)]
    return F.pad(x[place], missing)[place] if any(missing) else x[place]


def add_to_outermost(x: Tensor, delta: Tensor, sides: Tuple[int, int]) -> Tensor:
    """``x`` with ``delta`` added to its first or last row and column at BORDERS' ``sides``."""
    line, rest = {-1: slice(1), 0: slice(None), 1: slice(-1, None)}, {-1: slice(1, None), 1: slice(-1)}
    if not torch.jit.is_tracing():
        x[..., line[sides[0]], line[sides[1]]] += delta
        return x
    if sides == (0, 0):
        return x + delta
    # Few runtimes can write into a part of a tensor, but all can concatenate: rows first, then in the row.
    dim, side, inner = (2, sides[0], (0, sides[1])) if sides[0] else (3, sides[1], (0, 0))
    lines, others = (x[(slice(None),) * dim + (part[side],)] for part in (line, rest))
    parts = [add_to_outermost(lines, delta, inner), others]
    return torch.cat(parts[::-side], dim)


class CollapsedTail(nn.Module):
    """Every layer after the LeakyReLU, as one 5x5 convolution and one pixel shuffle.

    (N, C, H, W) -> (N, out_channels, scale * H, scale * W). Upsampling convolutions, shuffles and conv_last
    are linear, so inside the image they are one convolution. At the border they pad with zeros at a higher
    resolution, where the one convolution still sees values. The difference is linear too and affects only the
    outermost pixels. It is added there as a convolution of the outermost lines of features.
    """

    def __init__(self, channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale, self.depth = scale, BORDER_LINES[scale]
        outputs = out_channels * scale**2
        self.weight = nn.Parameter(torch.zeros(outputs, channels, 5, 5))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for name, sides in BORDERS.items():
            kernel = [self.depth if side else 5 for side in sides]
            setattr(self, f"{name}_weight", nn.Parameter(torch.zeros(outputs, channels, *kernel)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(outputs)))

    @staticmethod
    def collapse(tail: nn.Module, scale: int) -> Dict[str, Tensor]:
        """State dict of the CollapsedTail that equals ``tail``; kernels are gradients by a 5x5 image."""
        like = next(tail.parameters())
        images = like.new_zeros(9, like.shape[1], 5, 5)

        def outputs(images: Tensor) -> Tensor:
            return F.pixel_unshuffle(tail(images), scale)[:, :, ::2, ::2]  # (N, outputs, 3, 3): 9 positions

        def pixel_per_image(images: Tensor) -> Tensor:
            return torch.einsum("pop->o", outputs(images).flatten(2))  # an image for each position

        # (output, its row y, its column x, channel, row, column): cut to offsets -2..2 from the output.
        kernels = torch.autograd.functional.jacobian(pixel_per_image, images).unflatten(1, (3, 3))
        windows = F.pad(kernels, [2] * 4).unfold(4, 5, 2).unfold(5, 5, 2)
        weights, biases = torch.einsum("oyxcyxij->yxocij", windows), outputs(images)[0].permute(1, 2, 0)
        # Of an edge remains what the middle lacks, of a corner what both edges lack.
        for values in (weights, biases):
            values[::2] -= values[1].clone()
            values[:, ::2] -= values[:, 1:2].clone()
        lines = BORDER_LINES[scale]
        # The offsets that a correction sees: the first lines, all, the last lines.
        window = {-1: slice(2, 2 + lines), 0: slice(None), 1: slice(3 - lines, 3)}
        state = {"weight": weights[1, 1], "bias": biases[1, 1]}
        for name, (row, column) in BORDERS.items():
            weight, state[f"{name}_bias"] = weights[row + 1, column + 1], biases[row + 1, column + 1]
            state[f"{name}_weight"] = weight[:, :, window[row], window[column]]
        return state

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=2)

    def border(self, name: str) -> Tuple[Tensor, Tensor]:
        """Weight (outputs, C, rows, columns) and bias of a correction."""
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def forward(self, x: Tensor) -> Tensor:
        out = self.convolve(x)
        for name, sides in BORDERS.items():
            padding = [0 if side else 2 for side in sides]
            delta = F.conv2d(outermost(x, sides, self.depth), *self.border(name), padding=padding)
            out = add_to_outermost(out, delta, sides)
        return F.pixel_shuffle(out, self.scale)


class FusedAetherNet(AetherBase):
    """The form to release. Computes what AetherNet does in evaluation mode, even after train().

    Its tensors have their own names, so that none is mistaken for another form's. Weights hold img_range.
    Args: AetherNet's, and ``keep_norm`` if the last norm could not be merged.
    """

    block: Type[FusedAetherBlock] = FusedAetherBlock
    warns_in_training = True

    def __init__(self, *, keep_norm: bool = False, **options: Any) -> None:
        super().__init__(options)
        self.keep_norm = keep_norm
        in_chans, channels = self.options["in_chans"], self.options["embed_dim"]
        self.head = nn.Conv2d(in_chans, channels, 3, padding=1)
        self.add_stages(lambda: self.block(self.options))
        self.fusion = nn.Conv2d(channels, channels, 1)
        self.body_norm = nn.Conv2d(channels, channels, 1, groups=channels) if keep_norm else nn.Identity()
        self.body_conv = nn.Conv2d(channels, channels, 3, padding=1)
        before = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(before, nn.LeakyReLU(0.01))
        self.tail = CollapsedTail(channels, in_chans, self.scale)

    @classmethod
    def options_from_names(cls, names: Iterable[str]) -> Dict[str, Any]:
        return {"keep_norm": "body_norm.weight" in names}

    def features(self, x: Tensor) -> Tensor:
        """What the tail gets: (N, in_chans, H, W) -> (N, embed_dim, H, W)."""
        shallow = self.head(x - self.mean)
        body = self.fusion(self.all_stages(shallow)) + shallow
        return self.conv_before_upsample(self.body_conv(self.body_norm(body)) + body)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.warns_in_training and torch.is_grad_enabled():
            self.warns_in_training = False
            warnings.warn("AetherNet: this trains the fused form; use the training form.", stacklevel=2)
        return self.tail(self.features(x))


# Which tensor of the fused form a tensor of the training form becomes, or becomes a part of.
FUSED_NAMES = (
    (r"^conv_first", "head"), (r"\.conv\.[ls]k_(conv\.)?|(?<=\d)\.norm\.", ".reparam_conv."),
    (r"ffn\.conv_(gate|main|out)", r"\1_conv"), (r"ffn\.temperature", "gate_conv.weight"),
    (r"^quant_fusion_layer\.fusion_conv", "fusion"), (r"^quant_fusion_layer\.error_comp", "fusion.bias"),
    (r"^norm", "body_norm"), (r"^conv_after_body", "body_conv"),
    (r"^(upsample|conv_last|tail)\..*", "tail.weight"),
)  # fmt: skip


def fused_name(name: str, merged_norm: bool = False) -> str:
    """A tensor's name in the fused form. Where the last norm is merged, body_conv holds it."""
    name = functools.reduce(lambda text, pair: re.sub(pair[0], pair[1], text), FUSED_NAMES, name)
    return name.replace("body_norm", "body_conv") if merged_norm else name


def form_of(names: Iterable[str]) -> Any:
    """The class of network that has these tensor names; None if they are not an AetherNet's."""
    ends = {tuple(name.split(".")[3:]) for name in names if name.startswith("stages.")}
    if ("conv", "lk_conv", "weight") in ends:
        return AetherNet
    if ("reparam_conv", "weight") not in ends:
        return None
    quantised = ("reparam_conv", "quant_out", "range_sum") in ends
    return __getattr__("QuantAetherNet") if quantised else FusedAetherNet


def scale_of(state: Mapping[str, Tensor]) -> Optional[int]:
    """The scale that a state dict's tensors upsample by; None if it is not in SCALES."""
    convs = [name for name in state if re.fullmatch(r"(upsample\.blocks\.\d+|tail)\.weight", name)]
    scale, shuffled = 2 ** len(convs), state.get("conv_last.weight", state.get("head.weight"))
    if len(convs) == 1 and shuffled is not None and shuffled.dim() == 4:  # one pixel shuffle
        scale = math.isqrt(state[convs[0]].shape[0] // max(1, shuffled.shape[1]))
    return scale if scale in SCALES and convs else None


def differences(net: nn.Module, state: Mapping[str, Any], allowed: Sequence[str] = ()) -> str:
    """Why ``net`` can't load ``state``, by kind: "of another shape", "missing", "unexpected" names."""

    def kind_of(value: Any) -> Any:  # torch copies no sparse or quantised tensor into another
        return [getattr(value, name, None) for name in ("shape", "layout", "is_quantized")]

    expected = {name: kind_of(value) for name, value in net.state_dict().items() if name not in RECORDED}
    found = {name: kind_of(value) for name, value in state.items() if name not in RECORDED}
    both = expected.keys() & found.keys()
    kinds = {
        "missing": sorted(expected.keys() - both),
        "of another shape": sorted(name for name in both if expected[name] != found[name]),
        "unexpected": sorted(found.keys() - both),
    }
    texts = []
    for kind in [kind for kind, names in kinds.items() if names and kind not in allowed]:
        some = ", ".join([name[:80] for name in kinds[kind][:3]] + ["..."] * (len(kinds[kind]) > 3))
        texts.append(f"{kind}: {len(kinds[kind])} ({some})")
    return "; ".join(texts)


def described(state: Mapping[str, Any]) -> str:
    """The network with these tensors in words, such as "fused aether_small x2 (96 wide)"."""
    form, first = form_of(state), state.get("conv_first.weight", state.get("head.weight"))
    if form is None or first is None:
        return "no AetherNet"
    blocks = {tuple(name.split(".")[1:3]) for name in state if name.startswith("stages.")}
    count = collections.Counter(stage for stage, *_ in blocks)
    width, depths = first.shape[0], tuple(count[str(stage)] for stage in range(len(count)))
    names = [variant.__name__ for variant in VARIANTS if variant.body == (width, depths)]
    name = names[0] if names else f"AetherNet of depths {list(depths)}"
    kind = {AetherNet: "", FusedAetherNet: "fused "}.get(form, "quantised ")
    details = [f"{width} wide"] + [f"in_chans {first.shape[1]}"] * (first.shape[1] != 3)
    details += [f"{part} attention" for part in ("channel", "spatial") if f".{part}_attn." in " ".join(state)]
    return f"{kind}{name} x{scale_of(state)} ({', '.join(details)})"


@torch.inference_mode(False)
@torch.random.fork_rng(devices=[])
def _take_form_of(net: AetherBase, state_dict: Dict[str, Any], prefix: str) -> None:
    """Give ``net`` the form and recorded options of a whole file; ``state_dict`` keeps what is to be loaded.

    RuntimeError, and no change, if it can't be loaded. Without strict what fits is loaded, as in torch; but
    weights of another scale give their body.
    """
    file = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    empty = [name for name, value in file.items() if getattr(value, "is_meta", False)]
    if empty and not net.mean.is_meta:
        raise RuntimeError(f"{type(net).__name__} stays as it was: {empty[0]!r} is on the meta device.")
    # Without strict, BasicSR and traiNNer-redux append ".ignore" to names of tensors with other shapes.
    named = {name.split(".ignore")[0]: value for name, value in file.items() if getattr(value, "dim", int)()}
    form, scale, other, strict = form_of(named), scale_of(named), net, _strict_of_caller()
    try:
        recorded = {name: float(file[name]) for name in RECORDED.keys() & file.keys()}
        _check_options({**net.options, **recorded})
    except (RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(f"the file's {' or '.join(RECORDED)} is not one number: {error}") from None
    own = form.options_from_names(file) if form else {}
    if form and not (form is form_of(net.state_dict()) and own.items() <= vars(net).items()):
        other = form(**{**net.options, "bound": None, **recorded}, **own)
    body = form is AetherNet and scale not in (None, net.scale)
    taken = {name: value for name, value in file.items() if not (body and name.startswith(TAIL))}
    tail = {name: value for name, value in other.state_dict().items() if body and name.startswith(TAIL)}
    completed = {**taken, **tail}
    allowed = () if strict else ("unexpected",) if other is not net else ("unexpected", "missing")
    wrong = differences(other, file if strict else completed, allowed)
    if wrong:
        remedy = "Build the network with the options that the file was trained with."
        if form is None:
            remedy = "fuse_aether.py reads other layouts."
        elif body and not differences(other, completed):
            remedy = "To take only the body, pass strict=False; in a template, set strict_load_g: false"
        text = f"the file is {described(named)}, the network {described(net.state_dict())}"
        raise RuntimeError(f"{type(net).__name__} stays as it was: {text}; tensors {wrong}. {remedy}")
    whole = form is not None and not differences(other, completed, ("unexpected",))
    if other is not net:
        taken = net.take(other, taken)
    if body:
        log.warning("AetherNet x%s takes only the body of x%s weights; its tail is new.", net.scale, scale)
    if whole:
        net.take_options(recorded, taken)
        mine = {name: value for name, value in net.state_dict().items() if name in RECORDED}
        taken = {**{name: value for name, value in taken.items() if name not in RECORDED}, **mine}
    for name in file:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in taken.items()})


def _freeze_alike(net: AetherBase, other: AetherBase) -> None:
    """Freeze what in ``other`` consists of frozen tensors of ``net``, and name what is trained again."""
    merged = any(isinstance(getattr(each, "body_norm", None), nn.Identity) for each in (net, other))
    trained: Dict[str, set] = collections.defaultdict(set)
    for name, value in net.named_parameters():
        trained[fused_name(name, merged)].add(value.requires_grad)
    for name, value in other.named_parameters():
        value.requires_grad_(value.requires_grad and True in trained.get(fused_name(name, merged), {True}))
    mixed = [name for name, kinds in trained.items() if len(kinds) == 2]
    if mixed:
        log.warning("AetherNet: merged with others, no longer frozen: %s.", ", ".join(sorted(mixed)))


def _strict_of_caller() -> bool:
    """What load_state_dict, or traiNNer-redux before it, was asked for.

    torch tells a module strict=True whatever was asked of the whole (which may be DDP or another wrapper), so
    this looks up the stack.
    """
    frame: Any = inspect.currentframe()
    while frame and not isinstance(frame.f_locals.get("strict"), int):
        frame = frame.f_back
    return frame is None or bool(frame.f_locals["strict"])


HOMES = {"export_onnx": "aethersr.onnx", "aether_from_state_dict": "aethersr.identify"}
QUANT = ("QuantAetherNet", "Quantizer", "TARGETS", "insert_quantizers", "prepare_qat")


def __getattr__(name: str) -> Any:
    """Names that can be imported from here but live in aethersr, or in aether_quant.py beside this file."""
    home, package = ("aether_quant", __package__) if name in QUANT else (HOMES.get(name), "")
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{home}" if package else home, package), name)
    except ModuleNotFoundError as error:
        if home.split(".")[0] not in (error.name or "").split("."):
            raise
        copied = f"copy {home}.py beside {__file__}"
        remedy = copied if name in QUANT else "pip install . in AetherNet's folder"
        raise ImportError(f"{home} is missing: {remedy}.") from None


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for the first impossible option, with its name, its value and what is allowed."""

    def number(value: Any, low: float, high: float = math.inf, kind: Any = (int, float)) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and low <= value < high

    def check(name: str, ok: Any, allowed: str) -> None:
        if not ok:
            raise ValueError(f"AetherNet: {name}={options[name]!r} is not possible; allowed: {allowed}.")

    whole = functools.partial(number, low=1, kind=int)
    scale, depths, width, large = (options[name] for name in ("scale", "depths", "embed_dim", "lk_kernel"))
    check("scale", whole(scale) and scale in SCALES, "1, 2, 3, 4, 8")
    check("in_chans", whole(options["in_chans"]), "a whole number from 1")
    several = isinstance(depths, (list, tuple)) and depths
    check("depths", several and all(map(whole, depths)), "a list of whole numbers from 1")
    least = max(scale // 2, 8 * (options["use_channel_attn"] is True))  # for this scale and attention
    fits = whole(width) and width % len(depths) == 0 and width >= least
    check("embed_dim", fits, f"a multiple of {len(depths)}, the number of stages in depths, {least} or more")
    hidden = number(options["mlp_ratio"], 0, 1e6) and int(width * options["mlp_ratio"]) >= 1
    check("mlp_ratio", hidden, f"{1 / width:.3g} (one hidden channel) or more")
    check("lk_kernel", whole(large) and large % 2 == 1, "an odd number from 1")
    inside = whole(options["sk_kernel"]) and options["sk_kernel"] in range(1, large + 1, 2)
    check("sk_kernel", inside, f"an odd number from 1 to lk_kernel={large}")
    for name in ("drop", "drop_path_rate"):
        check(name, number(options[name], 0, 1), f"0 <= {name} < 1")
    check("img_range", number(options["img_range"], 1e-6, 1e6), "a number above 0 (1e-6 to 1e6)")
    for name in ("use_channel_attn", "use_spatial_attn", "batch_renorm"):
        check(name, isinstance(options.get(name, False), bool), "true or false")
    bounded = options["bound"] is None or number(options["bound"], 1e-3, 1e6)
    check("bound", bounded, "a number above 0 (1e-3 to 1e6), or nothing")
    check("norm", options["norm"] in (None, "frozen", "batch"), "frozen, batch, or nothing")


@torch.no_grad()
def _initialize(net: AetherNet) -> None:
    """Start as an interpolation: blocks are identities, and the first channels carry the image.

    Kernels inside blocks keep the size of their input: with small ones the gated product would leave conv_out
    no gradient. A value passes LeakyReLU as a pair: lrelu(v) - lrelu(-v) = 1.01 v. A network too narrow for
    that starts from random weights.
    """
    for part in reversed([*net.modules()]):  # a block after its convolutions
        if isinstance(part, nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, AetherBlock):
            for conv in (part.conv.lk_conv, part.ffn.conv_gate, part.ffn.conv_main):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            nn.init.dirac_(part.conv.sk_conv.weight, groups=part.conv.sk_conv.groups)
            part.ffn.conv_out.weight.zero_()
    nn.init.kaiming_normal_(net.conv_first.weight)
    image, width = net.conv_first.in_channels, net.conv_first.out_channels
    step, upsamplers = net.upsample.step, [c for c in net.upsample.blocks if isinstance(c, nn.Conv2d)]
    if width < 2 * image or any(conv.out_channels < step**2 * image for conv in upsamplers):
        return

    def carry(conv: Any, kernels: Tensor) -> None:
        """Set the first output channels of ``conv`` to ``kernels`` (out, in, K, K) of the first inputs."""
        kernels = F.pad(kernels, [(conv.kernel_size[0] - kernels.shape[-1]) // 2] * 4)
        conv.weight[: len(kernels)] = 0
        conv.weight[: len(kernels), : kernels.shape[1]] = kernels

    eye, (before, activation) = torch.eye(image).view(image, image, 1, 1), net.conv_before_upsample
    carry(net.conv_first, eye)
    carry(net.quant_fusion_layer.fusion_conv, torch.zeros_like(eye))
    carry(net.conv_after_body, torch.zeros_like(eye))
    carry(before, torch.cat([eye, -eye]))
    source = torch.cat([eye, -eye], 1) / (1 + float(activation.negative_slope))  # type: ignore[arg-type]
    # Lagrange's quadratic interpolation at t, from pixels at -1, 0 and 1.
    offsets = [(k + 0.5) / step - 0.5 for k in range(step)]
    taps = torch.tensor([[t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2] for t in offsets])
    for conv in upsamplers:
        carry(conv, torch.einsum("oc,iy,jx->oijcyx", source.flatten(1), taps, taps).flatten(0, 2))
        source = eye
    carry(net.conv_last, eye)


ARCHS = ("basicsr.archs", "neosr.archs", "traiNNer.archs")
FRAMEWORK = __package__.split(".")[0] if __package__ in ARCHS else None  # in whose folder this file lies


def _variant(name: str, doc: str, width: int, depths: Tuple[int, ...], attention: bool) -> Any:
    """A function that builds this variant. Options: AetherNet's, and ``qat``."""
    own = {"embed_dim": width, "depths": depths, "use_channel_attn": attention, "use_spatial_attn": attention}
    parameters = inspect.signature(AetherNet).parameters.values()
    options = [option.replace(default=own.get(option.name, option.default)) for option in parameters]
    qat = inspect.Parameter("qat", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool | str")
    signature = inspect.Signature([*options, qat], return_annotation="AetherBase")

    def build(*args: Any, qat: Any = False, **given: Any) -> AetherBase:
        if FRAMEWORK == "neosr" and not args and "scale" not in given:  # neosr keeps the scale itself
            given["scale"] = importlib.import_module("neosr.archs.arch_util").net_opt()[0]
        net = AetherNet(**{**own, **signature.bind(*args, **given).arguments})
        if FRAMEWORK == "basicsr":  # its EMA copies no buffers: norm statistics would never be updated
            for norm in [module for module in net.modules() if isinstance(module, DeploymentNorm)]:
                for statistic in ("running_mean", "running_var"):
                    value: Any = norm._buffers.pop(statistic)
                    norm.register_parameter(statistic, nn.Parameter(value, requires_grad=False))
        return net if qat is False else __getattr__("insert_quantizers")(net, qat)

    vars(build).update(__signature__=signature, body=(width, depths))
    build.__name__, build.__qualname__, build.__doc__ = name, name, doc
    return build


aether_small = _variant("aether_small", "Fast: 1.5 million parameters at x4.", 96, (4, 4, 4, 4), False)
aether_medium = _variant("aether_medium", "Balanced: 3.7 million parameters at x4.", 128, (6, 6, 6, 6), True)
aether_large = _variant("aether_large", "Best: 10.6 million parameters at x4.", 180, (8, 8, 8, 8, 8), True)
VARIANTS = (aether_small, aether_medium, aether_large)

if FRAMEWORK:
    registry = importlib.import_module(f"{FRAMEWORK}.utils.registry").ARCH_REGISTRY
    for variant in VARIANTS:
        if variant.__name__ in registry:
            raise ImportError(f"{variant.__name__} is in {FRAMEWORK} already; keep one copy of {__file__}.")
        registry.register(variant)
