"""Attention of one new token a sequence as Triton kernels, split over the keys.

    own       a program takes one sequence, one key head and `PART` places of the cache: the query heads that share the key head
              are the rows of one tile, so that a key is read once for all of them
    root      a program takes one key head, a part of the shared prefix and a tile of rows, which are query heads of as many
              sequences as fit: the prefix is read once for all of these
    combine   a program merges, for one query head of one sequence, what the parts found

A cache is a line of places a sequence, or pages that any sequence may hold, also several the same one: a table says which page
has a place. Each key's page is looked up by itself, so a tile may lie in many pages, and a page be as small as is good for who
allocates it; beside the key (256 bytes of a head of 128 in half precision) the entry (4 bytes, in L1 from the second time on)
is nothing.

A part leaves the largest of its scores, m, the sum of exp2(score - m) and the sum of the values with these weights, in float32
(scores are in units of log 2). They are merged in the order of the parts, without atomics.

Where parts, and tiles of keys in them, begin depends on nothing but the root, the window and the sequence's own length; parts
of which a sequence sees nothing are not read. So its result is the same to the bit whatever runs beside it.

Sizes and strides are run-time arguments in units of 8 (`_UNIT`), so that the compiler knows that they are multiples of it
without a specialisation for each.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._triton_head import _tanh

_UNIT = tl.constexpr(8)
# Places of a cache that are a program's: 128 KiB of keys and values of heads of 128 in half precision, beside which what seven
# query heads leave behind (3.6 KiB) is little.
PART = 256
# The same of the root, at least, and in how many parts it is cut at most: many sequences fill a GPU with its rows alone, and
# each part is one more result for every query head to write and to read again.
ROOT_PART, _ROOT_PARTS = 256, 4
# Parts that are merged at a time, and warps.
_MERGED, _MERGE_WARPS = 16, 4
# A window of so many tokens hides nothing.
_ALL = 2**31 - 1
_LOG2E = 1.4426950408889634


@triton.jit
def _scores(
    q_rows, inside, k_rows, seen, dim, factor, cap, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[M, N] scores in units of log 2; q_rows [M, 1] and k_rows [N, 1] point to the first entries of heads."""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.static_range(0, BLOCK_D, BLOCK_C):
        d = (first + tl.arange(0, BLOCK_C))[None, :]
        q = tl.load(q_rows + d, mask=inside[:, None] & (d < dim), other=0.0)
        k = tl.load(k_rows + d, mask=seen[:, None] & (d < dim), other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
    s *= factor
    if SOFTCAP:
        s = _tanh(s) * cap
    return s


@triton.jit
def _add(s, v, top, total, acc):
    """One more tile of keys: its scores [M, N], -inf where a key is not seen, and values [N, D], 0 there."""
    higher = tl.maximum(top, tl.max(s, 1))
    # As long as nothing is seen the largest is -inf, and -inf - -inf is not 0.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _leave(top, total, acc, tops, totals, accs, row, parts, part, inside, v_dim, d):
    """Store a part's result; rows of the three are [B H, parts]."""
    place = row * parts + part
    tl.store(tops + place, top, mask=inside)
    tl.store(totals + place, total, mask=inside)
    tl.store(accs + place[:, None] * v_dim + d[None, :], acc, mask=inside[:, None] & (d < v_dim)[None, :])


@triton.jit(
    do_not_specialize=[
        "q_slot", "q_head", "k_slot", "k_head", "k_place", "v_slot", "v_head", "v_place", "table_slot", "pages", "page_bits",
        "heads", "group", "longest", "dim", "v_dim", "window", "before", "parts",
    ],
    do_not_specialize_on_alignment=["table", "lengths", "tops", "totals"],
)  # fmt: skip
def decode_own_kernel(
    q, q_slot, q_head, k, k_slot, k_head, k_place, v, v_slot, v_head, v_place, table, table_slot, pages, page_bits, lengths,
    tops, totals, accs, heads, group, longest, dim, v_dim, window, before, parts, factor, cap,
    PAGED: tl.constexpr, SOFTCAP: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A sequence's own keys; `before`: how many parts the root has, which come before these.

    PAGED: `k_slot` and `v_slot` are strides of the pages, of 2^`page_bits` places each; place j lies in page
    `table`[slot, j >> page_bits]."""
    tiles = tl.cdiv(group, BLOCK_M)
    program = tl.program_id(0)
    in_group = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // tiles % (heads // group)
    slot = (program // tiles // (heads // group)).to(tl.int64)
    part = tl.program_id(1)
    # Nothing on a GPU has looked at the lengths: a wrong one must not lead out of the cache.
    length = tl.minimum(tl.load(lengths + slot), longest).to(tl.int32)
    low = tl.maximum(length - window, 0)
    begin = tl.maximum(part * PART, low // BLOCK_N * BLOCK_N)
    end = tl.minimum(part * PART + PART, length)

    inside = in_group < group
    query = (head * group + in_group).to(tl.int64)
    q_rows = q + slot * q_slot * _UNIT + query[:, None] * q_head * _UNIT
    keys = k + head.to(tl.int64) * k_head * _UNIT
    values = v + head.to(tl.int64) * v_head * _UNIT
    d = tl.arange(0, BLOCK_D)
    dim = dim * _UNIT
    v_dim = v_dim * _UNIT
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        seen = (place >= low) & (place < end)
        line = slot
        if PAGED:
            line = tl.load(table + slot * table_slot + (place >> page_bits), mask=seen, other=0)
            # Nor at the pages.
            line = tl.minimum(tl.maximum(line, 0), pages - 1).to(tl.int64)[:, None]
            place = place & ((1 << page_bits) - 1)
        at = place.to(tl.int64)[:, None]
        k_rows = keys + line * k_slot * _UNIT + at * k_place * _UNIT
        s = _scores(q_rows, inside, k_rows, seen, dim, factor, cap, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_C)
        s = tl.where(seen[None, :], s, -float("inf"))
        v_rows = values + line * v_slot * _UNIT + at * v_place * _UNIT
        v_tile = tl.load(v_rows + d[None, :], mask=seen[:, None] & (d < v_dim)[None, :], other=0.0)
        top, total, acc = _add(s, v_tile, top, total, acc)
    row = slot * heads + query
    _leave(top, total, acc, tops, totals, accs, row, parts, before + part, inside & (begin < end), v_dim, d)


@triton.jit(
    do_not_specialize=[
        "q_slot", "q_head", "k_place", "k_head", "v_place", "v_head", "slots", "heads", "group", "longest", "root", "dim",
        "v_dim", "window", "span", "parts",
    ],
    do_not_specialize_on_alignment=["lengths", "tops", "totals"],
)  # fmt: skip
def decode_root_kernel(
    q, q_slot, q_head, k, k_place, k_head, v, v_place, v_head, lengths, tops, totals, accs, slots, heads, group, longest, root,
    dim, v_dim, window, span, parts, factor, cap,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The shared prefix, `span` keys a program; rows are the query heads of one key head, sequence after sequence."""
    of_head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = (of_head // group).to(tl.int64)
    inside = slot < slots
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    query = head * group + of_head % group
    length = tl.minimum(tl.load(lengths + slot, mask=inside, other=longest), longest).to(tl.int32)
    low = tl.maximum(root + length - window, 0)
    begin = tl.maximum(part * span, tl.min(low, 0) // BLOCK_N * BLOCK_N)
    end = tl.minimum(part * span + span, root)

    q_rows = q + slot[:, None] * q_slot * _UNIT + query[:, None] * q_head * _UNIT
    keys = k + head * k_head * _UNIT
    values = v + head * v_head * _UNIT
    d = tl.arange(0, BLOCK_D)
    dim = dim * _UNIT
    v_dim = v_dim * _UNIT
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        there = place < end
        at = place.to(tl.int64)[:, None]
        k_rows = keys + at * k_place * _UNIT
        s = _scores(q_rows, inside, k_rows, there, dim, factor, cap, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_C)
        s = tl.where(there[None, :] & (place[None, :] >= low[:, None]), s, -float("inf"))
        v_tile = tl.load(
            values + at * v_place * _UNIT + d[None, :], mask=there[:, None] & (d < v_dim)[None, :], other=0.0
        )
        top, total, acc = _add(s, v_tile, top, total, acc)
    row = slot * heads + query
    _leave(top, total, acc, tops, totals, accs, row, parts, part, inside & (begin < end), v_dim, d)


@triton.jit(
    do_not_specialize=["heads", "longest", "root", "v_dim", "window", "span", "before", "parts"],
    do_not_specialize_on_alignment=["lengths", "tops", "totals"],
)
def decode_combine_kernel(
    tops, totals, accs, lengths, out, heads, longest, root, v_dim, window, span, before, parts,
    PART: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query head: the parts that hold a key which its sequence sees."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row // heads), longest).to(tl.int32)
    low = tl.maximum(length - window, 0)
    root_low = tl.maximum(root + length - window, 0)
    d = tl.arange(0, BLOCK_D)
    v_dim = v_dim * _UNIT
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        own = part - before
        own_end = tl.minimum(own * PART + PART, length)
        in_root = tl.minimum(part * span + span, root) > root_low
        in_own = (own_end > low) & (own_end > own * PART)
        seen = (part < parts) & tl.where(own < 0, in_root, in_own)
        place = row * parts + part
        part_top = tl.load(tops + place, mask=seen, other=-float("inf"))
        part_total = tl.load(totals + place, mask=seen, other=0.0)
        part_acc = tl.load(
            accs + place[:, None] * v_dim + d[None, :], mask=seen[:, None] & (d < v_dim)[None, :], other=0.0
        )
        higher = tl.maximum(top, tl.max(part_top, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(part_top - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight * part_total, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * part_acc, 0)
        top = higher
    tl.store(out + row * v_dim + d, (acc / total).to(out.dtype.element_ty), mask=d < v_dim)


class Tile(NamedTuple):
    """Tile of a program (rows, keys, entries of a head that are multiplied at a time) and how it is compiled."""

    block_m: int
    block_n: int
    block_c: int
    warps: int
    stages: int


# Entries of a head, rounded up. Of smaller heads no more is read, and their products are little in any case.
BLOCKS = (64, 128, 256)


def own_tile(float32: bool, block: int, paged: bool) -> Tile:
    """For the own cache: 16 rows are what a matrix instruction needs; two tiles of keys and values are on their way (float32:
    one). The compiler keeps as many of the table's entries on their way to these, with as many stages more; heads of 256 have
    one less, or triton 3.6 would spill."""
    if float32:
        return Tile(16, 16 if block == 256 else 32, 32, 8 if paged and block == 64 else 4, 3 if paged else 2)
    if block == 256:
        return Tile(16, 32, block, 4, 4 if paged else 3)
    return Tile(16, 64, block, 4, 5 if paged else 3)


def root_tile(float32: bool, block: int) -> Tile:
    """For the root: 64 rows are what the matrix instruction of four warps needs."""
    if float32:
        return Tile(32, 32, 32, 8, 2)
    return Tile(64, 32, block, 8, 2) if block == 256 else Tile(64, 64, block, 4, 2)


def _aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy whose last dimension lies side by side and whose rows begin at multiples of 8 and of 16 bytes."""
    whole = x.stride(-1) == 1 and all(stride % _UNIT.value == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _units(*sizes: int) -> list[int]:
    return [size // _UNIT.value for size in sizes]


def decode(
    q_BHD: Tensor, k_root_CGD: Tensor, v_root_CGV: Tensor, k_own_BGKD: Tensor, v_own_BGKV: Tensor, lengths_B: Tensor,
    scale: float, window: int | None, softcap: float | None, pages_BN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The launches; arguments are checked by the caller, head sizes are multiples of 8 up to 256.

    pages_BN: `k_own_BGKD` and `v_own_BGKV` are pages [P, G, K, ..], K a power of two; these are the sequences'."""
    batch, heads, dim = q_BHD.shape
    root, kv_heads, v_dim = v_root_CGV.shape
    longest, group = k_own_BGKD.shape[2], heads // kv_heads
    lengths = lengths_B.long().contiguous()
    pages = (lengths, 0, 0, 0)  # of no meaning
    if pages_BN is not None:
        table = pages_BN.int()
        table = table if table.stride(1) == 1 else table.contiguous()
        pages = (table, table.stride(0), len(k_own_BGKD), longest.bit_length() - 1)
        longest *= table.shape[1]
    out = q_BHD.new_empty(batch, heads, v_dim)
    if batch == 0:
        return out
    q, k_root, v_root, k_own, v_own = (_aligned(x) for x in (q_BHD, k_root_CGD, v_root_CGV, k_own_BGKD, v_own_BGKV))
    float32, block = q.dtype == torch.float32, max(BLOCKS[0], triton.next_power_of_2(max(dim, v_dim)))
    own, shared = own_tile(float32, block, pages_BN is not None), root_tile(float32, block)
    span = max(ROOT_PART, -(-root // (_ROOT_PARTS * shared.block_n)) * shared.block_n)
    before, own_parts = triton.cdiv(root, span), triton.cdiv(longest, PART)
    parts = before + own_parts
    tops, totals = q.new_empty(2, batch * heads, parts, dtype=torch.float32)
    accs = q.new_empty(batch * heads, parts, v_dim, dtype=torch.float32)
    window = _ALL if window is None else min(window, _ALL)
    factor, cap = (scale * _LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2E)
    queries, found = (q, *_units(*q.stride()[:2])), (lengths, tops, totals, accs)
    sizes = _units(dim, v_dim)
    with torch.cuda.device_of(q):
        if root:
            decode_root_kernel[(triton.cdiv(batch * group, shared.block_m), kv_heads, before)](
                *queries, k_root, *_units(*k_root.stride()[:2]), v_root, *_units(*v_root.stride()[:2]), *found, batch, heads,
                group, longest, root, *sizes, window, span, parts, factor, cap,
                SOFTCAP=softcap is not None, BLOCK_M=shared.block_m, BLOCK_N=shared.block_n, BLOCK_D=block,
                BLOCK_C=shared.block_c, num_warps=shared.warps, num_stages=shared.stages,
            )  # fmt: skip
        decode_own_kernel[(batch * kv_heads * triton.cdiv(group, own.block_m), own_parts)](
            *queries, k_own, *_units(*k_own.stride()[:3]), v_own, *_units(*v_own.stride()[:3]), *pages, *found, heads, group,
            longest, *sizes, window, before, parts, factor, cap,
            PAGED=pages_BN is not None, SOFTCAP=softcap is not None, PART=PART, BLOCK_M=own.block_m, BLOCK_N=own.block_n,
            BLOCK_D=block, BLOCK_C=own.block_c, num_warps=own.warps, num_stages=own.stages,
        )  # fmt: skip
        decode_combine_kernel[(batch * heads,)](
            tops, totals, accs, lengths, out, heads, longest, root, sizes[1], window, span, before, parts,
            PART=PART, BLOCK_P=_MERGED, BLOCK_D=block, num_warps=_MERGE_WARPS,
        )  # fmt: skip
    return out


def _configuration(kernel: Any, name: str, title: str, constants: dict[str, Any], warps: int, stages: int) -> Configuration:
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{name}") | dict.fromkeys(("tops", "totals", "accs"), "*fp32")
    types |= {"lengths": "*i64", "factor": "fp32", "cap": "fp32", "table": "*i32" if constants.get("PAGED") else "*i64"}
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    whole = tuple(argument for argument in ("q", "k", "v", "accs", "out") if argument in signature)
    return Configuration(f"{kernel.__name__} {name} {title}", kernel, signature, constants, warps, stages, whole)


def configurations() -> Iterator[Configuration]:
    """What `decode` can choose."""
    for name, block in product(("fp32", "bf16", "fp16"), BLOCKS):
        for (kernel, paged), softcap in product(
            ((decode_own_kernel, False), (decode_own_kernel, True), (decode_root_kernel, False)), (False, True)
        ):
            of_cache = kernel is decode_own_kernel
            tile = own_tile(name == "fp32", block, paged) if of_cache else root_tile(name == "fp32", block)
            constants = {"SOFTCAP": softcap, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": block}
            constants |= {"BLOCK_C": tile.block_c} | ({"PART": PART, "PAGED": paged} if of_cache else {})
            title = f"D{block}{', pages' if paged else ''}{', softcap' if softcap else ''}"
            yield _configuration(kernel, name, title, constants, tile.warps, tile.stages)
        constants = {"PART": PART, "BLOCK_P": _MERGED, "BLOCK_D": block}
        yield _configuration(decode_combine_kernel, name, f"D{block}", constants, _MERGE_WARPS, 3)
