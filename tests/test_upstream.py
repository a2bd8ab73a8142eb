"""What integrations/upstream.py lays into spandrel and traiNNer-redux works and passes their own checks.

SPANDREL_ROOT and TRAINNER_REDUX_ROOT name checkouts, SPANDREL_PYTHON and TRAINNER_REDUX_PYTHON the Python
that has their requirements. Without them the checkouts' own tests are skipped, the rest runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Set

import numpy as np
import pytest
import torch
from aether_arch import AetherNet
from checkpoints import older_fused
from conftest import ROOT, randomize
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "integrations"))
import upstream

pytestmark = pytest.mark.usefixtures("one_thread")
REGISTRY = "libs/spandrel/spandrel/__helpers/main_registry.py"
# torchvision as the tests of this repository import it, then a program.
START = f"import sys; sys.path.append({str(ROOT / 'demo')!r}); from basicsr_train import import_torchvision; "
START += "import_torchvision(); sys.path.pop(); "
OPENS = """
import numpy, torch
from spandrel import ModelLoader
image = torch.from_numpy(numpy.load("image.npy"))
for name in sys.argv[1:]:
    model = ModelLoader().load_from_file(name)
    assert model.architecture.id == "AetherNet", name
    numpy.save(name + ".npy", model(image).numpy())
print(sorted(name for name in sys.modules if name.split(".")[0] in ("aethersr", "aether_arch")))
"""


def run(python: str, *arguments: Any, folder: Path, **environment: str) -> str:
    """What a program prints; its output is shown where it fails."""
    settings = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **environment}
    command = [python, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command[1:4]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def with_ruff(python: str) -> str:
    """This Python, or the tests' own where it has no ruff; skips the test where neither has."""
    for each in (python, sys.executable):
        if not subprocess.run([each, "-m", "ruff", "--version"], capture_output=True).returncode:
            return each
    return str(pytest.skip("needs ruff: pip install ruff"))


def copy_of(variable: str, folder: Path) -> Path:
    """A copy of the checkout that an environment variable names."""
    source = os.environ.get(variable)
    if not source:
        pytest.skip(f"set {variable} to a checkout to run its own tests and linters")
    large = shutil.ignore_patterns(".git", "experiments", "datasets", "__pycache__", "zips")

    def ignored(folder: str, names: List[str]) -> Set[str]:
        return {*large(folder, names), *(["models"] if folder.endswith("tests") else [])}

    return Path(shutil.copytree(source, folder / "checkout", ignore=ignored))


def forms() -> Dict[str, Dict[str, torch.Tensor]]:
    """State dicts of one network in every form."""
    net: Any = randomize(AetherNet(scale=2, embed_dim=16, depths=(1, 1), lk_kernel=5)).eval()
    quantised = net.fused().prepare_qat("full", [torch.rand(1, 3, 16, 16)]).eval()
    found = {"training": net.state_dict(), "fused": net.fused().state_dict(), "older": older_fused(net)}
    found["quantised"] = dict(quantised.state_dict())
    return {**found, "int8": quantised.convert_to_quantized().state_dict()}


def test_every_change_fits_our_files_and_leaves_python() -> None:
    files = {**upstream.spandrel_files(), **upstream.redux_files()}
    templates = [path for path in files if path.endswith(".yml")]
    assert len(templates) == len(list((ROOT / "options" / "traiNNer-redux").rglob("*.yml"))) > 40
    for path, text in files.items():
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert not re.search(r"(?m)^\s*(import|from) (aethersr|aether_)", text), path
            assert "@URL@" not in text


