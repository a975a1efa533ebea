"""What of the sampler's ways is known beforehand, for whoever counts its memory: the pages of its cache, and from how many new
tokens on it does more than step by step."""

from __future__ import annotations

from typing import Any

import torch

from fastppo.errors import UserError
from fastppo_kernels import chosen_decode_backend

# Places of a page. Attention looks up each key's page by itself, so that small ones cost it nothing; of each sample's pages
# half a page is wasted on average at the end, and half a page copied at the beginning. 8 heads of 128 are 16 KiB.
PAGE = 8

# New tokens from which on steps are made CUDA graphs: making one runs the step twice, and the end of a batch needs several. A
# guess.
GRAPHS_FROM = 32
FOLD_FROM = 8  # new tokens, from which on adapters become part of copies of the weights, where that can be


def in_pages(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether keys and values lie in pages there: only Triton's kernels read them where they lie.

    Raises:
        UserError: FASTPPO_KERNELS asks for what cannot run there.
    """
    try:
        return device.type == "cuda" and chosen_decode_backend(device, dtype, head_dim) == "triton"
    except ValueError as error:
        raise UserError(str(error)) from error


def head_dim_of(config: Any, hidden: int) -> int:
    """Of a decoder's keys. Code of its own may know other names than its configuration's: then it is a guess."""
    return getattr(config, "head_dim", None) or hidden // (getattr(config, "num_attention_heads", None) or 1)


def pages_of(slots: int, samples: int, longest: int, new: int) -> int:
    """Pages for ``slots`` sequences, ``samples`` of each prompt, whose prompts have up to ``longest`` tokens of their own and
    answers ``new``; and one that is nobody's."""
    together, alone = longest // PAGE, -(-(min(longest, PAGE - 1) + new) // PAGE)
    return 1 + slots * alone + -(-slots // samples) * together
