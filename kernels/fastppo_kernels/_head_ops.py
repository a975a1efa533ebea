"""The head ops as torch operators that launch Triton kernels: opaque to torch.compile, no host synchronisation.

One operator a direction. Arguments are checked by the public functions; `softcap` and the like are None for none.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _triton_head as kernels

# Rows of the head whose weight gradient is made at a time: bounds the float32 product before it is added.
_WEIGHT_ROWS = 16384


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, accumulated in float32 and given in `dtype`: that of the factors, or float32, then without rounding."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == dtype:
            return a @ b
        return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def by_row(rows_A: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """(order_A, row_start_R1): actions sorted by row, stable, and where each row's begin; (None, None) for one a row."""
    if rows_A is None:
        return None, None
    sorted_A, order_A = rows_A.sort(stable=True)
    return order_A, torch.searchsorted(sorted_A, torch.arange(rows + 1, device=rows_A.device))


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))


def _bias_of(bias_V: Tensor | None, weight_VH: Tensor) -> Tensor | None:
    return None if bias_V is None else bias_V.to(weight_VH.dtype).float()


class _HeadGradient:
    """Gradients of hidden state, weight and bias, added up from the gradients of chunks of logits; empty if not wanted."""

    def __init__(self, hidden_RH: Tensor, weight_VH: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        self.hidden_RH, self.weight_VH = hidden_RH, weight_VH
        self.needs = need_hidden, need_weight, need_bias
        self.grad_hidden_RH = hidden_RH.new_empty(hidden_RH.shape if need_hidden else (0, 0))
        # Sums over chunks stay in float32: added up in bfloat16 they would lose the later chunks.
        self.grad_weight_VH = _float32(weight_VH, *(weight_VH.shape if need_weight else (0, 0))).zero_()
        self.grad_bias_V = _float32(weight_VH, len(weight_VH) if need_bias else 0).zero_()

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        need_hidden, need_weight, need_bias = self.needs
        if need_hidden:
            dtype = torch.float32 if self.hidden_RH.dtype == torch.float32 else grad_CV.dtype
            self.grad_hidden_RH[chunk] = _product(grad_CV, self.weight_VH, dtype)
        if need_weight:
            hidden_CH = self.hidden_RH[chunk].to(grad_CV.dtype)
            for part in _chunks(len(self.weight_VH), _WEIGHT_ROWS):
                self.grad_weight_VH[part] += _product(grad_CV[:, part].t(), hidden_CH, torch.float32)
        if need_bias:
            self.grad_bias_V += grad_CV.sum(0, dtype=torch.float32)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.grad_hidden_RH, self.grad_weight_VH, self.grad_bias_V


@torch.library.custom_op("fastppo_kernels::token_logprob", mutates_args=())
def token_logprob(
    logits_RV: Tensor, targets_R: Tensor, temperature: float, softcap: float | None, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, maximum, log S), each [R]. `inplace` is for the backward alone."""
    outputs = tuple(_float32(logits_RV, len(logits_RV)) for _ in range(4))
    logprob_R, entropy_R, maximum_R, log_sum_R = outputs
    if len(logits_RV):
        kernels.statistics(
            logits_RV, None, targets_R, None, None, 0, logprob_R, maximum_R, log_sum_R, entropy_R, None, 1.0, temperature,
            softcap,
        )  # fmt: skip
    return logprob_R, entropy_R, maximum_R, log_sum_R


@token_logprob.register_fake
def _(logits_RV: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(logits_RV.new_empty(logits_RV.shape[0], dtype=torch.float32) for _ in range(4))


def _token_logprob_gradient(
    logits_RV: Tensor,
    grad_RV: Tensor,
    targets_R: Tensor,
    statistics: list[Tensor],
    grad_logprob_R: Tensor,
    grad_entropy_R: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    logprob_R, entropy_R, maximum_R, log_sum_R = statistics
    if len(logits_RV):
        kernels.gradient(
            logits_RV, grad_RV, None, targets_R, None, None, 0, logprob_R, maximum_R, log_sum_R, entropy_R,
            grad_logprob_R.contiguous(), grad_entropy_R.contiguous(), 1.0, temperature, softcap,
        )  # fmt: skip


@torch.library.custom_op("fastppo_kernels::token_logprob_backward", mutates_args=())
def token_logprob_backward(
    logits_RV: Tensor,
    targets_R: Tensor,
    statistics: list[Tensor],
    grad_logprob_R: Tensor,
    grad_entropy_R: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    grad_RV = logits_RV.new_empty(logits_RV.shape)
    _token_logprob_gradient(logits_RV, grad_RV, targets_R, statistics, grad_logprob_R, grad_entropy_R, temperature, softcap)
    return grad_RV


@token_logprob_backward.register_fake
def _(logits_RV: Tensor, *_: Any) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_RV, targets_R, ctx.temperature, ctx.softcap, ctx.inplace = inputs
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(logits_RV, targets_R, *output)


def _token_backward(ctx: Any, grad_logprob_R: Tensor, grad_entropy_R: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits_RV, targets_R, *statistics = ctx.saved_tensors
    settings = (targets_R, statistics, grad_logprob_R, grad_entropy_R, ctx.temperature, ctx.softcap)
    # A compiled graph may not write to what it was given; its memory planner reuses the logits' memory by itself.
    if ctx.inplace and not torch.compiler.is_compiling():
        place_RV = logits_RV.detach()
        _token_logprob_gradient(place_RV, place_RV, *settings)
        torch.autograd.graph.increment_version(logits_RV)  # a second backward raises instead of giving nonsense
        return place_RV, None, None, None, None
    return token_logprob_backward(logits_RV, *settings), None, None, None, None


token_logprob.register_autograd(_token_backward, setup_context=_token_setup)


@torch.library.custom_op("fastppo_kernels::linear_logprob", mutates_args=())
def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_A: Tensor,
    rows_A: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    want_argmax: bool,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob_A, entropy_A, argmax_R, maximum_R, log S_R, entropy_R)."""
    rows = len(hidden_RH)
    logprob_A = _float32(hidden_RH, len(targets_A))
    maximum_R, log_sum_R, entropy_R = (_float32(hidden_RH, rows) for _ in range(3))
    argmax_R = targets_A.new_empty(rows if want_argmax else 0)
    bias, (order_A, row_start_R1) = _bias_of(bias_V, weight_VH), by_row(rows_A, rows)
    for chunk in _chunks(rows, chunk_rows):
        logits_CV = _product(hidden_RH[chunk].to(weight_VH.dtype), weight_VH.t(), logits_dtype)
        kernels.statistics(
            logits_CV, bias, targets_A, order_A, row_start_R1, chunk.start, logprob_A, maximum_R, log_sum_R, entropy_R,
            argmax_R if want_argmax else None, logit_scale, temperature, softcap,
        )  # fmt: skip
        del logits_CV  # before the next chunk is made
    entropy_A = entropy_R.clone() if rows_A is None else entropy_R[rows_A]
    return logprob_A, entropy_A, argmax_R, maximum_R, log_sum_R, entropy_R


@linear_logprob.register_fake
def _(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_A: Tensor, rows_A: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    rows, actions, want_argmax = hidden_RH.shape[0], targets_A.shape[0], others[4]
    of_actions = (hidden_RH.new_empty(actions, dtype=torch.float32) for _ in range(2))
    of_rows = (hidden_RH.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return *of_actions, targets_A.new_empty(rows if want_argmax else 0), *of_rows


@torch.library.custom_op("fastppo_kernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_A: Tensor,
    rows_A: Tensor | None,
    logprob_A: Tensor,
    statistics: list[Tensor],
    grad_logprob_A: Tensor,
    grad_entropy_A: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    logits_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden state (its dtype), weight and bias (both float32), empty where not needed."""
    maximum_R, log_sum_R, entropy_R = statistics
    gradient = _HeadGradient(hidden_RH, weight_VH, *needs)
    bias, (order_A, row_start_R1) = _bias_of(bias_V, weight_VH), by_row(rows_A, len(hidden_RH))
    grad_logprob_A, grad_entropy_A = grad_logprob_A.contiguous(), grad_entropy_A.contiguous()
    for chunk in _chunks(len(hidden_RH), chunk_rows):
        logits_CV = _product(hidden_RH[chunk].to(weight_VH.dtype), weight_VH.t(), logits_dtype)
        grad_CV = kernels.gradient_place(logits_CV, weight_VH.dtype)
        kernels.gradient(
            logits_CV, grad_CV, bias, targets_A, order_A, row_start_R1, chunk.start, logprob_A, maximum_R, log_sum_R, entropy_R,
            grad_logprob_A, grad_entropy_A, logit_scale, temperature, softcap,
        )  # fmt: skip
        gradient.add(chunk, grad_CV)
        del logits_CV, grad_CV
    return gradient.all()


@linear_logprob_backward.register_fake
def _(hidden_RH: Tensor, weight_VH: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden_RH, weight_VH, *others[-1])


def _fake_gradients(
    hidden_RH: Tensor, weight_VH: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden_RH.new_empty(hidden_RH.shape if need_hidden else (0, 0)),
        weight_VH.new_empty(weight_VH.shape if need_weight else (0, 0), dtype=torch.float32),
        weight_VH.new_empty(weight_VH.shape[0] if need_bias else 0, dtype=torch.float32),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_RH, weight_VH, bias_V, targets_A, rows_A = inputs[:5]
    ctx.temperature, ctx.softcap, ctx.logit_scale, ctx.chunk_rows, _, ctx.logits_dtype = inputs[5:]
    logprob_A, _, argmax_R, *statistics = output
    ctx.mark_non_differentiable(argmax_R, *statistics)
    ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_A, rows_A, logprob_A, *statistics)


def _linear_backward(ctx: Any, grad_logprob_A: Tensor, grad_entropy_A: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden_RH, weight_VH, bias_V, targets_A, rows_A, logprob_A, *statistics = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grad_hidden_RH, grad_weight_VH, grad_bias_V = linear_logprob_backward(
        hidden_RH, weight_VH, bias_V, targets_A, rows_A, logprob_A, statistics, grad_logprob_A, grad_entropy_A,
        ctx.temperature, ctx.softcap, ctx.logit_scale, ctx.chunk_rows, ctx.logits_dtype, needs,
    )  # fmt: skip
    return (
        grad_hidden_RH if needs[0] else None,
        grad_weight_VH.to(weight_VH.dtype) if needs[1] else None,
        grad_bias_V.to(bias_V.dtype) if needs[2] else None,
        *(None,) * 8,
    )


linear_logprob.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("fastppo_kernels::linear_ppo_loss", mutates_args=())
def linear_ppo_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_A: Tensor,
    rows_A: Tensor | None,
    old_logprob_A: Tensor,
    advantages_A: Tensor,
    mask_A: Tensor,
    ref_logprob_A: Tensor | None,
    denominator: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_kind: int,
    chunk_rows: int,
    logits_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, logprob_A, entropy_A, gradients of hidden, weight and bias, what these are to be multiplied by)."""
    rows = len(hidden_RH)
    logprob_A, entropy_A, grad_logprob_A = (_float32(hidden_RH, len(targets_A)) for _ in range(3))
    metrics_RM = _float32(hidden_RH, rows, kernels.COLUMNS)
    gradient = _HeadGradient(hidden_RH, weight_VH, *needs)
    bias, (order_A, row_start_R1) = _bias_of(bias_V, weight_VH), by_row(rows_A, rows)
    inverse = denominator.reciprocal()
    # Divided by thousands of tokens, most of a row's gradient would be below what float16 can hold: that comes afterwards.
    late = weight_VH.dtype == torch.float16
    inside, after = (torch.ones_like(inverse), inverse) if late else (inverse, torch.ones_like(inverse))
    for chunk in _chunks(rows, chunk_rows):
        logits_CV = _product(hidden_RH[chunk].to(weight_VH.dtype), weight_VH.t(), logits_dtype)
        grad_CV = kernels.gradient_place(logits_CV, weight_VH.dtype)
        kernels.ppo(
            logits_CV, grad_CV if any(needs) else None, bias, targets_A, order_A, row_start_R1, chunk.start,
            old_logprob_A, advantages_A, mask_A, ref_logprob_A, inside, logprob_A, entropy_A, grad_logprob_A, metrics_RM,
            logit_scale, temperature, softcap, clip_low, clip_high, math.inf if dual_clip is None else dual_clip,
            entropy_coef, kl_coef, kl_kind,
        )  # fmt: skip
        gradient.add(chunk, grad_CV)
        del logits_CV, grad_CV
    metrics_M = metrics_RM.sum(0, dtype=torch.float64)
    largest = kernels.METRICS.index("ratio_max") + 1
    metrics_M[largest] = metrics_RM[:, largest].max() if rows else 0
    loss = (metrics_M[0] / denominator).float()
    return loss, metrics_M[1:].clone(), logprob_A, entropy_A, *gradient.all(), after


@linear_ppo_loss.register_fake
def _(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_A: Tensor, rows_A: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden_RH.new_empty(shape, dtype=dtype)

    of_actions = (new(targets_A.shape[0]) for _ in range(2))
    gradients = _fake_gradients(hidden_RH, weight_VH, *others[-1])
    return new(), new(len(kernels.METRICS), dtype=torch.float64), *of_actions, *gradients, new()


def _ppo_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.save_for_backward(*output[-4:])


def _ppo_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *gradients, after = ctx.saved_tensors
    scale = (grad_loss * after).view(1)  # one dimension: of none it would be rounded to the gradient's dtype first
    scaled: list[Tensor | None] = [None] * 22
    for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i]:
            scaled[i] = torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    return tuple(scaled)


linear_ppo_loss.register_autograd(_ppo_backward, setup_context=_ppo_setup)
