"""The option templates: what the generator writes, complete, and what each framework's own parser takes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import aether_arch
import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "options"))
import generate_options

OPTIONS = ROOT / "options"
TEMPLATES = sorted(OPTIONS / path for path in generate_options.templates())
# What YAML would read as text if it were written 5e-4, without a point.
NUMBERS = ("lr", "weight_decay", "total_iter", "loss_weight", "ema_decay", "ema", "val_freq", "eta_min_ratio")


def of(framework: str, *parts: str) -> List[Path]:
    """The templates of a framework whose path holds every one of ``parts``."""
    found = [path for path in TEMPLATES if path.relative_to(OPTIONS).parts[0] == framework]
    return [path for path in found if all(part in path.as_posix().lower() for part in parts)]


def read(path: Path) -> Dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return pytest.importorskip("tomllib", reason="reading TOML needs Python 3.11").loads(text)
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # type: ignore[no-any-return]


def values(options: Any, name: str = "") -> Iterator[Tuple[str, Any]]:
    if isinstance(options, dict):
        for key, inner in options.items():
            yield from values(inner, str(key))
    else:
        yield name, options


def test_the_templates_on_disk_are_those_that_the_generator_writes(tmp_path: Path, monkeypatch: Any) -> None:
    written = {OPTIONS / path: text.encode() for path, text in generate_options.templates().items()}
    there = {file for folder in {path.parent for path in written} for file in folder.glob("*.*")}
    assert {path: path.read_bytes() for path in there} == written
    copied = Path(shutil.copytree(OPTIONS, tmp_path / "options"))
    monkeypatch.setattr(generate_options, "HERE", copied)
    shutil.rmtree(copied / "neosr")
    (copied / "basicsr/test/AetherNet/test_aether_small_x2.yml").write_text("# mine")
    generate_options.main()
    assert {path: (copied / path.relative_to(OPTIONS)).read_bytes() for path in written} == written


@pytest.mark.parametrize(("framework", "besides"), [("traiNNer-redux", 2), ("neosr", 0), ("basicsr", 0)])
def test_there_is_a_training_template_for_every_size_scale_and_stage(framework: str, besides: int) -> None:
    """Five stages, but three at x3, where no framework degrades pictures on the fly; and those for a CPU."""
    for size, (scale, stages) in itertools.product(("small", "medium", "large"), ((2, 5), (3, 3), (4, 5))):
        more = besides * ((size, scale) == ("small", 2))
        assert len(of(framework, "train", f"{size}_x{scale}_")) == stages + more, (size, scale)


def test_the_templates_agree_with_the_networks_and_with_each_other() -> None:
    built = set()
    for path in TEMPLATES:
        options = read(path)
        network = dict(options["network_g"])
        variant = network.pop("type")
        assert network.pop("scale", options["scale"]) == options["scale"], f"{path}: two scales"
        assert f"{variant.split('_')[1]}_x{options['scale']}" in path.stem, path
        assert network.get("qat", True) is True, path
        asked = (variant, options["scale"], str(network))
        if asked not in built:  # many templates ask for the same
            depths = [1] * (5 if "large" in variant else 4)
            network.update(scale=options["scale"], embed_dim=20, depths=depths)
            getattr(aether_arch, variant)(**network)
            built.add(asked)
        for name, value in values(options):
            assert name not in NUMBERS or isinstance(value, (int, float)), f"{path}: {name}: {value!r}"
        if options.get("queue_size"):
            assert options["queue_size"] % options["datasets"]["train"]["batch_size_per_gpu"] == 0, path
        parent = path.stem.replace("_gan", "_fidelity").replace("_qat", "_fidelity")
        if parent != path.stem:
            pretrained = Path(options["path"]["pretrain_network_g"])
            name = read(path.with_name(parent + path.suffix))["name"]
            assert pretrained.parts[:2] == ("experiments", name), path


def test_templates_say_adamw_and_in_a_comment_soap32_where_it_was_measured_besides() -> None:
    for path in of("traiNNer-redux", "train/"):
        optimizer, text = read(path)["train"]["optim_g"], path.read_text(encoding="utf-8")
        # The launcher of the CPU templates brings SOAP32, which a training on a GPU may not have.
        assert optimizer["type"] == ("SOAP32" if "_cpu" in path.stem else "AdamW"), path
        if "_cpu" not in path.stem and "fidelity" in path.stem:
            rate = f"{2 * optimizer['lr']:.0e}".replace("e-0", "e-")
            soap = f"    # type: SOAP32\n    # lr: !!float {rate}\n    # betas: [0.95, 0.95]\n"
            assert soap in text, path


@pytest.mark.parametrize("framework", ["traiNNer-redux", "basicsr"])
def test_the_frameworks_own_parser_takes_every_template(framework: str) -> None:
    """neosr's is tomllib, with which ``read`` has read its templates."""
    root, python, package, register = str(ROOT), sys.executable, "basicsr", "cpu.register_aether()"
    if framework == "traiNNer-redux":
        root = os.environ.get("TRAINNER_REDUX_ROOT", "")
        python = os.environ.get("TRAINNER_REDUX_PYTHON", python)
        package, register = "traiNNer", "cpu.import_torchvision()"
        if not root:
            pytest.skip("traiNNer-redux has no package: set TRAINNER_REDUX_ROOT to a checkout")
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'tests' / 'launchers'), root]}; import cpu; {register}\n"
        f"from {package}.utils.options import yaml_load\n"
        "print(len([yaml_load(path) for path in sys.stdin.read().split('\\n')]), 'templates')"
    )
    text = "\n".join(map(str, of(framework)))
    done = subprocess.run([python, "-c", program], input=text, capture_output=True, text=True, cwd=root)
    assert f"{len(of(framework))} templates" in done.stdout, done.stderr[-2000:]
