"""benchmarks/gpu.py on a CPU: every part runs, ends in time, and its tables say what was measured."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import depthwise
import gpu
import gpu_kit
import gpu_report

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_part_runs_and_is_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (text,) = (path.read_text() for path in tmp_path.glob("gpu_*.md"))
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("gpu_*.json"))
    for part in gpu.PARTS:
        rows = [row for row in result["rows"] if row["part"] == part]
        assert f"## {part}" in text
        assert sum("failed" not in row for row in rows) >= 4, rows
        assert printed.count(f"\n{part} | ") == len(rows)
    impossible = {row["way"].split(",")[0] for row in result["rows"] if "failed" in row}
    assert impossible <= {"CUDA graph", "Triton"}


def test_a_training_step_uses_cudnn_and_lets_it_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = gpu_kit.Kit("cpu", gpu_kit.QUICK, 1.0)
    step, seen = gpu.training(kit, "aether_small", 1, 8, "bf16", "contiguous"), []
    absolute = torch.Tensor.abs
    flags = torch.backends.cudnn
    monkeypatch.setattr(
        torch.Tensor, "abs", lambda x: seen.append((flags.enabled, flags.benchmark)) or absolute(x)
    )
    step()
    assert seen == [(True, True)]


def test_it_stops_when_its_minutes_are_over(capsys: pytest.CaptureFixture) -> None:
    gpu.main(["--device", "cpu", "--quick", "--minutes", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split(" | ")[1] for line in lines[1:-1]}) == 1, "one group"
    assert "minutes are over" in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_one_line_says_what_to_do(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --quick" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("way", [name for name in depthwise.WAYS if name != "Triton"])
@pytest.mark.parametrize("shape", [(2, 16, 9, 13), (1, 12, 3, 2)])
def test_every_way_is_the_same_convolution(way: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[1], 1, 11, 11)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=5, groups=shape[1])
    assert float((depthwise.WAYS[way](weight)(x) - expected).abs().max()) < 1e-4


def test_the_largest_batch_follows_from_a_straight_line() -> None:
    rows = [{"group": "net", "way": f"batch {n}", "peak MiB": 1024 + 512 * n} for n in (4, 8, 16)]
    rows += [{"group": "net", "way": "batch 32", "failed": "out of memory"}]
    rows += [{"group": "huge", "way": f"batch {n}", "peak MiB": 10 * 1024 * n} for n in (1, 2)]
    assert gpu_report.fitting(rows) == [["net", "12", "20", "28", "44"], ["huge", "-", "1", "1", "2"]]


def test_a_second_call_keeps_the_parts_of_the_first_and_an_error_ends_only_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--parts"]
    assert gpu.main([*base, "training"]) == 0

    def broken(kit: gpu_kit.Kit) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setitem(gpu.PARTS, "depthwise", broken)
    assert gpu.main([*base, "depthwise"]) == 1, "nothing was measured"
    assert gpu.main([*base, "depthwise", "graphs"]) == 0
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("gpu_*.json"))
    parts = [row["part"] for row in result["rows"]]
    assert list(dict.fromkeys(parts)) == ["training", "depthwise", "graphs"]
    assert parts.count("depthwise") == 1
    assert gpu.main([*base, "depthwise", "training", "--minutes", "0"]) == 1
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("gpu_*.json"))
    assert {row["part"] for row in result["rows"]} == {*parts}, "a part that was not begun keeps its rows"
    assert "depthwise | - | - | failed CUDA error" in capsys.readouterr().out


def test_what_takes_too_long_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_kit, "SLOWEST", 0.05)
    kit = gpu_kit.Kit("cpu", gpu_kit.QUICK, 1.0)
    times = kit.compare("p", "g", {"slow": lambda: lambda: time.sleep(0.1), "fast": lambda: lambda: None})
    assert times is not None
    assert list(times.times) == ["fast"]
    assert "p | g | slow | failed 0.1 s, too slow to compare" in capsys.readouterr().out


def test_no_weight_of_what_is_measured_is_zero_everywhere() -> None:
    net = gpu_kit.Kit("cpu", gpu_kit.QUICK, 1.0).fused("aether_small", 2)
    assert not [name for name, value in net.named_parameters() if not value.any()]


def test_what_is_not_possible_is_said_and_the_rest_goes_on(capsys: pytest.CaptureFixture) -> None:
    kit = gpu_kit.Kit("cpu", gpu_kit.QUICK, 1.0)

    def impossible() -> gpu_kit.Step:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    times = kit.compare("part", "group", {"no": impossible, "yes": lambda: lambda: None})
    assert times is not None
    assert list(times.times) == ["yes"]
    assert "part | group | no | failed CUDA out of memory. Tried to allocate\n" in capsys.readouterr().out
