"""Read examples from one data file. Whatever is wrong with it is a UserError: one line naming the file and the row."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fastppo.errors import UserError
from fastppo.tasks.example import Example
from fastppo.tasks.task import INDEX, LABEL, Task, Values

GROUP, PART = "group", "part"
"""Columns that a task's ``expand`` may add: see `Example.group`, and what tells the examples of one row apart in messages."""

DAMAGED_SHARE = 0.01
"""Part of a file's rows that may be damaged where the task's own files are known to be so."""

Row = tuple[int, Values | UserError]
"""Number of a row (the line it starts on, from 1; in Parquet the row), and its values by column or what is wrong with it."""


def read_file(task: Task, path: Path, damaged: list[str] | None = None) -> list[Example]:
    """All rows of a TSV (quotes are plain characters), CSV, JSONL or Parquet file, in order, each with its label (its index,
    where ``task`` is for a test split).

    TSV and CSV are UTF-8 with or without BOM, LF or CRLF. Raises UserError for a file that cannot be read, a malformed
    row, a label outside the task, and a file without rows. Where the task's files are known to have damaged rows, these are
    left out, and what is wrong with each is put into ``damaged``; they may be one in a hundred.
    """
    if path.suffix.lower() not in READERS:
        raise UserError(f"{show(path)}: unsupported file type {path.suffix!r}: use {' '.join(READERS)}")
    rows = READERS[path.suffix.lower()](task, path)
    examples: list[Example] = []
    wrong: list[UserError] = []
    for number, values in rows:
        try:
            if isinstance(values, UserError):
                raise values
            examples += make_examples(task, values, show(path), path.name, number)
        except UserError as error:
            wrong.append(error)
            if task.unlabelled or not task.drops_damaged or len(wrong) > DAMAGED_SHARE * len(rows):
                raise wrong[0] from None
    if not examples:
        raise UserError(f"{show(path)}: empty, no rows: every split needs at least one")
    if damaged is not None:
        damaged += [str(error) for error in wrong]
    return examples


def make_examples(task: Task, values: Values, where: str, origin: str, number: int) -> list[Example]:
    """The examples of row ``number`` of a file or split, which errors call ``where`` and examples ``origin``."""
    where, origin = f"{where}:{number}", f"{origin}:{number}"
    if task.expand is None:
        return [make_example(task, values, where, origin)]
    try:
        parts = task.expand(values, str(number), not task.unlabelled)
    except ValueError as error:
        raise UserError(f"{where}: malformed row: {show_line(error)}") from None
    examples = []
    for part in parts:
        suffix = f" {part[PART]}" if PART in part else ""
        named = _named(task, part, where + suffix)
        examples.append(make_example(task, named, where + suffix, origin + suffix, str(part.get(GROUP, ""))))
    return examples


def _named(task: Task, values: Values, where: str) -> Values:
    """The columns that the task needs, by its own names for them."""
    named = {}
    for column in task.columns:
        present = [name for name in task.columns_of(column) if name in values]
        if not present:
            raise UserError(
                f"{where}: malformed row: no field {column!r}: need {_needed(task)}, found {show_value(', '.join(values))}"
            )
        named[column] = values[present[0]]
    return named


