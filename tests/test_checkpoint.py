"""Reading checkpoints: whatever wrapped the weights is found, whatever is not one is refused, and nothing in
a file runs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

import aether_arch
import pytest
import torch
from conftest import ROOT, small_net
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from aethersr.checkpoint import READ_ENDINGS, WRAPPERS, read_checkpoint, unwrap, write_state
from aethersr.errors import UserError
from aethersr.identify import aether_from_state_dict

TINY: Dict[str, Any] = {"embed_dim": 8, "depths": (1,), "lk_kernel": 3}
MIB = 2**20
# The same examples every time, and a failing one as it was found: making it smaller would take minutes.
FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],
)

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def under(prefix: str, state: Mapping[str, Any]) -> Dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


NET = small_net(2, **TINY).float()
STATE: Dict[str, Tensor] = NET.state_dict()
EMA = {name: value + 0.125 for name, value in STATE.items()}
FUSED: Dict[str, Tensor] = NET.fused().state_dict()
DISCRIMINATOR = {"conv0.weight": torch.zeros(4, 3, 3, 3), "stages.0.weight": torch.zeros(4)}
LOSS = {"vgg.features.0.weight": torch.zeros(4, 3, 3, 3)}
COUNT = torch.tensor(3)


# ---------------------------------------------------------------------------------------- finding the weights


ONLINE: Dict[str, Any] = {
    "nothing": STATE,
    **{name: {name: STATE, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": COUNT}}}} for name in WRAPPERS},
    "two wrappers": {"model": {"state_dict": STATE}},
    "three wrappers": {"state": {"models": {"net_g": STATE}}},
    "an unknown wrapper": {"checkpoint": STATE},
    "beside other networks": {"net_d": DISCRIMINATOR, "net_g": STATE},
    "DDP": under("module.", STATE),
    "torch.compile": under("_orig_mod.", STATE),
    "both": under("module._orig_mod.", STATE),
    "both, the other way round": under("_orig_mod.module.", STATE),
    "three of them": under("module.module._orig_mod.", STATE),
    "a compiled stage": {
        name.replace("stages.0.", "stages.0._orig_mod."): value for name, value in STATE.items()
    },
    "FSDP": under("_fsdp_wrapped_module.", STATE),
    "Lightning": {
        "state_dict": under("model.", STATE),
        "epoch": 3,
        "loops": {},
        "optimizer_states": [{"state": {}}],
    },
    "Lightning, GAN": {
        "state_dict": {**under("net_d.", DISCRIMINATOR), **under("net_g.", STATE), **under("loss.", LOSS)}
    },
    "Lightning, the network itself among losses": {
        "state_dict": {**under("model.net_g.", STATE), **under("model.loss.", LOSS)}
    },
    "an unknown prefix": under("sr_network.", STATE),
    "an unknown prefix of two words": under("trainer.sr.", STATE),
    "counters": {**STATE, "step": COUNT, "initted": torch.tensor(True)},
    "an optimizer by names": {"model": STATE, "optimizer": {"state": {"exp_avg": EMA}}, "optim_ema": EMA},
    "a flat optimizer by names": {**under("model.", STATE), **under("optimizer.ema.", EMA)},
}

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
        "model": STATE,
        "average": {**under("module.", EMA), "n_averaged": COUNT},
    },
    "AveragedModel, compiled": {**under("module._orig_mod.", EMA), "n_averaged": COUNT},
    "SWA": {"state_dict": STATE, "swa_state_dict": {**under("module.", EMA), "n_averaged": COUNT}},
    "ema-pytorch": {
        **under("online_model.", STATE),
        **under("ema_model.", EMA),
        "initted": torch.tensor(True),
        "step": COUNT,
    },
    "ema-pytorch without its network": {
        **under("ema_model.", EMA),
        "initted": torch.tensor(True),
        "step": COUNT,
    },
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
}


def assert_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrapper", ONLINE)
@pytest.mark.parametrize("form", ["training", "fused"])
def test_the_network_is_found_in_every_wrapper(wrapper: str, form: str) -> None:
    content = ONLINE[wrapper]
    if form == "fused":
        content = replaced(content, {id(STATE[name]) for name in STATE}, FUSED)
    assert_state(unwrap(content).state, STATE if form == "training" else FUSED)


def replaced(content: Any, old: Any, new: Mapping[str, Tensor]) -> Any:
    """The same wrapper round another form: every mapping that holds all tensors of STATE gets ``new`` in
    their place."""
    if not isinstance(content, Mapping):
        return content
    rest = {key: replaced(value, old, new) for key, value in content.items() if id(value) not in old}
    if len(rest) + len(old) > len(content):
        return rest
    anchor = next(name for name, value in content.items() if value is STATE["conv_first.weight"])
    stage = next(name for name, value in content.items() if value is STATE["stages.0.0.norm.bias"])
    prefix, inner = anchor[: -len("conv_first.weight")], stage[: -len("0.norm.bias")]
    names = {
        name: prefix + name if not name.startswith("stages.0.") else inner + name[len("stages.0.") :]
        for name in new
    }
    return {**rest, **{names[name]: value for name, value in new.items()}}


@pytest.mark.parametrize("wrapper", AVERAGED)
def test_averaged_weights_are_preferred(wrapper: str) -> None:
    found = unwrap(AVERAGED[wrapper])
    assert_state(found.state, EMA)
    assert found.chosen.startswith("the averaged ones")
    with pytest.raises(AssertionError):
        assert_state(found.state, STATE)


def test_what_was_chosen_is_said() -> None:
    assert unwrap(STATE).chosen == "the only ones in the file"
    assert unwrap({"params": STATE}).chosen == "'params', not averaged"
    assert unwrap({"params": STATE, "params_ema": EMA}).chosen == "the averaged ones, 'params_ema'"
    assert unwrap({"a": {"b": under("c.", STATE)}}).chosen == "'a/b', names under 'c.', not averaged"
    two = unwrap({"first": STATE, "second": EMA})
    assert_state(two.state, STATE)
    assert two.chosen == "'first', not averaged; the file holds others too, 'second'"


def test_of_several_networks_the_better_known_name_is_taken() -> None:
    for better, worse in zip(WRAPPERS, [*WRAPPERS[1:], "another"]):
        assert_state(unwrap({worse: EMA, better: STATE}).state, STATE)
    assert_state(unwrap({"state_dict": {**under("a_teacher.", EMA), **under("net_g.", STATE)}}).state, STATE)


def test_a_network_whose_kernels_are_missing_is_found_by_its_blocks() -> None:
    damaged = {name: value for name, value in STATE.items() if "lk_conv" not in name}
    assert_state(unwrap({"params": under("module.", damaged)}).state, damaged)


def test_averaged_weights_whose_statistics_never_moved_take_the_online_ones() -> None:
    statistics = [name for name in STATE if name.endswith(("running_mean", "running_var"))]
    never = {
        **EMA,
        **{name: torch.full_like(STATE[name], float(name.endswith("var"))) for name in statistics},
    }
    expected = {**EMA, **{name: STATE[name] for name in statistics}}
    for content in (
        {"params": STATE, "params_ema": never},
        {**under("online_model.", STATE), **under("ema_model.", never)},
    ):
        found = unwrap(content)
        assert_state(found.state, expected)
        assert "never updated" in found.chosen
    assert_state(
        unwrap(
            {"params": {**STATE, **{name: never[name] for name in statistics}}, "params_ema": never}
        ).state,
        never,
    )
    assert_state(unwrap({"params_ema": never}).state, never)


def test_what_is_not_read_is_named_by_its_top_keys_beside_the_wrappers_that_are_known() -> None:
    contents: List[Tuple[Any, str]] = [
        ({}, "Keys at the top: none;"),
        ({"iter": 3, "weights": [STATE]}, "Keys at the top: 'iter', 'weights';"),
        ({"a": {"b": {"c": {"d": STATE}}}}, "Keys at the top: 'a';"),
        ({"params": DISCRIMINATOR}, "among 2. Keys at the top: 'params';"),
        ({str(k): torch.zeros(1) for k in range(9)}, "'4', '5' and 3 more;"),
        ({"shadow_params": list(EMA.values()), "decay": 0.9}, "Keys at the top: 'shadow_params', 'decay';"),
    ]
    for content, words in contents:
        with pytest.raises(ValueError, match="not an AetherNet") as error:
            unwrap(content)
        assert words in str(error.value)
        assert all(name in str(error.value) for name in WRAPPERS)
    with pytest.raises(ValueError, match=r"first layout \(v1"):
        unwrap({"params": {"layers.0.blocks.0.conv.lk_conv.bias": torch.zeros(3)}})


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
    contents: List[Any] = [
        averaged.state_dict(),
        nn.DataParallel(net).state_dict(),
        {"ema": averaged.state_dict(), "model": net},
    ]
    contents[2]["model"] = net.state_dict()
    for content in contents:
        torch.save({"state": content, **beside}, tmp_path / "a.pth")
        assert set(read_checkpoint(tmp_path / "a.pth").state) == set(STATE)


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
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
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


# -------------------------------------------------------------------------------------------- what is refused


class Reader:
    """A folder in which one file after another is read or refused."""

    def __init__(self, folder: Path, capfd: Any) -> None:
        self.folder, self.capfd = folder, capfd

    def read(self, name: str, content: bytes) -> str:
        """The error, or "" where the file is a whole network."""
        path = self.folder / name
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                aether_from_state_dict(read_checkpoint(path).state)
        except UserError as error:
            line = str(error)
            assert str(path) in line
            assert "--model_path" in line
            for words in ("torch.load", "Weights only load failed", "Traceback"):
                assert words not in line, "PyTorch's own words, with its advice to let the code run"
        except ValueError as error:  # not whole; the command puts the file's name before it
            line = str(error)
        else:
            line = ""
        assert "\n" not in line
        assert len(line) < 700
        assert path.read_bytes() == content, "the input was changed"
        assert [other.name for other in self.folder.iterdir()] == [name]
        assert self.capfd.readouterr().err == "", "libraries write to the file descriptor too"
        path.unlink()
        return line

    def refuses(self, name: str, content: bytes, words: str = "") -> str:
        line = self.read(name, content)
        assert line, "it was read"
        assert words in line, line
        return line


@pytest.fixture
def reader(tmp_path: Path, capfd: Any) -> Reader:
    capfd.readouterr()
    return Reader(tmp_path, capfd)


def test_a_path_that_is_no_checkpoint_is_named_with_the_option_to_change(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    for name, words in (
        ("no.pth", "does not exist"),
        ("folder.pth", "is not a file"),
        ("empty.pth", "is empty"),
        (
            "a.onnx",
            "ends in '.onnx'; expected a checkpoint that ends in .pth, .pt, .ckpt, .bin or .safetensors",
        ),
    ):
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / name, "--model")
        assert f"{tmp_path / name} {words}" in str(error.value)
        assert "--model" in str(error.value)
        assert "--model_path" not in str(error.value)


def test_other_content_is_refused_with_what_it_is(reader: Reader) -> None:
    reader.refuses("a.pth", b"hello", "not a readable checkpoint: it is damaged, or something else")
    reader.refuses("a.safetensors", b"hello there, friend", "is not a whole .safetensors file")
    reader.refuses("a.pth", saved(torch.zeros(3)), "holds a Tensor, expected a state dict")
    reader.refuses("a.pth", saved([1, 2]), "holds a list, expected a state dict")
    reader.refuses(
        "a.pth", saved(nn.Conv2d(3, 3, 3).state_dict()), "Keys at the top: 'weight', 'bias'; known wrappers"
    )
    reader.refuses(
        "a.pth", saved({**STATE, "mean": torch.zeros(1, 3, 1, 1, dtype=torch.int32)}), "'mean' is torch.int32"
    )
    reader.refuses(
        "a.pth", saved({**STATE, "mean": torch.zeros(1).expand(2**40)}), "claim more than the file holds"
    )
    assert "missing: 1 (mean)" in reader.read("a.pth", saved({**STATE, "mean": 3}))


def test_every_number_type_but_plain_floats_is_refused_by_name(reader: Reader) -> None:
    fit = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tried = 0
    for dtype in sorted(
        {value for value in vars(torch).values() if isinstance(value, torch.dtype)} - set(fit), key=str
    ):
        try:
            content = saved({**STATE, "mean": torch.zeros(12, dtype=torch.uint8).view(dtype)})
        except Exception:  # quantised types and those of less than a byte cannot be made or saved
            continue
        assert reader.read("a.pth", content)
        tried += 1
    assert tried >= 10
    for dtype, size in (("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8), ("U16", 2), ("BOOL", 1)):
        header = {"mean": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
        reader.refuses("a.safetensors", safetensors_of(header, bytes(size)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_hold_no_plain_values_are_refused(reader: Reader) -> None:
    odd: Dict[str, Tensor] = {
        "sparse": torch.zeros(1, 3, 1, 1).to_sparse(),
        "sparse rows": torch.eye(3).to_sparse_csr(),
        "meta": torch.zeros(1, 3, 1, 1, device="meta"),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "empty": torch.zeros(1, 0, 1, 1),
        "scalar": torch.zeros(()),
    }
    for value in odd.values():
        assert reader.read("a.pth", saved({**STATE, "mean": value}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_in_any_tensor(reader: Reader, bad: float) -> None:
    for name, value in STATE.items():
        broken = value.clone()
        broken.view(-1)[-1] = bad
        assert name in reader.refuses("a.pth", saved({"params": {**STATE, name: broken}}), "NaN or Inf")
        assert name in reader.refuses("a.safetensors", save({**STATE, name: broken}), "NaN or Inf")


def test_values_that_are_not_finite_beside_the_chosen_weights_do_not_matter(reader: Reader) -> None:
    broken = {name: value * float("nan") for name, value in STATE.items()}
    assert (
        reader.read(
            "a.pth", saved({"params": broken, "params_ema": EMA, "optimizer": {"state": {0: broken}}})
        )
        == ""
    )


# ---------------------------------------------------------------------------------------------------- damaged


FILES = {
    "net.pth": saved({"params": STATE}),
    "old.pth": saved({"params": STATE}, _use_new_zipfile_serialization=False),  # as before PyTorch 1.6
    "net.safetensors": save(STATE),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_of_200_places_is_refused(reader: Reader, name: str) -> None:
    whole = FILES[name]
    assert reader.read(name, whole) == ""
    places = (
        {len(whole) * k // 150 for k in range(150)} | set(range(25)) | {len(whole) - k for k in range(1, 26)}
    )
    assert len(places) >= 199
    for place in sorted(places):
        reader.refuses(name, whole[:place])


@pytest.mark.parametrize("name", FILES)
def test_bytes_after_the_end_or_in_place_of_the_file_hurt_nobody(reader: Reader, name: str) -> None:
    whole = FILES[name]
    reader.refuses(name, bytes(len(whole)))
    reader.refuses(name, b"\xff" * len(whole))
    reader.refuses(name, whole[::-1])
    reader.read(name, whole + whole)
    reader.read(name, whole + bytes(100_000))


PLACES = st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1))  # structure lies at head and tail
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1, max_size=8)


def flipped(content: bytes, flips: List[Tuple[float, int]]) -> bytes:
    damaged = bytearray(content)
    for place, bit in flips:
        damaged[int(place * (len(damaged) - 1))] ^= 1 << bit
    return bytes(damaged)


@pytest.mark.parametrize("name", FILES)
@settings(FUZZ, max_examples=80)
@given(flips=FLIPS)
def test_flipped_bits_end_in_an_error_or_in_a_whole_network(
    reader: Reader, name: str, flips: List[Tuple[float, int]]
) -> None:
    reader.read(name, flipped(FILES[name], flips))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(FUZZ, max_examples=1000)
@given(flips=FLIPS, cut=st.one_of(st.none(), PLACES), twice=st.booleans())
def test_thousands_of_damaged_files_end_in_an_error_or_in_a_whole_network(
    reader: Reader, name: str, flips: List[Tuple[float, int]], cut: Any, twice: bool
) -> None:
    content = flipped(FILES[name], flips)
    content = content if cut is None else content[: int(cut * len(content))]
    reader.read(name, content * 2 if twice else content)


# ---------------------------------------------------------------------------------------------------- hostile


class Calls:
    """Pickles as a call of ``function`` on loading."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


