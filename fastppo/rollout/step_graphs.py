"""Decoding steps as CUDA graphs: all launches of a step, the draw of the next tokens among them, become one.

A graph has fixed shapes, so there is one for each bucket of rows and of keys. What it reads and writes lies where it lay when
the graph was made: tokens and lengths, the cache and its pages, weights and adapters.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastppo.errors import is_out_of_memory
from fastppo.model.backbone import Backbone

VARIABLE = "FASTPPO_CUDA_GRAPHS"

# New tokens from which on graphs are made: making one runs the step twice, and the end of a batch needs several. A guess.
GRAPHS_FROM = 32
KEYS = 128  # a bucket of keys is a multiple of that
MAKE_AT = 3  # the step of a bucket that is made a graph: a bucket that is left at once is worth none

# Rotary embeddings that do not ask the host how long the sequences are.
ROPES = ("default", "linear", "llama3", "yarn")

Run = Callable[[int, int], None]  # the step of so many rows, of which the longest has so many keys


def usable(backbone: Backbone, max_new_tokens: int) -> bool:
    """Whether a step of this model is known to leave the host alone, and there are enough of them."""
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    if max_new_tokens < GRAPHS_FROM or backbone.llama is None or not backbone.graphs or not backbone.head.weight.is_cuda:
        return False
    return getattr(backbone.llama.trunk.rotary_emb, "rope_type", None) in ROPES


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
        self.made: dict[tuple[int, int], Callable[[], None]] = {}
        self.asked: Counter[tuple[int, int]] = Counter()
        self.maker = Maker()
        self.full = False  # memory ran out when a graph was made

    def step(self, run: Run, rows: int, longest: int, state: tuple[Tensor, ...]) -> None:
        """``run(rows, longest)``, or that of a bucket that holds them: what it does to further rows must do no harm.

        run: the same each time (it is not kept: it would hold the decoder, and that us).
        state: all that a step changes and reads again, but for the newest keys and values: it is what it was when these are
            written once more.
        """
        bucket = min(row_bucket(rows), self.slots), min(-(-longest // KEYS) * KEYS, self.capacity)
        self.asked[bucket] += 1
        if self.backbone.graphs and not self.full and bucket not in self.made and self.asked[bucket] >= MAKE_AT:
            self._make(bucket, run, state)
        if bucket in self.made:
            self.made[bucket]()
        else:
            run(rows, longest)

    def _make(self, bucket: tuple[int, int], run: Run, state: tuple[Tensor, ...]) -> None:
        before = [x.clone() for x in state]
        try:
            self.made[bucket] = self.maker.make(lambda: run(*bucket))
        except RuntimeError as error:  # whatever CUDA does not let a graph do
            self.made.clear()
            self.full = is_out_of_memory(error)  # only for this batch: the next one may be smaller
            if not self.full:
                self.backbone.graphs = False
                first = str(error).splitlines()[0]
                warnings.warn(f"decoding goes on without CUDA graphs: {first}", RuntimeWarning, stacklevel=3)
        for x, old in zip(state, before, strict=True):
            x.copy_(old)


class Maker:
    """Makes graphs that share their memory: only one runs at a time, and what it leaves lies in memory from before."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.aside: Any = None  # one stream for all: each that ever multiplied keeps a workspace

    def make(self, step: Callable[[], None]) -> Callable[[], None]:
        """What runs ``step`` again, which it is once while the graph is made.

        Raises:
            RuntimeError: the step cannot be a graph, or there is no memory for it. Nothing of the attempt is left.
        """
        here = torch.cuda.current_stream()
        if self.pool is None:
            self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.aside.wait_stream(here)
        try:
            with torch.cuda.stream(self.aside):  # what is compiled, measured or allocated at a first call must be there before
                step()
        finally:
            here.wait_stream(self.aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.aside, capture_error_mode="thread_local"):
                step()
        except BaseException:
            torch.cuda.set_stream(here)  # which torch does not return to where the end of a capture fails
            _abandon(here.device_index, self.pool)
            self.pool = None
            raise
        return graph.replay


def _abandon(device: int, pool: Any) -> None:
    """End a capture that CUDA has broken off, as far as torch's allocator is concerned.

    `CUDAGraph::capture_end` ends the capture first and, if that fails, raises: the allocator goes on to send what captures ask
    for to the pool, and counts the graph as one of its users for ever. Both are undone here. If it comes farther, it does that
    itself, or the graph does when it goes; the allocator then says that it sends nothing there.
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return
    torch._C._cuda_releasePool(device, pool)
