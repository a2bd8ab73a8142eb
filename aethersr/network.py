"""The network in a file, weights or ONNX, as a function from pictures to upscaled pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Optional, Protocol, Tuple

import numpy as np
import torch
from aether_arch import AetherBase
from torch import Tensor

from aethersr.checkpoint import read_checkpoint
from aethersr.errors import UserError, first_line, missing_package
from aethersr.identify import aether_from_state_dict
from aethersr.tiling import receptive_field


class Network(Protocol):
    """Takes (N, in_chans, H, W) on any device and returns (N, in_chans, scale * H, scale * W).

    ``reach`` is the overlap that leaves no seams, ``size`` the only (height, width) that it takes, if fixed.
    """

    in_chans: int
    scale: int
    reach: int
    size: Optional[Tuple[int, int]]

    def __call__(self, image: Tensor) -> Tensor: ...


class TorchNetwork:
    """An AetherNet of any form, on its device and in its precision."""

    size: Optional[Tuple[int, int]] = None

    def __init__(self, net: AetherBase) -> None:
        self.net = net.eval()
        self.in_chans, self.scale, self.reach = net.options["in_chans"], net.scale, receptive_field(net)
        self.like = next(net.parameters())

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        return self.net(image.to(self.like.device, self.like.dtype))


class OnnxNetwork:
    """An exported AetherNet."""

    def __init__(self, path: Path, device: Optional[str]) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise missing_package(error, str(path), "onnx") from None
        again = "export it again (--model)"
        cuda = "CUDAExecutionProvider"
        has_cuda = cuda in onnxruntime.get_available_providers()
        if device == "cuda" and not has_cuda:
            raise UserError(
                f"--device cuda was given, but this ONNX Runtime has no {cuda}: "
                "pip install onnxruntime-gpu, or pass --device cpu."
            )
        wanted = device == "cuda" or (device is None and torch.cuda.is_available())
        provider = cuda if wanted and has_cuda else "CPUExecutionProvider"
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # the command reports what fails
            # It would try again on the processor, and say so.
            more = {"providers": [provider], "enable_fallback": 0}
            self.session = onnxruntime.InferenceSession(str(path), options, **more)
            self.reach = _receptive_field(onnx.load(str(path)).graph)
        except Exception as error:
            raise UserError(f"{path} is not a readable ONNX file ({first_line(error)}); {again}.") from None
        inputs = self.session.get_inputs()
        source, types = inputs[0], {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
        self.name, self.dtype = source.name, types.get(source.type)
        if self.dtype is None or len(source.shape) != 4 or not isinstance(source.shape[1], int):
            found = f"{path} takes {source.type} {source.shape}"
            raise UserError(f"{found}, expected float (batch, channels, height, width); {again}.")
        self.in_chans: int = source.shape[1]
        fixed = [isinstance(side, int) for side in source.shape]
        if fixed[2] != fixed[3] or (fixed[0] and source.shape[0] != 1) or len(inputs) > 1:
            raise UserError(
                f"{path} takes {[value.shape for value in inputs]}, expected pictures of any size, "
                f"or one picture of one size; {again}."
            )
        self.one_by_one = fixed[0]
        self.size: Optional[Tuple[int, int]] = tuple(source.shape[2:]) if fixed[2] else None
        height, width = self.size or (8, 8)
        try:
            shape = self(torch.zeros(1, self.in_chans, height, width)).shape
        except Exception as error:  # ONNX Runtime raises many kinds
            raise UserError(f"{path} does not run ({first_line(error)}); {again}.") from None
        self.scale = shape[-1] // width if len(shape) == 4 else 0
        if self.scale < 1 or tuple(shape) != (1, self.in_chans, height * self.scale, width * self.scale):
            raise UserError(
                f"{path} turns {width}x{height} pixels into {tuple(shape)}, "
                "expected a network that upscales pictures (--model)."
            )

    def __call__(self, image: Tensor) -> Tensor:
        batches = image.split(1) if self.one_by_one else [image]
        results = [self.session.run(None, {self.name: batch.to(self.dtype).numpy()})[0] for batch in batches]
        return torch.from_numpy(np.concatenate(results)).to(image.dtype)


def _receptive_field(graph: Any) -> int:
    """The sum over the longest path: a convolution of size k sees k // 2 pixels round its own.

    The pixel shuffle comes last, so all of it is in input pixels.
    """
    reach: Dict[str, int] = {}
    for node in graph.node:  # in ONNX they are sorted: inputs come first
        kernel = next(
            (attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape"), [1]
        )
        seen = max((reach.get(name, 0) for name in node.input), default=0) + max(kernel) // 2
        reach.update(dict.fromkeys(node.output, seen))
    return max(reach.values())


def load_network(path: Path, device: Optional[str], fp16: bool) -> Network:
    """The network in a file: weights of any form, which are fused, or an exported ONNX file.

    Without ``device`` it runs on the GPU, if there is one and what runs the file can use it.

    Raises:
        UserError: the file holds no network, or device or precision don't fit it.
    """
    if path.suffix.lower() == ".onnx":
        if fp16:
            raise UserError(
                f"--fp16 can't change {path}; export it with precision fp16, or leave --fp16 out."
            )
        if not os.path.isfile(path):
            found = "is not a file" if os.path.exists(path) else "does not exist"
            raise UserError(f"{path} {found}; pass the network with --model.")
        return OnnxNetwork(path, device)
    try:
        net = aether_from_state_dict(read_checkpoint(path, "--model").state)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass the weights of an AetherNet (--model).") from None
    if not getattr(net, "is_int8", False):
        net = net.fused()
    elif fp16:
        raise UserError(
            f"--fp16 can't change {path}, whose int8 weights are rounded in float32; leave --fp16 out."
        )
    net = net.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout
    return TorchNetwork(net.half() if fp16 else net)
