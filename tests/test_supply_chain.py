"""What is installed is pinned with hashes and has its reason, and every place names the same versions."""

from __future__ import annotations

import re

import aether_arch
import pytest
import tomllib
from conftest import ROOT

PINNED = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ;[^\\]*)? \\\n((?: +--hash=sha256:[0-9a-f]{64}.*\n)+)", re.M)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_package_has_its_reason_and_is_locked_with_hashes_and_from_no_index_of_its_own() -> None:
    lines = [line for line in read("requirements.txt").splitlines() if line and not line.startswith("#")]
    wanted = [re.fullmatch(r"([\w-]+)(?:==(\S+))?(?: ;.*?)?  # .{5,}", line) for line in lines]
    assert all(wanted), [line for line, match in zip(lines, wanted) if not match]
    lock = read("requirements.lock")
    locked = PINNED.findall(lock)  # twice where Pythons need different versions
    pins = {name: (version, hashes.count("--hash")) for name, version, hashes in locked}
    assert len(locked) == len(re.findall(r"^[^ #\n]", lock, re.M)) > len(wanted)
    for match in wanted:
        assert match
        version, _ = pins[match[1].lower()]  # KeyError: make requirements
        assert match[2] in (None, version)
    assert not re.search(r"://|--(extra-)?index|--find-links|^-e|@", lock)
    assert not re.search("^(torch|triton|nvidia|cuda)[=-]", lock, re.M), "each GPU has its own"
    assert pins["numpy"][1] > 20, "the hashes of one platform alone"
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"].values()
    needed = project["dependencies"] + [line for extra in extras for line in extra]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in needed}  # type: ignore[index]
    assert names - {"torch", "aethersr"} <= {*pins}


def test_the_package_that_is_built_from_source_has_its_hash() -> None:
    (line,) = (line for line in read("requirements-basicsr.txt").splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"animesisr-basicsr==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


@pytest.mark.parametrize(("package", "files"), [
    ("torch", ["requirements.txt", "Makefile", "README.md"]),
    ("animesisr-basicsr", ["requirements-basicsr.txt", "docs/BasicSR.md"]),
    ("torchvision", ["requirements.txt", "requirements.lock", "docs/BasicSR.md"]),
])  # fmt: skip
def test_every_place_names_the_same_version(package: str, files: list[str]) -> None:
    versions = {file: set(re.findall(rf"(?<![\w-]){package}==([\d.]+\d)", read(file))) for file in files}
    assert all(versions.values()), versions
    assert len(set.union(*versions.values())) == 1, versions


def test_the_changelog_begins_with_the_version() -> None:
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.M)[0] == aether_arch.__version__
