"""Checkpoint files in and out: whatever wrapped the weights, without running code from a file.

Needs PyTorch alone, and the package safetensors for files that end so.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Tuple, Union

import torch
from torch import Tensor

from aethersr.errors import UserError, first_line, missing_package

ENDINGS = (".pth", ".safetensors")  # that are written
READ_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
WRAPPERS = (
    "params",
    "state_dict",
    "model_state_dict",
    "model",
    "net_g",
    "generator",
    "state",
)  # the common ones, in order of preference
DEPTH = 3  # wrappers inside one another
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_NOISE = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)  # no layer is called so
_BLOCK = re.compile(r"(?:^|\.)(?=stages\.\d+\.\d+\.)")  # every AetherNet has blocks of these names
_KERNEL = re.compile(r"(?:^|\.)(?=stages\.\d+\.\d+\.(conv\.lk_conv|conv\.fused_conv|reparam_conv)\.weight$)")
_COUNTERS = ("n_averaged", "initted", "step")  # of AveragedModel and ema-pytorch, beside the weights
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|averaging|shadow)(?![a-z])")


class Checkpoint(NamedTuple):
    """The network's tensors in a file, and a line that says which weights they are."""

    state: Dict[str, Tensor]
    chosen: str


# ------------------------------------------------------------------------------------------------- finding the weights


class _Candidate(NamedTuple):
    wrappers: Tuple[str, ...]
    prefix: str  # before every name, beside those of _NOISE
    state: Dict[str, Any]
    averaged: bool

    @property
    def rank(self) -> Tuple[bool, int, int]:
        known = [WRAPPERS.index(name) for name in self.wrappers if name in WRAPPERS]
        return not self.averaged, known[0] if known else len(WRAPPERS), len(self.wrappers)

    def __str__(self) -> str:
        where = repr("/".join(self.wrappers)) if self.wrappers else ""
        return (
            where
            + (", " if where and self.prefix else "")
            + (f"names under {self.prefix!r}" if self.prefix else "")
        )


def unwrap(content: Mapping[Any, Any]) -> Checkpoint:
    """Find the network in what a checkpoint holds: wrappers, other networks beside it, prefixes; averaged weights are preferred.

    Raises:
        ValueError: there is none; the message names the keys that were seen and the wrappers that are known.
    """
    candidates = [found for path, mapping in _mappings(content) for found in _networks(path, mapping)]
    candidates.sort(key=lambda candidate: candidate.rank)
    if not candidates:
        raise ValueError(_foreign(content))
    best = candidates[0]
    others = [
        other for other in candidates if other.averaged == best.averaged and other.rank[1] == best.rank[1]
    ][1:]
    chosen = f"{best}, not averaged" if best.wrappers or best.prefix else "the only ones in the file"
    state = dict(best.state)
    if best.averaged:
        chosen = f"the averaged ones, {best}"
        online = next((other for other in candidates if not other.averaged), None)
        if online and _never_updated(state) and not _never_updated(online.state):
            state.update({name: value for name, value in online.state.items() if _is_statistic(name)})
            chosen += f"; their norm statistics were never updated, so those are the online ones of {online}"
    if others:
        chosen += f"; not {others[0]}"
    return Checkpoint(state, chosen)


def _mappings(
    content: Mapping[Any, Any], path: Tuple[str, ...] = ()
) -> Iterator[Tuple[Tuple[str, ...], Mapping[Any, Any]]]:
    yield path, content
    if len(path) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _mappings(value, (*path, key))


