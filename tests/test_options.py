"""The option templates are current, and each framework's own parser takes every one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import aether_arch
import pytest
import yaml
from conftest import ROOT

OPTIONS = ROOT / "options"
GENERATOR = OPTIONS / "generate_options.py"
YAML = sorted(OPTIONS.glob("basicsr/*/AetherNet/*.yml"))
REDUX = sorted(OPTIONS.glob("traiNNer-redux/*/AetherNet/*.yml"))
TOML = sorted(OPTIONS.glob("neosr/*.toml"))


def read(path: Path) -> dict:
    if path.suffix == ".toml":
        tomllib = pytest.importorskip("tomllib", reason="reading TOML needs Python 3.11")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_template_on_disk_is_what_the_generator_writes() -> None:
    done = subprocess.run([sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_template_that_was_edited_by_hand_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "generate_options.py").write_text(GENERATOR.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "generate_options.py")]
    subprocess.run(command, check=True, capture_output=True)
    path = tmp_path / TOML[0].relative_to(OPTIONS)
    path.write_text(path.read_text(encoding="utf-8").replace("scale", "scales"), encoding="utf-8")
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert path.name in done.stderr


def test_there_is_a_training_template_for_every_framework_size_scale_and_kind() -> None:
    kinds = ("fidelity", "gan", "otf_fidelity", "otf_gan", "qat")
    for files, folder in ((YAML, "basicsr"), (REDUX, "traiNNer-redux"), (TOML, "neosr")):
        names = {path.stem.lower() for path in files if "train" in path.as_posix().split(folder, 1)[1]}
        expected = [(size, scale, kind) for size in ("small", "medium", "large") for scale in (2, 3, 4) for kind in kinds]
        expected = [(size, scale, kind) for size, scale, kind in expected if not (scale == 3 and "otf" in kind)]  # none of the three can
        missing = [wanted for wanted in expected if not any(name.endswith("_{}_x{}_{}".format(*wanted)) for name in names)]
        assert not missing, f"{folder} has no template for {missing}"
        assert len(names) == len(expected)


@pytest.mark.parametrize("path", [*YAML, *REDUX, *TOML], ids=lambda path: path.relative_to(OPTIONS).as_posix())
def test_the_network_of_a_template_is_one_that_this_file_builds(path: Path) -> None:
    options = read(path)
    network = dict(options["network_g"])
    variant = getattr(aether_arch, network.pop("type"))
    assert network.pop("scale", options["scale"]) == options["scale"], "two scales in one template"
    assert f"_x{options['scale']}" in path.stem
    assert variant.__name__.split("_")[1] in path.stem
    variant(**network, scale=options["scale"], embed_dim=16 if "large" not in path.stem else 20, depths=[1] * (5 if "large" in path.stem else 4))


@pytest.mark.parametrize("path", [*YAML, *REDUX, *TOML], ids=lambda path: path.relative_to(OPTIONS).as_posix())
def test_every_number_of_a_template_is_a_number(path: Path) -> None:
    def numbers(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                numbers(inner, str(key))
        elif name in ("lr", "weight_decay", "total_iter", "loss_weight", "ema_decay", "ema", "val_freq"):
            assert isinstance(value, (int, float)), f"{name}: {value!r}"  # YAML reads a bare 5e-4 as text

    numbers(read(path), "")


def test_the_batch_divides_the_queue_of_images_degraded_on_the_fly() -> None:
    for path in [path for path in (*YAML, *REDUX) if "otf" in path.stem.lower()]:
        options = read(path)
        assert options["queue_size"] % options["datasets"]["train"]["batch_size_per_gpu"] == 0, path.name


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
