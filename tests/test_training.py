"""prepare_pictures.py: sharp pairs, and nothing of the user's is touched; the launcher's own errors."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Set

import frameworks
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "training"))
import prepare_pictures
import trainner_redux_cpu

PICTURE = photographs.astronaut()
DEEP = PICTURE[..., 0].astype(np.uint16) * 257


def content(folder: Path) -> Dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(folder: Path, *arguments: Any) -> int:
    return prepare_pictures.main([str(folder), *map(str, arguments)])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Pictures of one's own: one that can be cut, one too soft and one too small."""
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.fromarray(PICTURE).save(folder / "a.png")
    Image.new("RGB", (400, 400), "grey").save(folder / "soft.png")
    Image.fromarray(PICTURE[:100, :100]).save(folder / "small.png")
    return folder


def test_pairs_are_sharp_cuts_and_their_place_in_the_reduced_picture(mine: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    assert prepare(pairs, "--pictures", mine, "--reductions", 1) == 0
    rows = list(csv.DictReader((pairs / "sources.csv").open(encoding="utf-8")))
    assert {row["picture"] for row in rows} == {"a.png"}
    assert all(20 <= float(row["bicubic_db"]) <= 37 for row in rows)
    assert {path.name for path in pairs.iterdir()} == {"gt", "lq", "sources.csv"}
    low = np.asarray(Image.fromarray(PICTURE).resize((256, 256), Image.Resampling.BICUBIC))
    places = {}
    for y in (0, 192):
        for x in (0, 192):
            cut = PICTURE[y : y + 192, x : x + 192].tobytes()
            places[cut] = low[y // 2 : y // 2 + 96, x // 2 : x // 2 + 96].tobytes()
    assert rows
    for row in rows:
        gt, lq = (np.asarray(Image.open(pairs / sub / row["cut"])).tobytes() for sub in ("gt", "lq"))
        assert places[gt] == lq


@pytest.mark.parametrize("place", [".", "unpacked", "packages", "gt.partial/x", "lq.partial", "unfinished-1"])
def test_a_folder_of_the_user_inside_the_target_stays_as_it_is(place: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / place).mkdir(parents=True)
    Image.fromarray(PICTURE).save(target / place / "a.png")
    (target / "notes.txt").write_text("years of work")
    before = content(target)
    assert prepare(target, "--pictures", target / place, "--reductions", 1) == 0
    assert before.items() <= content(target).items()
    assert list((target / "gt").iterdir())


@pytest.mark.parametrize("name", ["gt", "lq", "sources.csv", "copyright"])
def test_what_exists_is_neither_replaced_nor_completed(
    name: str, mine: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "pairs" / name).mkdir(parents=True)
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 2
    assert f"{name} exists; name another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == [name]


def test_a_run_that_fails_or_is_stopped_leaves_nothing(mine: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*arguments: Any) -> List[Any]:
        raise KeyboardInterrupt

    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 4) == 2
    monkeypatch.setattr(prepare_pictures, "cuts", stopped)
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 130
    assert list((tmp_path / "pairs").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pictures", "mine", "--reductions", "4"], "no crop of mine is sharp enough"),
        (["--pictures", "mine", "--textures"], "--textures is about the packages"),
        (["--pictures", "mine", "--packages", "mine"], "--packages is about the packages"),
        (["--pictures", "none"], "there is no folder none"),
        (["--pictures", "empty"], "empty holds none; expected pictures of 192 pixels"),
        (["--pictures", "broken"], "no picture of broken can be read"),
    ],
)
def test_what_cannot_be_cut_ends_in_one_line(
    arguments: List[str], words: str, mine: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "text.png").write_text("text")
    assert prepare(Path("pairs"), *arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_pictures_that_cannot_be_read_are_left_out_and_named(mine: Path, tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(DEEP).save(mine / "deep.png")
    (mine / "broken.png").write_bytes((mine / "a.png").read_bytes()[:5000])
    (mine / "text.jpg").write_text("text")
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 0
    out, error = capsys.readouterr()
    assert "pairs from 2 pictures" in out
    named = re.findall(r"left out: \S*?(\w+\.\w+)", error)
    assert sorted(named) == ["broken.png", "text.jpg"]


def test_transparent_pictures_stand_on_white(tmp_path: Path) -> None:
    hole = np.full(PICTURE.shape[:2], 255, np.uint8)
    hole[::40] = 0
    pictures = {
        "seen": np.where(hole[..., None] > 0, PICTURE, 255).astype(np.uint8),
        "clear": np.dstack([PICTURE, hole]),  # a colour behind each hole
    }
    for name, picture in pictures.items():
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "a.png")
        assert prepare(tmp_path / f"{name}_pairs", "--pictures", tmp_path / name, "--reductions", 1) == 0
    seen, clear = (sorted((tmp_path / f"{name}_pairs/gt").iterdir()) for name in pictures)
    assert [path.read_bytes() for path in seen] == [path.read_bytes() for path in clear]


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb, of Debian and Ubuntu")
def test_textures_come_from_the_archives_in_their_packages(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for name in ("wallpaper", "game"):
        folder = tmp_path / "made" / name
        (folder / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
        (folder / "DEBIAN" / "control").write_text(control)
        (folder / "usr/share/doc" / name).mkdir(parents=True)
        (folder / "usr/share/doc" / name / "copyright").write_text(name)
        Image.fromarray(PICTURE).resize((1100, 1100)).save(folder / "usr" / f"{name}.png")
    Image.fromarray(PICTURE).save(tmp_path / "saved.png")
    with zipfile.ZipFile(tmp_path / "made/game/usr/base.pk3", "w") as archive:
        for name in ("wall", "wall_nm"):  # and its normal map
            archive.write(tmp_path / "saved.png", f"textures/{name}.png")
    for name in ("wallpaper", "game"):
        subprocess.run(["dpkg-deb", "-b", tmp_path / "made" / name, tmp_path / f"{name}_1.deb"], check=True)
    monkeypatch.setattr(prepare_pictures, "WALLPAPERS", ("wallpaper",))
    monkeypatch.setattr(prepare_pictures, "TEXTURES", ("game",))

    def sources(name: str, *flags: str) -> Set[str]:
        assert prepare(tmp_path / name, "--packages", tmp_path, *flags) == 0
        with (tmp_path / name / "sources.csv").open(encoding="utf-8") as file:
            return {Path(row["picture"]).name for row in csv.DictReader(file)}

    assert sources("plain") == {"wallpaper.png"}
    assert sources("textures", "--textures") == {"wallpaper.png", "game.png", "wall.png"}
    assert (tmp_path / "textures/copyright/game").read_text() == "game"
    package = tmp_path / "wallpaper_1.deb"
    package.write_bytes(package.read_bytes()[:2000])
    assert prepare(tmp_path / "cut", "--packages", tmp_path) == 2
    assert "wallpaper_1.deb is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "words"), [("train", "is no traiNNer-redux"), ("-opt", "expected train or test")]
)
def test_the_launcher_says_where_and_how_it_starts(
    task: str, words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trainner_redux_cpu.py", task])
    with pytest.raises(SystemExit, match=words):
        trainner_redux_cpu.main()


# ------------------------------------------------------------ the route without a GPU, docs/fine-tuning.md


def started_by_the_page(language: str) -> List[str]:
    """The words that start the launcher in the page's block of a shell, with / between folders."""
    text = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    line = next(line for block in blocks for line in block.splitlines() if "trainner_redux_cpu" in line)
    return line[line.index("python ") :].split(" >")[0].replace("\\", "/").split()


def test_the_page_starts_the_same_on_windows() -> None:
    assert started_by_the_page("sh") == started_by_the_page("bat")


# Windows and macOS start data workers anew, by "spawn", and so does a run through this.
SPAWN = (
    "import multiprocessing, runpy, sys; multiprocessing.set_start_method('spawn'); "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_the_line_of_the_page_trains_in_an_untouched_checkout_and_resumes(tmp_path: Path) -> None:
    framework = frameworks.checkout(frameworks.Redux, "TRAINNER_REDUX_ROOT", tmp_path)
    for kind, side in (("hr", 64), ("lr", 32)):
        (tmp_path / kind).mkdir()
        Image.fromarray(PICTURE[:side, :side]).save(tmp_path / kind / "0.png")
    python, script, *words = started_by_the_page("sh")
    assert python == "python"
    changes = {"network_g": frameworks.TINY, "path": {"pretrain_network_g": None}}
    for iterations, how in ((2, []), (4, ["-c", SPAWN])):
        text = framework.template_text("cpu_finetune")
        options = framework.unedited("mine", text, tmp_path, 1, 24, 2, iterations, val=None, **changes)
        options.rename(framework.root / "mine.yml")
        command = [framework.python, *how, script.replace("AetherNet", str(ROOT), 1), *words]
        done = subprocess.run(command, cwd=framework.root, capture_output=True, text=True, timeout=900)
        assert framework.weights("mine", iterations).is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(framework.losses("mine")) == [1, 2, 3, 4]
    assert not list(framework.archs.glob("aether*"))
