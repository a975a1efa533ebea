"""Log-probability of given tokens, and the entropy of the rows, from logits that already exist."""

import torch
from torch import Tensor

from . import _head_ops
from ._checks import check_device, check_float, check_index, check_number, check_range, check_shape
from ._dispatch import Backend, use_triton


def _check(logits: Tensor, targets_name: str, targets: Tensor, temperature: float, softcap: float | None) -> None:
    """Raise unless these are logits and numbers for them, and `targets` token ids; their shapes are not compared."""
    check_float("logits", logits)
    check_index(targets_name, targets)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {list(logits.shape)}")
    check_device(targets_name, targets, "logits", logits)
    check_range(targets_name, targets, logits.shape[-1], "the vocabulary of logits")
    check_number("temperature", temperature, above=0)
    if softcap is not None:
        check_number("softcap", softcap, above=0)


def _of_rows(
    logits: Tensor, targets_RJ: Tensor, temperature: float, softcap: float | None, inplace: bool, backend: Backend | None
) -> tuple[Tensor, Tensor]:
    """(logprob [R J], entropy [R]) of J targets a row, float32 (float64 for float64 logits)."""
    logits_RV = logits.reshape(-1, logits.shape[-1])
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    # Rows that lie over each other (an expanded tensor) have no place for a gradient each.
    inplace = inplace and logits_RV.stride(0) >= logits_RV.shape[1]
    triton = use_triton(logits, backend) and logits.dtype != torch.float64
    cap = None if softcap is None else float(softcap)
    outputs = _head_ops.call_token_logprob(logits_RV, targets_RJ.long().contiguous(), float(temperature), cap, inplace, triton)
    # Copies: backward needs the op's own, and callers write into what they get (TRL's DPO zeroes masked tokens in place).
    return outputs[0].clone(), outputs[3].clone()


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
            of a linear layer is such). Saves a tensor of their size. Backward can then run once. Under torch.compile, and for
            rows that share memory, it is ignored.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 logits always take the
            torch form.

    Returns:
        (logprob, entropy), both [...] float32 (float64 for float64 logits), in nats, both differentiable once in the logits.
        The logits are saved for backward and nothing else of size V; backward makes one gradient of the logits' shape
        and dtype. Entries of -inf have probability 0 and add nothing to the entropy. A row with NaN or +inf, or of
        nothing but -inf, gives NaN, as `torch.log_softmax` does; where the loss gives such a row no weight its gradient
        is 0.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    _check(logits_RV, "targets", targets_R, temperature, softcap)
    shape = logits_RV.shape[:-1]
    check_shape("targets", targets_R, tuple(shape), "that of logits without its last dimension")
    logprob_R, entropy_R = _of_rows(logits_RV, targets_R.reshape(-1, 1), temperature, softcap, inplace, backend)
    return logprob_R.view(shape), entropy_R.view(shape)


def selective_log_softmax(logits: Tensor, index: Tensor, *, temperature: float = 1.0, backend: Backend | None = None) -> Tensor:
    """`log_softmax(logits / temperature).gather(-1, index)` in one pass and without a second tensor of the logits' size:
    takes the place of the function of this name in TRL (`trl.trainer.utils`), its shapes and dtypes included.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; any strides.
        index: [...], or [..., K] for K tokens a row; int64 or int32, in [0, V) (checked on the CPU only).
        temperature: > 0.
        backend: as in `token_logprob`.

    Returns:
        [...] or [..., K] in the dtype of the logits, as TRL's: from half precision it is rounded at the end, once.
        `token_logprob` gives the same numbers in float32. Differentiable once; rows that are not finite as there.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    _check(logits, "index", index, temperature, None)
    leading = tuple(logits.shape[:-1])
    if tuple(index.shape) != leading and tuple(index.shape[:-1]) != leading:
        allowed = f"{list(leading)} or {[*leading, 'K']} (logits without its last dimension, K tokens a row)"
        raise ValueError(f"index must have shape {allowed}, got {list(index.shape)}")
    many = index.dim() == logits.dim()
    if many and index.shape[-1] == 0:
        return logits.gather(-1, index.long())
    index_RK = index.reshape(-1, index.shape[-1] if many else 1)
    logprob, _ = _of_rows(logits, index_RK, temperature, None, False, backend)
    return logprob.view(index.shape).to(logits.dtype)
