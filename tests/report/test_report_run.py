"""``report.html`` of a run, on made-up run folders: what it says, that no text comes alive in it, what damage does to it."""

import json
import re
import shutil

import pytest
from pages import HOSTILE, Page, assert_inert
from small import lines, quiet_console

from fastppo import cli, config, report, trainer
from fastppo.config import SETTINGS, load_config
from fastppo.errors import UserError
from fastppo.report.answers import Labels, confusion
from fastppo.report.run import main_metric

REGRESSION = [(0.0, 0.5), (2.5, 2.5), (5.0, None), (3.8, 4.0)]


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(run, text="plain", labels=("unacceptable", "acceptable"), answers=None, **settings):
    """A finished run: 5 SFT steps, 8 PPO iterations, 10 dev rows. ``text`` is in everything that others wrote."""
    run.mkdir()
    config.save(load_config(settings), run / "config.yaml")
    setup = {
        "task": text, "labels": list(labels), "answers": ["no", "yes"][: len(labels)], "model": text, "seed": 0,
        "data": {"name": text, "train": 9000, "dev": 10}, "device": "cpu", "device_name": text, "dtype": "float32",
        "packed": True, "versions": {"python": "3.11.7", "torch": text},
    }  # fmt: skip
    stages = {
        name: {"mcc": i / 10, "mcc_low": -0.2, "mcc_high": 0.7, "accuracy": i / 10, "malformed": 0.1, "n": 10, "labels": i}
        for i, name in enumerate(("zero_shot", "sft", "ppo"))
    }
    results = {
        "stages": stages, "best_step": 6, "samples": 4096, "samples_per_s": 123.4, "tokens_tree": 250,
        "tokens_padded": 1000, "seconds": {"sft": 3.0, "sample": 5.0, "update": 12.0}, "sampler_gap_max": 1e-5, "first_kl": 0.0,
    }  # fmt: skip
    (run / "setup.json").write_text(json.dumps(setup))
    (run / "summary.json").write_text(json.dumps(setup | results))
    ppo = dict.fromkeys(("kl", "entropy", "value_loss", "explained_variance", "clip_fraction", "grad_norm", "accuracy"), 0.5)
    ppo |= {"malformed": 0.0, "tokens_tree": 25, "tokens_padded": 100, "a_new_metric": 3.0}
    write_lines(
        run / "metrics.jsonl",
        [{"stage": "SFT", "step": n, "loss": 1 / n, "tokens_tree": 5, "tokens_padded": 10} for n in range(1, 6)]
        + [
            {"stage": "PPO", "step": n, "reward": n / 10, "reward_class_0": 0.1, "reward_class_1": 0.3, **ppo}
            | ({"valid_reward": 0.5, "valid_mcc": 0.4} if n % 4 == 0 else {})
            for n in range(1, 9)
        ],
    )
    write_lines(
        run / "samples.jsonl",
        [
            {"step": n, "fields": {"sentence": text, "reward": "none"}, "label": 1, "answer": text, "reward": -2.0}
            for n in range(1, 9)
        ],
    )
    pairs = answers or [(1, 1)] * 4 + [(0, 0)] * 3 + [(1, 0), (0, 1), (1, None)]
    for stage in stages:
        same = {"fields": {"sentence": text, text[:9]: "x"}, "answer": text}
        rows = [{"origin": f"dev:{i}", "label": gold, "predicted": said, **same} for i, (gold, said) in enumerate(pairs, 1)]
        write_lines(run / "answers" / f"{stage}.jsonl", rows)
    return run


def page_of(run) -> Page:
    return Page(report.run_report(run))


# -- what it says ------------------------------------------------------------------------------------------------------


