"""Streams of randomness, each drawn from (seed, stream, place): no generator state to save, nothing to drift on resuming."""

import numpy as np

SPLIT, SFT_ORDER, PPO_ORDER, PPO_UPDATE, PPO_LENGTH = range(5)


def rng(seed: int, stream: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, *place])
