"""The PPO losses as Triton kernels: loss, metrics and gradients of all tokens in one launch, and one that adds them up.

Every program takes one block of tokens, writes their gradients (not yet divided by the denominator, which may be the
number of actions and is known only at the end) and one row of 16 sums. A single program adds those rows up in their
order: no atomics, so the same inputs give the same bits.

All arithmetic is in float64. The op waits for its launches and for memory, not for arithmetic, and then the sums have no
error to speak of, and a gradient is rounded once.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._triton_math import LIMIT, clamp, exp, expm1_minus, kl_terms

BLOCK = 256
_WARPS = 4
_ROWS = 64  # rows of sums that the finishing program adds at a time
_DENOMINATORS = (torch.int64, torch.float32, torch.float64)
COLUMNS = tl.constexpr(16)
POLICY_METRICS = (
    "count", "ratio_sum", "ratio_max", "clip_fraction_sum", "approx_kl_sum", "policy_loss_sum", "entropy_sum",
    "kl_ref_sum",
)  # fmt: skip
VALUE_METRICS = (
    "value_count", "value_loss_sum", "value_clip_fraction_sum", "value_error_sum", "value_error_square_sum",
    "return_sum", "return_square_sum",
)  # fmt: skip
# The columns of the sums: POLICY_METRICS, the policy's loss with entropy and KL, VALUE_METRICS.
VALUE_START = len(POLICY_METRICS) + 1
_POINTERS = [
    f"{name}_ptr"
    for name in (
        "logprob", "old_logprob", "advantages", "entropy", "ref_logprob", "values", "old_values", "returns", "mask",
        "dlogprob", "dvalues",
    )
]  # fmt: skip


@triton.jit
def _wins(a, b):
    """The share of the gradient of max(a, b) that a gets: half where they are equal, as torch.maximum."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _add(sums, column: tl.constexpr, values, keep):
    """Put the sum of the kept values into one column."""
    return tl.where(tl.arange(0, COLUMNS) == column, tl.sum(tl.where(keep, values, 0.0), axis=0), sums)


@triton.jit
def _load(pointer, offsets, keep):
    return tl.load(pointer + offsets, mask=keep, other=0.0).to(tl.float64)


