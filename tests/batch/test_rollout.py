"""Packing answers into micro- and mini-batches: nothing lost, prompts whole, budgets kept."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.batch.rollout import MicroBatch, Rollout, Sample, pack, pack_rollout

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=5)


def read_back(part: MicroBatch, i: int) -> list[int]:
    """Targets of the i-th sequence of a micro-batch."""
    cu = part.tree.cu_actions.tolist()
    return part.tree.action_targets[cu[i] : cu[i + 1]].tolist()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=6),
    st.integers(1, 60),
    st.booleans(),
)
def test_pack(groups, budget, padded):
    prompts = [prompt for prompt, _ in groups]
    answers = [(p, answer) for p, (_, several) in enumerate(groups) for answer in several]
    parts = pack(prompts, answers, budget=budget, padded=padded, device="cpu")
    assert [i for part in parts for i in part.samples] == list(range(len(answers))), "all, once, in order"
    for part in parts:
        members = {answers[i][0] for i in part.samples}
        for n, i in enumerate(part.samples):
            assert read_back(part, n) == answers[i][1]
        for p in members:
            assert {i for i, (q, _) in enumerate(answers) if q == p} <= set(part.samples), "a prompt's answers stay together"
        size = part.tree.padded_tokens if padded else part.tree.n_tokens
        assert size <= budget or len(members) == 1


def test_answers_of_one_prompt_that_stand_apart_are_groups_of_their_own():
    parts = pack([[1, 2], [3, 4]], [(0, [5]), (1, [6]), (0, [7])], budget=1, padded=False, device="cpu")
    assert [part.samples for part in parts] == [[0], [1], [2]]


def make_rollout(seed, prompts=7, samples=3):
    rng = random.Random(seed)
    texts = [[0, 1] + [rng.randrange(9) for _ in range(rng.randint(1, 5))] for _ in range(prompts)]
    made = [
        Sample(p, answer := [rng.randrange(9) for _ in range(rng.randint(1, 4))], [0.0] * len(answer), "eos", "")
        for p in range(prompts)
        for _ in range(samples)
    ]
    return Rollout(texts, made)


@pytest.mark.parametrize("minibatches", [1, 2, 3, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_pack_rollout(minibatches, padded):
    rollout = make_rollout(0)
    minis = pack_rollout(rollout, minibatches=minibatches, budget=25, padded=padded, device="cpu", rng=np.random.default_rng(0))
    assert len(minis) == minibatches
    seen = [i for mini in minis for part in mini.parts for i in part.samples]
    assert sorted(seen) == list(range(len(rollout.samples)))
    sizes = []
    for mini in minis:
        prompts = [rollout.samples[i].prompt for part in mini.parts for i in part.samples]
        sizes.append(len(set(prompts)))
        assert all(prompts.count(p) == 3 for p in prompts), "all samples of a prompt are in one mini-batch"
        assert mini.n_actions == sum(len(rollout.samples[i].tokens) for part in mini.parts for i in part.samples)
        for part in mini.parts:
            for n, i in enumerate(part.samples):
                sample = rollout.samples[i]
                assert read_back(part, n) == sample.tokens
                path = part.tree.paths[n]
                sequence = rollout.prompts[sample.prompt] + sample.tokens
                assert part.tree.token_ids[path[path >= 0]].tolist() == sequence[:-1]
    assert max(sizes) - min(sizes) <= 1


def test_division_is_random_and_repeatable():
    rollout = make_rollout(1)

    def order(seed):
        minis = pack_rollout(rollout, minibatches=2, budget=30, padded=False, device="cpu", rng=np.random.default_rng(seed))
        return [part.samples for mini in minis for part in mini.parts]

    assert order(0) == order(0)
    assert order(0) != order(1)
