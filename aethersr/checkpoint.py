"""Read weights from any checkpoint, without running code from it, and write them.

Needs only PyTorch, and the package safetensors for .safetensors files.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Set, Tuple, Union

import torch
from torch import Tensor

from aethersr.errors import Refused, first_line, naming
from aethersr.untrusted import ROOM, check_kind, load_pickled

ENDINGS = (".pth", ".safetensors")  # for writing; what is read is told by its content
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Common wrappers in order of preference. Those of any other name are searched as well, up to DEPTH levels.
WRAPPERS = ("params", "state_dict", "model_state_dict", "model", "net_g", "generator", "state")
DEPTH = 3
# What DDP, torch.compile, FSDP and checkpointed activations put between; no layer has such a name.
_NOISE = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|averaging|shadow)(?![a-z])")
_ONLINE = re.compile(r"(?<![a-z])online(?![a-z])")
_OPTIMIZER = re.compile(r"optim|sched")  # its tensors may have the names of the weights
_OUTERMOST = ("mean", "bound", "img_range", "scale_tensor")  # tensors of a network that lie in no layer

# What comes before a block is the prefix. Every AetherNet's blocks have a large kernel, whole or fused.
_BLOCK = re.compile(r"(?<![^.])stages\.\d+\.\d+\.")
_KERNEL = re.compile(r"stages\.\d+\.\d+\.(conv\.lk_conv|conv\.fused_conv|reparam_conv)\.weight$")


class Checkpoint(NamedTuple):
    """The network's tensors in a file, and a line that says which weights they are."""

    state: Dict[str, Tensor]
    chosen: str


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

    Averaged weights (EMA) are preferred, then WRAPPERS in their order. ValueError: there is no network.
    """
    found = _networks(content)
    candidates = [each for each in found if any(map(_KERNEL.match, each.state))] or found
    if not candidates:
        raise ValueError(_foreign(content))
    best, *others = sorted(candidates, key=_Candidate.rank)
    state, where = dict(best.state), best.where
    if best.averaged:
        chosen = f"the averaged ones, {where}" if where else "the averaged ones"
        online = next((other for other in others if not other.averaged), None)
        if online and _never_updated(state) and not _never_updated(online.state):
            state.update(_statistics(online.state))
            chosen += f"; their norm statistics were never updated, so those are of {online.where}"
    else:
        chosen = f"{where}, not averaged" if where else "the only ones in the file"
    if others and others[0].rank() == best.rank():
        chosen += f"; the file holds others too, {others[0].where}"
    for name in [name for name, value in state.items() if value.is_meta]:
        raise ValueError(f"{name[:80]!r} is on the meta device, without values.")
    return Checkpoint(state, chosen)


def _weights(content: Mapping[Any, Any]) -> Iterator[Tuple[Tuple[str, ...], Dict[str, Tensor]]]:
    """The tensors of every mapping in a checkpoint except optimizers, with the keys that lead to it."""
    seen: Set[int] = set()  # a small file can hold one mapping in endlessly many places
    waiting: List[Tuple[Tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for path, mapping in waiting:
        names = [key for key in mapping if isinstance(key, str) and not _OPTIMIZER.search(key)]
        named = [(key, mapping[key]) for key in names]
        yield path, {_NOISE.sub("", key): value for key, value in named if isinstance(value, Tensor)}
        for key, value in named if len(path) < DEPTH else ():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*path, key), value))


def _networks(content: Mapping[Any, Any]) -> List[_Candidate]:
    """The networks in a checkpoint: in each mapping, one for each prefix of a block."""
    found = []
    for path, tensors in _weights(content):
        blocks = filter(None, map(_BLOCK.search, tensors))
        states: Dict[str, Dict[str, Tensor]] = {block.string[: block.start()]: {} for block in blocks}
        for name, value in tensors.items():
            ends = [end.end() for end in re.finditer(r"\.", name)]
            prefix = next((name[:end] for end in [*reversed(ends), 0] if name[:end] in states), None)
            if prefix is not None:
                states[prefix][name[len(prefix) :]] = value.detach()
        for prefix, state in states.items():
            words = re.sub(r"([a-z])([A-Z])", r"\1_\2", "/".join((*path, prefix))).lower()
            averaged = "n_averaged" in state or bool(_AVERAGED.search(words) and not _ONLINE.search(words))
            where = [repr("/".join(path))] * bool(path) + [f"names under {prefix!r}"] * bool(prefix)
            for name in [name for name in state if "." not in name and name not in _OUTERMOST]:
                if not (state[name].dim() and state[name].is_floating_point()):
                    del state[name]  # a counter: AveragedModel's n_averaged, a trainer's global_step
            found.append(_Candidate(state, averaged, [*path, *prefix.split(".")[:-1]], ", ".join(where)))
    return found


def _foreign(content: Mapping[Any, Any]) -> str:
    """What to say about a file without an AetherNet."""
    names = [name for _, tensors in _weights(content) for name in tensors]
    if any(re.search(r"(?<![^.])layers\.(.*\.)?(dwconv|ffn|conv)\.", name) for name in names):
        return "this is AetherNet's first layout (v1, tensors 'layers.*'): another network, not read here."
    some = [repr(key[:40]) if isinstance(key, str) else type(key).__name__ for key in list(content)[:6]]
    keys = (", ".join(some) or "none") + (f" and {len(content) - 6} more" if len(content) > 6 else "")
    missing = f"not an AetherNet: no tensor 'stages.0.0.conv.lk_conv.weight' among {len(names)}"
    wrappers = f"{', '.join(WRAPPERS)}, with or without _ema, and any other up to {DEPTH} deep"
    return f"{missing}. Keys at the top: {keys}; known wrappers: {wrappers}."


def _statistics(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.endswith((".running_mean", ".running_var"))}


def _never_updated(state: Mapping[str, Tensor]) -> bool:
    """Whether the norms' statistics are still a new network's, as when averaging left out the buffers."""
    found = _statistics(state)
    if not found or any(_not_dense(value) or value.numel() > 2**20 for value in found.values()):
        return False  # what is not dense or claims terabytes is refused later
    return all(bool((value == float(name.endswith("var"))).all()) for name, value in found.items())


def read_checkpoint(path: Union[str, Path], flag: str = "--model_path") -> Checkpoint:
    """The network's weights in a file that torch.save or safetensors wrote, whatever its name. Runs no code.

    UserError: no such file, or no network of plain finite tensors in it; it names the option ``flag``.
    """
    with naming(path, flag):
        content = Path(path).read_bytes()  # once, so that what is checked is what is loaded
        check_kind(content[:512])
        found = _read_safetensors(content) if content[8:9] == b"{" else load_pickled(content)
        if not isinstance(found, Mapping):
            raise Refused(f"holds a {type(found).__name__}, expected a state dict; pass a checkpoint")
        checkpoint = unwrap(found)
        _check_tensors(checkpoint.state, len(content))
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


def _not_dense(value: Tensor) -> str:
    """What else a tensor is: words, or none."""
    if value.is_meta:
        return "on the meta device, without values"
    sparse = "sparse" if value.layout != torch.strided else ""
    return "nested" if value.is_nested else "quantised" if value.is_quantized else sparse


def _check_tensors(state: Mapping[str, Tensor], size: int) -> None:
    """Raise Refused unless all tensors are dense and finite, and little larger than the file in total."""
    room, room_if_tied = size + ROOM, size + 2**28
    stored: Dict[int, int] = {}  # by storage, which tied weights share
    for name, value in state.items():
        int8 = value.dtype == torch.int8 and f"{name}_scale" in state  # a weight of the int8 form
        kind = _not_dense(value) or ("" if int8 or value.dtype in DTYPES else value.dtype)
        if kind:
            raise Refused(f"holds {name[:80]!r}, which is {kind}; expected dense floating-point weights")
        storage = getattr(value, "untyped_storage", value.storage)().data_ptr()
        claimed = math.prod(value.shape) * value.element_size()
        room -= max(0, claimed - stored.get(storage, 0))
        room_if_tied -= claimed
        if min(room, room_if_tied) < 0:
            raise Refused("has tensors that claim more than the file holds; expected a plain checkpoint")
        stored[storage] = max(claimed, stored.get(storage, 0))
        if not bool(torch.isfinite(value).all()):
            raise Refused(f"is of a diverged training: {name[:80]!r} holds NaN or Inf; pass an earlier one")


def write_state(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a flat state dict in its tensors' own precision, .safetensors or .pth by the ending of ``path``.

    The same tensors give the same bytes. ``metadata`` is written into .safetensors files only.
    """
    plain = OrderedDict((name, value.detach().cpu().clone().contiguous()) for name, value in state.items())
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        content = save(plain, dict(metadata))
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])  # the library writes its metadata in random order
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        content = content[:8] + ordered + content[8 + size :]
    else:
        buffer = io.BytesIO()  # given a path, torch.save writes its name into the file
        torch.save(plain, buffer)
        content = buffer.getvalue()
    path.write_bytes(content)