def test_every_part_is_there(tmp_path):
    page = page_of(make_run(tmp_path / "run", **{"ppo.lr": "0.002"}))
    text = page.text
    assert_inert(page)
    headings = ("Results", "Learning curves, SFT", "Learning curves, PPO", "Confusion matrix", "Answers before and after")
    for part in (*headings, "Time and tokens", "Settings", "Device and checks", "9,000 train rows, 10 dev rows"):
        assert part in text
    assert "not finished" not in text and "damaged" not in text
    assert "0.200 [-0.200, 0.700] 20.0% 10.0% 10 2" in text  # the row after PPO
    assert "75.0% 250 of 1,000 computed in PPO" in text
    assert "computed in the tree 200 25% saved 600 75%" in text and "computed in the tree 25 50% saved 25 50%" in text
    assert "supervised training 3.0 s 15%" in text and "PPO updates 12.0 s 60%" in text
    assert "first KL 0 " in text and "sampler gap 1e-05" in text


def test_every_setting_is_there_with_its_help_and_the_changed_ones_come_first(tmp_path):
    text = page_of(make_run(tmp_path / "run", **{"ppo.lr": "0.002", "seed": "7"})).text
    for key, setting in SETTINGS.items():
        assert f"{key} " in text and setting.rule.help in text, key
    changed, same = text.split("settings with their defaults")
    assert "ppo.lr 0.002 learning rate; 0.00003 where --model is given; default: 0.001" in changed
    assert "seed 7 " in changed and "sft.lr" not in changed and f"{len(SETTINGS) - 2} " == changed[-3:]
    assert "sft.lr 0.001 " in same and "ppo.lr" not in same


def test_with_a_model_its_own_defaults_are_the_defaults(tmp_path):
    changed, _ = page_of(make_run(tmp_path / "run", model="owner/name")).text.split("settings with their defaults")
    assert "model owner/name" in changed and "ppo.lr" not in changed
    assert "All settings have their defaults." in page_of(make_run(tmp_path / "plain")).text


def test_curves_have_a_point_for_each_step(tmp_path):
    charts = page_of(make_run(tmp_path / "run")).charts()
    assert charts["Loss"] == [5] and charts["Reward"] == [8, 2] and charts["Reward by class"] == [8, 8]
    assert charts["MCC, held out"] == [2] and charts["a new metric"] == [8]
    for title in ("Accuracy", "KL to the reference", "Entropy", "Value error", "Explained variance", "Clip fraction"):
        assert charts[title] == [8], title
    assert charts["Tokens"] == [5, 5, 8, 8]  # SFT's and PPO's


def test_no_recorded_metric_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    row = lines(run / "metrics.jsonl")[-1]
    values = {key: 1000 + i for i, key in enumerate(key for key in row if key not in ("stage", "step"))}
    write_lines(run / "metrics.jsonl", [{"stage": "PPO", "step": n, **values} for n in (1, 2)])
    html = report.run_report(run)
    for key, value in values.items():
        assert f"{value:.1%}" in html or f"{value:,}" in html, key


def test_values_that_are_not_finite_are_gaps(tmp_path):
    run = make_run(tmp_path / "run")
    values = (0.1, None, float("nan"), float("inf"), 1e300, 0.2)
    rows = [{"stage": "PPO", "step": n, "kl": kl} for n, kl in enumerate(values, 1)]
    write_lines(run / "metrics.jsonl", [*rows, {"stage": "PPO", "step": 7, "entropy": None}])
    page = page_of(run)
    assert page.charts()["KL to the reference"] == [2]
    assert "Entropy of the policy, nats a token; near 0 it explores no more no values" in page.text
    assert "nan" not in page.text and "inf" not in page.text.replace("info", "")


def test_confusion_matrix_counts_every_answer(tmp_path):
    labels = Labels(["bad", "good"], ["no", "yes"])
    pairs = [(1, 1)] * 4 + [(0, 0)] * 3 + [(1, 0), (0, 1), (1, None)]
    rows = [{"label": gold, "predicted": said} for gold, said in pairs]
    assert confusion(rows, labels) == (["bad", "good"], ["bad", "good", "malformed"], [[3, 1, 0], [1, 4, 1]])
    text = page_of(make_run(tmp_path / "run")).text
    assert text.count("unacceptable acceptable malformed unacceptable 3 75% 1 25% 0 0% acceptable 1 17% 4 67% 1 17%") == 3


