"""Runs and studies of tasks from files, alone and beside built-in ones."""

import json

import pytest
from small import call, quiet_console

from fastppo import cli
from fastppo.errors import UserError
from fastppo.evaluate import evaluate_run
from fastppo.tasks import get_tasks
from fastppo.tasks.own import whole_name

YAML = """\
template: "Which team? Message: {text}\\nTeam:"
answers: [yes, no]
"""
PYTHON = """\
from fastppo.tasks import Task
TASK = Task(name="paid", template="{text}:", labels=["no", "yes"], reward=lambda text, label, said: 0.5)
"""


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "all").mkdir()
    (folder / "all" / "cola").symlink_to(world.data)
    (folder / "teams.yaml").write_text(YAML)
    (folder / "paid.py").write_text(PYTHON)
    for name in ("teams", "paid"):
        rows = [{"text": f"They see {i}.", "label": ("yes", "no")[i % 2]} for i in range(20)]
        (folder / "all" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def names(place):
    return f"cola,{place / 'teams.yaml'},{place / 'paid.py'}"


@pytest.fixture(scope="module")
def mixed(world, place, names):
    """A run of three tasks."""
    run = place / "run"
    _, shown = world.train(
        run, task=names, data=place / "all", sft__examples=4, ppo__iterations=1, sample__max_new_tokens=16,
        reward__preset="code",
    )
    return run, shown


def test_whose_rewards_the_preset_leaves_alone(mixed):
    said = [line for line in mixed[1].splitlines() if "--reward-preset" in line]
    assert said == ["rewards of task paid are its own: --reward-preset and its like change nothing about them"]


def test_only_the_file_that_changed_is_named(mixed, place, names):
    run = mixed[0]

    def said(name=None):
        console = quiet_console()
        evaluate_run(run, None, "dev", 2, console, name)
        return [line for line in console.file.getvalue().splitlines() if "changed since" in line]

    assert said() == []
    (place / "teams.yaml").write_text(YAML.replace("Which", "What"))
    try:
        changed = f"the task's file {place / 'teams.yaml'} changed since"
        assert said() == said(str(place / "teams.yaml"))
        assert said() == [f"{changed} the run began: what follows is of the task as it is now"]
        assert said("cola") == said(str(place / "paid.py")) == []
        code, _, err = call(["train", "--resume", str(run)], place / "call")
        assert code == 2 and err == f"fastppo: error: run folder {run}: {changed} it began; put it back\n"
    finally:
        (place / "teams.yaml").write_text(YAML)


def test_a_path_with_a_comma_is_refused_in_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "a,b"
    folder.mkdir()
    (folder / "teams.yaml").write_text(YAML)
    said = "teams.yaml: its path must hold no comma, which separates tasks; move or rename it$"
    for name in (str(folder / "teams.yaml"), "a,b/teams.yaml"):
        monkeypatch.chdir(tmp_path)
        for use in (whole_name, get_tasks):
            with pytest.raises(UserError, match=said):
                use(name)
    monkeypatch.chdir(folder)
    for name in ("teams.yaml", "cola, teams.yaml"):
        for use in (whole_name, get_tasks):
            with pytest.raises(UserError, match=said):
                use(name)


def test_a_study_knows_before_it_begins_that_a_task_has_no_tagged_prompt(place, world, capsys):
    argv = ["study", "--tasks", f"cola,{place / 'teams.yaml'}", "--methods", "zero-shot", "--data", str(place / "all"),
            "--model", str(world.model), "--template", "tagged", "--out", str(place / "tagged")]  # fmt: skip
    assert cli.main(argv) == 2 and not (place / "tagged").exists()
    assert "--template: tagged is not allowed with task teams" in capsys.readouterr().err


def test_a_diagnostic_set_is_not_planned(capsys):
    assert cli.main(["plan", "--task", "axb"]) == 2
    assert "task axb is a diagnostic set without a train split" in capsys.readouterr().err
