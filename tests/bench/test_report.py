"""The report, on made-up results."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from bench import report
from bench.goals import GOALS, Rows
from bench.record import ROOT, Figure, Record

VERSIONS = {"torch": "2.13.0", "trl": "1.12.0"}
CPU = {"device": "Made-up CPU, 2 threads", "versions": VERSIONS, "commit": "a" * 40, "changed": False}
GPU = CPU | {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "gibibytes": 79.6, "driver": "580.1"}


def ratio(*raw):
    return Figure.of(list(raw), "ratio", "higher")


def loop(part="loop-cola", machine=CPU, ratios=(11.0, 12.0, 13.0), memory=0.4, learned=(True, True), **changed):
    figures = {
        "ratio": ratio(*ratios), "fastppo samples/s": Figure.of([150.0, 160.0], "samples/s", "higher"),
        "trl samples/s": Figure.of([13.0, 13.2], "samples/s"), "memory ratio": Figure(memory, "ratio", "lower"),
        "fastppo MiB": Figure(40.0, "MiB", "lower"), "trl MiB": Figure(100.0, "MiB"),
    }  # fmt: skip
    data = {
        "phases": {"fastppo": {"sample": 1.0, "update": 3.0}, "trl": {"generation": 10.0, "update: forward": 20.0, "gc": 10.0}},
        "curves": {"fastppo": [0.5 + 0.01 * i for i in range(20)], "trl": [0.5 + 0.009 * i for i in range(20)]},
        "tokens": {"padded": 6400, "tree": 1500, "responses": 256}, "samples_per_iteration": 64,
        "learned": dict(zip(("fastppo", "trl"), learned, strict=True)), "workload": {}, "trl_gc_share": 0.25,
    }  # fmt: skip
    return Record(part, machine, figures=figures, data=data, complete=True, **changed)


def without_trl(part="loop-cola", note="trl is not installed: pip install trl==1.12.0"):
    record = loop(part, notes=[note])
    record.figures = {"fastppo samples/s": record.figures["fastppo samples/s"]}
    record.data["learned"] = {"fastppo": True}
    del record.data["curves"]["trl"], record.data["phases"]["trl"], record.data["trl_gc_share"]
    return record


def row(form, median, op="linear_ppo_loss", size="T8192 V152064 H3584", limit=25.0, peak=600.0, **more):
    return {
        "op": op, "size": size, "direction": "fwd+bwd", "dtype": "bfloat16", "form": form, "median_ms": median,
        "low_ms": 0.9 * median, "high_ms": 1.1 * median, "peak_MiB": peak, "limit_ms": limit,
        "percent_of_limit": 100 * limit / median,
    } | more  # fmt: skip


def out_of_memory(form):
    """As `row`, of a form that did not run."""
    names = ("median_ms", "low_ms", "high_ms", "percent_of_limit", "peak_MiB")
    return row(form, 1.0, note="out of memory") | dict.fromkeys(names)


def ops(*rows, machine=GPU):
    return Record("ops", machine, data={"rows": list(rows)}, complete=True)


def ablated(machine=CPU):
    figures = {
        "full samples/s": Figure(150.0, "samples/s", "higher"), "without tree: ratio": ratio(3.0, 3.5, 4.0),
        "without tree: MiB": Figure(90.0, "MiB"),
    }  # fmt: skip
    rows = [
        {"idea": "tree", "samples_per_s": 42.0, "ratio": 3.5, "peak_MiB": 90.0},
        {"idea": "kernels", "samples_per_s": None, "ratio": None, "peak_MiB": None, "note": "out of memory"},
    ]
    return Record("ablations-cola", machine, figures=figures, data={"rows": rows}, complete=True)


CHECK = {
    "machine": GPU, "complete": True, "seconds": 100.0, "started": "2026-01-02T03:04:05+00:00",
    "cases": {
        "sample, fp32": {"error": {"ok": True, "text": "", "figures": {}}},
        "attention, bf16": {"error": {"ok": True}, "graph": {"ok": False, "text": "no"}},
        "head, huge": {"memory": {"ok": True}},
    },
    "sanitizer": {"memcheck": {"sample, fp32": {"ok": True}}, "racecheck": {}},
}  # fmt: skip


@pytest.fixture
def drawn(tmp_path):
    """The folder of results, what stores records in it, and what writes the report."""

    class Results:
        folder = tmp_path / "results"
        out = tmp_path / "RESULTS.md"

        def add(self, *records, device="cpu"):
            (self.folder / device).mkdir(parents=True, exist_ok=True)
            for record in records:
                record.save(self.folder / device / f"{record.part}.json")
            return self

        def write(self, name, text):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return self

        def report(self):
            assert report.main(["--results", str(self.folder), "--out", str(self.out)]) == 0
            return self.out.read_text()

    return Results()


@pytest.fixture
def results(drawn, monkeypatch):
    """The same without pictures, which take most of the time."""
    for name in ("curves", "ratios", "ablations", "kernels"):
        monkeypatch.setattr(report.plots, name, lambda *_: None)
    return drawn


def table_rows(page, *words):
    """The cells of the table rows with all of these words."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and all(word in line for word in words)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def goal(page, *words):
    """The one row of the goals with these words: goal, wanted, measured, where, reached."""
    (cells,) = table_rows(page.split("## Goals")[1].split("\n## ")[0], *words)
    return cells


