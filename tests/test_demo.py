"""The demo: its checks, its launcher for BasicSR, and one short run of everything."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))
import basicsr_train

import demo


def test_every_photograph_ships_inside_scikit_image_and_one_is_held_out() -> None:
    assert demo.HELD_OUT not in demo.TRAINING
    for name in (demo.HELD_OUT, *demo.TRAINING):
        stem = {"immunohistochemistry": "ihc"}.get(name, name)
        assert list(Path(skimage.data.__file__).parent.glob(f"{stem}.*")), f"{name} would be downloaded"


def test_a_network_that_loses_to_bicubic_is_named() -> None:
    demo.check(30, [31, 30.5])
    for networks in ([31, 29.5], [31, float("nan")]):
        with pytest.raises(demo.UserError, match="bicubic 30;"):
            demo.check(30, networks)


def test_the_launcher_names_a_missing_options_file_in_one_line(capsys: Any) -> None:
    assert basicsr_train.main(["-opt", "nowhere.yml"]) == 2
    assert "error: there is no options file nowhere.yml" in capsys.readouterr().err


def test_a_folder_in_use_stays_as_it_is(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 2
    assert "is not an empty folder; name another" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert demo.main(["--quick", "--output", str(tmp_path / "file" / "demo")]) == 2
    assert "; pass another folder (--output)." in capsys.readouterr().err


def test_a_quick_run_goes_from_photographs_to_a_picture(tmp_path: Path, capsys: Any) -> None:
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    table = printed.split("| PSNR-Y, dB / SSIM | astronaut |")[1]
    names = ["bicubic", "aether_small_x2.pth", "aether_small_x2_fp32.onnx"]
    assert re.findall(r"^\| (\S+) \|", table, re.MULTILINE) == names
    assert "ms, 64x64, cpu" in printed
    assert "seed 0: 6 iterations" in printed
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 3 * 3 * demo.SIZE
    state = torch.load(tmp_path / "aether_small_x2.pth", weights_only=True)
    assert any("reparam_conv" in name for name in state)
