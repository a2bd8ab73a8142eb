"""AetherNet: single-image super-resolution made to be fused, exported and quantised.

One file, needs only torch (1.13 or newer, Python 3.8 or newer). Copy it unchanged into ``neosr/archs/``, ``traiNNer/archs/`` or
``basicsr/archs/`` and it registers ``aether_small``, ``aether_medium`` and ``aether_large`` there; imported alone it imports no
framework. A network has one of three forms, each a class of its own:

    AetherNet       the training form: two depthwise branches, norms with running statistics, separate reconstruction layers
    FusedAetherNet  the same function as plain convolutions, activations, attention and additions
    QuantAetherNet  the fused form with fake quantisation, for quantisation-aware training and INT8

``model.fuse_model()`` turns the first into the second, ``model.prepare_qat()`` into the third; ``eval()`` and ``train()`` never do.
Loading a state dict gives the network the form of the file.

In this order: blocks, training form, fused form, quantised form, helpers (options, initialisation), reading a state dict, export, variants,
registration.

Source: https://github.com/phhofm (AetherNet by Philip Hofmann). Licence: MIT.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
import warnings
from typing import Any, ClassVar, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__version__ = "0.1.0"
SCALES = (1, 2, 3, 4, 8)
PLACEMENTS = ("default", "full")  # of quantisers, see QuantAetherNet
TARGETS = ("onnxruntime", "tensorrt", "openvino")  # of an int8 export
# First (one pixel shuffle, a scale for each channel) and last of the exporter; the two of int8 that ONNX Runtime 1.31 opens, too.
OPSETS = {"fp32": (11, 23), "fp16": (11, 23), "int8": (13, 23), "int8 tensorrt": (13, 20), "int8 openvino": (13, 20)}


# ---------------------------------------------------------------------------------------------------------------- blocks


class _DepthwiseConv(torch.autograd.Function):
    """F.conv2d(x, weight, bias, padding="same", groups=channels) with a fast gradient of the weight on CPU.

    oneDNN has none for depthwise convolutions, and its fallback takes most of a training step. But that gradient is itself a depthwise
    convolution, of every input channel with its output gradient as the kernel, summed over the batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = (value.to(grad.dtype) for value in ctx.saved_tensors)  # autocast computed in another precision than it was given
        (batch, channels, height, width), padding = x.shape, weight.shape[-1] // 2
        options: Any = ([1, 1], [padding, padding], [1, 1], False, [0, 0], channels)
        grad_x = torch.ops.aten.convolution_backward(grad, x, weight, None, *options, [True, False, False])[0]
        planes, kernels = x.reshape(1, batch * channels, height, width), grad.reshape(batch * channels, 1, height, width)
        grad_weight = F.conv2d(planes, kernels, padding=padding, groups=batch * channels).view(batch, *weight.shape).sum(0)
        return grad_x, grad_weight, grad.sum((0, 2, 3))


def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    """F.conv2d with "same" padding, one kernel for each channel."""
    if training and x.device.type == "cpu" and torch.is_grad_enabled() and weight.shape[-1] > 3:
        return _DepthwiseConv.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def _training_layout(x: Tensor, training: bool) -> Tensor:
    """On a CPU the weight gradient of a large depthwise kernel is several times faster in channels_last."""
    return x.contiguous(memory_format=torch.channels_last) if training and x.device.type == "cpu" else x


