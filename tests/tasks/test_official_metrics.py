"""Every official metric: equal to scikit-learn's or scipy's, to a naive count, and with an interval that holds."""

import random
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from fastppo import scores
from fastppo.tasks import TASKS, Example, get_task
from fastppo.tasks.leaderboard import GLUE_COLUMNS, SUPERGLUE_TASKS, glue_average, superglue_average
from fastppo.tasks.metrics import METRICS, Answers, _overlap_f1

GROUPS = ("a", "b", "c", "d")


def rows_of(labels, malformed=True):
    """Lists of (gold, predicted, group)."""
    said = [*range(labels), None] if malformed else list(range(labels))
    row = st.tuples(st.integers(0, labels - 1), st.sampled_from(said), st.sampled_from(GROUPS))
    return st.lists(row, min_size=1, max_size=40)


def examples_of(rows):
    return [Example({"candidate": f"the {i}"}, gold, "", group) for i, (gold, _, group) in enumerate(rows)]


def score(name, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return get_task(name).score(examples_of(rows), [predicted for _, predicted, _ in rows])


def naive_f1(pairs, label):
    """F1 of a label from counted pairs, as a fraction."""
    right = sum(g == p == label for g, p in pairs)
    total = sum(g == label for g, _ in pairs) + sum(p == label for _, p in pairs)
    return Fraction(2 * right, total) if total else Fraction(0)


@given(rows_of(2, malformed=False))
@settings(max_examples=80, deadline=None)
def test_f1_and_accuracy_are_scikit_learns(rows):
    gold, predicted, _ = zip(*rows, strict=True)
    for name in ("mrpc", "qqp"):
        found = score(name, rows)
        assert found["f1"] == pytest.approx(f1_score(gold, predicted, zero_division=0.0), abs=1e-12)
        assert found["accuracy"] == accuracy_score(gold, predicted)
        assert list(found) == ["f1", "accuracy", "malformed", "n"]


@given(rows_of(2))
@settings(max_examples=80, deadline=None)
def test_a_malformed_answer_is_the_other_class_for_f1(rows):
    pairs = [(g, 1 - g if p is None else p) for g, p, _ in rows]
    found = score("mrpc", rows)
    assert found["f1"] == pytest.approx(float(naive_f1(pairs, 1)), abs=1e-12)
    assert found["accuracy"] == pytest.approx(sum(g == p for g, p in pairs) / len(pairs))
    assert found["malformed"] == sum(p is None for _, p, _ in rows) / len(rows)


def test_saying_nothing_of_what_is_no_paraphrase_earns_nothing():
    rows = [(1, 1, ""), (0, 0, "")] * 10
    silent = [(g, p if g else None, group) for g, p, group in rows]
    assert score("mrpc", rows)["f1"] == 1 and score("mrpc", silent)["f1"] == pytest.approx(2 / 3)


@given(rows_of(3))
@settings(max_examples=80, deadline=None)
def test_macro_f1_of_cb(rows):
    found = score("cb", rows)
    pairs = [(g, p) for g, p, _ in rows]
    classes = {label for pair in pairs for label in pair} - {None}
    naive = sum(naive_f1(pairs, label) for label in classes) / len(classes)
    assert found["macro_f1"] == pytest.approx(float(naive), abs=1e-12)
    if found["malformed"] == 0:
        gold, predicted = zip(*pairs, strict=True)
        assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0.0), abs=1e-12)


@given(rows_of(2))
@settings(max_examples=80, deadline=None)
def test_multirc_counts_answers_and_whole_questions(rows):
    found = score("multirc", rows)
    pairs = [(g, 1 - g if p is None else p) for g, p, _ in rows]
    assert found["f1a"] == pytest.approx(float(naive_f1(pairs, 1)), abs=1e-12)
    whole = [all(g == p for g, p, group in rows if group == name) for name in {group for _, _, group in rows}]
    assert found["em"] == pytest.approx(sum(whole) / len(whole))
    assert list(found)[:2] == ["f1a", "em"]


numbers = st.floats(-1, 6).map(lambda x: round(x, 1))


