"""Attention over a tree of shared prefixes: every token is stored once and attends to its own root path.

A packed tree is a list of *segments*. Segment ``s`` owns the query rows ``cu_q[s]:cu_q[s + 1]`` and attends to the rows
``kv_index[cu_k[s]:cu_k[s + 1]]``, its whole root path, which ends with its own rows. Aligned at the bottom right, causal
attention over (queries, keys) of each segment is exact attention of the padded batch, token for token.

This file is the torch form. Two things keep it quick where the same tokens are everyone's prefix: keys of the *root* (the
rows that start every segment's path, typically the instruction text) are multiplied once for all queries and never
gathered, and only the short rest of each path is gathered, again in backward rather than saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of one gathered bucket stay below this many elements a head, so that memory is bounded unless one path is long.
_MAX_BUCKET_SCORES = 1 << 22


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to a rectangle. Rows are rows of the packed arrays.

    q_rows_SQ, k_rows_SK: int64; padded places hold row 0 and are masked. k_rows_SK leaves the root out.
    q_valid_SQ: bool. q_pos_SQ, k_pos_SK: depth in the tree, padded keys have a depth that no query reaches.
    q_place_M: flat places (of S*Q) that hold a real query, and q_real_M the rows they hold.
    """

    q_rows_SQ: Tensor
    k_rows_SK: Tensor
    q_pos_SQ: Tensor
    k_pos_SK: Tensor
    q_place_M: Tensor
    q_real_M: Tensor


@dataclass(frozen=True)
class TreeLayout:
    """Who attends to whom in a packed tree.

    cu_q: int32 [S + 1], cumulative numbers of query rows of the segments; segments cover the rows in order.
    cu_k: int32 [S + 1], cumulative path lengths. kv_index: int64 [cu_k[-1]], rows of each segment's root path.
    root: number of rows (0, 1, ..., root - 1) with which every path begins.
    past: rows at the front of K and V that have no query here (a prefix computed before); query row ``i`` is row
        ``past + i`` of K and V. Then ``root >= past`` and ``kv_index`` counts the rows of K and V.
    """

    cu_q: Tensor
    cu_k: Tensor
    kv_index: Tensor
    root: int = 0
    past: int = 0

    @cached_property
    def n_queries(self) -> int:
        return int(self.cu_q[-1])

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments without their root part, grouped so that little is padded; made once per tree, used by every layer."""
        cu_q, cu_k = self.cu_q.tolist(), self.cu_k.tolist()
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
        q_step = torch.arange(int(n_q.max()), device=device)[None]
        k_step = torch.arange(int(n_k.max()), device=device)[None]
        q_valid, k_valid = q_step < q_S1, k_step < k_S1
        q_rows = torch.where(q_valid, q_start[:, None] + q_step, 0)
        k_rows = torch.where(k_valid, self.kv_index[torch.where(k_valid, k_start[:, None] + k_step, 0)], 0)
        q_pos = torch.where(q_valid, self.root + k_S1 - q_S1 + q_step, self.root)
        k_pos = torch.where(k_valid, self.root + k_step, torch.iinfo(torch.int32).max)
        place = q_valid.flatten().nonzero()[:, 0]
        return Bucket(q_rows, k_rows, q_pos, k_pos, place, q_rows.flatten()[place])


def root_and_own_attention(
    q: Tensor,
    k_root: Tensor,
    v_root: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    hide_root: Tensor | None,
    hide_own: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One softmax over keys that all segments share and keys of each segment's own.

    q [S, Hkv, G*Q, D]; k_root, v_root [Hkv, C, D]; k_own, v_own [S, Hkv, K, D]; hide_* boolean, True where a key is not
    seen, broadcastable to the scores. Returns out [S, Hkv, G*Q, D] and the log of the softmax's denominator [S, Hkv, G*Q, 1],
    in the dtype of ``q`` (the callers pass fp32). Every query sees at least one key of its own.
    """
    s_root, s_own = _scores(q, k_root, k_own, hide_root, hide_own, scale, softcap)
    top = s_own.amax(-1, keepdim=True)
    if k_root.shape[1]:
        top = torch.maximum(top, s_root.amax(-1, keepdim=True))
    p_own = s_own.sub_(top).exp_()
    total, out = p_own.sum(-1, keepdim=True), p_own @ v_own
    if k_root.shape[1]:
        p_root = s_root.sub_(top).exp_()
        total += p_root.sum(-1, keepdim=True)
        out += _by_root(p_root, v_root)
    return out.div_(total), top + total.log()


