"""What both ways through a decoder layer share: its weights, what is kept for backward, and the attention within."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_shape
from ._gather import add_rows_
from .lora_buffer import LoRAWeightBuffer
from .lora_linear import LoRAProjection, can_fold
from .rms_norm import normalise, normalise_backward
from .rope import rope, turn_back

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class DecoderWeights(NamedTuple):
    """What a layer computes with: the norms' weights [H] and epsilon, its seven projections, entries of a head, and, for Qwen3,
    the weights [D] of the norms of queries and keys. All of it frozen but the projections' adapters.

    buffers: of each of `groups`, made with masked=False, with the projections' weights as views (`LoRAWeightBuffer`): the
    adapters are then part of the products with those. Where a buffer does not hold the projections it stands beside, such as
    where the adapters are off or have other ranks, the layer is computed as without."""

    input_norm: Tensor
    post_norm: Tensor
    eps: float
    q: LoRAProjection
    k: LoRAProjection
    v: LoRAProjection
    o: LoRAProjection
    gate: LoRAProjection
    up: LoRAProjection
    down: LoRAProjection
    head_dim: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    buffers: tuple[LoRAWeightBuffer, ...] | None = None

    @property
    def groups(self) -> tuple[tuple[LoRAProjection, ...], ...]:
        """Projections of one input each."""
        return (self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,)


class Call(NamedTuple):
    """What a layer is called with besides tensors. tokens: rows of x that are real. choice: `choice_of`, found out once, for
    backward has to go the way that forward went; so is bordered: through the weights' buffers."""

    weights: DecoderWeights
    attend: Attend
    tokens: int
    fold: bool
    choice: str
    bordered: bool

    def folds(self, x_MK: Tensor, group: int) -> bool:
        return self.fold and self.choice == "torch" and can_fold(x_MK, None, self.weights.groups[group])


class Attended(NamedTuple):
    """inputs, out: of the attention, with its graph; no inputs where no gradient goes through it. q_MD, k_MD: before their
    norms, where there are any."""

    inputs: tuple[Tensor, ...]
    out: Tensor
    q_MD: Tensor | None
    k_MD: Tensor | None


class Kept(NamedTuple):
    """For backward. s: S of each group."""

    y_RH: Tensor
    gate: Tensor
    up: Tensor
    s: list[list[Tensor]]
    attended: Attended


def attention_forward(qkv: list[Tensor], cos: Tensor, sin: Tensor, call: Call, record: bool) -> Attended:
    """From the projections' outputs, which are taken out of the list. record: whether gradients will go back through it."""
    weights, tokens = call.weights, call.tokens
    q, k, v = (y.unflatten(1, (-1, weights.head_dim))[:tokens] for y in qkv)
    qkv.clear()
    q_MD = k_MD = None
    if weights.q_norm is not None and weights.k_norm is not None:
        q_MD, k_MD = (y.reshape(-1, weights.head_dim).contiguous() for y in (q, k))
        q = normalise(q_MD, weights.q_norm, weights.eps)[0].view(q.shape)
        k = normalise(k_MD, weights.k_norm, weights.eps)[0].view(k.shape)
    q, k = rope(q, k, cos[:tokens], sin[:tokens])
    # Values by themselves, or they would keep queries and keys of before the rotation alive with them.
    inputs: tuple[Tensor, ...] = (q, k, v.contiguous())
    if record:
        inputs = tuple(y.detach().requires_grad_() for y in inputs)
    del q, k, v
    with torch.set_grad_enabled(record):
        out = call.attend(*inputs)
    _check_attended(out, inputs[0], record)
    return Attended(inputs if record else (), out, q_MD, k_MD)


def attention_backward(
    grad_seen: Tensor, cos: Tensor, sin: Tensor, rows_R: Tensor | None, call: Call, attended: Attended,
    places: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the projections' outputs, [tokens, N] each, from that of what the output projection read.

    places: [rows, N] each, where those are to be written, with zeros behind them; None: in tensors of their own.
    """
    weights, tokens = call.weights, call.tokens
    inputs, out, q_MD, k_MD = attended
    if rows_R is None:
        grad_out = grad_seen[:tokens]
    else:
        grad_out = grad_seen.new_zeros(tokens, grad_seen.shape[1])
        add_rows_(grad_out, rows_R, grad_seen)
    del grad_seen
    grad_q, grad_k, grad_v = torch.autograd.grad(out, inputs, grad_out.view(out.shape), materialize_grads=True)
    normed = weights.q_norm is not None and weights.k_norm is not None and q_MD is not None and k_MD is not None
    turned: Sequence[Tensor] | None = None
    if places is not None and not normed:
        turned = [place[:tokens].view(g.shape) for place, g in zip(places, (grad_q, grad_k), strict=False)]
    grad_q, grad_k = turn_back(grad_q, grad_k, cos[:tokens], sin[:tokens], turned)
    if normed:
        grad_q, grad_k = (
            normalise_backward(g.reshape(y.shape), y, w, normalise(y, w, weights.eps)[1]).view(g.shape)  # type: ignore[union-attr,arg-type]
            for g, y, w in ((grad_q, q_MD, weights.q_norm), (grad_k, k_MD, weights.k_norm))
        )
    found = [grad.flatten(1) for grad in (grad_q, grad_k, grad_v)]
    if places is None:
        return found
    for i, (place, grad) in enumerate(zip(places, found, strict=True)):
        if turned is None or i == 2:
            place[:tokens].copy_(grad)
        if len(place) > tokens:
            place[tokens:].zero_()
    return list(places)


def seen_rows(out: Tensor, rows_R: Tensor | None, rows: int) -> Tensor:
    """What the output projection reads: the rows asked for, or all, padded."""
    flat = out.flatten(1)
    return padded(flat, rows) if rows_R is None else flat[rows_R]


def padded(x_TK: Tensor, rows: int) -> Tensor:
    return x_TK if len(x_TK) == rows else F.pad(x_TK, (0, 0, 0, rows - len(x_TK)))


def _check_attended(out: Tensor, query: Tensor, record: bool) -> None:
    check_shape("the result of attend", out, tuple(query.shape), "that of the queries")
    if out.dtype != query.dtype:
        raise ValueError(f"the result of attend must have the dtype of the queries ({query.dtype}), got {out.dtype}")
    if record and not out.requires_grad:
        raise ValueError("attend must be differentiable in queries, keys and values: its result requires no gradient")