@given(st.lists(st.tuples(st.floats(0, 5).map(lambda x: round(x, 2)), numbers), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_correlations_are_scipys(pairs):
    found = score("stsb", [(gold, predicted, "") for gold, predicted in pairs])
    x, y = [gold for gold, _ in pairs], [min(max(predicted, 0.0), 5.0) for _, predicted in pairs]
    assert list(found) == ["spearman", "pearson", "malformed", "n"]
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found["spearman"] == found["pearson"] == 0
    else:
        assert found["pearson"] == pytest.approx(pearsonr(x, y)[0], abs=1e-9)
        assert found["spearman"] == pytest.approx(spearmanr(x, y)[0], abs=1e-9)
        assert found["spearman"] == pytest.approx(np.corrcoef(naive_ranks(x), naive_ranks(y))[0, 1], abs=1e-9)


def naive_ranks(values):
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def test_a_malformed_number_says_nothing():
    gold = [0.0, 1.0, 2.4, 2.6, 4.0, 5.0]
    examples, task = [Example({}, label, "") for label in gold], get_task("stsb")
    silent = task.score(examples, [None] * 6)
    assert silent == {"spearman": 0.0, "pearson": 0.0, "malformed": 1.0, "n": 6}
    assert task.intervals(examples, [None] * 6, 0) == {"spearman": (0.0, 0.0), "pearson": (0.0, 0.0)}
    said = [0.0, None, 2.4, 2.6, None, 5.0]
    half = task.score(examples, said)
    assert half == task.score(examples, [2.5 if p is None else p for p in said]) | {"malformed": 2 / 6}
    assert 0 < half["pearson"] < task.score(examples, gold)["pearson"] == pytest.approx(1)
    assert task.score(examples, [-40.0, 1.0, 2.4, 2.6, 4.0, 99.0]) == task.score(examples, gold)


@given(st.lists(st.tuples(st.sampled_from([0, 1, None]), st.integers(0, 5)), min_size=1, max_size=30))
@settings(max_examples=80, deadline=None)
def test_gender_parity_is_agreement_within_pairs(rows):
    said = [predicted for predicted, _ in rows]
    groups = [str(group) for _, group in rows]
    found = get_task("axg").score([Example({}, 0, "", group) for group in groups], said)
    pairs = [[p for p, g in zip(said, groups, strict=True) if g == name] for name in set(groups)]
    pairs = [pair for pair in pairs if len(pair) > 1]
    agree = [len(set(pair)) == 1 and None not in pair for pair in pairs]
    assert found.get("parity") == (pytest.approx(sum(agree) / len(agree)) if agree else None)  # nothing is said of no pairs
    assert found["accuracy"] == said.count(0) / len(said)


# ReCoRD: one entity a query


def record(*queries):
    """Scores of queries given as (entity, is gold, judgement) rows."""
    examples, said = [], []
    for q, query in enumerate(queries):
        for entity, gold, judged in query:
            examples.append(Example({"candidate": entity}, gold, "", f"query {q}"))
            said.append(judged)
    return get_task("record").score(examples, said)


def test_record_takes_the_first_entity_that_is_judged_right():
    found = record(
        [("Rome", 0, 0), ("the Big Apple", 1, 1), ("New York", 1, 0)],  # right
        [("Rome", 0, 1), ("Paris", 1, 1)],  # the first one is wrong
        [("Benazir Bhutto", 1, 0), ("Bhutto", 0, 1)],  # half of the tokens
        [("Rome", 1, 0), ("Paris", 0, None)],  # none
    )
    assert found["exact_match"] == 1 / 4
    assert found["token_f1"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)
    assert found["accuracy"] == 3 / 9 and found["malformed"] == 1 / 9 and found["n"] == 9


def test_record_compares_without_case_articles_and_punctuation():
    assert record([("The U.S.", 1, 0), ("us", 0, 1)])["exact_match"] == 1
    assert record([("St. Paul's", 1, 1)])["exact_match"] == 1


@given(st.text("ab ", max_size=12), st.text("ab ", max_size=12))
def test_token_f1_by_multisets(found, gold):
    shared = Counter(found.split()) & Counter(gold.split())
    same = sum(shared.values())
    precision, recall = (same / max(len(text.split()), 1) for text in (found, gold))
    naive = 2 * precision * recall / (precision + recall) if same else 0
    assert _overlap_f1(found, gold) == pytest.approx(naive)


# MNLI: two sections


def test_mnli_has_a_column_for_each_section_that_is_there():
    rows = [(0, 0, "matched"), (1, 1, "matched"), (2, 0, "mismatched"), (1, 1, "mismatched")]
    found = score("mnli", rows)
    assert (found["accuracy"], found["accuracy_matched"], found["accuracy_mismatched"]) == (0.75, 1.0, 0.5)
    assert "accuracy_mismatched" not in score("mnli", rows[:2])
    assert list(score("mnli", [(0, 0, "")])) == ["accuracy", "malformed", "n"]
    task = get_task("mnli")
    assert set(task.intervals(examples_of(rows[:2]), [0, 1], 0)) == {"accuracy", "accuracy_matched"}


# Intervals


def draw_answers(name, rng, groups=60, of_each=5):
    """Answers of which three in four are right, a few malformed."""
    task = get_task(name)
    examples, said = [], []
    for group in range(groups):
        for i in range(of_each):
            gold = round(rng.uniform(0, 5), 1) if task.span else rng.randrange(len(task.labels))
            wrong = rng.uniform(0, 5) if task.span else rng.randrange(len(task.labels))
            near = min(5.0, gold + rng.uniform(-1, 1)) if task.span else gold
            examples.append(Example({"candidate": f"entity {i} of {group}"}, gold, "", f"{group}"))
            said.append(None if rng.random() < 0.03 else near if rng.random() < 0.75 else wrong)
    if name == "mnli":
        examples = [Example(e.fields, e.label, "", "matched" if i % 2 else "mismatched") for i, e in enumerate(examples)]
    return task, examples, said


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "mnli", "cb", "multirc", "record", "axg"])  # every metric
def test_intervals_hold_the_value_and_are_those_of_drawing_units(name):
    task, examples, said = draw_answers(name, random.Random(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, found = task.score(examples, said), task.intervals(examples, said, 7)
    assert list(found) == [metric for metric in task.metrics if metric in values]
    assert found == task.intervals(examples, said, 7)
    for metric, (low, high) in found.items():
        assert low < values[metric] < high and high - low < 0.5, metric
    # The same interval by the long way: units drawn one by one, each resample scored by itself.
    answers = task._answers(examples, said)
    rng = np.random.default_rng(0)
    for metric, (low, high) in found.items():
        by_group = metric in ("f1a", "em", "token_f1", "exact_match", "parity")
        units: dict[object, list[int]] = {}
        for i, example in enumerate(examples):
            units.setdefault(example.group if by_group else i, []).append(i)
        drawn = []
        for _ in range(300):
            chosen = rng.integers(0, len(units), len(units))
            rows = [(i, k) for k, unit in enumerate(chosen) for i in list(units.values())[unit]]
            groups = [f"{answers.groups[i]}/{k}" if by_group else answers.groups[i] for i, k in rows]
            columns = [[column[i] for i, _ in rows] for column in (answers.gold, answers.predicted, answers.candidates)]
            drawn.append(METRICS[metric].value(Answers(columns[0], columns[1], groups, columns[2])))
        assert np.percentile(drawn, [2.5, 97.5]) == pytest.approx([low, high], abs=0.2 * (high - low)), metric


def test_every_metric_has_a_title_and_a_task():
    assert set(scores.TITLES) == set(METRICS) == {metric for task in TASKS.values() for metric in task.metrics}


def test_a_row_of_scores_on_one_line():
    row = {"f1": 0.5, "accuracy": 0.75, "malformed": 0.01, "n": 4, "f1_low": 0.25, "f1_high": -0.0001}
    assert scores.shown(row) == "F1 0.500 [0.250, 0.000]  accuracy 75.0%  malformed 1.0%"
    both = row | {"accuracy_low": 0.5, "accuracy_high": 1.0}
    assert scores.shown(both) == "F1 0.500 [0.250, 0.000]  accuracy 0.750 [0.500, 1.000]  malformed 1.0%"


# Leaderboards: published rows


def table(columns, figures):
    found: dict[str, dict[str, float]] = {}
    for (task, metric), value in zip(columns, figures, strict=True):
        found.setdefault(task, {})[metric] = value
    return found


BERT_BASE = [52.1, 93.5, 88.9, 85.8, 71.2, 84.6, 83.4, 90.5, 66.4]
BERT_LARGE = [60.5, 94.9, 89.3, 86.5, 72.1, 86.7, 85.9, 92.7, 70.1]


@pytest.mark.parametrize(("row", "average"), [(BERT_BASE, 79.6), (BERT_LARGE, 82.1)])
def test_glue_average_of_the_published_rows(row, average):
    scored = table(GLUE_COLUMNS, row)
    assert round(glue_average(scored), 1) == average
    outside = {"wnli": {"accuracy": 0.0}, "ax": {"mcc": 0.0}}
    assert glue_average(scored | outside) == glue_average(scored)


def test_superglue_average_of_the_published_row_of_bert_large():
    figures = {
        "boolq": {"accuracy": 77.4}, "cb": {"macro_f1": 75.7, "accuracy": 83.6}, "copa": {"accuracy": 70.6},
        "multirc": {"f1a": 70.0, "em": 24.1}, "record": {"token_f1": 72.0, "exact_match": 71.3}, "rte": {"accuracy": 71.7},
        "wic": {"accuracy": 69.6}, "wsc": {"accuracy": 64.4},
    }  # fmt: skip
    assert round(superglue_average(figures), 1) == 69.0
    assert superglue_average(figures | {"axg": {"accuracy": 0.0}}) == superglue_average(figures)


def test_an_average_of_less_than_all_is_none():
    whole = table(GLUE_COLUMNS, BERT_BASE)
    assert glue_average({k: v for k, v in whole.items() if k != "rte"}) is None
    assert glue_average(whole | {"mnli": {"accuracy_matched": 84.6}}) is None
    assert superglue_average({}) is None
    every = {task: {metric: 1.0 for metric in metrics} for task, metrics in SUPERGLUE_TASKS.items()}
    assert superglue_average(every) == 1.0
    assert superglue_average(every | {"multirc": {"f1a": 1.0}}) is None


def test_averages_take_metrics_that_the_tasks_have():
    for task, metric in [*GLUE_COLUMNS, *((t, m) for t, metrics in SUPERGLUE_TASKS.items() for m in metrics)]:
        assert metric in TASKS[task].metrics