def _scores(
    q: Tensor,
    k_root: Tensor,
    k_own: Tensor,
    hide_root: Tensor | None,
    hide_own: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    s_root = _by_root(q, k_root.transpose(1, 2)).mul_(scale)
    s_own = (q @ k_own.transpose(2, 3)).mul_(scale)
    if softcap is not None:
        s_root, s_own = (torch.tanh(s / softcap).mul_(softcap) for s in (s_root, s_own))
    if hide_root is not None:
        s_root.masked_fill_(hide_root, -torch.inf)
    return s_root, s_own.masked_fill_(hide_own, -torch.inf)


def _by_root(x: Tensor, y: Tensor) -> Tensor:
    """x [S, Hkv, M, A] times y [Hkv, A, B] -> [S, Hkv, M, B], as one product a head over all segments."""
    n, heads, rows, _ = x.shape
    flat = x.transpose(0, 1).reshape(heads, n * rows, x.shape[3])
    return (flat @ y).view(heads, n, rows, y.shape[2]).transpose(0, 1)


def _group_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[S, Q, H, D] -> [S, Hkv, G*Q, D]: the G query heads that share a key head become further rows of it."""
    n, length, heads, dim = x.shape
    grouped = x.view(n, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return grouped.reshape(n, kv_heads, heads // kv_heads * length, dim)


def _ungroup_heads(x: Tensor, heads: int) -> Tensor:
    """[S, Hkv, G*Q, D] -> [S*Q, H, D]."""
    n, kv_heads, rows, dim = x.shape
    group = heads // kv_heads
    return x.view(n, kv_heads, group, rows // group, dim).permute(0, 3, 1, 2, 4).reshape(-1, heads, dim)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: TreeLayout, scale: float, window: int | None, softcap: float | None):
        ctx.layout, ctx.scale, ctx.window, ctx.softcap = layout, scale, window, softcap
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        stored = []
        for work in _pieces(q, k, v, layout, window):
            o, lse = root_and_own_attention(
                work.q, work.k_root, work.v_root, work.k_own, work.v_own, work.hide_root, work.hide_own, scale, softcap
            )
            work.scatter(out, _ungroup_heads(o, q.shape[1]))
            stored.append(lse)
        ctx.save_for_backward(q, k, v, out, *stored)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, *stored = ctx.saved_tensors
        layout, scale, softcap = ctx.layout, ctx.scale, ctx.softcap
        heads, kv_heads, root = q.shape[1], k.shape[1], layout.root
        dq = q.new_zeros(q.shape)
        # fp32 sums: a prefix row gathers the gradient of every segment below it.
        dk, dv = (torch.zeros(x.shape, dtype=_work_dtype(x), device=x.device) for x in (k, v))
        for work, lse in zip(_pieces(q, k, v, layout, ctx.window), stored, strict=True):
            s_root, s_own = _scores(work.q, work.k_root, work.k_own, work.hide_root, work.hide_own, scale, softcap)
            p_root, p_own = (s_root - lse).exp_(), (s_own - lse).exp_()
            do = _group_heads(work.gather(d_out), kv_heads)
            delta = (do * _group_heads(work.gather(out), kv_heads)).sum(-1, keepdim=True)
            ds_own = (do @ work.v_own.transpose(2, 3)).sub_(delta).mul_(p_own)
            ds_root = _by_root(do, work.v_root.transpose(1, 2)).sub_(delta).mul_(p_root)
            if softcap is not None:
                for ds, s in ((ds_root, s_root), (ds_own, s_own)):
                    ds.mul_(1 - (s.masked_fill(s == -torch.inf, 0.0) / softcap).square())
            dq_piece = ds_own @ work.k_own
            if work.k_root.shape[1]:
                dq_piece += _by_root(ds_root, work.k_root)
            work.scatter(dq, _ungroup_heads(dq_piece.mul_(scale), heads))
            dk_own = (ds_own.transpose(2, 3) @ work.q).mul_(scale)
            work.add_own(dk, dk_own)
            work.add_own(dv, p_own.transpose(2, 3) @ do)
            if work.k_root.shape[1]:
                q_flat, do_flat = (x.transpose(0, 1).flatten(1, 2) for x in (work.q, do))
                dk[:root] += (
                    (ds_root.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ q_flat).mul_(scale).transpose(0, 1)
                )
                dv[:root] += (p_root.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ do_flat).transpose(0, 1)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


@dataclass
class _Piece:
    """One bucket's tensors in the working dtype, or the root's own causal square when ``bucket`` is None."""

    bucket: Bucket | None
    root_slice: slice
    q: Tensor
    k_root: Tensor
    v_root: Tensor
    k_own: Tensor
    v_own: Tensor
    hide_root: Tensor | None
    hide_own: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Rows of a [T, H, D] tensor in the piece's [S, Q, H, D] order."""
        rows = x[self.root_slice][None] if self.bucket is None else x[self.bucket.q_rows_SQ]
        rows = rows.to(_work_dtype(x))
        if self.bucket is not None and self.bucket.q_place_M.shape[0] < self.bucket.q_rows_SQ.numel():
            # Padded places hold row 0: without this they would add its gradient to the keys.
            keep = torch.zeros(self.bucket.q_rows_SQ.numel(), 1, 1, dtype=rows.dtype, device=x.device)
            keep[self.bucket.q_place_M] = 1
            rows = rows * keep.view(*self.bucket.q_rows_SQ.shape, 1, 1)
        return rows

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        if self.bucket is None:
            x[self.root_slice] = rows.to(x.dtype)
        else:
            x[self.bucket.q_real_M] = rows[self.bucket.q_place_M].to(x.dtype)

    def add_own(self, x: Tensor, rows_SHKD: Tensor) -> None:
        if self.bucket is None:
            x[: rows_SHKD.shape[2]] += rows_SHKD[0].transpose(0, 1)
        else:  # padded keys carry probability 0, so what they add to row 0 is 0
            x.index_add_(0, self.bucket.k_rows_SK.flatten(), rows_SHKD.transpose(1, 2).reshape(-1, *x.shape[1:]))


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pieces(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int | None):
    kv_heads, group, root, past = k.shape[1], q.shape[1] // k.shape[1], layout.root, layout.past
    work = _work_dtype(q)
    no_k, no_v = (torch.zeros(kv_heads, 0, x.shape[2], dtype=work, device=q.device) for x in (k, v))
    k_root, v_root = (x[:root].to(work).transpose(0, 1) for x in (k, v))
    if root > past:  # the root rows themselves, attending to each other
        k_pos = torch.arange(root, device=q.device)
        hide = _hidden(k_pos[past:], k_pos, window)[None, None].repeat(1, 1, group, 1)
        rows = slice(0, root - past)
        q_root = _group_heads(q[None, rows].to(work), kv_heads)
        yield _Piece(None, rows, q_root, no_k, no_v, k_root[None], v_root[None], None, hide)
    for bucket in layout.buckets:
        q_piece = _group_heads(q[bucket.q_rows_SQ].to(work), kv_heads)
        k_own, v_own = (x[bucket.k_rows_SK].to(work).transpose(1, 2) for x in (k, v))
        hide_own = _hidden(bucket.q_pos_SQ, bucket.k_pos_SK, window)[:, None].repeat(1, 1, group, 1)
        hide_root = None
        if window is not None and root:
            k_pos = torch.arange(root, device=q.device)[None]
            hide_root = _hidden(bucket.q_pos_SQ, k_pos, window)[:, None].repeat(1, 1, group, 1)
        yield _Piece(bucket, slice(0), q_piece, k_root, v_root, k_own, v_own, hide_root, hide_own)


def _hidden(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """True where a query at depth q_pos [..., Q] does not see the key at depth k_pos [..., K]."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of every token of a packed tree to its root path.

    Args:
        q: [T, H, D], any float dtype; scores and sums are fp32 (fp64 for fp64).
        k, v: [past + T, Hkv, D] and [past + T, Hkv, Dv], H a multiple of Hkv (grouped query heads).
        layout: the tree's ``TreeLayout``.
        scale: of the scores; D ** -0.5 when None.
        window: a query sees the last ``window`` tokens of its path, itself included (sliding window); None: all.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [T, H, Dv] in q's dtype; differentiable in q, k and v.

    Raises:
        ValueError: shapes that do not fit each other or the layout.
    """
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"attention: q, k, v must be [tokens, heads, dim], got {_shapes(q, k, v)}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: k and v need equal tokens and heads, q and k equal dim, got {_shapes(q, k, v)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if k.shape[0] != q.shape[0] + layout.past:
        raise ValueError(f"attention: {k.shape[0]} keys for {q.shape[0]} queries and a past of {layout.past} rows")
    if q.shape[0] != layout.n_queries:
        raise ValueError(f"attention: {q.shape[0]} queries for a layout of {layout.n_queries} rows")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _TreeAttention.apply(q, k, v, layout, scale, window, softcap)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def decode_attention(
    q: Tensor,
    k_root: Tensor,
    v_root: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new token per sequence attends to a prefix that all sequences share and to its own cached tokens.

    Args:
        q: [B, H, D].
        k_root, v_root: [C, Hkv, D], the shared prefix, C may be 0.
        k_own, v_own: [B, Hkv, K, D], the cache; places from ``lengths`` on are ignored.
        lengths: [B] int64, filled places of each sequence's own cache, the new token included (at least 1).
        scale, window, softcap: as in ``attention``.

    Returns:
        [B, H, Dv] in q's dtype. Not differentiable in place of ``attention``: meant for sampling.
    """
    root, work = k_root.shape[0], _work_dtype(q)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    q_pos = root + lengths[:, None] - 1
    hide_own = _hidden(q_pos, root + torch.arange(k_own.shape[2], device=q.device)[None], window)[:, None]
    hide_root = None
    if window is not None and root:
        hide_root = _hidden(q_pos, torch.arange(root, device=q.device)[None], window)[:, None]
    grouped = _group_heads(q[:, None].to(work), k_own.shape[1])
    k_root, v_root = (x.to(work).transpose(0, 1) for x in (k_root, v_root))
    out, _ = root_and_own_attention(
        grouped, k_root, v_root, k_own.to(work), v_own.to(work), hide_root, hide_own, scale, softcap
    )
    return _ungroup_heads(out, q.shape[1]).to(q.dtype)