def test_labels_of_other_kinds(tmp_path):
    none = Labels([], [])
    rows = [{"label": gold, "predicted": said} for gold, said in (("neutral", "entailment"), ("neutral", None), (3, "neutral"))]
    assert confusion(rows, none) == (
        ["3", "entailment", "neutral"], ["3", "entailment", "neutral", "malformed"], [[0, 0, 1, 0], [0] * 4, [0, 1, 0, 1]]
    )  # fmt: skip
    assert confusion([{"label": i, "predicted": 0} for i in range(40)], none) is None  # too many
    assert confusion([{"label": [1, 2], "predicted": 1}], none) is None and confusion([], none) is None
    assert confusion([{"label": gold, "predicted": said} for gold, said in REGRESSION], none) is None
    page = page_of(make_run(tmp_path / "regression", labels=(), answers=REGRESSION))
    assert page.charts()["zero-shot"] == [3] and "1 of 4 malformed" in page.text
    assert "Given and right answers" in page.text and "Confusion matrix" not in page.text
    assert "off by 0.5" in page.text and "off by 0 " in page.text
    several = page_of(make_run(tmp_path / "several", labels=(), answers=[(["Rome", "the city"], "Rome"), (["a"], "b")])).text
    assert "Rome or the city" in several and "✓ right" in several and "✗ wrong" in several and "Confusion" not in several


def test_the_main_metric_is_what_the_run_says_else_the_one_with_an_interval():
    row = {"accuracy": 0.8, "f1": 0.7, "f1_low": 0.6, "f1_high": 0.8, "malformed": 0.0, "n": 9, "labels": 3}
    assert main_metric(row) == "f1" and main_metric(row, "accuracy") == "accuracy" and main_metric(row, "no such") == "f1"
    assert main_metric({"n": 3, "spearman": 0.5}) == "spearman" and main_metric({"n": 3, "malformed": 0.5}) is None


def test_answers_before_and_after_are_those_of_the_same_example(tmp_path):
    run = make_run(tmp_path / "run", answers=[(1, 1)] * 30)
    for stage, said in (("zero_shot", None), ("sft", 0)):
        rows = lines(run / "answers" / f"{stage}.jsonl")
        write_lines(run / "answers" / f"{stage}.jsonl", [row | {"answer": stage, "predicted": said} for row in rows[::-1]])
    text = page_of(run).text
    card = "right answer yes (acceptable) zero-shot zero_shot ✗ malformed after SFT sft ✗ wrong after PPO plain ✓ right"
    assert text.count(card) == 12 and "dev:1 " in text and "dev:28 " in text  # spread over the data set
    assert text.count("PPO iteration 1 sentence plain reward none right answer yes (acceptable) sampled plain reward -2") == 1


def test_the_page_is_the_same_every_time(tmp_path):
    run = make_run(tmp_path / "run", text=HOSTILE[0])
    assert report.run_report(run) == report.run_report(run)


