"""The benchmark runs, counts what it says it counts, and its rivals compute what AetherNet computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_net
from torch import nn

sys.path.insert(0, str(ROOT / "benchmarks"))
import benchmark
import counting
import int8
from published import kernels_merged, two_branches


@pytest.mark.parametrize("form", [two_branches, kernels_merged])
def test_the_published_forms_compute_the_same(form) -> None:  # type: ignore[no-untyped-def]
    net = small_net(4, use_spatial_attn=True)
    x = torch.rand(1, 3, 13, 17, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        assert float((form(net).eval()(x) - expected).abs().max() / expected.abs().max()) < 1e-12


def test_the_published_training_form_has_the_same_gradients_and_statistics() -> None:
    net = small_net(2, drop_path_rate=0.0, norm="batch").train()
    other = two_branches(net).train()
    x = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    for each in (net, other):
        each(x).square().mean().backward()
    for mine, theirs in (
        (net.stages[1][1].conv.lk_conv, other.stages[1][1].conv.conv.lk_conv),
        (net.conv_first, other.conv_first),
    ):
        assert torch.allclose(mine.weight.grad, theirs.weight.grad, rtol=1e-8, atol=1e-12)
    assert torch.allclose(net.stages[0][0].norm.running_var, other.stages[0][0].norm.norm.running_var)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def step() -> None:
        x = torch.ones(2**20)  # 4 MiB
        y = x.view(-1)[: 2**19] * 2  # and 2 MiB; the view takes none
        del x
        y.mul_(2)
        torch.cat([y, y])  # 4 MiB beside the 2

    assert counting.peak_mebibytes(step, "cpu") == 6


def test_multiply_adds_are_those_of_the_convolutions() -> None:
    net = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    assert counting.gigamacs(net, torch.rand(1, 4, 10, 10)) == pytest.approx(4 * 6 * 9 * 100 / 1e9)
    with counting.Convolutions() as counted, torch.no_grad():
        net(torch.rand(1, 4, 10, 10))
    (found,) = counted.found
    assert found == (4 * 6 * 9 * 100, 4 * (400 + 216 + 600), False)
    assert found.milliseconds(dense=1e-3, depthwise=1e3, bandwidth=1e3) == pytest.approx(21.6)
    assert found.milliseconds(dense=1e3, depthwise=1e3, bandwidth=1e-6) == pytest.approx(4864)


def test_a_run_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--quick", "--size", "8", "--rounds", "3", "--threads", "1", "--networks", "aether_small"]
    benchmark.main([*words, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "cpu.md").read_text().strip()
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["network"].split(" ", 1)[1] for row in result["networks"]] == list(benchmark.FORMS)
    assert all(ms > 0 for row in result["networks"] for ms in row["ms"].values())
    assert [len(row["ms"]) for row in result["networks"]] == [2, 2, 2], "eager and ONNX Runtime"
    assert result["networks"][0]["parameters_training"] == 1_536_451
    assert [set(row.get("gain", ())) for row in result["networks"]] == [
        set(),
        set(),
        {"eager, 1 thread", "ORT, 1 thread"},
    ]
    (limit,) = result["limit"]
    assert 0 < limit["floor_ms"] <= limit["reachable_ms"] * 1.01
    assert result["training"][0]["form"] == "two branches"
    assert "Training step" in printed


@pytest.mark.parametrize(
    "script",
    sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text()),
    ids=lambda path: path.stem,
)
def test_each_script_starts_by_itself(script: Path, tmp_path: Path) -> None:
    """The test run's own paths would hide an import that only they can resolve."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert script.stem in done.stdout


@pytest.mark.parametrize("name", [name for name in int8.CONVOLUTIONS if "180" not in name])
def test_the_integer_convolution_that_is_timed_computes_what_the_float_one_does(
    name: str, tmp_path: Path
) -> None:
    shape = int8.CONVOLUTIONS[name]
    codes = np.random.default_rng(0).integers(0, 256, (1, shape[0], 9, 12)).astype(np.uint8)
    outputs = []
    for integer, image in ((False, (codes.astype(np.float32) - 128) / 255), (True, codes)):
        path = tmp_path / f"{integer}.onnx"
        int8.convolution_file(path, shape, integer)
        outputs.append(benchmark.session(path, torch.from_numpy(image), 1)()[0])
    expected = np.clip(np.rint(outputs[0] * 255) + 128, 0, 255)
    assert np.abs(expected - outputs[1]).max() <= 1
    assert expected.std() > 5
