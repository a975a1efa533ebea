"""`pytest bench --benchmark-only`: every op, size, direction and form as a benchmark, in groups of what is compared.

The samples are those of `bench.timing`, which runs the forms of a group in turn and times a GPU by its own clock;
pytest-benchmark, which would time one form after the other by the host's, is handed them by a timer that plays them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bench.ops import Entry, entries
from bench.ops.measure import OUT_OF_MEMORY, chosen_forms
from bench.ops.op import LIMIT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(entry, form) for entry in entries(DEVICE) for form in (*chosen_forms(entry, DEVICE), LIMIT)]


class _Playback:
    """A clock that is read before and after every round."""

    def __init__(self) -> None:
        self.times: Iterator[float] = iter(())

    def load(self, ms: list[float]) -> None:
        self.times = (edge for sample in ms for edge in (0.0, sample / 1e3))

    def __call__(self) -> float:
        return next(self.times)


PLAYBACK = _Playback()


def _id(case: tuple[Entry, str]) -> str:
    entry, form = case
    return f"{entry.op.name} {entry.direction} {entry.size}: {form}"


@pytest.mark.benchmark(timer=PLAYBACK)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_op(case: tuple[Entry, str], benchmark, measured: Callable) -> None:
    entry, form = case
    row = next(row for row in measured(entry) if row.form == form)
    if row.median_ms is None:
        (pytest.skip if row.note == OUT_OF_MEMORY else pytest.fail)(f"{form}: {row.note}")
    benchmark.group = row.entry
    benchmark.name = form
    benchmark.extra_info |= {name: value for name, value in row.plain().items() if value is not None}
    PLAYBACK.load(row.raw["ms"])
    benchmark.pedantic(lambda: None, rounds=len(row.raw["ms"]))
