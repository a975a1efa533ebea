"""Triton kernel of `rope`: one program rotates all heads, of query and key, of one token.

With halves (a, b) of a head and tables (c1, c2), (s1, s2): forward a' = a c1 - b s1, b' = b c2 + a s2. The gradient is the
transposed matrix, a' = a c1 + b s2, b' = b c2 - a s1: the same with the halves of the sines exchanged and their sign turned.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._triton_producer import HALF, NAMES, signature_of

# Columns of a tile: half a rotated head, rounded up to a power of two. 1024 entries with its heads, 8 of each half a thread.
BLOCKS = (16, 32, 64, 128)
_ENTRIES, _WARPS = 1024, 4


@triton.jit
def _rotate_heads(
    x, x_heads, out, out_heads, heads, head, half, cos_1, cos_2, sin_1, sin_2, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    column = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, heads, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)[:, None]
        rows = x + at.to(tl.int64) * x_heads
        out_rows = out + at.to(tl.int64) * out_heads
        inside = (at < heads) & (column < half)
        a = tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(rows + half + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_rows + column, (a * cos_1 - b * sin_1).to(out.dtype.element_ty), mask=inside)
        tl.store(out_rows + half + column, (b * cos_2 + a * sin_2).to(out.dtype.element_ty), mask=inside)
        for first in range(2 * half, head, BLOCK_D):
            inside = (at < heads) & (first + column < head)
            tl.store(out_rows + first + column, tl.load(rows + first + column, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["tokens", "inverse", "heads", "key_heads"])
def rope_kernel(
    q, q_batches, q_heads, q_tokens, k, k_batches, k_heads, k_tokens,
    q_out, q_out_batches, q_out_heads, q_out_tokens, k_out, k_out_batches, k_out_heads, k_out_tokens,
    cos, cos_batches, cos_tokens, sin, sin_batches, sin_tokens, tokens, heads, key_heads, head, half, inverse,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch = program // tokens
    token = program % tokens
    column = tl.arange(0, BLOCK_D)[None, :]
    cos_row = cos + batch * cos_batches + token * cos_tokens + column
    sin_row = sin + batch * sin_batches + token * sin_tokens + column
    cos_1 = tl.load(cos_row, mask=column < half, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_row + half, mask=column < half, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_row + inverse * half, mask=column < half, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_row + (1 - inverse) * half, mask=column < half, other=0.0).to(tl.float32)
    sign = 1.0 - 2.0 * inverse
    sin_1 *= sign
    sin_2 *= sign
    _rotate_heads(
        q + batch * q_batches + token * q_tokens, q_heads, q_out + batch * q_out_batches + token * q_out_tokens, q_out_heads,
        heads, head, half, cos_1, cos_2, sin_1, sin_2, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    _rotate_heads(
        k + batch * k_batches + token * k_tokens, k_heads, k_out + batch * k_out_batches + token * k_out_tokens, k_out_heads,
        key_heads, head, half, cos_1, cos_2, sin_1, sin_2, BLOCK_H, BLOCK_D,
    )  # fmt: skip


def rotate(
    q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, inverse: bool, q_out: Tensor, k_out: Tensor
) -> None:
    """Fill the outputs; entries of a head (and of cos, sin) lie side by side, all other strides are free."""
    batch, heads, tokens, head = q_BHTD.shape
    half = cos_BTR.shape[2] // 2
    block = max(BLOCKS[0], triton.next_power_of_2(half))
    strides = [stride for x in (q_BHTD, k_BHTD, q_out, k_out) for stride in x.stride()[:3]]
    tables = [(x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)) for x in (cos_BTR, sin_BTR)]
    with torch.cuda.device_of(q_BHTD):
        rope_kernel[(batch * tokens,)](
            q_BHTD, *strides[0:3], k_BHTD, *strides[3:6], q_out, *strides[6:9], k_out, *strides[9:12], *tables[0], *tables[1],
            tokens, heads, k_BHTD.shape[1], head, half, int(inverse),
            BLOCK_H=_ENTRIES // block, BLOCK_D=block, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """What the launcher above can choose, for heads that begin at multiples of 16 bytes and ones that do not."""
    tables = [(dtype, dtype) for dtype in NAMES] + [(dtype, torch.float32) for dtype in HALF]
    for (dtype, table), block, aligned in product(tables, BLOCKS, (True, False)):
        constants = {"BLOCK_H": _ENTRIES // block, "BLOCK_D": block}
        types = {name: "*" + NAMES[dtype] for name in ("q", "k", "q_out", "k_out")}
        types |= {name: "*" + NAMES[table] for name in ("cos", "sin")}
        types |= {name: "i32" for name in rope_kernel.arg_names if name.rpartition("_")[2] in _SIZES}
        signature = signature_of(rope_kernel, constants, types)
        whole = tuple(name for name in signature if name not in ("tokens", "inverse", "heads", "key_heads"))
        name = f"rope_kernel {NAMES[dtype]} table {NAMES[table]} {_ENTRIES // block}x{block}"
        divisible = whole if aligned else ()
        name += "" if aligned else " unaligned"
        yield Configuration(name, rope_kernel, signature, constants, _WARPS, 1, divisible)


_SIZES = ("batches", "heads", "tokens", "head", "half", "inverse")
