"""Pictures for int8: which are taken, how they are read, and what int8 costs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_net
from PIL import Image
from skimage import data as photographs

from aethersr import calibration
from aethersr.calibration import calibrated, calibration_pairs, psnr
from aethersr.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("count", "others"), [(100, 0), (100, 300), (20, 300), (33, 0)])
def test_the_whole_folder_is_sampled_evenly(tmp_path: Path, count: int, others: int) -> None:
    (tmp_path / "inner").mkdir()
    for level in range(count):
        Image.new("L", (16, 16), level).save(tmp_path / "inner" / f"{level:03d}.png")
    for k in range(others):  # captions
        (tmp_path / f"{k:03d}.txt").write_text("a picture")
    pairs = calibration_pairs(tmp_path, tiny_net())
    levels = [round(float(high.mean()) * 255) for _, high in pairs]
    assert len(levels) == min(count, calibration.PICTURES)
    assert len(calibration_pairs(tmp_path, tiny_net(), most=5)) == 5
    steps = {after - before for before, after in zip(levels, levels[1:])}
    assert steps <= {count // len(levels), count // len(levels) + 1}
    assert count - levels[-1] <= max(steps) + 1


def test_broken_and_small_pictures_are_passed_over_and_a_folder_without_others_is_refused(
    tmp_path: Path,
) -> None:
    net = tiny_net()
    Image.new("RGB", (16, 16)).save(tmp_path / "z.png")
    content = (tmp_path / "z.png").read_bytes().replace(b"IDAT", b"\0\0\0\0")
    for k in range(calibration.PICTURES):
        (tmp_path / f"{k}.png").write_bytes(content)
    (tmp_path / "broken.ppm").write_bytes(b"P6 12 x 255\n")
    Image.new("RGB", (16, 15)).save(tmp_path / "small.png")
    Image.fromarray(np.ones((96, 96), np.float32)).save(tmp_path / "float.tif")  # of no known range
    assert len(calibration_pairs(tmp_path, net)) == 1
    (tmp_path / "z.png").unlink()
    with pytest.raises(UserError, match="has no picture of 16 pixels or more"):
        calibration_pairs(tmp_path, net)
    with pytest.raises(UserError, match=r"--pictures .* is not a folder"):
        calibration_pairs(tmp_path / "small.png", net, "--pictures")


def test_16_bits_are_not_cut_off_and_transparent_pixels_are_white(tmp_path: Path) -> None:
    grey = photographs.camera()[:96, :96].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "a16.png")
    hidden = np.dstack([photographs.coffee()[:96, :96], np.full((96, 96), 255, np.uint8)])
    hidden[:48, :, 3] = 0
    Image.fromarray(hidden).save(tmp_path / "b.png")
    (_, deep), (_, white) = calibration_pairs(tmp_path, tiny_net())
    assert np.array_equal((deep[0, 0] * 255).round().numpy(), grey // 257)
    assert bool((white[:, :, :48] == 1).all())
    assert np.array_equal((white[0, :, 48:] * 255).round().permute(1, 2, 0).numpy(), hidden[48:, :, :3])


@pytest.mark.parametrize(("scale", "channels"), [(2, 3), (3, 1)])
def test_a_pair_is_the_middle_of_a_picture_and_its_bicubic_reduction(
    tmp_path: Path, scale: int, channels: int
) -> None:
    picture = Image.fromarray(photographs.coffee())
    picture.save(tmp_path / "a.png")
    ((low, _),) = calibration_pairs(tmp_path, tiny_net(scale, in_chans=channels), side=9)
    assert low.shape == (1, channels, 9, 9)
    ((low, high),) = calibration_pairs(tmp_path, tiny_net(scale, in_chans=channels))
    side = min(calibration.SIDE, picture.height // scale)
    assert low.shape == (1, channels, side, calibration.SIDE)
    left, top = (picture.width - calibration.SIDE * scale) // 2, (picture.height - side * scale) // 2
    box = (left, top, left + calibration.SIDE * scale, top + side * scale)
    middle = picture.convert("RGB" if channels == 3 else "L").crop(box)
    small = middle.resize((calibration.SIDE, side), Image.Resampling.BICUBIC)
    for tensor, image in ((high, middle), (low, small)):
        pixels = (tensor[0].permute(1, 2, 0) * 255).round().numpy()
        assert np.array_equal(pixels, np.atleast_3d(np.asarray(image)))


def test_the_loss_is_that_of_the_file_which_is_written(tmp_path: Path) -> None:
    for name in ("coffee", "chelsea"):
        Image.fromarray(getattr(photographs, name)()[:96, :96]).save(tmp_path / f"{name}.png")
    net = tiny_net().fused()
    pairs = calibration_pairs(tmp_path, net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    wild = (torch.full_like(pairs[0][0], 3e38), pairs[0][1])
    assert "not finite on 1 of 3 images" in calibrated(net, [*pairs, wild], "onnxruntime").notes[0]
    found = calibrated(net, pairs, "onnxruntime")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items()), "changed"
    written, plain = found.net.for_target("onnxruntime"), net.float()
    gains = [psnr(written(low), high) - psnr(plain(low), high) for low, high in pairs]
    assert (found.mean, found.worst) == pytest.approx((sum(gains) / len(gains), min(gains)), abs=1e-3)
    assert calibrated(net, pairs, "onnxruntime", reduce_range=True).mean != found.mean
    black = torch.zeros(1, 1, 2, 2)  # of 8-bit pictures
    found_dB = psnr(black + 1.3 / 255, black), psnr(black + 0.3 / 255, black), psnr(black - 5, black)
    assert found_dB == pytest.approx((48.13, 99, 99), abs=0.01)
