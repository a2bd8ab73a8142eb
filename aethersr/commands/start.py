"""Import this before what takes seconds to load: Ctrl-C ends a program with one line then, too.

The installed commands begin here: aether-fuse is fuse.
"""

from __future__ import annotations

import importlib
import sys
from types import TracebackType
from typing import Callable, Optional, Type


def _one_line(kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; nothing was written.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _command(name: str) -> Callable[[], int]:
    return lambda: importlib.import_module(f"aethersr.commands.{name}").main()


sys.excepthook = _one_line
evaluate, fuse, shrink, upscale = map(_command, ("evaluate", "fuse", "shrink", "upscale"))
