"""How much memory a run will take on each process, worked out from sizes alone (``train --dry-run``).

Sizes of weights, optimiser state and trajectories are exact; activations follow from how much each block keeps per token
(:class:`~fastvideo_grpo.models.family.Activations`), decoding from how much the VAE holds per pixel. What the allocator, the
kernels' workspaces and the communication library add (some 1 to 3 GB on a GPU) is not counted. A UNet's activations are
counted on the network itself (:mod:`fastvideo_grpo.planning.unet_memory`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastvideo_grpo.config.keys import Config, checkpointed_blocks, guidance_of, make_objective
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.models.family import Activations, PassBytes
from fastvideo_grpo.models.registry import FAMILIES, lora_settings
from fastvideo_grpo.planning.run_steps import RunSteps
from fastvideo_grpo.planning.unet_memory import unet_bytes
from fastvideo_grpo.precision import DTYPES
from fastvideo_grpo.printed_sizes import gib
from fastvideo_grpo.rewards.models.weight_files import files_read

BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
PHASES = ("encode", "rollout", "decode", "reward", "update")
# Tiles of FastVideo's video VAEs: pixels along a side, frames.
_TILE, _TILE_FRAMES = 256, 17


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one process.

    Attributes:
        resident: part -> bytes that lie on the device all the time.
        phases: phase -> what it needs besides; the VAE and the rewards count where they are used when they may leave the
            device, else in ``resident``.
        host: part -> bytes of host memory.
    """

    resident: dict[str, float]
    phases: dict[str, float]
    host: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes on the device at the worst moment."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def worst_phase(self) -> str:
        """The phase of that moment."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def estimate(config: Config, facts: ModelFacts, ranks: int, parameters: tuple[int, int]) -> MemoryEstimate:
    """Memory of each of ``ranks`` processes.

    Args:
        parameters: (trained, all) parameters of the network.
    """
    trained, total = parameters
    engine, family = config.engine, FAMILIES[config.model.kind]
    size, shared = BYTES[config.model.precision], engine.sequence_parallel
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    if stage == 0 and engine.kind == "deepspeed" and config.model.precision == "bf16":
        stage = 1  # DeepSpeed has one optimiser for both
    resident: dict[str, float] = {}
    host: dict[str, float] = {}

    weights = total * size / (ranks if stage == 3 else 1)
    (host if engine.offload == "parameters" else resident)["weights"] = weights
    separate_masters = config.model.precision != "fp32" or stage > 0
    moments = (8 + 4 * separate_masters) * trained / (ranks if stage >= 1 else 1)
    (host if engine.offload != "none" else resident)["optimiser"] = moments
    gradients, offloaded = _gradient_bytes(config, trained, ranks, stage)
    if offloaded:
        host["gradients"] = offloaded
    objective = make_objective(config)
    if objective.needs_reference and config.model.lora is None:
        resident["reference"] = weights if stage == 3 else total * size
    average = 4 * trained / (ranks if stage >= 1 else 1)
    if config.optim.ema_decay is not None:
        host["EMA"] = average
    if config.grpo.old_weights is not None:
        host["old weights"] = average

    vae = _folder_bytes(config, "vae", 4) * BYTES[config.model.vae_precision] / 4
    placed = _reward_bytes(config)
    rewards = placed["inline"]
    leaves = host if engine.offload_idle else resident
    leaves["VAE"], leaves["rewards"] = vae, rewards
    for where, part in ((resident, "device"), (host, "host")):
        if placed[part]:
            where["rewards in processes"] = placed[part]
    encoders = sum(_folder_bytes(config, name, size) for name in family.folders if name.startswith("text_encoder"))
    cached = config.prompts.embeddings != "none"
    if not cached:
        leaves["text encoders"] = encoders
    # With a cache prompts are encoded before there is an optimiser, and the encoders are gone afterwards.
    encode = max(0.0, encoders - resident.get("optimiser", 0.0)) if cached else encoders if engine.offload_idle else 0.0

    block = _largest_block(config, facts) * size if stage == 3 else 0.0  # gathered while it runs
    beside = rewards if engine.offload_idle and config.rewards.async_ else 0.0  # scoring while the next samples are drawn
    # Compiled, the rollout runs the graph of the update, and lets go of what that keeps.
    forward = _forward_bytes(config, facts) if config.model.compile == "none" else _update_bytes(config, facts)
    phases = {
        "encode": encode,
        "rollout": forward + block + beside,
        "decode": _decode_bytes(config, facts) + (vae if engine.offload_idle else 0) + beside,
        "reward": rewards if engine.offload_idle else 0,
        "update": _update_bytes(config, facts) + 2 * block + gradients,
    }
    if objective.needs_reward_gradients:
        phases["update"] += _kept_by_decoding(config, facts)
    samples = config.grpo.prompts_per_iteration * config.grpo.group_size * shared / ranks
    state = math.prod(family.latent_shape(facts, config.sample)) * 4
    best_of, steps = config.grpo.best_of, RunSteps(config)
    host["trajectories"] = samples * steps.states * state
    kept = 1.0 if best_of is None else (best_of.top + best_of.bottom) / config.grpo.group_size
    if stage == 0 and (steps.stored or config.grpo.old_weights is not None):
        host["weights set aside"] = trained * size  # while others are in the network; ZeRO makes them of its masters again
    if steps.stored:
        # Of the trained rows, which each process of a group that shares them computes for itself; guidance makes it float32.
        width = 4 if guidance_of(config).training > 1 else BYTES[config.model.precision]
        host["stored outputs"] = samples * kept * steps.trained * len(steps.stored) * state / 4 * width
    if shared > 1 or best_of is not None:
        # The samples of one update are fetched from who drew them; only the kept ones are trained on.
        host["trajectories in exchange"] = host["trajectories"] * kept / config.grpo.updates_per_iteration
    return MemoryEstimate(resident, phases, host)


def describe_memory(memory: MemoryEstimate) -> list[str]:
    """Lines for a person."""
    parts = ", ".join(f"{name} {gib(value)}" for name, value in memory.resident.items() if value)
    lines = [
        f"memory       {gib(memory.peak)} on each device at the worst moment ({memory.worst_phase}), the allocator's own not "
        "counted",
        f"  always     {parts or 'nothing'}",
    ]
    lines += [f"  {phase:<10} {gib(memory.phases[phase])} more" for phase in PHASES if memory.phases[phase]]
    on_host = ", ".join(f"{name} {gib(value)}" for name, value in memory.host.items() if value)
    return [*lines, f"  host       {on_host} a process"]


def ways_out(config: Config, memory: MemoryEstimate) -> list[str]:
    """Settings that would need less, the cheapest first."""
    engine, ways = config.engine, []
    if memory.worst_phase == "update" and engine.activation_checkpointing != "full":
        ways.append("engine.activation_checkpointing=full")
    if memory.worst_phase == "decode" and not config.sample.vae_tiling and config.sample.frames > 1:
        ways.append("sample.vae_tiling=true")
    if memory.worst_phase == "decode" and config.model.vae_precision == "fp32":
        ways.append("model.vae_precision=bf16")
    if not engine.offload_idle:
        ways.append("engine.offload_idle=true")
    if config.prompts.embeddings == "none":
        ways.append("prompts.embeddings=FOLDER")
    if engine.micro_batch_size > 1:
        ways.append("engine.micro_batch_size=1")
    if engine.kind == "local":
        ways.append("engine.kind=deepspeed under torchrun")
    else:
        if engine.zero_stage < 3:
            ways.append(f"engine.zero_stage={engine.zero_stage + 1}")
        ways.append("a larger engine.sequence_parallel")
        if engine.offload == "none":
            ways.append("engine.offload=optimizer")
        elif engine.offload == "optimizer" and engine.zero_stage == 3:
            ways.append("engine.offload=parameters")
    if config.model.lora is None:
        ways.append("model.lora")
    return ways


def too_little(config: Config, memory: MemoryEstimate, needed: float, available: float) -> str:
    """What to say where a process needs more than it has, in bytes."""
    return (
        f"by the estimate a process needs {gib(needed)} (most of it in the {memory.worst_phase} phase), and there are "
        f"{gib(available)} for it; what would need less: {', '.join(ways_out(config, memory))} (train --dry-run shows the "
        "parts, docs/scaling.md examples)"
    )


def too_little_on_host(memory: MemoryEstimate, needed: float, available: float) -> str:
    """What to say where a process needs more host memory than its share of the machine's, in bytes."""
    parts = ", ".join(f"{name} {gib(value)}" for name, value in sorted(memory.host.items(), key=lambda part: -part[1]) if value)
    return (
        f"by the estimate a process needs {gib(needed)} of host memory ({parts}), and its share of the machine's is "
        f"{gib(available)}; what would need less: fewer samples an iteration (grpo.prompts_per_iteration, grpo.group_size), "
        "more nodes, less of engine.offload, engine.offload_idle, optim.ema_decay and grpo.old_weights"
    )