# ---- goals


def test_reached_missed_and_not_measured(results):
    page = results.add(loop(), loop("loop-few-shot", ratios=(14.0, 14.5, 16.0), memory=0.6)).report()
    name, wanted, measured, where, reached = goal(page, "CoLA-like", "at least 10 x")
    assert reached == "**yes**" and measured == "12.0 x (11.0 to 13.0)" and where.startswith("cpu, loop-cola, aaaa")
    assert goal(page, "CoLA-like", "at most half")[-1] == "**yes**"
    assert goal(page, "few-shot", "at least 15 x")[-1] == "**no**"  # by the median, not by the best pair
    assert goal(page, "few-shot", "at most half")[-1] == "**no**"
    assert goal(page, "GSM8K-like", "at least 3 x")[2:] == ["not measured", "any CPU", "not measured"]
    assert goal(page, "CoLA-like", "at least 20 x")[2:] == ["not measured", "any GPU", "not measured"]  # no CPU counts for it


def test_the_goals_of_a_cpu_are_those_that_were_set(results):
    found = {(goal.part.removesuffix("(-tiny)?"), goal.at_most): goal.limit for goal in GOALS if goal.kind == "CPU"}
    speed = {("loop-cola", False): 10, ("loop-few-shot", False): 15, ("loop-gsm8k", False): 3}
    assert found == speed | {(part, True): 0.5 for part, _ in speed}


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.kind} {goal.name}")
def test_a_goal_is_reached_at_its_limit_and_missed_beyond(goal):
    beyond = goal.limit * (1.01 if goal.at_most else 0.99)
    assert goal.reached(goal.limit) and not goal.reached(beyond)


