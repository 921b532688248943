"""SkyReels-I2V on one process: diffusers' own pipeline at noise level 0, guidance trained through both passes, ratio one."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.images import check_images
from fastvideo_grpo.sampling import noise
from fastvideo_grpo.trainers.conditioning import NEGATIVE, negative_of, split_guidance
from tests import tiny_checkpoints
from tests.trainer import runs
from tests.trainer.promises import (
    assert_draws,
    assert_gradients_through_both_passes,
    assert_ratio_one,
    assert_trains_the_same_weights,
    keys_of,
)

SAMPLES = 2


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_skyreels_i2v):
    from diffusers import HunyuanSkyreelsImageToVideoPipeline

    return tiny_checkpoints.load(HunyuanSkyreelsImageToVideoPipeline, tiny_skyreels_i2v)


@pytest.fixture
def prompt(tmp_path):
    file = tmp_path / "start.png"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()).save(file)
    return Prompt("parity", "a red circle walks over the grass, and a cat", image=file, negative_prompt="blurry, a dog")


@pytest.mark.parametrize(
    "cfg_scale,batched,negative",
    [(1.0, False, ""), (5.0, False, ""), (5.0, True, "blurry, a dog")],
    ids=["plain", "two passes", "one pass"],
)
def test_latents_and_pixels_are_those_of_diffusers(make_trainer, diffusers_pipeline, prompt, cfg_scale, batched, negative):
    """Promise 2, image latents included; in one pass the texts of different length are filled up and masked."""
    prompt = replace(prompt, negative_prompt=negative)
    settings = {**runs.SKYREELS_I2V, "sample__cfg_scale": cfg_scale, "model__cfg_batched": batched}
    trainer = make_trainer(train=False, **settings)
    initial = noise.initial_noise(keys_of(prompt, SAMPLES), trainer.latent_shape(), shared=False)

    def theirs(output_type):
        clips = []
        for latents in initial.split(1):  # diffusers draws the image's latents anew for each clip of a batch
            with torch.no_grad():
                clips.append(
                    diffusers_pipeline(
                        image=Image.open(prompt.image),
                        prompt=prompt.text,
                        negative_prompt=prompt.negative_prompt,
                        true_cfg_scale=cfg_scale,
                        guidance_scale=1.0,
                        height=48,
                        width=48,
                        num_frames=9,
                        num_inference_steps=trainer.config.sample.steps,
                        latents=latents,
                        generator=noise.generator("image", prompt.id),
                        output_type=output_type,
                    ).frames
                )
        return torch.cat(clips)

    latents, pixels = theirs("latent"), theirs("pt").permute(0, 1, 3, 4, 2)
    texts = split_guidance(trainer.conditioning(prompt, 1))
    if cfg_scale > 1:
        assert texts[0]["encoder_hidden_states"].shape[1] != texts[1]["encoder_hidden_states"].shape[1]
    else:
        assert texts[1] is None
    assert_draws(trainer, prompt, latents, pixels, micro_batches=(1, 2))


def test_the_image_is_drawn_from_its_posterior_the_same_way_each_time(make_trainer, prompt):
    trainer = make_trainer(train=False, **runs.SKYREELS_I2V)
    first, again = (trainer.encode([prompt])[0]["image_latents"] for _ in range(2))
    assert torch.equal(first, again) and first.shape == (1, 4, 1, 6, 6)
    other = Prompt("other", prompt.text, image=prompt.image)
    assert not torch.equal(trainer.encode([other])[0]["image_latents"], first)
    assert trainer.latent_shape() == (4, 3, 6, 6)  # the noise alone is the state


def test_the_image_is_encoded_whole_where_clips_are_decoded_in_tiles(make_trainer, diffusers_pipeline, prompt):
    trainer = make_trainer(train=False, **runs.SKYREELS_I2V, sample__vae_tiling=True)
    vae = trainer.get_module("vae")
    for name in ("height", "width"):
        setattr(vae, f"tile_sample_min_{name}", 32)
        setattr(vae, f"tile_sample_stride_{name}", 24)
    theirs = diffusers_pipeline
    image = theirs.video_processor.preprocess(Image.open(prompt.image), height=48, width=48)[:, :, None]
    with torch.no_grad():
        expected = theirs.vae.encode(image).latent_dist.sample(noise.generator("image", prompt.id)) * theirs.vae_scaling_factor
    torch.testing.assert_close(trainer.encode_image(prompt), expected, rtol=1e-5, atol=1e-5)
    assert vae.use_tiling


def test_the_image_matters_in_the_first_frame_and_has_no_part_in_the_state(make_trainer, prompt):
    trainer = make_trainer(train=False, **{**runs.SKYREELS_I2V, "sample__cfg_scale": 1.0})
    conditioning = trainer.conditioning(prompt, 1)
    sample = torch.randn(1, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0))
    level = trainer.schedule.at(torch.tensor([1]))
    seen = []
    trainer.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), trainer.forward_context(conditioning):
        output = trainer.predict(sample, level, conditioning)
        changed = trainer.predict(sample, level, {**conditioning, "image_latents": -conditioning["image_latents"]})
    assert output.shape == sample.shape and not torch.equal(output, changed)
    channels = seen[0].split(4, dim=1)
    assert torch.equal(channels[0], sample) and torch.equal(channels[1][:, :, :1], conditioning["image_latents"])
    assert not channels[1][:, :, 1:].any()


@pytest.mark.parametrize("batched", [False, True], ids=["two passes", "one pass"])
def test_guidance_has_gradients_through_both_passes(make_trainer, prompt, batched):
    trainer = make_trainer(train=False, **{**runs.SKYREELS_I2V, "model__cfg_batched": batched})
    assert_gradients_through_both_passes(trainer, prompt)


def test_a_prompt_without_a_negative_one_takes_the_runs(make_trainer, prompt):
    trainer = make_trainer(train=False, **runs.SKYREELS_I2V, sample__negative_prompt="a cat")
    assert negative_of(prompt, trainer.config).text == "blurry, a dog"
    plain = Prompt("plain", "a red circle", image=prompt.image)
    assert negative_of(plain, trainer.config).text == "a cat"
    ours, its = (trainer.conditioning(p, 1)[f"{NEGATIVE}pooled_projections"] for p in (prompt, plain))
    assert not torch.equal(ours, its)
    (cat,) = trainer.encode([Prompt("cat", "a cat")])
    assert torch.equal(its, cat["pooled_projections"]) and "image_latents" not in cat


FLAVOURS = {
    "two passes": {},
    "one pass": {"model__cfg_batched": True},
    "one pass, full checkpointing": {"model__cfg_batched": True, "engine__activation_checkpointing": "full"},
    "no guidance": {"sample__cfg_scale": 1.0},
    "LoRA, every second block, 1 sample": {
        "model__lora__rank": 4,
        "model__lora__alpha": 8.0,
        "optim__lr": 1e-2,
        "engine__activation_checkpointing": "every:2",
        "engine__micro_batch_size": 1,
    },
    "two updates, KL, idle offload": {
        "grpo__updates_per_iteration": 2,
        "grpo__kl_weight": 0.1,
        "engine__offload_idle": True,
        "model__cfg_batched": True,
    },
}


QUICK = ["two passes", "one pass, full checkpointing"]


@pytest.mark.parametrize("flavour", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FLAVOURS if f not in QUICK)])
def test_every_ratio_is_exactly_one_before_the_first_optimiser_step(make_trainer, flavour):
    settings = {**runs.SKYREELS_I2V, "sample__steps": 3, "optim__lr": 1e-3, "run__iterations": 2, **FLAVOURS[flavour]}
    assert_ratio_one(make_trainer(**settings))


def test_checkpointing_and_one_pass_train_the_weights_that_two_passes_do(make_trainer, tmp_path):
    """Recomputed blocks see the mask, too."""
    settings = {**runs.SKYREELS_I2V, "sample__steps": 3, "run__iterations": 1}
    flavours = {"plain": {}, "other": FLAVOURS["one pass, full checkpointing"]}
    assert_trains_the_same_weights(
        make_trainer(**settings, **flavour, run__dir=tmp_path / name) for name, flavour in flavours.items()
    )


def test_cached_embeddings_hold_images_and_negative_prompts(make_trainer, tmp_path):
    """The same run as without, and the text encoders stay on disk the second time; another image is encoded anew."""
    settings = {**runs.SKYREELS_I2V, "sample__steps": 3, "prompts__embedding_dtype": "fp32"}
    plain = make_trainer(run__iterations=1, run__dir=tmp_path / "plain", **settings)
    plain.train()
    settings["prompts__embeddings"] = tmp_path / "embeddings"
    cached = make_trainer(run__iterations=1, **settings)
    cached.train()
    assert runs.same_bits(dict(plain.engine.state_dict()), dict(cached.engine.state_dict()))
    image = cached.prompts[0].image
    image.rename(tmp_path / "elsewhere.png")  # cached: nobody looks at the file again in this process
    cached._save(1)
    assert cached._cache.get(cached.prompts[0])["image_latents"].shape == (1, 4, 1, 6, 6)
    (tmp_path / "elsewhere.png").rename(image)
    again = make_trainer(run__iterations=2, **settings)
    assert again.get_module("text_encoder") is None
    index = next((tmp_path / "embeddings").glob("*/index.json"))
    assert len(json.loads(index.read_text())["prompts"]) == len(runs.PROMPTS) + 2  # two negative prompts
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    check_images(again.prompts, 48, 48, World())
    assert again._cache.missing(again.prompts) == [again.prompts[0]]


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True], ids=["two passes", "one pass"])
def test_ratio_is_one_in_bf16(make_trainer, batched):
    precision = {"model__precision": "bf16", "model__vae_precision": "bf16", "grpo__updates_per_iteration": 2}
    trainer = make_trainer(
        **{**runs.SKYREELS_I2V, **precision}, model__cfg_batched=batched, sample__steps=3, optim__lr=1e-3, run__iterations=2
    )
    trainer.train()
    for line in trainer.log.read():
        assert line["train/ratio_first_update_max_dev"] <= 1e-6 < line["train/ratio_max_dev"]


OTHERS = {"FLUX": {}, "HunyuanVideo": runs.HUNYUAN_T2V}
REST = [("FLUX", False), ("HunyuanVideo", True), ("HunyuanVideo", False)]


@pytest.mark.parametrize("model,batched", [("FLUX", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_guidance_is_there_for_other_models(make_trainer, model, batched):
    """Off unless asked for; FLUX's texts are of one length and need no mask."""
    settings = {"sample__steps": 3, "run__iterations": 1, **OTHERS[model]}
    off = make_trainer(train=False, **settings)
    assert off.config.sample.cfg_scale == 1.0 and not [n for n in off.conditioning(Prompt("0", "a cat"), 1) if NEGATIVE in n]
    trainer = make_trainer(**settings, sample__cfg_scale=3.0, model__cfg_batched=batched)
    keys = keys_of(Prompt("0", "a cat"), 2)
    assert not torch.equal(trainer.draw(Prompt("0", "a cat"), keys).media, off.draw(Prompt("0", "a cat"), keys).media)
    trainer.train()
    assert trainer.log.read()[-1]["train/ratio_first_update_max_dev"] == 0.0


