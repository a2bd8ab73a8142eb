"""A card of training/model_card.py keeps OpenModelDB's rules and describes the files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from conftest import ROOT, small_net
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "training"))
import model_card

from aethersr.onnx import export_onnx

OPTIONS = ["--author", "my-id", "--date", "2026-11-22", "--tags", "photo,restoration"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = small_net(2).fused().float()
    folder, state = tmp_path_factory.mktemp("written"), net.state_dict()
    save_file({name: value.half() for name, value in state.items()}, folder / "2x_My_Model_fp16.safetensors")
    torch.save(state, folder / "2x_My_Model_fp16.pth")
    export_onnx(net, 2, output_path=str(folder / "2x_My_Model_fp16.onnx"))
    torch.save({name: value * 1.5 for name, value in state.items()}, folder / "2x_other_weights.pth")
    torch.save(small_net(3).float().state_dict(), folder / "3x_other_scale.pth")
    (folder / "2x_damaged.pth").write_bytes(b"damaged")
    return folder


@pytest.fixture
def files(written: Path) -> List[Path]:
    for card in written.glob("*.json"):
        card.unlink()
    return [written / f"2x_My_Model_fp16{ending}" for ending in (".safetensors", ".pth", ".onnx")]


def run(*arguments: Any) -> int:
    return model_card.main([*map(str, arguments), *OPTIONS])


def says_what_the_files_are(card: Dict[str, Any], *files: Path) -> None:
    assert len(card["resources"]) == len(files)
    for resource, file in zip(card["resources"], files):
        assert resource["size"] == file.stat().st_size
        assert resource["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert resource["type"] == file.suffix[1:]
        assert resource["platform"] == ("onnx" if file.suffix == ".onnx" else "pytorch")


def test_a_card_says_what_the_files_are_and_the_same_options_give_the_same_bytes(
    files: List[Path], capsys: Any
) -> None:
    more = [
        "--url",
        "https://example.org/v1/",
        "--license",
        "CC-BY-4.0",
        "--more",
        '{"trainingIterations": 7}',
    ]
    assert run(*files, *more, "--description", " one\ntwo ") == 0
    path = files[0].with_name("2x-My-Model.json")
    card = json.loads(path.read_text(encoding="utf-8"))
    says_what_the_files_are(card, *files)
    urls = [resource.pop("urls") for resource in card.pop("resources")]
    assert urls == [[f"https://example.org/v1/{file.name}"] for file in files]
    assert card == {
        "name": "My_Model",
        "author": "my-id",
        "license": "CC-BY-4.0",
        "tags": ["photo", "restoration"],
        "description": "one\ntwo",
        "date": "2026-11-22",
        "architecture": "aethernet",
        "size": ["24dim", "3nb", "11ks"],
        "scale": 2,
        "inputChannels": 3,
        "outputChannels": 3,
        "trainingIterations": 7,
        "images": [],
    }
    first = path.read_bytes()
    assert run(*files) == 2
    assert "--overwrite" in capsys.readouterr().err
    path.write_text("old")
    assert run(*files, *more, "--description", "one\ntwo", "--overwrite") == 0
    assert path.read_bytes() == first


def weights_of(card: Path) -> Path:
    return card.with_name(f"{card.stem.replace('-', '_')}_fp16.safetensors")


def int8_of(card: Path) -> Path:
    return Path(str(weights_of(card)).replace("_fp16.safetensors", "_int8.onnx"))


def test_every_released_file_has_a_card_that_lacks_its_address_alone() -> None:
    released = {path for path in (ROOT / "weights").glob("*_*.*") if "_training_" not in path.name}
    cards = sorted((ROOT / "weights").glob("*.json"))
    assert {path for card in cards for path in (weights_of(card), int8_of(card))} == released != set()
    for path in cards:
        card = json.loads(path.read_text(encoding="utf-8"))
        says_what_the_files_are(card, weights_of(path), int8_of(path))
        assert [resource["urls"] for resource in card["resources"]] == [[], []]
        facts = model_card.facts(weights_of(path))
        assert {name: card[name] for name in facts} == facts
        assert path.stem == model_card.model_id(card["name"], card["scale"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2x Mine", "2x-Mine"),
        ("2xMine", "2x-Mine"),
        ("Mine x2", "2x-Mine"),
        ("  a__b (c) ", "2x-a-b-c"),
        ("Größe", "2x-Gr-e"),
    ],
)
def test_an_id_has_letters_digits_and_single_dashes_and_the_scale_once(name: str, expected: str) -> None:
    assert model_card.model_id(name, 2) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["absent.pth"],
        ["2x_damaged.pth"],
        ["2x_My_Model_fp16.pth", "absent.onnx"],
        ["2x_My_Model_fp16.pth", "notes.txt"],
        ["2x_My_Model_fp16.pth", "2x_other_weights.pth"],
        ["2x_My_Model_fp16.pth", "3x_other_scale.pth"],
        ["2x_My_Model_fp16.pth", "--name", "写真"],
    ],
)
def test_what_makes_no_card_is_an_error_in_one_line(
    files: List[Path], arguments: List[str], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(files[0].parent)
    before = sorted(os.listdir())
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"model_card.py: error: .*(FILE|--name).*\n", error)
    assert "--model_path" not in error
    assert sorted(os.listdir()) == before
