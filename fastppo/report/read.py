"""What a run's folder holds, as far as it can be read: a run may be going on, cut off or damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastppo import config as config_module
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.track import STAGES


@dataclass
class Records:
    """The files of a run folder; what is not there, or is not what it should be, is empty and said in ``notes``.

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
    def stages(self) -> dict[str, dict[str, Any]]:
        """The row of figures of each evaluated stage, in the order of the stages."""
        return {name: as_dict(row) for name, row in as_dict(self.results.get("stages")).items()}


def by_task(records: Records) -> dict[str, Records]:
    """Of a run of several tasks what there is of each, by its name, as if it were all of a run; {} of a run of one task."""
    return {name: _of_task(records, name, as_dict(setup)) for name, setup in as_dict(records.setup.get("tasks")).items()}


def _of_task(records: Records, name: str, setup: dict[str, Any]) -> Records:
    start = f"{name}/"
    rows = {stage: as_dict(as_dict(row.get("tasks")).get(name)) for stage, row in records.stages.items()}
    measured = [
        {key.removeprefix(start): value for key, value in row.items() if key in ("stage", "step") or key.startswith(start)}
        for row in records.metrics
    ]
    return Records(
        records.run,
        setup=setup,
        results={
            "stages": {stage: row for stage, row in rows.items() if row},
            "metric": setup.get("metric"),
            "best_step": records.results.get("best_step"),
        },
        finished=records.finished,
        metrics=[row for row in measured if row.keys() - {"stage", "step"}],
        samples=[{key: row[key] for key in row if key != "task"} for row in records.samples if row.get("task") == name],
        answers={stage: [row for row in rows if row.get("task") == name] for stage, rows in records.answers.items()},
    )


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
    summary = _object(records, "summary.json") if "summary.json" in present else {}
    records.finished = bool(summary)
    records.results = summary or _checkpoint(records)
    records.setup = summary or _object(records, "setup.json")
    records.metrics = _lines(records, "metrics.jsonl")
    records.samples = _lines(records, "samples.jsonl")
    found = {path.stem for path in run.glob("answers/*.jsonl") if not path.name.startswith(".")}
    for stage in [*STAGES, *sorted(found - STAGES.keys())]:
        if stage in found or stage in records.stages:
            records.answers[stage] = _lines(records, f"answers/{stage}.jsonl")
    return records


def as_dict(value: object) -> dict[str, Any]:
    """The value where it is a dict, which a damaged file need not hold; else an empty one."""
    return value if isinstance(value, dict) else {}


def _text(records: Records, name: str) -> str:
    try:
        return (records.run / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        records.notes.append(f"{name} is missing.")
    except OSError as error:
        records.notes.append(f"{name} cannot be read: {error.strerror}.")
    return ""


def _parsed(text: str) -> dict[str, Any]:
    try:
        return as_dict(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _object(records: Records, name: str) -> dict[str, Any]:
    text = _text(records, name)
    found = _parsed(text)
    if text and not found:
        records.notes.append(f"{name} is damaged.")
    return found


def _lines(records: Records, name: str) -> list[dict[str, Any]]:
    *lines, last = _text(records, name).split("\n")
    rows = [_parsed(line) for line in lines]
    bad = [number for number, row in enumerate(rows, 1) if not row]
    if bad:
        records.notes.append(f"{name} is damaged: {_counted(bad)} left out.")
    if last:
        records.notes.append(f"{name} ends in the middle of a line, which is left out.")
    return [row for row in rows if row]


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
