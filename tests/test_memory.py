"""The estimate of memory: what it follows from, and the ways out it names (against real models: trainer/test_memory.py)."""

import math
from pathlib import Path

import pytest

from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.planning.memory import describe_memory, estimate, too_little, ways_out
from fastvideo_grpo.planning.plan import count_parameters

PARAMETERS = (12_821_012_544, 12_821_012_544)  # HunyuanVideo


@pytest.fixture
def planned(tmp_path):
    """``planned(ranks, key=value, ...)`` -> (config, estimate) of HunyuanVideo at 480 x 480 x 53."""

    def make(ranks=1, trained=PARAMETERS[0], **overrides):
        (tmp_path / "empty.yaml").write_text("{}")
        (tmp_path / "prompts.txt").write_text("a prompt")
        values = {
            "model.kind": "hunyuan_video",
            "model.path": tmp_path / "not there",
            "prompts.path": tmp_path / "prompts.txt",
            "prompts.embeddings": tmp_path / "embeddings",
            "sample.height": 480,
            "sample.width": 480,
            "sample.frames": 53,
            "engine.kind": "deepspeed",
            "rewards.models.motion.kind": "frame_difference",
            "run.dir": tmp_path / "run",
            **{key.replace("__", "."): value for key, value in overrides.items()},
        }
        config = run_config.load(tmp_path / "empty.yaml", [f"{key}={value}" for key, value in values.items()])
        facts = model_facts(config, published_if_missing=True)
        return config, estimate(config, facts, ranks, (trained, PARAMETERS[1]))

    return make


def test_weights_and_optimiser_by_stage(planned):
    total = PARAMETERS[1]
    expected = {
        0: (2 * total, 12 * total / 8),
        1: (2 * total, 12 * total / 8),
        2: (2 * total, 12 * total / 8),
        3: (total / 4, 1.5 * total),
    }
    for stage, (weights, optimiser) in expected.items():
        _, memory = planned(8, engine__zero_stage=stage)
        assert memory.resident["weights"] == weights and memory.resident["optimiser"] == optimiser
    _, alone = planned(1, engine__kind="local")
    assert alone.resident["optimiser"] == 12 * total  # float32 masters and two moments
    _, alone = planned(1, engine__kind="local", model__precision="fp32")
    assert alone.resident["optimiser"] == 8 * total  # the weights are the masters


def test_offload_moves_it_to_the_host(planned):
    _, memory = planned(8, engine__zero_stage=3, engine__offload="parameters")
    assert not {"weights", "optimiser"} & set(memory.resident) and {"weights", "optimiser"} <= set(memory.host)
    _, memory = planned(8, engine__offload_idle=True)
    assert {"VAE", "rewards"} <= set(memory.host) and "VAE" not in memory.resident


@pytest.mark.parametrize(
    ("stage", "offload", "precision", "device", "host"),
    [
        (1, "none", "bf16", 6, 0),
        (1, "optimizer", "bf16", 4, 4 / 8),
        (2, "none", "bf16", 4 / 8, 0),
        (2, "optimizer", "bf16", 4 / 8, 4 / 8),
        (2, "optimizer", "fp32", 0, 8 / 8),
        (3, "none", "bf16", 4 / 8, 0),
        (3, "optimizer", "bf16", 0, 8 / 8),
    ],
)
def test_gradients_lie_where_deepspeed_sums_them(planned, stage, offload, precision, device, host):
    """Bytes a weight on each of 8 ranks, as read off the tensors that DeepSpeed 0.19.8 holds between two backward passes."""
    settings = {"engine__zero_stage": stage, "engine__offload": offload, "model__precision": precision}
    few = planned(8, trained=0, **settings)[1]
    memory = planned(8, **settings)[1]
    assert memory.phases["update"] - few.phases["update"] == pytest.approx(device * PARAMETERS[0])
    assert memory.host.get("gradients", 0) == pytest.approx(host * PARAMETERS[0])


