"""Ops on numbers per token: PPO's losses, advantages."""

from __future__ import annotations

import torch

from bench.gpu_checks.case import randint, randn
from fastppo_kernels import gae, ppo_loss, whiten

from ..limits import copy
from .op import OURS, Inputs, Op, Results, by_device, parameter

_CLIP, _VALUE_CLIP, _ENTROPY, _KL, _VALUE = 0.2, 0.2, 0.01, 0.05, 0.5
_GAMMA, _LAMBDA = 0.99, 0.95


def _tokens(device: torch.device, dtype: torch.dtype, *, count: int) -> Inputs:
    """float32 whatever the model's dtype: log-probs and values are."""
    scales = {"old": 0.3, "advantages": 1.0, "reference": 0.3, "old_values": 1.0, "returns": 1.0}
    trained = {"logprob": 0.3, "entropy": 1.0, "values": 1.0}
    return {
        **{name: randn(device, 1 + i, count, scale=scale) for i, (name, scale) in enumerate(scales.items())},
        **{name: parameter(randn(device, 11 + i, count, scale=scale)) for i, (name, scale) in enumerate(trained.items())},
        "mask": randint(device, 21, 5, count) > 0,
    }


def _ppo_loss(inputs: Inputs) -> Results:
    loss, metrics = ppo_loss(
        inputs["logprob"], inputs["old"], inputs["advantages"], inputs["values"], inputs["old_values"], inputs["returns"],
        mask=inputs["mask"], clip_low=_CLIP, clip_high=_CLIP, entropy=inputs["entropy"], entropy_coef=_ENTROPY,
        ref_logprob=inputs["reference"], kl_coef=_KL, value_coef=_VALUE, value_clip=_VALUE_CLIP,
    )  # fmt: skip
    return {"loss": loss, "clipped": metrics["clip_fraction_sum"], "kl": metrics["approx_kl_sum"]}


def _plain_ppo_loss(inputs: Inputs) -> Results:
    mask = inputs["mask"].float()
    count = mask.sum()
    log_ratio, log_reference = inputs["logprob"] - inputs["old"], inputs["reference"] - inputs["logprob"]
    ratio, advantages = log_ratio.exp(), inputs["advantages"]
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - _CLIP, 1 + _CLIP)
    policy = torch.max(unclipped, clipped) - _ENTROPY * inputs["entropy"] + _KL * (log_reference.exp() - log_reference - 1)
    values, old, returns = inputs["values"], inputs["old_values"], inputs["returns"]
    near = torch.max(torch.min(values, old + _VALUE_CLIP), old - _VALUE_CLIP)
    value = 0.5 * torch.max((values - returns).square(), (near - returns).square())
    with torch.no_grad():
        metrics = {"clipped": ((clipped > unclipped) * mask).sum(), "kl": ((ratio - 1 - log_ratio) * mask).sum()}
    return {"loss": ((policy + _VALUE * value) * mask).sum() / count} | metrics


def _episodes(device: torch.device, dtype: torch.dtype, *, rows: int, steps: int) -> Inputs:
    return {"rewards": randn(device, 1, rows, steps), "values": randn(device, 2, rows, steps)}


def _gae(inputs: Inputs) -> Results:
    advantages, returns, sums = gae(inputs["rewards"], inputs["values"], gamma=_GAMMA, lam=_LAMBDA, with_sums=True)
    return {"advantages": whiten(advantages, sums=sums), "returns": returns}


def _plain_gae(inputs: Inputs) -> Results:
    """The loop over time of TRL's PPO, and its whitening."""
    rewards, values = inputs["rewards"], inputs["values"]
    steps, last, found = rewards.shape[1], 0.0, []
    for t in reversed(range(steps)):
        following = values[:, t + 1] if t + 1 < steps else 0.0
        last = rewards[:, t] + _GAMMA * following - values[:, t] + _GAMMA * _LAMBDA * last
        found.append(last)
    advantages = torch.stack(found[::-1], dim=1)
    white = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
    return {"advantages": white, "returns": advantages + values}


def ops() -> list[Op]:
    return [
        Op(
            "ppo_loss (policy and value)",
            "losses",
            by_device(_tokens, {"T4096": {"count": 4096}}, {"T8192": {"count": 8192}, "T65536": {"count": 65536}}),
            {OURS: _ppo_loss, "torch": _plain_ppo_loss},
            # 8 numbers and the mask are read, 3 gradients are written.
            lambda inputs, direction: copy(inputs["mask"].numel() * (11 * 4 + 1), inputs["mask"].device),
            "one read of every input, one write of every gradient (a copy of as many bytes)",
            directions=("fwd+bwd",),
            compiled_on_cpu=True,
        ),
        Op(
            "gae and whiten",
            "losses",
            by_device(_episodes, {"B32 T128": {"rows": 32, "steps": 128}}, {"B512 T4096": {"rows": 512, "steps": 4096}}),
            {OURS: _gae, "torch": _plain_gae},
            # Rewards and values in, advantages and returns out; the advantages in and out again for whitening.
            lambda inputs, direction: copy(inputs["rewards"].numel() * 6 * 4, inputs["rewards"].device),
            "one read or write of everything that goes in and out, twice of the advantages (a copy of as many bytes)",
            directions=("fwd",),
            compiled=False,
        ),
    ]
