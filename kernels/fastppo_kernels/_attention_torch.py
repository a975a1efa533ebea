"""Attention over a packed tree in plain torch: the definition, and what runs on the CPU; and where decoding chooses its form.

Two things keep it quick where the same tokens are everyone's prefix: keys of the *root* (the rows that start every segment's
path, typically the instruction text) are multiplied once for all queries and never gathered, and only the short rest of
each path is gathered, again in backward rather than saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._attention_layout import Bucket, TreeLayout, hidden, layout_of
from ._checks import accumulate_dtype, check_device, check_float, check_index, check_integer, check_number, check_shape
from ._dispatch import Backend, chosen_kernel_backend, use_triton
from ._gather import add_rows_
from ._products import no_autocast

# Entries of a head for which `decode_attention` has kernels.
_WIDEST = 256


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
    seen, [S, 1, Q, K or C]. Returns out [S, Hkv, G*Q, D] and the log of the softmax's denominator [S, Hkv, G*Q, 1], in the
    dtype of ``q`` (the callers pass fp32). Every query sees at least one key of its own.
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
        _hide_(s_root, hide_root)
    return s_root, _hide_(s_own, hide_own)


def _hide_(s: Tensor, hide: Tensor) -> Tensor:
    """Scores [S, Hkv, G*Q, K], -inf where ``hide`` [S, 1, Q, K] says so, for each of the G groups."""
    rows, queries = s.shape[2], hide.shape[2]
    grouped = s if rows == queries or queries == 1 else s.unflatten(2, (rows // queries, queries))
    grouped.masked_fill_(hide if grouped is s else hide.unsqueeze(2), -torch.inf)
    return s


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
    return x.view(n, kv_heads, group, rows // group, dim).permute(0, 3, 1, 2, 4).reshape(n * (rows // group), heads, dim)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """The output, and for each piece the log of the softmax's denominators."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    stored = []
    for work in _pieces(q, k, v, layout, window):
        o, lse = root_and_own_attention(
            work.q, work.k_root, work.v_root, work.k_own, work.v_own, work.hide_root, work.hide_own, scale, softcap
        )
        work.scatter(out, _ungroup_heads(o, q.shape[1]))
        stored.append(lse)
        del work, o  # before the next is made
    return out, stored


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stored: list[Tensor] | None,
    layout: TreeLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV; with ``stored`` None the denominators are found again from the scores."""
    dq = q.new_zeros(q.shape)
    # fp32 sums: a prefix row gathers the gradient of every segment below it.
    dk, dv = (torch.zeros(x.shape, dtype=accumulate_dtype(x.dtype), device=x.device) for x in (k, v))
    for i, work in enumerate(_pieces(q, k, v, layout, window)):
        lse = stored[i] if stored is not None else None
        _add_gradients(work, d_out, out, lse, (dq, dk, dv), scale, softcap)
        del work  # before the next is made
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _add_gradients(
    work: _Piece,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor | None,
    totals: tuple[Tensor, Tensor, Tensor],
    scale: float,
    softcap: float | None,
) -> None:
    """Those of one piece: into the rows of dQ, and onto dK and dV."""
    (dq, dk, dv), kv_heads, root = totals, work.k_own.shape[1], work.k_root.shape[1]
    s_root, s_own = _scores(work.q, work.k_root, work.k_own, work.hide_root, work.hide_own, scale, softcap)
    if lse is None:
        lse = _log_total(s_root, s_own)
    # In the place of the scores, but where those are wanted once more.
    p_root, p_own = ((s.sub_(lse) if softcap is None else s - lse).exp_() for s in (s_root, s_own))
    do = _group_heads(work.gather(d_out), kv_heads)
    delta = (do * _group_heads(work.gather(out), kv_heads)).sum(-1, keepdim=True)
    ds_own = (do @ work.v_own.transpose(2, 3)).sub_(delta).mul_(p_own)
    ds_root = _by_root(do, work.v_root.transpose(1, 2)).sub_(delta).mul_(p_root)
    if softcap is not None:
        for ds, s in ((ds_root, s_root), (ds_own, s_own)):
            ds.mul_(1 - (s.masked_fill(s == -torch.inf, 0.0) / softcap).square())
    dq_piece = ds_own @ work.k_own
    if root:
        dq_piece += _by_root(ds_root, work.k_root)
    work.scatter(dq, _ungroup_heads(dq_piece.mul_(scale), dq.shape[1]))
    dk_own = (ds_own.transpose(2, 3) @ work.q).mul_(scale)
    work.add_own(dk, dk_own)
    work.add_own(dv, p_own.transpose(2, 3) @ do)
    if root:
        q_flat, do_flat = (x.transpose(0, 1).flatten(1, 2) for x in (work.q, do))
        dk[:root] += (ds_root.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ q_flat).mul_(scale).transpose(0, 1)
        dv[:root] += (p_root.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ do_flat).transpose(0, 1)


def _log_total(s_root: Tensor, s_own: Tensor) -> Tensor:
    total = s_own.logsumexp(-1, keepdim=True)
    return torch.logaddexp(total, s_root.logsumexp(-1, keepdim=True)) if s_root.shape[-1] else total


class TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: TreeLayout, scale: float, window: int | None, softcap: float | None):
        ctx.layout, ctx.scale, ctx.window, ctx.softcap = layout, scale, window, softcap
        with no_autocast(q.device):
            out, stored = forward(q, k, v, layout, scale, window, softcap)
        ctx.save_for_backward(q, k, v, out, *stored)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, *stored = ctx.saved_tensors
        with no_autocast(q.device):
            grads = backward(d_out, q, k, v, out, stored, ctx.layout, ctx.scale, ctx.window, ctx.softcap)
        return *grads, None, None, None, None


# The same as an operator, which torch.compile does not look into; calling it costs more than calling the function above.
@torch.library.custom_op("fastppo_kernels::tree_attention", mutates_args=())
def tree_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    root: int,
    past: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    with no_autocast(q.device):
        return forward(q, k, v, layout_of(cu_q, cu_k, kv_index, root, past), scale, window, softcap)[0]


@tree_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | float | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("fastppo_kernels::tree_attention_backward", mutates_args=())
def _tree_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    root: int,
    past: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = layout_of(cu_q, cu_k, kv_index, root, past)
    with no_autocast(q.device):
        return backward(d_out, q, k, v, out, None, layout, scale, window, softcap)


@_tree_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _op_setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, kv_index, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, output, cu_q, cu_k, kv_index)


def _op_backward(ctx, d_out: Tensor):
    return *_tree_attention_backward(d_out, *ctx.saved_tensors, *ctx.numbers), *(8 * [None])


tree_attention_op.register_autograd(_op_backward, setup_context=_op_setup_context)


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
        rows = x[self.root_slice][None] if self.bucket is None else _rows(x, self.bucket.q_rows_SQ)
        rows = rows.to(accumulate_dtype(x.dtype))
        if self.bucket is not None and self.bucket.real_SQ11 is not None:
            # Padded places hold row 0: without this they would add its gradient to the keys.
            rows = rows * self.bucket.real_SQ11.to(rows.dtype)
        return rows

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        if self.bucket is None:
            x[self.root_slice] = rows.to(x.dtype)
        else:
            real = rows if self.bucket.real_SQ11 is None else rows.index_select(0, self.bucket.q_place_M)
            x.index_copy_(0, self.bucket.q_real_M, real.to(x.dtype))

    def add_own(self, x: Tensor, rows_SHKD: Tensor) -> None:
        if self.bucket is None:
            x[: rows_SHKD.shape[2]] += rows_SHKD[0].transpose(0, 1)
        else:  # padded keys carry probability 0, so what they add to row 0 is 0
            add_rows_(x, self.bucket.k_rows_SK.flatten(), rows_SHKD.transpose(1, 2).flatten(0, 1))


def _hidden_in_root(layout: TreeLayout, window: int | None) -> Tensor:
    k_pos = torch.arange(layout.root, device=layout.kv_index.device)
    return hidden(k_pos[layout.past :], k_pos, window)[None, None]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for two dimensions of rows; copied row by row, not number by number."""
    return x.index_select(0, rows.view(-1)).view(*rows.shape, *x.shape[1:])


