"""aethersr.network opens weights, ONNX and NCNN files as one kind of function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, small_net

from aethersr.errors import UserError
from aethersr.network import load_network
from aethersr.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(2, 3, 9, 13, generator=torch.Generator().manual_seed(1))


def test_weights_of_another_img_range_are_opened_without_its_record(tmp_path: Path) -> None:
    net = small_net(2, embed_dim=8, depths=(1,), lk_kernel=3, img_range=255.0).float()
    older = {name: value for name, value in net.state_dict().items() if name != "img_range"}
    torch.save(older, tmp_path / "old.pth")
    found = load_network(tmp_path / "old.pth", "cpu", img_range=255.0)
    torch.testing.assert_close(found(X), net.fused()(X))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.onnx", {}, "is a git-lfs pointer, not the file itself; git lfs pull"),
        ("a.param", {}, "is a git-lfs pointer"),
        ("no.onnx", {}, "no.onnx does not exist; pass another (FILE)"),
        ("a.onnx", {"img_range": 255.0}, "--img_range can't change"),
        ("a.param", {"fp16": True}, "--fp16 can't change"),
    ],
)
def test_what_is_no_network_is_named_with_the_option(
    name: str, options: Any, words: str, tmp_path: Path
) -> None:
    for ending in ("onnx", "param"):
        (tmp_path / f"a.{ending}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(UserError) as error:
        load_network(tmp_path / name, "cpu", flag="FILE", **options)
    assert words in str(error.value)
    assert "FILE" in str(error.value)


def test_an_onnx_file_sees_as_far_as_its_weights(tmp_path: Path) -> None:
    net = small_net(2, embed_dim=8, depths=(1, 1), lk_kernel=5).float()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    export_onnx(net, 2, "fp32", str(tmp_path / "a.onnx"))
    found, like = (load_network(tmp_path / name, "cpu").reach for name in ("a.onnx", "a.pth"))
    assert like <= found <= like + 4, "less leaves seams between tiles"


def test_int8_weights_stay_and_onnx_of_one_size_takes_float32_picture_by_picture(tmp_path: Path) -> None:
    net = small_net(2, embed_dim=8, depths=(1,), lk_kernel=3).float().fused()
    torch.save(net.fused().prepare_qat().convert_to_quantized().state_dict(), tmp_path / "int8.pth")
    assert load_network(tmp_path / "int8.pth", "cpu").net.is_int8  # type: ignore[union-attr]
    with pytest.raises(UserError, match="--fp16 can't change"):
        load_network(tmp_path / "int8.pth", "cpu", fp16=True)
    export_onnx(net, 2, "fp16", str(tmp_path / "a.onnx"), static=(3, *X.shape[2:]))
    found = load_network(tmp_path / "a.onnx", "cpu")
    assert (found.size, found(X).dtype, found(X).shape) == (X.shape[2:], X.dtype, (2, 3, 18, 26))


def test_an_ncnn_file_is_a_network_like_others(tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    pytest.importorskip("pnnx")
    from aethersr.ncnn import convert

    net = small_net(2, embed_dim=8, depths=(1,), lk_kernel=5).float().fused()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    path = tmp_path / "a.param"
    for file, content in zip((path, path.with_suffix(".bin")), convert(net)):
        file.write_bytes(content)
    found, like = load_network(path), load_network(tmp_path / "a.pth", "cpu")
    assert (found.in_chans, found.scale, found.size) == (3, 2, None)
    assert like.reach <= found.reach <= like.reach + 20
    expected = like(X)
    assert float((found(X) - expected).abs().max()) <= max(1.0, float(expected.abs().max())) / 255


@pytest.mark.parametrize("path", sorted(ROOT.glob("weights/*_fp16.safetensors")), ids=lambda path: path.name)
def test_a_shipped_network_keeps_a_hard_disc_of_half_brightness_below_160(path: Path) -> None:
    x = torch.arange(48) - 23.5
    disc = 0.5 * (x.square() + x[:, None].square() < 100)
    assert load_network(path, "cpu")(disc.expand(1, 3, -1, -1)).max() <= 160 / 255