# -- what others wrote -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_no_text_comes_alive(tmp_path, text):
    name = re.sub(r"\s", "_", text).replace("\x00", "0").encode("ascii", "replace").decode()[:200]  # of a task: no blanks
    run = make_run(tmp_path / "run", text=text, labels=(text, "b" + text), **{"sample.stop": json.dumps([text]), "task": name})
    for path in (run / "summary.json", run / "setup.json"):
        held = json.loads(path.read_text())
        for row in held.get("stages", {}).values():
            row[text] = 0.5
        path.write_text(json.dumps(held | {"seconds": {text: 1.0}, "versions": {text: text}}))
    rows = lines(run / "metrics.jsonl")
    write_lines(run / "metrics.jsonl", [row | {text: 1.0} for row in rows] + [{"stage": text, "step": 1, text: 2.0}])
    html = report.run_report(run)
    page = Page(html)
    assert_inert(page)
    plain = Page(report.run_report(make_run(tmp_path / "plain", text="plain")))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    for char in "\x00\x07\x1b\u202e\u202c\u2066\u2069\ud800\r\t":
        assert char not in html
    if "w" * 100 not in text:
        shown = text.replace("\r", "\\r").replace("\t", "\\t").replace("\x00", "\\x00").replace("\x07", "\\x07")
        shown = re.sub("[\x1b\ud800\u202e\u202c\u2066\u2069]", lambda m: m[0].encode("unicode_escape").decode(), shown)
        assert " ".join(shown.split()) in page.text
    report.write_report(run, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes().decode("utf-8") == html


def test_long_text_is_cut_and_says_so(tmp_path):
    page = page_of(make_run(tmp_path / "run", text="w" * 5000))
    assert max(map(len, page.texts)) < 1500 and "… (4,200 more characters)" in page.text


def test_the_style_sheet_lets_no_content_widen_the_page():
    """What a browser showed: text breaks anywhere, wide tables scroll in their own box, no column is wider than the screen."""
    style = (report.blocks.Path(report.blocks.__file__).parent / "page.css").read_text()
    assert "overflow-wrap: anywhere" in style and ".scroll { overflow-x: auto; }" in style and "url(" not in style
    assert style.count("minmax(min(100%") == style.count("auto-fill") + style.count("auto-fit")
    assert "@import" not in style and "</" not in style and "prefers-color-scheme: dark" in style


# -- runs that are going on, cut off or damaged ------------------------------------------------------------------------


def unfinished(tmp_path):
    run = make_run(tmp_path / "run")
    results = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    (run / "answers" / "ppo.jsonl").unlink()
    del results["stages"]["ppo"]
    (run / "checkpoints" / "000003").mkdir(parents=True)
    state = {"state": results | {"stage": "ppo", "step": 6}}
    (run / "checkpoints" / "000003" / "state.json").write_text(json.dumps(state))
    return run


def test_unfinished_run(tmp_path):
    run = unfinished(tmp_path)
    page = page_of(run)
    assert_inert(page)
    assert "plain not finished run run" in page.text and f"fastppo train --resume {run}" in page.text
    assert "Its last checkpoint stands in stage ppo after step 6." in page.text
    assert "after SFT 0.100 [-0.200, 0.700]" in page.text and "after PPO" not in page.text
    assert page.charts()["Reward"] == [8, 2] and "device cpu" in page.text and "damaged" not in page.text


def test_a_padded_run_saves_no_tokens_while_it_goes_on_either(tmp_path):
    run = unfinished(tmp_path)
    assert "tokens saved 75.0%" in page_of(run).text
    setup = json.loads((run / "setup.json").read_text())
    (run / "setup.json").write_text(json.dumps(setup | {"packed": False}))
    text = page_of(run).text
    assert "saved" not in text and "computed, padded" in text


def test_newest_checkpoint_that_can_be_read(tmp_path):
    run = unfinished(tmp_path)
    for name, content in (("000004", "{"), ("000005", '{"state": 3}'), ("000006", "")):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "state.json").write_text(content)
    assert "stands in stage ppo after step 6" in page_of(run).text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    config.save(load_config({"ppo.lr": "0.5"}), tmp_path / "run" / "config.yaml")
    text = page_of(tmp_path / "run").text
    assert "not finished" in text and "ppo.lr 0.5 " in text and "Learning curves" not in text
    assert "metrics.jsonl is missing." in text and "setup.json is missing." in text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null\n", b"[" * 99_999, b'{"a": NaN}\n{"b": 3}\n']
)
@pytest.mark.parametrize(
    "name", ["config.yaml", "setup.json", "summary.json", "metrics.jsonl", "samples.jsonl", "answers/ppo.jsonl"]
)
def test_damaged_file(tmp_path, name, content):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    if name == "setup.json":  # which the summary repeats
        (run / "summary.json").unlink()
    page = page_of(run)
    assert_inert(page)
    if name == "config.yaml":
        assert ("The settings cannot be shown: " in page.text) == (content not in (b"", b"null\n"))
    elif content != b"" and not content.startswith(b'{"a"'):
        assert f"{name} is damaged" in page.text or f"{name} ends in the middle of a line" in page.text
    if name != "metrics.jsonl":
        assert page.charts()["Reward"] == [8, 2]


