"""The most bytes that the attention over a tree has alive at once on a CPU, counted from sizes alone.

This follows the back ends `cpu` (`_attention_cpu`, `_attention_tiles`) and `torch` (`_attention_torch`) step by step: a tensor
is added where they make it and taken away where they let it go. A change of one is a change of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _attention_cpu, _attention_tiles
from ._attention_layout import Bucket, TreeLayout
from ._attention_torch import check_heads
from ._checks import FLOAT_DTYPES, accumulate_dtype, check_integer
from .frozen_linear import row_multiple


class AttentionMemory(NamedTuple):
    """Bytes that an attention takes besides queries, keys, values, its result, the softmax's denominators (a float32 a query
    and head) and the gradients of all these.

    kept: for backward, and there in backward besides. forward, recorded, backward: the most while it runs: of forward where
    nothing is kept, and where what is kept is in it too.
    """

    kept: int = 0
    forward: int = 0
    recorded: int = 0
    backward: int = 0


class Walk:
    """Bytes alive now and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def take(self, *sizes: int) -> None:
        self.now += sum(sizes)
        self.most = max(self.most, self.now)

    def drop(self, *sizes: int) -> None:
        self.now -= sum(sizes)

    def use(self, *sizes: int) -> None:
        """Alive for a moment."""
        self.take(*sizes)
        self.drop(*sizes)


class _Shape(NamedTuple):
    """Of an attention. size: bytes of an entry as it comes, wide: as it is computed with."""

    heads: int
    kv_heads: int
    dim: int
    size: int
    wide: int

    @property
    def queries(self) -> int:
        return self.heads * self.dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.dim

    @property
    def inputs(self) -> int:
        """Entries of queries, keys and values of a token."""
        return self.queries + 2 * self.keys


def attention_memory(
    layout: TreeLayout, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *,
    backend: Literal["cpu", "torch"] = "cpu", threads: int | None = None,
) -> AttentionMemory:  # fmt: skip
    """What `tree_attention` with this layout takes on a CPU, without running it. Nothing is counted of masks, which are made
    once a layout and have a byte for each of the pairs of a query and a key for which scores are made.

    Args:
        layout: a tree on the CPU without a past.
        heads, kv_heads, head_dim, dtype: of queries, of keys and values, and of both.
        backend: that runs; torch where there is a window or a softcap, whose own tensors are not counted.
        threads: of torch; None: as many as it has now.

    Raises:
        ValueError: heads that do not fit each other, a dtype without attention, another back end, or a layout with a past.
    """
    check_heads("attention_memory", heads, kv_heads, head_dim)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}")
    if backend not in ("cpu", "torch"):
        raise ValueError(f"backend must be cpu or torch, got {backend!r}")
    if layout.past:
        raise ValueError(f"layout must have no past, got one of {layout.past} rows")
    if threads is not None:
        check_integer("threads", threads, at_least=1)
    shape = _Shape(heads, kv_heads, head_dim, dtype.itemsize, accumulate_dtype(dtype).itemsize)
    if backend == "torch":
        return _torch(layout, shape)
    return _cpu(layout, shape, dtype, torch.get_num_threads() if threads is None else threads)


# -- the back end cpu -----------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """Of a long segment: queries of all heads, keys that they see, and whether there are padded queries among them."""

    queries: int
    keys: int
    padded: bool


