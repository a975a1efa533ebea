"""The table of a study: a row a method, a column a task, means over seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastppo.report.blocks import is_number
from fastppo.scores import TITLES
from fastppo.tasks.leaderboard import glue_average, superglue_average

UNIT = (
    "Scores are x 100, as published tables have them. In brackets 95 % intervals: of the mean over seeds (Student's t); of one "
    "seed, or where the seed changes nothing, by bootstrap over the dev rows."
)


@dataclass(frozen=True)
class Cell:
    """What is known of a method on a task. values: the task's official metric of each seed, in [-1, 1]. low, high: 95 %
    interval.

    malformed: mean fraction of answers that were none. failed: what went wrong where nothing was found. lost: how many seeds
    failed beside others.
    """

    metric: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    malformed: float
    failed: str | None = None
    lost: int = 0


def is_result(result: object) -> bool:
    """Whether it is one of a finished cell, whole."""
    if not isinstance(result, dict):
        return False
    start = result.get("start", {"value": 0.0})
    scores = result.get("scores")
    if not isinstance(start, dict) or not isinstance(scores, dict) or result.get("metric") not in TITLES:
        return False
    numbers = [result.get(key) for key in ("value", "low", "high", "malformed", "labels", "seconds")]
    return all(map(is_number, [*numbers, start.get("value"), *scores.values()]))


def cell(results: Sequence[Mapping[str, Any]]) -> Cell | None:
    """The results of one method on one task, one a seed, as one; None where there is none.

    Over several seeds the interval is Student's (mean +- t s / sqrt n); of one, or where the seed changes nothing, it is the
    run's own, by bootstrap over the examples.
    """
    good = [result for result in results if "value" in result]
    if not good:
        failed = next((result["failed"] for result in results if "failed" in result), None)
        return Cell("", (), math.nan, math.nan, math.nan, math.nan, failed) if failed else None
    values = tuple(float(result["value"]) for result in good)
    mean = float(np.mean(values))
    if len(set(values)) > 1:
        from scipy import stats  # half a second to import

        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        low, high = mean - half, mean + half
    else:
        low, high = float(good[0]["low"]), float(good[0]["high"])
    malformed = float(np.mean([result["malformed"] for result in good]))
    return Cell(str(good[0]["metric"]), values, mean, low, high, malformed, lost=len(results) - len(good))


def cells(
    results: Iterable[Mapping[str, Any]], tasks: Sequence[str], methods: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """By method and task; those without a result are left out."""
    results = list(results)
    found: dict[str, dict[str, Cell]] = {}
    for method in methods:
        row = {task: cell([r for r in results if (r["method"], r["task"]) == (method, task)]) for task in tasks}
        found[method] = {task: one for task, one in row.items() if one is not None}
    return found


def averages(results: Iterable[Mapping[str, Any]], method: str) -> dict[str, float | None]:
    """A method's averages by the rules of the leaderboards, of its means over seeds; None where a task is missing."""
    by_task: dict[str, list[Mapping[str, float]]] = {}
    for result in results:
        if result["method"] == method and "scores" in result:
            by_task.setdefault(result["task"], []).append(result["scores"])
    scores = {
        task: {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if isinstance(rows[0][name], float)}
        for task, rows in by_task.items()
    }
    return {"GLUE": glue_average(scores), "SuperGLUE": superglue_average(scores)}


def table(
    results: Sequence[Mapping[str, Any]], tasks: Sequence[str], methods: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of texts: each task with its metric, and the averages that some method has."""
    found = cells(results, tasks, methods)
    metrics = {task: TITLES[one.metric] for row in found.values() for task, one in row.items() if one.metric}
    means = {method: averages(results, method) for method in methods}
    shown_means = [name for name in ("GLUE", "SuperGLUE") if any(mean[name] is not None for mean in means.values())]
    headings = ["method", *(f"{task} ({metrics[task]})" if task in metrics else task for task in tasks)]
    rows = []
    for method, row in found.items():
        ends = [means[method][name] for name in shown_means]
        texts = [shown(row.get(task)) for task in tasks]
        rows.append([method, *texts, *("" if end is None else f"{100 * end:z.1f}" for end in ends)])
    return [*headings, *(f"{name} average" for name in shown_means)], rows


def shown(cell: Cell | None) -> str:
    """By `UNIT`: ``84.8 [83.1, 86.5]``."""
    if cell is None:
        return ""
    if cell.failed is not None:
        return "failed"
    return f"{100 * cell.mean:z.1f} [{100 * cell.low:z.1f}, {100 * cell.high:z.1f}]{lost(cell)}"


def lost(cell: Cell) -> str:
    """Of how many seeds a mean is, where some failed."""
    return f" ({len(cell.values)} of {len(cell.values) + cell.lost} seeds)" if cell.lost else ""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as Markdown, with `UNIT` below it. Its texts are plain words and numbers."""
    lines = [headings, ["---", *(["---:"] * (len(headings) - 1))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{UNIT}\n"
