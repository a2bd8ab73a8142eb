"""Copied into a framework's folder, the file registers its variants there as that framework needs them.

A stand-in of each framework's folders; tests/test_frameworks.py trains in the real ones.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import aether_arch
import pytest
import torch
from conftest import ROOT, X

NAMES = ["aether_small", "aether_medium", "aether_large"]
TINY: Dict[str, Any] = {"embed_dim": 8, "depths": [1]}
REGISTRY = """
class Registry(dict):
    def register(self, build):
        self[build.__name__] = build

ARCH_REGISTRY = Registry()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Makes a framework's folders with the file in them, imports it and returns the registry."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def make(framework: str) -> Any:
        for folder in ("", "archs", "utils"):
            (tmp_path / framework / folder).mkdir()
            (tmp_path / framework / folder / "__init__.py").touch()
        (tmp_path / framework / "utils" / "registry.py").write_text(REGISTRY)
        (tmp_path / framework / "archs" / "arch_util.py").write_text("def net_opt():\n    return 3, True\n")
        for name in ("aether_arch.py", "aether_quant.py"):
            shutil.copy(ROOT / "archs" / name, tmp_path / framework / "archs")
        importlib.import_module(f"{framework}.archs.aether_arch")
        return importlib.import_module(f"{framework}.utils.registry").ARCH_REGISTRY

    for name in [name for name in sys.modules if name.split(".")[0] in ("basicsr", "neosr", "traiNNer")]:
        monkeypatch.delitem(sys.modules, name)
    yield make
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("basicsr", "neosr", "traiNNer"):
            del sys.modules[name]


@pytest.mark.parametrize("framework", ["traiNNer", "neosr", "basicsr"])
def test_it_registers_its_variants_and_passes_options_on(install: Any, framework: str) -> None:
    registry = install(framework)
    assert list(registry) == NAMES
    for build in registry.values():
        net = build(scale=2, **TINY, qat=True)
        assert type(net).__module__ == f"{framework}.archs.aether_quant"
        assert (net.scale, net.options["embed_dim"]) == (2, 8)


def test_only_neosr_is_asked_for_the_scale(install: Any) -> None:
    neosr, redux = install("neosr")["aether_small"], install("traiNNer")["aether_small"]
    assert neosr(**TINY).scale == 3
    assert neosr(scale=2, **TINY).scale == 2
    assert neosr(2, **TINY).scale == 2
    assert redux(**TINY).scale == 4


def test_in_basicsr_statistics_are_parameters_that_are_not_trained(install: Any) -> None:
    """Its average of the weights copies parameters and no buffers."""
    net, other = (install(name)["aether_small"](scale=2, **TINY) for name in ("basicsr", "traiNNer"))
    assert set(net.state_dict()) == set(other.state_dict())
    statistics = {name for name in net.state_dict() if name.endswith(("running_mean", "running_var"))}
    assert statistics
    assert statistics == {name for name, value in net.named_parameters() if not value.requires_grad}
    assert statistics <= {name for name, _ in other.named_buffers()}


def test_a_second_copy_is_named(install: Any, tmp_path: Path) -> None:
    install("traiNNer")
    copy = tmp_path / "traiNNer" / "archs" / "another_arch.py"
    shutil.copy(ROOT / "archs" / "aether_arch.py", copy)
    with pytest.raises(ImportError, match="aether_small is in traiNNer already; keep one copy of") as error:
        importlib.import_module("traiNNer.archs.another_arch")
    assert str(copy) in str(error.value)


BESIDE = "aether_quant is missing: copy aether_quant.py beside {folder}/aether_arch.py."
ALONE = {
    "aether_small(qat=True)": BESIDE,
    "aether_small().prepare_qat()": BESIDE,
    "aether_small().load_state_dict(torch.load('int8.pth', weights_only=True))": BESIDE,
    "aether_arch.export_onnx": "aethersr.onnx is missing: pip install . in AetherNet's folder.",
}


def test_alone_the_file_imports_no_other_package_and_names_what_it_is_asked_for(tmp_path: Path) -> None:
    shutil.copy(ROOT / "archs" / "aether_arch.py", tmp_path)
    state = {"stages.0.0.reparam_conv.weight": X, "stages.0.0.reparam_conv.quant_out.range_sum": X}
    torch.save(state, tmp_path / "int8.pth")
    code = """
import sys; sys.path.insert(0, '.')
import aether_arch, torch; from aether_arch import aether_small
names = {'basicsr', 'neosr', 'traiNNer', 'onnx', 'onnxruntime', 'safetensors', 'aethersr', 'aether_quant'}
print(names & set(sys.modules))
"""
    for call in ALONE:
        code += f"try: {call}\nexcept ImportError as error: print(error)\n"
    printed = subprocess.check_output([sys.executable, "-I", "-c", code], cwd=tmp_path, text=True)
    expected = [text.format(folder=tmp_path) for text in ALONE.values()]
    assert printed.replace("/./", "/").splitlines() == ["set()", *expected]


def test_messages_go_to_the_frameworks_own_log_and_no_other_name_is_found() -> None:
    assert aether_arch.log is logging.getLogger("aether_arch")
    assert not hasattr(aether_arch, "aether_tiny")