def test_fastvideo_finds_its_configuration_by_name_and_by_pipeline(tiny_skyreels_i2v, tiny_hunyuan_video, tmp_path):
    from fastvideo import registry
    from fastvideo.configs.pipelines.hunyuan import HunyuanConfig

    from fastvideo_grpo.trainers.skyreels_config import SkyReelsI2VConfig
    from fastvideo_grpo.trainers.skyreels_i2v import SkyReelsI2VGRPOTrainer  # importing it registers the configuration

    assert SkyReelsI2VGRPOTrainer.pipeline_config_class is SkyReelsI2VConfig
    unnamed = tmp_path / "checkpoint"
    unnamed.symlink_to(tiny_skyreels_i2v)

    def found(path):
        return registry._get_config_info(str(path)).pipeline_config_cls

    assert found(unnamed) is found(tiny_skyreels_i2v) is found("Skywork/SkyReels-V1-Hunyuan-I2V") is SkyReelsI2VConfig
    assert found(tiny_hunyuan_video) is HunyuanConfig
    arch = SkyReelsI2VConfig().dit_config.arch_config
    assert (arch.in_channels, arch.num_channels_latents, arch.out_channels) == (32, 16, 16)
    assert SkyReelsI2VConfig().vae_config.load_encoder


def test_a_text_to_video_checkpoint_is_refused(tiny_hunyuan_video, tiny_skyreels_i2v, tmp_path):
    """By its pipeline, and where somebody wrote the other name into it, by its channels."""
    import shutil

    from fastvideo_grpo import config as configuration
    from fastvideo_grpo import families, plan
    from fastvideo_grpo.config import ConfigError

    (tmp_path / "empty.yaml").write_text("{}")
    config = configuration.load(tmp_path / "empty.yaml", runs.settings(tmp_path, tiny_hunyuan_video, **runs.SKYREELS_I2V))
    with pytest.raises(ConfigError, match=r"holds a HunyuanVideoPipeline.*set model\.kind=hunyuan_video"):
        families.model_facts(config)
    renamed = shutil.copytree(tiny_hunyuan_video, tmp_path / "renamed")
    shutil.copy(tiny_skyreels_i2v / "model_index.json", renamed)
    config.model.path = str(renamed)
    with pytest.raises(ConfigError, match="reads 4 channels, but image to video needs 8"):
        plan.check_run(config, families.model_facts(config), 1)
    config.model.path, config.sample.frames = str(tiny_skyreels_i2v), 1
    with pytest.raises(ConfigError, match=r"sample\.frames is 1, but skyreels_i2v makes clips"):
        plan.check_run(config, families.model_facts(config), 1)


