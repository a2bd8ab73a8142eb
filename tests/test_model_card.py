"""A card of training/model_card.py describes the files; what makes no card ends in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
from conftest import ROOT, small_net
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "training"))
import model_card

from aethersr.onnx import export_onnx

OPTIONS = ["--author", "my-id", "--date", "2026-11-22", "--tags", "photo,restoration"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = small_net(2).fused().float()
    folder, state = tmp_path_factory.mktemp("files"), net.state_dict()
    save_file({name: value.half() for name, value in state.items()}, folder / "2x_My_Model_fp16.safetensors")
    export_onnx(net, 2, output_path=str(folder / "2x_My_Model_fp16.onnx"))
    (folder / "2x_damaged.pth").write_bytes(b"damaged")
    return folder


def run(*arguments: Any) -> int:
    return model_card.main([*map(str, arguments), *OPTIONS])


def describes(card: Dict[str, Any], *files: Path) -> None:
    assert card.items() >= model_card.facts(files[0]).items()
    for resource, file in zip(card["resources"], files):
        assert resource["size"] == file.stat().st_size
        assert resource["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert resource["type"] == file.suffix[1:]
        assert resource["platform"] == ("onnx" if file.suffix == ".onnx" else "pytorch")
    assert len(card["resources"]) == len(files)


def test_a_card_says_what_the_files_are_and_is_not_replaced_unasked(folder: Path, capsys: Any) -> None:
    files = [folder / f"2x_My_Model_fp16{ending}" for ending in (".safetensors", ".onnx")]
    more = ["--url", "https://example.org/v1/", "--more", '{"trainingIterations": 7}']
    assert run(*files, *more) == 0
    path = folder / "2x-My-Model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    describes(card, *files)
    urls = [resource["urls"] for resource in card["resources"]]
    assert urls == [[f"https://example.org/v1/{file.name}"] for file in files]
    found = (card["name"], card["tags"], card["size"], card["trainingIterations"])
    assert found == ("My_Model", ["photo", "restoration"], ["24dim", "3nb", "11ks"], 7)
    assert run(*files) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*files, "--overwrite") == 0
    path.unlink()


def test_every_released_file_has_a_card_that_lacks_its_address_alone() -> None:
    released = {path for path in (ROOT / "weights").glob("*_*.*") if "_training_" not in path.name}
    for path in (ROOT / "weights").glob("*.json"):
        card = json.loads(path.read_text(encoding="utf-8"))
        stem = path.stem.replace("-", "_")
        files = [path.with_name(f"{stem}{ending}") for ending in ("_fp16.safetensors", "_int8.onnx")]
        describes(card, *files)
        assert [resource["urls"] for resource in card["resources"]] == [[], []]
        assert path.stem == model_card.model_id(card["name"], card["scale"])
        released -= set(files)
    assert not released


@pytest.mark.parametrize(
    ("name", "expected"), [("2xMine", "2x-Mine"), ("Mine x2", "2x-Mine"), ("  a__b (c) ", "2x-a-b-c")]
)
def test_an_id_has_letters_digits_and_single_dashes_and_the_scale_once(name: str, expected: str) -> None:
    assert model_card.model_id(name, 2) == expected


@pytest.mark.parametrize("arguments", [
    ["absent.pth"],
    ["2x_damaged.pth"],
    ["2x_My_Model_fp16.onnx"],
    ["2x_My_Model_fp16.safetensors", "notes.txt"],
    ["2x_My_Model_fp16.safetensors", "--name", "写真"],
])  # fmt: skip
def test_what_makes_no_card_is_one_line(folder: Path, arguments: list, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    assert run(*arguments) == 2
    assert re.fullmatch(r"model_card.py: error: .*(FILE|--name).*\n", capsys.readouterr().err)
    assert sorted(os.listdir()) == before
