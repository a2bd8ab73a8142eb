"""The demo: its helpers, its launcher for BasicSR, and one short run of everything."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))
import basicsr_train
import sheet

import demo


def test_training_pairs_show_the_same_place(tmp_path: Path) -> None:
    count = demo.prepare_data(tmp_path, ["rocket"])
    assert 5 < count < (640 // 96) * (426 // 96), "the plain sky should have been left out"
    for name in sorted(path.name for path in (tmp_path / "gt").iterdir())[:5]:
        gt, lq = (Image.open(tmp_path / sub / name) for sub in ("gt", "lq"))
        assert (gt.size, lq.size) == ((96, 96), (48, 48))
        # Away from the border the cut's own reduction is the cut of the whole photograph's reduction.
        difference = np.abs(np.asarray(demo.reduced(gt), dtype=int) - np.asarray(lq, dtype=int))[4:-4, 4:-4]
        assert difference.max() == 0, f"{name}: {difference.max()} > 0"


def test_every_photograph_ships_inside_scikit_image_and_one_is_held_out() -> None:
    import skimage.data

    assert demo.HELD_OUT not in demo.TRAINING
    for name in (demo.HELD_OUT, *demo.TRAINING):
        stem = {"immunohistochemistry": "ihc"}.get(name, name)
        assert list(Path(skimage.data.__file__).parent.glob(f"{stem}.*")), f"{name} would be downloaded"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((30, 31, 31.005, 31), "None"),
        ((30, 31, 31.02, 31), "differ"),
        ((30, 29, 29, 29), "bicubic"),
        ((30, float("nan"), 31, 31), "differ"),
    ],
)
def test_networks_that_disagree_or_lose_to_bicubic_are_named(values: Tuple[float, ...], words: str) -> None:
    picture = Image.new("RGB", (8, 8))
    assert words in str(demo.complaint([demo.Result("", picture, value, 0.9, 1.0) for value in values]))


def test_the_launcher_registers_the_file_once_and_prefers_a_copy_inside_basicsr(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("basicsr")
    if spec is None or spec.origin is None:
        pytest.skip("BasicSR is not installed: see requirements-basicsr.txt")
    code = f"""import sys; sys.path[:0] = {[str(tmp_path), str(ROOT / "demo")]}
import basicsr_train
module = basicsr_train.register_aether()
assert basicsr_train.register_aether() is module
from basicsr.utils.registry import ARCH_REGISTRY
assert isinstance(ARCH_REGISTRY.get("aether_small")(scale=2, embed_dim=8, depths=[1]), module.AetherBase)
print(module.__file__)"""
    copy = tmp_path / "basicsr" / "archs" / "aether_arch.py"
    for expected in (ROOT / "archs" / "aether_arch.py", copy):
        if expected == copy:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(Path(spec.origin).parent, tmp_path / "basicsr", ignore=ignore)
            shutil.copy(ROOT / "archs" / "aether_arch.py", copy)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip().splitlines()[-1:] == [str(expected)], done.stderr


def test_the_launcher_names_a_missing_options_file_in_one_line(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        basicsr_train.main(["-opt", "nowhere.yml"])
    assert "there is no options file nowhere.yml" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("cores", "load", "threads"), [(2, 1.0, 1), (2, 9.0, 1), (2, 0.2, 2), (32, 0.0, 4)])
def test_no_thread_shares_its_core(cores: int, load: float, threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert demo.free_cores() == threads


def test_what_goes_wrong_ends_in_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 2
    assert "not from an earlier demo and not empty; name another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"

    (tmp_path / "script.py").write_text("print('the reason'); raise SystemExit(3)")
    monkeypatch.setattr(demo, "TRAINER", tmp_path / "script.py")
    monkeypatch.setattr(demo, "demo", lambda args: demo.train(tmp_path, 1))
    assert demo.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("the reason\n\ndemo.py: error: script.py ended with exit code 3")

    def stopped(args: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", stopped)
    assert demo.main([]) == 130
    error = capsys.readouterr().err
    assert error.startswith("demo.py: stopped; start it again, or with --quick")
    assert error.count("\n") == 1


def test_a_quick_run_goes_from_photographs_to_a_picture(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / demo.MARKER).touch()
    (tmp_path / "stale.txt").write_text("from an earlier run")
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 0, capsys.readouterr()
    assert not (tmp_path / "stale.txt").exists()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("bicubic", "AetherNet"))]
    names = [line[:20].strip() for line in rows]
    assert names == ["bicubic", "AetherNet unfused", "AetherNet fused", "AetherNet ONNX fp32"]
    psnr = [float(line[20:].split()[0]) for line in rows[1:]]
    assert max(psnr) - min(psnr) <= demo.AGREEMENT, psnr
    assert "iteration 2 of 2, loss 0.0" in printed
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 3 * sheet.CROP_SIZE
    state = torch.load(tmp_path / "aether_small_x2_fused.pth", weights_only=True)
    assert any("reparam_conv" in name for name in state)
