"""SOAP in single precision for traiNNer-redux; copy it into ``traiNNer/optimizers``.

traiNNer-redux calls its optimizers inside autocast. SOAP multiplies gradients with each other there: in fp16
small products become zero, and on a CPU it ends with an error.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

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