def test_every_goal_of_a_gpu_is_read_and_judged_for_each_model(results):
    update = Record("update-7b", GPU, figures={"MFU": Figure(61.0, "percent"), "2048 tokens: MFU": Figure(40.0, "percent")})
    other = Record("update-0.5b", GPU, figures={"MFU": Figure(30.0, "percent", "higher")})
    figures = {f"batch {n}: overhead": Figure(v, "percent", "lower") for n, v in {1: 2.0, 64: 6.0, 128: 50.0}.items()}
    decode = Record("decode-1.5b", GPU, figures=figures)
    lora = {"op": "lora layer (7 linears)", "size": "M8192 7B r64"}
    kernels = ops(
        row("fastppo", 30.0), row("torch", 60.0), row("fastppo", 11.5, limit=10.0, **lora),
        row("fastppo", 20.0, limit=10.0, op="lora layer (7 linears)", size="M8192 7B r128"),
        row("fastppo", 1.0, limit=0.95, op="token_logprob", size="T8192 V152064", direction="fwd"),
    )  # fmt: skip
    loops = [loop(f"loop-cola-{model}", GPU, ratios=(r, r)) for model, r in (("0.5b", 25.0), ("7b", 19.0))]
    page = results.add(update, other, decode, kernels, *loops, device="nvidia-h100").report()
    assert goal(page, "at least 20 x", "cola-0.5b")[-1] == "**yes**" and goal(page, "at least 20 x", "cola-7b")[-1] == "**no**"
    assert len(table_rows(page, "at most a third")) == 2 and "**yes**" not in str(table_rows(page, "at most a third"))
    assert table_rows(page, "| 7b | 2048 tokens |")[0][2:] == ["40.0", *["not measured"] * 3]
    assert goal(page, "60 %")[2] == "61.0 %" and goal(page, "60 %")[-1] == "**yes**"
    assert goal(page, "merged", "batch 1)")[-1] == "**yes**" and goal(page, "merged", "batch 64)")[-1] == "**no**"
    assert not table_rows(page, "merged", "batch 128)")
    assert goal(page, "1.1 x")[2] == "1.15 x" and goal(page, "1.1 x")[-1] == "**no**"
    assert goal(page, "1.25 x")[2] == "1.20 x" and goal(page, "1.25 x")[-1] == "**yes**"
    assert goal(page, "640 MB")[2] == "600 MiB" and goal(page, "640 MB")[-1] == "**yes**"
    assert goal(page, "copy bandwidth", "log-probability")[-1] == "**yes**"
    assert goal(page, "GSM8K-like", "at least 8 x")[-1] == "not measured"


def test_goals_speak_of_kernels_that_are_measured():
    from bench.ops import entries

    measured = [(entry.op.name, entry.size, entry.direction) for entry in entries(torch.device("cuda"))]
    wanted = [goal for goal in GOALS if isinstance(goal.read, Rows)]
    assert wanted
    for goal in wanted:
        assert any(goal.read.fits(*names) for names in measured), goal.name


@pytest.mark.parametrize(
    ("learned", "why"),
    [
        ((True, False), "TRL did not learn the rule"),
        ((False, True), "fastppo did not learn the rule"),
        ((False, False), "fastppo and TRL did not learn the rule"),
        ((True, None), "it is not known whether TRL learned the rule"),
        ((None, "yes"), "it is not known whether fastppo and TRL learned the rule"),
        ((False, None), "fastppo did not learn the rule; it is not known whether TRL learned the rule"),
    ],
)
def test_a_comparison_in_which_an_engine_is_not_known_to_have_learned_is_void(results, learned, why):
    page = results.add(loop(ratios=(99.0, 99.0), memory=0.11, learned=learned)).report()
    for words in (("CoLA-like", "at least 10 x"), ("CoLA-like", "at most half")):
        assert goal(page, *words)[2::2] == [f"void: {why}", "void"]
    assert f"void: {why}" in page.split("### Whole loop")[1]
    assert "99.0" not in page and "0.110" not in page and "ratios.svg" not in page


@pytest.mark.parametrize("gone", ["learned", "data"])
def test_of_a_record_that_does_not_say_it_nobody_claims_that_an_engine_did_not_learn(results, gone):
    stored = json.loads(json.dumps(vars(loop()) | {"figures": {k: vars(v) for k, v in loop().figures.items()}}))
    del (stored if gone == "data" else stored["data"])[gone]
    page = results.write("cpu/loop-cola.json", json.dumps(stored)).report()
    why = "void: it is not known whether fastppo and TRL learned the rule"
    assert goal(page, "CoLA-like", "at least 10 x")[2] == why and "did not learn" not in page


def test_without_trl_its_figures_are_not_measured_and_the_page_says_why(results):
    page = results.add(without_trl()).report()
    _, _, measured, _, reached = goal(page, "CoLA-like", "at least 10 x")
    assert reached == "not measured" and "pip install trl==1.12.0" in measured
    (cells,) = table_rows(page.split("### Whole loop")[1], "CoLA-like, tiny", "155")
    assert cells[2:] == ["not measured", "not measured"]
    assert "void" not in page.split("## Goals")[1]


