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
from conftest import ROOT, small_net
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
    options: Any = {"use_channel_attn": False, "use_spatial_attn": False}
    return TorchNetwork(aether_arch.AetherNet(2, embed_dim=8, depths=(1,), lk_kernel=3, **options).fused())


def upscaled(pixels: np.ndarray, network: Any, alpha: bool = False, **options: Any) -> np.ndarray:
    return upscale_picture(Picture(pixels, alpha), network, 512, 28, **options).pixels


def job(folder: Path, name: str, *shape: int) -> Job:
    source = folder / "in" / name
    source.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, shape or (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(source)
    return Job(source, folder / "out" / name)


def over(pixels: np.ndarray, colour: Tuple[int, int, int]) -> np.ndarray:
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + np.array(colour) * (1 - alpha)


def neighbourhood(pixels: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The lowest and highest values of the 5x5 pixels that each upscaled pixel came from."""
    around = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), "edge")
    near = np.lib.stride_tricks.sliding_window_view(around, (5, 5), (0, 1))
    lowest, highest = (bound.repeat(2, 0).repeat(2, 1) for bound in (near.min((3, 4)), near.max((3, 4))))
    return lowest, highest


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (9, 99, 199)])
@pytest.mark.parametrize("hidden", ["as it is", "low alpha"])
def test_what_is_cut_out_looks_right_over_any_colour(
    new: TorchNetwork, hidden: str, colour: Tuple[int, int, int]
) -> None:
    disc = np.array(Image.open(CASES / "alpha_disc.png"))
    if hidden == "low alpha":  # colours of a hardly visible pixel mean as little
        disc[disc[..., 3] < 10, :3] = 0
        disc[10, 10] = (0, 0, 0, 3)
    out = upscaled(disc, new, True)
    darkest = out[out[..., 3] > 8][:, :3].min()
    assert darkest >= 250, f"a visible pixel is as dark as {darkest}"
    composite = over(disc, colour).round().astype(np.uint8)
    expected = upscaled(composite, new)
    ringless = expected.clip(*neighbourhood(composite))  # no one alpha can ring over every colour
    off = np.abs(over(out, colour) - ringless).max()
    assert off <= 4, f"{off:.1f} steps off"
    if set(colour) <= {0, 255}:  # where nothing can ring; at its border a new network darkens what is opaque
        off = np.abs(over(out, colour) - expected)[4:-4, 4:-4].max()
        assert off <= 4, f"{off:.1f} steps off"


@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 30, 90)])
def test_alpha_stays_within_that_of_its_neighbourhood(colour: Tuple[int, int, int]) -> None:
    """A hard disc of half transparency once got nearly opaque dots: networks overshoot at its rim."""
    net = load_network(ROOT / "weights" / "2x_AetherNet_small_wallpapers_fp16.safetensors", "cpu", False)
    y, x = np.mgrid[:40, :40]
    disc = np.zeros((40, 40, 4), np.uint8)
    disc[np.hypot(y - 19.5, x - 19.5) < 14] = (*colour, 128)
    out = upscaled(disc, net, True)[..., 3:].astype(int)
    lowest, highest = neighbourhood(disc[..., 3:])
    assert (out >= lowest).all()
    assert (out <= highest).all(), f"alpha {out.max()} of 128 at most"


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


def test_an_edge_of_what_is_cut_out_is_clean_through_any_network() -> None:
    net = TorchNetwork(small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().fused())
    pixels = np.full((24, 40, 4), (200, 10, 60, 255), np.uint8)
    pixels[:, :20] = 0
    out = upscaled(pixels, net, True)
    assert not out[:, :34, 3].any()
    assert (out[:, 46:, 3] == 255).all()
    assert (out[:, 36:44, :3] == (200, 10, 60)).all()
    assert (out[:, 46:, :3] != (200, 10, 60)).any(), "this network changes colours"


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
    net = TorchNetwork(small_net(2, in_chans=1, embed_dim=8, depths=(1,), lk_kernel=3).float().fused())
    colours = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    out = upscaled(colours, net)
    for channel in range(3):
        assert np.array_equal(out[..., channel], upscaled(colours[..., channel : channel + 1], net)[..., 0])


def test_a_wrapped_texture_with_holes_is_the_middle_of_its_tiling() -> None:
    options: Any = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3, "use_channel_attn": False}
    net = TorchNetwork(small_net(2, **options).float().fused())
    texture = np.array(Image.open(CASES / "tile_texture.png").convert("RGB"))
    alpha = np.where(np.roll(texture[..., :1], 7, 0) > 128, 255, 0).astype(np.uint8)
    texture = np.concatenate([texture * (alpha > 0), alpha], 2)
    out = upscaled(texture, net, True, wrap="xy").astype(int)
    many = upscaled(np.tile(texture, (3, 3, 1)), net, True)
    height, width = out.shape[:2]
    assert np.abs(out - many[height : 2 * height, width : 2 * width]).max() <= 1


def test_the_tile_is_halved_when_memory_runs_out(tmp_path: Path) -> None:
    def limit(image: Tensor) -> None:
        if image.shape[-1] > 70:
            raise MemoryError

    said: List[str] = []
    jobs = [job(tmp_path, f"{k}.png", 200, 150, 3) for k in range(3)]
    worker = Upscaler(Double(limit), 512, 3, say=said.append)
    assert not [result.problem for result in worker.run(jobs) if result.problem]
    assert worker.tile == 50
    assert said == ["Not enough memory for tiles of 512 pixels; going on with 100.",
                    "Not enough memory for tiles of 100 pixels; going on with 50."]  # fmt: skip
    out = np.array(Image.open(jobs[0].target))
    assert np.array_equal(out[::2, ::2], np.array(Image.open(jobs[0].source)))


def test_too_little_memory_for_any_tile_is_said_and_other_faults_are_raised(tmp_path: Path) -> None:
    def fail(image: Tensor) -> None:
        raise errors.pop()

    one = job(tmp_path, "a.png", 99, 99, 3)
    errors: List[Exception] = [MemoryError()] * 9
    (result,) = Upscaler(Double(fail), 512, 3, say=lambda line: None).run([one])
    assert "not enough memory" in result.problem
    errors = [RuntimeError("unsupported memory format option")]
    with pytest.raises(RuntimeError, match="memory format"):
        list(Upscaler(Double(fail), 512, 3).run([one]))
    assert not one.target.exists()


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


def test_an_interruption_ends_threads_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"{k}.png") for k in range(20)]
    before = threading.active_count()
    asked: List[int] = []
    Picture.read(jobs[0].source)  # whatever is imported late is imported: so the first picture is done first
    results = Upscaler(Double(lambda image: asked.append(1) or time.sleep(0.3)), 512, 3).run(jobs)
    next(results)
    count = len(asked)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())
    assert len(asked) <= count + 1, "pictures that had not begun were upscaled"
    assert threading.active_count() == before
    left = list((tmp_path / "out").iterdir())
    assert 1 <= len(left) <= count + 1
    assert all(Image.open(path).size == (22, 18) for path in left)
