"""Who attends to whom in a packed tree, and what every attention back end needs to know of it: made once per tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ._checks import check_device, check_index, check_integer, check_range
from ._gather import Occurrences, occurrences

T = TypeVar("T")

# Scores of one gathered bucket stay below this many elements a head, so that memory is bounded unless one path is long.
_MAX_BUCKET_SCORES = 1 << 22


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to a rectangle. Rows are rows of the packed arrays.

    q_rows_SQ, k_rows_SK: int64; padded places hold row 0 and are masked. k_rows_SK leaves the root out.
    q_pos_SQ, k_pos_SK: depth in the tree, padded keys have a depth that no query reaches.
    q_place_M: flat places (of S*Q) that hold a real query, and q_real_M the rows they hold.
    """

    q_rows_SQ: Tensor
    k_rows_SK: Tensor
    q_pos_SQ: Tensor
    k_pos_SK: Tensor
    q_place_M: Tensor
    q_real_M: Tensor

    @cached_property
    def real_SQ11(self) -> Tensor | None:
        """1.0 where a place holds a real query, 0.0 where it is padding; None where all do."""
        if self.q_place_M.shape[0] == self.q_rows_SQ.numel():
            return None
        real = torch.zeros(self.q_rows_SQ.numel(), device=self.q_rows_SQ.device)
        real[self.q_place_M] = 1
        return real.view(*self.q_rows_SQ.shape, 1, 1)


# Identity is what the caches below and torch.compile's guards need: equal-looking trees are different trees.
@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Who attends to whom in a packed tree.

    cu_q: int32 or int64 [S + 1], cumulative numbers of query rows of the segments; segments cover the rows in order.
    cu_k: like cu_q, cumulative path lengths. kv_index: int64 [cu_k[-1]], rows of each segment's root path.
    root: number of rows (0, 1, ..., root - 1) with which every path begins.
    past: rows at the front of K and V that have no query here (a prefix computed before); query row ``i`` is row
        ``past + i`` of K and V. Then ``root >= past`` and ``kv_index`` counts the rows of K and V.
    max_q, max_k: most queries of a segment and longest path, or more; None: looked up when first needed, which on a GPU
        waits for it, once, and which torch.compile cannot trace.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit. Values of the tensors are looked at when the layout is
            first used, on the CPU alone.
    """

    cu_q: Tensor
    cu_k: Tensor
    kv_index: Tensor
    root: int = 0
    past: int = 0
    max_q: int | None = None
    max_k: int | None = None
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_tree(self.cu_q, self.cu_k, self.kv_index, self.root, self.past, self.max_q, self.max_k)
        _LAYOUTS[id(self.kv_index)] = self

    @cached_property
    def n_queries(self) -> int:
        return self.host_lists[0][-1]

    @cached_property
    def host_lists(self) -> tuple[list[int], list[int]]:
        """(cu_q, cu_k) as numbers."""
        return self.cu_q.tolist(), self.cu_k.tolist()

    @property
    def bounds(self) -> tuple[int, int]:
        """(max_q, max_k)."""
        if self.max_q is not None and self.max_k is not None:
            return self.max_q, self.max_k
        return self._looked_up_bounds

    @cached_property
    def _looked_up_bounds(self) -> tuple[int, int]:
        longest = [max((b - a for a, b in zip(cu, cu[1:], strict=False)), default=0) for cu in self.host_lists]
        return longest[0], longest[1]

    def occurrences(self, rows: int) -> Occurrences:
        """Where in ``kv_index`` each row of K and V occurs, of ``rows`` = past + T: what the backward sums over."""
        return self.keep("occurrences", lambda: occurrences(self.kv_index, rows))

    def keep(self, what: str, make: Callable[[], T]) -> T:
        """Something that is made of the tree once, for all layers."""
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments without their root part, grouped so that little is padded; made once per tree, used by every layer."""
        cu_q, cu_k = self.host_lists
        own_root = self.root - self.past  # root rows that are queries here; they belong to segment 0
        segments = []
        for s in range(len(cu_q) - 1):
            start, stop = cu_q[s], cu_q[s + 1]
            start = max(start, own_root) if s == 0 else start
            if stop > start:
                segments.append((stop - start, cu_k[s + 1] - cu_k[s] - self.root, start, cu_k[s] + self.root))
        segments.sort(key=lambda seg: (seg[0], seg[1]))
        groups: list[list[tuple[int, int, int, int]]] = []
        most_k = 0  # longest path in the newest group; its queries are sorted, so the segment at hand has the most
        for seg in segments:
            most_k = max(most_k, seg[1])
            # Little padding is worth fewer, larger products; memory stays bounded.
            if (
                groups
                and seg[0] <= 2 * groups[-1][0][0] + 4
                and (len(groups[-1]) + 1) * seg[0] * (self.root + most_k) <= _MAX_BUCKET_SCORES
            ):
                groups[-1].append(seg)
            else:
                groups.append([seg])
                most_k = seg[1]
        return [self._bucket(group) for group in groups]

    def _bucket(self, group: list[tuple[int, int, int, int]]) -> Bucket:
        device = self.kv_index.device
        n_q, n_k, q_start, k_start = (torch.tensor(column, device=device) for column in zip(*group, strict=True))
        q_S1, k_S1 = n_q[:, None], n_k[:, None]
        q_step = torch.arange(max(seg[0] for seg in group), device=device)[None]
        k_step = torch.arange(max(seg[1] for seg in group), device=device)[None]
        q_valid, k_valid = q_step < q_S1, k_step < k_S1
        q_rows = torch.where(q_valid, q_start[:, None] + q_step, 0)
        k_rows = torch.where(k_valid, self.kv_index[torch.where(k_valid, k_start[:, None] + k_step, 0)], 0)
        q_pos = torch.where(q_valid, self.root + k_S1 - q_S1 + q_step, self.root)
        k_pos = torch.where(k_valid, self.root + k_step, torch.iinfo(torch.int32).max)
        place = q_valid.flatten().nonzero()[:, 0]
        return Bucket(q_rows, k_rows, q_pos, k_pos, place, q_rows.flatten()[place])


