"""HunyuanVideo on one process: diffusers' own pipeline at noise level 0, ratio one, decoding in tiles, idle offload."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from fastvideo_grpo.config import ConfigError
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise
from tests import tiny_checkpoints
from tests.trainer import runs
from tests.trainer.promises import assert_decodes_with_gradients, assert_draws, assert_ratio_one, keys_of

PROMPT = Prompt("parity", "a red circle walks over the grass, realistic style, and a cat")
SAMPLES = 4


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_hunyuan_video):
    from diffusers import HunyuanVideoPipeline

    return tiny_checkpoints.load(HunyuanVideoPipeline, tiny_hunyuan_video)


@pytest.mark.parametrize(
    "frames,size,text_length",
    [(9, (48, 48), 256), (1, (32, 64), 256), (5, (32, 32), 6)],
    ids=["video", "image", "a prompt longer than the text"],
)
def test_embeddings_latents_and_pixels_are_those_of_diffusers(make_trainer, diffusers_pipeline, frames, size, text_length):
    """Promise 2. diffusers pads the text and masks the padding, here there is none: both read the same tokens."""
    geometry = {"sample__frames": frames, "sample__height": size[0], "sample__width": size[1]}
    trainer = make_trainer(
        train=False, **{**runs.HUNYUAN_T2V, **geometry, "sample__shift": 7.0, "prompts__text_length": text_length}
    )
    with torch.no_grad():
        sequence, pooled, mask = diffusers_pipeline.encode_prompt(PROMPT.text, max_sequence_length=text_length)
    ours = trainer.conditioning(PROMPT, 1)
    tokens = int(mask.sum())
    assert ours["encoder_hidden_states"].shape[1] == tokens <= text_length and (text_length > 6 or tokens == 6)
    torch.testing.assert_close(ours["encoder_hidden_states"], sequence[:, :tokens], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pooled_projections"], pooled, rtol=1e-5, atol=1e-5)

    initial = noise.initial_noise(keys_of(PROMPT, SAMPLES), trainer.latent_shape(), shared=False)

    def theirs(output_type):
        with torch.no_grad():
            return diffusers_pipeline(
                prompt=PROMPT.text,
                max_sequence_length=text_length,
                height=size[0],
                width=size[1],
                num_frames=frames,
                num_inference_steps=trainer.config.sample.steps,
                guidance_scale=trainer.config.sample.guidance_scale,
                latents=initial,
                num_videos_per_prompt=SAMPLES,
                output_type=output_type,
            ).frames

    latents, pixels = theirs("latent"), theirs("pt").permute(0, 1, 3, 4, 2)
    assert pixels.shape == (SAMPLES, frames, *size, 3)
    assert_draws(trainer, PROMPT, latents, pixels)
    assert_decodes_with_gradients(trainer, latents, pixels)


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
    for name, expected in ours.encode([PROMPT])[0].items():
        assert torch.equal(published.encode([PROMPT])[0][name], expected)


def test_a_second_start_with_cached_embeddings_and_idle_offload(make_trainer, tmp_path):
    """The text encoders stay on disk then, and there is nothing of them to move."""
    settings = {**runs.HUNYUAN_T2I, "engine__offload_idle": True, "prompts__embeddings": tmp_path / "embeddings"}
    make_trainer(run__iterations=1, **settings).train()
    again = make_trainer(run__iterations=2, **settings)
    assert again.get_module("text_encoder") is None
    again.train()
    assert again.store.iterations()[-1] == 2


def test_evaluation_drops_media_and_pictures_keep_them(make_trainer, monkeypatch):
    from fastvideo_grpo.evaluation import fixed_set

    trainer = make_trainer(**runs.HUNYUAN_T2I)
    sampled = []
    sample_fixed = fixed_set.sample_fixed
    monkeypatch.setattr(
        "fastvideo_grpo.trainers.base.sample_fixed", lambda *a, **k: sampled.append(sample_fixed(*a, **k)) or sampled[-1]
    )
    trainer.evaluate()
    assert sampled and all(drawn.media is None for drawn in sampled)
    kept = trainer.save_pictures(0)
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


FLAVOURS = {
    "video": {},
    "video, 1 sample": {"engine__micro_batch_size": 1},
    "video, 4 samples": {"engine__micro_batch_size": 4},
    "image": {"sample__frames": 1},
    "LoRA": {"model__lora__rank": 4, "model__lora__alpha": 8.0, "optim__lr": 1e-2},
    "every second block": {"engine__activation_checkpointing": "every:2"},
    "full checkpointing, best of": {
        "engine__activation_checkpointing": "full",
        "grpo__best_of__top": 1,
        "grpo__best_of__bottom": 2,
    },
    "KL": {"grpo__kl_weight": 0.1},
    "idle offload": {"engine__offload_idle": True},
}
QUICK = ["video", "LoRA", "every second block"]


@pytest.mark.parametrize("flavour", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FLAVOURS if f not in QUICK)])
def test_every_ratio_is_exactly_one_before_the_first_optimiser_step(make_trainer, flavour):
    assert_ratio_one(make_trainer(**{**runs.HUNYUAN_T2V, "optim__lr": 1e-3, "run__iterations": 2, **FLAVOURS[flavour]}))


def test_ratio_is_one_in_bf16(make_trainer):
    trainer = make_trainer(
        **{**runs.HUNYUAN_T2V, "model__precision": "bf16", "model__vae_precision": "bf16"}, optim__lr=1e-3, run__iterations=2
    )
    trainer.train()
    assert max(line["train/ratio_first_update_max_dev"] for line in trainer.log.read()) <= 1e-6
    assert next(trainer.denoiser.parameters()).dtype == next(trainer.get_module("vae").parameters()).dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in trainer.engine.state_dict().values())


def test_training_moves_every_weight(make_trainer):
    trainer = make_trainer(**runs.HUNYUAN_T2V, optim__lr=1e-3, run__iterations=1)
    before = {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters()}
    trainer.train()
    assert not [name for name, p in trainer.denoiser.named_parameters() if torch.equal(p, before[name])]


def test_every_kth_block_is_checkpointed(make_trainer):
    trainer = make_trainer(**runs.HUNYUAN_T2V, engine__activation_checkpointing="every:2")
    wrapped = {
        name.split("._checkpoint")[0] for name, _ in trainer.denoiser.named_parameters() if "_checkpoint_wrapped" in name
    }
    assert wrapped == {"double_blocks.0", "single_blocks.0"}  # of two each


def test_what_is_idle_leaves_the_device(make_trainer, monkeypatch):
    """With ``engine.offload_idle`` each of them is on the device exactly while it is used."""
    inside, used = [], []

    @contextmanager
    def resident(movable, device):
        inside.append(type(movable).__name__)
        yield
        inside.pop()

    for module in ("rewards.inline", "trainers.policy"):
        monkeypatch.setattr(f"fastvideo_grpo.{module}.resident", resident)
    moved = []
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *args, _to=torch.nn.Module.to: moved.append((type(self), args)) or _to(self, *args)
    )
    trainer = make_trainer(**runs.HUNYUAN_T2V, engine__offload_idle=True, run__iterations=1)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert (type(trainer.get_module(name)), ("cpu",)) in moved  # where FastVideo's loader put them, they do not stay

    def watch(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: used.append((what, tuple(inside))) or original(*a, **k))

    watch(trainer, "predict", "network")
    watch(trainer.get_module("vae"), "decode", "vae")
    watch(trainer.text_stage, "encode_text", "text")
    ((_, reward),) = trainer.rewards.rewards.items()
    watch(reward.reward, "score", "rewards")
    trainer.train()
    vae, encoders = (
        type(trainer.get_module("vae")).__name__,
        {type(trainer.get_module(n)).__name__ for n in trainer.text_encoders},
    )
    assert {(what, place) for what, place in used if what != "text"} == {
        ("network", ()),
        ("vae", (vae,)),
        ("rewards", (type(reward.reward).__name__,)),
    }
    assert {place for what, place in used if what == "text"} and all(set(p) == encoders for w, p in used if w == "text")
