"""Data sets for a task: the built-in corpus, a folder, a file, or the Hugging Face hub."""

import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastppo.errors import Interrupted, UserError
from fastppo.tasks.example import Example
from fastppo.tasks.glue import GLUE
from fastppo.tasks.read import LABEL, READERS, find_columns, make_examples, read_file, show, show_line
from fastppo.tasks.superglue import SUPERGLUE
from fastppo.tasks.task import BUILT_IN, Task

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val")}
"""The names under which data sets have their two splits."""

DEV_SHARE = 0.1
"""Part of a single file that becomes the dev split."""

# Endings that say "this is a path" of a name that does not exist; not any suffix, for hub names have dots in them too.
PATH_SUFFIXES = {*READERS, ".json", ".txt", ".xlsx", ".arrow", ".gz", ".zip"}


Found = TypeVar("Found")


@dataclass(frozen=True)
class Dataset:
    """The two splits of a task's data, every example with a label; none empty, but for train of a diagnostic set."""

    train: list[Example]
    dev: list[Example]
    origin: Literal["built-in", "folder", "file", "hub"]
    name: str
    """What the user gave, or the task's own `Task.data`."""
    note: str = ""
    """What was done with the data that the user did not ask for; empty if nothing."""

    def summary(self) -> dict[str, str | int]:
        """For ``summary.json``: name, origin, note and the number of rows of each split."""
        return {
            "name": self.name,
            "origin": self.origin,
            "train": len(self.train),
            "dev": len(self.dev),
            "note": self.note,
        }


def data_of(task: Task, data: str | None) -> str | None:
    """What ``--data`` is of one of several tasks: in the folder ``data`` the folder or file that is named like the task; None:
    the task's own data where it has some, else its data set on the hub.

    Raises:
        UserError: no such folder, or nothing in it that is named so.
    """
    if data is None:
        return ":".join(task.hub) if task.data is None and task.hub else None
    found = found_in(data, task)
    if found is None:
        place = _named_like(data, task)
        if not place.parent.is_dir():
            what = "is no folder" if place.parent.exists() else "there is no such file or folder"
            raise UserError(f"data {data!r}: {what}; several tasks take a folder that has one for each, such as {place}")
        raise UserError(
            f"data {str(place)!r} is missing, there is no such file or folder: of several tasks {task.name} takes this folder, "
            f"or a file of this name ({' '.join(READERS)})"
        )
    return found


def found_in(data: str, task: Task) -> str | None:
    """The folder or file in the folder ``data`` that is named like the task; None where there is none."""
    place = _named_like(data, task)
    return next((path for path in (str(place), *(f"{place}{ending}" for ending in READERS)) if os.path.exists(path)), None)


def _named_like(data: str, task: Task) -> Path:
    return Path(os.path.expanduser(data), task.name)


def load_sets(tasks: Sequence[Task], data: str | None, seed: int, *, of_several: bool) -> list[Dataset]:
    """The data set of each task. of_several: ``data`` has one for each, which ``data_of`` finds; else it is itself one."""
    return [load_data(task, data_of(task, data) if of_several else data, seed) for task in tasks]


def load_data(task: Task, data: str | None = None, seed: int = 0) -> Dataset:
    """Load what ``--data`` names.

    None is the task's own (`Task.data`); otherwise a folder with a train and a dev file, a single file (10 % of which, drawn
    with ``seed``, become the dev split, examples of one group together), or ``name`` or ``name:config`` of a data set on
    the hub. What a task trains on only a part of is drawn with ``seed`` too. Of a diagnostic set all is dev.
    Raises UserError, one line naming the file and row or the data set, for whatever cannot be loaded.
    """
    loaded = _load(task, data, seed)
    if task.training is None or not loaded.train:
        return loaded
    drawn = task.training(loaded.train, random.Random(seed))
    count = f"{len(drawn):,} of {len(loaded.train):,}"
    note = f"train: {count} examples, a right and a wrong one of each query, drawn with seed {seed}"
    return replace(loaded, train=drawn, note=_joined(loaded.note, note))


