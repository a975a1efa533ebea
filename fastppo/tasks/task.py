"""A task: how an example becomes a prompt, how an answer becomes a label again, and how answers are scored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastppo.tasks import metrics


@dataclass(frozen=True)
class Example:
    """One row of a data set. ``fields`` holds at least the task's slots; ``label`` is None where it is not known."""

    fields: dict[str, str]
    label: int | None
    origin: str
    """Where it stands, for messages: ``train.tsv:17`` is line 17 of that file."""


@dataclass(frozen=True)
class Task:
    """A classification task with a closed set of answer words."""

    name: str
    template: str
    """The prompt, with ``{slot}`` where a field of the example goes; other braces are plain text."""
    slots: tuple[str, ...]
    """The fields of an example that the template takes, which are also their column names in data files."""
    labels: tuple[str, ...]
    """The answer word of each label id."""
    label_names: tuple[str, ...]
    """What data sets call each label id."""
    tsv_columns: tuple[str, ...]
    """The columns of the data set's own TSV where that has no header."""
    hub: tuple[str, str]
    """Name and configuration of the data set on the Hugging Face hub."""

    def prompt(self, example: Example) -> str:
        """The prompt of an example. Fields are untrusted: they go in as they are, and are not searched for slots."""
        slots = "|".join(map(re.escape, self.slots))
        return re.sub(f"{{({slots})}}", lambda slot: example.fields[slot[1]], self.template)

    def answer(self, label: int) -> str:
        """The text that follows the prompt when ``label`` is right, with the space before it and no end of text."""
        return " " + self.labels[label]

    def parse(self, text: str) -> int | None:
        """Label id of a generated answer: an answer word in any case, with or without space around it and a full stop
        after it. None (malformed) for everything else, so that a reward cannot be had by listing every answer."""
        word = text.strip().removesuffix(".").lower()
        return self.labels.index(word) if word in self.labels else None

    def label_id(self, value: object) -> int | None:
        """Label id of what a data file has as a label: the id (1, 1.0, "1"), the answer word or the name; else None."""
        if isinstance(value, str):
            text = value.strip().lower()
            if re.fullmatch(r"[0-9]+\.0+", text):  # a column of integers that went through pandas with a gap in it
                text = text.partition(".")[0]
        elif isinstance(value, float) and value.is_integer():
            text = str(int(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            text = str(value)
        else:
            return None
        for label, spellings in enumerate(zip(self.labels, self.label_names, strict=True)):
            if text in (str(label), *spellings):
                return label
        return None

    def label_spellings(self) -> str:
        """Every spelling that ``label_id`` knows, for messages."""
        ids = zip(self.labels, self.label_names, strict=True)
        return " or ".join(f"{label} ({word}, {name})" for label, (word, name) in enumerate(ids))

    def score(self, gold: Sequence[int], predicted: Sequence[int | None]) -> dict[str, float]:
        """``mcc``, ``accuracy``, ``malformed`` and ``n`` of parsed answers; see `fastppo.tasks.metrics.score`."""
        return metrics.score(gold, predicted)

    def interval(self, gold: Sequence[int], predicted: Sequence[int | None], seed: int) -> tuple[float, float]:
        """Bootstrap 95 % interval (low, high) of ``mcc``; see `fastppo.tasks.metrics.mcc_interval`."""
        return metrics.mcc_interval(gold, predicted, seed)
