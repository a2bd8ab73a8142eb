"""The commands: only arguments, messages and exit codes. Each of them runs through exit_code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Callable

from aethersr.errors import UserError, is_out_of_memory

# PyTorch's warning when numpy is not installed, which no user of a command needs to see.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def program_name(installed: str, script: str) -> str:
    """The name that the user typed: that of the installed command or of the script in a checkout."""
    return installed if Path(sys.argv[0]).stem == installed else script


def check_device(device: str) -> None:
    """Raises UserError if there is no such device ("cpu" or "cuda")."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was given, but PyTorch finds no CUDA device; pass --device cpu.")


def exit_code(program: str, action: Callable[[], None], stopped: str) -> int:
    """Run a command and return 0, 2 after a line about what the user can fix, or 130 if the user stopped it.

    Return 141 if whatever reads the output (such as ``head``) has ended.

    Args:
        program: the name before each line.
        action: the command; raises UserError.
        stopped: what to say after an interruption, such as "nothing was written."
    """
    try:
        code = _code(program, action, stopped)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # of the output: commands write to no other pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        return 141


def _code(program: str, action: Callable[[], None], stopped: str) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # don't fail on names that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")

    def error_line(message: object) -> int:
        for line in str(message).split(f"\n{program}: error: "):
            printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
            print(f"{program}: error: {printable}", file=sys.stderr)
        return 2

    old = None
    if threading.current_thread() is threading.main_thread():  # signal handlers work only there
        # SIGTERM must not leave temporary files either.
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        action()
    except UserError as error:
        return error_line(error)
    except KeyboardInterrupt:
        print(f"{program}: stopped; {stopped}", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error_line("there is not enough memory; close other programs, or pass --device cpu.")
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)
    return 0