@pytest.mark.parametrize("wrong", [None, 3, "text", [], {}, [[]], {"a": {"b": []}}, True, -1e400])
def test_values_of_any_type(tmp_path, wrong):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "answers/ppo.jsonl"):
        rows = lines(run / name)
        write_lines(run / name, [*rows, *(rows[-1] | {key: wrong} for key in rows[-1])])
    assert_inert(page_of(run))
    held = json.loads((run / "summary.json").read_text())
    for key in held:
        (run / "summary.json").write_text(json.dumps(held | {key: wrong}))
        assert_inert(page_of(run))


def test_a_task_that_nobody_knows_is_said_and_the_rest_shown(tmp_path):
    page = page_of(make_run(tmp_path / "run", task="colla"))
    assert "config.yaml: task 'colla' is not known" in page.text and "damaged" not in page.text
    assert page.charts()["Reward"] == [8, 2] and "task colla " in page.text


@pytest.mark.parametrize("name", ["setup.json", "answers/sft.jsonl", "metrics.jsonl", "summary.json"])
def test_an_empty_file_is_said(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).write_text("")
    assert f"{name} is empty." in page_of(run).text


@pytest.mark.parametrize(
    "line",
    ['{"stage": "PPO", "step": 9, "reward": "0.5"}', '{"stage": 3, "step": 9}', '{"step": 9, "reward": 1}', '{"reward": 1}',
     '{"stage": "PPO", "step": null}', '{"stage": "PPO", "step": 9, "reward": [1]}', "garbage", "{}"],
)  # fmt: skip
def test_a_garbage_line_is_said_and_the_others_shown(tmp_path, line):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    page = page_of(run)
    assert "metrics.jsonl is damaged: line 14 is left out." in page.text and page.charts()["Reward"] == [8, 2]


def test_what_a_summary_lacks_is_said_and_the_rest_shown(tmp_path):
    run = make_run(tmp_path / "run")
    held = json.loads((run / "summary.json").read_text())
    held["stages"]["ppo"]["mcc"] = held["seconds"] = held["stages"]["sft"] = None
    (run / "summary.json").write_text(json.dumps(held | {"first_kl": None}))
    page = page_of(run)
    assert "summary.json is damaged: it has no usable seconds, stages.sft, stages.ppo.mcc." in page.text
    assert "20.0% 10.0% 10 2" in page.text and "first KL" not in page.text and page.text.count("damaged") == 1


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_finished_run_without_its_summary_says_what_to_do(tmp_path, content):
    run = unfinished(tmp_path)
    (run / "checkpoints" / "000003" / "state.json").write_text(json.dumps({"state": {"stage": "done", "step": 0}}))
    if content is not None:
        (run / "summary.json").write_text(content)
    text = page_of(run).text
    assert "This run is finished, but has no summary" in text and f"fastppo train --resume {run} writes it again." in text
    assert "plain damaged run run" in text and "Go on with" not in text
    assert content is None or f"summary.json is {'damaged' if content else 'empty'}." in text


