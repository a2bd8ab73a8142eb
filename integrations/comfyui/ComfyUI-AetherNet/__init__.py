"""Lets ComfyUI's own "Load Upscale Model" open AetherNet files. Adds no node of its own.

Put this folder into ComfyUI's ``custom_nodes`` folder, as a link or as a copy: README.md says how.
"""

import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODE_CLASS_MAPPINGS: dict = {}  # without it ComfyUI doesn't accept the folder
NODE_DISPLAY_NAME_MAPPINGS: dict = {}

# aethersr/ and archs/ copied beside this file, or those of the linked checkout; otherwise the installed ones.
sys.path += [str(folder) for folder in (HERE, *HERE.parents[1:3]) if (folder / "aethersr").is_dir()]

try:
    from aethersr.spandrel import install
except ImportError as error:
    logging.error("AetherNet: %s. Install it for ComfyUI's Python, or see README.md in %s.", error, HERE)
else:
    install()
