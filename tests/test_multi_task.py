"""One policy for several tasks: what is mixed, whose parser, reward and metric an example has, and what a run leaves behind."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from engine import make_model
from small import World, call, kill_at, lines, outcome, ppo_steps, quiet_console
from test_task_runs import write

from fastppo import cli, report, run_data
from fastppo.batch.encode import encode_answer
from fastppo.batch.rollout import Sample
from fastppo.config import RewardConfig, load_config
from fastppo.errors import UserError
from fastppo.evaluate import LabelledPrompts, allowed_answers, check_room, encode, evaluate, evaluate_run, with_interval
from fastppo.rewards.marks import Marks
from fastppo.rollout.sampler import Sampling, generate
from fastppo.run_data import RunData, whole_passes
from fastppo.tasks import TASKS, Example, data_of, get_task, get_tasks, load_sets
from fastppo.tasks.metrics import mean_interval

NAMES = "cola,stsb,mnli"
ROOM = {"sample__max_new_tokens": 24, "ppo__iterations": 4, "sft__epochs": 1, "sft__examples": 16}


@pytest.fixture(scope="module")
def all_data(world, tmp_path_factory):
    """60 rows of CoLA, 40 of STS-B in a file of its name, 13 of MNLI."""
    folder = tmp_path_factory.mktemp("all")
    (folder / "cola").symlink_to(world.data)
    rows = write(folder / "unused", "stsb", (40, 2)) / "train.jsonl"
    rows.rename(folder / "stsb.jsonl")
    write(folder / "mnli", "mnli", (13, 9))
    return folder


@pytest.fixture(scope="module")
def mixed(world, all_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("mixed") / "run"
    summary, shown = world.train(run, task=NAMES, data=all_data, **ROOM)
    return run, summary, shown


def examples_of(name, n, labels=None):
    task = TASKS[name]
    given = labels or [i % len(task.labels) for i in range(n)]
    return [Example({slot: f"Row {i}." for slot in task.slots}, label, f"{name}:{i}") for i, label in enumerate(given)]


def data_for(model, *names, template="short"):
    parts = [encode(model, get_task(name, template), examples_of(name, 4, [0.0, 5.0] * 2 if name == "stsb" else None))
             for name in names]  # fmt: skip
    return LabelledPrompts.joined(parts)


# -- which examples ----------------------------------------------------------------------------------------------------


def test_small_tasks_are_repeated_in_whole_passes(monkeypatch):
    assert whole_passes([range(7)]) == list(range(7))
    # Beside 7 examples: of 3 it takes 3 passes to have as many, of 2 it takes 4.
    counts = Counter(whole_passes([range(7), range(7, 10), range(10, 12)]))
    assert [counts[i] for i in range(12)] == [1] * 7 + [3] * 3 + [4] * 2
    assert Counter(whole_passes([range(4), range(4, 8)])) == Counter(range(8))
    assert whole_passes([range(0), range(0)]) == []
    monkeypatch.setattr(run_data, "EVENED_UP_TO", 5)  # the largest has more than that: 5 are enough
    assert [Counter(whole_passes([range(7), range(7, 10)]))[i] for i in (0, 7)] == [1, 2]
    assert run_data.EVENED_UP_TO == 5 and len(whole_passes([range(7), range(7, 13)])) == 13


def test_a_task_is_divided_as_in_its_own_run_and_counts_are_of_each(world, all_data):
    model = make_model("llama")
    settings = world.settings(task=NAMES, data=all_data, sft__examples=10, train_examples=30, valid_examples=2)
    config = load_config(settings)
    tasks = get_tasks(NAMES, to_train=True)
    sets = load_sets(tasks, config.data, 0, of_several=True)
    assert [data.origin for data in sets] == ["folder", "file", "folder"]
    data = RunData.encoded(model, tasks, sets, config)
    for task, one in zip(tasks, sets, strict=True):
        alone = RunData.encoded(model, [task], [one], config)
        for whole, own in ((data.train, alone.train), (data.valid, alone.valid), (data.dev, alone.dev)):
            assert whole.by_task()[task.name] == own
        assert {data.train.examples[i].origin for i in data.warm if data.train.tasks[i] is task} == {
            alone.train.examples[i].origin for i in alone.warm
        }
    # 30 or, of MNLI, all 13; 2 held out of 30, 1 of 13; 10 of each for SFT.
    assert [len(part) for part in data.train.by_task().values()] == [28, 28, 12]
    assert len(data.valid) == 5 and len(data.warm) == 30
    assert len(data.sft_pass) == 30 and len(data.ppo_pass) == 28 + 28 + 3 * 12
    batches = [i for step in range(data.sft_steps) for i in data.sft_batch(step)]
    assert sorted(batches) == sorted(data.sft_pass) and batches != data.sft_pass
    steps = [data.ppo_prompts(step) for step in range(23)]  # two passes of 92, 8 an iteration
    assert Counter(i for step in steps for i in step) == {i: 2 * n for i, n in Counter(data.ppo_pass).items()}
    assert len({data.train.tasks[i].name for i in steps[0]}) > 1  # shuffled together
    assert data.labels_seen() <= len(data.train)


def test_what_the_warm_start_teaches_is_each_tasks_answer(world, all_data):
    model = make_model("llama")
    tasks, config = get_tasks(NAMES), load_config(world.settings(task=NAMES, data=all_data))
    data = RunData.encoded(model, tasks, load_sets(tasks, config.data, 0, of_several=True), config)
    for i, tokens in data.answers(model).items():
        task, example = data.train.tasks[i], data.train.examples[i]
        wanted = encode_answer(model.base.tokenizer, task.prompt(example), data.train.prompts[i], task.answer(example.label))
        assert tokens == wanted and task.parse(model.base.tokenizer.decode(tokens[:-1])) is not None


# -- rewards and scores ------------------------------------------------------------------------------------------------


def test_an_answer_is_parsed_and_rewarded_by_its_own_task():
    """The word no is class 0 of CoLA, class 1 of RTE and nothing of STS-B; metrics never mix their classes."""
    cola, rte, stsb = (TASKS[name] for name in ("cola", "rte", "stsb"))
    tasks = [cola, rte, stsb, rte, cola, stsb]
    marks = Marks(tasks, [0, 0, 2.5, 1, 1, 0.0], RewardConfig(preset="paper"))
    said = [" no", " no", " no", " no", " what", " 1.0"]
    rewards = [marks.reward(i, Sample(i, [], [], "eos", text)) for i, text in enumerate(said)]
    assert marks.predicted == [0, 1, None, 1, None, 1.0]
    assert rewards == [1.0, 0.0, -2.5, 1.0, -1.0, 1.5]
    of_tasks, of_all = marks.metrics(rewards)
    assert of_all == {"reward": 0.0, "malformed": pytest.approx(1 / 3)}
    assert of_tasks == {
        "cola": {"reward": 0.0, "malformed": 0.5, "accuracy": 0.5, "reward_class_0": 1.0, "reward_class_1": -1.0},
        "rte": {"reward": 0.5, "malformed": 0.0, "accuracy": 0.5, "reward_class_0": 0.0, "reward_class_1": 1.0},
        "stsb": {"reward": -0.5, "malformed": 0.5, "error": 1.0},
    }


@pytest.mark.parametrize("template", ["short", "tagged"])
def test_all_tasks_are_answered_at_once_as_each_is_alone(template):
    model = make_model("llama", template=template, fallback="random", sample__max_new_tokens=20)
    data = data_for(model, "rte", "stsb", "cb", template=template)
    together = evaluate(model, data)
    alone = [one for part in data.by_task().values() for one in evaluate(model, part)]
    assert together == alone and [one.task.name for one in together] == ["rte", "stsb", "cb"]


def test_the_score_is_the_mean_over_tasks():
    model = make_model("llama", sample__max_new_tokens=4)
    results = evaluate(model, data_for(model, "rte", "stsb"))
    row = with_interval(results, 0)
    assert list(row["tasks"]) == ["rte", "stsb"] and row["n"] == 8 and row["malformed"] == 1.0
    assert row["score"] == (row["tasks"]["rte"]["accuracy"] + row["tasks"]["stsb"]["spearman"]) / 2
    assert row["tasks"]["rte"] == with_interval(results[:1], 0) and "tasks" not in row["tasks"]["rte"]


def test_the_interval_of_a_mean():
    assert mean_interval([(0.5, 0.4, 0.7)]) == pytest.approx((0.4, 0.7))
    # Of two equal ones the mean's is narrower by the root of 2; of unequal ones squared distances add up.
    assert mean_interval([(0.5, 0.4, 0.6)] * 2) == pytest.approx((0.5 - 0.1 / 2**0.5, 0.5 + 0.1 / 2**0.5))
    assert mean_interval([(0.0, -0.3, 0.1), (1.0, 0.6, 1.0)]) == pytest.approx((0.5 - 0.25, 0.5 + 0.05))


def test_constrained_answers_are_those_of_each_prompts_task():
    model = make_model("llama", sample__constrained=True, sample__max_new_tokens=16)
    data = data_for(model, "cola", "mnli", "sst2")
    allowed = allowed_answers(model, data)
    assert len(set(allowed.roots)) == 3 and len(allowed.roots) == len(data)
    hot = Sampling(temperature=50.0, max_new_tokens=16, slots=16)
    rollout = generate(model, data.prompts, 8, hot, seed=0, answers=allowed.answers, roots=allowed.roots)
    said = {}
    for sample in rollout.samples:
        said.setdefault(data.tasks[sample.prompt].name, set()).add(sample.text.strip())
    assert said == {name: set(TASKS[name].labels) for name in ("cola", "mnli", "sst2")}
    assert [one.scores["malformed"] for one in evaluate(model, data)] == [0.0] * 3
    with pytest.raises(UserError, match="^--sample-constrained: answers to task stsb are numbers"):
        allowed_answers(model, data_for(model, "cola", "stsb"))


def test_too_few_tokens_for_one_of_the_tasks_names_it():
    model = make_model("llama", sample__max_new_tokens=3)
    with pytest.raises(UserError, match="too few for the answers of task mnli"):
        check_room(model, data_for(model, "cola", "mnli"))


# -- a run -------------------------------------------------------------------------------------------------------------


def test_stages_have_a_row_for_each_task(mixed):
    run, summary, shown = mixed
    assert summary["task"] == NAMES and summary["metric"] == "score"
    assert {name: one["metric"] for name, one in summary["tasks"].items()} == {
        "cola": "mcc", "stsb": "spearman", "mnli": "accuracy",
    }  # fmt: skip
    assert summary["tasks"]["mnli"]["labels"] == list(TASKS["mnli"].label_names) and summary["tasks"]["stsb"]["labels"] == []
    for row in summary["stages"].values():
        mains = [row["tasks"][name][one["metric"]] for name, one in summary["tasks"].items()]
        assert row["score"] == pytest.approx(sum(mains) / 3) and row["score_low"] <= row["score"] <= row["score_high"]
        assert {name: one["n"] for name, one in row["tasks"].items()} == {"cola": 20, "stsb": 4, "mnli": 9}
        assert row["n"] == 33
    assert [row["labels"] for row in summary["stages"].values()][:2] == [0, 16 + 16 + 12]
    for text in ("score [95 % interval]", "cola (MCC)", "stsb (Spearman)", "mnli: 12 rows for PPO, 5 times in a pass"):
        assert text in shown
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_records_name_the_task(mixed):
    run, _, _ = mixed
    steps = ppo_steps(run)
    assert all({"reward", "malformed"} <= row.keys() and "accuracy" not in row for row in steps)
    assert not any(key.startswith("reward_class") for row in steps for key in row)
    keys = {key for row in steps for key in row}
    assert {"cola/reward_class_0", "cola/accuracy", "stsb/reward", "mnli/reward_class_2"} <= keys
    assert "stsb/accuracy" not in keys and "stsb/reward_class_0" not in keys
    assert {"valid_reward", "valid_score", "cola/valid_mcc", "stsb/valid_spearman", "mnli/valid_reward"} <= steps[-1].keys()
    rewards = [steps[-1][f"{name}/valid_reward"] for name in NAMES.split(",")]
    assert steps[-1]["valid_reward"] == pytest.approx(sum(rewards) / 3)
    answers = lines(run / "answers" / "ppo.jsonl")
    assert Counter(row["task"] for row in answers) == {"cola": 20, "stsb": 4, "mnli": 9}
    assert all(set(TASKS[row["task"]].slots) <= set(row["fields"]) for row in answers)
    assert all(set(TASKS[row["task"]].slots) <= set(row["fields"]) for row in lines(run / "samples.jsonl"))


def test_eval_judges_all_or_some(mixed, all_data, capsys):
    run, summary, _ = mixed
    stored = summary["stages"]["ppo"]
    row = evaluate_run(run, None, "dev", None, quiet_console())
    assert row == {key: value for key, value in stored.items() if key != "labels"}
    assert evaluate_run(run, None, "dev", None, quiet_console(), "mnli") == stored["tasks"]["mnli"]
    assert evaluate_run(run, str(all_data / "mnli"), "dev", None, quiet_console(), "mnli") == stored["tasks"]["mnli"]
    assert evaluate_run(run, None, "train", 3, quiet_console())["n"] == 9
    assert cli.main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    for text in (f"{all_data}/cola dev: MCC ", f"{all_data}/stsb.jsonl dev: Spearman ", "3 tasks dev: score "):
        assert text in out
    with pytest.raises(UserError, match="^--task rte: is not one of the run's tasks cola,stsb,mnli; give its data"):
        evaluate_run(run, None, "dev", None, quiet_console(), "rte")


def test_the_report_has_a_part_for_each_task(mixed):
    page = report.run_report(mixed[0])
    for text in ("cola: confusion matrix", "mnli: confusion matrix", "stsb: answers before and after", "mnli: results",
                 "cola: learning curves, PPO", "stsb (Spearman)", "contradiction"):  # fmt: skip
        assert text in page, text
    shared = page[: page.index("cola: results")]
    assert "Confusion matrix" not in shared and "Reward by class" not in shared and "cola/" not in page


def test_the_report_says_what_is_damaged_of_a_task(mixed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(mixed[0], run)
    assert report.write_report(run, run / "report.html") == []
    summary = json.loads((run / "summary.json").read_text())
    summary["tasks"]["mnli"]["labels"] = None
    summary["stages"]["ppo"]["tasks"]["cola"]["mcc"] = None
    summary["stages"]["ppo"]["tasks"]["stsb"] = 3
    (run / "summary.json").write_text(json.dumps(summary))
    assert report.write_report(run, run / "report.html") == [
        "summary.json is damaged: it has no usable tasks.mnli.labels, stages.ppo.tasks.cola.mcc, stages.ppo.tasks.stsb."
    ]


def test_the_report_knows_the_tasks_of_files_by_the_set_up(mixed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(mixed[0], run)
    settings = (run / "config.yaml").read_text()
    for names, note in (
        ("/gone/colla.py,stsb,mnli", None),
        ("colla,stsb", "config.yaml: task 'colla' is not known: "),
    ):
        (run / "config.yaml").write_text(settings.replace(NAMES, names))
        notes = report.write_report(run, run / "report.html")
        assert [line[: len(note or "")] for line in notes] == ([note] if note else [])


def test_it_is_planned_and_exported(mixed, world, all_data, tmp_path, capsys):
    assert cli.main(["export", str(mixed[0]), "--to", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    words = ["plan", "--model", str(world.model), "--gpu", "a100-80", "--json", "--task"]
    longest = {}
    for names, data in ((NAMES, all_data), ("mnli", all_data / "mnli"), ("cola", all_data / "cola")):
        capsys.readouterr()
        assert cli.main([*words, names, "--data", str(data)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["notices"] == []
        longest[names] = found["prompts"]["longest"]
    assert longest[NAMES] >= longest["mnli"] > longest["cola"]


@pytest.mark.parametrize("place", [("fastppo.trainer", "sft_step", 4), ("fastppo.trainer", "ppo_iteration", 4)])
def test_it_resumes_to_the_same_bits(world, all_data, mixed, tmp_path, place):
    run = tmp_path / "run"
    code, _, _ = call(world.argv(run, task=NAMES, data=all_data, **ROOM), tmp_path / "first", kill_at, *place)
    assert code == -9
    code, _, err = call(["train", "--resume", str(run)], tmp_path / "second")
    assert code == 0, err
    assert outcome(run) == outcome(mixed[0])


def test_changed_data_of_one_task_is_seen(world, all_data, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for name in ("cola", "mnli"):
        (folder / name).symlink_to(all_data / name)
    write(folder / "rte", "rte")
    run = tmp_path / "run"
    settings = {"task": "cola,rte", "data": folder, **ROOM}
    assert call(world.argv(run, **settings), tmp_path / "first", kill_at, "fastppo.trainer", "ppo_iteration", 3)[0] == -9
    write(folder / "rte", "rte", (40, 11))
    code, _, err = call(["train", "--resume", str(run)], tmp_path / "second")
    assert code == 2 and "data, base model" in err


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "cola,axb"], "task axb is a diagnostic set without a train split: train on rte"),
        (["--task", "cola,rte,cola"], "task cola is given twice: cola,rte,cola"),
        (["--task", "cola,colla"], "task 'colla' is not known: choose from ax,"),
        (["--task", "cola,"], "task '' is not known"),
        (["--task", "cola,rte", "--data", "HERE"], "data 'HERE/cola' is missing, there is no such file or folder: of several"),
        (["--task", "cola,rte", "--data", "HERE/no"], "data 'HERE/no': there is no such file or folder; several tasks take"),
        (["--task", "cola,rte", "--data", "nyu-mll/glue"], "data 'nyu-mll/glue': there is no such file or folder; several"),
        (["--task", "cola,rte", "--data", "HERE/file.tsv"], "data 'HERE/file.tsv': is no folder; several tasks take a folder"),
    ],
)
def test_mistakes_are_one_line(words, said, world, tmp_path):
    (tmp_path / "file.tsv").touch()
    words = [word.replace("HERE", str(tmp_path)) for word in words]
    code, _, err = call(["train", "--model", str(world.model), "--out", str(tmp_path / "run"), *words], tmp_path / "call")
    assert code == 2 and err.count("\n") == 1 and not Path(tmp_path, "run").exists()
    assert err.startswith(f"fastppo: error: {said.replace('HERE', str(tmp_path))}"), err


def test_where_the_data_of_one_of_several_tasks_is(tmp_path):
    assert data_of(TASKS["cola"], None) is None and data_of(TASKS["rte"], None) == "nyu-mll/glue:rte"
    (tmp_path / "rte.csv").touch()
    assert data_of(TASKS["rte"], str(tmp_path)) == str(tmp_path / "rte.csv")
    (tmp_path / "rte").mkdir()
    assert data_of(TASKS["rte"], str(tmp_path)) == str(tmp_path / "rte")


def test_a_run_of_all_tasks_that_train(tmp_path):
    """Words and numbers, groups, pairs: all of them in one policy."""
    world = World.make(tmp_path / "world")
    names = [name for name, task in TASKS.items() if not task.train_on]
    folder = tmp_path / "all"
    folder.mkdir()
    for name in names:
        world.data.rename(folder / name) if name == "cola" else write(folder / name, name, (14, 4))
    settings = {**ROOM, "ppo__iterations": 2, "ppo__prompts": 40, "sft__examples": 2}
    summary, _ = world.train(tmp_path / "run", task=",".join(names), data=folder, **settings)
    assert list(summary["stages"]["ppo"]["tasks"]) == names and len(names) == 16
    assert all(row["sampler_gap"] < 1e-4 for row in ppo_steps(tmp_path / "run"))
