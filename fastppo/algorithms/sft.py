"""Supervised fine-tuning on answers: cross-entropy of the answer's tokens and end token, prompts carry no loss."""

from __future__ import annotations

from functools import partial

import torch

from fastppo.batch.rollout import MiniBatch, pack
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.out_of_memory import shrink_micro_batch, with_less_memory


def sft_step(
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    config: Config,
    prompts: list[list[int]],
    answers: list[list[int]],
) -> dict[str, float]:
    """One optimizer step on prompts and their answers (token ids). The loss is the mean over answer tokens.

    Raises:
        UserError: the loss or its gradient is not finite.

    Returns:
        loss (nats per token), grad_norm, tokens_tree and tokens_padded.
    """
    mini = MiniBatch([])

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        mini.parts = pack(
            prompts,
            list(enumerate(answers)),
            budget=model.micro_batch_tokens,
            padded=not model.backbone.packed,
            device=model.device,
        )
        optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=model.device)
        for part in mini.parts:
            logprob, _ = model.policy_logprob(part.tree, temperature=1.0)
            loss = -logprob.sum() / mini.n_actions
            loss.backward()
            loss_sum += loss.detach()
        return loss_sum, torch.nn.utils.clip_grad_norm_(model.trainable(), config.ppo.max_grad_norm)

    loss_sum, norm = with_less_memory(model, "fine-tuning", gradients, partial(shrink_micro_batch, model, [mini]))
    if not torch.isfinite(loss_sum + norm):
        raise UserError("the loss is no longer finite: supervised fine-tuning has diverged; lower --sft-lr")
    optimizer.step()
    return {
        "loss": float(loss_sum),
        "grad_norm": float(norm),
        "tokens_tree": sum(part.tree.n_tokens for part in mini.parts),
        "tokens_padded": sum(part.tree.padded_tokens for part in mini.parts),
    }
