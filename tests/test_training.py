"""training/: what reads files of its user. The training itself is that of the framework's own tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from aether_arch import AetherNet
from conftest import ROOT, randomize
from PIL import Image
from skimage import data as photographs


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "training" / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_evaluate_takes_every_nth_pair_of_a_folder(tmp_path: Path) -> None:
    for sub, side in (("gt", 64), ("lq", 32)):
        (tmp_path / sub).mkdir()
        for number in range(3):
            cut = Image.fromarray(photographs.astronaut()[number * 64 :][:64, 100:164])
            cut.resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / sub / f"{number}.png")
    net = randomize(AetherNet(embed_dim=16, depths=(1, 1), scale=2)).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    done = evaluate(tmp_path / "net.pth", "--data", tmp_path, "--every", 2)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["PSNR-Y, dB", "---", "0.png", "2.png", "mean"]
    assert abs(float(rows[2][2]) + float(rows[3][2]) - 2 * float(rows[4][2])) < 0.002
    assert 25 < float(rows[4][1]) < 45


def test_evaluate_says_what_is_missing(tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = evaluate(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    network = tmp_path / "net.pth"
    assert f"no {network}" in refused(network)
    network.write_bytes(b"no network")
    assert f"no .png in {tmp_path / 'gt'}" in refused(network, "--data", tmp_path)
    (tmp_path / "gt").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "gt" / "a.png")
    assert "lacks a.png (1 of 1" in refused(network, "--data", tmp_path)
    assert str(network) in refused(network)
