"""benchmarks/: speed.py and quality.py on tiny cases: their tables, and bad input refused in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import networks
import pytest
import quality
import speed
import torch
from conftest import PLAIN, ROOT, small_net
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs

from aethersr.quality import resize

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--quick", "--sizes", "aether_small", "--scales", "2", "--rounds", "3", "--threads", "1"]
TINY = "AetherNet,embed_dim=12,depths=(1, 1),use_channel_attn=False,use_spatial_attn=False,patch=16,batch=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gt and lq for training, val for validation, a network, and a checkout with one network."""
    folder = tmp_path_factory.mktemp("pairs")
    for sub in ("gt", "lq", "val", "checkout/traiNNer/archs", "checkout/traiNNer/utils"):
        (folder / sub).mkdir(parents=True)
    picture = photographs.astronaut()
    for k in range(4):
        gt = picture[k * 64 : k * 64 + 64, 200:264]
        Image.fromarray(gt).save(folder / "gt" / f"{k}.png")
        Image.fromarray(resize(gt, 32, 32)).save(folder / "lq" / f"{k}.png")
    Image.fromarray(photographs.chelsea()[100:180, 100:201]).save(folder / "val" / "cat.png")
    save_file(small_net(2, **PLAIN).float().state_dict(), folder / "net.safetensors")
    torch.save(small_net(2, **PLAIN).fused().state_dict(), folder / "fused.pth")
    package = folder / "checkout" / "traiNNer"
    (package / "archs" / "__init__.py").touch()
    (package / "utils" / "registry.py").write_text(
        "from torch import nn\nSPANDREL_REGISTRY = {}\n"
        "def peer(scale):\n"
        "    return nn.Sequential(nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))\n"
        "ARCH_REGISTRY = {'peer': peer}\n"
    )
    return folder


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def bench(*words: str) -> speed.Bench:
    return speed.Bench(speed.parse_args([*QUICK, *words]))


