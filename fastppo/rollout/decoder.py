"""What the sampler needs of a model: admit prompts, advance every running sequence by one token, let finished ones go.

``PackedDecoder`` computes the prefix of all prompts once, prefills the rest as a tree and keeps a key-value cache with one
slot a sequence; ``PaddedDecoder`` does the same with transformers' own cache for models off the packed path.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from fastppo.batch.token_tree import build_tree, common_prefix, cut_by_tokens
from fastppo.model.attention import DecodeContext, TreeContext
from fastppo.model.backbone import Backbone
from fastppo.rollout.step_graphs import StepGraphs, usable


class Decoder(Protocol):
    def room(self) -> int:
        """How many sequences can be admitted now."""

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        """Start ``copies[i]`` sequences from each prompt behind the running ones; hidden state [N, H] of each prompt's end."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """Feed each running sequence its newest token; hidden states [B, H]."""

    def keep(self, running: list[int]) -> list[int]:
        """Let all sequences go but those at these places; returns the old places in their new order."""


FOLD_FROM = 8  # new tokens


class PackedDecoder:
    """Slots of a key-value cache over a shared root.

    Args:
        backbone: a packed one.
        prompts: all prompts that will be admitted (their common prefix is computed here, once).
        slots: sequences at a time. max_new_tokens: longest answer. budget: tokens per prefill call.
    """

    def __init__(self, backbone: Backbone, prompts: list[list[int]], slots: int, max_new_tokens: int, budget: int):
        self.backbone, self.slots, self.budget = backbone, slots, budget
        self.device = backbone.head.weight.device
        # Every prompt keeps at least one token of its own: its last hidden state is what decoding starts from.
        self.root_length = min(common_prefix(prompts), min(len(p) for p in prompts) - 1)
        self.root: list[tuple[Tensor, Tensor]] = []
        if self.root_length:
            self.root = self._prefill([prompts[0][: self.root_length]])[1]
        self.own: list[tuple[Tensor, Tensor]] = []
        self.capacity = max(len(p) for p in prompts) - self.root_length + max_new_tokens
        self.lengths = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.host_lengths: list[int] = []
        # The policy stands still while it samples. In float32 on the CPU its adapters may then become part of copies of the
        # weights: each of many steps has a third of the products to start. Half precision would round away what was learned.
        plain = self.device.type == "cpu" and backbone.head.weight.dtype == torch.float32
        self.folded: dict[Any, Any] | None = {} if plain and max_new_tokens >= FOLD_FROM else None
        self.graphs = StepGraphs(slots, self.capacity, backbone) if usable(backbone, max_new_tokens) else None

    def room(self) -> int:
        return self.slots - len(self.host_lengths)

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        ends = []
        sizes = [len(p) - self.root_length for p in prompts]
        for batch in cut_by_tokens(sizes, 0, self.budget):
            chosen, times = [prompts[i] for i in batch], [copies[i] for i in batch]
            end, kept, tree = self._prefill(chosen, self.root_length)
            ends.append(end)
            self._fill(kept, tree, times)
        return torch.cat(ends)

    def _prefill(self, sequences: list[list[int]], past: int = 0):
        tree = build_tree(sequences, past=past, device=self.device)
        context = TreeContext(tree.layout, self.root if past else None, keep=True)
        hidden = self.backbone.run(tree.token_ids, tree.positions, context, tree.last_rows)
        kept = [context.kept[layer] for layer in sorted(context.kept)]
        return hidden, kept, tree

    def _fill(self, kept: list[tuple[Tensor, Tensor]], tree, copies: list[int]) -> None:
        rows = torch.as_tensor(tree.paths[:, self.root_length :] - self.root_length, device=self.device)
        lengths = (rows >= 0).sum(1)
        times = torch.tensor(copies, device=self.device)
        rows = rows.clamp(min=0).repeat_interleave(times, 0)
        start, stop = len(self.host_lengths), len(self.host_lengths) + rows.shape[0]
        if not self.own:
            self.own = [
                tuple(x.new_zeros(self.slots, x.shape[1], self.capacity, x.shape[2]) for x in layer)  # type: ignore[misc]
                for layer in kept
            ]
        for cache, new in zip(self.own, kept, strict=True):
            for c, x in zip(cache, new, strict=True):
                c[start:stop, :, : rows.shape[1]] = x[rows].transpose(1, 2)
        self.lengths = torch.cat([self.lengths, lengths.repeat_interleave(times)])
        self.host_lengths += [n for n, k in zip(lengths.tolist(), copies, strict=True) for _ in range(k)]

    def step(self, tokens_B: Tensor) -> Tensor:
        self.lengths = self.lengths + 1
        self.host_lengths = [n + 1 for n in self.host_lengths]
        longest = max(self.host_lengths)
        if self.graphs is not None:
            return self.graphs.step(self._run, tokens_B, self.lengths, longest)
        return self._run(tokens_B, self.lengths, longest)

    def _run(self, tokens_B: Tensor, lengths_B: Tensor, longest: int) -> Tensor:
        root = self.root or [(k[0, :, :0].transpose(0, 1), v[0, :, :0].transpose(0, 1)) for k, v in self.own]
        context = DecodeContext(root, self.own, lengths_B, longest, self.folded)
        return self.backbone.run(tokens_B, self.root_length + lengths_B - 1, context)

    def keep(self, running: list[int]) -> list[int]:
        n = len(running)
        # Only sequences beyond the new end move, each into a freed place: no other cache line is copied.
        movers = [place for place in running if place >= n]
        holes = sorted(set(range(n)) - set(running))
        order = list(range(n))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes and n:
            to, source = torch.tensor(holes, device=self.device), torch.tensor(movers, device=self.device)
            longest = max(self.host_lengths[m] for m in movers)
            for cache in self.own:
                for c in cache:
                    c[to, :, :longest] = c[source, :, :longest]
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.int64, device=self.device)]
        self.host_lengths = [self.host_lengths[i] for i in order]
        return order


class PaddedDecoder:
    """Left-padded prompts on transformers' cache; new prompts are admitted when all running sequences have ended."""

    def __init__(self, backbone: Backbone, slots: int):
        self.backbone, self.slots = backbone, slots
        self.device = backbone.head.weight.device
        self.running = 0

    def room(self) -> int:
        return 0 if self.running else self.slots

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        longest = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self.mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[i, longest - len(prompt) :] = 1
        self.mask = self.mask.to(self.device)
        self.cache = DynamicCache(config=self.backbone.model.config)
        hidden = self._run(ids.to(self.device), (self.mask.cumsum(1) - 1).clamp(min=0))
        times = torch.tensor(copies, device=self.device)
        self._select(torch.arange(len(prompts), device=self.device).repeat_interleave(times))
        return hidden

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra = {"position_ids": positions} if self.backbone.accepts_positions else {}
        out = self.backbone.trunk(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **extra
        )
        return out.last_hidden_state[:, -1]

    def _select(self, places: Tensor) -> None:
        self.cache.batch_select_indices(places)
        self.mask = self.mask[places]
        self.running = places.shape[0]

    def step(self, tokens_B: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.running, 1)], 1)
        return self._run(tokens_B[:, None], self.mask.sum(1, keepdim=True) - 1)

    def keep(self, running: list[int]) -> list[int]:
        self._select(torch.tensor(running, dtype=torch.int64, device=self.device))
        return running


def make_decoder(backbone: Backbone, prompts: list[list[int]], slots: int, max_new_tokens: int, budget: int) -> Decoder:
    if backbone.packed:
        return PackedDecoder(backbone, prompts, slots, max_new_tokens, budget)
    return PaddedDecoder(backbone, slots)
