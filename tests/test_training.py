"""training/: sharp and drawn pairs, test pictures among them, model cards; the user's files stay."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Set, Tuple

import draw_graphics
import frameworks
import model_card
import numpy as np
import overlap
import prepare_pictures
import pytest
from conftest import ROOT, noise, small_net
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from skimage import data as photographs

from aethersr.onnx import export_onnx

PICTURE = photographs.astronaut()


def prepare(folder: Path, *arguments: Any) -> int:
    return prepare_pictures.main([str(folder), *map(str, arguments)])


def sources(folder: Path) -> Set[str]:
    rows = csv.DictReader((folder / "sources.csv").read_text(encoding="utf-8").splitlines())
    return {Path(row["picture"]).name for row in rows}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Pictures of one's own: one that can be cut, one too soft, one too small, and two that can't be read."""
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.fromarray(PICTURE).save(folder / "a.png")
    Image.new("RGB", (400, 400), "grey").save(folder / "soft.png")
    Image.fromarray(PICTURE[:100, :100]).save(folder / "small.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:5000])
    (folder / "text.jpg").write_text("text")
    return folder


def test_pairs_are_sharp_cuts_and_their_place_in_the_reduced_picture(
    mine: Path, tmp_path: Path, capsys: Any
) -> None:
    assert prepare(tmp_path / "pairs", "--pictures", mine, "--reductions", 1) == 0
    named = re.findall(r"left out: \S*?(\w+\.\w+)", capsys.readouterr().err)
    assert sorted(named) == ["broken.png", "text.jpg"]
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


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb, of Debian and Ubuntu")
def test_textures_come_from_the_archives_in_their_packages(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    Image.fromarray(PICTURE).save(tmp_path / "saved.png")
    for name in ("wallpaper", "game"):
        folder = tmp_path / "made" / name
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
        for path, text in (("DEBIAN/control", control), (f"usr/share/doc/{name}/copyright", name)):
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_text(text)
        Image.fromarray(PICTURE).resize((1100, 1100)).save(folder / "usr" / f"{name}.png")
        if name == "game":
            for picture in ("land/lake", "ship/boat"):
                path = folder / f"usr/games/endless-sky/images/{picture}.png"
                path.parent.mkdir(parents=True)
                shutil.copy(tmp_path / "saved.png", path)
            with zipfile.ZipFile(folder / "usr" / "base.pk3", "w") as archive:
                for texture in ("wall", "wall_nm"):  # and its normal map
                    archive.write(tmp_path / "saved.png", f"textures/{texture}.png")
        subprocess.run(["dpkg-deb", "-b", folder, packages / f"{name}_1.deb"], check=True)
    monkeypatch.setattr(prepare_pictures, "WALLPAPERS", ("wallpaper",))
    monkeypatch.setattr(prepare_pictures, "TEXTURES", ("game",))
    for words, more in (([], []), (["--textures"], ["game.png", "lake.png", "wall.png"])):
        target = tmp_path / f"pairs{len(words)}"
        shutil.copytree(packages, target / "packages")
        assert prepare(target, *words) == 0
        assert sources(target) == {"wallpaper.png", *more}
    assert (target / "copyright/game").read_text() == "game"
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


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_both_pictures_of_a_pair_show_a_disc_at_the_same_place(scale: int) -> None:
    canvas = Image.new("RGB", (draw_graphics.SIDE,) * 2)
    ImageDraw.Draw(canvas).ellipse((301, 203, 1003, 1101), (255, 255, 255))

    def centre(picture: Image.Image, step: int) -> Any:
        values = np.asarray(picture.convert("L"), dtype=float)
        y, x = (np.indices(values.shape) + 0.5) * step
        return np.array([(y * values).sum(), (x * values).sum()]) / values.sum()

    random, kinds = np.random.default_rng(0), set()
    for _ in range(100):
        large, small = draw_graphics.pair(canvas, random, scale)
        assert (large.size, small.size) == ((192, 192), (192 // scale, 192 // scale))
        # If every n-th pixel were taken, half a pixel or more.
        assert np.abs(centre(large, 1) - centre(small, scale)).max() < 0.1 * scale
        kinds.add((large.tobytes(), small.tobytes()))
    assert len(kinds) == 8  # hard or smooth, and four kinds of small pictures


def test_pairs_are_complete_and_the_same_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = [str(tmp_path / name), "--count", "5", "--fonts", str(tmp_path)]
        assert draw_graphics.main(arguments) == 0
    names = sorted(path.name for path in (tmp_path / "one" / "gt").iterdir())
    assert names == [f"graphics_{index:05d}.png" for index in range(5)]
    for path in sorted((tmp_path / "one").rglob("*.png")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        assert len(Image.open(path).getcolors(192 * 192)) > 1, f"{path} is empty"


FACE = Image.fromarray(photographs.astronaut()[20:404, 100:484])


@pytest.fixture
def folders(tmp_path: Path) -> Tuple[Path, Path]:
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
    folders: Tuple[Path, Path], capsys: Any
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
    folders: Tuple[Path, Path], change: Callable[[Image.Image], Image.Image], capsys: Any
) -> None:
    cuts, tests = folders
    change(FACE).save(cuts / "face.jpg", quality=75)
    assert overlap.main([str(cuts), str(tests)]) == 2
    printed = capsys.readouterr()
    assert "of face.jpg in astronaut.png" in printed.out
    assert re.search(r"face.jpg shows \S+astronaut.png;", printed.err)


CARD = ["--author", "my-id", "--date", "2026-11-22", "--tags", "photo,restoration"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = small_net(2).fused().float()
    release, state = tmp_path_factory.mktemp("files"), net.state_dict()
    save_file({name: value.half() for name, value in state.items()}, release / "2x_My_Model_fp16.safetensors")
    export_onnx(net, 2, output_path=str(release / "2x_My_Model_fp16.onnx"))
    (release / "2x_damaged.pth").write_bytes(b"damaged")
    return release


def make_card(*arguments: Any) -> int:
    return model_card.main([*map(str, arguments), *CARD])


def describes(card: Dict[str, Any], *files: Path) -> None:
    assert card.items() >= model_card.facts(files[0]).items()
    for resource, file in zip(card["resources"], files):
        assert resource["size"] == file.stat().st_size
        assert resource["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert resource["type"] == file.suffix[1:]
        assert resource["platform"] == ("onnx" if file.suffix == ".onnx" else "pytorch")
    assert len(card["resources"]) == len(files)


def test_a_card_says_what_the_files_are_and_is_not_replaced_unasked(release: Path, capsys: Any) -> None:
    files = [release / f"2x_My_Model_fp16{ending}" for ending in (".safetensors", ".onnx")]
    more = ["--url", "https://example.org/v1/", "--more", '{"trainingIterations": 7}']
    assert make_card(*files, *more) == 0
    path = release / "2x-My-Model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    describes(card, *files)
    urls = [resource["urls"] for resource in card["resources"]]
    assert urls == [[f"https://example.org/v1/{file.name}"] for file in files]
    found = (card["name"], card["tags"], card["size"], card["trainingIterations"])
    assert found == ("My_Model", ["photo", "restoration"], ["24dim", "3nb", "11ks"], 7)
    assert make_card(*files) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert make_card(*files, "--overwrite") == 0
    path.unlink()
    for name, expected in (("2xMine", "2x-Mine"), ("Mine x2", "2x-Mine"), ("  a__b (c) ", "2x-a-b-c")):
        assert model_card.model_id(name, 2) == expected


def test_every_released_file_has_a_card_that_lacks_its_address_alone() -> None:
    released = {path for path in (ROOT / "weights").glob("*_*.*") if "_training_" not in path.name}
    for path in (ROOT / "weights").glob("*.json"):
        card = json.loads(path.read_text(encoding="utf-8"))
        stem = path.stem.replace("-", "_")
        files = [path.with_name(f"{stem}{ending}") for ending in ("_fp16.safetensors", "_int8.onnx")]
        describes(card, *files)
        assert [resource["urls"] for resource in card["resources"]] == [[], []]
        assert path.stem == model_card.model_id(card["name"], card["scale"])
        released -= set(files)
    assert not released


HELD = ("gt", "lq", "sources.csv", "copyright")
NET, CUT = "{release}/2x_My_Model_fp16.safetensors", "pairs --reductions 4 --pictures"


@pytest.mark.parametrize(("script", "words", "said"), [
    (prepare_pictures, f"{CUT} mine", "no crop of mine is sharp enough"),
    (prepare_pictures, f"{CUT} none", "--pictures none is not a folder"),
    (prepare_pictures, f"{CUT} empty", "empty holds no picture"),
    (prepare_pictures, f"{CUT} broken", "holds no pictures of 192 pixels or more a side that can be read"),
    *((prepare_pictures, f"has_{name} --pictures mine", f"{name} exists; name another") for name in HELD),
    (draw_graphics, "drawn", "graphics_0.png exists; remove the drawn pairs"),
    (overlap, "cuts none", "is not a folder"),
    (overlap, "cuts cuts/flat.png", "with details"),
    (model_card, "absent.pth", "is no file in .pth"),
    (model_card, "{release}/2x_damaged.pth", "(FILE)"),
    (model_card, "{release}/2x_My_Model_fp16.onnx", "(FILE)"),
    (model_card, f"{NET} --name 写真", "has no letter or digit that an id"),
])  # fmt: skip
def test_what_cannot_be_done_ends_in_one_line_and_leaves_nothing(
    script: Any, words: str, said: str, mine: Path, folders: Any, release: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(mine.parent)
    for name in ("empty", "broken", *(f"has_{name}/{name}" for name in HELD)):
        Path(name).mkdir(parents=True)
    Path("broken", "text.png").write_text("text")
    noise(Path("drawn/gt/graphics_0.png"))
    places = (Path(), release)
    before = [path for place in places for path in place.rglob("*")]
    more = CARD if script is model_card else []
    assert script.main([*words.format(release=release).split(), *more]) == 2
    assert re.match(
        rf"{script.__name__}.py: error: .*{re.escape(said)}", capsys.readouterr().err.splitlines()[-1]
    )
    assert [path for place in places for path in place.rglob("*") if path.name != "pairs"] == before
