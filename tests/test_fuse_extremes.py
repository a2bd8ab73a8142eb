"""Weights of any magnitude fuse into a verified file or are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from checkpoints import STATE
from conftest import one_line
from damage import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from aethersr.commands import fuse
from aethersr.identify import aether_from_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")
Outcome = Callable[[Dict[str, Tensor]], str]


@pytest.fixture
def outcome(tmp_path: Path, capfd: Any) -> Outcome:
    """Fuses a checkpoint, or expects it to be refused in one line, with nothing written."""
    source, target = tmp_path / "net.safetensors", tmp_path / "out.pth"

    def run(state: Dict[str, Tensor]) -> str:
        save_file(state, source)
        content = source.read_bytes()
        capfd.readouterr()
        code = fuse.main(["--model_path", str(source), "--output_path", str(target), "--device", "cpu"])
        error = capfd.readouterr().err  # of the descriptor: libraries write there too
        assert source.read_bytes() == content, "the input was changed"
        if code == 2:
            assert str(source) in one_line(error)
            assert [path.name for path in tmp_path.iterdir()] == [source.name]
            return "refused"
        assert (code, error) == (0, "")
        aether_from_state_dict(torch.load(target, weights_only=True))
        target.unlink()
        return "fused"

    return run


def changed(ending: str, value: float, dtype: torch.dtype = torch.float32) -> Dict[str, Tensor]:
    filled = {name: torch.full_like(each, value) for name, each in STATE.items() if name.endswith(ending)}
    return {name: tensor.to(dtype) for name, tensor in {**STATE, **filled}.items()}


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-12, 1e5, 1e30])
def test_norms_of_any_weight_and_variance_fuse_or_are_refused(outcome: Outcome, value: float) -> None:
    """The verification stands in between: what is written equals what was trained."""
    for ending in ("norm.weight", "norm.running_var", "norm.running_mean", "norm.bias"):
        for part in (ending, "." + ending):  # the last norm too, or those of the blocks alone
            if outcome(changed(part, value)) == "refused":
                assert value > 1, f"{part} = {value} is no reason to refuse"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read_with_their_extremes(outcome: Outcome, dtype: torch.dtype) -> None:
    smallest = float(torch.finfo(dtype).smallest_normal) / 4
    for ending, value in (("running_var", smallest), ("norm.running_var", 6e4), (".norm.weight", smallest)):
        assert outcome(changed(ending, value, dtype)) == "fused"


@pytest.mark.slow
@settings(FUZZ, max_examples=30)
@given(
    data=st.lists(
        st.tuples(st.sampled_from(list(STATE)), st.integers(-149, 127), st.booleans()), min_size=1, max_size=4
    )
)
def test_weights_of_any_magnitude_fuse_or_are_refused(
    outcome: Outcome, data: List[Tuple[str, int, bool]]
) -> None:
    state = dict(STATE)
    for name, exponent, single in data:
        value = state[name] = state[name].clone()
        part = value.view(-1)[-1:] if single else value
        signs = torch.ones_like(part) if "running_var" in name else part.sign()
        part.copy_(signs * 2.0**exponent)
    outcome(state)
