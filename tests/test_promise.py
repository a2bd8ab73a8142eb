"""benchmarks/promise.py: what equal_budget.py found beside the time in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import promise

NARROW = "AetherNet,embed_dim=12,depths=(1, 1),use_channel_attn=False,use_spatial_attn=False"
WIDE = NARROW.replace("12", "96") + ",bound=1.0"


def test_each_network_stands_with_the_mean_of_its_seeds_and_its_own_time(tmp_path: Path) -> None:
    rows = [
        {"run": NARROW, "seed": seed, "points": [[1, 1.0, 20.0], [2, 2.0, 30.0 + seed]]} for seed in (0, 1)
    ]
    rows.append({"run": WIDE, "seed": 0, "points": [[1, 1.0, 32.0]]})
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"title": "x2, 2 iterations a run", "rows": rows}), encoding="utf-8")
    promise.main([str(file), "--side", "64", "--rounds", "5"])
    lines = (tmp_path / "promise.md").read_text(encoding="utf-8").splitlines()
    assert "64x64 in ONNX Runtime, 1 thread" in lines[0]
    narrow, wide = (
        next(line.split(" | ") for line in lines if line.startswith(f"| {run} |")) for run in (NARROW, WIDE)
    )
    assert narrow[2:] == ["1.00", "30.50", "30.00, 31.00 |"]
    assert wide[3:] == ["32.00", "32.00 |"]
    assert float(wide[2]) > 1.5
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "promise.png").stat().st_size > 1000


def test_a_missing_comparison_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert promise.main([str(tmp_path / "none.json")]) == 2
    assert "equal_budget.py writes it" in capsys.readouterr().err
