"""What the Triton kernels that make S or dS columns share, and what describes kernels for the compile report."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration

HALF = (torch.bfloat16, torch.float16)
UNIT = tl.constexpr(8)


@triton.jit
def store_columns(
    product_MR, out_rows, row, rows, first, count, left, gap, scale, mask, mask_stride, group, has_mask,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write columns first, ..., first + count - 1 of S: column c lies at c, and from `left` on at c + gap."""
    c = first + tl.arange(0, BLOCK_R)
    wanted = c < first + count
    value = product_MR * tl.load(scale + c, mask=wanted, other=0.0)[None, :]
    inside = (row < rows)[:, None] & wanted[None, :]
    if has_mask:
        place = tl.load(group + c, mask=wanted, other=0)
        factor = tl.load(mask + (row * mask_stride)[:, None] + place[None, :], mask=inside, other=0.0)
        value = tl.where(factor != 0.0, value * factor, 0.0)  # NaN of an adapter that is off goes nowhere
    place = c + tl.where(c >= left, gap, 0)
    tl.store(out_rows + place[None, :], value.to(out_rows.dtype.element_ty), mask=inside)


# (BLOCK_M, BLOCK_R) of the kernels that make S -> (BLOCK_K, warps, stages).
Tiles = dict[tuple[int, int], tuple[int, int, int]]
PRODUCER_TILES: Tiles = {
    (16, 16): (128, 4, 3),
    (16, 32): (128, 4, 3),
    (32, 16): (128, 4, 3),
    (32, 32): (128, 4, 3),
    (32, 64): (128, 4, 3),
    (64, 16): (64, 4, 4),
    (64, 32): (64, 4, 4),
    (64, 64): (64, 4, 4),
    (64, 128): (64, 8, 4),
}
# Fewer blocks of rows leave half of an H100's multiprocessors idle for the whole of a sweep: then a GEMM, which also splits the
# columns, is quicker.
_FEWEST_BLOCKS = 64


def producer_tile(tiles: Tiles, rank: int, *matrices: Tensor) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_R) of a kernel that makes `rank` columns of S itself; None where a skinny GEMM is to do it.

    A is read from L2 again by every block of BLOCK_M rows. L2 being about 1.8 times as fast as memory, that is cheaper than to
    read X once more while rank <= 1.8 BLOCK_M. This is a model, not a measurement. The rows of all matrices (the first tells
    how many there are) must begin at multiples of 16 bytes, in one half-precision dtype: float32 has no matrix instruction of
    its precision.
    """
    rows, dtype = matrices[0].shape[0], matrices[0].dtype
    if dtype not in HALF or any(tensor.dtype != dtype or tensor.data_ptr() % 16 for tensor in matrices):
        return None
    if any(size % 8 for tensor in matrices for size in (tensor.shape[-1], *tensor.stride()[:-1])):
        return None
    for block_m in (64, 32, 16):
        tile = block_m, max(16, triton.next_power_of_2(rank))
        if 0 < rank <= 1.8 * block_m and triton.cdiv(rows, block_m) >= _FEWEST_BLOCKS and tile in tiles:
            return tile
    return None


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INTEGERS = ("rows", "columns", "left", "rank", "rank_gate", "rank_up", "has_mask")


def signature_of(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, str]:
    """The types of a kernel's run-time arguments: those given, i32 for sizes and strides, fp32 for a float or its pointer."""
    known = {name: "i32" for name in kernel.arg_names if name in _INTEGERS or name.endswith("_stride")}
    known |= {"eps": "fp32", "offset": "fp32", "group": "*i32"} | types
    return {name: known.get(name, "*fp32") for name in kernel.arg_names if name not in constants}


def producer_configurations(
    kernel: Any, whole: tuple[str, ...], tiles: Tiles, features: dict[str, bool] | None = None
) -> Iterator[Configuration]:
    """Every tile of a kernel that makes S; `whole`: its arguments of the activations' dtype, that begin at 16 bytes."""
    said = "".join(f" {name}" for name, on in (features or {}).items() if on)
    for dtype, ((block_m, block_r), (block_k, warps, stages)) in product(HALF, tiles.items()):
        constants = {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": block_r, "STAGES": stages} | (features or {})
        signature = signature_of(kernel, constants, {name: "*" + NAMES[dtype] for name in whole})
        name = f"{kernel.__name__} {NAMES[dtype]} {block_m}x{block_k} R{block_r}{said}"
        yield Configuration(name, kernel, signature, constants, warps, stages, whole)