class ReparamLargeKernelConv(nn.Module):
    """Depthwise convolution with a large and a small kernel in parallel: ``lk(x) + sk(x)``, (N, C, H, W) -> (N, C, H, W).

    Both branches are linear and nothing stands inside a branch, so one convolution with the summed kernel gives the same output
    and the same gradients in one pass. Reference: RepLKNet, https://arxiv.org/abs/2203.06717
    """

    def __init__(self, channels: int, lk_kernel: int, sk_kernel: int) -> None:
        super().__init__()
        self.lk_conv = nn.Conv2d(channels, channels, lk_kernel, padding=lk_kernel // 2, groups=channels, bias=False)
        self.sk_conv = nn.Conv2d(channels, channels, sk_kernel, padding=sk_kernel // 2, groups=channels, bias=False)
        self.lk_bias = nn.Parameter(torch.zeros(channels))
        self.sk_bias = nn.Parameter(torch.zeros(channels))

    def reparameterize(self) -> Tuple[Tensor, Tensor]:
        """Weight (C, 1, K, K) and bias (C,) of the one convolution that equals both branches."""
        border = (self.lk_conv.kernel_size[0] - self.sk_conv.kernel_size[0]) // 2
        return self.lk_conv.weight + F.pad(self.sk_conv.weight, [border] * 4), self.lk_bias + self.sk_bias

    def forward(self, x: Tensor) -> Tensor:
        return _depthwise_conv(x, *self.reparameterize(), self.training)


class DeploymentNorm(nn.Module):
    """Per-channel norm over (N, H, W) whose evaluation form is a scale and a shift.

    As BatchNorm, but the running variance is the biased one and every tensor has the shape (1, C, 1, 1). With ``renorm`` the training
    output is normalised with the running statistics too, while gradients flow through the batch's: Batch Renormalization,
    https://arxiv.org/abs/1702.03275, which ends the drift between training and validation at small batches.
    """

    eps = 1e-5
    momentum = 0.1
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, renorm: bool = False) -> None:
        super().__init__()
        self.renorm = renorm
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        """The evaluation form ``x * scale + shift``, both (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale.flatten(), (self.bias - self.running_mean * scale).flatten()

    def statistics_to_parameters(self) -> None:
        """Hold the statistics as parameters without gradient, for an averaging that visits parameters only; names stay the same."""
        for name in ("running_mean", "running_var"):
            value: Tensor = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if not self.training:
            return F.batch_norm(x, self.running_mean.flatten(), self.running_var.flatten(), weight, bias, eps=self.eps)
        affine = (torch.ones_like(weight), torch.zeros_like(bias)) if self.renorm else (weight, bias)
        out, mean, invstd = torch.native_batch_norm(x, *affine, None, None, True, 0.0, self.eps)
        with torch.no_grad():
            # float32 under autocast too, but not in what torch.compile knows of a CPU
            mean, invstd = (value.to(self.running_mean.dtype).view_as(self.running_mean) for value in (mean, invstd))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(invstd.pow(-2) - self.eps, self.momentum)
            if self.renorm:
                running_invstd = (self.running_var + self.eps).rsqrt()
                ratio, offset = running_invstd / invstd, (mean - self.running_mean) * running_invstd
        if self.renorm:
            out = out * (self.weight * ratio).to(out.dtype) + (self.bias + self.weight * offset).to(out.dtype)
        return out


class GatedConvFFN(nn.Module):
    """Gated feed-forward layer: ``conv_out(SiLU(conv_gate(x) * temperature) * conv_main(x))``, all 1x1.

    Reference: GLU variants, https://arxiv.org/abs/2002.05202
    """

    def __init__(self, channels: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.conv_gate = nn.Conv2d(channels, hidden, 1)
        self.conv_main = nn.Conv2d(channels, hidden, 1)
        self.conv_out = nn.Conv2d(hidden, channels, 1)
        self.temperature = nn.Parameter(torch.ones(1))
        self.drop1 = nn.Dropout(drop)
        self.drop2 = nn.Dropout(drop)

    def reparameterize(self) -> Tuple[Tensor, Tensor]:
        """Weight and bias of the gate with the temperature in them: a pass over weights instead of one over pixels."""
        return self.conv_gate.weight * self.temperature, _bias(self.conv_gate) * self.temperature

    def forward(self, x: Tensor) -> Tensor:
        gate = F.conv2d(x, *self.reparameterize())
        return self.drop2(self.conv_out(self.drop1(F.silu(gate) * self.conv_main(x))))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation over the global average. Reference: https://arxiv.org/abs/1709.01507"""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def weights(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class SpatialAttention(nn.Module):
    """Attention over pixels from the channels' maximum and mean. Reference: CBAM, https://arxiv.org/abs/1807.06521"""

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class DropPath(nn.Module):
    """Drops a sample's whole residual branch in training. Reference: https://arxiv.org/abs/1603.09382"""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1.0 - self.rate)
        return x * (keep / (1.0 - self.rate))


class AetherBlock(nn.Module):
    """``x + drop_path(attention(ffn(norm(conv(x)))))``, (N, C, H, W) -> (N, C, H, W).

    ``bound`` limits what the norm gives to [-bound, bound]. In training an outlier takes part in its own statistics, which limits it; in
    evaluation nothing does, and gated products that square it block by block end beyond every number.
    """

    bound: Optional[float] = None  # see AetherBase.set_bound

    def __init__(
        self,
        channels: int,
        hidden: int,
        lk_kernel: int,
        sk_kernel: int,
        drop: float,
        drop_path: float,
        channel_attn: bool,
        spatial_attn: bool,
        renorm: bool,
    ) -> None:
        super().__init__()
        self.conv = ReparamLargeKernelConv(channels, lk_kernel, sk_kernel)
        self.norm = DeploymentNorm(channels, renorm)
        self.ffn = GatedConvFFN(channels, hidden, drop)
        self.channel_attn = ChannelAttention(channels) if channel_attn else nn.Identity()
        self.spatial_attn = SpatialAttention() if spatial_attn else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def reparameterize(self) -> Dict[str, Tensor]:
        """State dict of the FusedAetherBlock that computes the same: the norm lies in the depthwise kernel, the temperature in the gate."""
        weight, bias = self.conv.reparameterize()
        scale, shift = self.norm.scale_and_shift()
        gate_weight, gate_bias = self.ffn.reparameterize()
        state = {"reparam_conv.weight": weight * scale.view(-1, 1, 1, 1), "reparam_conv.bias": bias * scale + shift}
        state.update({"gate_conv.weight": gate_weight, "gate_conv.bias": gate_bias})
        state.update(_state_of(self.ffn.conv_main, "main_conv."))
        state.update(_state_of(self.ffn.conv_out, "out_conv."))
        state.update(_state_of(self.channel_attn, "channel_attn."))
        state.update(_state_of(self.spatial_attn, "spatial_attn."))
        return state

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.bound is not None:
            out = out.clamp(-self.bound, self.bound)
        return x + self.drop_path(self.spatial_attn(self.channel_attn(self.ffn(out))))


class QuantFusion(nn.Module):
    """1x1 fusion of the concatenated stage outputs with a learned offset before it: ``fusion_conv(x + error_comp)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.error_comp = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.fusion_conv = nn.Conv2d(channels, channels, 1)

    def reparameterize(self) -> Tuple[Tensor, Tensor]:
        """Weight and bias of the one 1x1 convolution that equals this layer."""
        weight = self.fusion_conv.weight
        return weight, _bias(self.fusion_conv) + weight.flatten(1) @ self.error_comp.flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion_conv(x + self.error_comp)


class AdaptiveUpsample(nn.Module):
    """Convolutions and pixel shuffles, no activation: (N, C, H, W) -> (N, out_channels, scale * H, scale * W).

    Reference: https://arxiv.org/abs/1609.05158
    """

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.out_channels = max(32, channels // max(1, scale // 2))
        steps = [scale] if scale in (1, 3) else [2] * int(math.log2(scale))
        blocks: List[nn.Module] = []
        for k, step in enumerate(steps, 1):
            width = self.out_channels if k == len(steps) else channels // 2
            blocks.append(nn.Conv2d(channels, step**2 * width, 3, padding=1))
            if step > 1:
                blocks.append(nn.PixelShuffle(step))
            channels = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


# --------------------------------------------------------------------------------------------------------- training form


class AetherBase(nn.Module):
    """What both forms share: options, the change of form, and loading. Build an AetherNet instead."""

    options: Dict[str, Any]
    mean: Tensor
    scale: int

    def fused(self) -> FusedAetherNet:
        """A fused deep copy in evaluation mode; this network stays as it is."""
        return copy.deepcopy(self).eval().fuse_model()

    def fuse_model(self) -> FusedAetherNet:
        """Turn this network into a FusedAetherNet in place (the same object, the same function in evaluation mode) and return it."""
        raise NotImplementedError

    def prepare_qat(self, placement: str = "default", calibration: Optional[Iterable[Tensor]] = None) -> QuantAetherNet:
        """Fuse this network and insert fake quantisation, in place, for fine-tuning; an optimizer is to be made afterwards.

        Args:
            placement: "default" or "full", see QuantAetherNet.
            calibration: images, each (N, in_chans, H, W) in [0, 1], for the first ranges; default: synthetic ones. Training sets them anew.
        """
        self.insert_quantizers(placement).calibrate(_test_pictures(self.options["in_chans"]) if calibration is None else calibration)
        return self  # type: ignore[return-value]

    def insert_quantizers(self, placement: str = "default") -> QuantAetherNet:
        """prepare_qat without its calibration: ranges are unknown, and until the first training batch nothing is rounded."""
        state = self.fuse_model().state_dict()
        self.become(QuantAetherNet, placement=placement, keep_norm="body_norm.weight" in state)
        self.load_state_dict(state)
        return self  # type: ignore[return-value]

    def convert_to_quantized(self) -> QuantAetherNet:
        raise ValueError("convert_to_quantized: call prepare_qat() first, and fine-tune.")

    def set_bound(self, bound: Optional[float]) -> None:
        """Limit what every block's norm gives; None: not at all. The bound is in the state dict; parameters stay the objects that they are."""
        self.options = {**self.options, "bound": bound}
        self._buffers.pop("bound", None)
        if bound is not None:
            self.register_buffer("bound", self.mean.new_full((1,), bound))
        for block in self.modules():
            if isinstance(block, (AetherBlock, FusedAetherBlock)):
                block.bound = bound
            if isinstance(block, QuantAetherBlock):
                block.reparam_conv.quant_out.limit = bound  # type: ignore[union-attr]

    def become(self, form: Type[AetherBase], **extra: Any) -> None:
        """Take another form, with fresh weights: the object stays the same, so that whoever holds it sees the new form."""
        like = next(self.parameters())
        other = form(**self.options, **extra).to(device=like.device, dtype=like.dtype).train(self.training)
        if any(value.dim() == 4 and not value.is_contiguous() for value in self.parameters()):
            other = other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.__class__ = form  # as torch.nn.utils.parametrize does: a module's forward belongs to its class
        self.training = other.training
        self._parameters, self._buffers, self._modules = other._parameters, other._buffers, other._modules
        for name in ("keep_norm", "placement", "stored"):  # what a form knows besides the options
            self.__dict__.pop(name, None)
            if name in other.__dict__:
                setattr(self, name, getattr(other, name))

    def map_state_dict(self, state_dict: Dict[str, Tensor], prefix: str = "") -> Dict[str, Tensor]:
        """Give this network the form of ``state_dict``; an older fused form is rewritten in place as the training form it equals.

        Every load_state_dict comes through here, so no value is ever taken for one of the other form. traiNNer-redux calls this by name
        before it compares keys.
        """
        names = [name[len(prefix) :] for name in state_dict if name.startswith(prefix)]
        form = state_dict_form(names)
        bound = float(state_dict[prefix + "bound"]) if "bound" in names else None
        if form is not None and bound != self.options.get("bound"):
            self.set_bound(bound)
        if form == "older fused":
            _older_fused_to_training(state_dict, prefix, self.options["sk_kernel"])
            form = "training"
        if isinstance(self, QuantAetherNet) and form in ("training", "fused"):
            self._quantise_state_dict(state_dict, prefix, form)
        elif form == "training":
            if not isinstance(self, AetherNet):
                self.become(AetherNet)
        elif form is not None:
            cls, extra = _form_class(form, names)
            if type(self) is not cls or any(getattr(self, name) != value for name, value in extra.items()):
                self.become(cls, **extra)
        return state_dict

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.map_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AetherNet(AetherBase):
    """AetherNet in its training form: (N, in_chans, H, W) in [0, 1] -> (N, in_chans, scale * H, scale * W); any H, W >= 1.

    Args:
        scale: 1, 2, 3, 4 or 8.
        in_chans: image channels in and out.
        embed_dim: width C of the body; divisible by the number of stages.
        depths: blocks in each stage.
        mlp_ratio: hidden channels of a block's feed-forward layer are int(C * mlp_ratio).
        lk_kernel, sk_kernel: the two depthwise kernels, odd, sk_kernel <= lk_kernel.
        drop, drop_path_rate: dropout, and the last block's stochastic depth, both in [0, 1).
        img_range: the network works on (x - mean) * img_range.
        use_channel_attn, use_spatial_attn: attention at the end of every block.
        batch_renorm: normalise with the running statistics in training too (see DeploymentNorm); for batches of 8 and fewer.
        bound: limit of what a block's norm gives, so that no picture makes the network run away; None: no limit. Part of the function and of
            the state dict: loading a file takes the file's.

    Raises:
        ValueError: an option is impossible; the message names it, its value and what is allowed.
    """

    def __init__(
        self,
        scale: int = 4,
        in_chans: int = 3,
        embed_dim: int = 128,
        depths: Sequence[int] = (6, 6, 6, 6),
        mlp_ratio: float = 2.0,
        lk_kernel: int = 11,
        sk_kernel: int = 3,
        drop: float = 0.0,
        drop_path_rate: float = 0.1,
        img_range: float = 1.0,
        use_channel_attn: bool = True,
        use_spatial_attn: bool = True,
        batch_renorm: bool = False,
        bound: Optional[float] = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check_options(options)
        super().__init__()
        self.options = options
        self.scale, self.img_range = scale, float(img_range)
        hidden = int(embed_dim * mlp_ratio)
        rates = [drop_path_rate * k / max(1, sum(depths) - 1) for k in range(sum(depths))]

        self.register_buffer("mean", torch.full((1, in_chans, 1, 1), 0.5))
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.stages = nn.ModuleList()
        for depth in depths:
            attention = (use_channel_attn, use_spatial_attn)
            blocks = [AetherBlock(embed_dim, hidden, lk_kernel, sk_kernel, drop, rates.pop(0), *attention, batch_renorm) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.fusion_convs = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim // len(depths), 1) for _ in depths)
        self.quant_fusion_layer = QuantFusion(embed_dim)
        self.norm = DeploymentNorm(embed_dim, batch_renorm)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, embed_dim, 3, padding=1), nn.LeakyReLU(0.01))
        self.upsample = AdaptiveUpsample(embed_dim, scale)
        self.conv_last = nn.Conv2d(self.upsample.out_channels, in_chans, 3, padding=1)
        self.set_bound(bound)
        self.apply(_init_weights)
        _init_as_interpolation(self)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.conv_first((_training_layout(x, self.training) - self.mean) * self.img_range)
        out, features = shallow, []
        for stage, fusion_conv in zip(self.stages, self.fusion_convs):
            out = stage(out)
            features.append(fusion_conv(out))
        body = self.quant_fusion_layer(torch.cat(features, 1)) + shallow
        body = self.conv_after_body(self.norm(body)) + body
        out = self.conv_last(self.upsample(self.conv_before_upsample(body)))
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.average_statistics()
        return out / self.img_range + self.mean

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Give every process the mean of all processes' norm statistics, in one collective: else rank 0's data alone would decide them.

        Every process must call forward in training mode equally often, as in any data-parallel training.
        """
        norms = [module for module in self.modules() if isinstance(module, DeploymentNorm)]
        statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
        flat = torch.cat([value.flatten() for value in statistics])
        torch.distributed.all_reduce(flat)
        for value, mean in zip(statistics, (flat / torch.distributed.get_world_size()).split([value.numel() for value in statistics])):
            value.copy_(mean.view_as(value))

    @torch.no_grad()
    def fuse_model(self) -> FusedAetherNet:
        """Turn this network into a FusedAetherNet in place (the same object, the same function in evaluation mode) and return it.

        An optimizer made before still holds the old parameters: fuse after training.
        """
        state = copy.deepcopy(self).cpu().double().reparameterize()
        self.become(FusedAetherNet, keep_norm="body_norm.weight" in state)
        self.load_state_dict(state)
        return self  # type: ignore[return-value]

    def reparameterize(self) -> Dict[str, Tensor]:
        """State dict of the FusedAetherNet that computes the same, in this network's precision."""
        state = {name: value for name, value in self.named_buffers(recurse=False)}
        state.update({"head.weight": self.conv_first.weight * self.img_range, "head.bias": _bias(self.conv_first)})
        for name, block in self.stages.named_modules():
            if isinstance(block, AetherBlock):
                state.update({f"stages.{name}.{key}": value for key, value in block.reparameterize().items()})
        state.update(_state_of(self.fusion_convs, "fusion_convs."))
        state["fusion.weight"], state["fusion.bias"] = self.quant_fusion_layer.reparameterize()
        state.update(_state_of(self.conv_after_body, "body_conv."))
        scale, shift = self.norm.scale_and_shift()
        # conv(s * b + t) + b = conv'(b') + b' - t/s with b' = b + t/s. Where s is small beside t the sum b + t/s would drown b in rounding:
        # then the norm stays, as a depthwise 1x1 convolution.
        if bool((self.norm.bias.abs() <= 16 * self.norm.weight.abs()).all()):
            offset = torch.where(scale == 0, torch.zeros_like(shift), shift / scale)
            state["fusion.bias"] = state["fusion.bias"] + offset
            state["body_conv.weight"] = state["body_conv.weight"] * scale.view(1, -1, 1, 1)
            state["body_conv.bias"] = state["body_conv.bias"] - offset
        else:
            state["body_norm.weight"], state["body_norm.bias"] = scale.view(-1, 1, 1, 1), shift
        state.update(_state_of(self.conv_before_upsample, "conv_before_upsample."))
        tail = nn.Sequential(self.upsample, self.conv_last)
        state.update({f"tail.{name}": value / self.img_range for name, value in CollapsedTail.collapse(tail, self.scale).items()})
        state["tail.bias"] = state["tail.bias"] + self.mean.flatten().repeat_interleave(self.scale**2)
        return state


# ------------------------------------------------------------------------------------------------------------ fused form


class FusedAetherBlock(nn.Module):
    """AetherBlock as plain convolutions: (N, C, H, W) -> (N, C, H, W)."""

    STRIP = 1536  # pixels for each thread at once, see forward
    bound: Optional[float] = None  # see AetherBase.set_bound

    def __init__(self, channels: int, hidden: int, kernel: int, channel_attn: bool, spatial_attn: bool) -> None:
        super().__init__()
        self.reparam_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.gate_conv = nn.Conv2d(channels, hidden, 1)
        self.main_conv = nn.Conv2d(channels, hidden, 1)
        self.out_conv = nn.Conv2d(hidden, channels, 1)
        self.channel_attn = ChannelAttention(channels) if channel_attn else nn.Identity()
        self.spatial_attn = SpatialAttention() if spatial_attn else nn.Identity()

    def feed_forward(self, x: Tensor) -> Tensor:
        # In place where nobody else holds the tensor: fetching fresh memory for a large one takes as long as the operation itself.
        if self.bound is not None:
            x.clamp_(-self.bound, self.bound)
        hidden = F.silu(self.gate_conv(x), inplace=True)
        hidden *= self.main_conv(x)
        return self.out_conv(hidden)

    def forward(self, x: Tensor) -> Tensor:
        out = self.reparam_conv(x)
        eager = _eager_on_cpu(x)
        rows = self.STRIP * torch.get_num_threads() // (x.shape[0] * x.shape[3]) if eager else x.shape[2]
        if rows < x.shape[2]:  # the hidden tensor, wider than all others, then stays in each core's cache and takes next to no memory
            for strip in out.split(max(1, rows), 2):
                strip.copy_(self.feed_forward(strip))
        else:
            out = self.feed_forward(out)
        for attention in (self.channel_attn, self.spatial_attn):
            if eager and not isinstance(attention, nn.Identity):
                out *= attention.weights(out)
            else:
                out = attention(out)
        out += x
        return out


class CollapsedTail(nn.Module):
    """Every layer after the LeakyReLU as one 5x5 convolution and one pixel shuffle: (N, C, H, W) -> (N, out, scale * H, scale * W).

    Upsampling convolutions, shuffles and conv_last are linear, so inside the image they are one convolution. At the border they are not:
    they pad with zeros at a higher resolution, where the one convolution still sees something. The difference touches the outermost
    low-resolution pixels only and is linear too: it is added by a small convolution for each edge and corner.
    """

    # Where each correction lands, as (row, column): -1 the first, 1 the last, 0 all of them.
    BORDERS: ClassVar[Dict[str, Tuple[int, int]]] = {
        "top": (-1, 0), "bottom": (1, 0), "left": (0, -1), "right": (0, 1),
        "top_left": (-1, -1), "top_right": (-1, 1), "bottom_left": (1, -1), "bottom_right": (1, 1),
    }  # fmt: skip

    def __init__(self, channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale, self.stored = scale, False
        self.depth = self.depth_at(scale)
        outputs = out_channels * scale**2
        self.weight = nn.Parameter(torch.zeros(outputs, channels, 5, 5))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for name, sides in self.BORDERS.items():
            kernel = [self.depth if side else 5 for side in sides]
            setattr(self, f"{name}_weight", nn.Parameter(torch.zeros(outputs, channels, *kernel)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(outputs)))

    @classmethod
    def collapse(cls, tail: nn.Module, scale: int) -> Dict[str, Tensor]:
        """State dict of the CollapsedTail that equals ``tail``, read off a 5x5 image: kernels are gradients of outputs by inputs.

        The middle pixel sees no border there, a pixel in the middle of an edge its edge only, and a corner its two edges.
        """
        like = next(tail.parameters())
        zero = F.pixel_unshuffle(tail(like.new_zeros(1, like.shape[1], 5, 5)), scale)[0]
        outputs = len(zero)
        with torch.enable_grad():
            image = like.new_zeros(outputs * 9, like.shape[1], 5, 5).requires_grad_()
            out = F.pixel_unshuffle(tail(image), scale)[..., ::2, ::2].reshape(outputs, 3, 3, outputs, 3, 3)
            (kernels,) = torch.autograd.grad(torch.einsum("oyxoyx->", out), image)
        kernels = F.pad(kernels.view(outputs, 3, 3, -1, 5, 5), (2, 2, 2, 2))  # (output, its row, its column, channel, row, column)

        def seen_from(row: int, column: int) -> List[Tensor]:
            """Kernel over offsets -2..2 (zero outside the image) and bias of the output in the first (-1), middle or last row and column."""
            y, x = 2 * (row + 1), 2 * (column + 1)
            return [kernels[:, row + 1, column + 1, :, y : y + 5, x : x + 5], zero[:, y, x]]

        def correction(row: int, column: int) -> List[Tensor]:
            return [here - inside for here, inside in zip(seen_from(row, column), seen_from(0, 0))]

        depth = cls.depth_at(scale)
        window = {-1: slice(2, 2 + depth), 0: slice(0, 5), 1: slice(3 - depth, 3)}  # offsets 0..depth-1, all, 1-depth..0
        state = dict(zip(("weight", "bias"), seen_from(0, 0)))
        for name, (row, column) in cls.BORDERS.items():
            weight, bias = correction(row, column)
            if row and column:  # both edges act on a corner already
                for edge_weight, edge_bias in (correction(row, 0), correction(0, column)):
                    weight, bias = weight - edge_weight, bias - edge_bias
            state[f"{name}_weight"], state[f"{name}_bias"] = weight[:, :, window[row], window[column]], bias
        return state

    @staticmethod
    def depth_at(scale: int) -> int:
        """Pixels, from the border inwards, that a correction depends on: one more where zeros are padded at two resolutions."""
        return 1 if scale <= 3 else 2

    def _correction(self, x: Tensor, name: str) -> Tensor:
        """What one edge (a row or a column) or corner (a pixel) must add to the one convolution."""
        sides = self.BORDERS[name]
        for dim, side in zip((2, 3), sides):
            if side:
                x = x[_border(dim, side, self.depth)]
        weight, bias = (getattr(self, f"{name}_{part}").to(x.dtype) for part in ("weight", "bias"))
        if self.stored:
            weight = weight * getattr(self, f"{name}_weight_scale")
        # Padded for an image that is smaller than the kernel, by the convolution: ONNX's shape inference does not see through F.pad as traced.
        out = F.conv2d(x, weight, bias, padding=[self.depth - 1 if side else 2 for side in sides])
        for dim, side in zip((2, 3), sides):
            if side:  # where the kernel begins at the first row or ends at the last
                begin = self.depth - 1 if side < 0 else -self.depth
                out = out[(slice(None),) * dim + (slice(begin, begin + 1 or None),)]
        return out

    def store(self) -> None:
        """Hold the corrections as int8, which at the border is exact enough; the one convolution, where it is held here, as half."""
        self.stored = True
        for name in self.BORDERS:
            _store_int8(self, f"{name}_weight", getattr(self, f"{name}_weight"))
        for value in self.parameters(recurse=False):
            value.data = value.data.half()

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.convolve(x)
        for side, name in ((-1, "top"), (1, "bottom")):
            row = self._correction(x, name)
            row = _add_at_border(row, self._correction(x, f"{name}_left"), 3, -1)
            row = _add_at_border(row, self._correction(x, f"{name}_right"), 3, 1)
            out = _add_at_border(out, row, 2, side)
        for side, name in ((-1, "left"), (1, "right")):
            out = _add_at_border(out, self._correction(x, name), 3, side)
        return F.pixel_shuffle(out, self.scale)


class FusedAetherNet(AetherBase):
    """AetherNet after fusing, the form to release: the same function as AetherNet's in evaluation mode, in train() too.

    Its tensors have names of their own, so that a value of one form is never read as one of the other. ``img_range`` lies in the weights.
    Args: the options of AetherNet; ``keep_norm`` when the last norm could not be baked (see AetherNet.reparameterize).
    """

    block: Type[FusedAetherBlock] = FusedAetherBlock

    def __init__(self, keep_norm: bool = False, **options: Any) -> None:
        super().__init__()
        self.options, self.keep_norm = options, keep_norm
        self.scale = options["scale"]
        in_chans, channels, depths = options["in_chans"], options["embed_dim"], options["depths"]
        hidden, kernel = int(channels * options["mlp_ratio"]), options["lk_kernel"]
        attention = (options["use_channel_attn"], options["use_spatial_attn"])
        self.register_buffer("mean", torch.full((1, in_chans, 1, 1), 0.5))
        self.head = nn.Conv2d(in_chans, channels, 3, padding=1)
        self.stages = nn.ModuleList(nn.Sequential(*(self.block(channels, hidden, kernel, *attention) for _ in range(depth))) for depth in depths)
        self.fusion_convs = nn.ModuleList(nn.Conv2d(channels, channels // len(depths), 1) for _ in depths)
        self.fusion = nn.Conv2d(channels, channels, 1)
        self.body_norm = nn.Conv2d(channels, channels, 1, groups=channels) if keep_norm else nn.Identity()
        self.body_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.01))
        self.tail = CollapsedTail(channels, in_chans, self.scale)
        self.set_bound(options.get("bound"))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.head(x - self.mean)
        out, features = shallow, []
        for stage, fusion_conv in zip(self.stages, self.fusion_convs):
            out = stage(out)
            features.append(fusion_conv(out))
        body = self.fusion(torch.cat(features, 1)) + shallow
        body = self.body_conv(self.body_norm(body)) + body
        return self.tail(self.conv_before_upsample(body))

    def fuse_model(self) -> FusedAetherNet:
        return self


# -------------------------------------------------------------------------------------------------------- quantised form


class Quantizer(nn.Module):
    """Fake quantisation: rounds a tensor, (N, ...), to the 256 values that 8 bits hold, one scale for all of it.

    Reference: https://arxiv.org/abs/1712.05877. The range follows the first ``WATCH`` training batches, then stays; before the first it is
    unknown and nothing is rounded. It is a moving average of the largest value that the middle image of a batch brings about: where one
    image in ten drives a layer a hundred times as far as the others do, the batch's largest value leaves no steps for those. Its state is
    float parameters without gradient, because frameworks average those and not every buffer, and a sum beside its count, because an
    average of both that starts at zero still has the right quotient.

    Args:
        low: the smallest value, where a function has one (sigmoid, SiLU); None: symmetric about zero, as TensorRT wants it.
        low_ratio: in place of ``low``, where it is a fraction of the largest value (LeakyReLU).
        high: the largest value, where it is known (a picture); else it is watched.
        spread: how many times as far as the middle image others may go and be held too. Where the picture itself runs through,
            saturated colours must not be cut; elsewhere finer steps are worth more than what is cut.
    """

    WATCH = 100
    limit: Optional[float] = None  # the network's bound; no range goes beyond, so rounding applies it too
    margin = 1.2  # training's crops show less of what is largest than pictures do; calibrate, which sees pictures, needs none
    enabled = True
    signed = False  # int8 about zero instead of uint8 about 128: the same values; which one is fast is the runtime's affair

    def __init__(self, low: Optional[float] = None, low_ratio: Optional[float] = None, high: Optional[float] = None, spread: float = 1.0) -> None:
        super().__init__()
        self.low, self.low_ratio, self.high, self.spread = low, low_ratio, high, spread
        self.range_sum = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.watched = nn.Parameter(torch.zeros(1), requires_grad=False)  # training batches so far, up to WATCH

    @property
    def largest(self) -> Tensor:
        """The largest value (in a symmetric range: magnitude) that is represented."""
        return (self.range_sum / self.watched.clamp_min(1e-9)).clamp(max=math.inf if self.limit is None else self.limit)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        largest = (x.abs() if self.low is None else x).amax(tuple(range(1, x.dim()))).float()
        seen = (self.usual(largest) * self.margin).clamp(1e-6, self.limit)
        if self.high is not None:
            seen = torch.full_like(seen, self.high)
        # In a small batch the middle one may be wild too: it counts as twice what is usual.
        average = torch.where(self.watched > 0, self.largest.lerp(torch.minimum(seen, 2 * self.largest), 0.1), seen)
        counts = (self.watched < self.WATCH) & seen.isfinite()  # one batch that ran away would leave no range for good
        self.range_sum.copy_(torch.where(counts, average * (self.watched + 1), self.range_sum))
        self.watched.add_(counts)

    def usual(self, largest: Tensor) -> Tensor:
        """Of the images' largest values, (N,), that of the middle one, or the last within ``spread`` of it."""
        middle = largest.sort().values[len(largest) // 2]
        return torch.where(largest <= middle * self.spread, largest, middle).amax()

    def scale_and_zero_point(self) -> Tuple[Tensor, Tensor]:
        if self.signed or (self.low is None and self.low_ratio is None):
            return self.largest / 127, torch.full_like(self.watched, 0 if self.signed else 128, dtype=torch.int32)
        low = self.largest * self.low_ratio if self.low_ratio is not None else torch.full_like(self.watched, self.low or 0.0)
        scale = (self.largest - low) / 255
        return scale, (-low / scale).round().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.enabled:
            self.watch(x)
        limited = x if self.limit is None else x.clamp(-self.limit, self.limit)
        if not self.enabled:
            return limited
        scale, zero_point = self.scale_and_zero_point()
        low, high = (-128, 127) if self.signed else (0, 255)
        if torch.onnx.is_in_onnx_export():  # constants there: what a runtime would have to compute it doesn't see as a quantiser
            return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)
        with torch.autocast(x.device.type, enabled=False):  # rounding to 256 values is exact in float32 only
            rounded = torch.fake_quantize_per_tensor_affine(x.float(), scale.float().clamp_min(1e-12), zero_point, low, high)
        return torch.where(self.watched > 0, rounded.to(x.dtype), limited)


class QuantConv2d(nn.Conv2d):
    """Convolution with an 8-bit weight, one scale an output channel, and optional quantisers of what comes in and goes out."""

    quant_in: nn.Module
    quant_out: nn.Module

    @classmethod
    def like(cls, conv: nn.Conv2d, quant_in: Optional[Quantizer] = None, quant_out: Optional[Quantizer] = None) -> QuantConv2d:
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
        return self.quant_out(_depthwise_conv(x, weight, _bias(self), self.training) if depthwise else self._conv_forward(x, weight, self.bias))


class SplitConv2d(nn.Module):
    """A 3x3 convolution as the sum of a float 1x1 one with the few large weights in the middle of the kernel, and an 8-bit one with all others.

    Where an image runs through a network some weights are near one and the rest near 1/50: in one set of 8-bit steps those all but
    vanish. Splitting large values off is known from https://arxiv.org/abs/2208.07339. Float also spares the image a rounding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.quant_in = Quantizer(spread=1.25)
        self.fine = QuantConv2d.like(conv, quant_out=Quantizer())
        self.coarse = nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    @staticmethod
    def split(weight: Tensor, bias: Tensor) -> Dict[str, Tensor]:
        middle = (slice(None), slice(None), slice(1, 2), slice(1, 2))
        usual = weight.abs().flatten(1).float().quantile(0.99, dim=1).view(-1, 1, 1, 1)  # no quantile in half precision
        coarse = torch.where(weight[middle].abs() > 4 * usual, weight[middle], torch.zeros_like(weight[middle]))
        fine = weight.clone()
        fine[middle] -= coarse
        return {"fine.weight": fine, "fine.bias": bias, "coarse.weight": coarse, "coarse.bias": torch.zeros_like(bias)}

    @staticmethod
    def join(parts: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        weight = F.pad(parts["coarse.weight"], (1, 1, 1, 1)) + parts["fine.weight"]
        return {"weight": weight, "bias": parts["fine.bias"] + parts["coarse.bias"]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant_in(x)
        return self.fine(x) + self.coarse(x)


class QuantTail(CollapsedTail):
    """CollapsedTail whose one convolution is 8-bit and writes the picture itself, in steps of 1/255; borders are corrected in float."""

    def __init__(self, channels: int, out_channels: int, scale: int) -> None:
        super().__init__(channels, out_channels, scale)
        del self.weight, self.bias
        self.quant_in = Quantizer(low_ratio=-0.01, spread=1.25)  # what LeakyReLU leaves below zero
        conv = nn.Conv2d(channels, out_channels * scale**2, 5, padding=2)
        self.conv = QuantConv2d.like(conv, quant_out=Quantizer(low=0.0, high=1.0))

    def convolve(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.quant_in(x))


class StoredConv2d(nn.Module):
    """What a convolution of a quantised network becomes in the end: an int8 weight with its scales, or a half-precision weight."""

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
        return self.quant_out(F.conv2d(self.quant_in(x), weight, self.bias, padding=self.padding, groups=self.groups))


class QuantAetherBlock(FusedAetherBlock):
    """FusedAetherBlock whose 1x1 convolutions, and all between them, are 8-bit: (N, C, H, W) -> (N, C, H, W).

    The depthwise convolution computes in float: integer kernels of 11x11 are slower. So does the sum, in the default placement: rounding
    adds up in the stream that runs through all blocks.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reparam_conv = QuantConv2d.like(self.reparam_conv, quant_out=Quantizer())
        self.gate_conv = QuantConv2d.like(self.gate_conv, quant_out=Quantizer())
        self.main_conv = QuantConv2d.like(self.main_conv, quant_out=Quantizer())
        self.out_conv = QuantConv2d.like(self.out_conv, quant_in=Quantizer(), quant_out=Quantizer())
        self.quant_sigmoid = Quantizer(low=0.0)
        self.quant_silu = Quantizer(low=-0.2785)  # the minimum of SiLU
        self.quant_start: nn.Module = nn.Identity()  # where the 8-bit stream begins and
        self.quant_sum: nn.Module = nn.Identity()  # what each block adds up to, in full

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant_start(x)
        out = self.reparam_conv(x)
        gate = self.gate_conv(out)
        gate = self.quant_silu(gate * self.quant_sigmoid(torch.sigmoid(gate)))  # as the integer kernels do it
        return self.quant_sum(self.spatial_attn(self.channel_attn(self.out_conv(gate * self.main_conv(out)))) + x)


class QuantAetherNet(FusedAetherNet):
    """FusedAetherNet with fake quantisation, for quantisation-aware training; see prepare_qat and convert_to_quantized.

    Args: those of FusedAetherNet, and
        placement: "default" (the 1x1 convolutions of the blocks with all between them, and the 3x3 one after them) or "full" (all convolutions
            but the first and the depthwise ones, and the blocks' sums: faster, and less exact).
        stored: weights are held as int8, or half precision where they are not quantised; nothing can be trained any more.
    """

    WILD = 20.0  # times further than on the middle image: calibrate warns
    block = QuantAetherBlock

    def __init__(self, placement: str = "default", stored: bool = False, **options: Any) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"AetherNet: placement={placement!r} is not possible; allowed: {', '.join(PLACEMENTS)}.")
        super().__init__(**options)
        self.placement, self.stored = placement, False
        full = placement == "full"
        self.body_conv = QuantConv2d.like(self.body_conv, quant_in=Quantizer(), quant_out=Quantizer())
        if full:
            blocks = [block for block in self.stages.modules() if isinstance(block, QuantAetherBlock)]
            blocks[0].quant_start = Quantizer()
            for block in blocks:
                block.quant_sum = Quantizer()
            before, activation = self.conv_before_upsample
            assert isinstance(before, nn.Conv2d)
            self.fusion_convs = nn.ModuleList(QuantConv2d.like(conv, quant_out=Quantizer()) for conv in self.fusion_convs)  # type: ignore[arg-type]
            self.fusion = QuantConv2d.like(self.fusion, quant_in=Quantizer(), quant_out=Quantizer())
            self.conv_before_upsample = nn.Sequential(SplitConv2d(before), activation)
            self.tail = QuantTail(options["embed_dim"], options["in_chans"], self.scale)
        if stored:
            self.store()

    def _quantise_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, form: str) -> None:
        """Rewrite the state dict of a float network as one of this network, in place, with ranges unknown."""
        weights = {name[len(prefix) :]: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        if form == "training":
            weights = aether_from_state_dict(weights, self.options["img_range"]).fuse_model().state_dict()
        if self.placement == "full":
            before = "conv_before_upsample.0."
            parts = SplitConv2d.split(weights.pop(before + "weight"), weights.pop(before + "bias"))
            weights.update({before + name: value for name, value in parts.items()})
            weights.update({f"tail.conv.{name}": weights.pop(f"tail.{name}") for name in ("weight", "bias")})
        if self.stored or self.keep_norm != ("body_norm.weight" in weights):
            self.become(QuantAetherNet, placement=self.placement, keep_norm="body_norm.weight" in weights)
        for name, quantizer in self.quantizers().items():
            weights.update({f"{name}.{key}": torch.zeros_like(value) for key, value in quantizer.state_dict().items()})
        state_dict.update({prefix + name: value for name, value in weights.items()})

    def train(self, mode: bool = True) -> QuantAetherNet:
        """As everywhere, but stored weights stay in evaluation mode: their ranges belong to them."""
        return super().train(mode and not self.stored)

    def quantizers(self) -> Dict[str, Quantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    @torch.no_grad()
    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Set every range to what ``images`` bring about, each (N, in_chans, H, W) in [0, 1]; see Quantizer.usual. Takes no training.

        The middle image's, because one picture of many drives some layer ten times as far as all the others do, and a range that held
        this would leave a few steps for everything else: what is beyond is clipped.

        Raises:
            ValueError: no image, or none on which all values are finite; the ranges stay what they were.
        """
        training, quantizers = self.training, list(self.quantizers().values())
        before, largest = [(quantizer.range_sum.clone(), quantizer.watched.clone()) for quantizer in quantizers], []
        self.train()
        for quantizer in quantizers:
            quantizer.margin = 1.0
        try:
            for image in images:
                for quantizer in quantizers:
                    quantizer.watched.zero_()
                super().forward(image.to(self.mean))
                largest.append(torch.cat([torch.where(quantizer.watched > 0, quantizer.largest, math.inf) for quantizer in quantizers]))
        finally:
            self.train(training)
            for quantizer, (range_sum, watched) in zip(quantizers, before):
                quantizer.margin = Quantizer.margin
                quantizer.range_sum.copy_(range_sum)
                quantizer.watched.copy_(watched)
        finite = [values for values in largest if bool(values.isfinite().all())]  # some weights run away on an extreme picture
        if not finite:
            raise ValueError("calibrate: there is no image on which the network's values are finite.")
        seen = torch.stack(finite, 1)  # (quantizers, images)
        ranges = torch.stack([quantizer.usual(values) for quantizer, values in zip(quantizers, seen)])
        if len(finite) < len(largest):
            passed = f"{len(largest) - len(finite)} of {len(largest)} images"
            warnings.warn(f"calibrate: values are not finite on {passed}, which were passed over.", stacklevel=2)
        beyond, worst = (seen.amax(1) / ranges).max(0)
        if beyond > self.WILD:
            name = list(self.quantizers())[worst]
            warnings.warn(f"calibrate: one image drives {name} {beyond:.3g} times as far as the middle one does, and is clipped there.", stacklevel=2)
        for value, quantizer in zip(ranges, quantizers):
            quantizer.range_sum.fill_(float(value))
            quantizer.watched.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(_training_layout(x, self.training))
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            with torch.no_grad():  # every process saw other images: one range for all
                ranges: List[Tensor] = [quantizer.range_sum for quantizer in self.quantizers().values()]
                mean = torch.cat(ranges)
                torch.distributed.all_reduce(mean)
                for value, new in zip(ranges, mean / torch.distributed.get_world_size()):
                    value.copy_(new)
        return out

    def fuse_model(self) -> FusedAetherNet:
        """Take the quantisers out again: a FusedAetherNet with these weights, in place."""
        weights = {name: value.float() for name, value in self.state_dict().items() if not re.search(r"\.(range_sum|watched)$", name)}
        for name in [name for name in weights if name.endswith("weight_scale")]:
            weights[name[: -len("_scale")]] *= weights.pop(name)
        if self.placement == "full":
            before = "conv_before_upsample.0."
            joined = SplitConv2d.join({name[len(before) :]: weights.pop(name) for name in list(weights) if name.startswith(before)})
            weights.update({before + name: value for name, value in joined.items()})
            weights.update({f"tail.{name}": weights.pop(f"tail.conv.{name}") for name in ("weight", "bias")})
        self.become(FusedAetherNet, keep_norm="body_norm.weight" in weights)
        self.load_state_dict(weights)
        return self

    def for_target(self, target: str, reduce_range: bool = False) -> QuantAetherNet:
        """A copy, of a network with stored weights, that suits a runtime. ONNX Runtime on a CPU is fast in uint8, and only where a convolution's
        output is rounded as well; TensorRT and OpenVINO fuse better with float in between, and want int8 about zero. CPUs without VNNI add pairs
        of products in 16 bits, which ``reduce_range``, weights of 7 bits, keeps from overflowing."""
        other = copy.deepcopy(self)
        for conv in other.modules() if reduce_range else ():
            if isinstance(conv, StoredConv2d) and conv.weight_scale is not None and conv.groups == 1:
                conv.weight, conv.weight_scale = _round_taps(conv.weight.float() / 2).to(torch.int8), conv.weight_scale * 2
        for name, quantizer in other.quantizers().items():
            quantizer.signed = target != "onnxruntime"
            quantizer.enabled = target == "onnxruntime" or name.endswith(("quant_in", "reparam_conv.quant_out"))
        other._round_biases()
        return other

    def _sources(self) -> Iterator[Tuple[nn.Module, Any]]:
        """The convolutions that may be 8-bit, each with the quantiser that its input comes from, or what stands in its place."""
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
        """To what integer kernels can hold: multiples of the input's scale times the weight's, in 32 bits. The first is a small part of an 8-bit
        step, and yet without it one value of two hundred rounds to another code than in the exported file, block for block; the second is
        too little for a bias whose weights are next to zero, as in a channel that died, so those get a larger step."""
        for conv, source in self._sources():
            if isinstance(conv, StoredConv2d) and conv.weight_scale is not None and isinstance(source, Quantizer):
                scale = source.scale_and_zero_point()[0]
                wide = torch.maximum(conv.weight_scale, (conv.bias.abs() / (scale * 2**30)).view(-1, 1, 1, 1))
                conv.weight, conv.weight_scale = (conv.weight.float() * (conv.weight_scale / wide)).round().to(torch.int8), wide
                step = wide.flatten() * scale
                conv.bias = (conv.bias / step).round() * step

    def store(self) -> None:
        """Hold the weights as they will be shipped: int8 with scales, half precision where a convolution is not quantised."""
        small = {conv for module in self.modules() if isinstance(module, (ChannelAttention, SpatialAttention)) for conv in module.modules()}
        for module in [module for module in self.modules() if module not in small]:
            for name, conv in list(module.named_children()):
                if isinstance(conv, nn.Conv2d):
                    setattr(module, name, StoredConv2d(conv))
        self.tail.store()
        self.requires_grad_(False)
        self.stored = True
        self.eval()

    def convert_to_quantized(self) -> QuantAetherNet:
        """A copy in evaluation mode that holds int8 weights: a file a third of the float one's size, nothing left to train.

        Raises:
            ValueError: no batch was seen in training and calibrate was not called; or weights are beyond half precision.
        """
        if self.stored:
            return self
        if any(quantizer.watched == 0 or not quantizer.largest.isfinite() for quantizer in self.quantizers().values()):
            raise ValueError("convert_to_quantized: the ranges are unknown; train a batch, or call calibrate(images).")
        other = copy.deepcopy(self).eval().float()
        for quantizer in other.quantizers().values():
            quantizer.range_sum.copy_(quantizer.largest)  # the sum of a hundred may be beyond half precision
            quantizer.watched.fill_(1)
        other.store()
        for name, value in other.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"convert_to_quantized: {name} is beyond half precision; fuse_aether.py scales float weights so that they are not.")
        other._round_biases()
        return other


# --------------------------------------------------------------------------------------------------------------- helpers


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # for the type checker: these convolutions have one
    return conv.bias


def _eager_on_cpu(x: Tensor) -> bool:
    """Whether operations on ``x`` run one by one, with no gradient, tracer or compiler that would hold what is between them."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    compiling = getattr(getattr(torch, "compiler", None), "is_compiling", None)
    return not (compiling and compiling())


def _to_int8(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Codes from -127 to 127 (still float) and one step for each output channel, (out_channels, 1, 1, 1), of a weight.

    In a dense kernel each tap takes over what the taps before it lost, so that a flat area keeps its value: rounded one by one, the 25 taps
    of the last convolution shift whole areas by a step of the picture. Noise shaping, as in error diffusion.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / 127
    return _round_taps(weight / scale), scale


def _round_taps(codes: Tensor) -> Tensor:
    if codes.shape[1] == 1:  # depthwise: 121 taps in a row cost a training step time
        return codes.round()
    rounded, lost = [], torch.zeros_like(codes[:, :, 0, 0])
    for tap in codes.flatten(2).unbind(2):
        rounded.append((tap + lost).round().clamp(-127, 127))
        lost = lost + tap - rounded[-1]
    return torch.stack(rounded, 2).view_as(codes)


def _store_int8(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give ``module`` the buffers ``name``, int8, and ``name``_scale."""
    codes, scale = _to_int8(weight)
    for key, value in ((name, codes.to(torch.int8)), (f"{name}_scale", scale)):
        module._parameters.pop(key, None)
        module.register_buffer(key, value)


def _test_pictures(channels: int) -> Iterable[Tensor]:
    """Pictures that ask much of a network: noise, edges, gradients, flat black and white. (1, channels, 64, 64) in [0, 1]."""
    ramp = torch.linspace(0, 1, 64).expand(64, 64)
    checks = (torch.arange(64).view(-1, 1) // 4 + torch.arange(64) // 4) % 2
    noise = torch.rand(channels, 64, 64, generator=torch.Generator().manual_seed(0))
    for picture in (ramp, ramp.t(), checks.float(), noise, noise.round(), ramp * 0, ramp * 0 + 1):
        yield picture.expand(1, channels, 64, 64)


def _state_of(module: nn.Module, prefix: str) -> Dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def _border(dim: int, side: int, depth: int) -> Tuple[slice, ...]:
    """Index of the first (side -1) or last (side 1) ``depth`` rows (dim 2) or columns (dim 3)."""
    return (slice(None),) * dim + (slice(None, depth) if side < 0 else slice(-depth, None),)


def _add_at_border(x: Tensor, delta: Tensor, dim: int, side: int) -> Tensor:
    """``x`` with ``delta`` added to its first or last row or column; out of place, since ONNX has no cheap in-place slice."""
    here = x[_border(dim, side, 1)] + delta
    rest = x[(slice(None),) * dim + (slice(1, None) if side < 0 else slice(None, -1),)]
    return torch.cat([here, rest] if side < 0 else [rest, here], dim)


def _check_options(options: Mapping[str, Any]) -> None:
    def check(name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"AetherNet: {name}={options[name]!r} is not possible; allowed: {allowed}.")

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    def within(name: str, low: float, high: float) -> bool:
        value = options[name]
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high

    check("scale", whole(options["scale"]) and options["scale"] in SCALES, "1, 2, 3, 4, 8")
    check("in_chans", whole(options["in_chans"]), "a whole number from 1")
    depths, width, large = options["depths"], options["embed_dim"], options["lk_kernel"]
    check("depths", isinstance(depths, (list, tuple)) and len(depths) > 0 and all(map(whole, depths)), "a list of whole numbers from 1")
    check("embed_dim", whole(width) and width % len(depths) == 0, f"a multiple of {len(depths)}, the number of stages in depths")
    check("embed_dim", width >= options["scale"] // 2, f"{options['scale'] // 2} or more at scale {options['scale']}")
    check("embed_dim", width >= 8 or options["use_channel_attn"] is not True, "8 or more with use_channel_attn")
    check(
        "mlp_ratio", within("mlp_ratio", 1 / width, 1e6) and int(width * options["mlp_ratio"]) >= 1, f"{1 / width:.3g} (one hidden channel) or more"
    )
    check("lk_kernel", whole(large) and large % 2 == 1, "an odd number from 1")
    check("sk_kernel", whole(options["sk_kernel"]) and options["sk_kernel"] in range(1, large + 1, 2), f"an odd number from 1 to lk_kernel={large}")
    for name in ("drop", "drop_path_rate"):
        check(name, within(name, 0, 1), f"0 <= {name} < 1")
    check("img_range", within("img_range", 1e-6, 1e6), "a number above 0 (1e-6 to 1e6)")
    for name in ("use_channel_attn", "use_spatial_attn", "batch_renorm"):
        check(name, isinstance(options[name], bool), "true or false")
    check("bound", options["bound"] is None or within("bound", 1e-3, 1e6), "a number above 0 (1e-3 to 1e6), or nothing")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _init_as_interpolation(net: AetherNet) -> None:
    """Let blocks start as identities, and the first channels carry the image, so that a new network is a quadratic interpolation, not black.

    A gated product squares what its norm gives it, block after block: at a norm weight of 1 a pixel far from the training data's range can
    grow past any number within the depth of the network. At 0.25 (16 times smaller products) the same training keeps it where it was.

    An initialisation only: all other weights keep their random start, and training is free to change these. LeakyReLU passes a value
    and its negative as a pair: lrelu(v) - lrelu(-v) = 1.01 v. Networks too narrow for it keep the plain start.
    """
    for block in net.stages.modules():
        if isinstance(block, AetherBlock):
            nn.init.zeros_(block.ffn.conv_out.weight)
            nn.init.constant_(block.norm.weight, 0.25)
    image = net.conv_first.in_channels
    upsamplers = [conv for conv in net.upsample.blocks if isinstance(conv, nn.Conv2d)]
    steps = [1 if net.scale == 1 else 3 if net.scale == 3 else 2] * len(upsamplers)
    if net.conv_first.out_channels < 2 * image or any(conv.out_channels // step**2 < image for conv, step in zip(upsamplers, steps)):
        return
    eye = torch.eye(image)

    def carry(conv: nn.Conv2d, matrix: Tensor) -> None:
        """The first channels of ``conv`` become ``matrix`` times the first channels before it; pixels keep their place."""
        conv.weight[: matrix.shape[0]] = 0
        conv.weight[: matrix.shape[0], : matrix.shape[1], conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = matrix

    carry(net.conv_first, eye)
    carry(net.quant_fusion_layer.fusion_conv, torch.zeros(image, 1))
    carry(net.conv_after_body, torch.zeros(image, 1))
    before, activation = net.conv_before_upsample
    assert isinstance(before, nn.Conv2d)
    assert isinstance(activation, nn.LeakyReLU)
    carry(before, torch.cat([eye, -eye]))
    matrix = torch.cat([eye, -eye], 1) / (1 + activation.negative_slope)
    for conv, step in zip(upsamplers, steps):
        offsets = [(k + 0.5) / step - 0.5 for k in range(step)]
        taps = torch.tensor([[t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2] for t in offsets])  # Lagrange, for pixels -1, 0, 1
        kernels = torch.einsum("oc,iy,jx->oijcyx", matrix, taps, taps).flatten(0, 2)
        conv.weight[: len(kernels)] = 0
        conv.weight[: len(kernels), : matrix.shape[1]] = kernels
        matrix = eye
    net.conv_last.weight[:] = 0
    carry(net.conv_last, eye)


# -------------------------------------------------------------------------------------------------- reading a state dict


def state_dict_form(names: Sequence[str]) -> Optional[str]:
    """The form that tensor names speak of: "training", "fused", "older fused" (only the kernels merged), "quantised", "int8", or None."""
    endings = {
        "training": ".lk_conv.weight",
        "older fused": ".conv.fused_conv.weight",
        "int8": ".reparam_conv.weight_scale",
        "quantised": ".reparam_conv.quant_out.range_sum",
        "fused": ".reparam_conv.weight",
    }
    return next((form for form, ending in endings.items() if any(name.endswith(ending) for name in names)), None)


def _form_class(form: str, names: Iterable[str]) -> Tuple[Type[AetherBase], Dict[str, Any]]:
    """The class of a form, and the options that its tensor names tell."""
    if form == "training":
        return AetherNet, {}
    extra: Dict[str, Any] = {"keep_norm": "body_norm.weight" in names}
    if form == "fused":
        return FusedAetherNet, extra
    placement = "full" if "fusion.quant_in.range_sum" in names else "default"
    return QuantAetherNet, {**extra, "placement": placement, "stored": form == "int8"}


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The state dict without the prefixes that DataParallel, DDP and torch.compile put before every name."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state_dict.items()}


def _older_fused_to_training(state: Dict[str, Tensor], prefix: str, sk_kernel: int) -> None:
    """Rewrite an older fused form in place as the training form of the same function.

    Its norms hold scale and shift already; running statistics beside them are stale and would normalise a second time.
    """
    fused = [name for name in state if name.startswith(prefix) and name.endswith(".conv.fused_conv.weight")]
    norms = [name for name in state if re.fullmatch(re.escape(prefix) + r"(stages\.\d+\.\d+\.)?norm\.weight", name)]
    missing = [name for name in (name[: -len("weight")] + "bias" for name in fused + norms) if name not in state]
    if missing:
        raise ValueError(f"an AetherNet in older fused form, but {missing[0]!r} is missing.")
    for name in fused:
        block = name[: -len("fused_conv.weight")]
        weight, bias = state.pop(name), state.pop(block + "fused_conv.bias")
        state[block + "lk_conv.weight"], state[block + "lk_bias"] = weight, bias
        state[block + "sk_conv.weight"] = weight.new_zeros(weight.shape[0], 1, sk_kernel, sk_kernel)
        state[block + "sk_bias"] = torch.zeros_like(bias)
    for name in norms:
        norm = name[: -len("weight")]
        state[norm + "weight"], state[norm + "bias"] = (state[norm + part].reshape(1, -1, 1, 1) for part in ("weight", "bias"))
        state[norm + "running_mean"] = torch.zeros_like(state[norm + "weight"])
        state[norm + "running_var"] = torch.ones_like(state[norm + "weight"], dtype=torch.float32) - DeploymentNorm.eps


def aether_from_state_dict(state_dict: Mapping[str, Tensor], img_range: float = 1.0) -> AetherBase:
    """Build the network that a state dict belongs to and load it: training, fused or older fused form, in evaluation mode, float32.

    Variant, scale, kernels and attention come from names and shapes; prefixes ``module.`` and ``_orig_mod.`` are removed. Not readable
    from a training form: img_range (assumed as given here), and drop, drop_path_rate and batch_renorm, which change nothing in
    evaluation (assumed 0, 0 and False). A fused form holds img_range in its weights; its sk_kernel is gone and no longer matters.

    Raises:
        ValueError: not an AetherNet of a known layout; the message says what is missing or does not fit.
    """
    state = strip_prefixes(state_dict)
    form = state_dict_form(list(state))
    if form is None:
        raise ValueError(_describe_foreign(state))
    options = _read_options(state, form)
    if form == "older fused":
        _older_fused_to_training(state, "", options["sk_kernel"])
        form = "training"
    cls, extra = _form_class(form, state)
    if hasattr(torch.device, "__enter__"):  # PyTorch 2: compare shapes before any memory is taken for them
        with torch.device("meta"):
            _compare_shapes(cls(**options, img_range=img_range, **extra), state)
    net = cls(**options, img_range=img_range, **extra).eval()
    _compare_shapes(net, state)
    net.load_state_dict(state)
    return net


def _describe_foreign(state: Mapping[str, Tensor]) -> str:
    if any(name.startswith("layers.") for name in state) and any(".dwconv." in name or ".ffn." in name or ".conv." in name for name in state):
        return "this is AetherNet's first layout (v1, tensors 'layers.*'): another network, which this file does not hold."
    return f"not an AetherNet: no tensor 'stages.0.0.conv.lk_conv.weight' among {len(state)}; the first is {next(iter(state), '')[:80]!r}."


def _read_options(state: Mapping[str, Tensor], form: str) -> Dict[str, Any]:
    """Constructor options from shapes. Raises ValueError where a tensor is missing or has the wrong number of dimensions."""

    def shape(name: str) -> Tuple[int, ...]:
        if name not in state:
            raise ValueError(f"an AetherNet in {form} form, but {name!r} is missing.")
        if state[name].dim() != 4:
            raise ValueError(f"{name!r} has {state[name].dim()} dimensions, expected 4.")
        return tuple(state[name].shape)

    empty = [name for name, value in state.items() if value.numel() == 0]
    if empty:
        raise ValueError(f"tensor {empty[0]!r} holds no value; its shape is {tuple(state[empty[0]].shape)}.")
    for name, version in (("num_batches_tracked", "v3 or v4"), ("scale", "1.1.0"), ("scale_tensor", "3.x")):
        if any(key == name or key.endswith("." + name) for key in state):
            raise ValueError(f"this is the layout of AetherNet {version} (tensor {name!r}): the same names, another function.")
    block = "stages.0.0."
    gate, kernel = {
        "training": ("ffn.conv_gate", "conv.lk_conv"),
        "older fused": ("ffn.conv_gate", "conv.fused_conv"),
    }.get(form, ("gate_conv", "reparam_conv"))
    fused = form in ("fused", "quantised", "int8")
    embed_dim, in_chans = shape("head.weight" if fused else "conv_first.weight")[:2]
    hidden, lk_kernel = shape(f"{block}{gate}.weight")[0], shape(f"{block}{kernel}.weight")[2]
    sk_kernel = shape(f"{block}conv.sk_conv.weight")[2] if form == "training" else min(3, lk_kernel)
    blocks = {tuple(map(int, found.groups())) for found in map(re.compile(r"stages\.(\d{1,4})\.(\d{1,4})\.").match, state) if found}
    depths = [max(j for i, j in blocks if i == stage) + 1 if stage in {i for i, _ in blocks} else 0 for stage in range(max(blocks)[0] + 1)]
    if len(state) < 8 * len(blocks):  # before modules are made for them
        raise ValueError(f"not a whole AetherNet: {len(state)} tensors for {len(blocks)} blocks.")
    if 0 in depths or sum(depths) != len(blocks):
        raise ValueError(f"the blocks 'stages.i.j' have gaps: {len(blocks)} found, {sum(depths)} expected from the numbers.")
    if fused:
        scale = math.isqrt(shape("tail.conv.weight" if "tail.conv.weight" in state else "tail.weight")[0] // max(1, in_chans))
    else:
        convs = sorted(name for name in state if re.fullmatch(r"upsample\.blocks\.\d+\.weight", name))
        scale = 2 ** len(convs)
        if len(convs) == 1:
            scale = math.isqrt(shape(convs[0])[0] // max(1, shape("conv_last.weight")[1]))
    if scale not in SCALES:
        raise ValueError(f"the upsampling tensors fit none of the scales {SCALES}.")
    if "bound" in state and (state["bound"].numel() != 1 or not 1e-3 <= float(state["bound"]) < 1e6):
        raise ValueError("'bound' is not one number from 1e-3 to 1e6.")
    ratio = hidden / max(1, embed_dim)
    return {
        "scale": scale,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": depths,
        "mlp_ratio": ratio if int(embed_dim * ratio) == hidden else (hidden + 0.5) / embed_dim,
        "lk_kernel": lk_kernel,
        "sk_kernel": sk_kernel,
        "use_channel_attn": f"{block}channel_attn.fc.0.weight" in state,
        "use_spatial_attn": f"{block}spatial_attn.conv.weight" in state,
        "drop_path_rate": 0.0,
        "bound": float(state["bound"]) if "bound" in state else None,
    }


def _compare_shapes(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = net.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    wrong = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    problems = [f"{kind}: {len(names)} ({', '.join(name[:80] for name in names[:3])}{', ...' if len(names) > 3 else ''})"
                for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)) if names]  # fmt: skip
    if problems:
        raise ValueError("not a whole AetherNet; tensors " + "; ".join(problems) + ".")


# ---------------------------------------------------------------------------------------------------------------- export


def export_onnx(
    model: AetherBase,
    scale: int,
    precision: str = "fp32",
    output_path: Optional[str] = None,
    target: str = "onnxruntime",
    *,
    reduce_range: bool = False,
    static: Optional[Sequence[int]] = None,
    opset: int = 17,
    simplify: bool = False,
    metadata: Optional[Mapping[str, str]] = None,
) -> str:
    """Write the fused network as one ONNX file and return its path; the model itself is left as it was.

    Input ``input`` (N, in_chans, H, W) in [0, 1] and output ``output`` (N, in_chans, scale * H, scale * W), batch, height and width
    dynamic, both in the precision named, float32 for "int8". Before the path is returned ONNX Runtime has run the graph on two odd sizes
    and agreed with the network. Needs the packages onnx and onnxruntime; fp16 a PyTorch that computes half precision on the CPU.

    Args:
        scale: the model's scale, named again so that a mistaken export can't pass.
        precision: "fp32", "fp16", or "int8" for a network from prepare_qat: QuantizeLinear and DequantizeLinear around the quantised
            convolutions, weights int8 with a scale for each output channel.
        output_path: default ``aether_x{scale}_{precision}.onnx`` in the current folder.
        target: for "int8", whom the file is to be fast in: "onnxruntime" (on a CPU: uint8, everything between the convolutions too),
            "tensorrt" or "openvino" (int8 about zero, only what goes into convolutions).
        reduce_range: for "int8", weights of 7 bits: for CPUs without VNNI, whose integer kernels overflow on 8.
        static: (in_chans, height, width) for a file that takes this size only, one picture at a time; default: any size.
        opset: of the file, see OPSETS. 17 is what ONNX Runtime, TensorRT 10 and 11, OpenVINO and DirectML before its last versions all take.
        simplify: take out what is doubled or constant, with the package onnxslim; what is computed stays the same.
        metadata: written into the file beside architecture, variant, scale and precision, for instance license and author.

    Raises:
        ValueError: scale, precision, target, static or opset do not fit.
        RuntimeError: ONNX Runtime's output differs from the network's; nothing is left at output_path.
    """
    if scale != model.scale:
        raise ValueError(f"export_onnx: scale={scale} was asked for, the model has scale={model.scale}.")
    if precision not in ("fp32", "fp16", "int8"):
        raise ValueError(f"export_onnx: precision={precision!r} is not known; allowed: 'fp32', 'fp16', 'int8'.")
    if precision == "int8" and not isinstance(model, QuantAetherNet):
        raise ValueError("export_onnx: precision='int8' needs a quantised network: prepare_qat(), fine-tune, convert_to_quantized().")
    if target not in TARGETS:
        raise ValueError(f"export_onnx: target={target!r} is not known; allowed: {', '.join(map(repr, TARGETS))}.")
    if static is not None and (len(static) != 3 or static[0] != model.options["in_chans"] or not all(type(n) is int and n > 0 for n in static)):
        raise ValueError(f"export_onnx: static={tuple(static)!r} is not possible; expected ({model.options['in_chans']}, height, width).")
    first, last = OPSETS.get(f"{precision} {target}", OPSETS[precision])
    if type(opset) is not int or not first <= opset <= last:
        raise ValueError(f"export_onnx: opset={opset!r} is not possible for {precision}; allowed: {first} to {last}.")
    import numpy as np
    import onnx
    import onnxruntime

    path = output_path or f"aether_x{scale}_{precision}.onnx"
    part = f"{path}.{os.getpid()}.part"
    if isinstance(model, QuantAetherNet) and precision == "int8":
        reference: AetherBase = model.convert_to_quantized().cpu().for_target(target, reduce_range)
    else:
        reference = model.fused().cpu().float()
    net = copy.deepcopy(reference).half() if precision == "fp16" else reference
    image = torch.rand(1, model.options["in_chans"], 19, 23).to(net.mean.dtype)
    # Other names for the output: what fixes a size by its name (DirectML, ONNX Runtime) would give both the same one.
    axes = {"input": {0: "batch", 2: "height", 3: "width"}, "output": {0: "batch", 2: "out_height", 3: "out_width"}}
    legacy: Dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracing exporter: old and deprecated, and the one that writes one small file everywhere
            torch.onnx.export(net, (image,), part, input_names=["input"], output_names=["output"], opset_version=opset,
                              do_constant_folding=precision != "int8", dynamic_axes=axes, **legacy)  # fmt: skip
        onnx_model = onnx.load(part)
        if precision == "int8":
            _integer_convolutions(onnx_model, target)
        if simplify:
            import onnxslim

            onnx_model = onnxslim.slim(onnx_model, size_threshold=64)  # bytes: int8 weights are constants too, and are to stay what they are
        del onnx_model.graph.value_info[:]  # shapes between the layers: every reader infers them, for the size that it wants
        described = {"architecture": "AetherNet", "variant": variant_name(model.options), "scale": str(scale), "precision": precision}
        if isinstance(reference, QuantAetherNet):
            described.update(placement=reference.placement, target=target)
        onnx.helper.set_model_props(onnx_model, {**described, **(metadata or {})})
        onnx.checker.check_model(onnx_model, full_check=True)
        onnx.save(onnx_model, part)
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        for height, width in ((17, 31), (33, 13)):
            image = torch.rand(2, model.options["in_chans"], height, width).to(net.mean.dtype)
            with torch.no_grad():
                expected = reference(image.float())
            output = torch.from_numpy(np.asarray(session.run(["output"], {"input": image.numpy()})[0])).float()
            error = (output - expected).abs()
            # Integer kernels may round a value to the code next to it; what they must not do is compute another function.
            largest = float(error.max() if precision != "int8" else error.mean())
            bound = {"fp32": 1e-4, "fp16": 2e-2, "int8": 4e-3}[precision] * max(1.0, float(expected.abs().max()))
            if not largest <= bound:
                raise RuntimeError(f"export_onnx: ONNX Runtime differs from the network by {largest:.3g} at {width}x{height}, allowed {bound:.3g}.")
        if static is not None:  # the same graph: no node of it holds a size
            for value, factor in ((onnx_model.graph.input[0], 1), (onnx_model.graph.output[0], scale)):
                for dim, size in zip(value.type.tensor_type.shape.dim, (1, static[0], static[1] * factor, static[2] * factor)):
                    dim.dim_value = size
            onnx.checker.check_model(onnx_model, full_check=True)  # infers the output's size and compares
            onnx.save(onnx_model, part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    return path


def _integer_convolutions(model: Any, target: str) -> None:
    """Let the convolutions of an ONNX model between quantisers have int8 weights as runtimes look for them: DequantizeLinear of a constant.

    As traced, each of those weights is ``Cast(int8) * scale``. That stays where a convolution computes in float: runtimes compute it once,
    when they load the file; TensorRT takes no computed weights beside quantisers, and gets them as float constants. ONNX Runtime makes an
    integer convolution of any that stands between quantisers; LeakyRelu with a slope of 1, the identity, keeps the depthwise ones from it
    (and is computed with them).
    """
    import numpy as np
    import onnx

    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:  # values that the tracer wrote as nodes
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in list(graph.node):
        if node.op_type == "Identity" and node.input[0] in constants:  # the tracer's word for two equal tensors
            constants[node.output[0]] = constants[node.input[0]]
        if node.op_type == "Cast" and node.input[0] in constants and not constants[node.input[0]].dims:  # a quantiser's scale or zero point
            value = onnx.numpy_helper.to_array(constants[node.input[0]]).astype(onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i))
            constants[node.output[0]] = onnx.numpy_helper.from_array(value, node.output[0])
            graph.initializer.append(constants[node.output[0]])
            graph.node.remove(node)
    nodes: List[Any] = []
    for node in graph.node:
        source = made.get(node.input[0]) if node.input else None
        weight = made.get(node.input[1]) if node.op_type == "Conv" else None
        depthwise = any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        if source is not None and source.op_type == "DequantizeLinear" and weight is not None and weight.op_type == "Mul" and not depthwise:
            cast = made[weight.input[0]]
            scale = onnx.numpy_helper.to_array(constants[weight.input[1]]).reshape(-1)
            name = node.input[1]
            values = {f"{name}_scale": scale, f"{name}_zero_point": np.zeros(scale.shape, np.int8)}
            nodes.append(onnx.helper.make_node("DequantizeLinear", [constants[cast.input[0]].name, *values], [f"{name}_float"], axis=0))
            node.input[1] = f"{name}_float"
            if target != "tensorrt":
                bias_scale = scale * onnx.numpy_helper.to_array(constants[source.input[1]])
                bias = onnx.numpy_helper.to_array(constants[node.input[2]])
                values[f"{name}_bias"] = np.clip(np.rint(bias / bias_scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)
                values.update({f"{name}_bias_scale": bias_scale, f"{name}_bias_zero_point": np.zeros(scale.shape, np.int32)})
                names = [f"{name}_bias", f"{name}_bias_scale", f"{name}_bias_zero_point"]
                nodes.append(onnx.helper.make_node("DequantizeLinear", names, [f"{name}_bias_float"], axis=0))
                node.input[2] = f"{name}_bias_float"
            graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in values.items())
        nodes.append(node)
        if depthwise and source is not None and source.op_type == "DequantizeLinear" and target == "onnxruntime":
            name = node.output[0]
            node.output[0] = f"{name}_float"
            nodes.append(onnx.helper.make_node("LeakyRelu", [f"{name}_float"], [name], alpha=1.0))
    for node in [node for node in nodes if target == "tensorrt" and node.op_type in ("Cast", "Mul")]:
        if all(name in constants for name in node.input):
            factors = [onnx.numpy_helper.to_array(constants[name]).astype(np.float32) for name in node.input]
            constants[node.output[0]] = onnx.numpy_helper.from_array(np.asarray(math.prod(factors)), node.output[0])
            graph.initializer.append(constants[node.output[0]])
            nodes.remove(node)
    used = {output.name for output in graph.output}
    kept: List[Any] = []
    for node in reversed(nodes):  # drop what nothing reads any more
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values_kept in ((graph.node, kept[::-1]), (graph.initializer, initializers)):
        del field[:]
        field.extend(values_kept)


# -------------------------------------------------------------------------------------------------------------- variants


def _build(options: Dict[str, Any]) -> AetherBase:
    """An AetherNet, or with ``qat`` (true: the default placement, or "full") a network for quantisation-aware training."""
    qat = options.pop("qat")
    if not isinstance(qat, bool) and qat not in PLACEMENTS:
        raise ValueError(f"AetherNet: qat={qat!r} is not possible; allowed: true, false, {', '.join(PLACEMENTS)}.")
    net = AetherNet(**options)
    return net.insert_quantizers("default" if qat is True else qat) if qat else net


# The options are written out for the frameworks' documentation tools, which read signatures. They are AetherNet's, and qat, see _build.
# fmt: off


def aether_small(
    scale: int = 4, in_chans: int = 3, embed_dim: int = 96, depths: Sequence[int] = (4, 4, 4, 4), mlp_ratio: float = 2.0,
    lk_kernel: int = 11, sk_kernel: int = 3, drop: float = 0.0, drop_path_rate: float = 0.1, img_range: float = 1.0,
    use_channel_attn: bool = False, use_spatial_attn: bool = False, batch_renorm: bool = False, bound: Optional[float] = None,
    qat: Union[bool, str] = False,
) -> AetherBase:
    """Small and fast, no attention: 1.5 million parameters at x4. Options: see above."""
    return _build(locals())


def aether_medium(
    scale: int = 4, in_chans: int = 3, embed_dim: int = 128, depths: Sequence[int] = (6, 6, 6, 6), mlp_ratio: float = 2.0,
    lk_kernel: int = 11, sk_kernel: int = 3, drop: float = 0.0, drop_path_rate: float = 0.1, img_range: float = 1.0,
    use_channel_attn: bool = True, use_spatial_attn: bool = True, batch_renorm: bool = False, bound: Optional[float] = None,
    qat: Union[bool, str] = False,
) -> AetherBase:
    """Balanced, with channel and spatial attention: 3.7 million parameters at x4. Options: see above."""
    return _build(locals())


def aether_large(
    scale: int = 4, in_chans: int = 3, embed_dim: int = 180, depths: Sequence[int] = (8, 8, 8, 8, 8), mlp_ratio: float = 2.0,
    lk_kernel: int = 11, sk_kernel: int = 3, drop: float = 0.0, drop_path_rate: float = 0.1, img_range: float = 1.0,
    use_channel_attn: bool = True, use_spatial_attn: bool = True, batch_renorm: bool = False, bound: Optional[float] = None,
    qat: Union[bool, str] = False,
) -> AetherBase:
    """Highest quality: 10.6 million parameters at x4. Options: see above."""
    return _build(locals())


# fmt: on
VARIANTS = (aether_small, aether_medium, aether_large)


def variant_name(options: Mapping[str, Any]) -> str:
    """Name of the variant that has these options (training options aside), or a description of the network."""
    aside = ("scale", "in_chans", "sk_kernel", "drop", "drop_path_rate", "img_range", "batch_renorm", "bound", "qat")
    for variant in VARIANTS:
        defaults = {name: parameter.default for name, parameter in inspect.signature(variant).parameters.items() if name not in aside}
        if all(tuple(options[name]) == value if name == "depths" else options[name] == value for name, value in defaults.items()):
            return variant.__name__
    return "a network of its own ({})".format(", ".join(f"{name}={options[name]}" for name in ("embed_dim", "depths", "lk_kernel", "mlp_ratio")))


# ------------------------------------------------------------------------------------------------------------ registration


def _register(framework: str) -> None:
    """Register the variants in the framework whose ``archs`` folder this file lies in."""
    import functools
    import importlib

    registry = importlib.import_module(f"{framework}.utils.registry").ARCH_REGISTRY
    for variant in VARIANTS:
        if variant.__name__ in registry:
            raise ImportError(f"{variant.__name__} is registered in {framework} already; keep one copy of this file in its archs folder: {__file__}")

        @functools.wraps(variant)
        def build(*args: Any, _variant: Any = variant, **options: Any) -> AetherBase:
            if framework == "neosr" and not args and "scale" not in options:  # neosr passes no scale: a network asks for it
                options["scale"] = importlib.import_module("neosr.archs.arch_util").net_opt()[0]
            net = _variant(*args, **options)
            if framework == "basicsr":  # its EMA copies parameters and no buffers: norm statistics would stay at their start
                for module in net.modules():
                    if isinstance(module, DeploymentNorm):
                        module.statistics_to_parameters()
            return net

        registry.register(build)


if __package__ in ("basicsr.archs", "neosr.archs", "traiNNer.archs"):
    _register(__package__.split(".")[0])
