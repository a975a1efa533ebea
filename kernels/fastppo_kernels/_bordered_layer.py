"""A decoder layer through bordered buffers (`LoRAWeightBuffer`): adapters are part of the products with the frozen weights.

What a product reads is written into its buffer by the operation before it, with the adapters' columns where that operation can
make them on its way: norms and SwiGLU forward (S), SwiGLU backward (dS of gate and up). A thin product makes the others. Kept
for backward is S alone, not the buffers: their X is made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._decoder_parts import Call, DecoderWeights, Kept, attention_backward, attention_forward, seen_rows
from ._dispatch import use_triton
from ._gather import add_rows_
from ._lora_ops import Needs
from .lora_buffer import LoRAWeightBuffer
from .rms_norm import normalise, normalise_backward, residual_backward, rms_norm_lora
from .swiglu import swiglu_backward_lora, swiglu_lora


def suits(weights: DecoderWeights) -> bool:
    """Whether the layer's buffers hold its projections."""
    return weights.buffers is not None and all(
        buffer.holds(group) for buffer, group in zip(weights.buffers, weights.groups, strict=True)
    )


def _makes_columns(buffer: LoRAWeightBuffer, rank: int, gradient: bool, *matrices: Tensor) -> bool:
    """Whether a producer makes these columns of S (or dS) while it writes the others; else a thin product is the cheaper."""
    if not use_triton(matrices[0], None) or matrices[0].dtype == torch.float64:
        return False
    from ._triton_producer import PRODUCER_TILES, producer_tile
    from ._triton_swiglu import GRADIENT_TILES

    return producer_tile(GRADIENT_TILES if gradient else PRODUCER_TILES, rank, *matrices, buffer.weight) is not None