def _hidden(bucket: Bucket, root: int, window: int | None) -> tuple[Tensor | None, Tensor]:
    """hide_root and hide_own of a bucket."""
    hide_root = None
    if window is not None and root:
        hide_root = hidden(bucket.q_pos_SQ, torch.arange(root, device=bucket.q_pos_SQ.device)[None], window)[:, None]
    return hide_root, hidden(bucket.q_pos_SQ, bucket.k_pos_SK, window)[:, None]


def _pieces(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int | None):
    root, past = layout.root, layout.past
    work = accumulate_dtype(q.dtype)
    k_root, v_root = (x[:root].to(work).transpose(0, 1) for x in (k, v))
    if root > past:  # the root rows themselves, attending to each other
        hide = layout.keep(f"hidden root {window}", partial(_hidden_in_root, layout, window))
        rows = slice(0, root - past)
        own = _group_heads(q[None, rows].to(work), k.shape[1]), k_root[:, :0], v_root[:, :0], k_root[None], v_root[None]
        yield _Piece(None, rows, *own, None, hide)
        del own
    for i, bucket in enumerate(layout.buckets):
        hide_root, hide_own = layout.keep(f"hidden {i} {window}", partial(_hidden, bucket, root, window))
        yield _piece(bucket, q, k, v, k_root, v_root, hide_root, hide_own)


