"""prepare_pictures.py: sharp pairs, and nothing of the user's is touched; the launcher's own errors."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, List, Set

import frameworks
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "training"))
import prepare_pictures

PICTURE = photographs.astronaut()


def prepare(folder: Path, *arguments: Any) -> int:
    return prepare_pictures.main([str(folder), *map(str, arguments)])


def sources(folder: Path) -> Set[str]:
    rows = csv.DictReader((folder / "sources.csv").read_text(encoding="utf-8").splitlines())
    return {Path(row["picture"]).name for row in rows}


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
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 0
    assert sources(tmp_path / "pairs") == {"a.png"}
    low = np.asarray(Image.fromarray(PICTURE).resize((256, 256), Image.Resampling.BICUBIC))
    places = {
        PICTURE[y : y + 192, x : x + 192].tobytes(): low[y // 2 : y // 2 + 96, x // 2 : x // 2 + 96].tobytes()
        for y, x in ((0, 0), (0, 192), (192, 0), (192, 192))
    }
    gt, lq = (sorted((tmp_path / "pairs" / sub).iterdir()) for sub in ("gt", "lq"))
    assert gt
    for large, small in zip(gt, lq):
        assert places[Image.open(large).tobytes()] == Image.open(small).tobytes()


@pytest.mark.parametrize("place", [".", "unpacked", "packages", "unfinished-1"])
def test_a_folder_of_the_user_inside_the_target_stays_as_it_is(place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    Image.fromarray(PICTURE).save(tmp_path / place / "a.png")
    (tmp_path / "notes.txt").write_text("years of work")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert prepare(tmp_path, "--pictures", tmp_path / place, "--reductions", 1) == 0
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("name", ["gt", "lq", "sources.csv", "copyright"])
def test_what_exists_is_not_completed(name: str, mine: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "pairs" / name).mkdir(parents=True)
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 2
    assert f"{name} exists; name another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == [name]


@pytest.mark.parametrize(("source", "words"), [
    ("mine", "no crop of mine is sharp enough"),
    ("none", "--pictures none is not a folder"),
    ("empty", "empty holds no picture"),
    ("broken", "broken holds no pictures of 192 pixels or more a side that can be read"),
])  # fmt: skip
def test_what_cannot_be_cut_ends_in_one_line_and_leaves_nothing(
    source: str, words: str, mine: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "text.png").write_text("text")
    assert prepare(Path("pairs"), "--pictures", source, "--reductions", 4) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("pairs").glob("*"))


def test_pictures_that_cannot_be_read_are_left_out_and_named(mine: Path, tmp_path: Path, capsys: Any) -> None:
    (mine / "broken.png").write_bytes((mine / "a.png").read_bytes()[:5000])
    (mine / "text.jpg").write_text("text")
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 0
    assert sources(tmp_path / "pairs") == {"a.png"}
    named = re.findall(r"left out: \S*?(\w+\.\w+)", capsys.readouterr().err)
    assert sorted(named) == ["broken.png", "text.jpg"]


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb, of Debian and Ubuntu")
def test_textures_come_from_the_archives_in_their_packages(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    Image.fromarray(PICTURE).save(tmp_path / "saved.png")
    for name in ("wallpaper", "game"):
        folder = tmp_path / "made" / name
        (folder / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
        (folder / "DEBIAN" / "control").write_text(control)
        (folder / "usr/share/doc" / name).mkdir(parents=True)
        (folder / "usr/share/doc" / name / "copyright").write_text(name)
        Image.fromarray(PICTURE).resize((1100, 1100)).save(folder / "usr" / f"{name}.png")
        if name == "game":
            with zipfile.ZipFile(folder / "usr" / "base.pk3", "w") as archive:
                for texture in ("wall", "wall_nm"):  # and its normal map
                    archive.write(tmp_path / "saved.png", f"textures/{texture}.png")
        subprocess.run(["dpkg-deb", "-b", folder, packages / f"{name}_1.deb"], check=True)
    monkeypatch.setattr(prepare_pictures, "WALLPAPERS", ("wallpaper",))
    monkeypatch.setattr(prepare_pictures, "TEXTURES", ("game",))
    for name in ("plain", "textures"):
        shutil.copytree(packages, tmp_path / name / "packages")
        assert prepare(tmp_path / name, *(["--textures"] if name == "textures" else [])) == 0
    assert sources(tmp_path / "plain") == {"wallpaper.png"}
    assert sources(tmp_path / "textures") == {"wallpaper.png", "game.png", "wall.png"}
    assert (tmp_path / "textures/copyright/game").read_text() == "game"
    (packages / "wallpaper_1.deb").write_bytes((packages / "wallpaper_1.deb").read_bytes()[:2000])
    assert prepare(tmp_path) == 2
    assert "wallpaper_1.deb is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "said"), [("train", "is no traiNNer-redux"), ("-opt", "train or test")])
def test_the_launcher_says_where_and_how_it_starts(tmp_path: Path, task: str, said: str) -> None:
    words = [sys.executable, str(ROOT / "training" / "trainner_redux_cpu.py"), task]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def started_by_the_page(language: str) -> List[str]:
    """The words that start the launcher in the page's block of a shell, with / between folders."""
    text = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))
    line = re.search(r"python .*trainner_redux_cpu.*?(?= >|\n)", blocks)
    assert line
    return line[0].replace("\\", "/").split()


# Windows and macOS start data workers anew, by "spawn", and so does a run through this.
SPAWN = (
    "import multiprocessing, runpy, sys; multiprocessing.set_start_method('spawn'); "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_the_line_of_the_page_trains_in_an_untouched_checkout_and_resumes(tmp_path: Path) -> None:
    python, script, *words = started_by_the_page("sh")
    assert [python, script, *words] == started_by_the_page("bat")
    framework = frameworks.checkout(frameworks.Redux, "TRAINNER_REDUX_ROOT", tmp_path)
    for kind, side in (("hr", 64), ("lr", 32)):
        (tmp_path / kind).mkdir()
        Image.fromarray(PICTURE[:side, :side]).save(tmp_path / kind / "0.png")
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
