"""Turn a training checkpoint of AetherNet into fused release weights.

    python fuse_aether.py --model_path net_g_latest.pth --output_path 2x_MyModel_fused.safetensors

Reads what neosr, traiNNer-redux and BasicSR write (.pth or .safetensors, EMA weights preferred), fuses in float64, writes float32, reads the
written file back and compares it with the unfused network. Needs torch alone; safetensors only where such a file is named.

With ``--onnx fp32,fp16,int8`` ONNX files are written beside the weights (needs onnx, onnxruntime and onnxslim). int8 comes from a checkpoint of
quantisation-aware training, or from any other with ``--calibration FOLDER`` (pictures as large as the network's output; needs Pillow). With
these two --model_path may be fused weights too.

What half precision could not hold is rescaled inside the network, exactly. ``--check-fp16`` prints every layer's headroom, and fp16 and bf16
against fp32; alone, without --output_path, it writes nothing and takes fused weights too:

    python fuse_aether.py --model_path 2x_MyModel_fused.safetensors --check-fp16

Version 0.1.0. Source: https://github.com/phhofm (AetherNet by Philip Hofmann). Licence: MIT.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import io
import json
import math
import os
import pickletools
import re
import signal
import statistics
import sys
import threading
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent
for folder in (ROOT / "archs", ROOT):  # in the repository, or copied beside aether_arch.py
    if (folder / "aether_arch.py").is_file():
        sys.path.insert(0, str(folder))
        break
else:
    sys.exit(f"fuse_aether.py: error: aether_arch.py is missing; it belongs into {ROOT / 'archs'} or beside this script.")

from aether_arch import (  # noqa: E402
    OPSETS,
    PLACEMENTS,
    TARGETS,
    VARIANTS,
    AetherBase,
    ChannelAttention,
    FusedAetherBlock,
    FusedAetherNet,
    QuantAetherNet,
    SpatialAttention,
    __version__,
    aether_from_state_dict,
    export_onnx,
    state_dict_form,
    strip_prefixes,
    variant_name,
)

ALLOWED_DIFFERENCE = 1e-3  # of one step of 1/255
ENDINGS = (".pth", ".safetensors")
GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")  # a state dict's
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISIONS = ("fp32", "fp16", "int8")
LARGEST_STATIC = 16384  # pixels a side of a picture
CALIBRATION_PICTURES, CALIBRATION_SIDE = 32, 128  # pictures at most, and low-resolution pixels of the middle of each
HALF_MAX = torch.finfo(torch.float16).max
SPARE_BITS = 3  # headroom below which is rescaled: a picture may drive a layer further than the hard ones do
TINY = 2.0**-10  # where the largest value is below, most of the others are below fp16's smallest normal number
RUNAWAY = 10.0  # times as large an output as for most pictures
PARAM_KEYS = ("params_ema", "params-ema", "params", "state_dict")  # in order of preference


class UserError(Exception):
    """Something that the user can mend; the message says how."""


# --------------------------------------------------------------------------------------------------------------- reading


def read_state(path: Path) -> Tuple[Dict[str, Tensor], str]:
    """The network's tensors in a checkpoint and a line that says which weights they are. Runs no code from the file."""
    if not os.path.exists(path):  # not path.exists(): before Python 3.14 that raises for a name that is too long
        raise UserError(f"{path} does not exist; pass the checkpoint with --model_path.")
    if not path.is_file():
        raise UserError(f"{path} is not a file; pass one checkpoint with --model_path.")
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}; expected a checkpoint that ends in .pth or .safetensors (--model_path).")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; expected a checkpoint, so copy it again (--model_path).")
    content = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pth(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a state dict; pass a network's checkpoint (--model_path).")
    nested: Dict[str, Mapping[Any, Any]] = {key: content[key] for key in PARAM_KEYS if isinstance(content.get(key), Mapping)}
    if not nested:
        return _checked(path, content), "the only ones in the file"
    key, weights = next(iter(nested.items()))
    state = _checked(path, weights)
    if key not in ("params_ema", "params-ema"):
        return state, f"{key!r}, not averaged"
    chosen = f"the averaged ones, {key!r}"
    online = _checked(path, nested.get("params", {}))
    if _never_updated(state) and online and not _never_updated(online):
        state.update({name: value for name, value in online.items() if _is_statistic(name)})
        chosen += "; their norm statistics were never updated, so those are the online ones of 'params'"
    return state, chosen


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path} needs the package {error.name}: pip install {error.name}, or pass a .pth file (--model_path).") from None
    try:
        return load_file(str(path))
    except Exception as error:
        raise UserError(f"{path} is not a whole .safetensors file ({first_line(error)}); copy it again or pass another (--model_path).") from None


