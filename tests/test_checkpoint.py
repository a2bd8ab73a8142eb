"""The weights are found in whatever wraps them and beside whatever else; what is written has the same bytes.

What is refused: test_checkpoint_refused.py.
"""

from __future__ import annotations

import collections
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, Dict, Mapping

import pytest
import torch
from checkpoints import FILES, FUSED, NET, OLD, STATE, Reader, saved, tied, under
from torch import Tensor, nn

from aethersr.checkpoint import ENDINGS, WRAPPERS, read_checkpoint, unwrap, write_state
from aethersr.files import Together

EMA = {name: value + 0.125 for name, value in STATE.items()}
DISCRIMINATOR = {"conv0.weight": torch.zeros(4, 3, 3, 3), "stages.0.0.dwconv.weight": torch.zeros(4)}
LOSS = {"vgg.features.0.weight": torch.zeros(4, 3, 3, 3)}
COUNT = torch.tensor(3)
COUNTERS = {"initted": torch.tensor(True), "step": COUNT, "global_step": COUNT, "best": torch.tensor(3.5)}

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def online(state: Mapping[str, Tensor]) -> Dict[str, Any]:
    def inside(wrapper: str) -> Dict[str, Tensor]:
        return {name.replace("stages.0.", f"stages.0.{wrapper}."): value for name, value in state.items()}

    optimizer = {"state": {0: {"exp_avg": COUNT}}}
    gan = {**under("net_d.", DISCRIMINATOR), **under("net_g.", state), **under("loss.", LOSS)}
    return {
        "nothing": state,
        **{name: {name: state, "epoch": 3, "optimizer": optimizer} for name in WRAPPERS},
        "three wrappers": {"state": {"models": {"net_g": state}}},
        "an unknown wrapper beside another network": {"critic": DISCRIMINATOR, "sr": state},
        "DDP": under("module.", state),
        "torch.compile of DDP": under("_orig_mod.module.", state),
        "a compiled stage": inside("_orig_mod"),
        "FSDP, activations checkpointed": inside("_checkpoint_wrapped_module"),
        "Lightning, GAN": {"state_dict": gan, "loops": {}, "optimizer_states": [optimizer]},
        "an unknown prefix of two words": under("trainer.sr.", state),
        "counters": {**state, **COUNTERS},
        "an optimizer by names": {"model": state, "optimizer": {"state": {"exp_avg": EMA}}, "optim_ema": EMA},
        "a flat optimizer by names": {**under("model.", state), **under("optimizer.ema.", EMA)},
    }


AVERAGED_MODEL = {**under("module.", EMA), "n_averaged": COUNT}
AVERAGED: Dict[str, Any] = {
    "params_ema": {"params": STATE, "params_ema": EMA},
    "state_dict_ema (timm)": {"state_dict": STATE, "state_dict_ema": EMA},
    "modelEMA": {"model": STATE, "modelEMA": {"module": EMA}},
    "nested the other way round": {"ema": {"net_g": EMA}, "online": {"net_g": STATE}},
    "AveragedModel": AVERAGED_MODEL,
    "AveragedModel beside its network": {"model": STATE, "average": AVERAGED_MODEL},
    "SWA": {"state_dict": STATE, "swa_state_dict": {**under("module._orig_mod.", EMA), "n_averaged": COUNT}},
    "ema-pytorch": {**under("online_model.", STATE), **under("ema_model.", EMA), **COUNTERS},
    "Lightning": {"state_dict": {**under("model.", STATE), **under("ema.module.", EMA), "ema.n": COUNT}},
    "beside the plain names": {**STATE, **under("ema.", EMA)},
}


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


def test_averaged_weights_whose_statistics_never_moved_take_the_online_ones() -> None:
    moved = {name: value for name, value in STATE.items() if name.endswith(("running_mean", "running_var"))}
    new = {name: torch.full_like(value, float(name.endswith("var"))) for name, value in moved.items()}
    averaged = {**EMA, **new}
    found = unwrap({"params": STATE, "params_ema": averaged})
    assert_state(found.state, {**averaged, **moved})
    assert "never updated" in found.chosen
    for content in ({"params": {**STATE, **new}, "params_ema": averaged}, {"params_ema": averaged}):
        assert_state(unwrap(content).state, averaged)


def test_of_several_networks_the_better_known_name_is_taken_and_what_was_chosen_is_said() -> None:
    for better, worse in zip(WRAPPERS, [*WRAPPERS[1:], "another"]):
        assert_state(unwrap({worse: EMA, better: STATE}).state, STATE)
    assert_state(unwrap({**under("net_g.", EMA), **STATE}).state, STATE)
    for words, content in (
        ("the only ones in the file", STATE),
        ("'params', not averaged", {"params": STATE}),
        ("the averaged ones, 'params_ema'", {"params": EMA, "params_ema": STATE}),
        ("'a/b', names under 'c.', not averaged", {"a": {"b": under("c.", STATE)}}),
        ("'first', not averaged; the file holds others too, 'second'", {"first": STATE, "second": EMA}),
    ):
        found = unwrap(content)
        assert found.chosen == words
        assert_state(found.state, STATE)


