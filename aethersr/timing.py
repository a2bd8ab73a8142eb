"""How all times here are measured: candidates take turns; medians, and a spread with each ratio.

A machine's speed drifts by more than most differences of interest, so timing one candidate after the other
compares two moments. Here every round calls each candidate once, in alternating order, and ratios are taken
within a round, so drift affects all alike. Needs only Python.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple


class Ratio(NamedTuple):
    """How many times as long one candidate takes as another: the rounds' median and middle half."""

    value: float
    low: float
    high: float

    def words(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Comparison(NamedTuple):
    """Times in ms. Round k of every candidate was measured at about the same moment."""

    times: Dict[str, List[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times as long ``slow`` takes as ``fast``."""
        ratios = [one / other for one, other in zip(self.times[slow], self.times[fast]) if other > 0]
        if not ratios:
            return Ratio(math.nan, math.nan, math.nan)
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return Ratio(statistics.median(ratios), quartiles[0], quartiles[2])


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    seconds: float = 10.0,
    wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time every candidate once a round.

    Args:
        candidates: functions without arguments, by name.
        rounds: at most this many rounds are measured, and at least three however long they take.
        seconds: no round starts later than this after the first.
        wait: called before the clock is read, such as torch.cuda.synchronize, so that queued work counts.
        clock: returns seconds.
    """
    times: Dict[str, List[float]] = {name: [] for name in candidates}
    begin = clock()
    for number in range(-1, rounds):  # the first only warms up
        if number == 0:
            begin = clock()
        if number >= 3 and clock() - begin > seconds:
            break
        for name in list(candidates)[:: 1 if number % 2 else -1]:
            wait()
            start = clock()
            candidates[name]()
            wait()
            if number >= 0:
                times[name].append((clock() - start) * 1e3)
    return Comparison(times)
