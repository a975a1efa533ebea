"""``fastppo predict``: a run's answers to unlabelled test splits, as the files that the servers of GLUE and SuperGLUE take."""

from __future__ import annotations

import io
import os
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

import rich.console
from rich.text import Text

from fastppo import files
from fastppo.config import Config
from fastppo.errors import UserError, printable
from fastppo.evaluate import answer, encode, load_adapter, open_run
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import load_base
from fastppo.tasks import Example, Task, get_task, load_test, servers
from fastppo.tasks.servers import Server

ZIP = "submission.zip"


@dataclass(frozen=True)
class _Job:
    """What one run is to answer: examples by the name of their file."""

    config: Config
    adapter: Path
    task: Task
    server: Server
    examples: dict[str, list[Example]]


def predict_runs(
    runs: list[Path], to: Path, data: str | None, name: str | None, fallback: str | None, console: rich.console.Console
) -> None:
    """Write the file of each run's test split into the folder ``to``, and a zip of all files of the server that are there.

    Args:
        data: where the test split is, as ``--data`` has it; None: in each run's own data.
        name: of another task than the run's, for its own data.
        fallback: "first" or "random", what is written for an answer that is none (see `Task.guess`); None: as the run's own
            setting says, "first" where that is "wrong": without gold labels no label is.

    Raises:
        UserError: no test split or no server for one, or a folder that holds something else. Nothing is answered then.
    """
    jobs = [_job(run, data, name, console) for run in runs]
    server = jobs[0].server
    wanted = [file for job in jobs for file in job.examples]
    for job in jobs:
        if job.server is not server:
            raise UserError(f"run {runs[0]} is for {server.name}'s server, another run for {job.server.name}'s; not both")
    for file in wanted:
        if wanted.count(file) > 1:
            raise UserError(f"{to / file}: is what more than one of these runs would write; give one of them")
    _check_folder(to, server, wanted)
    for job in jobs:
        model = ActorCritic(load_base(job.config), job.config)
        load_adapter(model, job.adapter)
        for file, examples in job.examples.items():
            _say(console, f"{job.task.name}: answering {len(examples):,} examples")
            drawn = (fallback or job.config.fallback) == "random"
            _write(model, job, to / file, examples, random.Random(job.config.seed) if drawn else None, console)
        del model  # before the next one is loaded
    _zip(to, server, console)


def _say(console: rich.console.Console, line: str) -> None:
    console.print(Text(printable(line)), soft_wrap=True)


def _job(run: Path, data: str | None, name: str | None, console: rich.console.Console) -> _Job:
    config, adapter = open_run(run, console)
    task = get_task(config.task if name is None else name, config.template)
    if data is None:
        if task.name != config.task:
            raise UserError(f"--task {task.name}: is not the run's task {config.task}; give its data with --data")
        if config.data is not None and os.path.isfile(os.path.expanduser(config.data)):
            raise UserError(f"run {run}: its data {config.data} is one file, without a test split; give that with --data")
    servers.server_of(task, False)  # before any data is read
    test = load_test(task, data if data is not None else config.data)
    server = servers.server_of(task, test.superglue)
    return _Job(config, adapter, task, server, {server.files[task.name, s]: each for s, each in test.sections.items()})


def _check_folder(to: Path, server: Server, wanted: list[str]) -> None:
    """Raises UserError unless the folder is there for this server alone, and lacks the wanted files."""
    try:
        present = sorted(entry.name for entry in to.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--to: {to} cannot be used: {error.strerror}") from None
    for file in present:
        if file not in (*server.files.values(), ZIP):
            raise UserError(f"--to: {to} holds {file}, which is no file for {server.name}'s server; choose a folder of its own")
    for file in wanted:
        if file in present:
            raise UserError(f"--to: {to / file} exists already; remove it, or choose another folder")


def _write(
    model: ActorCritic, job: _Job, path: Path, examples: list[Example], draw: random.Random | None,
    console: rich.console.Console,
) -> None:  # fmt: skip
    """Answer the examples and write their file; says how many answers were none, and what is written for them."""
    task = job.task
    texts = answer(model, encode(model, task, examples))
    predicted = [task.parse(text) for text in texts]
    labels = [task.guess(text, draw) if said is None else said for text, said in zip(texts, predicted, strict=True)]
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, servers.content(job.server, task, examples, labels))
    line = f"wrote {path}: {len(examples):,} answers, {predicted.count(None):,} malformed"
    if None in predicted:
        first = f"{task.guess('', None):g}" if task.span is not None else task.labels[0]
        line += f" (written: the first label that each names, else {first if draw is None else 'one drawn evenly'})"
    if task.name == "record":
        found = [right for _, _, right in servers.entities(examples, labels)]
        line += f"; {len(found):,} queries"
        if not all(found):
            line += f", {found.count(False):,} without an entity judged right (written: the first entity)"
    _say(console, line)


def _zip(to: Path, server: Server, console: rich.console.Console) -> None:
    """Write the zip of the server's files that are in the folder; says which are not."""
    there = [file for file in server.files.values() if (to / file).is_file()]
    missing = [file for file in server.files.values() if file not in there]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in there:
            archive.writestr(zipfile.ZipInfo(file), (to / file).read_bytes(), zipfile.ZIP_DEFLATED)
    files.write_bytes(to / ZIP, packed.getvalue())
    line = f"wrote {to / ZIP} with {len(there)} of the {len(server.files)} files of {server.name}"
    _say(console, line + (f"; missing: {', '.join(missing)}" if missing else ""))