def test_every_case_of_the_cpu_is_in_the_table(folder: Path, capsys: Any) -> None:
    output = folder / "speed.md"
    more = f"--weights {folder}/net.safetensors --traiNNer-redux {folder}/checkout --peers peer"
    assert speed.main([*QUICK, *more.split(), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed == output.read_text()
    assert f"PyTorch {torch.__version__}" in printed.splitlines()[0]
    assert re.search("^`python benchmarks/speed.py --quick .*--traiNNer-redux CHECKOUT", printed, re.M)
    rows = rows_of(printed)
    whats = list(dict.fromkeys(re.split(r"[ ,]", row[0])[0] for row in rows))
    assert whats == ["aether_small", "x2", "net.safetensors", "training", "the", "depthwise"]
    for what in {row[0] for row in rows}:
        measured = {row[3]: float(row[2]) for row in rows if row[0] == what and row[2] != "-"}
        assert min(measured.values()) > 0
        assert "1" in measured, what
    for row in rows:
        missing = row[1] == "NCNN" or row[1].startswith("OpenVINO")
        assert speed.IMPOSSIBLE not in row[4] or (missing and "No module named" in row[4]), row
        differs = re.match(r"differs by (\S+)/255", row[4])
        if differs and row[1] in ("ONNX Runtime fp32", "PyTorch", "OpenVINO fp32"):
            assert float(differs[1]) < 0.1, row


def test_what_a_gpu_is_asked_runs_here_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda net: net)
    made = bench()
    cases.networks(made)
    cases.compiled(made)
    ways = [line.strip("| ").split(" | ")[1] for line in made.lines]
    assert ways[:2] == ["fp32, contiguous", "TF32, channels_last"]
    assert "AMP, channels_last, compiled" in ways
    assert not [line for line in made.lines if speed.IMPOSSIBLE in line]


def test_what_is_not_possible_is_said_and_a_short_step_has_the_time_of_one(monkeypatch: Any) -> None:
    def impossible(bench: Any) -> cases.Case:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nto allocate more")

    def step(seconds: float) -> Any:
        return lambda bench: (lambda: now.__setitem__(0, now[0] + seconds), lambda ms: f"{ms:.3f}")

    made, now = bench(), [0.0]
    made.clock = lambda: now[0]
    made.group("what", {"no": (impossible,), "short": (step(1e-3),), "long": (step(4e-3),)})
    assert made.lines == ["| what | no | - | - | not possible here: CUDA out of memory. Tried |",
                          "| what | short | 1.00 | 1 | 1.000 |",
                          "| what | long | 4.00 | 0.25 (0.25 to 0.25) | 4.000 |"]  # fmt: skip
    made.cuda = True
    for name in ("wait", "tidy"):
        monkeypatch.setattr(made, name, lambda: None)
    made.group("slow", {"it": (step(1.5),)})
    assert "too slow to compare" in made.lines[3]


def test_it_stops_when_its_minutes_are_over(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(speed.MINUTES, "cpu", 1e-6)
    assert speed.main([*QUICK, "--cases", "training", "depthwise"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0].endswith("minutes are over; --cases measures the rest.")
    assert "nothing could be measured" in error[1]


def train(folder: Path, file: Path, *words: str) -> list[dict[str, Any]]:
    base = [str(file), "--data", str(folder), "--validation", str(folder / "val")]
    assert quality.main(["train", *base, *words]) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def test_a_seed_gives_the_same_figures_and_no_finished_run_is_repeated(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    base = ["--iterations", "12", "--run", TINY]
    first, again = (train(folder, tmp_path / name, *base) for name in ("a.json", "b.json"))
    assert first[0]["points"][0][0] == 2
    assert [point[2] for point in first[0]["points"]] == [point[2] for point in again[0]["points"]]
    longer = train(folder, tmp_path / "a.json", *base, "--run", f"{TINY},skip=1", "--seeds", "0", "1")
    assert longer[0] == first[0]
    assert "holds 1 runs, which are not repeated" in capsys.readouterr().out
    assert [(row["run"], row["seed"]) for row in longer] == [
        (run, seed) for seed in (0, 1) for run in (TINY, f"{TINY},skip=1")
    ]
    assert quality.main(["table", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    ends = ", ".join(f"{row['points'][-1][2]:.2f}" for row in longer if row["run"] == TINY)
    assert rows_of(printed)[0][0::4] == [TINY, ends]
    assert "--iterations 12 --seeds 0 1 --run 'AetherNet," in printed
    assert f"Measured {networks.machine().split(',')[0]}" in printed


def test_training_learns_and_a_budget_in_seconds_ends(folder: Path, tmp_path: Path) -> None:
    (row,) = train(folder, tmp_path / "c.json", "--iterations", "300", "--run", f"{TINY},rate=2e-3")
    assert row["points"][-1][2] > row["points"][0][2]
    (row,) = train(folder, tmp_path / "d.json", "--seconds", "0.5", "--run", TINY)
    assert row["points"][-1][1] >= 0.5 > row["points"][-2][1]


def test_a_file_is_trained_further_alone_or_with_a_teacher(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file, net = tmp_path / "net.pth", networks.aether_arch.AetherNet(scale=2, embed_dim=8, depths=(1,))
    torch.save(net.state_dict(), file)
    before = quality.Validation(folder / "val", 2).measure(net.eval())
    runs = [f"{file},rate=1e-9,iterations=12", f"{file},rate=1e-2", f"{file},rate=1e-2,teacher={file}"]
    words = [word for run in runs for word in ("--run", run)]
    rows = train(folder, tmp_path / "e.json", "--iterations", "30", *words)
    still, alone, taught = (row["points"][-1] for row in rows)
    assert still[0] == 12
    assert abs(still[2] - before) < 1e-3
    assert abs(taught[2] - before) < abs(alone[2] - before)


def test_the_picture_shows_weights_and_runs_with_times(folder: Path, tmp_path: Path, capsys: Any) -> None:
    train(folder, tmp_path / "runs.json", "--iterations", "6", "--traiNNer-redux", str(folder / "checkout"),
          "--run", f"{TINY},embed_dim=96,optimizer=SOAP", "--run", "peer,patch=16")  # fmt: skip
    capsys.readouterr()
    words = ["draw", str(tmp_path / "runs.json"), "--validation", str(folder / "val"), "--output"]
    words += [str(tmp_path / "picture"), "--traiNNer-redux", str(folder / "checkout"), "--weights"]
    assert quality.main([*words, str(folder / "net.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "picture.md").read_text()
    rows = {row[0].split(",")[0]: row for row in rows_of(printed)}
    assert [rows[name][1] for name in ("net", "AetherNet", "peer")] == list(quality.KINDS)
    assert float(rows["peer"][2]) < float(rows["net"][2]) < float(rows["AetherNet"][2])
    assert rows["net"][3] == "1.00"
    net = networks.opened(folder / "net.safetensors", "")
    assert rows["net"][4] == f"{quality.Validation(folder / 'val', 2).measure(net):.2f}"
    assert (tmp_path / "picture.png").stat().st_size > 10_000


QUALITY = ["train", "{tmp}/x.json", "--data", "{folder}", "--validation", "{folder}/val", "--iterations", "1"]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (speed, ["--rounds", "0"], "argument --rounds: 0 is not above 0"),
        pytest.param(speed, ["--device", "cuda"], "finds no CUDA device; pass --device cpu",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")),
        (speed, ["--output", "{tmp}/no/x.md"], "no does not exist; make it or pass another --output"),
        (speed, ["--cases", "runtimes", "--weights", "{tmp}/no.pth"], "does not exist"),
        (speed, ["--cases", "peers", "--traiNNer-redux", "{tmp}"], r"can't be imported .*--traiNNer-redux"),
        (quality, ["train", "{folder}/two.json", *QUALITY[2:], "--run", TINY], r"another comparison \(x4"),
        (quality, ["table", "{folder}/net.safetensors"], "net.safetensors holds no runs"),
        (quality, [*QUALITY, "--data", "{tmp}", "--run", "AetherNet"], "holds no .png; .*prepare_pict"),
        (quality, [*QUALITY, "--validation", "{tmp}", "--run", TINY], r"holds no picture.*--validation"),
        (quality, [*QUALITY, "--run", "span"], "needs a checkout of traiNNer-redux"),
        (quality, [*QUALITY, "--run", f"{TINY},patch=33"], "a cut has 32 pixels a side"),
        (quality, [*QUALITY, "--run", f"{TINY},rat=1"], "unexpected keyword argument 'rat'"),
        (quality, [*QUALITY, "--run", "{folder}/net.safetensors,depths=(1,)"], "argument 'depths'"),
        (quality, [*QUALITY, "--run", f"{TINY},teacher={{folder}}/no.pth"], "no.pth does not exist.*--run"),
        (quality, [*QUALITY, "--run", f"{TINY},rate"], "expected NAME,OPTION=VALUE"),
        (quality, [*QUALITY, "--run", f"{TINY},rate=fast"], "rate can't be 'fast'"),
        (quality, [*QUALITY, "--run", TINY, "--run", f"{TINY},iterations=-1"], "iterations can't be '-1'"),
        (quality, [*QUALITY, "--run", "{folder}/fused.pth"], "fused.pth can't be trained"),
        (quality, [*QUALITY, "--run", f"{TINY},optimizer=load_optimizer"], "has no load_optimizer"),
        (quality, ["draw", "{folder}/two.json", "--validation", "{folder}/val", "--output", "{tmp}/x",
                   "--weights", "{folder}/net.safetensors"], r"x2 for 3 channels; expected x4 .*--weights"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_2_and_one_line(
    script: Any, words: list[str], message: str, folder: Path, tmp_path: Path, capsys: Any,
    monkeypatch: Any,
) -> None:  # fmt: skip
    (folder / "two.json").write_text('{"title": "x4, 2 cuts", "setting": [], "rows": []}')
    name, before = f"{script.__name__}.py", sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", [name])
    for module in [each for each in sys.modules if each.split(".")[0] == "traiNNer"]:
        monkeypatch.delitem(sys.modules, module)
    assert script.main([word.format(folder=folder, tmp=tmp_path) for word in words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines(True) if "error: " in line)
    assert re.search(message, line), line
    assert line[:-1].isprintable()
    assert sorted(tmp_path.rglob("*")) == before


def test_every_result_is_what_todays_scripts_print_and_a_page_names_it(tmp_path: Path) -> None:
    results = sorted((ROOT / "benchmarks" / "results").iterdir())
    assert len(results) <= 8
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    # By itself: the test run's own paths would hide an import that only they can resolve.
    table = [sys.executable, ROOT / "benchmarks" / "quality.py", "table"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for path in results:
        assert f"benchmarks/results/{path.name}" in text, f"no page names {path.name}"
        if path.suffix == ".json":
            subprocess.run([*table, path], check=True, cwd=tmp_path, env=environment)
        if path.suffix == ".md":
            machine, _, command, *_ = path.read_text(encoding="utf-8").splitlines()
            assert "PyTorch" in machine
            assert re.match(r"`python benchmarks/(speed|quality)\.py", command), path.name
