"""Break a module on purpose, one small change at a time, and see whether its tests notice.

    python tests/mutate.py archs/aether_arch.py --count 100 --seed 1
    python tests/mutate.py aethersr/checkpoint.py --tests tests/test_checkpoint.py --all

Prints every change that the tests did not notice (a survivor) and the share that they did. Works on copies of
the checkout. Linux and macOS only: each mutant runs in a fork of one process that has PyTorch loaded.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # of modules whose tests are not tests/test_<module>.py
    "aether_arch": ["network", "fusion", "loading", "registration"],
    "aether_quant": ["quant"],
    "checkpoint": ["checkpoint", "checkpoint_refused", "checkpoint_bombs"],
}
SWAPPED: Dict[type, type] = {
    **{
        ast.Lt: ast.LtE,
        ast.LtE: ast.Lt,
        ast.Gt: ast.GtE,
        ast.GtE: ast.Gt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
    },
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.And: ast.Or, ast.Or: ast.And},
}


class Mutant(NamedTuple):
    """The source with ``new`` in place of the bytes from ``start`` to ``end``."""

    statement: int  # the line where the statement begins that holds the change
    line: int
    start: int
    end: int
    new: str


# -------------------------------------------------------------------------------------------- what is changed


def changed(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """Every small change of one node; its children are visited by themselves."""

    def other(**fields: object) -> ast.AST:
        made = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    if isinstance(node, ast.Compare):
        for k, operator in enumerate(node.ops):
            yield other(ops=[*node.ops[:k], SWAPPED[type(operator)](), *node.ops[k + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
        yield other(op=SWAPPED[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield other(value=not node.value)
        elif isinstance(node.value, int):
            yield other(value=node.value + 1)
        elif isinstance(node.value, float):
            yield other(value=node.value * 2 + 1)
        elif isinstance(node.value, str) and not isinstance(parent, (ast.JoinedStr, ast.Expr)):
            yield other(value=node.value + "x")
    elif isinstance(node, ast.IfExp):
        yield other(body=node.orelse, orelse=node.body)
    elif isinstance(node, (ast.If, ast.While)):  # its test, so that the rest of the text stays
        yield ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
    elif isinstance(node, ast.Call):
        for k, argument in enumerate(node.args):
            if k == len(node.args) - 1 and not isinstance(argument, ast.Starred):
                yield other(args=node.args[:k])
        for k in range(len(node.keywords)):
            yield other(keywords=node.keywords[:k] + node.keywords[k + 1 :])
    elif isinstance(node, ast.Slice):
        for bound in ("lower", "upper"):
            if getattr(node, bound) is not None:
                yield other(**{bound: None})
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(None)
    elif removable(node):
        yield ast.Pass()


def removable(node: ast.AST) -> bool:
    """Whether the program still reads without this statement: names that it makes would be missed at once."""
    if isinstance(node, ast.Assign):
        return any(not isinstance(target, ast.Name) for target in node.targets)
    return isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )


def visited(tree: ast.AST, statement: int = 1) -> Iterator[Tuple[ast.AST, ast.AST, int]]:
    """Nodes that run, each with its parent and the line of its statement.

    Without annotations, docstrings, imports and words for people.
    """
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Import, ast.ImportFrom)):
                continue
            if isinstance(child, ast.Constant) and isinstance(child.value, str) and message(tree):
                continue
            if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
                continue
            line = child.lineno if isinstance(child, ast.stmt) else statement
            yield child, tree, line
            if not isinstance(child, ast.JoinedStr):
                yield from visited(child, line)


def message(node: ast.AST) -> bool:
    """Whether a text in this call is for people: any wording is as right."""
    words = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return words.endswith(("Error", "warn", "print", "help", "add_argument", "check"))


def mutants(source: str) -> List[Mutant]:
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node, parent, statement in visited(ast.parse(source)):
        for new in changed(node, parent):
            old: Any = node.test if isinstance(node, (ast.If, ast.While)) else node
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            text = ast.unparse(new)
            if isinstance(new, (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.UnaryOp)):
                text = f"({text})"
            found.append(Mutant(statement, old.lineno, start, end, text))
    return sorted(set(found))


def apply(source: str, mutant: Mutant) -> str:
    raw = source.encode()
    return (raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :]).decode()


def difference(source: str, mutant: Mutant, name: str) -> str:
    lines = difflib.unified_diff(
        source.splitlines(), apply(source, mutant).splitlines(), name, name, n=0, lineterm=""
    )
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


# ------------------------------------------------------------------------------------------ running the tests


def checkout(folder: Path) -> Path:
    """A copy of what git would commit of the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


