"""What the sampler needs of a model: admit prompts, advance every running sequence by one token, let finished ones go.

``PackedDecoder`` computes the prefix of all prompts once, prefills the rest as a tree and keeps keys and values as
``fastppo.rollout.cache`` says; ``PaddedDecoder`` does the same with transformers' own cache for models off the packed path.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from fastppo.batch.decoding import FOLD_FROM, head_dim_of, in_pages
from fastppo.batch.token_tree import build_tree, common_prefix, cut_by_tokens
from fastppo.model.attention import DecodeContext, TreeContext
from fastppo.model.backbone import Backbone
from fastppo.rollout.cache import Cache, Lines, Pages, on_device
from fastppo.rollout.step_graphs import StepGraphs, usable


class Rows(Protocol):
    """What is drawn for the running sequences, a row each: buffers, of which a CUDA graph remembers where they lie.

    tokens: [slots] int64, the newest of each sequence. state: all buffers that ``draw`` changes, ``tokens`` too.
    """

    tokens: Tensor
    state: tuple[Tensor, ...]

    def draw(self, hidden_RH: Tensor) -> None:
        """Draw the next token of the first R rows, of which the last may be nobody's."""


class Decoder(Protocol):
    def room(self, prompts: list[list[int]]) -> int:
        """How many of these prompts, in their order, can be admitted now, with all samples."""

    def admit(self, prompts: list[list[int]]) -> Tensor:
        """Start all samples of each prompt behind the running sequences; hidden state [N, H] of each prompt's end."""

    def step(self, rows: Rows) -> None:
        """Feed each running sequence its newest token, and let ``rows`` (the same each time) draw from the hidden states."""

    def keep(self, running: list[int]) -> list[int]:
        """Let all sequences go but those at these places; returns the old places in their new order."""




