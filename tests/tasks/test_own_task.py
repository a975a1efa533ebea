"""Tasks from files: what they may say, and one line for everything that is wrong with one."""

import os

import pytest

from fastppo.errors import UserError
from fastppo.tasks import TASKS, get_task, get_task_to_train, load_data
from fastppo.tasks.own import whole_name

YAML = """\
template: |
  Which team answers?

  Message: {text}
  Team:
tagged: |
  Which team answers?

  {text}
  <answer>
answers: {billing: [invoices, 1], Bug: 2, no: }
metrics: [macro_f1, accuracy]
aliases: {label: [topic, Team], text: body}
"""
PYTHON = """\
from fastppo.tasks import Task

def parse(text):
    return text.split()[-1].strip(".") if "?" not in text else None

def reward(text, label, said):
    return 2.5 if said == label else -1

TASK = Task(name="mine", template="{text}:", tagged="{text} <answer>", labels=["no", "yes"], parser=parse, reward=reward)
"""


def written(folder, text, name="mine.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def fails(path, *parts, template="short"):
    with pytest.raises(UserError) as caught:
        get_task(path, template)
    message = str(caught.value)
    assert message.isprintable(), message
    for part in (os.path.basename(path), *parts):
        assert part in message, message


def test_a_yaml_file(tmp_path):
    task = get_task(written(tmp_path, YAML))
    assert (task.name, task.slots, task.labels) == ("mine", ("text",), ("billing", "Bug", "no"))
    assert task.metrics == ("macro_f1", "accuracy")
    assert task.template == "Which team answers?\n\nMessage: {text}\nTeam:"
    assert [task.label_id(value) for value in (1, "Invoices", "bug", 2, "no", 0)] == [0, 0, 1, 1, 2, None]
    assert get_task(written(tmp_path, YAML), "tagged").closing == "</answer>"
    (tmp_path / "rows.csv").write_text("Body,TEAM\nNo money.,1\nIt fails.,bug\n")
    data = load_data(task, str(tmp_path / "rows.csv"))
    assert {example.label for example in (*data.train, *data.dev)} == {0, 1}


def test_toml_says_the_same(tmp_path):
    text = 'template = "{text}:"\nname = "other"\nanswers = {no = false, yes = [true, 1]}\nslots = ["text"]\n'
    task = get_task(written(tmp_path, text, "t.toml"))
    assert task.name == "other" and [task.label_id(value) for value in (False, True, 1, 0)] == [0, 1, 1, None]


def test_yes_and_no_in_yaml_are_words(tmp_path):
    assert get_task(written(tmp_path, "template: '{x}'\nanswers: [no, yes]")).labels == ("no", "yes")
    assert get_task(written(tmp_path, "template: '{x}'\nanswers: [1, 2, 3]")).label_id(3) == 2


def test_numbers_as_answers(tmp_path):
    task = get_task(written(tmp_path, "template: 'How good is {x}?'\nanswers: -1 to 2.5"))
    assert task.span == (-1.0, 2.5) and task.metrics == ("spearman", "pearson") and task.parse("-0.5") == -0.5


def test_slots_that_are_named_leave_other_braces_alone(tmp_path):
    assert get_task(written(tmp_path, "template: '{x} \\boxed{y}'\nslots: x\nanswers: [a, b]")).slots == ("x",)


def test_data_beside_the_file_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n{"text": "b", "label": 1}\n')
    path = written(tmp_path, YAML + "data: rows.jsonl\n")
    monkeypatch.chdir("/")
    assert load_data(get_task(path)).origin == "file"
    with pytest.raises(UserError, match="^data 'gone.jsonl' is missing"):
        load_data(get_task(written(tmp_path, YAML + "data: gone.jsonl\n")))
    with pytest.raises(UserError, match="^task mine has no built-in data: give --data"):
        load_data(get_task(written(tmp_path, YAML)))


def test_a_slot_that_the_data_lacks(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"txt": "a", "label": "no"}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: malformed row: no field 'text': need 'text' and 'label', found 'txt"):
        load_data(get_task(written(tmp_path, YAML)), str(tmp_path / "rows.jsonl"))


OK = "template: '{text}'\nanswers: [a, b]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "template: is missing"),
        ("answers: [a, b]", "template: is missing"),
        ("template: ''\nanswers: [a, b]", "template: is missing"),
        ("template: '{text}'", "answers: is missing"),
        (OK + "metric: mcc", "unknown field 'metric'; did you mean metrics?"),
        (OK + "name: [x]", "name: ['x'] is not allowed; expected a text"),
        (OK + "name: ../../evil", "name: '../../evil' is not allowed; expected at most 64 letters"),
        (OK + "name: ..", "name: '..' is not allowed"),
        (OK + "name: a/b", "name: 'a/b' is not allowed"),
        (OK + "name: 'a,b'", "name: 'a,b' is not allowed"),
        (OK + "name: 'a|b'", "name: 'a|b' is not allowed"),
        (OK + f"name: {'x' * 65}", "is not allowed; expected at most 64"),
        (OK + "name: COLA", "name: 'COLA' is the name of a built-in task; choose another"),
        ("template: text\nanswers: [a, b]", "template: has no slot"),
        ("template: '{label}'\nanswers: [a, b]", "slots: {label} is not allowed"),
        ("template: '{answer}'\nanswers: [a, b]", "slots: {answer} is not allowed, a run's records use that name"),
        (OK + "slots: [text, title]", "template: lacks the slot {title}"),
        (OK + "tagged: '{text}'", "tagged: ends with '{text}'; expected <answer> at its end"),
        (OK + "tagged: 'Say: <answer>'", "tagged: lacks the slot {text}"),
        (OK + "tagged: '{text} {title} <answer>'", "template: lacks the slot {title}"),
        ("template: '{text}'\nanswers: [a]", "answers: 1 given; expected at least two"),
        ("template: '{text}'\nanswers: a", "answers: 'a' is not allowed; expected a list of words, or a range such as 0 to 5"),
        ("template: '{text}'\nanswers: 5 to 0", "answers: '5 to 0' is not allowed; the lowest number comes first"),
        ("template: '{text}'\nanswers: [a, ' ']", "answers: '' is blank"),
        ("template: '{text}'\nanswers: [Yes, no, yes]", "answers: 'Yes' and 'yes' are alike"),
        ("template: '{text}'\nanswers: [yes., no]", "answers: ' yes.', which is taught as an answer, is read as no answer"),
        ("template: '{text}'\nanswers: {a: b, b: a}", "answers: 'a' stands for 'a' and for 'b'"),
        ("template: '{text}'\nanswers: {a: 1, b: 1}", "answers: '1' stands for 'a' and for 'b'"),
        ("template: '{text}'\nanswers: {a: [x, ' '], b: }", "answers: 'a' has a blank name"),
        ("template: '{text}'\nanswers: [[a], b]", "answers: ['a'] is not allowed; expected a text"),
        (OK + "metrics: acc", "metrics: 'acc' is not known; choose from mcc, accuracy, f1, macro_f1"),
        (OK + "metrics: [accuracy, spearman]", "metrics: 'spearman' is of numbers, answers are words; choose from mcc"),
        (OK + "metrics: em", "metrics: 'em' is of rows that are scored together"),
        (OK + "metrics: accuracy_matched", "metrics: 'accuracy_matched' is of the section matched"),
        ("template: '{text}'\nanswers: [a, b, c]\nmetrics: f1", "metrics: 'f1' is of two answers, here are 3"),
        ("template: '{text}'\nanswers: 0 to 1\nmetrics: mcc", "metrics: 'mcc' is of words, answers are numbers"),
        (OK + "aliases: text", "aliases: 'text' is not allowed; expected column: name in the data"),
        (OK + "aliases: {title: t}", "aliases: 'title' is no column; expected any of text, label"),
        (OK + "aliases: {text: Row, label: row}", "aliases: 'row' is the column of 'text' and of 'label'"),
        (OK + "data: built-in", "data: the built-in corpus has two labels and the slot {sentence}"),
        (OK + "answers: [c, d]", "line 3: 'answers' stands here twice"),
        ("- a", "expected settings by name, not list"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
    ],
)
def test_mistakes_in_a_yaml_file_are_one_line(tmp_path, text, said):
    fails(written(tmp_path, text), f"task file {tmp_path}", said)


