"""Checkpoints for the tests: of one small network, in the layouts that people have."""

from __future__ import annotations

import io
from typing import Any, Dict, Mapping

import torch
from aether_arch import AetherNet, DeploymentNorm, ReparamLargeKernelConv
from conftest import small_net
from torch import Tensor

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
NET = small_net(2, **TINY).float()
STATE: Dict[str, Tensor] = NET.state_dict()
FUSED: Dict[str, Tensor] = NET.fused().state_dict()


def saved(content: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def under(prefix: str, state: Mapping[str, Any]) -> Dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


class Calls:
    """Pickles as a call of ``function`` on loading."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def older_fused(net: AetherNet, stale_statistics: bool = True) -> Dict[str, Tensor]:
    """What the published tools wrote: kernels merged, norms as scale and shift beside stale statistics."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name, module in net.named_modules():
        if isinstance(module, ReparamLargeKernelConv):
            for part in ("lk_conv.weight", "sk_conv.weight", "lk_bias", "sk_bias"):
                del state[f"{name}.{part}"]
            weight, bias = (value.detach() for value in module.reparameterize())
            state[f"{name}.fused_conv.weight"], state[f"{name}.fused_conv.bias"] = weight, bias
        if isinstance(module, DeploymentNorm):
            scale, shift = (value.detach().view(1, -1, 1, 1) for value in module.scale_and_shift())
            state[f"{name}.weight"], state[f"{name}.bias"] = scale, shift
            if not stale_statistics:
                del state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return state
