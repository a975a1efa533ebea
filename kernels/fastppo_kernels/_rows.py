"""The row arithmetic of a softmax over the vocabulary, shared by `token_logprob`, `linear_logprob` and `sample`.

With z = (cap(logits) - max) / temperature and S = sum(exp(z)):

    log p_j = z_j - log S              H = log S - sum_j exp(z_j) z_j / S
    d log p_y / d z_j = 1[j = y] - p_j         d H / d z_j = -p_j (log p_j + H)

The maximum is taken out before anything else (also before the division by the temperature), so that neither huge
logits, nor rows of -1e4, nor a tiny temperature lose digits. Functions ending in `_` work in place on a tensor that the
caller owns.
"""

from torch import Tensor

# exp(-1e4) is 0 in every dtype: clamping there changes no probability and turns 0 * -inf into 0.
LOG_ZERO = -1e4


def shift_(logits_RV: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Turn logits into z (<= 0, largest entry 0) in place and return it. A row without a finite maximum becomes NaN."""
    if softcap is not None:
        logits_RV.div_(softcap).tanh_().mul_(softcap)
    logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
    return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)


def softcap_slope(logits_RV: Tensor, softcap: float) -> Tensor:
    """d cap(x) / dx = 1 - tanh(x / softcap)^2, for logits before `shift_`."""
    return (logits_RV / softcap).tanh_().square_().neg_().add_(1)


def normalise_(z_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log S, entropy), each [R]; `z_RV` is used up."""
    z_RV.clamp_(min=LOG_ZERO)
    weight_RV = z_RV.exp()
    sum_R = weight_RV.sum(-1)
    log_sum_R = sum_R.log()
    entropy_R = log_sum_R - weight_RV.mul_(z_RV).sum(-1) / sum_R
    return log_sum_R, entropy_R


def spread_gradient_(
    z_RV: Tensor, log_sum_R: Tensor, entropy_R: Tensor, grad_logprob_R: Tensor, grad_entropy_R: Tensor
) -> Tensor:
    """Turn z in place into the gradient that falls on every entry: -p_j (g_logprob + g_entropy (log p_j + H)).

    The caller adds g_logprob at the targets. A row whose two gradients are 0 gets exactly 0, even if its logits are
    NaN.
    """
    log_p_RV = z_RV.sub_(log_sum_R[:, None]).clamp_(min=LOG_ZERO)
    p_RV = log_p_RV.exp()
    grad_RV = log_p_RV.add_(entropy_R[:, None]).mul_(grad_entropy_R[:, None]).add_(grad_logprob_R[:, None])
    grad_RV.mul_(p_RV).neg_()
    unused_R = (grad_logprob_R == 0) & (grad_entropy_R == 0)
    return grad_RV.masked_fill_(unused_R[:, None], 0.0)


def add_at_(total: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """total[index] += value for 1-D tensors with repeated indices, always summed in the same order.

    On the CPU `index_add_` of one dimension is a plain loop (`index_put_` adds with atomics there); on CUDA it is
    `index_put_` that sorts and `index_add_` that uses atomics.
    """
    if total.is_cuda:
        return total.index_put_((index,), value, accumulate=True)
    return total.index_add_(0, index, value)
