"""Read weights from any checkpoint, without running code from it, and write them.

Needs only PyTorch, and the package safetensors for .safetensors files.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Pattern, Set, Tuple, Union

import torch
from torch import Tensor

from aethersr.errors import UserError, first_line
from aethersr.untrusted import ROOM, Refused, check_kind, load_pickled

ENDINGS = (".pth", ".safetensors")  # for writing; what is read is told by its content
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Common wrappers in order of preference. Those of any other name are searched as well, up to DEPTH levels.
WRAPPERS = ("params", "state_dict", "model_state_dict", "model", "net_g", "generator", "state")
DEPTH = 3
_BETWEEN = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # DDP, compile, ...
_NOISE = re.compile(rf"(?<![^.])({'|'.join(_BETWEEN)})\.")  # no layer has such a name
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|averaging|shadow)(?![a-z])")
_ONLINE = re.compile(r"(?<![a-z])online(?![a-z])")
_OPTIMIZER = re.compile(r"optim|sched")  # its tensors may have the names of the weights
_OUTERMOST = ("mean", "bound", "img_range", "scale_tensor")  # tensors of a network that lie in no layer

# What every AetherNet has: a block's large kernel or, in a damaged or unknown one, at least a block.
# The prefix is whatever comes before it.
_KERNEL = re.compile(r"(?<![^.])stages\.\d+\.\d+\.(conv\.lk_conv|conv\.fused_conv|reparam_conv)\.weight$")
_BLOCK = re.compile(r"(?<![^.])stages\.\d+\.\d+\.")


class Checkpoint(NamedTuple):
    """The network's tensors in a file, and a line that says which weights they are."""

    state: Dict[str, Tensor]
    chosen: str


# ---------------------------------------------------------------------------------------- finding the weights


class _Candidate(NamedTuple):
    """A network in a checkpoint, and where it is."""

    state: Dict[str, Tensor]
    averaged: bool
    words: List[str]  # wrappers and prefix
    where: str

    def rank(self) -> Tuple[bool, List[int]]:
        """Smaller is better."""
        return not self.averaged, [[*WRAPPERS, word].index(word) for word in self.words]


def unwrap(content: Mapping[Any, Any]) -> Checkpoint:
    """The network in a checkpoint's content, without wrappers, prefixes and anything else.

    Averaged weights (EMA) are preferred, then the wrappers in the order of WRAPPERS.

    Raises:
        ValueError: there is none; the message lists the keys found and the known wrappers.
    """
    candidates = sorted(_networks(content, _KERNEL) or _networks(content, _BLOCK), key=_Candidate.rank)
    if not candidates:
        raise ValueError(_foreign(content))
    best, others = candidates[0], candidates[1:]
    state, where = dict(best.state), best.where
    if not best.averaged:
        chosen = f"{where}, not averaged" if where else "the only ones in the file"
        shadow = _shadow(content, state)
        if shadow:
            state.update(shadow)
            chosen = "the averaged ones, 'shadow_params', with the names of the others"
    else:
        chosen = f"the averaged ones, {where}" if where else "the averaged ones"
        online = next((other for other in others if not other.averaged), None)
        if online and _never_updated(state) and not _never_updated(online.state):
            state.update({name: value for name, value in online.state.items() if _is_statistic(name)})
            chosen += (
                f"; their norm statistics were never updated, so those are the online ones of {online.where}"
            )
    if others and others[0].rank() == best.rank():
        chosen += f"; the file holds others too, {others[0].where}"
    return Checkpoint(state, chosen)


def _mappings(content: Mapping[Any, Any]) -> Iterator[Tuple[Tuple[str, ...], Mapping[Any, Any]]]:
    """Every mapping in a checkpoint except optimizers, with the keys that lead to it."""
    seen: Set[int] = set()  # a small file can hold one mapping in endlessly many places
    waiting: List[Tuple[Tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for path, mapping in waiting:
        yield path, mapping
        for key, value in mapping.items() if len(path) < DEPTH else ():
            named = isinstance(key, str) and not _OPTIMIZER.search(key)
            if named and isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*path, key), value))


def _networks(content: Mapping[Any, Any], anchor: Pattern[str]) -> List[_Candidate]:
    """The networks in a checkpoint: in each mapping, one for each prefix of an anchor."""
    found = []
    for path, mapping in _mappings(content):
        tensors = {_NOISE.sub("", name): value.detach() for name, value in _weights(mapping)}
        matches = ((name, anchor.search(name)) for name in tensors)
        states: Dict[str, Dict[str, Tensor]] = {
            prefix: {} for prefix in sorted({name[: match.start()] for name, match in matches if match})
        }
        for name, value in tensors.items():
            ends = [end.end() for end in re.finditer(r"\.", name)]
            prefix = next((name[:end] for end in [*reversed(ends), 0] if name[:end] in states), None)
            if prefix is not None:
                states[prefix][name[len(prefix) :]] = value
        for prefix, state in states.items():
            words = re.sub(r"([a-z])([A-Z])", r"\1_\2", "/".join((*path, prefix))).lower()
            averaged = "n_averaged" in state or bool(_AVERAGED.search(words) and not _ONLINE.search(words))
            where = [repr("/".join(path))] * bool(path) + [f"names under {prefix!r}"] * bool(prefix)
            plain = {name: value for name, value in state.items() if not _is_counter(name, value)}
            found.append(_Candidate(plain, averaged, [*path, *prefix.split(".")[:-1]], ", ".join(where)))
    return found


def _weights(mapping: Mapping[Any, Any]) -> List[Tuple[str, Tensor]]:
    return [
        (name, value)
        for name, value in mapping.items()
        if isinstance(name, str) and isinstance(value, Tensor) and not _OPTIMIZER.search(name)
    ]