def _gradient_bytes(config: Config, trained: int, ranks: int, stage: int) -> tuple[float, float]:
    """Gradients (float32 in every precision) of an update on the device and on the host, as DeepSpeed 0.19 keeps them."""
    whole, part = 4.0 * trained, 4.0 * trained / ranks
    bf16, offloaded = config.model.precision == "bf16", config.engine.offload != "none"
    if config.engine.kind == "local" or stage == 0:
        return whole, 0.0
    if stage == 1:
        # Reduced after the last backward pass, so whole until then; in bf16 the parameters keep theirs beside the sums.
        return (whole, part) if offloaded else (whole * 1.5 if bf16 else whole, 0.0)
    if not offloaded:
        return part, 0.0
    # Sums while they accumulate, and a copy for the optimiser's step. Stage 2 in bf16 leaves the sums on the device.
    return (part, part) if stage == 2 and bf16 else (0.0, 2 * part)


def _tokens(config: Config, facts: ModelFacts) -> tuple[float, int]:
    """Image tokens of a process, and text tokens, of one sample."""
    image = FAMILIES[config.model.kind].image_tokens(facts, config.sample)
    return math.ceil(image / config.engine.sequence_parallel), config.prompts.text_length


def _unit(config: Config, facts: ModelFacts) -> float:
    """Bytes of one hidden vector of a micro-batch."""
    return facts.hidden_width * BYTES[config.model.precision] * config.engine.micro_batch_size


