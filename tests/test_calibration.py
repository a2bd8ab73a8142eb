"""Pictures for int8: which are taken, how deep ones are read, and what int8 costs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
from conftest import small_net
from PIL import Image
from skimage import data as photographs

from aethersr import calibration
from aethersr.calibration import calibrated, calibration_pairs, psnr
from aethersr.errors import UserError

SMALL: Dict[str, Any] = {
    "embed_dim": 16,
    "depths": (1, 1),
    "use_channel_attn": False,
    "use_spatial_attn": False,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("coffee", "chelsea"):
        Image.fromarray(getattr(photographs, name)()[:96, :96]).save(folder / f"{name}.png")
    return folder


def test_pictures_that_are_broken_are_passed_over_and_16_bits_are_not_cut_off(pictures: Path) -> None:
    net = small_net(2, **SMALL).float()
    before = calibration_pairs(pictures, net)
    content = bytearray((pictures / "coffee.png").read_bytes())
    at = content.index(b"IDAT")
    content[at : at + 4] = b"\0\0\0\0"
    (pictures / "broken.png").write_bytes(content)
    (pictures / "broken.ppm").write_bytes(b"P6 12 x 255\n")
    (pictures / "notes.txt").write_text("no picture")
    assert len(calibration_pairs(pictures, net)) == len(before) == 2
    Image.fromarray(np.ones((96, 96), np.float32)).save(pictures / "float.tif")
    assert len(calibration_pairs(pictures, net)) == 2
    grey = photographs.camera()[:96, :96].astype(np.uint16) * 257
    Image.fromarray(grey).save(pictures / "a16.png")
    (_, picture), *_ = calibration_pairs(pictures, net)
    assert np.array_equal((picture[0, 0] * 255).round().numpy(), grey // 257)


@pytest.mark.parametrize(("scale", "channels"), [(2, 3), (3, 1), (4, 3)])
def test_a_pair_is_the_middle_of_a_picture_and_its_bicubic_reduction(
    tmp_path: Path, scale: int, channels: int
) -> None:
    picture = Image.fromarray(photographs.coffee())
    picture.save(tmp_path / "a.png")
    net = small_net(scale, in_chans=channels, **SMALL)
    ((low, high),) = calibration_pairs(tmp_path, net)
    side = min(calibration.SIDE, picture.height // scale)
    assert low.shape == (1, channels, side, calibration.SIDE)
    assert high.shape == (1, channels, side * scale, calibration.SIDE * scale)
    left, top = (picture.width - calibration.SIDE * scale) // 2, (picture.height - side * scale) // 2
    middle = picture.convert("RGB" if channels == 3 else "L").crop(
        (left, top, left + high.shape[3], top + high.shape[2])
    )
    for tensor, image in (
        (high, middle),
        (low, middle.resize((low.shape[3], low.shape[2]), Image.Resampling.BICUBIC)),
    ):
        assert np.array_equal(
            (tensor[0].permute(1, 2, 0) * 255).round().numpy(), np.atleast_3d(np.asarray(image))
        )


def test_folders_without_a_picture_that_is_large_enough_are_refused(tmp_path: Path) -> None:
    net = small_net(2, **SMALL)
    Image.new("RGB", (16, 15)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="holds no picture of 16 pixels or more"):
        calibration_pairs(tmp_path, net)
    Image.new("RGB", (16, 16)).save(tmp_path / "large_enough.png")
    assert len(calibration_pairs(tmp_path, net)) == 1
    with pytest.raises(UserError, match=r"--pictures .* is not a folder"):
        calibration_pairs(tmp_path / "small.png", net, "--pictures")


def test_no_more_pictures_are_taken_than_are_needed(tmp_path: Path) -> None:
    for k in range(calibration.PICTURES + 2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{k:02d}.png")
    assert len(calibration_pairs(tmp_path, small_net(2, **SMALL))) == calibration.PICTURES


def test_the_loss_is_that_of_the_file_which_is_written(pictures: Path) -> None:
    net = small_net(2, **SMALL).fused()
    pairs = calibration_pairs(pictures, net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = calibrated(net, "default", pairs, "onnxruntime")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items()), (
        "the network was changed"
    )
    assert found.net.is_int8
    plain = net.float()
    gains = [
        psnr(found.net.for_target("onnxruntime")(low), high) - psnr(plain(low), high) for low, high in pairs
    ]
    assert found.mean == pytest.approx(sum(gains) / len(gains), abs=1e-3)
    assert found.worst == pytest.approx(min(gains), abs=1e-3)
    assert calibrated(net, "default", pairs, "onnxruntime", reduce_range=True).mean != found.mean


def test_what_calibration_warns_of_is_a_note(pictures: Path) -> None:
    net = small_net(2, **SMALL).fused()
    pairs = calibration_pairs(pictures, net)
    wild = (torch.full_like(pairs[0][0], 3e38), pairs[0][1])
    assert (
        "values are not finite on 1 of 3 images"
        in calibrated(net, "default", [*pairs, wild], "onnxruntime").notes[0]
    )


def test_psnr_is_of_8_bit_pictures() -> None:
    truth = torch.rand(1, 3, 8, 8)
    assert psnr(truth, truth) == 99.0
    assert psnr(truth + 0.3 / 255 - truth % (1 / 255), truth - truth % (1 / 255)) == 99.0
    black = torch.zeros(1, 1, 2, 2)
    assert psnr(black + 1 / 255, black) == pytest.approx(48.13, abs=0.01)
    assert psnr(black - 5, black) == 99.0
