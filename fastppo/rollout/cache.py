"""Where the keys and values of running sequences lie.

``Pages`` holds a prompt once for all its samples: pages that it fills are theirs together, what is left of it is copied into
the first page of each, in which the answer goes on. ``Lines`` gives each sequence a line of places side by side, which is what
the products of a CPU want, and of a GPU without Triton's kernels: gathering pages costs more than the copies of a prompt do.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastppo.batch.decoding import PAGE, pages_of
from fastppo.model.attention import in_any_order

Layers = list[tuple[Tensor, Tensor]]  # of each layer keys and values


def on_device(numbers: list[int] | np.ndarray, device: torch.device) -> Tensor:
    """As int64, from memory that a GPU reads by itself: the host does not wait until it is done with what came before."""
    tensor = torch.as_tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Cache(Protocol):
    own: Layers  # as `DecodeContext` wants them; empty until the first sequences come

    def room(self, rows: int, lengths: list[int]) -> int:
        """Behind ``rows`` running sequences, how many of prompts of these lengths, in this order, can come with all samples."""

    def fill(self, rows: int, kept: Layers, paths: np.ndarray) -> None:
        """Samples of each prompt, side by side, behind ``rows`` running sequences. kept: [T, Hkv, D] of the prompts' tokens;
        paths: [N, K], of each prompt the rows in ``kept``, -1 behind its end."""

    def pages(self, rows: int, longest: int) -> Tensor | None:
        """Of the first rows the pages [rows, N] of as many places, at least."""

    def keep(self, rows: int, order: list[int], used: list[int]) -> None:
        """Of ``rows`` sequences these, in this order: only into places of others. used: places of each that are filled."""


class Lines:
    """A line of ``longest + new`` places a sequence; see ``pages_of``."""

    def __init__(self, slots: int, samples: int, longest: int, new: int, device: torch.device):
        self.slots, self.samples, self.capacity, self.device = slots, samples, longest + new, device
        self.own: Layers = []

    def room(self, rows: int, lengths: list[int]) -> int:
        return min(len(lengths), (self.slots - rows) // self.samples)

    def fill(self, rows: int, kept: Layers, paths: np.ndarray) -> None:
        if not self.own:
            shapes = [[(self.slots, x.shape[1], self.capacity, x.shape[2]) for x in layer] for layer in kept]
            self.own = [(k.new_zeros(a), v.new_zeros(b)) for (k, v), (a, b) in zip(kept, shapes, strict=True)]
        source = on_device(paths.clip(min=0), self.device).repeat_interleave(self.samples, 0)
        stop = rows + len(source)
        for caches, layer in zip(self.own, kept, strict=True):
            for cache, new in zip(caches, layer, strict=True):
                cache[rows:stop, :, : source.shape[1]] = new[source].transpose(1, 2)

    def pages(self, rows: int, longest: int) -> None:
        return None

    def keep(self, rows: int, order: list[int], used: list[int]) -> None:
        # Only sequences beyond the new end move, each into a freed place: no other line is copied.
        moves = [(to, source) for to, source in enumerate(order) if to != source]
        if moves:
            longest = max(used[source] for _, source in moves)
            to, source = on_device(np.array(moves), self.device).unbind(1)
            with in_any_order(self.device):  # no place comes twice
                for cache in (cache for layer in self.own for cache in layer):
                    cache[to, :, :longest] = cache[source, :, :longest]


class Pages:
    """Pages of ``PAGE`` places; see ``pages_of``. A sequence has all that it may come to need from its beginning, so that none
    ever waits for another one's; pages that no sequence has any more are taken by the next ones.

    Page 0 is nobody's: rows of the table behind the running sequences name it, which a CUDA graph of more rows computes too.
    """

    def __init__(self, slots: int, samples: int, longest: int, new: int, device: torch.device):
        self.slots, self.samples, self.new, self.device = slots, samples, new, device
        self.own: Layers = []
        self.users = np.zeros(pages_of(slots, samples, longest, new), dtype=np.int64)  # sequences that have a page
        self.free = [*range(len(self.users) - 1, 0, -1)]
        self.host = np.zeros((slots, -(-(longest + new) // PAGE)), dtype=np.int32)
        self.table = torch.zeros(self.host.shape, dtype=torch.int32, device=device)

    def _needs(self, length: int) -> tuple[int, int]:
        """Pages that all samples of a prompt have in common, and those of each."""
        return length // PAGE, -(-(length % PAGE + self.new) // PAGE)

    def room(self, rows: int, lengths: list[int]) -> int:
        most, left = (self.slots - rows) // self.samples, len(self.free)
        for i, length in enumerate(lengths[:most]):
            together, alone = self._needs(length)
            left -= together + self.samples * alone
            if left < 0:
                return i
        return min(most, len(lengths))

    def _take(self, count: int, users: int) -> np.ndarray:
        pages = np.array([self.free.pop() for _ in range(count)], dtype=np.int32)
        self.users[pages] = users
        return pages

    def fill(self, rows: int, kept: Layers, paths: np.ndarray) -> None:
        if not self.own:
            pages = len(self.users)
            shapes = [[(pages, x.shape[1], PAGE, x.shape[2]) for x in layer] for layer in kept]
            self.own = [(k.new_zeros(a), v.new_zeros(b)) for (k, v), (a, b) in zip(kept, shapes, strict=True)]
        source, page = [], []  # of each place that is written, by page
        start = rows
        for path in paths:
            path = path[path >= 0]
            together, alone = self._needs(len(path))
            shared, rest = self._take(together, self.samples), path[together * PAGE :]
            source.append(path[: together * PAGE])
            page.append(shared.repeat(PAGE))
            for row in range(rows, rows + self.samples):
                mine = self._take(alone, 1)
                self.host[row, : together + alone] = np.concatenate([shared, mine])
                source.append(rest)
                page.append(mine[:1].repeat(len(rest)))
            rows += self.samples
        # Each page is filled from its first place on.
        place = [np.arange(len(part)) % PAGE for part in page]
        at, to, line = (on_device(np.concatenate(x), self.device) for x in (place, page, source))
        with in_any_order(self.device):  # no place comes twice
            for caches, layer in zip(self.own, kept, strict=True):
                for cache, new in zip(caches, layer, strict=True):
                    cache[to, :, at] = new[line]
        self.table[start:rows] = on_device(self.host[start:rows], self.device)

    def pages(self, rows: int, longest: int) -> Tensor:
        return self.table[:rows, : -(-longest // PAGE)]

    def keep(self, rows: int, order: list[int], used: list[int]) -> None:
        gone = self.host[sorted(set(range(rows)) - set(order))]
        np.subtract.at(self.users, gone[gone > 0], 1)
        ended = np.unique(gone[gone > 0])
        self.free += ended[self.users[ended] == 0].tolist()
        self.host[: len(order)] = self.host[order]
        self.host[len(order) : rows] = 0
        self.table[: len(order)] = self.table[on_device(order, self.device)]
        self.table[len(order) : rows] = 0