def test_the_installed_spandrel_opens_every_form_once_it_has_our_files(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("spandrel")
    if spec is None or not spec.origin:
        pytest.skip("spandrel is not installed: pip install spandrel")
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(spec.origin).parent, checkout / "libs" / "spandrel" / "spandrel")
    (checkout / "tests").mkdir()
    (checkout / "README.md").write_text("- [RCAN](x)\n\n#### Face Restoration\n")
    command = [ROOT / "integrations" / "upstream.py", "spandrel", checkout]
    for _ in range(2):  # a second run adds nothing twice
        run(with_ruff(sys.executable), *command, folder=tmp_path)
    assert (checkout / REGISTRY).read_text().count("AetherNetArch()") == 1
    assert (checkout / REGISTRY).read_text().count("    AetherNet,\n") == 1
    assert (checkout / "README.md").read_text().count("AetherNet") == 1

    states, image = forms(), torch.rand(1, 3, 9, 14)
    np.save(tmp_path / "image.npy", image.numpy())
    for form, state in states.items():
        save_file(state, tmp_path / f"{form}.safetensors")
    names = [f"{form}.safetensors" for form in states]
    package = str(checkout / "libs" / "spandrel")
    printed = run(sys.executable, "-c", START + OPENS, *names, folder=tmp_path, PYTHONPATH=package)
    assert printed.strip().endswith("[]"), "it needs nothing of this repository"
    from aethersr.identify import aether_from_state_dict

    for form, state in states.items():
        with torch.no_grad():
            expected = aether_from_state_dict(state)(image).clamp(0, 1).numpy()
        assert np.abs(np.load(tmp_path / f"{form}.safetensors.npy") - expected).max() <= 1e-6, form


@pytest.mark.parametrize(
    ("project", "message"),
    [
        ("spandrel", "has no folder libs/spandrel: give"),
        ("trainner-redux", "has no folder traiNNer/archs: give"),
    ],
)
def test_another_folder_is_refused_in_one_line(project: str, message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "integrations" / "upstream.py"), project, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_spandrels_own_tests_and_linters_pass(tmp_path: Path) -> None:
    checkout, python = copy_of("SPANDREL_ROOT", tmp_path), os.environ.get("SPANDREL_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import bs4, cv2, requests, syrupy"], capture_output=True).returncode:
        pytest.skip("SPANDREL_PYTHON must name a Python with the checkout's requirements-dev.txt")
    run(with_ruff(python), ROOT / "integrations" / "upstream.py", "spandrel", checkout, folder=tmp_path)
    ours = ["libs/spandrel/spandrel/architectures/AetherNet", "tests/test_AetherNet.py", REGISTRY]
    run(with_ruff(python), "-m", "ruff", "check", *ours, folder=checkout)
    run(with_ruff(python), "-m", "ruff", "format", "--check", *ours, folder=checkout)
    tests = ["tests/test_AetherNet.py", "tests/test_registry.py", "-q", "-p", "no:cacheprovider"]
    start = START + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    run(python, "-c", start, *tests[:1], "--snapshot-update", folder=checkout)
    assert "7 passed" in run(python, "-c", start, *tests, folder=checkout)
    if not subprocess.run([python, "-c", "import pyright"], capture_output=True).returncode:
        run(python, "-m", "pyright", "--pythonpath", python, "libs", ours[1], folder=checkout)


def test_trainner_reduxs_own_tests_and_linters_pass(tmp_path: Path) -> None:
    checkout = copy_of("TRAINNER_REDUX_ROOT", tmp_path)
    python = os.environ.get("TRAINNER_REDUX_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import msgspec, pytest, timm"], capture_output=True).returncode:
        pytest.skip("TRAINNER_REDUX_PYTHON must name a Python with the checkout's requirements")
    run(with_ruff(python), ROOT / "integrations" / "upstream.py", "trainner-redux", checkout, folder=tmp_path)
    ours = [f"traiNNer/archs/aether_{name}.py" for name in ("arch", "quant")]
    run(with_ruff(python), "-m", "ruff", "check", *ours, folder=checkout)
    run(with_ruff(python), "-m", "ruff", "format", "--check", *ours, folder=checkout)
    start = START + "sys.path.insert(0, '.'); "
    tests = ["tests/test_archs/test_archs.py", "-q", "-k", "aether", "-p", "no:cacheprovider"]
    run_tests = start + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    assert "24 passed" in run(python, "-c", run_tests, *tests, folder=checkout)
    templates = [str(path) for path in (checkout / "options/_templates").rglob("AetherNet/*.yml")]
    parse = (
        "from traiNNer.utils.options import yaml_load; print(len([yaml_load(path) for path in sys.argv[1:]]))"
    )
    assert run(python, "-c", start + parse, *templates, folder=checkout).split()[-1] == str(len(templates))
    assert len(templates) > 40
    if not subprocess.run([python, "-c", "import pyright"], capture_output=True).returncode:
        run(python, "-m", "pyright", "--pythonpath", python, *ours, folder=checkout)