def test_out_of_memory_is_a_result(results):
    trained = Record("update-7b", GPU, notes=["out of memory: tried to allocate 90 GiB"], complete=True)
    kernels = ops(out_of_memory("fastppo"), row("torch", 60.0))
    page = results.add(trained, kernels, device="nvidia-h100").report()
    for words in (("60 %",), ("1.25 x",), ("640 MB",)):
        assert "out of memory" in goal(page, *words)[2] and goal(page, *words)[-1] == "not measured"
    assert "out of memory: tried to allocate 90 GiB" in page.split("## Notes")[1]


# ---- the rest of the page


def test_the_head_and_the_device_say_what_it_is_and_on_what(results):
    record = loop(machine=CPU | {"changed": True}, started="2026-05-06T07:08:09+00:00", seconds=12.5)
    page = results.add(record, ablated()).add(loop("loop-cola-7b", GPU), device="nvidia-h100").report()
    assert "python -m bench.report" in page.split("## Goals")[0]
    assert "Made-up CPU, 2 threads" in page and "NVIDIA H100 80GB HBM3, 79.6 GiB, driver 580.1, capability 9.0" in page
    assert "torch 2.13.0, trl 1.12.0" in page
    assert ["loop-cola", "2026-05-06", "12.5", "aaaaaaaaa and uncommitted changes", "whole"] in table_rows(page)
    assert goal(page, "CoLA-like", "at least 10 x")[3].endswith("uncommitted changes")
    assert not goal(page, "CoLA-like", "at least 20 x")[3].endswith("uncommitted changes")
    unknown = GPU | {"commit": None, "changed": False, "sources": "0123456789abcdef"}
    page = results.add(loop("loop-cola-1.5b", unknown), device="nvidia-h100").report()
    assert goal(page, "at least 20 x", "cola-1.5b")[3].endswith("commit unknown, sources 0123456789abcdef")


def test_a_part_that_was_measured_otherwise_than_the_others_says_so(results):
    one = CPU | {"device": "Made-up CPU, 1 threads", "versions": {"torch": "2.12.0", "peft": "1.0"}}
    results.add(loop(), ablated(), loop("loop-gsm8k", one), loop("loop-few-shot", CPU | {"commit": "b" * 40, "versions": None}))
    page = results.report()
    head, parts = page.split("## cpu")[1].split("| part |")
    assert "Device: Made-up CPU, 2 threads.\n" in head and "Versions: torch 2.13.0, trl 1.12.0.\n" in head
    rows = {row[0]: row[3:] for row in table_rows("| part |" + parts.split("\n\n")[0])}
    assert rows["part"] == ["commit", "state", "differs in"]
    assert rows["loop-cola"] == rows["ablations-cola"] == ["a" * 9, "whole", ""]
    assert rows["loop-gsm8k"] == ["a" * 9, "whole", "1 threads, torch 2.12.0, peft 1.0, no trl"]
    assert rows["loop-few-shot"] == ["b" * 9, "whole", "versions unknown"]
    assert goal(page, "GSM8K-like", "at least 3 x")[3] == f"cpu, loop-gsm8k, {'a' * 9}, 1 threads"
    assert goal(page, "CoLA-like", "at least 10 x")[3] == f"cpu, loop-cola, {'a' * 9}"


def test_loop_tables(results):
    page = results.add(loop()).report()
    assert ["CoLA-like, tiny", "155 (150 to 160)", "13.1 (13.0 to 13.2)", "12.0 x (11.0 to 13.0, 3 pairs)"] in table_rows(page)
    assert ["CoLA-like, tiny", "40.0", "100", "0.400 x", "6,400", "1,500", "256"] in table_rows(page)
    phases = table_rows(page, "update: forward")
    assert phases == [["", "update", "3.00", "75 %", "update: forward", "20.0", "50 %"]]
    assert "25.0 % of TRL's time is garbage collection" in page


