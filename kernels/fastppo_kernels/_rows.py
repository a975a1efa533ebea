"""The row arithmetic of a softmax over the vocabulary, shared by the head ops and `sample`; the torch twin of `_triton_head`.

With z = (cap(logit_scale (logits + bias)) - max) / temperature and S = sum(exp(z)):

    log p_j = z_j - log S              H = log S - sum_j exp(z_j) z_j / S
    d log p_y / d z_j = 1[j = y] - p_j         d H / d z_j = -p_j (log p_j + H)

The maximum is taken out before anything else (also before the division by the temperature), so that neither huge
logits, nor rows of -1e4, nor a tiny temperature lose digits. Functions ending in `_` work in place on a tensor that the
caller owns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# exp(-1e4) is 0 in every dtype: putting it for what is less changes no probability and turns 0 * -inf into 0.
LOG_ZERO = -1e4
# In float32 already for exp(-75), beside the largest, which is 1: divided by their sum it would soon be a subnormal number,
# with which a CPU takes many times as long.
_SMALLEST = {torch.float32: -75.0, torch.float64: -690.0}


class Transform(NamedTuple):
    """What logits go through before the softmax: cap(logit_scale x) / temperature, cap(x) = softcap tanh(x / softcap)."""

    logit_scale: float
    temperature: float
    softcap: float | None


class Actions(NamedTuple):
    """The actions (a row and a target token each) of all rows.

    rows_A: the row of every action, any; row r then has the actions order_A[row_start_R1[r]:row_start_R1[r + 1]] (the torch
    twin can do without these two). None: action a is that of row a // per_row; rows after the last action's are padding.
    """

    targets_A: Tensor
    rows_A: Tensor | None = None
    order_A: Tensor | None = None
    row_start_R1: Tensor | None = None
    per_row: int = 1


class Statistics(NamedTuple):
    """What is kept of logits, in float32 or float64: of every action its log-prob, of every row max, log S and H."""

    logprob_A: Tensor
    maximum_R: Tensor
    log_sum_R: Tensor
    entropy_R: Tensor


class Softmax(NamedTuple):
    """p = weight / total, weight_RV being what `torch.softmax` gives: it adds up a row in so few parts that over a large
    vocabulary it is worse than float32 can be. product_RV is weight z."""

    weight_RV: Tensor
    total_R: Tensor
    product_RV: Tensor


def _without_subnormal_(z_RV: Tensor) -> Tensor:
    """z with `LOG_ZERO` for what has no probability to speak of; NaN stays."""
    return torch.threshold_(z_RV, _SMALLEST[z_RV.dtype], LOG_ZERO)


def softmax_(z_RV: Tensor) -> tuple[Softmax, Tensor, Tensor]:
    """Return (softmax, log S [R], entropy [R]); `z_RV` is used up.

    `torch.softmax` is one pass, and on a CPU not slowed down by results that underflow, as `torch.exp` is. Where z is 0 its
    weight is total / S.
    """
    weight_RV = torch.softmax(_without_subnormal_(z_RV), -1)
    total_R = weight_RV.sum(-1)
    log_sum_R = (total_R / weight_RV.amax(-1)).log_()
    product_RV = z_RV.mul_(weight_RV)
    return Softmax(weight_RV, total_R, product_RV), log_sum_R, log_sum_R - product_RV.sum(-1) / total_R


def normalise_(z_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log S, entropy), each [R]; `z_RV` is used up."""
    return softmax_(z_RV)[1:]


