"""Triton kernels of `rms_norm` and of its form that also makes the adapters' S columns.

rms_norm: one program normalises a few whole rows that stay in registers (rows wider than 8192 are swept twice). Backward needs
one launch too; where the weight is trained, a program keeps the sum over its rows in registers and a second stage adds up what
256 programs found, in a fixed order.

rms_norm_lora: a program owns BLOCK_M rows, sweeps them for the sum of squares, and sweeps them again *backwards*, so that what
was read last is read first while it is still in the L2 cache: normalises, writes X, and multiplies the rounded X by the
stacked A with `tl.dot`. X is then not read from memory a second time for S = X A^T; A is read from L2 once for every BLOCK_M
rows instead.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._triton_producer import HALF, NAMES, PRODUCER_TILES, UNIT, producer_configurations, signature_of, store_columns

# Columns of a tile, its rows, warps: 8 to 32 entries a thread. The last sweeps rows of any width.
_TILES = ((256, 4, 4), (1024, 2, 4), (4096, 1, 8), (8192, 1, 8))
_WIDE = (4096, 1, 8)
# Partial sums of the weight's gradient; a constant, so that they are added in the same order on every GPU.
_PROGRAMS = 256


@triton.jit
def _apply(x, rstd, weight, offset, NARROW: tl.constexpr):
    """(x rstd) (weight + offset); Llama rounds x rstd to the input's type before the weight, Gemma (offset != 0) does not."""
    normal = x * rstd
    normal = tl.where(offset == 0.0, normal.to(NARROW).to(tl.float32), normal)
    return normal * (weight + offset)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, x_stride, weight, y, y_stride, rstds, rows, columns, eps, offset,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)[None, :]
    x_rows = x + row[:, None] * x_stride
    y_rows = y + row[:, None] * y_stride
    inside_row = (row < rows)[:, None]
    if WIDE:
        squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for start in range(0, columns, BLOCK_K):
            inside = inside_row & (start + column < columns)
            value = tl.load(x_rows + start + column, mask=inside, other=0.0).to(tl.float32)
            squares += value * value
        rstd = tl.rsqrt(tl.sum(squares, 1) / columns + eps)
        for start in range(0, columns, BLOCK_K):
            inside = inside_row & (start + column < columns)
            value = tl.load(x_rows + start + column, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(weight + start + column, mask=start + column < columns, other=0.0).to(tl.float32)
            value = _apply(value, rstd[:, None], scale, offset, x.dtype.element_ty)
            tl.store(y_rows + start + column, value.to(y.dtype.element_ty), mask=inside)
    else:
        inside = inside_row & (column < columns)
        value = tl.load(x_rows + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)
        value = _apply(value, rstd[:, None], scale, offset, x.dtype.element_ty)
        tl.store(y_rows + column, value.to(y.dtype.element_ty), mask=inside)
    tl.store(rstds + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    grad_y, grad_y_stride, x, x_stride, weight, rstds, grad_x, partial, rows, columns, offset,
    WIDE: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = rstd (m - n mean(m n)), dw = sum_rows dy n, with n = x rstd, m = dy (weight + offset)."""
    column = tl.arange(0, BLOCK_K)[None, :]
    program = tl.program_id(0)
    partial_row = partial + program.to(tl.int64) * columns
    if not WIDE:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + offset
    grad_weight = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside_row = (row < rows)[:, None]
        x_rows = x + row[:, None] * x_stride
        grad_y_rows = grad_y + row[:, None] * grad_y_stride
        grad_x_rows = grad_x + row[:, None] * columns
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        if WIDE:
            products = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
            for start in range(0, columns, BLOCK_K):
                here = start + column
                inside = inside_row & (here < columns)
                normal = tl.load(x_rows + here, mask=inside, other=0.0).to(tl.float32) * rstd
                wide_scale = tl.load(weight + here, mask=here < columns, other=0.0).to(tl.float32) + offset
                slope = tl.load(grad_y_rows + here, mask=inside, other=0.0).to(tl.float32)
                products += slope * wide_scale * normal
            mean = (tl.sum(products, 1) / columns)[:, None]
            for start in range(0, columns, BLOCK_K):
                here = start + column
                inside = inside_row & (here < columns)
                normal = tl.load(x_rows + here, mask=inside, other=0.0).to(tl.float32) * rstd
                wide_scale = tl.load(weight + here, mask=here < columns, other=0.0).to(tl.float32) + offset
                slope = tl.load(grad_y_rows + here, mask=inside, other=0.0).to(tl.float32)
                value = rstd * (slope * wide_scale - normal * mean)
                tl.store(grad_x_rows + here, value.to(grad_x.dtype.element_ty), mask=inside)
                if WEIGHT_GRAD:  # the row of sums is this program's own; each thread adds to what it stored itself
                    used = tl.where(offset == 0.0, normal.to(x.dtype.element_ty).to(tl.float32), normal)
                    added = tl.sum(slope * used, 0)[None, :]
                    first = tl.load(partial_row + here, mask=(here < columns) & (tile != program), other=0.0)
                    tl.store(partial_row + here, first + added, mask=here < columns)
        else:
            inside = inside_row & (column < columns)
            normal = tl.load(x_rows + column, mask=inside, other=0.0).to(tl.float32) * rstd
            slope = tl.load(grad_y_rows + column, mask=inside, other=0.0).to(tl.float32)
            mean = (tl.sum(slope * scale * normal, 1) / columns)[:, None]
            value = rstd * (slope * scale - normal * mean)
            tl.store(grad_x_rows + column, value.to(grad_x.dtype.element_ty), mask=inside)
            if WEIGHT_GRAD:
                used = tl.where(offset == 0.0, normal.to(x.dtype.element_ty).to(tl.float32), normal)
                grad_weight += slope * used
    if WEIGHT_GRAD and not WIDE:
        tl.store(partial_row + column, tl.sum(grad_weight, 0)[None, :], mask=column < columns)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_residual_backward_kernel(
    grad_y, grad_y_stride, x, x_stride, weight, residual, residual_stride, grad_x, grad_x_stride, y, y_stride,
    rows, columns, eps, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of the norm plus residual, rounded once, and y again; rstd comes out of the same sweep as the sum for dx."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)[None, :]
    inside_row = (row < rows)[:, None]
    x_rows = x + row[:, None] * x_stride
    y_rows = y + row[:, None] * y_stride
    grad_y_rows = grad_y + row[:, None] * grad_y_stride
    grad_x_rows = grad_x + row[:, None] * grad_x_stride
    residual_rows = residual + row[:, None] * residual_stride
    if WIDE:
        squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        products = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for start in range(0, columns, BLOCK_K):
            here = start + column
            inside = inside_row & (here < columns)
            value = tl.load(x_rows + here, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(weight + here, mask=here < columns, other=0.0).to(tl.float32)
            slope = tl.load(grad_y_rows + here, mask=inside, other=0.0).to(tl.float32)
            squares += value * value
            products += slope * scale * value
        rstd = tl.rsqrt(tl.sum(squares, 1) / columns + eps)[:, None]
        mean = tl.sum(products, 1)[:, None] / columns * rstd
        for start in range(0, columns, BLOCK_K):
            here = start + column
            inside = inside_row & (here < columns)
            value = tl.load(x_rows + here, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(weight + here, mask=here < columns, other=0.0).to(tl.float32)
            slope = tl.load(grad_y_rows + here, mask=inside, other=0.0).to(tl.float32)
            beside = tl.load(residual_rows + here, mask=inside, other=0.0).to(tl.float32)
            again = _apply(value, rstd, scale, 0.0, x.dtype.element_ty)
            tl.store(y_rows + here, again.to(y.dtype.element_ty), mask=inside)
            slope = rstd * (slope * scale - value * rstd * mean) + beside
            tl.store(grad_x_rows + here, slope.to(grad_x.dtype.element_ty), mask=inside)
    else:
        inside = inside_row & (column < columns)
        value = tl.load(x_rows + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        slope = tl.load(grad_y_rows + column, mask=inside, other=0.0).to(tl.float32)
        beside = tl.load(residual_rows + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)[:, None]
        again = _apply(value, rstd, scale, 0.0, x.dtype.element_ty)
        tl.store(y_rows + column, again.to(y.dtype.element_ty), mask=inside)
        mean = (tl.sum(slope * scale * value, 1) / columns)[:, None] * rstd
        slope = rstd * (slope * scale - value * rstd * mean) + beside
        tl.store(grad_x_rows + column, slope.to(grad_x.dtype.element_ty), mask=inside)


# Sizes are given in units of 8 entries, 16 bytes: with borders of 8 a stride is often no multiple of 16 entries, which is all
# that triton looks for, and 16-byte accesses (and with them cp.async) would be lost.
@triton.jit(
    do_not_specialize=[
        "x_stride", "stacked_stride", "mask_stride", "has_mask", "out_stride", "rows", "columns", "left", "rank"
    ],
    do_not_specialize_on_alignment=["rstds", "scale", "mask", "group"],
)  # fmt: skip
def rms_norm_lora_kernel(
    x, x_stride, weight, stacked, stacked_stride, scale, mask, mask_stride, group, has_mask, out, out_stride, rstds,
    rows, columns, left, rank, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width = columns * UNIT
    border = left * UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_row = (row < rows)[:, None]
    column = tl.arange(0, BLOCK_K)
    x_rows = x + (row * x_stride)[:, None] * UNIT
    out_rows = out + (row * out_stride)[:, None] * UNIT
    adapter = tl.arange(0, BLOCK_R)
    stacked_rows = stacked + (adapter.to(tl.int64) * stacked_stride)[None, :] * UNIT

    squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        here = start + column
        value = tl.load(x_rows + here[None, :], mask=inside_row & (here < width)[None, :], other=0.0).to(tl.float32)
        squares += value * value
    rstd = tl.rsqrt(tl.sum(squares, 1) / width + eps)
    tl.store(rstds + row, rstd, mask=row < rows)

    product_MR = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    blocks = tl.cdiv(width, BLOCK_K)
    for step in tl.range(0, blocks, num_stages=STAGES):
        here = (blocks - 1 - step) * BLOCK_K + column
        inside = inside_row & (here < width)[None, :]
        value = tl.load(x_rows + here[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + here, mask=here < width, other=0.0).to(tl.float32)
        value = _apply(value, rstd[:, None], factor[None, :], offset, x.dtype.element_ty).to(out.dtype.element_ty)
        tl.store(out_rows + (border + here)[None, :], value, mask=inside)
        wanted = (here < width)[:, None] & (adapter < rank)[None, :]
        a = tl.load(stacked_rows + here[:, None], mask=wanted, other=0.0)
        product_MR = tl.dot(value, a, product_MR)
    store_columns(product_MR, out_rows, row, rows, 0, rank, border, width, scale, mask, mask_stride, group, has_mask, BLOCK_R)


def _tile(columns: int, *matrices: Tensor) -> tuple[bool, int, int, int]:
    """(swept in blocks?, BLOCK_K, BLOCK_M, warps).

    Rows that do not all begin at multiples of 16 entries are read in narrow pieces whatever the tile: they have one for all
    widths, and a third of the kernels to compile is saved.
    """
    aligned = not any(size % 16 for size in (columns, *(x.stride(0) for x in matrices), *(x.data_ptr() for x in matrices)))
    for block_k, block_m, warps in _TILES if aligned else ():
        if columns <= block_k:
            return False, block_k, block_m, warps
    return True, *_WIDE


def forward(x_MK: Tensor, weight_K: Tensor, eps: float, offset: float, y_MK: Tensor, rstd_M: Tensor) -> None:
    """Fill y (rows of any stride) and rstd (float32)."""
    rows, columns = x_MK.shape
    wide, block_k, block_m, warps = _tile(columns, x_MK, y_MK)
    with torch.cuda.device_of(x_MK):
        rms_norm_kernel[(triton.cdiv(rows, block_m),)](
            x_MK, x_MK.stride(0), weight_K, y_MK, y_MK.stride(0), rstd_M, rows, columns, eps, offset,
            WIDE=wide, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=1,
        )  # fmt: skip


def backward(
    grad_y_MK: Tensor,
    x_MK: Tensor,
    weight_K: Tensor,
    rstd_M: Tensor,
    offset: float,
    grad_x_MK: Tensor,
    need_weight: bool,
) -> Tensor:
    """Fill grad_x (contiguous) and return the weight's gradient in float32, of no entries where it is not wanted."""
    rows, columns = x_MK.shape
    wide, block_k, block_m, warps = _tile(columns, x_MK, grad_y_MK)
    tiles = triton.cdiv(rows, block_m)
    programs = min(tiles, _PROGRAMS) if need_weight else tiles
    partial_PK = torch.empty((programs, columns) if need_weight else (0, 0), dtype=torch.float32, device=x_MK.device)
    with torch.cuda.device_of(x_MK):
        rms_norm_backward_kernel[(programs,)](
            grad_y_MK, grad_y_MK.stride(0), x_MK, x_MK.stride(0), weight_K, rstd_M, grad_x_MK,
            partial_PK if need_weight else rstd_M, rows, columns, offset,
            WIDE=wide, WEIGHT_GRAD=need_weight, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return partial_PK.sum(0)


def residual_backward(
    grad_y_MK: Tensor, x_MK: Tensor, weight_K: Tensor, eps: float, residual_MK: Tensor, grad_x_MK: Tensor, y_MK: Tensor
) -> None:
    """Fill grad_x and y; all in one dtype, rows of any stride."""
    rows, columns = x_MK.shape
    wide, block_k, block_m, warps = _tile(columns, grad_y_MK, x_MK, residual_MK, grad_x_MK, y_MK)
    with torch.cuda.device_of(x_MK):
        rms_norm_residual_backward_kernel[(triton.cdiv(rows, block_m),)](
            grad_y_MK, grad_y_MK.stride(0), x_MK, x_MK.stride(0), weight_K, residual_MK, residual_MK.stride(0),
            grad_x_MK, grad_x_MK.stride(0), y_MK, y_MK.stride(0), rows, columns, eps,
            WIDE=wide, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=1,
        )  # fmt: skip


def forward_lora(
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
    tile: tuple[int, int],
) -> None:
    """Fill the buffer and rstd; the stacked A has x's dtype, scale and mask are float32, group is int32."""
    (rows, columns), rank = x_MK.shape, len(stacked_RK)
    block_m, block_r = tile
    block_k, warps, stages = PRODUCER_TILES[tile]
    with torch.cuda.device_of(x_MK):
        rms_norm_lora_kernel[(triton.cdiv(rows, block_m),)](
            x_MK, x_MK.stride(0) // 8, weight_K, stacked_RK, stacked_RK.stride(0) // 8, scale_R,
            scale_R if mask_MG is None else mask_MG, 0 if mask_MG is None else mask_MG.stride(0),
            scale_R if group_R is None else group_R, int(mask_MG is not None), out, out.stride(0) // 8, rstd_M,
            rows, columns // 8, left // 8, rank, eps, offset,
            BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """What the launchers above can choose, for rows that begin at multiples of 16 bytes and ones that do not."""
    tiles = [((False, *tile), True) for tile in _TILES] + [((True, *_WIDE), True), ((True, *_WIDE), False)]
    weights = [(dtype, dtype) for dtype in NAMES] + [(dtype, torch.float32) for dtype in HALF]
    for (dtype, weight), ((wide, block_k, block_m, warps), aligned) in product(weights, tiles):
        result = torch.promote_types(dtype, weight)
        types = {name: "*" + NAMES[dtype] for name in ("x", "grad_x")}
        types |= {"weight": "*" + NAMES[weight]} | {name: "*" + NAMES[result] for name in ("y", "grad_y")}
        tile = {"WIDE": wide, "BLOCK_M": block_m, "BLOCK_K": block_k}
        for kernel, constants in (
            (rms_norm_kernel, tile),
            (rms_norm_backward_kernel, tile | {"WEIGHT_GRAD": False}),
            (rms_norm_backward_kernel, tile | {"WEIGHT_GRAD": True}),
        ):
            signature = signature_of(kernel, constants, types)
            whole = ("x", "x_stride", "weight", "y", "y_stride", "grad_y", "grad_y_stride", "grad_x", "partial", "columns")
            features = " dW" if constants.get("WEIGHT_GRAD") else ""
            name = f"{kernel.__name__} {NAMES[dtype]} weight {NAMES[weight]}{features} {block_m}x{block_k}{'+' if wide else ''}"
            divisible = tuple(name for name in whole if aligned and name in signature)
            yield Configuration(name + ("" if aligned else " unaligned"), kernel, signature, constants, warps, 1, divisible)
    kernel = rms_norm_residual_backward_kernel
    for dtype, ((wide, block_k, block_m, warps), aligned) in product(NAMES, tiles):
        types = {name: "*" + NAMES[dtype] for name in ("grad_y", "x", "weight", "residual", "grad_x", "y")}
        constants = {"WIDE": wide, "BLOCK_M": block_m, "BLOCK_K": block_k}
        signature = signature_of(kernel, constants, types)
        name = f"{kernel.__name__} {NAMES[dtype]} {block_m}x{block_k}{'+' if wide else ''}" + ("" if aligned else " unaligned")
        divisible = tuple(name for name in signature if name not in ("rows", "eps")) if aligned else ()
        yield Configuration(name, kernel, signature, constants, warps, 1, divisible)
    yield from producer_configurations(rms_norm_lora_kernel, ("x", "weight", "stacked", "out"), PRODUCER_TILES)
