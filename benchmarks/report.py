"""The benchmarks' tables and plots."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch

Row = Dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a Markdown table, and an empty one."""
    return ["| " + " | ".join(cells) + " |" for cells in [list(head), ["---"] * len(head), *rows]] + [""]


def short(ms: Optional[float]) -> str:
    return "-" if ms is None else f"{ms:.0f}" if ms >= 20 else f"{ms:.2f}"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def software() -> str:
    found = f"PyTorch {torch.__version__}"
    with contextlib.suppress(ImportError):
        import onnxruntime

        found += f", ONNX Runtime {onnxruntime.__version__}"
    return found


def load() -> str:
    """The machine's load average, in words."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(part, path)


def scatter(points: Mapping[str, Sequence[float]], labels: Sequence[str], path: Path) -> None:
    """A log-log plot of named points; ours, whose names begin with "aether", in red."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, (x, y) in points.items():
        axes.scatter(x, y, color="tab:red" if name.startswith("aether") else "tab:gray")
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.grid(which="both", alpha=0.2)
    figure.savefig(str(path), dpi=120)
    pyplot.close(figure)
