"""ComfyUI's real nodes load and use AetherNet files once the folder lies in custom_nodes.

COMFYUI names a checkout of ComfyUI with its requirements installed; without it the first test is skipped.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FORMS, older_fused
from conftest import ROOT, small_net

FOLDER = ROOT / "integrations" / "comfyui" / "ComfyUI-AetherNet"
COMFYUI = os.environ.get("COMFYUI", "")
# Runs in a Python of its own: ComfyUI reads the command line, and fills the process with modules of its own.
SCRIPT = """
import asyncio, sys
comfyui, models, node = sys.argv[1:]
sys.path[:0] = [comfyui]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import numpy, torch, folder_paths, nodes
torch.set_num_threads(1)
folder_paths.folder_names_and_paths["upscale_models"] = ([models], folder_paths.supported_pt_extensions)
print("loaded", asyncio.run(nodes.load_custom_node(node)))
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader
image = torch.from_numpy(numpy.load(models + "/image.npy"))
for name in folder_paths.get_filename_list("upscale_models"):
    (model,) = UpscaleModelLoader.execute(name).result
    (out,) = ImageUpscaleWithModel.execute(model, image).result
    numpy.save(models + "/" + name + ".npy", out.numpy())
"""


@pytest.mark.skipif(not COMFYUI, reason="needs a checkout of ComfyUI: COMFYUI=/path/to/ComfyUI")
@pytest.mark.parametrize("way", ["link", "copy"])
def test_its_own_nodes_take_files_of_every_form_in_tiles(way: str, tmp_path: Path) -> None:
    models, node = tmp_path / "models", tmp_path / "custom_nodes" / FOLDER.name
    for folder in (models, node.parent):
        folder.mkdir()
    if way == "link":
        node.symlink_to(FOLDER)
    else:
        for source, target in ((FOLDER, node), (ROOT / "aethersr", node), (ROOT / "archs", node)):
            place = target if source == FOLDER else target / source.name
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
    net = small_net(2, embed_dim=16, depths=(1, 1), use_channel_attn=False, use_spatial_attn=False).float()
    nets = {name: make(copy.deepcopy(net)) for name, make in FORMS.items()}
    states = {name: each.state_dict() for name, each in nets.items()}
    for name, state in {**states, "older": older_fused(net)}.items():
        torch.save({"params": state}, models / f"{name}.pth")
    image = torch.rand(1, 40, 560, 3, generator=torch.Generator().manual_seed(0))  # wider than a tile of 512
    np.save(models / "image.npy", image.numpy())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-c", SCRIPT, COMFYUI, models, node]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded True" in done.stdout
    for name, each in {**nets, "older": net}.items():
        with torch.no_grad():
            expected = each(image.movedim(-1, 1)).clamp(0, 1).movedim(1, -1).numpy()
        output = np.load(models / f"{name}.pth.npy")
        assert output.shape == expected.shape == (1, 80, 1120, 3)
        # ComfyUI blends tiles over an overlap of 32, the outermost pixels of a tile included.
        assert np.abs(output - expected).mean() <= (2e-3 if name in ("quantised", "int8") else 5e-4), name


def test_without_aethersr_it_says_what_is_missing_and_lets_comfyui_start(tmp_path: Path) -> None:
    node = tmp_path / "custom_nodes" / FOLDER.name
    shutil.copytree(FOLDER, node)
    code = f"import runpy; print(runpy.run_path({str(node / '__init__.py')!r})['NODE_CLASS_MAPPINGS'])"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No module named 'aethersr'" in done.stderr
    assert done.stdout.strip() == "{}"