def _from_norm(buffer: LoRAWeightBuffer, x_MH: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An activation buffer with norm(x) and its S."""
    out = buffer.new_input(len(x_MH))
    stacked, scale = buffer.lora_A_stacked, buffer.column_scale
    if _makes_columns(buffer, len(stacked), False, x_MH, out):
        rms_norm_lora(x_MH, weight, eps, stacked, buffer.left, scale, out=out)
    else:
        rms_norm_lora(x_MH, weight, eps, stacked[:0], 0, scale[:0], out=buffer.x_of(out))
        buffer.fill_s(out)
    return out


def _from_swiglu(buffer: LoRAWeightBuffer, gate: Tensor, up: Tensor) -> Tensor:
    """An activation buffer with silu(gate) up and its S."""
    out = buffer.new_input(len(gate))
    stacked, scale = buffer.lora_A_stacked, buffer.column_scale
    if _makes_columns(buffer, len(stacked), False, gate, up, out):
        swiglu_lora(gate, up, stacked, buffer.left, scale, out=out)
    else:
        swiglu_lora(gate, up, stacked[:0], 0, scale[:0], out=buffer.x_of(out))
        buffer.fill_s(out)
    return out


def _from_swiglu_back(buffer: LoRAWeightBuffer, grad_h: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """A gradient buffer with dG, dU and their dS. silu(gate) up takes the place of its gradient."""
    out = buffer.new_grad(len(gate))
    of_gate, of_up, scale = buffer.border(0), buffer.border(1), buffer.column_scale
    if _makes_columns(buffer, max(buffer.left, buffer.right), True, gate, up, grad_h, out):
        swiglu_backward_lora(grad_h, gate, up, of_gate, of_up, scale, out=out, h=grad_h)
    else:
        none = of_gate[:, :0]
        swiglu_backward_lora(grad_h, gate, up, none, none, scale[:0], out=out[:, : buffer.outputs], h=grad_h)
        buffer.fill_ds(out)
    return out


def _use(weights: DecoderWeights) -> tuple[LoRAWeightBuffer, ...]:
    """The buffers, holding the layer's adapters as they are now."""
    assert weights.buffers is not None
    for buffer, group in zip(weights.buffers, weights.groups, strict=True):
        buffer.take(group)  # `suits` has found that it holds them
    return weights.buffers


def forward(
    x_TH: Tensor, cos: Tensor, sin: Tensor, rows_R: Tensor | None, call: Call, keep: Sequence[bool], record: bool
) -> tuple[Tensor, Kept]:
    """keep: which groups' S is wanted. record: whether gradients will go back through the attention."""
    weights = call.weights
    of_qkv, of_o, of_gate_up, of_down = _use(weights)
    s: list[list[Tensor]] = []

    def multiply(buffer: LoRAWeightBuffer, x_buffer: Tensor) -> list[Tensor]:
        s.append([buffer.s_of(x_buffer)] if keep[len(s)] else [])
        return list(buffer.forward(x_buffer))

    attended = attention_forward(
        multiply(of_qkv, _from_norm(of_qkv, x_TH, weights.input_norm, weights.eps)), cos, sin, call, record
    )
    seen = of_o.new_input(len(x_TH) if rows_R is None else len(rows_R))
    flat, place = attended.out.detach().flatten(1), of_o.x_of(seen)
    if rows_R is None:
        place[: call.tokens].copy_(flat)
        place[call.tokens :].zero_()
    else:
        place.copy_(flat[rows_R])
    of_o.fill_s(seen)
    y_RH = multiply(of_o, seen)[0]
    del seen, place, flat
    y_RH = y_RH.add_(x_TH if rows_R is None else x_TH[rows_R])
    gate, up = multiply(of_gate_up, _from_norm(of_gate_up, y_RH, weights.post_norm, weights.eps))
    (down,) = multiply(of_down, _from_swiglu(of_down, gate, up))
    return down.add_(y_RH), Kept(y_RH, gate, up, s, attended)


def backward(
    grad_z_RH: Tensor, x_TH: Tensor, cos: Tensor, sin: Tensor, rows_R: Tensor | None, call: Call, kept: Kept,
    wanted: list[list[Needs]], need_x: bool, through: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradients of x (None where not wanted) and, flat, of the adapters."""
    weights = call.weights
    of_qkv, of_o, of_gate_up, of_down = buffers = _use(weights)

    def adapters(group: int, x_MK: Tensor, grad_buffer: Tensor) -> list[Tensor | None]:
        needs = [(need.lora_A, need.lora_B) for need in wanted[group]]
        buffer, s = buffers[group], kept.s[group]
        parts = tuple(s[0].split((buffer.left, buffer.right), 1)) if s else (x_MK, x_MK)
        found = buffer.adapter_gradients(x_MK, parts, grad_buffer, needs)
        return [gradient for pair in found for gradient in pair]

    rows = len(grad_z_RH)
    grads = of_down.new_grad(rows)
    of_down.grads_of(grads)[0].copy_(grad_z_RH)
    of_down.fill_ds(grads)
    h = of_down.input_gradient(grads)  # its gradient, until it is made again
    of_down_grads, grads = grads, _from_swiglu_back(of_gate_up, h, kept.gate, kept.up)
    down = adapters(3, h, of_down_grads)
    del h, of_down_grads
    grad_m = of_gate_up.input_gradient(grads)
    grads_o = of_o.new_grad(rows)
    place = of_o.grads_of(grads_o)[0]
    grad_y_RH, m_RH = residual_backward(grad_m, kept.y_RH, weights.post_norm, weights.eps, grad_z_RH, place)
    gate_up = adapters(2, m_RH, grads)
    del m_RH, grad_m
    grads = grads_o
    of_o.fill_ds(grads)
    o = adapters(1, seen_rows(kept.attended.out.detach(), rows_R, len(x_TH)), grads)
    if not through:
        return None, [None] * 6 + o + gate_up + down
    grad_seen = of_o.input_gradient(grads)
    grads_qkv = of_qkv.new_grad(len(x_TH))
    attention_backward(grad_seen, cos, sin, rows_R, call, kept.attended, of_qkv.grads_of(grads_qkv))
    del grad_seen
    of_qkv.fill_ds(grads_qkv)
    others = o + gate_up + down
    grad_x_TH: Tensor
    if need_x and rows_R is None:
        grad_n = of_qkv.input_gradient(grads_qkv)
        grad_x_TH, n_TH = residual_backward(grad_n, x_TH, weights.input_norm, weights.eps, grad_y_RH)
        del grad_n
        return grad_x_TH, adapters(0, n_TH, grads_qkv) + others
    n_TH, rstd = normalise(x_TH, weights.input_norm, weights.eps)
    found = adapters(0, n_TH, grads_qkv) + others
    del n_TH
    if not need_x or rows_R is None:
        return None, found
    grad_x_TH = normalise_backward(of_qkv.input_gradient(grads_qkv), x_TH, weights.input_norm, rstd)
    add_rows_(grad_x_TH, rows_R, grad_y_RH)
    return grad_x_TH, found
