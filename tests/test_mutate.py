"""tests/mutate.py changes what runs, one thing at a time, and tells survivors from the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mutate
import pytest
from conftest import ROOT

SOURCE = '''"""Docstring."""
import os

def clip(value: int, low=0, *, high: int = 10) -> "int":
    """Docstring."""
    if not value > low:
        raise ValueError(f"{value} is too small" + "here")
    total = -value
    total += os.path.join("a", str(value))[:3]
    return value if value < high and low else high
'''


def test_every_mutant_is_a_program_that_differs() -> None:
    found = mutate.mutants(SOURCE)
    trees = {ast.dump(ast.parse(mutate.apply(SOURCE, mutant))) for mutant in found}
    assert len(trees) == len(found)
    assert ast.dump(ast.parse(SOURCE)) not in trees


@pytest.mark.parametrize(
    "changed",
    [
        "low=1",
        "high: int = 11",
        "if (not not value > low):",
        "if (value > low):",
        "if not (value >= low):",
        "total = value",
        'total += os.path.join("a", str(value))[:4]',
        'total += os.path.join("a", str(value))[:]',
        'total += os.path.join("a", str())[:3]',
        "total += os.path.join('ax', str(value))[:3]",
        "return (high if value < high and low else value)",
        "return value if (value < high or low) else high",
    ],
)
def test_it_changes(changed: str) -> None:
    assert any(changed in mutate.apply(SOURCE, mutant) for mutant in mutate.mutants(SOURCE))


def test_annotations_docstrings_and_words_for_people_stay() -> None:
    for mutant in mutate.mutants(SOURCE):
        text = mutate.apply(SOURCE, mutant)
        for kept in ('"""Docstring."""\nimport os', "value: int", '-> "int":', "is too small"):
            assert kept in text or "pass" in text or "ValueError()" in text, text


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_mutant_that_no_test_notices_is_printed() -> None:
    """Of tests/matrix.py: its tests don't enter the interpreters that it tries."""
    lines = (ROOT / "tests" / "matrix.py").read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "9 * scale, 7 * scale" in text)
    command = [
        sys.executable,
        "tests/mutate.py",
        "tests/matrix.py",
        "--count",
        "1",
        "--lines",
        f"{line}-{line}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"survives: {Path('tests/matrix.py')}:{line}" in done.stdout
    assert "0% of 1 mutants noticed" in done.stdout
