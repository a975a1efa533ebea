"""The LM head and the log-probabilities after it, without ever holding more than one chunk of logits."""

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import (
    accumulate_dtype,
    check_device,
    check_float,
    check_index,
    check_integer,
    check_number,
    check_range,
    check_shape,
)
from ._dispatch import Backend, use_triton
from ._rows import add_at_, normalise_, shift_, softcap_slope, spread_gradient_


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))


def _head(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, logit_scale: float, logits_dtype: torch.dtype
) -> Tensor:
    """logit_scale * (hidden weight^T + bias): the product in `logits_dtype`, the result in float32 (or float64)."""
    with torch.autocast(hidden_CH.device.type, enabled=False):
        hidden_CH = hidden_CH.to(weight_VH.dtype)
        bias = None if bias_V is None else bias_V.to(weight_VH.dtype)
        if logits_dtype == weight_VH.dtype:
            logits_CV = F.linear(hidden_CH, weight_VH, bias).to(accumulate_dtype(weight_VH.dtype))
        elif hidden_CH.is_cuda:  # float32 sums of the product, as the GEMM has them, not rounded to the weight's dtype
            logits_CV = torch.mm(hidden_CH, weight_VH.t(), out_dtype=logits_dtype)
            logits_CV = logits_CV if bias is None else logits_CV.add_(bias)
        else:
            logits_CV = F.linear(
                hidden_CH.to(logits_dtype), weight_VH.to(logits_dtype), None if bias is None else bias.to(logits_dtype)
            )
    return logits_CV if logit_scale == 1.0 else logits_CV.mul_(logit_scale)


def _actions_of(chunk: slice, rows_A: Tensor | None, targets_A: Tensor) -> tuple[slice, Tensor, Tensor | None]:
    """Actions that may belong to a chunk of rows: (which actions, their row in the chunk, which really belong).

    With `rows_A` all actions are looked at in every chunk, those outside masked: picking them out would need their
    number on the host.
    """
    if rows_A is None:
        return chunk, torch.arange(chunk.stop - chunk.start, device=targets_A.device), None
    inside_A = (rows_A >= chunk.start) & (rows_A < chunk.stop)
    return slice(None), (rows_A - chunk.start).clamp(0, chunk.stop - chunk.start - 1), inside_A


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocab, device = len(hidden_RH), len(weight_VH), hidden_RH.device
        dtype = accumulate_dtype(weight_VH.dtype)
        logprob_A = torch.full((len(targets_A),), torch.nan, dtype=dtype, device=device)
        entropy_R, log_sum_R = (torch.empty(rows, dtype=dtype, device=device) for _ in range(2))
        argmax_R = torch.empty(rows if want_argmax else 0, dtype=torch.int64, device=device)
        for chunk in _chunks(rows, chunk_rows):
            z_CV = _head(hidden_RH[chunk], weight_VH, bias_V, logit_scale, logits_dtype)
            z_CV = shift_(z_CV, 1.0, softcap)
            if want_argmax:  # before the temperature: dividing could round two logits to the same value
                argmax_R[chunk] = z_CV.argmax(-1)
            z_CV.div_(temperature)
            actions, row_A, inside_A = _actions_of(chunk, rows_A, targets_A)
            z_target_A = z_CV.view(-1)[row_A * vocab + targets_A[actions]]
            log_sum_R[chunk], entropy_R[chunk] = normalise_(z_CV)
            found_A = z_target_A - log_sum_R[chunk][row_A]
            logprob_A[actions] = found_A if inside_A is None else torch.where(inside_A, found_A, logprob_A)
        entropy_A = entropy_R if rows_A is None else entropy_R[rows_A]
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_A, rows_A, log_sum_R, entropy_R)
        ctx.temperature, ctx.softcap, ctx.logit_scale, ctx.chunk_rows = temperature, softcap, logit_scale, chunk_rows
        ctx.logits_dtype = logits_dtype
        ctx.mark_non_differentiable(argmax_R)
        return logprob_A, entropy_A, argmax_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_A: Tensor, grad_entropy_A: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, bias_V, targets_A, rows_A, log_sum_R, entropy_R = ctx.saved_tensors
        vocab, dtype = len(weight_VH), log_sum_R.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden_RH = torch.empty_like(hidden_RH) if need_hidden else None
        # Sums over chunks stay in float32: added up in bfloat16 they would lose the later chunks.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if need_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if need_bias else None
        if rows_A is None:
            grad_logprob_R, grad_entropy_R = grad_logprob_A, grad_entropy_A
        else:
            grad_logprob_R = add_at_(torch.zeros_like(log_sum_R), rows_A, grad_logprob_A)
            grad_entropy_R = add_at_(torch.zeros_like(log_sum_R), rows_A, grad_entropy_A)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for chunk in _chunks(len(hidden_RH), ctx.chunk_rows):
                logits_CV = _head(hidden_RH[chunk], weight_VH, bias_V, ctx.logit_scale, ctx.logits_dtype)
                slope_CV = None if ctx.softcap is None else softcap_slope(logits_CV, ctx.softcap)
                z_CV = shift_(logits_CV, 1.0, ctx.softcap).div_(ctx.temperature)
                grad_CV = spread_gradient_(
                    z_CV, log_sum_R[chunk], entropy_R[chunk], grad_logprob_R[chunk], grad_entropy_R[chunk]
                )
                actions, row_A, inside_A = _actions_of(chunk, rows_A, targets_A)
                at_target_A = grad_logprob_A[actions]
                if inside_A is not None:
                    at_target_A = at_target_A.masked_fill(~inside_A, 0.0)
                add_at_(grad_CV.view(-1), row_A * vocab + targets_A[actions], at_target_A)
                if slope_CV is not None:
                    grad_CV.mul_(slope_CV)
                grad_CV.mul_(ctx.logit_scale / ctx.temperature)
                if grad_hidden_RH is not None:
                    grad_hidden_RH[chunk] = grad_CV.to(weight_VH.dtype) @ weight_VH
                if grad_weight_VH is not None:
                    grad_weight_VH.addmm_(grad_CV.t(), hidden_RH[chunk].to(dtype))
                if grad_bias_V is not None:
                    grad_bias_V.add_(grad_CV.sum(0))
        return (
            grad_hidden_RH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None,) * 8,
        )


