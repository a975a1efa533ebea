"""The sum over the occurrences of a row as a Triton kernel: one program a row and block of columns, no atomics."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._gather import Occurrences

BLOCK_N = 16  # occurrences that a program reads at a time
BLOCK_C = 128
_WARPS = 4


# `columns` (heads times their size) is one number a model, so it may be specialised: rows at multiples of 16 bytes are read
# 8 columns at a time.
@triton.jit(do_not_specialize_on_alignment=["order_ptr", "start_ptr"])
def _sum_rows_kernel(
    x_ptr, order_ptr, start_ptr, out_ptr, columns: tl.int64, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < columns
    first = tl.load(start_ptr + row)
    end = tl.load(start_ptr + row + 1)
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for start in range(first, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        here = place < end
        source = tl.load(order_ptr + place, mask=here, other=0)
        x = tl.load(x_ptr + source[:, None] * columns + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        total += x.to(tl.float32)
    tl.store(out_ptr + row * columns + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(x: Tensor, where: Occurrences, dtype: torch.dtype) -> Tensor:
    """The launch: x [N, ...] -> [R, ...] in ``dtype``; arguments are checked by the caller."""
    order_N, start_R1 = where
    rows, x = start_R1.shape[0] - 1, x.contiguous()
    out = x.new_empty(rows, *x.shape[1:], dtype=dtype)
    if out.numel():
        columns = out[0].numel()
        with torch.cuda.device_of(x):
            _sum_rows_kernel[(rows, triton.cdiv(columns, BLOCK_C))](
                x, order_N.contiguous(), start_R1.contiguous(), out, columns, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C,
                num_warps=_WARPS,
            )  # fmt: skip
    return out


def configurations() -> Iterator[Configuration]:
    """What `sum_rows` can choose where the sums are rounded to the dtype of the rows."""
    constants = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "order_ptr": "*i64", "start_ptr": "*i64", "columns": "i64"}
        for divisible in ((), ("x_ptr", "out_ptr", "columns")):
            name = f"sum_rows {dtype}{', aligned rows' if divisible else ''}"
            yield Configuration(name, _sum_rows_kernel, signature, constants, _WARPS, 3, divisible)
