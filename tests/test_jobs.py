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


def test_every_file_that_is_skipped_is_named_with_its_reason(tmp_path: Path) -> None:
    source = make(
        tmp_path / "Bilder \u00f6", "good.PNG", "inner/deep/b.jpg", "notes.txt", ".hidden", "Thumbs.db"
    )
    (source / "gone.png").symlink_to(source / "nothing")
    os.mkfifo(source / "pipe.png")
    (source / "inner" / "circle").symlink_to(source)
    jobs, skipped = find_jobs(source, tmp_path / "out", False, False, False)
    assert names(jobs, tmp_path / "out") == ["good.PNG"]
    reasons = {"gone.png": "a link to nothing", "notes.txt": "'.txt'", "pipe.png": "neither a file nor"}
    reasons["inner"] = "--recursive"
    assert len(skipped) == len(reasons)
    for name, reason in reasons.items():
        assert sum(f"{source / name} " in line and reason in line for line in skipped) == 1, (name, skipped)
    jobs, skipped = find_jobs(source, tmp_path / "out", True, False, False)
    assert names(jobs, tmp_path / "out") == ["good.PNG", "inner/deep/b.jpg"]
    assert not any("inner" in line for line in skipped)


def test_an_interrupted_folder_goes_on_and_its_output_inside_it_is_no_input(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "sub/b.png", "out/a.png")
    jobs, skipped = find_jobs(tmp_path, tmp_path / "out", True, False, True)
    assert (names(jobs, tmp_path / "out"), skipped) == (["sub/b.png"], [])
    make(tmp_path, "out/sub/b.png")
    assert find_jobs(tmp_path, tmp_path / "out", True, False, True) == ([], [])
    with pytest.raises(UserError, match="--overwrite"):
        find_jobs(tmp_path, tmp_path / "out", True, False, False)
    assert len(find_jobs(tmp_path, tmp_path / "out", True, True, False)[0]) == 2


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = make(tmp_path, "in/a.png") / "in" / "a.png"
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.link(source, tmp_path / "second.png")
    (tmp_path / "third.png").symlink_to(source)
    outputs = [(source, name) for name in ("in/a.png", "second.png", "third.png")]
    outputs += [(source.parent, name) for name in ("in", "link")]
    for given, name in outputs:
        with pytest.raises(UserError, match="input itself"):
            find_jobs(given, tmp_path / name, False, True, False)


def test_no_input_is_replaced_by_what_another_becomes(tmp_path: Path) -> None:
    make(tmp_path, "pics/a.png", "pics/pics/a.png")
    with pytest.raises(UserError, match="an input too"):
        find_jobs(tmp_path / "pics", tmp_path / "pics" / "..", True, True, False)
    jobs, _ = find_jobs(tmp_path / "pics", tmp_path, True, False, True)
    assert names(jobs, tmp_path) == ["a.png"]


def test_a_folder_keeps_its_name_where_a_link_leads_there_too(tmp_path: Path) -> None:
    make(tmp_path / "in", "b/inner/1.png", "z/2.png")
    make(tmp_path / "other", "3.png")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "b" / "c").symlink_to(tmp_path / "in" / "z")
    (tmp_path / "in" / "d").symlink_to(tmp_path / "other")
    jobs, skipped = find_jobs(tmp_path / "in", tmp_path / "out", True, False, False)
    assert (names(jobs, tmp_path / "out"), skipped) == (["b/inner/1.png", "z/2.png", "d/3.png"], [])


def test_one_picture_may_go_into_a_folder_that_exists(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "folder/other.png")
    ((job,), skipped) = find_jobs(tmp_path / "a.png", tmp_path / "folder", False, False, False)
    assert (job.target, skipped) == (tmp_path / "folder" / "a.png", [])


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("nothing.png", "out.png", "does not exist"),
        ("empty", "out", "holds no picture"),
        ("a.png", "out.xyz", "'.xyz'"),
        ("a.png", "out", "nothing"),
        ("a.png", "no/out.png", "does not exist"),
        ("a.png", "b.png", "--overwrite"),
        ("a.png", "pipe.png", "pipe or a device"),
        ("pipe.png", "out.png", "neither a file nor a folder"),
        (".", "b.png", "is a file"),
        (".", "no/out", "does not exist"),
    ],
)
def test_what_can_not_be_is_said(tmp_path: Path, source: str, target: str, said: str) -> None:
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=said) as caught:
        find_jobs(tmp_path / source, tmp_path / target, False, False, False)
    assert "--" in str(caught.value), "no remedy"
