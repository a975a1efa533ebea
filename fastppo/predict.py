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
from fastppo.tasks import Example, Task, data_of, get_tasks, load_test, servers
from fastppo.tasks.servers import Server

ZIP = "submission.zip"


@dataclass(frozen=True)
class _Part:
    """A test split, or a section of one, and the file that its answers are for."""

    task: Task
    server: Server
    file: str
    examples: list[Example]


@dataclass(frozen=True)
class _Job:
    """What one run is to answer."""

    config: Config
    adapter: Path
    parts: list[_Part]


def predict_runs(
    runs: list[Path], to: Path, data: str | None, name: str | None, fallback: str | None, console: rich.console.Console
) -> None:
    """Write the files of each run's test splits into the folder ``to``, and a zip of all files of the server that are there.

    Args:
        data: where the test split is, as ``--data`` has it; None: in each run's own data.
        name: of some of the run's tasks, or of others, for their own data.
        fallback: "first" or "random", what is written for an answer that is none (see `Task.guess`); None: as the run's own
            setting says, "first" where that is "wrong": without gold labels no label is.

    Raises:
        UserError: no test split or no server for one, or a folder that holds something else. Nothing is answered then.
    """
    jobs = [_job(run, data, name, console) for run in runs]
    parts = [part for job in jobs for part in job.parts]
    first, wanted = parts[0], [part.file for part in parts]
    for part in parts:
        task, server = part.task.name, part.server.name
        if part.server is not first.server:
            way_out = "; give some of them with --task" if len(jobs) == 1 else ""
            what = f"task {first.task.name} is for {first.server.name}'s server, task {task} for {server}'s; not both"
            raise UserError(what + way_out)
    for file in wanted:
        if wanted.count(file) > 1:
            raise UserError(f"{to / file}: is what more than one of these runs would write; give one of them")
    _check_folder(to, first.server, wanted)
    for job in jobs:
        model = ActorCritic(load_base(job.config), job.config)
        load_adapter(model, job.adapter)
        for part in job.parts:
            _say(console, f"{part.task.name}: answering {len(part.examples):,} examples")
            drawn = (fallback or job.config.fallback) == "random"
            _write(model, part, to / part.file, random.Random(job.config.seed) if drawn else None, console)
        del model  # before the next one is loaded
    _zip(to, first.server, console)


def _say(console: rich.console.Console, line: str) -> None:
    console.print(Text(printable(line)), soft_wrap=True)


def _job(run: Path, data: str | None, name: str | None, console: rich.console.Console) -> _Job:
    config, adapter = open_run(run, console)
    own = get_tasks(config.task, config.template)
    tasks = own if name is None else get_tasks(name, config.template)
    given, several = (config.data, len(own) > 1) if data is None else (data, len(tasks) > 1)
    parts = []
    for task in tasks:
        if data is None and task.name not in {one.name for one in own}:
            what = "the run's task" if len(own) == 1 else "one of the run's tasks"
            raise UserError(f"--task {task.name}: is not {what} {config.task}; give its data with --data")
        try:
            servers.server_of(task, False)  # before any data is read
        except UserError as error:
            with_one = [one.name for one in tasks if servers.has_server(one)]
            raise UserError(f"{error}" + (f"; leave it out: --task {','.join(with_one)}" if with_one else "")) from None
        place = data_of(task, given) if several else given
        if data is None and place is not None and os.path.isfile(os.path.expanduser(place)):
            raise UserError(f"run {run}: its data {place} is one file, without a test split; give that with --data")
        test = load_test(task, place)
        server = servers.server_of(task, test.superglue)
        parts += [_Part(task, server, server.files[task.name, s], examples) for s, examples in test.sections.items()]
    return _Job(config, adapter, parts)


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


def _write(model: ActorCritic, part: _Part, path: Path, draw: random.Random | None, console: rich.console.Console) -> None:
    """Answer the examples and write their file; says how many answers were none, and what is written for them."""
    task, examples = part.task, part.examples
    texts = answer(model, encode(model, task, examples))
    predicted = [task.parse(text) for text in texts]
    labels = [task.guess(text, draw) if said is None else said for text, said in zip(texts, predicted, strict=True)]
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, servers.content(part.server, task, examples, labels))
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
