"""training/: pairs, and train.py with a traiNNer-redux that only waits (the real one: test_frameworks.py)."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, small_net
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "training"))

import prepare_pictures
import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the program that waits is a script")
NAME = "2x_AetherNet_small_float"
FAKE = """#!{python}
import os, sys, time
if "-c" in sys.argv:
    sys.exit(print({cuda}))
time.sleep(min(0.3, {seconds}))
print("threads", os.environ["OMP_NUM_THREADS"], "nice", os.nice(0), sys.argv[1:], flush=True)
time.sleep({seconds})
if not {code}:
    from pathlib import Path
    models = Path("experiments") / Path(sys.argv[-1]).stem / "models"
    models.mkdir(parents=True, exist_ok=True)
    (models / "net_g_ema_latest.safetensors").touch()
sys.exit({code} % 9)
"""
LOG = "INFO: [epoch:   0, iter:   1,200, lr:(9.999e-04)] [performance: 1.583 it/s] l_g_total: 1.5796e-02 grad"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("archs", "optimizers"):
        (tmp_path / "checkout" / "traiNNer" / folder).mkdir(parents=True)
    (tmp_path / "data" / "gt").mkdir(parents=True)
    return tmp_path / "checkout"


def python(checkout: Path, seconds: float = 60, code: int = 0, cuda: bool = False) -> Path:
    path = checkout / "python"
    path.write_text(FAKE.format(python=sys.executable, seconds=seconds, code=code, cuda=cuda))
    path.chmod(0o755)
    return path


def command(checkout: Path, *arguments: object) -> int:
    fake = checkout / "python"
    base = [
        "--traiNNer-redux",
        checkout,
        "--data",
        checkout.parent / "data",
        "--python",
        fake,
        "--kept",
        checkout / "kept.safetensors",
    ]
    return train.main([str(word) for word in (*base, *arguments)])


def settings(checkout: Path, name: str = NAME) -> Any:
    return yaml.safe_load((checkout / f"{name}.yml").read_text(encoding="utf-8"))


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_it_starts_once_in_the_background_is_paused_goes_on_and_stops(checkout: Path, capsys: Any) -> None:
    python(checkout)
    assert command(checkout) == 0
    assert "starts from scratch, on the CPU, since PyTorch finds no CUDA; pid" in capsys.readouterr().out
    process = train.Training(checkout, NAME).process()
    assert process is not None
    pid = process.pid
    try:
        eventually(lambda: (checkout / f"{NAME}.log").read_text().startswith("threads 1 nice 19"))
        assert command(checkout) == 0  # it runs already: says so, starts nothing
        assert f"runs, pid {pid}" in capsys.readouterr().out
        assert train.Training(checkout, NAME).process() == process
        assert command(checkout, "--pause") == 0
        eventually(lambda: state_of(pid) == "T")
        assert command(checkout, "--resume") == 0
        eventually(lambda: state_of(pid) == "S")
        assert command(checkout, "--pause") == 0
        capsys.readouterr()
    finally:
        assert command(checkout, "--stop") == 0  # although it is paused
    assert train.Training(checkout, NAME).process() is None
    assert "does not run" in capsys.readouterr().out
    assert command(checkout, "--pause") == 2
    assert "does not run" in capsys.readouterr().err


def test_another_process_of_that_number_is_not_taken_for_the_training(checkout: Path, capsys: Any) -> None:
    (checkout / f"{NAME}.pid").write_text(str(os.getpid()))
    assert command(checkout, "--status") == 0
    assert "does not run" in capsys.readouterr().out
    assert command(checkout, "--stop") == 2


def test_the_options_are_those_of_the_template_and_the_network_is_copied(checkout: Path) -> None:
    python(checkout, seconds=0)
    assert command(checkout, "--wait", "--iterations", 3000) == 0
    template = yaml.safe_load(
        (train.TEMPLATES / "AetherNet_small_x2_fidelity.yml").read_text(encoding="utf-8")
    )
    written = settings(checkout)
    assert written["network_g"] == template["network_g"]
    assert written["train"]["optim_g"] == template["train"]["optim_g"]
    assert written["train"]["total_iter"] == written["train"]["scheduler"]["total_iters"] == 3000
    assert written["datasets"]["train"]["dataroot_gt"] == [str(checkout.parent / "data" / "gt")]
    assert written["datasets"]["train"]["lq_size"] == 32
    assert written["num_gpu"] == 0
    copied = checkout / "traiNNer" / "archs"
    assert (copied / "aether_arch.py").read_bytes() == (ROOT / "archs" / "aether_arch.py").read_bytes()
    assert not (copied / "aether_quant.py").exists()
    optimizer = checkout / "traiNNer" / "optimizers" / "soap32_optim.py"
    assert optimizer.read_bytes() == (ROOT / "archs" / "soap32_optim.py").read_bytes()


def test_quantisation_aware_training_starts_from_weights(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0)
    assert command(checkout, "--stage", "qat") == 2
    assert "--pretrained" in capsys.readouterr().err
    weights = checkout / "float.safetensors"
    save_file(small_net(2).state_dict(), weights)
    assert command(checkout, "--stage", "qat_full", "--pretrained", weights, "--rate", 2e-4, "--wait") == 0
    written = settings(checkout, "2x_AetherNet_small_qat_full")
    assert written["network_g"]["qat"] == "full"
    assert written["train"]["optim_g"]["lr"] == 2e-4
    assert written["path"]["pretrain_network_g"] == str(weights)
    assert written["path"]["strict_load_g"]
    assert (checkout / "traiNNer" / "archs" / "aether_quant.py").exists()


def test_another_scale_starts_from_the_body_of_x2_and_is_kept_apart(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0)
    weights = checkout / "x2.safetensors"
    save_file(small_net(2).state_dict(), weights)
    assert command(checkout, "--scale", 4, "--pretrained", weights, "--wait") == 0
    written = settings(checkout, "4x_AetherNet_small_float")
    assert written["scale"] == 4
    assert not written["path"]["strict_load_g"]
    assert train.KEPT.format(scale=4, stage="") == "weights/4x_AetherNet_small_training_fp16.safetensors"


def test_pictures_can_be_degraded_while_training_at_x2_and_x4(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0)
    assert command(checkout, "--stage", "otf", "--wait") == 0
    written = settings(checkout, "2x_AetherNet_small_otf")
    assert written["high_order_degradation"]
    assert written["jpeg_range2"] == train.DEGRADATIONS["jpeg_range2"]
    assert "dataroot_lq" not in written["datasets"]["train"]
    assert command(checkout, "--stage", "otf", "--scale", 3) == 2
    assert "--scale" in capsys.readouterr().err


def test_a_training_with_a_state_goes_on_as_it_began(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0)
    assert command(checkout, "--wait", "--iterations", 3000) == 0
    states = checkout / "experiments" / NAME / "training_states"
    states.mkdir(parents=True, exist_ok=True)
    (states / "500.state").write_bytes(b"")
    (checkout / "kept.safetensors").write_bytes(b"not looked at")
    capsys.readouterr()
    before = settings(checkout)
    assert before["num_gpu"] == 0
    shutil.copytree(checkout.parent / "data", checkout.parent / "moved")
    python(checkout, seconds=0, cuda=True)  # on another machine
    assert command(checkout, "--wait", "--iterations", 7, "--data", checkout.parent / "moved") == 0
    assert "continues from its newest state" in capsys.readouterr().out
    after = settings(checkout)
    assert after["num_gpu"] == "auto"
    assert after["datasets"]["train"].pop("dataroot_gt") == [str(checkout.parent / "moved" / "gt")]
    assert not after["amp_bf16"]
    assert after["datasets"]["train"].pop("num_worker_per_gpu") > 1
    assert before["datasets"]["train"].pop("num_worker_per_gpu") == 1
    for each in (before, after):
        each.pop("num_gpu")
        each.pop("amp_bf16")
        each["datasets"]["train"] = {
            key: value for key, value in each["datasets"]["train"].items() if "dataroot" not in key
        }
    assert after == before
    assert "--auto_resume" in (checkout / f"{NAME}.log").read_text().splitlines()[-1]


def test_without_a_state_it_goes_on_from_kept_weights_at_the_rate_where_it_was(
    checkout: Path, capsys: Any
) -> None:
    python(checkout, seconds=0)
    save_file({"x": torch.zeros(1)}, checkout / "kept.safetensors", {"iterations": "2000"})
    assert command(checkout, "--wait", "--iterations", 3000) == 0
    assert "(2000 iterations)" in capsys.readouterr().out
    written = settings(checkout)
    template = yaml.safe_load(
        (train.TEMPLATES / "AetherNet_small_x2_fidelity.yml").read_text(encoding="utf-8")
    )
    rate, lowest = template["train"]["optim_g"]["lr"], template["train"]["scheduler"]["eta_min_ratio"]
    now = rate * (lowest + (1 - lowest) * (1 + math.cos(math.pi * 2 / 3)) / 2)
    assert written["path"]["pretrain_network_g"] == str(checkout / "kept.safetensors")
    assert written["train"]["optim_g"]["lr"] == pytest.approx(now)
    assert written["train"]["total_iter"] == written["train"]["scheduler"]["total_iters"] == 1000
    assert written["train"]["scheduler"]["eta_min_ratio"] * now == pytest.approx(lowest * rate)
    assert written["train"]["scheduler"]["warmup_iters"] == 100


def test_kept_weights_are_the_newest_average_and_count_what_came_before(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0)
    save_file({"x": torch.zeros(1)}, checkout / "before.safetensors", {"iterations": "2000"})
    base = ["--kept", checkout / "before.safetensors"]
    assert command(checkout, *base, "--wait") == 0
    assert command(checkout, "--keep") == 2
    assert "train first" in capsys.readouterr().err
    models = checkout / "experiments" / NAME / "models"
    models.mkdir(parents=True, exist_ok=True)
    states = {number: small_net(2).float().state_dict() for number in (500, 1500)}
    states[1500]["conv_last.bias"] += 0.25
    for number, state in states.items():
        save_file(state, models / f"net_g_ema_{number}.safetensors")
    (models / "net_g_ema_latest.safetensors").write_bytes(b"written at the end of a training")
    assert command(checkout, "--keep") == 0
    with safe_open(str(checkout / "kept.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", "form": "training", "stage": "float", "iterations": "3500"}
    kept = load_file(checkout / "kept.safetensors")
    assert set(kept) == set(states[1500])
    assert all(torch.equal(value, states[1500][name].half()) for name, value in kept.items())
    for _ in range(2):  # to the file that it began from
        assert command(checkout, *base, "--keep") == 0
        with safe_open(str(checkout / "before.safetensors"), "pt") as file:
            assert file.metadata()["iterations"] == "3500"
    states[1500]["conv_last.bias"] += 1e6
    save_file(states[1500], models / "net_g_ema_2000.safetensors")
    before = (checkout / "kept.safetensors").read_bytes()
    assert command(checkout, "--keep") == 2
    assert "not finite" in capsys.readouterr().err
    assert (checkout / "kept.safetensors").read_bytes() == before


def test_a_named_training_does_not_replace_the_released_weights(checkout: Path, capsys: Any) -> None:
    base = ["--traiNNer-redux", str(checkout), "--name", "2x_mine"]
    assert train.main([*base, "--keep"]) == 2
    assert "pass a file (--kept)" in capsys.readouterr().err
    models = checkout / "experiments" / "2x_mine" / "models"
    models.mkdir(parents=True, exist_ok=True)
    save_file(small_net(2).float().state_dict(), models / "net_g_ema_10.safetensors")
    assert train.main([*base, "--keep", "--kept", str(checkout / "mine.safetensors")]) == 0
    assert (checkout / "mine.safetensors").is_file()


def test_the_iterations_of_another_scale_are_not_counted(checkout: Path) -> None:
    python(checkout, seconds=0)
    save_file(small_net(2).state_dict(), checkout / "x2.safetensors", {"iterations": "2000"})
    assert command(checkout, "--scale", 4, "--pretrained", checkout / "x2.safetensors", "--wait") == 0
    models = checkout / "experiments" / "4x_AetherNet_small_float" / "models"
    models.mkdir(parents=True, exist_ok=True)
    save_file(small_net(4).float().state_dict(), models / "net_g_ema_10.safetensors")
    assert command(checkout, "--scale", 4, "--keep") == 0
    with safe_open(str(checkout / "kept.safetensors"), "pt") as file:
        assert file.metadata()["iterations"] == "10"


def test_the_iterations_of_another_stage_are_not_counted(checkout: Path) -> None:
    python(checkout, seconds=0)
    begun = checkout / "x2.safetensors"
    models = checkout / "experiments" / "2x_AetherNet_small_otf" / "models"
    models.mkdir(parents=True, exist_ok=True)
    save_file(small_net(2).float().state_dict(), models / "net_g_ema_10.safetensors")
    for notes, count in (
        ({"iterations": "2000"}, 10),  # kept before stages were noted: of float
        ({"iterations": "2000", "stage": "qat"}, 10),
        ({"iterations": "2000", "stage": "otf"}, 2010),
    ):
        save_file(small_net(2).state_dict(), begun, notes)
        assert command(checkout, "--stage", "otf", "--pretrained", begun, "--wait") == 0
        assert command(checkout, "--stage", "otf", "--keep") == 0
        with safe_open(str(checkout / "kept.safetensors"), "pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "form": "training",
                "stage": "otf",
                "iterations": str(count),
            }


def test_the_status_shows_the_last_line_of_the_log(checkout: Path, capsys: Any) -> None:
    folder = checkout / "experiments" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_a.log").write_text(LOG.replace("1,200", "1,100") + f"\n# psnr: 31.25 Best\n{LOG}\n")
    assert command(checkout, "--status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "iteration 1,200, loss 0.01580, 1.583 iterations a second",
        "PSNR of the last validation: 31.25 dB",
    ]


def test_what_is_missing_is_said_in_one_line(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0, code=3)
    for arguments, part in (
        (["--traiNNer-redux", checkout / "none"], "is no checkout of traiNNer-redux"),
        (["--data", checkout], "prepare_pictures.py"),
        (["--wait"], "'NAME.yml']); the reason is in".replace("NAME", NAME)),
        ([], f"{NAME} ended with 3 (threads 1"),  # at once: it doesn't run in the background
        (["--python", checkout / "nothing"], "there is no program"),
        (["--python", "false"], "has no PyTorch; pass the Python that runs traiNNer-redux (--python)"),
        (["--keep", "--kept", checkout / "none" / "x.safetensors"], "none does not exist"),
        (["--keep", "--kept", checkout / "x.pth"], "expected .safetensors (--kept)"),
    ):
        assert command(checkout, *arguments) == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("code", [3, 9])  # 9 becomes 0: traiNNer-redux's code after most errors
def test_a_training_that_ended_says_why(checkout: Path, capsys: Any, code: int) -> None:
    python(checkout, seconds=0)
    assert command(checkout, "--wait") == 0
    complete = checkout / "experiments" / NAME / "models" / "net_g_ema_latest.safetensors"
    os.utime(complete, (1e9, 1e9))  # what an earlier training left says nothing about this one
    (checkout / f"{NAME}.log").unlink()
    python(checkout, seconds=0, code=code)
    assert command(checkout) == 2
    capsys.readouterr()
    assert command(checkout, "--status") == 0
    status = capsys.readouterr().out.splitlines()
    assert status[0].endswith("does not run")
    assert status[1].startswith(f"last line of {NAME}.log: threads 1")


def test_a_training_on_a_gpu_runs_the_frameworks_own_program(
    checkout: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(checkout, seconds=0, cuda=True)
    monkeypatch.chdir(checkout.parent)
    assert command(checkout, "--wait", "--python", "checkout/python") == 0  # it starts in the checkout
    assert "starts from scratch, on the GPU; pid" in capsys.readouterr().out
    assert "['train.py', '--auto_resume'" in (checkout / f"{NAME}.log").read_text()
    assert settings(checkout)["num_gpu"] == "auto"
    assert not settings(checkout).get("amp_bf16")


def test_fused_weights_are_not_trained(checkout: Path, capsys: Any) -> None:
    python(checkout, seconds=0)
    save_file(small_net(2).fused().state_dict(), checkout / "fused.safetensors")
    assert command(checkout, "--pretrained", checkout / "fused.safetensors") == 2
    assert "holds no training form of an AetherNet" in capsys.readouterr().err
    assert command(checkout, "--pretrained", checkout / "fused.safetensors", "--stage", "qat", "--wait") == 0
    assert not (checkout / f"{NAME}.yml").exists()


def test_pairs_of_own_pictures_are_sharp_cuts_and_their_reductions(tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "images"
    mine.mkdir()
    picture = photographs.astronaut()
    Image.fromarray(picture).save(mine / "a.png")
    Image.fromarray(picture[:, ::-1]).save(mine / "b.png")
    Image.new("RGB", (400, 400), "grey").save(mine / "soft.png")
    Image.fromarray(picture[:100, :100]).save(mine / "small.png")
    arguments = [str(tmp_path / "pairs"), "--pictures", str(mine), "--reductions", "1"]
    prepare_pictures.main(arguments)
    rows = list(csv.DictReader((tmp_path / "pairs" / "sources.csv").open(encoding="utf-8")))
    assert {row["picture"] for row in rows} == {"a.png", "b.png"}
    assert all(20 <= float(row["bicubic_db"]) <= 37 for row in rows)
    assert not (tmp_path / "pairs" / "unpacked").exists()
    whole = np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.BICUBIC))
    for row in rows:
        gt, lq = (np.asarray(Image.open(tmp_path / "pairs" / sub / row["cut"])) for sub in ("gt", "lq"))
        assert gt.shape == (192, 192, 3)
        if row["picture"] == "a.png":
            y, x = place(picture, gt)
            assert np.array_equal(whole[y // 2 : y // 2 + 96, x // 2 : x // 2 + 96], lq)
    capsys.readouterr()
    assert prepare_pictures.main(arguments) == 2
    assert "exists; remove it" in capsys.readouterr().err
    again = [str(tmp_path / "none"), "--pictures", str(mine), "--reductions", "4"]
    assert prepare_pictures.main(again) == 2
    assert "is sharp enough" in capsys.readouterr().err
    assert prepare_pictures.main([*again[:-1], "0"]) == 2
    assert "no reduction to 1/0; pass 1 or more (--reductions)" in capsys.readouterr().err
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(mine / "deep.png")
    assert prepare_pictures.main(again) == 2
    assert "expected 8 bits a channel; leave it out (--pictures)" in capsys.readouterr().err
    assert not (tmp_path / "none" / "gt").exists()
    for flag in (["--textures"], ["--packages", str(mine)]):
        assert prepare_pictures.main([*again, *flag]) == 2
        assert f"{flag[0]} is about the packages" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert prepare_pictures.main([*again[:1], "--pictures", str(tmp_path / "empty")]) == 2
    assert "empty holds none; expected pictures of 192 pixels" in capsys.readouterr().err


def test_pictures_of_ones_own_that_cannot_be_read_are_left_out_and_named(tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "images"
    mine.mkdir()
    picture = photographs.astronaut()
    Image.fromarray(picture).save(mine / "a.tif")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(mine / "deep.png")
    Image.fromarray(picture).save(mine / "broken.png")
    (mine / "broken.png").write_bytes((mine / "broken.png").read_bytes()[:5000])
    (mine / "text.jpg").write_text("text")
    arguments = [str(tmp_path / "pairs"), "--pictures", str(mine), "--reductions", "1"]
    assert prepare_pictures.main(arguments) == 0
    out, error = capsys.readouterr()
    assert "pairs from 1 pictures" in out
    named = [line for line in error.splitlines() if "left out: " in line]
    assert len(named) == 3
    assert all(line.endswith("leave it out (--pictures).") for line in named)
    (mine / "a.tif").unlink()
    assert prepare_pictures.main([str(tmp_path / "none"), *arguments[1:]]) == 2
    assert "no picture of" in capsys.readouterr().err.splitlines()[-1]


def test_transparent_pictures_stand_on_white(tmp_path: Path, capsys: Any) -> None:
    picture = photographs.astronaut()
    hole = np.full(picture.shape[:2], 255, np.uint8)
    hole[::40] = 0
    (tmp_path / "seen").mkdir()
    (tmp_path / "clear").mkdir()
    seen = np.where(hole[..., None] > 0, picture, 255).astype(np.uint8)
    Image.fromarray(seen).save(tmp_path / "seen/a.png")
    Image.fromarray(np.dstack([picture, hole])).save(tmp_path / "clear/a.png")  # a colour behind each hole
    for name in ("seen", "clear"):
        pairs = [str(tmp_path / f"{name}_pairs"), "--pictures", str(tmp_path / name), "--reductions", "1"]
        prepare_pictures.main(pairs)
    cuts = [sorted((tmp_path / f"{name}_pairs/gt").iterdir()) for name in ("seen", "clear")]
    assert [path.read_bytes() for path in cuts[0]] == [path.read_bytes() for path in cuts[1]]


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb, of Debian and Ubuntu")
def test_textures_come_from_the_archives_in_their_packages(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    picture = Image.fromarray(photographs.astronaut())
    for name in ("wallpaper", "game"):
        folder = tmp_path / "made" / name
        (folder / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
        (folder / "DEBIAN" / "control").write_text(control)
        (folder / "usr/share/doc" / name).mkdir(parents=True)
        (folder / "usr/share/doc" / name / "copyright").write_text(name)
        picture.resize((1100, 1100)).save(folder / "usr" / f"{name}.png")
    picture.save(tmp_path / "saved.png")
    with zipfile.ZipFile(tmp_path / "made/game/usr/base.pk3", "w") as archive:
        for name in ("wall", "wall_nm"):  # and its normal map
            archive.write(tmp_path / "saved.png", f"textures/{name}.png")
    for name in ("wallpaper", "game"):
        subprocess.run(["dpkg-deb", "-b", tmp_path / "made" / name, tmp_path / f"{name}_1.deb"], check=True)
    monkeypatch.setattr(prepare_pictures, "WALLPAPERS", ("wallpaper",))
    monkeypatch.setattr(prepare_pictures, "TEXTURES", ("game",))
    found = {}
    for flags in ((), ("--textures",)):
        pairs = tmp_path / f"pairs{len(flags)}"
        assert prepare_pictures.main([str(pairs), "--packages", str(tmp_path), *flags]) == 0
        with (pairs / "sources.csv").open(encoding="utf-8") as file:
            found[flags] = {Path(row["picture"]).name for row in csv.DictReader(file)}
    assert found == {(): {"wallpaper.png"}, ("--textures",): {"wallpaper.png", "game.png", "wall.png"}}
    assert (tmp_path / "pairs1/copyright/game").read_text() == "game"
    package = tmp_path / "wallpaper_1.deb"
    package.write_bytes(package.read_bytes()[:2000])
    assert prepare_pictures.main([str(tmp_path / "cut"), "--packages", str(tmp_path)]) == 2
    assert "wallpaper_1.deb is damaged" in capsys.readouterr().err


def place(picture: np.ndarray, cut: np.ndarray) -> tuple[int, int]:
    for y in range(0, picture.shape[0] - 191, 192):
        for x in range(0, picture.shape[1] - 191, 192):
            if np.array_equal(picture[y : y + 192, x : x + 192], cut):
                return y, x
    raise AssertionError("the cut is not in the picture")
