"""``report.html`` of a study, on a made-up folder: nothing that others wrote comes alive in it, and damage is told."""

import dataclasses
import json

import pytest
from pages import HOSTILE, Page, assert_inert

from fastppo.study import run, spec
from fastppo.study.spec import Method, Study

STUDY = Study(
    {"cola": {}, "stsb": {}}, (Method("zero-shot", "zero-shot"), Method("sft", "sft"), Method("ppo", "ppo")), seeds=(0, 1)
)
NUMBERS = dict.fromkeys(("reward", "valid_mcc", "accuracy", "kl", "entropy", "value_loss", "clip_fraction", "malformed"), 0.5)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_study(out, text="plain", study=STUDY):
    """Everything finished but the last cell, which failed. ``text`` is in everything that others wrote."""
    spec.save(study, out / "study.yaml")
    *places, last = study.places()
    for i, place in enumerate(places):
        folder, metric = place.folder(out), "mcc" if place.task == "cola" else "spearman"
        folder.mkdir(parents=True)
        score = {"metric": metric, "value": 0.5 + i / 100, "low": 0.25, "high": 0.75, "malformed": 0.5, "n": 10}
        result = score | {"labels": 100, "seconds": 5.0, "scores": {metric: 0.5}, text: text}
        (folder / "result.json").write_text(json.dumps(run.named(place.keys[0]) | result))
        label, said = (1, 0) if place.task == "cola" else (2.5, 3.0)
        row = {"fields": {"sentence": text, text[:9]: "x"}, "label": label, "answer": text, "predicted": said}
        stage = place.method.kind.replace("-", "_")
        write_lines(folder / "answers" / f"{stage}.jsonl", [row | {"origin": f"dev:{n}"} for n in range(3)])
        if place.method.kind != "zero-shot":
            setup = {"device": "cpu", "device_name": text, "dtype": text, "versions": {"torch": text, text: "1"}}
            (folder / "setup.json").write_text(json.dumps(setup))
            (folder / "report.html").touch()
            rows = [{"stage": "SFT", "step": n, "loss": 1 / n} for n in (1, 2, 3)]
            if place.method.kind == "ppo":
                rows += [{"stage": "PPO", "step": n, f"reward_class_{text}": 1.0, **NUMBERS} for n in (1, 2)]
            write_lines(folder / "metrics.jsonl", rows)
    (out / "study.json").write_text(json.dumps({"results": [run.named(last.keys[0]) | {"failed": f"diverged {text}"}]}))


def page_of(out, study=STUDY):
    html, notes = run.page(study, out, out / "report.html")
    return Page(html), notes


def test_what_is_on_the_page(tmp_path):
    make_study(tmp_path)
    page, notes = page_of(tmp_path)
    assert_inert(page)
    assert notes[0].startswith("9 of 10 cells are finished") and notes[0].endswith(f"fastppo study --resume {tmp_path}")
    assert notes[1:] == ["stsb, ppo, seed 1 failed: diverged plain"] and all(note in page.text for note in notes)
    charts = page.charts()
    assert charts["Reward"] == charts["Accuracy"] == [2, 2, 2] and charts["MCC, held out"] == [2, 2]  # of cola, and of stsb
    assert charts["Loss"] == [3] * 7 and charts["Reward of plain"] == [2, 2, 2]
    assert "Scores are x 100" in page.text and "cola (MCC) stsb (Spearman)" in page.text
    assert "zero-shot 50.0 [25.0, 75.0] 55.0 [25.0, 75.0]" in page.text and "58.0 [25.0, 75.0] (1 of 2 seeds)" in page.text
    scores = page.text[page.text.index("Scores are x 100") : page.text.index("Curves: sft")]
    assert "%" not in scores.replace("95 %", "")
    assert page.text.count("cola zero-shot any ") == 1 and "cola ppo 1 " in page.text
    assert page.text.count("right answer yes (acceptable) zero-shot plain ✗ wrong sft plain ✗ wrong ppo plain ✗ wrong") == 3
    assert "off by 0.5" in page.text and "device plain of the runs that train" in page.text


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_no_text_comes_alive(tmp_path, text):
    """Answers, examples, errors, versions; and a method and settings, past the check of a study that is read."""
    given = text.replace("\x00", "0")  # which no setting may hold
    methods = (*STUDY.methods[:2], Method("<b>p'p\"o</b>", "ppo", {"sample.stop": (given,)}))
    study = dataclasses.replace(STUDY, methods=methods, settings={"model": given}, data=given, encoder=given)
    hostile, plain = tmp_path / "hostile", tmp_path / "plain"
    for out, one, said in ((hostile, study, text), (plain, STUDY, "plain")):
        out.mkdir()
        make_study(out, said, one)
    page, _ = page_of(hostile, study)
    assert_inert(page)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in page_of(plain)[0].elements}
    html, _ = run.page(study, hostile, hostile / "report.html")
    for char in "\x00\x07\x1b\u202e\u202c\u2066\u2069\ud800\r\t":
        assert char not in html
    if "w" * 100 not in text:
        shown = text.replace("\r", "\\r").replace("\t", "\\t")
        shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)
        assert f"stsb, <b>p'p\"o</b>, seed 1 failed: diverged {' '.join(shown.split())}" in page.text
        assert page.text.count(" ".join(shown.split())) > 10


