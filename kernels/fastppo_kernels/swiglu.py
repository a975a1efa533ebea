"""SwiGLU, silu(gate) * up, and its forms that write the bordered buffers of the LoRA projections on either side of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import accumulate_dtype, check_device, check_float, check_shape
from ._dispatch import Backend, use_triton
from ._producer import (
    check_columns,
    check_out,
    lora_columns,
    refuse_gradients,
    rows_of,
    store_activation_columns,
    wide_product,
)
from .rms_norm import check_stacked, column_arguments


def _gradients(grad_h_MN: Tensor, gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor]:
    """d silu(g) u = (dh u sigmoid(g) (1 + g (1 - sigmoid(g))), dh silu(g)), rounded once."""
    dtype = accumulate_dtype(gate_MN.dtype)
    wide_MN, slope_MN = gate_MN.to(dtype), grad_h_MN.to(dtype)
    sigmoid_MN = torch.sigmoid(wide_MN)
    grad_gate_MN = slope_MN * up_MN.to(dtype) * sigmoid_MN * (1 + wide_MN * (1 - sigmoid_MN))
    return grad_gate_MN.to(gate_MN.dtype), (slope_MN * wide_MN * sigmoid_MN).to(gate_MN.dtype)


@torch.library.custom_op("fastppo_kernels::swiglu", mutates_args=())
def _swiglu(gate_MN: Tensor, up_MN: Tensor) -> Tensor:
    from . import _triton_swiglu

    h_MN = gate_MN.new_empty(gate_MN.shape)
    if gate_MN.numel():
        _triton_swiglu.forward(gate_MN, up_MN, h_MN)
    return h_MN


@_swiglu.register_fake
def _(gate_MN: Tensor, up_MN: Tensor) -> Tensor:
    return gate_MN.new_empty(gate_MN.shape)


@torch.library.custom_op("fastppo_kernels::swiglu_backward", mutates_args=())
def _swiglu_backward(grad_h_MN: Tensor, gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor]:
    from . import _triton_swiglu

    grads = gate_MN.new_empty(gate_MN.shape), gate_MN.new_empty(gate_MN.shape)
    if gate_MN.numel():
        _triton_swiglu.backward(rows_of(grad_h_MN, gate_MN.shape[1]), gate_MN, up_MN, *grads)
    return grads


@_swiglu_backward.register_fake
def _(grad_h_MN: Tensor, gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor]:
    return gate_MN.new_empty(gate_MN.shape), gate_MN.new_empty(gate_MN.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_h_MN: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(grad_h_MN, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup)


def _check(gate: Tensor, up: Tensor) -> None:
    check_float("gate", gate)
    check_float("up", up)
    if gate.dim() < 1:
        raise ValueError(f"gate must have shape [..., N], got {list(gate.shape)}")
    _check_like("up", up, gate)


def _check_like(name: str, tensor: Tensor, gate: Tensor) -> None:
    check_shape(name, tensor, tuple(gate.shape), "that of gate")
    check_device(name, tensor, "gate", gate)
    if tensor.dtype != gate.dtype:
        raise ValueError(f"{name} must have the dtype of gate ({gate.dtype}), got {tensor.dtype}")


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """h = silu(gate) * up (Shazeer 2020, equation 6), silu(g) = g sigmoid(g) rounded to the input's dtype before the product.

    Args:
        gate, up: [..., N], one dtype: float32, bfloat16, float16 or float64. Rows may lie apart: the two halves of one wider
            matrix are read where they are.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 always takes the torch
            form.

    Returns:
        [..., N], differentiable in both. The Triton form saves gate and up only (no intermediate of that size), and makes both
        gradients in one launch.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    _check(gate, up)
    if use_triton(gate, backend) and gate.dtype != torch.float64:
        columns = gate.shape[-1]
        return _swiglu(rows_of(gate, columns), rows_of(up, columns)).view(gate.shape)
    return F.silu(gate) * up


def gated(gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor | None]:
    """`swiglu` without autograd, and, where torch made it, silu(gate)."""
    if use_triton(gate_MN, None) and gate_MN.dtype != torch.float64:
        return swiglu(gate_MN, up_MN), None
    silu_MN = F.silu(gate_MN)
    return silu_MN * up_MN, silu_MN


