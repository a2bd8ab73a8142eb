"""The option templates: what the generator writes, complete, and what each framework's own parser takes."""

from __future__ import annotations

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
STAGES = ("fidelity", "gan", "otf_fidelity", "otf_gan", "qat")
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


def numbers(value: Any, name: str = "") -> Iterator[Tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, str(key))
    elif name in NUMBERS:
        yield name, value


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own with everything in options/, which the generator then works on."""
    folder = Path(shutil.copytree(OPTIONS, tmp_path / "options"))
    monkeypatch.setattr(generate_options, "HERE", folder)
    return folder


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate_options.py", *arguments])
    return generate_options.main()


def test_every_template_on_disk_is_what_the_generator_writes(monkeypatch: Any) -> None:
    assert generate(monkeypatch, "--check") == 0


@pytest.mark.parametrize("damage", ["edited", "deleted", "added", "a skeleton edited"])
def test_check_names_what_is_not_current_and_the_generator_mends_it(
    copied: Path, damage: str, monkeypatch: Any, capsys: Any
) -> None:
    path = copied / "neosr" / ("my_own.toml" if damage == "added" else "test_aether_small_x2.toml")
    wanted = b"# mine\n" if damage == "added" else path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "a skeleton edited":
        with (copied / "skeletons/neosr/test.toml").open("a", encoding="utf-8") as file:
            file.write("# more\n")
        wanted += b"# more\n"
    else:
        path.write_text("# mine\n", encoding="utf-8")
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    assert generate(monkeypatch, "--check") == 1
    assert f"options/neosr/{path.name}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before
    assert generate(monkeypatch) == 0
    assert path.read_bytes() == wanted


@pytest.mark.parametrize("framework", ["traiNNer-redux", "neosr", "basicsr"])
def test_there_is_a_training_template_for_every_size_scale_and_stage(framework: str) -> None:
    # No framework degrades pictures on the fly at x3.
    wanted = {
        f"{size}_x{scale}_{stage}"
        for size in ("small", "medium", "large")
        for scale in (2, 3, 4)
        for stage in STAGES
        if scale != 3 or "otf" not in stage
    }
    if framework == "traiNNer-redux":
        wanted |= {"small_x2_cpu", "small_x2_cpu_finetune"}
    found = {
        path.stem.lower().split("aether_")[-1].split("aethernet_")[-1] for path in of(framework, "train")
    }
    found = {name for name in found if name.count("_") > 1}
    assert found == wanted


def test_the_templates_agree_with_the_networks_and_with_each_other() -> None:
    built = set()
    for path in TEMPLATES:
        options = read(path)
        network = dict(options["network_g"])
        variant = network.pop("type")
        assert network.pop("scale", options["scale"]) == options["scale"], f"{path}: two scales"
        assert f"{variant.split('_')[1]}_x{options['scale']}" in path.stem, path
        assert network.get("qat", True) is True, path
        if (variant, options["scale"], str(network)) not in built:  # many templates ask for the same
            depths = [1] * (5 if "large" in variant else 4)
            getattr(aether_arch, variant)(
                **network, scale=options["scale"], embed_dim=4 * len(depths), depths=depths
            )
            built.add((variant, options["scale"], str(network)))
        for name, value in numbers(options):
            assert isinstance(value, (int, float)), f"{path}: {name}: {value!r}"
        if options.get("queue_size"):
            assert options["queue_size"] % options["datasets"]["train"]["batch_size_per_gpu"] == 0, path
        parent = path.stem.replace("_gan", "_fidelity").replace("_qat", "_fidelity")
        if parent != path.stem:
            pretrained = Path(options["path"]["pretrain_network_g"])
            name = read(path.with_name(parent + path.suffix))["name"]
            assert pretrained.parts[:2] == ("experiments", name), path


def test_templates_say_adamw_and_in_a_comment_soap32_where_it_was_measured_besides() -> None:
    for path in of("traiNNer-redux", "train/"):
        optimizer = read(path)["train"]["optim_g"]
        if "_cpu" in path.stem:  # the launcher brings SOAP32, which a training on a GPU may not have
            assert optimizer["type"] == "SOAP32", path
            continue
        assert (optimizer["type"], optimizer["betas"]) == ("AdamW", [0.9, 0.99]), path
        section = path.read_text(encoding="utf-8").split("optim_g:\n")[1].split("\n\n")[0]
        lines = [line.strip("# ") for line in section.splitlines()]
        if "fidelity" in path.stem:
            soap = yaml.safe_load("\n".join(lines[lines.index("type: SOAP32") :]))
            assert soap == {"type": "SOAP32", "lr": 2 * optimizer["lr"], "betas": [0.95, 0.95]}, path


@pytest.mark.parametrize("framework", ["traiNNer-redux", "basicsr"])
def test_the_frameworks_own_parser_takes_every_template(framework: str) -> None:
    """neosr's is tomllib, with which ``read`` has read its templates."""
    root, python, register = None, sys.executable, "cpu.register_aether()"
    if framework == "traiNNer-redux":
        root = os.environ.get("TRAINNER_REDUX_ROOT")
        python, register = os.environ.get("TRAINNER_REDUX_PYTHON", python), "cpu.import_torchvision()"
        if root is None:
            pytest.skip("traiNNer-redux has no package: set TRAINNER_REDUX_ROOT to a checkout")
    package = "traiNNer" if root else "basicsr"
    program = (
        "import sys; paths = sys.stdin.read().split('\\n')\n"
        f"sys.path[:0] = {[str(ROOT / 'tests' / 'launchers'), root or str(ROOT)]}\n"
        f"import cpu; {register}\n"
        f"from {package}.utils.options import yaml_load\n"
        "for path in paths: yaml_load(path)\n"
        "print(len(paths), 'templates')"
    )
    text = "\n".join(map(str, of(framework)))
    done = subprocess.run([python, "-c", program], input=text, capture_output=True, text=True, cwd=root)
    assert f"{len(of(framework))} templates" in done.stdout, done.stderr[-2000:]