# Neither lengths nor the alignment of slices of a packed batch may lead to another compilation; loads of neighbouring
# tokens coalesce in any case. What can be switched at run time is: a branch that all threads take costs nothing here.
@triton.jit(
    do_not_specialize=["size", "has_mask", "has_entropy", "kl_kind", "has_value_clip"],
    do_not_specialize_on_alignment=_POINTERS,
)
def _loss_kernel(
    logprob_ptr, old_logprob_ptr, advantages_ptr, entropy_ptr, ref_logprob_ptr,
    values_ptr, old_values_ptr, returns_ptr, mask_ptr, dlogprob_ptr, dvalues_ptr, sums_ptr,
    size: tl.int64, has_mask: tl.int32, has_entropy: tl.int32, kl_kind: tl.int32, has_value_clip: tl.int32,
    ratio_low: tl.float64, ratio_high: tl.float64, dual_clip: tl.float64, entropy_coef: tl.float64, kl_coef: tl.float64,
    value_coef: tl.float64, value_clip: tl.float64, huber_delta: tl.float64,
    POLICY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    keep = inside & (tl.load(mask_ptr + offsets, mask=inside & (has_mask != 0), other=1) != 0)
    one = tl.full([BLOCK], 1.0, tl.float64)
    sums = tl.zeros([COLUMNS], dtype=tl.float64)
    if POLICY:
        new = _load(logprob_ptr, offsets, keep)
        advantage = _load(advantages_ptr, offsets, keep)
        difference = new - _load(old_logprob_ptr, offsets, keep)
        log_ratio = clamp(difference, -LIMIT, LIMIT)
        ratio = exp(log_ratio)
        bounded = clamp(ratio, ratio_low, ratio_high)
        unclipped = -advantage * ratio
        clipped = -advantage * bounded
        surrogate = tl.where(clipped > unclipped, clipped, unclipped)
        was_clipped = clipped > unclipped
        share = _wins(unclipped, clipped)
        share += (1.0 - share) * tl.where(bounded == ratio, 1.0, 0.0)
        # Without dual clip the bound is infinite.
        bound = -advantage * dual_clip
        bad = advantage < 0
        was_clipped = was_clipped | (bad & (surrogate > bound))
        share *= tl.where(bad, _wins(bound, surrogate), 1.0)
        surrogate = tl.where(bad & (bound < surrogate), bound, surrogate)
        gradient = tl.where(tl.abs(difference) <= LIMIT, unclipped * share, 0.0)
        sums = _add(sums, 0, one, keep)
        sums = _add(sums, 1, ratio, keep)
        sums = tl.where(tl.arange(0, COLUMNS) == 2, tl.max(tl.where(keep, ratio, 0.0), axis=0), sums)
        sums = _add(sums, 3, tl.where(was_clipped, one, 0.0), keep)
        sums = _add(sums, 4, expm1_minus(log_ratio), keep)
        sums = _add(sums, 5, surrogate, keep)
        entropy = _load(entropy_ptr, offsets, keep & (has_entropy != 0))
        sums = _add(sums, 6, entropy, keep)
        loss = surrogate - tl.where(entropy_coef == 0, 0.0, entropy_coef * entropy)
        if kl_kind != 0:
            kl, slope = kl_terms(new - _load(ref_logprob_ptr, offsets, keep), kl_kind)
            sums = _add(sums, 7, kl, keep)
            loss += tl.where(kl_coef == 0, 0.0, kl_coef * kl)
            gradient += tl.where(kl_coef == 0, 0.0, kl_coef * slope)
        sums = _add(sums, 8, loss, keep)
        tl.store(dlogprob_ptr + offsets, tl.where(keep, gradient, 0.0).to(tl.float32), mask=inside)
    if VALUE:
        value = _load(values_ptr, offsets, keep)
        target = _load(returns_ptr, offsets, keep)
        error = value - target
        slope = clamp(error, -huber_delta, huber_delta)
        value_loss = slope * (error - 0.5 * slope)
        if has_value_clip != 0:
            old_value = _load(old_values_ptr, offsets, keep)
            moved = value - old_value
            clipped_error = old_value + clamp(moved, -value_clip, value_clip) - target
            clipped_slope = clamp(clipped_error, -huber_delta, huber_delta)
            clipped_loss = clipped_slope * (clipped_error - 0.5 * clipped_slope)
            share = _wins(clipped_loss, value_loss)
            slope = (1.0 - share) * slope + tl.where(tl.abs(moved) <= value_clip, share * clipped_slope, 0.0)
            sums = _add(sums, 11, tl.where(clipped_loss > value_loss, one, 0.0), keep)
            value_loss = tl.where(clipped_loss > value_loss, clipped_loss, value_loss)
        sums = _add(sums, 9, one, keep)
        sums = _add(sums, 10, value_loss, keep)
        sums = _add(sums, 12, -error, keep)
        sums = _add(sums, 13, error * error, keep)
        sums = _add(sums, 14, target, keep)
        sums = _add(sums, 15, target * target, keep)
        tl.store(dvalues_ptr + offsets, tl.where(keep, value_coef * slope, 0.0).to(tl.float32), mask=inside)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS), sums)