def _piece(
    bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, k_root: Tensor, v_root: Tensor, hide_root: Tensor | None, hide_own: Tensor
) -> _Piece:
    """By a function of its own: the generator would keep what it has names for until it has the next."""
    q_piece = _group_heads(_rows(q, bucket.q_rows_SQ).to(k_root.dtype), k.shape[1])
    k_own, v_own = (_rows(x, bucket.k_rows_SK).to(k_root.dtype).transpose(1, 2) for x in (k, v))
    return _Piece(bucket, slice(0), q_piece, k_root, v_root, k_own, v_own, hide_root, hide_own)


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
    backend: Backend | None = None,
    pages: Tensor | None = None,
) -> Tensor:
    """One new token per sequence attends to a prefix that all sequences share and to its own cached tokens.

    Args:
        q: [B, H, D], any float dtype, H and D at least 1; scores and sums are fp32 (fp64 for fp64), under autocast too.
        k_root, v_root: [C, Hkv, D] and [C, Hkv, Dv] in q's dtype, the shared prefix, H a multiple of Hkv; C may be 0.
        k_own, v_own: [B, Hkv, K, D] and [B, Hkv, K, Dv] in q's dtype, the cache, K at least 1; places from ``lengths`` on are
            ignored. With ``pages``: [P, Hkv, S, D] and [P, Hkv, S, Dv], pages of S places each, S a power of two.
        lengths: [B] int64 or int32, filled places of each sequence's own cache, the new token included: from 1 to K.
        scale, window, softcap: as in ``attention``.
        pages: [B, N] int32 or int64, numbers from 0 to P - 1: place j of sequence b is place j % S of page
            ``pages[b, j // S]``, and K is N S. Sequences may have pages in common. None: each has a line of the cache.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64, heads whose sizes
            are no multiples of 8 up to 256, and inputs that want a gradient always take the torch form. The Triton form reads
            keys and values where they lie, but copies tensors first whose rows do not begin at multiples of 16 bytes; it
            rounds the probabilities to the dtype of the values, as FlashAttention does. What it gives a sequence does not
            depend, to the bit, on the others.

    Returns:
        [B, H, Dv] in q's dtype. Not differentiable in place of ``attention``: meant for sampling.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit each other; on the CPU, where nothing is compiled, also
            lengths that are not from 1 to K, and pages that there are not.
    """
    _check_decode(q, k_root, v_root, k_own, v_own, lengths, pages)
    check_options(scale, window, softcap)
    root, dtype, (batch, heads, dim), kv_heads = k_root.shape[0], q.dtype, q.shape, k_own.shape[1]
    work = accumulate_dtype(dtype)
    scale = dim**-0.5 if scale is None else scale
    if use_triton(q, backend) and _has_kernel(q, k_root, v_root, k_own, v_own):
        run = _decode_op if torch.compiler.is_compiling() else _decode
        return run(q, k_root, v_root, k_own, v_own, lengths, scale, window, softcap, pages)
    if pages is not None:
        k_own, v_own = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k_own, v_own))
    places = torch.arange(k_own.shape[2], device=q.device)
    hide_root = None
    if window is None:
        hide_own = places >= lengths.view(batch, 1, 1, 1)
    else:
        q_pos = lengths[:, None] - 1  # in the own cache, as the keys' below
        hide_own = hidden(q_pos, places[None], window)[:, None]
        if root:
            hide_root = hidden(q_pos + root, torch.arange(root, device=q.device)[None], window)[:, None]
    if work is not q.dtype:
        q, k_root, v_root, k_own, v_own = (x.to(work) for x in (q, k_root, v_root, k_own, v_own))
    with no_autocast(q.device):
        grouped, roots = q.view(batch, kv_heads, heads // kv_heads, dim), (k_root.transpose(0, 1), v_root.transpose(0, 1))
        s_root, s_own = _scores(grouped, roots[0], k_own, hide_root, hide_own, scale, softcap)
        p = torch.softmax(torch.cat([s_root, s_own], -1) if root else s_own, -1)
        out = p[..., root:] @ v_own
        if root:
            out += _by_root(p[..., :root], roots[1])
    return out.flatten(1, 2).to(dtype)


def _has_kernel(q: Tensor, *keys_and_values: Tensor) -> bool:
    """Whether the Triton form of `decode_attention` takes these."""
    tensors = (q, *keys_and_values)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return _kernel_suits(q.dtype, *(x.shape[-1] for x in tensors))


def _kernel_suits(dtype: torch.dtype, *dims: int) -> bool:
    """dims: of heads."""
    return dtype != torch.float64 and all(0 < dim <= _WIDEST and dim % 8 == 0 for dim in dims)


def chosen_decode_backend(device: torch.device, dtype: torch.dtype, *dims: int, backend: Backend | None = None) -> str:
    """"triton" or "torch": what `decode_attention` runs for tensors of this device and dtype and heads of these sizes where no
    gradient is wanted. Nothing is made on the device.

    Raises:
        ValueError: an unknown back end, or ``triton`` where it cannot run.
    """
    chosen = chosen_kernel_backend(device, backend)
    return chosen if _kernel_suits(dtype, *dims) else "torch"


def _decode(
    q: Tensor,
    k_root: Tensor,
    v_root: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    pages: Tensor | None,
) -> Tensor:
    from . import _triton_decode

    return _triton_decode.decode(q, k_root, v_root, k_own, v_own, lengths, scale, window, softcap, pages)


# For torch.compile, as above.
_decode_op = torch.library.custom_op("fastppo_kernels::decode_attention", mutates_args=())(_decode)


@_decode_op.register_fake
def _(q: Tensor, k_root: Tensor, v_root: Tensor, *others: Tensor | float | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_root.shape[2])


def _check_decode(
    q: Tensor, k_root: Tensor, v_root: Tensor, k_own: Tensor, v_own: Tensor, lengths: Tensor, pages: Tensor | None = None
) -> None:
    """Called once a layer and token: what fits passes few lines."""
    check_float("q", q)
    dtype, device = q.dtype, q.device
    for name, x in (("k_root", k_root), ("v_root", v_root), ("k_own", k_own), ("v_own", v_own)):
        check_float(name, x)
        if x.dtype != dtype:
            raise ValueError(f"{name} must have q's dtype {dtype}, got {x.dtype}")
        if x.device != device:
            check_device(name, x, "q", q)
    check_index("lengths", lengths)
    check_device("lengths", lengths, "q", q)
    if q.ndim != 3 or v_root.ndim != 3 or v_own.ndim != 4:
        raise ValueError(
            "decode_attention: q must be [B, H, D], v_root [C, Hkv, Dv] and v_own [B, Hkv, K, Dv], got "
            f"{tuple(q.shape)}, {tuple(v_root.shape)} and {tuple(v_own.shape)}"
        )
    batch, heads, dim = q.shape
    rows, (lines, kv_heads, longest, v_dim) = v_root.shape[0], v_own.shape
    if pages is None:
        lines = batch
    else:
        check_index("pages", pages)
        check_device("pages", pages, "q", q)
        if pages.ndim != 2 or pages.shape[0] != batch or pages.shape[1] == 0:
            raise ValueError(f"pages must be [{batch}, N], at least one for each row of q, got {list(pages.shape)}")
        if longest & (longest - 1):
            raise ValueError(f"a page must have a power of two of places, got v_own with {longest}")
    for name, x, shape, why in (
        ("v_own", v_own, (lines, kv_heads, longest, v_dim), "[B, Hkv, K, Dv] with q's B"),
        ("k_own", k_own, (lines, kv_heads, longest, dim), "[B, Hkv, K, D], of q and v_own"),
        ("v_root", v_root, (rows, kv_heads, v_dim), "[C, Hkv, Dv] with those of v_own"),
        ("k_root", k_root, (rows, kv_heads, dim), "[C, Hkv, D], of q and v_root"),
        ("lengths", lengths, (batch,), "one a sequence"),
    ):
        if x.shape != shape:
            check_shape(name, x, shape, why)
    check_heads("decode_attention", heads, kv_heads, dim)
    if longest == 0:
        raise ValueError("v_own must have at least one place (the new token's), got none")
    if batch and device.type == "cpu" and not torch.compiler.is_compiling():
        if pages is not None:
            longest *= pages.shape[1]
            low, high = (int(bound) for bound in pages.aminmax())
            if low < 0 or high >= lines:
                raise ValueError(f"pages must be from 0 to {lines - 1} (of the cache), got values from {low} to {high}")
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 1 or high > longest:
            raise ValueError(f"lengths must be from 1 to {longest} (places of the cache), got values from {low} to {high}")


def check_heads(name: str, heads: int, kv_heads: int, dim: int) -> None:
    """Raise unless there is something to attend with."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{name}: {heads} query heads are no multiple of {kv_heads} key heads")
    if heads == 0 or dim == 0:
        raise ValueError(f"{name}: q needs at least one head of a size of at least 1, got {heads} of size {dim}")


def check_options(scale: float | None, window: int | None, softcap: float | None) -> None:
    """Raise unless the numbers are ones that scores can be made with."""
    if window is not None:
        check_integer("window", window, at_least=1)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if scale is not None:
        check_number("scale", scale)
