"""TokenTree: what is packed can be read back, nothing is packed twice, and actions stand where they are predicted from."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.batch.token_tree import build_tree, common_prefix, cut_by_tokens

# Few letters, so that shared prefixes, duplicates and prefixes of each other are common.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=10)


def prefixes(sequences):
    return {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}


def path_of(tree, i):
    path = tree.paths[i]
    return path[path >= 0]


def check_tree(tree, packed):
    """Everything that must hold of a tree (no past) whose packed sequences are ``packed``."""
    for i, sequence in enumerate(packed):
        path = path_of(tree, i)
        assert tree.token_ids[path].tolist() == sequence
        assert tree.positions[path].tolist() == list(range(len(sequence)))
        assert tree.last_rows[i] == path[-1]
    assert tree.n_tokens == len(prefixes(packed)), "a shared prefix is packed once, and nothing else is packed"
    check_layout(tree)


def check_layout(tree):
    """Every row belongs to one segment, whose keys are the row's root path."""
    layout = tree.layout
    cu_q, cu_k = layout.cu_q.tolist(), layout.cu_k.tolist()
    assert cu_q[0] == 0 and cu_q[-1] == tree.n_tokens
    parents = {}  # row: path, read from the sequences
    for i in range(len(tree.paths)):
        path = path_of(tree, i).tolist()
        for n, row in enumerate(path):
            parents[row] = path[: n + 1]
    for s in range(len(cu_q) - 1):
        n = cu_q[s + 1] - cu_q[s]
        keys = layout.kv_index[cu_k[s] : cu_k[s + 1]].tolist()
        assert n > 0
        assert keys[: layout.root] == list(range(layout.root))
        for j in range(n):
            assert keys[: len(keys) - n + 1 + j] == parents[layout.past + cu_q[s] + j]


@settings(max_examples=150, deadline=None)
@given(SEQUENCES)
def test_sequences_can_be_read_back(sequences):
    tree = build_tree(sequences)
    check_tree(tree, sequences)
    assert tree.n_actions == 0 and tree.cu_actions.tolist() == [0] * (len(sequences) + 1)
    assert tree.padded_tokens == len(sequences) * max(map(len, sequences))


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, st.data())
def test_actions_are_predicted_from_the_row_before(sequences, data):
    starts = [data.draw(st.integers(1, len(s))) for s in sequences]
    tree = build_tree(sequences, starts)
    packed = [s[:-1] if start < len(s) else s for s, start in zip(sequences, starts, strict=True)]
    check_tree(tree, packed)
    cu = tree.cu_actions.tolist()
    assert cu[-1] == tree.n_actions
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        mine = slice(cu[i], cu[i + 1])
        assert tree.action_targets[mine].tolist() == sequence[start:]
        rows = tree.head_rows[tree.action_rows[mine]].tolist()
        assert rows == path_of(tree, i)[start - 1 : len(sequence) - 1].tolist()
    assert len(set(tree.head_rows.tolist())) == len(tree.head_rows), "a row goes through the head once"
    assert set(tree.action_rows.tolist()) == set(range(len(tree.head_rows))), "and only rows that are needed"


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(0, 4))
def test_past(sequences, past):
    """The first tokens, computed before, get no rows; everything else is as without a past."""
    stem = [0, 1, 2, 1][:past]
    sequences = [stem + s for s in sequences]
    whole, tree = build_tree(sequences), build_tree(sequences, past=past)
    assert tree.n_tokens == whole.n_tokens - past
    assert tree.token_ids.tolist() == whole.token_ids[past:].tolist()
    assert tree.positions.tolist() == whole.positions[past:].tolist()
    assert (tree.last_rows + past).tolist() == whole.last_rows.tolist()
    assert np.array_equal(tree.paths, whole.paths)
    assert tree.layout.past == past and tree.layout.root >= past
    check_layout(tree)