@dataclass(frozen=True)
class Unlabelled:
    """The examples of a test split by section ("" where the task has none), in the order of their files."""

    sections: dict[str, list[Example]]
    name: str
    """What the user gave."""
    superglue: bool
    """Whether it came in the form of SuperGLUE: from a JSONL file, or from SuperGLUE's data set on the hub."""


def load_test(task: Task, data: str | None) -> Unlabelled:
    """Load the test split, which need have no labels, that ``--data`` names: a folder with a ``test`` file, one such file, or
    a data set on the hub.

    Raises UserError as `load_data`, and for an index that is missing or stands twice.
    """
    if data is None:
        such_as = f", such as {':'.join(task.hub)}" if task.hub else ""
        raise UserError(f"the built-in data has no test split: give --data that of {task.name}{such_as}")
    task = task.for_test()
    names = _names(task, "test")
    if task.sections:
        del names[""]  # nobody could say which section it is
    path = _place(task, data)
    if path is None:
        sections = _from_hub(task, data, partial(_read_hub_test, task, data, names))
        superglue = data.partition(":")[0] in (SUPERGLUE, SUPERGLUE.rpartition("/")[2])
    else:
        files = _test_files(path, names)
        sections = {section: [e for file in found for e in read_file(task, file)] for section, found in files.items()}
        superglue = all(file.suffix.lower() == ".jsonl" for found in files.values() for file in found)
    for examples in sections.values():
        _check_indices(examples)
    return Unlabelled(sections, data, superglue)


def _test_files(path: Path, names: dict[str, list[tuple[str, ...]]]) -> dict[str, list[Path]]:
    """The files of each section of a test split."""
    if not path.is_dir():
        of_name = [section for section, choices in names.items() if any(path.stem in stems for stems in choices)]
        if not of_name and "" not in names:
            raise UserError(f"{show(path)}: its name says no section of the test split; expected {_shown(names)}")
        return {(of_name or [""])[0]: [path]}
    present = _listed(path)
    found = {section: _find_split(path, present, "test", choices) for section, choices in names.items()}
    if not any(found.values()):
        raise UserError(f"{show(path)}: no test split: looked for {_shown(names)} with the ending {', '.join(READERS)}")
    return {section: [path / file for file in files] for section, files in found.items() if files}


def _read_hub_test(task: Task, name: str, names: dict[str, list[tuple[str, ...]]], splits: Any) -> dict[str, list[Example]]:
    found = {section: [stem for stems in choices for stem in stems if stem in splits] for section, choices in names.items()}
    if not any(found.values()):
        raise UserError(f"data {name!r}: no test split: looked for {_shown(names)}, found {', '.join(splits)}")
    return {section: _read_hub_table(task, name, splits[stems[0]], stems[0]) for section, stems in found.items() if stems}


def _check_indices(examples: list[Example]) -> None:
    """Raises UserError where two examples have one index, but for those of one query, which share its."""
    first: dict[tuple[int, ...], Example] = {}
    for example in examples:
        other = first.setdefault(example.index, example)
        of_query = len(example.index) == 1 and "candidate" in example.fields and other.group == example.group
        if other is not example and not of_query:
            shown = ", ".join(map(str, example.index))
            raise UserError(f"{example.where}: index {shown} stands at {other.where} already; every row needs one of its own")


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _load(task: Task, data: str | None, seed: int) -> Dataset:
    if data is None:
        if task.data == BUILT_IN:
            return _load_builtin()
        if task.data is None:
            raise UserError(f"task {task.name} has no built-in data: give --data {_choices(task)}")
        data = task.data
    path = _place(task, data)
    if path is None:
        return _load_hub(task, data)
    return _load_folder(task, path, data) if path.is_dir() else _load_file(task, path, data, seed)


def _place(task: Task, data: str) -> Path | None:
    """The file or folder that ``--data`` names; None: a name on the hub."""
    path = Path(os.path.expanduser(data))
    try:
        if not data.strip():
            raise FileNotFoundError  # Path("") would be the current folder
        # stat, because exists() takes a folder that may not be entered for a missing one
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if looks_like_path(data):
            raise UserError(
                f"data {data!r} is missing, there is no such file or folder: give {_choices(task)}"
            ) from None
        return None
    except OSError as error:
        raise UserError(f"data {data!r} cannot be read: {error.strerror or error}") from None
    return path


