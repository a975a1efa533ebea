"""Rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .measure import Row
from .op import LIMIT, OURS

_HEADER = ("form", "median", "IQR", "fastppo is faster", "of the limit", "peak memory")


def peers_ratio(rows: Iterable[Row]) -> dict[str, float]:
    """By the name of the peer: how many times as fast as it fastppo is (below 1: slower)."""
    return {
        row.form: row.ratio for row in rows if row.ratio is not None and row.form != LIMIT and not row.form.startswith(OURS)
    }


def tables(rows: Iterable[Row]) -> Iterator[str]:
    """Lines: a table for each op, size and direction."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.entry, []).append(row)
    for name, group in groups.items():
        peers = peers_ratio(group)
        lines = [_HEADER, *(_cells(row, peers) for row in group)]
        widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(_HEADER))]
        yield ""
        yield name
        for line in lines:
            if len(line) == 2:  # a note
                yield f"  {line[0]:<{widths[0]}}  {line[1]}"
            else:
                rest = (f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
                yield "  ".join(("", f"{line[0]:<{widths[0]}}", *rest)).rstrip()


def _cells(row: Row, peers: dict[str, float]) -> tuple[str, ...]:
    if row.median_ms is None or row.low_ms is None or row.high_ms is None:
        return row.form, row.note or "not measured"
    return (
        row.form,
        _time(row.median_ms),
        _time(row.high_ms - row.low_ms),
        f"{peers[row.form]:.2f} x" if row.form in peers else "",
        "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f} %",
        "" if row.peak_MiB is None else f"{row.peak_MiB:.2f} MiB",
    )


def _time(ms: float) -> str:
    if ms < 0.1:
        return f"{ms * 1e3:.1f} us"
    return f"{ms:.3f} ms" if ms < 100 else f"{ms:.0f} ms"
