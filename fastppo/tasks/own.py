"""A user's own task: a Python file that defines ``TASK``, or a YAML or TOML file with a template and answers.

Whatever is wrong with it is a UserError: one line that names the file, and its line or the field.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fastppo import config
from fastppo.errors import UserError
from fastppo.tasks.check import FUNCTIONS, NAME, NAME_IN_WORDS, checked
from fastppo.tasks.example import Example
from fastppo.tasks.read import show, show_line, show_value
from fastppo.tasks.task import BUILT_IN, Task

ENDINGS = (".py", ".yaml", ".yml", ".toml")
FIELDS = ("name", "template", "tagged", "slots", "answers", "metrics", "aliases", "data")
"""What a YAML or TOML file may say."""

RANGE = r"(-?[0-9]+(?:\.[0-9]+)?) to (-?[0-9]+(?:\.[0-9]+)?)"


def is_file(name: str) -> bool:
    """Whether a task's name is that of a file."""
    return name.endswith(ENDINGS)


def whole_name(names: str) -> str:
    """A task's name, or several with commas, by the whole path where one is a file, so that it is found from any folder.
    Raises UserError as `names_in`."""
    whole = [os.path.abspath(os.path.expanduser(name)) if is_file(name) else name for name in names_in(names)]
    for path in whole:
        _without_comma(path)
    return ",".join(whole)


def names_in(names: str) -> list[str]:
    """The tasks that commas separate. Raises UserError for what is a file's path as a whole: it would be taken apart."""
    if is_file(names) and os.path.isfile(os.path.expanduser(names)):
        _without_comma(names)
    return [name.strip() for name in names.split(",")]


def _without_comma(path: str) -> None:
    if "," in path:
        raise UserError(f"task file {show(path)}: its path must hold no comma, which separates tasks; move or rename it")


def read_task(name: str, built_in: Mapping[str, Task]) -> Task:
    """The task of a file; a Python file is run for it, once a process as long as it stays the same.

    Args:
        built_in: the tasks whose names are taken.

    Raises:
        UserError: it cannot be read, or what it says is no task.
    """
    path = Path(whole_name(name))
    try:
        source = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise UserError(f"task file {show(path)}: cannot be read: {error.strerror or error}") from None
    if source is None:
        raise UserError(f"task file {show(path)}: {'is no file' if path.exists() else 'is missing, there is no such file'}")
    task, answers = _parsed(path, source)
    try:
        return checked(task, built_in, answers)
    except _Raised:
        raise
    except UserError as error:
        raise UserError(f"task file {show(path)}: {error}") from None


@lru_cache(maxsize=64)
def _parsed(path: Path, source: bytes) -> tuple[Task, str]:
    """What a file says, unchecked, and what it calls its answers. By its content: the same functions at every look."""
    task, answers = (_python(path, source), "labels") if path.suffix == ".py" else (_of_fields(path), "answers")
    data = task.data
    if isinstance(data, str) and data != BUILT_IN:
        beside = path.parent / os.path.expanduser(data)
        data = str(beside) if beside.exists() else data
    return replace(task, data=data, source=hashlib.sha256(source).hexdigest()), answers


# -- Python files ------------------------------------------------------------------------------------------------------


