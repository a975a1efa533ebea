"""The official metrics of GLUE and SuperGLUE, with bootstrap intervals. A malformed answer is wrong; of numbers, a constant.

Suffixes of arrays: N rows, U units that the bootstrap draws (rows, or groups of rows), K sums, B resamples, C cells.
"""

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

MALFORMED = -1
"""Class id of an answer that the parser refused; no gold label has it."""

RESAMPLES, LEVEL = 1000, 0.95


class Answers(NamedTuple):
    """What is scored, row by row: gold and predicted labels (ids, `MALFORMED` among the predicted; or numbers), the group that
    a row is scored with, and the candidate answer that it is about."""

    gold: Sequence[int | float]
    predicted: Sequence[int | float]
    groups: Sequence[str]
    candidates: Sequence[str]


class Metric(NamedTuple):
    """Its value, and the bootstrap percentile interval (answers, seed) -> (low, high)."""

    value: Callable[[Answers], float]
    interval: Callable[[Answers, int], tuple[float, float]]


def score(names: Sequence[str], answers: Answers) -> dict[str, float]:
    """The metrics of these names, in this order; without those of sections or of pairs that the answers lack."""
    return {name: METRICS[name].value(answers) for name in _present(names, answers)}


def intervals(names: Sequence[str], answers: Answers, seed: int) -> dict[str, tuple[float, float]]:
    """Bootstrap 95 % interval (low, high) of each, over rows, or over groups where a metric is one of groups.

    Percentile interval of 1,000 resamples (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3).
    """
    return {name: METRICS[name].interval(answers, seed) for name in _present(names, answers)}


def _present(names: Sequence[str], answers: Answers) -> list[str]:
    return [
        name for name in names
        if (name not in SECTIONS or SECTIONS[name] in answers.groups) and (name != "parity" or _parities(answers))
    ]  # fmt: skip


# -- classes, row by row -----------------------------------------------------------------------------------------------


def accuracy(answers: Answers) -> float:
    """Fraction of right answers."""
    from sklearn.metrics import accuracy_score  # a second to import: not for commands that score nothing

    return float(accuracy_score(answers.gold, answers.predicted))


def matthews_correlation(gold: Sequence[int | float], predicted: Sequence[int | float]) -> float:
    """Matthews correlation, for any number of classes Gorodkin's R_K (Comput. Biol. Chem. 28, 2004, eq. 8).

    Malformed answers are one more predicted class. 0 where it is undefined (one class only in gold or in predicted).
    """
    if len(set(gold)) < 2 or len(set(predicted)) < 2:
        return 0.0  # what scikit-learn returns too, but with a warning for a single label
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predicted))


def mcc_interval(
    gold: Sequence[int | float], predicted: Sequence[int | float], seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Bootstrap percentile interval (low, high) of the Matthews correlation over rows drawn with replacement.

    A resample matters only through its confusion matrix, whose cells are multinomial with the observed frequencies, so
    the resamples are drawn as matrices: the same distribution as drawing rows.
    """
    cells = sorted(Counter(zip(gold, predicted, strict=True)).items())
    counts_C = np.array([count for _, count in cells])
    drawn_BC = np.random.default_rng(seed).multinomial(len(gold), counts_C / len(gold), size=resamples)
    return _percentiles(_gorodkin([cell for cell, _ in cells], drawn_BC.astype(np.float64)), level)


def _gorodkin(cells: list[tuple[int | float, int | float]], counts_BC: np.ndarray) -> np.ndarray:
    """R_K [B] of B confusion matrices, each given by the counts of its (gold, predicted) cells."""
    ids = sorted({label for cell in cells for label in cell})
    is_gold_CK = np.array([[float(gold == label) for label in ids] for gold, _ in cells])
    is_predicted_CK = np.array([[float(predicted == label) for label in ids] for _, predicted in cells])
    gold_BK, predicted_BK = counts_BC @ is_gold_CK, counts_BC @ is_predicted_CK
    total_B = counts_BC.sum(axis=1)
    right_B = counts_BC @ np.array([float(gold == predicted) for gold, predicted in cells])
    covariance_B = right_B * total_B - (gold_BK * predicted_BK).sum(axis=1)
    spread_B = (total_B**2 - (gold_BK**2).sum(axis=1)) * (total_B**2 - (predicted_BK**2).sum(axis=1))
    return np.divide(covariance_B, np.sqrt(spread_B), out=np.zeros_like(covariance_B), where=spread_B > 0)


def positive_f1(answers: Answers) -> float:
    """F1 of class 1 of two. A malformed answer counts as the wrong class of the two; 0 where nothing is of class 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(answers.gold, _other_class(answers), zero_division=0.0))


def _other_class(answers: Answers) -> list[int | float]:
    """With the other one of two classes for a malformed answer: as a class of its own it would be no false positive."""
    return [1 - g if p == MALFORMED else p for g, p in zip(answers.gold, answers.predicted, strict=True)]


