"""VideoAlign's weights in transformers' Qwen2-VL: the two layouts they are saved in, old names, LoRA folded in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastvideo_grpo.rewards.models import sources
from fastvideo_grpo.rewards.models.videoalign_template import TOKENS
from fastvideo_grpo.rewards.models.weight_files import find_weights, read_weights

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

StateDict = Mapping[str, torch.Tensor]

CONFIG = "model_config.json"
FULL = "model.pth"
ADAPTER = "adapter_model.safetensors"
REST = "non_lora_state_dict.pth"

GET_CHECKPOINT = f"the weights are KlingTeam/VideoReward on Hugging Face: {sources.VIDEO_REWARD.advice()}"

_EMBEDDINGS = "backbone.language_model.embed_tokens.weight"
_HEAD = "rm_head.weight"
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


class RewardModel(nn.Module):
    """Qwen2-VL without its vocabulary layer, and a linear head that is read at the reward tokens.

    config: of the backbone; its vocabulary includes the reward tokens. output_dim: rows of the head: 1 for all tokens, or
    one for each, of which token k is read with row k. token_ids: of `videoalign_template.TOKENS`.
    """

    def __init__(self, config: Qwen2VLConfig, output_dim: int, token_ids: list[int]) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.backbone = Qwen2VLModel(config)
        self.rm_head = nn.Linear(config.get_text_config().hidden_size, output_dim, bias=False)
        self.token_ids = token_ids

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor,
    ) -> torch.Tensor:
        """Inputs as `Qwen2VLProcessor` makes them, padded on the right; returns float32 [B, 3], the logits."""
        batch, length = input_ids.shape
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # VideoAlign was trained with these, not with Qwen2-VL's positions in time, height and width.
            position_ids=torch.arange(length, device=input_ids.device).expand(3, batch, length),
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            use_cache=False,
        ).last_hidden_state
        return self.read(hidden, input_ids)

    def read(self, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The head's outputs at the reward tokens: hidden [B, L, H], input_ids [B, L] -> float32 [B, 3]."""
        places = torch.isin(input_ids, torch.tensor(self.token_ids, device=input_ids.device))
        logits = self.rm_head(hidden[places].to(self.rm_head.weight.dtype)).view(len(input_ids), len(TOKENS), -1)
        return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.diagonal(dim1=1, dim2=2)


def read_config(folder: Path) -> dict[str, Any]:
    """model_config.json of a VideoReward folder, checked.

    Raises FileNotFoundError when it is not there, ValueError when it lacks what is read from it or describes a model whose
    scores are not read at the reward tokens.
    """
    path = folder / CONFIG
    if not path.is_file():
        if not folder.exists():
            found = f"there is no checkpoint {folder}"
        elif (folder.parent / CONFIG).is_file():
            found = f"the checkpoint {folder} is inside the folder that is meant: set it to {folder.parent}"
        else:
            found = f"the checkpoint {folder} has no {CONFIG}"
        raise FileNotFoundError(f"videoalign: {found}; {GET_CHECKPOINT}")
    try:
        config = json.loads(path.read_bytes())
        model, inference = config["model_config"], config["inference_config"]
        needed = {
            **{
                f"inference_config.{output}_{part}": inference[f"{output}_{part}"]
                for output in ("VQ", "MQ", "TA")
                for part in ("mean", "std")
            },
            "data_config.fps": config["data_config"]["fps"],
            "data_config.max_frame_pixels": config["data_config"]["max_frame_pixels"],
            "peft_lora_config.lora_r": config["peft_lora_config"]["lora_r"],
            "peft_lora_config.lora_alpha": config["peft_lora_config"]["lora_alpha"],
        }
        expected = {"reward_token": "special", "use_special_tokens": True}
        pooling = {name: model[name] for name in expected}
        output_dim, base = model["output_dim"], model["model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"videoalign: {path}: expected VideoAlign's configuration, found something else "
            f"({type(error).__name__}: {error}); {GET_CHECKPOINT}"
        ) from error
    wrong = [f"{name} is {value!r}" for name, value in needed.items() if not isinstance(value, int | float)]
    if pooling != expected or output_dim not in (1, len(TOKENS)) or not isinstance(base, str):
        wrong.append(f"model_config has {pooling}, output_dim {output_dim!r}, model_name_or_path {base!r}")
    if wrong:
        raise ValueError(
            f"videoalign: {path}: {'; '.join(wrong)}; this reward reads numbers there, {expected}, "
            f"output_dim 1 or {len(TOKENS)} and the name of a Qwen2-VL; {GET_CHECKPOINT}"
        )
    return config


