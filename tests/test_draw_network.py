"""The network's picture is the one that its script draws, and names tensors that are there."""

from __future__ import annotations

import re
import runpy
from xml.etree import ElementTree

import pytest
from aether_arch import AetherNet
from conftest import ROOT

DRAWN = runpy.run_path(str(ROOT / "docs" / "draw_network.py"))["draw"]()


def test_the_committed_picture_is_what_the_script_draws() -> None:
    committed = (ROOT / "docs" / "network.svg").read_text(encoding="utf-8")
    assert committed == DRAWN, "run python docs/draw_network.py"


@pytest.mark.parametrize("title", ["AetherNet", "FusedAetherNet"])
def test_every_name_in_a_panel_is_that_of_a_tensor(title: str) -> None:
    net = AetherNet(scale=2, embed_dim=16, depths=(1, 1), bound=1.0)
    names = (net if title == "AetherNet" else net.fused()).state_dict()
    texts = [
        "".join(text.itertext())
        for text in ElementTree.fromstring(DRAWN).iter()
        if "name" in text.get("class", "").split()
    ]
    fused = texts.index("FusedAetherNet")
    panel = texts[1:fused] if title == "AetherNet" else texts[fused + 1 :]
    assert len(panel) > 12
    for text in panel:
        for part in text.strip("()").split(", "):
            pattern = rf"(stages\.0\.0\.)?{re.escape(part)}(\..*)?"
            assert any(re.fullmatch(pattern, name) for name in names), part
