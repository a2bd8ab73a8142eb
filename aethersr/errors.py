"""Errors that a user can fix: one line with the file, what was found, what was expected and the remedy."""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any, Iterator


class UserError(Exception):
    """Something that the user can fix; the message says how."""


class Refused(Exception):
    """Why a file isn't opened, and what to do: words that follow its name."""


@contextlib.contextmanager
def naming(path: Any, flag: str) -> Iterator[None]:
    """Inside, what is wrong with a file becomes a UserError with its name and the option to change."""
    try:
        if not os.path.isfile(path):  # Path's own raises before Python 3.14 where a name is too long
            raise Refused(f"{missing(path, 'is not a file')}; pass another")
        yield
    except Refused as error:
        raise UserError(f"{path} {error} ({flag}).") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; pass another ({flag}).") from None
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass the weights of an AetherNet ({flag}).") from None


def missing(path: Any, otherwise: str) -> str:
    """Why nothing of the kind that is wanted lies there; ``otherwise``: the words for another kind."""
    link = "is a link to nothing" if os.path.islink(path) else "does not exist"
    return otherwise if os.path.exists(path) else link


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut to fit into a line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def missing_package(error: ImportError, why: str, extra: str) -> UserError:
    """One line about a package that ``why`` (such as "--onnx") needs, and that our ``extra`` installs."""
    name = (error.name or first_line(error)).split(".")[0]
    name = {"PIL": "pillow", "cv2": "opencv-python", "skimage": "scikit-image"}.get(name, name)
    ours = f""" (or pip install ".[{extra}]" in AetherNet's folder)""" if extra else ""
    return UserError(f"{why} needs the package {name}: pip install {name}{ours}.")


def need(packages: str, why: str, extra: str = "") -> None:
    """Import packages, named with spaces between. UserError, see missing_package: one isn't installed."""
    try:
        for name in packages.split():
            importlib.import_module(name)
    except ImportError as error:
        raise missing_package(error, why, extra) from None


# What the allocators of PyTorch and ONNX Runtime say when memory runs out. The word "memory" alone is not
# enough: an illegal memory access and an unknown memory format are different errors.
_ALLOCATORS = (
    "DefaultCPUAllocator: can't allocate memory",  # Linux, macOS
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Failed to allocate memory for requested buffer",  # ONNX Runtime
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's on a GPU
        return True
    return isinstance(error, Exception) and any(words in str(error) for words in _ALLOCATORS)
