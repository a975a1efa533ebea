"""Generalised advantage estimation and whitening."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._checks import (
    accumulate_dtype,
    check_device,
    check_float,
    check_index,
    check_mask,
    check_mask_argument,
    check_number,
    check_shape,
)
from ._dispatch import Backend, use_triton
from ._eager import eager_or


def _sequence_ends(cu_seqlens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For every packed position: the number of its sequence, and the position after that sequence's last."""
    position_A = torch.arange(size, device=cu_seqlens.device)
    sequence_A = torch.searchsorted(cu_seqlens, position_A, right=True) - 1
    return sequence_A, cu_seqlens[sequence_A + 1]


def _check_rises(cu_seqlens: Tensor, size: int) -> None:
    """On the CPU; on a GPU looking would synchronise, and while compiling it would break the graph."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != size or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to {size}, the length of rewards, got {cu_seqlens.tolist()}")


def _check_lambda(lam: float | Tensor, sequences: int, device: torch.device) -> None:
    if isinstance(lam, Tensor):
        check_float("lam", lam)
        check_shape("lam", lam, (sequences,), "one for each sequence")
        if lam.device != device:
            raise ValueError(f"lam must be on the device of rewards ({device}), got {lam.device}")
    else:
        check_number("lam", lam, at_least=0, at_most=1)


def _gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    lam_tensor: Tensor | None,
    gamma: float,
    lam: float,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, sums); arguments are checked by the caller. `lam` counts where `lam_tensor` is None."""
    if use_triton:
        from . import _triton_gae

        outputs = _empty_outputs(rewards, cu_seqlens)
        _triton_gae.gae(rewards, values, cu_seqlens, mask, lam_tensor, gamma, lam, *outputs)
        return outputs

    shape, size, device = rewards.shape, rewards.numel(), rewards.device
    if cu_seqlens is None:
        cu_seqlens = torch.arange(shape[0] + 1, device=device) * shape[1]
    mask_A = check_mask(mask, "rewards", rewards).reshape(-1)
    sequence_A, end_A = _sequence_ends(cu_seqlens.long(), size)
    if lam_tensor is not None:
        lam_A = lam_tensor.double()[sequence_A]
    else:
        lam_A = torch.full(sequence_A.shape, float(lam), dtype=torch.float64, device=device)

    reward_A = torch.where(mask_A, rewards.reshape(-1).double(), 0.0)
    value_A = torch.where(mask_A, values.reshape(-1).double(), 0.0)
    # The first counted step at or after each position, then strictly after it; beyond the sequence's end it is none.
    position_A = torch.arange(size, device=device)
    counted_A = torch.where(mask_A, position_A, size).flip(0).cummin(0).values.flip(0) if size else position_A
    next_A = torch.cat([counted_A[1:], counted_A.new_full((min(size, 1),), size)])
    next_value_A = torch.where(next_A < end_A, value_A[next_A.clamp(max=max(size - 1, 0))], 0.0)

    # x_t = d_t + c_t x_{t+1}: a masked step hands on what comes after it, the last step of a sequence ends it.
    d_A = torch.where(mask_A, reward_A + gamma * next_value_A - value_A, 0.0)
    c_A = torch.where(mask_A, gamma * lam_A, 1.0)
    c_A = torch.where(position_A + 1 < end_A, c_A, 0.0)
    step = 1
    while step < size:
        # where, not a product alone: 0 * NaN of the next sequence must not come in.
        later_A = torch.where(c_A[:-step] == 0, 0.0, c_A[:-step] * d_A[step:])
        d_A = torch.cat([d_A[:-step] + later_A, d_A[-step:]])
        c_A = torch.cat([c_A[:-step] * c_A[step:], c_A[-step:]])
        step *= 2

    dtype = accumulate_dtype(rewards.dtype)
    advantage_A = torch.where(mask_A, d_A, 0.0)
    stored_A = advantage_A.to(dtype)
    advantages, returns = stored_A.view(shape), (advantage_A + value_A).to(dtype).view(shape)
    # Each row is added up in one fixed order; "unsafe" leaves out a check that would synchronise.
    rows_A3 = torch.stack([mask_A.double(), stored_A.double(), stored_A.double().square()], dim=1)
    sums_N3 = torch.segment_reduce(rows_A3, "sum", lengths=cu_seqlens.diff(), axis=0, initial=0, unsafe=True)
    return advantages, returns, sums_N3


