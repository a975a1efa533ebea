"""Padded trees: what is real stands where it stood, padding is a tree of its own, shapes are few and little is wasted."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.batch.buckets import FEWEST_BOUND, FINEST, Shape, pad_tree, padded_tokens, step_up
from fastppo.batch.token_tree import build_tree
from fastppo_kernels._attention_layout import check_values

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=10)


def drawn(seed, prompts, samples=4, longest=40, new=12):
    """A tree of prompts of any length with their samples, and its sequences."""
    rng = random.Random(seed)
    sequences, starts = [], []
    for _ in range(prompts):
        prompt = [rng.randrange(3, 300) for _ in range(rng.randint(1, longest))]
        for _ in range(samples):
            sequences.append(prompt + [rng.randrange(3, 300) for _ in range(rng.randint(1, new))])
            starts.append(len(prompt))
    return build_tree(sequences, starts)


def check_padding(tree):
    padded, mask = pad_tree(tree)
    real, whole = Shape.of(tree), Shape.of(padded)
    for name in ("token_ids", "positions", "action_targets", "action_rows", "head_rows"):
        before, after = getattr(tree, name), getattr(padded, name)
        assert torch.equal(after[: len(before)], before) and after.dtype == before.dtype, name
    for name in ("cu_q", "cu_k", "kv_index"):
        before, after = getattr(tree.layout, name), getattr(padded.layout, name)
        assert torch.equal(after[: len(before)], before) and after.dtype == before.dtype, name
    assert mask.tolist() == [True] * real.actions + [False] * (whole.actions - real.actions)
    for name in ("last_rows", "cu_actions"):
        assert getattr(padded, name) is getattr(tree, name)
    check_values(padded.layout, whole.tokens)  # a tree, within its bounds
    # Padding attends to padding, is read by padding, and no segment has keys but no queries.
    assert (padded.layout.kv_index[real.keys :] >= real.tokens).all()
    assert (padded.head_rows[real.rows :] >= real.tokens).all()
    own, paths = padded.layout.cu_q.diff()[real.segments :], padded.layout.cu_k.diff()[real.segments :]
    assert ((own > 0) == (paths > 0)).all()
    # What several threads work on at a time: rows of the same thing are gone through one by one.
    assert padded.action_rows.bincount().max() <= tree.action_rows.bincount().max() + 1
    return real, whole


@settings(max_examples=60, deadline=None)
@given(SEQUENCES)
def test_small_trees(sequences):
    real, whole = check_padding(build_tree(sequences, [1] * len(sequences)))
    assert whole.tokens == padded_tokens(real.tokens) == FINEST and whole.max_q == whole.max_k == FEWEST_BOUND


@pytest.mark.parametrize("prompts", [1, 3, 40, 300])
@pytest.mark.parametrize("new", [1, 3, 60, 200])
def test_little_is_wasted(prompts, new):
    for seed in range(4):
        real, whole = check_padding(drawn(seed, prompts, new=new))
        for name in ("tokens", "rows", "actions", "segments", "keys"):
            of, to = getattr(real, name), getattr(whole, name)
            of += whole.tokens - real.tokens if name == "keys" else 0  # padding's own keys
            # Beside the eighth at most a step of the finest, and what has to be there at least.
            assert of <= to <= 1.125 * of + 2 * FINEST, name
        assert whole.max_q <= max(FEWEST_BOUND, 2 * real.max_q) and whole.max_k <= max(FEWEST_BOUND, 2 * real.max_k)


def test_few_shapes():
    """Of 200 mini-batches of one task; most of them in a handful."""
    shapes = [Shape.of(pad_tree(drawn(seed, 64, longest=20, new=4)).tree) for seed in range(200)]
    counts = sorted((shapes.count(shape) for shape in set(shapes)), reverse=True)
    assert sum(counts[:16]) >= 160, counts


def test_the_shape_follows_from_the_sizes_alone():
    """A run that is resumed finds the shapes that it had."""
    tree = drawn(0, 12)
    assert Shape.of(pad_tree(tree).tree) == Shape.of(pad_tree(drawn(0, 12)).tree)
    other = build_tree([[5, *range(10, 30)], [5, 9]], [2, 1])
    twin = build_tree([[7, *range(50, 70)], [7, 3]], [2, 1])
    assert Shape.of(other) == Shape.of(twin) and Shape.of(pad_tree(other).tree) == Shape.of(pad_tree(twin).tree)


def test_steps():
    small = [*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8), 144]
    assert sorted({step_up(n, 1) for n in range(1, 130)}) == small
    assert sorted({step_up(n, 64) for n in range(1, 64 * 129)}) == [64 * n for n in small]
    for n in range(1, 3000):
        for finest in (1, 16, 64):
            up = step_up(n, finest)
            assert n <= up < n + max(finest, n / 8) and up % finest == 0 and step_up(up, finest) == up


def test_a_tree_with_a_past_is_not_padded():
    with pytest.raises(ValueError, match="pad_tree: a tree with a past of 2 tokens cannot be padded"):
        pad_tree(build_tree([[1, 2, 3], [1, 2, 4]], past=2))