@triton.jit(do_not_specialize=["blocks", "has_denominator"], do_not_specialize_on_alignment=["denominator_ptr"])
def _finish_kernel(
    sums_ptr, denominator_ptr, loss_ptr, scale_ptr, metrics_ptr, blocks: tl.int64, has_denominator: tl.int32,
    denominator: tl.float64, value_coef: tl.float64, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float64)
    largest = tl.zeros([COLUMNS], dtype=tl.float64)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = tl.load(sums_ptr + row[:, None] * COLUMNS + column[None, :], mask=row[:, None] < blocks, other=0.0)
        total += tl.sum(tile, axis=0)
        largest = tl.maximum(largest, tl.max(tile, axis=0))
    # A maximum passes over NaN, the sum of the ratios does not.
    ratio_sum = tl.sum(tl.where(column == 1, total, 0.0), axis=0)
    total = tl.where(column == 2, tl.where(ratio_sum == ratio_sum, largest, ratio_sum), total)
    # What is not asked for is 0 in every column of its own.
    loss = tl.sum(tl.where(column == 8, total, 0.0), axis=0) + value_coef * tl.sum(tl.where(column == 10, total, 0.0), axis=0)
    count = tl.max(tl.where((column == 0) | (column == 9), total, 0.0), axis=0)
    of_tensor = tl.load(denominator_ptr, mask=has_denominator != 0, other=0).to(tl.float64)
    of_number = tl.where(denominator == 0, tl.maximum(count, 1.0), denominator)  # 0: the number of actions
    divisor = tl.where(has_denominator != 0, of_tensor, of_number)
    tl.store(loss_ptr, (loss / divisor).to(tl.float32))
    tl.store(scale_ptr, (1.0 / divisor).to(tl.float32))
    tl.store(metrics_ptr + column, total)


