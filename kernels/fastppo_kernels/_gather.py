"""Rows gathered by an index with repetitions, and the sum of gradients over those repetitions in a fixed order.

    gather_rows:  out[j] = x[index[j]]          its gradient, sum_rows:  out[r] = sum over {j: index[j] = r} of x[j]

The sum goes through the index sorted by row (made once for all layers), so nothing is added with atomics and the result is
the same in every run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import accumulate_dtype
from ._dispatch import Backend, use_triton


class Occurrences(NamedTuple):
    """Where each of R rows occurs in an index of N entries: row r at order_N[start_R1[r]:start_R1[r + 1]]. Both int64."""

    order_N: Tensor
    start_R1: Tensor


def occurrences(index_N: Tensor, rows: int) -> Occurrences:
    """The places of each row in ``index_N`` in ascending order, without synchronising."""
    sorted_N, order_N = index_N.sort(stable=True)
    return Occurrences(order_N, torch.searchsorted(sorted_N, torch.arange(rows + 1, device=index_N.device)))


def reference(x_NC: Tensor, where: Occurrences, dtype: torch.dtype) -> Tensor:
    """The definition; also what runs on the CPU. Sums in float32 (float64 for float64), rounded once."""
    order_N, start_R1 = where
    rows = start_R1.shape[0] - 1
    total_RC = torch.zeros(rows, *x_NC.shape[1:], dtype=accumulate_dtype(x_NC.dtype), device=x_NC.device)
    row_N = torch.repeat_interleave(torch.arange(rows, device=x_NC.device), start_R1.diff(), output_size=order_N.shape[0])
    add_rows_(total_RC, row_N, x_NC[order_N].to(total_RC.dtype))
    return total_RC.to(dtype)


def add_rows_(total: Tensor, index_N: Tensor, value: Tensor) -> None:
    """total[index[j]] += value[j], where rows repeat, always in the same order.

    On CUDA `index_add_` uses atomics and `index_put_` sorts; on the CPU it is `index_add_` that goes through the rows in turn.
    """
    if total.is_cuda:
        total.index_put_((index_N,), value, accumulate=True)
    else:
        total.index_add_(0, index_N, value)


def sum_rows(x: Tensor, where: Occurrences, dtype: torch.dtype, backend: Backend | None = None) -> Tensor:
    """Sums of the rows of ``x`` [N, ...] that are occurrences of one row: [R, ...] in ``dtype``, 0 for a row without any."""
    if x.dtype == torch.float64 or x.numel() == 0 or not use_triton(x, backend):
        return reference(x, where, dtype)
    from . import _triton_gather

    return _triton_gather.sum_rows(x, where, dtype)


@torch.library.custom_op("fastppo_kernels::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, index_N: Tensor, order_N: Tensor, start_R1: Tensor) -> Tensor:
    return x.index_select(0, index_N)


@_gather_rows.register_fake
def _(x: Tensor, index_N: Tensor, order_N: Tensor, start_R1: Tensor) -> Tensor:
    return x.new_empty(index_N.shape[0], *x.shape[1:])


@torch.library.custom_op("fastppo_kernels::sum_rows", mutates_args=())
def _sum_rows(x: Tensor, order_N: Tensor, start_R1: Tensor) -> Tensor:
    return sum_rows(x, Occurrences(order_N, start_R1), x.dtype)


@_sum_rows.register_fake
def _(x: Tensor, order_N: Tensor, start_R1: Tensor) -> Tensor:
    return x.new_empty(start_R1.shape[0] - 1, *x.shape[1:])


def _setup_context(ctx, inputs, output) -> None:
    _, _, order_N, start_R1 = inputs
    ctx.save_for_backward(order_N, start_R1)


def _backward(ctx, grad: Tensor):
    return _sum_rows(grad, *ctx.saved_tensors), None, None, None


_gather_rows.register_autograd(_backward, setup_context=_setup_context)


def gather_rows(x: Tensor, index_N: Tensor, where: Occurrences) -> Tensor:
    """x[index_N] for rows of ``x`` [R, ...]; differentiable in ``x``. ``where`` is ``occurrences(index_N, R)``."""
    return _gather_rows(x, index_N, *where)
