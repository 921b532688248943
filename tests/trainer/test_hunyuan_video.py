"""What is particular to HunyuanVideo: its tokenizer, decoding in tiles. (The promises it shares with all: tests/promises.)"""

import json
import shutil

import pytest
import torch

from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.prompts.files import Prompt
from tests import tiny_checkpoints
from tests.trainer import runs


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_hunyuan_video):
    from diffusers import HunyuanVideoPipeline

    return tiny_checkpoints.load(HunyuanVideoPipeline, tiny_hunyuan_video)


def test_a_tokenizer_that_reads_the_template_otherwise_is_refused(make_trainer):
    """What transformers 5 makes of a published Llama tokenizer would shift every prompt in silence."""
    trainer = make_trainer(train=False, **runs.HUNYUAN_T2V)
    tokenizer = trainer.get_module("tokenizer")
    trainer.modules["tokenizer"] = lambda text: {"input_ids": tokenizer(text)["input_ids"][1:]}
    with pytest.raises(ConfigError, match=r"makes 94 tokens.*tokenizer.json of HunyuanVideo's own"):
        trainer.initialize_pipeline(trainer.fastvideo_args)


def test_a_tokenizer_declared_as_the_published_one_reads_as_its_file_says(make_trainer, tiny_hunyuan_video, tmp_path):
    """The published files say LlamaTokenizerFast, of which transformers 5 makes another tokenizer."""
    ours = make_trainer(train=False, **runs.HUNYUAN_T2V)
    checkpoint = shutil.copytree(tiny_hunyuan_video, tmp_path / "published")
    for file, change in {
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"},
        "model_index.json": {"tokenizer": ["transformers", "LlamaTokenizerFast"]},
    }.items():
        path = checkpoint / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    published = make_trainer(train=False, **{**runs.HUNYUAN_T2V, "model__path": checkpoint})
    prompt = Prompt("0", "a red circle walks over the grass, realistic style, and a cat")
    for name, expected in ours.encode([prompt])[0].items():
        assert torch.equal(published.encode([prompt])[0][name], expected)


def test_evaluation_drops_media_and_pictures_keep_them(make_trainer, monkeypatch):
    from fastvideo_grpo.trainers import fixed_set

    trainer = make_trainer(**runs.HUNYUAN_T2I)
    sampled = []
    sample_fixed = fixed_set.sample_fixed
    monkeypatch.setattr(
        "fastvideo_grpo.trainers.monitoring.sample_fixed", lambda *a, **k: sampled.append(sample_fixed(*a, **k)) or sampled[-1]
    )
    trainer.run.monitor.evaluate()
    assert sampled and all(drawn.media is None for drawn in sampled)
    kept = trainer.run.monitor.save_pictures(0)
    assert kept.media.shape[0] == len(kept.prompts)


def test_partitioned_loading_asks_for_the_attention_that_was_chosen(make_trainer, monkeypatch):
    """Outside this scope FastVideo takes the fastest kernel it finds, flash-attn where it is installed."""
    from fastvideo.attention.selector import _active_component_attention_backend_scope

    from fastvideo_grpo.trainers import fastvideo

    asked = []

    def build(*arguments):
        asked.append(_active_component_attention_backend_scope().backend.name)
        raise InterruptedError

    trainer = make_trainer(train=False, **runs.HUNYUAN_T2I)
    monkeypatch.setattr(fastvideo, "fastvideo_transformer", build)
    for attention, backend in fastvideo.ATTENTION_BACKENDS.items():
        trainer.config.model.attention = attention
        with pytest.raises(InterruptedError):
            trainer._load_partitioned(trainer.config, trainer.world)
        assert asked[-1] == backend


def test_tiles_are_those_of_diffusers(make_trainer, diffusers_pipeline):
    """Of 32 x 32 pixels and 5 frames, so that the tiny clip has eight in space and three in time."""
    trainer = make_trainer(train=False, **{**runs.HUNYUAN_T2V, "sample__frames": 13, "sample__vae_tiling": True})
    vae, theirs = trainer.get_module("vae"), diffusers_pipeline.vae
    tiles = {
        "tile_sample_min_height": 32,
        "tile_sample_min_width": 32,
        "tile_sample_min_num_frames": 4,
        "tile_sample_stride_height": 24,
        "tile_sample_stride_width": 24,
        "tile_sample_stride_num_frames": 4,
    }
    for name, value in tiles.items():
        setattr(vae, name, value)
    vae.blend_num_frames = 0
    latents = torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0))
    whole = trainer.decode(latents).float()
    try:
        theirs.enable_tiling(**tiles)
        with torch.no_grad():
            decoded = theirs.decode(latents / theirs.config.scaling_factor).sample
    finally:
        theirs.disable_tiling()
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 4, 1)
    assert (whole - expected).abs().max() <= 0.5 + 1e-2
    vae.use_tiling = False
    assert (trainer.decode(latents).float() - whole).abs().max() > 1  # or nothing was tiled
