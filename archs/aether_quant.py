"""The quantised form of AetherNet (being moved here from aether_arch.py)."""

from aether_arch import (  # noqa: F401
    PLACEMENTS,
    TARGETS,
    QuantAetherBlock,
    QuantAetherNet,
    QuantConv2d,
    Quantizer,
    QuantTail,
    SplitConv2d,
    StoredConv2d,
)
