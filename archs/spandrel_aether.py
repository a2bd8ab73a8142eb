"""AetherNet for spandrel, the library that chaiNNer and others open model files with.

    import spandrel_aether                  # this file lies beside aether_arch.py
    from spandrel import ModelLoader

    spandrel_aether.install()
    model = ModelLoader().load_from_file("2x_mine.safetensors")

Opens the training, fused, older fused, quantised and int8 forms, every option read
from the weights. Tested with spandrel 0.4.2. To put it into spandrel itself, copy it to
``architectures/AetherNet/__init__.py``, aether_arch.py to ``__arch/`` beside that, both
unchanged, and add ``AetherNetArch()`` to the main registry; install() is not needed there.

Source: https://github.com/phhofm (AetherNet by Philip Hofmann). Licence: MIT.
"""

from __future__ import annotations

from collections.abc import Sequence

from spandrel.__helpers.model_descriptor import (
    Architecture,
    ImageModelDescriptor,
    StateDict,
)
from spandrel.util import KeyCondition, store_hyperparameters

if __package__:  # inside spandrel
    from .__arch import aether_arch
else:
    import aether_arch


@store_hyperparameters()
class AetherNet(aether_arch.AetherNet):
    """AetherNet as store_hyperparameters wants it: every option by keyword.

    Fused or quantised, the object stays and its class becomes aether_arch's of that form.
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        in_chans: int = 3,
        embed_dim: int = 128,
        depths: Sequence[int] = (6, 6, 6, 6),
        mlp_ratio: float = 2.0,
        lk_kernel: int = 11,
        sk_kernel: int = 3,
        drop: float = 0.0,
        drop_path_rate: float = 0.1,
        img_range: float = 1.0,
        use_channel_attn: bool = True,
        use_spatial_attn: bool = True,
        batch_renorm: bool = False,
        bound: float | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depths=depths,
            mlp_ratio=mlp_ratio,
            lk_kernel=lk_kernel,
            sk_kernel=sk_kernel,
            drop=drop,
            drop_path_rate=drop_path_rate,
            img_range=img_range,
            use_channel_attn=use_channel_attn,
            use_spatial_attn=use_spatial_attn,
            batch_renorm=batch_renorm,
            bound=bound,
        )


class AetherNetArch(Architecture[aether_arch.AetherBase]):
    def __init__(self) -> None:
        super().__init__(
            id="AetherNet",
            detect=KeyCondition.has_any(
                # training and older fused form
                KeyCondition.has_all(
                    "conv_first.weight",
                    KeyCondition.has_any(
                        "stages.0.0.conv.lk_conv.weight",
                        "stages.0.0.conv.fused_conv.weight",
                    ),
                    "stages.0.0.norm.weight",
                    "stages.0.0.ffn.conv_gate.weight",
                    "stages.0.0.ffn.temperature",
                    "fusion_convs.0.weight",
                    "quant_fusion_layer.error_comp",
                    "conv_after_body.weight",
                    "conv_last.weight",
                ),
                # fused, quantised and int8 form
                KeyCondition.has_all(
                    "head.weight",
                    "stages.0.0.reparam_conv.weight",
                    "stages.0.0.gate_conv.weight",
                    "stages.0.0.main_conv.weight",
                    "fusion_convs.0.weight",
                    "body_conv.weight",
                    "tail.weight",
                    "tail.top_left_weight",
                ),
            ),
        )

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[aether_arch.AetherBase]:
        # Every option that matters in evaluation is detectable but one: img_range of a
        # training or older fused form. 1, assumed here, is the default of every variant.
        # Raises ValueError where the tensors aren't those of a whole AetherNet.
        options = aether_arch.aether_from_state_dict(state_dict).options
        model = AetherNet(**options)  # loading gives it the form of the state dict

        form = aether_arch.state_dict_form(list(state_dict))
        float_only = form in ("quantised", "int8")  # 8-bit rounding, done in float32

        tags = [f"{options['embed_dim']}dim", f"{sum(options['depths'])}nb", str(form)]
        variant = aether_arch.variant_name(options)
        if variant in [known.__name__ for known in aether_arch.VARIANTS]:
            tags.insert(0, variant)

        return ImageModelDescriptor(
            model,
            state_dict,
            architecture=self,
            purpose="Restoration" if options["scale"] == 1 else "SR",
            tags=tags,
            supports_half=not float_only,
            supports_bfloat16=not float_only,
            scale=options["scale"],
            input_channels=options["in_chans"],
            output_channels=options["in_chans"],
        )


def install() -> None:
    """Register AetherNet in spandrel's main registry; a second call does nothing."""
    from spandrel import MAIN_REGISTRY, ArchSupport

    MAIN_REGISTRY.add(ArchSupport.from_architecture(AetherNetArch()), ignore_duplicates=True)


__all__ = ["AetherNet", "AetherNetArch", "install"]
