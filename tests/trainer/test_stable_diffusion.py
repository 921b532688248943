"""Stable Diffusion on one process: diffusers' pipeline with DDIM, guidance trained through one pass or both, ratio one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvideo_grpo import cli, families, memory, plan
from fastvideo_grpo import config as configuration
from fastvideo_grpo.config import ConfigError
from fastvideo_grpo.prompts.files import Prompt
from fastvideo_grpo.sampling import noise
from fastvideo_grpo.sampling.rollout import Walk
from fastvideo_grpo.trainers.conditioning import split_guidance
from tests import tiny_checkpoints
from tests.trainer import runs
from tests.trainer.memory import kept_for_backward

PROMPT = Prompt("parity", "a red circle on a cat, realistic style", negative_prompt="blurry")
SAMPLES = 2
SD = runs.STABLE_DIFFUSION


def _keys(count):
    return [noise.SampleKey(0, 0, 0, PROMPT.id, member) for member in range(count)]


@pytest.fixture(scope="module")
def checkpoints(tiny_stable_diffusion, tmp_path_factory):
    from fastvideo_grpo.tiny.stable_diffusion import write_stable_diffusion

    v = write_stable_diffusion(tmp_path_factory.mktemp("v") / "checkpoint", prediction_type="v_prediction")
    return {"epsilon": tiny_stable_diffusion, "v_prediction": v}


def _diffusers(checkpoint):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = tiny_checkpoints.load(StableDiffusionPipeline, checkpoint)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.safety_checker = None  # it may blacken pictures
    return pipeline


class _Replayed:
    """Stands for torch's generator in diffusers' DDIM: hands out the noise of our transitions, in turn."""

    def __init__(self, monkeypatch, walk):
        self.walk, self.next = walk, 0
        import diffusers.schedulers.scheduling_ddim as ddim

        monkeypatch.setattr(ddim, "randn_tensor", self.draw)

    def draw(self, shape, **kwargs):
        self.next += 1
        return self.walk.noise(self.next - 1)


# The whole matrix in `make test-all`.
GUIDANCE = {"plain": (1.0, False), "two passes": (5.0, False), "one pass": (5.0, True)}
PARITY = [(p, eta, guidance) for p in ("epsilon", "v_prediction") for eta in (0.0, 1.0) for guidance in GUIDANCE]
QUICK_PARITY = [case for case in PARITY if case[0] == "epsilon" or case[1:] == (1.0, "two passes")]


@pytest.mark.parametrize(
    "prediction_type,eta,guidance",
    [case if case in QUICK_PARITY else pytest.param(*case, marks=pytest.mark.slow) for case in PARITY],
)
def test_latents_and_pixels_are_those_of_diffusers(make_trainer, checkpoints, monkeypatch, prediction_type, eta, guidance):
    """Promise 2, and with DDIM's own noise as well, from the same draws."""
    cfg_scale, batched = GUIDANCE[guidance]
    settings = {**SD, "sample__cfg_scale": cfg_scale, "model__cfg_batched": batched, "sample__steps": 6}
    trainer = make_trainer(train=False, **settings, model__path=checkpoints[prediction_type])
    pipeline = _diffusers(checkpoints[prediction_type])
    initial = noise.initial_noise(_keys(SAMPLES), trainer.latent_shape(), shared=False)
    shape = trainer.latent_shape()
    transition = trainer.transition if eta else trainer.transition.deterministic()
    walk = Walk(trainer.schedule, transition, lambda i: noise.step_noise(_keys(SAMPLES), shape, i), record=False)

    def theirs(output_type):
        if eta:
            _Replayed(monkeypatch, walk)
        with torch.no_grad():
            return pipeline(
                prompt=PROMPT.text,
                negative_prompt=PROMPT.negative_prompt,
                height=64,
                width=64,
                num_inference_steps=6,
                guidance_scale=cfg_scale,
                eta=eta,
                latents=initial,
                num_images_per_prompt=SAMPLES,
                output_type=output_type,
            ).images

    latents, pixels = theirs("latent"), theirs("pt").permute(0, 2, 3, 1)[:, None]
    caught = []
    decode = trainer.decode
    trainer.decode = lambda states, **kwargs: caught.append(states) or decode(states, **kwargs)
    media = trainer.generate(trainer.conditioning(PROMPT, SAMPLES), initial, walk).media
    # Latents reach 10 with guidance, where float32's last digit is 1e-6: relative to the largest.
    torch.testing.assert_close(caught[0], latents, rtol=1e-5, atol=1e-5 * max(1.0, latents.abs().max().item()))
    torch.testing.assert_close(decode(caught[0], differentiable=True), pixels, rtol=1e-4, atol=1e-4)
    assert (media.float() - pixels * 255).abs().max() <= 0.5 + 1e-2
    assert pixels.std() > 0.01  # a constant picture would agree with anything


