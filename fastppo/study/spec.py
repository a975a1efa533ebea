"""What a study consists of: tasks, methods, seeds, and the settings of ``train`` that its runs share."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastppo import config as config_module
from fastppo import files
from fastppo.config import LARGEST_INT, SETTINGS, Config
from fastppo.errors import UserError
from fastppo.tasks import data_of, found_in, get_task, load_data
from fastppo.tasks.own import whole_name

KINDS = {
    "zero-shot": "the base as it is",
    "few-shot": "the base, with solved examples in front of the question",
    "sft": "supervised on all labels of the train split",
    "ppo": "PPO from where --sft-examples labels lead (0: from the base)",
    "sft-multi": "one policy for all tasks: supervised on the labels of all",
    "ppo-multi": "one policy for all tasks: PPO on all, from where --sft-examples labels of each lead",
    "encoder": "a sequence classifier, fully fine-tuned",
}
# Of the runs behind the methods that train, whatever a task's settings say; a method's own settings come after these.
SUPERVISED = {"sft.examples": LARGEST_INT, "ppo.iterations": 0}
OF_KIND: dict[str, dict[str, Any]] = {"sft": SUPERVISED, "sft-multi": SUPERVISED}
RESERVED = {"task": "--tasks", "seed": "--seeds", "out": "--out", "data": "--data"}  # settings that a study has flags for


@dataclass(frozen=True)
class Method:
    """A row of the table. kind: one of `KINDS`. settings: of its runs alone, by key."""

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def multi(self) -> bool:
        """Whether a run of it is one policy for all tasks."""
        return self.kind.endswith("-multi")

    @property
    def reinforced(self) -> bool:
        return self.kind in ("ppo", "ppo-multi")


@dataclass(frozen=True)
class Place:
    """One cell of a study: a method on a task with a seed; or on all tasks together, whose names ``task`` has with commas."""

    task: str
    method: Method
    seed: int

    @property
    def tasks(self) -> list[str]:
        return self.task.split(",")

    @property
    def names(self) -> list[str]:
        """What its tasks are called in tables and folders."""
        return [get_task(task).name for task in self.tasks]

    @property
    def title(self) -> str:
        """For texts."""
        return f"{' + '.join(self.names)}, {self.method.name}, seed {self.seed}"

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """Of its results, one of each task: (the task's name, method, seed)."""
        return [(name, self.method.name, self.seed) for name in self.names]

    def folder(self, out: Path) -> Path:
        return out / "cells" / ",".join(self.names) / self.method.name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study, whole: the same study gives the same table.

    tasks: names or files, with settings of their own by key. data: a folder that has one for each task, named like it; None:
    the task's own data where it has some (cola: the built-in corpus), else the hub. shots: examples in front of a few-shot
    question. demonstrations: whether they are the ``first`` of the train split or drawn from it with the seed (``random``).
    settings: of ``train``, by key.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0,)
    data: str | None = None
    shots: int = 5
    demonstrations: str = "random"
    encoder: str | None = None
    encoder_lr: float = 2e-5
    encoder_epochs: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """What each task is called in tables and folders."""
        return {task: get_task(task).name for task in self.tasks}

    def places(self) -> Iterator[Place]:
        """All cells: task by task, then those of all tasks together."""
        for task, multi in [*((task, False) for task in self.tasks), (",".join(self.tasks), True)]:
            for method in self.methods:
                if method.multi == multi:
                    yield from (Place(task, method, seed) for seed in self.seeds_of(task, method))

    def place_of(self, task: str, method: Method, seed: int) -> Place:
        """The cell that has the result of a method on a task."""
        return Place(",".join(self.tasks) if method.multi else task, method, seed)

    def data_of(self, task: str) -> str | None:
        """What ``--data`` would be in ``fastppo train``; of a task that the study's folder lacks, where that would be."""
        if self.data is None or "," in task:
            return self.data if "," in task else data_of(get_task(task), None)
        return found_in(self.data, get_task(task)) or str(Path(self.data, get_task(task).name))

    def config(self, task: str, method: Method, seed: int, out: Path | None = None) -> Config:
        """The settings of a cell's run; those of single tasks are not for a run of several. Raises UserError."""
        values: dict[str, tuple[object, str]] = {}
        for where, settings in (
            ("", self.settings), (f"tasks.{task}.", self.tasks.get(task, {})), ("", OF_KIND.get(method.kind, {})),
            (f"methods.{method.name}.", method.settings),
        ):  # fmt: skip
            values |= {key: (value, where + key) for key, value in settings.items()}
        own: dict[str, object] = {"task": task, "seed": seed, "data": self.data_of(task), "out": out and str(out)}
        values |= {key: (value, RESERVED[key]) for key, value in own.items()}
        return config_module.from_values(values)

    def seeds_of(self, task: str, method: Method) -> tuple[int, ...]:
        """The seeds that a method is run with on a task: the first alone where all give the same answers."""
        drawn = method.kind not in ("zero-shot", "few-shot")
        if method.kind == "few-shot":
            drawn = self.demonstrations == "random" or get_task(task).training is not None
        drawn = drawn or self.config(task, method, self.seeds[0]).fallback == "random"
        drawn = drawn or os.path.isfile(self.data_of(task) or "")  # of one file the seed draws the dev split
        return self.seeds if drawn else self.seeds[:1]