def _activations(config: Config) -> Activations | None:
    family = FAMILIES[config.model.kind]
    if family.activations is None:
        return None
    full, lora = family.activations[config.model.precision], config.model.lora
    if lora is None or family.lora_activations is None:
        return full
    frozen = family.lora_activations[config.model.precision]
    if _among(lora.targets or (), family.lora_targets):
        return frozen
    return replace(full, adapters=frozen.adapters)  # of other layers: no adapter needs an input that a trained layer does not


def _among(targets: Sequence[str], known: Sequence[str]) -> bool:
    """Whether all layers that ``targets`` name are among those that ``known`` name, by how a layer's name ends."""
    return all(any(target == name or target.endswith(f".{name}") for name in known) for target in targets)


def _unet(config: Config, facts: ModelFacts) -> PassBytes:
    """Of one pass; both texts of guidance in one are not two passes of the same batch, but in bytes they are."""
    family = FAMILIES[config.model.kind]
    told = family.pass_bytes(config, facts)
    if told is not None:
        return told
    return unet_bytes(
        facts.denoiser,
        (config.engine.micro_batch_size, *family.latent_shape(facts, config.sample)),
        config.prompts.text_length,
        DTYPES[config.model.precision],
        checkpointed_blocks(config.engine.activation_checkpointing),
        blocks=family.blocks,
        not_recomputed=family.not_recomputed,
        lora=None if config.model.lora is None else lora_settings(config),
    )


def _passes_at_once(config: Config) -> int:
    return 2 if max(guidance_of(config)) > 1 and config.model.cfg_batched else 1


def _passes_kept(config: Config) -> int:
    """Passes of a prediction whose activations wait for the backward pass."""
    both = config.grpo.cfg_gradients == "both" or config.model.cfg_batched
    return 2 if guidance_of(config).training > 1 and both else 1


def _forward_bytes(config: Config, facts: ModelFacts) -> float:
    kept = _activations(config)
    once = _unet(config, facts).forward if kept is None else held_by_forward(kept, config, facts)
    return _passes_at_once(config) * once


def held_by_forward(kept: Activations, config: Config, facts: ModelFacts) -> float:
    """Bytes that a transformer's forward of a micro-batch holds at once, without gradients."""
    return kept.forward * sum(_tokens(config, facts)) * _unit(config, facts)


def _kept_bytes(config: Config, facts: ModelFacts) -> float:
    """What a forward of a micro-batch keeps for its backward pass; with classifier-free guidance there are two."""
    kept = _activations(config)
    once = _unet(config, facts).kept if kept is None else kept_by_forward(kept, config, facts)
    return _passes_kept(config) * once