def test_embeddings_are_those_of_diffusers(make_trainer, tiny_stable_diffusion):
    trainer = make_trainer(train=False, **SD)
    with torch.no_grad():
        positive, negative = _diffusers(tiny_stable_diffusion).encode_prompt(
            PROMPT.text, torch.device("cpu"), 1, True, PROMPT.negative_prompt
        )
    ours = split_guidance(trainer.conditioning(PROMPT, 1))
    for part, expected in zip(ours, (positive, negative), strict=True):
        torch.testing.assert_close(part["encoder_hidden_states"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision,dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_vae_decodes_in_the_precision_that_is_asked_for(make_trainer, precision, dtype):
    trainer = make_trainer(train=False, **SD, model__vae_precision=precision)
    assert {parameter.dtype for parameter in trainer.get_module("vae").parameters()} == {dtype}
    latents = torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0))
    rounded = trainer.decode(latents, differentiable=True)
    exact = make_trainer(train=False, **SD).decode(latents, differentiable=True)
    assert 0 < (rounded - exact).abs().max() < 0.1


@pytest.mark.parametrize("trained", ["both", "conditional"])
@pytest.mark.parametrize("batched", [False, True], ids=["two passes", "one pass"])
def test_guidance_has_gradients_through_the_passes_that_are_trained(make_trainer, batched, trained):
    """Against u + w (c - u) written out: its gradient is (1 - w) du + w dc, or w dc with ``grpo.cfg_gradients=conditional``."""
    trainer = make_trainer(train=False, **SD, model__cfg_batched=batched, grpo__cfg_gradients=trained)
    network, scale = trainer.denoiser, trainer.config.sample.cfg_scale
    conditioning = trainer.conditioning(PROMPT, 2)
    sample = torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0))
    towards = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    level = trainer.schedule.at(torch.tensor([0, 2]))

    def gradients(output):
        return [g.double() for g in torch.autograd.grad((output * towards).sum(), list(network.parameters()))]

    output = trainer.predict(sample, level, conditioning)
    ours = gradients(output)
    conditional, unconditional = (trainer.network_output(sample, level, part) for part in split_guidance(conditioning))
    torch.testing.assert_close(output, unconditional + scale * (conditional - unconditional), rtol=1e-5, atol=1e-5)
    share = 1 - scale if trained == "both" else 0.0
    by_hand = [scale * c + share * u for c, u in zip(gradients(conditional), gradients(unconditional), strict=True)]
    largest = max(g.abs().max() for g in by_hand)
    for found, expected in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)


FLAVOURS = {
    "two passes": {},
    "one pass, full checkpointing": {"model__cfg_batched": True, "engine__activation_checkpointing": "full"},
    "LoRA, every second block, 1 sample": {
        "model__lora__rank": 4,
        "model__lora__alpha": 8.0,
        "optim__lr": 1e-2,
        "engine__activation_checkpointing": "every:2",
        "engine__micro_batch_size": 1,
    },
    "KL, idle offload, conditional alone": {
        "grpo__kl_weight": 0.1,
        "engine__offload_idle": True,
        "grpo__cfg_gradients": "conditional",
    },
    "reverse SDE, no guidance, decaying noise": {
        "sample__transition": "diffusion_sde",
        "sample__cfg_scale": 1.0,
        "sample__noise_decay": 1.0,
        "engine__micro_batch_size": 4,
    },
}


QUICK = ["two passes", "one pass, full checkpointing", "reverse SDE, no guidance, decaying noise"]


@pytest.mark.parametrize("flavour", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FLAVOURS if f not in QUICK)])
def test_every_ratio_is_exactly_one_before_the_first_optimiser_step(make_trainer, flavour):
    """Promise 1, bitwise in float32."""
    settings = {**SD, "sample__steps": 3, "optim__lr": 1e-3, "run__iterations": 2, "grpo__updates_per_iteration": 2}
    trainer = make_trainer(**{**settings, **FLAVOURS[flavour]})
    trainer.train()
    for line in trainer.log.read():
        assert line["train/ratio_first_update_max_dev"] == 0.0 < line["train/ratio_max_dev"]
        assert line["train/updates"] == 2 and line["train/skipped_updates"] == 0


def test_ratio_is_one_in_bf16(make_trainer):
    settings = {**SD, "grpo__updates_per_iteration": 2, "optim__lr": 1e-3, "run__iterations": 2, "sample__steps": 3}
    trainer = make_trainer(**settings, model__precision="bf16")
    trainer.train()
    for line in trainer.log.read():
        assert line["train/ratio_first_update_max_dev"] <= 1e-6 < line["train/ratio_max_dev"]


