"""Write a model card in OpenModelDB's schema, filled in from the release files.

    python training/model_card.py 2x_MyModel.safetensors 2x_MyModel_fp16.onnx \\
        --author my-id --date 2026-11-22 --tags photo,restoration

Writes 2x-MyModel.json beside the first file, named as in OpenModelDB's data/models/. Scale, channels and size
tags are read from the weights, size and sha256 from each file, and the rest from options, so the same options
always give the same bytes. OpenModelDB accepts a card once its files have addresses (--url) and its lists
contain the author and the architecture "aethernet".
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.checkpoint import read_checkpoint  # noqa: E402
from aethersr.commands import exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.files import Together  # noqa: E402
from aethersr.identify import aether_from_state_dict, variant_name  # noqa: E402
from aethersr.network import open_upscaler  # noqa: E402
from aethersr.quality import psnr  # noqa: E402

PLATFORMS = {".pth": "pytorch", ".safetensors": "pytorch", ".onnx": "onnx"}
ALIKE = 43.0  # dB, PSNR-Y between files of one model; 8 bits cost less, other training more
TRAINING = {  # option: property of the schema
    "iterations": "trainingIterations",
    "batch_size": "trainingBatchSize",
    "hr_size": "trainingHRSize",
    "dataset": "dataset",
    "dataset_size": "datasetSize",
}


def facts(path: Path) -> dict[str, Any]:
    """The card's entries about the network itself."""
    try:
        net = aether_from_state_dict(read_checkpoint(path, "FILE").state)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass release files of AetherNet (FILE).") from None
    options, name = net.options, variant_name(net.options)
    size = [name[len("aether_") :]] if name.startswith("aether_") else []
    size += [f"{options['embed_dim']}dim", f"{sum(options['depths'])}nb", f"{options['lk_kernel']}ks"]
    return {
        "size": size,
        "scale": net.scale,
        "inputChannels": options["in_chans"],
        "outputChannels": options["in_chans"],
    }


def check_same_network(first: Path, others: list[Path]) -> None:
    """Raise UserError if a file enlarges the middle of a grainy picture differently from the first.

    Files for one size of picture see another border.
    """
    grain = np.random.default_rng(0).normal(128, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    upscale, scale = open_upscaler(first, "cpu", "FILE")
    expected = upscale(grain)
    for path in others:
        found = open_upscaler(path, "cpu", "FILE")[0](grain)
        if found.shape != expected.shape or psnr(expected, found, 16 * scale) < ALIKE:
            raise UserError(f"{path} holds other weights than {first}; pass the files of one model (FILE).")


def resource(path: Path, url: str) -> dict[str, Any]:
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; pass release files (FILE).") from None
    if not content:
        raise UserError(f"{path} is not a file, or is empty; pass release files (FILE).")
    ending = path.suffix.lower()
    urls = [f"{url.rstrip('/')}/{quote(path.name)}"] if url else []
    return {
        "platform": PLATFORMS[ending],
        "type": ending[1:],
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "urls": urls,
    }


def model_name(path: Path) -> str:
    """2x_NAME_fused_fp16.safetensors -> NAME."""
    return re.sub(r"(_fused|_fp16|_fp32|_bf16|_int8)+$", "", re.sub(r"^\d+x[-_ ]?", "", path.stem))


def model_id(name: str, scale: int) -> str:
    """The id in OpenModelDB: the scale, then letters and digits separated by dashes."""
    words = re.sub("[^a-zA-Z0-9]+", "-", name).strip("-")
    words = re.sub(rf"^({scale}x|x{scale})-?|-({scale}x|x{scale})$", "", words, flags=re.IGNORECASE)
    if not words:
        raise UserError(f"{name!r} has no letter or digit that an id of OpenModelDB may have; pass --name.")
    return f"{scale}x-{words}"


def card(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The card, and its id."""
    for path in args.files:
        if path.suffix.lower() not in PLATFORMS:
            raise UserError(
                f"{path} ends in {path.suffix or 'nothing'!r}; expected .pth, .safetensors or .onnx (FILE)."
            )
    weights = [path for path in args.files if PLATFORMS[path.suffix.lower()] == "pytorch"]
    if not weights:
        raise UserError(
            f"{args.files[0]} alone does not tell the network's size; pass its weights too (FILE)."
        )
    network = facts(weights[0])
    for path in args.files:
        scale = re.match(r"(\d+)x", path.name)
        if (path in weights and facts(path) != network) or (scale and int(scale[1]) != network["scale"]):
            raise UserError(
                f"{path} is not the x{network['scale']} network of {weights[0]}; "
                "pass the files of one model, named by its scale (FILE)."
            )
    if network["inputChannels"] in (1, 3):
        check_same_network(weights[0], [path for path in args.files if path != weights[0]])
    name = args.name or model_name(args.files[0])
    content = {
        "name": name,
        "author": args.author[0] if len(args.author) == 1 else args.author,
        "license": args.license,
        "tags": args.tags,
        "description": args.description.strip(),
        "date": args.date.isoformat(),
        "architecture": "aethernet",
        **network,
        "resources": [resource(path, args.url) for path in args.files],
        **{
            key: getattr(args, option)
            for option, key in TRAINING.items()
            if getattr(args, option) is not None
        },
        "images": [],
    }
    return content, model_id(name, network["scale"])


def write_card(args: argparse.Namespace) -> None:
    content, name = card(args)
    target: Path = args.files[0].with_name(f"{name}.json")
    if os.path.lexists(target) and not args.overwrite:
        raise UserError(f"{target} exists; pass --overwrite to replace it, or another --name.")
    text = json.dumps(content, indent=4, ensure_ascii=False)  # as OpenModelDB's own, no line break at the end
    try:
        with Together() as files:
            files.part(target).write_bytes(text.encode())
            files.commit()
    except OSError as error:
        remedy = "free space, or pass another --name"
        raise UserError(f"{target} can't be written: {error.strerror or error}; {remedy}.") from None
    print(f"Wrote {target}" + ("" if args.url else "; its files have no addresses yet (--url)"))


def ids(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", word) for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected ids of lower-case letters, digits and dashes, separated by commas"
        )
    return words


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="release files of one network, .safetensors, .pth and .onnx",
    )
    parser.add_argument(
        "--author", type=ids, required=True, help="id in OpenModelDB, or several separated by commas"
    )
    parser.add_argument(
        "--date", type=datetime.date.fromisoformat, required=True, help="publication date, YYYY-MM-DD"
    )
    parser.add_argument(
        "--tags", type=ids, required=True, help="ids from OpenModelDB's data/tags.json, separated by commas"
    )
    parser.add_argument("--license", help="SPDX id, such as CC-BY-4.0 (default: none)")
    parser.add_argument("--name", help="default: the first file's name, without scale and precision")
    parser.add_argument("--description", default="", help="text in Markdown")
    parser.add_argument("--url", default="", help="address of the folder from which to download the files")
    for option in TRAINING:
        parser.add_argument(
            f"--{option}",
            type=str if option == "dataset" else positive,
            help=f"about the training: the schema's {TRAINING[option]}",
        )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing card")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code("model_card.py", lambda: write_card(parse_args(argv)), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
