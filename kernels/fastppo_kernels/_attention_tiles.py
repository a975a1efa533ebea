"""Attention of long segments on a CPU by oneDNN's products: one pair of products for each tile of queries and key head.

    P = softmax(scale Q K^T)    O = P V    dV^T = dO^T P    dS = P * (dO V^T - rowsum(dO * O))    dQ = dS K    dK^T = Q^T dS

(Dao et al. 2022, FlashAttention, arXiv 2205.14135, appendix B.2). The keys of a segment's whole path are gathered once. oneDNN
uses AVX-512 on every CPU that has it and makes code for each shape, so queries and keys are padded to multiples of 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._gather import add_rows_
from .frozen_linear import onednn_linear

MULTIPLE = 64
FEWEST_WORK = 1 << 22  # multiplications of a product from which on it is worth a call of its own
MOST_SCORES = 1 << 18  # of a tile, which passes through the caches several times
KEPT_BYTES = 8 << 20  # of probabilities that a call may keep for backward, as much as a layer of a small model keeps in all


class Tile(NamedTuple):
    """Queries start to stop of a segment, padded; the first ``keys`` of its keys are those that they see.

    rows [Hkv * G * Q]: theirs of [T * H, D], in the order key heads, queries' heads of each, queries; padded ones hold a row
    again. real: places of those that are not padded, None for all. mask [Q, keys]: added to the scores.
    """

    rows: Tensor
    real: Tensor | None
    keys: int
    mask: Tensor

    def queries(self, x: Tensor, heads: int) -> Tensor:
        """[T * H, D] -> [Hkv, G * Q, D]"""
        return x.index_select(0, self.rows).view(heads, -1, x.shape[1])

    def put(self, total: Tensor, part: Tensor) -> None:
        part = part.flatten(0, 1)
        if self.real is None:
            total.index_copy_(0, self.rows, part)
        else:
            total.index_copy_(0, self.rows[self.real], part.index_select(0, self.real))


class Segment(NamedTuple):
    """k_rows [Hkv, K]: rows of [T * Hkv, D] of the path's keys, padded ones too, which no real query sees."""

    k_rows: Tensor
    tiles: list[Tile]


def is_long(queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> bool:
    return queries > MULTIPLE and heads // kv_heads * queries * keys * dim >= FEWEST_WORK


def make_segment(queries: range, path: Tensor, past: int, heads: int, kv_heads: int) -> Segment:
    """path: rows of the keys above the queries' own."""
    above, count, each = len(path), len(queries), heads // kv_heads
    keys = _up(above + _up(count))
    own = torch.arange(past + queries.start, past + queries.stop)
    k_rows = torch.cat([path, own, own[:1].expand(keys - above - count)])
    step = min(max(MOST_SCORES // (each * keys) // MULTIPLE * MULTIPLE, MULTIPLE), _up(count))
    head = torch.arange(heads).view(kv_heads, each, 1)
    tiles = []
    for start in range(0, count, step):
        place = torch.arange(start, min(start + step, _up(count)))
        seen = _up(above + int(place[-1]) + 1)
        is_real = (place < count).expand(kv_heads, each, -1).flatten()
        rows = (queries.start + place.where(place < count, start)) * heads + head
        hide = torch.arange(seen) > above + place[:, None]
        mask = torch.zeros(hide.shape).masked_fill_(hide, -math.inf)
        tiles.append(Tile(rows.flatten(), None if is_real.all() else is_real.nonzero()[:, 0], seen, mask))
    return Segment(k_rows * kv_heads + torch.arange(kv_heads)[:, None], tiles)


def _up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[G * Q, keys] of scaled queries [G * Q, D]."""
    scores = onednn_linear(q, k)
    scores.view(-1, *mask.shape).add_(mask)
    return torch.softmax(scores, -1)


def keeps(segments: Sequence[Segment], itemsize: int) -> bool:
    """Whether the probabilities of all tiles are few enough."""
    return sum(len(tile.rows) * tile.keys for each in segments for tile in each.tiles) * itemsize <= KEPT_BYTES


def forward(segments: Sequence[Segment], q: Tensor, k: Tensor, v: Tensor, out: Tensor, keep: bool) -> list[Tensor]:
    """Fill the segments' rows of out [T * H, D] from scaled q [T * H, D] and k, v [T * Hkv, D]; probabilities if to be kept."""
    kept: list[Tensor] = []
    for k_rows, tiles in segments:
        k_part, v_part = (x.index_select(0, k_rows.flatten()).view(*k_rows.shape, -1) for x in (k, v))
        for tile in tiles:
            parts = []
            for q_head, k_head, v_head in zip(tile.queries(q, len(k_rows)), k_part, v_part, strict=True):
                p = _probabilities(q_head, k_head[: tile.keys], tile.mask)
                parts.append(onednn_linear(p, v_head[: tile.keys].t()))
                if keep:
                    kept.append(p)
                del p  # before the next is made
            tile.put(out, torch.stack(parts))
    return kept


def backward(
    segments: Sequence[Segment],
    kept: Iterator[Tensor],
    d_out: Tensor,
    mean: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    totals: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Fill dQ and add to dK and dV, all flat as in `forward`. mean [T * H, 1]: sums of d_out * out over each row."""
    dq, dk, dv = totals
    for k_rows, tiles in segments:
        k_part, v_part = (x.index_select(0, k_rows.flatten()).view(*k_rows.shape, -1) for x in (k, v))
        dk_part, dv_part = (x.new_zeros(len(k_rows), x.shape[2], x.shape[1]) for x in (k_part, v_part))
        for tile in tiles:
            do_tile, mean_tile, q_tile = (tile.queries(x, len(k_rows)) for x in (d_out, mean, q))
            if tile.real is not None:  # a padded query has no gradient
                is_real = torch.zeros(len(tile.rows), 1, dtype=d_out.dtype).index_fill_(0, tile.real, 1.0).view(mean_tile.shape)
                do_tile, mean_tile = do_tile * is_real, mean_tile * is_real
            parts = []
            for i, (q_head, do, total) in enumerate(zip(q_tile, do_tile, mean_tile, strict=True)):
                k_head, v_head = k_part[i, : tile.keys], v_part[i, : tile.keys]
                p = next(kept, None)
                if p is None:
                    p = _probabilities(q_head, k_head, tile.mask)
                dv_part[i, :, : tile.keys] += onednn_linear(do.t().contiguous(), p.t())
                ds = onednn_linear(do, v_head).sub_(total).mul_(p)
                dk_part[i, :, : tile.keys] += onednn_linear(q_head.t().contiguous(), ds.t())
                parts.append(onednn_linear(ds, k_head.t()))
                del p, ds  # before the next are made
            tile.put(dq, torch.stack(parts).mul_(scale))
        for total, part in ((dk, dk_part), (dv, dv_part)):
            add_rows_(total, k_rows.flatten(), part.transpose(1, 2).flatten(0, 1))
