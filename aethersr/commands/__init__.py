"""The commands: only arguments, messages and exit codes. Each of them runs through exit_code."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, List, NoReturn, Optional, Type

from aethersr.errors import UserError, is_out_of_memory

# PyTorch reads it when it is imported. Threads that spin while they wait take several times as long on a busy
# machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# PyTorch's warning when numpy is not installed, which no user of a command needs to see.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
# Pillow's about broken EXIF tags, which are left out.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
DEVICES = ("cuda", "mps", "cpu")


def _one_line(kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
    """Ctrl-C while a command loads PyTorch, before exit_code runs it, ends it with a line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: stopped; nothing was written.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # another program's own stays
    sys.excepthook = _one_line


def program_name(installed: str, script: str) -> str:
    """The name that the user typed: that of the installed command or of the script in a checkout."""
    return installed if Path(sys.argv[0]).stem == installed else script


# What an argument of a type should have been.
_EXPECTED = {"int": "a whole number", "float": "a number", "fromisoformat": "YYYY-MM-DD", "loads": "JSON"}


class Parser(argparse.ArgumentParser):
    """Answers --version, and raises UserError where argparse would print its usage.

    ``hints``: answers to options that don't exist but are typed.
    """

    def __init__(self, program: str, document: Optional[str], hints: Optional[Dict[str, str]] = None) -> None:
        super().__init__(prog=program, description=(document or "").split("\n", 1)[0])
        self.hints = hints or {}
        from aether_arch import __version__

        self.add_argument("--version", action="version", version=f"{program} {__version__}")

    def parse(self, argv: Optional[List[str]] = None) -> argparse.Namespace:
        known = {name.strip("-").replace("_", "-"): name for name in self._option_string_actions}
        for word in itertools.takewhile("--".__ne__, sys.argv[1:] if argv is None else argv):
            option = word.split("=")[0] if word.startswith("--") else word[:2]
            begins = any(name.startswith(option) for name in known.values()) and option not in self.hints
            if not re.match("--?[a-zA-Z]", word) or begins:
                continue
            near = difflib.get_close_matches(option.strip("-").replace("_", "-"), known, 1, 0.65)
            if near or option in self.hints:
                hint = self.hints.get(option) or f"the nearest one is {known[near[0]]}"
                self.error(f"{option} is not an option: {hint}")
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        wrong = re.fullmatch(r"argument (\S+): invalid (\w+) value: '(.*)'", message, re.DOTALL)
        if wrong and wrong[2] in _EXPECTED:
            message = f"{wrong[1]} {wrong[3]} is not possible; expected {_EXPECTED[wrong[2]]}"
        message = re.sub(r"\(choose from '?(\d+)'?, .{40,}, '?(\d+)'?\)", r"(expected \1 to \2)", message)
        several = r"\1 follows no option that takes it; several files go in as a folder"
        message = re.sub("^unrecognized arguments: ([^-].*)", several, message, flags=re.DOTALL)
        raise UserError(f"{message} (--help lists the options).")


def local_path(text: str) -> Path:
    """An argument's type: a path, no web address and not empty, as an unset variable is."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    if re.match(r"\w+://", text):
        raise argparse.ArgumentTypeError(f"{text} is a web address; download the file and pass its path")
    return Path(text)


def check_device(device: str) -> None:
    """Raises UserError if there is no such device, one of DEVICES."""
    import torch

    mps = getattr(torch.backends, "mps", None)  # PyTorch for an Apple GPU
    found = {"cuda": torch.cuda.is_available(), "mps": mps is not None and mps.is_available(), "cpu": True}
    if not found[device]:
        name = "CUDA device" if device == "cuda" else "Apple GPU"
        raise UserError(f"--device {device} was given, but PyTorch finds no {name}; pass --device cpu.")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which must not leave temporary files either."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def exit_code(program: str, action: Callable[[], None], stopped: str) -> int:
    """Run a command and return 0, or 2 after a line for each problem, which a UserError's lines are.

    Return 130 or 143 if Ctrl-C or SIGTERM ended it, which ``stopped`` says too, 141 if what reads the output
    (such as ``head``) has ended. ``program``: the name before each line.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # don't fail on names that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    handles = threading.current_thread() is threading.main_thread()  # signal handlers work only there
    old = signal.signal(signal.SIGTERM, _terminate) if handles else None
    code, problems = 0, ""
    try:
        try:
            action()
        except UserError as error:
            code, problems = 2, str(error)
        except KeyboardInterrupt as error:
            print(f"{program}: stopped; {stopped}", file=sys.stderr)
            code = 143 if isinstance(error, _Terminated) else 130
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            code, problems = 2, "there is not enough memory; close other programs, or pass --device cpu."
        for line in problems.split(f"\n{program}: error: ") if problems else ():
            printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
            print(f"{program}: error: {printable}", file=sys.stderr)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # of the output: commands write to no other pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        return 141
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)