def macro_f1(answers: Answers) -> float:
    """Mean over the classes, those in gold or predicted, of each one's F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(answers.gold, answers.predicted, labels=_classes(answers), average="macro", zero_division=0.0))


def _classes(answers: Answers) -> list[int | float]:
    return sorted({*answers.gold, *answers.predicted} - {MALFORMED})


# -- numbers -----------------------------------------------------------------------------------------------------------


def pearson(answers: Answers) -> float:
    """Pearson correlation; 0 where it is undefined."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, answers)


def spearman(answers: Answers) -> float:
    """Spearman's rank correlation; 0 where it is undefined."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, answers)


def _correlation(function: Callable[..., tuple[float, float]], answers: Answers) -> float:
    if len(set(answers.gold)) < 2 or len(set(answers.predicted)) < 2:
        return 0.0
    with warnings.catch_warnings():  # of numbers that differ so little that they count as equal
        warnings.simplefilter("ignore")
        value = float(function(answers.gold, answers.predicted)[0])
    return value if np.isfinite(value) else 0.0


def _correlation_interval(ranked: bool, answers: Answers, seed: int) -> tuple[float, float]:
    """Rows are drawn, and ranked anew in each resample."""
    from scipy.stats import rankdata

    pairs_N2 = np.array([answers.gold, answers.predicted], dtype=np.float64).T
    rng, n = np.random.default_rng(seed), len(pairs_N2)
    values = []
    for _ in range(RESAMPLES):
        x_N, y_N = pairs_N2[rng.integers(0, n, size=n)].T
        if ranked:
            x_N, y_N = rankdata(x_N), rankdata(y_N)
        x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
        spread = np.sqrt((x_N @ x_N) * (y_N @ y_N))
        values.append(x_N @ y_N / spread if spread > 0 else 0.0)
    return _percentiles(np.array(values), LEVEL)


# -- groups of rows ----------------------------------------------------------------------------------------------------


def all_right(answers: Answers) -> float:
    """MultiRC's EM: fraction of questions (groups) whose answers are all judged rightly (Khashabi et al. 2018, MultiRC)."""
    return float(np.mean([ok for ok, _ in _all_right(answers)]))


def _all_right(answers: Answers) -> list[list[float]]:
    right = [g == p for g, p in zip(answers.gold, answers.predicted, strict=True)]
    return [[float(all(right[i] for i in rows)), 1.0] for rows in _groups(answers).values()]


def _groups(answers: Answers) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(answers.groups):
        rows.setdefault(group, []).append(i)
    return rows


def token_f1(answers: Answers) -> float:
    """ReCoRD's F1: of the tokens of a query's chosen entity with those of the gold entity that is most like it, in the mean."""
    return float(np.mean([f1 for f1, _, _ in _queries(answers)]))


def exact_match(answers: Answers) -> float:
    """ReCoRD's EM: fraction of queries whose chosen entity is a gold one."""
    return float(np.mean([match for _, match, _ in _queries(answers)]))


def _queries(answers: Answers) -> list[list[float]]:
    """(F1, exact match, 1) of each query (group). Chosen is its first candidate that is judged right; none: both are 0."""
    queries = []
    for rows in _groups(answers).values():
        chosen = next((_normalised(answers.candidates[i]) for i in rows if answers.predicted[i] == 1), None)
        gold = [_normalised(answers.candidates[i]) for i in rows if answers.gold[i] == 1]
        found = [(_overlap_f1(chosen, g), float(chosen == g)) for g in gold] if chosen is not None else []
        queries.append([max((f1 for f1, _ in found), default=0.0), max((match for _, match in found), default=0.0), 1.0])
    return queries