class PackedDecoder:
    """Sequences with a key-value cache each, over a root that all share.

    Args:
        backbone: a packed one.
        prompts: all prompts that will be admitted (their common prefix is computed here, once), each with so many ``samples``.
        slots: sequences at a time, at least ``samples``. max_new_tokens: longest answer. budget: tokens per prefill call.
    """

    def __init__(
        self, backbone: Backbone, prompts: list[list[int]], samples: int, slots: int, max_new_tokens: int, budget: int
    ):
        self.backbone, self.samples, self.slots, self.budget = backbone, samples, slots, budget
        self.device = backbone.head.weight.device
        # Every prompt keeps at least one token of its own: its last hidden state is what decoding starts from.
        self.root_length = min(common_prefix(prompts), min(len(p) for p in prompts) - 1)
        self.root: list[tuple[Tensor, Tensor]] = []
        if self.root_length:
            self.root = self._prefill([prompts[0][: self.root_length]])[1]
        longest = max(len(p) for p in prompts) - self.root_length
        weight = backbone.head.weight
        head_dim = head_dim_of(backbone.model.config.get_text_config(), weight.shape[1])
        cache = Pages if in_pages(self.device, weight.dtype, head_dim) else Lines
        self.cache: Cache = cache(slots, samples, longest, max_new_tokens, self.device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=self.device)  # 0: nobody's
        self.host_lengths: list[int] = []
        # The policy stands still while it samples. In float32 on the CPU its adapters may then become part of copies of the
        # weights: each of many steps has a third of the products to start. Half precision would round away what was learned.
        plain = self.device.type == "cpu" and backbone.head.weight.dtype == torch.float32
        self.folded: dict[Any, Any] | None = {} if plain and max_new_tokens >= FOLD_FROM else None
        self.graphs = StepGraphs(slots, longest + max_new_tokens, backbone) if usable(backbone, max_new_tokens) else None

    def room(self, prompts: list[list[int]]) -> int:
        return self.cache.room(len(self.host_lengths), [len(p) - self.root_length for p in prompts])

    def admit(self, prompts: list[list[int]]) -> Tensor:
        ends, before = [], len(self.host_lengths)
        sizes = [len(p) - self.root_length for p in prompts]
        for batch in cut_by_tokens(sizes, 0, self.budget):
            end, kept, tree = self._prefill([prompts[i] for i in batch], self.root_length)
            ends.append(end)
            self.cache.fill(len(self.host_lengths), kept, tree.paths[:, self.root_length :] - self.root_length)
            self.host_lengths += [sizes[i] for i in batch for _ in range(self.samples)]
        self.lengths[before : len(self.host_lengths)] = on_device(self.host_lengths[before:], self.device)
        return torch.cat(ends)

    def _prefill(self, sequences: list[list[int]], past: int = 0):
        tree = build_tree(sequences, past=past, device=self.device)
        context = TreeContext(tree.layout, self.root if past else None, keep=True)
        hidden = self.backbone.run(tree.token_ids, tree.positions, context, tree.last_rows)
        kept = [context.kept[layer] for layer in sorted(context.kept)]
        return hidden, kept, tree

    def step(self, rows: Rows) -> None:
        self.host_lengths = [n + 1 for n in self.host_lengths]
        run, size = partial(self._run, rows), (len(self.host_lengths), max(self.host_lengths))
        if self.graphs is None:
            run(*size)
        else:
            self.graphs.step(run, *size, (self.lengths, *rows.state))

    def _run(self, rows: Rows, count: int, longest: int) -> None:
        """Of the first ``count`` rows. Those behind the running ones write to the first place of a page or line that is
        nobody's."""
        lengths = self.lengths[:count]
        lengths += lengths.sign()
        lengths = lengths.clamp(min=1)
        own, pages = self.cache.own, self.cache.pages(count, longest)
        root = self.root or [(k[0, :, :0].transpose(0, 1), v[0, :, :0].transpose(0, 1)) for k, v in own]
        context = DecodeContext(root, own, lengths, longest, self.folded, pages)
        rows.draw(self.backbone.run(rows.tokens[:count], self.root_length + lengths - 1, context))

    def keep(self, running: list[int]) -> list[int]:
        n = len(running)
        movers = [place for place in running if place >= n]
        holes = sorted(set(range(n)) - set(running))
        order = list(range(n))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.cache.keep(len(self.host_lengths), order, self.host_lengths)
        self.lengths[:n] = self.lengths[on_device(order, self.device)]
        self.lengths[n : len(self.host_lengths)] = 0
        self.host_lengths = [self.host_lengths[i] for i in order]
        return order


class PaddedDecoder:
    """Left-padded prompts on transformers' cache; new prompts are admitted when all running sequences have ended."""

    def __init__(self, backbone: Backbone, samples: int, slots: int):
        self.backbone, self.samples, self.slots = backbone, samples, slots
        self.device = backbone.head.weight.device
        self.running = 0

    def room(self, prompts: list[list[int]]) -> int:
        return 0 if self.running else min(len(prompts), self.slots // self.samples)

    def admit(self, prompts: list[list[int]]) -> Tensor:
        longest = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self.mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[i, longest - len(prompt) :] = 1
        self.mask = self.mask.to(self.device)
        self.cache = DynamicCache(config=self.backbone.model.config)
        hidden = self._run(ids.to(self.device), (self.mask.cumsum(1) - 1).clamp(min=0))
        self._select(torch.arange(len(prompts), device=self.device).repeat_interleave(self.samples))
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

    def step(self, rows: Rows) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.running, 1)], 1)
        rows.draw(self._run(rows.tokens[: self.running, None], self.mask.sum(1, keepdim=True) - 1))

    def keep(self, running: list[int]) -> list[int]:
        self._select(on_device(running, self.device))
        return running


def make_decoder(
    backbone: Backbone, prompts: list[list[int]], samples: int, slots: int, max_new_tokens: int, budget: int
) -> Decoder:
    if backbone.packed:
        return PackedDecoder(backbone, prompts, samples, slots, max_new_tokens, budget)
    return PaddedDecoder(backbone, samples, slots)
