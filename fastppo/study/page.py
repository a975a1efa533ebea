"""``report.html`` of a study: the table, each task's methods beside each other, curves of every seed, answers, what was run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastppo.report import NAME, blocks
from fastppo.report.answers import Labels, beside_each_other, given_and_right
from fastppo.report.blocks import Section, Series, is_number
from fastppo.report.read import Records, as_dict, is_metrics, json_lines, json_object, metrics_of
from fastppo.scores import title
from fastppo.study import table
from fastppo.study.spec import KINDS, Method, Place, Study
from fastppo.tasks import get_task
from fastppo.track import STAGES

Curve = tuple[str, str, str, bool]
"""Metric, title, what it is, whether it is shown in percent."""

Curves = Mapping[int, Sequence[Mapping[str, Any]]]
"""The rows of metrics of each seed."""

CURVES = (
    ("reward", "Reward", "mean of an iteration's sampled answers", False),
    ("accuracy", "Accuracy", "sampled answers that are right", True),
    ("error", "Error", "of sampled answers that are a number, in the mean", False),
    ("kl", "KL to the reference", "nats a sampled answer", False),
    ("entropy", "Entropy", "of the policy, nats a token", False),
    ("value_loss", "Value error", "of the critic, squared and clipped", False),
    ("clip_fraction", "Clip fraction", "tokens at the edge of what one update may change", True),
    ("malformed", "Malformed answers", "sampled answers that are no answer", True),
)
MORE_CURVES = (
    ("valid_reward", "Reward, held out", "greedy, on examples held out of the train set", False),
    ("explained_variance", "Explained variance", "of the returns by the critic; 1: all of it", False),
    ("grad_norm", "Gradient norm", "before clipping", False),
)
LOSS = ("loss", "Loss", "cross-entropy of SFT, nats a token of the answer", False)
HELD_OUT = "x 100; greedy, on examples held out of the train set"
BY_CLASS = "reward_class_"
UNFOLDED_TASKS, UNFOLDED_CELLS = 3, 12


def study_page(
    study: Study, results: Sequence[Mapping[str, Any]], out: Path, damaged: Sequence[str], to: Path
) -> tuple[str, list[str]]:
    """(the page as HTML, its lines on what is unfinished, failed or damaged).

    Args:
        damaged: lines on results that could not be read.
        to: where the page will lie: it leads to the runs' own pages.
    """
    done, total = sum("value" in result for result in results), sum(len(place.tasks) for place in study.places())
    failed: dict[tuple[str, int, str], list[str]] = {}  # one policy for all tasks fails for all of them
    for r in results:
        if "failed" in r:
            failed.setdefault((r["method"], r["seed"], r["failed"]), []).append(r["task"])
    notes = [f"{' + '.join(of)}, {method}, seed {seed} failed: {why}" for (method, seed, why), of in failed.items()]
    if done < total:
        go_on = f"fastppo study --resume {shlex.quote(str(out))}"
        notes.insert(0, f"{done} of {total} cells are finished: the table is of those. Go on with: {go_on}")
    notes += damaged
    tasks, methods = list(study.names.values()), [method.name for method in study.methods]
    names = ", ".join(map(str, study.seeds))
    runs = _Runs(study, out)
    sections = [
        Section("Scores", [_scores(results, tasks, methods), _plots(results, tasks, methods)], table.UNIT),
        *(Section(name, [*_curves(study, task, runs), *_answers(study, task, runs)]) for task, name in study.names.items()),
        Section("All tasks in one policy", list(_curves_of_all(study, runs))),
        Section("Cells", [_cells(study, results, out, to)]),
        Section("What was run", [_settings(study), _devices(runs)]),
    ]
    notes += runs.notes
    page = blocks.page(
        "fastppo study",
        f"{len(tasks)} tasks · {len(methods)} methods · seeds {names} · {study.settings.get('model') or 'the built-in model'}",
        sections,
        badge="" if done == total else "not finished",
        notes=notes,
    )
    return page, notes


def _scores(results: Sequence[Mapping[str, Any]], tasks: Sequence[str], methods: Sequence[str]) -> Markup:
    headings, rows = table.table(results, tasks, methods)
    found = table.cells(results, tasks, methods)
    shown: list[list[object]] = []
    for row in rows:
        method, cells, rest = row[0], row[1 : 1 + len(tasks)], row[1 + len(tasks) :]
        of_tasks: list[object] = []
        for task, text in zip(tasks, cells, strict=True):
            one = found[method].get(task)
            if one is None or one.failed is not None:
                of_tasks.append(text or "–")
            else:
                of_tasks.append(_hundredths(one.mean, one.low, one.high) + table.lost(one))
        shown.append([method, *of_tasks, *rest])
    return blocks.table(headings, shown)


def _hundredths(value: float, low: float, high: float) -> Markup:
    return blocks.with_interval(100 * value, 100 * low, 100 * high, digits=1)


def _plots(results: Sequence[Mapping[str, Any]], tasks: Sequence[str], methods: Sequence[str]) -> Markup:
    found = table.cells(results, tasks, methods)
    plots = []
    for task in tasks:
        scored = {m: one for m in methods if (one := found[m].get(task)) and one.failed is None}
        rows = [(m, 100 * one.mean, 100 * one.low, 100 * one.high) for m, one in scored.items()]
        if rows:
            metric = title(next(iter(scored.values())).metric)
            plots.append(blocks.interval_plot(task, rows, explained=f"{metric} x 100 on the dev split", digits=1))
    return blocks.grid(*plots)


class _Runs:
    """The files of a study's cells. ``notes`` says what in them is damaged."""

    def __init__(self, study: Study, out: Path):
        self.study, self.out = study, out
        self.notes: list[str] = []
        self._of_all: dict[Path, list[dict[str, Any]]] = {}  # files of runs of all tasks, which each task's section reads

    def lines(self, place: Place, name: str, whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The objects of a file of a cell's folder that are ``whole``; none where there is no such file."""
        records = Records(place.folder(self.out))
        path = records.run / name
        if path in self._of_all or not path.is_file():
            return self._of_all.get(path, [])
        rows = json_lines(records, name, whole)
        self._tell(place, records)
        if len(place.tasks) > 1:
            self._of_all[path] = rows
        return rows

    def metrics(self, task: str, method: Method) -> Curves:
        """What was recorded by seed: in a run of several tasks, of this one."""
        found = {}
        for seed in self.study.seeds_of(task, method):
            place = self.study.place_of(task, method, seed)
            rows = self.lines(place, "metrics.jsonl", is_metrics)
            found[seed] = metrics_of(rows, get_task(task).name) if len(place.tasks) > 1 else rows
        return found

    def metrics_of_all(self, method: Method) -> Curves:
        """What runs of all tasks recorded by seed, but for what is of single ones."""
        places = [self.study.place_of("", method, seed) for seed in self.study.seeds]
        found = {place.seed: self.lines(place, "metrics.jsonl", is_metrics) for place in places}
        return {seed: [{key: row[key] for key in row if "/" not in key} for row in rows] for seed, rows in found.items()}

    def answers(self, task: str, method: Method) -> list[dict[str, Any]]:
        """Those of the last stage of the first seed."""
        place = self.study.place_of(task, method, self.study.seeds[0])
        for stage in reversed(STAGES):
            rows = self.lines(place, f"answers/{stage}.jsonl", lambda row: "label" in row)
            if len(place.tasks) > 1:
                rows = [row for row in rows if row.get("task") == get_task(task).name]
            if rows:
                return rows
        return []

    def setups(self) -> Iterable[dict[str, Any]]:
        """The set-up of each run that trains."""
        for place in self.study.places():
            records = Records(place.folder(self.out))
            if (records.run / "setup.json").is_file():
                yield json_object(records, "setup.json")
                self._tell(place, records)

    def _tell(self, place: Place, records: Records) -> None:
        self.notes += [f"{place.title}: {note}" for note in records.notes]


def _curves(study: Study, task: str, runs: _Runs) -> Iterable[Markup]:
    metric = get_task(task).metrics[0]
    held_out = (f"valid_{metric}", f"{title(metric)}, held out", HELD_OUT, False)
    for method in study.methods:
        found = runs.metrics(task, method)
        yield _charts(study, method, found, held_out, _classes(task, found))


def _curves_of_all(study: Study, runs: _Runs) -> Iterable[Markup]:
    """Of methods that are one policy for all tasks: what is of no single one."""
    held_out = ("valid_score", "Score, held out", f"mean over tasks of their metrics; {HELD_OUT}", False)
    for method in study.methods:
        if method.multi and len(study.tasks) > 1:
            yield _charts(study, method, runs.metrics_of_all(method), held_out)


def _charts(study: Study, method: Method, runs: Curves, held_out: Curve, classes: Iterable[Curve] = ()) -> Markup:
    """The charts of a method's runs; nothing where none has been trained."""
    sft, ppo = ({s: [r for r in rows if r["stage"] == stage] for s, rows in runs.items()} for stage in ("SFT", "PPO"))
    first = [_chart(ppo, *curve) for curve in CURVES]
    first.insert(1, _chart(ppo, *held_out, scale=100))
    more = [_chart(ppo, *curve) for curve in (*MORE_CURVES, *classes)]
    (more if any(first) else first).append(_chart(sft, *LOSS, x="SFT step"))
    if not any(first):
        return Markup()
    rest = [blocks.folded("More", blocks.grid(*more))] if any(more) else []
    return blocks.folded(f"Curves: {method.name}", blocks.grid(*first), *rest, opened=_opened(study))


def _opened(study: Study) -> bool:
    return len(study.tasks) <= UNFOLDED_TASKS


def _classes(task: str, runs: Curves) -> Iterable[Curve]:
    """The reward of each class that was recorded, as in `CURVES`."""
    labels = dict(enumerate(get_task(task).label_names))
    for key in sorted({key for rows in runs.values() for row in rows for key in row if key.startswith(BY_CLASS)}):
        label = key.removeprefix(BY_CLASS)
        name = next((name for number, name in labels.items() if str(number) == label), label)
        yield key, f"Reward of {name}", "mean of this right answer's samples", False


def _chart(
    runs: Curves, key: str, name: str, explained: str, percent: bool, *, x: str = "PPO iteration", scale: int = 1
) -> Markup:
    """One curve a seed; nothing where no seed has a value."""
    series = [
        Series(f"seed {seed}", [(row["step"], scale * row[key]) for row in rows if is_number(row.get(key))], color=i)
        for i, (seed, rows) in enumerate(runs.items())
    ]
    if not any(one.points for one in series):
        return Markup()
    return blocks.line_chart(name, series, x=x, explained=explained, percent=percent, last=len(series) == 1)


def _answers(study: Study, task: str, runs: _Runs) -> Iterable[Markup]:
    """Every method's answers, by its first seed."""
    found = {method.name: runs.answers(task, method) for method in study.methods}
    answers = {name: rows for name, rows in found.items() if rows}
    if answers:
        known = get_task(task)
        labels = Labels(known.label_names, known.labels)
        matrices, which = given_and_right(answers, labels), "" if len(study.seeds) == 1 else f", seed {study.seeds[0]}"
        text = blocks.paragraph(matrices.text)
        yield blocks.folded(f"{matrices.title}{which}", text, *matrices.blocks, opened=_opened(study))
        yield blocks.folded(f"Answers to the same examples{which}", beside_each_other(answers, labels))


def _cells(study: Study, results: Sequence[Mapping[str, Any]], out: Path, to: Path) -> Markup:
    heads = ["task", "method", "seed", "score", "where it started", "malformed", "labels seen", "seconds", "its page"]
    methods, tasks = {method.name: method for method in study.methods}, {name: task for task, name in study.names.items()}
    rows: list[list[object]] = []
    for r in results:
        if "value" in r:
            task, method, start = tasks[r["task"]], methods[r["method"]], r.get("start")
            seed = str(r["seed"]) if len(study.seeds_of(task, method)) == len(study.seeds) else "any"
            page = study.place_of(task, method, r["seed"]).folder(out) / NAME
            rows.append([
                r["task"], r["method"], seed, _hundredths(r["value"], r["low"], r["high"]),
                blocks.score(100 * start["value"], digits=1) if start else "–", blocks.score(r["malformed"], True),
                blocks.number(r["labels"]), blocks.number(r["seconds"]),
                blocks.link("report", os.path.relpath(page, to.parent)) if page.is_file() else "–",
            ])  # fmt: skip
    caption = "Scores are x 100. A method that the seed does not change is run once, for any seed."
    if any(method.multi for method in study.methods) and len(study.tasks) > 1:
        caption += " Labels and seconds of one policy for all tasks are those of its whole run."
    shown = blocks.table(heads, rows, text_columns=3, caption=caption) if rows else Markup()
    return shown if len(rows) <= UNFOLDED_CELLS else blocks.folded(f"{len(rows)} cells", shown)


def _devices(runs: _Runs) -> Markup:
    """On what the runs were trained, and with which versions; all of them where they differ."""
    found: dict[str, dict[str, None]] = {}
    for setup in runs.setups():
        facts = {"device": setup.get("device_name") or setup.get("device"), "dtype": setup.get("dtype")}
        for name, value in (facts | as_dict(setup.get("versions"))).items():
            if value:
                found.setdefault(name, {})[str(value)] = None
    meanings = {"device": "of the runs that train", "dtype": "numbers of the frozen base"}
    return blocks.facts([(name, "\n".join(values), meanings.get(name, "version")) for name, values in found.items()])


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
