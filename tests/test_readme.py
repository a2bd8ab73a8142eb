"""What the pages say is so: their Python runs, their links lead somewhere, their scripts are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def run(command: list[str], folder: Path) -> str:
    """As from the checkout's root, with archs/ on the path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "archs")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# test_runtimes.py runs those of docs/runtimes.md, which need the runtimes.
@pytest.mark.parametrize("page", [name for name in BLOCKS if BLOCKS[name] and name != "docs/runtimes.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    code = "\n".join(BLOCKS[page])
    output = run([sys.executable, "-c", code], tmp_path)
    for expected in re.findall(r"# Expected output shape: (.*)", code):
        assert expected in output


def test_the_readme_shows_how_to_use_it_in_python() -> None:
    assert BLOCKS["README.md"]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for pair in LINK.findall(re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        link = "".join(pair)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


def test_the_table_of_parameters_is_what_the_command_prints(tmp_path: Path) -> None:
    rows = [line for text in PAGES.values() for line in text.splitlines()]
    for line in run([sys.executable, str(ROOT / "tests" / "print_parameters.py")], tmp_path).splitlines():
        variant, counts = line.split(": ")
        found = [row for row in rows if row.startswith(f"| `{variant}`") and row.endswith(f"{counts} |")]
        assert found, f"no page has {line}"


OURS = re.compile(
    r"\b((?:(?:options|training|benchmarks|demo|tests|docs)/\w+|(?<!/)fuse_aether|(?<!/)upscale)\.py)\b"
)


# The changelog names scripts that are gone, docs/upstream.md those of other projects.
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("CHANGELOG.md", "docs/upstream.md")])
def test_every_script_that_a_page_names_is_there(page: str) -> None:
    for name in set(OURS.findall(PAGES[page])):
        assert (ROOT / name).is_file(), name


def test_the_readme_is_read_in_minutes() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
