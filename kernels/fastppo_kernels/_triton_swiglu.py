"""Triton kernels of `swiglu`, and of its forms that also make the adapters' S or dS columns.

The plain ones are elementwise over rows of any stride. The producers own BLOCK_M rows each and sweep the columns once: what
they write (h, or dG and dU) goes through `tl.dot` with the adapters' matrix while it is in registers, so that nothing of the
intermediate size is read from memory a second time for S = h A^T, or dS = [dG B_gate | dU B_up].
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._triton_producer import NAMES, PRODUCER_TILES, UNIT, Tiles, producer_configurations, signature_of, store_columns

# 8 entries a thread: 16 bytes of half precision at a time from each operand.
_BLOCK, _WARPS = 1024, 4
# As PRODUCER_TILES, for the gradient, which keeps two accumulators of BLOCK_R columns and twice the elements. 128 columns
# spilled.
GRADIENT_TILES: Tiles = {
    (16, 16): (64, 4, 3),
    (16, 32): (64, 4, 3),
    (32, 16): (64, 4, 3),
    (32, 32): (64, 4, 3),
    (32, 64): (32, 4, 4),
    (64, 16): (64, 8, 3),
    (64, 32): (64, 8, 3),
    (64, 64): (32, 8, 4),
}


@triton.jit
def _silu(gate):
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _product(gate, up, NARROW: tl.constexpr):
    """silu(gate) rounded to the input's type, as torch gives it, times up."""
    return _silu(gate).to(NARROW).to(tl.float32) * up


@triton.jit
def _gradients(grad_h, gate, up):
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return grad_h * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), grad_h * gate * sigmoid


