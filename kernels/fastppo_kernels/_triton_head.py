"""Triton kernels of the head: one program owns one row of logits, from its statistics to its gradient.

A row is swept once for its statistics (maximum, sum of exponentials, entropy) and, where a gradient is wanted, once more to
write it. The arithmetic is that of `_rows.py`; the sums are kept *online*, rescaled whenever a block raises the maximum.
Everything of size V is in float32 registers only; what a row's targets (none, one or many) need is a few scalars beside it.

Rows and actions: see `_rows.Actions`; `per_row` is 0 where `order` lists the actions of the rows. Sums over the actions of a
row are made by the one program that owns it, in that order, so nothing is added with atomics.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._configuration import Configuration
from ._rows import Actions, Statistics, Transform
from ._triton_math import LIMIT, clamp, exp, expm1_minus, kl_terms

LOG_ZERO = tl.constexpr(_rows.LOG_ZERO)

# Slices of a packed batch begin anywhere: only of the logits and their gradient does the alignment decide over a compilation.
_OF_ROWS = [
    "bias", "targets", "order", "row_start", "logprobs", "maxima", "log_sums", "entropies", "best", "grad_logprobs",
    "grad_entropies", "old_logprobs", "advantages", "mask", "ref_logprobs", "normaliser", "metrics",
]  # fmt: skip

# Actions of a row are looked at this many at a time.
BLOCK_A = tl.constexpr(32)


@triton.jit
def _at_least(x, low):
    """max(x, low) that keeps NaN: a row that holds NaN must end as NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    """tanh to float32 rounding (the rational form of Cephes' tanhf for small x), from nothing but exp."""
    y = x * x
    series = -5.70498872745e-3
    series = series * y + 2.06390887954e-2
    series = series * y - 5.37397155531e-2
    series = series * y + 1.33314422036e-1
    series = series * y - 3.33332819422e-1
    return tl.where(y < 0.390625, series * y * x + x, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _load(row, bias, has_bias, columns, inside, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """cap(logit_scale (row + bias)) in float32; -inf outside, which is no probability (0 would be one)."""
    x = tl.load(row + columns, mask=inside, other=-float("inf")).to(tl.float32)
    # A load that no thread makes costs less than twice as many kernels to compile.
    x += tl.load(bias + columns, mask=inside & (has_bias != 0), other=0.0)
    x *= logit_scale
    if SOFTCAP:
        x = tl.where(inside, softcap * _tanh(x * (1.0 / softcap)), -float("inf"))
    return x


@triton.jit
def _sweep(
    row, bias, has_bias, vocab, logit_scale, inverse_temperature, softcap,
    SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(maximum, log S, entropy, argmax) of a row; see `_rows.py`."""
    maximum = -float("inf")
    total = 0.0
    weighted = 0.0
    best = 0
    for start in range(0, vocab, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = _load(row, bias, has_bias, columns, columns < vocab, logit_scale, softcap, SOFTCAP)
        if ARGMAX:
            block_maximum, block_best = tl.max(x, 0, return_indices=True)
            best = tl.where(block_maximum > maximum, start + block_best, best)
        else:
            block_maximum = tl.max(x, 0)
        raised = tl.maximum(maximum, block_maximum)
        base = tl.where(raised == -float("inf"), 0.0, raised)  # -inf - -inf would be NaN: the row may still have a number
        z = _at_least((x - base) * inverse_temperature, LOG_ZERO)
        weight = tl.exp(z)
        shift = _at_least((maximum - base) * inverse_temperature, LOG_ZERO)
        rescale = tl.exp(shift)
        weighted = rescale * (weighted + shift * total) + tl.sum(weight * z, 0)
        total = rescale * total + tl.sum(weight, 0)
        maximum = raised
    total = tl.where(maximum == -float("inf"), float("nan"), total)
    log_sum = tl.log(total)
    return maximum, log_sum, log_sum - weighted / total, best


@triton.jit
def _segment(row_start, row, per_row):
    start = row * per_row
    stop = start + per_row
    if per_row == 0:
        start = tl.load(row_start + row)
        stop = tl.load(row_start + row + 1)
    return start, stop


@triton.jit
def _action(order, places, inside, per_row):
    action = places
    if per_row == 0:
        action = tl.load(order + places, mask=inside, other=0)
    return action


@triton.jit
def _target_logprob(
    row, bias, has_bias, targets, action, inside, vocab, maximum, log_sum, logit_scale, inverse_temperature, softcap,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Log-probability of the targets of some actions of a row; NaN for a target outside of the vocabulary."""
    target = tl.load(targets + action, mask=inside, other=0)
    valid = inside & (target >= 0) & (target < vocab)
    x = _load(row, bias, has_bias, target, valid, logit_scale, softcap, SOFTCAP)
    return tl.where(valid, (x - maximum) * inverse_temperature - log_sum, float("nan"))


@triton.jit
def _write_gradient(
    row, grad_row, bias, has_bias, vocab, maximum, log_sum, entropy, grad_logprob, grad_entropy, logit_scale,
    inverse_temperature, softcap, factor, SOFTCAP: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient that falls on every entry of a row: -p_j (g_logprob + g_entropy (log p_j + H)), through cap and scales.

    A row whose two gradients are 0 gets exactly 0, even if its logits are NaN. NARROW: `grad_row` lies over `row`, of fewer
    bytes an entry. Entry j is then stored at or before place j of the logits, on top of what this block (all of it) and
    earlier blocks have read.
    """
    if (grad_logprob == 0) & (grad_entropy == 0):
        for start in range(0, vocab, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            tl.store(grad_row + columns, tl.zeros([BLOCK_V], grad_row.dtype.element_ty), mask=columns < vocab)
    else:
        for start in range(0, vocab, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            inside = columns < vocab
            x = _load(row, bias, has_bias, columns, inside, logit_scale, softcap, SOFTCAP)
            log_p = _at_least((x - maximum) * inverse_temperature - log_sum, LOG_ZERO)
            grad = -tl.exp(log_p) * (grad_logprob + grad_entropy * (log_p + entropy))
            if SOFTCAP:
                slope = x * (1.0 / softcap)
                grad *= 1.0 - slope * slope
            if NARROW:
                tl.debug_barrier()
            tl.store(grad_row + columns, (grad * factor).to(grad_row.dtype.element_ty), mask=inside)


@triton.jit
def _write_targets(
    grad_row, targets, order, logprobs, grad_logprobs, start, stop, per_row, vocab, maximum, log_sum, entropy,
    grad_logprob, grad_entropy, inverse_temperature, softcap, factor, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient at the targets of a row, written over what `_write_gradient` left there.

    Made anew from the action's log-probability rather than added to the stored entry: that one is rounded, and several
    actions of the row may have the same target. All of those write the same bits.
    """
    unused = (grad_logprob == 0) & (grad_entropy == 0)
    for first in range(start, stop, BLOCK_A):
        places = first + tl.arange(0, BLOCK_A)
        inside = places < stop
        action = _action(order, places, inside, per_row)
        target = tl.load(targets + action, mask=inside, other=-1)
        logprob = tl.load(logprobs + action, mask=inside, other=0.0)
        total = tl.zeros([BLOCK_A], tl.float32)
        for other_first in range(start, stop, BLOCK_A):
            other_places = other_first + tl.arange(0, BLOCK_A)
            other_inside = other_places < stop
            other = _action(order, other_places, other_inside, per_row)
            other_target = tl.load(targets + other, mask=other_inside, other=-2)
            other_grad = tl.load(grad_logprobs + other, mask=other_inside, other=0.0)
            total += tl.sum(tl.where(target[:, None] == other_target[None, :], other_grad[None, :], 0.0), 1)
        log_p = _at_least(logprob, LOG_ZERO)
        spread = tl.exp(log_p) * (grad_logprob + grad_entropy * (log_p + entropy))
        grad = total - tl.where(unused, 0.0, spread)
        if SOFTCAP:
            slope = ((logprob + log_sum) / inverse_temperature + maximum) / softcap
            grad *= tl.where(grad == 0, 0.0, 1.0 - slope * slope)
        valid = inside & (target >= 0) & (target < vocab)
        tl.store(grad_row + target, (grad * factor).to(grad_row.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["has_bias", "first_row", "per_row"], do_not_specialize_on_alignment=_OF_ROWS)
def statistics_kernel(
    logits, logits_stride, bias, has_bias, vocab, first_row, targets, order, row_start, per_row,
    logprobs, maxima, log_sums, entropies, best,
    logit_scale, inverse_temperature, softcap,
    SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics of one row, and the log-probabilities of its targets."""
    local = tl.program_id(0).to(tl.int64)  # int64: 14,123 rows of 152,064 logits are more than 2^31
    row_logits = logits + local * logits_stride
    row = first_row + local
    maximum, log_sum, entropy, index = _sweep(
        row_logits, bias, has_bias, vocab, logit_scale, inverse_temperature, softcap, SOFTCAP, ARGMAX, BLOCK_V
    )
    tl.store(maxima + row, maximum)
    tl.store(log_sums + row, log_sum)
    tl.store(entropies + row, entropy)
    if ARGMAX:
        tl.store(best + row, index.to(tl.int64))
    start, stop = _segment(row_start, row, per_row)
    for first in range(start, stop, BLOCK_A):
        places = first + tl.arange(0, BLOCK_A)
        inside = places < stop
        action = _action(order, places, inside, per_row)
        logprob = _target_logprob(
            row_logits, bias, has_bias, targets, action, inside, vocab, maximum, log_sum, logit_scale, inverse_temperature,
            softcap, SOFTCAP,
        )  # fmt: skip
        tl.store(logprobs + action, logprob, mask=inside)


@triton.jit(do_not_specialize=["has_bias", "first_row", "per_row"], do_not_specialize_on_alignment=_OF_ROWS)
def gradient_kernel(
    logits, logits_stride, grad, grad_stride, bias, has_bias, vocab, first_row, targets, order, row_start, per_row,
    logprobs, maxima, log_sums, entropies, grad_logprobs, grad_entropies,
    logit_scale, inverse_temperature, softcap,
    SOFTCAP: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of one row of logits from those of its actions; `grad` may be `logits` itself."""
    local = tl.program_id(0).to(tl.int64)
    row_logits = logits + local * logits_stride
    row_grad = grad + local * grad_stride
    row = first_row + local
    maximum = tl.load(maxima + row)
    log_sum = tl.load(log_sums + row)
    entropy = tl.load(entropies + row)
    start, stop = _segment(row_start, row, per_row)
    grad_logprob = 0.0
    grad_entropy = 0.0
    for first in range(start, stop, BLOCK_A):
        places = first + tl.arange(0, BLOCK_A)
        inside = places < stop
        action = _action(order, places, inside, per_row)
        grad_logprob += tl.sum(tl.load(grad_logprobs + action, mask=inside, other=0.0), 0)
        grad_entropy += tl.sum(tl.load(grad_entropies + action, mask=inside, other=0.0), 0)
    factor = logit_scale * inverse_temperature
    _write_gradient(
        row_logits, row_grad, bias, has_bias, vocab, maximum, log_sum, entropy, grad_logprob, grad_entropy, logit_scale,
        inverse_temperature, softcap, factor, SOFTCAP, NARROW, BLOCK_V,
    )  # fmt: skip
    tl.debug_barrier()  # entries at the targets are written again, by other threads
    _write_targets(
        row_grad, targets, order, logprobs, grad_logprobs, start, stop, per_row, vocab, maximum, log_sum, entropy,
        grad_logprob, grad_entropy, inverse_temperature, softcap, factor, SOFTCAP,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["has_bias", "first_row", "per_row", "kl_kind", "want_grad", "metrics_stride"],
    do_not_specialize_on_alignment=_OF_ROWS,
)
def ppo_kernel(
    logits, logits_stride, grad, grad_stride, bias, has_bias, vocab, first_row, targets, order, row_start, per_row,
    old_logprobs, advantages, mask, ref_logprobs, normaliser,
    logprobs, entropies, grad_logprobs, metrics, metrics_stride,
    logit_scale, inverse_temperature, softcap, clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_kind, want_grad,
    SOFTCAP: tl.constexpr, NARROW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics, PPO's loss and the gradient of one row of logits; `grad` may be `logits` itself.

    The gradient is of (sum of the actions' losses) * normaliser; the sums in `metrics` are without it.
    """
    local = tl.program_id(0).to(tl.int64)
    row_logits = logits + local * logits_stride
    row = first_row + local
    maximum, log_sum, entropy, _ = _sweep(
        row_logits, bias, has_bias, vocab, logit_scale, inverse_temperature, softcap, SOFTCAP, False, BLOCK_V
    )
    scale = tl.load(normaliser)
    start, stop = _segment(row_start, row, per_row)
    grad_logprob = 0.0
    loss_sum = 0.0
    count = 0.0
    ratio_sum = 0.0
    ratio_max = 0.0
    clip_sum = 0.0
    approx_kl_sum = 0.0
    policy_sum = 0.0
    kl_sum = 0.0
    for first in range(start, stop, BLOCK_A):
        places = first + tl.arange(0, BLOCK_A)
        inside = places < stop
        action = _action(order, places, inside, per_row)
        logprob = _target_logprob(
            row_logits, bias, has_bias, targets, action, inside, vocab, maximum, log_sum, logit_scale, inverse_temperature,
            softcap, SOFTCAP,
        )  # fmt: skip
        tl.store(logprobs + action, logprob, mask=inside)
        tl.store(entropies + action, tl.zeros([BLOCK_A], tl.float32) + entropy, mask=inside)

        # Not a product with the mask: what is masked out may be NaN, and is not even read.
        counted = inside & (tl.load(mask + action, mask=inside, other=0) != 0)
        new = tl.where(counted, logprob, 0.0)
        old = tl.load(old_logprobs + action, mask=counted, other=0.0).to(tl.float32)
        advantage = tl.load(advantages + action, mask=counted, other=0.0).to(tl.float32)
        d = new - old
        log_ratio = clamp(d, -LIMIT, LIMIT)
        ratio = exp(log_ratio)
        unclipped = -advantage * ratio
        clipped = -advantage * clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
        was_clipped = clipped > unclipped
        surrogate = tl.where(was_clipped, clipped, unclipped)
        bound = -advantage * dual_clip  # dual_clip is inf for none
        was_bounded = (advantage < 0) & (surrogate > bound)
        surrogate = tl.where(was_bounded, bound, surrogate)
        was_clipped = was_clipped | was_bounded
        grad_action = tl.where(was_clipped, 0.0, tl.where(tl.abs(d) <= LIMIT, unclipped, 0.0))
        per_token = surrogate - entropy_coef * tl.where(counted, entropy, 0.0)
        if kl_kind != 0:
            reference = tl.load(ref_logprobs + action, mask=counted, other=0.0).to(tl.float32)
            kl, kl_slope = kl_terms(new - reference, kl_kind)
            kl_sum += tl.sum(tl.where(counted, kl, 0.0), 0)
            if kl_coef != 0:
                per_token += kl_coef * kl
                grad_action += kl_coef * kl_slope
        grad_action = tl.where(counted, grad_action, 0.0) * scale
        tl.store(grad_logprobs + action, grad_action, mask=inside)
        grad_logprob += tl.sum(grad_action, 0)
        loss_sum += tl.sum(tl.where(counted, per_token, 0.0), 0)
        count += tl.sum(counted.to(tl.float32), 0)
        ratio_sum += tl.sum(tl.where(counted, ratio, 0.0), 0)
        ratio_max = tl.maximum(ratio_max, tl.max(tl.where(counted, ratio, 0.0), 0))
        clip_sum += tl.sum((counted & was_clipped).to(tl.float32), 0)
        approx_kl_sum += tl.sum(tl.where(counted, expm1_minus(log_ratio), 0.0), 0)
        policy_sum += tl.sum(tl.where(counted, surrogate, 0.0), 0)
    sums = metrics + row * metrics_stride
    tl.store(sums + 0, loss_sum)
    tl.store(sums + 1, count)
    tl.store(sums + 2, ratio_sum)
    tl.store(sums + 3, ratio_max)
    tl.store(sums + 4, clip_sum)
    tl.store(sums + 5, approx_kl_sum)
    tl.store(sums + 6, policy_sum)
    tl.store(sums + 7, tl.where(count > 0, count * entropy, 0.0))
    tl.store(sums + 8, kl_sum)
    if want_grad:
        grad_entropy = -entropy_coef * count * scale
        factor = logit_scale * inverse_temperature
        row_grad = grad + local * grad_stride
        tl.debug_barrier()  # `grad` may lie over the logits: all targets are read before anything is written
        _write_gradient(
            row_logits, row_grad, bias, has_bias, vocab, maximum, log_sum, entropy, grad_logprob, grad_entropy, logit_scale,
            inverse_temperature, softcap, factor, SOFTCAP, NARROW, BLOCK_V,
        )  # fmt: skip
        tl.debug_barrier()  # entries at the targets are written again, and what other threads stored of the actions read
        _write_targets(
            row_grad, targets, order, logprobs, grad_logprobs, start, stop, per_row, vocab, maximum, log_sum, entropy,
            grad_logprob, grad_entropy, inverse_temperature, softcap, factor, SOFTCAP,
        )  # fmt: skip


def _size(dtype: torch.dtype, softcap: bool) -> tuple[int, int]:
    """(BLOCK_V, warps): 8 KiB of logits, or 4 of narrow ones where a cap needs registers, too; with more, kernels spilled."""
    return 2048 if dtype == torch.float32 or softcap else 4096, 8


def _inverse(temperature: float) -> float:
    return min(1.0 / temperature, 3e38)  # finite in float32


def _read(logits_CV: Tensor, bias_V: Tensor | None, first_row: int, actions: Actions, unread: Tensor) -> tuple[Any, ...]:
    """The kernels' arguments from `bias` to `per_row`. A pointer that is not read is one of the same type: no other kernel."""
    targets_A, order_A, row_start_R1 = actions.targets_A, actions.order_A, actions.row_start_R1
    return (
        unread if bias_V is None else bias_V, int(bias_V is not None), logits_CV.shape[1], first_row, targets_A,
        targets_A if order_A is None else order_A, targets_A if row_start_R1 is None else row_start_R1,
        actions.per_row if order_A is None else 0,
    )  # fmt: skip


def _numbers(transform: Transform) -> tuple[float, float, float]:
    return transform.logit_scale, _inverse(transform.temperature), transform.softcap or 1.0


def statistics(
    logits_CV: Tensor,
    bias_V: Tensor | None,
    first_row: int,
    actions: Actions,
    transform: Transform,
    out: Statistics,
    argmax_R: Tensor | None,
) -> None:
    """`_rows.statistics`, and leaves the logits as they are."""
    block, warps = _size(logits_CV.dtype, transform.softcap is not None)
    with torch.cuda.device_of(logits_CV):
        statistics_kernel[(len(logits_CV),)](
            logits_CV, logits_CV.stride(0), *_read(logits_CV, bias_V, first_row, actions, out.log_sum_R), *out,
            actions.targets_A if argmax_R is None else argmax_R, *_numbers(transform),
            SOFTCAP=transform.softcap is not None, ARGMAX=argmax_R is not None, BLOCK_V=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


def gradient(
    logits_CV: Tensor,
    grad_CV: Tensor,
    bias_V: Tensor | None,
    first_row: int,
    actions: Actions,
    transform: Transform,
    of: Statistics,
    grad_logprob_A: Tensor,
    grad_entropy_A: Tensor,
) -> None:
    """`_rows.gradient`; `grad_CV` is the logits, a narrower view of their memory, or another tensor."""
    block, warps = _size(logits_CV.dtype, transform.softcap is not None)
    with torch.cuda.device_of(logits_CV):
        gradient_kernel[(len(logits_CV),)](
            logits_CV, logits_CV.stride(0), grad_CV, grad_CV.stride(0),
            *_read(logits_CV, bias_V, first_row, actions, of.log_sum_R), *of, grad_logprob_A, grad_entropy_A,
            *_numbers(transform),
            SOFTCAP=transform.softcap is not None, NARROW=logits_CV.dtype != grad_CV.dtype, BLOCK_V=block, num_warps=warps,
            num_stages=1,
        )  # fmt: skip


def ppo(
    logits_CV: Tensor,
    grad_CV: Tensor | None,
    bias_V: Tensor | None,
    first_row: int,
    actions: Actions,
    transform: Transform,
    constants: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor],
    settings: Sequence[float],
    kl_kind: int,
    of_actions: Sequence[Tensor],
    metrics_RM: Tensor,
) -> None:
    """The PPO loss of rows first_row, ... and, where `grad_CV` is given (as in `gradient`), the gradient of their logits.

    constants: old log-probs, advantages, mask and reference log-probs of the actions, and the normaliser. settings: as in
    `_head_ops.linear_ppo_loss`. Filled: of_actions (log-prob, entropy and what the loss's gradient is in the log-prob) and the
    sums of each row.
    """
    block, warps = _size(logits_CV.dtype, transform.softcap is not None)
    old_logprob_A, advantages_A, mask_A, ref_logprob_A, normaliser = constants
    grad = logits_CV if grad_CV is None else grad_CV
    with torch.cuda.device_of(logits_CV):
        ppo_kernel[(len(logits_CV),)](
            logits_CV, logits_CV.stride(0), grad, grad.stride(0),
            *_read(logits_CV, bias_V, first_row, actions, old_logprob_A), old_logprob_A, advantages_A, mask_A,
            old_logprob_A if ref_logprob_A is None else ref_logprob_A, normaliser,
            *of_actions, metrics_RM, metrics_RM.stride(0), *_numbers(transform), *settings,
            0 if ref_logprob_A is None else kl_kind, int(grad_CV is not None),
            SOFTCAP=transform.softcap is not None, NARROW=logits_CV.dtype != grad.dtype, BLOCK_V=block, num_warps=warps,
            num_stages=1,
        )  # fmt: skip


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INDICES = ("targets", "order", "row_start", "best")


def configurations() -> Iterator[Configuration]:
    """What the launchers above can choose, for vocabularies (and rows) that are multiples of 16 and ones that are not."""
    in_place = [(logits, logits) for logits in _NAMES]
    narrow = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    kernels = ((statistics_kernel, in_place), (gradient_kernel, in_place + narrow), (ppo_kernel, in_place + narrow))
    for kernel, dtypes in kernels:
        switches = [name for name in ("SOFTCAP", "ARGMAX") if name in kernel.arg_names]
        settings = product((False, True), repeat=len(switches))
        for (logits, grad), aligned, on in product(dtypes, (True, False), settings):
            constants: dict[str, Any] = dict(zip(switches, on, strict=True))
            constants["BLOCK_V"], warps = _size(logits, constants["SOFTCAP"])
            if "NARROW" in kernel.arg_names:
                constants["NARROW"] = logits != grad
            types = {"logits": "*" + _NAMES[logits], "grad": "*" + _NAMES[grad], "mask": "*u8"}
            types |= {name: "*i64" for name in _INDICES}
            types |= {name: "i32" for name in _RUN_TIME_INTEGERS} | {name: "fp32" for name in _RUN_TIME_FLOATS}
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            whole = ("logits", "logits_stride", "grad", "grad_stride", "vocab") if aligned else ()
            divisible = tuple(name for name in whole if name in signature)
            features = "+".join(name.lower() for name in switches if constants[name]) or "plain"
            name = f"{kernel.__name__} {_NAMES[logits]}->{_NAMES[grad]} {features}" + ("" if aligned else " unaligned")
            yield Configuration(name, kernel, signature, constants, warps, 1, divisible)


_RUN_TIME_INTEGERS = (
    "logits_stride", "grad_stride", "has_bias", "vocab", "first_row", "per_row", "metrics_stride", "kl_kind", "want_grad"
)  # fmt: skip
_RUN_TIME_FLOATS = (
    "logit_scale", "inverse_temperature", "softcap", "clip_low", "clip_high", "dual_clip", "entropy_coef", "kl_coef"
)  # fmt: skip
