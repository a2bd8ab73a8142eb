"""aethersr/quality.py: the figures are those of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from aethersr.quality import crop_to_multiple, luma, psnr, quality, resize, resize_matrix


def test_a_reduction_is_that_of_matlab() -> None:
    # imresize(uint8(reshape(0:35, 6, 6)' * 7), 0.5), worked out by hand from Keys' kernel of width 8.
    picture = np.repeat((np.arange(36).reshape(6, 6) * 7).astype(np.uint8)[..., None], 3, 2)
    weights = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    assert np.allclose(resize_matrix(16, 8)[3, 3:11], weights)
    rows = np.zeros((3, 6))
    for k in range(3):
        for offset, weight in enumerate(weights):
            index = 2 * k - 3 + offset
            rows[k, -1 - index if index < 0 else 11 - index if index > 5 else index] += weight
    expected = np.floor(rows @ picture[..., 0].astype(float) @ rows.T + 0.5)
    assert np.array_equal(resize(picture, 3, 3)[..., 0], expected)


@pytest.mark.parametrize(("size", "target"), [(7, 7), (12, 4), (4, 12), (5, 9), (3, 1), (1, 8)])
def test_a_flat_picture_keeps_its_values_and_an_edge_does_not_wrap_round(size: int, target: int) -> None:
    assert (resize(np.full((size, 5, 3), 200, np.uint8), target, 5) == 200).all()
    edge = np.repeat(np.array([0, 255], np.uint8), size)[:, None, None].repeat(3, 2)
    found = resize(edge, 4 * size, 1)
    assert found[: 2 * size - 1].max(initial=0) < 128 < found[2 * size + 1 :].min(initial=255)


def test_luma_is_that_of_bt_601_and_not_rounded() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert np.allclose(luma(colours), [[16, 235, 81.481, 144.553, 40.966]])


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    truth = data.astronaut()[:200, 100:331]
    output = resize(resize(crop_to_multiple(truth, 2), 100, 115), 200, 230)
    truth = crop_to_multiple(truth, 2)
    assert truth.shape == output.shape == (200, 230, 3)
    a, b = luma(truth)[2:-2, 2:-2], luma(output)[2:-2, 2:-2]
    decibels, likeness = quality(truth, output, 2)
    assert decibels == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert likeness == pytest.approx(structural_similarity(a, b, **settings), abs=1e-9)


def test_the_border_does_not_count_and_sizes_that_cannot_be_compared_are_named() -> None:
    truth = data.astronaut()[:64, :64]
    output = np.pad(truth[3:-3, 3:-3], ((3, 3), (3, 3), (0, 0)))
    assert quality(truth, output, 3) == (float("inf"), pytest.approx(1))
    assert np.isfinite(psnr(truth, output, 2))
    with pytest.raises(ValueError, match="30x20 can't be compared with one of 20x30"):
        quality(truth[:30, :20], truth[:20, :30], 2)
    with pytest.raises(ValueError, match="14x20 is too small to compare; both sides need 15 pixels"):
        quality(truth[:20, :14], truth[:20, :14], 2)
    assert quality(truth[:20, :15], truth[:20, :15], 2) == (float("inf"), 1.0)
