"""Whole studies in miniature: every method, going on after a kill, and what a failure leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
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
    assert table[0] == "| method | cola (MCC) |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| zero-shot", "| few-shot", "| sft", "| ppo"]
    results = json.loads((whole / "study.json").read_text())["results"]
    assert len(results) == 8 and all(r["n"] == 20 and r["low"] <= r["value"] <= r["high"] for r in results)
    labels = {r["method"]: r["labels"] for r in results}
    assert labels["zero-shot"] == 0 and labels["few-shot"] == 2 and labels["sft"] == 54
    assert all(("start" in r) == (r["method"] == "ppo") for r in results)


def test_the_page_has_the_table_and_the_curves(whole):
    page = (whole / "report.html").read_text()
    assert "not finished" not in page and "<script" not in page
    for text in ("Scores", "Curves: cola, ppo", "seed 1", "zero-shot", "few-shot", "8 cells", "ppo.iterations"):
        assert text in page


def test_finished_cells_are_not_run_again(whole, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in whole.glob("cells/**/result.json")}
    before = (whole / "table.md").read_text()
    assert len(stamps) == 8
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
    assert len(values(out)) < 8 and "not finished" in (out / "report.html").read_text()
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
        (["study", "--tasks", "cola,rte", "--data", "/nowhere"], "no such file or folder"),
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
