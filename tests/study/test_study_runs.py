"""Whole studies in miniature: every method, going on after a kill, and what a failure leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from pages import Page, assert_inert
from small import REPO, World
from tiny import save_tiny_model

from fastppo import cli

SETTINGS = [
    "--lora-rank", "4", "--lora-alpha", "8", "--sft-epochs", "1", "--sft-batch-size", "8", "--sft-examples", "16",
    "--ppo-iterations", "2", "--ppo-prompts", "8", "--ppo-samples", "2", "--sample-max-new-tokens", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    world = World.make(folder)
    (folder / "all").mkdir()
    world.data.rename(folder / "all" / "cola")
    return folder


def arguments(place, out, *more):
    model, data = str(place / "model"), str(place / "all")
    return ["study", "--tasks", "cola", "--model", model, "--data", data, "--out", str(out), *SETTINGS, *more]


def values(out):
    results = json.loads((out / "study.json").read_text())["results"]
    return {(r["task"], r["method"], r["seed"]): r["value"] for r in results}


@pytest.fixture(scope="module")
def whole(place):
    out = place / "whole"
    methods = ["--methods", "zero-shot,few-shot,sft,ppo", "--seeds", "0,1", "--shots", "2"]
    assert cli.main(arguments(place, out, *methods)) == 0
    return out


def test_every_method_has_a_row(whole):
    table = (whole / "table.md").read_text().splitlines()
    assert table[0] == "| method | cola (MCC) |" and table[-1].startswith("Scores are x 100")
    assert [line.split(" | ")[0] for line in table[2:-2]] == ["| zero-shot", "| few-shot", "| sft", "| ppo"]
    results = json.loads((whole / "study.json").read_text())["results"]
    assert len(results) == 7 and all(r["n"] == 20 and r["low"] <= r["value"] <= r["high"] for r in results)
    labels = {r["method"]: r["labels"] for r in results}
    assert labels["zero-shot"] == 0 and labels["few-shot"] == 2 and labels["sft"] == 54
    assert all(("start" in r) == (r["method"] == "ppo") for r in results)
    assert [r["seed"] for r in results if r["method"] == "zero-shot"] == [0]  # which no seed changes


def test_the_page_has_the_table_and_the_curves(whole):
    page = (whole / "report.html").read_text()
    assert "not finished" not in page and "<script" not in page
    for text in ("Scores", "Curves: ppo", "Confusion matrix, seed 0", "its page", "ppo.iterations"):
        assert text in page
    seen = Page(page)
    assert_inert(seen)
    links = [attributes["href"] for tag, attributes in seen.elements if tag == "a" and attributes["href"][0] != "#"]
    assert len(links) == 4 and all((whole / link).is_file() for link in links)
    charts, once = seen.charts(), ("Reward", "Accuracy", "KL to the reference", "Entropy", "Value error", "Clip fraction")
    for title in (*once, "Malformed answers", "Reward of acceptable"):
        assert charts[title] == [2, 2], title  # a curve a seed
    assert charts["MCC, held out"] == [1, 1] and charts["Loss"] == [7, 7, 2, 2]  # of sft, and of ppo's start


def test_a_hint_comes_once_and_only_for_the_built_in_model(place, whole, capsys):
    assert cli.main(["study", "--resume", str(whole)]) == 0
    assert "built-in" not in capsys.readouterr().out


def test_report_writes_the_page_again(whole, tmp_path, capsys):
    before = (whole / "report.html").read_text()
    (whole / "report.html").unlink()
    assert cli.main(["report", str(whole)]) == 0
    assert capsys.readouterr().out == f"wrote {whole / 'report.html'}\n" and (whole / "report.html").read_text() == before
    assert cli.main(["report", str(whole), "--to", str(tmp_path / "a.html")]) == 0
    links = [a["href"] for tag, a in Page((tmp_path / "a.html").read_text()).elements if tag == "a" and a["href"][0] != "#"]
    assert len(links) == 4 and all((tmp_path / link).resolve().is_file() for link in links)


def test_a_damaged_result_is_said_and_its_cell_run_again(whole, tmp_path, capsys):
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    before = values(out)
    damaged = out / "cells" / "cola" / "zero-shot" / "seed-0" / "result.json"
    for content in ("", "{}", json.dumps(json.loads(damaged.read_text()) | {"value": None})):
        damaged.write_text(content)
        assert cli.main(["report", str(out)]) == 0
        said = "cells/cola/zero-shot/seed-0/result.json is damaged: the cell counts as not finished."
        assert said in capsys.readouterr().out and said in Page((out / "report.html").read_text()).text
        assert cli.main(["study", "--resume", str(out)]) == 0
        assert f"{said} It is run again." in capsys.readouterr().out and values(out) == before
        assert "damaged" not in (out / "report.html").read_text()


def test_damaged_curves_are_said_and_the_rest_shown(whole, tmp_path, capsys):
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    with (out / "cells" / "cola" / "ppo" / "seed-1" / "metrics.jsonl").open("a") as file:
        file.write("garbage\n")
    assert cli.main(["report", str(out)]) == 0
    said = "cola, ppo, seed 1: metrics.jsonl is damaged: line 5 is left out."
    page = Page((out / "report.html").read_text())
    assert said in capsys.readouterr().out and said in page.text and page.charts()["Reward"] == [2, 2]


def test_all_tasks_without_data_are_named_before_the_first_cell(place, tmp_path, capsys):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "cola").symlink_to(place / "all" / "cola")
    (tmp_path / "all" / "mrpc").mkdir()
    words = arguments(place, tmp_path / "out")
    words[words.index("--tasks") + 1], words[words.index("--data") + 1] = "cola,rte,mrpc,sst2", str(tmp_path / "all")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert f"--data: {tmp_path / 'all'} has no rte, sst2; expected a folder or file for each task, named like it; " in err
    assert f"{tmp_path / 'all' / 'mrpc'}: no train split" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_commands_for_a_run_name_those_for_a_study(place, whole, capsys):
    run = whole / "cells" / "cola" / "sft" / "seed-0"
    for words in (["train", "--resume"], ["eval"]):
        assert cli.main([*words, str(whole)]) == 2
        err = capsys.readouterr().err
        assert f"run folder {whole}: is a study" in err and f"go on with it: fastppo study --resume {whole}\n" in err
    assert cli.main(["study", "--resume", str(run)]) == 2
    assert f"study folder {run}: is a run; go on with it: fastppo train --resume {run}\n" in capsys.readouterr().err


def test_finished_cells_are_not_run_again(whole, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in whole.glob("cells/**/result.json")}
    before = (whole / "table.md").read_text()
    assert len(stamps) == 7
    assert cli.main(["study", "--resume", str(whole)]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and (whole / "table.md").read_text() == before
    assert "cell " not in capsys.readouterr().out


def test_killed_anywhere_and_resumed_it_gives_the_same_table(place, whole):
    out = place / "killed"
    methods = ["--methods", "zero-shot,few-shot,sft,ppo", "--seeds", "0,1", "--shots", "2"]
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastppo", *arguments(place, out, *methods)], env=environment, stdout=subprocess.DEVNULL
    )
    while not list(out.glob("cells/cola/sft/seed-0/checkpoints/*")):  # in the middle of a cell that trains
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(values(out)) < 7 and "not finished" in (out / "report.html").read_text()
    assert cli.main(["study", "--resume", str(out)]) == 0
    assert values(out) == values(whole)
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_a_failed_cell_does_not_stop_the_others_and_is_tried_again(place, monkeypatch, capsys):
    from fastppo import trainer
    from fastppo.errors import UserError

    def fail(*_):
        raise UserError("training has diverged")

    out = place / "failed"
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train", fail)
        assert cli.main(arguments(place, out, "--methods", "sft,zero-shot")) == 1
    assert "failed: training has diverged" in capsys.readouterr().out
    assert "| sft | failed |" in (out / "table.md").read_text()
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0  # it knows what failed
    said = "cola, sft, seed 0 failed: training has diverged"
    assert said in capsys.readouterr().out and said in (out / "report.html").read_text()
    done = [path.parent.parent.name for path in out.glob("cells/cola/*/seed-0/result.json")]
    assert done == ["zero-shot"]
    assert cli.main(["study", "--resume", str(out)]) == 0
    assert "failed" not in (out / "table.md").read_text()


def test_demonstrations_come_from_what_is_trained_on(place, capsys):
    out = place / "shots"
    flags = ["--methods", "few-shot", "--demonstrations", "first", "--train-examples", "3", "--shots"]
    assert cli.main(arguments(place, out, *flags, "4")) == 1
    assert "failed: --shots: 4 is not allowed; the train split has 3 examples" in capsys.readouterr().out
    assert cli.main(arguments(place, place / "fewer", *flags, "3")) == 0


def test_an_encoder(place):
    from transformers import BertConfig, BertForSequenceClassification

    folder = place / "encoder"
    save_tiny_model("llama", folder)  # for its tokenizer
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    out = place / "with-encoder"
    flags = ["--methods", "encoder", "--encoder", str(folder), "--encoder-epochs", "30", "--encoder-lr", "5e-3"]
    assert cli.main(arguments(place, out, *flags)) == 0
    (result,) = json.loads((out / "study.json").read_text())["results"]
    assert result["scores"]["accuracy"] == 1.0 and result["malformed"] == 0.0  # what ends in "no" is unacceptable


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study"], "--tasks: is missing"),
        (["study", "--tasks", "cola,rte", "--data", "/nowhere"], "--data: /nowhere: no such folder"),
        (["study", "--resume", "/nowhere"], "study folder /nowhere: no such folder"),
        (["study", "--resume", "/nowhere", "--seeds", "1"], "--seeds: is not allowed with --resume"),
        (["study", "--tasks", "cola", "--seed", "1"], "unknown flag --seed; did you mean --seeds"),
        (["study", "--tasks", "cola", "--methods", "encoder", "--encoder", "/nowhere"], "'/nowhere' cannot be loaded"),
        (["study", "--tasks", "axg"], "sft needs a train split, which axg lacks; train on"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) in (1, 2)
    out = capsys.readouterr()
    assert said in out.err + out.out and "Traceback" not in out.err


def test_each_method_asks_its_own_base(place, monkeypatch):
    """Methods that train nothing share a base, but not another one's."""
    from fastppo.study import run

    other, loaded = str(place / "other"), []
    save_tiny_model("qwen2", place / "other")
    load_base = run.load_base
    monkeypatch.setattr(run, "load_base", lambda config: loaded.append(config.model) or load_base(config))
    file = place / "bases.yaml"
    file.write_text(f"methods: {{zero-shot: , again: {{kind: zero-shot}}, other: {{kind: zero-shot, model: {other}}}}}\n")
    assert cli.main(arguments(place, place / "bases", "--config", str(file))) == 0
    assert loaded == [str(place / "model"), other]
