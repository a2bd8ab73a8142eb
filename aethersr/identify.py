"""Reads variant, scale and form of a network from the names and shapes in its state dict."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import re
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Tuple

import aether_arch
import aether_quant
import torch
from aether_arch import AetherBase, AetherNet, FusedAetherNet
from torch import Tensor

from aethersr.checkpoint import read_checkpoint, unwrap
from aethersr.errors import naming

OLDER_KERNEL = ".conv.fused_conv.weight"  # from older tools, which merged only the kernels
OLDER_NORM = re.compile(r"(stages\.\d+\.\d+\.)?norm\.weight")
# Tensors that only other versions have. Their networks share the other names but compute something else.
OTHER_VERSIONS = {"num_batches_tracked": "v3 or v4", "scale": "1.1.0", "scale_tensor": "3.x"}
# Options that don't decide which variant a network is.
FREE = re.compile(r"scale|in_chans|sk_kernel|drop|drop_path_rate|img_range|norm|batch_renorm|bound|qat")


def form_name(state: Mapping[str, Any]) -> str:
    """The form: "training", "fused", "older fused", "quantised" or "int8"; "" for another network."""
    if any(name.endswith(OLDER_KERNEL) for name in state):
        return "older fused"
    int8 = any(name.endswith(".reparam_conv.weight_scale") for name in state)
    known = {None: "", AetherNet: "training", FusedAetherNet: "fused"}
    return known.get(aether_arch.form_of(state), "int8" if int8 else "quantised")


def aether_from_state_dict(state_dict: Mapping[str, Any], img_range: Optional[float] = None) -> AetherBase:
    """Build the network that a state dict belongs to and load it: any form, in evaluation mode, float32.

    Options come from names and shapes, after a framework's wrappers are removed (see
    aethersr.checkpoint.unwrap). drop and drop_path_rate, which don't matter in evaluation, become 0.
    ``img_range`` is for a training form that was trained with another one than 1 and is too old to record it.

    Raises:
        ValueError: not an AetherNet of a known layout; the message says what is missing or doesn't fit.
    """
    state = unwrap(state_dict).state
    options = read_options(state)
    if form_name(state) == "older fused":
        state = older_fused_to_training(state, options["sk_kernel"])
    form: Any = aether_arch.form_of(state)
    options.update(form.options_from_names(state))
    if img_range is not None:
        if form is not AetherNet:
            raise ValueError(f"its weights hold img_range; leave --img_range {img_range:g} out.")
        if not 1e-6 <= img_range < 1e6:
            expected = "expected a number from 1e-6 to 1e6, the training option of this name"
            raise ValueError(f"--img_range {img_range:g} is not possible; {expected}.")
        if "img_range" in state and img_range != options["img_range"]:
            found = f"it was trained with img_range {options['img_range']:g}, which it records"
            raise ValueError(f"{found}; leave --img_range {img_range:g} out.")
        options["img_range"] = img_range
    # Compare shapes before allocating memory, which needs PyTorch 2.
    with torch.device("meta") if hasattr(torch.device, "__enter__") else contextlib.nullcontext():
        wrong = aether_arch.differences(form(**options), state)
    if wrong:
        raise ValueError(f"the file is {aether_arch.described(state)}, but not whole; tensors {wrong}.")
    net: AetherBase = form(**options).eval()
    net.load_state_dict(state)
    return net


def read_network(path: Any, flag: str, img_range: Optional[float] = None) -> AetherBase:
    """The network in a file, see aether_from_state_dict. UserError: there is none; it names ``flag``."""
    with naming(path, flag):
        net = aether_from_state_dict(read_checkpoint(path, flag).state, img_range)
    return net


def add_img_range(parser: argparse.ArgumentParser) -> None:
    text = "the training option of this name, if it wasn't 1 and the file is too old to record it"
    parser.add_argument("--img_range", type=float, metavar="R", help=text)


def bounded(state: Mapping[str, Tensor], bound: float) -> Dict[str, Tensor]:
    """The state dict with another bound. ValueError for quantised weights, and for fused ones that had none:
    their blocks may be rescaled, by powers that the file doesn't hold, and a bound would be with them."""
    if form_name(state) == "quantised":
        raise ValueError("it was trained with 8-bit ranges, which are bounds already; leave --bound out.")
    if form_name(state) == "fused" and "bound" not in state:
        raise ValueError("fused weights can't get a bound, a training checkpoint can.")
    return {**state, "bound": torch.tensor([bound])}