def test_k_equal_samples_share_every_row():
    """Four equal answers of two tokens: the prompt's last row and one answer row are all that the head needs."""
    prompt, answer = [5, 6, 7], [8, 9]
    tree = build_tree([prompt + answer] * 4, [3] * 4)
    assert tree.n_tokens == 4 and tree.padded_tokens == 20
    assert tree.head_rows.tolist() == [2, 3]
    assert tree.action_rows.tolist() == [0, 1] * 4
    assert tree.action_targets.tolist() == [8, 9] * 4
    assert tree.cu_actions.tolist() == [0, 2, 4, 6, 8]


def test_several_targets_on_one_row():
    tree = build_tree([[5, 6, 1], [5, 6, 2], [5, 6, 3]], [2, 2, 2])
    assert tree.token_ids.tolist() == [5, 6], "single-token answers are targets only"
    assert tree.head_rows.tolist() == [1] and tree.action_rows.tolist() == [0, 0, 0]
    assert tree.action_targets.tolist() == [1, 2, 3]
    assert tree.layout.root == 2


def test_one_sequence_of_one_token():
    tree = build_tree([[7]])
    assert tree.token_ids.tolist() == [7] and tree.last_rows.tolist() == [0] and tree.n_actions == 0


def test_order_of_sequences_does_not_change_what_is_packed():
    rng = random.Random(0)
    sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 6))] for _ in range(12)]
    tree = build_tree(sequences)
    rng.shuffle(sequences)
    shuffled = build_tree(sequences)
    assert torch.equal(tree.token_ids, shuffled.token_ids)
    assert torch.equal(tree.layout.kv_index, shuffled.layout.kv_index)


def test_large_token_ids_keep_their_order_and_value():
    sequences = [[0, 256, 300_000], [0, 255, 2**31], [0, 65_536]]
    check_tree(build_tree(sequences), sequences)


def test_index_dtypes():
    tree = build_tree([[1, 2], [1, 3]], [1, 1])
    for tensor in (tree.token_ids, tree.positions, tree.last_rows, tree.action_targets, tree.action_rows, tree.head_rows):
        assert tensor.dtype == torch.int64
    assert tree.layout.cu_q.dtype == tree.layout.cu_k.dtype == tree.cu_actions.dtype == torch.int32


@pytest.mark.parametrize(
    ("sequences", "starts", "past", "message"),
    [
        ([], None, 0, "no sequences"),
        ([[1], []], None, 0, "sequence 1 is empty"),
        ([[1, 2]], [0], 0, "action start 0 of sequence 0"),
        ([[1, 2], [1, 2]], [1, 3], 0, "action start 3 of sequence 1"),
        ([[1, 2], [1, 2]], [1], 0, "1 action starts for 2 sequences"),
        ([[1, 2], [1, 3]], None, 2, "first 2 tokens"),  # not shared
        ([[1, 2], [1, 2]], None, 2, "first 2 tokens"),  # shared, but nothing would be left to compute
        ([[1, 2], [1]], None, 1, "first 1 tokens"),
        ([[1, 2, 3]], [2], 2, "first 2 tokens"),  # the last token is a target only
    ],
)
def test_errors(sequences, starts, past, message):
    with pytest.raises(ValueError, match=message):
        build_tree(sequences, starts, past=past)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES)
def test_common_prefix(sequences):
    expected = 0
    while all(len(s) > expected for s in sequences) and len({s[expected] for s in sequences}) == 1:
        expected += 1
    assert common_prefix(sequences) == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=20), st.integers(0, 8), st.integers(1, 30))
def test_cut_by_tokens(sizes, shared, budget):
    batches = cut_by_tokens(sizes, shared, budget)
    assert [i for batch in batches for i in batch] == list(range(len(sizes)))
    totals = [shared + sum(sizes[i] for i in batch) for batch in batches]
    for batch, total in zip(batches, totals, strict=True):
        assert batch and (total <= budget or len(batch) == 1 or all(sizes[i] == 0 for i in batch[1:]))
    for (batch, total), following in zip(zip(batches, totals, strict=True), batches[1:], strict=False):
        assert total + sizes[following[0]] > budget, f"batch {batch} had room for group {following[0]}"