def check(study: Study) -> None:
    """Raises UserError, one line, for what is unknown, contradicts itself or cannot be run."""
    for what, given in (("tasks", study.tasks), ("methods", study.methods), ("seeds", study.seeds)):
        if not given:
            raise UserError(f"--{what}: none given; expected at least one")
    names = [method.name for method in study.methods]
    for what, several in (("methods", names), ("seeds", study.seeds)):
        twice = [str(one) for one in several if list(several).count(one) > 1]
        if twice:
            raise UserError(f"--{what}: {twice[0]} is given twice")
    if study.shots < 1:
        raise UserError(f"--shots: {study.shots} is not allowed; expected a whole number, 1 or more")
    if study.demonstrations not in ("first", "random"):
        raise UserError(f"--demonstrations: {study.demonstrations!r} is not allowed; expected first or random")
    if study.encoder is None and any(method.kind == "encoder" for method in study.methods):
        raise UserError("--encoder: is missing; expected a folder or hub name such as google-bert/bert-base-uncased")
    if not 0 < study.encoder_lr < 1 or study.encoder_epochs < 1:
        raise UserError("--encoder-lr, --encoder-epochs: expected a number between 0 and 1, and 1 or more")
    called: dict[str, str] = {}
    for task, name in study.names.items():
        if called.setdefault(name, task) != task:
            raise UserError(f"--tasks: {called[name]} and {task} are both called {name}")
    for task in study.tasks:
        known = get_task(task)
        if (study.data, known.data, known.hub) == (None, None, None):
            raise UserError(f"--data: is missing, task {known.name} has none; expected a folder that holds {known.name}")
        without = known.train_on
        for method in study.methods:
            if without and method.kind != "zero-shot":
                raise UserError(f"--methods: {method.name} needs a train split, which {task} lacks; train on {without}")
    for place in study.places():
        if place.seed == study.seeds[0]:
            config = study.config(place.task, place.method, place.seed)
            for task in place.tasks if place.method.kind != "encoder" else ():
                get_task(task, config.template)  # not every task has a tagged prompt


def check_data(study: Study, tasks: Collection[str]) -> None:
    """Raises UserError, one line that names all of these tasks whose data cannot be loaded: before hours of training."""
    expected = "expected a folder or file for each task, named like it"
    if tasks and study.data is not None and not os.path.isdir(os.path.expanduser(study.data)):
        raise UserError(f"--data: {study.data}: no such folder; {expected}")
    missing, wrong = [], []
    for task in map(get_task, tasks):
        if study.data is not None and not found_in(study.data, task):
            missing.append(task.name)
            continue
        try:
            load_data(task, data_of(task, study.data), study.seeds[0])
        except UserError as error:
            wrong.append(str(error))
    if missing:
        wrong.insert(0, f"--data: {study.data} has no {', '.join(missing)}; {expected}")
    if wrong:
        raise UserError("; ".join(wrong))


