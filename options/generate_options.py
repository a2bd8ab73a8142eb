"""Write the option templates of AetherNet for traiNNer-redux, neosr and BasicSR.

    python options/generate_options.py          # write them all
    python options/generate_options.py --check  # write nothing; exit 1 and list outdated files

skeletons/ holds a text for each kind of file, values.yml what differs from file to file. Edit these, never a
template.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).resolve().parent


def cases(values: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The variables of the skeletons, for every size, stage and scale."""
    for size, of_size in values["sizes"].items():
        for stage, of_stage in values["stages"].items():
            if size not in of_stage.get("sizes", values["sizes"]):
                continue
            kind = {
                "stage": stage,
                "cpu": stage.startswith("cpu"),
                "otf": stage.startswith("otf"),
                "gan": stage.endswith("gan"),
                "parent": None,
                "skeletons": list(values["files"]),
            }
            for scale in of_stage["scales"]:
                yield {**values, "size": size, "scale": scale, **kind, **of_size, **of_stage}


def templates() -> Dict[Path, str]:
    """Every template's path below options/, and its text."""
    values = yaml.safe_load((HERE / "values.yml").read_text(encoding="utf-8"))
    blocks: Dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    skeletons = Environment(loader=FileSystemLoader(HERE / "skeletons"), undefined=StrictUndefined, **blocks)
    names = {skeleton: skeletons.from_string(name) for skeleton, name in values["files"].items()}
    texts: Dict[Path, str] = {}
    for case in cases(values):
        for skeleton in case["skeletons"]:
            path = Path(names[skeleton].render(case))
            if path not in texts:  # a test template is the same for all stages
                texts[path] = skeletons.get_template(skeleton).render(case)
    return texts


def leftover(wanted: Dict[Path, str]) -> List[Path]:
    """Files in the templates' folders that don't come from a skeleton."""
    folders = {(HERE / path).parent for path in wanted}
    found = (file.relative_to(HERE) for folder in folders for file in folder.glob("*.*"))
    return sorted(path for path in found if path not in wanted)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    text = "write nothing; exit 1 if a template is out of date"
    parser.add_argument("--check", action="store_true", help=text)
    check, wanted = parser.parse_args().check, templates()
    files = {path: HERE / path for path in wanted}
    changed = [
        path for path, text in wanted.items()
        if not files[path].is_file() or files[path].read_bytes() != text.encode("utf-8")
    ]  # fmt: skip
    foreign = leftover(wanted)
    for path in foreign:
        print(f"options/{path.as_posix()} is not one of the templates: delete or move it", file=sys.stderr)
    if check:
        for path in changed:
            print(f"options/{path.as_posix()} is out of date: run generate_options.py", file=sys.stderr)
        return 1 if changed or foreign else 0
    for path in changed:
        files[path].parent.mkdir(parents=True, exist_ok=True)
        files[path].write_bytes(wanted[path].encode("utf-8"))
    print(f"{len(wanted)} templates, {len(changed)} of them new or changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
