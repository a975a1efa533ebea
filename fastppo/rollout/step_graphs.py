"""Decoding steps as CUDA graphs: all launches of a step, some twenty a layer, become one.

A graph has fixed shapes, so there is one for each bucket of rows and of keys. What it reads and writes lies where it lay when
the graph was made: the newest tokens and the lengths are copied to buffers of their own first; caches, weights and adapters
stay.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.model.backbone import Backbone

VARIABLE = "FASTPPO_CUDA_GRAPHS"

# New tokens from which on graphs are made: making one takes about three steps, and the end of a batch needs several.
GRAPHS_FROM = 32
KEYS = 128  # a bucket of keys is a multiple of that

# Rotary embeddings that do not ask the host how long the sequences are.
_ROPES = ("default", "linear", "llama3", "yarn")

Run = Callable[[Tensor, Tensor, int], Tensor]  # newest tokens [B], lengths [B], the longest of them -> hidden states [B, H]


def usable(backbone: Backbone, max_new_tokens: int) -> bool:
    """Whether a step of this model is known to leave the host alone, and there are enough of them."""
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    if max_new_tokens < GRAPHS_FROM or backbone.llama is None or not backbone.graphs or not backbone.head.weight.is_cuda:
        return False
    return getattr(backbone.llama.trunk.rotary_emb, "rope_type", None) in _ROPES


def row_bucket(rows: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, .. (2^k and 1.5 2^k) that holds ``rows``: at most a third is wasted."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


class StepGraphs:
    """A decoder's step, replayed.

    Args:
        slots, capacity: of the cache: rows and keys of the largest graph.
        backbone: of the decoder; where a graph cannot be made it is marked, and all goes on without.
    """

    def __init__(self, slots: int, capacity: int, backbone: Backbone):
        self.slots, self.capacity, self.backbone = slots, capacity, backbone
        device = backbone.head.weight.device
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lengths = torch.ones(slots, dtype=torch.int64, device=device)
        self.made: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}

    def step(self, run: Run, tokens_B: Tensor, lengths_B: Tensor, longest: int) -> Tensor:
        """``run(tokens_B, lengths_B, longest)``, hidden states [B, H]; the next call overwrites them.

        run: the same each time (it is not kept: it would hold the decoder, and that us). It writes each row's key and value
            at place ``length - 1`` of the row's slot.
        """
        rows = len(tokens_B)
        bucket = min(row_bucket(rows), self.slots), min(-(-longest // KEYS) * KEYS, self.capacity)
        self.tokens[:rows].copy_(tokens_B)
        self.lengths[:rows].copy_(lengths_B)
        # The rows behind are free slots. They write to their first place, which whoever comes there next overwrites.
        self.lengths[rows : bucket[0]].fill_(1)
        if bucket not in self.made:
            try:
                self.made[bucket] = capture(lambda: run(self.tokens[: bucket[0]], self.lengths[: bucket[0]], bucket[1]))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # whatever CUDA does not let a graph do
                self.backbone.graphs = False
                first = str(error).splitlines()[0]
                warnings.warn(f"decoding goes on without CUDA graphs: {first}", RuntimeWarning, stacklevel=2)
        if not self.backbone.graphs:
            return run(tokens_B, lengths_B, longest)
        replay, hidden_BH = self.made[bucket]
        replay()
        return hidden_BH[:rows]


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What runs ``step`` again, and where its result then lies. Steps may be run more than once at no harm."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # what is compiled, measured or allocated at a first call must be there before
        step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result
