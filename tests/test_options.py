"""The option templates are current, complete, and what the networks and the frameworks' parsers take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Set, Tuple

import aether_arch
import pytest
import yaml
from conftest import ROOT

OPTIONS = ROOT / "options"
YAML = sorted(OPTIONS.glob("basicsr/*/AetherNet/*.yml"))
REDUX = sorted(OPTIONS.glob("traiNNer-redux/*/AetherNet/*.yml"))
TOML = sorted(OPTIONS.glob("neosr/*.toml"))
ALL = [*YAML, *REDUX, *TOML]
ON_THE_FLY = [path for path in (*YAML, *REDUX) if "otf" in path.stem.lower()]
FINE_TUNING = [path for path in ALL if path.stem.endswith(("gan", "qat"))]
BUILT: Set[Tuple[Any, int, str]] = set()
STAGES = ("fidelity", "gan", "otf_fidelity", "otf_gan", "qat")
NUMBERS = ("lr", "weight_decay", "total_iter", "loss_weight", "ema_decay", "ema", "val_freq", "eta_min_ratio")


def read(path: Path) -> Dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return pytest.importorskip("tomllib", reason="reading TOML needs Python 3.11").loads(text)
    return yaml.safe_load(text)


def name_of(path: Path) -> str:
    return path.relative_to(OPTIONS).as_posix()


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "generate_options.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder of our own with the generator, its skeletons and values, and every template."""
    return Path(shutil.copytree(OPTIONS, tmp_path / "options"))


def test_every_template_on_disk_is_what_the_generator_writes() -> None:
    done = generate(OPTIONS, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["edited", "deleted", "added", "a skeleton edited"])
def test_check_names_the_file_that_is_not_current_and_changes_nothing(copied: Path, damage: str) -> None:
    path = copied / "neosr" / "test_aether_small_x2.toml"
    if damage == "edited":
        path.write_text(path.read_text(encoding="utf-8").replace("scale", "scales"), encoding="utf-8")
    elif damage == "deleted":
        path.unlink()
    elif damage == "added":
        path = path.with_name("my_own.toml")
        path.write_text("", encoding="utf-8")
    else:
        skeleton = copied / "skeletons" / "neosr" / "test.toml"
        skeleton.write_text(skeleton.read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    done = generate(copied, "--check")
    assert done.returncode == 1
    assert f"options/neosr/{path.name}" in done.stderr
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before


def test_the_generator_restores_a_template_and_leaves_a_file_that_is_not_its_own(copied: Path) -> None:
    template, own = copied / "neosr" / "test_aether_small_x2.toml", copied / "neosr" / "my_own.toml"
    text = template.read_bytes()
    template.write_bytes(b"")
    own.write_bytes(b"mine")
    done = generate(copied)
    assert done.returncode == 0, done.stderr
    assert template.read_bytes() == text
    assert own.read_bytes() == b"mine"


def test_there_is_a_training_template_for_every_framework_size_scale_and_stage() -> None:
    for files, folder in ((YAML, "basicsr"), (REDUX, "traiNNer-redux"), (TOML, "neosr")):
        names = {path.stem.lower() for path in files if "train" in path.as_posix().split(folder, 1)[1]}
        sizes, scales = ("small", "medium", "large"), (2, 3, 4)
        wanted = [(size, scale, stage) for size in sizes for scale in scales for stage in STAGES]
        # No framework degrades pictures on the fly at x3.
        wanted = [(size, scale, stage) for size, scale, stage in wanted if scale != 3 or "otf" not in stage]
        ends = ["_{}_x{}_{}".format(*one) for one in wanted]
        missing = [end for end in ends if not any(name.endswith(end) for name in names)]
        assert not missing, f"{folder} has no template for {missing}"
        assert len(names) == len(wanted)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_network_of_a_template_is_one_that_this_file_builds(path: Path) -> None:
    options = read(path)
    network = dict(options["network_g"])
    variant = getattr(aether_arch, network.pop("type"))
    assert network.pop("scale", options["scale"]) == options["scale"], "two scales in one template"
    assert f"_x{options['scale']}" in path.stem
    assert variant.__name__.split("_")[1] in path.stem
    if (variant, options["scale"], str(network)) not in BUILT:  # many templates ask for the same
        stages = 5 if "large" in path.stem else 4
        variant(**network, scale=options["scale"], embed_dim=4 * stages, depths=[1] * stages)
        BUILT.add((variant, options["scale"], str(network)))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_number_of_a_template_is_a_number(path: Path) -> None:
    def numbers(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                numbers(inner, str(key))
        elif name in NUMBERS:
            assert isinstance(value, (int, float)), f"{name}: {value!r}"  # YAML reads a bare 5e-4 as text

    numbers(read(path), "")


@pytest.mark.parametrize("path", ON_THE_FLY, ids=name_of)
def test_the_batch_divides_the_queue_of_pictures_degraded_on_the_fly(path: Path) -> None:
    options = read(path)
    assert options["queue_size"] % options["datasets"]["train"]["batch_size_per_gpu"] == 0


@pytest.mark.parametrize("path", FINE_TUNING, ids=name_of)
def test_a_fine_tuning_starts_from_the_result_of_another_template_of_its_size_and_scale(path: Path) -> None:
    parent = path.with_name(path.name.replace("otf_gan", "otf_fidelity").replace("OTF_gan", "OTF_fidelity"))
    if parent == path:
        parent = path.with_name(path.name.replace("gan", "fidelity").replace("qat", "fidelity"))
    pretrained = Path(read(path)["path"]["pretrain_network_g"])
    assert pretrained.parts[:2] == ("experiments", read(parent)["name"])


def test_trainner_redux_parses_every_template_strictly() -> None:
    root = os.environ.get("TRAINNER_REDUX_ROOT")
    if not root:
        pytest.skip("traiNNer-redux has no package: set TRAINNER_REDUX_ROOT to a checkout to use its parser")
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import cpu; cpu.import_torchvision()\n"
        "from traiNNer.utils.options import yaml_load\n"
        "for path in sys.argv[3:]: yaml_load(path)\n"
        "print(len(sys.argv) - 3, 'templates')"
    )
    python = os.environ.get("TRAINNER_REDUX_PYTHON", sys.executable)
    command = [python, "-c", program, str(ROOT / "tests" / "launchers"), root, *map(str, REDUX)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert f"{len(REDUX)} templates" in done.stdout, done.stderr[-2000:]