def _read_pth(path: Path) -> Any:
    try:
        with path.open("rb") as file:  # at once, so that what was looked at is what is loaded
            content = io.BytesIO(file.read())
        _check_pickles(path, content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(content, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Not PyTorch's own words: they speak of its inside, and advise to let the code run.
        reason = error.strerror if isinstance(error, OSError) else "it is damaged, or something else"
        raise UserError(f"{path} is not a readable checkpoint: {reason}; copy it again or pass another (--model_path).") from None


def _check_pickles(path: Path, content: io.BytesIO) -> None:
    """Refuse what is no plain state dict before PyTorch sees it.

    Without running code, PyTorch still makes what a pickle asks for: bytearray(2**40), a text encoded over and over, a set for every byte.
    """
    streams = [content] * 5  # before PyTorch 1.6: five pickles, one after another, then the raw weights
    if zipfile.is_zipfile(content):
        with zipfile.ZipFile(content) as archive:  # PyTorch stores, it does not compress: more inside than outside is no checkpoint
            entries = archive.infolist()
            if sum(max(entry.file_size, entry.compress_size) for entry in entries) > len(content.getbuffer()):
                raise UserError(f"{path} is a compressed archive, expected a checkpoint as torch.save writes it (--model_path).")
            streams = [io.BytesIO(archive.read(entry)) for entry in entries if entry.filename.endswith(".pkl")]
    content.seek(0)
    for stream in streams:
        begin = stream.tell()
        for opcode, argument, position in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EMPTY_SET") and not GLOBALS.fullmatch(str(argument)):
                raise UserError(f"{path} is not a readable checkpoint: it asks to run code on loading ({str(argument)[:40]!r}), which is refused; "
                                "pass another (--model_path).")  # fmt: skip
            if (position or 0) - begin > 2**20:
                raise UserError(f"{path} is not a readable checkpoint: it holds more than weights; pass another (--model_path).")
    content.seek(0)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _checked(path: Path, content: Mapping[Any, Any]) -> Dict[str, Tensor]:
    """The state dict without wrappers' prefixes, after a look at every tensor."""
    size = path.stat().st_size
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: entry {str(name)[:80]!r} is a {type(value).__name__}, expected a state dict of tensors (--model_path).")
        stored = value.dtype == torch.int8 and f"{name}_scale" in content  # a weight of the int8 form
        if value.layout != torch.strided or not (stored or value.dtype in DTYPES) or value.is_nested or value.device.type != "cpu":
            kind = f"{value.dtype} {'nested' if value.is_nested else value.layout} on {value.device}"
            raise UserError(f"{path}: tensor {name[:80]!r} is {kind}, expected dense floating-point weights (--model_path).")
        size -= value.numel() * value.element_size()
        if size < 0:
            raise UserError(f"{path}: the tensors claim more than the file holds, expected a plain checkpoint (--model_path).")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: tensor {name[:80]!r} holds NaN or Inf; training has diverged, so pass an earlier checkpoint (--model_path).")
    return strip_prefixes(content)


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))


def _never_updated(state: Mapping[str, Tensor]) -> bool:
    statistics_ = {name: value for name, value in state.items() if _is_statistic(name)}
    return bool(statistics_) and all(bool((value == float(name.endswith("var"))).all()) for name, value in statistics_.items())


def build(path: Path, state: Mapping[str, Tensor], args: argparse.Namespace) -> AetherBase:
    """The unfused network in float64, after the checks that it is what the user says it is."""
    form = state_dict_form(list(state))
    if form == "int8":
        raise UserError(f"{path} holds int8 weights already, expected a training checkpoint; export it, or pass another (--model_path).")
    nothing_to_do = args.output_path and args.bound is None and not (args.onnx or args.int8)
    if (form == "fused" and nothing_to_do) or (form == "older fused" and not args.accept_older_fused):
        remedy = "it can be used as it is, and --onnx exports it" if form == "fused" else "pass --accept_older_fused to bake the rest of it"
        raise UserError(f"{path} is fused already ({form} form), expected a training checkpoint; {remedy}, or pass another (--model_path).")
    if args.bound is not None:
        if form == "quantised":
            raise UserError(f"{path} was trained with 8-bit ranges, which are bounds already; leave --bound out.")
        state = {**state, "bound": torch.tensor([args.bound])}
    try:
        net = aether_from_state_dict(state, img_range=args.img_range)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass a training checkpoint of AetherNet (--model_path).") from None
    name = variant_name(net.options)
    if args.model_type and args.model_type != name:
        raise UserError(f"{path} holds {name}, but --model_type {args.model_type} was given; pass --model_type {name} or leave it out."
                        if name.startswith("aether") else
                        f"{path} holds {name}, but --model_type {args.model_type} was given; leave --model_type out.")  # fmt: skip
    if args.upscale and args.upscale != net.scale:
        raise UserError(f"{path} holds a x{net.scale} network, but --upscale {args.upscale} was given; pass --upscale {net.scale} or leave it out.")
    negative = [key for key, value in state.items() if key.endswith("running_var") and bool((value < 0).any())]
    if negative:
        raise UserError(f"{path}: tensor {negative[0]!r} holds a negative variance; the file is damaged, so pass another (--model_path).")
    return net.double()


# --------------------------------------------------------------------------------------------------------------- writing


def write_state(state: Mapping[str, Tensor], path: Path, metadata: Dict[str, str]) -> None:
    """Flat state dict to .pth or .safetensors by the ending of ``path`` (".part" aside)."""
    state = OrderedDict((name, value.detach().float().cpu().clone().contiguous()) for name, value in state.items())
    if path.name.endswith(".safetensors"):
        from safetensors.torch import save

        content = save(state, metadata)
        size = int.from_bytes(content[:8], "little")  # of the header, whose metadata the library writes in an order of chance
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(size) + content[8 + size :]
    else:  # to memory first: to a path, torch.save writes that path's name into the file, and a full disk is no OSError
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_output(path: Path, source: Path, overwrite: bool) -> None:
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}; expected .pth or .safetensors (--output_path).")
    if path.suffix.lower() == ".safetensors":
        try:
            import safetensors.torch  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path} needs the package {error.name}: pip install {error.name}, or write a .pth file (--output_path).") from None
    if not os.path.isdir(path.parent):
        raise UserError(f"the folder {path.parent} does not exist; make it or pass another --output_path.")
    exists = os.path.lexists(path)  # not path.exists(): a link to nothing is something too
    if os.path.exists(path) and os.path.samefile(path, source):
        raise UserError(f"{path} is the input itself, which is never overwritten; pass another --output_path.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, expected a file name; pass another --output_path.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a pipe or a device, expected a file name; pass another --output_path.")
    if exists and not overwrite:
        raise UserError(f"{path} exists; pass --overwrite to replace it, or another --output_path.")


