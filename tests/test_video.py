"""The commands of docs/video.md, as they stand there, on a clip of ten frames with sound."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from aether_arch import AetherNet
from conftest import ROOT
from PIL import Image

from aethersr.commands.fuse import main as fuse
from aethersr.commands.upscale import main as upscale

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg: apt install ffmpeg")
PAGE = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COLOURS = np.random.default_rng(0).integers(0, 256, (10, 2, 3))  # each frame: its left and its right half


def run(command: str, folder: Path) -> bytes:
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def colours(frames: np.ndarray) -> np.ndarray:
    """The mean colours in the middle of the left and the right halves, from 0 to 255."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 4 : -height // 4].reshape(len(frames), -1, 2, width // 2, 3)
    return middle[..., width // 8 : -width // 8, :].mean((1, 3))


def pictures(folder: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def clip(folder: Path, matrix: str) -> None:
    """video.mkv of COLOURS, and net.pth, a new network, which interpolates."""
    for number, halves in enumerate(COLOURS.astype(np.uint8)):
        Image.fromarray(halves.repeat(32, 0)[None].repeat(48, 0)).save(folder / f"{number}.png")
    sound = "-f lavfi -i sine=duration=0.4 -c:a flac"
    scale = f"scale=out_color_matrix={matrix}:out_range=tv:flags=accurate_rnd"
    video = f"-c:v ffv1 -pix_fmt yuv444p10le -vf {scale}"
    run(f"ffmpeg -framerate 25 -i %d.png {sound} {video} video.mkv", folder)
    torch.save(AetherNet(2, embed_dim=8, depths=(1,)).state_dict(), folder / "net.pth")


def upscaled_video(folder: Path) -> np.ndarray:
    """The frames of video_2x.mkv, from 0 to 255, whose sound is that of video.mkv."""
    packets = "ffmpeg -i {} -map 0:a -c copy -f framemd5 -"
    assert run(packets.format("video_2x.mkv"), folder) == run(packets.format("video.mkv"), folder)
    raw = run("ffmpeg -i video_2x.mkv -vf scale=flags=accurate_rnd -f rawvideo -pix_fmt rgb48le -", folder)
    return np.frombuffer(raw, "<u2").reshape(-1, 96, 128, 3) / 256  # ffmpeg shifts 8 bits by 8


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
def test_frames_order_colours_and_sound_are_kept(
    matrix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip(tmp_path, matrix)
    look, folder, apart, each, together, *_ = COMMANDS
    assert b"r_frame_rate=25/1" in run(look, tmp_path)
    run(folder, tmp_path)
    run(apart.replace("MATRIX", matrix), tmp_path)
    words = shlex.split(re.sub(r"weights/\S+", "net.pth", each))
    assert words[0] == "aether-upscale"
    assert upscale(words[1:]) == 0
    run(together.replace("RATE", "25/1"), tmp_path)
    frames = upscaled_video(tmp_path)
    assert len(frames) == len(pictures("frames")) == 10
    assert np.abs(colours(pictures("frames")) - COLOURS).max() <= 1
    assert np.abs(colours(frames) - colours(pictures("upscaled"))).max() <= 1


@pytest.mark.skipif(shutil.which("vspipe") is None, reason="needs VapourSynth: docs/video.md installs it")
def test_vapoursynth_keeps_them_too(tmp_path: Path) -> None:
    clip(tmp_path, "smpte170m")
    *_, export, start = COMMANDS
    words = shlex.split(re.sub(r"weights/\S+", str(tmp_path / "net.pth"), export))
    words[words.index("2x_mine.safetensors")] = str(tmp_path / "2x_mine.safetensors")
    assert fuse(words[1:]) == 0
    (script,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "video.py").write_text(script)
    subprocess.run(["bash", "-c", start], cwd=tmp_path, check=True, capture_output=True)
    frames = upscaled_video(tmp_path)
    assert len(frames) == 10
    assert np.abs(colours(frames) - COLOURS).max() <= 1