def _choices(task: Task) -> str:
    such_as = f" such as {':'.join(task.hub)}" if task.hub else ""
    return f"a folder with train and dev files ({' '.join(READERS)}), one such file, or a hub name{such_as}"


def looks_like_path(data: str) -> bool:
    return (
        data.startswith((".", "/", "~"))
        or data.endswith("/")
        or Path(data).suffix.lower() in PATH_SUFFIXES
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", data)  # hub names are "name" or "owner/name"
    )


def _load_builtin() -> Dataset:
    from fastppo.builtin.corpus import build_corpus

    train, dev = (
        [
            Example({"sentence": row.text, "phenomenon": row.phenomenon}, row.label, f"built-in {split}:{number}")
            for number, row in enumerate(rows, 1)
        ]
        for split, rows in zip(SPLITS, build_corpus(), strict=True)
    )
    return Dataset(train, dev, BUILT_IN, BUILT_IN)


def _load_folder(task: Task, folder: Path, name: str) -> Dataset:
    present = _listed(folder)
    damaged: list[str] = []
    found: dict[str, list[Example]] = {"train": []}
    for split in ("dev",) if task.train_on else SPLITS:
        names = _names(task, split)
        files = {section: _find_split(folder, present, split, choices) for section, choices in names.items()}
        if not any(files.values()):
            endings = ", ".join(READERS)
            raise UserError(f"{show(folder)}: no {split} split: looked for {_shown(names)} with the ending {endings}")
        found[split] = [example for file in files[""] for example in read_file(task, folder / file, damaged)]
        for section in () if files[""] else task.sections:
            for file in files[section]:
                found[split] += _in_section(read_file(task, folder / file, damaged), section)
    return Dataset(found["train"], found["dev"], "folder", name, _note_damaged(damaged))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{show(folder)}: cannot be read: {error.strerror or error}") from None


def _names(task: Task, split: str) -> dict[str, list[tuple[str, ...]]]:
    """Names of a split, best first, those beside each other equally good: of all of it (""), and of its sections."""
    usual = SPLITS.get(split, (split,))
    sections = {s: [tuple(f"{stem}_{s}" for stem in usual)] for s in task.sections if split != "train"}
    return {"": [usual, *((stem,) for stem in task.files.get(split, ()))], **sections}


def _shown(names: dict[str, list[tuple[str, ...]]]) -> str:
    return ", ".join(stem for choices in names.values() for stems in choices for stem in stems)


def _in_section(examples: list[Example], section: str) -> list[Example]:
    return [replace(example, group=section) for example in examples]


def _note_damaged(damaged: list[str]) -> str:
    """One line that names the rows that were left out."""
    if not damaged:
        return ""
    more = f", and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return f"left out {len(damaged)} damaged row{'s' * (len(damaged) != 1)}: {'; '.join(damaged[:3])}{more}"


def _find_split(folder: Path, present: list[str], split: str, choices: list[tuple[str, ...]]) -> list[str]:
    """The file of a split, or its parts as the hub cuts them (``train-00000-of-00002.parquet``); [] if there is none."""
    found = (_find_file(folder, present, split, stems) for stems in choices)
    return next(filter(None, found), [])


def _find_file(folder: Path, present: list[str], split: str, stems: tuple[str, ...]) -> list[str]:
    endings = "|".join(map(re.escape, READERS))
    names = "|".join(map(re.escape, stems))
    whole = [file for file in present if re.fullmatch(f"({names})({endings})", file)]
    if len(whole) > 1:
        raise UserError(f"{show(folder)}: more than one {split} split: {', '.join(whole)}: keep one of them")
    if whole:
        return whole
    parts = [match for file in present if (match := re.fullmatch(rf"({names})-\d{{5}}-of-(\d{{5}})\.parquet", file))]
    if not parts:
        return []
    found, (stem, total) = [part[0] for part in parts], parts[0].groups()
    if found != [f"{stem}-{part:05d}-of-{total}.parquet" for part in range(int(total))]:
        raise UserError(f"{show(folder)}: parts of the {split} split do not make a whole: found {', '.join(found)}")
    return found