# ------------------------------------------------------------------------------------------------- verifying and measuring


def read_back(part: Path, source: Path) -> Mapping[str, Tensor]:
    """The fused weights as they were written."""
    try:
        return read_state(part)[0]
    except UserError:
        raise UserError(f"{source}: the fused weights are not finite in float32, these are too extreme. "
                        f"Nothing was written; pass another checkpoint (--model_path).") from None  # fmt: skip


@torch.no_grad()
def largest_difference(unfused: AetherBase, fused: AetherBase, device: str) -> float:
    """Largest difference of two networks in float64, in steps of 1/255 (of the largest output, where that is above 1)."""
    chans = unfused.options["in_chans"]
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, chans, height, width, generator=generator, dtype=torch.float64) for height, width in ((1, 1), (3, 2), (17, 31), (25, 12))]
    images.append((torch.linspace(0, 1, 21).view(-1, 1) * torch.linspace(0, 1, 19)).double().expand(1, chans, 21, 19))
    unfused, fused = unfused.double().eval().to(device), fused.double().eval().to(device)
    worst = 0.0
    for image in images:
        expected, output = unfused(image.to(device)), fused(image.to(device))
        difference = float((output - expected).abs().max()) / max(1.0, float(expected.abs().max()))
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference * 255)
    return worst


@torch.no_grad()
def milliseconds(nets: List[AetherBase], device: str, size: int = 64, runs: int = 5, seconds: float = 10.0) -> List[float]:
    """Median time of each network for one float32 image of size x size, in turn, after one run that is not counted.

    Fewer runs where they would take longer than ``seconds``.
    """
    image = torch.rand(1, nets[0].options["in_chans"], size, size, device=device)
    nets = [net.float().eval().to(device) for net in nets]
    times: List[List[float]] = [[] for _ in nets]
    begin = time.perf_counter()
    for run in range(runs + 1):
        if run > 1 and time.perf_counter() - begin > seconds:
            break
        for net, kept in zip(nets, times):
            start = time.perf_counter()
            net(image)
            if device == "cuda":
                torch.cuda.synchronize()
            if run:
                kept.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(kept) for kept in times]


class _Counter(TorchFunctionMode):
    """Counts the operations that a forward pass calls; looking at a tensor or at a part of it is none."""

    LOOKS = ("__get__", "__getitem__", "dim", "size", "view", "view_as", "flatten", "reshape", "float", "to")

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.others = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        if func.__name__ == "conv2d":
            self.convolutions += 1
        elif func.__name__ not in self.LOOKS:
            self.others += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_operations(net: AetherBase) -> Tuple[int, int]:
    """Convolutions, and other operations, of one forward pass."""
    image = torch.rand(1, net.options["in_chans"], 8, 8, dtype=next(net.parameters()).dtype)
    with _Counter() as counter:
        net(image)
    return counter.convolutions, counter.others


def parameters(net: AetherBase) -> int:
    return sum(value.numel() for value in net.parameters())


# -------------------------------------------------------------------------------------------------------- half precision


class Group(NamedTuple):
    """Values inside the network that can be scaled together: by the tensors that make them, and back by those that use them."""

    values: List[str]  # as largest_values names them
    made_by: List[str]
    used_by: List[str]


