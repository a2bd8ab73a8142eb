from functools import partial
from typing import Any

from spandrel.architectures.AetherNet import AetherNet, AetherNetArch

from .util import (
    ModelFile,
    TestImage,
    assert_image_inference,
    assert_loads_correctly,
    assert_size_requirements,
    disallowed_props,
)

URL = "@URL@"
SMALL: dict[str, Any] = {"embed_dim": 16, "depths": [1], "scale": 2}
# No tensor holds these, and none of them changes what a loaded network computes.
NOT_IN_WEIGHTS = {"drop", "drop_path_rate", "norm"}


def small(**options: Any) -> AetherNet:
    return AetherNet(**{**SMALL, **options}).eval()


def test_load():
    plain = {"use_channel_attn": False, "use_spatial_attn": False}
    assert_loads_correctly(
        AetherNetArch(),
        lambda: AetherNet(),
        lambda: AetherNet(embed_dim=96, depths=(4, 4, 4, 4), **plain),
        *[partial(small, scale=scale) for scale in (1, 3, 4, 8)],
        *[partial(small, in_chans=channels) for channels in (1, 4)],
        *[partial(small, **{name: False}) for name in plain],
        partial(small, embed_dim=24, depths=[1, 3, 2], mlp_ratio=1.5),
        partial(small, lk_kernel=17, sk_kernel=5, bound=4.0, img_range=255.0),
        ignore_parameters=NOT_IN_WEIGHTS,
    )


def test_load_other_forms():
    assert_loads_correctly(
        AetherNetArch(),
        lambda: small(scale=1, in_chans=1).fused(),
        lambda: small(scale=3, use_channel_attn=False).fused(),
        lambda: small(scale=4, lk_kernel=17, bound=4.0).fused(),
        lambda: small().prepare_qat(),
        lambda: small().prepare_qat().convert_to_quantized(),
        ignore_parameters=NOT_IN_WEIGHTS | {"sk_kernel"},
    )


def test_size_requirements():
    assert_size_requirements(ModelFile.from_url(URL).load_model())


def test_aether_small(snapshot):
    file = ModelFile.from_url(URL)
    model = file.load_model()
    assert model == snapshot(exclude=disallowed_props)
    assert_image_inference(file, model, [TestImage.SR_16, TestImage.SR_32, TestImage.SR_64])
