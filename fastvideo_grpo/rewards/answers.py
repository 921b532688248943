"""Reading a reward's answer, which may be anything."""

from __future__ import annotations

from typing import Any

import torch

from fastvideo_grpo.rewards.base import RewardResult


def checked(result: RewardResult, size: int) -> RewardResult:
    """The answer as plain copies on the CPU, to be sent; whether its scores have the right shape is not looked at.

    Raises:
        TypeError, ValueError: as :func:`judged`, or scores that are no real numbers; and what an attribute of it raises.
    """
    valid, scores = judged(result, size), {}
    for output, values in _scores(result, size).items():
        if not _is_real(values):
            raise ValueError(f"the scores of {output} are {describe(values)}; they must be float32 [{size}]")
        scores[str(output)] = _copy(values, torch.float32)
    return RewardResult(scores, valid, reason(result))


def judged(result: RewardResult, size: int) -> torch.Tensor:
    """Which samples the reward says it could judge, bool ``[size]`` on the CPU, a copy.

    Raises:
        TypeError, ValueError: what is no result, or ``valid`` of another form; and what an attribute of it raises.
    """
    if not isinstance(result, RewardResult):
        raise TypeError(f"score() returned {type(result).__name__}; it must return a RewardResult")
    valid = result.valid
    if not _is_dense(valid) or valid.dtype != torch.bool or valid.shape != (size,):
        raise ValueError(f"valid is {describe(valid)}; it must be bool [{size}]")
    return _copy(valid, torch.bool)


def reason(result: RewardResult) -> str:
    """Why samples are marked invalid; an answer that gives no text is told of instead."""
    words = result.invalid_because
    if not isinstance(words, str):
        return f"invalid_because is {type(words).__name__}; it must be a text"
    return words.encode("utf-8", "backslashreplace").decode()


def column(result: RewardResult, output: str, size: int) -> torch.Tensor:
    """The scores of an output, float32 ``[size]`` on the CPU, a copy without a gradient.

    Raises:
        TypeError, ValueError: no such output, or no real numbers of that shape.
    """
    scores = _scores(result, size)
    if output not in scores:
        raise ValueError(f"the answer lacks the output; it has {', '.join(map(str, scores)) or 'none'}")
    if not _is_real(scores[output]) or scores[output].shape != (size,):
        raise ValueError(f"the scores are {describe(scores[output])}; they must be float32 [{size}]")
    return _copy(scores[output], torch.float32)


def _scores(result: RewardResult, size: int) -> dict[str, Any]:
    scores = result.scores
    if not isinstance(scores, dict):
        raise TypeError(f"scores is {type(scores).__name__}; it must be a dict, output -> float32 [{size}]")
    return scores


def _is_real(scores: Any) -> bool:
    return _is_dense(scores) and not scores.is_complex() and not scores.is_quantized


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type != "meta"


def _copy(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # No subclass, whose operators may do anything, and nothing that the reward writes its next answer to.
    return values.detach().as_subclass(torch.Tensor).to("cpu", dtype, copy=True)


def describe(value: Any) -> str:
    """Dtype and shape of a tensor, and what may be the matter with it; the type of anything else."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    without = " without numbers (on meta)" if value.device.type == "meta" else ""
    return f"{layout}{value.dtype} {list(value.shape)}{without}"
