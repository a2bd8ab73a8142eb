"""A measured ratio: candidates in turn, medians, and no claim where the spread is larger than the effect."""

from __future__ import annotations

from functools import partial
from typing import Any, Dict, List

from aethersr.timing import Comparison, interleaved


class Clock:
    """Time that only passes when the work of a candidate is waited for, as on a GPU."""

    def __init__(self) -> None:
        self.now, self.queue, self.calls = 0.0, 0.0, ""

    def wait(self) -> None:
        self.now, self.queue = self.now + self.queue, 0.0

    def times(self, candidates: Any, rounds: int, seconds: float) -> Dict[str, List[float]]:
        def run(name: str) -> None:
            self.queue = candidates[name][min(self.calls.count(name), len(candidates[name]) - 1)]
            self.calls += name

        calls = {name: partial(run, name) for name in candidates}
        return interleaved(calls, rounds, seconds, self.wait, clock=lambda: self.now).times


def test_candidates_take_turns_in_an_order_that_changes_and_the_warm_up_is_not_counted() -> None:
    clock = Clock()
    assert clock.times({"a": [9, 1], "b": [9, 2]}, 4, 100) == {"a": [1000] * 4, "b": [2000] * 4}
    assert clock.calls == "ab" + "ba" + "ab" + "ba" + "ab"


def test_it_stops_when_the_time_is_up_but_not_before_three_rounds() -> None:
    for (seconds, rounds, limit), count in {(9, 50, 1): 3, (0.25, 50, 2): 9, (0.1, 7, 100): 7}.items():
        assert len(Clock().times({"a": [seconds]}, rounds, limit)["a"]) == count


def test_a_drift_of_the_machine_cancels_in_the_ratio() -> None:
    found = Comparison({"slow": [2.0**k for k in range(9)], "fast": [2.0**k / 1.5 for k in range(9)]})
    assert found.ratio("slow", "fast").words() == "1.50 (1.50 to 1.50)"
    assert found.median("slow") == 16
    assert Comparison({"a": [0.0], "b": [0.0]}).ratio("a", "b").words() == "nan (nan to nan)"
