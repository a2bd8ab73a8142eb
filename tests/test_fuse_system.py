"""The fuse command on weights of any magnitude, odd names and full disks.

Several runs at once, and closed streams: test_upscale_command.py.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STATE, fuse
from conftest import one_line

from aethersr.checkpoint import ENDINGS
from aethersr.identify import aether_from_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")


NORM = ("weight", "running_var", "running_mean", "bias")
TYPES = (torch.float16, torch.bfloat16, torch.float64)
EXTREMES = [
    *((torch.float32, "norm." + part, value) for part in NORM for value in (0.0, 1e-44, 1e30)),
    *((dtype, "running_var", 6e4) for dtype in TYPES),
    *((dtype, ".norm.weight", torch.finfo(dtype).smallest_normal / 4) for dtype in TYPES),
]


@pytest.mark.parametrize(("dtype", "ending", "value"), EXTREMES)
def test_norms_of_any_magnitude_fuse_or_are_refused(
    checkpoint: Path, capfd: Any, dtype: Any, ending: str, value: float
) -> None:
    """The verification stands in between: what is written equals what was trained."""
    state = {name: torch.full_like(x, value) if name.endswith(ending) else x for name, x in STATE.items()}
    torch.save({name: x.to(dtype) for name, x in state.items()}, checkpoint)
    target = checkpoint.with_name("out.pth")
    if fuse(checkpoint, target) == 0:
        assert capfd.readouterr().err == ""
        aether_from_state_dict(torch.load(target, weights_only=True))
    else:
        assert value == 1e30, "no reason to refuse"
        assert str(checkpoint) in one_line(capfd.readouterr().err)
        assert os.listdir(checkpoint.parent) == ["in.pth"]


NAMES = ["Модель ä '写真' \"😀", "-leading", "a" * 237, "new\nline\x1b[31m\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_the_disk_takes_is_read_and_written(checkpoint: Path, capfd: Any, name: str) -> None:
    folder = checkpoint.parent / name
    folder.mkdir()
    source = folder / f"{name}.pth"
    checkpoint.rename(source)
    for ending in ENDINGS:
        if ending == ".safetensors" and "\udcff" in name:
            continue  # the library takes no path that is not Unicode
        target = folder / f"{name[1:]}{ending}"
        assert fuse(source, target) == 0, capfd.readouterr().err
        assert sorted(os.listdir(folder)) == sorted([source.name, target.name])
        assert fuse(target, folder / "again.pth") == 2
        assert "fused already" in one_line(capfd.readouterr().err)  # it was read back
        target.unlink()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, capfd: Any, ending: str) -> None:
    """A limit to the size of files stands for the disk: writing fails at the same byte, in C code too."""
    target = checkpoint.with_name(f"out{ending}")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        assert fuse(checkpoint, target) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert str(target) in one_line(capfd.readouterr().err)
    assert os.listdir(checkpoint.parent) == ["in.pth"]
