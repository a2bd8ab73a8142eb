"""What the benchmarks compare: AetherNet in its forms, and other networks as published, built by spandrel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs"), str(ROOT / "demo")]
import aether_arch  # noqa: E402
import aether_quant  # noqa: E402, F401
from aether_arch import AetherNet  # noqa: E402
from published import kernels_merged, two_branches  # noqa: E402

FORMS = {"unfused": two_branches, "kernels merged": kernels_merged, "fused": AetherNet.fused}
Builder = Callable[[int], nn.Module]  # of a scale


def aether(variant: str, form: str, scale: int) -> nn.Module:
    net = getattr(aether_arch, variant)(scale=scale).eval()
    for name, value in net.state_dict().items():
        # As after training: ONNX Runtime drops a new network's multiplications by one.
        if name.endswith("temperature") or "norm." in name:
            value.uniform_(0.5, 1.5)
    return FORMS[form](net).eval()


def peers() -> Dict[str, Builder]:
    """Other networks by name. Empty without spandrel."""
    try:
        from basicsr_train import import_torchvision

        import_torchvision()
        from spandrel.architectures.Compact import Compact
        from spandrel.architectures.DAT import DAT
        from spandrel.architectures.ESRGAN import ESRGAN
        from spandrel.architectures.MoSR import MoSR
        from spandrel.architectures.OmniSR import OmniSR
        from spandrel.architectures.PLKSR import PLKSR, RealPLKSR
        from spandrel.architectures.SAFMN import SAFMN
        from spandrel.architectures.SPAN import SPAN
        from spandrel.architectures.SwinIR import SwinIR
    except ImportError as error:
        print(f"without peers: {error}; pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return {}
    swin: Dict[str, Any] = {"depths": [6] * 4, "embed_dim": 60, "num_heads": [6] * 4, "mlp_ratio": 2}
    swin.update(window_size=8, upsampler="pixelshuffledirect")
    dat: Dict[str, Any] = {"embed_dim": 60, "depth": [18], "num_heads": [6], "expansion_factor": 2}
    dat.update(split_size=[8, 32], resi_connection="3conv", upsampler="pixelshuffledirect")
    tiny: Dict[str, Any] = {"n_blocks": 12, "kernel_size": 13, "ccm_type": "DCCM", "use_ea": False}
    return {
        "Compact": lambda s: Compact(num_feat=64, num_conv=16, upscale=s),
        "SPAN": lambda s: merged(SPAN(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=s)),
        "SAFMN": lambda s: SAFMN(dim=36, n_blocks=8, upscaling_factor=s),
        "OmniSR": lambda s: OmniSR(num_feat=64, res_num=5, block_num=1, window_size=8, up_scale=s),
        "SwinIR-S": lambda s: SwinIR(upscale=s, **swin),
        "DAT light": lambda s: DAT(upscale=s, **dat),
        "PLKSR tiny": lambda s: PLKSR(upscaling_factor=s, **tiny),
        "RealPLKSR": lambda s: RealPLKSR(upscaling_factor=s),
        "MoSR": lambda s: MoSR(upscale=s),
        "ESRGAN lite": lambda s: ESRGAN(num_filters=32, num_blocks=12, scale=s),
    }


def merged(span: Any) -> Any:
    """SPAN with its branches merged once; spandrel merges them in every pass."""
    for module in span.eval().modules():
        if hasattr(module, "update_params"):
            module.update_params()
            module.update_params = lambda: None
    return span


def networks(words: Sequence[str], quick: bool) -> Dict[str, Builder]:
    """Those whose names contain one of the words (no words: all); with ``quick``, few and fast ones."""
    found: Dict[str, Builder] = {}
    for variant in ("aether_small", "aether_medium", "aether_large"):
        for form in FORMS:
            found[f"{variant} {form}"] = lambda scale, v=variant, f=form: aether(v, f, scale)  # type: ignore[misc]
    found.update(peers())
    if quick:
        few = ("aether_small", "Compact", "SPAN", "PLKSR", "SAFMN")
        found = {name: build for name, build in found.items() if name.split()[0] in few}
    chosen = [name for name in found if not words or any(word.lower() in name.lower() for word in words)]
    return {name: found[name] for name in chosen}
