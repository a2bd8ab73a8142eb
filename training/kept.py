"""Kept weights: the training form in half precision, which knows how many iterations are behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

import torch
from aether_arch import AetherNet, form_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aethersr.checkpoint import read_checkpoint
from aethersr.errors import UserError
from aethersr.files import Together, check_output


def check_target(target: Path, flag: str, sources: Sequence[Path] = ()) -> None:
    """Raise UserError if weights can't be written there, or it is one of ``sources``."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target} ends in {target.suffix!r}; expected .safetensors ({flag}).")
    check_output(target, sources, True, flag)


def training_form(path: Path, flag: str) -> Mapping[str, Tensor]:
    """The weights in a training checkpoint. UserError: it holds none, or another form."""
    state = read_checkpoint(path, flag).state
    if form_of(state) is not AetherNet:
        raise UserError(
            f"{path} holds no training form of an AetherNet; "
            f"pass a training checkpoint, not the fused weights ({flag})."
        )
    return state


def write_kept(target: Path, weights: Mapping[str, Tensor], stage: str, iterations: int, source: str) -> None:
    """Write a training form, or a quantised one. UserError: half precision can't hold ``source``'s values."""
    state = {name: value.half().contiguous().cpu() for name, value in weights.items()}
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{source}: {broken[0]} is not finite in half precision; nothing was written.")
    form = "training" if form_of(state) is AetherNet else "qat"
    notes = {"format": "pt", "form": form, "stage": stage, "iterations": str(iterations)}
    with Together() as files:
        save_file(state, str(files.part(target)), notes)
        files.commit()
    print(f"Wrote {target}: {iterations} iterations")


def iterations_of(weights: Path, stage: str) -> int:
    """The number of iterations of a stage behind kept weights; those of an earlier stage don't count.

    0 if the file doesn't say.
    """
    if weights.suffix != ".safetensors":
        return 0
    with safe_open(str(weights), "pt") as file:
        metadata = file.metadata() or {}
    return int(metadata.get("iterations", 0)) if metadata.get("stage", "float") == stage else 0
