"""Drop-in operations for PPO and LoRA: import this package alone, with torch.

Every operation has a readable torch implementation that runs on any device, the definition of what it computes; those with a
``backend`` argument also have Triton kernels, which CUDA tensors get by default.
"""

from .attention import TreeLayout, attention, decode_attention
from .gae import gae, whiten
from .kl import KLEstimator, sampled_kl
from .linear_logprob import linear_logprob
from .linear_ppo_loss import linear_ppo_loss
from .ppo_loss import ppo_loss, ppo_policy_loss, ppo_value_loss, reduce_metrics
from .sample import sample
from .token_logprob import token_logprob

__all__ = [
    "KLEstimator",
    "TreeLayout",
    "attention",
    "decode_attention",
    "gae",
    "linear_logprob",
    "linear_ppo_loss",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reduce_metrics",
    "sample",
    "sampled_kl",
    "token_logprob",
    "whiten",
]
