"""The clipped losses of PPO (Schulman et al. 2017, arXiv 1707.06347) for tokens, as sums over actions divided by a
given count.

The torch forms are the definition. The Triton form (`_triton_loss`) does policy and value, metrics and gradients
included, in one launch and a finishing one.

A mini-batch that is cut into micro-batches passes the whole mini-batch's number of actions as `denominator`; the
micro-batches' losses and gradients then add up to the mini-batch's. Metrics add up in the same way: see
`reduce_metrics`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ._checks import (
    accumulate_dtype,
    check_device,
    check_float,
    check_mask_argument,
    check_number,
    check_shape,
)
from ._dispatch import Backend, use_triton
from .kl import MAX_LOG_RATIO, KLEstimator, sampled_kl


class _PolicySettings(NamedTuple):
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"


class _Policy(NamedTuple):
    """Inputs and settings of `ppo_policy_loss`."""

    logprob: Tensor
    old_logprob: Tensor
    advantages: Tensor
    entropy: Tensor | None
    ref_logprob: Tensor | None
    settings: _PolicySettings


class _Value(NamedTuple):
    """Inputs and settings of `ppo_value_loss`; clip_name is what its caller calls `clip`."""

    values: Tensor
    old_values: Tensor | None
    returns: Tensor
    clip: float | None
    huber_delta: float | None
    clip_name: str


def check_tokens(like_name: str, like: Tensor, mask: Tensor | None, **tensors: Tensor | None) -> None:
    """Raise unless all per-token inputs that are given have the shape and device of the first."""
    check_float(like_name, like)
    check_mask_argument(mask, like_name, like)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_float(name, tensor)
            check_shape(name, tensor, tuple(like.shape), f"that of {like_name}")
            check_device(name, tensor, like_name, like)


def check_policy_settings(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: KLEstimator,
    ref_logprob: Tensor | None,
) -> None:
    """Raise unless the settings are as `ppo_policy_loss` says (`ref_logprob`: whether there is one)."""
    check_number("clip_low", clip_low, at_least=0, at_most=1)
    check_number("clip_high", clip_high, at_least=0)
    check_number("entropy_coef", entropy_coef)
    check_number("kl_coef", kl_coef)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, above=1)
    if kl_coef and ref_logprob is None:
        raise ValueError(f"ref_logprob must be given for kl_coef {kl_coef!r}, got None")
    if kl_estimator not in get_args(KLEstimator):
        raise ValueError(f"kl_estimator must be one of {', '.join(get_args(KLEstimator))}, got {kl_estimator!r}")


def check_denominator(denominator: float | Tensor | None, like: Tensor) -> None:
    """Raise unless `denominator` is None, a number > 0, or a 0-d tensor on the device of `like`."""
    if isinstance(denominator, Tensor):
        check_shape("denominator", denominator, (), "one number")
        check_device("denominator", denominator, "the inputs", like)
    elif denominator is not None:
        check_number("denominator", denominator, above=0)


def _check(policy: _Policy | None, value: _Value | None, value_coef: float, mask: Tensor | None) -> None:
    if policy is not None:
        check_tokens(
            "logprob", policy.logprob, mask, old_logprob=policy.old_logprob, advantages=policy.advantages,
            entropy=policy.entropy, ref_logprob=policy.ref_logprob,
        )  # fmt: skip
        check_policy_settings(*policy.settings, ref_logprob=policy.ref_logprob)
        if policy.settings.entropy_coef and policy.entropy is None:
            raise ValueError(f"entropy must be given for entropy_coef {policy.settings.entropy_coef!r}, got None")
    if value is not None:
        name, like = ("values", value.values) if policy is None else ("logprob", policy.logprob)
        check_tokens(name, like, mask, values=value.values, old_values=value.old_values, returns=value.returns)
        check_number("value_coef", value_coef)
        if value.clip is not None:
            check_number(value.clip_name, value.clip, above=0)
            if value.old_values is None:
                raise ValueError(f"old_values must be given for {value.clip_name} {value.clip!r}, got None")
        if value.huber_delta is not None:
            check_number("huber_delta", value.huber_delta, above=0)


def _loss(
    policy: _Policy | None,
    value: _Value | None,
    value_coef: float,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    backend: Backend | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss + value_coef times the value's, or the one that is given."""
    _check(policy, value, value_coef, mask)
    differentiable = [policy.logprob] if policy is not None else []
    differentiable += [value.values] if value is not None else []
    like = differentiable[0]
    check_denominator(denominator, like)
    denominator = denominator.detach() if isinstance(denominator, Tensor) else denominator
    if use_triton(like, backend) and all(tensor.dtype != torch.float64 for tensor in differentiable):
        return _triton_form(policy, value, value_coef, mask, denominator)
    if mask is not None:
        mask = mask != 0
    count = _number(like, mask).clamp(min=1) if denominator is None else denominator
    if policy is None:
        assert value is not None
        return _torch_value(value, mask, count)
    policy_loss, policy_metrics = _torch_policy(policy, mask, count)
    if value is None:
        return policy_loss, policy_metrics
    value_loss, value_metrics = _torch_value(value, mask, count)
    return policy_loss + value_coef * value_loss, policy_metrics | value_metrics


