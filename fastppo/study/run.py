"""Run a study: cell after cell, each kept as soon as it is done, so that a study that is begun again goes on where it stood.

    OUT/study.yaml                          the study
    OUT/cells/TASK/METHOD/seed-N/           a cell: the run folder of what was trained, and result.json once it is done
    OUT/study.json, table.md, report.html   written anew after every cell
"""

from __future__ import annotations

import gc
import json
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
from fastppo.config import Config
from fastppo.errors import UserError, printable
from fastppo.evaluate import encode, evaluate, row_of, with_interval
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import load_base, pick_device
from fastppo.study import table
from fastppo.study.encoder import train_encoder
from fastppo.study.page import study_page
from fastppo.study.spec import Place, Study
from fastppo.tasks import Dataset, Example, Task, get_task, load_data

RESULT = "result.json"


def results(study: Study, out: Path) -> list[dict[str, Any]]:
    """What the finished cells found, in their order, one of each task. Raises UserError for a file that is no result."""
    found = []
    for place in study.places():
        path = place.folder(out) / RESULT
        if path.is_file():
            try:
                one = json.loads(path.read_bytes())
            except ValueError:
                raise UserError(f"{path}: is not JSON; remove it and the cell is run again") from None
            found += one.get("results", [one])
    return found


class Runner:
    """Runs the cells of a study that are not finished."""

    def __init__(self, study: Study, out: Path, console: rich.console.Console):
        self.study, self.out, self.console = study, out, console
        self.base: ActorCritic | None = None  # of the methods that train nothing; they share it

    def go(self) -> list[dict[str, Any]]:
        """All results. A cell that fails leaves its reason for the table and is tried again by the next run.

        Raises:
            UserError: a task's data cannot be loaded, or its file changed. Interrupted: after a signal.
        """
        todo = [place for place in self.study.places() if not (place.folder(self.out) / RESULT).is_file()]
        self._check_files()
        for task in dict.fromkeys(task for place in todo for task in place.tasks):  # a wrong path is known before hours of work
            self._data(task, self.study.seeds[0])
        total = sum(1 for _ in self.study.places())
        failed: list[dict[str, Any]] = []
        for number, place in enumerate(todo, total - len(todo) + 1):
            names = " + ".join(get_task(task).name for task in place.tasks)
            self._say(f"cell {number}/{total}: {names}, {place.method.name}, seed {place.seed}")
            self._check_files()
            began = time.monotonic()
            try:
                of_tasks = self._run(place)
            except UserError as error:
                self._say(f"failed: {error}")
                failed += [{**self._name(place, task), "failed": str(error)} for task in place.tasks]
                continue
            folder = place.folder(self.out)
            folder.mkdir(parents=True, exist_ok=True)
            seconds = time.monotonic() - began
            found = [{**self._name(place, task), "seconds": seconds, **result} for task, result in of_tasks.items()]
            files.write_json(folder / RESULT, found[0] if len(found) == 1 else {"results": found})
            write(self.study, self.out, [*results(self.study, self.out), *failed])
        return [*results(self.study, self.out), *failed]

    def _name(self, place: Place, task: str) -> dict[str, Any]:
        known = get_task(task)
        return {"task": known.name, "task_file": known.source, "method": place.method.name, "seed": place.seed}

    def _check_files(self) -> None:
        """All cells of a task are of the same file."""
        sources = {task.name: task.source for task in map(get_task, self.study.tasks)}
        for found in results(self.study, self.out):
            if found.get("task_file", "") != sources.get(found["task"]):
                raise UserError(f"the file of task {found['task']} changed since cells of this study were run; put it back")

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
        if self.base is None:
            self.base = ActorCritic(load_base(config), config)
        self.base.config = config
        prompts = encode(self.base, task, data.dev)
        self.base.choose(Prompts.of(prompts.prompts))
        return {**_score(task, with_interval(evaluate(self.base, prompts), config.seed)), "labels": self._labels(place)}

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


def write(study: Study, out: Path, found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Write ``study.json``, ``table.md`` and ``report.html`` of these results; headings and rows of the table."""
    headings, rows = table.table(found, list(study.names.values()), [method.name for method in study.methods])
    files.write_json(out / "study.json", {"results": found})
    files.write_text(out / "table.md", table.markdown(headings, rows))
    files.write_text(out / "report.html", study_page(study, found, out, sum(len(place.tasks) for place in study.places())))
    return headings, rows


def run(study: Study, out: Path, console: rich.console.Console) -> int:
    """Run what is not finished, and show the table; 1 where a cell failed, else 0."""
    found = Runner(study, out, console).go()
    headings, rows = write(study, out, found)
    shown = Table()
    for heading in headings:
        shown.add_column(Text(heading), justify="left" if heading == "method" else "right")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print(Text(printable(f"wrote {out}")), soft_wrap=True)
    return int(any("failed" in result for result in found))
