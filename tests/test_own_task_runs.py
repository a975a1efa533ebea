"""A user's own task from end to end: learned, evaluated, reported, exported, resumed from elsewhere, compared in a study."""

import json
import random

import pytest
from small import call, kill_at, lines, outcome, ppo_steps, quiet_console

from fastppo.config import load_config
from fastppo.evaluate import evaluate_run
from fastppo.trainer import train

YAML = """\
template: |
  Say how many the sentence is about, one or more.
  Answer with one word: one or many.

  Sentence: {sentence}
  About:
answers: {one: singular, many: plural}
aliases: {label: number}
data: rows.jsonl
"""
PYTHON = """\
from fastppo.tasks import Task

def reward(text, label, said):
    return 3.0 if said == label == "many" else 1.0 if said == label else -1.0

TASK = Task(
    name="number-by-reward", template="{sentence}\\n\\nAbout:", labels=("one", "many"), label_names=("singular", "plural"),
    aliases={"label": ("number",)}, reward=reward, data="rows.jsonl",
)
"""
def make_rows(n):
    """Sentences with a subject in the singular or the plural, which their verb shows too."""
    draw = random.Random(0)
    for i in range(n):
        noun, verb, rest = draw.choice(("cat", "dog", "girl", "boy", "teacher")), draw.choice(("sleep", "sing", "wait")), ""
        if draw.random() < 0.5:
            rest = " in the garden"
        words = f"the {noun} {verb}s{rest}." if i % 2 else f"the {noun}s {verb}{rest}."
        yield {"sentence": words.capitalize(), "number": "singular" if i % 2 else "plural"}


@pytest.fixture
def own(tmp_path):
    """A folder with a blank in its name, in which a task lies with its data."""
    folder = tmp_path / "my tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(300)))
    (folder / "number.yaml").write_text(YAML)
    (folder / "costs.py").write_text(PYTHON)
    return folder


def test_the_built_in_model_learns_a_task_from_a_file(own):
    values = {
        "task": str(own / "number.yaml"), "sft.examples": "80", "sft.epochs": "4", "sft.batch_size": "8",
        "ppo.iterations": "10", "ppo.prompts": "32", "valid_examples": "20",
    }  # fmt: skip
    summary = train(load_config(values), own / "run", quiet_console())
    assert summary["task"] == "number" and summary["data"]["train"] == 270 and summary["labels"] == ["singular", "plural"]
    before, taught, after = (summary["stages"][stage] for stage in ("zero_shot", "sft", "ppo"))
    assert before["accuracy"] < 0.2 and taught["accuracy"] > 0.7
    assert after["accuracy"] >= max(0.9, taught["accuracy"]) and after["malformed"] == 0
    sampled = [step["accuracy"] for step in ppo_steps(own / "run")]
    assert sum(sampled[-3:]) / 3 > sum(sampled[:3]) / 3 + 0.05
    row = evaluate_run(own / "run", None, "dev", None, quiet_console())
    assert row["accuracy"] == after["accuracy"]
    assert "<title>fastppo: number</title>" in (own / "run" / "report.html").read_text()


SMALL = {
    "data": "rows.jsonl", "train_examples": 40, "sft__examples": 16, "sft__epochs": 1, "ppo__iterations": 2,
    "sample__max_new_tokens": 12,
}  # fmt: skip


def test_a_run_goes_on_from_another_folder_and_says_if_its_file_changed_or_is_gone(world, own, tmp_path):
    for name in ("whole", "cut"):
        hook = () if name == "whole" else (kill_at, "fastppo.trainer", "ppo_iteration", 2)
        code, _, err = call(world.argv(tmp_path / name, task="./costs.py", **SMALL), tmp_path / f"{name}-out", *hook, cwd=own)
        assert code == (-9 if hook else 0), err
    code, _, err = call(["train", "--resume", str(tmp_path / "cut")], tmp_path / "again", cwd=tmp_path)
    assert code == 0, err
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    rewards = {row["reward"] for row in lines(tmp_path / "whole" / "samples.jsonl")}
    assert rewards <= {3.0, 1.0, -1.0}

    def says(folder, *argv):
        code, out, err = call([*argv], tmp_path / folder, cwd=tmp_path)
        return code, " ".join((out + err).split())

    cut, file = str(tmp_path / "cut"), own / "costs.py"
    file.write_text(PYTHON + "# another reward\n")
    code, said = says("a", "train", "--resume", cut)
    assert code == 2 and f"the task's file {file} changed since it began; put it back" in said
    code, said = says("b", "eval", cut)
    assert code == 0 and f"the task's file {file} changed since the run began" in said and "accuracy" in said
    file.unlink()
    for command in (["train", "--resume", cut], ["eval", cut]):
        code, said = says(f"c-{command[0]}", *command)
        assert code == 2 and f"task file {file}: is missing, there is no such file" in said
    assert says("d", "report", cut)[0] == 0 and says("e", "export", cut, "--to", str(tmp_path / "exported"))[0] == 0


def test_own_tasks_in_a_study(world, own, tmp_path):
    (own / "other.yaml").write_text(YAML.replace("{one: singular, many: plural}", "[plural, singular]"))
    out, words = tmp_path / "study", world.argv(tmp_path, **SMALL)[3:]
    del words[words.index("--data") : words.index("--data") + 2]
    begin = ["study", "--tasks", "./costs.py,other.yaml", "--methods", "zero-shot,ppo", "--out", str(out), *words]
    code, _, err = call(begin, tmp_path / "a", cwd=own)
    assert code == 0, err
    assert (out / "table.md").read_text().splitlines()[0] == "| method | number-by-reward (accuracy) | other (accuracy) |"
    assert (out / "cells" / "number-by-reward" / "ppo" / "seed-0" / "adapter").is_dir()
    page = (out / "report.html").read_text()
    assert page.count("Curves: ppo") == 2 and "<h2>other</h2>" in page
    (out / "cells" / "other" / "ppo" / "seed-0" / "result.json").unlink()
    code, _, err = call(["study", "--resume", str(out)], tmp_path / "b", cwd=tmp_path)
    assert code == 0, err
    (own / "other.yaml").write_text(YAML)
    code, _, err = call(["study", "--resume", str(out)], tmp_path / "c", cwd=tmp_path)
    assert code == 2 and "the file of task other changed since cells of this study were run; put it back" in err
    for tasks, said in (
        ("costs.py,./costs.py", "--tasks: one is given twice"),
        ("cola,number.yaml,again.yaml", "are both called number"),
        ("cola,nodata.yaml", "--data: is missing, task nodata has none; expected a folder that holds nodata"),
    ):
        (own / "again.yaml").write_text(YAML + "name: number\n")
        (own / "nodata.yaml").write_text(YAML.replace("data: rows.jsonl", ""))
        code, _, err = call(["study", "--tasks", tasks, "--out", str(tmp_path / "x")], tmp_path / "d", cwd=own)
        assert code == 2 and said in err
