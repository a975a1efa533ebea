"""What sampled answers say and are worth, and what of that is recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastppo.batch.rollout import Sample
from fastppo.config import RewardConfig
from fastppo.rewards.rules import answer_reward
from fastppo.tasks import Task


class Marks:
    """Of one rollout: what each sample's answer says by the parser of its own task (``predicted``), and its reward.

    Args:
        tasks, gold: of each sample, its task and its example's label.
    """

    def __init__(self, tasks: Sequence[Task], gold: Sequence[int | float], config: RewardConfig):
        self.tasks, self.gold, self.config = tasks, gold, config
        self.predicted: list[int | float | None] = [None] * len(gold)

    def reward(self, index: int, sample: Sample) -> float:
        """The reward of one sample; for a `RewardStream`."""
        task, said = self.tasks[index], self.tasks[index].parse(sample.text)
        self.predicted[index] = said
        return answer_reward(task, self.gold[index], said, sample.text, self.config)

    def metrics(self, rewards: Sequence[float]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """(of each task's samples, by its name; of all): mean reward and fraction malformed. Of a task of classes ``accuracy``
        and each class's mean reward too; of one of numbers the mean ``error`` of answers that are one, if any."""
        by_task: dict[str, list[int]] = {}
        for i, task in enumerate(self.tasks):
            by_task.setdefault(task.name, []).append(i)
        return {name: self._of(places, rewards) for name, places in by_task.items()}, {
            "reward": float(np.mean(rewards)),
            "malformed": float(np.mean([p is None for p in self.predicted])),
        }

    def _of(self, places: list[int], rewards: Sequence[float]) -> dict[str, float]:
        """Metrics of the samples of one task."""
        task, earned = self.tasks[places[0]], [rewards[i] for i in places]
        gold, predicted = [self.gold[i] for i in places], [self.predicted[i] for i in places]
        found = {"reward": float(np.mean(earned)), "malformed": float(np.mean([p is None for p in predicted]))}
        if task.span is None:
            found["accuracy"] = float(np.mean([p == g for p, g in zip(predicted, gold, strict=True)]))
            for c in sorted(set(gold)):
                found[f"reward_class_{c}"] = float(np.mean([r for r, g in zip(earned, gold, strict=True) if g == c]))
        else:
            errors = [abs(p - g) for p, g in zip(predicted, gold, strict=True) if p is not None]
            if errors:
                found["error"] = float(np.mean(errors))
        return found
