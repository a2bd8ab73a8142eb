"""Print the README's table of parameters: training form and fused form of each variant."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "archs"))

from aether_arch import VARIANTS, AetherBase


def row(variant: str, nets: list[AetherBase]) -> str:
    def counts(forms: list[AetherBase]) -> str:
        return " / ".join(f"{sum(value.numel() for value in form.parameters()):,}" for form in forms)

    return f"{variant}: {counts(nets)} | {counts([net.fused() for net in nets])}"


if __name__ == "__main__":
    for build in VARIANTS:
        print(row(build.__name__, [build(scale=scale) for scale in (2, 3, 4)]))
