"""What a run's policy answered, for its report: confusion matrices, and the same examples' answers before and after."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fastppo.report import blocks
from fastppo.report.blocks import Answer, Card, Section, Series, is_number, number
from fastppo.report.read import Records, as_dict
from fastppo.track import STAGES

MOST_CLASSES, NARROW = 12, 4  # of a confusion matrix; of those that stand beside each other
CARDS = 12

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Labels:
    """What class ids are called: in the data (``names``) and in answers (``words``). Labels of other tasks are themselves."""

    names: Sequence[str]
    words: Sequence[str]

    @classmethod
    def of(cls, setup: Row) -> Labels:
        lists = [found if isinstance(found := setup.get(key), list) else [] for key in ("labels", "answers")]
        return cls(*([str(item) for item in found] for found in lists))

    def is_class(self, label: object) -> bool:
        return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.names)

    def name(self, label: Any) -> str:
        if self.is_class(label):
            return self.names[label]
        if isinstance(label, str):
            return label
        return number(label) if is_number(label) else json.dumps(label, ensure_ascii=False)

    def right_answer(self, label: Any) -> str:
        """A label as the answer that was wanted: ``no (unacceptable)``."""
        if isinstance(label, list):
            return " or ".join(map(self.right_answer, label))
        name, word = self.name(label), self.words[label] if self.is_class(label) and label < len(self.words) else ""
        return f"{word} ({name})" if word and word.lower() != name.lower() else name


def confusion(rows: Sequence[Row], labels: Labels) -> tuple[list[str], list[str], list[list[int]]] | None:
    """(right answers, given answers, counts [right][given]) of a stage's answers; the last column is for malformed ones.

    None where the labels are no classes (numbers with a fraction, lists of answers) or too many to be seen at once.
    """
    pairs = [(row["label"], row.get("predicted")) for row in rows if row.get("label") is not None]
    if not pairs or not all(label is None or isinstance(label, (int, str)) for pair in pairs for label in pair):
        return None
    others = {label for pair in pairs for label in pair if label is not None and not labels.is_class(label)}
    classes = [*range(len(labels.names)), *sorted(others, key=lambda label: (isinstance(label, str), label))]
    if len(classes) > MOST_CLASSES:
        return None
    counts, names = Counter(pairs), [labels.name(label) for label in classes]
    return names, [*names, "malformed"], [[counts[right, given] for given in [*classes, None]] for right in classes]


def given_and_right(answers: Mapping[str, Sequence[Row]], labels: Labels) -> Section:
    """The confusion matrix of each one's answers, by its name; where labels are numbers instead of classes, given against right
    answers."""
    matrices = {name: confusion(rows, labels) for name, rows in answers.items()}
    maps = [blocks.heat_map(name, *matrix) for name, matrix in matrices.items() if matrix]
    if maps:
        wide = any(matrix and len(matrix[0]) > NARROW for matrix in matrices.values())
        text = "Greedy answers to the dev set, by right answer and given answer; shares are those of a row."
        return Section("Confusion matrix", maps if wide else [blocks.grid(*maps)], text)
    plots = [_scattered(name, rows) for name, rows in answers.items()]
    return Section("Given and right answers", [blocks.grid(*plots)], "Greedy answers to the dev set; each dot is one.")


def _scattered(title: str, rows: Sequence[Row]) -> Markup:
    pairs = [(row.get("label"), row.get("predicted")) for row in rows]
    points = [(right, given) for right, given in pairs if is_number(right) and is_number(given)]
    if not points:
        return Markup()
    malformed = f"{sum(given is None for _, given in pairs):,} of {len(rows):,} malformed"
    series = [Series("given answer", points, marked=True, joined=False)]
    return blocks.line_chart(title, series, x="right answer", explained=malformed)


def before_and_after(records: Records, labels: Labels) -> Section:
    """Some examples of the dev set with the answers after each stage; folded: some that were sampled in training."""
    shown = [beside_each_other(by_stage(records), labels), *_sampled(records, labels)]
    return Section("Answers before and after", shown, "Greedy answers to the same examples of the dev set.")


def by_stage(records: Records) -> dict[str, list[dict[str, Any]]]:
    """A run's answers to the dev set by the shown names of its stages."""
    return {STAGES.get(stage, stage): rows for stage, rows in records.answers.items()}


def beside_each_other(answers: Mapping[str, Sequence[Row]], labels: Labels) -> Markup:
    """Cards of some examples of the dev set with everyone's answer, by name; the last one's answers choose the examples."""
    keyed = {name: {_key(row, i): row for i, row in enumerate(rows)} for name, rows in answers.items() if rows}
    return blocks.answer_cards([_card(key, keyed, labels) for key in _chosen(keyed)]) if keyed else Markup()


def _sampled(records: Records, labels: Labels) -> Iterable[Markup]:
    rows = [row for row in records.samples if is_number(row.get("step"))]
    if rows:
        steps = sorted({row["step"] for row in rows})
        picked = {steps[0], steps[len(steps) // 2], steps[-1]}
        cards = blocks.answer_cards([_sample(row, labels) for row in rows if row["step"] in picked])
        yield blocks.folded("Answers sampled in training: first, middle and last", cards)


def _key(row: Row, place: int) -> str:
    return str(row.get("origin") or place)


def _chosen(answers: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Of every way that examples went some, spread over the data set; what was learned comes first, then what was unlearned."""
    groups: dict[tuple[bool | None, ...], list[str]] = {}
    for key in list(answers.values())[-1]:
        went = tuple(_verdict(rows[key])[1] if key in rows else None for rows in answers.values())
        groups.setdefault(went, []).append(key)
    order = sorted(groups, key=lambda w: ((w[0], w[-1]) != (False, True), (w[0], w[-1]) != (True, False), str(w)))
    shown = {went: min(CARDS, len(groups[went])) for went in order}
    turns = [[groups[went][i * len(groups[went]) // n] for i in range(n)] for went, n in shown.items()]
    return [keys[i] for i in range(CARDS) for keys in turns if i < len(keys)][:CARDS]


def _card(key: str, answers: Mapping[str, Mapping[str, Row]], labels: Labels) -> Card:
    found = {name: rows[key] for name, rows in answers.items() if key in rows}
    last = list(found.values())[-1]
    shown = [Answer(name, _text(row), *_verdict(row)) for name, row in found.items()]
    return Card(key, as_dict(last.get("fields")), labels.right_answer(last.get("label")), shown)


def _sample(row: Row, labels: Labels) -> Card:
    reward = row.get("reward")
    answer = Answer("sampled", _text(row), f"reward {number(reward)}" if is_number(reward) else "", None)
    return Card(f"PPO iteration {row['step']}", as_dict(row.get("fields")), labels.right_answer(row.get("label")), [answer])


def _text(row: Row) -> str:
    return str(row.get("answer") or "")


def _verdict(row: Row) -> tuple[str, bool | None]:
    label, predicted = row.get("label"), row.get("predicted")
    if predicted is None:
        return "✗ malformed", False
    if isinstance(label, float) and is_number(label) and is_number(predicted):
        return f"off by {number(abs(predicted - label))}", None
    right = predicted in label if isinstance(label, list) else predicted == label
    return ("✓ right", True) if right else ("✗ wrong", False)
