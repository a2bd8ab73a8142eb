"""archs/soap32_optim.py, as traiNNer-redux calls it: inside autocast."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from typing import Any, Callable, Dict

import pytest
import torch
from conftest import ROOT
from pytorch_optimizer import SOAP
from torch import nn

STEPS = 25  # the bases are renewed every ten
OPTIONS = {"lr": 2e-3, "weight_decay": 0, "betas": (0.95, 0.95)}


class Registry(Dict[str, Any]):
    def register(self) -> Callable[[Any], Any]:
        return lambda kind: self.setdefault(kind.__name__, kind)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    module: Any = types.ModuleType("traiNNer.utils.registry")
    module.OPTIMIZER_REGISTRY = registry
    for name, content in (("traiNNer", None), ("traiNNer.utils", None), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, content or types.ModuleType(name))
    spec = importlib.util.spec_from_file_location("soap32_optim", ROOT / "archs" / "soap32_optim.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return registry


def trained(kind: Any, autocast: bool) -> nn.Conv2d:
    """A convolution after some steps, with gradients that fp16 can't square."""
    torch.manual_seed(0)
    net = nn.Conv2d(4, 6, 3)
    optimizer = kind(net.parameters(), **OPTIONS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (net(torch.rand(2, 4, 8, 8)).square().mean() * 1e-4).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.step()
    return net


def test_the_step_is_that_of_soap_without_autocast(registry: Registry) -> None:
    expected, found = trained(SOAP, autocast=False), trained(registry["SOAP32"], autocast=True)
    assert torch.equal(expected.weight, found.weight)
    assert torch.equal(expected.bias, found.bias)


def test_a_training_goes_on_from_its_saved_state(registry: Registry) -> None:
    first, second = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    optimizer, resumed = (registry["SOAP32"](net.parameters(), **OPTIONS) for net in (first, second))
    for step in range(STEPS):
        if step == 13:
            second.load_state_dict(first.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
        picture = torch.rand(2, 4, 8, 8)
        for net, its in ((first, optimizer), (second, resumed))[: 1 if step < 13 else 2]:
            its.zero_grad()
            net(picture).square().mean().backward()
            its.step()
    assert torch.allclose(first.weight, second.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("began", "name"), [(torch.optim.AdamW, "Adam or AdamW"), (torch.optim.SGD, "another optimizer")]
)
def test_the_state_of_another_optimizer_is_refused_by_name_with_the_way_on(
    registry: Registry, began: Any, name: str
) -> None:
    net = nn.Conv2d(4, 6, 3)
    other, optimizer = began(net.parameters(), lr=1e-3), registry["SOAP32"](net.parameters(), **OPTIONS)
    net(torch.rand(2, 4, 8, 8)).sum().backward()
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=f"began with {name}, .* says SOAP32: .*pretrain_network_g"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


def test_adamw_fails_on_the_state_of_soap32_as_the_page_says(registry: Registry) -> None:
    net = nn.Conv2d(4, 6, 3)
    optimizer = registry["SOAP32"](net.parameters(), **OPTIONS)
    for _ in range(2):
        net(torch.rand(2, 4, 8, 8)).sum().backward()
        optimizer.step()
    with pytest.raises(KeyError) as raised:
        torch.optim.AdamW(net.parameters()).load_state_dict(optimizer.state_dict())
    page = (ROOT / "docs" / "traiNNer-redux.md").read_text(encoding="utf-8")
    assert f"KeyError: {raised.value}" in page
