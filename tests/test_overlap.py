"""training/overlap.py finds a test picture among training cuts, however it was cut, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "training"))
import overlap

FACE = Image.fromarray(photographs.astronaut()[20:404, 100:484])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A cut of a cat, a flat cut, and test pictures that they are not from."""
    cuts, tests = tmp_path / "cuts", tmp_path / "tests"
    cuts.mkdir()
    tests.mkdir()
    Image.fromarray(photographs.chelsea()[100:292, 100:292]).save(cuts / "cat.png")
    Image.new("RGB", (64, 64), "grey").save(cuts / "flat.png")
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(photographs, name)()).save(tests / f"{name}.png")
    return cuts, tests


def test_other_pictures_and_a_pattern_that_looks_like_one_place_have_nothing_in_common(
    folders: tuple[Path, Path], capsys: Any
) -> None:
    cuts, tests = folders
    eye = np.zeros((48, 48, 3), np.uint8)
    eye[16:32, 12:36] = 255
    Image.fromarray(np.pad(eye, ((40, 40), (40, 40), (0, 0)))).save(tests / "eye.png")
    Image.fromarray(np.tile(eye, (12, 12, 1))).save(cuts / "eyes.png")
    assert overlap.main([str(cuts), str(tests)]) == 0
    assert "3 pictures, 3 cuts" in capsys.readouterr().out


@pytest.mark.parametrize("change", [
    lambda cut: cut.rotate(90),
    lambda cut: cut.resize((192, 192), Image.Resampling.BICUBIC),
    lambda cut: cut.crop((90, 60, 282, 252)).convert("L"),
])  # fmt: skip
def test_a_test_picture_among_the_cuts_is_found(
    folders: tuple[Path, Path], change: Callable[[Image.Image], Image.Image], capsys: Any
) -> None:
    cuts, tests = folders
    change(FACE).save(cuts / "face.jpg", quality=75)
    assert overlap.main([str(cuts), str(tests)]) == 2
    printed = capsys.readouterr()
    assert "of face.jpg in astronaut.png" in printed.out
    assert re.search(r"face.jpg shows \S+astronaut.png;", printed.err)


@pytest.mark.parametrize(("name", "words"), [("none", "is not a folder"), ("flat.png", "with details")])
def test_a_folder_without_pictures_or_details_ends_in_one_line(
    name: str, words: str, folders: tuple[Path, Path], capsys: Any
) -> None:
    assert overlap.main([str(folders[0]), str(folders[0] / name)]) == 2
    assert words in capsys.readouterr().err