def check_head(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    rows_A: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    logits_dtype: torch.dtype | None,
) -> torch.dtype:
    """Raise unless these are arguments for a head; the dtype of its logits."""
    check_float("hidden", hidden_RH)
    check_float("weight", weight_VH)
    check_index("targets", targets_A)
    if hidden_RH.dim() != 2:
        raise ValueError(f"hidden must have shape [R, H], got {list(hidden_RH.shape)}")
    rows, width = hidden_RH.shape
    if weight_VH.dim() != 2 or weight_VH.shape[1] != width or weight_VH.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [V, {width}], V >= 1 (H is that of hidden), got {list(weight_VH.shape)}"
        )
    vocab = weight_VH.shape[0]
    if (hidden_RH.dtype == torch.float64) != (weight_VH.dtype == torch.float64):
        came = f"{hidden_RH.dtype} and {weight_VH.dtype}"
        raise ValueError(f"hidden and weight must both be float64 or neither, got {came}")
    check_device("weight", weight_VH, "hidden", hidden_RH)
    check_device("targets", targets_A, "hidden", hidden_RH)
    if rows_A is None:
        check_shape("targets", targets_A, (rows,), "one for each row of hidden, as rows_A is None")
    else:
        check_index("rows_A", rows_A)
        if targets_A.dim() != 1:
            raise ValueError(f"targets must have shape [A], got {list(targets_A.shape)}")
        check_shape("rows_A", rows_A, tuple(targets_A.shape), "that of targets")
        check_device("rows_A", rows_A, "hidden", hidden_RH)
        check_range("rows_A", rows_A, rows, "the rows of hidden")
    check_range("targets", targets_A, vocab, "the rows of weight")
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (vocab,), "one for each row of weight")
        check_device("bias", bias, "hidden", hidden_RH)
    check_number("temperature", temperature, above=0)
    check_number("logit_scale", logit_scale, above=0)
    check_integer("chunk_rows", chunk_rows, at_least=1)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if logits_dtype not in (None, weight_VH.dtype, accumulate_dtype(weight_VH.dtype)):
        raise ValueError(f"logits_dtype must be None, float32 or the weight's {weight_VH.dtype}, got {logits_dtype}")
    return logits_dtype or weight_VH.dtype


