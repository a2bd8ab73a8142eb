"""training/compare.py: a column for bicubic, each network and the photograph, with their PSNR."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT, small_net
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "training"))
import compare

from aethersr.quality import psnr, resize


def test_columns_are_labelled_with_what_was_measured(tmp_path: Path, capsys: Any) -> None:
    truth = photographs.astronaut()[:96, 200:296]
    Image.fromarray(truth).save(tmp_path / "photo.png")
    save_file(small_net(2).float().state_dict(), tmp_path / "net.safetensors")
    output, ours = tmp_path / "shown.jpg", f"ours={tmp_path / 'net.safetensors'}"
    command = [str(tmp_path / "photo.png"), str(output), ours, "--details", "0,0"]
    assert compare.main(command) == 0
    decibels = psnr(truth, resize(resize(truth, 48, 48), 96, 96), 2)
    assert f"bicubic {decibels:.2f} dB, ours " in capsys.readouterr().out
    shown = np.asarray(Image.open(output))
    assert shown.shape[1] > 3 * 96 * 3
    assert compare.main([*command, "--jpeg", "5"]) == 0
    assert f"bicubic {decibels:.2f} dB" not in capsys.readouterr().out


def test_networks_of_two_scales_are_refused_and_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(photographs.astronaut()[:96, :96]).save(tmp_path / "photo.png")
    files = []
    for scale in (2, 4):
        save_file(small_net(scale).float().state_dict(), tmp_path / f"{scale}.safetensors")
        files.append(f"x{scale}={tmp_path / f'{scale}.safetensors'}")
    assert compare.main([str(tmp_path / "photo.png"), str(tmp_path / "shown.jpg"), *files]) == 2
    assert "pass networks of one scale" in capsys.readouterr().err
    assert not (tmp_path / "shown.jpg").exists()
