"""What a run's folder holds, as far as it can be read: a run may be going on, cut off or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastppo import config as config_module
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.track import STAGES

# What a summary or a set-up may hold, where it holds it.
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "task": str, "tasks": dict, "metric": str, "labels": list, "answers": list, "model": str, "data": dict, "seed": int,
    "device": str, "device_name": str, "dtype": str, "versions": dict, "stages": dict, "best_step": int, "samples": int,
    "seconds": dict, "tokens_tree": int, "tokens_padded": int, "sampler_gap_max": (int, float), "packed": bool,
}  # fmt: skip


@dataclass
class Records:
    """The files of a run folder; what is not there, or is not what it should be, is empty and said in ``notes``.

    finished: there is a summary. trained: all stages are done, whether or not the summary can be read.
    results: ``summary.json`` of a finished run, else what its newest checkpoint says of the same (and ``stage``, ``step``).
    answers: the objects of ``answers/STAGE.jsonl`` by stage, in the order of the stages.
    """

    run: Path
    config: Config | None = None
    setup: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        return self.finished or self.results.get("stage") == "done"

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The row of figures of each evaluated stage, in the order of the stages."""
        return {name: as_dict(row) for name, row in as_dict(self.results.get("stages")).items()}


def by_task(records: Records) -> dict[str, Records]:
    """Of a run of several tasks what there is of each, by its name, as if it were all of a run; {} of a run of one task."""
    return {name: _of_task(records, name, as_dict(setup)) for name, setup in as_dict(records.setup.get("tasks")).items()}


def _of_task(records: Records, name: str, setup: dict[str, Any]) -> Records:
    rows = {stage: as_dict(as_dict(row.get("tasks")).get(name)) for stage, row in records.stages.items()}
    return Records(
        records.run,
        setup=setup,
        results={
            "stages": {stage: row for stage, row in rows.items() if row},
            "metric": setup.get("metric"),
            "best_step": records.results.get("best_step"),
        },
        finished=records.finished,
        metrics=metrics_of(records.metrics, name),
        samples=[{key: row[key] for key in row if key != "task"} for row in records.samples if row.get("task") == name],
        answers={stage: [row for row in rows if row.get("task") == name] for stage, rows in records.answers.items()},
    )