def test_only_what_is_trained_on_is_exchanged(planned):
    memory = planned(8)[1]
    assert "trajectories in exchange" not in memory.host
    shared = planned(8, engine__sequence_parallel=2)[1]
    assert shared.host["trajectories in exchange"] == shared.host["trajectories"] / 4
    best = planned(8, grpo__group_size=24, grpo__best_of="{top: 4, bottom: 4}")[1]
    assert best.host["trajectories in exchange"] == pytest.approx(best.host["trajectories"] / 3 / 4)


def test_device_memory_does_not_grow_with_the_group_and_trajectories_are_linear(planned):
    small, large = planned(2, grpo__group_size=8)[1], planned(2, grpo__group_size=24)[1]
    assert small.resident == large.resident and small.phases == large.phases
    assert large.host["trajectories"] == 3 * small.host["trajectories"]
    state = 16 * 14 * 60 * 60 * 4
    assert small.host["trajectories"] == 32 * 8 / 2 * 16 * state
    longer = planned(2, grpo__group_size=8, sample__steps=32)[1]
    assert longer.host["trajectories"] == pytest.approx(2 * small.host["trajectories"])


def test_prompts_are_encoded_before_there_is_an_optimiser(planned):
    """The text encoders of HunyuanVideo (7.6 billion parameters in bf16) are on the device while a cache is filled."""
    memory = planned(32)[1]
    encoders = memory.phases["encode"] + memory.resident["optimiser"]
    assert 15e9 < encoders < 16e9
    assert planned(8)[1].phases["encode"] == max(0, encoders - planned(8)[1].resident["optimiser"])
    always = planned(8, prompts__embeddings="none")[1]
    assert always.resident["text encoders"] == encoders and always.phases["encode"] == 0
    idle = planned(8, prompts__embeddings="none", engine__offload_idle=True)[1]
    assert idle.host["text encoders"] == idle.phases["encode"] == encoders


def test_what_lowers_the_update_and_the_decode(planned):
    base = planned(8)[1]
    full = planned(8, engine__activation_checkpointing="full")[1]
    second = planned(8, engine__activation_checkpointing="every:2")[1]
    shared = planned(8, engine__sequence_parallel=4)[1]
    assert full.phases["update"] < second.phases["update"] < base.phases["update"]
    gradients = 4 * PARAMETERS[0] / 8
    ratio = (shared.phases["update"] - gradients) / (base.phases["update"] - gradients)
    assert 0.25 < ratio < 0.3  # the text is not shared
    assert planned(8, sample__vae_tiling=True)[1].phases["decode"] < base.phases["decode"] / 4
    assert planned(8, model__vae_precision="bf16")[1].phases["decode"] < 0.6 * base.phases["decode"]


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_a_compiled_rollout_holds_what_the_update_does(planned, recomputed):
    settings = {"engine__activation_checkpointing": recomputed, "model__lora__rank": 4, "model__lora__alpha": 4.0}
    (_, plain), (_, compiled) = (planned(8, trained=0, **settings, model__compile=each) for each in ("none", "blocks"))
    assert compiled.phases["rollout"] == compiled.phases["update"] == plain.phases["update"] > plain.phases["rollout"]
    assert compiled.resident == plain.resident


def test_rewards_count_where_they_are_placed(planned, tmp_path):
    checkpoint = tmp_path / "reward"
    (checkpoint / "checkpoint-5").mkdir(parents=True)
    (checkpoint / "checkpoint-5" / "model.pth").write_bytes(bytes(1000))
    (checkpoint / "model_config.json").write_bytes(bytes(50))
    reward = "rewards__models__motion__"
    entry = {f"{reward}kind": "frame_difference", f"{reward}checkpoint": checkpoint}
    assert planned(8, **entry)[1].resident["rewards"] == 1000
    idle = planned(8, **entry, engine__offload_idle=True)[1]
    assert (idle.host["rewards"], idle.phases["reward"]) == (1000, 1000)
    beside = planned(8, **entry, engine__offload_idle=True, rewards__async="true")[1]
    for phase in ("rollout", "decode"):  # it is there while the next samples are drawn
        assert beside.phases[phase] == idle.phases[phase] + 1000
    own = {**entry, f"{reward}placement": "process", "engine__offload_idle": True}
    assert planned(8, **own)[1].resident["rewards in processes"] == 1000  # it does not leave the device
    assert planned(8, **own, **{f"{reward}device": "cpu"})[1].host["rewards in processes"] == 1000
    elsewhere = planned(8, **own, **{f"{reward}device": "cuda:7"})[1]
    assert "rewards in processes" not in {**elsewhere.resident, **elsewhere.host} and elsewhere.phases["reward"] == 0


