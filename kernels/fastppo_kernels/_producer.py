"""What the ops that write a bordered activation or gradient buffer share: see `rms_norm_lora`, `swiglu_backward_lora`.

A row of an activation buffer is ``[ S_left | X | S_right ]``, one of a gradient buffer ``[ dY_0 | dY_1 | ... | dS ]``. Such
rows are one operand of a GEMM whose other operand has the adapter beside the frozen weight, ``[X | S] [W | B]^T``, so that
LoRA rides in the same contraction. This is the torch half: the checks, and the S columns from a product that is already there.
"""

import torch
from torch import Tensor

from ._checks import accumulate_dtype, check_device, check_float, check_integer, check_shape
from ._products import masked, product

# Borders are this many columns, or a multiple: 16 bytes of a half-precision buffer.
BORDER = 8


def refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would be on: a building block without a gradient must not cut a graph in silence."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{op} has no gradient of its own: call it under torch.no_grad() or inside an autograd function")


def check_border(name: str, size: int) -> None:
    check_integer(name, size, at_least=0)
    if size % BORDER:
        raise ValueError(f"{name} must be a multiple of {BORDER}, got {size}")


def check_columns(
    rank: int, rows: int, like: Tensor, column_scale_R: Tensor, mask_MG: Tensor | None, column_group_R: Tensor | None
) -> None:
    """Raise unless scale, mask and group fit `rank` columns and `rows` rows on the device of `like`."""
    check_float("column_scale", column_scale_R)
    check_shape("column_scale", column_scale_R, (rank,), "one number for each column of S")
    check_device("column_scale", column_scale_R, "the input", like)
    if (mask_MG is None) != (column_group_R is None):
        raise ValueError("mask and column_group go together: give both or neither")
    if mask_MG is None or column_group_R is None:
        return
    check_float("mask", mask_MG)
    if mask_MG.dim() != 2 or mask_MG.shape[0] != rows:
        raise ValueError(f"mask must have shape [{rows}, G] (a row for each row of the input), got {list(mask_MG.shape)}")
    check_device("mask", mask_MG, "the input", like)
    if column_group_R.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"column_group must have one of the dtypes int32, int64, got {column_group_R.dtype}")
    check_shape("column_group", column_group_R, (rank,), "the mask column of each column of S")
    check_device("column_group", column_group_R, "the input", like)


def check_out(
    out: Tensor, rows: int, columns: int, like: Tensor, name: str = "out", why: str = "[rows, S and X columns]"
) -> None:
    check_shape(name, out, (rows, columns), why)
    if out.dtype != like.dtype or (out.shape[0] > 1 and out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(f"{name} must have dtype {like.dtype} and stride 1 in its rows, got {out.dtype}, {list(out.stride())}")
    check_device(name, out, "the input", like)


def rows_of(tensor: Tensor, width: int) -> Tensor:
    """[..., width] as [M, width] with stride 1 within a row; a copy only where the strides ask for one."""
    flat = tensor.reshape(-1, width)
    return flat if flat.stride(1) == 1 or width <= 1 else flat.contiguous()


def lora_columns(
    product_MR: Tensor, column_scale_R: Tensor, mask_MG: Tensor | None, column_group_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """S or dS from a product in the accumulation dtype: times scale and mask, 0 where the mask is 0 whatever the product is."""
    columns_MR = product_MR * column_scale_R.to(product_MR.dtype)
    if mask_MG is not None and column_group_R is not None:
        columns_MR = masked(columns_MR, mask_MG.to(product_MR.dtype)[:, column_group_R.long()])
    return columns_MR.to(dtype)


def wide_product(a_MK: Tensor, b_KR: Tensor) -> Tensor:
    """a @ b in the accumulation dtype, rounded no further; b is rounded to a's dtype."""
    return product(a_MK, b_KR.to(a_MK.dtype), accumulate_dtype(a_MK.dtype))


def store_activation_columns(
    out: Tensor,
    left: int,
    stacked_RK: Tensor,
    column_scale_R: Tensor,
    mask_MG: Tensor | None,
    column_group_R: Tensor | None,
) -> None:
    """The S columns of an activation buffer from its X columns, by one skinny GEMM."""
    rank, width = stacked_RK.shape
    if not rank:
        return
    s_MR = wide_product(out[:, left : left + width], stacked_RK.t())
    s_MR = lora_columns(s_MR, column_scale_R, mask_MG, column_group_R, out.dtype)
    out[:, :left] = s_MR[:, :left]
    out[:, left + width :] = s_MR[:, left:]
