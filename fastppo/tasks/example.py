"""What a task is about, row by row."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One row of a data set. ``fields`` holds at least the task's slots."""

    fields: dict[str, str]
    label: int | float | None
    """The id of its class, or the number of a task whose answers are numbers; None where it is not known."""
    origin: str
    """Where it stands, for records: ``train.tsv:17`` is line 17 of that file."""
    group: str = ""
    """What is scored together: the question of an answer, the query of an entity, the section of a dev set. "": nothing is."""
    path: str = field(default="", compare=False)
    """The same with the whole path as the user gave it; "" for what is in no file."""

    index: tuple[int, ...] = ()
    """Of a test split: what its server calls it, a number; of MultiRC those of passage, question and answer."""

    @property
    def where(self) -> str:
        """How an error names it."""
        return self.path or self.origin
