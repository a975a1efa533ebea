"""Means and intervals over seeds."""

import math

import pytest
from scipy import stats

from fastppo.study import table


def result(task, method, seed, value, **more):
    spread = {"low": value - 0.1, "high": value + 0.1, "malformed": 0.25, "metric": "mcc"}
    return {"task": task, "method": method, "seed": seed, "value": value, **spread, **more}


def test_over_seeds_the_interval_is_students():
    one = table.cell([result("cola", "ppo", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))])
    assert one is not None and one.mean == pytest.approx(0.6) and one.values == (0.5, 0.6, 0.7)
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=0.1 / math.sqrt(3))
    assert (one.low, one.high) == pytest.approx((low, high))


@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5, 0.5)])
def test_of_one_value_the_interval_is_the_runs_own(values):
    one = table.cell([result("cola", "zero-shot", seed, value) for seed, value in enumerate(values)])
    assert one is not None and (one.mean, one.low, one.high) == (0.5, 0.4, 0.6)


def test_cells_are_found_by_method_and_task():
    results = [result("cola", "sft", 0, 0.5), result("cola", "ppo", 0, 0.25), result("rte", "ppo", 0, 0.125)]
    found = table.cells(results, ["cola", "rte"], ["sft", "ppo"])
    assert {method: {task: cell.mean for task, cell in row.items()} for method, row in found.items()} == {
        "sft": {"cola": 0.5}, "ppo": {"cola": 0.25, "rte": 0.125},
    }  # fmt: skip


def test_a_failed_cell_is_shown_and_does_not_count():
    results = [result("cola", "sft", 0, 0.5), {"task": "cola", "method": "sft", "seed": 1, "failed": "diverged"}]
    assert table.cell(results).values == (0.5,)
    assert table.shown(table.cell(results)) == "50.0 [40.0, 60.0] (1 of 2 seeds)"
    only = table.cells(results[1:], ["cola"], ["sft"])
    assert only["sft"]["cola"].failed == "diverged" and table.shown(only["sft"]["cola"]) == "failed"


def test_markdown():
    results = [result("cola", "sft", 0, 0.5), result("rte", "ppo", 0, -0.0004)]
    *lines, gap, unit = table.markdown(*table.table(results, ["cola", "rte"], ["sft", "ppo"])).splitlines()
    assert gap == "" and unit.startswith("Scores are x 100")
    assert lines == [
        "| method | cola (MCC) | rte (MCC) |",
        "| --- | ---: | ---: |",
        "| sft | 50.0 [40.0, 60.0] |  |",
        "| ppo |  | 0.0 [-10.0, 10.0] |",
    ]


def test_averages_are_the_leaderboards():
    bert = {
        "cola": {"mcc": 0.521}, "sst2": {"accuracy": 0.935}, "mrpc": {"f1": 0.889}, "stsb": {"spearman": 0.858},
        "qqp": {"f1": 0.712}, "mnli": {"accuracy_matched": 0.846, "accuracy_mismatched": 0.834}, "qnli": {"accuracy": 0.905},
        "rte": {"accuracy": 0.664},
    }  # fmt: skip
    results = [
        result(task, "encoder", seed, 0.0, scores={name: value + shift for name, value in scores.items()})
        for task, scores in bert.items()
        for seed, shift in enumerate((-0.01, 0.01))
    ]
    assert f"{100 * table.averages(results, 'encoder')['GLUE']:.1f}" == "79.6"
    headings, (row,) = table.table(results, list(bert), ["encoder"])
    assert (headings[-1], row[-1]) == ("GLUE average", "79.6")
    assert table.averages(results[2:], "encoder") == {"GLUE": None, "SuperGLUE": None}
