"""How scores are shown. A row of scores holds metrics by name, and ``NAME_low`` and ``NAME_high`` of those with an interval."""

from collections.abc import Mapping

TITLES = {
    "mcc": "MCC", "accuracy": "accuracy", "accuracy_matched": "accuracy (matched)",
    "accuracy_mismatched": "accuracy (mismatched)", "f1": "F1", "macro_f1": "macro F1", "pearson": "Pearson",
    "spearman": "Spearman", "f1a": "F1a", "em": "EM", "token_f1": "F1", "exact_match": "EM", "parity": "gender parity",
}  # fmt: skip
"""What `fastppo.tasks.metrics.METRICS` are called."""


def title(name: str) -> str:
    """A metric's name in texts; of one that is not a task's, such as the mean ``score`` of several tasks, its words."""
    return TITLES.get(name, name.replace("_", " "))


def with_intervals(row: Mapping[str, float]) -> list[str]:
    """The names of a row's metrics that have an interval."""
    return [name for name in row if f"{name}_low" in row]


def figure(row: Mapping[str, float], name: str) -> str:
    """A metric and its interval."""
    return f"{row[name]:z.3f} [{row[f'{name}_low']:z.3f}, {row[f'{name}_high']:z.3f}]"


def shown(row: Mapping[str, float]) -> str:
    """A row as one line: metrics with intervals, then fractions."""
    parts = [f"{title(name)} {figure(row, name)}" for name in with_intervals(row)]
    if "accuracy" in row and "accuracy_low" not in row:
        parts.append(f"accuracy {row['accuracy']:.1%}")
    return "  ".join([*parts, f"malformed {row['malformed']:.1%}"])
