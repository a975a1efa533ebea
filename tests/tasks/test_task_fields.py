"""What a `Task` makes of the fields that a user writes: defaults, spellings of labels, an own parser and reward."""

import random

import pytest

from fastppo.config import RewardConfig
from fastppo.rewards.rules import answer_reward
from fastppo.tasks import TASKS, Task


def task_of(**fields):
    return Task(**{"name": "mine", "template": "{text}:", "tagged": "{text} <answer>", "labels": ("no", "yes"), **fields})


def test_slots_names_and_metrics_follow_from_the_rest():
    task = task_of(template='{title} {"not": 1} {} {body} {title}', tagged="{title} {größe}<answer>")
    assert task.slots == ("title", "body", "größe") and task.label_names == ("no", "yes") and task.metrics == ("accuracy",)
    assert task_of(slots=("text",), template="\\boxed{yes} {text}").slots == ("text",)
    assert Task(name="n", template="{x}", span=(0, 1)).metrics == ("spearman", "pearson")


def test_case_is_kept_in_what_is_taught_and_does_not_matter_in_what_is_read():
    task = task_of(labels=("A", "Not sure"))
    assert [task.answer(label) for label in (0, 1)] == [" A", " Not sure"]
    assert task.parse("a") == 0 and task.parse(" NOT SURE.") == 1
    tagged = task.with_template("tagged")
    assert tagged.parse("well, not Sure</answer>") == 1 and tagged.guess("a or b", random.Random(0)) == 0


def test_of_two_answers_that_begin_alike_the_longer_one_is_meant():
    task = task_of(labels=("not", "not sure", "c", "c++")).with_template("tagged")
    assert [task.parse(f"{word}</answer>") for word in task.labels] == [0, 1, 2, 3]
    assert task.parse("not sure, not</answer>") is None


@pytest.mark.parametrize(
    ("value", "label"),
    [(1, 0), ("1.0", 0), (2.0, 1), ("rejected", 0), (" Accepted ", 1), ("YES", 1), (0, None), (True, None), ("", None)],
)
def test_where_names_are_numbers_bare_ids_are_names(value, label):
    task = task_of(label_names=("rejected", "Accepted"), label_aliases=(("1",), ("2",)))
    assert task.label_id(value) == label
    assert task.label_spellings() == "no, rejected, 1 or yes, Accepted, 2"


def test_ratings_as_words():
    task = task_of(labels=("0.5", "1.0", "1.5"))
    assert [task.label_id(value) for value in (0.5, "0.5", 1, 1.0, "1.0", 1.5, 2)] == [0, 0, 1, 1, 1, 2, None]


def test_numbers_below_zero_and_small_ones():
    task = Task(name="n", template="{x}", span=(-1, 1))
    assert [task.label_id(value) for value in (-1, "-0.5", 1e-05)] == [-1, -0.5, 1e-05]
    assert [task.label_id(value) for value in ("1e-05", -1.01, True, "nan")] == [None] * 4


def test_columns_are_found_in_tables_whose_names_are_searched_in_lower_case():
    assert task_of(template="{Text}", aliases={"Text": ("Body",)}).columns_of("Text") == ("Text", "Body", "text", "body")


@pytest.mark.parametrize("template", ["short", "tagged"])
def test_an_own_parser_reads_what_stands_before_the_tag(template):
    seen = []

    def parser(text):
        seen.append(text)
        return {"1": "YES", "0": 0}.get(text.strip()[-1:])

    task = task_of(parser=parser).with_template(template)
    end = task.closing and f"{task.closing} and on"
    assert [task.parse(text + end) for text in ("is 1", "0", "?")] == [1, 0, None]
    assert seen == ["is 1", "0", "?"]
    if task.closing:
        assert task.parse("is 1") is None and len(seen) == 3  # without its tag an answer is none


def test_an_own_parser_of_numbers():
    task = Task(name="n", template="{x}", span=(0, 5), parser=lambda text: {"two": 2, "9": "9", "nan": float("nan")}.get(text))
    assert [task.parse(text) for text in ("two", "9", "nan", "3")] == [2.0, 9.0, None, None]


def test_an_own_reward_gets_words_and_takes_the_place_of_the_presets():
    seen = []

    def reward(text, label, said):
        seen.append((text, label, said))
        return len(text)

    task = task_of(reward=reward)
    rewards = [answer_reward(task, 1, said, text, RewardConfig(preset="code")) for said, text in ((1, "yes"), (None, "hm"))]
    assert rewards == [3.0, 2.0] and seen == [("yes", "yes", "yes"), ("hm", "yes", None)]
    numbers = Task(name="n", template="{x}", span=(0, 5), reward=reward)
    assert answer_reward(numbers, 2.5, 0.0, "0", RewardConfig()) == 1.0 and seen[-1] == ("0", 2.5, 0.0)


def test_no_built_in_task_has_functions_of_its_own_for_answers():
    assert all((task.parser, task.reward, task.source) == (None, None, "") for task in TASKS.values())
