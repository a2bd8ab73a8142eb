"""Damaged files, as hypothesis draws them: bits flipped, parts cut, removed, repeated or overwritten."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

PLACES = st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1))  # structure lies at head and tail
CHANGES = ("flip", "cut", "remove", "repeat", "ones")
DAMAGE = st.lists(st.tuples(PLACES, st.sampled_from(CHANGES), st.integers(0, 63)), min_size=1, max_size=6)
# The same examples every time, and a failing one as it was found: making it smaller would take minutes.
FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)


def damaged(content: bytes, damage: Any) -> bytes:
    """A file's content after what was drawn from DAMAGE."""
    changed = bytearray(content)
    for where, change, count in damage:
        place = int(where * (len(changed) - 1))
        if change == "flip":
            changed[place : place + 1] = bytes(value ^ 1 << count % 8 for value in changed[place : place + 1])
        elif change == "cut":
            del changed[max(1, place) :]
        elif change == "remove":
            del changed[max(1, place) : place + count]
        elif change == "repeat":
            changed[place:place] = changed[place : place + count]
        else:
            changed[place : place + count] = b"\xff" * len(changed[place : place + count])
    return bytes(changed)
