"""Attention over a packed tree through torch's fused kernel for CPUs, with no key multiplied twice for the same query.

What a query sees falls into at most three parts: the root that everybody shares, the segments between the root and its own, and
its own segment up to itself. Queries that see the same keys make one call: all of them for the root, all segments below one
parent for what lies above it, all segments of similar length for their own causal squares. The parts of a softmax are put
together by their denominators,

    out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i),

and the kernel's backward, given the whole ``out`` and ``lse``, finds each part's share of the gradients (Dao et al. 2022,
FlashAttention, arXiv 2205.14135, appendix B.2: both enter only through P = exp(S - lse) and the row sums of dO * O).

Long segments go another way where oneDNN is faster than that kernel, see `_attention_tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _attention_tiles
from ._attention_layout import TreeLayout
from ._checks import accumulate_dtype
from ._gather import add_rows_
from ._products import no_autocast
from .frozen_linear import row_multiple

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """One call: S groups of at most Q queries and K keys, each query of a group seeing each of its keys, or those up to itself.

    q_rows_SQ, k_rows_SK: rows of Q and of K and V, as slices where one group's rows stand together; padded places hold row 0.
    q_place_M, q_real_M: flat places (of S * Q) of the real queries, None where no place is padded, and their rows. hide_S11K:
    0, and -inf for padded keys (None where causality hides them or there are none). own: each query row occurs in one such
    block and in none before it.
    """

    q_rows_SQ: Tensor | slice
    k_rows_SK: Tensor | slice
    q_place_M: Tensor | None
    q_real_M: Tensor | slice
    hide_S11K: Tensor | None
    own: bool

    def queries(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [S, H, Q, D]"""
        return _rows(x, self.q_rows_SQ).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return _rows(x, self.k_rows_SK).transpose(1, 2)

    def add_keys(self, total: Tensor, part_SHKD: Tensor) -> None:
        """Add to the rows of K or V what their places got."""
        part = part_SHKD.transpose(1, 2)
        if isinstance(self.k_rows_SK, slice):
            total[self.k_rows_SK] += part[0]
        else:
            add_rows_(total, self.k_rows_SK.flatten(), part.flatten(0, 1))

    def real(self, x_SQ: Tensor) -> Tensor:
        """[S, Q, ...] -> [M, ...], without the padded places."""
        flat = x_SQ.flatten(0, 1)
        return flat if self.q_place_M is None else flat.index_select(0, self.q_place_M)

    def padded_with(self, x_SQ: Tensor, value: float) -> Tensor:
        """The same with the padded places set to ``value``."""
        if self.q_place_M is None:
            return x_SQ
        full = x_SQ.new_full(x_SQ.shape, value).flatten(0, 1)
        full[self.q_place_M] = x_SQ.flatten(0, 1)[self.q_place_M]
        return full.view(x_SQ.shape)


def _dense(x: Tensor) -> Tensor:
    """The kernel reads numbers side by side, whatever the last stride says."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    if isinstance(rows, slice):
        return x[rows][None]
    return x.index_select(0, rows.view(-1)).view(*rows.shape, *x.shape[1:])  # copied row by row, not number by number


LARGEST_SQUARE = 128  # at least 32: see `_blocks`


class Plan(NamedTuple):
    """Made once a tree. blocks: the calls, those of the queries' own segments first. long: segments that oneDNN takes, whose
    queries are in no block."""

    blocks: list[Block]
    long: list[_attention_tiles.Segment]


def plan_of(layout: TreeLayout, q: Tensor, k: Tensor) -> Plan:
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    tiles = row_multiple(q.device, accumulate_dtype(q.dtype)) > 1
    return layout.keep(f"cpu {heads} {kv_heads} {dim} {tiles}", lambda: _plan(layout, heads, kv_heads, dim, tiles))


def _plan(layout: TreeLayout, heads: int, kv_heads: int, dim: int, tiles: bool) -> Plan:
    long, taken = [], set()
    for s, queries, path in _segments(layout) if tiles else ():
        if _attention_tiles.is_long(len(queries), len(path) + len(queries), heads, kv_heads, dim):
            long.append(_attention_tiles.make_segment(queries, path, layout.past, heads, kv_heads))
            taken.add(s)
    return Plan(_blocks(layout, frozenset(taken)), long)


def _segments(layout: TreeLayout) -> Iterator[tuple[int, range, Tensor]]:
    """Number, own queries and rows of the keys above them of each segment; -1 for the root's own rows."""
    cu_q, cu_k = layout.host_lists
    own_root = max(layout.root - layout.past, 0)
    yield -1, range(own_root), torch.arange(layout.past)
    for s in range(len(cu_q) - 1):
        queries = range(max(cu_q[s], own_root if s == 0 else 0), cu_q[s + 1])
        yield s, queries, layout.kv_index[cu_k[s] : cu_k[s + 1] - len(queries)]


