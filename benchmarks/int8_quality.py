"""What int8 costs in dB, for each way of choosing ranges and for each rounded part of the network.

Usage:
    python benchmarks/int8_quality.py FOLDER            # to benchmarks/results/int8_quality.md
    python benchmarks/int8_quality.py FOLDER --picture  # docs/int8.png: one photograph in fp32 and int8

FOLDER holds the pictures to calibrate on: the gt of training/prepare_pictures.py. With other --photographs
than the default it only prints.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence
from unittest import mock

import numpy as np
import torch
from int8 import PLACEMENTS, RESULTS, ROOT, float_network
from networks import aether_arch, aether_quant
from PIL import Image
from report import table, write
from skimage import data

from aethersr import quality as measures
from aethersr.calibration import calibration_pairs

# Of the pictures that training/prepare_pictures.py cuts: smooth and of saturated colours, which a range too
# small or a shifted area spoils.
SMOOTH = ("01060.png", "00780.png")


def pair(name: str, scale: int) -> List[np.ndarray]:
    """High and low resolution of a photograph of scikit-image, or of a file in gt beside a folder lq."""
    if "/" in name:
        path = Path(name)
        files = (path, path.parents[1] / "lq" / path.name)
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]
    high = np.asarray(Image.fromarray(getattr(data, name)()).convert("RGB"))
    high = measures.crop_to_multiple(high, scale)
    return [high, measures.resize(high, high.shape[0] // scale, high.shape[1] // scale)]


@torch.no_grad()
def upscaled(net: aether_arch.AetherBase, picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 in and out."""
    image = torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    return (net.eval()(image)[0].clamp(0, 1) * 255).round().byte().numpy().transpose(1, 2, 0)


def quality(folder: Path, names: Sequence[str]) -> List[str]:
    """PSNR-Y of ways to choose the ranges, and of rounding one part at a time, all of placement "full"."""
    names = [*names, *(str(folder / name) for name in SMOOTH if (folder / name).is_file())]
    net = float_network(2)
    images = [low for low, _ in calibration_pairs(folder, net)]
    nets: Dict[str, Any] = {
        "fp32": net,
        "default": aether_quant.prepare_qat(copy.deepcopy(net), "default", images),
    }
    full = aether_quant.prepare_qat(copy.deepcopy(net), "full", images)
    nets["full"] = full
    seen: Dict[str, List[List[float]]] = {name: [] for name in full.quantizers()}

    def look(name: str) -> Callable[..., None]:
        def hook(quantizer: aether_quant.Quantizer, inputs: Any, _: Any) -> None:
            values = inputs[0].abs() if quantizer.low is None else inputs[0]
            some = values.flatten()[:: max(1, values.numel() // 10**5)]
            quantile = some.kthvalue(max(1, round(some.numel() * 0.9999))).values
            seen[name].append([float(values.max()), float(quantile)])

        return hook

    watching = copy.deepcopy(full).eval()
    for name, quantizer in watching.quantizers().items():
        quantizer.enabled = False
        quantizer.register_forward_hook(look(name))
    with torch.no_grad():
        for image in images:
            watching(image)
    ways: Dict[str, Callable[[np.ndarray], float]] = {
        "largest of all": lambda values: float(values[:, 0].max()),
        "mean of largest": lambda values: float(values[:, 0].mean()),
        "middle one's": lambda values: float(np.sort(values[:, 0])[len(values) // 2]),
        "99.99%, largest": lambda values: float(values[:, 1].max()),
        "99.99%, median": lambda values: float(np.median(values[:, 1])),
    }
    for way, choose in ways.items():
        nets[f"full, {way}"] = copy.deepcopy(full)
        for name, quantizer in nets[f"full, {way}"].quantizers().items():
            if quantizer.high is None:
                quantizer.range_sum.data.fill_(choose(np.array(seen[name])))
    stream = re.compile(r"quant_(start|sum)$")
    parts = {
        "blocks": lambda name: name.startswith("stages") and not stream.search(name),
        "stream": stream.search,
        "after the blocks": lambda name: not name.startswith(("stages", "tail")),
        "tail": lambda name: name.startswith("tail"),
    }
    for part, belongs in parts.items():
        nets[f"only {part}"] = copy.deepcopy(full)
        for name, quantizer in nets[f"only {part}"].quantizers().items():
            quantizer.enabled = bool(belongs(name))

    rows: Dict[str, List[float]] = {}
    for name in names:
        high, low = pair(name, net.scale)
        found = [upscaled(each, low) for each in nets.values()]
        with mock.patch.object(aether_quant, "_round_taps", torch.round):
            found.append(upscaled(full, low))
        rows[Path(name).name] = [measures.psnr(high, each, net.scale) for each in found]
    rows["mean"] = [float(np.mean(column)) for column in zip(*rows.values())]
    head = ["PSNR-Y, dB", *nets, "full, taps rounded one by one"]
    return table(head, [[name, *(f"{value:.3f}" for value in row)] for name, row in rows.items()])


def picture(folder: Path, path: Path, gain: int = 32) -> str:
    """fp32, default and full in the upper row; below, 128 and ``gain`` times their difference from fp32."""
    net = float_network(2)
    images = [low for low, _ in calibration_pairs(folder, net)][::4]
    crop = pair("chelsea", 2)[1][20:130, 40:150]
    rows: List[List[np.ndarray]] = [[], []]
    for each in (
        net,
        *(aether_quant.prepare_qat(net.fused(), placement, images) for placement in PLACEMENTS),
    ):
        rows[0].append(upscaled(each, crop).astype(float))
        rows[1].append(128 + gain * (rows[0][-1] - rows[0][0]))
    pixels = np.concatenate([np.concatenate(row, 1) for row in rows]).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, optimize=True)
    differences = [np.abs(each - rows[0][0]) for each in rows[0][1:]]
    return "\n".join(
        f"{name}: mean {each.mean():.2f}, largest {each.max():.0f} of 255"
        for name, each in zip(PLACEMENTS, differences)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--photographs", nargs="+", default=["chelsea", "coins", "brick"])
    args = parser.parse_args()
    if args.picture:
        print(picture(args.folder, ROOT / "docs" / "int8.png"))
        return
    text = "\n".join(quality(args.folder, args.photographs))
    print(text)
    if args.photographs == parser.get_default("photographs"):
        write(RESULTS / "int8_quality.md", text)


if __name__ == "__main__":
    main()
