"""TokenTree: a batch of token sequences as a tree of shared prefixes, each token computed once.

Sequences are sorted; a sequence then shares its longest prefix with its neighbour, and what is new in it becomes one
*segment* of the packed arrays. Nothing is padded and no branch point needs a node of its own: a later sequence that
leaves an earlier one halfway just lists that half in its path. Models see ``token_ids`` and ``positions``; attention sees
the ``TreeLayout``; heads see the rows that the actions (sampled or supervised tokens) are predicted from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastppo_kernels.attention import TreeLayout


@dataclass(frozen=True)
class TokenTree:
    """A packed batch. All index tensors are int64, on one device.

    token_ids, positions: [T], the tokens and their depth in the tree (= position in their sequence).
    layout: who attends to whom.
    last_rows: [N], for each given sequence, the row of its last packed token.
    action_targets: [A], target tokens, sequence after sequence in the order given.
    action_rows: [A], index into ``head_rows`` of the row that predicts the target.
    head_rows: [R], rows of the packed arrays whose hidden state is needed; several targets can share one.
    cu_actions: [N + 1], cumulative numbers of actions of the sequences (int32).
    padded_tokens: N times the longest sequence, what a padded batch of the same sequences would compute.
    paths: [N, L] int64 numpy, rows of each sequence's tokens (-1 past its end); kept on the host, for padded models.
    """

    token_ids: Tensor
    positions: Tensor
    layout: TreeLayout
    last_rows: Tensor
    action_targets: Tensor
    action_rows: Tensor
    head_rows: Tensor
    cu_actions: Tensor
    padded_tokens: int
    paths: np.ndarray

    @property
    def n_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def n_actions(self) -> int:
        return self.action_targets.shape[0]


def build_tree(
    sequences: Sequence[Sequence[int]],
    action_starts: Sequence[int] | None = None,
    *,
    past: int = 0,
    device: torch.device | str = "cpu",
) -> TokenTree:
    """Pack sequences into a tree.

    Args:
        sequences: N lists of token ids, each with at least one token.
        action_starts: for each sequence, the position from which on its tokens are actions (at least 1: the first token
            has nothing to be predicted from). The last token of a sequence with actions is only a target and is not
            computed. None: no actions, every token is computed.
        past: the first ``past`` tokens, the same in all sequences, were computed before; they get no rows in
            ``token_ids``, and layout and ``last_rows`` count rows after them as ``past + i`` and ``i``.
        device: of the tensors.

    Raises:
        ValueError: no sequences, an empty one, an action start outside its sequence, or a past that is not shared.
    """
    if not sequences:
        raise ValueError("build_tree: no sequences")
    starts = [len(s) for s in sequences] if action_starts is None else list(action_starts)
    full_lengths = np.array([len(s) for s in sequences])
    if full_lengths.min() == 0:
        raise ValueError(f"build_tree: sequence {int(full_lengths.argmin())} is empty")
    if len(starts) != len(sequences):
        raise ValueError(f"build_tree: {len(starts)} action starts for {len(sequences)} sequences")
    for i, start in enumerate(starts):
        if not 1 <= start <= full_lengths[i]:
            raise ValueError(f"build_tree: action start {start} of sequence {i} is not in 1..{full_lengths[i]}")

    # A target that closes its sequence needs no hidden state of its own.
    lengths = full_lengths - (np.array(starts) < full_lengths)
    tokens = np.full((len(sequences), int(full_lengths.max())), -1, dtype=np.int64)
    for i, ids in enumerate(sequences):
        tokens[i, : len(ids)] = ids
    packed = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)[:, : int(lengths.max())]

    order, shared = _sorted_with_shared_prefixes(packed, lengths)
    new = lengths[order] - shared
    base = np.cumsum(new) - new
    columns = np.arange(packed.shape[1])
    # The owner of column p on sequence i's path is the last sequence up to i that brought new tokens at p.
    owner = np.maximum.accumulate(np.where(columns >= shared[:, None], np.arange(len(order))[:, None], 0), axis=0)
    rows = base[owner] + columns - shared[owner]
    sorted_paths = np.where(columns < lengths[order][:, None], rows, -1)
    paths = np.empty_like(sorted_paths)
    paths[order] = sorted_paths

    distinct = np.flatnonzero(new)
    root = int(shared[1:].min()) if len(order) > 1 else 0
    root = max(root, past)
    if past:
        _check_past(packed, lengths, past)
    token_ids = packed[order][sorted_paths >= 0][_first_owner(sorted_paths, owner)]
    n_q = new[distinct].copy()
    n_q[0] -= past
    segments = sorted_paths[distinct]

    tensor = lambda x, dtype=torch.int64: torch.as_tensor(np.ascontiguousarray(x), dtype=dtype, device=device)  # noqa: E731
    cumulative = lambda n: tensor(np.concatenate([[0], np.cumsum(n)]), torch.int32)  # noqa: E731
    positions = np.empty(int(new.sum()), dtype=np.int64)
    positions[sorted_paths[sorted_paths >= 0]] = np.broadcast_to(columns, sorted_paths.shape)[sorted_paths >= 0]

    path_lengths = lengths[order][distinct]
    layout = TreeLayout(
        cumulative(n_q), cumulative(path_lengths), tensor(segments[segments >= 0]), root, past,
        max_q=int(n_q.max()), max_k=int(path_lengths.max()),
    )  # fmt: skip
    is_action = (np.arange(tokens.shape[1]) >= np.array(starts)[:, None]) & (tokens >= 0)
    sequence, place = np.nonzero(is_action)
    head_rows, action_rows = np.unique(paths[sequence, place - 1], return_inverse=True)
    return TokenTree(
        token_ids=tensor(token_ids[past:]),
        positions=tensor(positions[past:]),
        layout=layout,
        last_rows=tensor(paths[np.arange(len(order)), lengths - 1] - past),
        action_targets=tensor(tokens[sequence, place]),
        action_rows=tensor(action_rows),
        head_rows=tensor(head_rows - past),
        cu_actions=cumulative(is_action.sum(1)),
        padded_tokens=int(full_lengths.max()) * len(sequences),
        paths=paths,
    )


def _sorted_with_shared_prefixes(packed: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order in which sequences are sorted, and how many tokens each shares with the one before it there."""
    keys = (packed + 1).astype(">u4")  # big-endian bytes sort like the numbers; padding (0) sorts first
    raw = [row.tobytes() for row in keys]
    order = np.array(sorted(range(len(raw)), key=raw.__getitem__))
    shared = np.zeros(len(order), dtype=np.int64)
    if len(order) > 1:
        differs = packed[order[1:]] != packed[order[:-1]]
        first = np.where(differs.any(1), differs.argmax(1), packed.shape[1])
        shared[1:] = np.minimum(first, np.minimum(lengths[order[1:]], lengths[order[:-1]]))
    return order, shared


