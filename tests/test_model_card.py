"""A card that training/model_card.py writes keeps OpenModelDB's rules and describes the files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable

import aether_arch
import pytest
import torch
from conftest import ROOT, small_net
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "training"))

import model_card

from aethersr.errors import UserError
from aethersr.identify import aether_from_state_dict
from aethersr.onnx import export_onnx

Rule = Callable[[Any], bool]
OPTIONS = ["--author", "my-id", "--date", "2026-11-22", "--tags", "photo,restoration"]
ADDRESS = ["--url", "https://example.org/v1"]


def text(pattern: str = "(?s).*") -> Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def whole(least: int = 1, most: float = float("inf")) -> Rule:
    return lambda value: type(value) is int and least <= value <= most


def several(rule: Rule, least: int = 1) -> Rule:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(rule, value))


ID = text("[a-z0-9]+(-[a-z0-9]+)*")
REQUIRED: dict[str, Rule] = {  # what OpenModelDB's validation asks of each property, of a resource's too
    "name": text(),
    "author": lambda value: ID(value) or several(ID)(value),
    "tags": several(ID),
    "description": lambda value: isinstance(value, str) and value == value.strip(),
    "date": text(r"\d{4}-(0[1-9]|1[012])-(0[1-9]|[12]\d|3[01])"),
    "architecture": ID,
    "scale": whole(most=16),
    "inputChannels": whole(most=4),
    "outputChannels": whole(most=4),
    "resources": several(lambda value: isinstance(value, dict) and not broken(value, RESOURCE)),
    "images": lambda value: isinstance(value, list),
}
OPTIONAL: dict[str, Rule] = {
    "license": text(),
    "size": several(text(".+")),
    "dataset": text(),
    **dict.fromkeys(("trainingIterations", "trainingBatchSize", "trainingHRSize", "datasetSize"), whole()),
}
RESOURCE: dict[str, Rule] = {
    "platform": text("pytorch|onnx"),
    "type": text("pth|safetensors|onnx"),
    "size": whole(),
    "sha256": text("[0-9a-f]{64}"),
    "urls": several(text("https://(?!cdn.discordapp.com/).+")),
}


def broken(value: dict[str, Any], rules: dict[str, Rule]) -> list[str]:
    return [key for key, rule in rules.items() if not rule(value.get(key))]


def problems(path: Path) -> list[str]:
    """The properties of a card that OpenModelDB would refuse, and "id" where the file's name is wrong."""
    card = json.loads(path.read_text(encoding="utf-8"))
    unknown = [key for key in card if key not in {**REQUIRED, **OPTIONAL}]
    wrong = broken(card, REQUIRED) + broken(
        card, {key: rule for key, rule in OPTIONAL.items() if card.get(key) is not None}
    )
    scale = card.get("scale")
    twice = re.search(rf"^{scale}x-({scale}x|x{scale})|-({scale}x|x{scale})$", path.stem)
    return (
        unknown
        + wrong
        + (["id"] if twice or not re.fullmatch(rf"{scale}x(-[a-zA-Z0-9]+)+", path.stem) else [])
    )