def _empty_outputs(rewards: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    advantages, returns = (rewards.new_empty(rewards.shape, dtype=accumulate_dtype(rewards.dtype)) for _ in range(2))
    return advantages, returns, rewards.new_empty(sequences, 3, dtype=torch.float64)


# An operator: torch.compile would unroll the doublings, whose number changes with the length.
_gae_op = torch.library.custom_op("fastppo_kernels::gae", mutates_args=())(_gae)


@_gae_op.register_fake
def _(rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(rewards, cu_seqlens)


_call_gae = eager_or(_gae_op, _gae)


@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    with_sums: Literal[False] = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    with_sums: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    with_sums: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns of episodes that all end (no bootstrap: the value after the last step is 0).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    return_t = A_t + V_t
        (Schulman et al. 2016, arXiv 1506.02438, eq. 16 and section 4)

    A masked step is as if absent: its reward and value are not read (they may be NaN), the steps around it are
    neighbours.

    The recursion is a scan of x -> d + c x, composed by doubling: log2(length) passes over all steps at once, in
    float64, without knowing the longest sequence on the host. The result of a sequence does not depend on the others in
    the batch.

    Args:
        rewards, values: packed [A] with `cu_seqlens`, or padded [B, T] without; floating point.
        cu_seqlens: [N + 1] int64 or int32: sequence i is steps cu_seqlens[i] to cu_seqlens[i + 1]; from 0 to A;
            sequences may be empty. These values are checked on the CPU only, and not while compiling.
        gamma: in [0, 1].
        lam: in [0, 1], or a tensor with one for each sequence ([N] or [B]; values not checked).
        mask: bool or integer, the shape of the rewards; None: every step counts.
        with_sums: also return what `whiten` needs.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 rewards always take
            the torch form.

    Returns:
        (advantages, returns), the shape of the rewards, float32 (float64 for float64 rewards), detached; 0 at masked
        steps. With `with_sums` also float64 [N, 3], for each sequence the number, the sum and the sum of the squares of its
        counted advantages: `whiten(advantages, mask, sums=sums)` then need not read them first, and the sums of several
        batches, concatenated, whiten each with the mean and variance of all.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    check_float("rewards", rewards)
    check_float("values", values)
    check_shape("values", values, tuple(rewards.shape), "that of rewards")
    check_device("values", values, "rewards", rewards)
    check_number("gamma", gamma, at_least=0, at_most=1)
    check_mask_argument(mask, "rewards", rewards)
    shape, size, device = rewards.shape, rewards.numel(), rewards.device
    if cu_seqlens is None:
        if rewards.dim() != 2:
            raise ValueError(f"rewards must have shape [B, T] where cu_seqlens is None, got {list(shape)}")
        sequences = shape[0]
    else:
        check_index("cu_seqlens", cu_seqlens)
        if rewards.dim() != 1:
            raise ValueError(f"rewards must have shape [A] with cu_seqlens, got {list(shape)}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"cu_seqlens must have shape [N + 1], got {list(cu_seqlens.shape)}")
        check_device("cu_seqlens", cu_seqlens, "rewards", rewards)
        sequences = len(cu_seqlens) - 1
        _check_rises(cu_seqlens, size)
    _check_lambda(lam, sequences, device)
    of_tensor = isinstance(lam, Tensor)
    advantages, returns, sums = _call_gae(
        rewards, values, cu_seqlens, mask, lam if of_tensor else None, float(gamma), 0.0 if of_tensor else float(lam),
        use_triton(rewards, backend) and rewards.dtype != torch.float64,
    )  # fmt: skip
    return (advantages, returns, sums) if with_sums else (advantages, returns)


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    sums: Tensor | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    backend: Backend | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the entries that count, with the unbiased variance (n - 1), as TRL and verl do.

    Without `shift_mean` the mean is added back: scaled but not centred, for rewards (Ziegler et al. 2019, arXiv
    1909.08593). One entry has variance 0.

    Args:
        x: any shape; floating point. mask: bool or integer, the same shape; None: all count. eps: >= 0.
        sums: [N, 3] float64, rows of (count, sum, sum of squares) as `gae` gives them, whose totals define mean and variance;
            None: those of x.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 always takes the torch
            form.

    Returns:
        The shape of x, float32 (float64 for float64), detached; 0 where masked, whatever x holds there.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    check_float("x", x)
    check_mask_argument(mask, "x", x)
    check_number("eps", eps, at_least=0)
    if sums is not None:
        if not isinstance(sums, Tensor) or sums.dtype != torch.float64:
            raise ValueError(f"sums must be a float64 tensor, got {getattr(sums, 'dtype', type(sums).__name__)}")
        if sums.dim() != 2 or sums.shape[1] != 3 or sums.shape[0] == 0:
            raise ValueError(f"sums must have shape [N, 3], N >= 1, got {list(sums.shape)}")
        check_device("sums", sums, "x", x)
    if use_triton(x, backend) and x.dtype != torch.float64:
        from . import _triton_gae

        return _triton_gae.whiten(x.detach(), mask, sums, shift_mean, float(eps))

    mask = check_mask(mask, "x", x)
    if sums is not None:
        count, total, squares = sums.sum(0)
        mean = total / count.clamp(min=1)
        centred = torch.where(mask, x.double() - mean, 0.0)
        variance = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    else:
        count = mask.sum()
        mean = torch.where(mask, x.double(), 0.0).sum() / count.clamp(min=1)
        centred = torch.where(mask, x.double() - mean, 0.0)
        variance = centred.square().sum() / (count - 1).clamp(min=1)
    # Equal entries stay 0 even with eps = 0.
    scaled = torch.where(centred == 0, 0.0, centred * torch.rsqrt(variance + eps))
    shifted = scaled if shift_mean else scaled + mean
    return torch.where(mask, shifted, 0.0).to(accumulate_dtype(x.dtype))
