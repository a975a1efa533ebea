"""Data sets for a task: the built-in corpus, a folder, a file, or the Hugging Face hub."""

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastppo.errors import Interrupted, UserError
from fastppo.tasks.read import LABEL, READERS, find_columns, make_example, read_file, show, show_line
from fastppo.tasks.task import Example, Task

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val")}
"""The names under which data sets have their two splits."""

DEV_SHARE = 0.1
"""Part of a single file that becomes the dev split."""

# Endings that say "this is a path" of a name that does not exist; not any suffix, for hub names have dots in them too.
PATH_SUFFIXES = {*READERS, ".json", ".txt", ".xlsx", ".arrow", ".gz", ".zip"}


@dataclass(frozen=True)
class Dataset:
    """The two splits of a task's data, none empty, every example with a label."""

    train: list[Example]
    dev: list[Example]
    origin: Literal["built-in", "folder", "file", "hub"]
    name: str
    """What the user gave, or "built-in"."""
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


def load_data(task: Task, data: str | None = None, seed: int = 0) -> Dataset:
    """Load what ``--data`` names.

    None is the built-in corpus; otherwise a folder with a train and a dev file, a single file (10 % of which, drawn
    with ``seed``, become the dev split), or ``name`` or ``name:config`` of a data set on the hub. Raises UserError, one
    line naming the file and row or the data set, for whatever cannot be loaded.
    """
    if data is None:
        return _load_builtin(task)
    path = Path(os.path.expanduser(data))
    try:
        if not data.strip():
            raise FileNotFoundError  # Path("") would be the current folder
        # stat, because exists() takes a folder that may not be entered for a missing one
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if looks_like_path(data):
            raise UserError(
                f"data {data!r} is missing, there is no such file or folder: give a folder with train and dev "
                f"files ({' '.join(READERS)}), one such file, or a hub name such as {':'.join(task.hub)}"
            ) from None
        return _load_hub(task, data)
    except OSError as error:
        raise UserError(f"data {data!r} cannot be read: {error.strerror or error}") from None
    return _load_folder(task, path, data) if path.is_dir() else _load_file(task, path, data, seed)


def looks_like_path(data: str) -> bool:
    return (
        data.startswith((".", "/", "~"))
        or data.endswith("/")
        or Path(data).suffix.lower() in PATH_SUFFIXES
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", data)  # hub names are "name" or "owner/name"
    )


def _load_builtin(task: Task) -> Dataset:
    from fastppo.builtin.corpus import build_corpus

    train, dev = (
        [
            Example({"sentence": row.text, "phenomenon": row.phenomenon}, row.label, f"built-in {split}:{number}")
            for number, row in enumerate(rows, 1)
        ]
        for split, rows in zip(SPLITS, build_corpus(), strict=True)
    )
    return Dataset(train, dev, "built-in", "built-in")


def _load_folder(task: Task, folder: Path, name: str) -> Dataset:
    try:
        present = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{show(folder)}: cannot be read: {error.strerror or error}") from None
    train, dev = (
        [example for file in _find_split(folder, present, split, stems) for example in read_file(task, folder / file)]
        for split, stems in SPLITS.items()
    )
    return Dataset(train, dev, "folder", name)


def _find_split(folder: Path, present: list[str], split: str, stems: tuple[str, ...]) -> list[str]:
    """The file of a split, or its parts as the hub cuts them (``train-00000-of-00002.parquet``)."""
    endings = "|".join(map(re.escape, READERS))
    whole = [file for file in present if re.fullmatch(f"({'|'.join(stems)})({endings})", file)]
    if len(whole) > 1:
        raise UserError(f"{show(folder)}: more than one {split} split: {', '.join(whole)}: keep one of them")
    if whole:
        return whole
    parts = [
        match
        for file in present
        if (match := re.fullmatch(rf"({'|'.join(stems)})-\d{{5}}-of-(\d{{5}})\.parquet", file))
    ]
    if not parts:
        raise UserError(
            f"{show(folder)}: no {split} split: looked for {', '.join(stems)} with the ending {', '.join(READERS)}"
        )
    found, (stem, total) = [part[0] for part in parts], parts[0].groups()
    if found != [f"{stem}-{part:05d}-of-{total}.parquet" for part in range(int(total))]:
        raise UserError(f"{show(folder)}: parts of the {split} split do not make a whole: found {', '.join(found)}")
    return found


def _load_file(task: Task, path: Path, name: str, seed: int) -> Dataset:
    examples = read_file(task, path)
    if len(examples) < 2:
        raise UserError(f"{show(path)}: has 1 row: need at least 2, one of them for the dev split")
    size = max(1, round(DEV_SHARE * len(examples)))
    chosen = set(random.Random(seed).sample(range(len(examples)), size))
    train = [example for i, example in enumerate(examples) if i not in chosen]
    dev = [example for i, example in enumerate(examples) if i in chosen]
    note = f"{path.name} is one file: {len(dev)} of its {len(examples)} rows, drawn with seed {seed}, are the dev split"
    return Dataset(train, dev, "file", name, note)


def _load_hub(task: Task, name: str) -> Dataset:
    import datasets  # seconds to import, and only the hub needs it
    from huggingface_hub.utils import logging as hub_logging

    repository, _, config = name.partition(":")
    if repository in (task.hub[0], task.hub[0].rpartition("/")[2]):
        repository, config = task.hub[0], config or task.hub[1]
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # without a network its retries log a dozen lines in front of the error
    try:
        splits = datasets.load_dataset(repository, config or None)
        train, dev = (_read_hub_split(task, name, splits, split) for split in SPLITS)
    except (Interrupted, UserError):
        raise
    except Exception as error:  # of a network, a remote service and other people's files: no list of causes is complete
        raise UserError(
            f"data {name!r}: no such file or folder, and the hub does not give it: {type(error).__name__}: "
            f"{show_line(error)}"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    return Dataset(train, dev, "hub", name)


def _read_hub_split(task: Task, name: str, splits: Any, split: str) -> list[Example]:
    found = [candidate for candidate in SPLITS[split] if candidate in splits]
    if not found:
        raise UserError(
            f"data {name!r}: no {split} split: looked for {', '.join(SPLITS[split])}, found {', '.join(splits)}"
        )
    table = splits[found[0]]
    where = f"{name} {found[0]}"
    names = list(table.column_names)
    columns = {column: names[index] for column, index in find_columns(task, names, where).items()}
    # A data set may number the same classes in another order, so names are believed before numbers.
    classes = getattr(table.features[columns[LABEL]], "names", [])
    if not any(task.label_id(label) is not None for label in classes):
        classes = []
    examples = []
    for number, row in enumerate(table.select_columns(list(columns.values())), 1):
        values = {column: row[source] for column, source in columns.items()}
        if isinstance(values[LABEL], int) and 0 <= values[LABEL] < len(classes):
            values[LABEL] = classes[values[LABEL]]
        examples.append(make_example(task, values, f"{where}:{number}", f"{found[0]}:{number}"))
    if not examples:
        raise UserError(f"data {name!r}: the {found[0]} split is empty: every split needs at least one row")
    return examples
