"""AetherNet for spandrel, the library with which chaiNNer, ComfyUI and others open model files.

    import aethersr.spandrel
    from spandrel import ModelLoader

    aethersr.spandrel.install()
    model = ModelLoader().load_from_file("2x_mine.safetensors")

Opens the training, fused, older fused, quantised and int8 forms in every wrapper that aethersr.checkpoint
knows. All options are read from the weights. Tested with spandrel 0.4.2.
"""

from __future__ import annotations

from typing import Any, Mapping

from aether_arch import AetherBase
from spandrel.__helpers.model_descriptor import Architecture, ImageModelDescriptor, StateDict

from aethersr.checkpoint import unwrap
from aethersr.identify import aether_from_state_dict, form_name, variant_name


class AetherNetArch(Architecture[AetherBase]):
    def __init__(self) -> None:
        super().__init__(id="AetherNet", detect=is_aether)

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[AetherBase]:
        """Build the network of a state dict. Raises ValueError if it is not a complete AetherNet."""
        state = unwrap(state_dict).state
        model: Any = aether_from_state_dict(state)
        options, form = model.options, form_name(state)
        model.hyperparameters = dict(options)  # every network in spandrel has these
        tags = [f"{options['embed_dim']}dim", f"{sum(options['depths'])}nb", form]
        if variant_name(options).startswith("aether"):
            tags.insert(0, variant_name(options))
        half = form not in ("quantised", "int8")  # 8-bit rounding needs float32
        return ImageModelDescriptor(
            model,
            model.state_dict(),  # in the network's own form, because the descriptor loads it again
            architecture=self,
            purpose="Restoration" if options["scale"] == 1 else "SR",
            tags=tags,
            supports_half=half,
            supports_bfloat16=half,
            scale=options["scale"],
            input_channels=options["in_chans"],
            output_channels=options["in_chans"],
        )


def is_aether(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict is, or contains, an AetherNet's."""
    try:
        return bool(form_name(unwrap(state_dict).state))
    except ValueError:
        return False


def install() -> None:
    """Register AetherNet in spandrel's main registry. A second call does nothing."""
    from spandrel import MAIN_REGISTRY, ArchSupport

    MAIN_REGISTRY.add(ArchSupport.from_architecture(AetherNetArch()), ignore_duplicates=True)