def test_what_is_not_read_is_named_by_its_top_keys_beside_the_wrappers_that_are_known() -> None:
    for words, content in (
        ("Keys at the top: none;", {}),
        ("Keys at the top: 'iter', 'weights';", {"iter": 3, "weights": [STATE]}),
        ("Keys at the top: 'a';", {"a": {"b": {"c": {"d": STATE}}}}),
        ("'4', '5' and 3 more;", {str(k): torch.zeros(1) for k in range(9)}),
        (f"Keys at the top: '{'k' * 40}';", {"k" * 99: 3}),
    ):
        with pytest.raises(ValueError, match=f"not an AetherNet.*{words}.*: {', '.join(WRAPPERS)}, with"):
            unwrap(content)


BESIDE: Dict[str, Any] = {
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "sets": [{1, 2}, set()],
    "complex": 1j,
    "a loss history": [k / 7 for k in range(150_000)],
    "logs": [{"epoch": k, "loss": k / 7} for k in range(5000)],
    "a counter": collections.Counter("aab"),
    "a large number": 10**30,
    "types": [torch.Size([1, 2]), torch.bfloat16, torch.device("cpu"), torch.get_rng_state(), None, (True,)],
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a quantised tensor": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "a tensor without values": torch.ones(3, device="meta"),
    "a tensor with attributes": nn.Parameter(torch.ones(3)),
}
vars(BESIDE["a tensor with attributes"]).update(note="mine")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("options", [{}, OLD], ids=["", "old"])
@pytest.mark.parametrize("kind", BESIDE)
def test_whatever_pytorch_opens_beside_weights_is_opened(
    reader: Reader, kind: str, options: Dict[str, Any]
) -> None:
    assert reader.read("a.pth", saved({"state_dict": STATE, "more": BESIDE[kind]}, **options)) == ""


def test_weights_that_are_parameters_share_their_values_or_were_packed_again_are_read(reader: Reader) -> None:
    """Without PyTorch's warning about a parameter that becomes a number: Reader makes them errors."""
    assert reader.read("a.pth", saved({name: nn.Parameter(value) for name, value in STATE.items()})) == ""
    content = saved(tied(40))
    assert len(content) < 10e6
    assert reader.read("a.pth", content) == ""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILES["net.pth"])) as whole, zipfile.ZipFile(packed, "w", 8) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    assert reader.read("a.pth", packed.getvalue()) == ""


def test_weights_saved_on_a_card_open_without_one(tmp_path: Path) -> None:
    here, there = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"  # where its pickle says they were
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as cpu, zipfile.ZipFile(tmp_path / "a.pth", "w") as card:
        for name in cpu.namelist():
            card.writestr(name, cpu.read(name).replace(here, there))
    assert there in (tmp_path / "a.pth").read_bytes()
    assert_state(read_checkpoint(tmp_path / "a.pth").state, STATE)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_weights_give_the_same_bytes_under_any_name(tmp_path: Path, ending: str) -> None:
    half = {name: value.half() for name, value in STATE.items()}
    metadata = {"scale": "2", "architecture": "aether_small", "form": "fused", "format": "pt"}
    for name, order in (("a", 1), ("another_name", -1)):
        write_state(half, tmp_path / f"{name}{ending}", dict(list(metadata.items())[::order]))
    first, second = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("a", "another_name"))
    assert first == second
    assert (first[8:9] == b"{") == (ending == ".safetensors")
    state = read_checkpoint(tmp_path / f"a{ending}").state
    assert_state(state, half)
    assert {value.dtype for value in state.values()} == {torch.float16}
    int8 = NET.fused().prepare_qat().convert_to_quantized().state_dict()
    write_state(int8, tmp_path / f"int8{ending}", {})
    assert_state(read_checkpoint(tmp_path / f"int8{ending}").state, int8)
    assert torch.int8 in {value.dtype for value in int8.values()}
    if ending == ".safetensors":
        size = int.from_bytes(first[:8], "little")
        assert json.loads(first[8 : 8 + size])["__metadata__"] == metadata


def test_the_whole_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    sizes: Any = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    with Together() as files:
        write_state({"mean": NET.mean}, files.part(tmp_path / "a.pth"), {})
        files.commit()
    assert sizes == [(tmp_path / "a.pth").stat().st_size]
