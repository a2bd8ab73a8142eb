"""Weights of any magnitude fuse into a verified file or are refused in one line; so are other networks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from checkpoints import STATE, saved
from conftest import ROOT, one_line
from damage import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from aethersr.commands import fuse as command
from aethersr.identify import aether_from_state_dict

NAMES = st.sampled_from(list(STATE))

pytestmark = pytest.mark.usefixtures("one_thread", "no_timing")


def fuse(*arguments: Any) -> int:
    return command.main([str(argument) for argument in arguments])


class Folder:
    """A folder in which one checkpoint after another is refused."""

    def __init__(self, path: Path, capfd: Any) -> None:
        self.path, self.capfd = path, capfd
        self.target = path / "out.pth"

    def run(self, name: str, content: bytes) -> Tuple[int, str, Path]:
        source = self.path / name
        source.write_bytes(content)
        self.capfd.readouterr()
        code = fuse("--model_path", source, "--output_path", self.target, "--overwrite", "--device", "cpu")
        error = self.capfd.readouterr().err  # of the file descriptor: libraries write there too
        assert source.read_bytes() == content, "the input was changed"
        assert {path.name for path in self.path.iterdir()} <= {name, "out.pth"}
        source.unlink()
        return code, error, source

    def refuses(self, name: str, content: bytes, words: str = "") -> str:
        code, error, source = self.run(name, content)
        assert code == 2, error
        assert not self.target.exists()
        line = one_line(error)
        assert str(source) in line
        assert words in line
        assert len(line) < 700
        return line

    def refuses_or_fuses(self, name: str, content: bytes) -> str:
        """For damage that may leave a whole file: then the output is whole as well and verified."""
        code, error, _ = self.run(name, content)
        if code == 2:
            assert not self.target.exists()
            one_line(error)
            return "refused"
        assert (code, error) == (0, "")
        aether_from_state_dict(torch.load(self.target, weights_only=True))
        self.target.unlink()
        return "fused"


@pytest.fixture
def folder(tmp_path: Path, capfd: Any) -> Folder:
    return Folder(tmp_path, capfd)


def changed(ending: str, value: float, dtype: torch.dtype = torch.float32) -> Dict[str, Tensor]:
    state = {
        name: torch.full_like(tensor, value) if name.endswith(ending) else tensor
        for name, tensor in STATE.items()
    }
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 1e-12, 1e-5, 1e5, 1e12, 1e30])
def test_norms_of_any_weight_and_variance_fuse_or_are_refused(folder: Folder, value: float) -> None:
    """The verification stands in between: what is written equals what was trained."""
    for ending in ("norm.weight", "norm.running_var", "norm.running_mean", "norm.bias"):
        for part in (ending, "." + ending):  # the last norm too, or those of the blocks alone
            outcome = folder.refuses_or_fuses("net.pth", saved(changed(part, value)))
            if value < 1:
                assert outcome == "fused", f"{part} = {value} is no reason to refuse"


def test_denormals_are_kept(folder: Folder) -> None:
    for scale in (1e-40, 1e-44):
        state = {name: value * scale if name.endswith("weight") else value for name, value in STATE.items()}
        assert folder.refuses_or_fuses("net.pth", saved(state)) == "fused"


@pytest.mark.parametrize(
    "ending", ["weight", "conv_last.weight", "temperature", "error_comp", "lk_bias", "running_mean"]
)
def test_what_overflows_float32_is_refused_with_the_name_of_the_input(folder: Folder, ending: str) -> None:
    for value in (1e20, 3e38):
        code, error, source = folder.run("net.pth", saved(changed(ending, value)))
        if code == 2:
            assert str(source) in one_line(error)
            assert ".part" not in error, "the name of a file that is gone"
        folder.target.unlink(missing_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read_with_their_extremes(folder: Folder, dtype: torch.dtype) -> None:
    smallest, largest = float(torch.finfo(dtype).smallest_normal) / 4, 6e4
    for state in (
        changed("-", 0, dtype),
        changed("running_var", smallest, dtype),
        changed("norm.running_var", largest, dtype),
        changed(".norm.weight", smallest, dtype),
    ):
        assert folder.refuses_or_fuses("net.pth", saved(state)) == "fused"
        assert folder.refuses_or_fuses("net.safetensors", save(state)) == "fused"


@pytest.mark.slow
@settings(FUZZ, max_examples=30)
@given(data=st.lists(st.tuples(NAMES, st.integers(-149, 127), st.booleans()), min_size=1, max_size=4))
def test_weights_of_any_magnitude_fuse_or_are_refused(
    folder: Folder, data: List[Tuple[str, int, bool]]
) -> None:
    state = dict(STATE)
    for name, exponent, single in data:
        value = state[name].clone()
        part = value.view(-1)[-1:] if single else value
        part.copy_(
            part.sign() * 2.0**exponent if "running_var" not in name else torch.full_like(part, 2.0**exponent)
        )
        state[name] = value
    folder.refuses_or_fuses("net.pth", saved(state))


OTHERS: Dict[str, Callable[[Any], nn.Module]] = {  # checkpoints as their authors' code writes them
    "SPAN": lambda a: a.SPAN.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8),
    "PLKSR": lambda a: a.PLKSR.PLKSR(dim=8, n_blocks=1),
    "RealPLKSR": lambda a: a.PLKSR.RealPLKSR(dim=8, n_blocks=1),
    "SwinIR": lambda a: a.SwinIR.SwinIR(embed_dim=12, depths=[1], num_heads=[2]),
    "OmniSR": lambda a: a.OmniSR.OmniSR(num_feat=8, res_num=1, window_size=8),
    "SAFMN": lambda a: a.SAFMN.SAFMN(dim=8, n_blocks=1),
    "DAT": lambda a: a.DAT.DAT(embed_dim=12, depth=[1], num_heads=[2], split_size=[2, 4]),
    "ATD": lambda a: a.ATD.ATD(embed_dim=12, depths=[1], num_heads=[2]),
    "HAT": lambda a: a.HAT.HAT(embed_dim=12, depths=[1], num_heads=[2]),
    "RealCUGAN": lambda a: a.RealCUGAN.UpCunet2x(),
}


@pytest.mark.skipif(
    importlib.util.find_spec("spandrel") is None,
    reason="the package spandrel builds them: pip install spandrel",
)
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_ten_other_architectures_are_refused(folder: Folder) -> None:
    sys.path.insert(0, str(ROOT / "demo"))
    from basicsr_train import import_torchvision

    import_torchvision()  # spandrel imports it
    for name, build in OTHERS.items():
        module = "PLKSR" if name == "RealPLKSR" else name
        importlib.import_module(f"spandrel.architectures.{module}")
        state = {
            key: value.float().contiguous()
            for key, value in build(sys.modules["spandrel.architectures"]).state_dict().items()
        }
        for content in (saved({"params_ema": state}), saved(state)):
            folder.refuses("net.pth", content, "AetherNet")
