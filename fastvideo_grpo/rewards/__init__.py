"""Rewards: one file a reward model, a registry that finds them by kind, and the set that a run scores with."""

from fastvideo_grpo.rewards.base import Reward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.registry import check, create, kinds, register
from fastvideo_grpo.rewards.reward_set import RewardSet, ScoredBatch

__all__ = [
    "Reward", "RewardRequest", "RewardResult", "RewardSet", "ScoredBatch", "check", "create", "kinds", "register"
]
