"""What ``--run`` of equal_budget.py says: a network, and how it is trained."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("archs", "demo", "training"))]
import aether_arch  # noqa: E402
from kept import training_form  # noqa: E402

from aethersr.errors import UserError, first_line  # noqa: E402

OURS = ("aether_small", "aether_medium", "aether_large", "AetherNet")
DEFAULTS: Dict[str, Any] = {
    "rate": 1e-3,
    "optimizer": "AdamW",
    "batch": 8,
    "patch": 32,
    "loss": "charbonnier",
    "skip": 0,
}
START = ("start", "freeze_at", "pretrained")  # of AetherNet
BASES = "precondition_frequency"  # of SOAP


def charbonnier(out: Tensor, target: Tensor) -> Tensor:
    return ((out - target).square() + 1e-12).sqrt().mean()


LOSSES: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {"charbonnier": charbonnier, "mse": F.mse_loss}


def positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


VALUES: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "rate": (lambda value: isinstance(value, (int, float)) and value > 0, "a number above 0"),
    "batch": (positive, "1 or more"),
    "patch": (positive, "1 or more"),
    "loss": (lambda value: value in list(LOSSES), " or ".join(LOSSES)),
    "skip": (lambda value: value in (0, 1), "0 or 1"),
    "start": (lambda value: value in ("plain", "quiet"), "plain or quiet"),
    "freeze_at": (positive, "1 or more"),
    "pretrained": (lambda value: Path(str(value)).is_file(), "a file"),
    BASES: (positive, "1 or more"),
}


class Run(NamedTuple):
    text: str
    network: str
    training: Dict[str, Any]
    options: Dict[str, Any]


def parse_run(text: str, base: Optional[str] = None) -> Run:
    whole = base + text[len("base") :] if base and text.split(",")[0] == "base" else text
    network, *pairs = re.split(r",(?![^()]*\))", whole)  # not inside (2, 2)
    training, options = dict(DEFAULTS), {}  # type: Dict[str, Any], Dict[str, Any]
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{text!r}: expected NAME,OPTION=VALUE,..., not {pair!r} (--run).")
        with contextlib.suppress(SyntaxError, ValueError):  # a word stays one
            value = ast.literal_eval(value)
        accepts, what = VALUES.get(name, (lambda value: True, ""))
        if not accepts(value):
            raise UserError(f"{text!r}: {name} is {value!r}; expected {what} (--run).")
        if name in START and network not in OURS:
            raise UserError(f"{text!r}: {name} is for AetherNet alone; leave it out (--run).")
        (training if name in DEFAULTS or name in (*START, BASES) else options)[name] = value
    if BASES in training and training["optimizer"] != "SOAP":
        raise UserError(f"{text!r}: {BASES} is for SOAP alone; leave it out (--run).")
    return Run(text, network, training, options)


class WithSkip(nn.Module):
    def __init__(self, net: nn.Module, scale: int) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + F.interpolate(x, scale_factor=self.scale, mode="bicubic")


def made(run: Run, network: Callable[..., nn.Module], scale: int) -> nn.Module:
    try:
        return network(scale=scale, **run.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.text!r}: {first_line(error)} (--run)") from None


def build(run: Run, scale: int, checkout: Optional[Path]) -> nn.Module:
    if run.network in OURS:
        net = made(run, getattr(aether_arch, run.network), scale)
        blocks = [module for module in net.modules() if isinstance(module, aether_arch.AetherBlock)]
        if run.training.get("start") == "plain":
            restart([conv for conv in net.modules() if isinstance(conv, nn.Conv2d)])
        if run.training.get("start") == "quiet":
            inside = [
                (block.conv.lk_conv, block.conv.sk_conv, block.ffn.conv_gate, block.ffn.conv_main)
                for block in blocks
            ]
            restart([conv for convs in inside for conv in convs])
            nn.init.trunc_normal_(net.conv_first.weight[net.conv_first.in_channels :], std=0.02)
            for block in blocks:
                nn.init.constant_(block.norm.weight, 0.25)
        if "pretrained" in run.training:
            state = training_form(Path(run.training["pretrained"]), "--run")
            try:
                net.load_state_dict(state)
            except RuntimeError as error:  # other options than the file's
                raise UserError(f"{run.text!r}: {first_line(error)} (--run)") from None
    else:
        if checkout is None:
            raise UserError(f"{run.network} needs a checkout of traiNNer-redux (--traiNNer-redux).")
        net = made(run, registered(run.network, checkout), scale)
    return WithSkip(net, scale) if run.training["skip"] else net


def restart(convs: List[nn.Conv2d]) -> None:
    for conv in convs:
        nn.init.trunc_normal_(conv.weight, std=0.02)


def registered(name: str, checkout: Path) -> Callable[..., nn.Module]:
    from basicsr_train import import_torchvision

    import_torchvision()
    sys.path.insert(0, str(checkout))
    import traiNNer.archs  # noqa: F401
    from traiNNer.utils import registry

    for found in (registry.SPANDREL_REGISTRY, registry.ARCH_REGISTRY):
        if name in found:
            return found.get(name)  # type: ignore[no-any-return]
    raise UserError(f"{checkout} has no network {name}; pass one of its names (--run).")
