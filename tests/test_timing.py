"""A measured ratio: candidates in turn, medians, and no claim where the spread is larger than the effect."""

from __future__ import annotations

from typing import Any, Dict, List

from aethersr.timing import Comparison, interleaved


class Clock:
    """Time that only passes when a candidate runs."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def times(self, candidates: Any, rounds: int, seconds: float) -> Dict[str, List[float]]:
        def takes(name: str) -> Any:
            def run() -> None:
                self.now += candidates[name][min(self.calls.count(name), len(candidates[name]) - 1)]
                self.calls += name

            return run

        return interleaved({name: takes(name) for name in candidates}, rounds, seconds, clock=self).times


def test_candidates_take_turns_in_an_order_that_changes_and_the_warm_up_is_not_counted() -> None:
    clock = Clock()
    assert clock.times({"a": [9, 1], "b": [9, 2]}, 4, 100) == {"a": [1000] * 4, "b": [2000] * 4}
    assert clock.calls == "ab" + "ba" + "ab" + "ba" + "ab"


def test_it_stops_when_the_time_is_up_but_not_before_three_rounds() -> None:
    for (seconds, rounds, limit), count in {(9, 50, 1): 3, (0.25, 50, 2): 9, (0.1, 7, 100): 7}.items():
        assert len(Clock().times({"a": [seconds]}, rounds, limit)["a"]) == count


def test_what_waits_in_a_queue_counts() -> None:
    """As on a GPU: the call returns at once, the work is done when it is waited for."""
    clock, queue = Clock(), [0.0]

    def wait() -> None:
        clock.now += queue[0]
        queue[0] = 0.0

    found = interleaved({"a": lambda: queue.__setitem__(0, 3.0)}, rounds=3, wait=wait, clock=clock)
    assert found.times == {"a": [3000] * 3}


def test_a_drift_of_the_machine_cancels_in_the_ratio() -> None:
    found = Comparison({"slow": [2.0**k for k in range(9)], "fast": [2.0**k / 1.5 for k in range(9)]})
    assert found.ratio("slow", "fast").words() == "1.50 (1.50 to 1.50)"
    assert found.median("slow") == 16
    assert Comparison({"a": [0.0], "b": [0.0]}).ratio("a", "b").words() == "nan (nan to nan)"