def test_lora_sits_on_the_attention_projections_and_starts_as_the_model(make_trainer):
    from fastvideo_grpo.engines.lora import LoRALinear, lora_disabled

    trainer = make_trainer(**SD, model__lora__rank=4, model__lora__alpha=8.0, optim__lr=1e-2, run__iterations=1)
    layers = {name: m for name, m in trainer.denoiser.named_modules() if isinstance(m, LoRALinear)}
    blocks = {name.rpartition(".attn")[0] for name in layers}
    assert len(layers) == 8 * len(blocks) and len(blocks) > 1  # query, key, value and output of both attentions
    before = trainer.draw(PROMPT, _keys(2), deterministic=True).media
    trainer.train()
    assert all(layer.lora_B.abs().max() > 0 for layer in layers.values())
    with lora_disabled(trainer.denoiser):
        assert torch.equal(trainer.draw(PROMPT, _keys(2), deterministic=True).media, before)
    assert not torch.equal(trainer.draw(PROMPT, _keys(2), deterministic=True).media, before)


def test_cached_embeddings_give_the_same_run_without_the_text_encoder(make_trainer, tmp_path):
    settings = {**SD, "sample__steps": 3, "prompts__embedding_dtype": "fp32", "run__iterations": 1}
    plain = make_trainer(run__dir=tmp_path / "plain", **settings)
    plain.train()
    settings["prompts__embeddings"] = tmp_path / "embeddings"
    cached = make_trainer(**settings)
    cached.train()
    assert runs.same_bits(dict(plain.engine.state_dict()), dict(cached.engine.state_dict()))
    again = make_trainer(**{**settings, "run__iterations": 2})
    assert again.get_module("text_encoder") is None
    index = next((tmp_path / "embeddings").glob("*/index.json"))
    assert len(json.loads(index.read_text())["prompts"]) == len(runs.PROMPTS) + 1  # the empty negative prompt


