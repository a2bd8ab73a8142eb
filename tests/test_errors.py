"""How a command ends: one line and an exit code; only what an allocator says is taken for out of memory."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aether_arch
import pytest
import torch
from conftest import ROOT

from aethersr.commands import Parser, exit_code
from aethersr.errors import UserError, missing_package

SCRIPTS = ["prepare_pictures", "draw_graphics", "overlap", "photographs", "basicsr_train", "serve_web"]
SCRIPTS += ["model_card", "trainner_redux_cpu"]
SCRIPTS += [*(f"aethersr.commands.{name}" for name in ("evaluate", "fuse", "upscale"))]


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60, dtype=torch.uint8),
        raising(MemoryError()),
        raising(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        raising(RuntimeError("CUDA error: out of memory")),
    ],
)
def test_only_an_allocator_that_gets_nothing_is_one_line_with_a_remedy(allocate: Any, capsys: Any) -> None:
    assert exit_code("x.py", allocate, "") == 2
    line = "x.py: error: there is not enough memory; close other programs, or pass --device cpu.\n"
    assert capsys.readouterr().err == line
    with pytest.raises(RuntimeError, match="illegal"):
        exit_code("x.py", raising(RuntimeError("CUDA error: an illegal memory access")), "")


def test_what_the_user_can_mend_is_one_printable_line_for_each_problem(capsys: Any) -> None:
    assert exit_code("x.py", raising(UserError("a\nb \x1b[31m\nx.py: error: c")), "") == 2
    assert capsys.readouterr().err == "x.py: error: a\\nb \\x1b[31m\nx.py: error: c\n"
    assert exit_code("x.py", lambda: None, "") == 0
    assert exit_code("x.py", raising(KeyboardInterrupt()), "nothing was written.") == 130
    assert capsys.readouterr().err == "x.py: stopped; nothing was written.\n"


LOADED = ["fuse_aether.py", "demo/demo.py", "demo/basicsr_train.py", "benchmarks/quality.py"]
LOADED += [f"training/{name}.py" for name in ("trainner_redux_cpu", "overlap", "draw_graphics")]


@pytest.mark.parametrize("program", ["other", "aether-fuse", *LOADED])
def test_ctrl_c_while_a_program_of_ours_is_loaded_ends_in_one_line(program: str, tmp_path: Path) -> None:
    for name in ("torch", "numpy", "cv2"):  # what takes seconds
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    if program not in LOADED:
        hook = "import sys; sys.excepthook = lambda *_: None; " * (program == "other")
        (tmp_path / program).write_text(f"{hook}from aethersr.commands.fuse import main")  # as pip writes it
    path = program if program in LOADED else str(tmp_path / program)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, path], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert (done.stderr == f"{Path(program).name}: stopped; nothing was written.\n") == (program != "other")


def test_a_missing_package_is_named_as_the_index_names_it() -> None:
    assert str(missing_package(ImportError(name="PIL.Image"), "--calibration", "upscale")) == (
        "--calibration needs the package pillow: pip install pillow "
        '(or pip install ".[upscale]" in AetherNet\'s folder).'
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe as another error")
@pytest.mark.parametrize("action", ["lambda: print('a' * 10**6)", "wrong"])
def test_a_reader_that_has_ended_is_no_traceback(action: str) -> None:
    code = f"""
import sys
from aethersr.commands import UserError, exit_code
def wrong(): print('a'); raise UserError('b')
sys.exit(exit_code('x', {action}, ''))"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    pipes: Any = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "x: error: b\n" if action == "wrong" else "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_tells_its_version(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.endswith(f" {aether_arch.__version__}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--outptu_path x", "--outptu_path is not an option: the nearest one is --output_path"),
        ("--output-path=x", "--output-path is not an option: the nearest one is --output_path"),
        ("-s2", "-s is not an option: it is read"),
        ("--gone 1", "--gone is not an option: there is one alone"),
        ("--other", "unrecognized arguments: --other"),
        ("a.jpg b", "a.jpg b follows no option that takes it; several files go in as a folder"),
        ("--tile abc", "--tile abc is not possible; expected a whole number"),
        ("--share a", "--share a is not possible; expected a number"),
        ("--date 2026", "--date 2026 is not possible; expected YYYY-MM-DD"),
        ("--more {a", "--more {a is not possible; expected JSON"),
    ],
)
def test_what_is_typed_wrong_is_answered_with_what_is_right(words: str, said: str) -> None:
    parser = Parser("x.py", "", {"-s": "it is read", "--gone": "there is one alone"})
    types = {"tile": int, "share": float, "date": datetime.date.fromisoformat, "more": json.loads}
    for name, kind in {**types, "output_path": str}.items():
        parser.add_argument(f"--{name}", type=kind)
    with pytest.raises(UserError) as error:
        parser.parse(words.split())
    assert str(error.value) == f"{said} (--help lists the options)."
    right = parser.parse(["--out", "two", "--tile", "-2"])
    assert (right.output_path, right.tile) == ("two", -2)
