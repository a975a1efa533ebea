"""Independent pieces of an iteration side by side on CPU threads.

torch divides each operation among its threads. Those of a small model are too short for that: on two threads they take two
thirds of the time on one. Here each worker does a whole piece, a micro-batch, with its share of torch's threads; what stays
serial is Python's own time, for one thread at a time has the interpreter (sampling has so much of it that it gains nothing).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """At most ``most`` threads, and no more than torch has, for the time of each call; 1: all in the caller's thread."""

    def __init__(self, most: int = 1):
        self.most = most

    def count(self, items: int) -> int:
        """How many of so many items are done at a time."""
        return max(1, min(self.most, items, torch.get_num_threads()))

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """``function`` of each item, in order, and not many more of them than were taken.

        Gradients are recorded where the caller records them. An error in a piece is raised when its turn comes. Then, and where
        the caller stops early, pieces that run are waited for, others not begun.
        """
        count = self.count(len(items))
        if count < 2:
            yield from map(function, items)
            return
        threads = torch.get_num_threads()
        run = _Run(function, items, count, threads // count)
        try:
            for i in range(len(items)):
                yield run.result(i)
        finally:
            run.stop()
            torch.set_num_threads(threads)  # new threads begin with the number that was set last, whichever thread set it


class _Run(Generic[T, R]):
    def __init__(self, function: Callable[[T], R], items: Sequence[T], count: int, share: int):
        self.function, self.items, self.ahead, self.share = function, items, 2 * count, share
        self.recording = torch.is_grad_enabled()
        self.changed = threading.Condition()
        self.begun = self.taken = 0
        self.stopped = False
        self.made: dict[int, tuple[list[R], BaseException | None]] = {}
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _next(self) -> int | None:
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.begun < self.taken + self.ahead)
            if self.stopped or self.begun == len(self.items):
                return None
            self.begun += 1
            return self.begun - 1

    def _work(self) -> None:
        torch.set_num_threads(self.share)
        with torch.set_grad_enabled(self.recording):
            while (i := self._next()) is not None:
                made: list[R] = []
                error: BaseException | None = None
                try:
                    made.append(self.function(self.items[i]))
                except BaseException as caught:  # for the caller's thread
                    error = caught
                with self.changed:
                    self.made[i] = made, error
                    self.changed.notify_all()
                del made, error

    def result(self, i: int) -> R:
        with self.changed:
            self.changed.wait_for(lambda: i in self.made)
            made, error = self.made.pop(i)
            self.taken = i + 1
            self.changed.notify_all()
        if error is not None:
            raise error
        return made[0]

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
