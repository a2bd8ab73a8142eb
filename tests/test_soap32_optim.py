"""archs/soap32_optim.py, as traiNNer-redux calls it: inside autocast."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from conftest import ROOT
from pytorch_optimizer import SOAP
from torch import nn

OPTIONS = {"lr": 2e-3, "weight_decay": 0, "betas": (0.95, 0.95)}
STEPS = 25  # the bases are renewed every ten


@pytest.fixture
def soap32(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, as it is registered where traiNNer-redux isn't installed."""
    found: list = []
    module: Any = types.ModuleType("traiNNer.utils.registry")
    module.OPTIMIZER_REGISTRY = types.SimpleNamespace(register=lambda: found.append)
    for name in ("traiNNer", "traiNNer.utils", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    spec: Any = importlib.util.spec_from_file_location("soap32_optim", ROOT / "archs" / "soap32_optim.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert [kind.__name__ for kind in found] == ["SOAP32"]
    return found[0]


def step(net: nn.Module, optimizer: Any, picture: torch.Tensor, autocast: bool = False) -> None:
    """With gradients that fp16 can't square."""
    optimizer.zero_grad()
    (net(picture).square().mean() * 1e-4).backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        optimizer.step()


def test_the_step_is_that_of_soap_without_autocast(soap32: Any) -> None:
    nets = [nn.Conv2d(4, 6, 3)]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [kind(net.parameters(), **OPTIONS) for kind, net in zip((SOAP, soap32), nets)]
    for _ in range(STEPS):
        picture = torch.rand(2, 4, 8, 8)
        for net, optimizer in zip(nets, optimizers):
            step(net, optimizer, picture, autocast=isinstance(optimizer, soap32))
    assert all(torch.equal(one, other) for one, other in zip(nets[0].parameters(), nets[1].parameters()))


def test_a_training_goes_on_from_its_saved_state(soap32: Any) -> None:
    first, second = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    optimizer, resumed = (soap32(net.parameters(), **OPTIONS) for net in (first, second))
    for number in range(STEPS):
        if number == 13:
            second.load_state_dict(first.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
        picture = torch.rand(2, 4, 8, 8)
        step(first, optimizer, picture)
        if number >= 13:
            step(second, resumed, picture)
    assert torch.allclose(first.weight, second.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("began", "name"), [(torch.optim.AdamW, "Adam or AdamW"), (torch.optim.SGD, "another optimizer")]
)
def test_the_state_of_another_optimizer_is_refused_by_name_with_the_way_on(
    soap32: Any, began: Any, name: str
) -> None:
    net = nn.Conv2d(4, 6, 3)
    other, optimizer = began(net.parameters(), lr=1e-3), soap32(net.parameters(), **OPTIONS)
    step(net, other, torch.rand(2, 4, 8, 8))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=f"began with {name}, .* says SOAP32: .*pretrain_network_g"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


def test_adamw_fails_on_the_state_of_soap32_as_the_page_says(soap32: Any) -> None:
    net = nn.Conv2d(4, 6, 3)
    optimizer = soap32(net.parameters(), **OPTIONS)
    for _ in range(2):
        step(net, optimizer, torch.rand(2, 4, 8, 8))
    with pytest.raises(KeyError) as raised:
        torch.optim.AdamW(net.parameters()).load_state_dict(optimizer.state_dict())
    page = (ROOT / "docs" / "traiNNer-redux.md").read_text(encoding="utf-8")
    assert f"KeyError: {raised.value}" in page
