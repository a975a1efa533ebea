"""Rewards by rule: what an answer to a task with known labels is worth."""

from __future__ import annotations

from fastppo.config import RewardConfig


def answer_reward(gold: int, predicted: int | None, reward: RewardConfig) -> float:
    """Reward of one parsed answer; ``predicted`` is None where the text is no answer (malformed)."""
    if predicted is None:
        return reward.malformed
    return reward.correct if predicted == gold else reward.wrong