def add_at_(total: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """total[index] += value for 1-D tensors with repeated indices, always summed in the same order.

    On the CPU `index_add_` of one dimension is a plain loop (`index_put_` adds with atomics there); on CUDA it is
    `index_put_` that sorts and `index_add_` that uses atomics.
    """
    if total.is_cuda:
        return total.index_put_((index,), value, accumulate=True)
    return total.index_add_(0, index, value)


def _capped_(logits_CV: Tensor, bias_V: Tensor | None, transform: Transform, dtype: torch.dtype) -> Tensor:
    """cap(logit_scale (logits + bias)) in `dtype`: in the logits' memory if that is theirs."""
    x_CV = logits_CV.to(dtype)
    if bias_V is not None:
        x_CV.add_(bias_V)
    if transform.logit_scale != 1.0:
        x_CV.mul_(transform.logit_scale)
    return x_CV if transform.softcap is None else x_CV.div_(transform.softcap).tanh_().mul_(transform.softcap)


def _actions_of(actions: Actions, first_row: int, rows: int) -> tuple[slice | Tensor, Tensor, Tensor | None]:
    """Actions that may belong to a chunk of rows: (which actions, their row in the chunk, which really belong).

    With `rows_A` all actions are looked at in every chunk, those outside masked, where picking them out would need their
    number on the host.
    """
    if actions.rows_A is None:
        each = actions.per_row
        row_A = torch.arange(min(rows * each, len(actions.targets_A) - first_row * each), device=actions.targets_A.device)
        return slice(first_row * each, (first_row + rows) * each), row_A if each == 1 else row_A // each, None
    if actions.rows_A.is_cpu and actions.order_A is not None and actions.row_start_R1 is not None:
        which_A = actions.order_A[actions.row_start_R1[first_row] : actions.row_start_R1[first_row + rows]]
        return which_A, actions.rows_A[which_A] - first_row, None
    row_A = actions.rows_A - first_row
    return slice(None), row_A.clamp(0, rows - 1), (row_A >= 0) & (row_A < rows)


def statistics(
    logits_CV: Tensor,
    bias_V: Tensor | None,
    first_row: int,
    actions: Actions,
    transform: Transform,
    out: Statistics,
    argmax_R: Tensor | None,
) -> Softmax:
    """Fill `out` (and argmax_R) for rows first_row, first_row + 1, ..., whose logits these are and may be used up."""
    rows, vocab = logits_CV.shape
    chunk = slice(first_row, first_row + rows)
    z_CV = _capped_(logits_CV, bias_V, transform, out.log_sum_R.dtype)
    torch.amax(z_CV, -1, out=out.maximum_R[chunk])
    z_CV.sub_(out.maximum_R[chunk, None])
    if argmax_R is not None:  # before the temperature: dividing could round two logits to the same value
        argmax_R[chunk] = z_CV.argmax(-1)
    if transform.temperature != 1.0:
        z_CV.div_(transform.temperature)
    which, row_A, inside_A = _actions_of(actions, first_row, rows)
    z_target_A = z_CV.view(-1)[row_A * vocab + actions.targets_A[which]]
    softmax, out.log_sum_R[chunk], out.entropy_R[chunk] = softmax_(z_CV)
    found_A = z_target_A - out.log_sum_R[chunk][row_A]
    out.logprob_A[which] = found_A if inside_A is None else torch.where(inside_A, found_A, out.logprob_A)
    return softmax


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
    """Fill `grad_CV` (which may be `logits_CV`, used up in any case) with the gradient of the logits.

    A row whose two gradients are 0 gets exactly 0, even if its logits are NaN.
    """
    rows, vocab = logits_CV.shape
    chunk = slice(first_row, first_row + rows)
    z_CV = _capped_(logits_CV, bias_V, transform, of.log_sum_R.dtype)
    slope_CV = None if transform.softcap is None else (z_CV / transform.softcap).square_().neg_().add_(1)
    z_CV.sub_(of.maximum_R[chunk, None])
    if transform.temperature != 1.0:
        z_CV.div_(transform.temperature)

    which, row_A, inside_A = _actions_of(actions, first_row, rows)
    factor = transform.logit_scale / transform.temperature
    of_action = [grad_A[which] * factor for grad_A in (grad_logprob_A, grad_entropy_A)]
    if inside_A is not None:
        of_action = [grad_A.masked_fill(~inside_A, 0.0) for grad_A in of_action]
    logprob_C1, entropy_C1 = (add_at_(z_CV.new_zeros(rows), row_A, grad_A)[:, None] for grad_A in of_action)

    weight_CV = torch.softmax(_without_subnormal_(z_CV), -1)
    total_C1 = weight_CV.sum(-1, keepdim=True)
    ignored_C1 = (logprob_C1 == 0) & (entropy_C1 == 0)
    # On a CPU it costs nothing to look first, and passes over the chunk are what all this is.
    if z_CV.is_cpu and not entropy_C1.any():
        dz_CV = torch.mul(weight_CV, -logprob_C1 / total_C1, out=z_CV)
    else:
        log_p_CV = z_CV.sub_(of.log_sum_R[chunk, None]).clamp_(min=LOG_ZERO)
        dz_CV = log_p_CV.add_(of.entropy_R[chunk, None]).mul_(-entropy_C1 / total_C1).sub_(logprob_C1 / total_C1)
        dz_CV.mul_(weight_CV)
    if not z_CV.is_cpu or ignored_C1.any():
        dz_CV.masked_fill_(ignored_C1, 0.0)
    add_at_(dz_CV.view(-1), row_A * vocab + actions.targets_A[which], of_action[0])
    if slope_CV is not None:  # an entry without gradient has none, even if its slope is NaN
        dz_CV.mul_(slope_CV.masked_fill_(dz_CV == 0, 0.0))
    grad_CV.copy_(dz_CV)
