"""What is particular to SkyReels-I2V: the image of a prompt. (The promises it shares with all models: tests/promises.)"""

import json

import pytest
import torch
from PIL import Image

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.prompts.images import check_images
from fastvideo_grpo.sampling import noise
from tests import tiny_checkpoints
from tests.trainer import runs


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
        posterior = theirs.vae.encode(image).latent_dist
        drawn = noise.normal(noise.generator("image", prompt.id), tuple(posterior.mean.shape))
        expected = (posterior.mean + posterior.std * drawn) * theirs.vae_scaling_factor
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


def test_cached_embeddings_hold_images_and_another_image_is_encoded_anew(make_trainer, tmp_path):
    settings = {**runs.SKYREELS_I2V, "sample__steps": 3, "prompts__embeddings": tmp_path / "embeddings"}
    cached = make_trainer(run__iterations=1, **settings)
    cached.train()
    image = cached.run.prompts[0].image
    image.rename(tmp_path / "elsewhere.png")  # cached: nobody looks at the file again in this process
    cached.run.save(1)
    assert cached._cache.get(cached.run.prompts[0])["image_latents"].shape == (1, 4, 1, 6, 6)
    (tmp_path / "elsewhere.png").rename(image)
    again = make_trainer(run__iterations=2, **settings)
    assert again.get_module("text_encoder") is None
    index = next((tmp_path / "embeddings").glob("*/index.json"))
    assert len(json.loads(index.read_text())["prompts"]) == len(runs.PROMPTS) + 2  # two negative prompts
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    check_images(again.run.prompts, 48, 48, World())
    assert again._cache.missing(again.run.prompts) == [again.run.prompts[0]]


def test_fastvideo_finds_its_configuration_by_name_and_by_pipeline(tiny_skyreels_i2v, tiny_hunyuan_video, tmp_path):
    from fastvideo import registry
    from fastvideo.configs.pipelines.hunyuan import HunyuanConfig

    from fastvideo_grpo.models.skyreels_i2v.fastvideo_config import SkyReelsI2VConfig
    from fastvideo_grpo.models.skyreels_i2v.trainer import SkyReelsI2VGRPOTrainer  # importing it registers the configuration

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

    from fastvideo_grpo.errors import ConfigError
    from fastvideo_grpo.models import run_config
    from fastvideo_grpo.models.checkpoint import model_facts
    from fastvideo_grpo.planning import plan

    (tmp_path / "empty.yaml").write_text("{}")
    config = run_config.load(tmp_path / "empty.yaml", runs.settings(tmp_path, tiny_hunyuan_video, **runs.SKYREELS_I2V))
    with pytest.raises(ConfigError, match=r"holds a HunyuanVideoPipeline.*set model\.kind=hunyuan_video"):
        model_facts(config)
    renamed = shutil.copytree(tiny_hunyuan_video, tmp_path / "renamed")
    shutil.copy(tiny_skyreels_i2v / "model_index.json", renamed)
    config.model.path = str(renamed)
    with pytest.raises(ConfigError, match="reads 4 channels, but image to video needs 8"):
        plan.check_run(config, model_facts(config), 1)
    config.model.path, config.sample.frames = str(tiny_skyreels_i2v), 1
    with pytest.raises(ConfigError, match=r"sample\.frames is 1, but skyreels_i2v makes clips"):
        plan.check_run(config, model_facts(config), 1)


def test_resuming_with_another_image_is_refused(tiny_skyreels_i2v, tmp_path):
    overrides = runs.settings(tmp_path, tiny_skyreels_i2v, **runs.SKYREELS_I2V, sample__steps=3, run__iterations=1)
    assert runs.run(overrides) == [0]
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert runs.run([*overrides, "run.iterations=2"]) == [1]
    assert "1 images are others than when" in runs.output(tmp_path) and f"first {tmp_path}/0.png" in runs.output(tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    assert runs.run([*overrides, "run.iterations=2"]) == [1]
    assert "1 of 5 images cannot be used" in runs.output(tmp_path)
