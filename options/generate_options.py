"""Write the option templates of AetherNet for traiNNer-redux, neosr and BasicSR.

    python options/generate_options.py

skeletons/ holds a text for each kind of file, values.yml what differs from file to file. Edit these, never a
template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator

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


def main() -> None:
    texts = templates()
    for path, text in texts.items():
        (HERE / path).parent.mkdir(parents=True, exist_ok=True)
        (HERE / path).write_bytes(text.encode("utf-8"))
    print(f"{len(texts)} templates")


if __name__ == "__main__":
    main()
