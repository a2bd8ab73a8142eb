"""Draw docs/network.svg: the network's training form and its fused form, side by side.

    python docs/draw_network.py

Boxes of one colour in the training form become the one box of that colour in the fused form. A row stands at
the same height in both, so that what vanishes leaves a gap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Tuple

WIDTH, HEIGHT, PANEL = 1040, 872, 505
TOP, PITCH, BOX = 100, 51, 38  # the first row's middle, from row to row, and a box's height
SPINE, BLOCK, HALF = 120, 371, 58  # middles of a panel's two columns, and of a half box from that

SIGNS = str.maketrans({"*": "\u00d7", "-": "\u2212", "/": "\u00f7", "~": "\u00b1"})

# name: fill and line, on a light and on a dark page
COLOURS: Dict[str, Tuple[Tuple[str, str], Tuple[str, str]]] = {
    "same": (("#ffffff", "#8c959f"), ("#22272e", "#768390")),
    "first": (("#ddf4ff", "#0969da"), ("#0c2d6b", "#539bf5")),
    "depthwise": (("#fff1e5", "#bc4c00"), ("#5a2a0a", "#e0823d")),
    "gate": (("#ffeff7", "#bf3989"), ("#611347", "#e275ad")),
    "fusion": (("#dafbe1", "#1a7f37"), ("#113417", "#57ab5a")),
    "body": (("#fbefff", "#8250df"), ("#3c1e70", "#b083f0")),
    "tail": (("#fff8c5", "#9a6700"), ("#4d3500", "#c69026")),
}
PAGE = (("#f6f8fa", "#1f2328", "#59636e", "#d1d9e0"), ("#2d333b", "#e6edf3", "#adbac7", "#444c56"))


def style() -> str:
    def rules(dark: int) -> str:
        panel, text, quiet, edge = PAGE[dark]
        lines = [
            f".panel{{fill:{panel};stroke:{edge}}} text{{fill:{text}}} .quiet{{fill:{quiet}}}",
            f".line{{stroke:{quiet}}} .tip{{fill:{quiet}}} .sum{{fill:{panel};stroke:{quiet}}}",
        ]
        lines += [f".{name}{{fill:{c[dark][0]};stroke:{c[dark][1]}}}" for name, c in COLOURS.items()]
        return " ".join(lines)

    fonts = (
        "text{font:14px -apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;text-anchor:middle} "
        ".title{font-size:19px;font-weight:600} .name{font:11.5px ui-monospace,'DejaVu Sans Mono',monospace} "
        ".small{font-size:12.5px} .left{text-anchor:start} .line{fill:none;stroke-width:1.4} "
        ".optional{stroke-dasharray:4 3} .zoom{stroke-dasharray:1.5 4;stroke-width:1.2}"
    )
    return f"<style>{fonts} {rules(0)} @media (prefers-color-scheme:dark){{{rules(1)}}}</style>"


class Panel:
    """One form: a spine with the whole network, and beside it one block. Rows are counted from 0."""

    def __init__(self, left: float, title: str, name: str) -> None:
        self.left = left
        self.under: List[str] = []  # lines, below the boxes
        self.over: List[str] = []
        self.under.append(f'<rect class="panel" x="{left}" y="8" width="{PANEL}" height="810" rx="10"/>')
        self.text(SPINE, 42, title, "title")
        self.text(SPINE, 62, name, "name quiet")
        self.text(BLOCK, 42, "one block")
        self.text(BLOCK, 61, "11*11 and 3*3: depthwise", "small quiet")

    def y(self, row: float) -> float:
        return TOP + row * PITCH

    def text(self, x: float, y: float, words: str, classes: str = "") -> None:
        words = words.translate(SIGNS)
        self.over.append(f'<text class="{classes}" x="{self.left + x:g}" y="{y:g}">{words}</text>')

    def box(
        self, x: float, row: float, words: str, name: str = "", colour: str = "same", width: float = 176
    ) -> None:
        """A layer and, below it, the name of its tensors, in brackets where not every network has it."""
        optional = " optional" if name.startswith("(") else ""
        place = f'x="{self.left + x - width / 2:g}" y="{self.y(row) - BOX / 2:g}"'
        self.over.append(
            f'<rect class="{colour}{optional}" {place} width="{width:g}" height="{BOX}" rx="6"/>'
        )
        self.text(x, self.y(row) + (-1 if name else 5), words)
        if name:
            self.text(x, self.y(row) + 13, name, "name quiet")

    def sign(self, x: float, row: float, words: str) -> None:
        place = f'cx="{self.left + x:g}" cy="{self.y(row):g}"'
        self.over.append(f'<circle class="sum" {place} r="11"/>')
        self.text(x, self.y(row) + 5, words)

    def line(self, *points: Tuple[float, float], tip: bool = True, classes: str = "line") -> None:
        """Through points (x, y), with a tip at the end."""
        path = " ".join(f"{self.left + x:g},{y:g}" for x, y in points)
        self.under.append(f'<polyline class="{classes}" points="{path}"/>')
        if tip:
            (x0, y0), (x, y) = points[-2:]
            x += self.left
            down, right = (y > y0) - (y < y0), (x - self.left > x0) - (x - self.left < x0)
            if down:
                ends = f"{x - 4:g},{y - 7 * down:g} {x + 4:g},{y - 7 * down:g}"
            else:
                ends = f"{x - 7 * right:g},{y - 4:g} {x - 7 * right:g},{y + 4:g}"
            self.over.append(f'<polygon class="tip" points="{x:g},{y:g} {ends}"/>')

    def skip(self, x: float, row: float, last: float, out: float) -> None:
        """Round the layers between, from the line at ``row`` into the sign at ``last``."""
        begin = self.y(row)
        edge = 11 if out > x else -11
        self.line((x, begin), (out, begin), (out, self.y(last)), (x + edge, self.y(last)))

    def chain(self, x: float, rows: List[float], signs: Tuple[float, ...] = ()) -> None:
        for first, last in zip(rows, rows[1:]):
            start = self.y(first) + (11 if first in signs else BOX / 2)
            end = self.y(last) - (11 if last in signs else BOX / 2)
            self.line((x, start), (x, end))


def spine(panel: Panel, fused: bool) -> None:
    panel.text(SPINE, panel.y(0) + 2, "picture", "small quiet")
    panel.line((SPINE, panel.y(0) + 9), (SPINE, panel.y(1) - BOX / 2))
    if fused:
        panel.box(SPINE, 1, "- mean", "mean")
        panel.box(SPINE, 2, "3*3", "head", "first")
    else:
        panel.box(SPINE, 1, "- mean, * img_range", "mean", "first")
        panel.box(SPINE, 2, "3*3", "conv_first", "first")
    panel.box(SPINE, 3, "blocks, in stages", "stages")
    panel.box(SPINE, 4, "1*1 after each stage", "fusion_convs")
    if fused:
        panel.box(SPINE, 5.5, "1*1", "fusion", "fusion")
        panel.box(SPINE, 8.5, "3*3", "body_conv", "body")
        panel.box(SPINE, 12, "5*5, pixel shuffle", "tail", "tail")
        rows: List[float] = [1, 2, 3, 4, 5.5, 7, 8.5, 10, 11, 12]
    else:
        panel.box(SPINE, 5, "+ offset", "quant_fusion_layer.error_comp", "fusion", 210)
        panel.box(SPINE, 6, "1*1", "quant_fusion_layer.fusion_conv", "fusion", 214)
        panel.box(SPINE, 8, "norm", "norm", "body")
        panel.box(SPINE, 9, "3*3", "conv_after_body", "body")
        panel.box(SPINE, 12, "3*3, pixel shuffle", "upsample", "tail")
        panel.box(SPINE, 13, "3*3, / img_range, + mean", "conv_last", "tail", 196)
        rows = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    panel.sign(SPINE, 7, "+")
    panel.sign(SPINE, 10, "+")
    panel.box(SPINE, 11, "3*3, LeakyReLU", "conv_before_upsample")
    panel.chain(SPINE, rows, (7, 10))
    panel.skip(SPINE, 2.5, 7, 8)
    panel.skip(SPINE, 7.4, 10, 8)
    panel.line((SPINE, panel.y(rows[-1]) + BOX / 2), (SPINE, panel.y(13.65)))
    panel.text(SPINE, panel.y(14), "picture, * scale", "small quiet")


def block(panel: Panel, fused: bool) -> None:
    left, right, half = BLOCK - HALF, BLOCK + HALF, 108.0
    top, bottom = panel.y(0.1), panel.y(11.8)
    for begin, end in ((panel.y(3) - BOX / 2, top), (panel.y(3) + BOX / 2, bottom)):
        panel.line((SPINE + 88, begin), (BLOCK - 124, end), tip=False, classes="line zoom")
    place = f'x="{panel.left + BLOCK - 124:g}" y="{top:g}" width="250" height="{bottom - top:g}"'
    panel.under.append(f'<rect class="line zoom" {place} rx="8"/>')
    panel.line((BLOCK, top - 14), (BLOCK, panel.y(0.5)), tip=False)
    entry = (BLOCK, panel.y(0.5))
    if fused:
        panel.box(BLOCK, 2, "11*11", "reparam_conv", "depthwise")
        panel.line(entry, (BLOCK, panel.y(2) - BOX / 2))
        panel.chain(BLOCK, [2, 4])
    else:
        panel.box(left, 1, "11*11", "conv.lk_conv", "depthwise", half)
        panel.box(right, 1, "3*3", "conv.sk_conv", "depthwise", half)
        for x in (left, right):
            panel.line(entry, (x, panel.y(0.5)), (x, panel.y(1) - BOX / 2))
            edge = -11 if x < BLOCK else 11
            panel.line((x, panel.y(1) + BOX / 2), (x, panel.y(2)), (BLOCK + edge, panel.y(2)))
        panel.sign(BLOCK, 2, "+")
        panel.box(BLOCK, 3, "norm", "norm", "depthwise")
        panel.chain(BLOCK, [2, 3, 4], (2,))
    panel.box(BLOCK, 4, "clamp to ~ bound", "(bound)")
    gate, main = ("gate_conv", "main_conv") if fused else ("ffn.conv_gate", "ffn.conv_main")
    row = 5.5 if fused else 5
    panel.box(left, row, "1*1", gate, "gate", half)
    panel.box(right, row, "1*1", main, "same", half)
    for x in (left, right):
        middle = panel.y(4.5)
        panel.line((BLOCK, panel.y(4) + BOX / 2), (BLOCK, middle), (x, middle), (x, panel.y(row) - BOX / 2))
    if not fused:
        panel.box(left, 6, "* temperature", "ffn.temperature", "gate", half)
    panel.box(left, 7, "SiLU", "", "same", half)
    panel.chain(left, [row, 7] if fused else [5, 6, 7])
    panel.line((left, panel.y(7) + BOX / 2), (left, panel.y(8)), (BLOCK - 11, panel.y(8)))
    panel.line((right, panel.y(row) + BOX / 2), (right, panel.y(8)), (BLOCK + 11, panel.y(8)))
    panel.sign(BLOCK, 8, "*")
    panel.box(BLOCK, 9, "1*1", "out_conv" if fused else "ffn.conv_out")
    panel.box(BLOCK, 10, "attention", "(channel_attn, spatial_attn)", width=208)
    panel.sign(BLOCK, 11, "+")
    panel.chain(BLOCK, [8, 9, 10, 11], (8, 11))
    panel.skip(BLOCK, 0.27, 11, BLOCK + 119)
    panel.line((BLOCK, panel.y(11) + 11), (BLOCK, bottom + 14))


def draw() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        "<title>AetherNet: training form and fused form</title>",
        style(),
    ]
    forms = (("Training form", "AetherNet"), ("Fused form", "FusedAetherNet"))
    for fused, (title, name) in enumerate(forms):
        panel = Panel(8 + fused * (PANEL + 14), title, name)
        spine(panel, bool(fused))
        block(panel, bool(fused))
        parts += panel.under + panel.over
    note = "Layers of one colour become one convolution. Without a colour: stays as it is. "
    note += "Dashed: not in every network."
    parts.append(f'<rect class="panel" x="8" y="828" width="{WIDTH - 16}" height="34" rx="10"/>')
    parts.append(f'<text class="small" x="{WIDTH / 2:g}" y="850">{note}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = Path(__file__).with_name("network.svg")
    target.write_text(draw(), encoding="utf-8")
    print(f"Wrote {target}")