def _is_counter(name: str, value: Tensor) -> bool:
    """Whether it only lies beside the weights, as AveragedModel's n_averaged or a trainer's global_step."""
    return "." not in name and name not in _OUTERMOST and not (value.dim() and value.is_floating_point())


def _shadow(content: Mapping[Any, Any], state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Averaged weights as torch-ema and diffusers save them: no names, in the order of ``state``; or none."""
    names = [name for name in state if name not in _OUTERMOST and not _is_statistic(name)]
    for _, mapping in _mappings(content):
        found = mapping.get("shadow_params")
        values = [value for value in found if isinstance(value, Tensor)] if isinstance(found, list) else []
        if [value.shape for value in values] == [state[name].shape for name in names]:
            return dict(zip(names, values))
    return {}


def _foreign(content: Mapping[Any, Any]) -> str:
    """What to say about a file without an AetherNet."""
    names = [name for _, mapping in _mappings(content) for name, _ in _weights(mapping)]
    if any(re.search(r"(?<![^.])layers\.(.*\.)?(dwconv|ffn|conv)\.", name) for name in names):
        return "this is AetherNet's first layout (v1, tensors 'layers.*'): another network, not read here."
    keys = ", ".join(repr(str(key)[:40]) for key in list(content)[:6]) or "none"
    more = f" and {len(content) - 6} more" if len(content) > 6 else ""
    return (
        f"not an AetherNet: no tensor 'stages.0.0.conv.lk_conv.weight' among {len(names)}. "
        f"Keys at the top: {keys}{more}; known wrappers: {', '.join(WRAPPERS)}, with or without _ema, "
        f"and any other up to {DEPTH} deep."
    )


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))


def _never_updated(state: Mapping[str, Tensor]) -> bool:
    """Whether the norms' statistics are still a new network's, as when averaging left out the buffers."""
    found = [(name, value) for name, value in state.items() if _is_statistic(name)]
    return bool(found) and all(bool((value == float(name.endswith("var"))).all()) for name, value in found)


# ---------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Union[str, Path], flag: str = "--model_path") -> Checkpoint:
    """The network's weights in a file that torch.save or safetensors wrote, whatever its name. Runs no code.

    Args:
        path: the file.
        flag: the option to name in error messages.

    Raises:
        UserError: there is no such file, or no network of plain finite tensors in it.
    """
    path = Path(path)
    if not os.path.exists(path):  # path.exists() raises before Python 3.14 where a name is too long
        raise UserError(f"{path} does not exist; pass the checkpoint with {flag}.")
    if not path.is_file():
        raise UserError(f"{path} is not a file; pass one checkpoint with {flag}.")
    try:
        with path.open("rb") as file:
            check_kind(file.read(512))
            file.seek(0)
            content = file.read()  # once, so that what is checked is what is loaded
        found = _read_safetensors(content) if content[8:9] == b"{" else load_pickled(content)
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            raise Refused(f"holds a {kind}, expected a state dict; pass a network's checkpoint")
        checkpoint = unwrap(found)
        _check_tensors(checkpoint.state, len(content))
    except Refused as error:
        raise UserError(f"{path} {error} ({flag}).") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; pass another ({flag}).") from None
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass a checkpoint of AetherNet ({flag}).") from None
    return checkpoint


def _read_safetensors(content: bytes) -> Dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        package = (error.name or "safetensors").split(".")[0]
        raise Refused(f"needs the package {package}: pip install {package}, or pass a .pth file") from None
    try:
        return load(content)
    except Exception as error:
        raise Refused(f"is not a whole .safetensors file ({first_line(error)}); copy it again") from None


def _check_tensors(state: Mapping[str, Tensor], size: int) -> None:
    """Raise Refused unless all tensors are dense and finite, and little larger than the file in total."""
    room, room_if_tied = size + ROOM, size + 2**28
    stored: Dict[int, int] = {}  # by storage, which tied weights share
    for name, value in state.items():
        int8 = value.dtype == torch.int8 and f"{name}_scale" in state  # a weight of the int8 form
        kind = "on the meta device, without values" if value.is_meta else ""
        kind = kind or ("nested" if value.is_nested else "quantised" if value.is_quantized else "")
        kind = kind or ("sparse" if value.layout != torch.strided else "")
        if kind or not (int8 or value.dtype in DTYPES):
            wrong = f"holds tensor {name[:80]!r}, which is {kind or value.dtype}"
            raise Refused(f"{wrong}; expected dense floating-point weights")
        storage = getattr(value, "untyped_storage", value.storage)().data_ptr()
        claimed = math.prod(value.shape) * value.element_size()
        room -= max(0, claimed - stored.get(storage, 0))
        room_if_tied -= claimed
        if min(room, room_if_tied) < 0:
            raise Refused("has tensors that claim more than the file holds; expected a plain checkpoint")
        stored[storage] = max(claimed, stored.get(storage, 0))
        if not bool(torch.isfinite(value).all()):
            found = f"is of a training that diverged, {name[:80]!r} holds NaN or Inf"
            raise Refused(f"{found}; pass an earlier checkpoint")


# ---------------------------------------------------------------------------------------------------- writing


def write_state(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a flat state dict in its tensors' own precision, .safetensors or .pth by the ending of ``path``.

    The same tensors give the same bytes. ``metadata`` is written into .safetensors files only. When this
    returns, the file is on disk.
    """
    plain = OrderedDict((name, value.detach().cpu().clone().contiguous()) for name, value in state.items())
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        content = save(plain, dict(metadata))
        # The library writes the header's metadata in random order.
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        content = content[:8] + ordered + content[8 + size :]
    else:
        # To memory first: given a path, torch.save writes its name into the file, and a full disk raises no
        # OSError.
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        content = buffer.getvalue()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