WATCHED = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "shutil.",
    "socket.",
    "ctypes.",
    "pickle.find_class",
    "compile",
    "marshal.",
)
events: List[str] = []
watching = False


def _watch(event: str, arguments: Tuple[Any, ...]) -> None:
    if not watching:
        return
    writing = event == "open" and set("wax") & set(str(arguments[1]))
    if event.startswith(WATCHED) or (
        writing and not os.path.isdir(arguments[0])
    ):  # a folder: pytest's nameless files
        events.append(f"{event} {arguments}")


sys.addaudithook(
    _watch
)  # the interpreter calls it at every such action, in C code too; nobody can remove it again


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What payloads try to make; outside the folder that is looked at."""
    global watching
    events.clear()
    watching = True
    yield tmp_path.with_name(tmp_path.name + "_ran")
    watching = False


def nothing_ran(marker: Path) -> None:
    """The interpreter did nothing that a payload could want."""
    foreign = [event for event in events if not re.match(r"(open|os.remove) .*(net|old)\.", event)]
    assert not foreign, foreign
    assert not marker.exists(), "the payload ran"


def test_the_watch_notices_code_that_runs(tmp_path: Path) -> None:
    global watching
    events.clear()
    watching = True
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}")))
    watching = False
    assert (tmp_path / "ran").exists()
    assert {event.split()[0] for event in events} >= {"os.system", "pickle.find_class"}


def payloads(marker: Path) -> Dict[str, Any]:
    import builtins
    import functools
    import importlib
    import operator
    import runpy
    import shutil
    import subprocess

    return {
        "system": Calls(os.system, f"touch {marker}"),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, Path, "unlink"),
        "import": Calls(importlib.import_module, "antigravity"),
        "run": Calls(runpy.run_path, str(marker)),
        "partial": Calls(functools.partial, os.system, f"touch {marker}"),
        "attribute": Calls(operator.methodcaller, "system", f"touch {marker}"),
        "remove": Calls(shutil.rmtree, str(marker.parent)),
        "pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {marker}"))),
        "torch": Calls(torch.load, "nested.pth"),
        "hub": Calls(torch.hub.load, "nobody/nothing", "x"),
        "input": Calls(builtins.input),
    }


LAYOUTS: Dict[str, Callable[[Any], bytes]] = {
    "net.pth": lambda payload: saved({"params": STATE, "more": payload}),
    "net_.pth": lambda payload: saved({"params": {**STATE, "mean": payload}}),
    "old.pth": lambda payload: saved(
        {"params": STATE, "more": payload}, _use_new_zipfile_serialization=False
    ),
    "old_.pth": lambda payload: pickle.dumps(payload, 2),
    "old__.pth": lambda payload: pickle.dumps(payload, 4),
    "net.safetensors": lambda payload: saved(payload),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_payload_runs(reader: Reader, marker: Path, layout: str) -> None:
    global watching
    for payload in payloads(marker).values():
        watching = False  # pickling may look up what it names
        content = LAYOUTS[layout](payload)
        watching = True
        reader.refuses(
            layout.replace("_", ""),
            content,
            "" if layout.endswith("tensors") else "asks to run code on loading",
        )
        nothing_ran(marker)


def test_a_class_that_is_refused_is_named_with_the_way_to_save_the_weights_alone(reader: Reader) -> None:
    import argparse
    import decimal

    for content, name in (
        (argparse.Namespace(rate=1), "argparse.Namespace"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (NET, "aether_arch.AetherNet"),
    ):
        for protocol in (2, 4):
            line = reader.refuses(
                "a.pth", saved({"state_dict": STATE, "hyper_parameters": content}, pickle_protocol=protocol)
            )
            assert repr(name) in line
            assert "save the weights alone, torch.save(model.state_dict(), 'weights.pth')" in line


def test_archives_of_code_are_not_opened(reader: Reader, marker: Path) -> None:
    global watching
    watching = False
    buffer, archive = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8)), buffer)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    watching = True
    reader.refuses("net.pth", buffer.getvalue())
    reader.refuses("net.pth", archive.getvalue())
    nothing_ran(marker)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a" * 100_000, "\u202egnp.exe", "", "\0"])
def test_names_of_tensors_make_no_long_lines(tmp_path: Path, name: str) -> None:
    for content in (
        {**STATE, name: torch.full((1,), float("nan"))},
        {name: torch.zeros(1)},
        {name: {name: 1}},
    ):
        (tmp_path / "a.pth").write_bytes(saved(content))
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / "a.pth")
        assert len(str(error.value)) < 700
        assert str(error.value).isprintable()


# --------------------------------------------------------------------------------------- larger than it looks


def repacked(pickled: bytes, compression: int = zipfile.ZIP_STORED, padding: int = 0) -> bytes:
    """The good checkpoint with another pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILES["net.pth"])) as good, zipfile.ZipFile(
        buffer, "w", compression
    ) as bad:
        for name in good.namelist():
            bad.writestr(name, pickled if name.endswith("data.pkl") else good.read(name))
        if padding:
            bad.writestr("archive/data/bomb", bytes(padding))
    return buffer.getvalue()


