"""NCNN files: written from the fused network through pnnx, run in ncnn, and only then kept."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, List, Tuple

import torch
from aether_arch import AetherBase, ChannelAttention, SpatialAttention
from torch import Tensor
from torch.nn import functional as F

from aethersr.errors import UserError, need
from aethersr.exported import ExportTail, for_export
from aethersr.onnx import picture

WAY_OUT = "pip install -U ncnn pnnx, or leave --ncnn out."


def convert(model: AetherBase) -> Tuple[bytes, bytes]:
    """The .param and the .bin file of the fused network, checked in ncnn on three odd sizes; it stays.

    The input blob is ``data`` (in_chans, H, W) in [0, 1], the output blob ``output`` (in_chans, scale * H,
    scale * W), as Upscayl and others expect. H and W can be any size; weights are in half precision. Raises
    UserError if ncnn or pnnx is missing, or ncnn's output is more than a step of 1/255 off.
    """
    need("ncnn pnnx", "an NCNN file", "ncnn")
    import ncnn
    import pnnx

    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        reference = model.fused().cpu().float()
        channels = model.options["in_chans"]
        image = picture(torch.float32, 1, channels, 19, 23)
        torch.jit.trace(for_chainner(reference), image, check_trace=False).save(f"{folder}/net.pt")
        shapes = [f"inputshape=[1,{channels},19,23]", f"inputshape2=[1,{channels},34,26]"]  # so any size is
        done = subprocess.run([pnnx.EXEC_PATH, "net.pt", *shapes], cwd=folder, capture_output=True, text=True)
        param, weights = (Path(folder, f"net.ncnn.{ending}") for ending in ("param", "bin"))
        if not (param.is_file() and weights.is_file()):
            raise UserError(f"pnnx stopped with code {done.returncode}; {WAY_OUT}")
        named = re.sub(r"\bin0\b", "data", param.read_text(encoding="ascii"))
        param.write_text(re.sub(r"\bout0\b", "output", named), encoding="ascii")
        net = ncnn.Net()
        net.load_param(str(param)), net.load_model(str(weights))
        for height, width in ((17, 31), (33, 13), (9, 1)):
            image = picture(torch.float32, 1, channels, height, width)
            expected, output = reference(image), run(net, image)
            same = output.shape == expected.shape
            difference = float((output - expected).abs().max()) if same else math.inf
            # One step of 1/255, or in proportion if the output goes far beyond a picture's range.
            allowed = max(1.0, float(expected.abs().max())) / 255
            if not difference <= allowed:
                found = f"ncnn differs from the network by {difference:.3g} at {width}x{height}"
                raise UserError(f"{found}, expected at most {allowed:.3g}; {WAY_OUT}")
        return param.read_bytes(), weights.read_bytes()


def for_chainner(network: Any) -> Any:
    """exported.for_export without what chaiNNer breaks: it rewrites a file before loading it.

    It drops a Reduction's "not all axes", and a pad_top of 0 if pad_left differs. So means over one axis are
    poolings here, and ExportTail has no rows to pad.
    """
    network = for_export(network)
    network.tail.__class__ = _Tail
    for module in network.modules():
        if isinstance(module, ChannelAttention):
            module.__class__ = _ChannelAttention
        elif isinstance(module, SpatialAttention):
            module.__class__, module.channels = _SpatialAttention, network.options["embed_dim"]
    return network


class _Tail(ExportTail):
    def mean(self, x: Tensor, dim: int) -> Tensor:
        return F.adaptive_avg_pool2d(x, (1, None) if dim == 2 else (None, 1))

    def line(self, x: Tensor, masks: List[Tensor], dim: int) -> Tensor:
        share = self.mean(masks[0], dim)  # one line's share of the picture
        lines = [self.mean(x * mask, dim) / share for mask in masks]
        return torch.cat(lines, 1) if len(lines) > 1 else lines[0]


class _ChannelAttention(ChannelAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(F.adaptive_avg_pool2d(x, 1))


class _SpatialAttention(SpatialAttention):
    channels: int

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 3, 2, 1)  # channels last, so that pooling over them is pooling along a row
        window = [1, self.channels]
        pooled = [pool(pixels, window, 1).permute(0, 3, 2, 1) for pool in (F.max_pool2d, F.avg_pool2d)]
        return x * torch.sigmoid(self.conv(torch.cat(pooled, 1)))


def named_for_upscayl(stem: str, scale: int) -> str:
    """A file name from which Upscayl reads the right scale: ``2x_`` is put in front if it would read another.

    Upscayl takes the first of 1, 2, 3, 4 and 8 that the name contains as ``2x`` or ``x2``.
    """
    found = [each for each in (1, 2, 3, 4, 8) if re.search(f"{each}x|x{each}", stem.lower())]
    return stem if found[:1] == [scale] else f"{scale}x_{stem}"


def channels_and_reach(param: Path) -> Tuple[int, int]:
    """The channels that the first convolution of an NCNN file takes, or 0, and how far all together see.

    ncnn itself doesn't check: a picture of other channels makes it read past the weights.
    """
    lines = re.findall("^Convolution.*", param.read_text("utf-8", "replace"), re.MULTILINE)
    sizes = [{int(k): int(v) for k, v in re.findall(r" ([016])=(\d+)", line)} for line in lines] or [{}]
    channels = sizes[0].get(6, 0) // max(1, sizes[0].get(0, 0) * sizes[0].get(1, 0) ** 2)
    return channels, sum(size.get(1, 0) // 2 for size in sizes)  # a little more, as if all were in a row


def run(net: Any, image: Tensor) -> Tensor:
    """An ncnn.Net's output for one picture (1, in_chans, H, W). ValueError: there is none."""
    import ncnn
    import numpy as np

    if "data" not in net.input_names() or "output" not in net.output_names():
        raise ValueError("ncnn finds no blobs named data and output")
    extractor = net.create_extractor()
    pixels = np.ascontiguousarray(image[0].numpy())  # a Mat doesn't keep what it reads alive
    failed = extractor.input("data", ncnn.Mat(pixels).clone())
    failed, output = (failed, None) if failed else extractor.extract("output")
    if failed:
        raise ValueError(f"ncnn stopped with code {failed} on a picture of {image.shape[3]}x{image.shape[2]}")
    return torch.from_numpy(np.array(output))[None]
