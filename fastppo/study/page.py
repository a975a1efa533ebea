"""``report.html`` of a study: the table, each task's methods beside each other, curves of every seed, what the study was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastppo import files
from fastppo.report import blocks
from fastppo.report.blocks import Section, Series, is_number
from fastppo.scores import TITLES
from fastppo.study import table
from fastppo.study.spec import KINDS, Study

CURVES = (
    ("reward", "mean of an iteration's sampled answers", False),
    ("valid_reward", "greedy, on examples held out of the train set", False),
    ("kl", "to the reference, nats a sampled answer", False),
    ("entropy", "of the policy, nats a token", False),
    ("value_loss", "of the critic", False),
    ("clip_fraction", "tokens at the edge of what one update may change", True),
    ("malformed", "sampled answers that are no answer", True),
)


def study_page(study: Study, results: Sequence[Mapping[str, Any]], out: Path, total: int) -> str:
    """The page, as HTML. total: how many cells the study has."""
    done = sum("value" in result for result in results)
    failed: dict[tuple[str, int, str], list[str]] = {}  # one policy for all tasks fails for all of them
    for r in results:
        if "failed" in r:
            failed.setdefault((r["method"], r["seed"], r["failed"]), []).append(r["task"])
    notes = [f"{' + '.join(of)}, {method}, seed {seed} failed: {why}" for (method, seed, why), of in failed.items()]
    if done < total:
        notes.insert(0, f"{done} of {total} cells are finished: the table is of those.")
    tasks, methods = list(study.names.values()), [method.name for method in study.methods]
    names = ", ".join(map(str, study.seeds))
    return blocks.page(
        "fastppo study",
        f"{len(tasks)} tasks · {len(methods)} methods · seeds {names} · {study.settings.get('model') or 'the built-in model'}",
        [
            Section("Scores", [_scores(results, tasks, methods), _plots(results, tasks, methods)]),
            *_curves(study, out),
            Section("Cells", [_cells(results)]),
            Section("What was run", [_settings(study)]),
        ],
        badge="" if done == total else "not finished",
        notes=notes,
    )


def _scores(results: Sequence[Mapping[str, Any]], tasks: Sequence[str], methods: Sequence[str]) -> Markup:
    headings, rows = table.table(results, tasks, methods)
    found = table.cells(results, tasks, methods)
    shown: list[list[object]] = []
    for row in rows:
        method, cells, rest = row[0], row[1 : 1 + len(tasks)], row[1 + len(tasks) :]
        of_tasks: list[object] = []
        for task, text in zip(tasks, cells, strict=True):
            one = found[method].get(task)
            scored = one is not None and one.failed is None
            of_tasks.append(blocks.with_interval(one.mean, one.low, one.high, percent=True) if one and scored else text or "–")
        shown.append([method, *of_tasks, *rest])
    caption = (
        "In brackets 95 % intervals: of the mean over seeds (Student's t); of one seed, or where the seed changes nothing, by "
        "bootstrap over the dev rows."
    )
    return blocks.table(headings, shown, caption=caption)


def _plots(results: Sequence[Mapping[str, Any]], tasks: Sequence[str], methods: Sequence[str]) -> Markup:
    found = table.cells(results, tasks, methods)
    plots = []
    for task in tasks:
        rows = [(m, one.mean, one.low, one.high) for m in methods if (one := found[m].get(task)) and one.failed is None]
        if rows:
            metric = next(one.metric for m in methods if (one := found[m].get(task)) and one.metric)
            plots.append(blocks.interval_plot(task, rows, explained=f"{TITLES[metric]} on the dev split", percent=True))
    return blocks.grid(*plots)


def _curves(study: Study, out: Path) -> Iterable[Section]:
    by_heading: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for place in study.places():
        if place.method.reinforced:
            names = " + ".join(study.names[task] for task in place.tasks)
            runs = by_heading.setdefault(f"Curves: {names}, {place.method.name}", {})
            runs[place.seed] = _ppo_rows(place.folder(out))
    for heading, runs in by_heading.items():
        charts = []
        for key, explained, percent in CURVES:
            series = [
                Series(f"seed {seed}", [(row["step"], row[key]) for row in rows if is_number(row.get(key))])
                for seed, rows in runs.items()
            ]
            if any(one.points for one in series):
                name = key.replace("_", " ")
                charts.append(blocks.line_chart(name, series, x="PPO iteration", explained=explained, percent=percent))
        yield Section(heading, [blocks.grid(*charts)])


def _ppo_rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [row for row in files.read_json_lines(path) if row.get("stage") == "PPO"] if path.is_file() else []


def _cells(results: Sequence[Mapping[str, Any]]) -> Markup:
    heads = ["task", "method", "seed", "score", "where it started", "malformed", "labels seen", "seconds"]
    rows = []
    for r in results:
        if "value" in r:
            start = r.get("start")
            score = blocks.with_interval(r["value"], r["low"], r["high"], percent=True)
            before = blocks.score(start["value"], True) if start else "–"
            malformed = blocks.score(r["malformed"], True)
            labels, seconds = blocks.number(r["labels"]), blocks.number(r["seconds"])
            rows.append([r["task"], r["method"], str(r["seed"]), score, before, malformed, labels, seconds])
    return blocks.folded(f"{len(rows)} cells", blocks.table(heads, rows, text_columns=3)) if rows else Markup()


def _settings(study: Study) -> Markup:
    rows: list[tuple[str, object, str]] = []
    for method in study.methods:
        own = ", ".join(f"{key} {value}" for key, value in method.settings.items())
        rows.append((method.name, own or "–", KINDS[method.kind]))
    rows += [(key, str(value), "setting of all runs") for key, value in study.settings.items()]
    for task, settings in study.tasks.items():
        rows += [(key, str(value), f"setting of {study.names[task]}") for key, value in settings.items()]
    if any(method.kind == "few-shot" for method in study.methods):
        rows.append(("shots", str(study.shots), f"examples in front of a question: {study.demonstrations}"))
    if study.encoder is not None:
        rows.append(("encoder", study.encoder, f"learning rate {study.encoder_lr:g}, {study.encoder_epochs} epochs"))
    if study.data is not None:
        rows.append(("data", study.data, "a folder for each task"))
    return blocks.facts(rows)
