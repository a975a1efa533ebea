"""The LM head and the log-probabilities after it, without ever holding more than one chunk of logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _head_ops
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

# What a chunk of logits may take (its gradient lies in the same memory where the kernels run), and its rows, for more make the
# products no faster. For 152,064 tokens: 1024 rows in half precision (311 MB), 768 in float32 (467 MB).
_CHUNK_BYTES, _CHUNK_ROWS = 512 << 20, 1024
# On a CPU a chunk passes through the caches about ten times, between two products: what stays there is read faster than memory.
_CHUNK_BYTES_CPU = 2 << 20
# Whole tiles of a GEMM.
_ROW_TILE = 128


def chosen_chunk_rows(vocab: int, dtype: torch.dtype, on_cpu: bool = False) -> int:
    """Rows of logits of this dtype that are alive at a time, where the caller leaves it open."""
    room = min(_CHUNK_BYTES, _CHUNK_BYTES_CPU) if on_cpu else _CHUNK_BYTES
    rows = room // (vocab * dtype.itemsize) // _ROW_TILE * _ROW_TILE
    return min(max(rows, _ROW_TILE), _CHUNK_ROWS)


class Head(NamedTuple):
    """Checked arguments, in the order in which the operators of `_head_ops` take them; the first five have gradients."""

    hidden_RH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    lora_A_KH: Tensor | None
    lora_B_VK: Tensor | None
    targets_A: Tensor
    rows_A: Tensor | None
    lora_scale: float
    temperature: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int
    logits_dtype: torch.dtype

    def use_triton(self, backend: Backend | None) -> bool:
        """Whether the Triton kernels run; a float64 head always takes the torch form."""
        return use_triton(self.hidden_RH, backend) and self.weight_VH.dtype != torch.float64


def checked_head(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    rows_A: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    lora_scale: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    logits_dtype: torch.dtype | None,
) -> Head:
    """Raise unless these are arguments for a head."""
    check_float("hidden", hidden_RH)
    if hidden_RH.dim() != 2:
        raise ValueError(f"hidden must have shape [R, H], got {list(hidden_RH.shape)}")
    check_float("weight", weight_VH)
    rows, width = hidden_RH.shape
    if weight_VH.dim() != 2 or weight_VH.shape[1] != width or weight_VH.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, {width}], V >= 1 (H is that of hidden), got {list(weight_VH.shape)}")
    vocab = weight_VH.shape[0]
    _check_parameters(hidden_RH, weight_VH, bias, lora_A, lora_B)
    check_index("targets", targets_A)
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
    check_number("lora_scale", lora_scale)
    check_number("temperature", temperature, above=0)
    check_number("logit_scale", logit_scale, above=0)
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows, at_least=1)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if logits_dtype not in (None, weight_VH.dtype, accumulate_dtype(weight_VH.dtype)):
        raise ValueError(f"logits_dtype must be None, float32 or the weight's {weight_VH.dtype}, got {logits_dtype}")
    logits_dtype = logits_dtype or weight_VH.dtype
    if chunk_rows is None:
        chunk_rows = chosen_chunk_rows(vocab, logits_dtype, hidden_RH.is_cpu)
    return Head(
        hidden_RH, weight_VH, bias, lora_A, lora_B, targets_A.long().contiguous(), None if rows_A is None else rows_A.long(),
        float(lora_scale), float(temperature), None if softcap is None else float(softcap), float(logit_scale), chunk_rows,
        logits_dtype,
    )  # fmt: skip


def _check_parameters(
    hidden_RH: Tensor, weight_VH: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None
) -> None:
    vocab, width = weight_VH.shape
    if (lora_A is None) != (lora_B is None):
        given, missing = ("lora_B", "lora_A") if lora_A is None else ("lora_A", "lora_B")
        raise ValueError(f"{missing} must be given with {given}, got None")
    rank = 0
    if lora_A is not None and lora_B is not None:
        check_float("lora_A", lora_A)
        check_float("lora_B", lora_B)
        rank = lora_A.shape[0] if lora_A.dim() else 0
        if lora_A.dim() != 2 or lora_A.shape[1] != width or rank == 0:
            raise ValueError(f"lora_A must have shape [K, {width}], K >= 1 (H is that of hidden), got {list(lora_A.shape)}")
    shapes = {
        "weight": (weight_VH, (vocab, width), ""),
        "bias": (bias, (vocab,), "one for each row of weight"),
        "lora_A": (lora_A, (rank, width), ""),
        "lora_B": (lora_B, (vocab, rank), "rows of weight, rows of lora_A"),
    }
    for name, (tensor, shape, why) in shapes.items():
        if tensor is not None:
            check_float(name, tensor)
            check_shape(name, tensor, shape, why)
            check_device(name, tensor, "hidden", hidden_RH)
            if name != "bias" and (hidden_RH.dtype == torch.float64) != (tensor.dtype == torch.float64):
                came = f"{hidden_RH.dtype} and {tensor.dtype}"
                raise ValueError(f"hidden and {name} must both be float64 or neither, got {came}")


def linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    *,
    rows_A: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    lora_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    argmax: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """Log-probability of tokens, and the entropy of their rows, from hidden states and the LM head:

        logits = hidden weight^T + lora_scale (hidden lora_A^T) lora_B^T + bias
        softmax(cap(logit_scale logits) / temperature)

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
        bias: [V] or None; rounded to the weight's dtype and added in float32.
        lora_A, lora_B: [K, H] and [V, K], any floating dtype, or both None. The adapter's product is computed in the dtype of
            the logits. In float32 on the CPU the logits are PEFT's, to the bit. lora_scale: any finite number.
        temperature: > 0. softcap: > 0 or None, cap(x) = softcap * tanh(x / softcap). logit_scale: > 0.
        chunk_rows: rows of logits alive at a time, >= 1. None: 1024, or fewer where their logits would take more than 512 MiB
            (V > 262,144 in half precision, V > 131,072 in float32), on a CPU more than 2 MiB, but at least 128.
        logits_dtype: float32 keeps the logits of a bfloat16 or float16 weight as the GEMM sums them up, not rounded to the
            weight's dtype; a CUDA GEMM does that at its usual speed. None: the weight's dtype.
        argmax: also return the best token of each row.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. A float64 head always takes
            the torch form.

    Returns:
        (logprob_A, entropy_A), or (logprob_A, entropy_A, argmax_R) with `argmax`: float32 (float64 for a float64
        weight), in nats; argmax_R [R] int64 of the logits before the temperature, the lowest index of equals. Log-prob
        and entropy are differentiable once in the hidden state, the weight, the bias and the adapter, each gradient
        computed only if it is required. Rows that are not finite behave as in `token_logprob`.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    head = checked_head(
        hidden_RH, weight_VH, targets_A, rows_A, bias, lora_A, lora_B, lora_scale, temperature, softcap, logit_scale,
        chunk_rows, logits_dtype,
    )  # fmt: skip
    logprob_A, *others = _head_ops.call_linear_logprob(*head, argmax, 0, head.use_triton(backend))
    # A copy: backward needs the op's own, and callers write into what they get (masked tokens set to 0, in place).
    return logprob_A.clone(), *others[: 2 if argmax else 1]
