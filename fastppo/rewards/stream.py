"""Rewards of single samples, asked for while the sampler still decodes others."""

from __future__ import annotations

from collections.abc import Callable

from fastppo.batch.rollout import Rollout, Sample


class RewardStream:
    """The rewards of one rollout: ``finished`` is for ``generate`` and asks for the reward of a sample as soon as it ends;
    calling the stream with the rollout gives all, in its order.

    On a GPU the next step runs meanwhile.

    Args:
        reward: of a sample and its index in the rollout. Samples end in any order: nothing else may decide the number.
    """

    def __init__(self, reward: Callable[[int, Sample], float]):
        self.reward = reward
        self.found: dict[int, float] = {}

    def finished(self, index: int, sample: Sample) -> None:
        self.found[index] = self.reward(index, sample)

    def __call__(self, rollout: Rollout) -> list[float]:
        return [self.found[index] for index in range(len(rollout.samples))]
