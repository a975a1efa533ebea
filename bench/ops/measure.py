"""One measurement: are all forms right, how long do they take side by side, and how much memory is that."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import timing
from ..memory import peak
from ..peers import missing
from .op import COMPILED, DTYPE_NAMES, LIMIT, OURS, Entry, Form, Inputs, Op, Results, call

# Of the largest entry, for models in half precision: forms round in other places, TRL log-probs to bfloat16 at the end.
_HALF_TOLERANCE = 0.1
_PART = 1 << 26
OUT_OF_MEMORY = "out of memory"


@dataclass
class Row:
    """One form of one entry. Times are of one call, in milliseconds: median and quartiles.

    peak_MiB: the most that was alive above what was there before. host_ms: what the host needs to start it, on a GPU.
    limit_ms, percent_of_limit: of the limit measured in the same rounds; 100 is as fast as the limit. ratio: this form's time
    over fastppo's, the median over rounds; above 1 fastppo is faster. note: why there are no figures.
    raw: every sample, and the ratios of every round.
    """

    op: str
    family: str
    size: str
    direction: str
    dtype: str
    form: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    host_ms: float | None = None
    peak_MiB: float | None = None
    limit_ms: float | None = None
    percent_of_limit: float | None = None
    ratio: float | None = None
    note: str | None = None
    raw: dict[str, list[float]] = field(default_factory=dict)

    @property
    def entry(self) -> str:
        return f"{self.op} {self.direction} {self.size} {self.dtype}"

    def plain(self) -> dict[str, Any]:
        """Without the samples: what goes into a table."""
        found = asdict(self)
        del found["raw"]
        return found


def skipped(op: Op, device: torch.device) -> dict[str, str]:
    """Forms that cannot run here, and why."""
    found = {}
    for name, form in op.all_forms.items():
        if form.peer and (reason := missing(form.peer)):
            found[name] = reason
        elif device.type == "cpu" and not form.on_cpu:
            compiled = f"{name} is left out here on the CPU, where compiling takes long"
            found[name] = compiled if name == COMPILED else f"{name} has kernels for GPUs alone here"
    return found


def notes(ops: Iterable[Op], device: torch.device) -> list[str]:
    """A line for each reason why forms are missing, with the ops that it is about."""
    about: dict[str, list[str]] = {}
    for op in ops:
        for reason in skipped(op, device).values():
            about.setdefault(reason, []).append(op.name)
    return [f"{reason} ({'; '.join(names)})" for reason, names in about.items()]


def chosen_forms(entry: Entry, device: torch.device) -> dict[str, Form]:
    """The forms of this entry that can run here."""
    left_out = skipped(entry.op, device)
    forms = entry.op.all_forms.items()
    return {name: form for name, form in forms if name not in left_out and entry.direction in form.directions}


def measure_entry(
    entry: Entry, device: torch.device, dtype: torch.dtype, *, seconds: float = 2.0, forms: Collection[str] | None = None
) -> list[Row]:
    """A row for each form (of those named in `forms`, and ours) that can run here, and one for the limit.

    Before anything is timed, each form's results are compared with the reference's: a form that is wrong, fails or runs out of
    memory has a row that says so. `seconds` is for timing alone, all forms together.
    """
    op, chosen = entry.op, chosen_forms(entry, device)
    if forms is not None:
        chosen = {name: form for name, form in chosen.items() if name in forms or name == OURS}
    rows = {name: _row(entry, dtype, name) for name in (*chosen, LIMIT)}
    calls: dict[str, Callable[[], Any]] = {}
    inputs: Inputs = {}
    try:
        inputs = entry.make(device, dtype)
        expected = _expected(entry, inputs)
        for name, form in chosen.items():
            run, rows[name].note = _checked(entry, form, inputs, expected, dtype)
            if run is not None:
                calls[name] = run
        del expected
        calls[LIMIT] = op.limit(inputs, entry.direction)
        taken = _timed(calls, device, seconds, rows)
        for name in taken:
            if name != LIMIT:
                rows[name].peak_MiB = peak(calls[name], device) / 2**20
        _fill(rows, taken)
    except Exception as error:  # of the inputs, the reference, or while timing; others can still be measured
        for row in rows.values():
            row.note = row.note or _why(error)
    finally:
        calls.clear()
        del inputs
        _free(device)
    return list(rows.values())


def _row(entry: Entry, dtype: torch.dtype, form: str) -> Row:
    return Row(entry.op.name, entry.op.family, entry.size, entry.direction, DTYPE_NAMES[dtype], form)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _results(entry: Entry, run: Callable[[], Results], inputs: Inputs) -> Results:
    """What is compared."""
    found = run()
    with torch.no_grad():
        found = entry.op.comparable(inputs, found) if entry.op.comparable else found
    return {name: x.detach() for name, x in found.items()}


def _expected(entry: Entry, inputs: Inputs) -> Results | None:
    """The reference's results; None where they do not fit into memory."""
    op = entry.op
    try:
        return _results(entry, call(op.all_forms[op.reference].run, inputs, entry.direction), inputs)
    except torch.OutOfMemoryError:
        return None


