"""Attention over a tree of shared prefixes: every token is stored once and attends to its own root path.

A packed tree is a list of *segments*. Segment ``s`` owns the query rows ``cu_q[s]:cu_q[s + 1]`` and attends to the rows
``kv_index[cu_k[s]:cu_k[s + 1]]``, its whole root path, which ends with its own rows. Aligned at the bottom right, causal
attention over (queries, keys) of each segment is exact attention of the padded batch, token for token.

Back ends, of which each gathers keys and values again in backward rather than keep them:

    flash-attn  the package, bfloat16 and float16 on CUDA; windows and softcap
    varlen      torch's own FlashAttention (what `torch.nn.attention.varlen` calls); windows
    xformers    the package's CUTLASS kernels, float32 too
    sdpa        `scaled_dot_product_attention` with a mask; any device
    cpu         torch's fused kernel for CPUs, once for all queries that see the same keys
    torch       plain torch, any device and dtype: the definition

The choice is made per call (``backend=``), else by the environment variable ``FASTPPO_ATTENTION`` (empty: as if not set), else
it is the first of this list that can do what is asked on CUDA, cpu where it can do it on the CPU, and torch elsewhere.

Autocast changes nothing: each computes as it does without.
"""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ._attention_cpu import CpuAttention, refuses
from ._attention_layout import TreeLayout, check_tree, check_values
from ._attention_torch import (
    TreeAttention,
    check_heads,
    check_options,
    chosen_decode_backend,
    decode_attention,
    tree_attention_op,
)
from ._attention_varlen import LIBRARIES, varlen_attention
from ._checks import check_device, check_float, check_integer
from ._gather import Occurrences

__all__ = [
    "AttentionBackend", "TreeLayout", "attention", "attention_backends", "chosen_attention_backend",
    "chosen_decode_backend", "decode_attention", "tree_attention",
]  # fmt: skip

AttentionBackend = Literal["auto", "flash-attn", "varlen", "xformers", "sdpa", "cpu", "torch"]
VARIABLE = "FASTPPO_ATTENTION"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    *,
    max_q: int | None = None,
    max_k: int | None = None,
    root: int = 0,
    past: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """Causal attention of every token of a packed tree to its root path.

    For one call. Where the same tree goes through many layers, make one ``TreeLayout`` and use ``tree_attention``: what is
    prepared of the tree is then prepared once.

    Args:
        q: [T, H, D], any float dtype, H and D at least 1; scores and sums are fp32 (fp64 for fp64), under autocast too.
        k, v: [past + T, Hkv, D] and [past + T, Hkv, Dv] in q's dtype, H a multiple of Hkv (grouped query heads).
        cu_q: [S + 1] int32 or int64, cumulative numbers of query rows of the segments, from 0 to T.
        cu_k: [S + 1], cumulative lengths of the segments' root paths, from 0 to N; a path has at least its own queries.
        kv_index: [N] int64, rows of K and V on each root path, in order; a path ends with the segment's own rows.
        max_q, max_k: the most queries of a segment and the longest path, or more. None: looked up, which on a GPU waits for it
            and which torch.compile cannot trace where a library runs.
        root: number of rows (0, 1, ..., root - 1) with which every path begins; the torch back end multiplies them once.
        past: rows at the front of K and V that have no query here; query row ``i`` is row ``past + i`` of K and V.
        scale: of the scores; D ** -0.5 when None.
        window: a query sees the last ``window`` tokens of its path, itself included (sliding window); None: all.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        backend: which back end; see above.

    Returns:
        [T, H, Dv] in q's dtype; differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit each other; on the CPU, where nothing is compiled, also
            values of the index tensors that are not as above, but for what stands on a path between root and own rows; a back
            end that cannot do what is asked.
    """
    check_tree(cu_q, cu_k, kv_index, root, past, max_q, max_k)
    name = _check(q, k, v, cu_q, past, scale, window, softcap, backend)
    layout = None
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        layout = TreeLayout(cu_q, cu_k, kv_index, root, past, max_q, max_k)
        check_values(layout, q.shape[0])
    # Without a TreeLayout where nothing has to be looked up on the host.
    if name in LIBRARIES and max_q is not None and max_k is not None:
        return _varlen(q, k, v, cu_q, cu_k, kv_index, None, (max_q, max_k), scale, window, softcap, name)
    if name == "torch" and torch.compiler.is_compiling():
        return _torch_op(q, k, v, cu_q, cu_k, kv_index, root, past, scale, window, softcap)
    if layout is None:
        layout = TreeLayout(cu_q, cu_k, kv_index, root, past, max_q, max_k)
    return _run(q, k, v, layout, scale, window, softcap, name)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """``attention`` with the tree as a ``TreeLayout``, which keeps what is prepared of it for all layers.

    Args:
        q: [T, H, D]. k, v: [past + T, Hkv, D] and [past + T, Hkv, Dv]. scale, window, softcap, backend: as in ``attention``.
        layout: the tree's.

    Returns:
        [T, H, Dv] in q's dtype; differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit each other or the layout; on the CPU also a layout whose
            tensors hold no such tree, as in ``attention`` (looked at once a layout); a back end that cannot do what is asked.
    """
    if not isinstance(layout, TreeLayout):
        raise ValueError(f"layout must be a TreeLayout, got {type(layout).__name__}")
    name = _check(q, k, v, layout.cu_q, layout.past, scale, window, softcap, backend)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        if q.shape[0] != layout.n_queries:
            raise ValueError(f"attention: {q.shape[0]} queries for a layout of {layout.n_queries} rows")
        layout.keep("checked", lambda: check_values(layout, layout.n_queries))
    return _run(q, k, v, layout, scale, window, softcap, name)