def says_what_the_files_are(path: Path, *files: Path) -> None:
    resources = json.loads(path.read_text(encoding="utf-8"))["resources"]
    assert len(resources) == len(files)
    for resource, file in zip(resources, files, strict=True):
        assert resource["size"] == file.stat().st_size
        assert resource["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert resource["type"] == file.suffix[1:]
        assert resource["platform"] == ("onnx" if file.suffix == ".onnx" else "pytorch")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    net = small_net(2).fused().float()
    state = net.state_dict()
    paths = [tmp_path / f"2x_My_Model_fp16{ending}" for ending in (".safetensors", ".pth", ".onnx")]
    save_file({name: value.half() for name, value in state.items()}, paths[0])
    torch.save(state, paths[1])
    export_onnx(net, 2, output_path=str(paths[2]))
    return paths


def run(*arguments: Any) -> int:
    return model_card.main([*map(str, arguments), *OPTIONS])


def test_a_card_keeps_every_rule_and_says_what_the_files_are(files: list[Path]) -> None:
    training = [
        word
        for option in ("iterations", "batch_size", "hr_size", "dataset_size")
        for word in (f"--{option}", "7")
    ]
    assert (
        run(
            *files,
            *ADDRESS,
            *training,
            "--license",
            "CC-BY-4.0",
            "--dataset",
            "pictures",
            "--description",
            " one\ntwo ",
        )
        == 0
    )
    path = files[0].with_name("2x-My-Model.json")
    assert problems(path) == []
    says_what_the_files_are(path, *files)
    card = json.loads(path.read_text(encoding="utf-8"))
    assert (card["name"], card["size"]) == ("My_Model", ["24dim", "3nb", "11ks"])
    assert (card["scale"], card["inputChannels"], card["outputChannels"]) == (2, 3, 3)
    assert [resource["urls"] for resource in card["resources"]] == [
        [f"https://example.org/v1/{file.name}"] for file in files
    ]


def weights_of(card: Path) -> Path:
    return card.with_name(f"{card.stem.replace('-', '_')}_fp16.safetensors")


def int8_of(card: Path) -> Path:
    return Path(str(weights_of(card)).replace("_fp16.safetensors", "_int8.onnx"))


def test_every_released_file_has_a_card() -> None:
    released = {path for path in (ROOT / "weights").glob("*_*.*") if "_training_" not in path.name}
    cards = sorted((ROOT / "weights").glob("*.json"))
    assert {path for card in cards for path in (weights_of(card), int8_of(card))} == released != set()


@pytest.mark.parametrize("path", sorted((ROOT / "weights").glob("*.json")), ids=lambda path: path.name)
def test_the_card_of_shipped_weights_lacks_their_address_alone(path: Path) -> None:
    scale = int(path.name.split("x")[0])
    says_what_the_files_are(path, weights_of(path), int8_of(path))
    assert problems(path) == ["resources"]
    card = json.loads(path.read_text(encoding="utf-8"))
    for resource in card["resources"]:
        resource["urls"] = ["https://example.org/x"]
    assert broken(card, REQUIRED) == []
    assert card["scale"] == scale
    net = aether_arch.aether_small(scale=scale)
    assert card["size"] == [
        "small",
        f"{net.options['embed_dim']}dim",
        f"{sum(net.options['depths'])}nb",
        f"{net.options['lk_kernel']}ks",
    ]


@pytest.mark.parametrize(
    "change", [{"urls": []}, {"sha256": "0" * 63}, {"type": "bin"}, {"size": 0}, {"platform": "torch"}]
)
def test_the_rules_notice_a_broken_resource(files: list[Path], change: dict[str, Any]) -> None:
    assert run(*files, *ADDRESS) == 0
    path = files[0].with_name("2x-My-Model.json")
    card = json.loads(path.read_text(encoding="utf-8"))
    card["resources"][1].update(change)
    path.write_text(json.dumps(card), encoding="utf-8")
    assert problems(path) == ["resources"]


def test_the_same_files_and_options_give_the_same_bytes_and_nothing_is_overwritten_unasked(
    files: list[Path], capsys: Any
) -> None:
    assert run(*files) == 0
    path = files[0].with_name("2x-My-Model.json")
    first = path.read_bytes()
    assert run(*files) == 2
    assert "--overwrite" in capsys.readouterr().err
    path.write_text("old")
    assert run(*files, "--overwrite") == 0
    assert path.read_bytes() == first
    assert sorted(os.listdir(path.parent)) == sorted([path.name, *(file.name for file in files)])


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


def test_another_models_file_is_refused(files: list[Path], capsys: Any) -> None:
    clean = ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors"
    for name in ("2x_AetherNet_small_jpeg_int8.onnx", "2x_AetherNet_small_jpeg_fp16.safetensors"):
        with pytest.raises(UserError, match=f"{name} holds other weights than .*{clean.name}"):
            model_card.check_same_network(clean, [ROOT / "weights" / name])
    fixed = files[0].with_name("fixed.onnx")
    net = aether_from_state_dict({name: value.float() for name, value in load_file(clean).items()})
    export_onnx(net, 2, output_path=str(fixed), static=(3, 96, 128))
    model_card.check_same_network(clean, [clean.with_name("2x_AetherNet_small_wallpapers_int8.onnx"), fixed])
    state = {name: value * 1.5 for name, value in small_net(2).fused().float().state_dict().items()}
    torch.save(state, files[1])
    assert run(*files) == 2
    assert f"{files[1]} holds other weights than {files[0]}" in capsys.readouterr().err


def test_what_makes_no_card_is_an_error_in_one_line(files: list[Path], capsys: Any) -> None:
    other = files[0].with_name("other.pth")
    torch.save(small_net(3).float().state_dict(), other)
    damaged, empty = files[0].with_name("damaged.pth"), files[0].with_name("empty.onnx")
    damaged.write_bytes(b"damaged")
    empty.write_bytes(b"")
    wrong_scale = files[2].rename(files[2].with_name("4x_My_Model.onnx"))
    for arguments in (
        [files[0].with_name("absent.pth")], [damaged], [wrong_scale], [files[0], other],
        [files[0], wrong_scale], [files[0], empty], [files[0], ROOT],
        [files[0], files[0].with_name("absent.onnx")], [files[0], "--name", "写真"],
    ):  # fmt: skip
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("model_card.py: error: ")
        assert "FILE" in error or "--name" in error
        assert "--model_path" not in error
    for option, value in (
        ("--date", "22.11.2026"),
        ("--tags", "Photo"),
        ("--author", ""),
        ("--iterations", "0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            model_card.main([str(files[0]), *OPTIONS, option, value])
        assert stopped.value.code == 2
    assert not list(files[0].parent.glob("*.json"))