def kept_by_forward(kept: Activations, config: Config, facts: ModelFacts) -> float:
    """Bytes that a transformer's forward of a micro-batch keeps for its backward pass."""
    image, text = _tokens(config, facts)
    every = checkpointed_blocks(config.engine.activation_checkpointing)
    units = kept.rest[0] * image + kept.rest[1] * text
    for layers, of_block in zip(("num_layers", "num_single_layers"), _block_units(kept, config, facts), strict=True):
        count = int(facts.denoiser.get(layers, 0))
        checkpointed = -(-count // every) if every else 0
        units += (count - checkpointed) * of_block
        units += checkpointed * (image + (text if kept.text is None else 0))  # a checkpointed block keeps its input
    count = int(facts.denoiser.get("num_refiner_layers", 0))
    checkpointed = -(-count // every) if every else 0
    units += ((count - checkpointed) * kept.refiner + checkpointed) * text
    return units * _unit(config, facts)


def _block_units(kept: Activations, config: Config, facts: ModelFacts) -> tuple[float, float]:
    """Hidden vectors that a double and a single block keep."""
    image, text = _tokens(config, facts)
    mlp = kept.mlp * int(facts.denoiser["ffn_dim"]) / facts.hidden_width if kept.mlp else 0.0
    rank = 0 if config.model.lora is None else config.model.lora.rank
    double, single = (
        (factor + mlp + adapters * rank / facts.hidden_width) * image
        + (factor + adapters * rank / facts.hidden_width if kept.text is None else kept.text) * text
        for factor, adapters in zip((kept.double, kept.single), kept.adapters, strict=True)
    )
    return double, single


def _update_bytes(config: Config, facts: ModelFacts) -> float:
    """What is kept, and what the backward of one block holds besides: all that it would have kept, where it was checkpointed,
    else the gradients on their way (about a third of that)."""
    kept = _activations(config)
    if kept is None:
        return _kept_bytes(config, facts) + _passes_at_once(config) * _unet(config, facts).working
    share = 1.0 if config.engine.activation_checkpointing != "none" else 0.3
    block = share * max(_block_units(kept, config, facts)) * _unit(config, facts)
    return _kept_bytes(config, facts) + _passes_at_once(config) * block


def _decode_bytes(config: Config, facts: ModelFacts) -> float:
    sample, tile = config.sample, config.sample.vae_tiling
    height, width = (min(side, _TILE) if tile else side for side in (sample.height, sample.width))
    family = FAMILIES[config.model.kind]
    frames = min(sample.frames, family.decodes_frames or (_TILE_FRAMES if tile else sample.frames))
    at_once = 1 if family.decodes_singly else config.engine.micro_batch_size
    factor = _of_media(config, family.decode, family.clip_decode)
    held = factor * height * width * frames * facts.vae_width * BYTES[config.model.vae_precision]
    return at_once * (held + 3 * 4 * sample.height * sample.width * sample.frames)


def _of_media(config: Config, of_image: float, of_clip: float | None) -> float:
    """A factor of the VAE for what the run makes."""
    return of_image if config.sample.frames == 1 or of_clip is None else of_clip


def _kept_by_decoding(config: Config, facts: ModelFacts) -> float:
    """What the decoder keeps of a micro-batch for its backward pass, tiles or not (what the rewards keep is not counted)."""
    sample = config.sample
    pixels = config.engine.micro_batch_size * sample.height * sample.width * sample.frames
    family = FAMILIES[config.model.kind]
    kept = _of_media(config, family.decode_kept, family.clip_decode_kept) * facts.vae_width * BYTES[config.model.vae_precision]
    return pixels * (kept + 3 * 4)


def _largest_block(config: Config, facts: ModelFacts) -> float:
    """Parameters of the largest block."""
    if _activations(config) is None:
        return _unet(config, facts).largest_block
    return FAMILIES[config.model.kind].block_parameters(facts)


def _folder_bytes(config: Config, component: str, size: int) -> float:
    """Bytes of a component's weights at ``size`` bytes a weight, from its files; of a published model from its size."""
    from fastvideo_grpo.engines.sharded_loading import CheckpointReader

    folder = Path(config.model.path) / component
    if not folder.is_dir():
        return FAMILIES[config.model.kind].parameters.get(component, 0.0) * size
    return sum(math.prod(shape) for shape in CheckpointReader(folder).shapes.values()) * size


def _reward_bytes(config: Config) -> dict[str, float]:
    """Bytes of the rewards' weights, taken to be as large as their files: of inline ones, and of those in processes of their
    own beside this one, on its ``device`` or on the ``host``. Those behind servers or on other devices do not count."""
    placed = dict.fromkeys(("inline", "device", "host"), 0.0)
    for reward in config.rewards.models.values():
        size = _weight_file_bytes(reward.checkpoint) + _weight_file_bytes(reward.params.get("clip"))
        if reward.placement == "inline":
            placed["inline"] += size
        elif reward.placement == "process" and reward.device in (None, "cpu"):
            placed["host" if reward.device else "device"] += size
    return placed


def _weight_file_bytes(path: str | None) -> float:
    """Bytes of a file, or of those that are read of a folder; of folders below it (checkpoint-N) the largest counts."""
    if path is None:
        return 0.0
    place = Path(path)
    if not place.is_dir():
        return float(place.stat().st_size) if place.is_file() else 0.0
    below = [_weight_file_bytes(str(folder)) for folder in place.iterdir() if folder.is_dir()]
    try:
        read = files_read(place)
    except ValueError:  # a damaged index, which `plan.check_run` names
        read = []
    return float(sum(file.stat().st_size for file in read if file.is_file())) + max(below, default=0.0)
