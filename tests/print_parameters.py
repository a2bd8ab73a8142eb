"""Print the README's table of parameters: training form and fused form of each variant."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "archs"))

from aether_arch import VARIANTS

for build in VARIANTS:
    nets = [build(scale=scale) for scale in (2, 3, 4)]
    counts = [f"{sum(v.numel() for v in net.parameters()):,}" for net in nets + [net.fused() for net in nets]]
    print(f"{build.__name__}: {' / '.join(counts[:3])} | {' / '.join(counts[3:])}")
