"""Classification metrics in which a malformed answer is a predicted class of its own, always wrong."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

MALFORMED = -1
"""Class id of an answer that the parser refused; no gold label has it."""


def score(gold: Sequence[int], predicted: Sequence[int | None]) -> dict[str, float]:
    """``mcc`` (in [-1, 1]), ``accuracy`` and ``malformed`` (fractions) and ``n`` (rows) of parsed answers.

    ``predicted`` holds label ids, None for a malformed answer. Raises ValueError on no rows or unequal lengths.
    """
    classes = _classes(gold, predicted)
    from sklearn.metrics import accuracy_score  # a second to import: not for commands that score nothing

    return {
        "mcc": matthews_correlation(gold, predicted),
        "accuracy": float(accuracy_score(gold, classes)),
        "malformed": classes.count(MALFORMED) / len(classes),
        "n": len(classes),
    }


def matthews_correlation(gold: Sequence[int], predicted: Sequence[int | None]) -> float:
    """Matthews correlation, for any number of classes Gorodkin's R_K (Comput. Biol. Chem. 28, 2004, eq. 8).

    Malformed answers are one more predicted class. 0 where it is undefined (one class only in gold or in predicted).
    """
    classes = _classes(gold, predicted)
    if len(set(gold)) < 2 or len(set(classes)) < 2:
        return 0.0  # what scikit-learn returns too, but with a warning for a single label
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, classes))


def mcc_interval(
    gold: Sequence[int], predicted: Sequence[int | None], seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap percentile interval (low, high) of the Matthews correlation over rows drawn with replacement.

    A resample matters only through its confusion matrix, whose cells are multinomial with the observed frequencies, so
    the resamples are drawn as matrices: the same distribution as drawing rows (Efron and Tibshirani, "An Introduction
    to the Bootstrap", 1993, section 13.3: the percentile interval).
    """
    classes = _classes(gold, predicted)
    cells = sorted(Counter(zip(gold, classes, strict=True)).items())
    counts_C = np.array([count for _, count in cells])
    drawn_BC = np.random.default_rng(seed).multinomial(len(classes), counts_C / len(classes), size=resamples)
    mcc_B = _gorodkin([cell for cell, _ in cells], drawn_BC.astype(np.float64))
    tail = 50 * (1 - level)
    low, high = np.percentile(mcc_B, [tail, 100 - tail])
    return float(low), float(high)


def _gorodkin(cells: list[tuple[int, int]], counts_BC: np.ndarray) -> np.ndarray:
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


def _classes(gold: Sequence[int], predicted: Sequence[int | None]) -> list[int]:
    if not len(gold) or len(gold) != len(predicted):
        raise ValueError(
            f"{len(gold)} gold labels and {len(predicted)} predictions: need as many of each, at least one"
        )
    return [MALFORMED if label is None else label for label in predicted]
