import dataclasses
import subprocess
import sys

import pytest

from fastppo.errors import UserError
from fastppo.tasks import TASKS, Example, get_task
from fastppo.tasks.cola import COLA

PROMPT = """Decide whether a sentence is acceptable English.
A sentence is acceptable if a native speaker could say it: the word order, the agreement, the forms of the words and what each verb needs are all right.
Answer with one word: yes if the sentence is acceptable, no if it is not.

Sentence: The cat sat.
Acceptable:"""  # noqa: E501


def example(sentence: str, **fields: str) -> Example:
    return Example({"sentence": sentence, **fields}, 1, "here:1")


def test_prompt_is_the_agreed_text():
    assert COLA.prompt(example("The cat sat.")) == PROMPT


@pytest.mark.parametrize(
    "sentence",
    [
        "{sentence}",
        "{",
        "}",
        "{0}",
        "{}",
        "{sentence.__class__}",
        "%s %d",
        "$x ${y}",
        r"\1 \g<0> \n",
        "a\nb\0c\u2028",
        "",
    ],
)
def test_sentence_goes_in_literally(sentence):
    assert COLA.prompt(example(sentence)) == PROMPT.replace("The cat sat.", sentence)


def test_slots_are_filled_at_once_and_other_braces_stay():
    task = dataclasses.replace(COLA, template='{"a": {a}, {b}} {c} {a}', slots=("a", "b"))
    assert task.prompt(Example({"a": "{b}", "b": "{a}", "c": "x"}, 0, "")) == '{"a": {b}, {a}} {c} {b}'


def test_answers_follow_the_prompt_and_parse_back():
    assert [COLA.answer(label) for label in (0, 1)] == [" no", " yes"]
    assert [COLA.parse(COLA.answer(label)) for label in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("yes", 1),
        ("no", 0),
        (" yes", 1),
        ("\n No\t", 0),
        ("YES", 1),
        ("nO", 0),
        ("yes.", 1),
        (" no. \n", 0),
        ("", None),
        (" ", None),
        (".", None),
        ("yes..", None),
        ("yes .", None),
        (".yes", None),
        ("yes!", None),
        ("yes,", None),
        ("yes no", None),
        ("yesno", None),
        ("yes yes", None),
        ("yes\nno", None),
        ("yes\0", None),
        ("noyes.", None),
        ("not", None),
        ("y", None),
        ("1", None),
        ("acceptable", None),
        ("ye\u017f", None),  # long s, which case folding would turn into "yes"
        ("\uff59\uff45\uff53", None),  # full-width letters
        ("'yes'", None),
    ],
)
def test_parser(text, label):
    assert COLA.parse(text) == label


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (1, 1),
        (1.0, 1),
        (0.0, 0),
        (-0.0, 0),
        ("1", 1),
        (" 0 ", 0),
        ("1.0", 1),
        ("0.00", 0),
        ("acceptable", 1),
        ("Unacceptable", 0),
        ("yes", 1),
        ("NO", 0),
        (2, None),
        (-1, None),
        (0.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (1e300, None),
        ("2", None),
        ("", None),
        ("1.5", None),
        ("1.", None),
        ("+1", None),
        ("01", None),
        ("1e0", None),
        ("\u0661", None),  # Arabic-Indic digit one
        ("*", None),
        (None, None),
        (True, None),
        ([1], None),
        ({"label": 1}, None),
        (b"1", None),
    ],
)
def test_label_spellings_of_data_files(value, label):
    assert COLA.label_id(value) == label


def test_get_task():
    assert get_task("cola") is COLA
    with pytest.raises(UserError, match=r"task 'glou\\n' is not known: choose from .*cola"):
        get_task("glou\n")
    assert all(get_task(name).name == name for name in TASKS)


def test_importing_tasks_stays_light():
    heavy = {"torch", "transformers", "datasets", "pandas", "pyarrow", "sklearn", "scipy"}
    code = f"import sys, fastppo.tasks; print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
