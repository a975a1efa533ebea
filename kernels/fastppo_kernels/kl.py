"""Divergences of the policy from the reference, estimated from the sampled token alone."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ._checks import accumulate_dtype, check_device, check_float, check_shape

KLEstimator = Literal["k1", "clamped_k1", "k2", "k3", "jensen_shannon"]

# exp() of a larger log-ratio says nothing but "far away" and overflows float32 at 88.
MAX_LOG_RATIO = 20.0


def sampled_kl(logprob: Tensor, ref_logprob: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token divergence estimate of pi (`logprob`) from pi_ref (`ref_logprob`), with d = logprob - ref_logprob:

        k1              d                                               unbiased for KL(pi || pi_ref), of either sign
        clamped_k1      max(d, 0)                                       biased upwards (AlpacaFarm)
        k2              d^2 / 2                                         biased, low variance
        k3              exp(-d) - 1 + d                                 unbiased, never negative
        jensen_shannon  (max(lp - ln m, 0) + max(lr - ln m, 0)) / 2     m = (pi + pi_ref) / 2 at the sampled token

    k1, k2, k3: Schulman 2020, http://joschu.net/blog/kl-approx.html. clamped_k1, jensen_shannon: Sun et al. 2023, arXiv
    2309.09055 (sampled-token surrogates, not divergences of the whole distribution).

    As a value (in the reward) choose by bias and variance. As a loss the *gradient* decides, and it is another story
    (tokens sampled from pi): k1's has expectation 0, so it regularises nothing; k2's is that of KL(pi || pi_ref), the
    one wanted; k3's is that of KL(pi_ref || pi), the other direction. k3 takes exp of -d clamped to [-20, 20], where
    its gradient is 0.

    Args:
        logprob, ref_logprob: any shape, the same; floating point. Differentiable in both.

    Returns:
        The same shape, float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: a wrong shape, dtype, device or estimator.
    """
    check_float("logprob", logprob)
    check_float("ref_logprob", ref_logprob)
    check_shape("ref_logprob", ref_logprob, tuple(logprob.shape), "that of logprob")
    check_device("ref_logprob", ref_logprob, "logprob", logprob)
    dtype = accumulate_dtype(logprob.dtype)
    lp, lr = logprob.to(dtype), ref_logprob.to(dtype)
    if estimator == "k1":
        return lp - lr
    if estimator == "clamped_k1":
        return (lp - lr).clamp(min=0)
    if estimator == "k2":
        return 0.5 * (lp - lr).square()
    if estimator == "k3":
        log_ratio = (lr - lp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(log_ratio) - log_ratio
    if estimator == "jensen_shannon":
        log_mean = torch.logaddexp(lp, lr) - math.log(2.0)
        return 0.5 * ((lp - log_mean).clamp(min=0) + (lr - log_mean).clamp(min=0))
    raise ValueError(f"estimator must be one of {', '.join(get_args(KLEstimator))}, got {estimator!r}")