def test_a_file_whose_name_names_no_task(tmp_path):
    fails(written(tmp_path, OK, "my task.yaml"), "name: is missing, and the file's own is none")
    assert get_task(written(tmp_path, OK + "name: my-task", "my task.yaml")).name == "my-task"


def test_a_task_without_a_tagged_prompt(tmp_path):
    with pytest.raises(UserError, match="^--template: tagged is not allowed with task mine, which has no tagged prompt$"):
        get_task(written(tmp_path, OK), "tagged")


def test_files_that_cannot_be_read(tmp_path):
    fails(str(tmp_path / "gone.yaml"), "is missing, there is no such file")
    (tmp_path / "folder.py").mkdir()
    fails(str(tmp_path / "folder.py"), "is no file")
    (tmp_path / "latin.yaml").write_bytes(b"template: '\xff'")
    fails(str(tmp_path / "latin.yaml"), "is not UTF-8 text")
    with pytest.raises(UserError, match=r"task 'nope' is not known: choose from .*, or give a file that ends in .py, .yaml"):
        get_task("nope")


def test_a_python_file(tmp_path):
    task = get_task(written(tmp_path, PYTHON, "t.py"))
    assert (task.name, task.labels, task.parse("It is yes."), task.parse("yes?")) == ("mine", ("no", "yes"), 1, None)
    assert [task.worth("", 1, said) for said in (1, 0, None)] == [2.5, -1.0, -1.0]
    tagged = get_task(written(tmp_path, PYTHON, "t.py"), "tagged")
    assert tagged.parse("no, yes</answer> no") == 1 and tagged.parse("yes") is None


