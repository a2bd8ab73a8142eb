"""benchmarks/equal_budget.py on cuts of one photograph, a few iterations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs

sys.path.insert(0, str(ROOT / "benchmarks"))

import cuts
import equal_budget
import runs
from budget_results import shown

from aethersr.errors import UserError
from aethersr.quality import resize

TINY = "AetherNet,embed_dim=12,depths=(1, 1),use_channel_attn=False,use_spatial_attn=False,patch=16,batch=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gt and lq for training, val for validation."""
    folder = tmp_path_factory.mktemp("pairs")
    for sub in ("gt", "lq", "val"):
        (folder / sub).mkdir()
    picture = photographs.astronaut()
    for k in range(4):
        gt = picture[k * 64 : k * 64 + 64, 200:264]
        Image.fromarray(gt).save(folder / "gt" / f"{k}.png")
        Image.fromarray(resize(gt, 32, 32)).save(folder / "lq" / f"{k}.png")
    Image.fromarray(photographs.chelsea()[100:180, 100:201]).save(folder / "val" / "cat.png")
    return folder


def run(folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    base = ["--data", str(folder), "--validation", str(folder / "val"), "--output", str(output)]
    equal_budget.compare(equal_budget.parse_args([*base, "--base", TINY, *arguments]))
    result: dict[str, Any] = json.loads(output.with_name(output.name + ".json").read_text(encoding="utf-8"))
    return result


def test_the_same_seed_gives_the_same_figures_and_a_finished_run_is_not_repeated(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    first = run(folder, tmp_path / "a", "--iterations", "12", "--run", "base")
    again = run(folder, tmp_path / "b", "--iterations", "12", "--run", "base")
    longer = run(
        folder,
        tmp_path / "a",
        "--iterations",
        "12",
        "--run",
        "base",
        "--run",
        "base,skip=1",
        "--seeds",
        "0",
        "1",
    )
    assert [point[2] for point in first["rows"][0]["points"]] == [
        point[2] for point in again["rows"][0]["points"]
    ]
    assert longer["rows"][0] == first["rows"][0]
    assert "holds 1 runs, which are not repeated" in capsys.readouterr().out
    assert [(row["run"], row["seed"]) for row in longer["rows"]] == [
        ("base", 0),
        ("base,skip=1", 0),
        ("base", 1),
        ("base,skip=1", 1),
    ]
    iterations = [point[0] for point in first["rows"][0]["points"]]
    assert iterations == [2, 4, 6, 8, 10, 12]
    lines = (tmp_path / "a.md").read_text(encoding="utf-8").splitlines()
    assert TINY in lines[0]
    assert [line.split(" | ")[:3] for line in lines[4:]] == [
        ["| base", "2", "12"],
        ["| base,skip=1", "2", "12"],
    ]


def test_training_learns_and_a_budget_in_seconds_ends(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "c", "--seconds", "3", "--run", "base,rate=2e-3")
    points = result["rows"][0]["points"]
    assert points[-1][1] >= 3 > points[-2][1]
    assert points[-1][2] > points[0][2] + 0.05
    assert 0.1 < result["rows"][0]["largest"] < 100
    assert abs(result["rows"][0]["last"] - points[-1][2]) < 1


def test_the_loss_changes_what_is_learned(folder: Path, tmp_path: Path) -> None:
    losses = ["--run", "base", "--run", "base,loss=charbonnier", "--run", "base,loss=mse"]
    rows = run(folder, tmp_path / "l", "--iterations", "6", *losses)["rows"]
    usual, charbonnier, mse = (row["last"] for row in rows)
    assert usual == charbonnier != mse
    out, target = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0])
    assert runs.LOSSES["charbonnier"](out, target).item() == pytest.approx(0.25, abs=1e-6)
    assert runs.LOSSES["mse"](out, target).item() == pytest.approx(0.125)


def test_another_comparison_is_not_mixed_into_a_file(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "d", "--iterations", "1", "--run", "base")
    before = (tmp_path / "d.json").read_bytes()
    with pytest.raises(UserError, match="another comparison"):
        run(folder, tmp_path / "d", "--iterations", "2", "--run", "base")
    assert (tmp_path / "d.json").read_bytes() == before
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match="is no results file"):
        run(folder, tmp_path / "d", "--iterations", "1", "--run", "base")


def test_a_run_is_read_with_values_words_and_brackets() -> None:
    parsed = runs.parse_run("base,rate=1e-4,start=plain,bound=None", "AetherNet,depths=(2, 3),rate=1")
    assert (parsed.text, parsed.network) == ("base,rate=1e-4,start=plain,bound=None", "AetherNet")
    assert parsed.options == {"depths": (2, 3), "bound": None}
    assert parsed.training == {**runs.DEFAULTS, "rate": 1e-4, "start": "plain"}
    with pytest.raises(UserError, match="expected NAME,OPTION=VALUE"):
        runs.parse_run("aether_small,fast")
    for wrong, text in (
        ("aether_small,loss=huber", "loss is 'huber'; expected charbonnier or mse"),
        ("aether_small,start=qiet", "expected plain or quiet"),
        ("aether_small,skip=no", "skip is 'no'; expected 0 or 1"),
        ("aether_small,rate=0", "expected a number above 0"),
        ("aether_small,batch=2.5", "batch is 2.5; expected 1 or more"),
        ("span,start=plain", "start is for AetherNet alone"),
        ("span,precondition_frequency=5", "precondition_frequency is for SOAP alone"),
    ):
        with pytest.raises(UserError, match=text):
            runs.parse_run(wrong)


def test_soap_gets_its_frequency() -> None:
    run = runs.parse_run("span,optimizer=SOAP,precondition_frequency=5")
    optimizer = equal_budget.build_optimizer(torch.nn.Linear(2, 2), run.training)
    assert type(optimizer).__name__ == "SOAP"
    assert optimizer.param_groups[0]["precondition_frequency"] == 5


