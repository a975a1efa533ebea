"""Trees padded to a few shapes: what has fixed shapes can be captured once, and is run again on other trees.

Padding is a tree of its own beside the real one. Its segments, rows and actions come behind the real ones, attend to nothing
but themselves and are read by no real action; actions of padding are masked. So real numbers are those without padding, and
padding adds exactly 0 to every gradient and metric.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastppo.batch.token_tree import TokenTree
from fastppo_kernels.attention import TreeLayout

FINEST = 64  # tokens, rows, actions and keys are a multiple of that; segments of a quarter: empty ones cost next to nothing
# Queries and keys that a segment has at most: attention goes through them in blocks, and a bound costs blocks without work.
FEWEST_BOUND = 128


class Shape(NamedTuple):
    """Sizes of a tree's arrays: tokens, head rows, actions, segments, entries of ``kv_index``; the layout's two bounds."""

    tokens: int
    rows: int
    actions: int
    segments: int
    keys: int
    max_q: int
    max_k: int

    @staticmethod
    def of(tree: TokenTree) -> Shape:
        layout = tree.layout
        return Shape(
            tree.n_tokens, tree.head_rows.shape[0], tree.n_actions, layout.cu_q.shape[0] - 1, layout.kv_index.shape[0],
            *layout.bounds,
        )  # fmt: skip


class Padded(NamedTuple):
    """A tree with its padding. mask: [A] bool, the actions that are real. What is there of each sequence (``last_rows``,
    ``cu_actions``, ``paths``) is of the real ones alone."""

    tree: TokenTree
    mask: Tensor


def step_up(n: int, finest: int) -> int:
    """The smallest of eight steps an octave (8 2^k, 9 2^k, .. 15 2^k), a multiple of ``finest``, that is at least ``n``.

    From ``8 * finest`` on less than an eighth is wasted.
    """
    step = max(finest, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // step) * step


def _bound(n: int) -> int:
    return max(FEWEST_BOUND, 1 << (n - 1).bit_length())


def _bucket(real: Shape) -> tuple[Shape, int]:
    """(the shape for a tree of this shape, how many segments the padding's tokens are divided among).

    It follows from the tree alone, not from those before it: a run that is resumed computes in the same shapes.
    """
    max_q, max_k = _bound(real.max_q), _bound(real.max_k)
    tokens, used = real.tokens, 1
    while tokens - real.tokens < used:  # each of these segments has a query: what nobody asks for has no gradient, not even 0
        tokens = step_up(real.tokens + used, FINEST)
        extra = tokens - real.tokens
        keys = step_up(real.keys + extra, FINEST)
        used = max(-(-extra // max_q), -(-(keys - real.keys) // max_k))
    rows, actions = step_up(real.rows + 1, FINEST), step_up(real.actions, FINEST)
    return Shape(tokens, rows, actions, step_up(real.segments + used, FINEST // 4), keys, max_q, max_k), used


def padded_tokens(tokens: int) -> int:
    """About as many tokens as a tree of so many has with its padding."""
    return step_up(tokens + 1, FINEST)


def pad_tree(tree: TokenTree) -> Padded:
    """The tree in the shape of its bucket. The layout's root is not told, for padding does not begin with it: attention by a
    library does not ask for it.

    Raises:
        ValueError: a tree with tokens computed before (``past``).
    """
    layout, device = tree.layout, tree.token_ids.device
    if layout.past:
        raise ValueError(f"pad_tree: a tree with a past of {layout.past} tokens cannot be padded")
    real = Shape.of(tree)
    shape, used = _bucket(real)
    tokens, rows, actions, segments, keys = (to - of for to, of in zip(shape[:5], real[:5], strict=True))

    def ends(total: int, start: int) -> np.ndarray:
        """Where each of the padding's segments ends: the first ``used`` share ``total`` evenly, the others are empty."""
        n = np.minimum(np.arange(1, segments + 1), used)
        return start + n * (total // used) + np.minimum(n, total % used)

    own_end, path_end = ends(tokens, real.tokens), ends(keys, 0)
    # A path ends with the segment's own tokens. Before them stands any of the padding, not always the same: its gradients are
    # added up one by one.
    place = np.arange(keys)
    segment = np.searchsorted(path_end, place, side="right")
    own = own_end[segment] - (path_end[segment] - place)
    begin = np.concatenate([[real.tokens], own_end])[segment]
    kv_index = np.where(own >= begin, own, real.tokens + place % tokens)

    def joined(x: Tensor, more: np.ndarray) -> Tensor:
        return torch.cat([x, torch.as_tensor(more, dtype=x.dtype, device=device)])

    whole = TreeLayout(
        joined(layout.cu_q, own_end), joined(layout.cu_k, real.keys + path_end), joined(layout.kv_index, kv_index),
        max_q=shape.max_q, max_k=shape.max_k,
    )  # fmt: skip
    padded = replace(
        tree,
        token_ids=pad(tree.token_ids, (0, tokens)),
        positions=pad(tree.positions, (0, tokens)),
        layout=whole,
        action_targets=pad(tree.action_targets, (0, actions)),
        # First those of the padding, then any: each row's actions are gone through one by one.
        action_rows=joined(tree.action_rows, (real.rows + np.arange(actions)) % shape.rows),
        head_rows=joined(tree.head_rows, real.tokens + np.arange(rows) % tokens),
    )
    return Padded(padded, torch.arange(shape.actions, device=device) < real.actions)