def test_lora_and_kl(planned):
    _, adapters = planned(1, trained=1e8, model__lora__rank=4)
    assert adapters.resident["optimiser"] == 12e8
    _, memory = planned(8, engine__zero_stage=3, grpo__kl_weight=0.1)
    assert memory.resident["reference"] == memory.resident["weights"]


MEASURED = {
    "model.kind": "flux",
    "model.lora.rank": 128,
    "model.lora.alpha": 256,
    "model.vae_precision": "bf16",
    "sample.height": 720,
    "sample.frames": 1,
    "sample.width": 720,
    "prompts.text_length": 512,
    "engine.kind": "local",
}


def test_flux_with_adapters_takes_what_was_measured(planned):
    """FLUX.1-dev, LoRA of rank 128, 720 x 720, batch 1, nothing recomputed, on one H200: 25.1 GiB always, 36.9 at the peak."""
    config, _ = planned(1, **{key.replace(".", "__"): value for key, value in MEASURED.items()})
    facts = model_facts(config, published_if_missing=True)
    memory = estimate(config, facts, 1, count_parameters(config, facts))
    assert memory.worst_phase == "update"
    assert sum(memory.resident.values()) == pytest.approx(25.1 * 2**30, rel=0.1)
    assert memory.peak == pytest.approx(36.9 * 2**30, rel=0.1)


def test_adapters_elsewhere_keep_what_trained_layers_do(planned):
    """The factors of LoRA are of the family's own targets; of some of them less is kept, of others no more than of all."""
    settings = {"trained": 0, "model__lora__rank": 4}
    own = planned(8, **settings)[1].phases["update"]
    full = planned(8, trained=0)[1].phases["update"]
    assert own < 0.8 * full
    assert planned(8, **settings, model__lora__targets="[single_blocks.3.linear1]")[1].phases["update"] == own
    elsewhere = planned(8, **settings, model__lora__targets="[linear1, img_mlp.fc_in]")[1].phases["update"]
    assert full <= elsewhere < 1.01 * full


def test_the_warning_names_ways_out(planned):
    config, memory = planned(8, model__vae_precision="fp32")
    text = too_little(config, memory, 2.0**37, 2.0**36)
    assert "128.0 GiB" in text and "64.0 GiB" in text
    for way in ("engine.activation_checkpointing=full", "engine.offload_idle=true", "engine.zero_stage=3", "model.lora"):
        assert way in text
    settings = {"engine__activation_checkpointing": "full", "engine__offload_idle": True, "engine__zero_stage": 3}
    config, memory = planned(8, **settings, engine__offload="parameters", sample__vae_tiling=True)
    assert ways_out(config, memory) == ["a larger engine.sequence_parallel", "model.lora"]


def test_the_description_adds_up(planned):
    _, memory = planned(8)
    assert memory.peak == sum(memory.resident.values()) + memory.phases[memory.worst_phase]
    assert memory.phases[memory.worst_phase] == max(memory.phases.values())
    lines = "\n".join(describe_memory(memory))
    assert "worst moment" in lines and "trajectories" in lines and "weights 23.9 GiB" in lines


def test_a_checkpoint_on_disk_is_measured_not_assumed(planned, tmp_path):
    from fastvideo_grpo.engines.sharded_loading import CheckpointReader
    from fastvideo_grpo.models.hunyuan_video.tiny import write_hunyuan_video

    folder = write_hunyuan_video(tmp_path / "tiny")
    _, memory = planned(1, model__path=folder, sample__height=32, sample__width=32, sample__frames=5)
    vae = sum(math.prod(shape) for shape in CheckpointReader(Path(folder) / "vae").shapes.values())
    assert memory.resident["VAE"] == 4 * vae
    assert memory.host["trajectories"] == 32 * 12 * 16 * 4 * (4 * 2 * 4 * 4)