def step_folder(folder: Path, step: int | None) -> Path:
    """checkpoint-STEP of a VideoReward folder, the newest when `step` is None, with the weights in one of the two layouts.

    Raises FileNotFoundError, saying what is there.
    """
    steps = sorted(
        int(match[1])
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint-N folders" if step is None else f"checkpoint-{step} (params.step)"
        there = ", ".join(f"checkpoint-{one}" for one in steps) or "none"
        raise FileNotFoundError(f"videoalign: expected {wanted} in {folder}, found {there}; {GET_CHECKPOINT}")
    chosen = folder / f"checkpoint-{steps[-1] if step is None else step}"
    if not (chosen / FULL).is_file() and not ((chosen / ADAPTER).is_file() and (chosen / REST).is_file()):
        there = ", ".join(sorted(path.name for path in chosen.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"videoalign: {chosen}: expected {FULL}, or {ADAPTER} and {REST}, found {there}; {GET_CHECKPOINT}"
        )
    return chosen


def lora_scale(config: Mapping[str, Any]) -> float:
    """What B A is multiplied by before it is added to a weight: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.

    config: `peft_lora_config` of model_config.json.
    """
    rank = config["lora_r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_checkpoint(folder: Path, peft_lora_config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint-N folder under the names they are saved with; mapped, so not to be written to.

    Raises ValueError for a file that is not what it should be, and where the adapter's own file disagrees with
    model_config.json, which VideoAlign goes by.
    """
    if (folder / FULL).is_file():
        return _read(folder / FULL)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        own = json.loads(adapter.read_bytes())
        scale, own_scale = lora_scale(peft_lora_config), lora_scale({**own, "lora_r": own["r"]})
        if scale != own_scale or own.get("use_dora"):
            raise ValueError(
                f"{adapter}: expected plain LoRA with the factor {scale} of {CONFIG}, found the factor {own_scale}"
                f"{' and DoRA' if own.get('use_dora') else ''}"
            )
    return {**_read(folder / REST), **_read(folder / ADAPTER)}


def _read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    try:
        return read_weights(path, wanted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def module_name(name: str) -> str:
    """The name in `RewardModel` of what a checkpoint calls `name`.

    Transformers called the parts `visual.` and `model.` when VideoAlign was trained; they are `model.visual.` and
    `model.language_model.` now. peft puts `base_model.model.` in front, and the weights it adapts under `base_layer`.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if name.startswith(("model.visual.", "model.language_model.")):
        return "backbone." + name.removeprefix("model.")
    if name.startswith("visual."):
        return "backbone." + name
    if name.startswith("model."):
        return "backbone.language_model." + name.removeprefix("model.")
    return name


def fill(
    model: RewardModel,
    tensors: StateDict,
    *,
    scale: float,
    rank: int,
    dtype: torch.dtype,
    base: Callable[[set[str]], StateDict] | None = None,
) -> None:
    """Put a checkpoint's `tensors` into `model`, which has no storage yet; they are copied and may go away.

    scale, rank: of LoRA, whose products are folded into the weights in float32, one at a time.
    dtype: of the backbone; the head stays float32.
    base: returns the wanted tensors, by their names in the model, of the Qwen2-VL that was trained, for layouts that leave
        out what was frozen. Without it all has to be in `tensors`.

    Raises ValueError when the tensors are not those of the model: some missing, left over, or of another shape.
    """
    plain: dict[str, torch.Tensor] = {}
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        lora = _LORA.fullmatch(name)
        if lora:
            factors.setdefault(module_name(lora[1] + ".weight"), {})[lora[2]] = tensor
        elif module_name(name) != "lm_head.weight":  # the vocabulary layer, which is not used
            plain[module_name(name)] = tensor

    expected = model.state_dict()
    missing = expected.keys() - plain.keys()
    # The embeddings of the reward tokens and the head are no part of Qwen2-VL.
    if base is not None and missing and not missing & {_EMBEDDINGS, _HEAD}:
        plain |= base(missing)
        missing = expected.keys() - plain.keys()
    if missing:
        raise ValueError(f"no tensor for {_some(missing)}: the weights are incomplete")
    left_over = (plain.keys() | factors.keys()) - expected.keys()
    if left_over:
        raise ValueError(f"found tensors that VideoAlign does not have: {_some(left_over)}")
    misfits = {
        f"{name} is {list(plain[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if plain[name].shape != tensor.shape
    }
    for name, pair in factors.items():
        rows, columns = expected[name].shape
        if {part: tuple(factor.shape) for part, factor in pair.items()} != {"A": (rank, columns), "B": (rows, rank)}:
            found = ", ".join(f"{part} {list(factor.shape)}" for part, factor in sorted(pair.items()))
            misfits.add(f"the LoRA of {name} is {found} instead of A {[rank, columns]}, B {[rows, rank]}")
    if misfits:
        raise ValueError(f"the tensors do not fit together: {_some(misfits)}")

    def final(name: str) -> torch.Tensor:
        tensor = plain[name]
        if name in factors:
            tensor = tensor.float().addmm(factors[name]["B"].float(), factors[name]["A"].float(), alpha=scale)
        # Copied even where the dtype fits: a mapped file that somebody overwrites must not change the weights in use.
        return tensor.to(torch.float32 if name == _HEAD else dtype, copy=True)

    model.load_state_dict({name: final(name) for name in expected}, assign=True)


def build(config: Qwen2VLConfig, tensors: StateDict, output_dim: int, token_ids: list[int]) -> RewardModel:
    """A `RewardModel` without storage, frozen, in evaluation mode, with the vocabulary that `tensors` has.

    Raises ValueError when they have no embeddings, or not one for each token up to the last reward token.
    """
    rows = [len(tensor) for name, tensor in tensors.items() if module_name(name) == _EMBEDDINGS]
    if not rows:
        raise ValueError("no tensor for the token embeddings, without which the reward tokens mean nothing")
    if rows[0] != max(token_ids) + 1:
        raise ValueError(
            f"{rows[0]} token embeddings, but the reward tokens are the last of {max(token_ids) + 1} in the tokenizer of the "
            "Qwen2-VL folder: set params.base to the model that VideoAlign was trained from (Qwen2-VL-2B-Instruct)"
        )
    config.get_text_config().vocab_size = rows[0]
    # Without storage: initialising a 2B model takes longer than reading it.
    with torch.device("meta"):
        model = RewardModel(config, output_dim, token_ids)
    return model.requires_grad_(False).eval()


def fill_buffers(model: RewardModel, dtype: torch.dtype) -> None:
    """The frequencies of the rotary embeddings, which no file has, in `dtype`."""
    for module in model.backbone.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model.backbone._init_weights(module)
            # In bfloat16 the released code rounds them with everything else, in training too, so they belong to the model.
            module.to(dtype)


def load(
    folder: Path, config: Mapping[str, Any], backbone: Qwen2VLConfig, base: Path, token_ids: list[int], dtype: torch.dtype
) -> RewardModel:
    """The model of a checkpoint-N folder on the CPU, in `dtype`; never more of it in memory than this and one weight.

    config: model_config.json. backbone, base: configuration and folder of the Qwen2-VL that was trained.

    Raises ValueError when a file is not what it should be, FileNotFoundError when frozen weights are needed from `base`
    and are not there.
    """
    lora = config["peft_lora_config"]
    try:
        tensors = read_checkpoint(folder, lora)
        model = build(backbone, tensors, config["model_config"]["output_dim"], token_ids)
        frozen = None if (folder / FULL).is_file() else lambda names: _frozen(base, names)
        fill(model, tensors, scale=lora_scale(lora), rank=lora["lora_r"], dtype=dtype, base=frozen)
        fill_buffers(model, dtype)
    except ValueError as error:
        raise ValueError(f"videoalign: {folder}: {error}; {GET_CHECKPOINT}") from error
    return model


def _frozen(base: Path, names: set[str]) -> StateDict:
    try:
        file = find_weights(base, ["model"])
        if file is None:
            raise FileNotFoundError(f"there is no {base / 'model.safetensors'}")
        found = _read(file, lambda name: module_name(name) in names)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"videoalign: {error}, and the checkpoint leaves out {len(names)} weights that were not trained: "
            f"set params.base to the complete model: {sources.QWEN2_VL_2B.advice()}"
        ) from error
    return {module_name(name): tensor for name, tensor in found.items()}


def _some(names: set[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + rest
