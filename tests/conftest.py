"""Shared by all tests: where the code is, and networks with random statistics (a new one hides errors)."""

from __future__ import annotations

import copy
import functools
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("archs", "", "benchmarks", "demo", "options", "training")]

import aether_arch  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job ignores it, and so would every command that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def randomize(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every tensor of a training-form network values that a trained one could have, statistics too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).mul(std).to(like.dtype)

    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith(("running_var", "temperature")) or (name.endswith("norm.weight")):
                value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
            elif name in ("mean", "bound", "img_range"):
                continue
            elif value.dim() == 4 and value.shape[0] != 1:
                gain = 0.3 if ".ffn.conv_out." in name else 1.0  # else forty gated products in a row explode
                value.copy_(normal(value, gain * value[0].numel() ** -0.5))
            else:
                value.copy_(normal(value, 0.2))
    return net


def small_net(scale: int = 2, **options: Any) -> aether_arch.AetherNet:
    """A small network of every part, with random statistics and no bound, in float64 and evaluation mode."""
    options = {"embed_dim": 24, "depths": (1, 2), "bound": None, **options}
    return randomize(aether_arch.AetherNet(scale=scale, **options)).double().eval()


TINY: Any = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3, "use_channel_attn": False}


def tiny_net(scale: int = 2, **options: Any) -> aether_arch.AetherNet:
    """The smallest, without attention."""
    return small_net(scale, **{**TINY, "use_spatial_attn": False, **options})


def noise(path: Path, *shape: int, **options: Any) -> Path:
    """A picture of these (height, width, channels), by default small; its folder is made."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, shape or (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


X = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(1))
PLAIN = {"use_channel_attn": False, "use_spatial_attn": False, "embed_dim": 16, "lk_kernel": 3}


@functools.lru_cache(maxsize=None)
def _made(form: str, scale: int, options: Any) -> Any:
    net: Any = small_net(scale, **{**PLAIN, **dict(options)}).float()
    if form != "training":
        net.fuse_model()
    if form in ("quantised", "int8"):
        net.prepare_qat(calibration=[X])
    return net.eval().convert_to_quantized() if form == "int8" else net.eval()


def in_form(form: str, scale: int = 2, **options: Any) -> Any:
    """A small network: training, fused, quantised or int8; in evaluation mode, float32, without a bound."""
    return copy.deepcopy(_made(form, scale, tuple(options.items())))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these are many times slower with more, where other work wants the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reader(tmp_path: Path, capfd: pytest.CaptureFixture) -> Any:
    """A folder in which one checkpoint after another is read or refused: see checkpoints.Reader."""
    from checkpoints import Reader

    capfd.readouterr()
    return Reader(tmp_path, capfd)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training checkpoint of the small network in checkpoints.py, the only file of its folder."""
    from checkpoints import STATE

    torch.save({"params": STATE}, tmp_path / "in.pth")
    return tmp_path / "in.pth"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two photographs."""
    from PIL import Image
    from skimage import data

    (tmp_path / "pictures").mkdir()
    for name in ("coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()[:64, :64]).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


def one_line(error: str, program: str = "fuse_aether.py") -> str:
    """The line that a command's error consists of: readable, with its remedy, in the command's own words."""
    assert error.count("\n") == 1, error
    assert error.startswith(f"{program}: error: ")
    line = error[:-1]
    assert line.isprintable(), ascii(line)
    assert re.search(r"--\w+", line), f"no remedy: {line}"
    for words in ("Traceback", "torch.load", "Weights only load failed"):
        assert words not in line, f"PyTorch's words, with its advice to let the code run: {line}"
    return line


def run_onnx(model: Any, image: Any) -> Any:
    """ONNX Runtime's output of a file or a model, as an array."""
    import onnxruntime

    content = model.SerializeToString() if hasattr(model, "graph") else str(model)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": image})[0]


class AsNobody:
    """Inside, files are seen with the rights of another user than root, whom every permission is open to."""

    def __enter__(self) -> None:
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *_: Any) -> None:
        if self.root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's are the user's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)
