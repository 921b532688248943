"""All rewards of a run: scored together, and none of them can invent a number or end the run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastvideo_grpo.errors import Escape, one_line
from fastvideo_grpo.rewards import answers, registry
from fastvideo_grpo.rewards.base import DifferentiableReward, Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.output_transform import OutputTransform
from fastvideo_grpo.rewards.placement.entries import check_media, check_placement, get, place
from fastvideo_grpo.rewards.placement.process import ProcessReward
from fastvideo_grpo.rewards.placement.threads import SerialThread

logger = logging.getLogger(__name__)


@dataclass
class ScoredBatch:
    """What a :class:`RewardSet` says of B samples; every dict has one entry per name "MODEL/OUTPUT".

    Attributes:
        scores: float32 ``[B]`` on the CPU, after the outputs' transforms; NaN where invalid. This is what is optimised.
        raw: float32 ``[B]`` on the CPU, as the reward gave it; NaN where invalid.
        valid: bool ``[B]`` on the CPU.
        failures: one line for each thing that went wrong in this batch, with the reward's name and the number of samples.
    """

    scores: dict[str, torch.Tensor]
    raw: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    failures: list[str]


class RewardSet:
    """The rewards of a run, ``rewards.models``.

    Each reward has a thread that asks it, one request after the other, so that slow ones (processes, servers) work side by
    side. A request that fails is asked again, ``retries`` times, after ``backoff_s``, twice that, and so on; what then has no
    score is masked.

    Args:
        models: MODEL -> an entry with ``kind`` and, each optional, ``checkpoint``, ``params``, ``placement`` with its keys, and
            ``outputs`` (OUTPUT -> ``weight``, 1 if left out, and the keys of ``OutputTransform``), as keys or as attributes.
            Without ``outputs`` all outputs of the reward count with weight 1.
        device, offload_idle, timeout_s: see :func:`~fastvideo_grpo.rewards.placement.entries.place`.
        retries, backoff_s: how often a request that failed is asked again, and the seconds before the first time.
        elsewhere: MODEL -> the outputs that the rewards of another process have. Then none is made here, and this set knows
            names, weights and transforms only.
        watch: called with the inline rewards that are at work, whenever one begins or ends (a reward in this process can end
            it without a word).

    Attributes:
        names: "MODEL/OUTPUT" in the order of the configuration.
        weights, transforms: by name.
        rewards: MODEL -> Reward.
        failure_counts: micro-batches that lost samples to a failure, by its message, since this set was made.
        retried: requests that were asked again, by reward, since this set was made.

    Raises:
        ValueError: with the key, for anything wrong in the configuration; every entry is checked before the first reward is
            loaded.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        offload_idle: bool = False,
        timeout_s: float = 600.0,
        retries: int = 2,
        backoff_s: float = 0.5,
        elsewhere: Mapping[str, tuple[str, ...]] | None = None,
        watch: Callable[[Collection[str]], None] = lambda models: None,
    ) -> None:
        if not models:
            raise ValueError(f"rewards.models is empty; name at least one reward, of kind {', '.join(registry.kinds())}")
        for model, entry in models.items():
            check_entry(model, entry)
        self._entries = dict(models)
        self.attempts, self.backoff_s = retries + 1, backoff_s
        self.rewards: dict[str, Reward] = {}
        self.weights: dict[str, float] = {}
        self.transforms: dict[str, OutputTransform] = {}
        self.failure_counts: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self._failures_left: dict[str, float] = {}
        self._seconds_left: dict[str, float] = {}
        self._threads: dict[str, SerialThread] = {}
        self._failing: set[str] = set()
        self._closed = False
        self._watch, self._at_work, self._at_work_lock = watch, set[str](), threading.Lock()
        try:
            for model, entry in models.items():
                if elsewhere is None:
                    with self._working(model):
                        self.rewards[model] = place(
                            model, entry, device=torch.device(device), offload_idle=offload_idle, timeout_s=timeout_s
                        )
                known = self.rewards[model].outputs if elsewhere is None else elsewhere[model]
                for output, settings in _outputs(model, entry, known).items():
                    weight = get(settings, "weight")
                    self.weights[f"{model}/{output}"] = 1.0 if weight is None else float(weight)
                    self.transforms[f"{model}/{output}"] = _transform(model, output, settings)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def check_frames(self, frames: int) -> None:
        """To be called once, before the run.

        Raises:
            ValueError: a reward cannot look at media of ``frames`` frames.
        """
        for model, reward in self.rewards.items():
            check_media(model, reward.media_kind, frames)

    @property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """MODEL -> all outputs of the rewards that were made here."""
        return {model: reward.outputs for model, reward in self.rewards.items()}

    @property
    def restart_s(self) -> float:
        """Seconds that a request may take longer because a process is started anew."""
        return max((reward.restart_s for reward in self.rewards.values() if isinstance(reward, ProcessReward)), default=0.0)

    def begin(self, failures: float = math.inf, seconds: float = math.inf) -> None:
        """Begin a round of requests in which a reward that fails is left alone at some point, since one that hangs would hold
        the run for each request: once it has no score for more than ``failures`` samples (which end the run anyway), or
        when its failures have taken ``seconds``. An attempt that has begun is waited for."""
        self._failures_left = dict.fromkeys(self.rewards, failures)
        self._seconds_left = dict.fromkeys(self.rewards, seconds)

    def score(self, request: RewardRequest) -> ScoredBatch:
        """Score the samples with every reward.

        A reward that raises (anything), is late, or whose answer has a wrong form or lacks an output, has all its samples
        masked; one that returns NaN or infinity has those samples masked; both after it was asked again. All of it is told in
        ``failures``, and logged the first time. Each reward, and each attempt, gets a copy of the request.
        """
        return self.submit(request).result()

    def submit(self, request: RewardRequest) -> PendingScores:
        """Begin to score; ``result()`` waits. Requests are scored in the order they come in, whenever they are collected."""
        if not self.rewards:
            raise RuntimeError("the rewards are with another process, which scores its samples")
        asked = {}
        for model in self.rewards:
            if model not in self._threads:
                self._threads[model] = SerialThread(f"reward {model}")
            asked[model] = self._threads[model].submit(partial(self._ask, model, request))
        return PendingScores(self, asked)

    def differentiable(
        self, pixels: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """What the rewards say of media that are no bytes yet, with gradients.

        It is computed in the calling thread, once, with no time limit, while the rewards' threads must be idle: collect
        every ``submit`` before. The loop does, since an update begins when all samples are scored.

        Args:
            pixels: float ``[B, F, H, W, 3]``, RGB in 0..1; what is not float32 is converted.
            prompts, metadata: B each, as in :class:`RewardRequest`; no metadata is as good as empty dicts.

        Returns:
            for each "MODEL/OUTPUT" of nonzero weight, in the order of ``names``, float32 ``[B]`` on the device of ``pixels``:
            the score after the output's transform, without the weight, differentiable in ``pixels``. Where the reward gave no
            finite number it is NaN, and constant. No other reward is asked.

        Raises:
            ValueError: media of another form, what :func:`check_differentiable` raises, and, naming the reward, an answer
                that lacks an output, has another shape or carries no gradient.
            RuntimeError: the rewards are with another process.

        What a reward raises passes through, with a note that names it; what would end the program as if all were well
        (SystemExit and the like) as :class:`~fastvideo_grpo.errors.Escape`.
        """
        if not self.rewards:
            raise RuntimeError("the rewards are with another process, where no gradient comes from")
        if not pixels.is_floating_point() or pixels.ndim != 5 or pixels.shape[-1] != 3:
            found = answers.describe(pixels)
            raise ValueError(f"pixels are {found}; they must be floating [batch, frames, height, width, 3] in 0..1")
        metadata = metadata or [{} for _ in prompts]
        if not len(prompts) == len(metadata) == len(pixels):
            raise ValueError(
                f"{len(prompts)} prompts and {len(metadata)} metadata entries for {len(pixels)} samples; give each sample one"
            )
        counted: dict[str, list[str]] = {}
        for name, weight in self.weights.items():
            if weight != 0:
                counted.setdefault(name.rpartition("/")[0], []).append(name)
        for model in counted:
            check_differentiable(model, self._entries[model])
        pixels = pixels.to(torch.float32)
        scores = {}
        for model, names in counted.items():
            reward = self.rewards[model]
            assert isinstance(reward, DifferentiableReward)
            try:
                with self._working(model):
                    answer = reward.score_differentiably(pixels, prompts, metadata)
            except (Exception, KeyboardInterrupt) as error:  # this is the main thread: the latter may be Ctrl-C
                error.add_note(f"raised by the reward {model} in score_differentiably")
                raise
            except BaseException as error:
                escape = Escape(error)
                escape.add_note(f"raised by the reward {model} in score_differentiably")
                raise escape from error
            for name in names:
                raw = _differentiable_column(name, answer, pixels)
                scores[name] = self.transforms[name](torch.where(raw.isfinite(), raw, torch.nan))
        return scores

    def _ask(self, model: str, request: RewardRequest) -> _Answer:
        """All attempts of one reward at one request."""
        names = [name for name in self.weights if name.rpartition("/")[0] == model]
        answer = _Answer(model, names, len(request))
        if self._failures_left.get(model, math.inf) < 0:
            answer.failures[f"reward {model}: not asked: too many samples have no score already"] = len(request)
            return answer
        seconds = self._seconds_left.get(model, math.inf)
        if seconds <= 0:
            answer.failures[f"reward {model}: not asked: its failures took too long already"] = len(request)
            return answer
        begun, failing = time.monotonic(), 0.0
        # A reward that failed through all attempts gets one at a time until it answers: one that hangs costs its limit once.
        for attempt in range(1 if model in self._failing else self.attempts):
            if self._closed:
                break
            if attempt:
                pause = self.backoff_s * 2 ** (attempt - 1)
                if failing + pause >= seconds:
                    break
                self.retried[model] += 1
                time.sleep(pause)
            with self._working(model):
                answer.take(lambda: self.rewards[model].score(request))
            if not answer.failures:
                self._failing.discard(model)
                break
            failing = time.monotonic() - begun
            reasons = "; ".join(answer.failures)
            if attempt + 1 < self.attempts and self.retried[model] == 0:
                logger.warning("%s (it is asked again, %d times at most)", reasons, self.attempts - 1)
        if answer.failures and answer.missing == len(request):
            self._failing.add(model)
        self._seconds_left[model] = seconds - failing
        counted = [answer.valid[name] for name in names if self.weights[name] != 0]
        if counted:
            left = self._failures_left.get(model, math.inf)
            self._failures_left[model] = left - int((~torch.stack(counted).all(0)).sum())
        return answer

    @contextmanager
    def _working(self, model: str) -> Iterator[None]:
        """Within, the reward is at work; ``watch`` is told."""
        if (get(self._entries[model], "placement") or "inline") != "inline":
            yield
            return
        with self._at_work_lock:
            self._at_work.add(model)
            self._watch(self._at_work)
        try:
            yield
        finally:
            with self._at_work_lock:
                self._at_work.discard(model)
                self._watch(self._at_work)

    def note(self, message: str, count: int, size: int) -> str:
        """Count a failure that cost ``count`` of ``size`` samples, and log it the first time; returns a line that says so."""
        if message not in self.failure_counts:
            logger.warning("%s (%d of %d samples masked; told once, counted always)", message, count, size)
        self.failure_counts[message] += 1
        return f"{message} ({count} of {size} samples masked)"

    def close(self) -> None:
        """Let go of the rewards, their processes and connections; one that fails at it is named in the log."""
        self._closed = True
        for thread in self._threads.values():
            thread.close()
        with ExitStack() as closing:  # Ctrl-C meanwhile keeps none from being closed
            for model, reward in self.rewards.items():
                closing.callback(self._close, model, reward)

    def _close(self, model: str, reward: Reward) -> None:
        try:
            with self._working(model):
                reward.close()
        except Exception as error:
            logger.error("reward %s: close(): %s", model, one_line(error))


class PendingScores:
    """Samples that are being scored."""

    def __init__(self, rewards: RewardSet, asked: dict[str, Future[_Answer]]) -> None:
        self._rewards, self._asked = rewards, asked

    def result(self) -> ScoredBatch:
        """Wait for all rewards, and tell what failed."""
        batch, note = ScoredBatch({}, {}, {}, []), self._rewards.note
        for model, asked in self._asked.items():
            answer = asked.result()
            for message, count in answer.failures.items():
                # An attempt before the last one may have had scores for some of them.
                batch.failures.append(note(message, min(count, answer.missing), answer.size))
            for message, count in answer.judgements.items():
                batch.failures.append(note(f"reward {model}: could not judge the sample: {message}", count, answer.size))
            for name, raw in answer.raw.items():
                batch.raw[name] = raw
                batch.scores[name] = self._rewards.transforms[name](raw)
                batch.valid[name] = answer.valid[name] & batch.scores[name].isfinite()
                lost = int((answer.valid[name] & ~batch.valid[name]).sum())
                if lost:
                    batch.failures.append(note(f"reward {name}: affine made it infinite", lost, answer.size))
        return batch


class _Answer:
    """What the attempts at a request have given so far.

    Attributes:
        raw, valid: by name, ``[B]``.
        failures: message -> samples that the last attempt failed at.
        judgements: message -> samples that the reward says it cannot judge, which is an answer, and not asked again.
    """

    def __init__(self, model: str, names: list[str], size: int) -> None:
        self.model, self.size = model, size
        self.raw = {name: torch.full((size,), float("nan")) for name in names}
        self.valid = {name: torch.zeros(size, dtype=torch.bool) for name in names}
        self.failures: dict[str, int] = {}
        self.judgements: dict[str, int] = {}

    @property
    def missing(self) -> int:
        """Samples without a score in one of the outputs."""
        return int((~torch.stack(list(self.valid.values())).all(0)).sum()) if self.valid else 0

    def take(self, score: Callable[[], RewardResult]) -> None:
        """One attempt, whatever it raises or returns. What an earlier one gave stays: asked again, a reward answers for the
        same batch."""
        self.failures, self.judgements = {}, {}
        try:
            result = score()
            judged = answers.judged(result, self.size)
            if not judged.all():
                self.judgements[answers.reason(result)] = int((~judged).sum())
        except BaseException as error:  # this is no main thread: Ctrl-C is raised elsewhere
            self.failures[f"reward {self.model}: {one_line(error)}"] = self.size
            return
        for name in self.raw:
            try:
                scores = answers.column(result, name.rpartition("/")[2], self.size)
            except BaseException as error:
                self.failures[f"reward {name}: {one_line(error)}"] = self.size
                continue
            fresh = judged & scores.isfinite() & ~self.valid[name]
            self.raw[name] = torch.where(fresh, scores, self.raw[name])
            self.valid[name] |= fresh
            missing = int((judged & ~self.valid[name]).sum())
            if missing:
                self.failures[f"reward {name}: returned NaN or infinity"] = missing


def _differentiable_column(name: str, answer: Mapping[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    output = name.rpartition("/")[2]
    if output not in answer:
        raise ValueError(f"reward {name}: score_differentiably lacks the output; it has {', '.join(answer) or 'none'}")
    scores = answer[output]
    if not isinstance(scores, torch.Tensor) or scores.shape != pixels.shape[:1] or not scores.is_floating_point():
        raise ValueError(
            f"reward {name}: score_differentiably gave {answers.describe(scores)}; it must be floating [{len(pixels)}], one a "
            "sample"
        )
    wanted = torch.is_grad_enabled() and pixels.requires_grad
    if wanted and not scores.requires_grad and scores.isfinite().any():
        raise ValueError(
            f"reward {name}: the scores of score_differentiably carry no gradient; it may not detach, round or compare the "
            "pixels on the way, nor run under no_grad or inference_mode"
        )
    return scores.to(torch.float32)


def check_entry(model: str, entry: Any) -> None:
    """Check an entry of ``rewards.models``; loads nothing and opens no file.

    Raises:
        ValueError: with the key, what is wrong.
    """
    if not model.strip():
        raise ValueError(f"rewards.models has the name {model!r}, which nobody sees; give it another")
    if "/" in model:
        raise ValueError(f"rewards.models has the name '{model}'; a name may not hold '/', which joins it to an output")
    known = check_placement(model, entry)
    for output, settings in (get(entry, "outputs") or {}).items():
        _transform(model, output, settings)
    if known is not None:
        _outputs(model, entry, known)


def check_differentiable(model: str, entry: Any) -> None:
    """Check that an entry that :func:`check_entry` accepts can give the gradient of its scores; one whose outputs all have
    weight 0 is only watched and needs none. Loads nothing and opens no file.

    Raises:
        ValueError: with the key, why it cannot.
    """
    outputs = get(entry, "outputs") or {}
    counting = [output for output, settings in outputs.items() if get(settings, "weight") != 0]
    if outputs and not counting:
        return
    key, watch = f"rewards.models.{model}", "give all its outputs weight=0 to only watch it"
    placement = get(entry, "placement") or "inline"
    if placement != "inline":
        raise ValueError(
            f"{key}.placement is {placement!r}, but the objective needs the reward's gradient, which comes from the training "
            f"process only; set it to inline, or {watch}"
        )
    try:
        has_gradient = registry.differentiable(get(entry, "kind"))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if not has_gradient:
        raise ValueError(
            f"{key}.kind is {get(entry, 'kind')!r}, which has no gradient (score_differentiably), but the objective needs it; "
            f"kinds that have one: {', '.join(registry.differentiable_kinds())}; use one of them, or {watch}"
        )
    for output in counting:
        threshold = get(outputs[output], "threshold")
        if threshold is not None:
            raise ValueError(
                f"{key}.outputs.{output}.threshold is {threshold!r}, but the objective needs the reward's gradient, which is 0 "
                "on both sides of a threshold; remove it (affine, clamp and invert keep the gradient), or give the output "
                "weight=0"
            )


def _transform(model: str, output: str, settings: Any) -> OutputTransform:
    pairs = {name: get(settings, name) for name in ("affine", "clamp")}
    try:
        return OutputTransform(
            **{name: tuple(pair) if pair is not None else None for name, pair in pairs.items()},
            threshold=get(settings, "threshold"),
            invert=bool(get(settings, "invert")),
        )
    except ValueError as error:
        raise ValueError(f"rewards.models.{model}.outputs.{output}.{error}") from error


def _outputs(model: str, entry: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """The outputs that count, with their settings, checked against those the reward has."""
    chosen = get(entry, "outputs") or {output: {} for output in known}
    for output, settings in chosen.items():
        key = f"rewards.models.{model}.outputs.{output}"
        if output not in known:
            raise ValueError(f"{key}: the reward has no such output; it has {', '.join(known)}")
        weight = get(settings, "weight")
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight)
        ):
            raise ValueError(f"{key}.weight is {weight!r}; it must be a finite number")
    return chosen
