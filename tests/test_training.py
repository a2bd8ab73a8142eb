"""The scripts that made the shipped weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_drawn_pairs_are_reductions_of_each_other_and_always_the_same(scale: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "training" / "prepare_pictures.py"), "--drawn", "12", "--scale", str(scale)]
    for name in ("one", "two"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "one" / "gt").iterdir())
    assert len(names) == 12
    assert names == sorted(path.name for path in (tmp_path / "one" / "lq").iterdir())
    for name in names:
        gt, lq = (Image.open(tmp_path / "one" / folder / name) for folder in ("gt", "lq"))
        assert gt.size == (lq.width * scale, lq.height * scale)
        inner = (slice(4, -4), slice(4, -4))  # a reduction of the cut alone has a border of its own
        again = np.asarray(gt.resize(lq.size, Image.Resampling.BICUBIC), dtype=int)[inner]
        assert np.abs(again - np.asarray(lq, dtype=int)[inner]).max() <= 1
        assert (tmp_path / "one" / "gt" / name).read_bytes() == (tmp_path / "two" / "gt" / name).read_bytes()
