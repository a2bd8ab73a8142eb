"""The results of equal_budget.py: a table and curves of what each run has learned."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from aethersr.errors import UserError
from aethersr.files import Together

SHOWN_DB = 2.0  # of the curves, below the best


def read_results(path: Path, flag: str) -> Dict[str, Any]:
    """A comparison's "title" and "rows". UserError: the file holds none; ``flag`` named it."""
    if not path.is_file():
        raise UserError(f"there is no {path}; benchmarks/equal_budget.py writes it ({flag}).")
    try:
        result: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"title": result["title"], "rows": result["rows"]}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is no results file of equal_budget.py; pass another ({flag}).") from None


class Results:
    """The runs of one comparison, in OUTPUT.json. UserError: the file holds another comparison."""

    def __init__(self, output: Path, title: str) -> None:
        self.output, self.title = output, title
        self.rows: List[Dict[str, Any]] = []
        saved = self.file(".json")
        if saved.exists():
            result = read_results(saved, "--output")
            if result["title"] != title:
                raise UserError(
                    f"{saved} holds another comparison ({result['title']}); name another --output."
                )
            self.rows = result["rows"]

    def file(self, suffix: str) -> Path:
        """OUTPUT with a suffix."""
        return self.output.with_name(self.output.name + suffix)

    def hold(self, run: str, seed: int) -> bool:
        """Whether this run has been done."""
        return any(row["run"] == run and row["seed"] == seed for row in self.rows)

    def add(self, row: Dict[str, Any]) -> None:
        """Keep a run: writes OUTPUT.json and OUTPUT.md."""
        self.rows.append(row)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"title": self.title, "rows": self.rows}, indent=1) + "\n"
        with Together() as files:
            for suffix, text in ((".json", content), (".md", self.table())):
                files.part(self.file(suffix)).write_text(text, encoding="utf-8")
            files.commit()

    def table(self) -> str:
        """Markdown: a row for each run, the mean of its seeds."""
        names = "run | seeds | iterations | seconds | PSNR-Y, dB | each seed | not averaged | largest"
        lines = [self.title, "", f"| {names} |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
        for text in dict.fromkeys(row["run"] for row in self.rows):
            rows = [row for row in self.rows if row["run"] == text]
            last = [row["points"][-1] for row in rows]
            iterations, seconds, decibels = (statistics.mean(values) for values in zip(*last))
            each = ", ".join(f"{point[2]:.2f}" for point in last)
            raw = ""
            if all("last" in row for row in rows):  # files of earlier versions lack it
                raw = f"{statistics.mean(row['last'] for row in rows):.2f}"
            largest = max(row["largest"] for row in rows)
            budget = f"{len(rows)} | {iterations:.0f} | {seconds:.0f}"
            lines.append(f"| {text} | {budget} | {decibels:.2f} | {each} | {raw} | {largest:.3g} |")
        return "\n".join(lines) + "\n"

    def draw(self) -> None:
        """Write OUTPUT.png, if matplotlib is installed."""
        pyplot = plotting()
        if pyplot is None:
            return
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
        for number, text in enumerate(dict.fromkeys(row["run"] for row in self.rows)):
            for row in (row for row in self.rows if row["run"] == text):
                for axis, column in zip(axes, (0, 1)):
                    x, y = [point[column] for point in row["points"]], [point[2] for point in row["points"]]
                    label = text if row["seed"] == self.rows[0]["seed"] else None
                    axis.plot(x, y, f"C{number % 10}", marker=".", label=label)
        axes[0].set(xlabel="iterations", ylabel="PSNR-Y, dB")
        axes[0].set_ylim(*shown(self.rows))
        axes[1].set(xlabel="seconds of training steps")
        axes[1].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(self.file(".png"), dpi=100)


def shown(rows: List[Dict[str, Any]]) -> Tuple[float, float]:
    """The decibels that the picture shows. A run that broke down is cut off; it would flatten the others."""
    best = max(row["points"][-1][2] for row in rows)
    lowest = min(point[2] for row in rows for point in row["points"])
    return max(best - SHOWN_DB, lowest - 0.1), best + 0.1


def plotting() -> Any:
    """matplotlib.pyplot for drawing into files. If it is not installed: None, and a message."""
    try:
        import matplotlib
    except ImportError:
        print("no picture without matplotlib: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
