"""Triton GEMM with the LoRA product inside: y = x W^T + bias + S B^T, S = scale * factor * (x A^T), for dense and NF4 weights.

A program owns BLOCK_N outputs of BLOCK_M rows and computes them *transposed*, W x^T: the weight is then the operand with at
least 64 rows that sm_90's matrix instruction wants, however few rows x has, and tiles of 16 rows waste nothing on padding.
`TRANSPOSED` reads every matrix the other way round, for y = x W + S A, S = scale * factor * (x B), the gradient of the input.

Three modes, where S comes from:

- GIVEN: it is an argument. One launch.
- IN_LOOP: each program adds up S for its rows beside y, in the same loop. One launch; A is read once for every BLOCK_N outputs.
- SPLIT: programs own a part of the contraction too, and some own columns of S instead of y. A second launch adds up what they
  found, in a fixed order, and multiplies S by B. For few outputs, which alone would leave most of the GPU idle.

Sizes and strides are run-time arguments in units of 8 (`_UNIT`), so that the compiler knows that they are multiples of it
without a specialisation for each.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._products import ROWS_WITH_S
from .lora_gemm import NF4_CODE

GIVEN, IN_LOOP, SPLIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_UNIT = tl.constexpr(8)
# Entries of a row that share one absmax at least: what `_dequantise` multiplies at once.
_GROUP = tl.constexpr(64)
# Tiles of rows that are walked together, so that what they read of W stays in the L2 cache.
_TILES_M = tl.constexpr(8)
_CODE = tl.constexpr(NF4_CODE)
# S B^T is added in chunks of this many columns where S is complete.
_BLOCK_R = 32


@triton.jit
def _code_table():
    """The 16 values of NF4 in registers: made once a program, looked up in the loop."""
    place = tl.arange(0, 16)
    table = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        table = tl.where(place == i, _CODE[i], table)
    return table


@triton.jit
def _dequantise(packed, absmax, table, dtype: tl.constexpr):
    """[P, Q / 2] bytes and [P, Q / 64] scales to [P, Q] weights: code times absmax in float32, rounded once."""
    P: tl.constexpr = packed.shape[0]
    Q: tl.constexpr = 2 * packed.shape[1]
    code = tl.interleave(packed >> 4, packed & 15).to(tl.int32)
    # One lookup for both halves: each stages the table in shared memory, behind a barrier.
    value = tl.gather(table, tl.reshape(code, [P * Q]), 0)
    value = tl.reshape(value, [P, absmax.shape[1], _GROUP]) * absmax[:, :, None]
    return tl.reshape(value, [P, Q]).to(dtype)


@triton.jit
def _tile(matrix, stride, row, k, rows, contraction, TRANSPOSED: tl.constexpr):
    """[row, k] of a matrix that is stored [row, k] (TRANSPOSED: [k, row]); 0 outside."""
    inside = (row < rows)[:, None] & (k < contraction)[None, :]
    if TRANSPOSED:
        address = matrix + k.to(tl.int64)[None, :] * stride + row[:, None]
    else:
        address = matrix + row.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def _x_tile(x_columns, k0, contraction, inside_m, BLOCK_K: tl.constexpr):
    k = k0 + tl.arange(0, BLOCK_K)
    return tl.load(x_columns + k[:, None], mask=inside_m & (k < contraction)[:, None], other=0.0)


@triton.jit
def _weight_tile(
    weight, stride, absmax, shift, table, n0, k0, columns, contraction, dtype: tl.constexpr,
    TRANSPOSED: tl.constexpr, QUANTISED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of the weight. NF4: a byte holds two neighbours of a row, the first in its high half."""
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    if QUANTISED:
        if TRANSPOSED:
            row, rows, width = k.to(tl.int64), contraction, columns
            half = n0 // 2 + tl.arange(0, BLOCK_N // 2)
            group = n0 + tl.arange(0, BLOCK_N // _GROUP) * _GROUP
        else:
            row, rows, width = n.to(tl.int64), columns, contraction
            half = k0 // 2 + tl.arange(0, BLOCK_K // 2)
            group = k0 + tl.arange(0, BLOCK_K // _GROUP) * _GROUP
        inside = (row < rows)[:, None]
        packed = tl.load(
            weight + row[:, None] * (width // 2) + half[None, :], mask=inside & (half < width // 2)[None, :], other=0
        )
        place = (row[:, None] * width + group[None, :]) >> shift
        scale = tl.load(absmax + place, mask=inside & (group < width)[None, :], other=0.0)
        tile = _dequantise(packed, scale, table, dtype)
        if TRANSPOSED:
            tile = tl.trans(tile)
    else:
        tile = _tile(weight, stride, n, k, columns, contraction, TRANSPOSED)
    return tile


@triton.jit
def _place(rows, tiles_n, BLOCK_M: tl.constexpr):
    """(tile of rows, tile of columns) of this program: a few tiles of rows at a time walk over all columns."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    band = program // (_TILES_M * tiles_n)
    first = band * _TILES_M
    height = min(tiles_m - first, _TILES_M)
    inside = program % (_TILES_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def _factor_tile(factor, factor_row, factor_column, r, m, rank, rows, scale, has_factor):
    """scale * factor as [r, m]."""
    tile = tl.full([r.shape[0], m.shape[0]], 1.0, tl.float32)
    if has_factor:
        address = factor + m.to(tl.int64)[None, :] * factor_row + r[:, None] * factor_column
        tile = tl.load(address, mask=(r < rank)[:, None] & (m < rows)[None, :], other=0.0)
    return tile * scale


@triton.jit
def _scaled(product, factor):
    """0 where the factor is, whatever the product is: an adapter that is switched off may hold NaN."""
    return tl.where(factor == 0.0, 0.0, product * factor)


@triton.jit
def _add_adapter(acc, s, lora_b, b_stride, n, r, columns, rank, TRANSPOSED: tl.constexpr):
    """acc [n, m] + B [n, r] S [r, m], where entries of B that are not finite meet only entries of S that are not 0."""
    b = _tile(lora_b, b_stride, n, r, columns, rank, TRANSPOSED).to(tl.float32)
    finite = tl.abs(b) < float("inf")
    broken = tl.min(finite.to(tl.int32), 0) == 0
    wide = s.to(tl.float32)
    s = tl.where(broken[:, None] & (wide != 0.0), float("nan"), wide).to(s.dtype)
    b = tl.where(finite, b, 0.0).to(s.dtype)
    return tl.dot(b, s, acc, input_precision="ieee")


@triton.jit
def _write(acc, bias, y, n, m, columns, rows, has_bias):
    if has_bias:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    address = y + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(address, tl.trans(acc).to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


@triton.jit(
    do_not_specialize=[
        "x_stride", "weight_stride", "shift", "a_stride", "b_stride", "factor_row", "factor_column", "s_stride", "rows",
        "columns", "contraction", "rank", "span", "has_factor", "has_bias",
    ],
    do_not_specialize_on_alignment=["absmax", "bias", "factor"],
)  # fmt: skip
def lora_gemm_kernel(
    x, x_stride, weight, weight_stride, absmax, shift, lora_a, a_stride, lora_b, b_stride, bias, factor, factor_row,
    factor_column, s, s_stride, y, partial, rows, columns, contraction, rank, span, scale, has_factor, has_bias,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [rows, columns]. SPLIT: `partial` instead, [parts, columns + rank, rows rounded up to tiles]; `span` is how
    many steps of BLOCK_K belong to a part."""
    dtype: tl.constexpr = x.dtype.element_ty
    columns = columns * (_GROUP if QUANTISED and TRANSPOSED else _UNIT)
    contraction = contraction * (_GROUP if QUANTISED and not TRANSPOSED else _UNIT)
    x_stride = x_stride * _UNIT
    weight_stride = weight_stride.to(tl.int64) * _UNIT
    a_stride = a_stride.to(tl.int64) * _UNIT
    b_stride = b_stride.to(tl.int64) * _UNIT
    s_stride = s_stride * _UNIT
    rank = rank * _UNIT

    tiles = tl.cdiv(columns, BLOCK_N)
    tiles_n = tiles
    begin = 0
    end = contraction
    if MODE == SPLIT:
        tiles_n += tl.cdiv(rank, BLOCK_N)
        begin = tl.program_id(1) * span * BLOCK_K
        end = min(begin + span * BLOCK_K, contraction)
    tile_m, tile_n = _place(rows, tiles_n, BLOCK_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = (m < rows)[None, :]
    x_columns = x + m.to(tl.int64)[None, :] * x_stride
    n0 = tile_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)

    table = tl.zeros([16], tl.float32)
    if QUANTISED:
        table = _code_table()
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    product = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for k0 in range(begin, tl.where(tile_n < tiles, end, begin), BLOCK_K):
        x_tile = _x_tile(x_columns, k0, contraction, inside_m, BLOCK_K)
        w = _weight_tile(
            weight, weight_stride, absmax, shift, table, n0, k0, columns, contraction, dtype, TRANSPOSED, QUANTISED, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(w, x_tile, acc, input_precision="ieee")
        if MODE == IN_LOOP:
            a = _tile(lora_a, a_stride, r, k0 + tl.arange(0, BLOCK_K), rank, contraction, TRANSPOSED)
            product = tl.dot(a, x_tile, product, input_precision="ieee")

    if MODE == SPLIT:
        # Tiles after those of W: rows of A are more rows of a weight. Loops of no steps: loads in a branch are not pipelined.
        own = n - tiles * BLOCK_N
        for k0 in range(tl.where(tile_n < tiles, end, begin), end, BLOCK_K):
            x_tile = _x_tile(x_columns, k0, contraction, inside_m, BLOCK_K)
            a = _tile(lora_a, a_stride, own, k0 + tl.arange(0, BLOCK_K), rank, contraction, TRANSPOSED)
            acc = tl.dot(a, x_tile, acc, input_precision="ieee")
        inside = tl.where(tile_n < tiles, n < columns, own < rank)
        place = tl.program_id(1).to(tl.int64) * (columns + rank) + tl.where(tile_n < tiles, n, columns + own)
        padded = tl.cdiv(rows, BLOCK_M) * BLOCK_M
        tl.store(partial + place[:, None] * padded + m[None, :], acc, mask=inside[:, None])
    else:
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_R)
            inside_s = (r < rank)[:, None] & inside_m
            address = s + m.to(tl.int64)[None, :] * s_stride + r[:, None]
            if MODE == IN_LOOP:  # rank <= BLOCK_R: once
                scales = _factor_tile(factor, factor_row, factor_column, r, m, rank, rows, scale, has_factor)
                s_tile = _scaled(product, scales).to(dtype)
                tl.store(address, s_tile, mask=inside_s & (tile_n == 0))
            else:
                s_tile = tl.load(address, mask=inside_s, other=0.0)
            acc = _add_adapter(acc, s_tile, lora_b, b_stride, n, r, columns, rank, TRANSPOSED)
        _write(acc, bias, y, n, m, columns, rows, has_bias)


@triton.jit(
    do_not_specialize=[
        "parts", "b_stride", "factor_row", "factor_column", "s_stride", "rows", "columns", "rank", "given", "has_factor",
        "has_bias",
    ],
    do_not_specialize_on_alignment=["bias", "factor"],
)  # fmt: skip
def lora_finish_kernel(
    partial, parts, lora_b, b_stride, bias, factor, factor_row, factor_column, s, s_stride, y, rows, columns, rank, scale,
    given, has_factor, has_bias,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Second launch of SPLIT: adds up the parts in their order, S too unless it is `given`, then S B^T and the bias."""
    columns = columns * _UNIT
    b_stride = b_stride.to(tl.int64) * _UNIT
    s_stride = s_stride * _UNIT
    rank = rank * _UNIT
    tile_n = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = (m < rows)[None, :]
    padded = tl.num_programs(1) * BLOCK_M
    whole = (columns + tl.where(given != 0, 0, rank)).to(tl.int64) * padded
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    address = partial + n.to(tl.int64)[:, None] * padded + m[None, :]
    for _ in range(0, parts):
        acc += tl.load(address, mask=(n < columns)[:, None], other=0.0)
        address += whole
    for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        inside_s = (r < rank)[:, None] & inside_m
        s_address = s + m.to(tl.int64)[None, :] * s_stride + r[:, None]
        s_tile = tl.load(s_address, mask=inside_s & (given != 0), other=0.0)
        if given == 0:
            product = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
            address = partial + (columns + r).to(tl.int64)[:, None] * padded + m[None, :]
            for _ in range(0, parts):
                product += tl.load(address, mask=(r < rank)[:, None], other=0.0)
                address += whole
            scales = _factor_tile(factor, factor_row, factor_column, r, m, rank, rows, scale, has_factor)
            s_tile = _scaled(product, scales).to(y.dtype.element_ty)
            tl.store(s_address, s_tile, mask=inside_s & (tile_n == 0))
        acc = _add_adapter(acc, s_tile, lora_b, b_stride, n, r, columns, rank, TRANSPOSED)
    _write(acc, bias, y, n, m, columns, rows, has_bias)


class Tile(NamedTuple):
    """Tile of a program (rows, outputs, contraction of a step) and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """A launch: `mode` is GIVEN, IN_LOOP or SPLIT; SPLIT has `parts` of `span` steps each."""

    tile: Tile
    mode: int
    block_r: int = _BLOCK_R
    parts: int = 1
    span: int = 0


# (float32?, NF4?) -> tiles for up to 16 rows, up to 64, and more.
_TILES = {
    (False, False): (Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 8, 4), Tile(256, 128, 32, 8, 4)),
    (False, True): (Tile(16, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    (True, False): (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    (True, True): (Tile(16, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3)),
}
# A gradient of few rows is rare: one tile. Of NF4, 64 rows spilled with triton 3.6.
_FEW_TRANSPOSED = {(False, True): Tile(32, 128, 64, 4, 4)}
# Tile of the second launch of SPLIT, and its warps.
_FINISH = (16, 32, 4)


def _in_loop_ranks(float32: bool, transposed: bool) -> tuple[int, ...]:
    """Ranks up to which S is added up in the loop: A is then read from the L2 cache at most half as often as W from memory.

    Not for what is rare (float32, and gradients of few rows): less to compile.
    """
    return () if float32 or transposed else (16, 32)


def _tiles(float32: bool, quantised: bool, transposed: bool) -> tuple[Tile, Tile, Tile]:
    tiny, small, large = _TILES[float32, quantised]
    if transposed:
        tiny = small = _FEW_TRANSPOSED.get((float32, quantised), small)
    return tiny, small, large


def plan(
    rows: int, columns: int, contraction: int, rank: int, float32: bool, quantised: bool, transposed: bool, given: bool,
    processors: int,
) -> Plan:  # fmt: skip
    """What is launched for these sizes on a GPU with so many multiprocessors; S must be given for more than 64 rows."""
    tiny, small, large = _tiles(float32, quantised, transposed)
    if rows > ROWS_WITH_S:
        filled = triton.cdiv(rows, large.block_m) * triton.cdiv(columns, large.block_n) >= processors
        return Plan(large if filled else small, GIVEN.value)
    tile = tiny if rows <= tiny.block_m else small
    tiles = triton.cdiv(columns, tile.block_n)
    if 4 * tiles >= 3 * processors:
        if given or rank == 0:
            return Plan(tile, GIVEN.value)
        for size in _in_loop_ranks(float32, transposed):
            if rank <= size:
                return Plan(tile, IN_LOOP.value, size)
    tiles += 0 if given else triton.cdiv(rank, tile.block_n)
    # NF4 has a quarter of the bytes in flight for each program. The partial sums (in the L2 cache) are at most as large as W.
    parts = triton.cdiv((4 if quantised else 2) * processors, tiles)
    parts = max(1, min(parts, contraction // (2 * tile.block_k), contraction // (4 * rows)))
    steps = triton.cdiv(contraction, tile.block_k)
    span = triton.cdiv(steps, parts)
    return Plan(tile, SPLIT.value, parts=triton.cdiv(steps, span), span=span)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def lora_gemm(
    x_MK: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    bias_N: Tensor | None,
    factor_MR: Tensor | None,
    s_MR: Tensor | None,
    scale: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """(y, S). `weight` is [N, K] (`shape`), or the bytes of it with `absmax`; sizes and strides as `supported` asks for.

    The names are those of TRANSPOSED = False; with `transposed` x is [M, N], y [M, K] and the factors trade places. An
    adapter that is only added (S is given) needs no `lora_A_RK` (transposed: `lora_B_NR`).
    """
    first, second = (lora_B_NR, lora_A_RK) if transposed else (lora_A_RK, lora_B_NR)
    rows, contraction = x_MK.shape
    columns = shape[1] if transposed else shape[0]
    rank_dim = 0 if transposed else 1
    rank = 0 if second is None else second.shape[rank_dim]
    padding = -rank % _UNIT.value
    given = s_MR is not None or rank == 0
    x_MK = aligned(x_MK)
    # What a kernel does not read takes any tensor of its type.
    nothing = x_MK.new_empty(0, dtype=torch.float32)
    first = x_MK if given or first is None else aligned(_pad(first.to(x_MK.dtype), 1 - rank_dim, padding))
    second = x_MK if second is None else aligned(_pad(second.to(x_MK.dtype), rank_dim, padding))
    s = x_MK.new_empty(rows, rank + padding) if s_MR is None else aligned(_pad(s_MR, 1, padding))
    y = x_MK.new_empty(rows, columns)
    if rows == 0:
        return y, s[:, :rank]
    quantised = absmax is not None
    chosen = plan(
        rows, columns, contraction, rank, x_MK.dtype == torch.float32, quantised, transposed, given, _processors(x_MK.device)
    )
    tile, split = chosen.tile, chosen.mode == SPLIT.value
    units = _units(rank + padding)
    own = 0 if given and split else units
    tiles_m, tiles_n = triton.cdiv(rows, tile.block_m), triton.cdiv(columns, tile.block_n)
    partial = nothing
    if split:
        tiles_n += triton.cdiv(own * _UNIT.value, tile.block_n)
        shape_of_parts = (chosen.parts, columns + own * _UNIT.value, tiles_m * tile.block_m)
        partial = x_MK.new_empty(shape_of_parts, dtype=torch.float32)
    bias = x_MK if bias_N is None else bias_N.contiguous()
    factor, strides = (nothing, (0, 0)) if factor_MR is None else (factor_MR, factor_MR.stride())
    switches = {"has_factor": int(factor_MR is not None), "has_bias": int(bias_N is not None)}
    with torch.cuda.device_of(x_MK):
        lora_gemm_kernel[(tiles_m * tiles_n, chosen.parts)](
            x_MK, _units(x_MK.stride(0)), weight, 0 if quantised else _units(weight.stride(0)),
            nothing if absmax is None else absmax, blocksize.bit_length() - 1, first, _units(first.stride(0)), second,
            _units(second.stride(0)), bias, factor, *strides, s, _units(s.stride(0)), y, partial, rows,
            columns // (_GROUP.value if quantised and transposed else _UNIT.value),
            contraction // (_GROUP.value if quantised and not transposed else _UNIT.value), own, chosen.span, scale, **switches,
            MODE=chosen.mode, TRANSPOSED=transposed, QUANTISED=quantised, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, BLOCK_R=chosen.block_r, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if split:
            block_m, block_n, warps = _FINISH
            lora_finish_kernel[(triton.cdiv(columns, block_n), tiles_m * tile.block_m // block_m)](
                partial, chosen.parts, second, _units(second.stride(0)), bias, factor, *strides, s, _units(s.stride(0)), y,
                rows, _units(columns), units, scale, int(given), **switches,
                TRANSPOSED=transposed, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=_BLOCK_R, num_warps=warps, num_stages=2,
            )  # fmt: skip
    return y, s[:, :rank]


def _units(size: int) -> int:
    return size // _UNIT.value


def _pad(matrix: Tensor, dim: int, padding: int) -> Tensor:
    """Zeros for a rank that is no multiple of 8."""
    if padding == 0:
        return matrix
    return torch.nn.functional.pad(matrix, (0, padding) if dim == 1 else (0, 0, 0, padding))


def supported(x_MK: Tensor, weight: Tensor, absmax: Tensor | None, shape: tuple[int, int], blocksize: int) -> bool:
    """Whether the kernel takes a weight like this: rows of 16 bytes, or a whole number of groups of 64 for NF4."""
    if x_MK.dtype == torch.float64 or any(size == 0 or size % _UNIT.value for size in shape):
        return False
    if absmax is not None:
        return shape[1] % _GROUP.value == 0 and blocksize % _GROUP.value == 0 and weight.data_ptr() % 16 == 0
    return is_aligned(weight)


def is_aligned(matrix: Tensor) -> bool:
    """Whether the rows of the matrix (its width is a multiple of 8) have stride 1 and begin at multiples of 16 bytes."""
    return matrix.stride(1) == 1 and matrix.stride(0) % _UNIT.value == 0 and matrix.data_ptr() % 16 == 0


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that is aligned."""
    return matrix if is_aligned(matrix) else matrix.clone(memory_format=torch.contiguous_format)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FLOATS = ("scale",)
_POINTERS = ("x", "weight", "absmax", "lora_a", "lora_b", "bias", "factor", "s", "y", "partial")


def configurations() -> Iterator[Configuration]:
    """What `lora_gemm` can choose."""
    for (dtype, name), transposed in product(_NAMES.items(), (False, True)):
        for quantised in (False, True):
            for tile, mode, block_r in _choices(dtype == torch.float32, quantised, transposed):
                yield _gemm_configuration(name, transposed, quantised, tile, mode, block_r)
        yield _finish_configuration(name, transposed)


def _choices(float32: bool, quantised: bool, transposed: bool) -> Iterator[tuple[Tile, int, int]]:
    tiny, small, large = _tiles(float32, quantised, transposed)
    for tile in dict.fromkeys((tiny, small)):
        yield tile, SPLIT.value, _BLOCK_R
        for block_r in _in_loop_ranks(float32, transposed):
            yield tile, IN_LOOP.value, block_r
    for tile in dict.fromkeys((tiny, small, large)):
        yield tile, GIVEN.value, _BLOCK_R


def _signature(kernel: Any, name: str, quantised: bool, constants: dict[str, Any]) -> dict[str, str]:
    types = dict.fromkeys(("x", "y", "s", "bias", "lora_a", "lora_b"), name) | {"weight": "u8" if quantised else name}
    signature = {}
    for argument in kernel.arg_names:
        if argument in _POINTERS:
            signature[argument] = "*" + types.get(argument, "fp32")
        elif argument not in constants:
            signature[argument] = "fp32" if argument in _FLOATS else "i32"
    return signature


def _gemm_configuration(name: str, transposed: bool, quantised: bool, tile: Tile, mode: int, block_r: int) -> Configuration:
    constants = {"MODE": mode, "TRANSPOSED": transposed, "QUANTISED": quantised, "BLOCK_R": block_r}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    signature = _signature(lora_gemm_kernel, name, quantised, constants)
    way = ("given", f"in loop {block_r}", "split")[mode]
    title = f"lora_gemm_kernel {name} {'nf4 ' if quantised else ''}{way} {tile.block_m}x{tile.block_n}"
    title += " transposed" if transposed else ""
    whole = ("x", "weight", "lora_a", "lora_b", "s", "y", "partial")
    return Configuration(title, lora_gemm_kernel, signature, constants, tile.warps, tile.stages, whole)


def _finish_configuration(name: str, transposed: bool) -> Configuration:
    block_m, block_n, warps = _FINISH
    constants = {"TRANSPOSED": transposed, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": _BLOCK_R}
    signature = _signature(lora_finish_kernel, name, False, constants)
    title = f"lora_finish_kernel {name}" + (" transposed" if transposed else "")
    return Configuration(title, lora_finish_kernel, signature, constants, warps, 2, ("partial", "lora_b", "s", "y"))