def test_export_is_what_diffusers_loads_and_draws_the_same_clip(make_trainer, prompt, tmp_path, capsys):
    """Promise 7."""
    from diffusers import HunyuanSkyreelsImageToVideoPipeline

    from fastvideo_grpo import cli

    trainer = make_trainer(**runs.SKYREELS_I2V, optim__lr=1e-2, run__iterations=1)
    before = trainer.draw(prompt, keys_of(prompt, 1), deterministic=True).media
    trainer.train()
    out = tmp_path / "exported"
    assert cli.main(["export", str(trainer.folder), "--out", str(out), "--pipeline"]) == 0
    assert "HunyuanSkyreelsImageToVideoPipeline.from_pretrained" in capsys.readouterr().out
    ours = trainer.draw(prompt, keys_of(prompt, 1), deterministic=True).media
    pipeline = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(out)
    with torch.no_grad():
        theirs = pipeline(
            image=Image.open(prompt.image),
            prompt=prompt.text,
            negative_prompt=prompt.negative_prompt,
            true_cfg_scale=5.0,
            guidance_scale=1.0,
            height=48,
            width=48,
            num_frames=9,
            num_inference_steps=trainer.config.sample.steps,
            latents=noise.initial_noise(keys_of(prompt, 1), trainer.latent_shape(), shared=False),
            generator=noise.generator("image", prompt.id),
            output_type="pt",
        ).frames
    assert (theirs.permute(0, 1, 3, 4, 2) * 255 - ours).abs().max() <= 0.5 + 0.1
    assert (ours.int() - before.int()).abs().max() > 2