def test_what_a_workload_is_and_what_no_phase_of_trl_has(results):
    record = loop()
    record.data |= {"workload": {"what": "80-token *instruction*", "prompts": 64, "samples": 1}, "trl_other": 40.0}
    page = results.add(record).report()
    assert "- CoLA-like, tiny: 80-token \\*instruction\\*; 64 prompts an iteration, samples of each: 1\n\n|" in page
    assert ["", "", "", "", "all else", "40.0", "50 %"] in table_rows(page)


def test_the_full_engine_is_one_row_of_the_ablations(results):
    record = ablated()
    record.figures["full: MiB"] = Figure(30.0, "MiB", "lower")
    record.data["rows"].insert(0, {"idea": "full", "samples_per_s": 150.0, "ratio": 1.0, "peak_MiB": 30.0})
    page = results.add(record).report()
    assert ["nothing: the full engine", "150", "", "30.0", ""] in table_rows(page) and not table_rows(page, "| full |")


def test_ablations_kernels_and_check(results):
    limit = row("limit", 25.0, ratio=0.85)
    kernels = ops(row("torch", 60.0, note="chunked"), row("fastppo", 30.0), out_of_memory("liger"), limit)
    results.add(ablated()).add(kernels, device="h100").write("h100/check.json", json.dumps(CHECK))
    page = results.report()
    assert ["nothing: the full engine", "150", "", "", ""] in table_rows(page)
    assert ["tree", "42.0", "3.50 (3.00 to 4.00)", "90.0", ""] in table_rows(page)
    assert ["kernels", "not measured", "not measured", "not measured", "out of memory"] in table_rows(page)
    key = ["linear_ppo_loss", "T8192 V152064 H3584", "fwd+bwd", "bfloat16"]
    assert [*key, "30.0", "83.3", "torch 2.00, liger (out of memory)"] in table_rows(page)
    assert [*key, "torch", "60.0", "54.0 to 66.0", "2.00", "41.7", "600", "chunked"] in table_rows(page)
    assert [*key, "limit", "25.0", "22.5 to 27.5", "0.850", "100", "600", ""] in table_rows(page)
    assert [*key, "liger", *["not measured"] * 5, "out of memory"] in table_rows(page)
    assert "3 cases, 1 failed, 1 left out" in page and "- **failed**: attention, bf16" in page
    assert "memcheck: 1 cases, 0 with errors" in page and "racecheck: not measured" in page


def test_what_is_left_to_measure(results):
    started = loop("loop-gsm8k")
    started.complete = False
    page = results.add(loop("loop-cola-tiny"), started).write("PENDING.md", "much").report()
    left = page.split("## Not measured yet")[1]
    assert "loop-cola" not in left and "loop-gsm8k" in left and "loop-few-shot" in left and "ceilings" in left
    assert "GPU: not measured at all" in left and "](results/PENDING.md)" in left
    assert "cut off" in table_rows(page, "loop-gsm8k", "a" * 9)[-1]
    assert "CPU: not measured at all" not in left


def test_no_results_at_all(results):
    results.folder.mkdir()
    page = results.report()
    goals = page.split("## Goals")[1].split("\n## ")[0]
    for kind in ("CPU", "GPU"):
        cells = table_rows(goals.split(f"### On a {kind}")[1].split("\n### ")[0])[2:]
        assert len(cells) == sum(goal.kind == kind for goal in GOALS) and {row[-1] for row in cells} == {"not measured"}


# ---- worse than before


def worse():
    now, before = loop(ratios=(11.0, 11.0)), loop(ratios=(12.0, 12.0))
    now.follow(before)
    return now


