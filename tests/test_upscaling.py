"""Whole pictures and many of them: transparency, textures, too little memory, folders that change."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, List, Tuple

import aether_arch
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, noise, tiny_net
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from aethersr import upscaling
from aethersr.errors import UserError
from aethersr.jobs import Job
from aethersr.network import TorchNetwork, load_network
from aethersr.picture import Picture
from aethersr.upscaling import Upscaler, through_transparency, upscale_picture

CASES = ROOT / "tests" / "cases"
pytestmark = pytest.mark.usefixtures("one_thread")


class Double:
    """A network that repeats every pixel; ``before`` is called first."""

    in_chans, scale, reach, size = 3, 2, 3, None

    def __init__(self, before: Any = lambda image: None) -> None:
        self.before = before

    def __call__(self, image: Tensor) -> Tensor:
        self.before(image)
        return F.interpolate(image, scale_factor=2.0)


@pytest.fixture(scope="module")
def new() -> TorchNetwork:
    """A new network is an interpolation, so it is known what pictures should become."""
    torch.manual_seed(0)
    return TorchNetwork(aether_arch.AetherNet(2, use_spatial_attn=False, **TINY).fused())


def upscaled(pixels: np.ndarray, network: Any, alpha: bool = False, **options: Any) -> np.ndarray:
    return upscale_picture(Picture(pixels, alpha), network, 512, 28, **options).pixels


def job(folder: Path, name: str, *shape: int) -> Job:
    return Job(noise(folder / "in" / name, *shape), folder / "out" / name)


def over(pixels: np.ndarray, shade: int) -> np.ndarray:
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + shade * (1 - alpha)


@pytest.mark.parametrize("hidden", ["as it is", "low alpha"])
def test_what_is_cut_out_looks_right_over_any_colour(new: TorchNetwork, hidden: str) -> None:
    """That is, over black and over white: others lie between."""
    disc = np.array(Image.open(CASES / "alpha_disc.png"))
    if hidden == "low alpha":  # colours of a hardly visible pixel mean as little
        disc[disc[..., 3] < 10, :3] = 0
        disc[10, 10] = (0, 0, 0, 3)
    out = upscaled(disc, new, True)
    darkest = out[out[..., 3] > 8][:, :3].min()
    assert darkest >= 250, f"a visible pixel is as dark as {darkest}"
    for shade in (0, 255):
        expected = upscaled(over(disc, shade).round().astype(np.uint8), new)
        off = np.abs(over(out, shade) - expected)[4:-4, 4:-4].max()  # at its border it darkens what is opaque
        assert off <= 4, f"{off:.1f} steps off over {shade}"


@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 30, 90)])
def test_the_rim_of_what_is_cut_out_has_its_colour_and_no_dots(colour: Tuple[int, int, int]) -> None:
    """Networks overshoot at a hard one: it got nearly opaque dots, and the black of hidden pixels."""
    y, x = np.mgrid[:40, :40]
    disc = np.zeros((40, 40, 4), np.uint8)
    disc[np.hypot(y - 19.5, x - 19.5) < 14] = (*colour, 128)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(disc[..., 3], 2), (5, 5))
    lowest, highest = (each((2, 3)).repeat(2, 0).repeat(2, 1) for each in (near.min, near.max))
    shipped = load_network(ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors", "cpu", False)
    for net in (shipped, TorchNetwork(tiny_net().float().fused())):
        out = upscaled(disc, net, True)
        assert (out[..., 3] >= lowest).all()
        assert (out[..., 3] <= highest).all(), f"alpha {out[..., 3].max()} of 128 at most"
        assert (out[(lowest == 0) & (highest > 0), :3] == colour).all()


def test_what_is_not_finite_is_said_of_transparent_pictures_too() -> None:
    pixels = np.full((8, 9, 4), 100, np.uint8)
    pixels[0, 0] = 0
    with pytest.raises(ValueError, match="not finite"):
        upscaled(pixels, Double(lambda image: image.fill_(float("inf"))), True)


def test_alpha_and_colours_come_nearest_to_both_pictures_at_their_worst_channel() -> None:
    black, white = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).sort(0).values
    outputs, image = [black, white], torch.ones(1, 4, 16, 16)
    image[..., ::2, ::2] = 0  # so every neighbourhood allows every value
    out = through_transparency(lambda shown: outputs.pop(0))(image)

    def error(alpha: Tensor, colours: Tensor) -> Tensor:
        over_white = colours * alpha + 1 - alpha
        return torch.maximum((colours * alpha - black).abs(), (over_white - white).abs()).amax(1)

    alphas = torch.linspace(0.002, 1, 500)
    fitting = [((black + white - 1 + alpha) / (2 * alpha)).clamp(0, 1) for alpha in alphas]
    best = torch.stack([error(*pair) for pair in zip(alphas, fitting)]).amin(0)
    assert (error(out[:, 3:], out[:, :3]) <= best + 2e-3).all()


def test_one_alpha_everywhere_stays_and_changes_no_colour(new: TorchNetwork) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    plain = upscaled(colours, new)
    for alpha in (255, 7):
        out = upscaled(np.dstack([colours, np.full((20, 24), alpha, np.uint8)]), new, True)
        assert np.array_equal(out[..., :3], plain)
        assert (out[..., 3] == alpha).all()


def test_16_bits_on_an_older_pytorch_are_one_line(new: TorchNetwork, monkeypatch: Any) -> None:
    monkeypatch.delattr(torch, "uint16")
    with pytest.raises(UserError, match=r"need PyTorch 2\.3 or newer"):
        upscaled(np.zeros((8, 8, 3), np.uint16), new)


def test_a_network_for_grey_takes_colours_too() -> None:
    net = TorchNetwork(tiny_net(in_chans=1).float().fused())
    colours = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    out = upscaled(colours, net)
    for channel in range(3):
        assert np.array_equal(out[..., channel], upscaled(colours[..., channel : channel + 1], net)[..., 0])


def test_a_network_for_colours_takes_grey_too() -> None:
    net = TorchNetwork(tiny_net().float().fused())
    grey = np.random.default_rng(0).integers(0, 2**16, (9, 11, 1), np.uint16)
    three = upscaled(np.repeat(grey, 3, 2), net)
    sound = ((three > 0) & (three < 65535)).all(2)
    assert sound.any()
    assert np.abs(upscaled(grey, net)[..., 0] - three.mean(2))[sound].max() <= 1


def test_the_tile_is_halved_when_memory_runs_out_and_other_faults_are_raised(tmp_path: Path) -> None:
    errors: List[Exception] = []
    most = 70

    def limit(image: Tensor) -> None:
        if errors:
            raise errors[0]
        if image.shape[-1] > most:
            raise MemoryError

    said: List[str] = []
    jobs = [job(tmp_path, f"{k}.png", 200, 150, 3) for k in range(3)]
    worker = Upscaler(Double(limit), 512, 3, overwrite=True, say=said.append)
    assert not [result.problem for result in worker.run(jobs) if result.problem]
    assert worker.tile == 50
    assert said == ["Not enough memory for tiles of 512 pixels; going on with 100.",
                    "Not enough memory for tiles of 100 pixels; going on with 50."]  # fmt: skip
    out = np.array(Image.open(jobs[0].target))
    assert np.array_equal(out[::2, ::2], np.array(Image.open(jobs[0].source)))
    most = 1
    (result,) = worker.run(jobs[:1])
    assert "not enough memory" in result.problem
    errors.append(RuntimeError("unsupported memory format option"))
    with pytest.raises(RuntimeError, match="memory format"):
        list(Upscaler(Double(limit), 512, 3, overwrite=True, say=said.append).run(jobs[:1]))
    assert len(said) == 2


def test_a_folder_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Files go, are cut, and come up as output: each is named, the others are written whole.

    So are names that differ in their last letter alone, after more letters than temporary files have of them.
    """
    names = [f"{'x' * 60}{k:02}.png" for k in range(12)]
    jobs = [job(tmp_path, name, 5, 6 + k, 3) for k, name in enumerate(names)]

    def change(image: Tensor) -> None:
        if not jobs[11].target.exists():
            jobs[8].source.unlink()
            jobs[9].source.write_bytes(jobs[9].source.read_bytes()[:60])
            (tmp_path / "out").mkdir(exist_ok=True)
            jobs[11].target.write_text("mine")

    results = list(Upscaler(Double(change), 512, 3).run(jobs))
    assert [bool(result.problem) for result in results] == [k in (8, 9, 11) for k in range(12)]
    assert jobs[11].target.read_text() == "mine"
    jobs[11].target.unlink()
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes == {name: (12 + 2 * k, 10) for k, name in enumerate(names) if k not in (8, 9, 11)}


