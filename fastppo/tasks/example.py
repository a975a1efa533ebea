"""What a task is about, row by row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One row of a data set. ``fields`` holds at least the task's slots."""

    fields: dict[str, str]
    label: int | float | None
    """The id of its class, or the number of a task whose answers are numbers; None where it is not known."""
    origin: str
    """Where it stands, for messages: ``train.tsv:17`` is line 17 of that file."""
    group: str = ""
    """What is scored together: the question of an answer, the query of an entity, the section of a dev set. "": nothing is."""
