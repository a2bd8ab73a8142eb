"""training/release.py: fused weights in half precision, or one line that says why not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, small_net
from safetensors import safe_open

sys.path.insert(0, str(ROOT / "training"))
import release

from aethersr.checkpoint import read_checkpoint
from aethersr.identify import aether_from_state_dict


def test_the_file_holds_the_fused_network_in_half_precision(tmp_path: Path, capsys: Any) -> None:
    net = small_net(2).float()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    target = tmp_path / "2x_a.safetensors"
    assert release.main([str(tmp_path / "a.pth"), str(target)]) == 0
    assert f"Wrote {target}" in capsys.readouterr().out
    with safe_open(str(target), "pt") as file:
        assert {name: file.metadata()[name] for name in ("scale", "form")} == {"scale": "2", "form": "fused"}
    state = read_checkpoint(target).state
    assert {value.dtype for value in state.values()} == {torch.float16}
    x = torch.rand(1, 3, 12, 15)
    with torch.no_grad():
        torch.testing.assert_close(aether_from_state_dict(state).float()(x), net(x), atol=4e-3, rtol=0)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("ends in '.pth'; expected .safetensors", ["a.pth", "b.pth"]),
        ("does not exist; make it", ["a.pth", "none/b.safetensors"]),
        ("fused weights can't get a bound", ["fused.pth", "b.safetensors", "--bound", "1"]),
        ("--bound 70000 is not possible", ["a.pth", "b.safetensors", "--bound", "70000"]),
        ("can't be written", ["a.pth", f"{'b' * 300}.safetensors"]),
    ],
)
def test_what_it_cannot_write_is_said_in_one_line(
    words: str, arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = small_net(2).float()
    torch.save(net.state_dict(), "a.pth")
    torch.save(net.fused().state_dict(), "fused.pth")
    assert release.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "fused.pth"]
