"""The tables and the plot of gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Mapping, Tuple

from report import Row, scatter, short, table

CARDS = (8, 12, 16, 24)  # GB
RESERVE = 1.0  # GB that the screen and CUDA itself take


def fitting(rows: List[Row]) -> List[List[str]]:
    """Largest batch for each network and lq on GPUs with CARDS GB: memory grows linearly with the batch."""
    cells = []
    for group in dict.fromkeys(row["group"] for row in rows):
        points = [
            (int(row["way"][6:]), row["peak MiB"])
            for row in rows
            if row["group"] == group and "peak MiB" in row
        ]
        if len(points) < 2:
            continue
        (few, least), (many, most) = points[0], points[-1]
        slope = max((most - least) / (many - few), 1e-9)
        batches = [int((1024 * (card - RESERVE) - least) / slope + few) for card in CARDS]
        cells.append([group, *(str(batch) if batch >= 1 else "-" for batch in batches)])
    return cells


def markdown(rows: List[Row], title: str, parts: Mapping[str, str]) -> str:
    """A table for each part; ``parts`` tells what each measures."""
    lines = [title, ""]
    for part, told in parts.items():
        found = [row for row in rows if row["part"] == part]
        if not found:
            continue
        names = dict.fromkeys(name for row in found for name in row)
        columns = [name for name in names if name not in ("part", "group", "way", "failed", "parameters")]
        cells = []
        for row in found:
            values = [row.get(name) for name in columns]
            way = row["way"] + (f" (not possible: {row['failed']})" if "failed" in row else "")
            cells.append([row["group"], way, *(v if isinstance(v, str) else short(v) for v in values)])
        lines += [f"## {part}", "", told, "", *table(["", "", *columns], cells)]
        if part == "memory":
            lines += [f"Largest batch that fits, with {RESERVE:g} GB left to the screen and CUDA:", ""]
            lines += table(["", *(f"{card} GB" for card in CARDS)], fitting(found))
    return "\n".join(lines)


def plot(rows: List[Row], path: Path) -> None:
    """The fastest layout of each network at the largest scale."""
    best: Dict[str, Tuple[float, float]] = {}
    for row in rows:
        if row["part"] == "peers" and row["group"].startswith("x4") and "ms" in row:
            name, ms = row["way"].split(",")[0], row["ms"]
            if name not in best or ms < best[name][1]:
                best[name] = (row["parameters"] / 1e6, ms)
    if best:
        scatter(best, ["parameters in use, million", "ms (fp16, x4, 256x256)"], path)