def test_a_figure_that_lost_more_than_5_percent_is_flagged(results, capsys):
    page = results.add(worse(), ablated()).report()
    assert ["cpu", "loop-cola", "ratio", "11.0 x", "12.0", "a" * 9, "**8 % worse**"] in table_rows(page)
    assert "> **1 figure is worse" in page.split("## cpu")[0]
    capsys.readouterr()
    results.out.unlink()
    assert report.main(["--results", str(results.folder), "--out", str(results.out), "--check"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "cpu, loop-cola, ratio" in line and "8 % worse" in line
    assert not results.out.exists()


def test_a_figure_that_is_no_longer_measured_is_flagged(results, capsys):
    now = worse()
    del now.figures["ratio"]
    page = results.add(now).report()
    assert ["cpu", "loop-cola", "ratio", "", "12.0", "a" * 9, "**no longer measured**"] in table_rows(page)
    capsys.readouterr()
    assert report.main(["--results", str(results.folder), "--check"]) == 1
    assert capsys.readouterr().out == f"cpu, loop-cola, ratio: no longer measured; it was 12.0 (commit {'a' * 9})\n"


def test_nothing_lost(results, capsys):
    now = loop(ratios=(11.5, 11.5))
    now.follow(loop(ratios=(12.0, 12.0)))  # 4 %
    page = results.add(now).report()
    assert "**" not in page.split("## Losses")[1].split("## Notes")[0]
    assert "worse than what was stored" not in page.split("## cpu")[0]
    capsys.readouterr()
    assert report.main(["--results", str(results.folder), "--check"]) == 0
    assert capsys.readouterr().out == ""


def test_a_check_that_cannot_read_a_file_does_not_say_that_all_is_well(results, capsys):
    results.add(loop()).write("cpu/ops.json", "{")
    assert report.main(["--results", str(results.folder), "--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cpu/ops.json: is no JSON: ")


# ---- whatever lies in the folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cpu/ops.json", '{"part": "ops", "fig'),
        ("cpu/ops.json", "[]"),
        ("cpu/ops.json", "null"),
        ("cpu/ops.json", '{"part": "ops", "machine": [], "figures": {}}'),
        ("cpu/ops.json", '{"part": "ops", "machine": {}, "figures": {}, "data": [1]}'),
        ("cpu/ops.json", '{"part": "loop-cola", "machine": {}, "figures": {}}'),
        ("cpu/ops.json", '{"part": "ops", "machine": {}, "figures": {"a": {"value": 1, "unit": "ms", "colour": "red"}}}'),
        ("cpu/package.json", "{}"),
        ("cpu/loop-chess.json", "{}"),
        ("cpu/check.json", '{"machine": {}, "cases": []}'),
        ("check-h100.json", "{}"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_the_rest_comes(results, capsys, name, text):
    page = results.add(loop()).write(name, text).report()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: ")
    assert report.escape(line) in page.split("## Files that could not be read")[1]
    assert goal(page, "CoLA-like", "at least 10 x")[-1] == "**yes**"


# Part, heading, words of its goals.
DAMAGED = [
    ("loop-cola", "Whole loop", "CoLA-like", "at least 10 x"), ("loop-gsm8k", "Learning curves", "GSM8K-like", "at most half"),
    ("ablations-cola", "Each idea"), ("update-7b", "Update", "60 %"), ("decode-7b", "Decoding", "merged"),
    ("ops", "Kernels", "1.25 x"), ("ceilings", "Ceilings"), ("check", "Correctness"),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "nvidia-h100"])
@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda damaged: damaged[0])
def test_a_damaged_file_is_named_where_its_figures_would_stand(results, device, damaged):
    part, heading, *words = damaged
    page = results.write(f"{device}/{part}.json", "{").report()
    said = f"the stored record could not be read: {device}/{part}.json: "
    under = page.split(f"## {device}")[1].split(f"### {heading}")[1].split("\n#")[0]
    assert said in under and "not measured" not in under
    assert [part, "", "", "", "the stored record could not be read"] in table_rows(page)
    if words and (device == "cpu") == part.startswith("loop"):  # a goal of this kind of device
        _, _, measured, where, reached = goal(page, *words)
        assert measured.startswith(said) and where == f"{device}, {part}" and reached == "not measured"


def test_a_damaged_file_is_still_to_be_measured(results):
    left = results.write("cpu/ops.json", "{").report().split("## Not measured yet")[1]
    assert "ceilings, ops (the stored record could not be read), " in left


def test_a_figure_that_was_edited_by_hand_is_no_result(results, capsys):
    record = loop(ratios=(1.0, 2.0, 4.0))
    record.figures["ratio"].value = 20.0
    page = results.add(record, ablated()).report()
    said = "cpu/loop-cola.json: the figure 'ratio' is 20, but the median of its samples is 2"
    assert capsys.readouterr().err.splitlines() == [said]
    assert said in goal(page, "CoLA-like", "at least 10 x")[2] and "20.0" not in page
    assert report.main(["--results", str(results.folder), "--check"]) == 1


def test_without_a_check_the_page_says_what_runs_instead(results):
    page = results.add(loop()).report().split("### Correctness of the kernels")[1].split("\n## ")[0]
    assert "No result of `python -m bench.gpu --check` is stored" in page
    (file,) = re.findall(r"`(tests/\S+\.py)`", page)
    assert "def test_every_case_is_right_in_the_interpreter" in (ROOT / file).read_text()


def test_a_check_on_a_cpu_is_not_passed_off_as_one_of_compiled_kernels(results):
    results.write("cpu/check.json", json.dumps(CHECK | {"machine": CPU})).write("h100/check.json", json.dumps(CHECK))
    cpu, gpu = (part.split("\n## ")[0] for part in results.report().split("### Correctness of the kernels")[1:])
    assert "in triton's interpreter" in cpu and "3 cases, 1 failed" in cpu
    assert "interpreter" not in gpu and "3 cases, 1 failed" in gpu


def test_bytes_that_are_no_text(results, capsys):
    results.add(loop()).folder.joinpath("cpu", "ops.json").write_bytes(b"\xff\xfe{}")
    results.report()
    assert "cpu/ops.json" in capsys.readouterr().err


def test_what_is_no_number_is_named_and_not_measured(results, capsys):
    record = loop()
    record.figures["ratio"].value = float("nan")  # written as null
    record.figures["memory ratio"].raw = ["a lot"]
    record.reference = {"memory ratio": {"value": None}, "gone": {"value": 1.0}, "trl MiB": {"value": 1.0}}
    page = results.add(record).report()
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert goal(page, "CoLA-like", "at least 10 x")[-1] == "not measured"
    assert goal(page, "CoLA-like", "at most half")[-1] == "**yes**"


JUNK = [None, True, 7, "text", [], [1, None, "x"], {}, {"fastppo": None, "trl": 3}, {"fastppo": [None], "trl": ["x", 1.0]}]


@pytest.mark.parametrize("junk", JUNK, ids=map(json.dumps, JUNK))
def test_no_data_breaks_the_page(results, junk):
    first, kernels, off = loop(), ops(machine=CPU), ablated()
    first.data = dict.fromkeys([*first.data], junk)
    first.notes = [junk, "a note"]
    kernels.data["rows"] = [junk, {"op": junk, "form": junk, "note": junk}, dict.fromkeys(row("x", 1.0), junk)]
    off.data["rows"] = [junk, {"idea": junk, "samples_per_s": junk, "ratio": junk, "note": junk}]
    machine = dict.fromkeys(GPU, junk)
    results.add(first, kernels, off).add(loop("loop-cola-7b", machine), device="other")
    check = {"machine": {"device": junk}, "cases": {"a": junk, "b": {"c": junk}}, "sanitizer": {"d": junk}}
    results.write("cpu/check.json", json.dumps(check))
    assert "a note" in results.report()


def test_names_and_notes_are_no_markup(results):
    nasty = "<script>x</script> | **bold** `code` [a](http://b) _it_ $x$ \\ &amp;\nsecond"
    record = without_trl(note=f"trl {nasty}")
    record.machine = CPU | {"device": nasty}
    kernels = ops(row("fastppo", 30.0, op=nasty), row(nasty, 60.0, op=nasty, note=nasty), machine=CPU)
    page = results.add(record, kernels).report()
    assert "&amp;amp;" in page
    for markup in ("<script", " | **bold", "`code`", "[a](", " _it_", "$x$", "\nsecond"):
        assert markup not in page
    heads = [line.count("|") - line.count("\\|") for line in page.splitlines() if line.startswith("| op ")]
    rows_of = [line.count("|") - line.count("\\|") for line in page.splitlines() if line.startswith("| &lt;script")]
    assert sorted(set(rows_of)) == sorted(heads)
    assert report.escape("linear_logprob __init__ *") == "linear_logprob \\_\\_init\\_\\_ \\*"


# ---- pictures and bytes


def pictures_of(page, base: Path):
    return [(base / unquote(link)).resolve() for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)]


def test_pictures_exist_and_their_links_resolve(drawn):
    pytest.importorskip("matplotlib")
    drawn.add(loop(), without_trl("loop-gsm8k"), ablated())
    page = drawn.add(ops(row("fastppo", 30.0), row("torch", 60.0)), device="a (b) $").report()
    found = pictures_of(page, drawn.out.parent)
    assert "](results/cpu/ratios.svg)" in page
    assert {path.relative_to(drawn.folder.resolve()).as_posix() for path in found} == {
        "cpu/curves-cola.svg", "cpu/curves-gsm8k.svg", "cpu/ratios.svg", "cpu/ablations-cola.svg", "a (b) $/kernels.svg",
    }  # fmt: skip
    for path in found:
        text = path.read_text()
        assert text.startswith("<?xml") and text.rstrip().endswith("</svg>")


def test_what_of_a_curve_is_no_number_is_a_gap(drawn):
    pytest.importorskip("matplotlib")
    record = loop()
    record.data["curves"] = {"fastppo": [0.5, None, "x", 0.6], "trl": [None]}
    record.figures = {}
    (path,) = pictures_of(drawn.add(record).report(), drawn.out.parent)
    assert "nan" not in path.read_text().lower()


def test_the_same_results_give_the_same_bytes(drawn):
    drawn.add(loop(), ablated()).add(ops(row("fastppo", 30.0)), device="h100").write("h100/check.json", json.dumps(CHECK))
    first = {path: path.read_bytes() for path in (drawn.report() and drawn.folder.rglob("*.svg"))}
    page = drawn.out.read_bytes()
    subprocess.run(
        [sys.executable, "-m", "bench.report", "--results", drawn.folder, "--out", drawn.out], check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(map(str, sys.path))},
    )  # fmt: skip
    assert drawn.out.read_bytes() == page and {path: path.read_bytes() for path in first} == first
    assert not first or len(first) == 4