def test_a_python_file_may_change_a_built_in_task(tmp_path):
    head = "from dataclasses import replace\nfrom fastppo.tasks import TASKS\n"
    path = written(tmp_path, head + "TASK = replace(TASKS['cola'], name='mine', reward=len)", "t.py")
    assert len(load_data(get_task(path, "tagged")).dev) == 1000


def test_a_python_file_is_run_once_for_what_it_holds(tmp_path):
    counting = f"open({str(tmp_path / 'log')!r}, 'a').write('.')\n"
    path = written(tmp_path, counting + PYTHON, "t.py")
    first = get_task(path)
    assert get_task(path) == first == get_task_to_train(path) and (tmp_path / "log").read_text() == "."
    assert get_task(written(tmp_path, counting + "\n" + PYTHON, "t.py")).source != first.source
    assert (tmp_path / "log").read_text() == ".."


HEAD = "from fastppo.tasks import Task\n"


def with_task(**fields):
    given = {"name": "'mine'", "template": "'{text}'", "labels": "['a', 'b']", **fields}
    return HEAD + f"TASK = Task({', '.join(f'{name}={text}' for name, text in given.items() if text)})\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "defines no TASK; expected TASK = Task(...), with from fastppo.tasks import Task"),
        ("TASK = 3", "TASK is 3; expected TASK = Task"),
        (HEAD + "class Mine(Task): pass\nTASK = Mine(name='a', template='{x}', labels=('a', 'b'))", "TASK is"),
        ("x = 1\ny = (", "t.py, line 2: SyntaxError: '(' was never closed"),
        ("\nimport no_such_module", "t.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f():\n    1 / 0\nf()", "t.py, line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(0)", "t.py, line 2: SystemExit: 0"),
        (with_task(template=""), "t.py, line 2: TypeError: Task.__init__() missing 1 required"),
        (with_task(foo="1"), "unexpected keyword argument 'foo'"),
        (with_task(labels="'yes'"), "labels: 'yes' is not allowed; expected a list of texts"),
        (with_task(labels="[1, 2]"), "labels: [1, 2] is not allowed; expected a list of texts"),
        (with_task(template="None"), "template: None is not allowed; expected a text"),
        (with_task(slots="'text'"), "slots: 'text' is not allowed; expected a list of texts"),
        (with_task(metrics="'mcc'"), "metrics: 'mcc' is not allowed; expected a list of texts"),
        (with_task(aliases="{'text': 'body'}"), "aliases: {'text': 'body'} is not allowed; expected lists of texts by name"),
        (with_task(reward="1"), "reward: 1 is not allowed; expected a function"),
        (with_task(label_names="['x']"), "label_names: 1 given; expected one for each of the 2 labels"),
        (with_task(label_aliases="[['x']]"), "label_aliases: 1 given"),
        (with_task(label_aliases="['x', 'y']"), "label_aliases: ['x', 'y'] is not allowed"),
        (with_task(labels="[' a', 'b']"), "labels: ' a' is not allowed; white space is around it"),
        (with_task(span="(0, 1)"), "span: is not allowed with labels"),
        (with_task(labels="", span="(1, 0)"), "span: (1, 0) is not allowed; expected the lowest and the highest number"),
        (with_task(labels="", span="'05'"), "span: '05' is not allowed"),
        (with_task(labels=""), "labels: 0 given; expected at least two"),
        (with_task(hub="'glue'"), "hub: 'glue' is not allowed; expected the data set's name and configuration"),
        (with_task(data="3"), "data: 3 is not allowed"),
        (with_task(tsv_extra="'1'"), "tsv_extra: '1' is not allowed"),
        (with_task(parser="lambda text: None"), "parser: ' a', which is taught as an answer, is read as no answer"),
        (with_task(parser="lambda text: 'b'"), "parser: ' a', which is taught as an answer, is read as 'b'"),
        (with_task(parser="lambda text: 'c'"), "parser for ' a': returned 'c'; expected 'a', 'b', or None"),
        (with_task(parser="lambda text: text[9]"), "t.py, line 2: parser for ' a': IndexError: string index out of range"),
        (with_task(labels="", span="(0, 1)", parser="lambda text: 'x'"), "parser for ' 0.0': returned 'x'; expected a number"),
    ],
)
def test_mistakes_in_a_python_file_are_one_line(tmp_path, text, said):
    fails(written(tmp_path, text, "t.py"), f"task file {tmp_path}", said)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("lambda text, label: 1", "reward for 'hm': TypeError: "),
        ("lambda text, label, said: None", "t.py: reward for 'hm': returned None; expected a number"),
        ("lambda text, label, said: float('inf')", "returned inf; expected a finite number"),
        ("lambda text, label, said: {}[label]", "t.py, line 2: reward for 'hm': KeyError: 'b'"),
    ],
)
def test_mistakes_of_an_own_reward_are_one_line(tmp_path, reward, said):
    task = get_task(written(tmp_path, with_task(reward=reward), "t.py"))
    with pytest.raises(UserError) as caught:
        task.worth("hm", 1, None)
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_own_functions_for_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"texts": ["x", "y"], "label": "a"}\n')
    good = "lambda row, number, labelled: [{'text': t, 'label': row['label'], 'group': number} for t in row['texts']]"
    task = get_task(written(tmp_path, with_task(expand=good, metrics="['em']"), "t.py"))
    with pytest.raises(UserError, match="has 1 group of rows"):
        load_data(task, str(rows))
    for function, said in (
        ("lambda row, number, labelled: row", "t.py: expand for .*: returned .*; expected a list of dicts"),
        ("lambda row, number, labelled: row['no']", "t.py, line 2: expand for .*: KeyError: 'no'"),
        ("lambda row, number, labelled: int('x')", "rows.jsonl:1: malformed row: invalid literal"),
    ):
        with pytest.raises(UserError, match=said):
            load_data(get_task(written(tmp_path, with_task(expand=function), "t.py")), str(rows))


def test_files_are_named_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    whole = [whole_name(name) for name in ("t.py", "~/a b.yaml", "cola", "nope")]
    assert whole == [f"{tmp_path}/t.py", "/home/me/a b.yaml", "cola", "nope"]
    assert not any(name.endswith((".py", ".yaml", ".yml", ".toml")) for name in TASKS)
