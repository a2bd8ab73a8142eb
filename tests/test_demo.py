"""The demo: its helpers, its launcher for BasicSR, and one short run of everything."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))

import sheet

import demo

LAST = "demo.py: error: script.py ended with exit code 3; its last lines stand above.\n"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900)


def test_training_pairs_show_the_same_place_and_the_held_out_photograph_is_not_among_them(
    tmp_path: Path,
) -> None:
    assert demo.HELD_OUT not in demo.TRAINING
    count = demo.prepare_data(tmp_path, ["coffee"])
    names = sorted(path.name for path in (tmp_path / "gt").iterdir())
    assert len(names) == count > 5
    assert names == sorted(path.name for path in (tmp_path / "lq").iterdir())
    for name in names[:5]:
        gt, lq = (Image.open(tmp_path / sub / name) for sub in ("gt", "lq"))
        assert gt.size == (96, 96)
        assert lq.size == (48, 48)
        # Away from the border the cut's own reduction is the cut of the whole photograph's reduction.
        difference = np.abs(np.asarray(demo.reduced(gt), dtype=int) - np.asarray(lq, dtype=int))[4:-4, 4:-4]
        assert difference.max() == 0, f"{name}: {difference.max()} > 0"


def test_every_photograph_ships_inside_scikit_image() -> None:
    import skimage.data

    shipped = Path(skimage.data.__file__).parent
    for name in (demo.HELD_OUT, *demo.TRAINING):
        stem = {"immunohistochemistry": "ihc"}.get(name, name)
        assert list(shipped.glob(f"{stem}.*")), f"{name} would be downloaded"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((30, 31, 31.005, 31), None),
        ((30, 31, 31.02, 31), "differ"),
        ((30, 29, 29, 29), "bicubic"),
        ((30, float("nan"), 31, 31), "differ"),
    ],
)
def test_networks_that_disagree_or_lose_to_bicubic_are_complained_about(
    values: tuple[float, ...], words: str | None
) -> None:
    picture = Image.new("RGB", (8, 8))
    complaint = demo.complaint([demo.Result("", picture, value, 0.9, 1.0) for value in values])
    assert complaint is None if words is None else words in str(complaint)


def test_the_picture_shows_every_image_with_its_details() -> None:
    image = demo.photograph("coffee").crop((0, 0, 128, 100))
    inverted = Image.fromarray(255 - np.asarray(image))
    drawn = np.asarray(
        sheet.side_by_side({"one": image, "two": inverted}, boxes=((5, 2), (500, 500)), size=32, zoom=2)
    )
    height = 28 + 50 + 64 + 2 * 8  # label, whole image, one detail (the other lies outside), gaps
    assert drawn.shape == (height, 2 * (64 + 8) + 8, 3)
    detail = np.asarray(image.crop((5, 2, 37, 34)).resize((64, 64), Image.Resampling.NEAREST))
    assert np.array_equal(drawn[-72:-8, 8:72], detail)
    assert np.array_equal(drawn[-72:-8, 80:144], 255 - detail)


REGISTER = f"""import sys; sys.path.insert(0, {str(ROOT / "demo")!r})
import basicsr_train
module = basicsr_train.register_aether()
assert basicsr_train.register_aether() is module
from basicsr.utils.registry import ARCH_REGISTRY
net = ARCH_REGISTRY.get("aether_small")(scale=2, embed_dim=8, depths=[1], qat=QAT)
assert isinstance(net, module.AetherBase)
print(module.__file__)"""


def registered(folder: Path, qat: bool) -> Path:
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + REGISTER.replace("QAT", str(qat))
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


def test_the_launcher_registers_the_file_once_and_prefers_a_copy_inside_basicsr(tmp_path: Path) -> None:
    assert registered(tmp_path, qat=True) == ROOT / "archs" / "aether_arch.py"
    spec = importlib.util.find_spec("basicsr")
    assert spec is not None
    assert spec.origin is not None
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, tmp_path / "basicsr", ignore=ignore)
    copy = shutil.copy(ROOT / "archs" / "aether_arch.py", tmp_path / "basicsr" / "archs")
    assert registered(tmp_path, qat=False) == Path(copy)


def test_the_launcher_names_a_missing_options_file_in_one_line() -> None:
    done = run(str(ROOT / "demo" / "basicsr_train.py"), "-opt", "nowhere.yml")
    assert done.returncode == 2
    assert "nowhere.yml" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_demo_does_not_empty_a_folder_that_is_not_its_own(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 2
    assert "is not empty and not from an earlier demo; name another (--output)" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("cores", "load", "threads"), [(2, 1.0, 1), (2, 9.0, 1), (2, 0.2, 2), (32, 0.0, 4)])
def test_no_thread_shares_its_core(cores: int, load: float, threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert demo.free_cores() == threads


def test_a_failed_step_and_a_stop_end_in_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('the reason'); raise SystemExit(3)")
    monkeypatch.setattr(demo, "demo", lambda args: demo.run([str(script)]))
    assert demo.main([]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == "the reason\n\ndemo.py: error: script.py ended with exit code 3; its last lines stand above.\n"
    )

    def stopped(args: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", stopped)
    assert demo.main([]) == 130
    error = capsys.readouterr().err
    assert error.startswith("demo.py: stopped; start it again, or with --quick")
    assert error.count("\n") == 1


def test_a_quick_run_goes_from_photographs_to_a_picture_and_starts_afresh_the_second_time(
    tmp_path: Path, capsys: Any
) -> None:
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
