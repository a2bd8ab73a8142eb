"""AetherNet written out a second time, operation by operation from a training state dict: slow and plain."""

from __future__ import annotations

from typing import Dict, Mapping, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(
    state: Mapping[str, Tensor], x: Tensor, img_range: float = 1.0, training: bool = False
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """Output, and the running statistics after it: two depthwise branches, a norm by hand, no drop path."""
    after: Dict[str, Tensor] = {}

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            batch_mean = x.mean((0, 2, 3), keepdim=True)
            batch_var = (x - batch_mean).pow(2).mean((0, 2, 3), keepdim=True)
            after[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            after[f"{name}.running_var"] = 0.9 * var + 0.1 * batch_var
            mean, var = batch_mean, batch_var
        return (x - mean) / torch.sqrt(var + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def block(x: Tensor, name: str) -> Tensor:
        channels = x.shape[1]
        large = conv(x, f"{name}.conv.lk_conv", groups=channels) + state[f"{name}.conv.lk_bias"].view(
            1, -1, 1, 1
        )
        small = conv(x, f"{name}.conv.sk_conv", groups=channels) + state[f"{name}.conv.sk_bias"].view(
            1, -1, 1, 1
        )
        out = norm(large + small, f"{name}.norm")
        if "bound" in state:
            out = torch.minimum(torch.maximum(out, -state["bound"]), state["bound"])
        gate = conv(out, f"{name}.ffn.conv_gate") * state[f"{name}.ffn.temperature"]
        out = conv(gate * torch.sigmoid(gate) * conv(out, f"{name}.ffn.conv_main"), f"{name}.ffn.conv_out")
        if f"{name}.channel_attn.fc.0.weight" in state:
            squeezed = out.mean((2, 3), keepdim=True)
            out = out * torch.sigmoid(
                conv(torch.relu(conv(squeezed, f"{name}.channel_attn.fc.0")), f"{name}.channel_attn.fc.2")
            )
        if f"{name}.spatial_attn.conv.weight" in state:
            pooled = torch.cat([out.max(1, keepdim=True)[0], out.mean(1, keepdim=True)], 1)
            out = out * torch.sigmoid(conv(pooled, f"{name}.spatial_attn.conv"))
        return x + out

    shallow = conv((x - state["mean"]) * img_range, "conv_first")
    out, features, i = shallow, [], 0
    while f"fusion_convs.{i}.weight" in state:
        j = 0
        while f"stages.{i}.{j}.norm.weight" in state:
            out = block(out, f"stages.{i}.{j}")
            j += 1
        features.append(conv(out, f"fusion_convs.{i}"))
        i += 1
    body = (
        conv(
            torch.cat(features, 1) + state["quant_fusion_layer.error_comp"], "quant_fusion_layer.fusion_conv"
        )
        + shallow
    )
    body = conv(norm(body, "norm"), "conv_after_body") + body
    out = F.leaky_relu(conv(body, "conv_before_upsample.0"), 0.01)
    steps = [name for name in state if name.startswith("upsample.blocks.") and name.endswith(".weight")]
    for k, name in enumerate(sorted(steps)):
        out = conv(out, name[: -len(".weight")])
        following = state[sorted(steps)[k + 1]] if k + 1 < len(steps) else state["conv_last.weight"]
        out = F.pixel_shuffle(out, round((out.shape[1] / following.shape[1]) ** 0.5))
    return conv(out, "conv_last") / img_range + state["mean"], after
