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
        large, small = (
            conv(x, f"{name}.conv.{kind}_conv", groups=channels)
            + state[f"{name}.conv.{kind}_bias"].view(-1, 1, 1)
            for kind in ("lk", "sk")
        )
        out = norm(large + small, f"{name}.norm")
        if "bound" in state:
            out = torch.minimum(torch.maximum(out, -state["bound"]), state["bound"])
        gate = conv(out, f"{name}.ffn.conv_gate") * state[f"{name}.ffn.temperature"]
        out = conv(gate * torch.sigmoid(gate) * conv(out, f"{name}.ffn.conv_main"), f"{name}.ffn.conv_out")
        if f"{name}.channel_attn.fc.0.weight" in state:
            squeezed = torch.relu(conv(out.mean((2, 3), keepdim=True), f"{name}.channel_attn.fc.0"))
            out = out * torch.sigmoid(conv(squeezed, f"{name}.channel_attn.fc.2"))
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
    joined = torch.cat(features, 1) + state["quant_fusion_layer.error_comp"]
    body = conv(joined, "quant_fusion_layer.fusion_conv") + shallow
    body = conv(norm(body, "norm"), "conv_after_body") + body
    out = F.leaky_relu(conv(body, "conv_before_upsample.0"), 0.01)
    steps = sorted(name for name in state if name.startswith("upsample.") and name.endswith(".weight"))
    for name, following in zip(steps, [*steps[1:], "conv_last.weight"]):
        out = conv(out, name[: -len(".weight")])
        out = F.pixel_shuffle(out, round((out.shape[1] / state[following].shape[1]) ** 0.5))
    return conv(out, "conv_last") / img_range + state["mean"], after
