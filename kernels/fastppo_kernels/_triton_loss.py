"""The PPO losses as Triton kernels: loss, metrics and gradients of all tokens in one launch, and one that adds them up.

Every program takes one block of tokens, writes their gradients (not yet divided by the denominator, which may be the
number of actions and is known only at the end) and one row of 16 sums in float64. A single program adds those rows up
in their order: no atomics, so the same inputs give the same bits.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from .kl import MAX_LOG_RATIO, KLEstimator

BLOCK = 512
_WARPS = 4
_ROWS = 64  # rows of sums that the finishing program adds at a time
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
_K1, _CLAMPED_K1, _K2, _K3 = (tl.constexpr(i) for i in range(1, 5))
_LIMIT = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def clamp(x, low, high):
    """Comparisons rather than min and max, which lose NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp(x):
    """exp for |x| <= 100 to float32 rounding, and exactly 1 at 0; the hardware's alone loses a digit at 20."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) - n * -2.12194440e-4
    return tl.exp(rest) * tl.exp2(n)


@triton.jit
def expm1_minus(x):
    """exp(x) - 1 - x for |x| <= 20: by its series where the difference would lose its digits."""
    tail = 1 / 5040.0 + x * (1 / 40320.0 + x * (1 / 362880.0 + x * (1 / 3628800.0 + x * (1 / 39916800.0))))
    series = x * x * (0.5 + x * (1 / 6.0 + x * (1 / 24.0 + x * (1 / 120.0 + x * (1 / 720.0 + x * tail)))))
    return tl.where(tl.abs(x) < 1.0, series, exp(x) - 1.0 - x)


@triton.jit
def wins(a, b):
    """The share of the gradient of max(a, b) that a gets: half where they are equal, as torch.maximum."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _kl(d, KL: tl.constexpr):
    """A KL estimate and its derivative, of d = logprob - ref_logprob: see `sampled_kl`."""
    if KL == _K1:
        return d, tl.where(d == d, 1.0, d)
    elif KL == _CLAMPED_K1:
        return tl.where(d < 0, 0.0, d), tl.where(d < 0, 0.0, 1.0)
    elif KL == _K2:
        return 0.5 * d * d, d
    elif KL == _K3:
        x = clamp(-d, -_LIMIT, _LIMIT)
        value = expm1_minus(x)
        return value, tl.where(tl.abs(d) <= _LIMIT, -(value + x), 0.0)
    else:
        # One of the two terms is 0; the other is -log((1 + exp(-|d|)) / 2) = -log1p(y) = -2 atanh(s).
        e = exp(clamp(-tl.abs(d), -100.0, 0.0))
        # exp(x) - 1 by its own formula near 0, where subtracting would lose the digits.
        y = 0.5 * tl.where(d * d < 1.0, expm1_minus(-tl.abs(d)) - tl.abs(d), e - 1.0)
        s = y / (2.0 + y)
        t = s * s
        series = 1 + t * (1 / 3.0 + t * (1 / 5.0 + t * (1 / 7.0 + t * (1 / 9.0 + t * (1 / 11.0 + t * (1 / 13.0))))))
        slope = 0.5 * e / (1.0 + e)
        return -s * series, tl.where(d > 0, slope, tl.where(d < 0, -slope, 0.0))


@triton.jit
def _add(sums, column: tl.constexpr, values, keep):
    """Put the sum of the kept values into one column."""
    total = tl.sum(tl.where(keep, values, 0.0).to(tl.float64), axis=0)
    return tl.where(tl.arange(0, COLUMNS) == column, total, sums)


