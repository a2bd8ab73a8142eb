"""Write a model card in OpenModelDB's schema, filled in from the release files.

    python training/model_card.py 2x_MyModel.safetensors 2x_MyModel_fp16.onnx \\
        --author my-id --date 2026-11-22 --tags photo,restoration

Writes 2x-MyModel.json beside the first file, which must hold weights. OpenModelDB accepts a card once its
files have addresses (--url) and its lists contain the author and the architecture "aethernet".
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.commands import Parser, exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.files import Together, check_output  # noqa: E402
from aethersr.identify import read_network, variant_name  # noqa: E402

PLATFORMS = {".pth": "pytorch", ".safetensors": "pytorch", ".onnx": "onnx"}


def facts(path: Path) -> dict[str, Any]:
    """The card's entries about the network itself, from its weights."""
    options = read_network(path, "FILE").options
    name, scale, channels = variant_name(options), options["scale"], options["in_chans"]
    size = [name[len("aether_") :]] if name.startswith("aether_") else []
    size += [f"{options['embed_dim']}dim", f"{sum(options['depths'])}nb", f"{options['lk_kernel']}ks"]
    return {"size": size, "scale": scale, "inputChannels": channels, "outputChannels": channels}


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
    network, first = facts(args.files[0]), args.files[0]
    # 2x_NAME_fused_fp16.safetensors -> NAME
    name = args.name or re.sub(r"^\d+x[-_ ]?|(_fused|_fp16|_fp32|_bf16|_int8)+$", "", first.stem)
    target = first.with_name(f"{model_id(name, network['scale'])}.json")
    check_output(target, args.files, args.overwrite, "--name")
    said = {"name": name, "author": args.author, "license": args.license, "tags": args.tags.split(",")}
    said.update(description=args.description.strip(), date=args.date.isoformat(), architecture="aethernet")
    resources = []
    for path in args.files:
        ending, digest = path.suffix.lower(), hashlib.sha256(path.read_bytes()).hexdigest()
        urls = [f"{args.url.rstrip('/')}/{quote(path.name)}"] if args.url else []
        file = {"size": path.stat().st_size, "sha256": digest, "urls": urls}
        resources.append({"platform": PLATFORMS[ending], "type": ending[1:], **file})
    content = {**said, **network, "resources": resources, **args.more, "images": []}
    text = json.dumps(content, indent=4, ensure_ascii=False)  # as OpenModelDB's own, no line break at the end
    with Together() as files:
        files.part(target).write_bytes(text.encode())
        files.commit()
    print(f"Wrote {target}" + ("" if args.url else "; its files have no addresses yet (--url)"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("model_card.py", __doc__)
    add, date = parser.add_argument, datetime.date.fromisoformat
    text = "release files of one network: weights first, then others and .onnx"
    add("files", type=Path, nargs="+", metavar="FILE", help=text)
    add("--author", required=True, help="id in OpenModelDB")
    add("--date", type=date, required=True, help="of publication, YYYY-MM-DD")
    add("--tags", required=True, help="ids from OpenModelDB's data/tags.json, separated by commas")
    add("--license", help="SPDX id, such as CC-BY-4.0 (default: none)")
    add("--name", help="default: the first file's name, without scale and precision")
    add("--description", default="", help="text in Markdown")
    add("--url", default="", help="address of the folder from which to download the files")
    text = """further properties of the schema, such as '{"trainingIterations": 5000}'"""
    add("--more", type=json.loads, default={}, metavar="JSON", help=text)
    add("--overwrite", action="store_true", help="replace an existing card")
    return exit_code("model_card.py", lambda: write_card(parser.parse(argv)), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