def metrics_of(rows: Iterable[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """Of rows of ``metrics.jsonl`` of a run of several tasks what is of this one, as if it were all of a run."""
    start = f"{task}/"
    own = [
        {key.removeprefix(start): value for key, value in row.items() if key in ("stage", "step") or key.startswith(start)}
        for row in rows
    ]
    return [row for row in own if row.keys() - {"stage", "step"}]


def read_records(run: Path) -> Records:
    """Reads a run's folder. No file of it is needed but the folder itself.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    records = Records(run)
    try:
        present = {path.name for path in run.iterdir()}
    except OSError as error:
        raise UserError(f"run folder {run}: cannot be read: {error.strerror}") from None
    try:
        records.config = config_module.load_config({}, run / "config.yaml")
    except UserError as error:
        records.notes.append(f"The settings cannot be shown: {error}")
    summary = json_object(records, "summary.json") if "summary.json" in present else {}
    records.finished = bool(summary)
    setup = json_object(records, "setup.json")
    records.results, records.setup = summary or _checkpoint(records), setup | summary
    records.notes[:0] = _unknown_tasks(records)
    trained = any(stage != "zero_shot" for stage in records.stages)
    records.metrics = json_lines(records, "metrics.jsonl", is_metrics, needed=trained)
    records.samples = json_lines(records, "samples.jsonl", lambda row: _is_number(row.get("step")))
    found = {path.stem for path in run.glob("answers/*.jsonl") if not path.name.startswith(".")}
    for stage in [*STAGES, *sorted(found - STAGES.keys())]:
        if stage in found or stage in records.stages:
            records.answers[stage] = json_lines(records, f"answers/{stage}.jsonl", lambda row: "label" in row, needed=True)
    return records


def _unknown_tasks(records: Records) -> Iterable[str]:
    """A line on each task of the settings that nobody knows. Those of files are not read: what they say is in the set-up."""
    from fastppo.tasks import get_task, own  # with its numbers: half a second that no other use of reports needs

    known = str(records.setup.get("task", "")).split(",")
    for name in map(str.strip, records.config.task.split(",") if records.config else ()):
        if name not in known and not own.is_file(name):
            try:
                get_task(name)
            except UserError as error:
                yield f"config.yaml: {error}"


def as_dict(value: object) -> dict[str, Any]:
    """The value where it is a dict, which a damaged file need not hold; else an empty one."""
    return value if isinstance(value, dict) else {}


def _text(records: Records, name: str) -> str | None:
    """None where there is no such file, or it cannot be read."""
    try:
        return (records.run / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        records.notes.append(f"{name} is missing.")
    except OSError as error:
        records.notes.append(f"{name} cannot be read: {error.strerror}.")
    return None


def _parsed(text: str) -> dict[str, Any]:
    try:
        return as_dict(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def json_object(records: Records, name: str) -> dict[str, Any]:
    """A summary or a set-up, without what cannot be what it says."""
    text = _text(records, name)
    found = _parsed(text or "")
    if text is not None and not found:
        records.notes.append(f"{name} is {'damaged' if text.strip() else 'empty'}.")
    wrong = _of_other_kinds(found, "")
    for task, of_task in as_dict(found.get("tasks")).items():
        wrong += _of_other_kinds(as_dict(of_task), f"tasks.{task}.") if as_dict(of_task) else [f"tasks.{task}"]
    for stage, row in as_dict(found.get("stages")).items():
        figures = as_dict(row)
        several = as_dict(figures.get("tasks"))
        wrong += _no_numbers({key: figures[key] for key in figures if not several or key != "tasks"}, f"stages.{stage}")
        for task, of_task in several.items():
            wrong += _no_numbers(as_dict(of_task), f"stages.{stage}.tasks.{task}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        records.notes.append(f"{name} is damaged: it has no usable {', '.join(wrong[:8])}{more}.")
    return {key: value for key, value in found.items() if key not in wrong}


def _of_other_kinds(found: Mapping[str, Any], where: str) -> list[str]:
    return [f"{where}{key}" for key in found if key in KINDS and not isinstance(found[key], KINDS[key])]


def _no_numbers(row: Mapping[str, Any], where: str) -> list[str]:
    """The keys of a stage's row that hold no number; the row itself where it is empty."""
    return [f"{where}.{key}" for key in row if not _is_number(row[key])] if row else [where]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_metrics(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``metrics.jsonl`` is whole: a stage, a step, and numbers or nulls."""
    values = [value for key, value in row.items() if key != "stage"]
    return isinstance(row.get("stage"), str) and _is_number(row.get("step")) and all(v is None or _is_number(v) for v in values)


def json_lines(
    records: Records, name: str, whole: Callable[[dict[str, Any]], bool], *, needed: bool = False
) -> list[dict[str, Any]]:
    """The objects of a file of the run that are ``whole``; what is left out is said in its notes. needed: it has some."""
    text = _text(records, name)
    if needed and text is not None and not text.strip():
        records.notes.append(f"{name} is empty.")
    *lines, last = (text or "").split("\n")
    rows = [_parsed(line) for line in lines]
    bad = [number for number, row in enumerate(rows, 1) if not row or not whole(row)]
    if bad:
        records.notes.append(f"{name} is damaged: {_counted(bad)} left out.")
    if last:
        records.notes.append(f"{name} ends in the middle of a line, which is left out.")
    return [row for row in rows if row and whole(row)]


def _counted(numbers: list[int]) -> str:
    return f"line {numbers[0]} is" if len(numbers) == 1 else f"{len(numbers)} lines, the first of them line {numbers[0]}, are"


def _checkpoint(records: Records) -> dict[str, Any]:
    """What the newest checkpoint that can be read says of the run."""
    found: Iterable[Path] = sorted(records.run.glob("checkpoints/[0-9]*/state.json"), reverse=True)
    for path in found:
        try:
            state = as_dict(_parsed(path.read_text(encoding="utf-8", errors="replace")).get("state"))
        except OSError:
            state = {}
        if state:
            return state
    return {}
