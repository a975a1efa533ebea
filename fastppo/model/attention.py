"""The bridge from transformers' attention interface to the packed tree and to the sampler's cache.

A model whose attention implementation is ``fastppo`` is called with ``fastppo_context=...``; transformers hands the keyword
through to every attention layer, and the context decides what the layer's queries attend to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from fastppo_kernels.attention import TreeLayout, decode_attention, tree_attention

NAME = "fastppo"


@contextmanager
def in_any_order(device: torch.device) -> Iterator[None]:
    """Where torch is to be deterministic it sorts places on a GPU before it writes to them, with many launches: not in here."""
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    # The function under `torch.use_deterministic_algorithms`, which also writes to Inductor's settings.
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(True, warn_only=warn_only)


class AttentionContext(Protocol):
    calls: int  # how many layers have come here, those that are refused too
    folded: dict[Any, Any] | None  # where `LlamaTrunk` may keep weights with their adapters in them, for calls to come

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [T, H, D], k and v [T, Hkv, D] of this call's tokens -> [T, H, D]."""


class TreeContext:
    """Attention over a packed tree; optionally after a prefix computed before, optionally keeping keys and values.

    Args:
        layout: the tree's.
        past: per layer (k, v), each [layout.past, Hkv, D].
        keep: store each layer's (k, v) of this call's tokens in ``kept``.
    """

    def __init__(self, layout: TreeLayout, past: list[tuple[Tensor, Tensor]] | None = None, keep: bool = False):
        self.layout, self.past, self.keep = layout, past, keep
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls = 0
        self.folded: dict[Any, Any] | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self.keep:
            self.kept[layer] = (k, v)
        if self.past is not None:
            k, v = (torch.cat([old, new]) for old, new in zip(self.past[layer], (k, v), strict=True))
        return tree_attention(q, k, v, self.layout, **options)


class DecodeContext:
    """One new token for each of ``n`` sequences with a cache.

    Args:
        root: per layer (k, v) [C, Hkv, D], the prefix that all share.
        own: per layer (k, v) [slots, Hkv, L, D], the first n slots of which are the sequences', or with ``pages``
            [P, Hkv, S, D]; written here at each sequence's place ``lengths - 1``.
        lengths: [n] int64, own tokens of each sequence, the new one included. longest: their maximum.
        folded: see ``AttentionContext``.
        pages: [n, N] int32, the pages of each sequence, see ``decode_attention``.
    """

    def __init__(
        self,
        root: list[tuple[Tensor, Tensor]],
        own: list[tuple[Tensor, Tensor]],
        lengths: Tensor,
        longest: int,
        folded: dict[Any, Any] | None = None,
        pages: Tensor | None = None,
    ):
        self.root, self.own, self.lengths, self.longest, self.pages = root, own, lengths, longest, pages
        self.rows: dict[int, Tensor] = {}  # by key heads: of the newest keys, the cache's first three dimensions as one
        self.calls = 0
        self.folded = folded

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        k_own, v_own = self.own[layer]
        n, heads = k.shape[:2]
        if heads not in self.rows:
            self.rows[heads] = self._newest(n, heads, k_own.shape[2]).flatten()
        with in_any_order(k.device):  # to places of which no two are one, but for those that are nobody's
            for cache, new in ((k_own, k), (v_own, v)):
                cache.view(-1, new.shape[2]).index_copy_(0, self.rows[heads], new.flatten(0, 1))
        if self.pages is None:
            k_own, v_own = k_own[:n, :, : self.longest], v_own[:n, :, : self.longest]
        return decode_attention(q, *self.root[layer], k_own, v_own, self.lengths, pages=self.pages, **options)

    def _newest(self, n: int, heads: int, places: int) -> Tensor:
        """[n, heads]: where the newest keys lie. places: of a slot or page."""
        last = self.lengths[:, None] - 1
        if self.pages is None:
            return torch.arange(n * heads, device=last.device).view(n, heads) * places + last
        line = self.pages.gather(1, last // places).long() * heads + torch.arange(heads, device=last.device)
        return line * places + last % places


def _interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastppo_context: AttentionContext | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, H, T, D] -> [1, T, H, D]."""
    if fastppo_context is None:
        raise RuntimeError(
            "the attention implementation 'fastppo' needs fastppo_context: call the model through fastppo"
        )
    fastppo_context.calls += 1
    if s_aux is not None:
        raise ValueError("attention sinks are not supported on the packed path")
    if dropout:
        raise ValueError(f"attention dropout must be 0 on the packed path, got {dropout}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = fastppo_context.attend(layer, q, k, v, scale=scaling, window=sliding_window, softcap=softcap)
    return out[None], None


AttentionInterface.register(NAME, _interface)
