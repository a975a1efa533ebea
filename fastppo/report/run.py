"""``report.html`` of a run: learning curves, answers before and after, confusion matrices, settings, time and tokens."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from fastppo import config as config_module
from fastppo import files
from fastppo.report import blocks
from fastppo.report.answers import Labels, before_and_after, by_stage, given_and_right
from fastppo.report.blocks import Section, Series, is_number, number
from fastppo.report.read import Records, as_dict, by_task, read_records
from fastppo.scores import title
from fastppo.track import STAGES

NAME = "report.html"
NOT_SCORES = {"n", "labels", "malformed"}  # of a stage's row
IN_PERCENT = {"accuracy", "malformed"}
PHASES = {
    "sft": "supervised training",
    "sample": "sampling answers",
    "score": "rewards",
    "estimate": "log-probs, values and advantages",
    "update": "PPO updates",
    "evaluate": "evaluation",
}


class Chart(NamedTuple):
    """A chart of a stage: which metrics, by the names of their curves."""

    title: str
    explained: str
    curves: dict[str, str]
    percent: bool = False
    zero: bool = False


CHARTS = (
    Chart("Reward", "mean of an iteration's sampled answers", {"reward": "sampled", "valid_reward": "held out, greedy"}),
    Chart("Accuracy", "answers that are right", {"accuracy": "sampled", "valid_accuracy": "held out, greedy"}, percent=True),
    Chart("Error", "of answers that are a number, in the mean", {"error": "sampled"}, zero=True),
    Chart("Malformed answers", "sampled answers that are no answer", {"malformed": "malformed"}, percent=True, zero=True),
    Chart("KL to the reference", "nats a sampled answer", {"kl": "KL"}),
    Chart("Entropy", "of the policy, nats a token; near 0 it explores no more", {"entropy": "entropy"}, zero=True),
    Chart("Value error", "of the critic, squared and clipped", {"value_loss": "value error"}, zero=True),
    Chart("Explained variance", "of the returns by the critic; 1: all of it", {"explained_variance": "explained variance"}),
    Chart(
        "Clip fraction", "tokens at the edge of what one update may change",
        {"clip_fraction": "policy", "value_clip_fraction": "value"}, percent=True, zero=True,
    ),
    Chart("Loss", "cross-entropy, nats a token of the answer", {"loss": "loss"}, zero=True),
    Chart("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}, zero=True),
)  # fmt: skip
FURTHER_CHARTS = (
    Chart("Tokens", "computed, and those of a padded batch", {"tokens_tree": "tree", "tokens_padded": "padded"}, zero=True),
    Chart("Policy loss", "", {"policy_loss": "policy loss"}),
    Chart("KL of an update", "nats a token, from before the iteration's update", {"approx_kl": "KL"}),
    Chart("KL weight", "", {"kl_coef": "KL weight"}),
    Chart("Largest |log ratio|", "of a token, new to old policy", {"log_ratio_max": "all updates", "first_log_ratio": "first"}),
    Chart("Answer length", "tokens", {"length": "length"}),
    Chart("Samples a second", "sampled and trained on, since the run began", {"samples_per_s": "samples a second"}),
    Chart("Sampler gap", "sampler's against trainer's log-probs, nats", {"sampler_gap": "gap"}, zero=True),
)
BY_CLASS, HELD_OUT = "reward_class_", "valid_"
NO_CURVES = {"stage", "step"}
X_NAMES = {"SFT": "SFT step", "PPO": "PPO iteration"}


def write_report(run: Path, to: Path) -> list[str]:
    """Write the report of a run, whatever of it there is, to one HTML file. Returns the lines on what is unfinished, missing or
    damaged, which stand on the page too.

    Raises:
        UserError: there is no such folder, or the file cannot be written.
    """
    records = read_records(run)
    files.write_text(to, _page(records))
    return _notes(records)


def run_report(run: Path) -> str:
    """The report of a run, as HTML."""
    return _page(read_records(run))


def _page(records: Records) -> str:
    tasks = by_task(records)
    task = records.setup.get("task") or (records.config.task if records.config else "run")
    return blocks.page(
        f"fastppo: {task}",
        _subtitle(records),
        [
            Section("Results", [*_results(records), _overview(tasks)]),
            *_curves(records, tasks),
            *_answers(records, tasks),
            Section("Time and tokens", [blocks.grid(*_costs(records))]),
            Section("Settings", _settings(records)),
            Section("Device and checks", [_device(records)]),
        ],
        badge="" if records.finished else "damaged" if records.trained else "not finished",
        notes=_notes(records),
    )


def _answers(records: Records, tasks: Mapping[str, Records]) -> Iterable[Section]:
    """What was answered; of several tasks each with its own results and curves in front of that."""
    for name, of_task in tasks.items():
        labels = Labels.of(of_task.setup)
        sections = [Section("Results", _results(of_task)), *_curves(of_task, {}), given_and_right(by_stage(of_task), labels)]
        for section in (*sections, before_and_after(of_task, labels)):
            yield Section(f"{name}: {section.title[:1].lower()}{section.title[1:]}", section.blocks, section.text)
    if not tasks:
        labels = Labels.of(records.setup)
        yield given_and_right(by_stage(records), labels)
        yield before_and_after(records, labels)


def _subtitle(records: Records) -> str:
    setup, data = records.setup, as_dict(records.setup.get("data"))
    parts = [f"run {records.run.resolve().name}"]
    if setup:
        rows = ", ".join(f"{number(data[k])} {k} rows" for k in ("train", "dev") if is_number(data.get(k)))
        parts += [f"{key} {setup[key]}" for key in ("model", "seed") if key in setup]
        parts.insert(2, f"data {data.get('name')} ({rows})")
    return " · ".join(parts)


def _notes(records: Records) -> list[str]:
    if records.finished:
        return records.notes
    command = f"fastppo train --resume {shlex.quote(str(records.run))}"
    if records.trained:
        first = "This run is finished, but has no summary: its figures are those of its last checkpoint."
        return [f"{first} {command} writes it again.", *records.notes]
    stage, step = records.results.get("stage"), records.results.get("step")
    where = f" Its last checkpoint stands in stage {stage} after step {step}." if stage else ""
    first = f"This run is not finished: what follows is what there is so far.{where} Go on with: {command}"
    return [first, *records.notes]


# -- results -----------------------------------------------------------------------------------------------------------


def main_metric(row: dict[str, Any], said: object = None) -> str | None:
    """The metric that a task is judged by: the one that was said, else the first with an interval, else the first score."""
    scores = [k for k, v in row.items() if is_number(v) and k not in NOT_SCORES]
    if said in scores:
        return str(said)
    return next((k for k in scores if f"{k}_low" in scores and f"{k}_high" in scores), scores[0] if scores else None)


def _results(records: Records) -> list[Markup]:
    stages = records.stages
    if not stages:
        return [_tiles(records, None)]
    metric = main_metric(list(stages.values())[-1], records.results.get("metric"))
    keys = list(dict.fromkeys(k for row in stages.values() for k, v in row.items() if is_number(v)))
    scores = [k for k in keys if k not in NOT_SCORES and not (k.endswith(("_low", "_high")) and k.rpartition("_")[0] in keys)]
    scores.sort(key=lambda k: k != metric)
    columns = [*scores, *(k for k in ("malformed", "n", "labels") if k in keys)]
    heads = [{"n": "dev rows", "labels": "labels seen"}.get(k, title(k)) for k in columns]
    table = blocks.table(
        ["", *heads], [[STAGES.get(name, name), *(_score(row, k) for k in columns)] for name, row in stages.items()],
        caption="In brackets: bootstrap 95 % intervals over the dev rows." if metric and f"{metric}_low" in keys else "",
    )  # fmt: skip
    bounds = [
        (STAGES.get(stage, stage), *(row.get(f"{metric}{end}", math.nan) for end in ("", "_low", "_high")))
        for stage, row in stages.items()
    ]
    plot = blocks.interval_plot(
        title(metric or ""), bounds, explained="on the dev set, with 95 % interval", percent=metric in IN_PERCENT
    )
    return [_tiles(records, metric), blocks.beside(table, plot)]


def _overview(tasks: Mapping[str, Records]) -> Markup:
    """The main metric of each of several tasks, by stage."""
    stages = list(dict.fromkeys(stage for of_task in tasks.values() for stage in of_task.stages))
    rows: list[list[object]] = []
    for name, of_task in tasks.items():
        metric = main_metric(next(iter(of_task.stages.values()), {}), of_task.results.get("metric")) or ""
        scores = [_score(of_task.stages.get(stage, {}), metric) for stage in stages]
        rows.append([f"{name} ({title(metric)})" if metric else name, *scores])
    caption = "The score of the run is the mean over tasks of these."
    heads = ["task", *(STAGES.get(stage, stage) for stage in stages)]
    return blocks.table(heads, rows, caption=caption) if stages else Markup()


def _score(row: dict[str, Any], key: str) -> object:
    value, low, high = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    if not is_number(value):
        return "–"
    if is_number(low) and is_number(high):
        return blocks.with_interval(value, low, high, percent=key in IN_PERCENT)
    return number(value) if key in ("n", "labels") else blocks.score(value, key in IN_PERCENT)


def _tiles(records: Records, metric: str | None) -> Markup:
    results, stages = records.results, list(records.stages.items())
    tiles = []
    for key in dict.fromkeys(k for k in (metric, "accuracy", "malformed") if k):
        shown = [(STAGES.get(s, s), blocks.score(row[key], key in IN_PERCENT)) for s, row in stages if is_number(row.get(key))]
        if shown:
            *before, (stage, last) = shown
            tiles.append((f"{title(key)} {stage}", last, ", ".join(f"{text} {name}" for name, text in before)))
    tree, padded = results.get("tokens_tree"), results.get("tokens_padded")
    if is_number(tree) and is_number(padded) and padded and records.setup.get("packed", True):
        tiles.append(("tokens saved", f"{1 - tree / padded:.1%}", f"{number(tree)} of {number(padded)} computed in PPO"))
    seconds = [v for v in as_dict(results.get("seconds")).values() if is_number(v)]
    if seconds:
        tiles.append(("time", _duration(sum(seconds)), "in training and evaluation"))
    speed, samples = results.get("samples_per_s"), results.get("samples")
    if is_number(speed) and is_number(samples):
        tiles.append(("samples a second", number(speed), f"{number(samples)} answers sampled"))
    return blocks.tiles(tiles) if tiles else Markup()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


# -- curves ------------------------------------------------------------------------------------------------------------


def _curves(records: Records, tasks: Mapping[str, Records]) -> Iterable[Section]:
    """Those of metrics that are of a single one of several tasks are left out."""
    labels = Labels.of(records.setup)
    for stage in dict.fromkeys(str(row.get("stage")) for row in records.metrics):
        rows = [row for row in records.metrics if str(row.get("stage")) == stage and is_number(row.get("step"))]
        best = records.results.get("best_step") if stage == "PPO" and records.finished else None
        x = X_NAMES.get(stage, "step")
        own = tuple(f"{name}/" for name in tasks)
        kept = [{key: value for key, value in row.items() if not key.startswith(own)} for row in rows]
        charts, further = ([_chart(chart, rows, x, best) for chart in part] for part in _charts(kept, labels))
        text = f"The dashed line marks iteration {best}, whose policy was kept." if is_number(best) else ""
        more = blocks.folded("More", blocks.grid(*further)) if further else Markup()
        yield Section(f"Learning curves, {stage}", [blocks.grid(*charts), more], text)


def _charts(rows: list[dict[str, Any]], labels: Labels) -> tuple[list[Chart], list[Chart]]:
    """The charts for what a stage recorded, and those that come second; no metric is left out."""
    recorded = [key for row in rows for key, value in row.items() if value is None or is_number(value)]
    keys = [key for key in dict.fromkeys(recorded) if key not in NO_CURVES]
    shown = [chart for chart in CHARTS if chart.curves.keys() & keys]
    classes = {key: labels.name(_class_id(key)) for key in sorted(keys) if key.startswith(BY_CLASS)}
    if classes:
        shown.insert(1, Chart("Reward by class", "mean of each right answer's samples", classes))
    scores = [key for key in keys if key.startswith(HELD_OUT) and not any(key in chart.curves for chart in CHARTS)]
    names = {key: title(key.removeprefix(HELD_OUT)) for key in scores}
    shown[2:2] = [Chart(f"{name}, held out", "greedy; not the dev set", {key: name}) for key, name in names.items()]
    further = [chart for chart in FURTHER_CHARTS if chart.curves.keys() & keys]
    known = {key for chart in [*shown, *further] for key in chart.curves}
    further += [Chart(key.replace("_", " "), "", {key: key}) for key in keys if key not in known]
    return shown, further


def _class_id(key: str) -> int | str:
    text = key.removeprefix(BY_CLASS)
    return int(text) if text.isascii() and text.isdigit() else text


def _chart(chart: Chart, rows: list[dict[str, Any]], x: str, best: object) -> Markup:
    series = []
    for i, (key, name) in enumerate(chart.curves.items()):
        points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
        if points:
            series.append(Series(name, points, marked=key.startswith(HELD_OUT), color=i))
    return blocks.line_chart(
        chart.title, series, x=x, explained=chart.explained, percent=chart.percent, zero=chart.zero,
        at=best if is_number(best) else None, x_range=(1, max(row["step"] for row in rows)),
    )  # fmt: skip


# -- costs, settings, device -------------------------------------------------------------------------------------------


def _costs(records: Records) -> Iterable[Markup]:
    seconds = {k: v for k, v in as_dict(records.results.get("seconds")).items() if is_number(v)}
    order = [*(k for k in PHASES if k in seconds), *(k for k in seconds if k not in PHASES)]
    phases = [(PHASES.get(k, k), seconds[k], _duration(seconds[k])) for k in order]
    yield blocks.stacked_bar("Time by phase", phases, explained=f"{_duration(sum(seconds.values()))} together")
    packed = records.setup.get("packed", True)
    for stage in dict.fromkeys(str(row.get("stage")) for row in records.metrics):
        rows = [row for row in records.metrics if str(row.get("stage")) == stage]
        tree, padded = (sum(row[k] for row in rows if is_number(row.get(k))) for k in ("tokens_tree", "tokens_padded"))
        if padded and packed:
            yield blocks.stacked_bar(
                f"Tokens of the batches, {stage}",
                [("computed in the tree", tree, number(tree)), ("saved", max(0, padded - tree), number(padded - tree))],
                explained=f"{number(padded)} in padded batches", rest="saved",
            )  # fmt: skip
        elif padded:
            yield blocks.stacked_bar(f"Tokens of the batches, {stage}", [("computed, padded", padded, number(padded))])


def _settings(records: Records) -> list[Markup]:
    config = records.config
    if config is None:
        return []
    defaults = config_module.REAL_MODEL_DEFAULTS if config.model is not None else {}
    changed, same = [], []
    for key, setting in config_module.SETTINGS.items():
        value, default = config_module.get(config, key), defaults.get(key, setting.default)
        if value == default:
            same.append((key, _setting(value), setting.rule.help))
        else:
            changed.append((key, _setting(value), f"{setting.rule.help}; default: {_setting(default)}"))
    first = blocks.facts(changed) if changed else blocks.paragraph("All settings have their defaults.")
    return [first, blocks.folded(f"{len(same)} settings with their defaults", blocks.facts(same))]


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False) if value else "none"
    return "none" if value is None else str(value)


def _device(records: Records) -> Markup:
    setup, results = records.setup, records.results
    rows = [("device", str(setup["device"]), str(setup.get("device_name") or ""))] if setup.get("device") else []
    if setup.get("dtype"):
        rows.append(("dtype", str(setup["dtype"]), "numbers of the frozen base"))
    rows += [(name, str(version), "version") for name, version in as_dict(setup.get("versions")).items()]
    for key, name, meaning in (
        ("best_step", "kept iteration", "of PPO: its policy earned most on examples held out of the train set (0: the start)"),
        ("first_kl", "first KL", "policy to reference at the first PPO step: 0 where PPO starts from its reference"),
        ("first_log_ratio", "first |log ratio|", "new to old policy at the first step: 0 unless --ppo-old-logprobs sampler"),
        ("sampler_gap_max", "sampler gap", "largest difference between the sampler's and the trainer's log-probs, nats"),
    ):
        if is_number(results.get(key)):
            rows.append((name, number(results[key]), meaning))
    return blocks.facts(rows) if rows else Markup()
