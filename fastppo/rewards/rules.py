"""Rewards by rule: what an answer to a task with known labels is worth."""

from __future__ import annotations

from typing import NamedTuple

from fastppo.config import RewardConfig
from fastppo.tasks import Task


class Worth(NamedTuple):
    """Rewards of a right, a wrong and a malformed answer. Of numbers ``wrong`` is that of the largest error on the scale."""

    correct: float
    wrong: float
    malformed: float


WORDS = {"default": Worth(1.0, -1.0, -2.0), "paper": Worth(1.0, 0.0, -1.0), "code": Worth(1.0, -1.0, -3.0)}
"""Answer words, by preset."""

NUMBERS = {"default": WORDS["default"], "paper": Worth(2.5, -2.5, -2.5), "code": Worth(2.5, -2.5, -2.5)}
"""Numbers, by preset. On a scale from 0 to 5, 2.5 to -2.5 is 2.5 - |error|."""


def answer_reward(task: Task, gold: int | float, predicted: int | float | None, text: str, config: RewardConfig) -> float:
    """Reward of one answer.

    Args:
        predicted: what ``text``, the answer, says; None where it is malformed.
        config: the preset, and what replaces parts of it.

    A number's reward falls evenly with its error. A number off the scale is worth no less than the worst on it, but with
    ``code``, whose reward has no lower bound. A task's own reward (`Task.reward`) takes the place of all this.
    """
    if task.reward is not None:
        return task.worth(text, gold, predicted)
    of_words, of_preset = task.span is None, config.preset
    worth = (WORDS if of_words else NUMBERS)[of_preset]
    correct = worth.correct if config.correct is None else config.correct
    wrong = worth.wrong if config.wrong is None else config.wrong
    malformed = worth.malformed if config.malformed is None else config.malformed
    if predicted is None:
        spared = of_preset == "code" and task.wordless_is_wrong and task.closing and task.found(text) == []
        return wrong if spared else malformed
    if task.span is None:
        return correct if predicted == gold else wrong
    low, high = task.span
    error = abs(predicted - gold) / (high - low)
    return correct + (wrong - correct) * (error if of_preset == "code" else min(error, 1.0))
