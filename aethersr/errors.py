"""What a user can mend: one line with the file, what was found, what was expected and the remedy."""

from __future__ import annotations

import sys


class UserError(Exception):
    """Something that the user can mend; the message says how."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, short enough for one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def missing_package(error: ImportError, why: str, extra: str) -> UserError:
    """One line for a package that is not installed.

    Args:
        error: what the import raised.
        why: what needs the package, such as "--onnx".
        extra: the extra of this distribution that brings it, such as "onnx".
    """
    name = (error.name or first_line(error)).split(".")[0]
    name = {"PIL": "pillow", "cv2": "opencv-python"}.get(name, name)
    return UserError(
        f"{why} needs the package {name}: pip install {name} (or pip install 'aethersr[{extra}]')."
    )


# What the allocators of PyTorch and ONNX Runtime say when they get no memory. The word "memory" alone does
# not mean it: an illegal memory access and an unknown memory format are other faults.
_ALLOCATORS = (
    "DefaultCPUAllocator: can't allocate memory",  # Linux, macOS
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUDA out of memory.",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Failed to allocate memory for requested buffer",  # ONNX Runtime
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator got no memory."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and any(words in str(error) for words in _ALLOCATORS)