def gated_backward(grad_h_MN: Tensor, gate_MN: Tensor, up_MN: Tensor, silu_MN: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; torch's are those of its autograd, to the bit. silu_MN: as `gated` gave it."""
    if silu_MN is None:
        columns = gate_MN.shape[1]
        return _swiglu_backward(grad_h_MN, rows_of(gate_MN, columns), rows_of(up_MN, columns))
    return torch.ops.aten.silu_backward(grad_h_MN * up_MN, gate_MN), grad_h_MN * silu_MN


@torch.library.custom_op("fastppo_kernels::swiglu_lora", mutates_args=("out",))
def _swiglu_lora(
    gate_MN: Tensor,
    up_MN: Tensor,
    stacked_RN: Tensor,
    left: int,
    scale_R: Tensor,
    mask_MG: Tensor | None,
    group_R: Tensor | None,
    out: Tensor,
) -> None:
    from . import _triton_producer
    from . import _triton_swiglu as kernels

    rank, columns = stacked_RN.shape
    tile = _triton_producer.producer_tile(_triton_producer.PRODUCER_TILES, rank, gate_MN, up_MN, stacked_RN, out)
    if tile is not None:
        kernels.forward_lora(gate_MN, up_MN, stacked_RN, left, scale_R, mask_MG, group_R, out, tile)
    else:
        kernels.forward(gate_MN, up_MN, out[:, left : left + columns])
        store_activation_columns(out, left, stacked_RN, scale_R, mask_MG, group_R)


@_swiglu_lora.register_fake
def _(*_: Any) -> None:
    return None


def swiglu_lora(
    gate: Tensor,
    up: Tensor,
    lora_A_stacked: Tensor,
    left: int,
    column_scale: Tensor,
    *,
    mask: Tensor | None = None,
    column_group: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """h = swiglu(gate, up) into the middle of the bordered buffer of the projection behind it (down), with its S columns.

    Row: [ S_left | h | S_right ], S = factor * (h A^T); everything about A, S, mask and limits is as in `rms_norm_lora`, with
    h in X's place. Not differentiable: `swiglu_backward_lora` is the other direction.

    Args:
        gate, up: [..., N] (M rows), as in `swiglu`.
        lora_A_stacked, left, column_scale, mask, column_group, out: as in `rms_norm_lora`.

    Returns:
        [M, left + N + right].

    Raises:
        ValueError: a wrong shape, dtype, device or number, or autograd is on and an input requires a gradient.
    """
    _check(gate, up)
    refuse_gradients("swiglu_lora", gate, up, lora_A_stacked)
    columns = gate.shape[-1]
    gate_MN, up_MN = rows_of(gate, columns), rows_of(up, columns)
    rows = gate_MN.shape[0]
    check_stacked(lora_A_stacked, left, columns, gate)
    rank = lora_A_stacked.shape[0]
    check_columns(rank, rows, gate, column_scale, mask, column_group)
    if out is None:
        out = gate.new_empty((rows, columns + rank))
    check_out(out, rows, columns + rank, gate)
    stacked_RN = rows_of(lora_A_stacked.to(gate.dtype), columns)
    if use_triton(gate, backend) and gate.dtype != torch.float64:
        if rows and columns:
            _swiglu_lora(gate_MN, up_MN, stacked_RN, left, *column_arguments(column_scale, mask, column_group), out)
        return out
    out[:, left : left + columns] = F.silu(gate_MN) * up_MN
    store_activation_columns(out, left, stacked_RN, column_scale, mask, column_group)
    return out


def _store_gradient_columns(
    out: Tensor,
    lora_gate_NR: Tensor,
    lora_up_NR: Tensor,
    scale_R: Tensor,
    mask_MG: Tensor | None,
    group_R: Tensor | None,
) -> None:
    """The dS columns of a gradient buffer from its dG and dU columns, by two skinny GEMMs."""
    columns = lora_gate_NR.shape[0]
    products = [wide_product(out[:, :columns], lora_gate_NR), wide_product(out[:, columns : 2 * columns], lora_up_NR)]
    out[:, 2 * columns :] = lora_columns(torch.cat(products, 1), scale_R, mask_MG, group_R, out.dtype)


@torch.library.custom_op("fastppo_kernels::swiglu_backward_lora", mutates_args=("out", "h_MN"))
def _swiglu_backward_lora(
    grad_h_MN: Tensor,
    gate_MN: Tensor,
    up_MN: Tensor,
    lora_gate_NR: Tensor,
    lora_up_NR: Tensor,
    scale_R: Tensor,
    mask_MG: Tensor | None,
    group_R: Tensor | None,
    out: Tensor,
    h_MN: Tensor | None,
) -> None:
    from . import _triton_producer
    from . import _triton_swiglu as kernels

    columns = gate_MN.shape[1]
    rank = max(lora_gate_NR.shape[1], lora_up_NR.shape[1])
    matrices = gate_MN, up_MN, grad_h_MN, lora_gate_NR, lora_up_NR, out, *([] if h_MN is None else [h_MN])
    tile = _triton_producer.producer_tile(kernels.GRADIENT_TILES, rank, *matrices)
    if tile is not None:
        kernels.backward_lora(grad_h_MN, gate_MN, up_MN, lora_gate_NR, lora_up_NR, scale_R, mask_MG, group_R, out, h_MN, tile)
    else:
        kernels.backward(grad_h_MN, gate_MN, up_MN, out[:, :columns], out[:, columns : 2 * columns], h_MN)
        _store_gradient_columns(out, lora_gate_NR, lora_up_NR, scale_R, mask_MG, group_R)


@_swiglu_backward_lora.register_fake
def _(*_: Any) -> None:
    return None


def swiglu_backward_lora(
    grad_h: Tensor,
    gate: Tensor,
    up: Tensor,
    lora_B_gate: Tensor,
    lora_B_up: Tensor,
    column_scale: Tensor,
    *,
    mask: Tensor | None = None,
    column_group: Tensor | None = None,
    out: Tensor | None = None,
    h: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The gradients of gate and up, and with them dS of the gate and up projections, in one launch.

    Row: [ dG | dU | dS_gate | dS_up ], dS_gate = factor * (dG B_gate), dS_up = factor * (dU B_up): one operand of the single
    GEMM [dG | dU | dS] [W_gate; W_up; A_gate; A_up] = dX, and the right-hand sides of dA and dB. Not differentiable.

    Triton makes dS with tensor cores while dG and dU are in registers, where `rms_norm_lora` does and for at most 64 columns of
    either projection. Otherwise it is the plain kernel and two skinny GEMMs.

    Args:
        grad_h, gate, up: [..., N] (M rows), one dtype.
        lora_B_gate: [N, R_gate], lora_B_up: [N, R_up], any float dtype (used in gate's); columns of zeros pad, R = 0 is no
            adapter.
        column_scale: [R_gate + R_up], mask: [M, G], column_group: [R_gate + R_up]: as in `rms_norm_lora`.
        out: [M, 2 N + R_gate + R_up] to write to, rows of stride 1; None: a new one.
        h: [M, N], rows of stride 1, where swiglu(gate, up) is to be written, too, in the same launch; may be grad_h itself,
            which is then overwritten. None: not.

    Returns:
        [M, 2 N + R_gate + R_up].

    Raises:
        ValueError: a wrong shape, dtype, device or number, or autograd is on and an input requires a gradient.
    """
    _check(gate, up)
    check_float("grad_h", grad_h)
    _check_like("grad_h", grad_h, gate)
    columns = gate.shape[-1]
    for name, matrix in (("lora_B_gate", lora_B_gate), ("lora_B_up", lora_B_up)):
        check_float(name, matrix)
        if matrix.dim() != 2 or matrix.shape[0] != columns:
            raise ValueError(f"{name} must have shape [{columns}, R] (the width of gate), got {list(matrix.shape)}")
        check_device(name, matrix, "gate", gate)
    refuse_gradients("swiglu_backward_lora", grad_h, gate, up, lora_B_gate, lora_B_up)
    grad_h_MN, gate_MN, up_MN = (rows_of(tensor, columns) for tensor in (grad_h, gate, up))
    rows, rank = gate_MN.shape[0], lora_B_gate.shape[1] + lora_B_up.shape[1]
    check_columns(rank, rows, gate, column_scale, mask, column_group)
    if out is None:
        out = gate.new_empty((rows, 2 * columns + rank))
    check_out(out, rows, 2 * columns + rank, gate)
    if h is not None:
        check_out(h, rows, columns, gate, "h", "that of gate")
    lora_gate_NR, lora_up_NR = (b.to(gate.dtype) for b in (lora_B_gate, lora_B_up))
    lora_gate_NR, lora_up_NR = (b if b.stride(1) == 1 else b.contiguous() for b in (lora_gate_NR, lora_up_NR))
    if use_triton(gate, backend) and gate.dtype != torch.float64:
        if rows and columns:
            arguments = column_arguments(column_scale, mask, column_group)
            _swiglu_backward_lora(grad_h_MN, gate_MN, up_MN, lora_gate_NR, lora_up_NR, *arguments, out, h)
        return out
    out[:, :columns], out[:, columns : 2 * columns] = _gradients(grad_h_MN, gate_MN, up_MN)
    _store_gradient_columns(out, lora_gate_NR, lora_up_NR, column_scale, mask, column_group)
    if h is not None:
        h.copy_(F.silu(gate_MN) * up_MN)
    return out