@overload
def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    *,
    rows_A: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int = 1024,
    logits_dtype: torch.dtype | None = None,
    argmax: Literal[False] = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    *,
    rows_A: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int = 1024,
    logits_dtype: torch.dtype | None = None,
    argmax: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    *,
    rows_A: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int = 1024,
    logits_dtype: torch.dtype | None = None,
    argmax: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """Log-probability of tokens, and the entropy of their rows, from hidden states and the LM head:

        softmax(cap(logit_scale (hidden weight^T + bias)) / temperature)

    One chunk of rows at a time goes through the head; at most one chunk of logits (and temporaries of that size) is
    alive, in forward and in backward, which computes the logits again. The forward is the same with and without
    gradients, to the bit.

    Args:
        hidden_RH: [R, H], float32, bfloat16, float16 or float64; any strides.
        weight_VH: [V, H]. The product is computed in this dtype (as the model's own head would), then cast to float32;
            a hidden state of another dtype is cast to it first. float64 only together with a float64 hidden state.
        targets_A: [A] int64 or int32 token ids in [0, V) (checked on the CPU only).
        rows_A: [A] int64 or int32, the row of `hidden_RH` that each target belongs to, in any order; rows may have
            several targets, or none, and the logits of a row are computed once. None: A = R, one target a row.
        bias: [V] or None.
        temperature: > 0. softcap: > 0 or None, cap(x) = softcap * tanh(x / softcap). logit_scale: > 0.
        chunk_rows: rows of logits alive at a time, >= 1.
        logits_dtype: float32 keeps the logits of a bfloat16 or float16 weight as the GEMM sums them up, not rounded to the
            weight's dtype; a CUDA GEMM does that at its usual speed. None: the weight's dtype.
        argmax: also return the best token of each row.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. A float64 head always takes
            the torch form.

    Returns:
        (logprob_A, entropy_A), or (logprob_A, entropy_A, argmax_R) with `argmax`: float32 (float64 for a float64
        weight), in nats; argmax_R [R] int64 of the logits before the temperature, the lowest index of equals. Log-prob
        and entropy are differentiable in the hidden state, the weight and the bias, each gradient computed only if it
        is required. Rows that are not finite behave as in `token_logprob`.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    logits_dtype = check_head(
        hidden_RH, weight_VH, targets_A, rows_A, bias, temperature, softcap, logit_scale, chunk_rows, logits_dtype
    )
    rows_A = None if rows_A is None else rows_A.long()
    if use_triton(hidden_RH, backend) and weight_VH.dtype != torch.float64:
        from . import _head_ops

        cap = None if softcap is None else float(softcap)
        logprob_A, entropy_A, argmax_R, *_ = _head_ops.linear_logprob(
            hidden_RH, weight_VH, bias, targets_A.long().contiguous(), rows_A, float(temperature), cap, float(logit_scale),
            chunk_rows, argmax, logits_dtype,
        )  # fmt: skip
        return (logprob_A, entropy_A, argmax_R) if argmax else (logprob_A, entropy_A)
    logprob_A, entropy_A, argmax_R = _LinearLogprob.apply(
        hidden_RH,
        weight_VH,
        bias,
        targets_A.long(),
        rows_A,
        float(temperature),
        softcap,
        float(logit_scale),
        chunk_rows,
        argmax,
        logits_dtype,
    )
    return (logprob_A, entropy_A, argmax_R) if argmax else (logprob_A, entropy_A)
