"""A measured ratio: candidates in turn, medians, and no claim where the spread is larger than the effect."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest

from aethersr.timing import Comparison, interleaved


class Clock:
    """Time that only passes when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: List[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float) -> Any:
        def run() -> None:
            self.now += seconds[min(sum(call == name for call in self.calls), len(seconds) - 1)]
            self.calls.append(name)

        return run


def measured(clock: Clock, candidates: Dict[str, Any], **options: Any) -> Comparison:
    return interleaved(
        {name: clock.takes(name, *times) for name, times in candidates.items()}, clock=clock, **options
    )


def test_candidates_take_turns_in_an_order_that_changes() -> None:
    clock = Clock()
    found = measured(clock, {"a": [1], "b": [2]}, rounds=4, seconds=100)
    assert "".join(clock.calls) == "ab" + "ba" + "ab" + "ba" + "ab"
    assert found.times == {"a": [1000] * 4, "b": [2000] * 4}


def test_the_warm_up_is_not_counted_and_the_middle_of_the_rounds_is_the_time() -> None:
    found = measured(Clock(), {"a": [50, 50, 1, 1, 9]}, warmup=2, rounds=3, seconds=100)
    assert found.times == {"a": [1000, 1000, 9000]}
    assert found.median("a") == 1000


def test_what_waits_in_a_queue_counts() -> None:
    """As on a GPU: the call returns at once, the work is done when it is waited for."""
    clock, queue = Clock(), [0.0]

    def wait() -> None:
        clock.now += queue[0]
        queue[0] = 0.0

    found = interleaved({"a": lambda: queue.__setitem__(0, 3.0)}, rounds=3, wait=wait, clock=clock)
    assert found.times == {"a": [3000] * 3}


def test_it_stops_when_the_time_is_up_but_not_before_three_rounds() -> None:
    assert len(measured(Clock(), {"a": [9]}, rounds=50, seconds=1).times["a"]) == 3
    assert len(measured(Clock(), {"a": [0.1], "b": [0.1]}, rounds=50, seconds=2.1).times["a"]) == 11
    assert len(measured(Clock(), {"a": [0.1]}, rounds=7, seconds=100).times["a"]) == 7


def test_a_drift_of_the_machine_cancels_in_the_ratio() -> None:
    slow, fast = [2.0**k for k in range(9)], [2.0**k / 1.5 for k in range(9)]
    ratio = Comparison({"slow": slow, "fast": fast}).ratio("slow", "fast")
    assert ratio.value == pytest.approx(1.5)
    assert ratio.measurable
    assert ratio.words("times as fast") == "1.50 times as fast (1.50 to 1.50)"


@pytest.mark.parametrize(
    ("ratios", "measurable"),
    [
        ([1.5, 1.5, 1.5, 1.5], True),
        ([1.1, 1.5, 2.9], False),  # on one side, but the spread is as large as the effect
        ([1.05, 1.051, 1.052], True),  # a small effect that is sure
    ],
)
def test_an_effect_is_claimed_only_where_it_is_larger_than_the_spread(
    ratios: List[float], measurable: bool
) -> None:
    found = Comparison({"a": ratios, "b": [1.0] * len(ratios)})
    assert found.ratio("a", "b").measurable == measurable
    assert found.ratio("b", "a").measurable == measurable
    assert found.ratio("a", "b").words().startswith("no measurable difference (") != measurable


def test_a_clock_too_coarse_to_see_anything_makes_no_claim() -> None:
    ratio = Comparison({"a": [0.0, 0.0], "b": [0.0, 0.0]}).ratio("a", "b")
    assert not ratio.measurable
    assert ratio.words().startswith("no measurable difference")
