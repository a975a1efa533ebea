"""Every measured op of `fastppo_kernels`: what it is, what it is held against, and how it is measured."""

from __future__ import annotations

import torch

from .op import Entry, Op, entries_of


def ops() -> list[Op]:
    """What matters most first."""
    from . import attention, heads, layers, lora, losses

    found = {op.name: op for module in (heads, lora, attention, losses, layers) for op in module.ops()}
    first = [
        "linear_ppo_loss", "lora layer (7 linears)", "linear_logprob", "lora_gemm, decoding (7 linears)", "decode_attention",
        "token_logprob", "tree_attention", "decoder layer (patch_peft)",
    ]  # fmt: skip
    return [found.pop(name) for name in first] + list(found.values())


def entries(device: torch.device) -> list[Entry]:
    """Every op in every size and direction, in the order in which they are measured."""
    return [entry for op in ops() for entry in entries_of(op, device)]


__all__ = ["Entry", "Op", "entries", "ops"]
