"""What each picture becomes; outputs appear together or not at all, and are refused before the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List

import pytest
from conftest import AsNobody

from aethersr.errors import UserError
from aethersr.files import Together, check_output
from aethersr.jobs import find_jobs


def contents(folder: Path) -> Dict[str, str]:
    paths = folder.iterdir()
    return {path.name: os.readlink(path) if path.is_symlink() else path.read_text() for path in paths}


def write(folder: Path, *names: str) -> None:
    with Together() as files:
        for name in names:
            part = files.part(folder / name)
            assert (part.parent, part.suffix) == (folder, Path(name).suffix or ".part")
            part.write_text(f"new {name}")
            part.chmod(0o600)  # as safetensors writes it
        assert not any(contents(folder).get(name) == f"new {name}" for name in names)
        files.commit()
        (folder / "ordinary").touch()
        modes = {(folder / name).stat().st_mode for name in (*names, "ordinary")}
        assert len(modes) == 1, "others may not read it"


@pytest.mark.parametrize("links", [True, False], ids=["links", "a disk without links"])
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=["full", "stopped"]
)
@pytest.mark.parametrize("before", [True, False], ids=["before it moved", "after it moved"])
def test_a_move_that_fails_takes_the_earlier_ones_back(
    tmp_path: Path, monkeypatch: Any, failing: int, error: BaseException, links: bool, before: bool
) -> None:
    (tmp_path / "a").write_text("old a")
    (tmp_path / "c").symlink_to("elsewhere")
    old, real, count = contents(tmp_path), os.replace, iter(range(99))

    def replace(source: Any, target: Any) -> None:
        mine = next(count) == failing
        if mine and before:
            raise error
        real(source, target)
        if mine:
            raise error

    def link(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", link)
    with pytest.raises(type(error)):
        write(tmp_path, "a", "b", "c")
    assert contents(tmp_path) == old
    monkeypatch.undo()
    write(tmp_path, "a", "b", "c")


def test_an_output_that_cannot_be_written_is_refused_with_the_reason(open_folder: Path) -> None:
    source = open_folder / "in.pth"
    for name, rights in (("in.pth", 0o644), ("taken.pth", 0o644), ("read-only.pth", 0o444)):
        (open_folder / name).touch(rights)
    os.link(source, open_folder / "second.pth")
    for name, target in (("link", source), ("dangling", open_folder / "nothing"), ("device", os.devnull)):
        (open_folder / f"{name}.pth").symlink_to(target)
    (open_folder / "folder.pth").mkdir()
    (open_folder / "locked").mkdir(0o555)
    for name, words, overwrite in (
        ("second.pth", "is the input itself", True),
        ("link.pth", "is the input itself", True),
        ("folder.pth", "is a folder", True),
        ("device.pth", "is a pipe or a device", True),
        ("taken.pth", "exists; pass --overwrite", False),
        ("dangling.pth", "exists; pass --overwrite", False),
        ("taken.pth/out.pth", "taken.pth is a file, where a folder is needed", True),
        ("read-only.pth", "is read-only; make it writable", True),
        ("locked/out.pth", "locked can't be written: Permission denied; pass another --out", True),
    ):
        with pytest.raises(UserError, match=words) as error, AsNobody():
            check_output(open_folder / name, [source], overwrite, "--out")
        assert "--out" in str(error.value)
    for name in ("taken.pth", "dangling.pth", "new.pth"):
        check_output(open_folder / name, [source], True, "--out")


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content does not matter")
    return folder


def names(jobs: List[Any], folder: Path) -> List[str]:
    return [job.target.relative_to(folder).as_posix() for job in jobs]


def test_no_input_is_replaced_by_what_another_becomes(tmp_path: Path) -> None:
    make(tmp_path, "pics/a.png", "pics/pics/a.png")
    with pytest.raises(UserError, match="an input too"):
        find_jobs(tmp_path / "pics", str(tmp_path / "pics" / ".."), True, overwrite=True)
    jobs, *_ = find_jobs(tmp_path / "pics", str(tmp_path), True, skip_existing=True)
    assert names(jobs, tmp_path) == ["a.png"]
    make(tmp_path, "folder.png/b.png")
    assert names(find_jobs(tmp_path / "pics", f"{tmp_path}/folder.png")[0], tmp_path) == ["folder.png/a.png"]


@pytest.mark.parametrize(
    ("output", "ending", "target"),
    [("folder", "", "folder/a.jpg"), ("folder", ".png", "folder/a.png"), ("new/", "", "new/a.jpg"),
     ("new/", ".webp", "new/a.webp"), ("b.JPEG", ".jpg", "b.JPEG"), ("b.tif", "", "b.tif"),
     ("new/inner/", "", "new/inner/a.jpg")],
)  # fmt: skip
def test_one_picture_goes_to_a_file_or_into_a_folder(
    tmp_path: Path, output: str, ending: str, target: str
) -> None:
    make(tmp_path, "a.jpg", "folder/other.png")
    (job,) = find_jobs(tmp_path / "a.jpg", f"{tmp_path}/{output}", ending=ending)[0]
    assert job.target == tmp_path / target


@pytest.mark.parametrize(
    ("source", "target", "ending", "said"),
    [("nothing.png", "out.png", "", "does not exist"), ("empty", "out", "", "holds no picture"),
     ("a.png", "out.xyz", "", "'.xyz'"), ("a.png", "no/out.png", "", "does not exist"),
     ("a.png", "out", "", "'nothing'; expected one of .png, .* or a folder: .*out/"),
     ("a.png", "b.png/", "", "b.png is a file, where a folder is needed"),
     ("a.png", "b.png", "", "pass --overwrite"), ("two", "b.png/new", "", "b.png is a file, where"),
     ("a.png", "out.jpg", ".png", "contradicts --format png"), ("a.png", "pipe.png", "", "pipe or a device"),
     ("pipe.png", "out.png", "", "neither a file nor a folder"), (".", "b.png", "", "is a file"),
     (".", "x.png", "", "is a picture's name"), ("gone.png", "x.png", "", "is a link to nothing"),
     ("two", "out", ".png", r"a\.jpg and .*a\.png would both become .*out/a\.png"),
     ("a.png", "a.png", "", "input itself"), ("a.png", "./", "", "input itself"),
     ("two", "two", "", "input itself"), ("two", "link", "", "input itself")],
)  # fmt: skip
def test_what_can_not_be_is_said(tmp_path: Path, source: str, target: str, ending: str, said: str) -> None:
    make(tmp_path, "a.png", "b.png", "two/a.jpg", "two/a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("two")
    (tmp_path / "gone.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=said) as caught:
        find_jobs(tmp_path / source, f"{tmp_path}/{target}", ending=ending)
    assert "--" in str(caught.value), "no remedy"
