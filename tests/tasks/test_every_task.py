"""What holds for every task: prompts, answers and their parser, labels of data files."""

import random
import re

import pytest

from fastppo.errors import UserError
from fastppo.tasks import TASKS, Example, get_task, get_task_to_train, load_data
from fastppo.tasks.task import CLOSING, OPENING

NAMES = sorted(TASKS)
WORDS = sorted(name for name in NAMES if TASKS[name].span is None)
TAGGED = {name: get_task(name, "tagged") for name in NAMES}


def example_of(task):
    return Example({slot: f"<{slot}>" for slot in task.slots}, None, "")


def other_case(word):
    return [word, word.upper(), word.capitalize()]


def test_the_tasks_of_glue_and_superglue_are_there():
    glue = "cola sst2 mrpc qqp stsb mnli qnli rte wnli ax".split()
    assert set(NAMES) == {*glue, *"boolq cb copa multirc record wic wsc axb axg".split()}
    assert all(TASKS[name].name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_prompts(name):
    short, tagged = TASKS[name], TAGGED[name]
    for task, end in ((short, ":"), (tagged, OPENING)):
        text = task.prompt(example_of(task))
        assert text.endswith(end) and not re.search(r"\{\w+\}", text)
        for slot in task.slots:  # the instruction, which all prompts share, stands before everything else
            assert text.count(f"<{slot}>") == 1 and text.index("\n\n") < text.index(f"<{slot}>")
        for word in task.labels:
            assert re.search(rf"\b{word}\b", text.split("\n\n")[0]), word
    assert short.closing == "" and tagged.closing == CLOSING
    assert short.prompt(example_of(short)).count(OPENING) == 0 and tagged.prompt(example_of(tagged)).count(OPENING) == 2


def test_prompts_do_not_take_over_the_published_wording():
    for name in NAMES:
        for task in (TASKS[name], TAGGED[name]):
            assert not re.search(r"judge?ment|assistant|system|analysis|prompt:", task.template, re.IGNORECASE)


@pytest.mark.parametrize("name", WORDS)
def test_taught_answers_are_words_and_parse_back_in_any_case(name):
    """No raw id is ever taught, and what is taught is what is asked for and what is understood."""
    for task in (TASKS[name], TAGGED[name]):
        for label, word in enumerate(task.labels):
            assert re.fullmatch(r"[a-z]+", word) and task.answer(label).removesuffix(CLOSING).strip() == word
            for spelling in other_case(word):
                text = spelling + task.closing
                assert task.parse(text) == label and task.parse(f" {text}") == label
            assert task.parse(str(label) + task.closing) is None


def test_the_verbaliser_of_sst2_is_what_its_prompt_asks_for():
    assert [TASKS["sst2"].answer(label) for label in (0, 1)] == [" negative", " positive"]
    assert [TAGGED["sst2"].answer(label) for label in (0, 1)] == ["negative</answer>", "positive</answer>"]
    assert TASKS["sst2"].parse("no") is None and TAGGED["sst2"].parse("no</answer>") is None


def test_the_parser_of_wic_takes_what_training_rewards():
    for task, end in ((TASKS["wic"], ""), (TAGGED["wic"], CLOSING)):
        assert [task.parse(word + end) for word in ("Same", "same", "SAME", "Different", "different")] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", WORDS)
def test_short_answers_are_one_word_and_nothing_else(name):
    task = TASKS[name]
    first, second = task.labels[:2]
    several = (f"{first} {second}", f"{first} and {second}", f"{first} {first}")
    for text in ("", *several, f"not {first}", "maybe", first + CLOSING):
        assert task.parse(text) is None, text
    assert task.parse(f"\n{first}.") == 0


@pytest.mark.parametrize("name", WORDS)
def test_tagged_answers_hold_one_label_before_the_first_closing_tag(name):
    task = TAGGED[name]
    first, second = task.labels[:2]
    both = f"{first.capitalize()} and {second.capitalize()}"
    cases = [
        (f"{first}{CLOSING}", 0), (f" {second} {CLOSING}", 1), (f"It is\n{first}!{CLOSING}", 0),
        (f"{first}, {first}{CLOSING}", 0), (f"{first}{CLOSING} {second}{CLOSING}", 0), (f"{second}{CLOSING}{first}", 1),
        (first, None), (f"{first}</ answer>", None), (f"{first}<answer>", None), ("", None), (CLOSING, None),
        (f"{both}{CLOSING}", None), (f"neither{CLOSING}", None), (f"x{first}{CLOSING}", None), (f"{first}ly{CLOSING}", None),
        (f"_{first}{CLOSING}", None), (f"\u00e9{first}{CLOSING}", None),
    ]  # fmt: skip
    for text, label in cases:
        assert task.parse(text) == label, text


@pytest.mark.parametrize(
    ("text", "short", "tagged"),
    [
        ("4.5", 4.5, 4.5), (" 0 ", 0.0, 0.0), ("3.", 3.0, 3.0), ("+2.50", 2.5, 2.5), ("50", 50.0, 50.0), ("-1.5", -1.5, -1.5),
        ("about 4", None, 4.0), ("3 or 4.2", None, 4.2), ("3 or 4", None, 3.0), ("4.2 or 3.1", None, 4.2),
        ("4.2/5.0", None, 4.2), ("", None, None), ("high", None, None), (".", None, None), ("nan", None, None),
        ("inf", None, None), ("1e3", None, 1.0),
        ("\u0664", None, None), ("9" * 400, None, None),
    ],
)  # fmt: skip
def test_numbers(text, short, tagged):
    assert TASKS["stsb"].parse(text) == short
    assert TAGGED["stsb"].parse(text + CLOSING) == tagged
    assert TAGGED["stsb"].parse(text) is None


def test_numbers_are_taught_with_one_decimal():
    labels = (0.0, 2.667, 3.75, 5.0)
    assert [TASKS["stsb"].answer(label) for label in labels] == [" 0.0", " 2.7", " 3.8", " 5.0"]
    assert [TAGGED["stsb"].parse(TAGGED["stsb"].answer(label)) for label in labels] == [0.0, 2.7, 3.8, 5.0]


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0.0), (5.0, 5.0), ("2.750", 2.75), (3.2, 3.2), (" 4 ", 4.0), (5.01, None), (-0.1, None), ("-1", None), (-1, None),
     ("", None), ("nan", None), (float("nan"), None), (float("inf"), None), (True, None), (None, None), ([1], None),
     ("1e0", None)],
)  # fmt: skip
def test_numbers_of_data_files(value, label):
    assert TASKS["stsb"].label_id(value) == label