def good_pickle(offset: bytes = b"", replacement: bytes = b"") -> bytes:
    with zipfile.ZipFile(io.BytesIO(FILES["net.pth"])) as good:
        content = good.read(next(name for name in good.namelist() if name.endswith("data.pkl")))
    assert offset in content
    return content.replace(offset, replacement, 1)


def safetensors_of(header: Dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def value(shape: Any, *offsets: int) -> Dict[str, Any]:
    return {"dtype": "F32", "shape": shape if isinstance(shape, list) else [shape], "data_offsets": offsets}


def archive_of_entries(count: int) -> bytes:
    entries = b"PK\x01\x02".ljust(46, b"\0") * count
    return (
        b"PK\x03\x04"
        + entries
        + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, count, count, len(entries), 4, 0)
    )


def long1(number: int) -> bytes:
    """A pickle's opcode for a large number."""
    return b"\x8a\x08" + struct.pack("<q", number)


def blown_up_text() -> Any:
    encode = __import__("_codecs").encode
    text: Any = "ab"
    for _ in range(24):  # each doubles it
        text = Calls(encode, text, "utf-16-le") if isinstance(text, str) else Calls(encode, text, "hex")
    return text


def nested(depth: int) -> bytes:
    """Dictionaries inside one another, each under the key "a"."""
    return b"\x80\x02" + b"}(X\x01\x00\x00\x00a" * depth + b"N" + b"u" * depth + b"."


