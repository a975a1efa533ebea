"""Log-probability of given tokens, and the entropy of the rows, from logits that already exist."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import (
    accumulate_dtype,
    check_device,
    check_float,
    check_index,
    check_number,
    check_range,
    check_shape,
)
from ._dispatch import Backend, use_triton
from ._rows import normalise_, shift_, softcap_slope, spread_gradient_

# Rows worked on at a time: bounds the float32 temporaries when the logits are in half precision.
_CHUNK_ROWS = 1024


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, targets_R: Tensor, temperature: float, softcap: float | None, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(logits_RV.dtype)
        rows = len(logits_RV)
        logprob_R, entropy_R, log_sum_R = (torch.empty(rows, dtype=dtype, device=logits_RV.device) for _ in range(3))
        for start in range(0, rows, _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            z_RV = shift_(logits_RV[chunk].to(dtype, copy=True), temperature, softcap)
            z_target_R = z_RV.gather(1, targets_R[chunk, None]).squeeze(1)
            log_sum_R[chunk], entropy_R[chunk] = normalise_(z_RV)
            logprob_R[chunk] = z_target_R - log_sum_R[chunk]
        ctx.save_for_backward(logits_RV, targets_R, log_sum_R, entropy_R)
        ctx.temperature, ctx.softcap, ctx.inplace = temperature, softcap, inplace
        return logprob_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_R: Tensor, grad_entropy_R: Tensor) -> tuple[Tensor | None, ...]:
        logits_RV, targets_R, log_sum_R, entropy_R = ctx.saved_tensors
        inplace = ctx.inplace and not torch.compiler.is_compiling()
        grad_RV = logits_RV.detach() if inplace else torch.empty_like(logits_RV, memory_format=torch.contiguous_format)
        for start in range(0, len(logits_RV), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            chunk_RV = logits_RV[chunk].to(log_sum_R.dtype, copy=True)
            slope_RV = None if ctx.softcap is None else softcap_slope(chunk_RV, ctx.softcap)
            z_RV = shift_(chunk_RV, ctx.temperature, ctx.softcap)
            dz_RV = spread_gradient_(
                z_RV, log_sum_R[chunk], entropy_R[chunk], grad_logprob_R[chunk], grad_entropy_R[chunk]
            )
            dz_RV.scatter_add_(1, targets_R[chunk, None], grad_logprob_R[chunk, None])
            if slope_RV is not None:
                dz_RV.mul_(slope_RV)
            grad_RV[chunk] = dz_RV.div_(ctx.temperature)
        if inplace:
            torch.autograd.graph.increment_version(logits_RV)  # a second backward raises instead of giving nonsense
        return grad_RV, None, None, None, None


def token_logprob(
    logits_RV: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token a row, and the entropy of the row, under softmax(cap(logits) / temperature).

    cap(x) = softcap * tanh(x / softcap) (Gemma 2), or x where softcap is None.

    Args:
        logits_RV: [..., V], float32, bfloat16, float16 or float64; any strides.
        targets_R: [...], the leading shape of the logits; int64 or int32, in [0, V) (checked on the CPU only).
        temperature: > 0.
        softcap: > 0, or None.
        inplace: let backward overwrite the logits with their gradient, for logits that nobody reads afterwards (the output
            of a linear layer is such). Saves a tensor of their size. Backward can then run once. Under torch.compile it is
            ignored.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 logits always take the
            torch form.

    Returns:
        (logprob, entropy), both [...] float32 (float64 for float64 logits), in nats, both differentiable in the logits.
        The logits are saved for backward and nothing else of size V; backward makes one gradient of the logits' shape
        and dtype. Entries of -inf have probability 0 and add nothing to the entropy. A row with NaN or +inf, or of
        nothing but -inf, gives NaN, as `torch.log_softmax` does; where the loss gives such a row no weight its gradient
        is 0.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    check_float("logits", logits_RV)
    check_index("targets", targets_R)
    if logits_RV.dim() < 1 or logits_RV.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {list(logits_RV.shape)}")
    shape, vocab = logits_RV.shape[:-1], logits_RV.shape[-1]
    check_shape("targets", targets_R, tuple(shape), "that of logits without its last dimension")
    check_device("targets", targets_R, "logits", logits_RV)
    check_range("targets", targets_R, vocab, "the vocabulary of logits")
    check_number("temperature", temperature, above=0)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    flat_RV, flat_targets_R = logits_RV.reshape(-1, vocab), targets_R.reshape(-1).long()
    if use_triton(logits_RV, backend) and logits_RV.dtype != torch.float64:
        from . import _head_ops

        if flat_RV.stride(1) != 1:
            flat_RV = flat_RV.contiguous()
        how = float(temperature), None if softcap is None else float(softcap), inplace
        logprob_R, entropy_R = _head_ops.token_logprob(flat_RV, flat_targets_R.contiguous(), *how)[:2]
    else:
        logprob_R, entropy_R = _TokenLogprob.apply(flat_RV, flat_targets_R, float(temperature), softcap, inplace)
    return logprob_R.view(shape), entropy_R.view(shape)
