"""Which versions of Python and PyTorch the network's files and fuse_aether.py work with.

Usage:
    python tests/matrix.py                                   # those on PATH
    python tests/matrix.py /usr/bin/python3 venv/bin/python  # these

Tries the interpreters named and prints a Markdown table; exit code 1 where anything failed. An interpreter
needs PyTorch, and safetensors for the column of that name; nothing is installed here. Versions of Python that
no interpreter was found for are listed as not tested.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = [f"3.{minor}" for minor in range(8, 14)]
ABSENT = "-"


class Absent(Exception):
    """This version of PyTorch or this interpreter has no such thing."""


# ------------------------------------------------------------------------ inside an interpreter that is tried


def trials(folder: Path) -> Dict[str, Callable[[], None]]:
    """One for each column, in an interpreter with PyTorch; each raises where it fails."""
    import torch

    shutil.copy(str(ROOT / "archs" / "aether_arch.py"), str(folder))  # alone, as in a framework
    sys.path.insert(0, str(folder))
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))

    def tiny() -> Any:
        import aether_arch

        torch.manual_seed(0)
        return aether_arch.AetherNet(
            scale=2, embed_dim=8, depths=(1, 1), lk_kernel=3, use_channel_attn=True, use_spatial_attn=True
        )

    def load(path: Path) -> Any:
        return torch.load(str(path), weights_only=True)

    def same(first: Any, second: Any, allowed: float = 1e-5) -> None:
        torch.testing.assert_close(first, second, rtol=1e-4, atol=allowed)

    def imported() -> None:
        import aether_arch

        assert Path(aether_arch.__file__).parent == folder

    def variants() -> None:
        import aether_arch

        for build in aether_arch.VARIANTS:
            for scale in (2, 3, 4) if build is aether_arch.VARIANTS[0] else (4,):
                net = build(scale=scale).eval()
                with torch.no_grad():
                    expected = net(image)
                    assert expected.shape == (1, 3, 9 * scale, 7 * scale)
                    net.fuse_model()
                    same(net(image), expected)
                    torch.save(net.state_dict(), str(folder / "fused.pth"))
                    other = build(scale=scale).eval()
                    other.load_state_dict(load(folder / "fused.pth"))
                    same(other(image), expected)

    def training() -> None:
        net = tiny().train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        before = {name: value.clone() for name, value in net.named_parameters()}
        torch.nn.functional.l1_loss(net(image), torch.rand(1, 3, 18, 14)).backward()
        optimizer.step()
        assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())
        assert any(not torch.equal(value, before[name]) for name, value in net.named_parameters())

    def round_trip() -> None:
        first, second = tiny().eval(), tiny().eval()
        with torch.no_grad():
            for value in second.parameters():
                value.zero_()
            torch.save(first.state_dict(), str(folder / "state.pth"))
            second.load_state_dict(load(folder / "state.pth"), strict=True)
            same(second(image), first(image))

    def int8() -> None:
        shutil.copy(str(ROOT / "archs" / "aether_quant.py"), str(folder))
        net = tiny().eval().fused().prepare_qat("default", [image])
        net(image).sum().backward()
        with torch.no_grad():
            same(net.convert_to_quantized()(image), net.eval()(image), 1 / 255 / 8)  # biases are rounded too

    def compiled() -> None:
        if not hasattr(torch, "compile"):
            raise Absent
        net = tiny().eval().fused()
        try:
            function = torch.compile(net)
        except RuntimeError as error:  # "not supported on Python 3.12+"
            if "not supported" in str(error):
                raise Absent from None
            raise
        with torch.no_grad():
            same(function(image), net(image))

    def command(ending: str) -> None:
        source, target = folder / f"in{ending}", folder / f"out{ending}"
        if ending == ".safetensors":
            try:
                from safetensors.torch import save_file
            except ImportError:
                raise Absent from None
            save_file(tiny().state_dict(), str(source))
        else:
            torch.save({"params": tiny().state_dict()}, str(source))

        def run(*more: str) -> int:
            words = [
                sys.executable,
                str(ROOT / "fuse_aether.py"),
                "--model_path",
                str(source),
                "--output_path",
                str(target),
                *more,
            ]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.stderr.count("\n") == (0 if done.returncode == 0 else 1), done.stderr
            return done.returncode

        assert run() == 0
        assert target.is_file()
        assert run() == 2, "an output that exists was overwritten"
        source.write_bytes(source.read_bytes()[:-99])
        assert run("--overwrite") == 2, "a cut file was taken"

    return {
        "import alone": imported,
        "variants: forward, fuse, reload": variants,
        "training step": training,
        "state dict": round_trip,
        "int8": int8,
        "`torch.compile`": compiled,
        "command, .pth": lambda: command(".pth"),
        "command, .safetensors": lambda: command(".safetensors"),
    }


def inside() -> None:
    """Print what this interpreter is and what its trials ended in, as one line of JSON."""
    report: Dict[str, Any] = {"python": "{}.{}.{}".format(*sys.version_info[:3]), "where": sys.prefix}
    try:
        import torch
    except ImportError:
        print(json.dumps(report))
        return
    report["torch"], report["results"] = torch.__version__.split("+")[0], {}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for column, trial in trials(Path(name)).items():
            try:
                trial()
                report["results"][column] = "yes"
            except Absent:
                report["results"][column] = ABSENT
            except Exception as error:
                report["results"][column] = f"{type(error).__name__}: {error}"
    report["seconds"] = round(time.perf_counter() - begin)
    print("\n" + json.dumps(report))


# ------------------------------------------------------------------------------------------- the table of all


def on_path() -> List[str]:
    names = ["python3", "python", *(f"python{version}" for version in VERSIONS)]
    return [path for path in map(shutil.which, names) if path]


def ask(interpreter: str) -> Optional[Dict[str, Any]]:
    """What inside() prints in that interpreter; None where it does not start."""
    try:
        done = subprocess.run([interpreter, __file__, "--inside"], capture_output=True, text=True)
        report: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return None
    return report


def table(reports: List[Dict[str, Any]]) -> List[str]:
    tried = [report for report in reports if "torch" in report]
    tried.sort(
        key=lambda report: [
            int(part) for part in f"{report['python']}.{report['torch']}".split(".")[:5] if part.isdigit()
        ]
    )
    columns = list(tried[0]["results"]) if tried else []
    rows = [["Python", "PyTorch", *columns], ["---", "---", *(":-:" for _ in columns)]]
    for report in tried:
        results = [result if result in ("yes", ABSENT) else "**no**" for result in report["results"].values()]
        rows.append([report["python"], report["torch"], *results])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    missing = [
        version
        for version in VERSIONS
        if not any(report["python"].startswith(version + ".") for report in tried)
    ]
    return lines + ["", f"Not tested: Python {', '.join(missing)}."] if missing else lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("interpreters", nargs="*", metavar="PYTHON", help="default: those on PATH")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside()
        return 0
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    reports: Dict[str, Dict[str, Any]] = {}
    failed = False
    for interpreter in args.interpreters or on_path():
        report = ask(interpreter)
        if report is None:
            if args.interpreters:
                parser.error(
                    f"{interpreter} does not run this script; pass interpreters of Python 3.8 or newer"
                )
            continue
        name = f"{interpreter}: Python {report['python']}"
        if "torch" not in report:
            print(f"{name} without PyTorch, not tested", file=sys.stderr)
            continue
        reports[report["where"]] = report
        name += f", PyTorch {report['torch']}"
        print(f"{name}, tried in {report['seconds']} s", file=sys.stderr)
        for column, result in report["results"].items():
            if result not in ("yes", ABSENT):
                failed = True
                print(f"{name}, {column}: {result}", file=sys.stderr)
    print("\n".join(table(list(reports.values()))))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