def _python(path: Path, source: bytes) -> Task:
    module = types.ModuleType(f"fastppo_task_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise UserError(f"task file {show(path)}{_line(error, path)}: {_said(error)}") from None
    task = getattr(module, "TASK", None)
    if type(task) is not Task:  # of a class of the user's own, what it overrides could not be named in an error
        found = "defines no TASK" if task is None else f"TASK is {show_value(task)}"
        raise UserError(f"task file {show(path)}: {found}; expected TASK = Task(...), with from fastppo.tasks import Task")
    functions = {name: getattr(task, name) for name in FUNCTIONS}
    guarded = {name: partial(_call, path, name, function, task) for name, function in functions.items() if callable(function)}
    return replace(task, **guarded)  # type: ignore[arg-type]


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it happened: ``, line 3``; nothing where it did not."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}" if error.lineno else ""
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
        trace = trace.tb_next
    return "" if line is None else f", line {line}"


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else show_line(error)
    return f"{type(error).__name__}: {show(text)}"


def _call(path: Path, name: str, function: Callable[..., Any], task: Task, *given: Any) -> Any:
    """What a function of the file returns; what goes wrong in it becomes a line for the user."""

    def wrong(what: str, line: str = "") -> UserError:
        on = "" if name == "training" else f" for {show_value(given[0])}"
        return _Raised(f"task file {show(path)}{line}: {name}{on}: {what}")

    try:
        result = function(*given)
    except (Exception, SystemExit) as error:
        if name == "expand" and isinstance(error, ValueError):  # which says that a row is damaged
            raise
        raise wrong(_said(error), _line(error, path)) from None
    if name == "reward" or (name == "parser" and task.span is not None and result is not None):
        try:
            result = float(result)
        except (TypeError, ValueError):
            raise wrong(f"returned {show_value(result)}; expected a number") from None
    expected = _unexpected(name, result, task)
    if expected:
        raise wrong(f"returned {show_value(result)}; expected {expected}")
    return result


class _Raised(UserError):
    """It names the file already."""


def _unexpected(name: str, result: Any, task: Task) -> str:
    """What a function should have returned; "" where it did."""
    if name == "reward":
        return "" if math.isfinite(result) else "a finite number"
    if name == "parser":
        fits = task.span is not None or result is None or task.label_id(result) is not None
        return "" if fits else f"{', '.join(map(repr, task.labels))}, or None"
    kind = Mapping if name == "expand" else Example
    fits = isinstance(result, list) and bool(result or name == "expand") and all(isinstance(item, kind) for item in result)
    return "" if fits else f"a list of {'dicts' if name == 'expand' else 'examples'}"


# -- YAML and TOML files -----------------------------------------------------------------------------------------------


class _TextLoader(config.UniqueKeyLoader):
    """Every word is the text that stands there: ``no`` is an answer, not a truth value."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _of_fields(path: Path) -> Task:
    tree = config.read_tree(path, "task", _TextLoader)
    where = f"task file {show(path)}"
    for name in tree:
        if name not in FIELDS:
            raise UserError(f"{where}: unknown field {show_value(name)}{config.suggest(str(name), list(FIELDS))}")
    for name in ("template", "answers"):
        if not tree.get(name):
            raise UserError(f"{where}: {name}: is missing")
    given: dict[str, Any] = {"name": path.stem}
    if "name" not in tree and not re.fullmatch(NAME, path.stem, re.ASCII):
        raise UserError(f"{where}: name: is missing, and the file's own is none; expected {NAME_IN_WORDS}")
    for name in ("name", "template", "tagged", "data"):
        if name in tree:
            given[name] = _text(tree[name], f"{where}: {name}")
    for name in ("slots", "metrics"):
        if name in tree:
            given[name] = _texts(tree[name], f"{where}: {name}")
    if "aliases" in tree:
        aliases = tree["aliases"]
        if not isinstance(aliases, Mapping):
            raise UserError(f"{where}: aliases: {show_value(aliases)} is not allowed; expected column: name in the data")
        given["aliases"] = {str(key): _texts(value, f"{where}: aliases: {key}") for key, value in aliases.items()}
    return Task(**given, **_answers(tree["answers"], f"{where}: answers"))


def _answers(value: object, where: str) -> dict[str, Any]:
    """Fields of a `Task` from ``0 to 5``, a list of words, or words with what the data calls each."""
    if isinstance(value, str):
        ends = re.fullmatch(RANGE, value.strip())
        if ends is None:
            raise UserError(f"{where}: {show_value(value)} is not allowed; expected a list of words, or a range such as 0 to 5")
        low, high = float(ends[1]), float(ends[2])
        if low >= high:
            raise UserError(f"{where}: {show_value(value)} is not allowed; the lowest number comes first")
        return {"span": (low, high)}
    if not isinstance(value, Mapping):
        return {"labels": _texts(value, where)}
    words = tuple(_text(word, where) for word in value)
    names = [_texts(called, f"{where}: {word}") if called not in ("", None) else () for word, called in value.items()]
    return {
        "labels": words,
        "label_names": tuple((*called, word)[0] for word, called in zip(words, names, strict=True)),
        "label_aliases": tuple(called[1:] for called in names),
    }


def _text(value: object, where: str) -> str:
    """A text, or the number or truth value that TOML makes of one, as data files have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {show_value(value)} is not allowed; expected a text")
    return str(value).strip()


def _texts(value: object, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where) for item in (value if isinstance(value, list) else [value]))
