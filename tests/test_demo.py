"""The demo: its helpers, its launcher for BasicSR, and one short run of everything."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "demo"))

import sheet

import demo


def result(name: str, psnr: float) -> demo.Result:
    return demo.Result(name, Image.new("RGB", (8, 8)), psnr, 0.9, 1.0)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


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


def test_flat_cuts_stay_out_of_the_training_pairs(tmp_path: Path) -> None:
    kept = demo.prepare_data(tmp_path, ["rocket"])
    assert 0 < kept < (640 // 96) * (426 // 96), "the plain sky should have been left out"


def test_every_photograph_ships_inside_scikit_image() -> None:
    import skimage.data

    shipped = Path(skimage.data.__file__).parent
    for name in (demo.HELD_OUT, *demo.TRAINING):
        stem = {"immunohistochemistry": "ihc"}.get(name, name)
        assert list(shipped.glob(f"{stem}.*")), f"{name} would be downloaded"


def test_images_survive_the_way_through_the_network_format() -> None:
    image = demo.photograph("coffee").crop((0, 0, 31, 17))
    array = demo.to_array(image)
    assert (array.shape, array.dtype) == ((1, 3, 17, 31), np.float32)
    assert np.array_equal(np.asarray(demo.to_image(array)), np.asarray(image))


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
    complaint = demo.complaint([result(str(k), value) for k, value in enumerate(values)])
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


def test_the_demo_does_not_empty_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run(str(ROOT / "demo" / "demo.py"), "--quick", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "not from an earlier demo" in done.stderr.splitlines()[-1]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_quick_run_goes_from_photographs_to_a_picture_and_starts_afresh_the_second_time(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / demo.MARKER).touch()
    (output / "stale.txt").write_text("from an earlier run")
    done = run(str(ROOT / "demo" / "demo.py"), "--quick", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (output / "stale.txt").exists()
    printed = done.stdout.splitlines()
    rows = {
        line[:20].strip(): line[20:].split() for line in printed if line.startswith(("bicubic", "AetherNet"))
    }
    assert list(rows) == ["bicubic", "AetherNet unfused", "AetherNet fused", "AetherNet ONNX fp32"]
    psnr = [float(values[0]) for name, values in rows.items() if name != "bicubic"]
    assert max(psnr) - min(psnr) <= demo.AGREEMENT, psnr
    assert sum("[epoch:" in line for line in printed) == 2, "training should report its progress"
    with Image.open(output / "comparison.png") as picture:
        assert picture.width > 3 * sheet.CROP_SIZE
    state = torch.load(output / "aether_small_x2_fused.pth", weights_only=True)
    assert any("reparam_conv" in name for name in state)
    assert (output / "aether_small_x2_fp32.onnx").stat().st_size > 4e6
