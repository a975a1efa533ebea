"""Measure every kernel op against its peers and its limit, and keep it: `bench/results/DEVICE/ops.json`.

    python -m bench.kernels [--device cuda|cpu] [--only TEXT ...] [--minutes N] [--out FILE]

What matters most comes first, torch.compile (which takes the longest to start) after all else. Every measurement is kept at
once; a run that is cut off, or out of time, goes on with what is missing, as long as neither sources nor machine have changed.
The exit status is 1 where a form is wrong or fails, 2 where there is no such device, 3 where something is left.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .limits import main_dtype
from .ops import Entry, entries, ops
from .ops.measure import Row, chosen_forms, measure_entry, notes
from .ops.op import COMPILED, LIMIT, OURS
from .ops.summary import peers_ratio, tables
from .record import Figure, Record, folder_of, machine, sources

SOURCES = (
    "kernels/fastppo_kernels", "bench/ops", "bench/gpu_checks/case.py", "bench/limits.py", "bench/memory.py", "bench/timing.py",
)  # fmt: skip
_BROKEN = "CUDA error"  # after one nothing works in this process
_SECONDS = 1.0  # of timing, for one op in one size and direction


def measure(device: torch.device, path: Path, deadline: float, only: Sequence[str] | None = None) -> Record:
    """The record of part "ops" at `path`, with what could be measured before `deadline` (of `time.monotonic`) added to it.

    only: entries whose name has one of these in it; the record is complete when all entries are in it nevertheless. Of a record
    that is complete they are measured again.
    """
    dtype, begun = main_dtype(device), time.monotonic()
    record = _begun(path, device, only)
    before, every = record.seconds, _todo(device)
    names, missing = {_key(*each, dtype) for each in every}, notes(ops(), device)
    wanted = [each for each in every if not only or any(text in each[0].name(dtype) for text in only)]
    if only and record.complete:
        record.data["done"] = [key for key in record.data["done"] if key not in {_key(*each, dtype) for each in wanted}]

    def keep() -> None:
        record.notes = [
            *missing,
            *(f"{Row(**row).entry} | {row['form']}: {row['note']}" for row in record.data["rows"] if row["note"]),
        ]
        record.complete = names <= set(record.data["done"])
        record.seconds = round(before + time.monotonic() - begun, 1)
        record.save(path)

    for entry, compiled in wanted:
        key = _key(entry, compiled, dtype)
        if key in record.data["done"]:
            continue
        if time.monotonic() > deadline:
            break
        forms = [COMPILED] if compiled else [form for form in chosen_forms(entry, device) if form != COMPILED]
        rows = measure_entry(entry, device, dtype, seconds=_SECONDS, forms=forms)
        _add(record, [row for row in rows if not compiled or row.form == COMPILED])
        record.data["done"].append(key)
        keep()
        print(*tables(rows), sep="\n", flush=True)
        if any(_BROKEN in (row.note or "") for row in rows):
            break
    keep()
    return record


def _todo(device: torch.device) -> list[tuple[Entry, bool]]:
    """(what, whether it is its compiled form that is measured)."""
    found = entries(device)
    return [(entry, False) for entry in found] + [(entry, True) for entry in found if COMPILED in chosen_forms(entry, device)]


def _key(entry: Entry, compiled: bool, dtype: torch.dtype) -> str:
    return f"{entry.name(dtype)} | {COMPILED}" if compiled else entry.name(dtype)


def _begun(path: Path, device: torch.device, only: Sequence[str] | None) -> Record:
    """The stored record where it is of these sources and this machine and something of it is wanted, else a new one."""
    here, digest = machine(device), sources(*SOURCES)
    stored = Record.load(path)
    if stored is not None and stored.data.get("sources") == digest and isinstance(stored.data.get("done"), list):
        same = all(stored.machine.get(name) == here[name] for name in ("device", "versions"))
        if same and (not stored.complete or only):
            return stored
    record = Record("ops", here, data={"sources": digest, "rows": [], "done": []})
    record.follow(stored)
    return record


def _add(record: Record, rows: list[Row]) -> None:
    """Rows in the place of earlier ones of the same form, and their figures."""
    added = {(row.entry, row.form) for row in rows}
    kept = [row for row in record.data["rows"] if (Row(**row).entry, row["form"]) not in added]
    record.data["rows"] = kept + [row.plain() for row in rows]
    peers = peers_ratio(rows)
    for row in rows:
        name, ours = f"{row.entry} | {row.form}", row.form.startswith(OURS)
        if row.median_ms is None:
            continue
        record.figures[name] = Figure.of(row.raw["ms"], "ms", "lower" if ours else None)
        if row.form in peers:
            record.figures[f"{row.entry} | ratio to {row.form}"] = Figure.of(row.raw["ratio"], "ratio", "higher")
        if row.form != LIMIT and "percent" in row.raw:
            record.figures[f"{name} | percent of limit"] = Figure.of(row.raw["percent"], "percent", "higher" if ours else None)
        if row.peak_MiB is not None:
            record.figures[f"{name} | MiB"] = Figure(row.peak_MiB, "MiB", "lower" if ours else None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only ops with one of these in their name, size or direction")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="stop after that (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/DEVICE/ops.json")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA GPU that torch can use: --device cpu measures small sizes", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    if args.only and not any(text in each.name(main_dtype(device)) for each in entries(device) for text in args.only):
        parser.error(f"--only: no op has {' or '.join(args.only)} in its name")
    os.environ.setdefault("FASTPPO_KERNELS_CACHE", "")  # what the dispatcher measures here is not to be kept
    path = args.out or folder_of(device) / "ops.json"
    record = measure(device, path, time.monotonic() + 60 * args.minutes, args.only)
    bad = [note for note in record.notes if ": wrong: " in note or ": failed: " in note]
    print("", *record.notes, f"{len(record.data['done'])} measurements, {record.seconds:.0f} s; figures in {path}", sep="\n")
    if not record.complete:
        print("the same command goes on with those that are left" if not args.only else "others are left")
    return 1 if bad else 0 if record.complete or args.only else 3


if __name__ == "__main__":
    sys.exit(main())
