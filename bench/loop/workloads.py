"""The three workloads of the whole-loop comparison, their prompts, and the toy rule that both engines must learn.

The models have random weights, so a prompt is random token ids; what matters is how long it is and how much of it is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import config as config_module
from fastppo.config import Config


@dataclass(frozen=True)
class Workload:
    """One shape of PPO iteration.

    template: tokens that all prompts begin with (the rule is not learned without: a LoRA of random weights then has nothing
    constant to shift the hidden states by). own: shortest and longest rest of a prompt, uniform. response: new tokens of every
    sample (nothing ends early). judged: how many of them, the last ones, the toy rule looks at, as an answer stands at the end:
    with lambda at 0.95 no credit reaches the first of 256. prompts, samples: of an iteration, and of each prompt. iterations:
    for the comparison. kl_coef: weight of the KL to the base, a sum over a sample's tokens, beside a reward of at most 1 a
    sample: so that the rule is worth learning.
    """

    name: str
    what: str
    template: int
    own: tuple[int, int]
    response: int
    judged: int
    prompts: int
    samples: int
    iterations: int
    kl_coef: float

    @property
    def batch(self) -> int:
        """Samples of an iteration."""
        return self.prompts * self.samples


WORKLOADS = {
    w.name: w
    for w in (
        Workload("cola", "80-token instruction, a short sentence, 4 new tokens",
                 80, (8, 24), 4, 4, 64, 1, 20, 0.05),
        Workload("few-shot", "200-token instruction with examples, a short sentence, 4 new tokens",
                 200, (8, 24), 4, 4, 64, 1, 20, 0.05),
        Workload("gsm8k", "100-token prompts, 20 of them an instruction, 4 samples each, 256 new tokens",
                 20, (60, 100), 256, 8, 16, 4, 24, 0.0005),
    )
}  # fmt: skip
LR = 1e-3
EPOCHS = 4
RANK, ALPHA = 16, 32


def prompts_of(workload: Workload, vocab: int, iterations: int, seed: int = 0) -> list[list[list[int]]]:
    """Token ids of the prompts of each iteration."""
    rng = np.random.default_rng([seed, 1])
    template = rng.integers(vocab, size=workload.template).tolist()

    def prompt() -> list[int]:
        return template + rng.integers(vocab, size=rng.integers(workload.own[0], workload.own[1] + 1)).tolist()

    return [[prompt() for _ in range(workload.prompts)] for _ in range(iterations)]


def good_tokens(model: PreTrainedModel) -> Tensor:
    """[V] float32 of zeros and ones, about half of each: the tokens that the toy rule rewards, those whose row of the frozen
    head has a positive first coordinate. LoRA can learn that; a random half of the ids it could not, for behind a frozen random
    head the mean gap between their logits is about zero. A sample's reward is the share of such tokens among those judged."""
    return (model.get_output_embeddings().weight.detach()[:, 0] > 0).float()


def engine_config(
    workload: Workload, iterations: int, device: str, dtype: torch.dtype, others: Mapping[str, str] | None = None
) -> Config:
    """Our settings (and ``others``) where TRL's PPO has its own: one optimizer step an epoch (what TRL takes whatever its
    mini-batches), no warm-up, linear decay, Adam's usual epsilon, no clipping of the gradient, KL to the bare base."""
    values = {
        "seed": 0, "device": device, "dtype": str(dtype).removeprefix("torch."),
        "lora.rank": RANK, "lora.alpha": ALPHA, "value.coef": 0.1, "value.clip": 0.2,
        "ppo.iterations": iterations, "ppo.prompts": workload.prompts, "ppo.samples": workload.samples, "ppo.epochs": EPOCHS,
        "ppo.minibatches": 1, "ppo.lr": LR, "ppo.schedule": "linear", "ppo.warmup": 0, "ppo.kl_coef": workload.kl_coef,
        "ppo.kl_estimator": "k1", "ppo.clip": 0.2, "ppo.gamma": 1.0, "ppo.lam": 0.95, "ppo.adam_eps": 1e-8,
        "ppo.max_grad_norm": 1e9, "ppo.reference": "base", "sample.max_new_tokens": workload.response,
        "sample.temperature": 1.0,
    }  # fmt: skip
    return config_module.load_config({key: str(value) for key, value in values.items()} | dict(others or {}))