_LAYOUTS: WeakValueDictionary[int, TreeLayout] = WeakValueDictionary()


def layout_of(cu_q: Tensor, cu_k: Tensor, kv_index: Tensor, root: int, past: int) -> TreeLayout:
    """The layout that was made of these very tensors, with what is cached in it, or a new one.

    Operators take tensors and numbers only; this is how they find again what was prepared once for all layers.
    """
    known = _LAYOUTS.get(id(kv_index))
    if known is not None and known.kv_index is kv_index and known.cu_q is cu_q and known.cu_k is cu_k:
        if (known.root, known.past) == (root, past):
            return known
    return TreeLayout(cu_q, cu_k, kv_index, root, past)


def hidden(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """True where a query at depth q_pos [..., Q] does not see the key at depth k_pos [..., K]."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    unseen = distance < 0
    return unseen if window is None else unseen | (distance >= window)


def check_tree(
    cu_q: Tensor, cu_k: Tensor, kv_index: Tensor, root: int, past: int, max_q: int | None, max_k: int | None
) -> None:  # fmt: skip
    """Raise unless shapes, dtypes, devices and numbers fit each other."""
    check_index("kv_index", kv_index, (torch.int64,))
    if kv_index.ndim != 1:
        raise ValueError(f"kv_index must have shape [N], got {list(kv_index.shape)}")
    for name, x in (("cu_q", cu_q), ("cu_k", cu_k)):
        check_index(name, x)
        if x.ndim != 1 or x.shape[0] == 0 or x.shape != cu_q.shape:
            raise ValueError(f"{name} must have shape [S + 1], the same for cu_q and cu_k, got {list(x.shape)}")
        check_device(name, x, "kv_index", kv_index)
    check_integer("past", past, at_least=0)
    check_integer("root", root, at_least=0)
    for name, bound in (("max_q", max_q), ("max_k", max_k)):
        if bound is not None:
            check_integer(name, bound, at_least=0)


def check_values(layout: TreeLayout, queries: int) -> None:
    """Raise unless the tensors hold a tree of ``queries`` rows. For the CPU: elsewhere it would wait for the device."""
    root, past, rows = layout.root, layout.past, layout.kv_index.tolist()
    cu_q, cu_k = layout.host_lists
    for name, cu, end in (("cu_q", cu_q, queries), ("cu_k", cu_k, len(rows))):
        if cu[0] != 0 or cu[-1] != end or cu != sorted(cu):
            raise ValueError(f"{name} must go up from 0 to {end}, got {cu if len(cu) < 9 else 'other values'}")
    check_range("kv_index", layout.kv_index, past + queries, "rows of k")
    root_rows = list(range(root))
    for s in range(len(cu_q) - 1):
        own_rows, path = list(range(past + cu_q[s], past + cu_q[s + 1])), rows[cu_k[s] : cu_k[s + 1]]
        if len(path) < len(own_rows):
            raise ValueError(f"cu_k: a segment has a root path shorter than its queries, {len(path)} < {len(own_rows)}")
        if path[len(path) - len(own_rows) :] != own_rows:
            raise ValueError(f"kv_index: the path of segment {s} must end with its own rows {own_rows[0]} to {own_rows[-1]}")
        if path[:root] != root_rows:
            raise ValueError(f"root: not every root path begins with the rows 0 to {root - 1}")
    if len(cu_q) > 1 and root - past > cu_q[1]:
        raise ValueError(f"root: its rows belong to the first segment, which has {cu_q[1]} queries")
    for name, bound, cu in (("max_q", layout.max_q, cu_q), ("max_k", layout.max_k, cu_k)):
        longest = max((b - a for a, b in zip(cu, cu[1:], strict=False)), default=0) if bound is not None else 0
        if bound is not None and bound < longest:
            raise ValueError(f"{name} must be at least {longest}, the most of a segment, got {bound}")
