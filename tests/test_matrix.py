"""tests/matrix.py tells what works from what does not, and the files for every Python read as Python 3.8."""

from __future__ import annotations

import ast
from typing import Any

import matrix
import pytest
from conftest import ROOT


def report(python: str, torch: str, **results: str) -> dict[str, Any]:
    return {"python": python, "torch": torch, "results": {"a": "yes", "b": "yes", **results}}


def test_a_row_for_each_interpreter_in_order_and_the_rest_is_not_tested() -> None:
    reports = [
        report("3.11.2", "2.13.0"),
        report("3.8.18", "1.13.1", a="AssertionError: x", b=matrix.ABSENT),
        report("3.11.2", "2.4.1"),
    ]
    head, _, *rows, empty, rest = matrix.table([*reports, {"python": "3.12.1"}])
    assert head == "| Python | PyTorch | a | b |"
    assert rows == [
        "| 3.8.18 | 1.13.1 | **no** | - |",
        "| 3.11.2 | 2.4.1 | yes | yes |",
        "| 3.11.2 | 2.13.0 | yes | yes |",
    ]
    assert (empty, rest) == ("", "Not tested: Python 3.9, 3.10, 3.12, 3.13.")


def test_an_interpreter_that_does_not_start_is_none() -> None:
    assert matrix.ask("/no/such/python") is None
    assert matrix.ask("true") is None


OLD = ["fuse_aether.py", "upscale.py", "tests/matrix.py"]
OLD += [
    path.relative_to(ROOT).as_posix()
    for name in ("archs", "aethersr")
    for path in (ROOT / name).rglob("*.py")
]


@pytest.mark.parametrize("name", OLD)
def test_the_syntax_is_that_of_python_3_8(name: str) -> None:
    """Syntax alone: the table of tests/matrix.py comes from a real Python 3.8."""
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_newer_syntax_is_noticed() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))
