"""Drawn training pairs: complete, the same again, and with both pictures on one pixel grid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, one_line
from PIL import Image, ImageDraw

sys.path.insert(0, str(ROOT / "training"))
import draw_graphics


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_both_pictures_of_a_pair_show_a_disc_at_the_same_place(scale: int) -> None:
    canvas = Image.new("RGB", (draw_graphics.SIDE,) * 2)
    ImageDraw.Draw(canvas).ellipse((301, 203, 1003, 1101), (255, 255, 255))

    def centre(picture: Image.Image, step: int) -> Any:
        values = np.asarray(picture.convert("L"), dtype=float)
        y, x = (np.indices(values.shape) + 0.5) * step
        return np.array([(y * values).sum(), (x * values).sum()]) / values.sum()

    random, kinds = np.random.default_rng(0), set()
    for _ in range(40):
        large, small = draw_graphics.pair(canvas, random, scale)
        assert (large.size, small.size) == ((192, 192), (192 // scale, 192 // scale))
        assert (
            np.abs(centre(large, 1) - centre(small, scale)).max() < 0.1 * scale
        )  # every n-th pixel: half a pixel or more
        kinds.add((large.tobytes(), small.tobytes()))
    assert len(kinds) == 8  # hard or smooth, and four kinds of small pictures


def test_pairs_are_complete_and_the_same_again(tmp_path: Path, capsys: Any) -> None:
    for name in ("one", "two"):
        arguments = [str(tmp_path / name), "--count", "5", "--fonts", str(tmp_path)]
        assert draw_graphics.main(arguments) == 0
    names = sorted(path.name for path in (tmp_path / "one" / "gt").iterdir())
    assert names == [f"graphics_{index:05d}.png" for index in range(5)]
    for path in sorted((tmp_path / "one").rglob("*.png")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        assert len(Image.open(path).getcolors(192 * 192)) > 1, f"{path} is empty"
    capsys.readouterr()
    assert draw_graphics.main(arguments) == 2
    assert "exists" in one_line(capsys.readouterr().err.replace("(FOLDER)", "--folder"), "draw_graphics.py")