def read_options(state: Mapping[str, Tensor]) -> Dict[str, Any]:
    """Constructor options from the shapes of a state dict without wrappers. ValueError: some are missing."""
    form = form_name(state)
    if not form:
        raise ValueError(f"not an AetherNet: no tensor 'stages.0.0.conv.lk_conv.weight' among {len(state)}.")
    _refuse_other_versions(state)

    def shape(name: str) -> Tuple[int, ...]:
        if name not in state:
            raise ValueError(f"an AetherNet in {form} form, but {name!r} is missing.")
        if state[name].dim() != 4:
            raise ValueError(f"{name!r} has {state[name].dim()} dimensions, expected 4.")
        return tuple(state[name].shape)

    head, gate, kernel = "head", "gate_conv", "reparam_conv"
    if form in ("training", "older fused"):
        kernel = "conv.lk_conv" if form == "training" else "conv.fused_conv"
        head, gate = "conv_first", "ffn.conv_gate"
    embed_dim, in_chans = shape(f"{head}.weight")[:2]
    hidden, lk_kernel = shape(f"stages.0.0.{gate}.weight")[0], shape(f"stages.0.0.{kernel}.weight")[2]
    for name in filter(re.compile(r"(tail|upsample\..*)\.weight$").match, state):
        shape(name)
    scale = aether_arch.scale_of(state)
    if scale is None:
        raise ValueError(f"the upsampling tensors fit none of the scales {aether_arch.SCALES}.")
    recorded: Dict[str, Any] = {**aether_arch.RECORDED}
    for name, least in (("bound", 1e-3), ("img_range", 1e-6)):
        if name in state and (tuple(state[name].shape) != (1,) or not least <= float(state[name]) < 1e6):
            raise ValueError(f"{name!r} is not one number from {least:g} to 1e6, of shape (1,).")
        recorded[name] = float(state[name]) if name in state else recorded[name]
    exact, safe = hidden / embed_dim, (hidden + 0.5) / embed_dim
    # The shortest that gives this many channels: a ratio is cut to a whole number of them.
    ratios = (round(exact, 4), round(safe, 4), safe)
    return {
        "scale": scale,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": _depths(state),
        "mlp_ratio": next(ratio for ratio in ratios if int(embed_dim * ratio) == hidden),
        "lk_kernel": lk_kernel,
        "sk_kernel": shape("stages.0.0.conv.sk_conv.weight")[2] if form == "training" else min(3, lk_kernel),
        "use_channel_attn": "stages.0.0.channel_attn.fc.0.weight" in state,
        "use_spatial_attn": "stages.0.0.spatial_attn.conv.weight" in state,
        "drop_path_rate": 0.0,
        **recorded,
    }


def _refuse_other_versions(state: Mapping[str, Tensor]) -> None:
    aether_quant.refuse_full(state)
    for name, value in state.items():
        if 0 in value.shape:
            raise ValueError(f"tensor {name[:80]!r} holds no value; its shape is {tuple(value.shape)}.")
        *_, last = name.split(".")
        if last in OTHER_VERSIONS:
            found = f"this is the layout of AetherNet {OTHER_VERSIONS[last]} (tensor {last!r})"
            raise ValueError(f"{found}: the same names, another function.")


def _depths(state: Mapping[str, Tensor]) -> List[int]:
    """Blocks in each stage, from the names ``stages.i.j``."""
    matches = map(re.compile(r"stages\.(\d{1,4})\.(\d{1,4})\.").match, state)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    if len(state) < 8 * len(blocks):  # before creating modules for them
        raise ValueError(f"not a whole AetherNet: {len(state)} tensors for {len(blocks)} blocks.")
    found = Counter(stage for stage, _ in blocks)
    depths = [found[stage] for stage in range(len(found))]
    if blocks != {(stage, block) for stage, depth in enumerate(depths) for block in range(depth)}:
        raise ValueError(f"the blocks 'stages.i.j' have gaps: {len(blocks)} in {len(found)} stages.")
    return depths


def older_fused_to_training(state: Mapping[str, Tensor], sk_kernel: int) -> Dict[str, Tensor]:
    """An older fused form as the equivalent training form. Its norms hold scale and shift; the statistics
    beside them are stale and would normalise twice."""
    state = dict(state)
    for name in [name for name in state if name.endswith(OLDER_KERNEL)]:
        conv = name[: -len("fused_conv.weight")]
        weight, bias = state.pop(name), state.pop(conv + "fused_conv.bias", None)
        if bias is None:
            raise ValueError(f"an AetherNet in older fused form, but '{conv}fused_conv.bias' is missing.")
        state[conv + "lk_conv.weight"], state[conv + "lk_bias"] = weight, bias
        zero = weight.new_zeros(())  # expanded, it takes no memory, whatever sizes a file claims
        state[conv + "sk_conv.weight"] = zero.expand(*weight.shape[:1], 1, sk_kernel, sk_kernel)
        state[conv + "sk_bias"] = zero.expand(bias.shape)
    for name in [name for name in state if OLDER_NORM.fullmatch(name)]:
        norm = name[: -len("weight")]
        for statistic, value in (("running_mean", 0.0), ("running_var", 1 - aether_arch.DeploymentNorm.eps)):
            state[norm + statistic] = torch.tensor(value).expand(state[name].shape)
    return state


def variant_name(options: Mapping[str, Any]) -> str:
    """The variant with these options (ignoring training options), or a description of the network."""
    own = {**options, "depths": tuple(options["depths"])}
    for variant in aether_arch.VARIANTS:
        parameters = inspect.signature(variant).parameters
        if all(own[name] == parameters[name].default for name in parameters if not FREE.fullmatch(name)):
            return variant.__name__
    told = ", ".join(f"{name}={options[name]}" for name in ("embed_dim", "depths", "lk_kernel", "mlp_ratio"))
    return f"a network of its own ({told})"
