"""The averages of the two leaderboards, from scores by task and metric."""

from collections.abc import Mapping

GLUE_COLUMNS = (
    ("cola", "mcc"), ("sst2", "accuracy"), ("mrpc", "f1"), ("stsb", "spearman"), ("qqp", "f1"), ("mnli", "accuracy_matched"),
    ("mnli", "accuracy_mismatched"), ("qnli", "accuracy"), ("rte", "accuracy"),
)  # fmt: skip
"""(task, metric) of the nine columns whose mean is the GLUE average of the BERT paper (Devlin et al. 2019, table 1): MNLI is
two of them, WNLI and AX are none."""

SUPERGLUE_TASKS: dict[str, tuple[str, ...]] = {
    "boolq": ("accuracy",), "cb": ("macro_f1", "accuracy"), "copa": ("accuracy",), "multirc": ("f1a", "em"),
    "record": ("token_f1", "exact_match"), "rte": ("accuracy",), "wic": ("accuracy",), "wsc": ("accuracy",),
}  # fmt: skip
"""Metrics of the eight tasks of the SuperGLUE average: a task with two counts with their mean (Wang et al. 2019, section 3)."""


def glue_average(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """The nine-column average of scores by task and metric name, in their own unit; None if one is missing."""
    return _mean([scores.get(task, {}).get(metric) for task, metric in GLUE_COLUMNS])


def superglue_average(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """The average over the eight tasks of scores by task and metric name, in their own unit; None if one is missing."""
    return _mean([_mean([scores.get(task, {}).get(m) for m in metrics]) for task, metrics in SUPERGLUE_TASKS.items()])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