def test_a_slow_disk_keeps_neither_reading_nor_the_network_waiting(tmp_path: Path, monkeypatch: Any) -> None:
    asked: List[int] = []
    seen: List[int] = []
    busy = threading.Lock()

    def work(image: Tensor) -> None:
        assert busy.acquire(blocking=False), "the network is asked twice at once"
        asked.append(1)
        time.sleep(0.01)
        busy.release()

    def write(job: Job, *arguments: Any) -> None:
        until = time.monotonic() + 20
        while job.source.name == "0" and len(asked) < 7 and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(len(asked))

    monkeypatch.setattr(upscaling.Picture, "read", lambda path: Picture(np.zeros((4, 4, 3), np.uint8)))
    monkeypatch.setattr(upscaling, "_write", write)
    jobs = [Job(Path(f"{k}"), Path(f"{k}.png")) for k in range(12)]
    results = list(Upscaler(Double(work), 512, 3).run(jobs))
    assert [result.job for result in results] == jobs
    assert max(seen[:5]) >= 7, f"{seen} pictures were upscaled while the first one was written"


def test_an_interruption_ends_threads_and_no_further_picture_begins(tmp_path: Path) -> None:
    jobs, before = [job(tmp_path, f"{k}.png") for k in range(20)], threading.active_count()
    asked: List[int] = []
    Picture.read(jobs[0].source)  # whatever is imported late is imported: so the first picture is done first
    results = Upscaler(Double(lambda image: asked.append(1) or time.sleep(0.3)), 512, 3).run(jobs)
    next(results)
    count = len(asked)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())
    assert threading.active_count() == before
    assert len(asked) <= count + 1, "pictures that had not begun were upscaled"
    assert 1 <= len(list((tmp_path / "out").iterdir())) <= count + 1
