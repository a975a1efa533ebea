"""PPO: from a sampled rollout to advantages, and from advantages to an updated policy and critic.

Clipped surrogate and value losses of Schulman et al. 2017 (arXiv 1707.06347), generalised advantages of Schulman et al. 2016
(arXiv 1506.02438), the KL penalty of Ziegler et al. 2019 (arXiv 1909.08593).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fastppo.batch.rollout import MicroBatch, MiniBatch, Rollout
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.out_of_memory import shrink_micro_batch, with_less_memory
from fastppo_kernels import gae, linear_ppo_loss, ppo_value_loss, reduce_metrics, whiten

KL_HORIZON = 10_000  # samples over which the KL weight adapts: Ziegler et al. 2019's, and N+'s


class Estimates(NamedTuple):
    """kl: mean over samples of the summed log-ratio to the reference, in nats (None where no reference is needed).
    sampler_gap: largest |sampler log-prob - trainer log-prob| over all sampled tokens, in nats."""

    kl: float | None
    sampler_gap: float


def needs_reference(config: Config) -> bool:
    return config.ppo.kl_coef > 0


def _kl_in_loss(config: Config) -> bool:
    return config.ppo.kl_estimator != "k1" and needs_reference(config)


def _settings(config: Config, kl_coef: float) -> Hashable:
    """All numbers that a loss computes with: a graph of it keeps them."""
    return config, kl_coef if _kl_in_loss(config) else 0.0


@torch.no_grad()
def estimate(
    model: ActorCritic,
    minibatches: list[MiniBatch],
    rollout: Rollout,
    rewards: list[float],
    kl_coef: float,
    config: Config,
    *,
    before_update: bool = False,
) -> Estimates:
    """Fill every micro-batch with old log-probs, old values, reference log-probs, advantages and returns.

    Args:
        rewards: one for each sample; it goes to the sample's last token. With ``kl_estimator="k1"`` every token's reward is
            lowered by ``kl_coef * (log-prob - reference log-prob)``.
        before_update: ``update`` follows on the same weights, so the first mini-batch, where one forward holds it, keeps what
            backward needs, and the first step has no forward to do (unless a CUDA graph does the whole of it).
    """
    for mini in minibatches:
        _fit(model, mini)
        for part in mini.parts:
            part.states = None  # of an attempt before this one
            if model.graphs is not None:  # as the update will: the same shapes, the same bits
                part.pad()
    *parts, last = [part for mini in reversed(minibatches) for part in mini.parts]
    replays = model.graphs is not None and model.graphs.replays(last, _settings(config, kl_coef))
    kept = last if before_update and len(minibatches[0].parts) == 1 and not replays else None
    parts.append(last)
    # One copy to the device for all parts, and nothing comes back before the end: the host runs ahead.
    order = [rollout.samples[i] for part in parts for i in part.samples]
    sampled_logprobs = torch.tensor([x for sample in order for x in sample.logprobs], device=model.device)
    final_rewards = torch.tensor([rewards[i] for part in parts for i in part.samples], device=model.device)
    kl_sums, gaps, sums = [], [], []
    for part, sampled, part_rewards in zip(
        parts,
        sampled_logprobs.split([part.tree.n_actions for part in parts]),
        final_rewards.split([len(part.samples) for part in parts]),
        strict=True,
    ):
        tree, actions = part.computed, part.tree.n_actions  # behind these is padding
        with torch.set_grad_enabled(part is kept):
            states = model.states(tree)
        if part is kept:
            part.states = states
        scores = model.scores(*states, tree, temperature=config.sample.temperature)
        logprob, values = scores.logprob[:actions], scores.values[:actions]
        gaps.append((sampled - logprob).abs().max())
        part.known = {
            "old_logprob": logprob if config.ppo.old_logprobs == "trainer" else sampled,
            "old_values": values,
        }
        token_rewards = torch.zeros_like(logprob)
        ends = part.tree.cu_actions[1:].long() - 1
        token_rewards[ends] = part_rewards
        if needs_reference(config):
            reference = model.reference_logprob(tree, temperature=config.sample.temperature)[:actions]
            log_ratio = logprob - reference
            kl_sums.append(log_ratio.sum())
            part.known["ref_logprob"] = reference
            if config.ppo.kl_estimator == "k1":
                token_rewards -= kl_coef * log_ratio
        part.known["advantages"], part.known["returns"], part_sums = gae(
            token_rewards, values, part.tree.cu_actions, gamma=config.ppo.gamma, lam=config.ppo.lam, with_sums=True
        )
        sums.append(part_sums)
    if config.ppo.whiten:  # over the whole batch, not a mini-batch: its mean is the baseline of all
        for part in parts:
            part.known["advantages"] = whiten(part.known["advantages"], sums=torch.cat(sums))
    for part in parts:
        part.pad_known()
    gap = float(torch.stack(gaps).max())
    if not math.isfinite(gap):
        raise UserError("log-probabilities are no longer finite: the policy has diverged; lower --ppo-lr")
    kl = float(torch.stack(kl_sums).double().sum()) / len(rollout.samples) if kl_sums else None
    return Estimates(kl, gap)


def _fit(model: ActorCritic, mini: MiniBatch) -> None:
    """Cut the micro-batches to what they may have now, where memory ran out since they were packed or before."""
    if model.most_tokens is not None:
        pieces = [part.cut(model.micro_batch_tokens, padded=not model.backbone.packed) for part in mini.parts]
        mini.parts = [piece for several in pieces for piece in several]


def update(
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    minibatches: list[MiniBatch],
    kl_coef: float,
    config: Config,
    rng: np.random.Generator,
    *,
    critic_only: bool,
) -> dict[str, float]:
    """Epochs over the mini-batches, an optimizer step each; the first epoch takes them as they stand (they are random already).

    Returns:
        Means over all actions seen (see ``reduce_metrics``), ``grad_norm`` (mean, before clipping), ``steps`` taken, and
        ``first_log_ratio``: the largest |log-prob - old log-prob| at the first step, before anything was changed.
    """
    seen, norms, first_log_ratio = [], [], None
    for epoch in range(config.ppo.epochs):
        for m in rng.permutation(len(minibatches)).tolist() if epoch else range(len(minibatches)):
            mini = minibatches[m]
            metrics, norm = with_less_memory(
                model,
                "updating",
                partial(_gradients, model, optimizer, mini, kl_coef, config, critic_only),
                partial(shrink_micro_batch, model, [mini]),
            )
            optimizer.step()
            norms.append(norm)
            seen += metrics
            if first_log_ratio is None and not critic_only:
                first_log_ratio = torch.stack([x["log_ratio_max"] for x in metrics]).max()
            if config.ppo.target_kl is not None and not critic_only:
                if float(reduce_metrics(metrics)["approx_kl"]) > config.ppo.target_kl:
                    return _reduced(seen, norms, first_log_ratio)
    return _reduced(seen, norms, first_log_ratio)


def _gradients(
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    mini: MiniBatch,
    kl_coef: float,
    config: Config,
    critic_only: bool,
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Add up the gradient of a mini-batch and clip it: metrics of each micro-batch, as sums, and the norm before clipping."""
    _fit(model, mini)
    optimizer.zero_grad(set_to_none=True)
    parameters = model.trainable(critic_only=critic_only)
    graphs = None if critic_only else model.graphs
    if graphs is not None:
        graphs.begin(parameters)

    def loss_of(part: MicroBatch, n_actions: float | torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return micro_batch_loss(model, part, n_actions, kl_coef, config, critic_only)

    metrics = []
    for part in mini.parts:
        found = None
        if graphs is not None:
            found = graphs.add_gradients(part, mini.n_actions, loss_of, parameters, _settings(config, kl_coef))
        if found is None:
            loss, found = loss_of(part, mini.n_actions)
            loss.backward()
        metrics.append(found)
    return metrics, torch.nn.utils.clip_grad_norm_(parameters, config.ppo.max_grad_norm)


def micro_batch_loss(
    model: ActorCritic, part: MicroBatch, n_actions: float | torch.Tensor, kl_coef: float, config: Config, critic_only: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The micro-batch's share of its mini-batch's loss, whose gradients add up to the mini-batch's, and its metrics as sums.

    Args:
        part: with what `estimate` knows of its actions; its ``states``, where there are any, are used up.
        n_actions: of the whole mini-batch, by which the sums over this one's actions are divided.
        kl_coef: weight of the KL divergence, where that is in the loss.
        critic_only: the value loss alone.

    Returns:
        (loss, metrics): 0-d float32, differentiable in the adapters and the value head; 0-d float64 sums and maxima over the
        actions, as of `ppo_loss`.
    """
    tree, mask, known, head = part.computed, part.mask, part.known, model.backbone.head
    if critic_only:
        value_loss, metrics = ppo_value_loss(
            model.values(tree), known["old_values"], known["returns"], mask=mask, clip=config.value.clip,
            denominator=n_actions,
        )  # fmt: skip
        return value_loss, metrics
    policy_RH, critic_RH = part.states or model.states(tree)
    part.states = None
    in_loss = _kl_in_loss(config)
    policy_loss, metrics, logprob, _ = linear_ppo_loss(
        policy_RH, head.weight, tree.action_targets, known["old_logprob"], known["advantages"],
        rows_A=tree.action_rows, mask=mask, bias=head.bias, temperature=config.sample.temperature, softcap=head.softcap,
        logit_scale=head.scale, clip_low=config.ppo.clip, clip_high=config.ppo.clip, entropy_coef=config.ppo.entropy_coef,
        ref_logprob=known["ref_logprob"] if in_loss else None, kl_coef=kl_coef if in_loss else 0.0,
        kl_estimator="k2" if config.ppo.kl_estimator == "k2" else "k3", denominator=n_actions,
    )  # fmt: skip
    value_loss, value_metrics = ppo_value_loss(
        model.action_values(critic_RH, tree), known["old_values"], known["returns"], mask=mask, clip=config.value.clip,
        denominator=n_actions,
    )  # fmt: skip
    metrics |= value_metrics
    log_ratio = logprob - known["old_logprob"]
    metrics["log_ratio_max"] = (log_ratio if mask is None else log_ratio.where(mask, 0.0)).abs().max().double()
    return policy_loss + config.value.coef * value_loss, metrics


def _reduced(
    seen: list[dict[str, torch.Tensor]], norms: list[torch.Tensor], first_log_ratio: torch.Tensor | None
) -> dict[str, float]:
    reduced = reduce_metrics(seen)
    names = [
        n for n in reduced if n not in ("count", "value_count", "value_error", "value_error_square", "return_square")
    ]
    values = torch.stack([reduced[n] for n in names] + [torch.stack(norms).mean().double()]).tolist()
    result = dict(zip([*names, "grad_norm"], values, strict=True))
    result["steps"] = len(norms)
    if first_log_ratio is not None:
        result["first_log_ratio"] = float(first_log_ratio)
    return result


def adapt_kl_coef(kl_coef: float, kl: float, samples: int, config: Config) -> float:
    """The controller of Ziegler et al. 2019, section 2.2: a bounded proportional step towards ``kl_target``."""
    if config.ppo.kl_target is None:
        return kl_coef
    error = min(max(kl / config.ppo.kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * samples / KL_HORIZON)