def _normalised(text: str) -> str:
    """As the evaluation of SQuAD and ReCoRD has it: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _overlap_f1(found: str, gold: str) -> float:
    tokens, wanted = found.split(), gold.split()
    same = sum((Counter(tokens) & Counter(wanted)).values())
    return 2 * same / (len(tokens) + len(wanted)) if same else 0.0


def gender_parity(answers: Answers) -> float:
    """Fraction of sentence pairs (groups of two rows and more) whose answers agree (Wang et al. 2019, SuperGLUE, section 3.3).

    A pair with a malformed answer does not agree. There must be a pair.
    """
    return float(np.mean([same for same, _ in _parities(answers)]))


def _parities(answers: Answers) -> list[list[float]]:
    pairs = ([answers.predicted[i] for i in rows] for rows in _groups(answers).values() if len(rows) > 1)
    return [[float(len(set(said)) == 1 and said[0] != MALFORMED), 1.0] for said in pairs]


def _section(section: str, answers: Answers) -> Answers:
    """The answers of one section of the dev set."""
    rows = [i for i, group in enumerate(answers.groups) if group == section]
    gold, predicted = ([labels[i] for i in rows] for labels in (answers.gold, answers.predicted))
    return Answers(gold, predicted, [section] * len(rows), [answers.candidates[i] for i in rows])


# -- intervals of metrics that follow from sums over units ---------------------------------------------------------------


Units = Callable[[Answers], Sequence[Sequence[float]]]
"""What each unit adds to the sums, [U, K]."""
OfSums = Callable[[np.ndarray], np.ndarray]
"""The metric [B] from the sums [B, K] of the drawn units."""


def _sums_interval(units: Units, of_sums: OfSums, answers: Answers, seed: int) -> tuple[float, float]:
    """Units are drawn with replacement: equal ones together, as their counts are multinomial."""
    rows_UK = np.array(units(answers), dtype=np.float64)
    kinds_CK, counts_C = np.unique(rows_UK, axis=0, return_counts=True)
    drawn_BC = np.random.default_rng(seed).multinomial(len(rows_UK), counts_C / len(rows_UK), size=RESAMPLES)
    return _percentiles(of_sums(drawn_BC @ kinds_CK), LEVEL)


def mean_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Interval (low, high) of the mean of independent scores, each (value, low, high): the squared distances to the ends add
    up as variances do (Zou & Donner 2008, Construction of confidence limits about effect measures, Statistics in Medicine 27).
    """
    values, lows, highs = np.array(scores, dtype=np.float64).T
    below, above = (float(np.sqrt(((values - ends) ** 2).sum())) / len(values) for ends in (lows, highs))
    return float(values.mean()) - below, float(values.mean()) + above


def _percentiles(values_B: np.ndarray, level: float) -> tuple[float, float]:
    tail = 50 * (1 - level)
    low, high = np.percentile(values_B, [tail, 100 - tail])
    return float(low), float(high)


def _right(answers: Answers) -> list[list[float]]:
    return [[float(g == p), 1.0] for g, p in zip(answers.gold, answers.predicted, strict=True)]


def _positive_counts(answers: Answers) -> list[list[float]]:
    """(true positives, false positives, false negatives) of each row."""
    pairs = zip(answers.gold, _other_class(answers), strict=True)
    return [[float(g == p == 1), float(g != 1 and p == 1), float(g == 1 and p != 1)] for g, p in pairs]


def _positive_counts_of_groups(answers: Answers) -> list[list[float]]:
    counts = np.array(_positive_counts(answers))
    return [counts[rows].sum(axis=0).tolist() for rows in _groups(answers).values()]


def _counts_by_class(answers: Answers) -> list[list[float]]:
    """The three counts of each class after the other."""
    classes = _classes(answers)
    pairs = zip(answers.gold, answers.predicted, strict=True)
    return [[float(x) for c in classes for x in (g == p == c, g != c and p == c, g == c and p != c)] for g, p in pairs]


def _mean(sums_BK: np.ndarray) -> np.ndarray:
    return sums_BK[:, 0] / sums_BK[:, -1]


def _f1(sums_BK: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes, from their counts."""
    right_BC, wrong_BC, missed_BC = np.moveaxis(sums_BK.reshape(len(sums_BK), -1, 3), 2, 0)
    total_BC = 2 * right_BC + wrong_BC + missed_BC
    return np.divide(2 * right_BC, total_BC, out=np.zeros_like(total_BC), where=total_BC > 0).mean(axis=1)


def _by_sums(value: Callable[[Answers], float], units: Units, of_sums: OfSums = _mean) -> Metric:
    return Metric(value, partial(_sums_interval, units, of_sums))


def _of_section(section: str) -> Metric:
    return _by_sums(lambda a: accuracy(_section(section, a)), lambda a: _right(_section(section, a)))


SECTIONS = {"accuracy_matched": "matched", "accuracy_mismatched": "mismatched"}
"""Metrics of one section of the dev set (a group of rows), and its name."""

METRICS: dict[str, Metric] = {
    "mcc": Metric(
        lambda a: matthews_correlation(a.gold, a.predicted), lambda a, seed: mcc_interval(a.gold, a.predicted, seed)
    ),
    "accuracy": _by_sums(accuracy, _right),
    **{name: _of_section(section) for name, section in SECTIONS.items()},
    "f1": _by_sums(positive_f1, _positive_counts, _f1),
    "macro_f1": _by_sums(macro_f1, _counts_by_class, _f1),
    "pearson": Metric(pearson, partial(_correlation_interval, False)),
    "spearman": Metric(spearman, partial(_correlation_interval, True)),
    "f1a": _by_sums(positive_f1, _positive_counts_of_groups, _f1),
    "em": _by_sums(all_right, _all_right),
    "token_f1": _by_sums(token_f1, _queries),
    "exact_match": _by_sums(exact_match, lambda a: [[match, 1.0] for _, match, _ in _queries(a)]),
    "parity": _by_sums(gender_parity, _parities),
}
