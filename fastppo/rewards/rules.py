"""Rewards by rule: what an answer to a task with known labels is worth."""

from __future__ import annotations

from fastppo.config import RewardConfig
from fastppo.tasks import Task


def answer_reward(task: Task, gold: int | float, predicted: int | float | None, text: str, reward: RewardConfig) -> float:
    """Reward of one answer; ``predicted`` is what ``text``, the answer, says, None where it is malformed.

    A number's reward falls evenly with its error, from that of a right answer to that of a wrong one at the largest error.
    """
    if predicted is None:
        return reward.malformed
    if task.span is None:
        return reward.correct if predicted == gold else reward.wrong
    low, high = task.span
    return reward.correct + (reward.wrong - reward.correct) * min(abs(predicted - gold) / (high - low), 1.0)
