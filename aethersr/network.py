"""The network in a file, weights, ONNX or NCNN, as a function from pictures to upscaled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import numpy as np
import torch
from aether_arch import AetherBase
from torch import Tensor

from aethersr.errors import Refused, UserError, first_line, naming, need
from aethersr.identify import read_network
from aethersr.tiling import receptive_field
from aethersr.untrusted import check_kind


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
    """An exported AetherNet. Raises Refused for other files."""

    def __init__(self, path: Path, device: Optional[str]) -> None:
        need("onnx onnxruntime", str(path), "onnx")
        import onnx
        import onnxruntime

        cuda = "CUDAExecutionProvider"
        has_cuda = cuda in onnxruntime.get_available_providers()
        if device == "cuda" and not has_cuda:
            found = f"--device cuda was given, but this ONNX Runtime has no {cuda}"
            raise UserError(f"{found}: pip install onnxruntime-gpu, or pass --device cpu.")
        on_card = has_cuda and (device == "cuda" or (device is None and torch.cuda.is_available()))
        provider = cuda if on_card else "CPUExecutionProvider"
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # the command reports what fails
            more = {"providers": [provider], "enable_fallback": 0}  # it would say that it tries another
            self.session = onnxruntime.InferenceSession(str(path), options, **more)
            self.reach = _receptive_field(onnx.load(str(path)).graph)
        except Exception as error:
            raise Refused(f"is not a readable ONNX file ({first_line(error)}); export it again") from None
        inputs = self.session.get_inputs()
        source, types = inputs[0], {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
        self.name, self.dtype = source.name, types.get(source.type)
        fixed = [isinstance(side, int) for side in source.shape]
        known = len(inputs) == 1 and self.dtype and len(fixed) == 4 and fixed[1] and fixed[2] == fixed[3]
        if not known or (fixed[0] and source.shape[0] != 1):
            found = f"takes {', '.join(f'{value.type} {value.shape}' for value in inputs)}"
            expected = "floats (batch, channels, height, width) of any size, or one picture of one size"
            raise Refused(f"{found}, expected {expected}; export it again")
        self.in_chans: int = source.shape[1]
        self.one_by_one = fixed[0]
        self.size: Optional[Tuple[int, int]] = tuple(source.shape[2:]) if fixed[2] else None
        self.scale = _scale(self)

    def __call__(self, image: Tensor) -> Tensor:
        batches = image.split(1) if self.one_by_one else [image]
        results = [self.session.run(None, {self.name: batch.to(self.dtype).numpy()})[0] for batch in batches]
        return torch.from_numpy(np.concatenate(results)).to(image.dtype)


class NcnnNetwork:
    """NCNN's two files, by the first. Raises Refused for other files."""

    size: Optional[Tuple[int, int]] = None

    def __init__(self, path: Path) -> None:
        need("ncnn", str(path), "ncnn")
        import ncnn

        from aethersr.ncnn import channels_and_reach, run

        self.net, self.run, weights = ncnn.Net(), run, path.with_suffix(".bin")
        if not weights.is_file() or self.net.load_param(str(path)) or self.net.load_model(str(weights)):
            raise Refused(f"and {weights.name} are not the two files of an NCNN network; pass others")
        self.in_chans, self.reach = channels_and_reach(path)
        if not self.in_chans:
            raise Refused("takes an unknown number of channels; pass another network")
        self.scale = _scale(self)

    def __call__(self, image: Tensor) -> Tensor:
        return torch.cat([self.run(self.net, each) for each in image.float().cpu().split(1)])


def _receptive_field(graph: Any) -> int:
    """The sum over the longest path: a convolution of size k sees k // 2 pixels round its own (in input
    pixels, because the pixel shuffle comes last)."""
    reach: Dict[str, int] = {}
    for node in graph.node:  # in ONNX they are sorted: inputs come first
        kernel = next((each.ints for each in node.attribute if each.name == "kernel_shape"), [1])
        seen = max((reach.get(name, 0) for name in node.input), default=0) + max(kernel) // 2
        reach.update(dict.fromkeys(node.output, seen))
    return max(reach.values())


def _scale(net: Any) -> int:
    """The scale, found by running ``net`` once."""
    height, width = net.size or (8, 8)
    try:
        shape = tuple(net(torch.zeros(1, net.in_chans, height, width)).shape)
    except Exception as error:  # ONNX Runtime raises many kinds
        raise Refused(f"does not run ({first_line(error)}); pass a file that aether-fuse wrote") from None
    scale = shape[-1] // width if len(shape) == 4 else 0
    if scale < 1 or shape != (1, net.in_chans, height * scale, width * scale):
        found = f"turns {width}x{height} pixels into {shape}"
        raise Refused(f"{found}, expected a network that upscales pictures; pass another")
    return int(scale)


# Takes (N, in_chans, H, W) on any device and returns (N, in_chans, scale * H, scale * W). ``reach`` is the
# overlap that leaves no seams, ``size`` the only (height, width) that it takes, if fixed.
Network = Union[TorchNetwork, OnnxNetwork, NcnnNetwork]


def load_network(
    path: Path,
    device: Optional[str] = None,
    fp16: bool = False,
    img_range: Optional[float] = None,
    flag: str = "--model",
) -> Network:
    """The network in a file: weights of any form, which are fused, ONNX (.onnx) or NCNN (.param).

    Without ``device`` it runs on the GPU, if there is one and what runs the file can use it. ``img_range``:
    see aether_from_state_dict.

    Raises:
        UserError: no network, or device, precision or img_range don't fit it; it names the option ``flag``.
    """
    ending = path.suffix.lower()
    if ending in (".onnx", ".param"):
        if fp16 or img_range is not None:
            option = "--fp16" if fp16 else "--img_range"
            raise UserError(f"{option} can't change {path}; leave it out, or pass the weights ({flag}).")
        with naming(path, flag):
            with path.open("rb") as file:
                check_kind(file.read(512), weights=False)
            return NcnnNetwork(path) if ending == ".param" else OnnxNetwork(path, device)
    net = read_network(path, flag, img_range)
    if not getattr(net, "is_int8", False):
        net = net.fused()
    elif fp16:
        found = f"--fp16 can't change {path}, whose int8 weights are rounded in float32"
        raise UserError(f"{found}; leave --fp16 out.")
    net = net.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout
    return TorchNetwork(net.half() if fp16 else net)