def read(path: Path) -> dict[str, Any]:
    """The fields of a study file (YAML): ``tasks`` and ``methods`` as lists, or as mappings with settings of their own.

    ``preset`` there, or a preset's name in place of a file, gives the settings that all others come after.

    Raises:
        UserError: names the file and the field.
    """
    tree = {"preset": path.name} if config_module.names_preset(path) else config_module.read_tree(path)
    known = [*(f.name for f in dataclasses.fields(Study)), "preset"]
    for name in tree:
        if name not in known:
            raise UserError(f"{path}: unknown field {name!r}{config_module.suggest(str(name), known)}")
    fields: dict[str, Any] = dict(tree)
    for name in ("tasks", "methods"):
        if name in fields:
            fields[name] = _named(fields[name], f"{path}: {name}")
    if "methods" in fields:
        fields["methods"] = methods_of(fields["methods"], f"{path}: methods")
    if "seeds" in fields:
        fields["seeds"] = seeds_of(fields["seeds"], f"{path}: seeds")
    if "settings" in fields:
        fields["settings"] = _settings(fields["settings"], f"{path}: settings")
    if "preset" in fields:
        where = "--config" if config_module.names_preset(path) else f"{path}: preset"
        preset = config_module.read_tree(config_module.preset_file(str(fields.pop("preset")), where))
        fields["settings"] = {**dict(config_module.flatten(preset, where)), **fields.get("settings", {})}
    for name, kind in (("data", str), ("encoder", str), ("demonstrations", str), ("shots", int), ("encoder_epochs", int)):
        if fields.get(name) is not None and (not isinstance(fields[name], kind) or isinstance(fields[name], bool)):
            raise UserError(f"{path}: {name}: {fields[name]!r} is not allowed; expected {_WORDS[kind]}")
    if "encoder_lr" in fields:
        try:
            fields["encoder_lr"] = float(fields["encoder_lr"])
        except (TypeError, ValueError):
            raise UserError(f"{path}: encoder_lr: {fields['encoder_lr']!r} is not allowed; expected a number") from None
    return fields


_WORDS = {str: "a text", int: "a whole number"}


def _named(value: object, where: str) -> dict[str, dict[str, Any]]:
    """``[a, b]`` or ``{a: {settings}, b: }`` as a mapping of names to settings by key."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, Sequence):
        if any(not isinstance(name, str) or not name for name in value):
            raise UserError(f"{where}: expected names")
        if len(set(value)) < len(value):
            raise UserError(f"{where}: one is given twice: {', '.join(value)}")
        return {name: {} for name in value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} is not allowed; expected names, or names with settings")
    return {str(name): _settings(inner, f"{where}.{name}", "kind") for name, inner in value.items()}


def _settings(value: object, where: str, *more: str) -> dict[str, Any]:
    """Settings of ``train``, nested as in its files or with dotted keys; ``more`` are names that are let through."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} is not allowed; expected settings")
    flat = dict(config_module.flatten(value, where))
    for key in flat:
        if key in RESERVED:
            raise UserError(f"{where}: {key} is not allowed here; {RESERVED[key]} says it")
        if key not in SETTINGS and key not in more:
            raise UserError(f"{where}: unknown setting {key!r}{config_module.suggest(key, list(SETTINGS))}")
    return flat


def tasks_of(text: str) -> dict[str, dict[str, Any]]:
    return _named(text, "--tasks")


def whole_names(tasks: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tasks that are files by their whole path, so that the study can go on from any folder. Raises UserError."""
    whole = {whole_name(task): settings for task, settings in tasks.items()}
    if len(whole) < len(tasks):
        raise UserError(f"--tasks: one is given twice: {', '.join(tasks)}")
    return whole


def methods_of(named: str | Mapping[str, Mapping[str, Any]], where: str = "--methods") -> tuple[Method, ...]:
    """Methods by name; a name that is no kind says its kind: ``{name: {kind: ppo, ...}}``."""
    methods = []
    for name, given in (_named(named, where) if isinstance(named, str) else named).items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.+-]*", name):  # it names folders and stands in tables
            raise UserError(f"{where}: {name!r} is not allowed; expected a name of letters, digits, spaces and any of _ . + -")
        settings = dict(given)
        kind = settings.pop("kind", name)
        if kind not in KINDS:
            raise UserError(f"{where}: {kind!r} is not known: choose from {', '.join(KINDS)}")
        methods.append(Method(name, kind, settings))
    return tuple(methods)


def seeds_of(value: object, where: str = "--seeds") -> tuple[int, ...]:
    parts: Sequence[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    try:
        seeds = tuple(int(str(part)) for part in parts)
    except ValueError:
        seeds = (-1,)
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"{where}: {value!r} is not allowed; expected whole numbers from 0 to {2**32 - 1}, such as 0,1,2")
    return seeds


def save(study: Study, path: Path) -> None:
    """Writes a file that `read` gives back."""
    tree = dataclasses.asdict(study) | {
        "methods": {method.name: {"kind": method.kind, **method.settings} for method in study.methods},
        "seeds": list(study.seeds),
    }
    files.write_text(path, yaml.safe_dump(tree, sort_keys=False))