@triton.jit
def swiglu_kernel(gate, gate_stride, up, up_stride, h, h_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * h_stride + column, _product(g, u, gate.dtype.element_ty).to(h.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad_h, grad_h_stride, gate, gate_stride, up, up_stride, grad_gate, grad_gate_stride, grad_up, grad_up_stride, h, h_stride,
    columns, MAKES_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad_h + row * grad_h_stride + column, mask=inside, other=0.0).to(tl.float32)
    dg, du = _gradients(d, g, u)
    tl.store(grad_gate + row * grad_gate_stride + column, dg.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + row * grad_up_stride + column, du.to(grad_up.dtype.element_ty), mask=inside)
    if MAKES_H:
        tl.store(h + row * h_stride + column, _product(g, u, gate.dtype.element_ty).to(h.dtype.element_ty), mask=inside)


# Sizes in units of 8 entries: see `rms_norm_lora_kernel`.
@triton.jit(
    do_not_specialize=[
        "gate_stride", "up_stride", "stacked_stride", "mask_stride", "has_mask", "out_stride", "rows", "columns",
        "left", "rank",
    ],
    do_not_specialize_on_alignment=["scale", "mask", "group"],
)  # fmt: skip
def swiglu_lora_kernel(
    gate, gate_stride, up, up_stride, stacked, stacked_stride, scale, mask, mask_stride, group, has_mask, out, out_stride,
    rows, columns, left, rank,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width = columns * UNIT
    border = left * UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_row = (row < rows)[:, None]
    gate_rows = gate + (row * gate_stride)[:, None] * UNIT
    up_rows = up + (row * up_stride)[:, None] * UNIT
    out_rows = out + (row * out_stride)[:, None] * UNIT
    adapter = tl.arange(0, BLOCK_R)
    stacked_rows = stacked + (adapter.to(tl.int64) * stacked_stride)[None, :] * UNIT
    product_MR = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        here = start + tl.arange(0, BLOCK_K)
        inside = inside_row & (here < width)[None, :]
        g = tl.load(gate_rows + here[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up_rows + here[None, :], mask=inside, other=0.0).to(tl.float32)
        h = _product(g, u, gate.dtype.element_ty).to(out.dtype.element_ty)
        tl.store(out_rows + (border + here)[None, :], h, mask=inside)
        a = tl.load(stacked_rows + here[:, None], mask=(here < width)[:, None] & (adapter < rank)[None, :], other=0.0)
        product_MR = tl.dot(h, a, product_MR)
    store_columns(product_MR, out_rows, row, rows, 0, rank, border, width, scale, mask, mask_stride, group, has_mask, BLOCK_R)


@triton.jit(
    do_not_specialize=[
        "grad_h_stride", "gate_stride", "up_stride", "lora_gate_stride", "lora_up_stride", "mask_stride", "has_mask",
        "out_stride", "h_stride", "rows", "columns", "rank_gate", "rank_up",
    ],
    do_not_specialize_on_alignment=["scale", "mask", "group"],
)  # fmt: skip
def swiglu_backward_lora_kernel(
    grad_h, grad_h_stride, gate, gate_stride, up, up_stride, lora_gate, lora_gate_stride, lora_up, lora_up_stride,
    scale, mask, mask_stride, group, has_mask, out, out_stride, h, h_stride, rows, columns, rank_gate, rank_up,
    MAKES_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width = columns * UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_row = (row < rows)[:, None]
    grad_h_rows = grad_h + (row * grad_h_stride)[:, None] * UNIT
    gate_rows = gate + (row * gate_stride)[:, None] * UNIT
    up_rows = up + (row * up_stride)[:, None] * UNIT
    out_rows = out + (row * out_stride)[:, None] * UNIT
    adapter = tl.arange(0, BLOCK_R)[None, :]
    adapters_gate = rank_gate * UNIT
    adapters_up = rank_up * UNIT
    product_gate = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    product_up = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        here = start + tl.arange(0, BLOCK_K)
        inside = inside_row & (here < width)[None, :]
        d = tl.load(grad_h_rows + here[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate_rows + here[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up_rows + here[None, :], mask=inside, other=0.0).to(tl.float32)
        if MAKES_H:
            made = _product(g, u, gate.dtype.element_ty).to(h.dtype.element_ty)
            tl.store(h + (row * h_stride)[:, None] * UNIT + here[None, :], made, mask=inside)
        dg, du = _gradients(d, g, u)
        dg = dg.to(out.dtype.element_ty)
        du = du.to(out.dtype.element_ty)
        tl.store(out_rows + here[None, :], dg, mask=inside)
        tl.store(out_rows + (width + here)[None, :], du, mask=inside)
        matrix_row = here.to(tl.int64)[:, None]
        inside_b = (here < width)[:, None]
        wanted = inside_b & (adapter < adapters_gate)
        b = tl.load(lora_gate + matrix_row * lora_gate_stride * UNIT + adapter, mask=wanted, other=0.0)
        product_gate = tl.dot(dg, b, product_gate)
        wanted = inside_b & (adapter < adapters_up)
        b = tl.load(lora_up + matrix_row * lora_up_stride * UNIT + adapter, mask=wanted, other=0.0)
        product_up = tl.dot(du, b, product_up)
    store_columns(
        product_gate, out_rows, row, rows, 0, adapters_gate, 0, 2 * width, scale, mask, mask_stride, group, has_mask, BLOCK_R
    )
    store_columns(
        product_up, out_rows, row, rows, adapters_gate, adapters_up, 0, 2 * width, scale, mask, mask_stride, group, has_mask,
        BLOCK_R,
    )  # fmt: skip


def forward(gate_MN: Tensor, up_MN: Tensor, h_MN: Tensor) -> None:
    """Fill h; rows of any stride."""
    rows, columns = gate_MN.shape
    with torch.cuda.device_of(gate_MN):
        swiglu_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            gate_MN, gate_MN.stride(0), up_MN, up_MN.stride(0), h_MN, h_MN.stride(0), columns,
            BLOCK=_BLOCK, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip


def backward(
    grad_h_MN: Tensor, gate_MN: Tensor, up_MN: Tensor, grad_gate_MN: Tensor, grad_up_MN: Tensor, h_MN: Tensor | None = None
) -> None:
    """Fill the gradients of gate and up, and h where it is given; rows of any stride."""
    h = gate_MN if h_MN is None else h_MN
    rows, columns = gate_MN.shape
    with torch.cuda.device_of(gate_MN):
        swiglu_backward_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            grad_h_MN, grad_h_MN.stride(0), gate_MN, gate_MN.stride(0), up_MN, up_MN.stride(0),
            grad_gate_MN, grad_gate_MN.stride(0), grad_up_MN, grad_up_MN.stride(0), h, h.stride(0), columns,
            MAKES_H=h_MN is not None, BLOCK=_BLOCK, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip


def forward_lora(
    gate_MN: Tensor,
    up_MN: Tensor,
    stacked_RN: Tensor,
    left: int,
    scale_R: Tensor,
    mask_MG: Tensor | None,
    group_R: Tensor | None,
    out: Tensor,
    tile: tuple[int, int],
) -> None:
    """Fill an activation buffer; arguments as `_triton_norm.forward_lora` has them."""
    (rows, columns), rank = gate_MN.shape, len(stacked_RN)
    block_m, block_r = tile
    block_k, warps, stages = PRODUCER_TILES[tile]
    with torch.cuda.device_of(gate_MN):
        swiglu_lora_kernel[(triton.cdiv(rows, block_m),)](
            gate_MN, gate_MN.stride(0) // 8, up_MN, up_MN.stride(0) // 8, stacked_RN, stacked_RN.stride(0) // 8, scale_R,
            scale_R if mask_MG is None else mask_MG, 0 if mask_MG is None else mask_MG.stride(0),
            scale_R if group_R is None else group_R, int(mask_MG is not None), out, out.stride(0) // 8,
            rows, columns // 8, left // 8, rank,
            BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def backward_lora(
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
    tile: tuple[int, int],
) -> None:
    """Fill a gradient buffer, and h where it is given."""
    h = gate_MN if h_MN is None else h_MN
    rows, columns = gate_MN.shape
    block_m, block_r = tile
    block_k, warps, stages = GRADIENT_TILES[tile]
    with torch.cuda.device_of(gate_MN):
        swiglu_backward_lora_kernel[(triton.cdiv(rows, block_m),)](
            grad_h_MN, grad_h_MN.stride(0) // 8, gate_MN, gate_MN.stride(0) // 8, up_MN, up_MN.stride(0) // 8,
            lora_gate_NR, lora_gate_NR.stride(0) // 8, lora_up_NR, lora_up_NR.stride(0) // 8, scale_R,
            scale_R if mask_MG is None else mask_MG, 0 if mask_MG is None else mask_MG.stride(0),
            scale_R if group_R is None else group_R, int(mask_MG is not None), out, out.stride(0) // 8, h, h.stride(0) // 8,
            rows, columns // 8, lora_gate_NR.shape[1] // 8, lora_up_NR.shape[1] // 8,
            MAKES_H=h_MN is not None, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, STAGES=stages,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """What the launchers above can choose, for rows that begin at multiples of 16 bytes and ones that do not."""
    backward_kernels = [(swiglu_backward_kernel, {"MAKES_H": makes_h}) for makes_h in (False, True)]
    for (kernel, more), dtype, aligned in product([(swiglu_kernel, {}), *backward_kernels], NAMES, (True, False)):
        types = {name: "*" + NAMES[dtype] for name in ("gate", "up", "h", "grad_h", "grad_gate", "grad_up")}
        constants = {"BLOCK": _BLOCK} | more
        signature = signature_of(kernel, constants, types)
        made = " with h" if more.get("MAKES_H") else ""
        name = f"{kernel.__name__} {NAMES[dtype]} {_BLOCK}{made}" + ("" if aligned else " unaligned")
        divisible = tuple(signature) if aligned else ()
        yield Configuration(name, kernel, signature, constants, _WARPS, 1, divisible)
    yield from producer_configurations(swiglu_lora_kernel, ("gate", "up", "stacked", "out"), PRODUCER_TILES)
    whole = ("grad_h", "gate", "up", "lora_gate", "lora_up", "out", "h")
    for makes_h in (False, True):
        yield from producer_configurations(swiglu_backward_lora_kernel, whole, GRADIENT_TILES, {"MAKES_H": makes_h})