class Watch:
    """A plugin of pytest that notes, for each test, how long it takes and which lines of a file it runs."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)
        self.tests: Dict[str, Tuple[float, List[int]]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        lines = set()

        def inside(frame: Any, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            return inside

        begin = time.process_time()
        sys.settrace(lambda frame, *_: inside if frame.f_code.co_filename == self.file else None)
        yield
        sys.settrace(None)
        self.tests[item.nodeid] = time.process_time() - begin, sorted(lines)

    def save(self, path: Path) -> None:
        modules = {name.partition(".")[0] for name, module in sys.modules.items() if installed(module)}
        path.write_text(json.dumps({"tests": self.tests, "modules": sorted(modules)}))


def installed(module: Any) -> bool:
    return "site-packages" in (getattr(module, "__file__", None) or "")


def start(folder: Path, tests: List[str], limit: int, watch: Optional[Watch] = None) -> int:
    """Run the tests in a fork, in ``folder``, and return its process id; a signal ends it at the limit."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10 * limit)  # a busy machine is no reason to end it, waiting for ever is
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # so is this: only what never ends takes so long
    os.chdir(folder)
    sink = os.open("mutate.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, *tests], plugins=[watch] if watch else [])
    if watch:
        watch.save(folder / "watch.json")
    os._exit(int(code))


def finished() -> Tuple[int, int]:
    """Process id and status of the next fork that ends; what it started ends with it."""
    process, status = os.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    return process, status


def quick(watched: Dict[str, Any], limit: int) -> List[str]:
    """The quickest tests that take ``limit`` seconds together."""
    found, total = [], 0.0
    for seconds, name in sorted((seconds, name) for name, (seconds, _) in watched.items()):
        total += seconds
        if total <= limit:
            found.append(name)
    return found


def outcomes(
    module: str, source: str, chosen: List[Mutant], tests: List[str], limit: int, jobs: int
) -> Iterator[Tuple[Mutant, str]]:
    """Each mutant with "survives", "fails" or "too slow".

    It meets the tests that run its statement first, then the others: fixtures and processes run lines too.
    """
    with tempfile.TemporaryDirectory() as name:
        free = [checkout(Path(name, str(k)).resolve()) for k in range(jobs)]
        start(free[0], tests, 30 * limit, Watch(free[0] / module))
        if finished()[1] != 0:
            print((free[0] / "mutate.log").read_text(), file=sys.stderr)
            sys.exit(f"{module}: the tests fail, or take over {30 * limit} s, without a change")
        known = json.loads((free[0] / "watch.json").read_text())
        for package in known["modules"]:  # so that the forks need not
            with contextlib.suppress(Exception):
                importlib.import_module(package)
        taken = quick(known["tests"], limit)
        print(f"{module}: {len(taken)} of {len(known['tests'])} tests, {len(chosen)} mutants", flush=True)
        running: Dict[int, Tuple[Mutant, Path, bool]] = {}
        waiting = [(mutant, False) for mutant in reversed(chosen)]
        while waiting or running:
            if waiting and free:
                (mutant, again), folder = waiting.pop(), free.pop()
                (folder / module).write_text(apply(source, mutant), encoding="utf-8")
                lines = {*range(mutant.statement, mutant.line + 1)}
                mine = [] if again else [name for name in taken if lines & {*known["tests"][name][1]}]
                running[start(folder, mine or taken, 3 * limit)] = mutant, folder, bool(mine)
                continue
            process, status = finished()
            mutant, folder, partly = running.pop(process)
            free.append(folder)
            if status == 0 and partly:
                waiting.append((mutant, True))
                continue
            slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (
                signal.SIGALRM,
                signal.SIGXCPU,
                signal.SIGKILL,
            )
            yield mutant, "survives" if status == 0 else "too slow" if slow else "fails"


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("module", help="file to change, from the checkout's root")
    parser.add_argument("--tests", nargs="+", help="files of tests (default: tests/test_<module>.py)")
    parser.add_argument("--count", type=int, default=100, help="mutants, taken at random (default: 100)")
    parser.add_argument("--all", action="store_true", help="every mutant there is")
    parser.add_argument("--lines", help="only those on lines FIRST-LAST")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--limit",
        type=int,
        default=20,
        help="seconds of tests that a mutant meets: the quickest (default: 20)",
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    source = (ROOT / args.module).read_text(encoding="utf-8")
    stem = Path(args.module).stem
    tests = args.tests or [f"tests/test_{name}.py" for name in TESTS.get(stem, [stem])]
    found = mutants(source)
    if args.lines:
        first, last = map(int, args.lines.split("-"))
        found = [mutant for mutant in found if first <= mutant.line <= last]
    chosen = found if args.all else random.Random(args.seed).sample(found, min(args.count, len(found)))
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    counted = {"survives": 0, "fails": 0, "too slow": 0}
    for mutant, outcome in outcomes(args.module, source, chosen, tests, args.limit, args.jobs):
        counted[outcome] += 1
        if outcome == "survives":
            print(
                f"survives: {args.module}:{mutant.line}\n{difference(source, mutant, args.module)}\n",
                flush=True,
            )
    share = 1 - counted["survives"] / max(1, len(chosen))
    print(
        f"{args.module}: {share:.0%} of {len(chosen)} mutants noticed, out of {len(found)} possible: "
        f"{counted['fails']} failed a test, {counted['too slow']} never ended"
    )
    return int(share < 0.9)


if __name__ == "__main__":
    sys.exit(main())
