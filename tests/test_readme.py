"""What the pages say is so: their Python runs, their links lead somewhere, README's commands run as typed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
OURS = re.compile(
    r"\b((?:(?:options|training|benchmarks|demo|tests|docs)/\w+|(?<!/)fuse_aether|(?<!/)upscale)\.py)\b"
)


def run(command: list[str], folder: Path) -> str:
    """As from the checkout's root, with archs/ on the path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "archs")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# test_runtimes.py runs those of docs/runtimes.md, which need the runtimes.
@pytest.mark.parametrize("page", [name for name in BLOCKS if BLOCKS[name] and name != "docs/runtimes.md"])
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(page: str, tmp_path: Path) -> None:
    code = "\n".join(BLOCKS[page])
    output = run([sys.executable, "-c", code], tmp_path)
    for expected in re.findall(r"# Expected output shape: (.*)", code):
        assert expected in output
    for row in output.splitlines():
        assert row in PAGES[page] or not row.startswith("|"), row


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_leads_to_a_file_and_a_heading_and_every_script_is_there(page: str) -> None:
    for pair in LINK.findall(re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        link = "".join(pair)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link
    scripts = OURS.findall(PAGES[page]) if page != "CHANGELOG.md" else []  # it names scripts that are gone
    for name in set(scripts):
        assert (ROOT / name).is_file(), name


def test_the_table_of_parameters_is_what_the_command_prints(tmp_path: Path) -> None:
    rows = [line for text in PAGES.values() for line in text.splitlines()]
    for line in run([sys.executable, str(ROOT / "tests" / "print_parameters.py")], tmp_path).splitlines():
        variant, counts = line.split(": ")
        found = [row for row in rows if row.startswith(f"| `{variant}`") and row.endswith(f"{counts} |")]
        assert found, f"no page has {line}"


def test_the_readme_is_read_in_minutes_and_shows_python() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert BLOCKS["README.md"]


@pytest.mark.slow
def test_every_command_of_the_readme_runs_as_typed_on_a_fresh_clone(tmp_path: Path) -> None:
    """In an empty environment that sees the packages of this one, such as PyTorch. Needs PyPI and POSIX."""
    clone, venv = tmp_path / "clone", tmp_path / "venv"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "this.pth").write_text(sysconfig.get_path("purelib"))
    (clone / ".venv").mkdir()  # make finds its environment set up
    for each in Path(sys.prefix).glob("*"):
        (clone / ".venv" / each.name).symlink_to(each)
    (clone / ".venv" / ".installed").touch()
    environment = {**os.environ, "PATH": os.pathsep.join([str(venv / "bin"), os.environ["PATH"]])}
    readme = PAGES["README.md"]
    commands = "".join(re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)).splitlines()
    commands += re.findall(r"`((?:make|python (?:tests|docs)/)[^`]*)`", readme)
    assert len(commands) >= 12
    for command in commands:
        if command == "make test":
            continue
        shell = ["bash", "-c", f"exec {command} 2>&1"]
        pipes: Any = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(shell, cwd=clone, env=environment, **pipes)
        said, start = "", time.monotonic()
        for line in process.stdout or ():
            said += line
            if line.startswith("Open http://"):  # make web: until Ctrl-C
                os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 0 or "serve_web.py: stopped" in said, f"{command}\n{said[-3000:]}"
        print(f"{command}: {time.monotonic() - start:.0f} s\n{said}")
