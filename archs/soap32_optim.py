"""SOAP in single precision for traiNNer-redux; copy it into ``traiNNer/optimizers``.

traiNNer-redux calls its optimizers inside autocast. SOAP multiplies gradients with each other there: in fp16
small products become zero, and on a CPU it ends with an error.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional

import torch
from pytorch_optimizer import SOAP
from traiNNer.utils.registry import OPTIMIZER_REGISTRY

__all__ = ["SOAP32"]


@OPTIMIZER_REGISTRY.register()
class SOAP32(SOAP):
    """SOAP (https://arxiv.org/abs/2409.11321) that computes its step without autocast."""

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        device = self.param_groups[0]["params"][0].device.type
        with torch.autocast(device, enabled=False):
            return super().step(closure)

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError if another optimizer saved it."""
        groups = state_dict.get("param_groups", [])
        if any("precondition_frequency" not in group for group in groups):
            other = "Adam or AdamW" if any("amsgrad" in group for group in groups) else "another optimizer"
            raise RuntimeError(
                f"This training began with {other}, and optim_g now says SOAP32: a training can't change its "
                "optimizer. Write back what optim_g said, or start anew from models/net_g_ema_*.safetensors "
                "with pretrain_network_g."
            )
        super().load_state_dict(state_dict)