# Neither lengths nor the alignment of slices of a packed batch may lead to another compilation; loads of neighbouring
# tokens coalesce in any case.
@triton.jit(do_not_specialize=["size", "has_entropy"], do_not_specialize_on_alignment=_POINTERS)
def _loss_kernel(
    logprob_ptr, old_logprob_ptr, advantages_ptr, entropy_ptr, ref_logprob_ptr,
    values_ptr, old_values_ptr, returns_ptr, mask_ptr, dlogprob_ptr, dvalues_ptr, sums_ptr,
    size: tl.int64, has_entropy: tl.int32, ratio_low, ratio_high, dual_clip, entropy_coef, kl_coef, value_coef, value_clip,
    huber_delta,
    POLICY: tl.constexpr, VALUE: tl.constexpr, MASK: tl.constexpr, KL: tl.constexpr,
    VALUE_CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    keep = inside
    if MASK:
        keep = inside & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)
    one = tl.where(keep, 1.0, 0.0)
    sums = tl.zeros([COLUMNS], dtype=tl.float64)
    if POLICY:
        new = tl.load(logprob_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        old = tl.load(old_logprob_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        log_ratio = clamp(new - old, -_LIMIT, _LIMIT)
        ratio = exp(log_ratio)
        bounded = clamp(ratio, ratio_low, ratio_high)
        unclipped = -advantage * ratio
        clipped = -advantage * bounded
        surrogate = tl.where(clipped > unclipped, clipped, unclipped)
        was_clipped = clipped > unclipped
        share = wins(unclipped, clipped)
        share += (1.0 - share) * tl.where(bounded == ratio, 1.0, 0.0)
        # Without dual clip the bound is infinite.
        bound = -advantage * dual_clip
        bad = advantage < 0
        was_clipped = was_clipped | (bad & (surrogate > bound))
        share *= tl.where(bad, wins(bound, surrogate), 1.0)
        surrogate = tl.where(bad & (bound < surrogate), bound, surrogate)
        share = tl.where(tl.abs(new - old) <= _LIMIT, share, 0.0)
        gradient = -advantage * ratio * share
        loss = surrogate
        sums = _add(sums, 0, one, keep)
        sums = _add(sums, 1, ratio, keep)
        largest = tl.max(tl.where(keep, ratio, 0.0), axis=0).to(tl.float64)
        sums = tl.where(tl.arange(0, COLUMNS) == 2, largest, sums)
        sums = _add(sums, 3, tl.where(was_clipped, 1.0, 0.0), keep)
        sums = _add(sums, 4, expm1_minus(log_ratio), keep)
        sums = _add(sums, 5, surrogate, keep)
        entropy = tl.load(entropy_ptr + offsets, mask=keep & (has_entropy != 0), other=0.0).to(tl.float32)
        sums = _add(sums, 6, entropy, keep)
        loss -= tl.where(entropy_coef == 0, 0.0, entropy_coef * entropy)
        if KL:
            reference = tl.load(ref_logprob_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
            kl, slope = _kl(new - reference, KL)
            sums = _add(sums, 7, kl, keep)
            loss += tl.where(kl_coef == 0, 0.0, kl_coef * kl)
            gradient += tl.where(kl_coef == 0, 0.0, kl_coef * slope)
        sums = _add(sums, 8, loss, keep)
        tl.store(dlogprob_ptr + offsets, tl.where(keep, gradient, 0.0), mask=inside)
    if VALUE:
        value = tl.load(values_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        error = value - target
        slope = clamp(error, -huber_delta, huber_delta)
        value_loss = slope * (error - 0.5 * slope)
        if VALUE_CLIP:
            old_value = tl.load(old_values_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
            moved = value - old_value
            clipped_error = old_value + clamp(moved, -value_clip, value_clip) - target
            clipped_slope = clamp(clipped_error, -huber_delta, huber_delta)
            clipped_loss = clipped_slope * (clipped_error - 0.5 * clipped_slope)
            share = wins(clipped_loss, value_loss)
            slope = (1.0 - share) * slope + tl.where(tl.abs(moved) <= value_clip, share * clipped_slope, 0.0)
            value_was_clipped = clipped_loss > value_loss
            value_loss = tl.where(value_was_clipped, clipped_loss, value_loss)
            sums = _add(sums, 11, tl.where(value_was_clipped, 1.0, 0.0), keep)
        error = target - value
        sums = _add(sums, 9, one, keep)
        sums = _add(sums, 10, value_loss, keep)
        sums = _add(sums, 12, error, keep)
        sums = _add(sums, 13, error.to(tl.float64) * error.to(tl.float64), keep)
        sums = _add(sums, 14, target, keep)
        sums = _add(sums, 15, target.to(tl.float64) * target.to(tl.float64), keep)
        tl.store(dvalues_ptr + offsets, tl.where(keep, value_coef * slope, 0.0), mask=inside)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS), sums)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["denominator_ptr"])
def _finish_kernel(
    sums_ptr, denominator_ptr, loss_ptr, scale_ptr, metrics_ptr, blocks: tl.int64, denominator: tl.float64,
    value_coef: tl.float64, POLICY: tl.constexpr, DENOMINATOR_TENSOR: tl.constexpr, ROWS: tl.constexpr,
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
    loss = value_coef * tl.sum(tl.where(column == 10, total, 0.0), axis=0)
    count = tl.sum(tl.where(column == 9, total, 0.0), axis=0)
    if POLICY:
        loss += tl.sum(tl.where(column == 8, total, 0.0), axis=0)
        count = tl.sum(tl.where(column == 0, total, 0.0), axis=0)
    if DENOMINATOR_TENSOR:
        divisor = tl.load(denominator_ptr).to(tl.float64)
    else:  # 0: the number of actions
        divisor = tl.where(denominator == 0, tl.maximum(count, 1.0), denominator)
    tl.store(loss_ptr, (loss / divisor).to(tl.float32))
    tl.store(scale_ptr, (1.0 / divisor).to(tl.float32))
    tl.store(metrics_ptr + column, total)


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
    inputs = [logprob, old_logprob, advantages, entropy, ref_logprob, values, old_values, returns]
    # A pointer that the kernel does not read takes any tensor.
    flat = [like if tensor is None else tensor.contiguous() for tensor in inputs]
    words = like if mask is None else mask.contiguous()
    if words.dtype == torch.bool:
        words = words.view(torch.uint8)
    with torch.cuda.device_of(like):
        if blocks:
            _loss_kernel[(blocks,)](
                *flat, words, dlogprob, dvalues, sums, like.numel(), int(entropy is not None), 1.0 - clip_low,
                1.0 + clip_high, dual_clip, entropy_coef, kl_coef, value_coef, value_clip, huber_delta,
                POLICY=logprob is not None, VALUE=values is not None, MASK=mask is not None,
                KL=kl_estimator if ref_logprob is not None else 0, VALUE_CLIP=value_clip != float("inf"), BLOCK=BLOCK,
                num_warps=_WARPS,
            )  # fmt: skip
        _finish_kernel[(1,)](
            sums, sums if denominator_tensor is None else denominator_tensor, loss, scale, metrics, blocks,
            denominator, value_coef if values is not None else 0.0,
            POLICY=logprob is not None, DENOMINATOR_TENSOR=denominator_tensor is not None, ROWS=_ROWS,
            num_warps=_WARPS,
        )  # fmt: skip
    return loss, metrics, dlogprob, dvalues, scale


def _outputs(like: Tensor, policy: bool, value: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, scale = like.new_empty((), dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    dlogprob, dvalues = (
        like.new_empty(like.shape if there else (0,), dtype=torch.float32) for there in (policy, value)
    )
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
    """What `ppo_loss` can choose where the per-token inputs have one dtype and the mask is bool."""
    pointers = [name for name in _loss_kernel.arg_names if name.endswith("_ptr")]
    numbers = ("ratio_low", "ratio_high", "dual_clip", "entropy_coef", "kl_coef", "value_coef", "value_clip", "huber_delta")
    written = {"mask_ptr": "*u8", "dlogprob_ptr": "*fp32", "dvalues_ptr": "*fp32", "sums_ptr": "*fp64"}
    kinds = [("policy", True, False, False), ("value", False, True, False), ("clipped value", False, True, True)]
    kinds += [("policy, value", True, True, False), ("policy, clipped value", True, True, True)]
    for dtype, mask, (kind, policy, value, clip) in product(("fp32", "bf16", "fp16"), (False, True), kinds):
        signature = {name: written.get(name, f"*{dtype}") for name in pointers} | dict.fromkeys(numbers, "fp32")
        signature |= {"size": "i64", "has_entropy": "i32"}
        for kl, estimator in enumerate(("no kl", *get_args(KLEstimator)) if policy else ("",)):
            constants = {"POLICY": policy, "VALUE": value, "MASK": mask, "KL": kl, "VALUE_CLIP": clip, "BLOCK": BLOCK}
            name = f"ppo_loss {dtype} {kind}, {f'{estimator}, ' if policy else ''}{'mask' if mask else 'no mask'}"
            yield Configuration(name, _loss_kernel, signature, constants, _WARPS, 3)
    signature = {"sums_ptr": "*fp64", "loss_ptr": "*fp32", "scale_ptr": "*fp32", "metrics_ptr": "*fp64"}
    signature |= {"blocks": "i64", "denominator": "fp64", "value_coef": "fp64"}
    for policy, denominator in product((False, True), ("number", "i64", "fp32", "fp64")):
        of_tensor = denominator != "number"
        types = signature | {"denominator_ptr": f"*{denominator}" if of_tensor else "*fp64"}
        constants = {"POLICY": policy, "DENOMINATOR_TENSOR": of_tensor, "ROWS": _ROWS}
        name = f"ppo_loss, finish, {'policy' if policy else 'value'}, denominator {denominator}"
        yield Configuration(name, _finish_kernel, types, constants, _WARPS, 3)
