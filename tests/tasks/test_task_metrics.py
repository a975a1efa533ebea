import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, matthews_corrcoef

from fastppo.tasks import Example
from fastppo.tasks import metrics as scoring
from fastppo.tasks.cola import COLA
from fastppo.tasks.metrics import MALFORMED, _gorodkin, matthews_correlation

pairs = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, None])), min_size=1, max_size=40)


def split(rows):
    return [gold for gold, _ in rows], [predicted for _, predicted in rows]


def examples_of(gold):
    return [Example({}, label, "") for label in gold]


def score(gold, predicted):
    return COLA.score(examples_of(gold), predicted)


def mcc_interval(gold, predicted, seed):
    return COLA.intervals(examples_of(gold), predicted, seed)["mcc"]


def reference_mcc(gold, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where one label is all there is
        return matthews_corrcoef(gold, [-1 if p is None else p for p in predicted])


@given(pairs)
@settings(max_examples=150, deadline=None)
def test_scores_are_scikit_learns_with_malformed_as_a_class(rows):
    gold, predicted = split(rows)
    result = score(gold, predicted)
    assert list(result) == ["mcc", "accuracy", "malformed", "n"]
    assert result["mcc"] == pytest.approx(reference_mcc(gold, predicted), abs=1e-12)
    assert result["accuracy"] == accuracy_score(gold, [-1 if p is None else p for p in predicted])
    assert result["malformed"] == predicted.count(None) / len(rows)
    assert result["n"] == len(rows)


@given(pairs)
@settings(max_examples=150, deadline=None)
def test_mcc_of_resamples_is_scikit_learns(rows):
    gold, predicted = split(rows)
    cells = sorted({(g, -1 if p is None else p) for g, p in rows})
    counts = np.array([[float(sum((g, -1 if p is None else p) == cell for g, p in rows)) for cell in cells]] * 2)
    assert _gorodkin(cells, counts) == pytest.approx([reference_mcc(gold, predicted)] * 2, abs=1e-12)


@given(pairs, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_intervals_are_ordered_bounded_and_never_warn(rows, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = mcc_interval(*split(rows), seed=seed)
        score(*split(rows))
    assert -1 - 1e-12 <= low <= high <= 1 + 1e-12


def test_worked_numbers():
    # TP 3, FN 1, FP 1, TN 3: (3*3 - 1*1) / sqrt(4*4*4*4)
    assert matthews_correlation([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]) == pytest.approx(0.5)
    assert matthews_correlation([0, 1, 0, 1], [0, 1, 0, 1]) == pytest.approx(1)
    assert matthews_correlation([0, 1, 0, 1], [1, 0, 1, 0]) == pytest.approx(-1)


def test_malformed_answers_are_wrong():
    gold = [0, 1] * 20
    assert score(gold, [None] * 40) == {"mcc": 0.0, "accuracy": 0.0, "malformed": 1.0, "n": 40}
    broken = [None if i < 10 else label for i, label in enumerate(gold)]
    result = score(gold, broken)
    assert (result["accuracy"], result["malformed"]) == (0.75, 0.25)
    assert 0 < result["mcc"] < score(gold, gold)["mcc"]


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [([1], [1]), ([1], [0]), ([0], [None]), ([1, 1, 1], [1, 1, 1]), ([1, 1], [0, 1]), ([0, 1], [1, 1])],
)
def test_one_class_scores_zero_quietly(gold, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(gold, predicted)["mcc"] == 0
        assert mcc_interval(gold, predicted, seed=0) == (0, 0)


@pytest.mark.parametrize(("gold", "predicted"), [([], []), ([1], []), ([0, 1], [0])])
def test_nothing_to_score_is_an_error(gold, predicted):
    with pytest.raises(ValueError, match=f"{len(gold)} gold labels and {len(predicted)} predictions"):
        score(gold, predicted)
    with pytest.raises(ValueError, match="at least one"):
        mcc_interval(gold, predicted, seed=0)


def noisy(rng, n, flip=0.2, malformed=0.05):
    gold = (rng.random(n) < 0.69).astype(int)
    predicted = np.where(rng.random(n) < flip, 1 - gold, gold)
    lost = rng.random(n) < malformed
    return gold.tolist(), [None if gone else int(p) for p, gone in zip(predicted, lost, strict=True)]


def test_interval_depends_on_the_seed_alone():
    gold, predicted = noisy(np.random.default_rng(0), 1043)
    first = mcc_interval(gold, predicted, seed=3)
    assert first == mcc_interval(gold, predicted, seed=3)
    assert first != mcc_interval(gold, predicted, seed=4)
    assert first == scoring.mcc_interval(gold, [MALFORMED if p is None else p for p in predicted], 3)
    order = np.random.default_rng(1).permutation(1043)
    assert first == mcc_interval([gold[i] for i in order], [predicted[i] for i in order], seed=3)
    assert first[0] < score(gold, predicted)["mcc"] < first[1]


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    truth = score(*noisy(rng, 400_000))["mcc"]
    hits = sum(low <= truth <= high for low, high in (mcc_interval(*noisy(rng, 400), seed=seed) for seed in range(400)))
    assert 0.92 <= hits / 400 <= 0.98


def test_interval_is_that_of_drawing_rows():
    rng = np.random.default_rng(0)
    gold, predicted = noisy(rng, 300)
    pairs_N = [(g, -1 if p is None else p) for g, p in zip(gold, predicted, strict=True)]
    cells = sorted(set(pairs_N))
    cell_N = np.array([cells.index(pair) for pair in pairs_N])
    drawn_BN = cell_N[rng.integers(0, 300, size=(20_000, 300))]
    counts_BC = np.stack([(drawn_BN == cell).sum(axis=1) for cell in range(len(cells))], axis=1).astype(float)
    by_rows = np.percentile(_gorodkin(cells, counts_BC), [2.5, 97.5])
    classes = [MALFORMED if p is None else p for p in predicted]
    assert scoring.mcc_interval(gold, classes, seed=0, resamples=20_000) == pytest.approx(by_rows, abs=0.003)
    assert mcc_interval(gold, predicted, seed=0) == pytest.approx(by_rows, abs=0.02)


def test_counts_of_millions_do_not_overflow():
    low, high = mcc_interval([0, 1] * 1_000_000, [0, 1, 1, 0, 0, 1, 0, 1] * 250_000, seed=0)
    assert 0.49 < low < 0.5 < high < 0.51
