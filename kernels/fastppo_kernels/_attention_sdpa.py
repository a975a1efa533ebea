"""Attention over a packed tree through `scaled_dot_product_attention` with a mask, one call for segments of similar length.

Segments are padded to rectangles and each gets its whole root path as keys, which repeats the root for every segment; no
scores are kept. In backward, keys and values are gathered and the forward is computed again, so that nothing of the size of
the gathered rows lives in between.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from ._attention_layout import TreeLayout, hidden
from ._attention_varlen import deterministic
from ._gather import Occurrences, gather_rows, occurrences
from ._products import no_autocast


class Rectangle(NamedTuple):
    """S segments of at most Q queries and K keys; their places among all rectangles' queries and gathered keys."""

    segments: int
    queries: int
    keys: int
    q_pos_SQ: Tensor
    k_pos_SK: Tensor


class Rectangles(NamedTuple):
    """A layout as rectangles. place_T: where in all their S * Q queries each query row is. key_rows: rows of K and V."""

    parts: list[Rectangle]
    place_T: Tensor
    key_rows: Tensor
    where: Occurrences

    @property
    def places(self) -> int:
        return sum(part.segments * part.queries for part in self.parts)


def rectangles(layout: TreeLayout, rows: int) -> Rectangles:
    """The layout as rectangles, for K and V of ``rows`` = past + T rows; made once."""
    return layout.keep("rectangles", lambda: _rectangles(layout, rows))


def _rectangles(layout: TreeLayout, rows: int) -> Rectangles:
    device, own_root = layout.kv_index.device, layout.root - layout.past
    root_rows = torch.arange(layout.root, device=device)
    parts, key_rows = [], []
    place_T = torch.empty(layout.n_queries, dtype=torch.int64, device=device)
    start = 0
    if own_root > 0:
        place_T[:own_root] = torch.arange(own_root, device=device)
        parts.append(Rectangle(1, own_root, layout.root, root_rows[None, layout.past :], root_rows[None]))
        key_rows.append(root_rows)
        start = own_root
    for bucket in layout.buckets:
        segments, queries = bucket.q_rows_SQ.shape
        k_rows, k_pos = (
            torch.cat([root_rows.expand(segments, -1), own], 1) for own in (bucket.k_rows_SK, bucket.k_pos_SK)
        )  # fmt: skip
        place_T[bucket.q_real_M] = start + bucket.q_place_M
        parts.append(Rectangle(segments, queries, k_rows.shape[1], bucket.q_pos_SQ, k_pos))
        key_rows.append(k_rows.flatten())
        start += segments * queries
    all_rows = torch.cat(key_rows) if key_rows else layout.kv_index[:0]
    return Rectangles(parts, place_T, all_rows, occurrences(all_rows, rows))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Rectangles, scale: float, window: int | None) -> Tensor:
    """Differentiable in q [T, H, D], k and v; as torch differentiates it, which keeps what is gathered."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    # Every row has one place of its own, so the gradients of both steps add nothing up.
    q_all = q.new_zeros(plan.places, *q.shape[1:]).index_copy(0, plan.place_T, q)
    k_all, v_all = (gather_rows(x, plan.key_rows, plan.where) for x in (k, v))
    outs, q_start, k_start = [], 0, 0
    for part in plan.parts:
        n_q, n_k = part.segments * part.queries, part.segments * part.keys
        # The query heads that share a key head become further query rows: no key is repeated, whatever torch then calls.
        q_part = q_all[q_start : q_start + n_q].view(part.segments, part.queries, kv_heads, group, -1)
        q_part = q_part.permute(0, 2, 3, 1, 4).reshape(part.segments, kv_heads, group * part.queries, -1)
        k_part, v_part = (
            x[k_start : k_start + n_k].view(part.segments, part.keys, kv_heads, -1).transpose(1, 2) for x in (k_all, v_all)
        )  # fmt: skip
        seen = ~hidden(part.q_pos_SQ, part.k_pos_SK, window)[:, None].repeat(1, 1, group, 1)
        with _memory_efficient(q):
            out = scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=seen, scale=scale)
        out = out.view(part.segments, kv_heads, group, part.queries, -1).permute(0, 3, 1, 2, 4)
        outs.append(out.reshape(n_q, heads, -1))
        q_start, k_start = q_start + n_q, k_start + n_k
    return torch.cat(outs).index_select(0, plan.place_T)


def _memory_efficient(q: Tensor):
    """On a GPU, the one kernel that takes masks and, unlike the plain form, can be made deterministic."""
    if not q.is_cuda:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)


class _SDPAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan: Rectangles, scale: float, window: int | None):
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        ctx.save_for_backward(q, k, v)
        with no_autocast(q.device):
            return _sdpa(q, k, v, plan, scale, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v = rows = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with no_autocast(q.device):
            with torch.enable_grad():
                out = _sdpa(q, k, v, ctx.plan, ctx.scale, ctx.window)
            with deterministic() if d_out.is_cuda else nullcontext():
                grads = torch.autograd.grad(out, rows, d_out)
        return *grads, None, None, None


# Traced it would be compiled anew for every tree, and an operator cannot differentiate torch's function: a break.
@torch.compiler.disable
def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, window: int | None) -> Tensor:
    """`attention` without a softcap, for a tree that is not empty."""
    return _SDPAttention.apply(q, k, v, rectangles(layout, k.shape[0]), scale, window)
