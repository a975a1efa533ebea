"""Models of given dimensions with random weights: what they compute is meaningless, how long they take is not.

No files and no network: the weights are drawn on the device, the tokenizer is one token a byte.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import Base

# The dimensions of Qwen2.5 0.5B, 1.5B and 7B, and those of a model that two CPU cores train in seconds.
_DIMENSIONS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=352,
                 vocab_size=2048, tie_word_embeddings=True, initializer_range=0.05),
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                 vocab_size=151936, tie_word_embeddings=True),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
                 vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
               vocab_size=152064, tie_word_embeddings=False),
}  # fmt: skip
NAMES = tuple(_DIMENSIONS)
PAD, EOS = 0, 1  # ids of the tokenizer's two special tokens; the bytes follow


def config_of(name: str) -> Qwen2Config:
    """The configuration of the model of that name (one of `NAMES`)."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2Config(
        **_DIMENSIONS[name], max_position_embeddings=32768, rope_parameters=rope, rms_norm_eps=1e-6,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip


def random_model(name: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Qwen2ForCausalLM:
    """The model with weights that depend on the seed (and the kind of device), drawn on the device: there is no host copy."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return Qwen2ForCausalLM._from_config(config_of(name), dtype=dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte. Ids beyond its 258 are no text: they decode to nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    made = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def random_base(name: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Base:
    """As `fastppo.model.load.load_base` gives it: frozen, in evaluation mode, on its device."""
    device = torch.device(device)
    model = random_model(name, device, dtype, seed)
    model.requires_grad_(False)
    model.eval()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels launch on the current device
    return Base(model, tokenizer(), (EOS,), f"random {name}")


def keep_micro_batch(model: ActorCritic) -> ActorCritic:
    """Out of memory is a result here, and not answered with a smaller micro-batch, as it is in training."""

    def refuse(notice: str) -> None:
        raise torch.OutOfMemoryError(notice)

    model.notify = refuse
    return model