def test_without_matplotlib_the_page_comes_without_pictures(drawn, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = drawn.add(loop(), ablated()).report()
    assert "pip install matplotlib" in capsys.readouterr().err
    assert "![" not in page and "no picture" in page and not list(drawn.folder.rglob("*.svg"))
    assert goal(page, "CoLA-like", "at least 10 x")[-1] == "**yes**"


# ---- the command


def test_no_such_folder_is_one_line_and_status_2(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none" in line


def test_a_page_that_cannot_be_written_is_one_line_and_status_2(results, capsys):
    results.add(loop())
    for out, why in ((results.folder / "no" / "R.md", "No such file or directory"), (results.folder, "Is a directory")):
        assert report.main(["--results", str(results.folder), "--out", str(out)]) == 2
        wanted = "expected a file in a folder that exists and can be written"
        assert capsys.readouterr().err == f"cannot write {out}: {why}; {wanted}\n"


def test_a_picture_that_cannot_be_written_is_one_line_and_status_2(drawn, capsys):
    pytest.importorskip("matplotlib")
    (drawn.add(loop()).folder / "cpu" / "ratios.svg").mkdir()
    assert report.main(["--results", str(drawn.folder), "--out", str(drawn.out)]) == 2
    assert capsys.readouterr().err.startswith(f"cannot write {drawn.folder / 'cpu' / 'ratios.svg'}: Is a directory; expected ")
