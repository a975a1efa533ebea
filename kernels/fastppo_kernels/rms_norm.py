"""Root-mean-square normalisation, and its form that writes the bordered buffer ``[S | X | S]`` of the LoRA projections behind
it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import accumulate_dtype, check_device, check_float, check_number, check_shape
from ._dispatch import Backend, use_triton
from ._eager import is_eager
from ._producer import check_border, check_columns, check_out, refuse_gradients, rows_of, store_activation_columns


def _normalised(x_MK: Tensor, weight_K: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The definition, in the order of Hugging Face's modules, so that the forward is theirs to the bit: (y, rstd [M, 1])."""
    dtype = accumulate_dtype(x_MK.dtype)
    wide_MK = x_MK.to(dtype)
    rstd_M1 = torch.rsqrt(wide_MK.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide_MK * rstd_M1 * (offset + weight_K.to(dtype))).to(x_MK.dtype), rstd_M1
    return weight_K * (wide_MK * rstd_M1).to(x_MK.dtype), rstd_M1


def _result_dtype(x: Tensor, weight: Tensor, offset: float) -> torch.dtype:
    return x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)


@torch.library.custom_op("fastppo_kernels::rms_norm", mutates_args=())
def _rms_norm(x_MK: Tensor, weight_K: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y, rstd_M)."""
    from . import _triton_norm

    y_MK = x_MK.new_empty(x_MK.shape, dtype=_result_dtype(x_MK, weight_K, offset))
    rstd_M = x_MK.new_empty(x_MK.shape[0], dtype=torch.float32)
    if x_MK.numel():
        _triton_norm.forward(x_MK, weight_K, eps, offset, y_MK, rstd_M)
    return y_MK, rstd_M


@_rms_norm.register_fake
def _(x_MK: Tensor, weight_K: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y_MK = x_MK.new_empty(x_MK.shape, dtype=_result_dtype(x_MK, weight_K, offset))
    return y_MK, x_MK.new_empty(x_MK.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastppo_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad_y_MK: Tensor, x_MK: Tensor, weight_K: Tensor, rstd_M: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the latter of no entries where it is not wanted."""
    from . import _triton_norm

    grad_x_MK = x_MK.new_empty(x_MK.shape)
    if not x_MK.numel():
        return grad_x_MK, weight_K.new_zeros(weight_K.shape if need_weight else (0,))
    grad_y_MK = rows_of(grad_y_MK, x_MK.shape[1])
    grad_weight_K = _triton_norm.backward(grad_y_MK, x_MK, weight_K, rstd_M, offset, grad_x_MK, need_weight)
    return grad_x_MK, grad_weight_K.to(weight_K.dtype)


