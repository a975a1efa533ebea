"""Studies with methods that are one policy for all tasks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from urllib.parse import unquote

import pytest
from pages import Page, assert_inert
from small import REPO, World
from test_study_runs import SETTINGS, values
from test_task_runs import write

from fastppo import cli
from fastppo.config import LARGEST_INT
from fastppo.study import command, table
from fastppo.study.spec import Study

METHODS = "zero-shot,sft-multi,ppo-multi"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    world = World.make(folder)
    (folder / "all").mkdir()
    world.data.rename(folder / "all" / "cola")
    write(folder / "all" / "rte", "rte", (20, 8))
    return folder


def arguments(place, out, *more, tasks="cola,rte", methods=METHODS):
    model, data = str(place / "model"), str(place / "all")
    start = ["study", "--tasks", tasks, "--methods", methods, "--model", model, "--data", data, "--out", str(out)]
    return [*start, *SETTINGS, *more]


@pytest.fixture(scope="module")
def whole(place):
    out = place / "whole"
    assert cli.main(arguments(place, out, "--seeds", "0,1")) == 0
    return out


def results_of(out):
    return json.loads((out / "study.json").read_text())["results"]


def test_one_run_a_seed_fills_the_column_of_every_task(whole):
    lines = (whole / "table.md").read_text().splitlines()
    assert lines[0] == "| method | cola (MCC) | rte (accuracy) |"
    assert [line.split(" | ")[0] for line in lines[2:-2]] == ["| zero-shot", "| sft-multi", "| ppo-multi"]
    assert all(line.count("[") == 2 for line in lines[2:-2])
    results = results_of(whole)
    assert {(r["method"], r["task"], r["seed"], r["n"]) for r in results} == {
        (method, task, seed, n)
        for method in METHODS.split(",")
        for task, n in (("cola", 20), ("rte", 8))
        for seed in ((0,) if method == "zero-shot" else (0, 1))
    }
    trained = sorted(path.parent.relative_to(whole / "cells") for path in whole.glob("cells/**/summary.json"))
    assert list(map(str, trained)) == [f"cola,rte/{kind}-multi/seed-{seed}" for kind in ("ppo", "sft") for seed in (0, 1)]
    for r in results:
        if r["method"] != "zero-shot":
            run = json.loads((whole / "cells" / "cola,rte" / r["method"] / f"seed-{r['seed']}" / "summary.json").read_text())
            stages = list(run["stages"].values())
            assert r["value"] == stages[-1]["tasks"][r["task"]][r["metric"]] and r["labels"] == stages[-1]["labels"]
            assert ("start" in r) == (r["method"] == "ppo-multi")
            if "start" in r:
                assert r["start"]["value"] == run["stages"]["sft"]["tasks"][r["task"]][r["metric"]]
    # All of 54 and 18 that are not held out; the smaller one three times in a pass.
    assert {r["labels"] for r in results if r["method"] == "sft-multi"} == {54 + 18}


def test_the_page_has_what_a_run_found_of_each_task(whole):
    html = (whole / "report.html").read_text()
    page = Page(html)
    assert_inert(page)
    assert "not finished" not in html and "damaged" not in html
    charts = page.charts()
    # A curve a seed: of cola, of rte, then of what is of no single task.
    assert charts["Reward"] == charts["Malformed answers"] == [2, 2] * 3 and charts["Accuracy"] == [2, 2] * 2
    assert charts["MCC, held out"] == charts["accuracy, held out"] == charts["Score, held out"] == [1, 1]
    assert charts["KL to the reference"] == charts["Entropy"] == [2, 2]
    assert charts["Loss"] == [steps_of(whole, "sft-multi")] * 2 + [steps_of(whole, "ppo-multi")] * 2
    for task, label in (("cola", "acceptable"), ("rte", "entailment")):
        part = html[html.index(f">{task}</h2>") :]
        part = part[: part.index("</section>")]
        assert f"Reward of {label}" in part and "KL to the reference" not in part
        assert "Confusion matrix, seed 0" in part and all(f">{name}<" in part for name in METHODS.split(","))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a" and attributes["href"][0] != "#"]
    assert len(links) == 8 and len(set(links)) == 4  # a run stands in the row of both tasks
    assert all((whole / unquote(link)).is_file() and "cola%2Crte" in link for link in links)
    assert page.text.count("zero-shot any ") == 2 and "Labels and seconds of one policy for all tasks" in page.text
    assert "of the runs that train" in page.text


def steps_of(out, method):
    rows = (out / "cells" / "cola,rte" / method / "seed-0" / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(row)["stage"] == "SFT" for row in rows)


def test_damage_of_a_run_is_said_once(whole, tmp_path, capsys):
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    run = out / "cells" / "cola,rte" / "ppo-multi" / "seed-0"
    for name in ("metrics.jsonl", "answers/ppo.jsonl"):
        rows = (run / name).read_text()
        (run / name).write_text(f"garbage\n{rows}")
    before = values(out)
    result = json.loads((run / "result.json").read_text())
    del result["results"][1]["value"]
    (run / "result.json").write_text(json.dumps(result))
    assert cli.main(["report", str(out)]) == 0
    said, page = capsys.readouterr().out, (out / "report.html").read_text()
    for note in ("cola + rte, ppo-multi, seed 0: metrics.jsonl is damaged: line 1 is left out.",
                 "cola + rte, ppo-multi, seed 0: answers/ppo.jsonl is damaged: line 1 is left out.",
                 "cells/cola,rte/ppo-multi/seed-0/result.json is damaged: the cell counts as not finished.",
                 "8 of 10 cells are finished"):  # fmt: skip
        assert said.count(note) == page.count(note) == 1, note
    assert cli.main(["study", "--resume", str(out)]) == 0
    assert values(out) == before


def test_the_page_does_not_need_the_data(place, whole, tmp_path, capsys):
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    text = (out / "study.yaml").read_text()
    (out / "study.yaml").write_text(text.replace(str(place / "all"), "/nowhere"))
    assert cli.main(["report", str(out)]) == 0
    assert cli.main(["study", "--resume", str(out)]) == 0  # nothing is left to do
    (out / "cells" / "cola,rte" / "ppo-multi" / "seed-0" / "result.json").unlink()
    assert cli.main(["study", "--resume", str(out)]) == 2
    assert capsys.readouterr().err == (
        "fastppo: error: --data: /nowhere: no such folder; expected a folder or file for each task, named like it\n"
    )


def test_finished_runs_are_not_repeated(whole, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in whole.glob("cells/**/*.json")}
    assert cli.main(["study", "--resume", str(whole)]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "cell " not in capsys.readouterr().out


def test_killed_within_a_run_and_resumed_it_gives_the_same_table(place, whole):
    out = place / "killed"
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'kernels'}"}
    argv = [sys.executable, "-m", "fastppo", *arguments(place, out, "--seeds", "0,1")]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    while not list(out.glob("cells/cola,rte/sft-multi/seed-1/checkpoints/*")):
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(values(out)) == 4 and "4 of 10 cells are finished" in (out / "report.html").read_text()
    assert cli.main(["study", "--resume", str(out)]) == 0
    assert values(out) == values(whole)
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_a_run_that_fails_fails_for_all_tasks_in_one_line(place, monkeypatch):
    from fastppo import trainer
    from fastppo.errors import UserError

    def fail(*_):
        raise UserError("training has diverged")

    out = place / "failed"
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train", fail)
        assert cli.main(arguments(place, out, methods="sft-multi")) == 1
    assert "| sft-multi | failed | failed |" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert page.count("training has diverged") == 1 and "cola + rte, sft-multi, seed 0 failed: " in page
    assert cli.main(["study", "--resume", str(out)]) == 0
    assert "failed" not in (out / "table.md").read_text()


def test_settings_of_the_run(place):
    text = (
        "tasks: {cola: {ppo.lr: 2e-3}, rte: }\n"
        "methods: {sft-multi: , all: {kind: ppo-multi, sft.examples: 0}}\n"
        "settings: {ppo: {iterations: 5}}\n"
    )
    path = place / "study.yaml"
    path.write_text(text)
    study = command.study_of({}, {"data": str(place / "all")}, path)
    cells = list(study.places())
    assert [(cell.task, cell.method.name) for cell in cells] == [("cola,rte", "sft-multi"), ("cola,rte", "all")]
    supervised, reinforced = (study.config(cell.task, cell.method, 0) for cell in cells)
    assert (supervised.sft.examples, supervised.ppo.iterations) == (LARGEST_INT, 0)
    assert (reinforced.sft.examples, reinforced.ppo.iterations) == (0, 5)
    assert reinforced.task == "cola,rte" and reinforced.data == str(place / "all")
    assert reinforced.ppo.lr == study.config("rte", cells[1].method, 0).ppo.lr != 2e-3  # what is of one task is not of all


def test_of_a_single_task_it_is_a_run_of_that_task(place):
    out = place / "single"
    assert cli.main(arguments(place, out, tasks="rte", methods="sft,sft-multi")) == 0
    sft, multi = results_of(out)
    same = {"value", "low", "high", "labels", "scores"}
    assert {key: sft[key] for key in same} == {key: multi[key] for key in same}


def test_averages_are_of_these_rows_too():
    scores = {"cola": "mcc", "sst2": "accuracy", "mrpc": "f1", "stsb": "spearman", "qqp": "f1", "qnli": "accuracy",
              "rte": "accuracy"}  # fmt: skip
    results = [{"task": task, "method": "ppo-multi", "scores": {metric: 0.5}} for task, metric in scores.items()]
    results.append({"task": "mnli", "method": "ppo-multi", "scores": {"accuracy_matched": 0.9, "accuracy_mismatched": 0.6}})
    assert table.averages(results, "ppo-multi")["GLUE"] == pytest.approx((7 * 0.5 + 1.5) / 9)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "cola,axg"], "sft-multi needs a train split, which axg lacks; train on rte"),
        (["--tasks", "cola,mrpc"], "all has no mrpc; expected a folder or file for each task, named like it"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, capsys, more, said):
    assert cli.main([*arguments(place, tmp_path / "out", methods="sft-multi"), *more]) == 2
    out = capsys.readouterr()
    assert said in out.err and out.err.count("\n") == 1


def test_a_study_is_saved_with_its_methods(place, whole):
    study = command.spec.read(whole / "study.yaml")
    assert [method.kind for method in Study(**study).methods] == METHODS.split(",")
