"""Run a study: cell after cell, each kept as soon as it is done, so that a study that is begun again goes on where it stood.

    OUT/study.yaml                          the study
    OUT/cells/TASK/METHOD/seed-N/           a cell: the run folder of what was trained, and result.json once it is done
    OUT/study.json, table.md, report.html   written anew after every cell
"""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.table import Table
from rich.text import Text

from fastppo import files, trainer
from fastppo.budget import Prompts
from fastppo.config import Config, get
from fastppo.errors import UserError, printable
from fastppo.evaluate import encode, evaluate, row_of, with_interval, write_answers
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import load_base, pick_device
from fastppo.report import NAME
from fastppo.study import table
from fastppo.study.encoder import train_encoder
from fastppo.study.page import study_page
from fastppo.study.spec import Place, Study, check_data
from fastppo.tasks import Dataset, Example, Task, get_task, load_data

RESULT = "result.json"
OF_BASE = ("model", "device", "dtype", "trust_remote_code")
"""The settings that say which base it is, and where."""


Key = tuple[str, str, int]
"""Of a result: task, name of the method, seed."""


def named(key: Key) -> dict[str, Any]:
    """What a result says of its place."""
    return dict(zip(("task", "method", "seed"), key, strict=True))


def results(study: Study, out: Path) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """(what the finished cells found of each task, by key and in their order; a line on each damaged file, whose cell counts as
    not finished)."""
    found: dict[Key, dict[str, Any]] = {}
    damaged = []
    for place in study.places():
        path = place.folder(out) / RESULT
        result = files.read_json(path) or {}
        of_tasks = result.get("results", [result])
        if isinstance(of_tasks, list) and len(of_tasks) == len(place.keys) and all(map(table.is_result, of_tasks)):
            found |= {key: {**one, **named(key)} for key, one in zip(place.keys, of_tasks, strict=True)}
        elif path.exists():
            damaged.append(f"{path.relative_to(out)} is damaged: the cell counts as not finished.")
    return found, damaged


