"""The demo: its checks, its launcher for BasicSR, and one short run of everything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import basicsr_train
import pytest
import skimage.data
import torch
from PIL import Image

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


def test_what_cannot_be_used_is_named_in_one_line_and_stays_as_it_is(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    output = ["--quick", "--output"]
    for main, words, said in (
        (demo.main, [*output, str(tmp_path)], "is not an empty folder; name another (--output)"),
        (demo.main, [*output, str(tmp_path / "thesis.txt" / "demo")], "; pass another folder (--output)."),
        (basicsr_train.main, ["-opt", "nowhere.yml"], "error: there is no options file nowhere.yml"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_quick_run_goes_from_photographs_to_a_picture(tmp_path: Path, capsys: Any) -> None:
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    table = printed.split("| PSNR-Y, dB / SSIM | astronaut |")[1]
    names = ["bicubic", "aether_small_x2.pth", "aether_small_x2_fp32.onnx"]
    assert re.findall(r"^\| (\S+) \|", table, re.MULTILINE) == names
    assert "ms, 96x96, cpu" in printed
    assert "seed 0: 6 iterations" in printed
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 3 * 3 * demo.SIZE
    state = torch.load(tmp_path / "aether_small_x2.pth", weights_only=True)
    assert any("reparam_conv" in name for name in state)
