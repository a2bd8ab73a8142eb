"""Write a model card in OpenModelDB's schema, filled in from the release files.

    python training/model_card.py 2x_MyModel.safetensors 2x_MyModel_fp16.onnx \\
        --author my-id --date 2026-11-22 --tags photo,restoration

Writes 2x-MyModel.json beside the first file, which must hold weights. Scale, channels and size tags are read
from them, size and sha256 from each file, the rest from options. OpenModelDB accepts a card once its files
have addresses (--url) and its lists contain the author and the architecture "aethernet".
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.commands import Parser, exit_code  # noqa: E402
from aethersr.commands.evaluate import upscaler  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.files import Together, check_output  # noqa: E402
from aethersr.identify import aether_from_state_dict, variant_name  # noqa: E402
from aethersr.network import load_network  # noqa: E402
from aethersr.quality import psnr  # noqa: E402

PLATFORMS = {".pth": "pytorch", ".safetensors": "pytorch", ".onnx": "onnx"}
ALIKE = 43.0  # dB, PSNR-Y between files of one model; 8 bits cost less, other training more


def facts(path: Path) -> dict[str, Any]:
    """The card's entries about the network itself."""
    try:
        net = aether_from_state_dict(read_checkpoint(path, "FILE").state)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass release files of AetherNet (FILE).") from None
    options, name = net.options, variant_name(net.options)
    size = [name[len("aether_") :]] if name.startswith("aether_") else []
    size += [f"{options['embed_dim']}dim", f"{sum(options['depths'])}nb", f"{options['lk_kernel']}ks"]
    channels = options["in_chans"]
    return {"size": size, "scale": net.scale, "inputChannels": channels, "outputChannels": channels}


def check_same_network(first: Path, others: list[Path]) -> None:
    """Raise UserError if a file enlarges the middle of a grainy picture differently from the first.

    Files for one size of picture see another border.
    """
    grain = np.random.default_rng(0).normal(128, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    network = load_network(first, "cpu", flag="FILE")
    expected = upscaler(network)(grain)
    for path in others:
        found = upscaler(load_network(path, "cpu", flag="FILE"))(grain)
        if found.shape != expected.shape or psnr(expected, found, 16 * network.scale) < ALIKE:
            raise UserError(f"{path} holds other weights than {first}; pass the files of one model (FILE).")


def resource(path: Path, url: str) -> dict[str, Any]:
    content, ending = path.read_bytes(), path.suffix.lower()
    urls = [f"{url.rstrip('/')}/{quote(path.name)}"] if url else []
    file = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "urls": urls}
    return {"platform": PLATFORMS[ending], "type": ending[1:], **file}


def model_id(name: str, scale: int) -> str:
    """The id in OpenModelDB: the scale, then letters and digits separated by dashes."""
    words = re.sub("[^a-zA-Z0-9]+", "-", name).strip("-")
    words = re.sub(rf"^({scale}x|x{scale})-?|-({scale}x|x{scale})$", "", words, flags=re.IGNORECASE)
    if not words:
        raise UserError(f"{name!r} has no letter or digit that an id of OpenModelDB may have; pass --name.")
    return f"{scale}x-{words}"


def write_card(args: argparse.Namespace) -> None:
    for path in args.files:
        if path.suffix.lower() not in PLATFORMS or not path.is_file():
            raise UserError(f"{path} is no file in {', '.join(PLATFORMS)}; pass release files (FILE).")
    first: Path = args.files[0]
    network = facts(first)
    if network["inputChannels"] in (1, 3):
        check_same_network(first, args.files[1:])
    # 2x_NAME_fused_fp16.safetensors -> NAME
    name = args.name or re.sub(r"^\d+x[-_ ]?|(_fused|_fp16|_fp32|_bf16|_int8)+$", "", first.stem)
    target = first.with_name(f"{model_id(name, network['scale'])}.json")
    check_output(target, args.files, args.overwrite, "--name")
    content = {
        "name": name,
        "author": args.author,
        "license": args.license,
        "tags": args.tags.split(","),
        "description": args.description.strip(),
        "date": args.date.isoformat(),
        "architecture": "aethernet",
        **network,
        "resources": [resource(path, args.url) for path in args.files],
        **args.more,
        "images": [],
    }
    text = json.dumps(content, indent=4, ensure_ascii=False)  # as OpenModelDB's own, no line break at the end
    with Together() as files:
        files.part(target).write_bytes(text.encode())
        files.commit()
    print(f"Wrote {target}" + ("" if args.url else "; its files have no addresses yet (--url)"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("model_card.py", __doc__)
    text = "release files of one network: weights first, then others and .onnx"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help=text)
    parser.add_argument("--author", required=True, help="id in OpenModelDB")
    date = datetime.date.fromisoformat
    parser.add_argument("--date", type=date, required=True, help="of publication, YYYY-MM-DD")
    text = "ids from OpenModelDB's data/tags.json, separated by commas"
    parser.add_argument("--tags", required=True, help=text)
    parser.add_argument("--license", help="SPDX id, such as CC-BY-4.0 (default: none)")
    parser.add_argument("--name", help="default: the first file's name, without scale and precision")
    parser.add_argument("--description", default="", help="text in Markdown")
    parser.add_argument("--url", default="", help="address of the folder from which to download the files")
    text = """further properties of the schema, such as '{"trainingIterations": 5000}'"""
    parser.add_argument("--more", type=json.loads, default={}, metavar="JSON", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing card")
    return exit_code("model_card.py", lambda: write_card(parser.parse(argv)), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
