"""Mathematics that several Triton kernels share: what a PPO loss does with one log-ratio.

In float64, whatever comes in: these are a few numbers for each token, next to a launch or to a row of logits, and the result is
then as good as its inputs, with the digits that float32 would lose (exp(x) - 1 - x near 0) and no series to get them back.
"""

import triton
import triton.language as tl

from .kl import MAX_LOG_RATIO

LIMIT = tl.constexpr(MAX_LOG_RATIO)

# Kinds of `kl_terms`: one more than the places in `KLEstimator`; 0 is no estimate.
_CLAMPED_K1, _K2, _K3, _JENSEN_SHANNON = (tl.constexpr(i) for i in range(2, 6))


@triton.jit
def clamp(x, low, high):
    """Comparisons rather than min and max, which lose NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp(x):
    """exp, rounded once to the dtype of x; the hardware's float32 one loses a digit at 20."""
    return tl.exp(x.to(tl.float64)).to(x.dtype)


@triton.jit
def expm1_minus(x):
    """exp(x) - 1 - x for |x| <= 20, rounded once to the dtype of x."""
    wide = x.to(tl.float64)
    return (tl.exp(wide) - 1.0 - wide).to(x.dtype)


@triton.jit
def kl_terms(d, kind):
    """A KL estimate and its derivative, of d = logprob - ref_logprob: see `sampled_kl`.

    kind: which, known at compile time or (one scalar branch) not; see above. Both results have the dtype of d.
    """
    x = d.to(tl.float64)
    value = x  # k1
    slope = tl.where(x == x, 1.0, x)
    if kind == _CLAMPED_K1:
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x < 0, 0.0, slope)
    elif kind == _K2:
        value = 0.5 * x * x
        slope = x
    elif kind == _K3:
        log_ratio = clamp(-x, -LIMIT, LIMIT)
        ratio = tl.exp(log_ratio)
        value = ratio - 1.0 - log_ratio
        slope = tl.where(tl.abs(x) <= LIMIT, 1.0 - ratio, 0.0)
    elif kind == _JENSEN_SHANNON:
        # One of the two terms is 0; the other is -log((1 + exp(-|d|)) / 2).
        value = -0.5 * tl.log(0.5 + 0.5 * tl.exp(-tl.abs(x)))
        # exp(-|d|) / (1 + exp(-|d|)) / 2 without the division, around which registers were spilled.
        slope = 0.25 * tl.exp(2.0 * value - tl.abs(x))
        slope = tl.where(x > 0, slope, tl.where(x < 0, -slope, 0.0))
    return value.to(d.dtype), slope.to(d.dtype)
