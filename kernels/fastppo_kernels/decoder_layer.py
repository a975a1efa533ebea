"""A decoder layer of Llama's shape with LoRA adapters as one function: what is cheap to make again is not kept for backward.

    n = norm(x)            q, k, v = rope(project(n))      a = attend(q, k, v)      y = x + project(a)
    m = norm(y)            g, u = project(m)               h = silu(g) u            z = y + project(h)

Kept for backward are x, y, g, u and what the attention keeps (q, k, v, a), q and k before norms of their own, and S = x A^T
where the adapters are not folded; n, m and h are made again.

With `DecoderWeights.buffers` the same goes through bordered buffers (`_bordered_layer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _bordered_layer, _lora_fold, _lora_ops
from ._checks import check_device, check_float, check_index, check_integer, check_number, check_range, check_shape
from ._decoder_parts import (
    Attend,
    Attended,
    Call,
    DecoderWeights,
    Kept,
    attention_backward,
    attention_forward,
    padded,
    seen_rows,
)
from ._gather import add_rows_
from ._products import ROWS_WITH_S, no_autocast
from .lora_buffer import LoRAWeightBuffer
from .lora_linear import LoRAProjection, check_projection, choice_of
from .rms_norm import normalise, normalise_backward
from .swiglu import gated, gated_backward, swiglu


def _project(call: Call, group: int, x_MK: Tensor, keep: bool) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Outputs of a group, and S of its adapters where it is made by itself and to be kept."""
    projections = _plain(call.weights.groups[group])
    if call.folds(x_MK, group):
        return _lora_fold.forward(x_MK, projections), []
    outputs, kept = _lora_ops.run_forward(x_MK, None, projections, keep, call.choice)
    return outputs, kept if keep else []


def _plain(group: Sequence[LoRAProjection]) -> list[_lora_ops.Projection]:
    return [_lora_ops.Projection(w, lora_A, lora_B, bias, float(scale)) for w, lora_A, lora_B, scale, bias in group]


