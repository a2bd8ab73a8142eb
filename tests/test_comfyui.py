"""ComfyUI's real nodes load and use AetherNet files once the folder lies in custom_nodes.

COMFYUI names a checkout of ComfyUI with its requirements installed; without it these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
from aether_arch import AetherNet
from checkpoints import older_fused
from conftest import ROOT, randomize
from safetensors.torch import save_file

FOLDER = ROOT / "integrations" / "comfyui" / "ComfyUI-AetherNet"
COMFYUI = os.environ.get("COMFYUI", "")

# Runs in a Python of its own: ComfyUI reads the command line, and fills the process with modules of its own.
SCRIPT = """
import asyncio, sys
sys.path[:0] = [{demo!r}]
from basicsr_train import import_torchvision
import_torchvision()
sys.path[:0] = [{comfyui!r}]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import numpy, torch, folder_paths, nodes
torch.set_num_threads(1)
folder_paths.folder_names_and_paths["upscale_models"] = ([{models!r}], folder_paths.supported_pt_extensions)
print("loaded", asyncio.run(nodes.load_custom_node({node!r})))
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader
image = torch.from_numpy(numpy.load({models!r} + "/image.npy"))
for name in folder_paths.get_filename_list("upscale_models"):
    (model,) = UpscaleModelLoader.execute(name).result
    (out,) = ImageUpscaleWithModel.execute(model, image).result
    numpy.save({models!r} + "/" + name + ".npy", out.numpy())
    if model.supports_half:
        half = model.half()(image.movedim(-1, 1).half()).detach().float().clamp(0, 1).movedim(1, -1)
        numpy.save({models!r} + "/" + name + ".half.npy", half.numpy())
"""


def write_every_form(folder: Path) -> Dict[str, Any]:
    """Files of one network in every form and several wrappers; name -> network."""
    net: Any = randomize(
        AetherNet(
            scale=2, embed_dim=16, depths=(1, 1), lk_kernel=5, use_channel_attn=False, use_spatial_attn=False
        )
    ).eval()
    quantised = {
        place: net.fused().prepare_qat(place, [torch.rand(1, 3, 32, 32)]).eval()
        for place in ("default", "full")
    }
    nets = {
        "training.pth": net,
        "older.pth": net,
        "fused.safetensors": net.fused(),
        "lightning.ckpt": net.fused(),
        **{f"quantised_{place}.safetensors": each for place, each in quantised.items()},
        **{f"int8_{place}.safetensors": each.convert_to_quantized() for place, each in quantised.items()},
    }
    for name, each in nets.items():
        state = older_fused(each) if name == "older.pth" else each.state_dict()
        if name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in state.items()}, str(folder / name))
        elif name.endswith(".ckpt"):
            torch.save({"state_dict": {f"net_g.{key}": value for key, value in state.items()}}, folder / name)
        else:
            torch.save({"params": state}, folder / name)
    return nets


@pytest.mark.skipif(not COMFYUI, reason="needs a checkout of ComfyUI: COMFYUI=/path/to/ComfyUI")
@pytest.mark.parametrize("way", ["link", "copy"])
def test_its_own_nodes_take_files_of_every_form_in_tiles_and_half(way: str, tmp_path: Path) -> None:
    models, node = tmp_path / "models", tmp_path / "custom_nodes" / FOLDER.name
    for folder in (models, node.parent):
        folder.mkdir()
    if way == "link":
        node.symlink_to(FOLDER)
    else:
        shutil.copytree(FOLDER, node)
        for name in ("aethersr", "archs"):
            shutil.copytree(ROOT / name, node / name, ignore=shutil.ignore_patterns("__pycache__"))
    nets = write_every_form(models)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 40, 560, 3, generator=generator)  # wider than a tile of 512
    np.save(models / "image.npy", image.numpy())
    paths = {"demo": str(ROOT / "demo"), "comfyui": COMFYUI, "models": str(models), "node": str(node)}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(**paths)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded True" in done.stdout
    for name, net in nets.items():
        with torch.no_grad():
            expected = net(image.movedim(-1, 1)).clamp(0, 1).movedim(1, -1).numpy()
        output = np.load(models / f"{name}.npy")
        assert output.shape == expected.shape == (1, 80, 1120, 3)
        # ComfyUI blends tiles over an overlap of 32, the outermost pixels of a tile included.
        assert np.abs(output - expected).mean() <= (2e-3 if "default" in name or "full" in name else 5e-4), (
            name
        )
        half = models / f"{name}.half.npy"
        assert half.exists() == (
            net in (nets["training.pth"], nets["fused.safetensors"], nets["lightning.ckpt"])
        )
        if half.exists():
            assert np.abs(np.load(half) - expected).mean() <= 2e-3, name


def test_without_aethersr_it_says_what_is_missing_and_lets_comfyui_start(tmp_path: Path) -> None:
    node = tmp_path / "custom_nodes" / FOLDER.name
    shutil.copytree(FOLDER, node)
    code = f"import runpy; print(runpy.run_path({str(node / '__init__.py')!r})['NODE_CLASS_MAPPINGS'])"
    arguments = [sys.executable, "-I", "-c", code]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No module named 'aethersr'" in done.stderr
    assert done.stdout.strip() == "{}"
