"""Random checkpoints in diffusers' layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastvideo_grpo.tiny import checkpoint_files

from .network import CONFIGS, WEIGHTS, make

PIPELINE = "DotsPipeline"


def write_dots(folder, *, seed=0, overwrite=False):
    """Write one and return its path; the same seed writes the same bytes. Raises FileExistsError as all writers do."""
    checkpoint_files.prepare(folder, "Dots", PIPELINE, overwrite=overwrite)
    torch.manual_seed(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINE}))
    for component, config in CONFIGS.items():
        (folder / component).mkdir(exist_ok=True)
        (folder / component / "config.json").write_text(json.dumps(config))
        save_file(make(component, config).state_dict(), folder / component / WEIGHTS)
    return folder
