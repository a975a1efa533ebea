"""What must hold of a task that a user wrote, field by field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastppo.errors import UserError
from fastppo.tasks.metrics import METRICS, SECTIONS
from fastppo.tasks.read import GROUP, LABEL, PART, show_value
from fastppo.tasks.task import BUILT_IN, CLOSING, OPENING, Task

TEXTS = ("name", "template", "tagged", "demonstrations", "closing", "train_on")
LISTS = ("slots", "labels", "label_names", "metrics", "tsv_columns", "sections")
MAPPINGS = ("aliases", "files")
FUNCTIONS = ("parser", "reward", "expand", "training")

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
NAME_IN_WORDS = "at most 64 letters, digits and any of _ . - behind the first"
RESERVED = {LABEL, "step", "answer", "finish", "reward"}
"""What `samples.jsonl` holds of a sample beside the fields of its example."""

NUMBERS = {"pearson", "spearman"}
OF_GROUPS = {"f1a", "em", "token_f1", "exact_match", "parity"}
"""Metrics of rows that are scored together, which ``expand`` says."""


def checked(task: Task, built_in: Mapping[str, Task], answers: str = "labels") -> Task:
    """The task with tuples for lists and without white space around its prompts.

    Args:
        built_in: the tasks whose names are taken.
        answers: what the file calls the field of the answer words.

    Raises:
        UserError: one line that names the field, for the first thing that is wrong.
    """
    _types(task)
    task = _tidy(task)
    _name(task, built_in)
    _answers(task, answers)
    _templates(task)
    _metrics(task)
    _columns(task)
    if task.data == BUILT_IN and (task.slots != ("sentence",) or len(task.labels) != 2):
        raise UserError("data: the built-in corpus has two labels and the slot {sentence}, no others")
    for template in ("short", "tagged") if task.tagged else ("short",):
        _read_back(task.with_template(template), answers)
    return task


def _tidy(task: Task) -> Task:
    changed: dict[str, Any] = {name: tuple(getattr(task, name)) for name in LISTS}
    changed |= {name: {key: tuple(names) for key, names in getattr(task, name).items()} for name in MAPPINGS}
    changed |= {name: getattr(task, name).strip() for name in ("template", "tagged")}
    if task.span is not None:
        changed["span"] = (float(task.span[0]), float(task.span[1]))
    return replace(task, **changed, label_aliases=tuple(map(tuple, task.label_aliases)))


def _types(task: Task) -> None:
    for name in TEXTS:
        if not isinstance(getattr(task, name), str):
            raise _wrong(task, name, "a text")
    for name in LISTS:
        if not _are_texts(getattr(task, name)):
            raise _wrong(task, name, 'a list of texts, such as ("a", "b")')
    for name in MAPPINGS:
        value = getattr(task, name)
        if not isinstance(value, Mapping) or not all(isinstance(k, str) and _are_texts(v) for k, v in value.items()):
            raise _wrong(task, name, 'lists of texts by name, such as {"a": ("b", "c")}')
    for name in FUNCTIONS:
        value = getattr(task, name)
        if value is not None and not callable(value):
            raise _wrong(task, name, "a function")
    aliases = task.label_aliases
    if isinstance(aliases, str) or not isinstance(aliases, Sequence) or not all(map(_are_texts, aliases)):
        raise _wrong(task, "label_aliases", "a list of texts for each label")
    if task.hub is not None and not (_are_texts(task.hub) and len(task.hub) == 2):
        raise _wrong(task, "hub", "the data set's name and configuration")
    if task.data is not None and not isinstance(task.data, str):
        raise _wrong(task, "data", "a path or the name of a data set")
    if not isinstance(task.tsv_extra, int):
        raise _wrong(task, "tsv_extra", "a whole number")
    if task.span is not None:
        ends = task.span if isinstance(task.span, Sequence) and not isinstance(task.span, str) else ()
        numbers = all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends)
        if len(ends) != 2 or not numbers or not ends[0] < ends[1]:
            raise _wrong(task, "span", "the lowest and the highest number, such as (0, 5)")


def _are_texts(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)


def _wrong(task: Task, name: str, expected: str) -> UserError:
    return UserError(f"{name}: {show_value(getattr(task, name))} is not allowed; expected {expected}")


def _name(task: Task, built_in: Mapping[str, Task]) -> None:
    if not re.fullmatch(NAME, task.name, re.ASCII):  # it names folders and stands in tables
        raise _wrong(task, "name", NAME_IN_WORDS)
    if task.name.lower() in built_in:
        raise UserError(f"name: {task.name!r} is the name of a built-in task; choose another")


def _answers(task: Task, name: str) -> None:
    if task.span is not None:
        if task.labels:
            raise UserError(f"span: is not allowed with {name}; answers are words or numbers")
        return
    if len(task.labels) < 2:
        raise UserError(f"{name}: {len(task.labels)} given; expected at least two answer words, or a range of numbers")
    for word in task.labels:
        if not word.strip() or word != word.strip():
            raise UserError(f"{name}: {word!r} is {'blank' if not word.strip() else 'not allowed; white space is around it'}")
    for field, count in (("label_names", len(task.label_names)), ("label_aliases", len(task.label_aliases))):
        if count not in (len(task.labels), 0):
            raise UserError(f"{field}: {count} given; expected one for each of the {len(task.labels)} {name}")
    lowered = [word.lower() for word in task.labels]
    for i, word in enumerate(lowered):
        if word in lowered[:i]:
            other = task.labels[lowered.index(word)]
            raise UserError(f"{name}: {other!r} and {task.labels[i]!r} are alike; case does not count")
    for label, texts in enumerate(task.spellings):
        for text in texts:
            if not text.strip():
                raise UserError(f"{name}: {task.labels[label]!r} has a blank name")
            if (owner := task.label_id(text)) != label:
                raise UserError(f"{name}: {text!r} stands for {task.labels[label]!r} and for {task.labels[int(owner or 0)]!r}")


def _templates(task: Task) -> None:
    reserved = sorted(RESERVED.intersection(task.slots) or {GROUP, PART}.intersection(task.slots if task.expand else ()))
    if reserved:
        raise UserError(
            f"slots: {{{reserved[0]}}} is not allowed, a run's records use that name; call it otherwise, and give the column's "
            f"name in aliases"
        )
    for name, text in (("template", task.template), ("tagged", task.tagged)):
        if not text.strip() and name == "template":
            raise UserError("template: is blank")
        if not text:
            continue
        if not task.slots:
            raise UserError(f"{name}: has no slot; expected the name of a column in braces, such as {{text}}")
        for slot in task.slots:
            if f"{{{slot}}}" not in text:
                raise UserError(f"{name}: lacks the slot {{{slot}}}")
    if task.tagged and not task.tagged.endswith(OPENING):
        end = show_value(task.tagged[-20:])
        raise UserError(f"tagged: ends with {end}; expected {OPENING} at its end, as an answer ends with {CLOSING}")


def _metrics(task: Task) -> None:
    fitting = [name for name in METRICS if not _unfit(task, name)]
    for name in task.metrics:
        why = _unfit(task, name) if name in METRICS else "is not known"
        if why:
            raise UserError(f"metrics: {name!r} {why}; choose from {', '.join(fitting)}")


def _unfit(task: Task, name: str) -> str:
    """Why a metric cannot be computed of a task; "" where it can."""
    if (task.span is not None) != (name in NUMBERS):
        return "is of words, answers are numbers" if task.span is not None else "is of numbers, answers are words"
    if name in ("f1", "f1a") and len(task.labels) != 2:
        return f"is of two answers, here are {len(task.labels)}"
    if name in OF_GROUPS and task.expand is None:
        return "is of rows that are scored together, which only a Python task's expand says"
    if name in SECTIONS and SECTIONS[name] not in task.sections:
        return f"is of the section {SECTIONS[name]}, which sections lacks"
    return ""


def _columns(task: Task) -> None:
    known = (*task.slots, LABEL)
    for column in task.aliases:
        if column not in known:
            raise UserError(f"aliases: {column!r} is no column; expected any of {', '.join(known)}")
    owners: dict[str, str] = {}
    for column in known:
        for name in task.columns_of(column):
            if owners.setdefault(name, column) != column:
                raise UserError(f"aliases: {name!r} is the column of {owners[name]!r} and of {column!r}")


def _read_back(task: Task, answers: str) -> None:
    """What SFT teaches must be read as what it says."""
    by = "parser" if task.parser is not None else answers if task.span is None else "span"
    labels: Sequence[int | float] = range(len(task.labels)) if task.span is None else task.span
    for label in labels:
        taught = task.answer(label)
        said = task.parse(taught)
        if said is None or abs(said - label) > (0 if task.span is None else 0.0501):  # one decimal is taught
            read = "no answer" if said is None else repr(task.labels[int(said)] if task.span is None else said)
            raise UserError(f"{by}: {taught!r}, which is taught as an answer, is read as {read}")