def _forward(
    x_TH: Tensor, cos: Tensor, sin: Tensor, rows_R: Tensor | None, call: Call, keep: Sequence[bool], record: bool
) -> tuple[Tensor, Kept]:
    """keep: which groups' S is wanted. record: whether gradients will go back through the attention."""
    if call.bordered:
        return _bordered_layer.forward(x_TH, cos, sin, rows_R, call, keep, record)
    weights = call.weights
    n_TH, _ = normalise(x_TH, weights.input_norm, weights.eps)
    outputs, s_qkv = _project(call, 0, n_TH, keep[0])
    qkv = list(outputs)
    del n_TH, outputs
    attended = attention_forward(qkv, cos, sin, call, record)
    (o,), s_o = _project(call, 1, seen_rows(attended.out.detach(), rows_R, len(x_TH)), keep[1])
    y_RH = (x_TH if rows_R is None else x_TH[rows_R]) + o
    m_RH, _ = normalise(y_RH, weights.post_norm, weights.eps)
    (gate, up), s_gate_up = _project(call, 2, m_RH, keep[2])
    del m_RH
    (down,), s_down = _project(call, 3, swiglu(gate, up), keep[3])
    return y_RH + down, Kept(y_RH, gate, up, [s_qkv, s_o, s_gate_up, s_down], attended)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, cos: Tensor, sin: Tensor, rows_R: Tensor | None, call: Call, *adapters: Tensor | None
    ) -> Tensor:
        wanted = _wanted(ctx)
        keep = [any(need.lora_B for need in group) for group in wanted]
        ctx.through = ctx.needs_input_grad[0] or any(need.lora_A or need.lora_B for need in wanted[0])
        with no_autocast(x_TH.device):
            z_RH, kept = _forward(x_TH, cos, sin, rows_R, call, keep, ctx.through)
        inputs, out, q_MD, k_MD = kept.attended
        ctx.call, ctx.attention = call, (inputs, out)
        ctx.sizes = [len(group) for group in kept.s]
        flat_s = [s_MR for group in kept.s for s_MR in group]
        ctx.save_for_backward(x_TH, cos, sin, rows_R, kept.y_RH, kept.gate, kept.up, q_MD, k_MD, *adapters, *flat_s)
        return z_RH

    @staticmethod
    def backward(ctx: Any, grad_z_RH: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.attention is None:
            raise RuntimeError("decoder_layer: what backward needs is kept for one backward only")
        # What was saved is passed on, so that differentiating again raises: x or an adapter requires a gradient.
        return _once(ctx, grad_z_RH, *ctx.saved_tensors)


@once_differentiable
def _once(ctx: Any, grad_z_RH: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    x_TH, cos, sin, rows_R, y_RH, gate, up, q_MD, k_MD, *others = saved
    (inputs, out), ctx.attention = ctx.attention, None
    flat_s, s = iter(others[len(others) - sum(ctx.sizes) :]), []
    for size in ctx.sizes:
        s.append([next(flat_s) for _ in range(size)])
    with no_autocast(x_TH.device):
        kept = Kept(y_RH, gate, up, s, Attended(inputs, out, q_MD, k_MD))
        backward = _bordered_layer.backward if ctx.call.bordered else _backward
        grad_x_TH, grads = backward(
            grad_z_RH, x_TH, cos, sin, rows_R, ctx.call, kept, _wanted(ctx), ctx.needs_input_grad[0], ctx.through
        )
    return grad_x_TH, None, None, None, None, *grads


def _wanted(ctx: Any) -> list[list[_lora_ops.Needs]]:
    """Of each group's projections, whether the gradients of A and B are wanted."""
    flags = ctx.needs_input_grad[5:]
    needs = [_lora_ops.Needs(False, flags[i], flags[i + 1], False) for i in range(0, len(flags), 2)]
    return [needs[:3], needs[3:4], needs[4:6], needs[6:]]


def _project_back(
    call: Call, group: int, grads: Sequence[Tensor], x_MK: Tensor, s: list[Tensor], need_x: bool, needs: list[_lora_ops.Needs]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of a group's input and, flat, of its adapters."""
    projections = _plain(call.weights.groups[group])
    if call.folds(x_MK, group):
        grad_x_MK, found = _lora_fold.backward(grads, x_MK, projections, need_x, needs)
    else:
        grad_x_MK, all_found = _lora_ops.run_backward(grads, x_MK, None, projections, s, need_x, needs, call.choice)
        found = [(each.lora_A_RK, each.lora_B_NR) for each in all_found]
    return grad_x_MK, [gradient for pair in found for gradient in pair]


def _backward(
    grad_z_RH: Tensor, x_TH: Tensor, cos: Tensor, sin: Tensor, rows_R: Tensor | None, call: Call, kept: Kept,
    wanted: list[list[_lora_ops.Needs]], need_x: bool, through: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradients of x (None where not wanted) and, flat, of the adapters."""
    weights = call.weights
    h, silu = gated(kept.gate, kept.up)
    grad_h, of_down = _project_back(call, 3, [grad_z_RH], h, kept.s[3], True, wanted[3])
    assert grad_h is not None
    grads = gated_backward(grad_h, kept.gate, kept.up, silu)
    del h, silu, grad_h
    m_RH, rstd = normalise(kept.y_RH, weights.post_norm, weights.eps)
    grad_m, of_gate_up = _project_back(call, 2, grads, m_RH, kept.s[2], True, wanted[2])
    assert grad_m is not None
    del grads, m_RH
    grad_y_RH = grad_z_RH + normalise_backward(grad_m, kept.y_RH, weights.post_norm, rstd)
    seen = seen_rows(kept.attended.out.detach(), rows_R, len(x_TH))
    grad_seen, of_o = _project_back(call, 1, [grad_y_RH], seen, kept.s[1], through, wanted[1])
    del seen, grad_m
    if not through:
        return None, [None] * 6 + of_o + of_gate_up + of_down
    assert grad_seen is not None
    qkv = [padded(grad, len(x_TH)) for grad in attention_backward(grad_seen, cos, sin, rows_R, call, kept.attended)]
    n_TH, rstd = normalise(x_TH, weights.input_norm, weights.eps)
    grad_n, of_qkv = _project_back(call, 0, qkv, n_TH, kept.s[0], need_x, wanted[0])
    grads_of_adapters = of_qkv + of_o + of_gate_up + of_down
    if grad_n is None:
        return None, grads_of_adapters
    grad_x_TH = normalise_backward(grad_n, x_TH, weights.input_norm, rstd)
    if rows_R is None:
        return grad_x_TH.add_(grad_y_RH), grads_of_adapters
    add_rows_(grad_x_TH, rows_R, grad_y_RH)
    return grad_x_TH, grads_of_adapters


def decoder_layer(
    x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, weights: DecoderWeights, attend: Attend, *,
    rows_R: Tensor | None = None, tokens: int | None = None, fold: bool = False,
) -> Tensor:  # fmt: skip
    """One layer of a Llama, Mistral, Qwen2 or Qwen3 model over packed tokens, with LoRA adapters on a frozen base.

    The result and its gradients are those of the operations `rms_norm`, `lora_linear_group`, `rope` and `swiglu` one after the
    other; backward makes again what is cheap (the norms and silu(g) u), which leaves a third less to keep. One backward only,
    not differentiable twice. Autocast changes nothing.

    Args:
        x_TH: [T, H], the residual stream; float32, bfloat16, float16 or float64.
        cos_TD, sin_TD: [T, D], the rotary embedding's tables, without gradient.
        weights: in x's dtype, but for biases and adapters, which may have another; nothing but the adapters may require a
            gradient.
        attend: queries [t, heads, D] and keys and values [t, key heads, D] -> [t, heads, D], differentiable in these three, and
            in nothing else.
        rows_R: [R] int64, the rows of which the result is wanted, of the first `tokens`, also repeatedly (all of those are keys
            and values); None: all.
        tokens: how many rows of x, the first ones, are real: the others are padding, see `row_multiple`; None: all.
        fold: multiply by weight + scale B A where that is less work, as in `lora_linear_group`.

    Returns:
        [T, H] or [R, H], differentiable in x and the adapters.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or something frozen that requires a gradient.
    """
    tokens = len(x_TH) if tokens is None else tokens
    _check(x_TH, cos_TD, sin_TD, weights, rows_R, tokens)
    call = Call(weights, attend, tokens, fold, choice_of(x_TH, None), _bordered_layer.suits(weights))
    adapters = [tensor for group in weights.groups for each in group for tensor in (each.lora_A, each.lora_B)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TH, *adapters)):
        return _Layer.apply(x_TH, cos_TD, sin_TD, rows_R, call, *adapters)
    # S as in training, so that the products chosen, and with them the bits, are the same; not for the few rows of decoding.
    keep = [len(x_TH) > ROWS_WITH_S] * 4
    with torch.no_grad(), no_autocast(x_TH.device):
        return _forward(x_TH, cos_TD, sin_TD, rows_R, call, keep, False)[0]


def _check(x_TH: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, rows_R: Tensor | None, tokens: int) -> None:
    """What `rope` checks of the tables is left to it."""
    check_float("x", x_TH)
    if x_TH.dim() != 2 or x_TH.shape[1] == 0:
        raise ValueError(f"x must have shape [T, H] with H >= 1, got {list(x_TH.shape)}")
    check_integer("tokens", tokens, at_least=0, at_most=len(x_TH))
    if not isinstance(weights, DecoderWeights):
        raise ValueError(f"weights must be DecoderWeights, got {type(weights).__name__}")
    check_integer("head_dim", weights.head_dim, at_least=2)
    check_number("eps", weights.eps, at_least=0)
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, (len(x_TH), weights.head_dim), "one row for each of x, an entry for each of a head")
    if rows_R is not None:
        check_index("rows", rows_R, (torch.int64,))
        if rows_R.dim() != 1:
            raise ValueError(f"rows must have shape [R], got {list(rows_R.shape)}")
        check_device("rows", rows_R, "x", x_TH)
        check_range("rows", rows_R, tokens, "rows of x that are real")
    _check_norms(x_TH, weights)
    _check_projections(x_TH, weights)
    buffers = weights.buffers
    if buffers is not None and (len(buffers) != 4 or not all(isinstance(each, LoRAWeightBuffer) for each in buffers)):
        raise ValueError("buffers must be None, or a LoRAWeightBuffer for each of the 4 groups")


def _check_norms(x_TH: Tensor, weights: DecoderWeights) -> None:
    if (weights.q_norm is None) != (weights.k_norm is None):
        raise ValueError("q_norm and k_norm go together: give both or neither")
    hidden, head = (x_TH.shape[1], "the width of x"), (weights.head_dim, "head_dim")
    for name, norm, (size, why) in (
        ("input_norm", weights.input_norm, hidden), ("post_norm", weights.post_norm, hidden),
        ("q_norm", weights.q_norm, head), ("k_norm", weights.k_norm, head),
    ):  # fmt: skip
        if norm is None and name in ("q_norm", "k_norm"):
            continue
        check_shape(name, norm, (size,), why)  # type: ignore[arg-type]
        _check_like_x(name, norm, x_TH)  # type: ignore[arg-type]


def _check_like_x(name: str, tensor: Tensor, x_TH: Tensor) -> None:
    check_device(name, tensor, "x", x_TH)
    if tensor.dtype != x_TH.dtype:
        raise ValueError(f"{name} must have the dtype of x ({x_TH.dtype}), got {tensor.dtype}")
    _check_frozen(name, tensor)


def _check_frozen(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: all but the adapters is frozen")


def _check_projections(x_TH: Tensor, weights: DecoderWeights) -> None:
    def check(name: str, of: Tensor, like: str, rows: int | None = None, why: str = "") -> int:
        """Number of the projection's outputs; `of` has the width of its input."""
        projection = getattr(weights, name)
        if not isinstance(projection, LoRAProjection):
            raise ValueError(f"{name} must be a LoRAProjection, got {type(projection).__name__}")
        check_projection(f"{name}.", projection, of, autocast=False, like_name=like)
        _check_frozen(f"{name}.weight", projection.weight)
        _check_frozen(f"{name}.bias", projection.bias)
        outputs = len(projection.weight)
        if rows is not None and outputs != rows:
            raise ValueError(f"{name}.weight must have {rows} rows ({why}), got {outputs}")
        return outputs

    hidden = x_TH.shape[1]
    queries, keys = check("q", x_TH, "x"), check("k", x_TH, "x")
    for name, outputs in (("q", queries), ("k", keys)):
        if outputs % weights.head_dim:
            raise ValueError(f"{name}.weight must have a multiple of {weights.head_dim} rows (head_dim), got {outputs}")
    check("v", x_TH, "x", keys, "those of k.weight")
    check("o", x_TH.new_empty(0, queries), "the attention's result", hidden, "the width of x")
    inner = check("gate", x_TH, "x")
    check("up", x_TH, "x", inner, "those of gate.weight")
    check("down", x_TH.new_empty(0, inner), "gate's result", hidden, "the width of x")
