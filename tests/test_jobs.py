"""Which pictures there are, what each becomes, and why others are left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List

import pytest

from aethersr.errors import UserError
from aethersr.jobs import find_jobs


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content does not matter")
    return folder


def names(jobs: List[Any], folder: Path) -> List[str]:
    return [job.target.relative_to(folder).as_posix() for job in jobs]


def test_every_file_that_is_skipped_is_named_or_counted(tmp_path: Path) -> None:
    source = make(
        *(tmp_path / "Bilder \u00f6", "good.PNG", "inner/deep/b.jpg", "notes.txt", ".hidden", "Thumbs.db"),
        *("._good.PNG", ".hidden.png", ".thumbnails/good.png", "inner/x.png/c.png"),
    )
    (source / "gone.png").symlink_to(source / "nothing")
    os.mkfifo(source / "pipe.png")
    (source / "inner" / "circle").symlink_to(source)
    jobs, problems, others = find_jobs(source, str(tmp_path / "out"))
    assert names(jobs, tmp_path / "out") == ["good.PNG"]
    for line, words in zip(problems, ("gone.png is a link to nothing", "pipe.png is neither a file nor a")):
        assert f"{source}{os.sep}{words}" in line
    assert len(problems) == 2
    assert others == {"files that are no pictures": 1, "folders, without --recursive": 1}
    jobs, problems, others = find_jobs(source, str(tmp_path / "out"), recursive=True)
    assert names(jobs, tmp_path / "out") == ["good.PNG", "inner/deep/b.jpg", "inner/x.png/c.png"]
    assert others == {"files that are no pictures": 1, "links to folders": 1}


def test_an_interrupted_folder_goes_on_and_its_output_inside_it_is_no_input(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "sub/b.png", "out/a.png")
    out = str(tmp_path / "out")
    assert names(find_jobs(tmp_path, out, True, skip_existing=True)[0], tmp_path / "out") == ["sub/b.png"]
    make(tmp_path, "out/sub/b.png")
    assert find_jobs(tmp_path, out, True, skip_existing=True) == ([], [], {})
    with pytest.raises(UserError, match="--skip-existing to go on with the others, --overwrite to"):
        find_jobs(tmp_path, out, True)
    assert len(find_jobs(tmp_path, out, True, overwrite=True)[0]) == 2


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = make(tmp_path, "in/a.png") / "in" / "a.png"
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.link(source, tmp_path / "second.png")
    (tmp_path / "third.png").symlink_to(source)
    outputs = [(source, name) for name in ("in/a.png", "second.png", "third.png", "in/")]
    outputs += [(source.parent, name) for name in ("in", "link")]
    for given, name in outputs:
        with pytest.raises(UserError, match="input itself"):
            find_jobs(given, f"{tmp_path}/{name}", overwrite=True)


def test_no_input_is_replaced_by_what_another_becomes(tmp_path: Path) -> None:
    make(tmp_path, "pics/a.png", "pics/pics/a.png")
    with pytest.raises(UserError, match="an input too"):
        find_jobs(tmp_path / "pics", str(tmp_path / "pics" / ".."), True, overwrite=True)
    assert names(find_jobs(tmp_path / "pics", str(tmp_path), True, skip_existing=True)[0], tmp_path) == [
        "a.png"
    ]


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
     ("a.png", "b.png/c.png", "", "is a file, where"),
     ("a.png", "b.png", "", "pass --overwrite"), ("two", "b.png/new", "", "b.png is a file, where"),
     ("a.png", "out.jpg", ".png", "contradicts --format png"), ("a.png", "pipe.png", "", "pipe or a device"),
     ("pipe.png", "out.png", "", "neither a file nor a folder"), (".", "b.png", "", "is a file"),
     (".", "x.png", "", "is a picture's name"),
     ("two", "out", ".png", r"a\.jpg and .*a\.png would both become .*out/a\.png")],
)  # fmt: skip
def test_what_can_not_be_is_said(tmp_path: Path, source: str, target: str, ending: str, said: str) -> None:
    make(tmp_path, "a.png", "b.png", "two/a.jpg", "two/a.png")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=said) as caught:
        find_jobs(tmp_path / source, f"{tmp_path}/{target}", ending=ending)
    assert "--" in str(caught.value), "no remedy"
