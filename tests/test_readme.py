"""The README's code runs as it is written, and its table is the one that the committed command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT / "archs")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_python_block_runs_as_written(block: str, tmp_path: Path) -> None:
    output = run([sys.executable, "-c", block], tmp_path)
    for expected in re.findall(r"# Expected output shape: (.*)", block):
        assert expected in output


def test_there_are_python_blocks() -> None:
    assert len(BLOCKS) >= 3


def test_the_table_of_parameters_is_what_the_command_prints(tmp_path: Path) -> None:
    for line in run([sys.executable, str(ROOT / "tests" / "print_parameters.py")], tmp_path).splitlines():
        variant, counts = line.split(": ")
        (row,) = (row for row in README.splitlines() if row.startswith(f"| `{variant}`"))
        assert row.endswith(f"{counts} |")


def test_every_local_link_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_table_of_int8_is_what_the_command_printed() -> None:
    printed = (ROOT / "benchmarks" / "results" / "int8.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.splitlines() if "ONNX Runtime |" in line or ", OpenVINO f32 |" in line]
    assert len(rows) == 6
    assert all(row in printed for row in rows)


def test_the_table_of_fusing_is_what_the_command_printed() -> None:
    results = ROOT / "benchmarks" / "results"
    printed = [line for name in ("aether_small.md", "aether_medium_large.md") for line in (results / name).read_text(encoding="utf-8").splitlines()]
    rows = [line for line in README.splitlines() if re.match(r"\| aether_\w+ x4 \|", line)]
    assert len(rows) == 3
    assert set(rows) <= set(printed)
