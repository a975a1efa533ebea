"""The worked examples of docs/own-task.md and README.md run as they stand there: files are written, commands are run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from small import REPO, call

from fastppo import cli
from fastppo.tasks import get_task, load_data

BLOCK = re.compile(r"^<!-- (?:file: (?P<file>\S+)|(?P<run>run)) -->\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(page: str) -> dict[str, list[tuple[str, str]]]:
    """By the name of the task's file: (file or "", text) of the blocks of its example, in their order."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for block in BLOCK.finditer((REPO / page).read_text()):
        if block["file"] and not block["file"].endswith(".jsonl"):
            name = block["file"]
        found.setdefault(name, []).append((block["file"] or "", block["text"]))
    return found


EXAMPLES = [
    pytest.param(blocks, name, id=f"{page}:{name}") for page in ("docs/own-task.md",) for name, blocks in steps(page).items()
]


@pytest.mark.parametrize(("blocks", "name"), EXAMPLES)
def test_example(blocks: list[tuple[str, str]], name: str, tmp_path: Path) -> None:
    commands = 0
    for file, text in blocks:
        if file:
            (tmp_path / file).write_text(text)
        for line in [] if file else text.splitlines():
            program, *argv = shlex.split(line, comments=True)
            assert program == "fastppo"
            code, _, err = call(argv, tmp_path / f"out{commands}", cwd=tmp_path)
            assert code == 0, err
            commands += 1
    task = name.partition(".")[0]
    summary = json.loads((tmp_path / "runs" / task / "summary.json").read_text())
    assert commands >= 2 and summary["task"] == task and list(summary["stages"]) == ["zero_shot", "sft", "ppo"]
    assert (summary["data"]["train"], summary["data"]["dev"]) == (7, 1)


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    """What its files say, and that its command is understood; trained is on the page."""
    (file, text), (rows, data), (_, command) = steps("README.md")["tickets.yaml"]
    (tmp_path / file).write_text(text)
    (tmp_path / rows).write_text(data)
    found = load_data(get_task(str(tmp_path / file)), str(tmp_path / rows))
    assert sorted(str(example.label) for example in (*found.train, *found.dev)) == ["0", "1", "2"]
    args = cli._parse(shlex.split(command)[1:])
    assert (args.task, args.data) == (file, rows)


def test_both_examples_are_found() -> None:
    assert list(steps("docs/own-task.md")) == ["tickets.yaml", "triage.py"]
