"""How fast networks are on this machine: our sizes fused and unfused, others, other runtimes, training.

    python benchmarks/speed.py                       # the CPU, in ten minutes
    python benchmarks/speed.py --quick               # whether everything runs, with tiny networks
    python benchmarks/speed.py --cases sizes peers --traiNNer-redux CHECKOUT
    python benchmarks/speed.py --device cuda         # a GPU, in four minutes: make gpu

Needs only PyTorch, 2.3 or newer; a line says what is not possible here. Cases of one group take turns
(aethersr/timing.py). The table has the median in ms, how many times as fast as the group's first case that is
(with the middle half of the rounds), and what else was found.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aethersr.commands import Parser, check_device, exit_code  # noqa: I001
import torch
import cases
from networks import OURS, PEERS, SHIPPED, aether_arch, as_trained, machine, positive, short, table, typed

from aethersr.errors import UserError, first_line
from aethersr.timing import Comparison, interleaved

HEAD = ["what", "case", "ms", "times as fast as the first", "more"]
SLOWEST = 1.0  # seconds of a step on a GPU: one that takes longer would use up the minutes
IMPOSSIBLE = "not possible here"
MINUTES = {"cpu": math.inf, "cuda": 4}  # nothing begins after these
PARTS = {  # functions of cases.py, the most important first
    "cpu": ("sizes", "peers", "runtimes", "training", "depthwise"),
    "cuda": ("networks", "training", "depthwise", "memory", "peers", "compiled"),
}


class OutOfTime(Exception):
    pass


class Bench:
    """What the cases need, and the table so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.quick = args, args.quick
        self.device, self.cuda = args.device, args.device == "cuda"
        self.picture = f"{args.side}x{args.side}"
        self.crops = (2, 8) if args.quick else (16, 64) if self.cuda else (4, 32)  # of a training step
        self.lines: List[str] = []
        self.end = time.monotonic() + 60 * MINUTES[args.device]
        self.wait: Callable[[], Any] = torch.cuda.synchronize if self.cuda else lambda: None
        # Of one thread the computing time counts, which other work on the machine hardly changes.
        self.clock = time.perf_counter if self.cuda or args.threads > 1 else time.process_time

    def build(self, variant: str, scale: int) -> Any:
        torch.manual_seed(0)
        options: Any = {"embed_dim": 8, "depths": (1,)} if self.quick else {}
        return as_trained(getattr(aether_arch, variant)(scale=scale, **options)).eval()

    def random(self, count: int, channels: int, side: int) -> torch.Tensor:
        return torch.rand(count, channels, side, side, device=self.device)

    def say(self, text: str) -> None:
        """Print a line; the file has what was printed so far."""
        print(text, flush=True)
        self.lines.append(text)
        if self.args.output:
            part = self.args.output.with_name(f"{self.args.output.name}.part")
            part.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
            part.replace(self.args.output)

    def row(self, *cells: str) -> None:
        self.say(f"| {' | '.join(cells)} |")

    def tidy(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, step: Callable[[], Any]) -> float:
        start = self.clock()
        step()
        self.wait()
        return self.clock() - start

    def group(self, what: str, named: Mapping[str, Tuple[Any, ...]]) -> None:
        """Time the cases that work here, in turns. OutOfTime: the minutes are over.

        Args:
            what: what they have in common, for the table's first column.
            named: for each case a function and its arguments after the Bench, see cases.py.
        """
        if time.monotonic() > self.end:
            raise OutOfTime
        made: Dict[str, Tuple[Callable[[], Any], Callable[[float], str]]] = {}
        loops, counts = {}, {}
        for name, (prepare, *given) in named.items():
            try:
                step, told = prepare(self, *given)
                self.seconds(step)
                about = self.seconds(step)
                if self.cuda and about > SLOWEST:
                    raise RuntimeError(f"{about:.1f} s, too slow to compare")
            except Exception as error:  # of any library: the other cases may work
                self.row(what, name, "-", "-", f"{IMPOSSIBLE}: {first_line(error)}")
                self.tidy()
                continue
            # Repeated, so that waiting for the GPU before reading the clock counts little.
            counts[name] = max(1, min(100, int(0.01 / max(about, 1e-9))))
            loops[name], made[name] = functools.partial(repeat, step, counts[name]), (step, told)
        if made:
            seconds = len(made) * (0.02 if self.quick else 0.4 if self.cuda else 5)
            found = interleaved(loops, self.args.rounds, seconds, wait=self.wait, clock=self.clock)
            times = Comparison({name: [ms / counts[name] for ms in found.times[name]] for name in made})
        for name, (_, told) in made.items():
            first, ms = next(iter(made)), times.median(name)
            gain = "1" if name == first else times.ratio(first, name).words()
            self.row(what, name, short(ms), gain, told(ms))
        made.clear()
        self.tidy()


def repeat(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser("speed.py", __doc__)
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    names = list(dict.fromkeys(sum(PARTS.values(), ())))
    add = parser.add_argument
    add("--device", choices=sorted(PARTS), default="cpu")
    add("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    add("--quick", action="store_true", help="tiny networks: whether everything runs")
    add("--sizes", nargs="+", choices=OURS[:3], default=list(OURS[:3]), metavar="SIZE")
    add("--scales", type=int, nargs="+", choices=(1, 2, 3, 4, 8), default=[2, 4])
    add("--side", type=positive, help="pixels of the picture (default: 128; on a GPU 256)")
    add("--weights", type=Path, nargs="+", default=[SHIPPED], help="for runtimes")
    add("--traiNNer-redux", dest="checkout", type=Path, help="a checkout, for peers")
    add("--peers", nargs="+", default=list(PEERS), help="names in traiNNer-redux")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--rounds", type=positive, default=15, help="at most so many turns (default: %(default)s)")
    add("--output", type=Path, help="write the table to this file, too")
    args = parser.parse(argv)
    args.side = 8 if args.quick else args.side or (256 if args.device == "cuda" else 128)
    return args


def measure(argv: Optional[List[str]]) -> None:
    args = parse_args(argv)
    command = typed("speed.py", argv, {"CHECKOUT": args.checkout, "FILE": args.output})
    check_device(args.device)
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"the folder {args.output.parent} does not exist; make it or pass another --output.")
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    bench.say(f"{machine(args.device)}, {args.threads} thread" + "s" * (args.threads > 1) + ".\n")
    bench.say(f"`{command}`\n")
    bench.say("\n".join(table(HEAD, [])))
    start = len(bench.lines)
    try:
        for name in args.cases or PARTS[args.device]:
            getattr(cases, name)(bench)
    except OutOfTime:
        print(f"{MINUTES[args.device]} minutes are over; --cases measures the rest.", file=sys.stderr)
    if all(IMPOSSIBLE in line for line in bench.lines[start:]):
        raise UserError("nothing could be measured here; the lines above say why (--cases).")


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("speed.py", lambda: measure(argv), "printed lines are kept.")


if __name__ == "__main__":
    sys.exit(main())
