"""Checkpoints for the tests: one small network's, in the layouts that people have, and a reader of them."""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

import torch
from aether_arch import AetherNet, DeploymentNorm, ReparamLargeKernelConv
from conftest import small_net
from safetensors.torch import save
from torch import Tensor

from aethersr.checkpoint import read_checkpoint
from aethersr.errors import UserError
from aethersr.identify import aether_from_state_dict

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
NET = small_net(2, **TINY).float()
STATE: Dict[str, Tensor] = NET.state_dict()
FUSED: Dict[str, Tensor] = NET.fused().state_dict()


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


OLD: Dict[str, Any] = {"_use_new_zipfile_serialization": False}  # as before PyTorch 1.6
FILES = {
    "net.pth": saved({"params": STATE}),
    "old.pth": saved({"params": STATE}, **OLD),
    "net.safetensors": save(STATE),
}


def with_mean(value: Any) -> bytes:
    return saved({**STATE, "mean": value})


def safetensors_of(header: Dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def under(prefix: str, state: Mapping[str, Any]) -> Dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def tied(blocks: int) -> Dict[str, Tensor]:
    """A whole network whose blocks share their tensors, of 1.3 MiB a block."""
    net = AetherNet(2, embed_dim=192, depths=(1,), lk_kernel=3, use_channel_attn=False)
    state = net.state_dict()
    for name, tensor in net.state_dict().items():
        state.update({name.replace("s.0.0.", f"s.0.{k}."): tensor for k in range(blocks)})
    return state


FORMS: Dict[str, Callable[[Any], Any]] = {
    "training": lambda net: net,
    "fused": lambda net: net.fused(),
    "quantised": lambda net: net.prepare_qat(calibration=[torch.rand(1, net.mean.numel(), 16, 16)]).eval(),
    "int8": lambda net: FORMS["quantised"](net).convert_to_quantized(),
}


def fuse(source: Any, target: Any, *options: Any) -> int:
    """The fuse command's exit code, in this process and on the CPU."""
    from aethersr.commands.fuse import main

    words = ["--model_path", source, "--output_path", target, *options, "--device", "cpu"]
    return main([str(word) for word in words])


class Reader:
    """A folder in which one file after another is read or refused."""

    def __init__(self, folder: Path, capfd: Any) -> None:
        self.folder, self.capfd = folder, capfd

    def read(self, name: str, content: bytes) -> str:
        """The error, or "" where the file is a whole network."""
        path = self.folder / name
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                aether_from_state_dict(read_checkpoint(path).state)
        except UserError as error:
            line = str(error)
            assert str(path) in line
            assert re.search(r"--model_path\b", line), line
            for words in ("torch.load", "Weights only load failed", "Traceback"):
                assert words not in line, "PyTorch's own words, with its advice to let the code run"
        except ValueError as error:  # not whole; the command puts the file's name before it
            line = str(error)
        else:
            line = ""
        assert "\n" not in line
        assert len(line) < 700
        assert path.read_bytes() == content, "the input was changed"
        assert [other.name for other in self.folder.iterdir()] == [name]
        assert self.capfd.readouterr().err == "", "libraries write to the file descriptor too"
        path.unlink()
        return line

    def refuses(self, name: str, content: bytes, words: str = "") -> str:
        line = self.read(name, content)
        assert line, "it was read"
        assert words in line, line
        return line


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