def make_example(task: Task, values: Values, where: str, origin: str, group: str = "") -> Example:
    """Check the values of one example. ``where`` names it in errors, ``origin`` in the example."""
    fields = {}
    for slot in task.slots:
        text = values.get(slot)
        if not isinstance(text, str):
            raise UserError(f"{where}: {slot} is {'missing' if text is None else show_value(text)}, must be text")
        if not text.strip() and not (task.unlabelled and task.drops_damaged):  # a test split's every row is answered
            raise UserError(f"{where}: {slot} is empty, must be text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
            raise UserError(
                f"{where}: {slot} holds {ascii(text[error.start])} (character {error.start + 1}), "
                "half of a surrogate pair, must be valid Unicode"
            ) from None
        allowed = task.values.get(slot)
        if allowed and text.strip().lower() not in allowed:
            raise UserError(f"{where}: {slot} is {show_value(text)}, must be {' or '.join(allowed)}")
        fields[slot] = text
    if task.unlabelled:
        index = _index(values.get(INDEX))
        if index is None:
            given = values.get(INDEX)
            raise UserError(f"{where}: index {'is missing' if given is None else show_value(given)}, must be a whole number")
        return Example(fields, None, origin, group, where, index)
    label = task.label_id(values.get(LABEL))
    if label is None:
        given = values.get(LABEL)
        raise UserError(
            f"{where}: label {'is missing' if given is None else show_value(given)}, "
            f"task {task.name} allows {task.label_spellings()}"
        )
    return Example(fields, label, origin, group, where)


def _index(value: object) -> tuple[int, ...] | None:
    """One number or several, which text may spell."""
    parts = [str(part) for part in (value if isinstance(value, tuple) else (value,))]
    return tuple(map(int, parts)) if all(re.fullmatch("[0-9]{1,18}", part) for part in parts) else None


def find_columns(task: Task, names: Iterable[str], where: str) -> dict[str, int]:
    """Position of each column that the task needs, by name in any case; of all columns where rows are expanded.

    Raises UserError if one is not there once.
    """
    names = [name.strip().lower() for name in names]
    if task.expand is not None:
        return {name: index for index, name in enumerate(names)}
    columns = {}
    for column in task.columns:
        places = [index for index, name in enumerate(names) if name in task.columns_of(column)]
        if len(places) != 1:
            found = "more than one column" if places else "no column"
            hint = " (an unlabelled test file?)" if column == LABEL and not places else ""
            shown = show_value(", ".join(names))
            raise UserError(f"{where}: {found} {column!r}{hint}: need {_needed(task)} once each, found {shown}")
        columns[column] = places[0]
    return columns


def show(path: Path | str) -> str:
    """A path or message for an error: its characters as they are, those that would break the line escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def show_value(value: object) -> str:
    """A value from a data file for an error: quoted, escaped, at most 60 characters of it."""
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _needed(task: Task) -> str:
    return " and ".join(map(repr, task.columns))


def _read_tsv(task: Task, path: Path) -> list[Row]:
    lines = [line.removesuffix("\r") for line in _read_text(path).split("\n")]  # splitlines() would cut at U+2028 too
    while lines and not lines[-1].strip(" "):
        lines.pop()
    if not lines:
        return []
    first = lines[0].split("\t")
    if _has_header(task, first):
        columns, start = find_columns(task, first, f"{show(path)}:1"), 1
        widths = range(len(first), len(first) + 1)
        expected = f"{len(first)} as in the header"
    elif task.unlabelled:
        raise UserError(f"{show(path)}:1: is no header line naming {_needed(task)}")
    else:
        columns, start = find_columns(task, task.tsv_columns, show(path)), 0
        widths = range(len(task.tsv_columns), len(task.tsv_columns) + task.tsv_extra + 1)
        expected = f"{widths[0]} ({', '.join(task.tsv_columns)}), or a header line naming {_needed(task)}"
    rows: list[Row] = []
    for number, line in enumerate(lines[start:], start + 1):
        cells = line.split("\t")
        if len(cells) in widths:
            rows.append((number, {column: cells[index] for column, index in columns.items()}))
        else:
            found = "is blank" if not line.strip() else f"has {len(cells)} column{'s' * (len(cells) != 1)}"
            rows.append((number, UserError(f"{show(path)}:{number}: malformed row: {found}, must have {expected}")))
    return rows


def _has_header(task: Task, cells: list[str]) -> bool:
    """Whether the first line of a TSV names columns. With a label in the label column it is a row, whatever it says."""
    if not task.tsv_columns:
        return True
    by_column = dict(zip(task.tsv_columns, cells, strict=False))
    if len(cells) == len(task.tsv_columns) and task.label_id(by_column.get(LABEL)) is not None:
        return False
    known = {name for column in task.columns for name in task.columns_of(column)}
    return bool(known & {cell.strip().lower() for cell in cells})


def _read_csv(task: Task, path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            records.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{show(path)}:{start}: malformed row: {show(str(error))}") from None
    while records and not records[-1][1]:
        records.pop()
    if not records:
        return []
    header = records[0][1]
    columns = find_columns(task, header, f"{show(path)}:1")
    rows: list[Row] = []
    for number, cells in records[1:]:
        if len(cells) != len(header):
            raise UserError(
                f"{show(path)}:{number}: malformed row: has {len(cells)} columns, must have {len(header)} "
                "as in the header"
            )
        rows.append((number, {column: cells[index] for column, index in columns.items()}))
    return rows


def _read_jsonl(task: Task, path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{show(path)}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: malformed row: not JSON ({show(str(error))}): {show_value(line)}") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: malformed row: must be an object with {_needed(task)}, is {show_value(value)}")
        rows.append((number, value if task.expand is not None else _named(task, value, where)))
    return rows


def _read_parquet(task: Task, path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _read_bytes(path)
    if not data:
        return []
    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            names = file.schema_arrow.names
            columns = find_columns(task, names, show(path))
            table = file.read(columns=[names[index] for index in columns.values()])
            values = {column: table.column(names[index]).to_pylist() for column, index in columns.items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = show_line(error)
        raise UserError(f"{show(path)}: damaged Parquet file: {reason}") from None
    return [(i + 1, {column: values[column][i] for column in columns}) for i in range(table.num_rows)]


def show_line(error: BaseException) -> str:
    """What an exception says, as one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    text = show(lines[0]) if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a folder, or a pipe or device on which reading would hang
            raise UserError(f"{show(path)}: not a file but a {'folder' if path.is_dir() else 'device or pipe'}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be read: {error.strerror or error}") from None


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise UserError(
            f"{show(path)}:{line}: not UTF-8: byte 0x{byte:02x} at position {error.start}: save the file as UTF-8"
        ) from None


READERS: dict[str, Callable[[Task, Path], list[Row]]] = {
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
