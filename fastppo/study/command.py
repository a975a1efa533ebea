"""``fastppo study``: begin one, or go on with one, and show its table."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console

from fastppo import config as config_module
from fastppo import files
from fastppo.errors import Interrupted, UserError
from fastppo.study import spec
from fastppo.study.spec import Study

FLAGS = ("tasks", "methods", "seeds", "shots", "demonstrations", "encoder", "encoder_lr", "encoder_epochs")
SPEC = "study.yaml"
METHODS = "zero-shot,sft,ppo"


def begin(
    flags: Mapping[str, str], settings: Mapping[str, str], file: Path | None, out: str | None, console: rich.console.Console
) -> int:
    """A new study from a file and flags; the exit status is 1 where a cell failed.

    Raises:
        UserError: a mistake in what was given, or a folder in use. Interrupted: after a signal.
    """
    study = study_of(flags, settings, file)
    folder = Path(out) if out else files.unused(Path("studies", time.strftime("%Y%m%d-%H%M%S")))
    if not files.is_unused(folder):
        go_on = f", or go on with it: {_resume(folder)}" if (folder / SPEC).exists() else ""
        raise UserError(f"--out: {folder} exists and is not empty; choose another folder{go_on}")
    spec.check_data(study, study.tasks)
    with files.lock_run(folder):
        spec.save(study, folder / SPEC)
        if study.settings.get("model") is None:
            console.print("using the built-in model; for a real one: --model Qwen/Qwen2.5-0.5B", soft_wrap=True)
        return _run(study, folder, console, resumed=False)


def resume(folder: Path, console: rich.console.Console) -> int:
    """Go on with a study that was begun; as ``begin``."""
    if (folder / "config.yaml").is_file() and not (folder / SPEC).exists():
        raise UserError(f"study folder {folder}: is a run; go on with it: fastppo train --resume {shlex.quote(str(folder))}")
    study = _begun(folder)
    with files.lock_run(folder):
        return _run(study, folder, console, resumed=True)


def report(folder: Path, to: Path) -> list[str]:
    """Write the page of a study, whatever of it there is; the lines on what is unfinished, failed or damaged.

    Raises:
        UserError: no study began there, or the file cannot be written.
    """
    study = _begun(folder)
    from fastppo.study import run

    page, notes = run.page(study, folder, to)
    files.write_text(to, page)
    return notes


def _begun(folder: Path) -> Study:
    if not (folder / SPEC).is_file():
        why = f"has no {SPEC}, so no study began there" if folder.exists() else "no such folder"
        raise UserError(f"study folder {folder}: {why}")
    study = Study(**spec.read(folder / SPEC))
    spec.check(study)
    return study


def study_of(flags: Mapping[str, str], settings: Mapping[str, str], file: Path | None) -> Study:
    """The study that a file and flags describe; flags win. Raises UserError."""
    fields: dict[str, Any] = spec.read(file) if file is not None else {}
    fields.setdefault("methods", spec.methods_of(METHODS))
    if "tasks" in flags:
        fields["tasks"] = spec.tasks_of(flags["tasks"])
    if "methods" in flags:
        fields["methods"] = spec.methods_of(flags["methods"])
    if "seeds" in flags:
        fields["seeds"] = spec.seeds_of(flags["seeds"])
    for name, kind in (("shots", int), ("encoder_epochs", int), ("encoder_lr", float)):
        if name in flags:
            try:
                fields[name] = kind(flags[name])
            except ValueError:
                words = "a whole number" if kind is int else "a number"
                raise UserError(f"--{name.replace('_', '-')}: {flags[name]!r} is not allowed; expected {words}") from None
    for name in ("demonstrations", "encoder"):
        if name in flags:
            fields[name] = flags[name]
    given: dict[str, Any] = {key: config_module.from_flag(key, text) for key, text in settings.items()}
    if "data" in given:
        fields["data"] = given.pop("data")
    fields["settings"] = {**fields.get("settings", {}), **given}
    if "tasks" not in fields:
        raise UserError("--tasks: is missing; expected names such as cola,rte")
    for place in (fields, fields["settings"]):  # what is on this disk, so that the study can go on from any folder
        for name in ("data", "encoder", "model"):
            if isinstance(place.get(name), str):
                place[name] = files.whole_path(place[name])
    study = Study(**fields | {"tasks": spec.whole_names(fields["tasks"])})
    spec.check(study)
    return study


def _resume(folder: Path) -> str:
    return f"fastppo study --resume {shlex.quote(str(folder))}"


def _run(study: Study, folder: Path, console: rich.console.Console, *, resumed: bool) -> int:
    console.print("loading PyTorch and transformers")  # seconds, in which nothing else would be seen
    from fastppo.study import run

    try:
        return run.run(study, folder, console, resumed=resumed)
    except (Interrupted, KeyboardInterrupt) as stop:
        import signal

        signum = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        raise Interrupted(signum, f"go on with: {_resume(folder)}") from None