def test_differentiable_decode_has_gradients_and_agrees_with_decoding(make_trainer):
    trainer = make_trainer(train=False, **SD)
    latents = torch.randn(2, *trainer.latent_shape(), generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    pixels = trainer.decode(latents, differentiable=True)
    (gradient,) = torch.autograd.grad(pixels.sum(), latents)
    assert gradient.abs().sum() > 0
    assert torch.equal(trainer.decode(latents), (pixels.detach() * 255).round().to(torch.uint8))


@pytest.mark.parametrize("which", ["ema", "adapters", *(pytest.param(w, marks=pytest.mark.slow) for w in ("model", "merged"))])
def test_export_is_what_diffusers_loads_and_draws_the_same_pictures(
    make_trainer, tiny_stable_diffusion, tmp_path, capsys, which
):
    """Promise 7."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    lora = {"model__lora__rank": 4, "model__lora__alpha": 12.0, "optim__lr": 3e-2}
    settings = {**SD, "optim__lr": 1e-2, "optim__ema_decay": 0.5, "run__iterations": 2}
    trainer = make_trainer(**settings if which in ("model", "ema") else {**settings, **lora})
    before = trainer.draw(PROMPT, _keys(1), deterministic=True).media
    trainer.train()
    out = tmp_path / "exported"
    command = ["export", str(trainer.folder), "--out", str(out)]
    arguments = {"adapters": [], "merged": ["--merge-lora", "--pipeline"]}.get(which, ["--pipeline", "--weights", which])
    assert cli.main([*command, *arguments]) == 0
    printed = capsys.readouterr().out
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion if which == "adapters" else out)
    if which == "adapters":
        assert f'pipeline.load_lora_weights("{out}")' in printed
        pipeline.load_lora_weights(out)
    elif which != "merged":
        with trainer.engine.ema_weights() if which == "ema" else torch.no_grad():
            ours, loaded = trainer.denoiser.state_dict(), pipeline.unet.state_dict()
            assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], ours[name]) for name in ours)
    with trainer.engine.ema_weights() if which == "ema" else torch.no_grad():
        drawn = trainer.draw(PROMPT, _keys(1), deterministic=True).media
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler, pipeline.safety_checker = DDIMScheduler.from_config(pipeline.scheduler.config), None
    with torch.no_grad():
        theirs = pipeline(
            prompt=PROMPT.text,
            negative_prompt=PROMPT.negative_prompt,
            height=64,
            width=64,
            num_inference_steps=trainer.config.sample.steps,
            guidance_scale=trainer.config.sample.cfg_scale,
            latents=noise.initial_noise(_keys(1), trainer.latent_shape(), shared=False),
            output_type="pt",
        ).images.permute(0, 2, 3, 1)[:, None]
    assert (theirs * 255 - drawn).abs().max() <= 0.5 + 0.1
    assert (drawn.int() - before.int()).abs().max() > 2


@pytest.mark.parametrize(
    "guidance,every",
    [
        ({"sample__cfg_scale": 1.0}, "none"),
        ({}, "full"),
        ({"grpo__cfg_gradients": "conditional"}, "none"),
        pytest.param({"sample__cfg_scale": 1.0}, "every:2", marks=pytest.mark.slow),
    ],
)
def test_what_a_forward_keeps_is_what_the_estimate_counts(make_trainer, guidance, every):
    """Counted in a real forward, tensor by tensor."""
    trainer = make_trainer(**SD, **guidance, sample__width=96, engine__activation_checkpointing=every)
    config, batch = trainer.config, trainer.config.engine.micro_batch_size
    conditioning = trainer.conditioning(PROMPT, batch)
    level = trainer.schedule.at(torch.zeros(batch, dtype=torch.long))
    counted = kept_for_backward(trainer, conditioning, torch.randn(batch, *trainer.latent_shape()), level)
    assert memory._kept_bytes(config, families.model_facts(config)) == pytest.approx(counted, rel=0.1)


DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_full_run_makes_pictures_compressible(make_trainer, seed):
    """The tiny model that draws shapes, full weights: on fixed prompts and noise the JPEGs are smaller than before by three
    standard errors of the difference, on prompts trained on and kept out."""
    settings = {
        "model__kind": "stable_diffusion",
        "model__path": DATA / "tiny-sd-shapes",
        "prompts__path": DATA / "prompts" / "shapes_train.txt",
        "prompts__eval_path": DATA / "prompts" / "shapes_heldout.txt",
        "prompts__text_length": 77,
        "sample__height": 32,
        "sample__width": 32,
        "sample__steps": 10,
        "sample__noise_level": 1.0,
        "sample__cfg_scale": 1.0,
        "grpo__group_size": 8,
        "grpo__updates_per_iteration": 4,
        "engine__micro_batch_size": 8,
        "rewards__models__pixels__kind": "jpeg_size",
        "optim__lr": 1e-3,
        "run__seed": seed,
        "prompts__seed": seed,
        "run__iterations": 30,
        "run__save_every": 30,
        "run__eval_every": 30,
        "run__eval_samples": 8,
    }
    trainer = make_trainer(**settings)
    trainer.train()
    before, after = json.loads((trainer.folder / "evaluation_before.json").read_text()), trainer.log.read()[-1]
    for prompts in ("train", "heldout"):
        mean, error = (
            [metrics[f"eval/{prompts}/pixels/jpeg_size/{what}"] for metrics in (before, after)] for what in ("mean", "stderr")
        )
        assert mean[1] - mean[0] >= 3 * math.hypot(*error), prompts


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["sample.transition=flow_sde"], "predicts noise; use ddim or diffusion_sde"),
        (["sample.shift=5"], "which is of flow schedules"),
        (["sample.noise_level=1.5"], "at most 1"),
        (["sample.steps=1000"], "use fewer steps"),
        (["sample.guidance_scale=1"], "set sample.cfg_scale"),
        (["sample.height=72"], "must be a multiple of 16 for this model: 64 or 80"),
        (["sample.frames=5"], "makes images; use 1"),
        (["prompts.text_length=100"], "reads at most 77 tokens"),
        (["engine.kind=deepspeed", "engine.sequence_parallel=2"], "cannot be shared by processes; use 1"),
        (["sample.cfg_scale=1", "grpo.cfg_gradients=conditional"], "no guidance"),
        (["model.kind=flux"], "set model.kind=stable_diffusion"),
    ],
)
def test_what_stable_diffusion_rules_out(tiny_stable_diffusion, tmp_path, overrides, message):
    settings = [*runs.settings(tmp_path, tiny_stable_diffusion, **SD), *overrides]
    with pytest.raises(ConfigError, match=message):
        config = configuration.build({}, settings)
        plan.check_run(config, families.model_facts(config), 2 if "engine.kind=deepspeed" in overrides else 1)


def test_fastvideo_is_not_imported(tiny_stable_diffusion, tmp_path):
    """Half a minute and 1.2 GB that this model has no use for."""
    settings = runs.settings(
        tmp_path, tiny_stable_diffusion, **SD, run__iterations=1, rewards__models__pixels__kind="jpeg_size"
    )
    code = (
        "import sys; from fastvideo_grpo import config; from fastvideo_grpo.commands.train import train; "
        f"train(config.build({{}}, {settings!r})); assert 'fastvideo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