def _blocks(layout: TreeLayout, taken: frozenset[int] = frozenset()) -> list[Block]:
    """taken: segments to leave out, -1 the root's own rows."""
    cu_q, cu_k = layout.host_lists
    root, past, rows = layout.root, layout.past, layout.kv_index
    own_root, n = max(root - past, 0), layout.n_queries
    below: list[int] = []
    squares: list[tuple[range, range]] = []
    # Of squares: later queries, earlier keys. Those of one row differ twofold in size, so no block has it twice.
    left: list[tuple[range, range]] = []
    above: dict[int, tuple[list[int], range]] = {}  # by the parent's last row, which stands for the whole path to it
    _split(0, 0 if -1 in taken else own_root, past, squares, left)
    parents = rows[(layout.cu_k[1:].long() - layout.cu_q.diff().long() - 1).clamp(min=0)].tolist() if len(cu_q) > 1 else []
    for s in range(len(cu_q) - 1):
        start, stop = max(cu_q[s], own_root if s == 0 else 0), cu_q[s + 1]
        if stop > start and s not in taken:
            _split(start, stop, past, squares, left)
            below.extend(range(start, stop))
            own_keys = stop - start
            path = range(cu_k[s] + root, cu_k[s + 1] - own_keys)  # places in kv_index
            if len(path):
                above.setdefault(parents[s], ([], path))[0].extend(range(start, stop))
    result = [_block(group, None, True) for group in _similar(squares)]
    result += [_block(group, None, False) for group in _similar(left)]
    if past and own_root and -1 not in taken:  # the rest of the root's rows sees what was computed before
        result.append(_block([(range(own_root), range(past))], None, False))
    if root and below:
        result.append(_block([(below if taken else range(own_root, n), range(root))], None, False))
    return result + [_block(group, rows, False) for group in _similar(list(above.values()))]


def _split(start: int, stop: int, past: int, squares: list[tuple[range, range]], left: list[tuple[range, range]]) -> None:
    """The causal square of these rows as squares of at most `LARGEST_SQUARE` and the rectangles between them: the kernel takes
    longer for a large square whose upper half is hidden than for all of it."""
    if stop - start <= LARGEST_SQUARE:
        if stop > start:
            squares.append((range(start, stop), range(past + start, past + stop)))
        return
    middle = (start + stop) // 2
    _split(start, middle, past, squares, left)
    _split(middle, stop, past, squares, left)
    left.append((range(middle, stop), range(past + start, past + middle)))


_Groups = list[tuple["range | list[int]", range]]


def _similar(groups: list) -> list[_Groups]:
    """Groups of like numbers of queries and of keys together: little padding is worth fewer calls."""
    made: list[_Groups] = []
    for queries, keys in sorted(groups, key=lambda group: (len(group[0]), len(group[1]))):
        first = made[-1][0] if made else None
        if first and len(queries) <= 1.5 * len(first[0]) + 4 and max(len(keys), len(first[1])) <= 1.5 * len(first[1]) + 4:
            made[-1].append((queries, keys))
        else:
            made.append([(queries, keys)])
    return made


def _block(groups: _Groups, kv_index: Tensor | None, own: bool) -> Block:
    """kv_index: of which the groups' keys are places; None: they are rows."""
    if len(groups) == 1 and isinstance(groups[0][0], range) and kv_index is None:
        queries, keys = (slice(group.start, group.stop) for group in groups[0])  # type: ignore[union-attr]
        return Block(queries, keys, None, queries, None, own)
    most_q, most_k = (max(len(group[i]) for group in groups) for i in (0, 1))
    q_rows = torch.tensor([[*queries, *[0] * (most_q - len(queries))] for queries, _ in groups])
    k_rows = torch.tensor([[*keys, *[0] * (most_k - len(keys))] for _, keys in groups])
    n_q, n_k = (torch.tensor([len(group[i]) for group in groups]) for i in (0, 1))
    real_q, real_k = torch.arange(most_q) < n_q[:, None], torch.arange(most_k) < n_k[:, None]
    if kv_index is not None:
        k_rows = torch.where(real_k, kv_index[k_rows], 0)
    hide = None if own or real_k.all() else torch.where(real_k, 0.0, -math.inf)[:, None, None]
    place = None if real_q.all() else real_q.flatten().nonzero()[:, 0]
    return Block(q_rows, k_rows, place, q_rows.flatten() if place is None else q_rows.flatten()[place], hide, own)