def test_a_crop_and_its_reduction_show_the_same_place_turned_the_same_way(folder: Path) -> None:
    low, high = cuts.Cuts(folder, None).batch(16, 16, np.random.default_rng(0))
    assert low.shape == (16, 3, 16, 16)
    assert high.shape == (16, 3, 32, 32)
    means = torch.nn.functional.avg_pool2d(high, 2)
    assert float((means - low).abs().mean()) < 0.03
    assert float((means - low.flip(3)).abs().mean()) > 0.06


def test_the_start_and_the_norms_of_a_network_follow_the_options() -> None:
    def net(options: str) -> torch.nn.Module:
        return runs.build(runs.parse_run(f"{TINY},{options}"), 2, None)

    assert net("start=plain").conv_last.weight.abs().max().item() < 0.1
    assert net("rate=1").conv_last.weight.max().item() == 1
    quiet = net("start=quiet").stages[0][0]
    assert set(quiet.norm.weight.flatten().tolist()) == {0.25}
    assert float(quiet.conv(torch.randn(4, 12, 64, 64)).std()) < 0.5
    skipped = net("start=plain,skip=1")
    flat = torch.full((1, 3, 8, 8), 0.8)
    assert (skipped(flat) - skipped.net(flat) - 0.8).abs().max().item() < 1e-5
    frozen = net("rate=1").train()
    equal_budget.freeze_statistics(frozen)
    frozen(torch.rand(2, 3, 8, 8))
    assert float(frozen.norm.running_mean.abs().max()) == 0


def test_what_runs_away_is_seen(folder: Path) -> None:
    validation = cuts.Validation(folder / "val", 64, 2)
    net = runs.build(runs.parse_run(TINY), 2, None).eval()
    calm = validation.largest(net, "cpu")
    with torch.no_grad():
        net.stages[0][0].ffn.conv_out.weight.fill_(1e38)
    assert calm < 50
    assert validation.largest(net, "cpu") == float("inf")


def test_what_is_missing_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--data", str(tmp_path), "--run", "base"], "prepare_pictures.py"),
        (["--validation", str(tmp_path), "--run", "base"], r"holds no picture .* \(--validation\)"),
        (["--run", "span"], "--traiNNer-redux"),
        (["--run", "base,patch=33"], "a cut has 32 pixels a side"),
        (["--run", "base,rat=1e-4"], "unexpected keyword argument 'rat'"),
        (["--run", "base,depths=()"], r"--run\)"),
        (["--run", "base,optimizer=load_optimizer"], "pytorch-optimizer has no load_optimizer"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "e", "--iterations", "1", *arguments)


def test_bad_input_ends_with_2_and_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--data", str(tmp_path), "--validation", str(folder / "val"), "--iterations", "1"]
    assert equal_budget.main([*arguments, "--run", TINY, "--output", str(tmp_path / "x")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("equal_budget.py: error: ")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        equal_budget.parse_args([*arguments[:-1], "0", "--run", TINY])
    assert "argument --iterations: invalid positive number value: '0'" in capsys.readouterr().err


def test_kept_weights_go_on_in_the_next_run(folder: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}.safetensors" for name in "ab")
    run(folder, tmp_path / "f", "--iterations", "40", "--run", "base,rate=5e-3", "--weights", str(first))
    again = ["--run", f"base,pretrained={first}", "--weights", str(second)]
    result = run(folder, tmp_path / "g", "--seconds", "1", *again)
    start = runs.build(runs.parse_run(f"{TINY},pretrained={first}"), 2, None)
    kept = load_file(first)
    fused = tmp_path / "fused.safetensors"
    save_file(start.fused().state_dict(), fused)
    assert all(torch.equal(value, kept[name].float()) for name, value in start.state_dict().items())
    assert not torch.equal(kept["conv_last.weight"], load_file(second)["conv_last.weight"])
    iterations = result["rows"][0]["points"][-1][0]
    assert equal_budget.iterations_of(second, "float") == 40 + iterations
    with pytest.raises(UserError, match="holds this run; pass another seed"):
        run(folder, tmp_path / "g", "--seconds", "1", *again)
    for arguments, message in (
        (["--run", "base", "--seeds", "0", "1"], "pass one --run and one seed"),
        (["--run", f"{TINY},pretrained=no.safetensors"], "expected a file"),
        (["--run", "base", "--weights", str(tmp_path / "x.pth")], r"expected \.safetensors"),
        (["--run", "base,skip=1"], "without a skip"),
        (["--run", f"{TINY},embed_dim=14,pretrained={first}"], r"--run\)"),
        (["--run", f"{TINY},pretrained={fused}"], "pass a training checkpoint, not the fused weights"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "h", "--iterations", "1", "--weights", str(first), *arguments)


def test_a_run_that_broke_down_leaves_the_picture() -> None:
    good, weak, broken = ({"points": [(10, 1.0, 31.0), (20, 2.0, last)]} for last in (32.0, 31.5, 8.0))
    assert shown([good, weak]) == pytest.approx((30.9, 32.1))
    assert shown([broken, good]) == pytest.approx((30.0, 32.1))


def test_a_block_that_adds_nothing_contributes_nothing() -> None:
    import blocks

    net = runs.build(runs.parse_run(TINY), 2, None).eval()
    with torch.no_grad():
        net.stages[1][0].ffn.conv_out.bias.fill_(1.0)
    image = torch.rand(1, 3, 16, 16)
    first, second = blocks.contributions(net, image)
    assert first == 0
    assert second > 0.1
    assert blocks.contributions(net.fused(), image) == pytest.approx([first, second], abs=1e-4)