def _triton_form(
    policy: _Policy | None,
    value: _Value | None,
    value_coef: float,
    mask: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    from . import _triton_loss as triton_loss

    policy_tensors = [None] * 5 if policy is None else _constant(policy[:5], of=(1, 2, 4))
    value_tensors = [None] * 3 if value is None else _constant(value[:3], of=(1, 2))
    low, high, dual, entropy_coef, kl_coef, estimator = _PolicySettings() if policy is None else policy.settings
    clip, huber_delta = (None, None) if value is None else (value.clip, value.huber_delta)
    of_tensor = isinstance(denominator, Tensor)
    loss, sums, *_ = triton_loss.ppo_loss(
        *policy_tensors, *value_tensors, mask, denominator if of_tensor else None,
        0.0 if of_tensor or denominator is None else float(denominator), float(low), float(high), _or_inf(dual),
        float(entropy_coef), float(kl_coef), 1 + get_args(KLEstimator).index(estimator), float(value_coef),
        _or_inf(clip), _or_inf(huber_delta),
    )  # fmt: skip
    columns = sums.detach().unbind()
    metrics: dict[str, Tensor] = {}
    if policy is not None:
        metrics |= zip(triton_loss.POLICY_METRICS, columns[: triton_loss.VALUE_START], strict=False)
        if policy.entropy is None:
            del metrics["entropy_sum"]
        if policy.ref_logprob is None:
            del metrics["kl_ref_sum"]
    if value is not None:
        metrics |= zip(triton_loss.VALUE_METRICS, columns[triton_loss.VALUE_START :], strict=True)
    return loss, metrics


def _constant(tensors: Sequence[Tensor | None], of: tuple[int, ...]) -> list[Tensor | None]:
    """The tensors, those at the places `of` detached."""
    return [t.detach() if t is not None and i in of else t for i, t in enumerate(tensors)]


def _or_inf(number: float | None) -> float:
    return math.inf if number is None else float(number)


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values, 0 where masked.

    `where` rather than a product: a masked position may hold NaN or inf, and neither its value nor its gradient may
    leak.
    """
    return values if mask is None else torch.where(mask, values, 0)


def _token(tensor: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """One per-token input in `dtype`, 0 where masked."""
    return _counted(tensor.to(dtype), mask)


def _sum(values: Tensor, mask: Tensor | None) -> Tensor:
    # float64: sums of squares of a whole batch are compared with each other (explained variance).
    return _counted(values.detach(), mask).sum(dtype=torch.float64)


def _number(like: Tensor, mask: Tensor | None) -> Tensor:
    return like.new_tensor(like.numel(), dtype=torch.float64) if mask is None else mask.sum(dtype=torch.float64)


def _mean(per_token: Tensor, mask: Tensor | None, count: float | Tensor) -> Tensor:
    """Sum over the mask / count, in the dtype of `per_token` whatever that of a count in a tensor."""
    count = count.double() if isinstance(count, Tensor) else count
    return (_counted(per_token, mask).sum() / count).to(per_token.dtype)


def ppo_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    denominator: float | Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, minus entropy bonus, plus KL to the reference:

        ratio = exp(logprob - old_logprob)
        surrogate = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))     (arXiv 1707.06347, eq. 7)
        surrogate = min(surrogate, -A dual_clip) where A < 0, if dual_clip         (arXiv 1912.09729, eq. 5)
        loss = sum over actions (surrogate - entropy_coef H + kl_coef kl) / denominator

    The log-ratio is clamped to [-20, 20]: an action beyond has a finite loss and no gradient.

    Args:
        logprob, old_logprob, advantages, and entropy, ref_logprob where given: one shape, any; floating point. The loss
            is differentiable in `logprob` and `entropy`; the others are constants.
        mask: bool or integer, the same shape; what is masked out is neither counted nor read (it may be NaN) and has
            gradient 0.
        clip_low: in [0, 1]. clip_high: >= 0. dual_clip: > 1, or None.
        entropy_coef: any sign. kl_coef: any sign; other than 0 it needs `ref_logprob`, as entropy_coef needs `entropy`.
        kl_estimator: see `sampled_kl`, above all for what each does as a loss ("k2" has the gradient of the reverse
            KL).
        denominator: > 0, a number or a 0-d tensor; None: the number of actions here (1 if there are none). Under
            torch.compile every new number compiles the Triton form again, as new coefficients do; a tensor does not.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. The Triton form is
            differentiable once; float64 inputs always take the torch form.

    Returns:
        (loss, metrics): loss 0-d float32 (float64 for float64 inputs). metrics are detached 0-d float64 sums over the
        actions here: `count`, `ratio_sum`, `ratio_max` (a maximum; 0 without actions), `clip_fraction_sum` (actions
        whose gradient the clip took), `approx_kl_sum` (KL(old || new) as k3), `policy_loss_sum` (the surrogate),
        `entropy_sum` and `kl_ref_sum` if given. `reduce_metrics` adds up micro-batches and divides.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    settings = _PolicySettings(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    policy = _Policy(logprob, old_logprob, advantages, entropy, ref_logprob, settings)
    return _loss(policy, None, 1.0, mask, denominator, backend)


def _torch_policy(policy: _Policy, mask: Tensor | None, count: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    dtype, settings = accumulate_dtype(policy.logprob.dtype), policy.settings
    new = _token(policy.logprob, dtype, mask)
    old = _token(policy.old_logprob, dtype, mask).detach()
    advantage = _token(policy.advantages, dtype, mask).detach()

    log_ratio = (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    was_clipped = clipped > unclipped
    if settings.dual_clip is not None:
        bound = -advantage * settings.dual_clip
        was_clipped = was_clipped | ((advantage < 0) & (surrogate > bound))
        surrogate = torch.where(advantage < 0, torch.minimum(surrogate, bound), surrogate)
    metrics = {
        "count": _number(new, mask),
        "ratio_sum": _sum(ratio, mask),
        "ratio_max": (_counted(ratio.detach(), mask).max() if ratio.numel() else ratio.new_zeros(())).double(),
        "clip_fraction_sum": _sum(was_clipped, mask),
        "approx_kl_sum": _sum(torch.expm1(log_ratio.detach()) - log_ratio.detach(), mask),
        "policy_loss_sum": _sum(surrogate, mask),
    }
    per_token = surrogate
    if policy.entropy is not None:
        entropy = _token(policy.entropy, dtype, mask)
        metrics["entropy_sum"] = _sum(entropy, mask)
        if settings.entropy_coef:
            per_token = per_token - settings.entropy_coef * entropy
    if policy.ref_logprob is not None:
        reference = _token(policy.ref_logprob, dtype, mask).detach()
        kl = sampled_kl(new, reference, settings.kl_estimator)
        metrics["kl_ref_sum"] = _sum(kl, mask)
        if settings.kl_coef:
            per_token = per_token + settings.kl_coef * kl
    return _mean(per_token, mask, count), metrics


def _penalty(error: Tensor, huber_delta: float | None) -> Tensor:
    """error^2 / 2, or Huber's function: linear with slope `huber_delta` where |error| exceeds it."""
    if huber_delta is None:
        return 0.5 * error.square()
    inside = error.clamp(-huber_delta, huber_delta)
    return inside * (error - 0.5 * inside)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    clip: float | None = 0.2,
    huber_delta: float | None = None,
    denominator: float | Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value loss with the clip of OpenAI's baselines (ppo2):

        clipped = old_values + clip(values - old_values, -clip, clip)
        loss = sum over actions max(h(values - returns), h(clipped - returns)) / denominator
        h(e) = e^2 / 2, or Huber's function

    Args:
        values: any shape; floating point; the loss is differentiable in it alone.
        old_values: the same shape; may be None where `clip` is None. returns: the same shape.
        mask: as in `ppo_policy_loss`.
        clip: > 0, in units of the value; None: no clip.
        huber_delta: > 0; None: squares.
        denominator, backend: as in `ppo_policy_loss`.

    Returns:
        (loss, metrics): loss 0-d float32 (float64 for float64 inputs). metrics are detached 0-d float64 sums:
        `value_count`, `value_loss_sum`, `value_clip_fraction_sum` (actions where the clipped term is the larger),
        `value_error_sum` and `value_error_square_sum` (of returns - values), `return_sum`, `return_square_sum`.
        `reduce_metrics` makes means and `explained_variance` of them.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    value = _Value(values, old_values, returns, clip, huber_delta, "clip")
    return _loss(None, value, 1.0, mask, denominator, backend)


def _torch_value(inputs: _Value, mask: Tensor | None, count: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    dtype, clip, huber_delta = accumulate_dtype(inputs.values.dtype), inputs.clip, inputs.huber_delta
    value = _token(inputs.values, dtype, mask)
    target = _token(inputs.returns, dtype, mask).detach()
    per_token = _penalty(value - target, huber_delta)
    was_clipped = torch.zeros_like(value, dtype=torch.bool)
    if clip is not None:
        assert inputs.old_values is not None
        old = _token(inputs.old_values, dtype, mask).detach()
        clipped = _penalty(old + (value - old).clamp(-clip, clip) - target, huber_delta)
        was_clipped = clipped > per_token
        per_token = torch.maximum(per_token, clipped)
    error = target - value
    metrics = {
        "value_count": _number(value, mask),
        "value_loss_sum": _sum(per_token, mask),
        "value_clip_fraction_sum": _sum(was_clipped, mask),
        "value_error_sum": _sum(error, mask),
        "value_error_square_sum": _sum(error.double().square(), mask),
        "return_sum": _sum(target, mask),
        "return_square_sum": _sum(target.double().square(), mask),
    }
    return _mean(per_token, mask, count), metrics


def ppo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    value_coef: float = 1.0,
    value_clip: float | None = 0.2,
    huber_delta: float | None = None,
    denominator: float | Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_policy_loss` + value_coef * `ppo_value_loss` of the same actions: on a GPU in the same launch.

    Args:
        value_coef: any number. value_clip: `clip` of `ppo_value_loss`. All others: as there; one shape and one mask.

    Returns:
        (loss, metrics): differentiable in `logprob`, `entropy` and `values`; the metrics of both.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    settings = _PolicySettings(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    policy = _Policy(logprob, old_logprob, advantages, entropy, ref_logprob, settings)
    value = _Value(values, old_values, returns, value_clip, huber_delta, "value_clip")
    return _loss(policy, value, value_coef, mask, denominator, backend)


def reduce_metrics(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of a batch from those of its micro-batches: means over actions, maxima, and `explained_variance`.

    Args:
        parts: dictionaries from `ppo_policy_loss`, from `ppo_value_loss`, or both merged, all with the same keys; at
            least one.

    Returns:
        0-d float64 tensors. From the policy: count, ratio, ratio_max, clip_fraction, approx_kl, policy_loss, and
        entropy and kl_ref where they were given. From the value: value_count, value_loss, value_clip_fraction,
        value_error, value_error_square, return, return_square, explained_variance = 1 - Var(returns - values) /
        Var(returns) (NaN where the returns do not vary). Means over no action are 0.
    """
    if not parts:
        raise ValueError("parts must hold the metrics of at least one micro-batch, got none")
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    total = {name: value.max() if name.endswith("_max") else value.sum() for name, value in stacked.items()}
    reduced: dict[str, Tensor] = {}
    for name, value in total.items():
        if name.endswith("_sum"):
            of_value = name.startswith(("value_", "return_"))
            reduced[name.removesuffix("_sum")] = value / total["value_count" if of_value else "count"].clamp(min=1)
        else:
            reduced[name] = value
    if "return" in reduced:
        variance = reduced["return_square"] - reduced["return"].square()
        residual = reduced["value_error_square"] - reduced["value_error"].square()
        # Below rounding of the two sums the variance is noise: a batch of equal returns has none.
        varies = variance > 1e-12 * reduced["return_square"]
        reduced["explained_variance"] = torch.where(varies, 1 - residual / variance, torch.nan)
    return reduced
