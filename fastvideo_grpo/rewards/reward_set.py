"""All rewards of a run: scored together, and none of them can invent a number or end the run."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastvideo_grpo.rewards import registry
from fastvideo_grpo.rewards.base import Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.threshold import above

logger = logging.getLogger(__name__)


@dataclass
class ScoredBatch:
    """What a `RewardSet` says of B samples; every dict has one entry per name "MODEL/OUTPUT".

    scores: float32 [B] on the CPU, after thresholds; NaN where invalid. This is what is optimised.
    raw: float32 [B] on the CPU, as the reward gave it; NaN where invalid.
    valid: bool [B] on the CPU.
    failures: one line for each thing that went wrong in this batch, with the reward's name and the number of samples.
    """

    scores: dict[str, torch.Tensor]
    raw: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    failures: list[str]


class RewardSet:
    """The rewards of `rewards.models`: a mapping from a name to an entry with `kind` and, each optional, `checkpoint`,
    `params` and `outputs` (OUTPUT -> `weight`, 1 if left out, and `threshold`), as keys or as attributes.
    Without `outputs` all outputs of the reward count with weight 1.

    names: "MODEL/OUTPUT" in the order of the configuration. weights: name -> float. rewards: MODEL -> Reward.
    failure_counts: how often each failure happened, by its message, since this set was made.

    Raises ValueError, with the key, for anything wrong in the configuration; every entry is checked before the first
    reward is loaded.
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        if not models:
            raise ValueError(f"rewards.models is empty; name at least one reward, of kind {', '.join(registry.kinds())}")
        for model, entry in models.items():
            check_entry(model, entry)
        self.rewards: dict[str, Reward] = {}
        self.weights: dict[str, float] = {}
        self.thresholds: dict[str, float | None] = {}
        self.failure_counts: Counter[str] = Counter()
        for model, entry in models.items():
            reward = registry.create(_get(entry, "kind"), checkpoint=_get(entry, "checkpoint"), params=_get(entry, "params"))
            self.rewards[model] = reward
            for output, settings in _outputs(model, entry, reward.outputs).items():
                weight = _get(settings, "weight")
                self.weights[f"{model}/{output}"] = 1.0 if weight is None else float(weight)
                self.thresholds[f"{model}/{output}"] = _get(settings, "threshold")

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def check_frames(self, frames: int) -> None:
        """Raise ValueError if a reward cannot look at media of `frames` frames; to be called once, before the run."""
        for model, reward in self.rewards.items():
            unfit = {"image": frames > 1, "video": frames == 1}.get(reward.media_kind, False)
            if unfit:
                raise ValueError(
                    f"rewards.models.{model} scores {reward.media_kind}s, but the model makes {frames} frame(s); "
                    f"use a reward for {'images' if frames == 1 else 'videos'}"
                )

    def score(self, request: RewardRequest) -> ScoredBatch:
        """Score the samples with every reward.

        A reward that raises, or whose answer has a wrong shape or lacks an output, has all its samples masked; one that
        returns NaN or infinity has those samples masked. All of it is told in `failures`, and logged the first time.
        """
        batch = ScoredBatch({}, {}, {}, [])
        for model, reward in self.rewards.items():
            outputs = [name for name in self.weights if name.rpartition("/")[0] == model]
            raw, valid = self._score_one(model, reward, outputs, request, batch.failures)
            for name in outputs:
                threshold = self.thresholds[name]
                batch.raw[name] = raw[name]
                batch.scores[name] = raw[name].clone() if threshold is None else above(raw[name], threshold)
                batch.valid[name] = valid[name]
        return batch

    def _score_one(
        self, model: str, reward: Reward, names: list[str], request: RewardRequest, failures: list[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        size = len(request)
        raw = {name: torch.full((size,), float("nan")) for name in names}
        valid = {name: torch.zeros(size, dtype=torch.bool) for name in names}
        try:
            with torch.no_grad():
                result = reward.score(request)
            judged = _judged(result, size)
        except Exception as error:  # not BaseException: Ctrl-C ends the run
            self._note(failures, f"reward {model}: {type(error).__name__}: {error}", size, size)
            return raw, valid
        if not judged.all():
            self._note(
                failures,
                f"reward {model}: could not judge the sample: {result.invalid_because}",
                int((~judged).sum()),
                size,
            )
        for name in names:
            try:
                scores = _column(result, name.rpartition("/")[2], size)
            except Exception as error:
                self._note(failures, f"reward {name}: {type(error).__name__}: {error}", size, size)
                continue
            finite = scores.isfinite()
            if (judged & ~finite).any():
                self._note(failures, f"reward {name}: returned NaN or infinity", int((judged & ~finite).sum()), size)
            valid[name] = judged & finite
            raw[name] = torch.where(valid[name], scores, float("nan"))
        return raw, valid

    def _note(self, failures: list[str], message: str, count: int, size: int) -> None:
        failures.append(f"{message} ({count} of {size} samples masked)")
        if message not in self.failure_counts:
            logger.warning("%s (%d of %d samples masked; told once, counted always)", message, count, size)
        self.failure_counts[message] += 1

    def to(self, device: torch.device | str) -> RewardSet:
        for reward in self.rewards.values():
            reward.to(device)
        return self

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()


def _judged(result: RewardResult, size: int) -> torch.Tensor:
    if not isinstance(result, RewardResult):
        raise TypeError(f"score() returned {type(result).__name__}; it must return a RewardResult")
    valid = result.valid
    if not isinstance(valid, torch.Tensor) or valid.dtype != torch.bool or valid.shape != (size,):
        raise ValueError(f"valid is {_describe(valid)}; it must be bool [{size}]")
    return valid.detach().cpu()


def _column(result: RewardResult, output: str, size: int) -> torch.Tensor:
    if output not in result.scores:
        raise ValueError(f"the answer lacks the output; it has {', '.join(result.scores) or 'none'}")
    scores = result.scores[output]
    if not isinstance(scores, torch.Tensor) or scores.shape != (size,) or scores.is_complex():
        raise ValueError(f"the scores are {_describe(scores)}; they must be float32 [{size}]")
    return scores.detach().to("cpu", torch.float32)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, Mapping) else getattr(entry, key, None)


def check_entry(model: str, entry: Any) -> None:
    """Raise ValueError, with the key, for a wrong entry of `rewards.models`; loads nothing and opens no file."""
    if "/" in model:
        raise ValueError(f"rewards.models has the name '{model}'; a name may not hold '/', which joins it to an output")
    kind = _get(entry, "kind")
    if not isinstance(kind, str):
        known_kinds = ", ".join(registry.kinds())
        raise ValueError(f"rewards.models.{model}.kind is {kind!r}; set it to one of {known_kinds}")
    try:
        factory = registry.check(kind, checkpoint=_get(entry, "checkpoint"), params=_get(entry, "params"))
    except ValueError as error:
        raise ValueError(f"rewards.models.{model}: {error}") from error
    known = getattr(factory, "outputs", None)
    if isinstance(known, tuple):
        _outputs(model, entry, known)


def _outputs(model: str, entry: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """The outputs that count, with their settings, checked against those the reward has."""
    chosen = _get(entry, "outputs") or {output: {} for output in known}
    for output, settings in chosen.items():
        key = f"rewards.models.{model}.outputs.{output}"
        if output not in known:
            raise ValueError(f"{key}: the reward has no such output; it has {', '.join(known)}")
        for name in ("weight", "threshold"):
            value = _get(settings, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
            ):
                raise ValueError(f"{key}.{name} is {value!r}; it must be a finite number")
    return chosen