class Runner:
    """Runs the cells of a study that are not finished."""

    def __init__(self, study: Study, out: Path, console: rich.console.Console):
        self.study, self.out, self.console = study, out, console
        self.base: ActorCritic | None = None  # of the methods that train nothing; they share it

    def go(self, *, resumed: bool) -> list[dict[str, Any]]:
        """The cells that failed: each leaves its reason for the table and is tried again by the next run. resumed: data may be
        gone since the study began.

        Raises:
            UserError: it is gone, or a task's file changed. Interrupted: after a signal.
        """
        found, damaged = results(self.study, self.out)
        for line in damaged:
            self._say(f"{line} It is run again.")
        todo = [place for place in self.study.places() if place.keys[0] not in found]
        self._check_files()
        if resumed:
            check_data(self.study, dict.fromkeys(task for place in todo for task in place.tasks))
        total = sum(1 for _ in self.study.places())
        failed: list[dict[str, Any]] = []
        for number, place in enumerate(todo, total - len(todo) + 1):
            self._say(f"cell {number}/{total}: {place.title}")
            self._check_files()
            began = time.monotonic()
            try:
                of_tasks = self._run(place)
            except UserError as error:
                self._say(f"failed: {error}")
                failed += [{**named(key), "failed": str(error)} for key in place.keys]
            else:
                folder = place.folder(self.out)
                folder.mkdir(parents=True, exist_ok=True)
                seconds = time.monotonic() - began
                one, *more = [
                    {**named(key), "task_file": get_task(task).source, "seconds": seconds, **of_tasks[task]}
                    for task, key in zip(place.tasks, place.keys, strict=True)
                ]
                files.write_json(folder / RESULT, {"results": [one, *more]} if more else one)
            write(self.study, self.out, failed)
        return failed

    def _check_files(self) -> None:
        """All cells of a task are of the same file."""
        sources = {task.name: task.source for task in map(get_task, self.study.tasks)}
        for (name, _, _), found in results(self.study, self.out)[0].items():
            if found.get("task_file", "") != sources[name]:
                raise UserError(f"the file of task {name} changed since cells of this study were run; put it back")

    def _say(self, line: str) -> None:
        self.console.print(Text(printable(line)), soft_wrap=True)

    def _data(self, task: str, seed: int) -> Dataset:
        return load_data(get_task(task), self.study.data_of(task), seed)

    def _run(self, place: Place) -> dict[str, dict[str, Any]]:
        """The result of each of the cell's tasks."""
        config = self.study.config(place.task, place.method, place.seed)
        if place.method.kind in ("zero-shot", "few-shot"):
            return {place.task: self._prompted(place, config)}
        self.base = None  # two models at a time are one too many
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if place.method.kind == "encoder":
            return {place.task: self._encoder(place, config)}
        return self._trained(place, config)

    def _prompted(self, place: Place, config: Config) -> dict[str, Any]:
        task, data = get_task(place.task, config.template), self._data(place.task, place.seed)
        if place.method.kind == "few-shot":
            task = task.with_demonstrations(self._demonstrations(data.train[: config.train_examples], place.seed))
        if self.base is None or any(get(self.base.config, key) != get(config, key) for key in OF_BASE):
            self.base = None  # two models at a time are one too many
            self.base = ActorCritic(load_base(config), config)
        self.base.config = config
        prompts = encode(self.base, task, data.dev)
        self.base.choose(Prompts.of(prompts.prompts))
        result = evaluate(self.base, prompts)
        write_answers(place.folder(self.out), "zero_shot", result)
        return {**_score(task, with_interval(result, config.seed)), "labels": self._labels(place)}

    def _labels(self, place: Place) -> int:
        return self.study.shots if place.method.kind == "few-shot" else 0

    def _demonstrations(self, train: list[Example], seed: int) -> list[Example]:
        shots = self.study.shots
        if shots > len(train):
            raise UserError(f"--shots: {shots} is not allowed; the train split has {len(train)} examples")
        return train[:shots] if self.study.demonstrations == "first" else random.Random(seed).sample(train, shots)

    def _trained(self, place: Place, config: Config) -> dict[str, dict[str, Any]]:
        run = place.folder(self.out)
        if (run / "config.yaml").is_file():
            summary = trainer.resume(run, {}, self.console)
        else:
            summary = trainer.train(config, run, self.console)
        stages = list(summary["stages"].values())
        found = {}
        for name in place.tasks:
            task = get_task(name)
            rows = [stage["tasks"][task.name] if "tasks" in stage else stage for stage in stages]
            found[name] = {**_score(task, rows[-1]), "labels": stages[-1]["labels"]}
            if place.method.reinforced:
                found[name]["start"] = _score(task, rows[-2])
        return found

    def _encoder(self, place: Place, config: Config) -> dict[str, Any]:
        task, data = get_task(place.task), self._data(place.task, place.seed)
        train = data.train[: config.train_examples]

        def step_done(step: int, total: int, loss: float) -> None:
            if step % max(1, total // 20) == 0 or step == total:
                self._say(f"encoder {step}/{total}  loss {loss:.4f}")

        predicted = train_encoder(
            str(self.study.encoder), task, train, data.dev, lr=self.study.encoder_lr, epochs=self.study.encoder_epochs,
            seed=place.seed, device=pick_device(config.device), step_done=step_done,
        )  # fmt: skip
        row = row_of(task, data.dev, predicted, task.score(data.dev, predicted), config.seed)
        return {**_score(task, row), "labels": len(train)}


def _score(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    """The official metric of a row of scores, with its interval, and the row."""
    name = task.metrics[0]
    return {
        "metric": name, "value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"],
        "malformed": row["malformed"], "n": row["n"], "scores": row,
    }  # fmt: skip


def page(study: Study, out: Path, to: Path) -> tuple[str, list[str]]:
    """The page of what is in a study's folder, to lie at ``to``, and the lines on what is unfinished, failed or damaged."""
    found, damaged = results(study, out)
    last = (files.read_json(out / "study.json") or {}).get("results")
    said = [r for r in last if isinstance(r, dict) and isinstance(r.get("failed"), str)] if isinstance(last, list) else []
    before = {(r.get("task"), r.get("method"), r.get("seed")): r["failed"] for r in said}
    left = [key for place in study.places() for key in place.keys if key not in found and key in before]
    failed = [{**named(key), "failed": before[key]} for key in left]
    return study_page(study, [*found.values(), *failed], out, damaged, to)


def write(study: Study, out: Path, failed: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Write ``study.json``, ``table.md`` and ``report.html`` of what is in the folder and of these cells that failed; headings
    and rows of the table, and the page's lines on what is unfinished, failed or damaged."""
    finished, damaged = results(study, out)
    found = [*finished.values(), *failed]
    headings, rows = table.table(found, list(study.names.values()), [method.name for method in study.methods])
    files.write_json(out / "study.json", {"results": found})
    files.write_text(out / "table.md", table.markdown(headings, rows))
    html, notes = study_page(study, found, out, damaged, out / NAME)
    files.write_text(out / NAME, html)
    return headings, rows, notes


def run(study: Study, out: Path, console: rich.console.Console, *, resumed: bool) -> int:
    """Run what is not finished, and show the table; 1 where a cell failed, else 0."""
    failed = Runner(study, out, console).go(resumed=resumed)
    headings, rows, notes = write(study, out, failed)
    shown = Table()
    for heading in headings:
        shown.add_column(Text(heading), justify="left" if heading == "method" else "right")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    for line in (table.UNIT, *notes, f"wrote {out}; open {out / NAME} in a browser"):
        console.print(Text(printable(line)), soft_wrap=True)
    return int(bool(failed))