def hard_pictures(channels: int, side: int = 24) -> Dict[str, Tensor]:
    """Pictures that drive a network far: flat, saturated, periodic, ramps, noise. (1, channels, H, W) in [0, 1]."""
    y, x = torch.arange(side).view(-1, 1), torch.arange(side)
    noise = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0))
    pictures = {"black": noise * 0, "white": noise * 0 + 1, "noise": noise, "black and white noise": noise.round()}
    pictures.update({"ramp": x / (side - 1), "falling ramp": 1 - (x + y) / (2 * side - 2)})
    for channel in range(channels if channels > 1 else 0):
        only = (torch.arange(channels) == channel).float().view(-1, 1, 1)
        pictures.update({f"channel {channel} alone": only, f"all but channel {channel}": 1 - only})
    for pixels in (1, 2, 4, 8):
        pictures[f"{pixels} px stripes"] = (x // pixels % 2).float()
        pictures[f"{pixels} px checkerboard"] = ((x // pixels + y // pixels) % 2).float()
    pictures = {name: picture.expand(1, channels, side, side) for name, picture in pictures.items()}
    return {**pictures, "noise, 1x1": noise[None, :, :1, :1], "noise, 21x3": noise[None, :, :3, :21]}


@torch.no_grad()
def largest_values(net: AetherBase, picture: Tensor) -> Dict[str, float]:
    """Largest magnitude of what every module gets ("NAME.in") and gives ("NAME.out") for a picture; infinity where something is not finite."""
    found: Dict[str, float] = {}

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            for end, value in (("in", inputs[0]), ("out", output)):
                largest = float(value.abs().max())
                found[f"{name}.{end}"] = max(found.get(f"{name}.{end}", 0.0), math.inf if math.isnan(largest) else largest)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in net.named_modules()]
    try:
        net(picture)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def layers(net: FusedAetherNet) -> List[Tuple[str, str, str]]:
    """(module, part, name in largest_values) of all that half precision must hold, in the order of the data.

    Not what goes into a sigmoid: infinity there is as good as 20.
    """
    rows = [("head", "output", "head.out")]
    for name, block in net.named_modules():
        if isinstance(block, FusedAetherBlock):
            # What is beyond a bound, infinity too, comes back to it.
            parts = {"depthwise": "reparam_conv.out" if block.bound is None else "gate_conv.in", "gate": "gate_conv.out", "main": "main_conv.out"}
            parts.update({"product": "out_conv.in", "output": "out_conv.out"})
            if isinstance(block.channel_attn, ChannelAttention):
                parts["attention"] = "channel_attn.fc.0.out"
            rows += [(name, part, f"{name}.{key}") for part, key in {**parts, "sum": "out"}.items()]
    rows += [(f"fusion_convs.{stage}", "output", f"fusion_convs.{stage}.out") for stage in range(len(net.fusion_convs))]
    rows += [("fusion", "output", "fusion.out"), ("fusion", "sum", "body_norm.in")]
    rows += [("body_norm", "output", "body_norm.out")] if net.keep_norm else []
    rows += [("body_conv", "output", "body_conv.out"), ("body_conv", "sum", "conv_before_upsample.in")]
    return rows + [("conv_before_upsample", "output", "conv_before_upsample.0.out"), ("tail", "output", "tail.out")]


def groups(net: FusedAetherNet) -> Dict[str, Group]:
    """All that can be scaled, in the order of the data. The gate can't, SiLU(2x) is not 2 SiLU(x), nor can the output, which is the picture.

    The stream is what the blocks add to: it keeps one scale from the first convolution to the last sum.
    """

    def both(*convs: str) -> List[str]:
        return [f"{conv}.{tensor}" for conv in convs for tensor in ("weight", "bias")]

    fusions = [f"fusion_convs.{stage}" for stage in range(len(net.fusion_convs))]
    stream = Group(
        ["head.out", "fusion.out", "body_norm.in", "body_conv.out", "conv_before_upsample.in"],
        both("head", "fusion", "body_conv"),
        [f"{user}.weight" for user in (*fusions, "body_norm" if net.keep_norm else "body_conv", "conv_before_upsample.0")],
    )
    found = {"stream": stream}
    for name, block in net.named_modules():
        if not isinstance(block, FusedAetherBlock):
            continue
        reparam, gate, main, out = (f"{name}.{conv}_conv" for conv in ("reparam", "gate", "main", "out"))
        stream.values.extend([f"{out}.out", f"{name}.out"])
        stream.made_by.extend(both(out))
        stream.used_by.append(f"{reparam}.weight")
        if block.bound is None:
            found[f"{name} depthwise"] = Group([f"{reparam}.out"], both(reparam), [f"{gate}.weight", f"{main}.weight"])
        found[f"{name} product"] = Group([f"{main}.out", f"{out}.in"], both(main), [f"{out}.weight"])
        if isinstance(block.channel_attn, ChannelAttention):
            squeeze, excite = (f"{name}.channel_attn.fc.{layer}" for layer in (0, 2))
            stream.used_by.append(f"{squeeze}.weight")
            found[f"{name} attention"] = Group([f"{squeeze}.out"], [f"{squeeze}.weight"], [f"{excite}.weight"])
        if isinstance(block.spatial_attn, SpatialAttention):
            stream.used_by.append(f"{name}.spatial_attn.conv.weight")
    found["fusion_convs"] = Group([f"{conv}.out" for conv in fusions], both(*fusions), ["fusion.weight"])
    if net.keep_norm:
        found["body_norm"] = Group(["body_norm.out"], both("body_norm"), ["body_conv.weight"])
    tail = [f"tail.{name}" for name, _ in net.tail.named_parameters() if name.endswith("weight")]
    found["conv_before_upsample"] = Group(["conv_before_upsample.0.out"], both("conv_before_upsample.0"), tail)
    return found


@torch.no_grad()
def rescale_(net: FusedAetherNet, largest: Mapping[str, float]) -> Dict[str, int]:
    """Scale what half precision would not hold by powers of two, in place: the same function, bit for bit in float32.

    Down what comes near its largest number; up what it would drown in its smallest, and what makes up for that with weights beyond it.
    Returns the powers by group; a network that needs nothing stays untouched.
    """
    tensors, powers = dict(net.named_parameters()), {}
    for name, group in groups(net).items():
        value = max(largest[key] for key in group.values)
        made, used = (max(float(tensors[tensor].abs().max()) for tensor in part) for part in (group.made_by, group.used_by))
        filled = max(value * 2**SPARE_BITS, made) / HALF_MAX
        wanted = max(used / HALF_MAX, 1 / value if 0 < value < TINY else 0.0)
        power = 0
        if 1 < filled < math.inf:
            power = -math.ceil(math.log2(filled))
        elif wanted > 1 and 0 < filled <= 1:
            power = min(math.ceil(math.log2(wanted)), math.floor(-math.log2(filled)))
        if power:
            powers[name] = power
            for tensor in group.made_by:
                tensors[tensor].mul_(2.0**power)
            for tensor in group.used_by:
                tensors[tensor].mul_(2.0**-power)
    return powers


@torch.no_grad()
def fit_half_precision(
    net: FusedAetherNet, source: Path, say: Callable[[str], None], device: str = "cpu", asked: bool = True, table: bool = False
) -> None:
    """Rescale the fused network, in place, until half precision holds every layer's values on hard pictures, and report it.

    Pictures on which the network itself runs away, far from its training data, don't count: a scale that suits them would drown the others.

    Args:
        asked: someone wants half precision; if not, what can't be helped is a note and no error.
        table: print each layer's headroom, and how far the lower precisions agree with float32.

    Raises:
        UserError: no rescaling helps, and half precision was asked for.
    """
    pictures = {name: picture.to(device) for name, picture in hard_pictures(net.options["in_chans"]).items()}
    plain = rescaled = copy.deepcopy(net).float().to(device)
    measured = {name: largest_values(plain, picture) for name, picture in pictures.items()}
    outputs = {name: found[".out"] for name, found in measured.items()}
    bound = min(HALF_MAX, RUNAWAY * max(1.0, statistics.median(outputs.values())))
    lost = [name for name, output in outputs.items() if not output <= bound]
    sound = [picture for name, picture in pictures.items() if name not in lost]
    if lost:
        remedy = "; --bound 1 prevents it" if net.options.get("bound") is None else ""
        say(f"Note: on {len(lost)} of {len(pictures)} hard pictures the network runs away, in float32 too: {', '.join(lost[:3])}"
            + (", ..." if len(lost) > 3 else "") + remedy)  # fmt: skip
    if not sound:
        if asked:
            raise UserError(f"{source}: on no hard picture is the output below {HALF_MAX:g}, half precision's largest number; leave fp16 out, "
                            "or pass another checkpoint (--model_path).")  # fmt: skip
        return
    before = after = largest_of([measured[name] for name in pictures if name not in lost])
    powers = rescale_(net, before)
    if powers:
        rescaled = copy.deepcopy(net).float().to(device)
        after = largest_of([largest_values(rescaled, picture) for picture in sound])
        first = ", ".join(f"{name} 2^{power}" for name, power in list(powers.items())[:3])
        say(f"Rescaled for half precision, the same function: {first}" + (f" and {len(powers) - 3} more" if len(powers) > 3 else ""))
    if table:
        if powers:
            print_headroom(net, "before rescaling", before, say)
        print_headroom(net, "rescaled" if powers else "as it is", after, say)
        say("")
        if powers:
            say(f"fp16 against fp32, before rescaling: {agreement(plain, plain, torch.float16, sound)}")
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            say(f"{name} against fp32: {agreement(plain, rescaled, dtype, sound)}")
    beyond = {f"{module} {part}": after[key] for module, part, key in layers(net)}
    beyond.update({name: float(value.abs().max()) for name, value in net.named_parameters()})
    beyond = {name: value for name, value in beyond.items() if not value <= HALF_MAX}
    if beyond:
        name = next(iter(beyond))
        message = f"half precision holds {HALF_MAX:g} at most, {name} reaches {beyond[name]:.3g}, and no rescaling helps"
        if asked:
            raise UserError(f"{source}: {message}; leave fp16 out, or pass another checkpoint (--model_path).")
        say(f"Note: {message}; use these weights in float32 or bfloat16")


@torch.no_grad()
def report_bound(state: Mapping[str, Tensor], net: FusedAetherNet, say: Callable[[str], None]) -> None:
    """Say on how many hard pictures the bound that was given to the network changes anything, and on how many the network ran away."""
    unbounded = {name: value for name, value in state.items() if name != "bound"}
    before = aether_from_state_dict(unbounded, net.options.get("img_range", 1.0)).fused().float()
    after = copy.deepcopy(net).float().cpu()
    changed = lost = 0
    pictures = hard_pictures(net.options["in_chans"])
    for picture in pictures.values():
        expected = before(picture)
        lost += not bool(expected.isfinite().all())
        changed += not torch.allclose(after(picture), expected, rtol=1e-4, atol=1e-5)
    say(f"Bound {net.options['bound']:g}: changes the output for {changed} of {len(pictures)} hard pictures; "
        f"without it {lost} of them are not finite")  # fmt: skip


def largest_of(measured: List[Dict[str, float]]) -> Dict[str, float]:
    return {key: max(found[key] for found in measured) for key in measured[0]}


def print_headroom(net: FusedAetherNet, title: str, largest: Mapping[str, float], say: Callable[[str], None]) -> None:
    """A line for every block and every other layer: largest value, and how many times it may double."""

    def bits(value: float) -> float:
        return math.log2(HALF_MAX / max(value, 2.0**-24))

    rows: Dict[str, Dict[str, float]] = {}
    for module, part, key in layers(net):
        rows.setdefault(module, {})[part] = largest[key]
    say("")
    say(f"{'fp16, ' + title:<22}{'largest':>10}{'headroom, bits':>16}")
    for module, parts in rows.items():
        each = "".join(f"  {part} {bits(value):.1f}" for part, value in parts.items()) if len(parts) > 1 else ""
        say(f"{module:<22}{max(parts.values()):>10.4g}{bits(max(parts.values())):>16.1f}{each}")


@torch.no_grad()
def agreement(net: AetherBase, other: AetherBase, dtype: torch.dtype, pictures: List[Tensor]) -> str:
    """PSNR of ``other`` computed in ``dtype`` against ``net`` in float32, in words; the peak is 1."""
    low = copy.deepcopy(other).to(dtype)
    expected = [net(picture) for picture in pictures]
    try:
        outputs = [low(picture.to(dtype)).float() for picture in pictures]
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return "not compared, this PyTorch does not compute it on a CPU (newer ones do): pass --device cuda"
    errors = [float((output - picture).pow(2).mean()) for output, picture in zip(outputs, expected)]
    lost = sum(not math.isfinite(error) for error in errors)
    if lost:
        return f"not finite on {lost} of {len(pictures)} hard pictures"
    mean, worst = (-10 * math.log10(max(error, 1e-12)) for error in (statistics.mean(errors), max(errors)))
    return f"{mean:.1f} dB over {len(pictures)} hard pictures, {worst:.1f} dB on the worst"


# ------------------------------------------------------------------------------------------------------------------ ONNX


def precisions(args: argparse.Namespace) -> List[str]:
    """The ONNX files that are asked for, after the checks that need no weights."""
    wanted = [name.strip() for name in args.onnx.split(",")] if args.onnx else []
    unknown = [name for name in wanted if name not in PRECISIONS]
    if unknown:
        raise UserError(f"--onnx {unknown[0]!r} is not known; allowed, with commas between: {', '.join(PRECISIONS)}.")
    wanted += ["int8"] if args.int8 and "int8" not in wanted else []
    if wanted:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxslim  # noqa: F401
        except ImportError as error:
            raise UserError(f"--onnx needs the package {error.name}: pip install onnx onnxruntime onnxslim, or leave it out.") from None
        for name in wanted:
            target = f"{name} {args.target}"
            first, last = OPSETS.get(target, OPSETS[name])
            if not first <= args.opset <= last:
                raise UserError(f"--opset {args.opset} is not possible for {target if target in OPSETS else name}; pass one from {first} to {last}.")
    elif args.static is not None:
        raise UserError("--static is about ONNX files; pass --onnx too, or leave it out.")
    if "int8" not in wanted:
        for option in ("calibration", "placement", "reduce_range"):
            if getattr(args, option):
                raise UserError(f"--{option} is about the int8 file; pass --int8 too, or leave it out.")
    return wanted


def static_shape(args: argparse.Namespace, net: AetherBase) -> Optional[List[int]]:
    """--static as numbers: channels, height and width of the only picture that the ONNX files shall take."""
    if args.static is None:
        return None
    chans, allowed = net.options["in_chans"], f"expected {net.options['in_chans']},H,W with a height and width of 1 to {LARGEST_STATIC}"
    if not re.fullmatch(r"\d{1,5}(,\d{1,5}){2}", args.static):
        raise UserError(f"--static {args.static} is not possible; {allowed}.")
    shape = [int(number) for number in args.static.split(",")]
    if shape[0] != chans or not all(1 <= side <= LARGEST_STATIC for side in shape[1:]):
        raise UserError(f"--static {args.static} does not fit; {allowed}.")
    return shape


def onnx_path(target: Path, precision: str, static: Optional[List[int]]) -> Path:
    """2x_NAME_fused.safetensors -> 2x_NAME_fp16.onnx, as the community names them; 2x_NAME_fp16_3x48x64.onnx where the size is fixed."""
    stem = target.stem[: -len("_fused")] if target.stem.endswith("_fused") else target.stem
    size = "_" + "x".join(map(str, static)) if static else ""
    return target.with_name(f"{stem}_{precision}{size}.onnx")


def onnx_metadata(source: Path, args: argparse.Namespace) -> Dict[str, str]:
    """What an ONNX file says of its origin. The date is the checkpoint's and not today's: the same input gives the same bytes."""
    try:
        seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or source.stat().st_mtime)
        date = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):
        raise UserError("the environment's SOURCE_DATE_EPOCH is not a time in seconds since 1970; correct it, or unset it.") from None
    given = {"license": args.license, "author": args.author, "date": date, "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    return {key: value for key, value in given.items() if value}


def calibration_pairs(folder: Path, net: AetherBase) -> List[Tuple[Tensor, Tensor]]:
    """(low resolution, high resolution) of the middle of each picture: (1, 3, H, W) in [0, 1], reduced with Pillow's bicubic."""
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise UserError(f"--calibration needs the package {error.name}: pip install pillow numpy.") from None
    if not folder.is_dir():
        raise UserError(f"--calibration {folder} is not a folder; pass one with pictures.")
    pairs: List[Tuple[Tensor, Tensor]] = []
    side = CALIBRATION_SIDE * net.scale
    for path in sorted(folder.rglob("*")):
        if len(pairs) == CALIBRATION_PICTURES or not path.is_file():
            continue
        try:
            with Image.open(path) as opened:
                if opened.mode.startswith("I"):  # 16 bits; Pillow would cut off all above 255
                    opened = Image.fromarray((np.asarray(opened).clip(0, 65535) // 257).astype(np.uint8))
                image = opened.convert("RGB" if net.options["in_chans"] == 3 else "L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for broken files
            continue
        left, top = max(0, (image.width - side) // 2), max(0, (image.height - side) // 2)
        width, height = (min(side, size) // net.scale * net.scale for size in image.size)
        image = image.crop((left, top, left + width, top + height))
        if min(image.size) < 8 * net.scale:
            continue
        small = image.resize((image.width // net.scale, image.height // net.scale), Image.Resampling.BICUBIC)
        arrays = [np.atleast_3d(np.asarray(each, dtype=np.float32)) / 255 for each in (small, image)]
        pairs.append(tuple(torch.from_numpy(array).permute(2, 0, 1)[None].contiguous() for array in arrays))  # type: ignore[arg-type]
    if not pairs:
        raise UserError(f"--calibration {folder} holds no picture of {8 * net.scale} pixels or more that Pillow reads; pass another folder.")
    return pairs


@torch.no_grad()
def quantise(unfused: AetherBase, source: Path, args: argparse.Namespace, say: Callable[[str], None]) -> QuantAetherNet:
    """The network with int8 weights: from quantisation-aware training as it is, any other calibrated on pictures."""
    trained = unfused.placement if isinstance(unfused, QuantAetherNet) else None
    if args.calibration is None:
        if not isinstance(unfused, QuantAetherNet):
            raise UserError(f"{source} was not trained with qat: true, so int8 needs pictures to find its ranges: pass --calibration FOLDER.")
        if any(bool(quantizer.watched == 0) for quantizer in unfused.quantizers().values()):
            raise UserError(f"{source} was saved before its first training step, so its ranges are unknown; pass --calibration FOLDER.")
        if args.placement not in (None, trained):
            raise UserError(f"{source} was trained with placement {trained}; leave --placement out, or pass --calibration FOLDER too.")
        return unfused.float().convert_to_quantized()
    pairs = calibration_pairs(Path(args.calibration), unfused)
    say(f"Calibrating on {len(pairs)} pictures" + (", in place of the ranges that training found" if trained else ""))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = unfused.fused().float().prepare_qat(args.placement or trained or PLACEMENTS[0], [low for low, _ in pairs])
    for warning in caught:
        say(f"Note: {warning.message}")
    float_net, stored = net.fused(), net.convert_to_quantized()
    written = stored.for_target(args.target, args.reduce_range)
    losses = [psnr(float_net(low), high) - psnr(written(low), high) for low, high in pairs]
    say(f"int8 against float, on these pictures: PSNR {-sum(losses) / len(losses):+.3f} dB in the mean, {-max(losses):+.3f} dB at worst")
    return stored


def psnr(output: Tensor, truth: Tensor) -> float:
    """dB, of 8-bit pictures; 99 where they are equal."""
    error = float((output.clamp(0, 1).mul(255).round() - truth.mul(255).round()).pow(2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0


def write_onnx(nets: Mapping[str, AetherBase], target: Path, args: argparse.Namespace, metadata: Dict[str, str]) -> List[Path]:
    """One file for each precision, beside ``target``; all of them or none, and until then those that are there stay."""
    written: Dict[Path, Path] = {}
    try:
        for precision, net in nets.items():
            static = static_shape(args, net)
            part = target.with_name(f"{precision}.{os.getpid()}.part.onnx")
            written[part] = onnx_path(target, precision, static)
            export_onnx(net, net.scale, precision, str(part), args.target, reduce_range=args.reduce_range,
                        static=static, opset=args.opset, simplify=True, metadata=metadata)  # fmt: skip
        for part, path in written.items():
            os.replace(part, path)
    except BaseException as error:
        for part in written:
            if part.exists():
                part.unlink()
        if not isinstance(error, Exception) or isinstance(error, (OSError, MemoryError)):
            raise
        raise UserError(f"{target} as ONNX: {first_line(error)} Pass other weights, or leave --onnx out.") from None
    return list(written.values())


# ------------------------------------------------------------------------------------------------------------------ main


def fuse(args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """What the command does; raises UserError, and then no output exists."""
    source = Path(args.model_path)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was given, but PyTorch finds no CUDA device; pass --device cpu.")
    if not (math.isfinite(args.img_range) and args.img_range > 0):
        raise UserError(f"--img_range {args.img_range} is not possible; expected a number above 0, 1.0 unless the network was trained with another.")
    if args.bound is not None and not 1e-3 <= args.bound < 1e6:
        raise UserError(f"--bound {args.bound:g} is not possible; expected a number from 1e-3 to 1e6, such as 1.")
    wanted = precisions(args)
    say(f"Reading {source}")
    state, chosen = read_state(source)
    if args.output_path is None:
        net = build(source, state, args).fused()
        say(f"Weights: {chosen}")
        return fit_half_precision(net, source, say, args.device, table=True)
    target = Path(args.output_path)
    check_output(target, source, args.overwrite)
    unfused = build(source, state, args)
    static = static_shape(args, unfused)
    for path in [onnx_path(target, precision, static) for precision in wanted]:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; pass --overwrite to replace it, or another --output_path.")
    origin = onnx_metadata(source, args) if wanted else {}
    say(f"Weights: {chosen}")
    try:
        nets = {name: quantise(copy.deepcopy(unfused), source, args, say) if name == "int8" else unfused for name in wanted}
    except ValueError as error:
        raise UserError(f"{source} as int8: {first_line(error)} Pass other weights or pictures, or leave int8 out.") from None
    say("Fusing in float64")
    net = unfused.fused()
    if args.bound is not None:
        report_bound(state, net, say)
    fit_half_precision(net, source, say, args.device, args.check_fp16 or "fp16" in wanted, args.check_fp16)
    name, scale = variant_name(unfused.options), unfused.scale
    metadata = {"format": "pt", "architecture": name if name.startswith("aether") else "AetherNet", "scale": str(scale), "form": "fused"}
    part = target.with_name(f"{target.stem[:40]}.{os.getpid()}.part{target.suffix}")  # a longer name than target's may be too long
    try:
        write_state(net.state_dict(), part, metadata)
        say("Verifying: the written file against the unfused network, in float64")
        fused = aether_from_state_dict(read_back(part, source))
        # What quantisation-aware training rounds, the float file does not: of such a network the weights are what must be the same.
        difference = largest_difference(unfused.fused() if isinstance(unfused, QuantAetherNet) else unfused, fused, args.device)
        if not difference <= ALLOWED_DIFFERENCE:
            raise UserError(f"{source}: the fused network differs by {difference:.2g} steps of 1/255, allowed {ALLOWED_DIFFERENCE:g}; "
                            f"these weights are too extreme for float32. Nothing was written; pass another checkpoint (--model_path).")  # fmt: skip
        say("Measuring")
        before, after = count_operations(unfused.cpu()), count_operations(fused.cpu())
        sizes = [source.stat().st_size / 2**20, part.stat().st_size / 2**20]
        counts = parameters(unfused), parameters(fused)
        ms = milliseconds([unfused, fused], args.device)
        if nets:
            say(f"Exporting {', '.join(nets)}")
        check_output(target, source, args.overwrite)  # again: something else may have written it by now
        nets = {precision: (net if precision == "int8" else fused).cpu().float() for precision, net in nets.items()}
        files = write_onnx(nets, target, args, origin)
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror or error}; free space or pass another --output_path.") from None
    finally:
        if os.path.exists(part):
            part.unlink()
    say("")
    say(f"{name} x{scale}")
    say(f"{'':<20}{'unfused':>12}{'fused':>12}")
    for label, form, pair in (
        ("parameters", "{:>12,}", counts),
        ("convolutions", "{:>12}", (before[0], after[0])),
        ("other operations", "{:>12}", (before[1], after[1])),
        ("file, MiB", "{:>12.2f}", sizes),
        (f"ms, 64x64, {args.device}", "{:>12.1f}", ms),
    ):
        say(f"{label:<20}" + "".join(form.format(value) for value in pair))
    say(f"{ms[0] / ms[1]:.2f} times as fast; largest difference {difference:.1e} steps of 1/255 (allowed {ALLOWED_DIFFERENCE:g})")
    for path in (target, *files):
        say(f"Wrote {path}")


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model_path", required=True, help="the checkpoint, .pth or .safetensors")
    parser.add_argument("--output_path", help="the fused weights to write, .pth or .safetensors")
    parser.add_argument("--model_type", choices=[variant.__name__ for variant in VARIANTS], help="checked (default: read from the weights)")
    parser.add_argument("--upscale", type=int, choices=(2, 3, 4), help="checked (default: read from the weights)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--img_range", type=float, default=1.0, help="the training option of this name, which no checkpoint holds (default: 1.0)")
    parser.add_argument("--bound", type=float, metavar="B", help="limit what each block's norm gives to -B..B, for weights that run away on some "
                        "pictures, such as 1. Fused weights are taken too")  # fmt: skip
    parser.add_argument("--onnx", metavar="LIST", help="ONNX files to write beside --output_path: fp32, fp16, int8, with commas between")
    parser.add_argument("--int8", action="store_true", help="the same as int8 in --onnx")
    parser.add_argument("--calibration", metavar="FOLDER", help="pictures for int8 without quantisation-aware training")
    parser.add_argument("--placement", choices=PLACEMENTS, help=f"quantisers of --calibration (default: as trained, else {PLACEMENTS[0]})")
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0], help="whom the int8 file is to be fast in (default: %(default)s)")
    parser.add_argument("--reduce_range", action="store_true", help="int8 weights of 7 bits, for CPUs without VNNI, which overflow on 8")
    parser.add_argument("--check-fp16", action="store_true", help="print each layer's headroom in half precision; needs no --output_path")
    parser.add_argument("--static", metavar="C,H,W", help="ONNX files for pictures of one size only, for instance 3,256,256 (default: any size)")
    parser.add_argument("--opset", type=int, default=17, help="ONNX opset of the files; 17 suits every runtime (default: %(default)s)")
    parser.add_argument("--license", metavar="NAME", help="written into the ONNX files, for instance CC-BY-4.0")
    parser.add_argument("--author", metavar="NAME", help="written into the ONNX files")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_path where it exists")
    parser.add_argument("--version", action="version", version=f"AetherNet {__version__}")
    parser.add_argument("--accept_older_fused", action="store_true", help="take a file whose kernels an older tool merged already")
    args = parser.parse_args(argv)
    if args.output_path is None and (args.onnx or args.int8 or not args.check_fp16):
        parser.error("the following arguments are required: --output_path")
    return args


def exit_code(program: str, action: Callable[[], None], stopped: str) -> int:
    """Run a command's action: 0, or 2 after one line for what the user can mend, or 130 where the user stopped it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")

    def error_line(message: object) -> int:
        for line in str(message).split(f"\n{program}: error: "):
            print(f"{program}: error: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)
        return 2

    old = None
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a polite kill leaves no temporary file either
    try:
        action()
    except UserError as error:
        return error_line(error)
    except KeyboardInterrupt:
        print(f"{program}: stopped; {stopped}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return error_line("there is not enough memory; close other programs, or pass --device cpu.")
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("fuse_aether.py", lambda: fuse(parse_args(argv)), "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
