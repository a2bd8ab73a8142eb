"""The commands: arguments, messages and exit codes, nothing else. All of them end in exit_code."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Callable

from aethersr.errors import UserError, is_out_of_memory

# What PyTorch says when it is imported where numpy is not installed; no command needs it to hear that.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def program_name(installed: str, script: str) -> str:
    """The name that the user typed: of the installed command, or of the script in a checkout."""
    return installed if Path(sys.argv[0]).stem == installed else script


def exit_code(program: str, action: Callable[[], None], stopped: str) -> int:
    """Run a command: 0, or 2 after one line for what the user can mend, or 130 where the user stopped it.

    Args:
        program: the name before each line.
        action: the command; raises UserError.
        stopped: what is true after an interruption, such as "nothing was written."
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")

    def error_line(message: object) -> int:
        for line in str(message).split(f"\n{program}: error: "):
            printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
            print(f"{program}: error: {printable}", file=sys.stderr)
        return 2

    old = None
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
        # A polite kill leaves no temporary file either.
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
