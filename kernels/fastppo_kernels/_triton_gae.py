"""GAE and whitening as Triton kernels.

With B_t = V_t + lambda A_t the recursion A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1} becomes

    A_t = r_t - V_t + gamma B_{t+1},      B_t = (1 - lambda) V_t + lambda r_t + gamma lambda B_{t+1},

one linear recurrence of one quantity, in which a masked step is the identity: no "value of the next counted step" has to be
found. One program owns a sequence and scans it in blocks from its end, carrying B. What it needs at step t is B_{t+1}, so its
scan holds step t + 1 at place t. All in float64, as the torch form.

Whether there is a mask, a packed batch or a lambda for each sequence is known at run time only: a load that no thread makes
costs less than many times as many kernels to compile. Pointers that are not read point to some other tensor.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration

BLOCK = 512
_WARPS = 4
_ROWS = 256  # rows of sums that a program of `whiten` adds at a time
_MAX_ROWS = 1024  # more rows than these are added once, beforehand, rather than by every program


@triton.jit
def _then(c_later, d_later, c, d):
    """x -> d + c (d_later + c_later x); 0 times whatever comes later is 0, also where that is NaN."""
    return c * c_later, d + tl.where(c == 0, 0.0, c * d_later)


# Lengths, the number of sequences and where a slice of a packed batch begins must not lead to another compilation.
@triton.jit(
    do_not_specialize=["length", "has_mask", "packed", "lam_of_each"],
    do_not_specialize_on_alignment=[
        "rewards_ptr", "values_ptr", "mask_ptr", "lam_ptr", "cu_seqlens_ptr", "advantages_ptr", "returns_ptr",
    ],
)  # fmt: skip
def _gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, cu_seqlens_ptr, lam_ptr, advantages_ptr, returns_ptr, sums_ptr,
    length: tl.int64, gamma: tl.float64, lam: tl.float64, has_mask: tl.int32, packed: tl.int32, lam_of_each: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + sequence, mask=packed != 0, other=sequence * length)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=packed != 0, other=(sequence + 1) * length)
    lambda_ = tl.load(lam_ptr + sequence, mask=lam_of_each != 0, other=tl.full([], lam, tl.float64))
    gamma_ = tl.full([], gamma, tl.float64)
    carry = tl.full([], 0.0, tl.float64)
    count = tl.zeros([BLOCK], dtype=tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    blocks = tl.cdiv(end - first, BLOCK)
    for i in range(0, blocks):
        step = first + (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        here = step < end
        after = step + 1 < end
        keep_here = here & (tl.load(mask_ptr + step, mask=here & (has_mask != 0), other=1) != 0)
        keep_after = after & (tl.load(mask_ptr + step + 1, mask=after & (has_mask != 0), other=1) != 0)
        reward = tl.load(rewards_ptr + step + 1, mask=keep_after, other=0.0).to(tl.float64)
        value = tl.load(values_ptr + step + 1, mask=keep_after, other=0.0).to(tl.float64)
        d = tl.where(lambda_ == 0, value, (1.0 - lambda_) * value + lambda_ * reward)
        c = tl.where(keep_after, gamma_ * lambda_, 1.0)
        c, d = tl.associative_scan((c, d), 0, _then, reverse=True)
        following = d + tl.where(c == 0, 0.0, c * carry)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, following, 0.0), axis=0)

        reward = tl.load(rewards_ptr + step, mask=keep_here, other=0.0).to(tl.float64)
        value = tl.load(values_ptr + step, mask=keep_here, other=0.0).to(tl.float64)
        exact = reward - value + tl.where(gamma_ == 0, 0.0, gamma_ * following)
        advantage = tl.where(keep_here, exact, 0.0).to(tl.float32)
        tl.store(advantages_ptr + step, advantage, mask=here)
        tl.store(returns_ptr + step, tl.where(keep_here, exact + value, 0.0).to(tl.float32), mask=here)
        # Of the numbers as they are stored, so that whitening these has mean 0 exactly.
        rounded = advantage.to(tl.float64)
        count += tl.where(keep_here, 1.0, 0.0)
        total += rounded
        squares += rounded * rounded
    tl.store(sums_ptr + sequence * 3, tl.sum(count, axis=0))
    tl.store(sums_ptr + sequence * 3 + 1, tl.sum(total, axis=0))
    tl.store(sums_ptr + sequence * 3 + 2, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["size", "has_mask"], do_not_specialize_on_alignment=["x_ptr", "mask_ptr"])
def _moments_kernel(x_ptr, mask_ptr, sums_ptr, size: tl.int64, has_mask: tl.int32, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    keep = inside & (tl.load(mask_ptr + offset, mask=inside & (has_mask != 0), other=1) != 0)
    x = tl.load(x_ptr + offset, mask=keep, other=0.0).to(tl.float64)
    tl.store(sums_ptr + block * 3, tl.sum(tl.where(keep, 1.0, 0.0).to(tl.float64), axis=0))
    tl.store(sums_ptr + block * 3 + 1, tl.sum(x, axis=0))
    tl.store(sums_ptr + block * 3 + 2, tl.sum(x * x, axis=0))


@triton.jit(
    do_not_specialize=["size", "rows", "has_mask", "shift_mean"],
    do_not_specialize_on_alignment=["x_ptr", "mask_ptr", "sums_ptr", "out_ptr"],
)
def _whiten_kernel(
    x_ptr, mask_ptr, sums_ptr, out_ptr, size: tl.int64, rows: tl.int64, eps: tl.float64, has_mask: tl.int32,
    shift_mean: tl.int32, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Every program adds up the few sums itself, in the same order: cheaper than a launch that does it once.
    counts = tl.zeros([ROWS], dtype=tl.float64)
    totals = tl.zeros([ROWS], dtype=tl.float64)
    squares = tl.zeros([ROWS], dtype=tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        counts += tl.load(sums_ptr + row * 3, mask=row < rows, other=0.0)
        totals += tl.load(sums_ptr + row * 3 + 1, mask=row < rows, other=0.0)
        squares += tl.load(sums_ptr + row * 3 + 2, mask=row < rows, other=0.0)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(totals, axis=0) / tl.maximum(count, 1.0)
    # One entry has variance 0, and so have equal ones, whatever rounding says.
    spread = tl.sum(squares, axis=0) - tl.sum(totals, axis=0) * mean
    variance = tl.where(spread < 0, 0.0, spread) / tl.maximum(count - 1.0, 1.0)
    scale = 1.0 / tl.sqrt(variance + eps)

    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    keep = inside & (tl.load(mask_ptr + offset, mask=inside & (has_mask != 0), other=1) != 0)
    centred = tl.load(x_ptr + offset, mask=keep, other=0.0).to(tl.float64) - mean
    white = tl.where(centred == 0, 0.0, centred * scale)
    white += tl.where(shift_mean != 0, 0.0, mean)
    tl.store(out_ptr + offset, tl.where(keep, white, 0.0).to(tl.float32), mask=inside)


def _words(mask: Tensor | None, unread: Tensor) -> Tensor:
    """A mask as the kernels read it: bytes."""
    if mask is None:
        return unread.view(torch.uint8)
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous().view(torch.uint8)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    lam_tensor: Tensor | None,
    gamma: float,
    lam: float,
    advantages: Tensor,
    returns: Tensor,
    sums: Tensor,
) -> None:
    """The launch, which fills the last three; arguments are checked by the caller."""
    if len(sums) == 0:
        return
    with torch.cuda.device_of(rewards):
        _gae_kernel[(len(sums),)](
            rewards.contiguous(), values.contiguous(), _words(mask, sums),
            sums.view(torch.int64) if cu_seqlens is None else cu_seqlens.long().contiguous(),
            sums if lam_tensor is None else lam_tensor.double().contiguous(), advantages, returns, sums,
            0 if cu_seqlens is not None else rewards.shape[1], gamma, lam, int(mask is not None),
            int(cu_seqlens is not None), int(lam_tensor is not None), BLOCK=BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@torch.library.custom_op("fastppo_kernels::whiten", mutates_args=())
def whiten(x: Tensor, mask: Tensor | None, sums: Tensor | None, shift_mean: bool, eps: float) -> Tensor:
    """The launches; arguments are checked by the caller."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    blocks = triton.cdiv(x.numel(), BLOCK)
    if blocks == 0:
        return out
    x, has_mask = x.contiguous(), int(mask is not None)
    with torch.cuda.device_of(x):
        words = _words(mask, out.view(-1))
        if sums is None:
            sums = x.new_empty(blocks, 3, dtype=torch.float64)
            _moments_kernel[(blocks,)](x, words, sums, x.numel(), has_mask, BLOCK=BLOCK, num_warps=_WARPS)
        sums = sums.sum(0, keepdim=True) if len(sums) > _MAX_ROWS else sums.contiguous()
        _whiten_kernel[(blocks,)](
            x, words, sums, out, x.numel(), len(sums), eps, has_mask, int(shift_mean), ROWS=_ROWS, BLOCK=BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
    return out


@whiten.register_fake
def _(x: Tensor, mask: Tensor | None, sums: Tensor | None, shift_mean: bool, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def configurations() -> Iterator[Configuration]:
    """What `gae` and `whiten` can choose where rewards and values have one dtype."""
    flags = {"has_mask": "i32", "mask_ptr": "*u8", "sums_ptr": "*fp64"}
    for dtype in ("fp32", "bf16", "fp16"):
        of_gae = flags | {
            "rewards_ptr": f"*{dtype}", "values_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i64", "lam_ptr": "*fp64",
            "advantages_ptr": "*fp32", "returns_ptr": "*fp32", "length": "i64", "gamma": "fp64", "lam": "fp64",
            "packed": "i32", "lam_of_each": "i32",
        }  # fmt: skip
        yield Configuration(f"gae {dtype}", _gae_kernel, of_gae, {"BLOCK": BLOCK}, _WARPS, 3)
        signature = flags | {"x_ptr": f"*{dtype}", "size": "i64"}
        yield Configuration(f"whiten {dtype}, moments", _moments_kernel, signature, {"BLOCK": BLOCK}, _WARPS, 3)
        yield Configuration(
            f"whiten {dtype}", _whiten_kernel,
            signature | {"out_ptr": "*fp32", "rows": "i64", "eps": "fp64", "shift_mean": "i32"},
            {"ROWS": _ROWS, "BLOCK": BLOCK}, _WARPS, 3,
        )  # fmt: skip
