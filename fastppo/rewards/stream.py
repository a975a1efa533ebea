"""Rewards of single samples, asked for while the sampler still decodes others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fastppo.batch.rollout import Rollout, Sample


class RewardStream:
    """The rewards of one rollout: ``finished`` is for ``generate`` and asks for the reward of a sample as soon as it ends;
    calling the stream with the rollout gives all, in its order. Leaving it as a context drops rewards that nobody waits for.

    Args:
        reward: of a sample and its index in the rollout. Samples end in any order: nothing else may decide the number.
        threads: 0: in the sampler's own thread, the fastest where a reward takes microseconds. More: so many rewards at a time
            beside the sampler, for those that wait for a process or a server; ``reward`` is called from several threads then.
    """

    def __init__(self, reward: Callable[[int, Sample], float], threads: int = 0):
        self.reward = reward
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="reward") if threads else None
        self.found: dict[int, float | Future[float]] = {}

    def finished(self, index: int, sample: Sample) -> None:
        if self.pool is None:
            self.found[index] = self.reward(index, sample)
        else:
            self.found[index] = self.pool.submit(self.reward, index, sample)

    def __call__(self, rollout: Rollout) -> list[float]:
        """The reward of every sample. Raises what ``reward`` raised, for the first such sample of the rollout."""
        found = (self.found[index] for index in range(len(rollout.samples)))
        return [reward.result() if isinstance(reward, Future) else reward for reward in found]

    def __enter__(self) -> RewardStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
