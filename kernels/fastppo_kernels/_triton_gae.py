"""GAE and whitening as Triton kernels.

With B_t = V_t + lambda A_t the recursion A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1} becomes

    A_t = r_t - V_t + gamma B_{t+1},      B_t = (1 - lambda) V_t + lambda r_t + gamma lambda B_{t+1},

one linear recurrence of one quantity, in which a masked step is the identity: no "value of the next counted step" has to be
found. One program owns a sequence and scans it in blocks from its end, carrying B. What it needs at step t is B_{t+1}, so its
scan holds step t + 1 at place t. All in float64, as the torch form.
"""

from collections.abc import Iterator
from itertools import product

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
    do_not_specialize=["length"],
    do_not_specialize_on_alignment=[
        "rewards_ptr", "values_ptr", "mask_ptr", "lam_ptr", "cu_seqlens_ptr", "advantages_ptr", "returns_ptr",
    ],
)  # fmt: skip
def _gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, cu_seqlens_ptr, lam_ptr, advantages_ptr, returns_ptr, sums_ptr,
    length: tl.int64, gamma: tl.float64, lam: tl.float64,
    PACKED: tl.constexpr, MASK: tl.constexpr, LAM_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    else:
        first = sequence * length
        end = first + length
    lambda_ = tl.full([], lam, tl.float64)
    gamma_ = tl.full([], gamma, tl.float64)
    if LAM_TENSOR:
        lambda_ = tl.load(lam_ptr + sequence).to(tl.float64)
    carry = tl.full([], 0.0, tl.float64)
    count = tl.zeros([BLOCK], dtype=tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    blocks = tl.cdiv(end - first, BLOCK)
    for i in range(0, blocks):
        step = first + (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        here = step < end
        after = step + 1 < end
        keep_here = here
        keep_after = after
        if MASK:
            keep_here = here & (tl.load(mask_ptr + step, mask=here, other=0) != 0)
            keep_after = after & (tl.load(mask_ptr + step + 1, mask=after, other=0) != 0)
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


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["x_ptr", "mask_ptr"])
def _moments_kernel(x_ptr, mask_ptr, sums_ptr, size: tl.int64, MASK: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    keep = offset < size
    if MASK:
        keep = keep & (tl.load(mask_ptr + offset, mask=keep, other=0) != 0)
    x = tl.load(x_ptr + offset, mask=keep, other=0.0).to(tl.float64)
    tl.store(sums_ptr + block * 3, tl.sum(tl.where(keep, 1.0, 0.0).to(tl.float64), axis=0))
    tl.store(sums_ptr + block * 3 + 1, tl.sum(x, axis=0))
    tl.store(sums_ptr + block * 3 + 2, tl.sum(x * x, axis=0))


@triton.jit(
    do_not_specialize=["size", "rows"], do_not_specialize_on_alignment=["x_ptr", "mask_ptr", "sums_ptr", "out_ptr"]
)
def _whiten_kernel(
    x_ptr, mask_ptr, sums_ptr, out_ptr, size: tl.int64, rows: tl.int64, eps: tl.float64,
    SHIFT_MEAN: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    keep = inside
    if MASK:
        keep = inside & (tl.load(mask_ptr + offset, mask=inside, other=0) != 0)
    centred = tl.load(x_ptr + offset, mask=keep, other=0.0).to(tl.float64) - mean
    white = tl.where(centred == 0, 0.0, centred * scale)
    if not SHIFT_MEAN:
        white += mean
    tl.store(out_ptr + offset, tl.where(keep, white, 0.0).to(tl.float32), mask=inside)


def _words(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask as the kernels read it; any tensor where there is none."""
    if mask is None:
        return like
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


@torch.library.custom_op("fastppo_kernels::gae", mutates_args=())
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    lam_tensor: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch; arguments are checked by the caller.

    Returns:
        (advantages, returns) float32, and per sequence (count, sum, sum of squares) of its advantages, float64 [N, 3].
    """
    advantages, returns, sums = _gae_outputs(rewards, cu_seqlens)
    if len(sums):
        with torch.cuda.device_of(rewards):
            _gae_kernel[(len(sums),)](
                rewards.contiguous(), values.contiguous(), _words(mask, rewards),
                rewards if cu_seqlens is None else cu_seqlens.contiguous(),
                rewards if lam_tensor is None else lam_tensor.contiguous(), advantages, returns, sums,
                0 if cu_seqlens is not None else rewards.shape[1], gamma, lam, PACKED=cu_seqlens is not None,
                MASK=mask is not None, LAM_TENSOR=lam_tensor is not None, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip
    return advantages, returns, sums


def _gae_outputs(rewards: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    advantages, returns = (rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in range(2))
    return advantages, returns, rewards.new_empty(sequences, 3, dtype=torch.float64)


@gae.register_fake
def _(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, *others: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _gae_outputs(rewards, cu_seqlens)


@torch.library.custom_op("fastppo_kernels::whiten", mutates_args=())
def whiten(x: Tensor, mask: Tensor | None, sums: Tensor | None, shift_mean: bool, eps: float) -> Tensor:
    """The launches; arguments are checked by the caller."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    blocks = triton.cdiv(x.numel(), BLOCK)
    if blocks == 0:
        return out
    x, words = x.contiguous(), _words(mask, x)
    with torch.cuda.device_of(x):
        if sums is None:
            sums = x.new_empty(blocks, 3, dtype=torch.float64)
            _moments_kernel[(blocks,)](
                x, words, sums, x.numel(), MASK=mask is not None, BLOCK=BLOCK, num_warps=_WARPS
            )  # fmt: skip
        sums = sums.sum(0, keepdim=True) if len(sums) > _MAX_ROWS else sums.contiguous()
        _whiten_kernel[(blocks,)](
            x, words, sums, out, x.numel(), len(sums), eps, SHIFT_MEAN=shift_mean, MASK=mask is not None, ROWS=_ROWS,
            BLOCK=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return out


@whiten.register_fake
def _(x: Tensor, mask: Tensor | None, sums: Tensor | None, shift_mean: bool, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def configurations() -> Iterator[Configuration]:
    """What `gae` and `whiten` can choose where the inputs have one dtype and the mask is bool."""
    for dtype, mask in product(("fp32", "bf16", "fp16"), (False, True)):
        masked = "mask" if mask else "no mask"
        signature = {
            "rewards_ptr": f"*{dtype}", "values_ptr": f"*{dtype}", "mask_ptr": "*u8", "advantages_ptr": "*fp32",
            "returns_ptr": "*fp32", "sums_ptr": "*fp64", "length": "i64", "gamma": "fp64", "lam": "fp64",
        }  # fmt: skip
        for index, lam in product(("", "i32", "i64"), ("", "fp32", "fp64")):
            pointers = {"cu_seqlens_ptr": f"*{index or dtype}", "lam_ptr": f"*{lam or dtype}"}
            constants = {"PACKED": bool(index), "MASK": mask, "LAM_TENSOR": bool(lam), "BLOCK": BLOCK}
            name = f"gae {dtype} {f'packed {index}' if index else 'padded'}, lambda {lam or 'number'}, {masked}"
            yield Configuration(name, _gae_kernel, signature | pointers, constants, _WARPS, 3)
        signature = {"x_ptr": f"*{dtype}", "mask_ptr": "*u8", "sums_ptr": "*fp64", "size": "i64"}
        constants = {"MASK": mask, "BLOCK": BLOCK}
        yield Configuration(f"whiten {dtype}, moments, {masked}", _moments_kernel, signature, constants, _WARPS, 3)
        for shift in (False, True):
            yield Configuration(
                f"whiten {dtype}, {'centred' if shift else 'scaled'}, {masked}", _whiten_kernel,
                signature | {"out_ptr": "*fp32", "rows": "i64", "eps": "fp64"},
                constants | {"SHIFT_MEAN": shift, "ROWS": _ROWS}, _WARPS, 3,
            )  # fmt: skip
