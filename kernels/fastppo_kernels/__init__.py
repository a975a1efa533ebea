"""Drop-in operations for PPO and LoRA: import this package alone, with torch.

Every operation has a readable torch implementation that runs on any device, the definition of what it computes; those with a
``backend`` argument also have Triton kernels, which CUDA tensors get by default.
"""

from ._dispatch import chosen_kernel_backend, kernel_backends
from ._measure import measurements
from .attention import (
    TreeLayout,
    attention,
    attention_backends,
    chosen_attention_backend,
    chosen_decode_backend,
    decode_attention,
    tree_attention,
)
from .attention_memory import AttentionMemory, attention_memory
from .decoder_layer import DecoderWeights, decoder_layer
from .frozen_linear import frozen_linear, row_multiple
from .gae import gae, whiten
from .kl import KLEstimator, sampled_kl
from .linear_logprob import linear_logprob
from .linear_ppo_loss import linear_ppo_loss
from .lora_buffer import LoRAWeightBuffer
from .lora_gemm import NF4Weight, lora_gemm
from .lora_linear import LoRAProjection, fold_lora, lora_linear, lora_linear_group
from .patch_peft import adapter_mask, patch_peft, unpatch_peft
from .ppo_loss import ppo_loss, ppo_policy_loss, ppo_value_loss, reduce_metrics
from .rms_norm import rms_norm, rms_norm_lora
from .rope import rope
from .sample import linear_sample, sample
from .swiglu import swiglu, swiglu_backward_lora, swiglu_lora
from .token_logprob import selective_log_softmax, token_logprob

# Also part of what measurements are kept under, see `_measure`.
__version__ = "0.1.0"

__all__ = [
    "AttentionMemory",
    "DecoderWeights",
    "KLEstimator",
    "LoRAProjection",
    "LoRAWeightBuffer",
    "NF4Weight",
    "TreeLayout",
    "adapter_mask",
    "attention",
    "attention_backends",
    "attention_memory",
    "chosen_attention_backend",
    "chosen_decode_backend",
    "chosen_kernel_backend",
    "decode_attention",
    "decoder_layer",
    "fold_lora",
    "frozen_linear",
    "gae",
    "kernel_backends",
    "linear_logprob",
    "linear_ppo_loss",
    "linear_sample",
    "lora_gemm",
    "lora_linear",
    "lora_linear_group",
    "measurements",
    "patch_peft",
    "ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reduce_metrics",
    "rms_norm",
    "rms_norm_lora",
    "rope",
    "row_multiple",
    "sample",
    "sampled_kl",
    "selective_log_softmax",
    "swiglu",
    "swiglu_backward_lora",
    "swiglu_lora",
    "token_logprob",
    "tree_attention",
    "unpatch_peft",
    "whiten",
]
