"""benchmarks/operations.py: every operation of ONNX Runtime's profile counts once, in the right row."""

from __future__ import annotations

import sys
from typing import List

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("onnxruntime")

import operations

WIDE, NHWC = [1, 96, 16, 16], [1, 16, 16, 192]


@pytest.mark.parametrize(
    ("operation", "shapes", "kind"),
    [
        ("Conv", [WIDE, [96, 1, 11, 11], [96]], operations.DEPTHWISE),
        ("Conv", [WIDE, [192, 96, 1, 1], [192]], operations.DENSE),
        ("QLinearConv", [NHWC, [], [], [96, 192, 1, 1]], operations.DENSE),
        ("QuickGelu", [WIDE], operations.GATING),
        ("Mul", [WIDE, WIDE], operations.GATING),
        ("QLinearMul", [NHWC, [], [], NHWC, [], []], operations.GATING),
        ("Mul", [WIDE, [1, 96, 1, 16]], operations.REST),  # a mask of the tail's border correction
        ("Add", [WIDE, WIDE], operations.SUMS),
        ("Add", [[1, 12, 16, 16], [1, 12, 16, 16]], operations.REST),
        ("ReorderInput", [WIDE], operations.LAYOUT),
        ("QuantizeLinear", [WIDE, [], []], operations.LAYOUT),
    ],
)
def test_an_operation_is_in_its_row(operation: str, shapes: List[List[int]], kind: str) -> None:
    assert operations.kind_of(operation, shapes) == kind


def test_a_network_is_measured_and_the_limit_leaves_out_rounding_and_sums() -> None:
    found = operations.measure(2, 16, rounds=1)
    assert list(found) == ["fp32", "default onnxruntime", "full onnxruntime"]
    for name, kinds in found.items():
        assert set(kinds) == set(operations.KINDS)
        busy = (*operations.CONVOLUTIONS, operations.GATING)
        assert all(kinds[kind] > 0 for kind in (busy if name == "fp32" else operations.KINDS))
    lines = operations.report(2, 16, {"fp32": dict.fromkeys(operations.KINDS, 10.0)})
    assert "| all | 60 (1.00) |" in lines
    assert "| all, over its convolutions | 3.00 |" in lines
    assert "| limit: convolutions, SiLU and product alone | 30 (2.00) |" in lines
