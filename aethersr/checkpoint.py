"""Read weights from any checkpoint, without running code from it, and write them.

Needs only PyTorch, and the package safetensors for .safetensors files.
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
from typing import (
    Any,
    BinaryIO,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Pattern,
    Tuple,
    Union,
)

import torch
from torch import Tensor

from aethersr.errors import UserError, first_line

ENDINGS = (".pth", ".safetensors")  # for writing
READ_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Common wrappers in order of preference. Those of any other name are searched as well, up to DEPTH levels.
WRAPPERS = ("params", "state_dict", "model_state_dict", "model", "net_g", "generator", "state")
DEPTH = 3
_BETWEEN = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # DDP, compile, ...
_NOISE = re.compile(rf"(?<![^.])({'|'.join(_BETWEEN)})\.")  # no layer has such a name
_COUNTERS = ("n_averaged", "initted", "step")  # what AveragedModel and ema-pytorch save beside the weights
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|averaging|shadow)(?![a-z])")
_ONLINE = re.compile(r"(?<![a-z])online(?![a-z])")
_OPTIMIZER = re.compile(r"optim|sched")  # its tensors may have the names of the weights

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
    """A network in a checkpoint."""

    wrappers: Tuple[str, ...]
    prefix: str  # of every name, without _NOISE
    state: Dict[str, Tensor]
    averaged: bool

    def rank(self) -> Tuple[bool, List[int]]:
        """Smaller is better."""
        words = [*self.wrappers, *self.prefix.split(".")[:-1]]
        return not self.averaged, [[*WRAPPERS, word].index(word) for word in words]

    def __str__(self) -> str:
        where = [repr("/".join(self.wrappers))] if self.wrappers else []
        return ", ".join([*where, f"names under {self.prefix!r}"] if self.prefix else where)


def unwrap(content: Mapping[Any, Any]) -> Checkpoint:
    """The network in a checkpoint's content, without wrappers, prefixes and anything else.

    Averaged weights (EMA) are preferred, then the wrappers in the order of WRAPPERS.

    Raises:
        ValueError: there is none; the message lists the keys found and the known wrappers.
    """

    def found(anchor: Pattern[str]) -> List[_Candidate]:
        return [network for place in _mappings(content) for network in _networks(*place, anchor)]

    candidates = sorted(found(_KERNEL) or found(_BLOCK), key=_Candidate.rank)
    if not candidates:
        raise ValueError(_foreign(content))
    best, others = candidates[0], candidates[1:]
    state, where = dict(best.state), str(best)
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
            chosen += f"; their norm statistics were never updated, so those are the online ones of {online}"
    if others and others[0].rank() == best.rank():
        chosen += f"; the file holds others too, {others[0]}"
    return Checkpoint(state, chosen)


def _mappings(
    content: Mapping[Any, Any], path: Tuple[str, ...] = ()
) -> Iterator[Tuple[Tuple[str, ...], Mapping[Any, Any]]]:
    """Every mapping in a checkpoint except optimizers, each with the keys that lead to it."""
    yield path, content
    for key, value in content.items() if len(path) < DEPTH else ():
        if isinstance(key, str) and isinstance(value, Mapping) and not _OPTIMIZER.search(key):
            yield from _mappings(value, (*path, key))


def _networks(
    path: Tuple[str, ...], mapping: Mapping[Any, Any], anchor: Pattern[str]
) -> Iterator[_Candidate]:
    """The networks whose tensors share one mapping: one for each prefix of an anchor."""
    tensors = {_NOISE.sub("", name): value for name, value in mapping.items() if _is_weight(name, value)}
    matches = ((name, anchor.search(name)) for name in tensors)
    prefixes = {name[: match.start()] for name, match in matches if match}
    states: Dict[str, Dict[str, Tensor]] = {prefix: {} for prefix in sorted(prefixes)}
    for name, value in tensors.items():
        ends = [end.end() for end in re.finditer(r"\.", name)]
        prefix = next((name[:end] for end in [*reversed(ends), 0] if name[:end] in prefixes), None)
        if prefix is not None:
            states[prefix][name[len(prefix) :]] = value
    for prefix, state in states.items():
        counted = "n_averaged" in state
        for counter in _COUNTERS:
            state.pop(counter, None)
        words = re.sub(r"([a-z])([A-Z])", r"\1_\2", "/".join((*path, prefix))).lower()
        averaged = counted or (bool(_AVERAGED.search(words)) and not _ONLINE.search(words))
        yield _Candidate(path, prefix, state, averaged)


def _shadow(content: Mapping[Any, Any], state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Averaged weights as torch-ema and diffusers save them: no names, in the order of ``state``; or none."""
    names = [name for name in state if name not in ("mean", "bound") and not _is_statistic(name)]
    for _, mapping in _mappings(content):
        found = mapping.get("shadow_params")
        values = [value for value in found if isinstance(value, Tensor)] if isinstance(found, list) else []
        if [value.shape for value in values] == [state[name].shape for name in names]:
            return dict(zip(names, values))
    return {}


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and not _OPTIMIZER.search(name)


