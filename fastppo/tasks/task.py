"""A task: how an example becomes a prompt, how an answer becomes a label again, and how answers are scored."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Final

from fastppo.tasks import metrics as scoring
from fastppo.tasks.example import Example

SLOT = r"\{([^\W\d]\w*)\}"

OPENING, CLOSING = "<answer>", "</answer>"
"""The tags of tagged prompts: the first ends the prompt, the second ends the answer."""

LABEL, INDEX = "label", "index"
"""The column beside the slots: of labelled data, and of a test split."""

Values = dict[str, object]
"""What one row of a data file holds, by column."""

Said = str | int | float
"""An answer word or a label id, or the number of a task whose answers are numbers."""

BUILT_IN: Final = "built-in"
"""`Task.data` of a task whose data comes with fastppo."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task whose answer is one of a few words (``labels``) or a number (``span``).

    ``name``, ``template`` and one of these two suffice; all else has a default. `fastppo.tasks.check` says what must hold.
    """

    name: str
    template: str
    """The prompt, with ``{slot}`` where a field of the example goes; other braces are plain text."""
    slots: tuple[str, ...] = ()
    """The fields of an example that the template takes, which are also their column names in data files; (): every word that
    stands in braces in the template."""
    demonstrations: str = ""
    """Solved examples, which stand in front of the last part of the prompt: see ``with_demonstrations``."""
    tagged: str = ""
    """The prompt of ``--template tagged``; it ends with the opening tag."""
    closing: str = ""
    """The text that ends an answer and belongs to it; "" where the end token alone does."""
    labels: tuple[str, ...] = ()
    """The answer word of each label id, as it is taught; case does not matter in what is answered. The ids of a data set on the
    hub must be the same: files there hold bare ids."""
    label_names: tuple[str, ...] = ()
    """What data sets call each label id; (): the answer words."""
    label_aliases: tuple[tuple[str, ...], ...] = ()
    """What else they call each label id. Where a name is a number, bare ids in data are such names and no label ids."""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a slot may hold, where that is not any text; in lower case."""
    span: tuple[float, float] | None = None
    """Lowest and highest number of a task whose answers are numbers; None for words."""
    metrics: tuple[str, ...] = ()
    """Names of its official metrics in `fastppo.tasks.metrics.METRICS`; the first is the one to look at. (): accuracy, and of
    numbers Spearman's and Pearson's correlation."""
    hub: tuple[str, str] | None = None
    """Name and configuration of the data set on the Hugging Face hub, if it is there."""
    data: str | None = None
    """What is loaded where ``--data`` is not given: `BUILT_IN`, or what ``--data`` takes; None: it must be given."""
    parser: Callable[[str], Said | None] | None = None
    """(text of an answer, without its closing tag) -> the answer word or number that it says, None: malformed. None: see
    ``parse``."""
    reward: Callable[[str, str | float, str | float | None], float] | None = None
    """(text of an answer, right answer word or number, the same of what the answer says or None: malformed) -> its reward, in
    place of the preset's. Nothing else may decide the number: samples are scored in any order, and again by a resumed run."""
    tsv_columns: tuple[str, ...] = ()
    """The columns of the data set's own TSV where that has no header; () where it has one."""
    tsv_extra: int = 0
    """How many columns more a row without header may have, at its end."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names of the columns, in lower case: of slots, ``label`` and ``index``."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of its files for ``train``, ``dev`` and ``test`` where the usual ones are not there."""
    sections: tuple[str, ...] = ()
    """Parts of the dev and the test split with a file each, ``dev_SECTION``: the ``group`` of their examples."""
    expand: Callable[[Values, str, bool], list[Values]] | None = None
    """The examples' columns (``group`` and ``part`` too) from one row, its number, and whether it must be labelled. Raises
    ValueError for a damaged row."""
    training: Callable[[list[Example], random.Random], list[Example]] | None = None
    """Draws from the examples of the train split those that are trained on."""
    train_on: str = ""
    """Of a diagnostic set, which has no train split: the task that its policy was trained on."""
    drops_damaged: bool = False
    """Its own files are known to have damaged rows: few of them are left out, with a notice."""
    wordless_is_wrong: bool = False
    """With the rewards of `code`, a closed answer without any answer word is wrong, not malformed."""
    unlabelled: bool = False
    """Its data is a test split, see ``for_test``."""
    source: str = ""
    """SHA-256 of the file that the task was read from; "" of a built-in one."""

    def __post_init__(self) -> None:
        found = tuple(dict.fromkeys(re.findall(SLOT, f"{self.template}{self.tagged}")))
        of_kind = ("accuracy",) if self.span is None else ("spearman", "pearson")
        for name, default in (("slots", found), ("label_names", self.labels), ("metrics", of_kind)):
            if not getattr(self, name):
                object.__setattr__(self, name, default)

    def for_test(self) -> "Task":
        """The same task for reading a test split: rows have an index instead of a label, and every row counts."""
        return replace(self, unlabelled=True)

    def with_template(self, template: str) -> "Task":
        """The same task asked with the prompt ``short`` or ``tagged``."""
        return self if template == "short" else replace(self, template=self.tagged, closing=CLOSING)

    def prompt(self, example: Example) -> str:
        """The prompt of an example. Fields are untrusted: they go in as they are, and are not searched for slots."""
        instruction, question = self._parts()
        return self._filled(instruction, example) + self.demonstrations + self._filled(question, example)

    def with_demonstrations(self, examples: Sequence[Example]) -> "Task":
        """The same task with solved examples between the instruction and the question (few-shot)."""
        question = self._parts()[1]
        known = [(example, example.label) for example in examples if example.label is not None]
        solved = [self._filled(question, example) + self.answer(label) for example, label in known]
        return replace(self, demonstrations="".join(text + "\n\n" for text in solved))

    def _parts(self) -> tuple[str, str]:
        """What the template says once, up to its last blank line, and what it says of each example."""
        instruction, gap, question = self.template.rpartition("\n\n")
        return instruction + gap, question

    def _filled(self, text: str, example: Example) -> str:
        slots = "|".join(map(re.escape, self.slots))
        return re.sub(f"{{({slots})}}", lambda slot: example.fields[slot[1]], text)

    def answer(self, label: int | float) -> str:
        """The text that follows the prompt when ``label`` is right, as it is taught: a word or, of a number, one decimal.

        It begins with the space that follows a prompt, or ends with the closing tag.
        """
        text = self.labels[int(label)] if self.span is None else f"{label:.1f}"
        return text + self.closing if self.closing else " " + text

    def parse(self, text: str) -> int | float | None:
        """What a generated answer says: a label id, or a number, which may lie outside ``span``. None: malformed.

        Without tags the whole answer must be an answer word in any case or a number, with or without space around it and
        a full stop after it. With tags, what counts is the text before the first closing tag: it must be there, and hold
        exactly one of the answer words, in any case; or a number, of which the first with a decimal point counts, else the
        first. None for everything else, so that a reward cannot be had by listing every answer.
        A ``parser`` reads instead what stands before the tag, or the whole answer without tags.
        """
        if self.parser is not None:
            answer, closed, _ = text.partition(self.closing) if self.closing else (text, "all", "")
            return self._said(self.parser(answer)) if closed else None
        if self.closing:
            found = self.found(text)
            return found[0] if found is not None and len(found) == 1 else None
        word = text.strip().removesuffix(".").lower()
        if self.span is not None:
            return _number(word) if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", word) else None
        return self._words.index(word) if word in self._words else None

    def _said(self, value: Said | None) -> int | float | None:
        """What a parser returned, as ``parse`` returns it."""
        return self.label_id(value) if self.span is None or value is None else _number(str(value))

    def worth(self, text: str, gold: int | float, predicted: int | float | None) -> float:
        """What the task's own ``reward``, which there must be, says of an answer; gold and predicted as ``parse`` has them."""
        assert self.reward is not None
        return float(self.reward(text, self._word(gold), None if predicted is None else self._word(predicted)))

    def _word(self, label: int | float) -> str | float:
        return self.labels[int(label)] if self.span is None else label

    def found(self, text: str) -> list[int] | list[float] | None:
        """The different labels that an answer names before its closing tag, in order (a number is at most one); None without
        the tag."""
        answer, closed, _ = text.partition(self.closing)
        return self._named(answer) if closed else None

    def _named(self, text: str) -> list[int] | list[float]:
        if self.span is not None:
            number = re.search(r"[+-]?[0-9]+\.[0-9]+", text) or re.search(r"[+-]?[0-9]+", text)
            value = _number(number[0]) if number else None
            return [] if value is None else [value]
        longest_first = sorted(self._words, key=len, reverse=True)  # "not sure" says that, not "not"
        words = re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", text.lower())
        return [self._words.index(word) for word in dict.fromkeys(words)]

    @cached_property
    def _words(self) -> tuple[str, ...]:
        return tuple(word.lower() for word in self.labels)

    def guess(self, text: str, draw: random.Random | None) -> int | float:
        """A label for an answer that ``parse`` refuses: the first that it names anywhere, else one drawn evenly; without a
        ``draw`` the first of all, or the middle of the scale."""
        named = self._named(text)
        if named:
            return named[0]
        if draw is None:
            return 0 if self.span is None else sum(self.span) / 2
        return draw.randrange(len(self.labels)) if self.span is None else draw.uniform(*self.span)

    def label_id(self, value: object) -> int | float | None:
        """The label that a data file's value stands for, or None: of a class the id (1, 1.0, "1"), the answer word or a name in
        any case; of a number itself, within ``span``."""
        text = _plain(value)
        if text is None:
            return None
        if self.span is None:
            return self._ids.get(text)
        number = _number(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
        return number if number is not None and self.span[0] <= number <= self.span[1] else None

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The label id of every spelling."""
        named = {_plain(text): label for label, texts in enumerate(self.spellings) for text in texts}
        bare = {} if self._numbered else {str(label): label for label in range(len(self.labels))}
        return {text: label for text, label in (bare | named).items() if text is not None}

    @property
    def spellings(self) -> list[tuple[str, ...]]:
        """The answer word of each label id and what data calls it, each once."""
        aliases = self.label_aliases or ((),) * len(self.labels)
        every = zip(self.labels, self.label_names, aliases, strict=True)
        return [tuple(dict.fromkeys((word, name, *more))) for word, name, more in every]

    @property
    def _numbered(self) -> bool:
        return any(re.fullmatch(r"-?[0-9]+", _plain(text) or "") for texts in self.spellings for text in texts)

    def label_spellings(self) -> str:
        """Every spelling that ``label_id`` knows, for messages."""
        if self.span is not None:
            return f"numbers from {self.span[0]:g} to {self.span[1]:g}"
        if self._numbered:
            return " or ".join(", ".join(texts) for texts in self.spellings)
        return " or ".join(f"{label} ({', '.join(texts)})" for label, texts in enumerate(self.spellings))

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row of data must have."""
        return (*self.slots, INDEX if self.unlabelled else LABEL)

    def columns_of(self, column: str) -> tuple[str, ...]:
        """The names that one of ``columns`` goes by in data files; in lower case too, as tables are searched."""
        names = (column, *(("idx",) if column == INDEX else ()), *self.aliases.get(column, ()))
        return tuple(dict.fromkeys((*names, *map(str.lower, names))))

    def score(self, examples: Sequence[Example], predicted: Sequence[int | float | None]) -> dict[str, float]:
        """The official metrics, ``accuracy``, ``malformed`` (fractions) and ``n`` (rows) of parsed answers; None: malformed."""
        names = self.metrics
        if self.span is None and "accuracy" not in names:
            names = (*names, "accuracy")
        scores = scoring.score(names, self._answers(examples, predicted))
        return {**scores, "malformed": list(predicted).count(None) / len(predicted), "n": len(predicted)}

    def intervals(
        self, examples: Sequence[Example], predicted: Sequence[int | float | None], seed: int
    ) -> dict[str, tuple[float, float]]:
        """Bootstrap 95 % interval (low, high) of each official metric that the examples have."""
        return scoring.intervals(self.metrics, self._answers(examples, predicted), seed)

    def _answers(self, examples: Sequence[Example], predicted: Sequence[int | float | None]) -> scoring.Answers:
        """For scoring: numbers within ``span``, and instead of a malformed answer one that is wrong, or says nothing.

        Of numbers that is the middle of the scale, the same for all. The far end from the gold number would be an answer that
        knows it: such answers correlate with it, if negatively.
        """
        gold = [example.label for example in examples if example.label is not None]
        if not gold or len(gold) != len(examples) or len(gold) != len(predicted):
            raise ValueError(f"{len(gold)} gold labels and {len(predicted)} predictions: need as many of each, at least one")
        if self.span is None:
            counted = [scoring.MALFORMED if p is None else p for p in predicted]
        else:
            low, high = self.span
            counted = [(low + high) / 2 if p is None else min(max(p, low), high) for p in predicted]
        groups = [example.group for example in examples]
        return scoring.Answers(gold, counted, groups, [example.fields.get("candidate", "") for example in examples])


def _number(text: str) -> float | None:
    """The number that a text of digits spells; None where no float holds it."""
    value = float(text)
    return value if math.isfinite(value) else None


def _plain(value: object) -> str | None:
    """What labels are compared by of a data file's value: its text in lower case, 1 for 1.0; None for no text or number."""
    if isinstance(value, str):
        text = value.strip().lower()  # and integers that went through pandas with a gap in them
        return text.partition(".")[0] if re.fullmatch(r"-?[0-9]+\.0+", text) else text
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    return str(value).lower() if isinstance(value, int) else None
