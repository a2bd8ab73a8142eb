"""Outputs appear together or not at all, and a path that can't be written is refused before anything is
computed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Dict

import pytest
from conftest import AsNobody

from aethersr.errors import UserError
from aethersr.files import Together, check_output, unwritable


def contents(folder: Path) -> Dict[str, str]:
    paths = folder.iterdir()
    return {path.name: os.readlink(path) if path.is_symlink() else path.read_text() for path in paths}


def write(folder: Path, *names: str) -> None:
    with Together() as files:
        for name in names:
            part = files.part(folder / name)
            assert (part.parent, part.suffix) == (folder, Path(name).suffix or ".part")
            part.write_text(f"new {name}")
        assert not any(contents(folder).get(name) == f"new {name}" for name in names)
        files.commit()


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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_file_may_be_read_by_whoever_may_read_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    with Together() as files:
        part = files.part(tmp_path / "a.safetensors")
        part.write_bytes(b"")
        part.chmod(0o600)  # as safetensors writes it
        files.commit()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_an_output_that_cannot_be_written_is_refused_with_the_reason_and_the_option(
    open_folder: Path,
) -> None:
    source = open_folder / "in.pth"
    source.write_text("in")
    os.link(source, open_folder / "second.pth")
    (open_folder / "link.pth").symlink_to(source)
    (open_folder / "dangling.pth").symlink_to(open_folder / "nothing")
    (open_folder / "folder.pth").mkdir()
    (open_folder / "device.pth").symlink_to(os.devnull)
    (open_folder / "taken.pth").write_text("mine")
    (open_folder / "locked").mkdir(0o555)
    (open_folder / "read-only.pth").touch(0o444)
    for name, words, overwrite in (
        ("no/out.pth", "does not exist", True),
        ("in.pth", "is the input itself", True),
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
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "left on device; free space or pass another --out." in str(unwritable(source, full, "--out"))