def _flat(x: Tensor) -> Tensor:
    """[T, H, D] -> [T * H, D]"""
    return x.reshape(-1, x.shape[2])


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, differentiable: bool = True
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out [T, H, D] and lse [T, H] (anything for long segments), both in the accumulating dtype, and what these want kept."""
    dtype = accumulate_dtype(q.dtype)
    q, k, v = (_dense(x.to(dtype)) for x in (q, k, v))
    out, lse, kept = q.new_empty(q.shape), q.new_empty(q.shape[:2]), []
    plan = plan_of(layout, q, k)
    if plan.long:
        keep = differentiable and _attention_tiles.keeps(plan.long, dtype.itemsize)
        kept = _attention_tiles.forward(plan.long, _flat(q).mul(scale), _flat(k), _flat(v), _flat(out), keep)
    for block in plan.blocks:
        hide = None if block.hide_S11K is None else block.hide_S11K.to(dtype)
        part, total = _forward(
            block.queries(q), block.keys(k), block.keys(v), 0.0, block.own, attn_mask=hide, scale=scale
        )
        part, total = block.real(part.transpose(1, 2)), block.real(total.transpose(1, 2))
        rows = block.q_real_M
        if isinstance(rows, Tensor) and block.own:
            out.index_copy_(0, rows, part)
            lse.index_copy_(0, rows, total)
        elif block.own:
            out[rows], lse[rows] = part, total
        else:
            before = lse[rows]
            after = torch.logaddexp(before, total)
            out[rows] = out[rows].mul_((before - after).exp_()[..., None]).addcmul_(part, (total - after).exp_()[..., None])
            lse[rows] = after
    return out, lse, kept


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    layout: TreeLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, in the inputs' dtypes; out, lse, kept: as `forward` gave them."""
    dtype = accumulate_dtype(q.dtype)
    d_out, work_q, work_k, work_v = (_dense(x.to(dtype)) for x in (d_out, q, k, v))
    dq, dk, dv = work_q.new_empty(work_q.shape), work_k.new_zeros(work_k.shape), work_v.new_zeros(work_v.shape)
    plan = plan_of(layout, work_q, work_k)
    if plan.long:
        mean = (_flat(d_out) * _flat(out)).sum(-1, keepdim=True)
        flat = (_flat(d_out), mean, _flat(work_q).mul(scale), _flat(work_k), _flat(work_v))
        _attention_tiles.backward(plan.long, iter(kept), *flat, (_flat(dq), _flat(dk), _flat(dv)), scale)
    for block in plan.blocks:
        hide = None if block.hide_S11K is None else block.hide_S11K.to(dtype)
        # A padded query has probability exp(-inf) = 0 everywhere and no gradient.
        do = block.padded_with(_rows(d_out, block.q_rows_SQ), 0.0)
        total = block.padded_with(_rows(lse, block.q_rows_SQ), math.inf)
        dq_part, dk_part, dv_part = _backward(
            do.transpose(1, 2), block.queries(work_q), block.keys(work_k), block.keys(work_v), block.queries(out),
            total.transpose(1, 2), 0.0, block.own, attn_mask=hide, scale=scale,
        )  # fmt: skip
        rows = block.q_real_M
        dq_part = block.real(dq_part.transpose(1, 2))
        if isinstance(rows, Tensor):
            (dq.index_copy_ if block.own else dq.index_add_)(0, rows, dq_part)
        elif block.own:
            dq[rows] = dq_part
        else:
            dq[rows] += dq_part
        block.add_keys(dk, dk_part)
        block.add_keys(dv, dv_part)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: TreeLayout, scale: float):
        ctx.layout, ctx.scale = layout, scale
        with no_autocast(q.device):
            out, lse, kept = forward(q, k, v, layout, scale, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse, *kept = ctx.saved_tensors
        with no_autocast(d_out.device):
            return *backward(d_out, q, k, v, out, lse, kept, ctx.layout, ctx.scale), None, None


def refuses(q: Tensor, v: Tensor, window: int | None, softcap: float | None) -> str:
    """Why this form cannot do it; empty if it can."""
    if q.device.type != "cpu":
        return f"is for the CPU, not {q.device.type}"
    if window is not None or softcap is not None:
        return "has no " + ("window" if window is not None else "softcap")
    if q.shape[2] != v.shape[2]:
        return f"needs values as wide as keys, not {v.shape[2]} and {q.shape[2]}"
    if not q.shape[0]:
        return "needs a token"
    return ""