def _first_owner(sorted_paths: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Among the real places of ``sorted_paths``, read row by row, those where the token is new: the packed order."""
    real = sorted_paths >= 0
    return (owner == np.arange(len(owner))[:, None])[real]


def _check_past(packed: np.ndarray, lengths: np.ndarray, past: int) -> None:
    if lengths.min() <= past or (packed[:, :past] != packed[0, :past]).any():
        raise ValueError(f"build_tree: the first {past} tokens are not a proper common prefix of all sequences")


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all sequences begin with."""
    # Where any two sequences differ, the smallest and the largest differ at the same place or before.
    low, high = min(map(list, sequences)), max(map(list, sequences))
    n = 0
    while n < len(low) and n < len(high) and low[n] == high[n]:
        n += 1
    return n


def cut_by_tokens(sizes: Sequence[int], shared: int, budget: int) -> list[list[int]]:
    """Cut groups, in order, into micro-batches of at most ``budget`` tokens of the tree.

    Args:
        sizes: for each group (a prompt with its samples), an upper bound of its tokens besides the shared prefix.
        shared: tokens of the prefix that every micro-batch computes once.
        budget: tokens of a micro-batch; a group over the budget gets a micro-batch of its own.

    Returns:
        Lists of group indices; together every index once, in order.
    """
    batches: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not batches or size > room:
            batches.append([])
            room = budget - shared
        batches[-1].append(i)
        room -= size
    return batches