def test_a_study_that_has_just_begun_and_one_of_garbage(tmp_path):
    page, notes = page_of(tmp_path)
    assert_inert(page)
    assert notes[0].startswith("0 of 10 cells are finished") and len(notes) == 1 and "not finished" in page.text
    make_study(tmp_path)
    for path in [*tmp_path.glob("**/*.json"), *tmp_path.glob("**/*.jsonl")]:
        path.write_text("garbage\n")
    page, notes = page_of(tmp_path)
    assert_inert(page)
    for file in ("cells/cola/zero-shot/seed-0/result.json is damaged", "seed 1: metrics.jsonl is damaged: line 1 is left out"):
        assert any(file in note for note in notes) and file in page.text
    assert "zero-shot, seed 0: answers/zero_shot.jsonl is damaged" in page.text and "setup.json is damaged" in page.text


def test_a_task_of_a_file_goes_by_its_name(tmp_path):
    file = tmp_path / "tickets.yaml"
    file.write_text("template: 'Ticket: {text}'\nanswers: [bug, wish]\n")
    study = Study({str(file): {}, "cola": {}}, (Method("sft", "sft"), Method("all", "sft-multi")), data=str(tmp_path))
    row = {"fields": {"text": "x"}, "label": 1, "answer": "bug", "predicted": 0, "task": "tickets"}
    for place in study.places():
        folder, multi = place.folder(tmp_path), len(place.tasks) > 1
        score = {"metric": "accuracy", "value": 0.5, "low": 0.25, "high": 0.75, "malformed": 0.0, "labels": 1, "seconds": 1.0}
        found = [run.named(key) | score | {"scores": {"accuracy": 0.5}} for key in place.keys]
        if place.task != "cola":
            write_lines(folder / "metrics.jsonl", [{"stage": "PPO", "step": 1, "tickets/reward" if multi else "reward": 0.5}])
            write_lines(folder / "answers" / "sft.jsonl", [row])
            (folder / "report.html").touch()
            (folder / "result.json").write_text(json.dumps({"results": found} if multi else found[0]))
    page, notes = page_of(tmp_path, study)
    assert_inert(page)
    assert len(notes) == 1 and notes[0].startswith("3 of 4 cells are finished")
    assert page.charts()["Reward"] == [1, 1] and "tickets sft 0 50.0" in page.text and "tickets all 0 50.0" in page.text
    assert "right answer wish sft bug ✗ wrong all bug ✗ wrong" in page.text
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a" and attributes["href"][0] != "#"}
    assert links == {"cells/tickets/sft/seed-0/report.html", "cells/tickets%2Ccola/all/seed-0/report.html"}