def test_damaged_lines_are_counted_and_the_others_shown(tmp_path):
    run = make_run(tmp_path / "run")
    content = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*content[:6], "{", "[]", *content[6:], '{"stage": "PP']))
    page = page_of(run)
    assert "metrics.jsonl is damaged: 2 lines, the first of them line 7, are left out." in page.text
    assert "metrics.jsonl ends in the middle of a line, which is left out." in page.text
    assert page.charts()["Reward"] == [8, 2]


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # again over the old one
        assert cli.main(["report", "run"]) == 0
        assert capsys.readouterr() == ("wrote run/report.html\n", "")
    assert (run / "report.html").read_text() == report.run_report(run)
    assert cli.main(["report", "run", "--to", "my [b]report.html"]) == 0
    assert capsys.readouterr().out == "wrote my [b]report.html\n"
    assert (tmp_path / "my [b]report.html").read_bytes() == (run / "report.html").read_bytes()


def test_what_stands_above_the_page_is_said_on_the_console_too(tmp_path, capsys):
    run = make_run(tmp_path / "run", task="colla")
    (run / "setup.json").write_text("")
    assert cli.main(["report", str(run)]) == 0
    said, notes = capsys.readouterr().out.splitlines(), page_of(run).text
    assert said[0] == f"wrote {run / 'report.html'}" and said[1].startswith("config.yaml: task 'colla' is not known")
    assert said[2:] == ["setup.json is empty."] and all(line in notes for line in said[1:])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("report none", "run folder none: no such folder"),
        ("report .", "run folder .: has no config.yaml, so no run began there"),
        ("report run --to run/config.yaml", "--to: run/config.yaml is not allowed; expected a name that ends in .html"),
        ("report run --to none/a.html", "cannot write none/a.html: No such file or directory"),
        ("report run --to folder.html", "cannot write folder.html: Is a directory"),
        ("report", "the following arguments are required: RUN"),
        ("report run --too x", "report: unknown flag --too"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, line, expected):
    run = make_run(tmp_path / "run")
    (tmp_path / "folder.html").mkdir()
    monkeypatch.chdir(tmp_path)
    before = (run / "config.yaml").read_bytes()
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastppo: error: ") and expected in err and err.count("\n") == 1
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        report.run_report(tmp_path / "gone")


def test_training_writes_it_and_a_finished_run_gets_it_again(world, tmp_path):
    run = tmp_path / "run"
    summary, shown = world.train(run)
    assert f"wrote {run}; open {run / 'report.html'} in a browser" in shown
    written = (run / "report.html").read_bytes()
    page = Page(written.decode())
    assert_inert(page)
    assert page.charts()["Loss"] == [6] and page.charts()["Reward"] == [4, 2] and page.charts()["Reward by class"] == [4, 4]
    assert "not finished" not in page.text and "missing" not in page.text and "damaged" not in page.text
    labels = Labels.of(summary)
    for stage, row in summary["stages"].items():
        _, columns, counts = confusion(lines(run / "answers" / f"{stage}.jsonl"), labels)
        assert sum(map(sum, counts)) == row["n"] and columns[-1] == "malformed"
        assert sum(line[-1] for line in counts) == row["malformed"] * row["n"]
        assert counts[0][0] + counts[1][1] == pytest.approx(row["accuracy"] * row["n"])
    # A run killed before its report was written.
    moved = shutil.copytree(run, tmp_path / "copy" / "run")
    (moved / "report.html").unlink()
    trainer.resume(moved, {}, quiet_console())
    assert (moved / "report.html").read_bytes() == written
    # One whose summary or set-up was damaged: what the page says to do mends it.
    for name in ("summary.json", "setup.json"):
        whole = (moved / name).read_bytes()
        for content in (b"", whole[:100]):
            (moved / name).write_bytes(content)
            console = quiet_console()
            trainer.resume(moved, {}, console)
            assert "nothing to do" not in console.file.getvalue()
            assert (moved / name).read_bytes() == whole and (moved / "report.html").read_bytes() == written
    console = quiet_console()
    trainer.resume(moved, {}, console)
    assert "is finished already, nothing to do" in console.file.getvalue()
