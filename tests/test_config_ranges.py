"""Numbers that no run can use are refused at the start, with what would work."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.config.values import keys
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import plan, sampling_checks
from fastvideo_grpo.sampling import schedules, transitions

ROOT = Path(__file__).parent.parent
GIVEN = [
    "model.path=nowhere",
    f"prompts.path={ROOT / 'data/prompts/shapes_train.txt'}",
    "rewards.models.size.kind=jpeg_size",
    "run.dir=runs/x",
]

NAMES = {"rewards.models": "size.", "rewards.models.size.outputs": "jpeg_size."}


def build(*words):
    return run_config.build({}, [*GIVEN, *words])


def check(*words):
    config = build(*words)
    plan.check_run(config, model_facts(config, published_if_missing=True), 1, here=False)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=1e300", r"optim.lr is 1e\+300; it must be at most 3.4"),
        ("optim.lr=1e-300", "optim.lr is 1e-300, which float32 loses; it must be at least 1.2e-38"),
        ("sample.guidance_scale=1e300", "it must be at most 1000"),
        ("sample.cfg_scale=1e9", "it must be at most 1000"),
        ("sample.steps=100000", "sample.steps is 100000; it must be at most 1000"),
        (f"run.seed={10**30}", "it must be at most 9223372036854775807"),
        ("run.seed=-1", "run.seed is -1; it must be at least 0"),
        ("prompts.seed=-1", "it must be at least 0"),
        ("run.save_every=99999999999", "it must be at most 2147483647"),
        ("grpo.clip_range=1e-30", "it must be at least 1e-07"),
        ("grpo.advantage_clip=1e-40", "which float32 loses"),
        ("grpo.timesteps.fraction=1e-30", "it must be at least 1e-06"),
        ("grpo.group_size=2000000000", "= 64000000000 samples an iteration, of at most 10000000: lower one"),
        ("optim.betas=[0.9, .nan]", "optim.betas.1 is nan; it must be a finite number"),
        ("optim.ema_decay=0.999999999", "an average that never moves"),
        ("rewards.retries=1000000", "it must be at most 30"),
        ("rewards.models.size.outputs.jpeg_size.weight=-1e300", "it must be at least -3.4"),
        ("rewards.models.size.outputs.jpeg_size.affine=[1, .inf]", "affine.1 is inf; it must be a finite number"),
    ],
)
def test_numbers_that_are_none_where_they_are_used(word, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(word)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sample.shift=1e9"],
            r"sample.shift is 1e\+09: sigma must descend strictly .* in float32; use 3, or anything up to 6.14e\+03",
        ),
        (["sample.shift=1e4"], "sample.shift is 10000: levels 1 and 2 of 17 are 0.0067 of 1000 timesteps apart"),
        (["sample.shift=1e38"], r"sample.shift is 1e\+38: sigma must descend"),
        (["sample.shift=1e-9"], "levels are not finite in float32 .sigma inf, .*use 3, or anything down to 0.000183"),
        (
            ["sample.noise_level=1e30"],
            r"sample.noise_level is 1e\+30: after step 1 of 16 a sample is not finite; use 0.3, or .* 4.8",
        ),
        (["sample.noise_level=100"], "after step 1 of 16 samples are .* times as large as noise"),
        (["sample.noise_level=1e-30"], "step 1 of 16 adds noise of 1.5e-31, which float32 loses beside the sample"),
        (
            ["sample.noise_decay=1e6"],
            r"sample.noise_decay is 1e\+06: step 2 of 16 adds noise of 0.*use 0, or anything up to 6.4",
        ),
        (["sample.noise_decay=1e6", "model.kind=stable_diffusion"], "sample.noise_decay is .* of 50 adds noise of 0"),
        (["sample.shift=1e9", "sample.noise_level=1e30"], r"shift=1e\+09, sample.noise_level.*the model's own are shift 3"),
    ],
)
def test_steps_that_cannot_be_trained_on(words, message):
    with pytest.raises(ConfigError, match=message) as error:
        check(*words)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_said_to_work_does():
    for word in ("sample.shift=6144", "sample.shift=0.000183", "sample.noise_level=4.8", "sample.noise_decay=6.4"):
        check(word)


@pytest.mark.parametrize("kind", ["flux", "hunyuan_video", "wan", "stable_diffusion"])
def test_every_models_own_steps_and_those_of_the_paper_pass(kind):
    family = FAMILIES[kind]
    config = build(f"model.kind={kind}")
    facts = model_facts(config, published_if_missing=True)
    for steps in (2, 6, 16, 25, 50, 999 if kind != "stable_diffusion" else 500):
        for noise_level, noise_decay in ((0.3, 0), (1.0, 0), (1.0, 1)):
            sample = replace(config.sample, steps=steps, noise_level=noise_level, noise_decay=noise_decay)
            made = transitions.get(sample.transition, noise_level=noise_level, noise_decay=noise_decay)
            if steps < 100 or noise_level == 1:
                assert sampling_checks.flaw(family.schedule(sample, facts), made) is None, (steps, noise_level, noise_decay)


def test_a_step_without_noise_or_room_is_found_by_itself():
    schedule = schedules.flow(8, 3.0)
    assert "adds noise of 0" in sampling_checks.flaw(schedule, transitions.get("flow_sde"))
    assert sampling_checks.flaw(schedule, transitions.get("flow_sde", noise_level=0.3)) is None
    one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    sigma = torch.tensor([1.0, one, 0.5, 0.0])
    assert "tells apart" in sampling_checks.flaw(
        schedules.Schedule(1 - sigma, sigma, 1000 * sigma), transitions.get("flow_sde")
    )


def extremes():
    """Every number of the configuration at the ends of what numbers are: (key, its value)."""

    def numbers(cls, prefix=""):
        for name, (_, key) in keys(cls).items():
            if key.sort in ("section", "names"):
                yield from numbers(key.of, f"{prefix}{name}.{NAMES.get(prefix + name, '')}")
            elif key.sort in ("whole", "number"):
                yield prefix + name, key.sort

    for dotted, sort in numbers(Config):
        for value in (
            (0, -1, 2**31, 2**63, 10**30) if sort == "whole" else (0, -1.0, 1e-45, 1e-30, 1e30, 1e300, math.inf, math.nan)
        ):
            yield dotted, value


def told(dotted, value, use):
    """``use`` a configuration with this value; what is told names the key."""
    needed = ["grpo.best_of={top: 1, bottom: 1}"] if "best_of" in dotted else []
    needed += ["grpo.objective=nft"] if "old_weights" in dotted else []
    try:
        use(build(*needed, f"{dotted}={value}"))
    except ConfigError as error:
        assert dotted.rpartition(".")[2] in str(error), (dotted, value, str(error))


def test_no_number_of_any_key_ends_in_a_traceback():
    for dotted, value in extremes():
        told(dotted, value, lambda config: None)


@pytest.mark.slow
def test_nor_does_it_at_the_models_size():
    facts = model_facts(build(), published_if_missing=True)
    for dotted, value in extremes():
        told(dotted, value, lambda config: plan.check_run(config, facts, 1, here=False))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kind=jpeg_size", "params.quality=high"], "'quality' is 'high'; it must be a whole number"),
        (["kind=jpeg_size", "params.quality=1.5"], "'quality' is 1.5; it must be a whole number"),
        (["kind=jpeg_size", "params.quality=true"], "'quality' is True; it must be a whole number"),
        (["kind=jpeg_size", "params.frames=4"], "'frames' is 4; it must be a text .in quotes"),
        (["kind=hps", "checkpoint=x", "params.tokenizer=20241127"], "'tokenizer' is 20241127; it must be a text"),
        (["kind=clip", "checkpoint=x", "params.tokenizer=5"], "'tokenizer' is 5; it must be a text .*or null"),
        (["kind=pickscore", "checkpoint=x", "params.logit_scale=maybe"], "'logit_scale' is 'maybe'; it must be true or false"),
        (["kind=colour_match", "params.saturation=[1]"], r"'saturation' is \[1\]; it must be a number"),
    ],
)
def test_parameters_of_rewards_are_what_the_reward_says(words, message):
    with pytest.raises(ConfigError, match=f"rewards.models.size: reward '.*': the parameter {message}"):
        check(*(f"rewards.models.size.{word}" for word in words))
    check("rewards.models.size.kind=colour_match", "rewards.models.size.params.saturation=70")