def attention_backends(*names: str) -> dict[str, str]:
    """For each back end, or each of those named, "usable", or why it is not in this installation.

    Libraries are imported for it: with one name, one that breaks hides no other.

    Raises:
        ValueError: a name that is no back end's.
    """
    known = [name for name in get_args(AttentionBackend) if name != "auto"]
    for name in names:
        if name not in known:
            raise ValueError(f"a back end must be one of {', '.join(known)}, got {name!r}")
    return {name: _missing(name) or "usable" for name in names or known}


class _Like(NamedTuple):
    """What the choice looks at in queries and values, without their memory."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def chosen_attention_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, *,
    window: int | None = None, softcap: float | None = None, backend: AttentionBackend | None = None,
) -> str:  # fmt: skip
    """The back end that `attention` runs for queries, keys and values of this device, dtype and head size; nothing is made on
    the device. window, softcap, backend: as in `attention`.

    Raises:
        ValueError: numbers that scores cannot be made with, an unknown back end, or one that cannot do what is asked.
    """
    check_integer("head_dim", head_dim, at_least=1)
    check_options(None, window, softcap)
    like: Any = _Like(device, dtype, (1, 1, head_dim))
    return _choose(like, like, window, softcap, backend)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    name: str,
) -> Tensor:
    tree = layout.cu_q, layout.cu_k, layout.kv_index
    if name in LIBRARIES:
        need_where = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        where = layout.occurrences(k.shape[0]) if need_where else None
        return _varlen(q, k, v, *tree, where, layout.bounds, scale, window, softcap, name)
    if name == "torch" and torch.compiler.is_compiling():
        return _torch_op(q, k, v, *tree, layout.root, layout.past, scale, window, softcap)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if name == "sdpa" and q.shape[0]:
        from ._attention_sdpa import sdpa_attention

        return sdpa_attention(q, k, v, layout, scale, window)
    if name == "cpu":
        return CpuAttention.apply(q, k, v, layout, scale)
    return TreeAttention.apply(q, k, v, layout, scale, window, softcap)


def _torch_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    root: int,
    past: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return tree_attention_op(q, k, v, cu_q, cu_k, kv_index, root, past, scale, window, softcap)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    where: Occurrences | None,
    bounds: tuple[int, int],
    scale: float | None,
    window: int | None,
    softcap: float | None,
    name: str,
) -> Tensor:
    order_N, start_R1 = (None, None) if where is None else where
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return varlen_attention(q, k, v, cu_q, cu_k, kv_index, order_N, start_R1, *bounds, scale, window, softcap, name)[0]


_found: dict[str, str] = {}


def _missing(name: str) -> str:
    """Why a back end is not in this installation; empty if it is. Looked for when first asked."""
    if name not in _found:
        _found[name] = _look_for(name)
    return _found[name]


def _look_for(name: str) -> str:
    return LIBRARIES[name].missing() if name in LIBRARIES else ""


# What `torch.compiler.assume_constant_result` sets, which imports the compiler: imports and signatures cannot be traced.
_look_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(name: str, q: Tensor, v: Tensor, window: int | None, softcap: float | None) -> str:
    """Why a back end cannot do this; empty if it can."""
    if name in LIBRARIES:
        return LIBRARIES[name].refuses(q, v, window, softcap) or _missing(name)
    if name == "cpu":
        return refuses(q, v, window, softcap)
    if name == "sdpa" and softcap is not None:
        return "has no softcap"
    if name == "sdpa" and q.is_cuda and q.dtype == torch.float64:
        return "has no kernel for float64"
    return ""


def _choose(q: Tensor, v: Tensor, window: int | None, softcap: float | None, backend: AttentionBackend | None) -> str:
    where, wanted = ("backend", backend) if backend is not None else (VARIABLE, os.environ.get(VARIABLE) or "auto")
    names = get_args(AttentionBackend)
    if wanted not in names:
        raise ValueError(f"{where} must be one of {', '.join(names)}, got {wanted!r}")
    if wanted != "auto":
        refusal = _refusal(wanted, q, v, window, softcap)
        if refusal:
            raise ValueError(f"{where} {wanted!r}: {refusal}")
        return wanted
    if not q.is_cuda:
        return "torch" if torch.compiler.is_compiling() or refuses(q, v, window, softcap) else "cpu"
    # The graph would break at sdpa, which the torch operator does not ask for.
    skipped = ("auto", "sdpa") if torch.compiler.is_compiling() else ("auto",)
    return next(name for name in names if name not in skipped and not _refusal(name, q, v, window, softcap))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    past: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: AttentionBackend | None,
) -> str:
    """The back end that runs, after all checks that need no look at values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x)
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"attention: q, k, v must be [tokens, heads, dim], got {_shapes(q, k, v)}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: k and v need equal tokens and heads, q and k equal dim, got {_shapes(q, k, v)}")
    check_heads("attention", q.shape[1], k.shape[1], q.shape[2])
    if k.shape[0] != q.shape[0] + past:
        raise ValueError(f"attention: {k.shape[0]} keys for {q.shape[0]} queries and a past of {past} rows")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention: q, k and v need one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in (("k", k), ("v", v), ("cu_q", cu_q)):
        check_device(name, x, "q", q)
    check_options(scale, window, softcap)
    return _choose(q, v, window, softcap, backend)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