def _networks(path: Tuple[str, ...], mapping: Mapping[Any, Any]) -> List[_Candidate]:
    """The networks whose tensors stand in one mapping, side by side: one for each prefix before ``stages.0.0.``."""
    plain = {_NOISE.sub("", name): name for name in mapping if isinstance(name, str)}
    for anchor in (_KERNEL, _BLOCK):
        prefixes = {
            name[: found.end()]
            for name in plain
            for found in [anchor.search(name)]
            if found and isinstance(mapping[plain[name]], Tensor)
        }
        if prefixes:
            break
    candidates = []
    for prefix in sorted(prefixes):
        state = {
            name[len(prefix) :]: mapping[long] for name, long in plain.items() if name.startswith(prefix)
        }
        if not prefix:
            state = {
                name: value
                for name, value in state.items()
                if isinstance(value, Tensor) and name not in _COUNTERS
            }
        words = re.sub(r"([a-z])([A-Z])", r"\1_\2", "/".join((*path, prefix))).lower()
        averaged = bool(_AVERAGED.search(words)) or any(name.split(".")[-1] == "n_averaged" for name in plain)
        candidates.append(_Candidate(path, prefix, state, averaged))
    return candidates


def _foreign(content: Mapping[Any, Any]) -> str:
    """What to say of a file without an AetherNet."""
    names = [
        str(name)
        for _, mapping in _mappings(content)
        for name, value in mapping.items()
        if isinstance(value, Tensor)
    ]
    if any(
        re.search(r"(^|\.)layers\.", name) and re.search(r"\.(dwconv|ffn|conv)\.", name) for name in names
    ):
        return "this is AetherNet's first layout (v1, tensors 'layers.*'): another network, which these tools do not read."
    keys = [repr(str(key)[:40]) for key in content]
    seen = ", ".join(keys[:6]) + (f", ... ({len(keys)})" if len(keys) > 6 else "") if keys else "none"
    return (
        f"not an AetherNet: no tensor 'stages.0.0.conv.lk_conv.weight' among {len(names)}. The keys at the top: {seen}. "
        f"Known wrappers, {DEPTH} deep at most: {', '.join(WRAPPERS)}, each with or without ema, and any prefix before all names."
    )


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))


def _never_updated(state: Mapping[str, Any]) -> bool:
    found = {
        name: value for name, value in state.items() if _is_statistic(name) and isinstance(value, Tensor)
    }
    return bool(found) and all(
        bool((value == float(name.endswith("var"))).all()) for name, value in found.items()
    )


# --------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Union[str, Path], flag: str = "--model_path") -> Checkpoint:
    """Read a network's weights from a file. Runs no code from it.

    Raises:
        UserError: there is no such file, or no whole network of plain finite tensors in it; ``flag`` is the option that the message names.
    """
    path = Path(path)
    if not os.path.exists(
        path
    ):  # not path.exists(): before Python 3.14 that raises for a name that is too long
        raise UserError(f"{path} does not exist; pass the checkpoint with {flag}.")
    if not path.is_file():
        raise UserError(f"{path} is not a file; pass one checkpoint with {flag}.")
    ending = path.suffix.lower()
    if ending not in READ_ENDINGS:
        endings = f"{', '.join(READ_ENDINGS[:-1])} or {READ_ENDINGS[-1]}"
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'!r}; expected a checkpoint that ends in {endings} ({flag})."
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; expected a checkpoint, so copy it again ({flag}).")
    content = _read_safetensors(path, flag) if ending == ".safetensors" else _read_pickled(path, flag)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected a state dict; pass a network's checkpoint ({flag})."
        )
    try:
        found = unwrap(content)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass a checkpoint of AetherNet ({flag}).") from None
    _check(path, found.state, flag)
    return found


def _read_safetensors(path: Path, flag: str) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"{path} needs the package {error.name}: pip install {error.name}, or pass a .pth file ({flag})."
        ) from None
    try:
        return load_file(str(path))
    except Exception as error:
        raise UserError(
            f"{path} is not a whole .safetensors file ({first_line(error)}); copy it again or pass another ({flag})."
        ) from None


def _read_pickled(path: Path, flag: str) -> Any:
    try:
        with path.open("rb") as file:  # at once, so that what was looked at is what is loaded
            content = io.BytesIO(file.read())
        _check_pickles(path, content, flag)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(content, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Not PyTorch's own words: they speak of its inside, and advise to let the code run.
        reason = error.strerror if isinstance(error, OSError) else "it is damaged, or something else"
        raise UserError(
            f"{path} is not a readable checkpoint: {reason}; copy it again or pass another ({flag})."
        ) from None


# What a checkpoint may name: tensors, and what optimizers and schedulers keep. Each makes no more than its arguments already are.
_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|torch (Size|device)"
    r"|torch (u?int\d+|b?float\d+\w*|bool|complex\d+)"
)