@_rms_norm_backward.register_fake
def _(
    grad_y_MK: Tensor, x_MK: Tensor, weight_K: Tensor, rstd_M: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x_MK.new_empty(x_MK.shape), weight_K.new_empty(weight_K.shape if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MK, weight_K, _, ctx.offset = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_MK, weight_K, output[1])


def _backward(ctx: Any, grad_y_MK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_weight = ctx.needs_input_grad[1]
    grad_x_MK, grad_weight_K = _rms_norm_backward(grad_y_MK, *ctx.saved_tensors, ctx.offset, need_weight)
    return grad_x_MK, grad_weight_K if need_weight else None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)


class _Frozen(torch.autograd.Function):
    """The definition with a frozen weight, on the CPU: half the passes over x that autograd of it makes, and x alone kept.

    dx = rstd (g - x rstd^2 mean(g x)),  g = dy weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        y, rstd = _normalised(x, weight_K, eps, 0.0)
        ctx.save_for_backward(x, weight_K, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_K, rstd = ctx.saved_tensors
        return _gradient(grad_y, x, weight_K, rstd), None, None


def _gradient(grad_y: Tensor, x: Tensor, weight_K: Tensor, rstd: Tensor) -> Tensor:
    """dx of the definition; rstd [.., 1]."""
    wide, slope = x.to(rstd.dtype), grad_y.to(rstd.dtype) * weight_K.to(rstd.dtype)
    share = (slope * wide).mean(-1, keepdim=True).mul_(rstd.pow(3)).neg_()
    return slope.mul_(rstd).addcmul_(wide, share).to(x.dtype)


def normalise(x_MK: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of rows and what its gradient needs besides, without autograd: (y, rstd)."""
    if use_triton(x_MK, None) and torch.float64 not in (x_MK.dtype, weight_K.dtype):
        return _rms_norm(rows_of(x_MK, x_MK.shape[1]), weight_K.contiguous(), float(eps), 0.0)
    return _normalised(x_MK, weight_K, eps, 0.0)


def normalise_backward(grad_y_MK: Tensor, x_MK: Tensor, weight_K: Tensor, rstd: Tensor) -> Tensor:
    """dx, of what `normalise` gave."""
    if rstd.dim() == 1:
        rows = rows_of(x_MK, x_MK.shape[1])
        return _rms_norm_backward(grad_y_MK, rows, weight_K.contiguous(), rstd, 0.0, False)[0]
    return _gradient(grad_y_MK, x_MK, weight_K, rstd)


@torch.library.custom_op("fastppo_kernels::rms_norm_residual_backward", mutates_args=("grad_x_MK", "y_MK"))
def _rms_norm_residual_backward(
    grad_y_MK: Tensor, x_MK: Tensor, weight_K: Tensor, eps: float, residual_MK: Tensor, grad_x_MK: Tensor, y_MK: Tensor
) -> None:
    from . import _triton_norm

    if x_MK.numel():
        _triton_norm.residual_backward(grad_y_MK, x_MK, weight_K, eps, residual_MK, grad_x_MK, y_MK)


@_rms_norm_residual_backward.register_fake
def _(*_: Any) -> None:
    return None


def residual_backward(
    grad_y_MK: Tensor, x_MK: Tensor, weight_K: Tensor, eps: float, residual_MK: Tensor, place: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx + residual, y), all that backward wants of z = x + f(rms_norm(x)): dy is the gradient of y, residual that of z.

    Without autograd; of one dtype. place: [M, K] of row stride 1, where dx is written; None: a new one. In Triton one launch,
    with the sum rounded once.
    """
    if place is None:
        place = x_MK.new_empty(x_MK.shape)
    columns = x_MK.shape[1]
    if use_triton(x_MK, None) and x_MK.dtype != torch.float64:
        y_MK = x_MK.new_empty(x_MK.shape)
        grad_y_MK, x_MK, residual_MK = (rows_of(each, columns) for each in (grad_y_MK, x_MK, residual_MK))
        _rms_norm_residual_backward(grad_y_MK, x_MK, weight_K.contiguous(), float(eps), residual_MK, place, y_MK)
        return place, y_MK
    y_MK, rstd_M1 = _normalised(x_MK, weight_K, eps, 0.0)
    torch.add(_gradient(grad_y_MK, x_MK, weight_K, rstd_M1), residual_MK, out=place)
    return place, y_MK


def _check(x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    check_float("x", x)
    check_float("weight", weight)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., K] with K >= 1, got {list(x.shape)}")
    check_shape("weight", weight, (x.shape[-1],), "the last dimension of x")
    check_device("weight", weight, "x", x)
    check_number("eps", eps, at_least=0)
    check_number("offset", offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, backend: Backend | None = None) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension (Zhang and Sennrich 2019, equation 4).

    The sum of squares is float32. With offset 0 the quotient is rounded to x's dtype before the weight, and the result has the
    dtype of (x in its dtype) * weight, as in Hugging Face's Llama, Mistral, Qwen2 and Qwen3; with another offset (1.0: Gemma,
    whose weights are stored less 1) all is float32 up to one rounding to x's dtype, as there.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides (rows of stride 1 are read where they lie).
        weight: [K], a float dtype.
        eps: >= 0, added to the mean.
        offset: added to the weight.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 always takes the torch
            form.

    Returns:
        [..., K], differentiable in x and weight. The Triton form saves x and one float32 a row; a weight that requires no
        gradient costs none. Sums over rows are added in a fixed order.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    _check(x, weight, eps, offset)
    if use_triton(x, backend) and torch.float64 not in (x.dtype, weight.dtype):
        y_MK, _ = _rms_norm(rows_of(x, x.shape[-1]), weight.contiguous(), float(eps), float(offset))
        return y_MK.view(x.shape)
    if not offset and torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad and is_eager(x):
        return _Frozen.apply(x, weight, eps)
    return _normalised(x, weight, eps, offset)[0]


@torch.library.custom_op("fastppo_kernels::rms_norm_lora", mutates_args=("out", "rstd_M"))
def _rms_norm_lora(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    offset: float,
    stacked_RK: Tensor,
    left: int,
    scale_R: Tensor,
    mask_MG: Tensor | None,
    group_R: Tensor | None,
    out: Tensor,
    rstd_M: Tensor,
) -> None:
    from . import _triton_norm as kernels
    from . import _triton_producer

    rank, columns = stacked_RK.shape
    tile = _triton_producer.producer_tile(_triton_producer.PRODUCER_TILES, rank, x_MK, weight_K[None], stacked_RK, out)
    if tile is not None:
        kernels.forward_lora(x_MK, weight_K, eps, offset, stacked_RK, left, scale_R, mask_MG, group_R, out, rstd_M, tile)
    else:
        kernels.forward(x_MK, weight_K, eps, offset, out[:, left : left + columns], rstd_M)
        store_activation_columns(out, left, stacked_RK, scale_R, mask_MG, group_R)


@_rms_norm_lora.register_fake
def _(*_: Any) -> None:
    return None


def rms_norm_lora(
    x: Tensor,
    weight: Tensor,
    eps: float,
    lora_A_stacked: Tensor,
    left: int,
    column_scale: Tensor,
    *,
    mask: Tensor | None = None,
    column_group: Tensor | None = None,
    offset: float = 0.0,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` into the middle of a bordered buffer, and the S columns of the LoRA projections that read it, in one launch.

    A row of the buffer is [ S_left | X | S_right ] with X = rms_norm(x) and S = factor * (X A^T): one operand of the GEMM that
    does the frozen weights and the adapters together. Not differentiable: a building block for an autograd function (the
    backward of the norm itself needs x, weight and the rstd returned).

    Triton makes S with tensor cores while X is in registers, for bfloat16 and float16 and sizes that are multiples of 8: from
    1024 rows on for up to 28 columns, from 2048 rows for up to 57, from 4096 rows for up to 115. Otherwise it is the plain
    kernel and one skinny GEMM, with the same result but for the order of the sums.

    Args:
        x: [..., K] (M rows); weight: [K]; eps, offset: as in `rms_norm`. The buffer has x's dtype.
        lora_A_stacked: [R, K], any float dtype (used in x's), R = left + right; row c makes column c of S. Rows of zeros pad.
        left: how many columns lie before X; left and right are multiples of 8.
        column_scale: [R], float: alpha / r of the column's adapter.
        mask: [M, G], float: column c of row m is multiplied by mask[m, column_group[c]], and is 0 where that is 0 even if A
            holds NaN. None: ones.
        column_group: [R], int32 or int64, in [0, G); given where mask is.
        out: [M, R + K] to write to, rows of stride 1; None: a new one.

    Returns:
        (buffer [M, left + K + right], rstd [M] in float32, float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype, device or number, or autograd is on and an input requires a gradient.
    """
    _check(x, weight, eps, offset)
    refuse_gradients("rms_norm_lora", x, weight, lora_A_stacked)
    columns = x.shape[-1]
    x_MK = rows_of(x, columns)
    rows = x_MK.shape[0]
    check_stacked(lora_A_stacked, left, columns, x)
    rank = lora_A_stacked.shape[0]
    check_columns(rank, rows, x, column_scale, mask, column_group)
    if out is None:
        out = x.new_empty((rows, columns + rank))
    check_out(out, rows, columns + rank, x)
    stacked_RK = rows_of(lora_A_stacked.to(x.dtype), columns)
    rstd_M = x.new_empty(rows, dtype=accumulate_dtype(x.dtype))
    if use_triton(x, backend) and torch.float64 not in (x.dtype, weight.dtype):
        scale_R, mask_MG, group_R = column_arguments(column_scale, mask, column_group)
        if rows:
            _rms_norm_lora(
                x_MK, weight.contiguous(), float(eps), float(offset), stacked_RK, left, scale_R, mask_MG, group_R,
                out, rstd_M,
            )  # fmt: skip
        return out, rstd_M
    y_MK, rstd_M1 = _normalised(x_MK, weight, eps, offset)
    out[:, left : left + columns] = y_MK
    store_activation_columns(out, left, stacked_RK, column_scale, mask, column_group)
    return out, rstd_M.copy_(rstd_M1.squeeze(1))


def check_stacked(stacked: Tensor, left: int, columns: int, x: Tensor) -> None:
    """Raise unless these are the stacked A of an input of `columns` columns and how many of its rows make columns before X."""
    check_float("lora_A_stacked", stacked)
    if stacked.dim() != 2 or stacked.shape[1] != columns:
        raise ValueError(f"lora_A_stacked must have shape [R, {columns}] (the width of the input), got {list(stacked.shape)}")
    check_device("lora_A_stacked", stacked, "the input", x)
    check_border("left", left)
    if left > stacked.shape[0] or (stacked.shape[0] - left) % 8:
        raise ValueError(f"lora_A_stacked must have {left} (left) rows and a multiple of 8 more, got {stacked.shape[0]}")


def column_arguments(scale: Tensor, mask: Tensor | None, group: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In the dtypes and strides that the kernels read."""
    if mask is None or group is None:
        return scale.float().contiguous(), None, None
    return scale.float().contiguous(), mask.float().contiguous(), group.int().contiguous()
