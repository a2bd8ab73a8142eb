"""What is installed is pinned with hashes and has its reason, and every place names the same versions."""

from __future__ import annotations

import re
import subprocess
import sys

import aether_arch
import pytest
import tomllib
from conftest import ROOT

PINNED = re.compile(
    r"^([a-z0-9-]+)==([^ ]+)(?: ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def listed() -> dict[str, str]:
    """Package and version, "" where any, of each line of requirements.txt."""
    lines = [
        re.match(r"([A-Za-z0-9_-]+)(?:==(\S+))?", line) for line in read("requirements.txt").splitlines()
    ]
    return {line[1].lower(): line[2] or "" for line in lines if line}


def test_every_package_is_pinned_with_hashes_and_from_no_index_of_its_own() -> None:
    text = read("requirements.lock")
    pins = {name: (version, hashes.count("--hash")) for name, version, hashes in PINNED.findall(text)}
    packages = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(pins) == len(packages) > 15
    for name, version in listed().items():
        assert name in pins, f"{name} is not in requirements.lock: make requirements"
        assert version in ("", pins[name][0]), f"{name}: make requirements"
    assert not re.search(r"://|--(extra-)?index|--find-links|^-e|@", text)
    assert pins["numpy"][1] > 20, "the hashes of one platform alone"


def test_torch_and_what_needs_a_card_are_left_to_the_user() -> None:
    assert not re.search("^(torch|triton|nvidia|cuda)[=-]", read("requirements.lock"), re.MULTILINE)


def test_the_package_that_is_built_from_source_has_its_hash() -> None:
    (line,) = (line for line in read("requirements-basicsr.txt").splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"animesisr-basicsr==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_every_dependency_has_its_reason() -> None:
    for line in read("requirements.txt").splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"\S+( ; [^#]+)?  # .{9,}", line), line


@pytest.mark.parametrize(("package", "files"), [
    ("torch", ["requirements.txt", "Makefile"]),
    ("animesisr-basicsr", ["requirements-basicsr.txt", "docs/BasicSR.md"]),
    ("torchvision", ["requirements.txt", "docs/BasicSR.md"]),
])  # fmt: skip
def test_every_place_names_the_same_version(package: str, files: list[str]) -> None:
    versions = {file: set(re.findall(rf"(?<![\w-]){package}==([\d.]+\d)", read(file))) for file in files}
    assert all(versions.values()), versions
    assert len(set.union(*versions.values())) == 1, versions


def test_what_the_package_needs_is_pinned_for_the_tests() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"].values()
    needed = project["dependencies"] + [line for extra in extras for line in extra]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in needed}  # type: ignore[index]
    assert names - {"torch", "aethersr"} <= set(listed())


def test_the_changelog_begins_with_the_version() -> None:
    (version,) = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[:1]
    assert aether_arch.__version__ == version
    command = [sys.executable, str(ROOT / "fuse_aether.py"), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == version
