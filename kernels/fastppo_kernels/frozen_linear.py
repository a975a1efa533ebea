"""Plain products with frozen weights, at the speed of the vector units."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._eager import is_eager

# oneDNN makes machine code for every new number of rows, which takes 2 ms: few numbers, then.
_ROW_MULTIPLE = 64
# Multiplications below which the call of oneDNN costs more than it spares.
_ONEDNN_WORK = 1 << 22


@cache
def _has_onednn() -> bool:
    """Whether oneDNN is to multiply float32: with AVX-512 it was twice as fast on an AMD EPYC as what torch takes, MKL."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = torch.ones(_ROW_MULTIPLE, 3), torch.full((2, 3), 0.5)
    try:  # an operator that torch made for its compiler
        found = torch.ops.mkldnn._linear_pointwise.binary(x, torch.ones(_ROW_MULTIPLE, 2), weight, None, "add")
        return bool((torch.ops.mkldnn._linear_pointwise(x, weight, torch.ones(2), "none", [], "") == found).all())
    except (RuntimeError, TypeError):
        return False


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Products of so many rows, or a multiple of it, are the fastest per row: worth padding activations for."""
    usable = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.enabled and _has_onednn()
    return _ROW_MULTIPLE if usable else 1


@torch.no_grad()
def frozen_linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, add_MN: Tensor | None = None) -> Tensor:
    """x weight^T + bias + add, without autograd: within an op that makes its gradients itself, or where there are none.

    On a CPU with AVX-512, in float32, where `row_multiple` divides the number of rows, this is oneDNN's product, else torch's.

    Args:
        x_MK, weight_NK, bias_N: of one dtype and device. add_MN: added to the product; its memory may be used up.

    Returns:
        [M, N], which requires no gradient.
    """
    rows, width = x_MK.shape
    if is_eager(x_MK) and rows % _ROW_MULTIPLE == 0 and rows * width * len(weight_NK) >= _ONEDNN_WORK:
        if row_multiple(x_MK.device, x_MK.dtype) > 1 and x_MK.is_contiguous():
            if add_MN is None:
                return onednn_linear(x_MK, weight_NK, bias_N)
            return torch.ops.mkldnn._linear_pointwise.binary(x_MK, add_MN, weight_NK, bias_N, "add")
    if add_MN is None:
        return F.linear(x_MK, weight_NK, bias_N)
    add_MN.addmm_(x_MK, weight_NK.t())
    return add_MN if bias_N is None else add_MN.add_(bias_N)


def onednn_linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN whatever the sizes; x contiguous. Only where `row_multiple` is above 1."""
    return torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias_N, "none", [], "")
