"""What is checked of every tiny checkpoint, whatever its model: its files, its index, its weights in diffusers."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastvideo_grpo.commands import tiny as command

# Names in published files that diffusers and transformers 5 still read, and what they call them.
CURRENT_NAMES = {
    "vision_model.vision_model.": "vision_model.",
    "mid_block.attentions.0.query.": "mid_block.attentions.0.to_q.",
    "mid_block.attentions.0.key.": "mid_block.attentions.0.to_k.",
    "mid_block.attentions.0.value.": "mid_block.attentions.0.to_v.",
    "mid_block.attentions.0.proj_attn.": "mid_block.attentions.0.to_out.0.",
}


@pytest.fixture(autouse=True)
def one_thread():
    """As the writers: thread counts change sums. (Imported by who writes one.)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_command(*arguments):
    """`fastvideo-grpo tiny` with these arguments; returns the exit status."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def load(pipeline_class, folder):
    """A diffusers pipeline in float32 that draws no progress bar."""
    pipeline = pipeline_class.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def contents_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def keys_of(folder):
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    return names


def weights_of(folder):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def check_files(folder, published):
    """`published`: names; a * stands for the number of a shard, and there is more than one."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for pattern in published:
        matching = {name for name in found if Path(name).match(pattern)}
        assert matching, pattern
        assert len(matching) > 1 or "*" not in pattern, f"{pattern} is sharded"
        found -= matching
    assert not found


def check_index(folder, stem):
    """The index names every tensor, its shard, and the size of all."""
    index = read(folder / f"{stem}.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    total, seen = 0, {}
    for shard in shards:
        for key, value in load_file(folder / shard).items():
            seen[key] = shard
            total += value.nbytes
    assert seen == index["weight_map"]
    assert total == index["metadata"]["total_size"]


def components_of(folder):
    """The components with weights."""
    return sorted({path.parent.name for path in folder.glob("*/*.safetensors")})


def current_name(key):
    for old, new in CURRENT_NAMES.items():
        key = key.replace(old, new)
    return key.removeprefix("text_model.")


def check_every_weight_is_loaded(pipeline, folder):
    for name in components_of(folder):
        written = {current_name(key): value for key, value in weights_of(folder / name).items()}
        loaded = {key.removeprefix("text_model."): value for key, value in getattr(pipeline, name).state_dict().items()}
        for key, value in written.items():
            assert torch.equal(loaded.pop(key), value.float()), f"{name}: {key}"
        assert all("embed_tokens" in key for key in loaded), f"{name}: {sorted(loaded)}"  # T5's is tied to `shared`


def check_same_form(folder, other, measured=()):
    """The same files; all but weights are equal, apart from the keys `measured` of vae/config.json."""
    ours, theirs = contents_of(folder), contents_of(other)
    assert set(ours) == set(theirs)
    for path in ours:
        if str(path) == "vae/config.json":
            configs = [json.loads(contents[path]) for contents in (ours, theirs)]
            assert configs[0].keys() == configs[1].keys()
            assert all(configs[0][key] == configs[1][key] for key in configs[0] if key not in measured)
        else:
            assert path.suffix == ".safetensors" or ours[path] == theirs[path], path
    for component in components_of(folder):
        forms = [
            {key: (value.shape, value.dtype) for key, value in weights_of(place / component).items()}
            for place in (folder, other)
        ]
        assert forms[0] == forms[1], component


def check_the_prompt_shows_in_a_clip(pipeline, **arguments):
    """diffusers' pipeline makes clips of 9 frames of 32 x 32 pixels, and different prompts different ones."""
    clips = [
        pipeline(
            prompt,
            height=32,
            width=32,
            num_frames=9,
            num_inference_steps=3,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
            **arguments,
        ).frames
        for prompt in ("a red circle moving left", "a blue square moving up")
    ]
    assert clips[0].shape == (1, 9, 32, 32, 3)
    assert np.isfinite(clips[0]).all() and clips[0].std() > 0.05
    assert np.abs(clips[0] - clips[1]).mean() > 1e-3, "the prompt matters"