def _checked(
    entry: Entry, form: Form, inputs: Inputs, expected: Results | None, dtype: torch.dtype
) -> tuple[Callable[[], Results] | None, str | None]:
    """(what is timed, None), or (None, why not)."""
    run = call(form.run, inputs, entry.direction)
    try:
        results = _results(entry, run, inputs)
        if expected is None:
            return run, "not checked: the reference ran out of memory"
        wrong = disagreement(results, expected, max(entry.op.tolerance, _HALF_TOLERANCE if dtype.itemsize == 2 else 0.0))
        return (None, f"wrong: {wrong}") if wrong else (run, None)
    except Exception as error:  # another project's code on a machine it may not know
        return None, _why(error)


def _why(error: Exception) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:200] if lines else ''}"


def disagreement(results: Results, expected: Results, tolerance: float) -> str | None:
    """How results differ from the reference's by more than the tolerance (of the largest entry); None where they do not."""
    shared = [name for name in results if name in expected]
    if not shared:
        return "nothing in common with the reference's results"
    for name in shared:
        x, y = results[name], expected[name]
        if x.shape != y.shape:
            return f"{name} has shape {list(x.shape)}, not {list(y.shape)}"
        largest, off = _largest(y), _largest(x, y)
        if not off <= tolerance * max(largest, 1e-12):  # NaN is wrong too
            return f"{name} is off by {off:.3g}, its largest entry is {largest:.3g}"
    return None


def _largest(x: torch.Tensor, less: torch.Tensor | None = None) -> float:
    """max |x - less|, in float32, a part at a time: a whole gradient of logits would take more memory than the ops."""
    parts = [x.flatten().split(_PART)] + ([less.flatten().split(_PART)] if less is not None else [])
    found = [(pair[0].float() - (pair[1].float() if len(pair) > 1 else 0.0)).abs().max() for pair in zip(*parts, strict=True)]
    return float(torch.stack(found).max()) if x.numel() else 0.0


def _timed(
    calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float, rows: dict[str, Row]
) -> dict[str, timing.Samples]:
    """Leaves out, with a note, what runs out of memory beside the others' inputs."""
    while calls:
        current = ""

        def marked(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
            def marking() -> Any:
                nonlocal current
                current = name
                return run()

            return marking

        try:
            return timing.samples({name: marked(name, run) for name, run in calls.items()}, device, seconds)
        except torch.OutOfMemoryError:
            rows[current].note = OUT_OF_MEMORY
            del calls[current]
            _free(device)
    return {}


def _fill(rows: dict[str, Row], taken: dict[str, timing.Samples]) -> None:
    for name, found in taken.items():
        row = rows[name]
        row.median_ms, (row.low_ms, row.high_ms) = found.median, found.quartiles
        row.raw["ms"] = found.ms
        if found.host_ms:
            row.host_ms = statistics.median(found.host_ms)
        if LIMIT in taken:
            row.limit_ms = taken[LIMIT].median
            row.raw["percent"] = [100 * share for share in timing.ratios(taken[LIMIT], found)]
            row.percent_of_limit = statistics.median(row.raw["percent"])
        if OURS in taken:
            row.raw["ratio"] = timing.ratios(found, taken[OURS])
            row.ratio = statistics.median(row.raw["ratio"])