def _of_one_dtype(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Contiguous; as they are where their dtypes agree, else float32: a kernel for every mixture would be many."""
    mixed = len({tensor.dtype for tensor in tensors if tensor is not None}) > 1
    return [None if tensor is None else (tensor.float() if mixed else tensor).contiguous() for tensor in tensors]


def _mask_bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    """A mask as the kernels read it: bytes, whatever integers it was; for None the memory of any other tensor."""
    if mask is None:
        return unused.view(torch.uint8)
    return (mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0).contiguous().view(torch.uint8)


@torch.library.custom_op("fastppo_kernels::ppo_loss", mutates_args=())
def ppo_loss(
    logprob: Tensor | None,
    old_logprob: Tensor | None,
    advantages: Tensor | None,
    entropy: Tensor | None,
    ref_logprob: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    denominator_tensor: Tensor | None,
    denominator: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: int,
    value_coef: float,
    value_clip: float,
    huber_delta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The launches; arguments are checked by the callers. Infinite dual_clip, value_clip, huber_delta: none;
    denominator 0: the number of actions.

    Returns:
        (loss [], float64 sums [16], d loss / d logprob and d loss / d values, both float32 and times the denominator,
        and 1 / denominator []).
    """
    like = logprob if logprob is not None else values
    assert like is not None
    blocks = triton.cdiv(like.numel(), BLOCK)
    loss, scale, dlogprob, dvalues = _outputs(like, logprob is not None, values is not None)
    sums = like.new_empty(blocks, COLUMNS.value, dtype=torch.float64)
    metrics = like.new_empty(COLUMNS.value, dtype=torch.float64)
    inputs = _of_one_dtype([logprob, old_logprob, advantages, entropy, ref_logprob, values, old_values, returns])
    # A pointer that the kernel does not read takes any tensor of its dtype.
    like = next(tensor for tensor in inputs if tensor is not None)
    flat = [like if tensor is None else tensor for tensor in inputs]
    if denominator_tensor is None:
        divisor = metrics
    else:
        divisor = denominator_tensor if denominator_tensor.dtype in _DENOMINATORS else denominator_tensor.double()
    with torch.cuda.device_of(like):
        if blocks:
            _loss_kernel[(blocks,)](
                *flat, _mask_bytes(mask, sums), dlogprob, dvalues, sums, like.numel(), int(mask is not None),
                int(entropy is not None), kl_estimator if ref_logprob is not None else 0, int(value_clip != float("inf")),
                1.0 - clip_low, 1.0 + clip_high, dual_clip, entropy_coef, kl_coef, value_coef, value_clip, huber_delta,
                POLICY=logprob is not None, VALUE=values is not None, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        _finish_kernel[(1,)](
            sums, divisor, loss, scale, metrics, blocks, int(denominator_tensor is not None), denominator, value_coef,
            ROWS=_ROWS, num_warps=_WARPS,
        )  # fmt: skip
    return loss, metrics, dlogprob, dvalues, scale


def _outputs(like: Tensor, policy: bool, value: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, scale = like.new_empty((), dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    dlogprob, dvalues = (like.new_empty(like.shape if there else (0,), dtype=torch.float32) for there in (policy, value))
    return loss, scale, dlogprob, dvalues


@ppo_loss.register_fake
def _(logprob: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values: Tensor | None = arguments[4]
    like = logprob if logprob is not None else values
    assert like is not None
    loss, scale, dlogprob, dvalues = _outputs(like, logprob is not None, values is not None)
    return loss, like.new_empty(COLUMNS.value, dtype=torch.float64), dlogprob, dvalues, scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, entropy, values, mask = inputs[0], inputs[3], inputs[5], inputs[8]
    _, _, dlogprob, dvalues, scale = output
    wanted = inputs[14] != 0 and ctx.needs_input_grad[3]  # without a coefficient there is no gradient, not even 0
    ctx.save_for_backward(dlogprob, dvalues, scale, entropy if wanted else None, mask if wanted else None)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (logprob, values)]
    ctx.entropy_coef = inputs[14]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *of_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(other is not None for other in of_others):
        raise RuntimeError("the Triton PPO loss is differentiable once; backend 'torch' is differentiable twice")
    grads: list[Tensor | None] = [None] * 20
    if grad is None:
        return tuple(grads)
    dlogprob, dvalues, scale, entropy, mask = ctx.saved_tensors
    scale = grad * scale
    for place, gradient, dtype in ((0, dlogprob, ctx.dtypes[0]), (5, dvalues, ctx.dtypes[1])):
        if ctx.needs_input_grad[place]:
            grads[place] = (gradient * scale).to(dtype)
    if entropy is not None:
        each = (-ctx.entropy_coef * scale).to(entropy.dtype)
        grads[3] = each.expand(entropy.shape) if mask is None else torch.where(mask != 0, each, 0.0)
    return tuple(grads)


ppo_loss.register_autograd(_backward, setup_context=_setup_context)


def configurations() -> Iterator[Configuration]:
    """Everything that `ppo_loss` can choose."""
    numbers = ("ratio_low", "ratio_high", "dual_clip", "entropy_coef", "kl_coef", "value_coef", "value_clip", "huber_delta")
    flags = ("has_mask", "has_entropy", "kl_kind", "has_value_clip")
    types = {"mask_ptr": "*u8", "dlogprob_ptr": "*fp32", "dvalues_ptr": "*fp32", "sums_ptr": "*fp64", "size": "i64"}
    types |= dict.fromkeys(numbers, "fp64") | dict.fromkeys(flags, "i32")
    kinds = {"policy": (True, False), "value": (False, True), "policy and value": (True, True)}
    for dtype, (kind, (policy, value)) in product(("fp32", "bf16", "fp16"), kinds.items()):
        constants = {"POLICY": policy, "VALUE": value, "BLOCK": BLOCK}
        signature = {name: types.get(name, f"*{dtype}") for name in _loss_kernel.arg_names if name not in constants}
        yield Configuration(f"ppo_loss {dtype} {kind}", _loss_kernel, signature, constants, _WARPS, 3)
    signature = {"sums_ptr": "*fp64", "loss_ptr": "*fp32", "scale_ptr": "*fp32", "metrics_ptr": "*fp64", "blocks": "i64"}
    signature |= {"has_denominator": "i32", "denominator": "fp64", "value_coef": "fp64"}
    for dtype in ("i64", "fp32", "fp64"):
        denominator = {"denominator_ptr": f"*{dtype}"}
        yield Configuration(
            f"ppo_loss, finish, denominator {dtype}", _finish_kernel, signature | denominator, {"ROWS": _ROWS}, _WARPS, 3
        )
