"""Longest answers that each PPO iteration draws: from which numbers, from what they are drawn, and who does not draw."""

import math
from collections import Counter

import numpy as np
import pytest
from engine import make_config, make_model
from small import ppo_steps

from fastppo import trainer
from fastppo.algorithms.optim import make_optimizer
from fastppo.errors import UserError
from fastppo.rollout.sampler import Sampling
from fastppo.streams import PPO_LENGTH, rng

LENGTHS = {"sample__max_new_tokens_from": 3, "sample__max_new_tokens": 6}


def drawn(step, **settings):
    config = make_config("llama", **settings)
    return Sampling.drawn(config, rng(config.seed, PPO_LENGTH, step)).max_new_tokens


def test_both_ends_are_drawn_and_all_as_often():
    config, rng = make_config("llama", **LENGTHS), np.random.default_rng(0)
    counts = Counter(Sampling.drawn(config, rng).max_new_tokens for _ in range(4000))
    assert set(counts) == {3, 4, 5, 6}
    assert all(abs(count - 1000) < 5 * 27.4 for count in counts.values())  # five standard deviations: sqrt(4000 * 3/16)


def test_the_draw_is_the_seeds_and_the_steps():
    first = [drawn(step, **LENGTHS) for step in range(20)]
    assert first == [drawn(step, **LENGTHS) for step in range(20)] and len(set(first)) > 1
    assert first != [drawn(step, **LENGTHS, seed=1) for step in range(20)]


def test_nothing_else_is_drawn():
    config = make_config("llama", **LENGTHS, sample__temperature=0.7)
    one, usual = Sampling.drawn(config, np.random.default_rng(0)), Sampling.of(config)
    assert usual.max_new_tokens == Sampling.greedy(config).max_new_tokens == 6
    assert {**vars(one), "max_new_tokens": 6} == vars(usual)
    assert drawn(0, sample__max_new_tokens=6) == 6


def test_an_iteration_samples_no_more_than_it_drew():
    settings = {**LENGTHS, "ppo__prompts": 4, "ppo__samples": 2}
    model = make_model("llama", **settings)
    optimizer = make_optimizer(model.trainable(), 0.0, 1e-5)
    longest = []
    for step in range(6):
        done = trainer.ppo_iteration(
            model, optimizer, [[5, 6], [7], [8, 9, 10], [11]], lambda rollout: [0.0] * len(rollout.samples), 0.0,
            model.config, step=step,
        )  # fmt: skip
        longest.append(max(len(sample.tokens) for sample in done.rollout.samples))
    assert longest == [drawn(step, **settings) for step in range(6)] and len(set(longest)) > 1


def test_answers_of_a_run(world, tmp_path):
    """Of a random model hardly one ends by itself: their mean is just below what was drawn."""
    run = tmp_path / "run"
    world.train(run, sft__examples=0, ppo__iterations=6, ppo__lr=1e-6, valid_examples=0, **LENGTHS)
    assert [math.ceil(row["length"]) for row in ppo_steps(run)] == [drawn(step, **LENGTHS) for step in range(6)]


def test_the_shortest_must_have_room_for_an_answer(world, tmp_path):
    with pytest.raises(UserError, match=r"^--sample-max-new-tokens-from: 2 is too few .* task cola; expected at least \d+$"):
        world.train(tmp_path / "run", template="tagged", sample__max_new_tokens_from=2, sample__max_new_tokens=40)
