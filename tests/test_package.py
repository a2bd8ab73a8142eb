"""What `pip install .` brings: the wheel, installed into a fresh environment beside PyTorch alone."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Iterator

import aether_arch
import pytest
import torch
from conftest import ROOT
from PIL import Image

USAGE = (ROOT / "tests" / "golden" / "first_published_usage.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", USAGE, re.DOTALL)
SITE = Path(torch.__file__).parents[1]  # where the packages of the test run are


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy in which an older build left a file that the tree no longer has."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "fuse_aether.py", "upscale.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("archs", "aethersr"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    stale = folder / "build" / "lib" / "aethersr" / "renamed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (found,) = (folder / "dist").glob("*.whl")
    return found


def pip(*words: object) -> None:
    succeeds(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words, cwd=ROOT)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel, PyTorch and what PyTorch needs, nothing else."""
    folder, packages = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("torch_alone")
    venv.create(folder, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip("--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    for name in set(needed("torch")):
        files = importlib.metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__", "bin"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(SITE / top)
    (site,) = {path.parent for path in folder.rglob("aether_arch.py")}
    (site / "beside.pth").write_text(f"{packages}\n")
    return programs


def needed(name: str) -> Iterator[str]:
    """A distribution's name and those of what it needs, as far as they are installed."""
    try:
        requirements = importlib.metadata.distribution(name).requires or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield name
    for line in requirements:
        if "extra ==" not in line:
            yield from needed(re.match(r"[\w.-]+", line)[0])  # type: ignore[index]


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env={**kept, **variables}, capture_output=True, text=True)


def succeeds(*command: object, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_network_the_tools_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        told = archive.read(metadata).decode().splitlines()
    tools = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aethersr").rglob("*.py")}
    assert names == {"aether_arch.py", "aether_quant.py", "aethersr/py.typed", *tools}
    for line in (f"Version: {aether_arch.__version__}", "Requires-Python: >=3.8", "License: MIT"):
        assert line in told
    needed = [line[15:] for line in told if line.startswith("Requires-Dist: ")]
    assert [line for line in needed if "extra ==" not in line] == ["safetensors", "torch>=1.13"]
    assert not [line for line in needed if "torchvision" in line], "spandrel asks for it itself"


def test_what_runs_on_python_3_8_has_its_syntax() -> None:
    for path in [*ROOT.glob("*.py"), *(ROOT / "archs").glob("*.py"), *(ROOT / "aethersr").rglob("*.py")]:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 8))
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))


def test_the_commands_of_the_makefile_name_files_that_are_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"[\w/.-]+\.(?:py|lock|txt)\b", text):
        assert (ROOT / name).is_file() or "%" in name, name
    for name in re.search(r"^FAST := (.*)$", text, re.MULTILINE)[1].split():  # type: ignore[index]
        assert list((ROOT / "tests").glob(f"test_{name}.py")), name


def test_beside_pytorch_alone_a_checkpoint_is_fused(bare: Path, checkpoint: Path) -> None:
    words = ["--model_path", checkpoint.name, "--output_path", "out.pth"]
    succeeds(bare / "aether-fuse", *words, cwd=checkpoint.parent)
    code = "import aether_arch, aethersr; from aether_arch import aether_medium; print(aethersr.__version__)"
    assert succeeds(bare / "python", "-c", code, cwd=checkpoint.parent).strip() == aether_arch.__version__
    assert "head.weight" in torch.load(checkpoint.parent / "out.pth", weights_only=True)


def test_beside_pytorch_alone_the_speed_is_measured(bare: Path, tmp_path: Path) -> None:
    words = ["--quick", "--cases", "sizes", "training", "--sizes", "aether_small", "--scales", "2"]
    script = ROOT / "benchmarks" / "speed.py"
    printed = succeeds(bare / "python", script, *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "| aether_small x2, 8x8, PyTorch | fused |" in printed
    assert "| aether_small x2, 8x8, ONNX Runtime | fused | - | - | not possible here: " in printed


@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("aether-fuse --model_path {} --output_path out.safetensors", "safetensors"),
        ("aether-fuse --model_path {} --output_path out.pth --onnx fp32", "onnx"),
        ("aether-upscale --model {} --input picture.png --output out", "upscale"),
        ("aether-evaluate {} --hr .", "upscale"),
    ],
)
def test_beside_pytorch_alone_one_line_says_what_to_install(
    command: str, package: str, bare: Path, checkpoint: Path
) -> None:
    Image.new("RGB", (9, 7)).save(checkpoint.parent / "picture.png")
    program, *words = command.format(checkpoint).split()
    before = sorted(checkpoint.parent.iterdir())
    done = run(bare / program, *words, cwd=checkpoint.parent)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(rf"pip install (\S+ .*)?'?(aethersr\[)?{package}", done.stderr), done.stderr
    assert sorted(checkpoint.parent.iterdir()) == before


def test_the_usage_that_was_first_published_runs_once_installed(bare: Path, tmp_path: Path) -> None:
    assert len(BLOCKS) == 5
    with_the_rest = {"PYTHONPATH": str(SITE), "OMP_NUM_THREADS": "1"}
    output = succeeds(bare / "python", "-c", "\n".join(BLOCKS), cwd=tmp_path, **with_the_rest)
    assert output.splitlines()[0] == "Output shape: torch.Size([1, 3, 512, 512])"
    written = {"aether_medium_x4_fused.pth", *(f"aether_x4_{kind}.onnx" for kind in ("fp32", "fp16", "int8"))}
    assert {path.name for path in tmp_path.iterdir()} == written