BOMBS: Dict[str, Callable[[], Tuple[str, bytes]]] = {
    "zeros compressed": lambda: ("net.pth", repacked(good_pickle(), zipfile.ZIP_DEFLATED, 256 * MIB)),
    "bytearray": lambda: ("net.pth", saved({"params": STATE, "more": Calls(bytearray, 256 * MIB)})),
    "bytearray of terabytes": lambda: ("net.pth", saved({"params": STATE, "more": Calls(bytearray, 2**44)})),
    "bytearray, old": lambda: (
        "old.pth",
        saved({"more": Calls(bytearray, 256 * MIB)}, _use_new_zipfile_serialization=False),
    ),
    "doubled text": lambda: ("net.pth", saved({"more": blown_up_text()})),
    "sets": lambda: ("net.pth", repacked(b"\x80\x02(" + b"\x8f" * 600_000 + b"t.")),
    "lists": lambda: ("net.pth", repacked(b"\x80\x02(" + b"]" * 2_000_000 + b"t.")),
    "nested": lambda: ("net.pth", repacked(nested(50_000))),
    "storage of terabytes": lambda: ("net.pth", repacked(good_pickle(b"K\x03tq", long1(2**40) + b"tq"))),
    "storage of gigabytes, old": lambda: (
        "old.pth",
        FILES["old.pth"].replace(b"K\x03Ntq", long1(2**31) + b"Ntq", 1),
    ),
    "tensor of terabytes": lambda: (
        "net.pth",
        repacked(good_pickle(b"(K\x01K\x03K\x01K\x01t", b"(K\x01" + long1(2**40) + b"K\x01K\x01t")),
    ),
    "expanded tensor": lambda: ("net.pth", saved({**STATE, "mean": torch.zeros(1).expand(1, 2**40, 1, 1)})),
    "empty tensor of many": lambda: (
        "net.pth",
        saved({**STATE, "stages.0.0.conv.lk_conv.weight": torch.zeros(0, 1, 2**31 + 1, 1)}),
    ),
    "many blocks": lambda: (
        "net.pth",
        saved({**STATE, **{f"stages.0.{k}.x": torch.zeros(1) for k in range(3000)}}),
    ),
    "many networks": lambda: (
        "net.pth",
        saved({f"{k}.stages.0.0.conv.lk_conv.weight": torch.zeros(1) for k in range(3000)}),
    ),
    "many entries": lambda: ("net.pth", archive_of_entries(9000)),
    "safetensors, terabytes": lambda: (
        "net.safetensors",
        safetensors_of({"mean": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    ),
    "safetensors, header": lambda: ("net.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "safetensors, nested": lambda: ("net.safetensors", struct.pack("<Q", 400_000) + b"[" * 400_000),
    "safetensors, shared": lambda: (
        "net.safetensors",
        safetensors_of({str(k): value(1, 0, 4) for k in range(99)}, bytes(4)),
    ),
    "safetensors, empty of many": lambda: (
        "net.safetensors",
        safetensors_of({"stages.0.0.conv.lk_conv.weight": value([0, 2**60], 0, 0)}),
    ),
}


def test_tensors_that_are_one_in_the_file_count_each(reader: Reader) -> None:
    shared = torch.zeros(20_000)
    reader.refuses("net.pth", saved({**STATE, **{f"stages.0.0.x{k}": shared for k in range(8)}}), "more than")


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]


def can_measure_memory() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        return memory("VmHWM") > 0
    except (OSError, AttributeError):
        return False


@pytest.mark.skipif(not can_measure_memory(), reason="reads memory from Linux' /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_claims_more_than_it_holds_is_refused_in_little_memory(reader: Reader, bomb: str) -> None:
    name, content = BOMBS[bomb]()
    assert reader.read(name, FILES[name]) == ""  # what the libraries take once is no matter of the file
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    reader.refuses(name, content)
    taken = memory("VmHWM") - before
    assert taken <= 48 * MIB + 8 * len(content), (
        f"{taken / MIB:.0f} MiB for a file of {len(content) / MIB:.2f} MiB"
    )


def test_the_largest_network_with_everything_a_trainer_keeps_is_not_too_large_to_read() -> None:
    """The limit of a pickle is far above what five state dicts of aether_large, optimizer included, take."""
    from aethersr.checkpoint import _LARGEST_PICKLE

    with torch.device("meta") if hasattr(torch.device, "__enter__") else torch.no_grad():
        names = list(aether_arch.aether_large(scale=8).state_dict())
    one = torch.zeros(1)
    content = {
        part: {name: one.clone() for name in names}
        for part in ("params", "params_ema", "exp_avg", "exp_avg_sq", "more")
    }
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        size = next(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    assert size < 0.8 * _LARGEST_PICKLE, size


# ---------------------------------------------------------------------------------------------------- writing


def test_without_safetensors_its_files_are_named_with_what_to_install(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch")
    reader.refuses("net.safetensors", save(STATE), "pip install safetensors, or pass a .pth file")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
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