def _check_pickles(path: Path, content: io.BytesIO, flag: str) -> None:
    """Refuse what is no plain checkpoint before PyTorch sees it.

    Without running code, PyTorch still makes what a pickle asks for: bytearray(2**40), a text encoded over and over, a set for every byte.
    """
    streams = [content] * 5  # before PyTorch 1.6: five pickles, one after another, then the raw weights
    if zipfile.is_zipfile(content):
        with zipfile.ZipFile(
            content
        ) as archive:  # PyTorch stores, it does not compress: more inside than outside is no checkpoint
            entries = archive.infolist()
            if sum(max(entry.file_size, entry.compress_size) for entry in entries) > len(content.getbuffer()):
                raise UserError(
                    f"{path} is a compressed archive, expected a checkpoint as torch.save writes it ({flag})."
                )
            streams = [
                io.BytesIO(archive.read(entry)) for entry in entries if entry.filename.endswith(".pkl")
            ]
    content.seek(0)
    for stream in streams:
        begin, texts = stream.tell(), [""]
        for opcode, argument, position in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EMPTY_SET"):
                # STACK_GLOBAL takes module and name from the two texts before it; from elsewhere it is not allowed anyway.
                name = (
                    str(argument)
                    if argument
                    else "builtins set"
                    if opcode.name == "EMPTY_SET"
                    else " ".join(texts[-2:])
                )
                if opcode.name not in ("GLOBAL", "INST") or not _GLOBALS.fullmatch(name):
                    raise UserError(
                        f"{path} is not a readable checkpoint: it asks to run code on loading ({name.replace(' ', '.')[:80]!r}), which is "
                        f"refused; save the weights alone, torch.save(model.state_dict(), 'weights.pth'), or pass another ({flag})."
                    )
            elif isinstance(argument, str):
                texts = [texts[-1], argument[:80]]
            if (position or 0) - begin > 2**20:
                raise UserError(
                    f"{path} is not a readable checkpoint: it holds more than weights; pass another ({flag})."
                )
    content.seek(0)


def _check(path: Path, state: Mapping[str, Any], flag: str) -> None:
    """Look at every tensor: plain finite numbers that the file has room for."""
    size = path.stat().st_size
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: entry {name[:80]!r} is a {type(value).__name__}, expected a state dict of tensors ({flag})."
            )
        stored = value.dtype == torch.int8 and f"{name}_scale" in state  # a weight of the int8 form
        if (
            value.layout != torch.strided
            or not (stored or value.dtype in DTYPES)
            or value.is_nested
            or value.device.type != "cpu"
        ):
            kind = f"{value.dtype} {'nested' if value.is_nested else value.layout} on {value.device}"
            raise UserError(
                f"{path}: tensor {name[:80]!r} is {kind}, expected dense floating-point weights ({flag})."
            )
        size -= value.numel() * value.element_size()
        if size < 0:
            raise UserError(
                f"{path}: the tensors claim more than the file holds, expected a plain checkpoint ({flag})."
            )
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path}: tensor {name[:80]!r} holds NaN or Inf; training has diverged, so pass an earlier checkpoint ({flag})."
            )


# --------------------------------------------------------------------------------------------------------------- writing


def write_state(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a flat float32 state dict, .safetensors or .pth by the ending of ``path``; the same tensors give the same bytes."""
    plain = OrderedDict(
        (name, value.detach().float().cpu().clone().contiguous()) for name, value in state.items()
    )
    if path.name.endswith(".safetensors"):
        from safetensors.torch import save

        content = save(plain, dict(metadata))
        size = int.from_bytes(
            content[:8], "little"
        )  # of the header, whose metadata the library writes in an order of chance
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = (
            content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(size) + content[8 + size :]
        )
    else:  # to memory first: to a path, torch.save writes that path's name into the file, and a full disk is no OSError
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        content = buffer.getvalue()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
