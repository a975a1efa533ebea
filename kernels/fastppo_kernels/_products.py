"""Matrix products with a result wider than their factors, and what the adapter ops do with those: shared by all of them.

Sums are kept in float32 (float64 for float64). One setting of torch decides whether that holds within a CUDA product whose
result is in half precision: with `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` (True unless changed;
`allow_fp16_reduced_precision_reduction` likewise) cuBLAS may split the contraction and add the parts up in the result's dtype.
Products with a float32 result are not affected.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._eager import is_eager
from .frozen_linear import frozen_linear

# Up to so many rows the Triton GEMM adds up S = x A^T beside y; above, one product of its own makes it once for all programs.
ROWS_WITH_S = 64


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Dtypes within are as written, whatever autocast says. Entering takes a few microseconds: only where it is on."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of one dtype, summed up in float32 and given in `dtype`: that of the factors, or float32 and then never rounded."""
    with no_autocast(a.device):
        if a.dtype == dtype:
            recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
            return frozen_linear(a, b.t()) if is_eager(a) and not recorded else a @ b
        if a.is_cuda and dtype == torch.float32 and a.dtype != torch.float64 and a.numel() > 0:
            return torch.mm(a, b, out_dtype=dtype)
        wide = torch.promote_types(a.dtype, dtype)
        return (a.to(wide) @ b.to(wide)).to(dtype)


def masked(s: Tensor, factor: Tensor) -> Tensor:
    """factor * s, exactly 0 where the factor is, whatever s holds there; a bool factor is 1 and 0."""
    if factor.dtype == torch.bool:
        return torch.where(factor, s, 0.0)
    return torch.where(factor != 0, s * factor.to(s.dtype), 0.0)
