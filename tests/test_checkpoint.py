"""Whatever wrapped the weights is found, as the libraries write it; what is written has the same bytes every
time. What is refused: test_checkpoint_refused.py."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import aether_arch
import pytest
import torch
from checkpoints import FUSED, NET, STATE, TINY, saved, under
from conftest import ROOT, small_net
from safetensors.torch import save
from torch import Tensor, nn

from aethersr.checkpoint import (
    _LARGEST_PICKLE,
    ENDINGS,
    READ_ENDINGS,
    WRAPPERS,
    read_checkpoint,
    unwrap,
    write_state,
)
from aethersr.errors import UserError

EMA = {name: value + 0.125 for name, value in STATE.items()}
DISCRIMINATOR = {"conv0.weight": torch.zeros(4, 3, 3, 3), "stages.0.0.dwconv.weight": torch.zeros(4)}
LOSS = {"vgg.features.0.weight": torch.zeros(4, 3, 3, 3)}
COUNT = torch.tensor(3)
COUNTERS = {"initted": torch.tensor(True), "step": COUNT}

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------- finding the weights


def online(state: Mapping[str, Tensor]) -> Dict[str, Any]:
    """Checkpoints whose only AetherNet is this one."""

    def inside(wrapper: str) -> Dict[str, Tensor]:
        return {name.replace("stages.0.", f"stages.0.{wrapper}."): value for name, value in state.items()}

    optimizer = {"state": {0: {"exp_avg": COUNT}}}
    return {
        "nothing": state,
        **{name: {name: state, "epoch": 3, "optimizer": optimizer} for name in WRAPPERS},
        "two wrappers": {"model": {"state_dict": state}},
        "three wrappers": {"state": {"models": {"net_g": state}}},
        "an unknown wrapper": {"checkpoint": state},
        "beside another network": {"critic": DISCRIMINATOR, "sr": state},
        "DDP": under("module.", state),
        "torch.compile": under("_orig_mod.", state),
        "both": under("module._orig_mod.", state),
        "both, the other way round": under("_orig_mod.module.", state),
        "three of them": under("module.module._orig_mod.", state),
        "a compiled stage": inside("_orig_mod"),
        "FSDP": under("_fsdp_wrapped_module.", state),
        "FSDP, activations checkpointed": inside("_checkpoint_wrapped_module"),
        "Lightning": {"state_dict": under("model.", state), "loops": {}, "optimizer_states": [optimizer]},
        "Lightning, GAN": {
            "state_dict": {
                **under("net_d.", DISCRIMINATOR), **under("net_g.", state), **under("loss.", LOSS),
            }
        },
        "Lightning, the network itself among losses": {
            "state_dict": {**under("model.net_g.", state), **under("model.loss.", LOSS)}
        },
        "an unknown prefix": under("sr_network.", state),
        "an unknown prefix of two words": under("trainer.sr.", state),
        "counters": {**state, **COUNTERS},
        "an optimizer by names": {"model": state, "optimizer": {"state": {"exp_avg": EMA}}, "optim_ema": EMA},
        "a flat optimizer by names": {**under("model.", state), **under("optimizer.ema.", EMA)},
    }  # fmt: skip


AVERAGED: Dict[str, Any] = {
    "params_ema": {"params": STATE, "params_ema": EMA},
    "params-ema": {"params-ema": EMA, "params": STATE},
    "ema": {"model": STATE, "ema": EMA},
    "state_dict_ema (timm)": {"state_dict": STATE, "state_dict_ema": EMA},
    "model_ema": {"model": STATE, "model_ema": {"module": EMA}},
    "modelEMA": {"model": STATE, "modelEMA": EMA},
    "generator_ema": {"generator": STATE, "generator_ema": EMA, "discriminator": DISCRIMINATOR},
    "nested": {"net_g": {"params": STATE, "params_ema": EMA}},
    "nested the other way round": {"ema": {"net_g": EMA}, "online": {"net_g": STATE}},
    "AveragedModel": {**under("module.", EMA), "n_averaged": COUNT},
    "AveragedModel beside its network": {
        "model": STATE, "average": {**under("module.", EMA), "n_averaged": COUNT},
    },
    "AveragedModel, compiled": {**under("module._orig_mod.", EMA), "n_averaged": COUNT},
    "SWA": {"state_dict": STATE, "swa_state_dict": {**under("module.", EMA), "n_averaged": COUNT}},
    "ema-pytorch": {**under("online_model.", STATE), **under("ema_model.", EMA), **COUNTERS},
    "ema-pytorch without its network": {**under("ema_model.", EMA), **COUNTERS},
    "ema-pytorch in a wrapper called ema": {
        "ema": {**under("ema_model.module.", EMA), **under("online_model.module.", STATE)}
    },
    "Lightning": {
        "state_dict": {**under("model.", STATE), **under("ema.module.", EMA), "ema.n_averaged": COUNT}
    },
    "Lightning, ema-pytorch": {
        "state_dict": {**under("ema.online_model.", STATE), **under("ema.ema_model.", EMA), "ema.step": COUNT}
    },
    "beside the plain names": {**STATE, **under("ema.", EMA)},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", online(STATE))
@pytest.mark.parametrize("state", [STATE, FUSED], ids=["training", "fused"])
def test_the_network_is_found_in_every_wrapper(wrapper: str, state: Dict[str, Tensor]) -> None:
    assert_state(unwrap(online(state)[wrapper]).state, state)


@pytest.mark.parametrize("wrapper", AVERAGED)
def test_averaged_weights_are_preferred_and_no_others_are_taken_for_averaged(wrapper: str) -> None:
    found = unwrap(AVERAGED[wrapper])
    assert_state(found.state, EMA)
    assert found.chosen.startswith("the averaged ones")
    assert "holds others" not in found.chosen


def test_averaged_weights_without_names_take_those_of_the_network_beside_them() -> None:
    """As torch-ema and diffusers save them: a list, without what is no parameter."""
    names = [name for name, _ in NET.named_parameters()]
    ema = {"decay": 0.99, "num_updates": 3, "shadow_params": [EMA[name] for name in names]}
    for content in ({"model": STATE, "ema": ema}, {"ema": ema, **under("module.", STATE)}):
        found = unwrap(content)
        assert_state(found.state, {**STATE, **{name: EMA[name] for name in names}})
        assert found.chosen.startswith("the averaged ones, 'shadow_params'")
    for wrong in ([EMA[name] for name in names[1:]], [1.0], EMA):
        found = unwrap({"model": STATE, "ema": {**ema, "shadow_params": wrong}})
        assert_state(found.state, EMA if wrong is EMA else STATE)


def test_what_was_chosen_is_said() -> None:
    for content, words in (
        (STATE, "the only ones in the file"),
        ({"params": STATE}, "'params', not averaged"),
        ({"params": STATE, "params_ema": EMA}, "the averaged ones, 'params_ema'"),
        (AVERAGED["AveragedModel"], "the averaged ones"),
        ({"a": {"b": under("c.", STATE)}}, "'a/b', names under 'c.', not averaged"),
        ({"first": STATE, "second": EMA}, "'first', not averaged; the file holds others too, 'second'"),
    ):
        assert unwrap(content).chosen == words  # type: ignore[arg-type]


def test_of_several_networks_the_better_known_name_is_taken_and_a_bare_one_before_all() -> None:
    for better, worse in zip(WRAPPERS, [*WRAPPERS[1:], "another"]):
        assert_state(unwrap({worse: EMA, better: STATE}).state, STATE)
    assert_state(unwrap({"first": STATE, "second": EMA}).state, STATE)
    assert_state(unwrap({"state_dict": {**under("a_teacher.", EMA), **under("net_g.", STATE)}}).state, STATE)
    assert_state(unwrap({**under("net_g.", EMA), **STATE}).state, STATE)


def test_a_network_whose_kernels_are_missing_is_found_by_its_blocks() -> None:
    damaged = {name: value for name, value in STATE.items() if "lk_conv" not in name}
    assert_state(unwrap({"params": under("module.", damaged)}).state, damaged)


def test_averaged_weights_whose_statistics_never_moved_take_the_online_ones() -> None:
    moved = {name: value for name, value in STATE.items() if name.endswith(("running_mean", "running_var"))}
    new = {name: torch.full_like(value, float(name.endswith("var"))) for name, value in moved.items()}
    averaged = {**EMA, **new}
    for content in (
        {"params": STATE, "params_ema": averaged},
        {**under("online_model.", STATE), **under("ema_model.", averaged)},
    ):
        found = unwrap(content)
        assert_state(found.state, {**averaged, **moved})
        assert "never updated" in found.chosen
    for content in ({"params": {**STATE, **new}, "params_ema": averaged}, {"params_ema": averaged}):
        assert_state(unwrap(content).state, averaged)


def test_what_is_not_read_is_named_by_its_top_keys_beside_the_wrappers_that_are_known() -> None:
    contents: List[Tuple[Any, str]] = [
        ({}, "Keys at the top: none;"),
        ({"iter": 3, "weights": [STATE]}, "Keys at the top: 'iter', 'weights';"),
        ({"a": {"b": {"c": {"d": STATE}}}}, "Keys at the top: 'a';"),
        ({"params": LOSS}, "among 1. Keys at the top: 'params';"),
        ({str(k): torch.zeros(1) for k in range(6)}, "'4', '5';"),
        ({str(k): torch.zeros(1) for k in range(9)}, "'4', '5' and 3 more;"),
        ({"k" * 99: 3}, f"Keys at the top: '{'k' * 40}';"),
        ({"shadow_params": list(EMA.values()), "decay": 0.9}, "Keys at the top: 'shadow_params', 'decay';"),
    ]
    for content, words in contents:
        with pytest.raises(ValueError, match="not an AetherNet") as error:
            unwrap(content)
        assert words in str(error.value)
        assert all(name in str(error.value) for name in WRAPPERS)
    with pytest.raises(ValueError, match="first layout") as error:
        unwrap({"params": {"layers.0.blocks.0.conv.lk_conv.bias": torch.zeros(3)}})
    assert str(error.value).endswith("layout (v1, tensors 'layers.*'): another network, not read here.")


# -------------------------------------------------------------------------- files as the libraries write them


def test_files_of_pytorch_itself(tmp_path: Path) -> None:
    """AveragedModel, DataParallel, and what optimizers and schedulers keep, the classes in it included."""
    net = small_net(2, **TINY).float()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    optimizer = torch.optim.AdamW(net.parameters())
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    net(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    beside = {
        "optimizer": optimizer.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "rng": torch.get_rng_state(),
        "shape": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
    }
    contents: List[Any] = [averaged.state_dict(), nn.DataParallel(net).state_dict()]
    for content in (*contents, {"ema": contents[0], "model": net.state_dict()}):
        torch.save({"state": content, **beside}, tmp_path / "a.pth")
        assert set(read_checkpoint(tmp_path / "a.pth").state) == set(STATE)


def test_weights_saved_on_a_card_open_without_one(tmp_path: Path) -> None:
    here, there = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"  # where its pickle says they were
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as cpu, zipfile.ZipFile(tmp_path / "a.pth", "w") as card:
        for name in cpu.namelist():
            card.writestr(name, cpu.read(name).replace(here, there))
    assert there in (tmp_path / "a.pth").read_bytes()
    assert_state(read_checkpoint(tmp_path / "a.pth").state, STATE)


def test_the_int8_form_is_read_as_it_is(tmp_path: Path) -> None:
    state = NET.fused().prepare_qat("full").convert_to_quantized().state_dict()
    assert torch.int8 in {value.dtype for value in state.values()}
    (tmp_path / "a.pth").write_bytes(saved(state))
    assert_state(read_checkpoint(tmp_path / "a.pth").state, state)


def installed(*names: str) -> Any:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"writes its own files: pip install {' '.join(missing)}")


@installed("lightning")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hyper_parameters", ["plain", "attributes"])
def test_a_file_of_lightning_is_read_or_named(tmp_path: Path, hyper_parameters: str) -> None:
    sys.path.insert(0, str(ROOT / "demo"))
    from basicsr_train import import_torchvision

    import_torchvision()  # lightning imports it
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, rate: float = 1e-3, more: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net_g = small_net(2, **TINY).float()
            self.net_d = nn.Conv2d(3, 4, 3)
            self.loss = nn.Sequential(nn.Conv2d(3, 4, 3))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net_g(batch).mean() + self.net_d(batch).mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])]

    more = lightning.fabric.utilities.data.AttributeDict(a=1) if hyper_parameters == "attributes" else None
    module = Module(more=more)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = [lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last")]
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=checkpoints, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.rand(2, 3, 8, 8)))
    path = tmp_path / "last.ckpt"
    if hyper_parameters == "attributes":
        with pytest.raises(UserError, match=r"AttributeDict.*save the weights alone, torch.save"):
            read_checkpoint(path)
    else:
        assert_state(read_checkpoint(path).state, module.net_g.state_dict())


@installed("ema_pytorch")
def test_a_file_of_ema_pytorch_is_read(tmp_path: Path) -> None:
    from ema_pytorch import EMA as Averaging

    net = small_net(2, **TINY).float()
    averaging = Averaging(net, beta=0.9, update_every=1, update_after_step=0)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(1)
    averaging.update()
    torch.save({"model": net.state_dict(), "ema": averaging.state_dict()}, tmp_path / "a.pt")
    torch.save(averaging.state_dict(), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert_state(read_checkpoint(tmp_path / name).state, averaging.ema_model.state_dict())


@installed("accelerate")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickled"])
def test_a_folder_of_accelerate_is_read(tmp_path: Path, safe: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = small_net(2, **TINY).float()
    prepared, _ = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    path = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    assert_state(read_checkpoint(path).state, accelerator.unwrap_model(prepared).state_dict())


@pytest.mark.parametrize("ending", READ_ENDINGS)
def test_every_ending_is_read_in_any_letters(tmp_path: Path, ending: str) -> None:
    for name in (f"a{ending}", f"b{ending.upper()}"):
        (tmp_path / name).write_bytes(save(STATE) if ending == ".safetensors" else saved(STATE))
        assert_state(read_checkpoint(tmp_path / name).state, STATE)


def test_the_largest_network_with_everything_a_trainer_keeps_is_not_too_large_to_read() -> None:
    """The limit of a pickle is far above what five state dicts of aether_large, optimizer included, take."""
    with torch.device("meta") if hasattr(torch.device, "__enter__") else torch.no_grad():
        names = list(aether_arch.aether_large(scale=8).state_dict())
    parts = ("params", "params_ema", "exp_avg", "exp_avg_sq", "more")
    content = {part: {name: torch.zeros(1) for name in names} for part in parts}
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        size = next(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    assert size < 0.8 * _LARGEST_PICKLE, size


# ---------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_weights_give_the_same_bytes_under_any_name(tmp_path: Path, ending: str) -> None:
    half = {name: value.half() for name, value in STATE.items()}
    metadata = {"scale": "2", "architecture": "aether_small", "form": "fused", "format": "pt"}
    for name, order in (("a", 1), ("another_name", -1)):
        write_state(half, tmp_path / f"{name}{ending}", dict(list(metadata.items())[::order]))
    first, second = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("a", "another_name"))
    assert first == second
    state = read_checkpoint(tmp_path / f"a{ending}").state
    assert_state(state, {name: value.float() for name, value in half.items()})
    assert {value.dtype for value in state.values()} == {torch.float32}
    if ending == ".safetensors":
        size = int.from_bytes(first[:8], "little")
        assert json.loads(first[8 : 8 + size])["__metadata__"] == metadata


def test_the_whole_file_is_on_the_disk_when_writing_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, fsync = [], os.fsync

    def noted(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write_state({"mean": NET.mean}, tmp_path / "a.pth", {})  # less than a stream keeps to itself
    assert sizes == [(tmp_path / "a.pth").stat().st_size]