def _foreign(content: Mapping[Any, Any]) -> str:
    """What to say about a file without an AetherNet."""
    names = [
        name
        for _, mapping in _mappings(content)
        for name, value in mapping.items()
        if _is_weight(name, value)
    ]
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
    """The network's weights in a file. Runs no code from it.

    Args:
        path: a file with one of READ_ENDINGS.
        flag: the option to name in error messages.

    Raises:
        UserError: there is no such file, or no network of plain finite tensors in it.
    """
    path = Path(path)
    if not os.path.exists(path):  # path.exists() raises before Python 3.14 where a name is too long
        raise UserError(f"{path} does not exist; pass the checkpoint with {flag}.")
    if not path.is_file():
        raise UserError(f"{path} is not a file; pass one checkpoint with {flag}.")
    ending = path.suffix.lower()
    if ending not in READ_ENDINGS:
        endings = f"{', '.join(READ_ENDINGS[:-1])} or {READ_ENDINGS[-1]}"
        found = f"{path} ends in {path.suffix or 'nothing'!r}"
        raise UserError(f"{found}; expected a checkpoint that ends in {endings} ({flag}).")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; expected a checkpoint, so copy it again ({flag}).")
    content = _read_safetensors(path, flag) if ending == ".safetensors" else _read_pickled(path, flag)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(
            f"{path} holds a {kind}, expected a state dict; pass a network's checkpoint ({flag})."
        )
    try:
        checkpoint = unwrap(content)
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass a checkpoint of AetherNet ({flag}).") from None
    _check_tensors(path, checkpoint.state, flag)
    return checkpoint


def _read_safetensors(path: Path, flag: str) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        package = (error.name or "safetensors").split(".")[0]
        remedy = f"pip install {package}, or pass a .pth file ({flag})"
        raise UserError(f"{path} needs the package {package}: {remedy}.") from None
    try:
        return load_file(str(path))
    except Exception as error:
        reason = first_line(error)
        remedy = f"copy it again or pass another ({flag})"
        raise UserError(f"{path} is not a whole .safetensors file ({reason}); {remedy}.") from None


def _read_pickled(path: Path, flag: str) -> Any:
    try:
        with path.open("rb") as file:  # read once, so that what was checked is what is loaded
            content = io.BytesIO(file.read())
        _check_pickles(path, content, flag)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(content, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Not PyTorch's own message, which is about its internals and advises running the code.
        reason = error.strerror if isinstance(error, OSError) else "it is damaged, or something else"
        remedy = f"copy it again or pass another ({flag})"
        raise UserError(f"{path} is not a readable checkpoint: {reason}; {remedy}.") from None


# What a pickle may name: the parts of tensors, and what optimizers and schedulers store. None of these can
# create more than the file holds.
_GLOBALS = re.compile(
    r"|collections (OrderedDict|Counter|defaultdict)|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|Size|device|u?int\d+|b?float\d+\w*|bool|complex\d+)"
)
_LARGEST_PICKLE = 2**20  # bytes; a checkpoint with optimizers needs a tenth of it


def _check_pickles(path: Path, content: io.BytesIO, flag: str) -> None:
    """Refuse anything but a plain checkpoint before PyTorch sees it.

    Even without running code, PyTorch creates whatever a pickle asks for: bytearray(2**40), a text encoded
    over and over, a set for every byte.
    """
    refused = f"{path} is not a readable checkpoint: it"
    streams = [content] * 5  # before PyTorch 1.6: five pickles, one after another, then the raw weights
    if zipfile.is_zipfile(content):
        with zipfile.ZipFile(content) as archive:
            entries = archive.infolist()
            # PyTorch doesn't compress, so a file that holds more than its size is not a checkpoint.
            if sum(max(entry.file_size, entry.compress_size) for entry in entries) > len(content.getbuffer()):
                expected = f"expected a checkpoint as torch.save writes it ({flag})"
                raise UserError(f"{path} is a compressed archive, {expected}.")
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            streams = [io.BytesIO(archive.read(entry)) for entry in pickles]
    content.seek(0)
    for stream in streams:
        begin = stream.tell()
        for name in _names_of(stream):
            if not _GLOBALS.fullmatch(name):
                reason = f"asks to run code on loading ({name.replace(' ', '.')[:80]!r}), which is refused"
                remedy = "save the weights alone, torch.save(model.state_dict(), 'weights.pth')"
                raise UserError(f"{refused} {reason}; {remedy}, or pass another ({flag}).")
            if stream.tell() - begin > _LARGEST_PICKLE:
                raise UserError(f"{refused} holds more than weights; pass another ({flag}).")
    content.seek(0)


def _names_of(stream: BinaryIO) -> Iterator[str]:
    """What each opcode of a pickle asks for, as "module name", or ""."""
    texts = [""]
    memo: Dict[Any, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1]
        elif opcode.name == "BINGET":
            texts.append(memo.get(argument, ""))
        elif isinstance(argument, str):
            texts.append(argument)
        asked = {"GLOBAL": texts[-1], "STACK_GLOBAL": " ".join(texts[-2:]), "EMPTY_SET": "builtins set"}
        yield asked.get(opcode.name, "")


def _check_tensors(path: Path, state: Mapping[str, Tensor], flag: str) -> None:
    """Raise UserError unless all tensors are plain, finite, and no larger than the file in total."""
    room = path.stat().st_size
    for name, value in state.items():
        described = f"{path}: tensor {name[:80]!r}"
        stored = value.dtype == torch.int8 and f"{name}_scale" in state  # a weight of the int8 form
        plain = value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"
        if not plain or not (stored or value.dtype in DTYPES):
            kind = f"{value.dtype} {'nested' if value.is_nested else value.layout} on {value.device}"
            raise UserError(f"{described} is {kind}, expected dense floating-point weights ({flag}).")
        room -= value.numel() * value.element_size()
        if room < 0:
            found = f"{path}: the tensors claim more than the file holds"
            raise UserError(f"{found}, expected a plain checkpoint ({flag}).")
        if not bool(torch.isfinite(value).all()):
            remedy = f"training has diverged, so pass an earlier checkpoint ({flag})"
            raise UserError(f"{described} holds NaN or Inf; {remedy}.")


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
