"""Random checkpoints in diffusers' layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastvideo_grpo.tiny.target_folder import check_writable, replacing

from .network import CONFIGS, WEIGHTS, make


def write_dots(folder, *, seed=0, overwrite=False):
    """Write one and return its path; the same seed writes the same bytes. Raises FileExistsError as all writers do."""
    folder = Path(folder)
    check_writable(folder, "a Dots checkpoint", lambda folder: (folder / "mixer").is_dir(), overwrite=overwrite)
    torch.manual_seed(seed)
    with replacing(folder) as unfinished:
        unfinished.mkdir(parents=True)
        (unfinished / "model_index.json").write_text(json.dumps({"_class_name": "DotsPipeline"}))
        for component, config in CONFIGS.items():
            (unfinished / component).mkdir()
            (unfinished / component / "config.json").write_text(json.dumps(config))
            save_file(make(component, config).state_dict(), unfinished / component / WEIGHTS)
    return folder
