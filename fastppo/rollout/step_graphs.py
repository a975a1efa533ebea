"""Decoding steps as CUDA graphs: all launches of a step, the draw of the next tokens among them, become one.

A graph has fixed shapes, so there is one for each bucket of rows and of keys. What it reads and writes lies where it lay when
the graph was made: tokens and lengths, the cache and its pages, weights and adapters.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable

from torch import Tensor

from fastppo.batch.decoding import GRAPHS_FROM
from fastppo.errors import is_out_of_memory
from fastppo.model.backbone import Backbone
from fastppo.model.cuda_graphs import ROPES, VARIABLE, Maker

KEYS = 128  # a bucket of keys is a multiple of that
MAKE_AT = 3  # the step of a bucket that is made a graph: a bucket that is left at once is worth none

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