def _tiles(queries: int, above: int, shape: _Shape) -> tuple[int, list[_Tile]]:
    """(keys, tiles) as `_attention_tiles.make_segment` has them, without their masks, which have an entry for each pair."""
    multiple, each = _attention_tiles.MULTIPLE, shape.heads // shape.kv_heads
    count = queries + -queries % multiple
    keys = above + count + -(above + count) % multiple
    step = min(max(_attention_tiles.MOST_SCORES // (each * keys) // multiple * multiple, multiple), count)
    tiles = []
    for start in range(0, queries, step):
        stop = min(start + step, count)
        seen = above + stop + -(above + stop) % multiple
        tiles.append(_Tile(shape.heads * (stop - start), seen, stop > queries))
    return keys, tiles


def _cpu(layout: TreeLayout, shape: _Shape, dtype: torch.dtype, threads: int) -> AttentionMemory:
    tokens, queries, keys = layout.n_queries, shape.wide * shape.queries, shape.wide * shape.keys
    forward, recorded, backward = Walk(), Walk(), Walk()
    kept = converted = 0
    if shape.size < shape.wide:  # float32 copies of what comes and of the result, which backward wants too
        result = tokens * shape.queries
        for walk in (forward, recorded):
            walk.take(tokens * shape.inputs * shape.wide, result * (shape.wide - shape.size))
        # The gradients that are given are made last, of float32 ones.
        converted = tokens * shape.inputs * shape.size
        backward.take((tokens * shape.inputs + result) * shape.wide, tokens * shape.inputs * shape.wide - converted)
        kept += result * shape.wide
    segments, taken = [], set()
    on_tiles = row_multiple(torch.device("cpu"), accumulate_dtype(dtype)) > 1
    for number, own, path in _attention_cpu._segments(layout) if on_tiles else ():
        if _attention_tiles.is_long(len(own), len(path) + len(own), shape.heads, shape.kv_heads, shape.dim):
            segments.append(_tiles(len(own), len(path), shape))
            taken.add(number)
    if segments:
        kept += _long(forward, recorded, backward, segments, tokens, shape)
    before = 0, 0  # what the call before gave is there until this one gives something
    for block in _attention_cpu._blocks(layout, frozenset(taken)):
        n_q, n_k = (rows.numel() if isinstance(rows, Tensor) else rows.stop - rows.start for rows in block[:2])
        # Copies, where no slice will do.
        q, k = (n * isinstance(rows, Tensor) for n, rows in zip((n_q * queries, n_k * keys), block[:2], strict=True))
        results = n_q * (queries + 4 * shape.heads), n_q * queries + 2 * n_k * keys
        real = n_q * queries if block.q_place_M is not None else 0
        inside = threads * _flash_buffer(block, shape)
        for walk in (forward, recorded):
            walk.take(q, 2 * k, results[0])
            walk.use(inside)
            walk.drop(q, 2 * k, before[0])
            walk.use(real, 0 if block.own else q)
        backward.take(q)
        backward.use(q if real else 0, real)
        backward.take(2 * q, 2 * k, results[1])
        backward.use(2 * inside)
        backward.drop(2 * q, 2 * k, before[1])
        backward.use(real)
        backward.drop(q)
        before = results
    backward.use(converted)
    return AttentionMemory(kept, forward.most, recorded.most, backward.most)


def _flash_buffer(block: _attention_cpu.Block, shape: _Shape) -> int:
    """What torch's fused kernel takes for a thread: the scores of some queries and keys."""
    n_q, n_k = (rows.shape[1] if isinstance(rows, Tensor) else rows.stop - rows.start for rows in block[:2])
    some = 256 if n_q >= 768 else 64 if n_q >= 192 else 32
    return shape.wide * min(some, n_q) * (min(512, n_k) + shape.dim)


def _long(
    forward: Walk, recorded: Walk, backward: Walk, segments: Sequence[tuple[int, list[_Tile]]], tokens: int, shape: _Shape
) -> int:
    """Of the segments that oneDNN's products take (`_attention_tiles`). Returns what is kept."""
    row, scaled = shape.wide * shape.dim, shape.wide * tokens * shape.queries
    scores = sum(shape.wide * tile.queries * tile.keys for _, tiles in segments for tile in tiles)
    keeps = scores <= _attention_tiles.KEPT_BYTES
    most = [0, 0]
    recorded.take(scaled)
    for keys, tiles in segments:
        own = keys * shape.kv_heads * row
        for tile in tiles:
            q, values = tile.queries * row, tile.keys * row
            of_head = shape.wide * tile.queries // shape.kv_heads * tile.keys
            beside = 2 * own + 3 * q + of_head
            most[0] = max(most[0], beside + of_head)
            recorded.take(shape.kv_heads * of_head if keeps else 0)
            recorded.use(beside, 0 if keeps else of_head)
            made = of_head if keeps else 2 * of_head
            most[1] = max(most[1], 4 * own + 4 * q + (q if tile.padded else 0) + made + values)
    recorded.drop(scaled)
    forward.use(scaled, most[0])
    backward.use(scaled, max(scaled, most[1]))
    return scores if keeps else 0


# -- the back end torch ---------------------------------------------------------------------------------------------------


def _torch(layout: TreeLayout, shape: _Shape) -> AttentionMemory:
    tokens, root, casts = layout.n_queries, layout.root, shape.size < shape.wide
    forward, backward = Walk(), Walk()
    of_root = 2 * root * shape.keys * shape.wide if casts else 0
    forward.take(of_root)
    backward.take(of_root)
    if casts:  # dK and dV are summed up in float32 and made what they are given as last
        backward.take(2 * tokens * shape.keys * (shape.wide - shape.size))
    pieces = [_Piece(None, 1, root, root, 0, root, shape)] if root else []
    for each in layout.buckets:
        (segments, queries), keys, real = each.q_rows_SQ.shape, each.k_rows_SK.shape[1], each.q_place_M.shape[0]
        pieces.append(_Piece(each, segments, queries, keys, root, real, shape))
    denominators = 0
    for piece in pieces:
        piece.forward(forward)
        denominators += shape.wide * piece.rows
        forward.take(shape.wide * piece.rows)
        piece.backward(backward)
    if casts:
        backward.use(2 * tokens * shape.keys * shape.size)
    return AttentionMemory(denominators - 4 * tokens * shape.heads, forward.most, forward.most, backward.most)


class _Piece:
    """A bucket, or the root's own square where there is none: S segments of Q queries and K keys, behind C of the root."""

    def __init__(self, bucket: Bucket | None, segments: int, queries: int, keys: int, root: int, real: int, shape: _Shape):
        self.shape, self.is_square = shape, bucket is None
        self.rows = segments * queries * shape.heads
        self.q, self.k = (n * shape.dim * shape.wide for n in (self.rows, segments * keys * shape.kv_heads))
        self.real = real * shape.queries
        self.s_own, self.s_root = self.rows * keys * shape.wide, self.rows * root * shape.wide
        self.of_root = root * shape.keys * shape.wide
        self.is_padded = real < segments * queries
        # Heads that share keys become further rows of them, in a copy. Queries of other heads lie token by token, as keys do.
        shared = shape.heads > shape.kv_heads
        self.is_grouped = shared and queries > 1
        # A product over segments and heads copies what lies token by token, one over all segments what does not.
        several = segments > 1 and shape.kv_heads > 1
        by_token = several and not shared and queries > 1
        self.k_copied, self.q_copied, self.q_flat = (n if does else 0 for n, does in (
            (self.k, several), (self.q, by_token), (self.q, several and not by_token),
        ))  # fmt: skip

    def _gather(self, walk: Walk, entries: int, *copies: bool) -> None:
        """Rows of what came, widened, and once more for each of the copies that is made."""
        held = 0 if self.is_square else entries * self.shape.size
        walk.take(held)
        for does in (self.shape.size < self.shape.wide, *copies):
            if does:
                walk.take(entries * self.shape.wide)
                walk.drop(held)
                held = entries * self.shape.wide

    def _inputs(self, walk: Walk) -> None:
        self._gather(walk, self.q // self.shape.wide, self.is_grouped)
        if not self.is_square:  # whose keys are there
            for _ in range(2):
                self._gather(walk, self.k // self.shape.wide)

    def _product(self, walk: Walk, result: int, *copied: int) -> None:
        walk.take(*copied)
        walk.take(result)
        walk.drop(*copied)

    def _scores(self, walk: Walk) -> None:
        if self.s_root:
            self._product(walk, self.s_root, self.q_flat)
        self._product(walk, self.s_own, self.q_copied, self.k_copied)

    def _scatter(self, walk: Walk) -> None:
        """Rows of a result in the order of tokens, the real ones of them, and these as they are given."""
        casts = self.shape.size < self.shape.wide
        walk.use(self.q, self.real * self.shape.wide if self.is_padded else 0, self.real * self.shape.size if casts else 0)

    def forward(self, walk: Walk) -> None:
        before = walk.now
        self._inputs(walk)
        self._scores(walk)
        walk.take(2 * self.rows * self.shape.wide)  # of each row the highest score and the sum
        self._product(walk, self.q, self.k_copied)
        if self.s_root:
            walk.use(self.q)
        walk.drop(self.s_own, self.s_root)
        self._scatter(walk)
        walk.drop(walk.now - before)

    def backward(self, walk: Walk) -> None:
        before = walk.now
        self._inputs(walk)
        self._scores(walk)  # probabilities take their place
        entries = self.q // self.shape.wide
        self._gather(walk, entries, self.is_padded, self.is_grouped)  # of the result's gradient
        kept = walk.now
        self._gather(walk, entries, self.is_padded, self.is_grouped)  # of the result
        walk.use(self.q)
        walk.drop(walk.now - kept)
        walk.take(self.rows * self.shape.wide)
        self._product(walk, self.s_own, self.q_copied, self.k_copied)
        if self.s_root:
            self._product(walk, self.s_root, self.q_flat)
        self._product(walk, self.q, self.k_copied)  # dQ
        if self.s_root:
            walk.use(self.q)
        self._scatter(walk)
        # dK and dV of the piece's own keys, the first of which stays, and both token by token.
        in_order = 0 if self.is_square else self.k
        self._product(walk, self.k, self.q_copied)
        walk.use(in_order)
        walk.use(self.k, max(self.q_copied, in_order))
        if self.s_root:
            walk.use(2 * self.q_flat, self.of_root)
        walk.drop(walk.now - before)