@pytest.mark.parametrize("name", WORDS)
def test_labels_of_data_files(name):
    task = TASKS[name]
    assert len(task.labels) == len(task.label_names) == len(set(task.labels)) == len(set(task.label_names))
    for label, (word, official) in enumerate(zip(task.labels, task.label_names, strict=True)):
        for value in (label, float(label), str(label), word, official, official.upper(), f" {official} "):
            assert task.label_id(value) == label
    booleans = "true" in task.label_names
    assert (task.label_id(True), task.label_id(False)) == ((1, 0) if booleans else (None, None))
    assert task.label_id(len(task.labels)) is task.label_id(-1) is task.label_id("-") is None


# The numbering of the hub's data sets, which files without names hold.
HUB_CLASSES = {
    "cola": "unacceptable acceptable", "sst2": "negative positive", "mrpc": "not_equivalent equivalent",
    "qqp": "not_duplicate duplicate", "mnli": "entailment neutral contradiction", "ax": "entailment neutral contradiction",
    "qnli": "entailment not_entailment", "rte": "entailment not_entailment", "wnli": "not_entailment entailment",
    "boolq": "false true", "cb": "entailment contradiction neutral", "copa": "choice1 choice2", "multirc": "false true",
    "wic": "false true", "wsc": "false true", "axb": "entailment not_entailment", "axg": "entailment not_entailment",
}  # fmt: skip


def test_bare_ids_mean_what_the_hub_means():
    for name, classes in HUB_CLASSES.items():
        assert list(TASKS[name].label_names) == classes.split(), name


@pytest.mark.parametrize("name", NAMES)
def test_guesses_for_answers_that_are_none(name):
    task = TAGGED[name]
    draw = random.Random(0)
    if task.span is None:
        assert task.guess(f"hm, {task.labels[1].upper()} or {task.labels[0]}", draw) == 1
        drawn = [task.guess("hm", draw) for _ in range(3000)]
        for label in range(len(task.labels)):
            assert drawn.count(label) / 3000 == pytest.approx(1 / len(task.labels), abs=0.04)
    else:
        assert task.guess("perhaps 3", draw) == 3.0
        drawn = [task.guess("hm", draw) for _ in range(3000)]
        assert min(drawn) >= 0 and max(drawn) <= 5 and sum(drawn) / 3000 == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cola"])
def test_without_data_one_line_says_what_to_give(name):
    with pytest.raises(UserError, match=rf"^task {name} has no built-in data: give --data .*{':'.join(TASKS[name].hub)}$"):
        load_data(TASKS[name])


def test_diagnostic_sets_are_not_trained_on():
    for name in NAMES:
        if name in ("ax", "axb", "axg"):
            on = {"ax": "mnli"}.get(name, "rte")
            with pytest.raises(UserError, match=f"{name} is a diagnostic set .* train on {on}, then fastppo eval RUN --task"):
                get_task_to_train(name)
        else:
            assert get_task_to_train(name, "tagged") == TAGGED[name]