def _load_file(task: Task, path: Path, name: str, seed: int) -> Dataset:
    damaged: list[str] = []
    examples = read_file(task, path, damaged)
    if task.train_on:
        return Dataset([], examples, "file", name)
    units: dict[object, list[int]] = {}  # what is scored together stays together
    for i, example in enumerate(examples):
        units.setdefault(example.group or i, []).append(i)
    if len(units) < 2:
        what = "row" if len(examples) == 1 else "group of rows that are scored together"
        raise UserError(f"{show(path)}: has 1 {what}: need at least 2, one of them for the dev split")
    of_unit = list(units.values())
    size = max(1, round(DEV_SHARE * len(of_unit)))
    chosen = {i for unit in random.Random(seed).sample(range(len(of_unit)), size) for i in of_unit[unit]}
    train = [example for i, example in enumerate(examples) if i not in chosen]
    dev = [example for i, example in enumerate(examples) if i in chosen]
    note = f"{path.name} is one file: {len(dev)} of its {len(examples)} rows, drawn with seed {seed}, are the dev split"
    return Dataset(train, dev, "file", name, _joined(note, _note_damaged(damaged)))


def _load_hub(task: Task, name: str) -> Dataset:
    def read(splits: Any) -> Dataset:
        dev = _read_hub_split(task, name, splits, "dev")
        return Dataset([] if task.train_on else _read_hub_split(task, name, splits, "train"), dev, "hub", name)

    return _from_hub(task, name, read)


def _from_hub(task: Task, name: str, read: Callable[[Any], Found]) -> Found:
    """What ``read`` makes of the splits of a data set on the hub."""
    import datasets  # seconds to import, and only the hub needs it
    from huggingface_hub.utils import logging as hub_logging

    repository, _, config = name.partition(":")
    for benchmark in (GLUE, SUPERGLUE):
        if repository == benchmark.rpartition("/")[2]:
            repository = benchmark
    if task.hub and repository == task.hub[0]:
        config = config or task.hub[1]
    elif not config and repository in (GLUE, SUPERGLUE):
        its = f"that of {task.name} is {':'.join(task.hub)}" if task.hub else "give one as NAME:CONFIGURATION"
        raise UserError(f"data {name!r}: holds many tasks; {its}")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # without a network its retries log a dozen lines in front of the error
    try:
        return read(datasets.load_dataset(repository, config or None))
    except (Interrupted, UserError):
        raise
    except Exception as error:  # of a network, a remote service and other people's files: no list of causes is complete
        raise UserError(
            f"data {name!r}: no such file or folder, and the hub does not give it: {type(error).__name__}: "
            f"{show_line(error)}"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def _read_hub_split(task: Task, name: str, splits: Any, split: str) -> list[Example]:
    names = _names(task, split)
    whole = [stem for stems in names[""] for stem in stems if stem in splits][:1]
    found = {stem: "" for stem in whole} or {
        stem: section for section in task.sections for stems in names.get(section, ()) for stem in stems if stem in splits
    }
    if not found:
        raise UserError(f"data {name!r}: no {split} split: looked for {_shown(names)}, found {', '.join(splits)}")
    examples = []
    for stem, section in found.items():
        part = _read_hub_table(task, name, splits[stem], stem)
        examples += _in_section(part, section) if section else part
    return examples


def _read_hub_table(task: Task, name: str, table: Any, stem: str) -> list[Example]:
    where = f"{name} {stem}"
    names = list(table.column_names)
    columns = {column: names[index] for column, index in find_columns(task, names, where).items()}
    # A data set may number the same classes in another order, so names are believed before numbers.
    classes = getattr(table.features[columns[LABEL]], "names", []) if LABEL in columns else []
    if not any(task.label_id(label) is not None for label in classes):
        classes = []
    examples = []
    for number, row in enumerate(table.select_columns(list(columns.values())), 1):
        values = {column: row[source] for column, source in columns.items()}
        label = values.get(LABEL)
        if isinstance(label, int) and 0 <= label < len(classes):
            values[LABEL] = classes[label]
        examples += make_examples(task, values, where, stem, number)
    if not examples:
        raise UserError(f"data {name!r}: the {stem} split is empty: every split needs at least one row")
    return examples
