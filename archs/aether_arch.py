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

import copy
import functools
import importlib
import inspect
import math
import warnings
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__version__ = "0.2.0"
SCALES = (1, 2, 3, 4, 8)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One kernel per channel, zero-padded to keep the size: (N, C, H, W) -> (N, C, H, W)."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class ReparamLargeKernelConv(nn.Module):
    """A large and a small depthwise kernel in parallel, (N, C, H, W) kept. arxiv.org/abs/2203.06717

    Both are linear, so one convolution with the sum of the kernels has the same output and gradients.
    """

    def __init__(self, channels: int, lk_kernel: int, sk_kernel: int) -> None:
        super().__init__()
        same: Dict[str, Any] = {"groups": channels, "bias": False}
        self.lk_conv = nn.Conv2d(channels, channels, lk_kernel, padding=lk_kernel // 2, **same)
        self.sk_conv = nn.Conv2d(channels, channels, sk_kernel, padding=sk_kernel // 2, **same)
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

    bound: Optional[float] = None  # clamps the norm's output to [-bound, bound]

    def __init__(self, options: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        channels = options["embed_dim"]
        self.conv = ReparamLargeKernelConv(channels, options["lk_kernel"], options["sk_kernel"])
        self.norm = DeploymentNorm(channels, options["norm"] == "batch")
        self.ffn = GatedConvFFN(channels, int(channels * options["mlp_ratio"]), options["drop"])
        self.channel_attn = ChannelAttention(channels) if options["use_channel_attn"] else nn.Identity()
        self.spatial_attn = SpatialAttention() if options["use_spatial_attn"] else nn.Identity()
        self.drop_path = drop_path

    def reparameterize(self) -> Dict[str, Tensor]:
        """State dict of the equivalent FusedAetherBlock: norm and temperature go into the convolutions."""
        weight, bias = self.conv.reparameterize()
        scale, shift = self.norm.scale_and_shift()
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
        state = {"reparam_conv.weight": weight, "reparam_conv.bias": bias}
        state["gate_conv.weight"], state["gate_conv.bias"] = self.ffn.reparameterize()
        state.update(self.ffn.conv_main.state_dict(prefix="main_conv."))
        state.update(self.ffn.conv_out.state_dict(prefix="out_conv."))
        state.update(self.channel_attn.state_dict(prefix="channel_attn."))
        state.update(self.spatial_attn.state_dict(prefix="spatial_attn."))
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
    """What all forms share: options, changing form, loading. To build one, use AetherNet or a variant."""

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
            warnings.warn("AetherNet: batch_renorm was removed; using norm='frozen' instead.", stacklevel=3)
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

    def fused(self) -> FusedAetherNet:
        """A fused deep copy in evaluation mode; this network stays unchanged."""
        with torch.inference_mode(False):
            return copy.deepcopy(self).eval().fuse_model()

    def fuse_model(self) -> FusedAetherNet:
        """Turn this network into a FusedAetherNet in place. An earlier optimizer keeps the old parameters."""
        raise NotImplementedError

    def prepare_qat(self, *args: Any, **options: Any) -> AetherBase:
        """Turn this network into a QuantAetherNet in place: see aether_quant.prepare_qat."""
        return _import_sibling("aether_quant").prepare_qat(self, *args, **options)

    def convert_to_quantized(self) -> AetherBase:
        raise ValueError("convert_to_quantized: call prepare_qat() first, and fine-tune.")

    def set_bound(self, bound: Optional[float]) -> None:
        """Clamp every block's norm to [-bound, bound], 1e-3 to 1e6 (else ValueError); None: no limit.

        Do it before fusing: a fused file's values may be rescaled for half precision, unknown to the bound.
        """
        _check_options({**self.options, "bound": bound})
        self.options = {**self.options, "bound": bound}
        self._buffers.pop("bound", None)
        if bound is not None:
            self.register_buffer("bound", self.mean.new_full((1,), bound))
        for block in self.modules():
            if isinstance(block, (AetherBlock, FusedAetherBlock)):
                block.bound = bound

    def become(self, other: AetherBase) -> None:
        """Take ``other``'s form and tensors in place, but keep device, precision, layout and mode."""
        weights = list(self.parameters())
        other.to(device=self.mean.device, dtype=self.mean.dtype).train(self.training)
        if any(value.dim() == 4 and not value.is_contiguous() for value in weights):
            other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_int8 = getattr(self, "is_int8", False)  # as int8, which is never trainable
        if weights and not is_int8 and not any(value.requires_grad for value in weights):
            other.requires_grad_(False)
        self.__class__ = type(other)  # as torch.nn.utils.parametrize does: forward belongs to the class
        for name in ("keep_norm", "placement", "is_int8"):  # attributes that only some forms have
            self.__dict__.pop(name, None)
        self.__dict__.update({name: value for name, value in vars(other).items() if "_hooks" not in name})

    def map_state_dict(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Take the form of ``state_dict``. traiNNer-redux calls this before it compares names."""
        self._take_form_of(state_dict, "", strict=False)
        return state_dict

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Runs before any value is copied, so a file loads completely or the network stays unchanged."""
        # torch passes strict=True here, whatever load_state_dict got (perhaps DDP's): ask the caller's frame.
        frame: Any = inspect.currentframe()
        while frame and frame.f_code is not nn.Module.load_state_dict.__code__:
            frame = frame.f_back
        self._take_form_of(state_dict, prefix, strict=not frame or frame.f_locals["strict"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.inference_mode(False)
    @torch.random.fork_rng(devices=[])
    def _take_form_of(self, state_dict: Dict[str, Tensor], prefix: str, strict: bool) -> None:
        """Take a state dict's form, bound and norms. RuntimeError, and no change, if it doesn't fit."""
        # Without strict, BasicSR and traiNNer-redux append ".ignore" to names of tensors with other shapes.
        named = ((name[len(prefix) :], state_dict[name]) for name in state_dict if name.startswith(prefix))
        own = {name.split(".ignore")[0]: value for name, value in named}
        form, scale, other = form_of(own), scale_of(own), self
        if "bound" in own and own["bound"].shape != (1,):
            raise RuntimeError(f"{type(self).__name__}: 'bound' is not one number of shape (1,).")
        bound = float(own["bound"]) if "bound" in own else None
        if form and not (isinstance(self, form) and form.options_from_names(own).items() <= vars(self).items()):
            other = form(**{**self.options, "bound": bound}, **form.options_from_names(own))
        elif form is AetherNet and scale not in (None, self.scale) and not strict:
            text = f"AetherNet x{self.scale} loads only the body of x{scale} weights; its tail is new."
            warnings.warn(text, stacklevel=4)
            for name in [name for name in own if name.startswith(("upsample.", "conv_last."))]:
                state_dict.pop(prefix + name, own.pop(name))
        wrong = differences(other, own, strict or other is not self)  # another form is complete, or not taken
        if wrong:
            found = f"{form.__name__ if form else 'unknown weights'} x{scale} does not fit; tensors {wrong}."
            me = f"{type(self).__name__} x{self.scale} stays as it was"
            raise RuntimeError(f"{me}: {found} fuse_aether.py reads other layouts.")
        if other is not self:
            self.become(other)
        elif form and bound != self.options["bound"]:
            self.set_bound(bound)
        if form is AetherNet and self.options["norm"] is None:
            had_batch_statistics = any(name.endswith(".running_mean") and bool(value.any()) for name, value in own.items())
            for module in self.modules():
                if isinstance(module, DeploymentNorm):
                    module.batch = had_batch_statistics


class AetherNet(AetherBase):
    """AetherNet in its training form: (N, in_chans, H, W) in [0, 1] -> (N, in_chans, scale * H, scale * W).

    Args:
        scale: 1, 2, 3, 4 or 8.
        embed_dim: width C of the body; divisible by the number of stages.
        depths: blocks in each stage.
        mlp_ratio: a block's feed-forward layer has int(C * mlp_ratio) hidden channels.
        lk_kernel, sk_kernel: sizes of the two depthwise kernels, odd, sk_kernel <= lk_kernel.
        drop, drop_path_rate: dropout, and the last block's stochastic depth, both in [0, 1).
        img_range: the network works on (x - mean) * img_range.
        batch_renorm: from earlier versions; means norm="frozen".
        bound: clamps every block's norm to [-bound, bound], so that no picture makes the network run away.
            None, or loading a file without a bound: no limit.
        norm: "frozen" keeps the norms' statistics, "batch" uses each batch's. None: frozen, or batch after
            loading a file trained with batch statistics, so that its training can continue.

    Raises ValueError if an option is impossible; the message says what is allowed.
    """

    def __init__(
        self, scale: int = 4, in_chans: int = 3, embed_dim: int = 128, depths: Sequence[int] = (6, 6, 6, 6),
        mlp_ratio: float = 2.0, lk_kernel: int = 11, sk_kernel: int = 3, drop: float = 0.0,
        drop_path_rate: float = 0.1, img_range: float = 1.0, use_channel_attn: bool = True,
        use_spatial_attn: bool = True, batch_renorm: bool = False, bound: Optional[float] = 1.0,
        norm: Optional[str] = None,
    ) -> None:  # fmt: skip
        super().__init__({k: option for k, option in locals().items() if k not in ("self", "__class__")})
        self.img_range = float(img_range)
        self.non_finite: Any = 0  # training batches with a pixel that is not finite
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
        self.set_bound(bound)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            finite = x.isfinite()
            self.non_finite = self.non_finite + finite.all().logical_not().detach()
            x = torch.where(finite, x, self.mean.to(x.dtype))
        shallow = self.conv_first((x - self.mean) * self.img_range)
        body = self.quant_fusion_layer(self.all_stages(shallow)) + shallow
        body = self.conv_after_body(self.norm(body)) + body
        out = self.conv_last(self.upsample(self.conv_before_upsample(body))) / self.img_range + self.mean
        if out.requires_grad and not _is_traced():  # so that a broken target doesn't ruin the weights
            out.register_hook(lambda grad: torch.nan_to_num(grad, 0.0, 0.0, 0.0))
        return out

    def train(self, mode: bool = True) -> AetherNet:
        count = 0 if mode else int(self.non_finite)
        if count:
            warnings.warn(f"AetherNet: {count} batches held NaN or infinite pixels, now grey", stacklevel=2)
            self.non_finite = 0
        return super().train(mode)

    @torch.inference_mode(False)
    @torch.no_grad()
    @torch.random.fork_rng(devices=[])
    def fuse_model(self) -> FusedAetherNet:
        state = copy.deepcopy(self).cpu().double().reparameterize()
        other = FusedAetherNet(**self.options, **FusedAetherNet.options_from_names(state))
        other.double().load_state_dict(state)
        self.become(other)
        return self  # type: ignore[return-value]

    def reparameterize(self) -> Dict[str, Tensor]:
        """State dict of the equivalent FusedAetherNet, in this network's precision."""
        state = {**dict(self.named_buffers(recurse=False)), **self.conv_first.state_dict(prefix="head.")}
        state["head.weight"] = self.conv_first.weight * self.img_range
        for name, block in self.stages.named_modules():
            if isinstance(block, AetherBlock):
                state.update({f"stages.{name}.{key}": value for key, value in block.reparameterize().items()})
        state.update(self.fusion_convs.state_dict(prefix="fusion_convs."))
        state["fusion.weight"], state["fusion.bias"] = self.quant_fusion_layer.reparameterize()
        state.update(self.conv_after_body.state_dict(prefix="body_conv."))
        state.update(self.conv_before_upsample.state_dict(prefix="conv_before_upsample."))
        tail = CollapsedTail.collapse(nn.Sequential(self.upsample, self.conv_last), self.scale)
        tail = {name: value / self.img_range for name, value in tail.items()}
        scale, shift = self.norm.scale_and_shift()
        # conv(s * b + t) + b = conv'(b') + b' - t/s with b' = b + t/s, which half precision rounds by up to
        # t/s * 2^-11. If of this noise more than 1/16 of a step of 1/255 arrived in the picture (0.001 dB at
        # 40 dB), the norm stays, as a depthwise 1x1 convolution.
        offset = torch.where((scale == 0) & (shift == 0), shift, shift / scale)
        noise = (offset * 2.0**-11) ** 2
        for weight in (state["conv_before_upsample.0.weight"], tail["weight"]):
            noise = weight.pow(2).sum((2, 3)) @ noise
        if bool(noise.sqrt().max() * 255 <= 1 / 16):  # not where it is NaN
            state["fusion.bias"] = state["fusion.bias"] + offset
            state["body_conv.weight"] = state["body_conv.weight"] * scale.view(1, -1, 1, 1)
            state["body_conv.bias"] = state["body_conv.bias"] - offset
        else:
            state["body_norm.weight"], state["body_norm.bias"] = scale.view(-1, 1, 1, 1), shift
        state.update({f"tail.{name}": value for name, value in tail.items()})
        state["tail.bias"] = state["tail.bias"] + self.mean.flatten().repeat_interleave(self.scale**2)
        return state


class FusedAetherBlock(nn.Module):
    """AetherBlock as plain convolutions: (N, C, H, W) -> (N, C, H, W)."""

    STRIP = 1536  # pixels per thread, see forward
    bound: Optional[float] = None

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        channels, kernel = options["embed_dim"], options["lk_kernel"]
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
EDGES = {"top": (2, -1), "bottom": (2, 1), "left": (3, -1), "right": (3, 1)}  # as (dimension, side)
BORDER_LINES = {1: 1, 2: 1, 3: 1, 4: 2, 8: 2}  # by scale: how many lines of pixels a correction sees
Masks = Dict[Tuple[int, int], List[Tensor]]  # by edge


def outermost(x: Tensor, edge: Tuple[int, int], k: int = 0) -> Tensor:
    """View of ``x``'s k-th row or column from an edge."""
    return x.narrow(edge[0], k if edge[1] < 0 else x.shape[edge[0]] - 1 - k, 1)


class CollapsedTail(nn.Module):
    """Every layer after the LeakyReLU, as one 5x5 convolution and one pixel shuffle.

    Features (N, C, H, W) and the network's input (N, c, H, W) -> (N, c, scale * H, scale * W). Upsampling
    convolutions, shuffles and conv_last are linear, so inside the image they are one convolution. At the
    border they pad with zeros at a higher resolution, where the one convolution still sees values. The
    difference is linear too and affects only the outermost pixels. It is added there as a convolution of the
    outermost line of features; in an exported graph under a mask, since several runtimes can't slice.
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

        # (output, its row, its column, channel, row, column)
        kernels = torch.autograd.functional.jacobian(pixel_per_image, images).unflatten(1, (3, 3))
        kernels, biases = F.pad(kernels, [2] * 4), outputs(images)[0]

        def kernel_at(row: int, column: int) -> Tuple[Tensor, Tensor]:
            """Kernel over offsets -2..2 and bias of an output in the first (-1), middle or last (1) line."""
            y, x = row + 1, column + 1  # the middle sees no border, the middle of an edge only that edge
            return kernels[:, y, x, :, 2 * y : 2 * y + 5, 2 * x : 2 * x + 5], biases[:, y, x]

        # The offsets that a correction sees: the first lines, all, the last lines.
        window = {-1: slice(2, 2 + BORDER_LINES[scale]), 0: slice(None), 1: slice(3 - BORDER_LINES[scale], 3)}
        state: Dict[str, Tensor] = dict(zip(("weight", "bias"), kernel_at(0, 0)))
        for name, (row, column) in BORDERS.items():
            terms = [(1, row, column), (-1, 0, 0)]
            if row and column:  # both edges already correct a corner
                terms = [(1, row, column), (-1, row, 0), (-1, 0, column), (1, 0, 0)]
            signed = [[k * part for part in kernel_at(y, x)] for k, y, x in terms]
            weight, state[f"{name}_bias"] = (torch.stack(parts).sum(0) for parts in zip(*signed))
            state[f"{name}_weight"] = weight[:, :, window[row], window[column]]
        return state

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=2)

    def border(self, name: str) -> Tuple[Tensor, Tensor]:
        """Weight (outputs, C, rows, columns) and bias of a correction."""
        return getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        out = self.convolve(x)
        masks = {edge: self.masks(image, *edge) for edge in EDGES.values()} if _is_traced() else {}
        for name, edge in EDGES.items():
            line = self.line(x, edge, masks)
            delta = self.correction(line, name)
            for side in ("left", "right") if edge[0] == 2 else ():  # the corners
                delta = self.added(delta, self.correction(line, f"{name}_{side}"), EDGES[side], masks)
            out = self.added(out, delta, edge, masks)
        return F.pixel_shuffle(out, self.scale)

    def masks(self, image: Tensor, dim: int, side: int) -> List[Tensor]:
        """Masks of the ``depth`` outermost rows (dim 2: (N, 1, H, 1)) or columns (dim 3), outermost first."""
        shape, padding = ((1, 1, 3, 1), (1, 0)) if dim == 2 else ((1, 1, 1, 3), (0, 1))
        shift = image.new_tensor([1, 0, 0] if side < 0 else [0, 0, 1]).view(shape)
        ones = [torch.ones_like(image.mean((1, 5 - dim), keepdim=True))]
        for _ in range(self.depth):  # each shift brings in a zero from outside
            ones.append(F.conv2d(ones[-1], shift, padding=padding))
        return [before - after for before, after in zip(ones, ones[1:])]

    def line(self, x: Tensor, edge: Tuple[int, int], masks: Masks) -> Tensor:
        """The outermost rows (N, depth * C, 1, W) or columns (N, depth * C, H, 1), as channels."""
        if masks:
            return torch.cat([(x * mask).sum(edge[0], keepdim=True) for mask in masks[edge]], 1)
        lines = [outermost(x, edge, k) for k in range(min(self.depth, x.shape[edge[0]]))]
        missing = [torch.zeros_like(lines[0])] * (self.depth - len(lines))  # beyond the other edge
        return torch.cat(lines + missing, 1)

    def correction(self, line: Tensor, name: str) -> Tensor:
        """The correction of an edge, or of one of its corners: a convolution along the line."""
        (weight, bias), (row, column) = self.border(name), BORDERS[name]
        dim, side = (2, row) if row else (3, column)
        lines = weight.unbind(dim)  # in image order, while the line's channels have the outermost first
        weight = torch.cat(lines if side < 0 else lines[::-1], 1).unsqueeze(dim)
        if row and column and self.depth > 1:  # a corner's kernel starts or ends at its pixel: centre it
            # Not F.pad: the ONNX exporter doesn't know its output's shape.
            zeros = weight.new_zeros(*weight.shape[:3], self.depth - 1)
            weight = torch.cat([zeros, weight] if column < 0 else [weight, zeros], 3)
        return F.conv2d(line, weight, bias, padding=[weight.shape[2] // 2, weight.shape[3] // 2])

    def added(self, x: Tensor, delta: Tensor, edge: Tuple[int, int], masks: Masks) -> Tensor:
        """``x`` with ``delta`` added to its outermost row or column."""
        if masks:
            return x + delta * masks[edge][0]
        outermost(x, edge).add_(outermost(delta, edge))
        return x


class FusedAetherNet(AetherBase):
    """The form to release. Computes what AetherNet does in evaluation mode, even after train().

    Its tensors have their own names, so that none is mistaken for another form's. Weights hold img_range.
    Args: AetherNet's, and ``keep_norm`` if the last norm could not be merged.
    """

    block: Type[FusedAetherBlock] = FusedAetherBlock
    warns_in_training = True

    def __init__(self, keep_norm: bool = False, **options: Any) -> None:
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
        self.set_bound(self.options["bound"])

    @classmethod
    def options_from_names(cls, names: Iterable[str]) -> Dict[str, Any]:
        return {"keep_norm": "body_norm.weight" in names}

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.warns_in_training and torch.is_grad_enabled():
            self.warns_in_training = False
            warnings.warn("AetherNet: this trains the fused form; use the training form.", stacklevel=2)
        shallow = self.head(x - self.mean)
        body = self.fusion(self.all_stages(shallow)) + shallow
        body = self.body_conv(self.body_norm(body)) + body
        return self.tail(self.conv_before_upsample(body), x)

    def fuse_model(self) -> FusedAetherNet:
        return self


def form_of(names: Iterable[str]) -> Any:
    """The class of network that has these tensor names; None if they are not an AetherNet's."""
    names = list(names)
    if any(name.endswith(".lk_conv.weight") for name in names):
        return AetherNet
    quantised = any(name.endswith(".reparam_conv.quant_out.range_sum") for name in names)
    fused = any(name.endswith(".reparam_conv.weight") for name in names)
    return _import_sibling("aether_quant").QuantAetherNet if fused and quantised else FusedAetherNet if fused else None


def scale_of(state: Mapping[str, Tensor]) -> Optional[int]:
    """The scale that a state dict's tensors upsample by; None if it is not in SCALES."""
    convs = [name for name in state if name.startswith("upsample.blocks.") and name.endswith(".weight")]
    tail = [name for name in ("tail.weight", "tail.conv.weight") if name in state]
    scale, shuffled = 2 ** len(convs), state.get("head.weight" if tail else "conv_last.weight")
    if len(tail or convs) == 1 and shuffled is not None and shuffled.dim() == 4:  # one pixel shuffle
        scale = math.isqrt(state[(tail or convs)[0]].shape[0] // max(1, shuffled.shape[1]))
    return scale if scale in SCALES and (tail or convs) else None


def differences(net: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> str:
    """Why ``net`` can't load ``state``: other shapes and, if strict, missing and unexpected names."""
    expected = {name: value.shape for name, value in net.state_dict().items() if name != "bound"}
    found = {name: value.shape for name, value in state.items() if name != "bound"}
    kinds = {"of another shape": [name for name in found if expected.get(name, found[name]) != found[name]]}
    if strict:
        kinds.update(missing=sorted({*expected} - {*found}), unexpected=sorted({*found} - {*expected}))

    texts = []
    for kind, names in sorted(kinds.items()):
        some = ", ".join([name[:80] for name in names[:3]] + ["..."] * (len(names) > 3))
        texts += [f"{kind}: {len(names)} ({some})"] if names else []
    return "; ".join(texts)


def _import_sibling(module: str) -> Any:
    """Import aether_quant, which lies beside this file, or a module of aethersr, which is installed."""
    beside = module == "aether_quant"
    try:
        return importlib.import_module(f".{module}" if beside and __package__ else module, __package__)
    except ModuleNotFoundError as error:
        if module.split(".")[0] not in (error.name or "").split("."):
            raise
        remedy = f"copy {module}.py beside {__file__}" if beside else "pip install . in AetherNet's folder"
        raise ImportError(f"{module} is missing: {remedy}.") from None


def __getattr__(name: str) -> Any:
    """Names that can be imported from here but live in other modules."""
    homes = {"export_onnx": "aethersr.onnx", "aether_from_state_dict": "aethersr.identify"}
    homes.update(dict.fromkeys(("QuantAetherNet", "Quantizer", "PLACEMENTS", "TARGETS"), "aether_quant"))
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_sibling(homes[name]), name)


def _is_traced() -> bool:
    """Whether an exporter or a compiler is recording the operations instead of just running them."""
    compiling = getattr(getattr(torch, "compiler", None), "is_compiling", None)
    return torch.jit.is_tracing() or bool(compiling and compiling())


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
    several = isinstance(depths, (list, tuple)) and len(depths) > 0
    check("depths", several and all(map(whole, depths)), "a list of whole numbers from 1")
    divisible = whole(width) and width % len(depths) == 0
    check("embed_dim", divisible, f"a multiple of {len(depths)}, the number of stages in depths")
    least = max(scale // 2, 8 * (options["use_channel_attn"] is True))
    check("embed_dim", width >= least, f"{least} or more, for this scale and attention")
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
    bound, limits = options["bound"], "a number above 0 (1e-3 to 1e6), or nothing"
    check("bound", bound is None or number(bound, 1e-3, 1e6), limits)
    check("norm", options["norm"] in (None, "frozen", "batch"), "frozen, batch, or nothing")


@torch.no_grad()
def _initialize(net: AetherNet) -> None:
    """Start as an interpolation: blocks are identities, and the first channels carry the image.

    Kernels inside blocks keep the size of their input: with small ones the gated product would leave conv_out
    no gradient. A value passes LeakyReLU as a pair: lrelu(v) - lrelu(-v) = 1.01 v. A network too narrow for
    that starts from random weights.
    """
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            if conv.bias is not None:
                conv.bias.zero_()
    for block in net.stages.modules():
        if isinstance(block, AetherBlock):
            for conv in (block.conv.lk_conv, block.ffn.conv_gate, block.ffn.conv_main):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            nn.init.dirac_(block.conv.sk_conv.weight, groups=block.conv.sk_conv.groups)
            block.ffn.conv_out.weight.zero_()
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


def _variant(name: str, doc: str, width: int, depths: Tuple[int, ...], attention: bool) -> Any:
    """A function that builds this variant. Options: AetherNet's, and ``qat`` (true, or a placement)."""
    own = {"embed_dim": width, "depths": depths, "use_channel_attn": attention, "use_spatial_attn": attention}
    parameters = inspect.signature(AetherNet).parameters.values()
    options = [option.replace(default=own.get(option.name, option.default)) for option in parameters]
    qat = inspect.Parameter("qat", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool | str")
    signature = inspect.Signature([*options, qat], return_annotation="AetherBase")

    def build(*args: Any, qat: Any = False, **given: Any) -> AetherBase:
        net = AetherNet(**{**own, **signature.bind(*args, **given).arguments})
        return net if qat is False else _import_sibling("aether_quant").insert_quantizers(net, qat)

    vars(build).update(__signature__=signature)  # for the frameworks' documentation tools
    build.__name__, build.__qualname__, build.__doc__ = name, name, doc
    return build


aether_small = _variant("aether_small", "Fast: 1.5 million parameters at x4.", 96, (4, 4, 4, 4), False)
aether_medium = _variant("aether_medium", "Balanced: 3.7 million parameters at x4.", 128, (6, 6, 6, 6), True)
aether_large = _variant("aether_large", "Best: 10.6 million parameters at x4.", 180, (8, 8, 8, 8, 8), True)
VARIANTS = (aether_small, aether_medium, aether_large)


def _register(framework: str) -> None:
    """Register the variants in the framework whose ``archs`` folder this file lies in."""
    registry = importlib.import_module(f"{framework}.utils.registry").ARCH_REGISTRY
    for variant in VARIANTS:
        if variant.__name__ in registry:
            raise ImportError(f"{variant.__name__} is in {framework} already; keep one copy of {__file__}.")

        @functools.wraps(variant)
        def build(*args: Any, _variant: Callable[..., AetherBase] = variant, **options: Any) -> AetherBase:
            if framework == "neosr" and not args and "scale" not in options:  # neosr keeps the scale itself
                options["scale"] = importlib.import_module("neosr.archs.arch_util").net_opt()[0]
            net = _variant(*args, **options)
            if framework == "basicsr":  # its EMA copies no buffers: norm statistics would never be updated
                for norm in [module for module in net.modules() if isinstance(module, DeploymentNorm)]:
                    for name in ("running_mean", "running_var"):
                        value: Any = norm._buffers.pop(name)
                        norm.register_parameter(name, nn.Parameter(value, requires_grad=False))
            return net

        registry.register(build)


if __package__ in ("basicsr.archs", "neosr.archs", "traiNNer.archs"):
    _register(__package__.split(".")[0])
