import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import logging as hub_logging

from fastppo.errors import Interrupted, UserError
from fastppo.tasks import load_data
from fastppo.tasks.cola import COLA

ROWS = "x\t1\t\tIt howls.\nx\t0\t*\tIt howl.\n"
WITH_HEADER = "sentence\tlabel\nIt howls.\t1\nIt howl.\t0\n"
CSV = "label,sentence\n1,It howls.\n0,It howl.\n"
JSONL = '{"sentence": "It howls.", "label": 1}\n{"sentence": "It howl.", "label": 0}\n'


def labelled(examples):
    return [(example.fields["sentence"], example.label) for example in examples]


def fails(data, *parts):
    with pytest.raises(UserError) as caught:
        load_data(COLA, data)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable()
    for part in parts:
        assert part in message, message


# Folders


def test_real_cola(shared_data):
    data = load_data(COLA, str(shared_data / "cola"))
    name = str(shared_data / "cola")
    assert data.summary() == {"name": name, "origin": "folder", "train": 8551, "dev": 1043, "note": ""}
    assert Counter(e.label for e in data.train) == {1: 6023, 0: 2528}
    assert Counter(e.label for e in data.dev) == {1: 721, 0: 322}
    assert labelled([data.train[0]]) == [("Our friends won't buy this analysis, let alone the next one we propose.", 1)]
    assert (data.train[-1].origin, data.dev[-1].origin) == ("train.tsv:8551", "dev.tsv:1043")
    assert sum('"' in e.fields["sentence"] for e in data.train) == 2


def test_real_cola_test_file_has_no_labels(shared_data):
    fails(str(shared_data / "cola" / "test.tsv"), "test.tsv:1: no column 'label' (an unlabelled test file?)")


@pytest.mark.parametrize(
    ("train", "dev"),
    [
        (("train.tsv", ROWS), ("dev.tsv", ROWS)),
        (("train.tsv", WITH_HEADER), ("validation.csv", CSV)),
        (("train.jsonl", JSONL), ("val.jsonl", JSONL)),
        (("train.csv", CSV), ("dev.tsv", ROWS)),
    ],
)
def test_folder(tmp_path, train, dev):
    (tmp_path / train[0]).write_text(train[1])
    (tmp_path / dev[0]).write_text(dev[1])
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tIt.\n")
    (tmp_path / "README").write_text("x")
    data = load_data(COLA, str(tmp_path))
    assert labelled(data.train) == labelled(data.dev) == [("It howls.", 1), ("It howl.", 0)]
    assert data.train[0].origin.startswith(train[0]) and data.dev[0].origin.startswith(dev[0])
    assert (data.origin, data.name, data.note) == ("folder", str(tmp_path), "")


def test_folder_as_the_hub_stores_it(tmp_path):
    for part, (sentence, label) in enumerate([("It howls.", 1), ("It howl.", 0)]):
        table = pa.table({"sentence": [sentence], "label": [label], "idx": [part]})
        pq.write_table(table, tmp_path / f"train-0000{part}-of-00002.parquet")
    pq.write_table(table, tmp_path / "validation-00000-of-00001.parquet")
    pq.write_table(pa.table({"sentence": ["x"], "label": [-1]}), tmp_path / "test-00000-of-00001.parquet")
    data = load_data(COLA, str(tmp_path))
    assert labelled(data.train) == [("It howls.", 1), ("It howl.", 0)]
    assert labelled(data.dev) == [("It howl.", 0)]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    fails(str(tmp_path), str(tmp_path), "parts of the train split", "train-00001-of-00002.parquet")


def test_relative_and_home_folders(tmp_path, monkeypatch):
    folder = tmp_path / "my.data set"
    folder.mkdir()
    (folder / "train.tsv").write_text(ROWS)
    (folder / "dev.tsv").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my.data set", "my.data set/", "./my.data set", "~/my.data set"):
        data = load_data(COLA, name)
        assert (data.origin, data.name, len(data.train)) == ("folder", name, 2)


def test_folder_errors(tmp_path):
    folder = str(tmp_path)
    fails(folder, folder, "no train split", "looked for train with the ending .tsv, .jsonl, .csv, .parquet")
    (tmp_path / "train.tsv").write_text(ROWS)
    (tmp_path / "train.txt").write_text(ROWS)
    fails(folder, folder, "no dev split", "looked for dev, validation, val with")
    (tmp_path / "dev.tsv").write_text("")
    fails(folder, f"{folder}/dev.tsv: empty")
    (tmp_path / "dev.tsv").write_text(ROWS + "x\t3\t\tIt.\n")
    fails(folder, f"{folder}/dev.tsv:3: label '3'")
    (tmp_path / "val.jsonl").write_text(JSONL)
    fails(folder, folder, "more than one dev split: dev.tsv, val.jsonl")
    (tmp_path / "val.jsonl").unlink()
    (tmp_path / "dev.tsv").unlink()
    (tmp_path / "dev.tsv").mkdir()
    fails(folder, f"{folder}/dev.tsv: not a file but a folder")
    (tmp_path / "dev.tsv").rmdir()
    (tmp_path / "dev.tsv").symlink_to("nowhere")
    fails(folder, f"{folder}/dev.tsv: cannot be read: No such file")


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    fails(str(tmp_path), f"{tmp_path}: cannot be read: Permission denied")
    monkeypatch.setattr(os, "stat", refuse)
    fails("/far/away", "data '/far/away' cannot be read: Permission denied")


# Single files


def numbered(count):
    return "sentence\tlabel\n" + "".join(f"Sentence {i}.\t{i % 2}\n" for i in range(count))


@pytest.mark.parametrize(("count", "dev"), [(2, 1), (3, 1), (9, 1), (14, 1), (20, 2), (1000, 100), (1043, 104)])
def test_one_file_is_split(tmp_path, count, dev):
    path = tmp_path / "all.tsv"
    path.write_text(numbered(count))
    data = load_data(COLA, str(path), seed=3)
    assert (len(data.train), len(data.dev), data.origin, data.name) == (count - dev, dev, "file", str(path))
    assert data.note == f"all.tsv is one file: {dev} of its {count} rows, drawn with seed 3, are the dev split"
    origins = [example.origin for example in data.train + data.dev]
    assert sorted(origins) == sorted(f"all.tsv:{line}" for line in range(2, count + 2))
    assert all(int(e.fields["sentence"][9:-1]) + 2 == int(e.origin.split(":")[1]) for e in data.train + data.dev)


def test_the_split_of_one_file_depends_on_the_seed_alone(tmp_path):
    path = tmp_path / "all.tsv"
    path.write_text(numbered(200))
    assert load_data(COLA, str(path), seed=0) == load_data(COLA, str(path), seed=0)
    assert load_data(COLA, str(path), seed=0).dev != load_data(COLA, str(path), seed=1).dev


@pytest.mark.parametrize(("name", "content"), [("a.tsv", ROWS), ("a.csv", CSV), ("a.jsonl", JSONL)])
def test_every_format_is_split(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    data = load_data(COLA, str(tmp_path / name))
    assert sorted(labelled(data.train + data.dev)) == [("It howl.", 0), ("It howls.", 1)]


def test_file_errors(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text(JSONL.splitlines()[0])
    fails(str(path), f"{path}: has 1 row: need at least 2")
    path.write_text("")
    fails(str(path), f"{path}: empty")
    path.write_text(JSONL + "{\n")
    fails(str(path), f"{path}:3: malformed row")
    path = tmp_path / "all.json"
    path.write_text("[]")
    fails(str(path), f"{path}: unsupported file type '.json'")


@pytest.mark.parametrize(
    "data",
    [
        "",
        " ",
        "./x",
        "../x",
        "/no/such",
        "~/no/such",
        "x.tsv",
        "data/x.JSONL",
        "x/",
        "a/b/c",
        "a b",
        "a\\b",
        "a\nb",
        "\0",
        ".",
        "x:y:z",
        "train.txt",
    ],
)
def test_missing_paths_never_go_to_the_hub(data, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", None)
    if data == ".":
        monkeypatch.chdir(tmp_path)
        fails(data, "no train split")
    else:
        fails(data, f"data {data!r} is missing", "give a folder with train and dev files", "nyu-mll/glue:cola")


def test_too_long_a_name(tmp_path):
    fails(str(tmp_path / ("x" * 5000)), "cannot be read: File name too long")


# The built-in corpus


def test_built_in():
    data = load_data(COLA)
    assert (data.origin, data.name) == ("built-in", "built-in")
    assert len(data.train) > 5000 and len(data.dev) > 500
    assert {e.label for e in data.train} == {e.label for e in data.dev} == {0, 1}
    assert data.train[4].origin == "built-in train:5" and data.dev[4].origin == "built-in dev:5"
    assert len({e.fields["phenomenon"] for e in data.dev}) >= 12
    assert COLA.prompt(data.dev[0]).count(data.dev[0].fields["sentence"]) == 1


# The hub


def hub(monkeypatch, result):
    """Let `load_dataset` give a result or raise it, and return the list of its calls."""
    calls = []

    def load_dataset(*args):
        calls.append(args)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def split(sentences=("It howls.", "It howl."), labels=(1, 0), names=("unacceptable", "acceptable")):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
        if names
        else {"sentence": datasets.Value("string"), "label": datasets.Value("int32")}
    )
    return datasets.Dataset.from_dict({"sentence": list(sentences), "label": list(labels)}, features=features)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("nyu-mll/glue", ("nyu-mll/glue", "cola")),
        ("glue", ("nyu-mll/glue", "cola")),
        ("nyu-mll/glue:cola", ("nyu-mll/glue", "cola")),
        ("glue:other", ("nyu-mll/glue", "other")),
        ("someone/data-v1.5", ("someone/data-v1.5", None)),
        ("someone/data:part", ("someone/data", "part")),
    ],
)
def test_hub_names(monkeypatch, name, call):
    test = split(labels=(-1, -1))
    calls = hub(monkeypatch, datasets.DatasetDict(train=split(), validation=split(["It."], [1]), test=test))
    data = load_data(COLA, name)
    assert calls == [call]
    assert labelled(data.train) == [("It howls.", 1), ("It howl.", 0)] and labelled(data.dev) == [("It.", 1)]
    assert data.summary() == {"name": name, "origin": "hub", "train": 2, "dev": 1, "note": ""}
    assert data.train[1].origin == "train:2" and data.dev[0].origin == "validation:1"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("acceptable", "unacceptable"), [0, 1]),  # numbered the other way round
        (("unacceptable", "acceptable"), [1, 0]),
        (("LABEL_0", "LABEL_1"), [1, 0]),
        (("0", "1"), [1, 0]),
        (None, [1, 0]),
    ],
)
def test_hub_class_names_are_believed_before_numbers(monkeypatch, names, labels):
    hub(monkeypatch, datasets.DatasetDict(train=split(labels=labels, names=names), dev=split()))
    assert labelled(load_data(COLA, "x/y").train) == [("It howls.", 1), ("It howl.", 0)]


def test_hub_errors(monkeypatch):
    hub(monkeypatch, datasets.DatasetDict(train=split(), test=split()))
    fails("x/y", "data 'x/y': no dev split: looked for dev, validation, val, found train, test")
    hub(monkeypatch, datasets.DatasetDict(train=split([], []), dev=split()))
    fails("x/y", "data 'x/y': the train split is empty")
    hub(monkeypatch, datasets.DatasetDict(train=split(labels=(1, -1)), dev=split()))
    fails("x/y", "x/y train:2: label -1, task cola allows 0")
    hub(monkeypatch, datasets.DatasetDict(train=split(labels=(1, 2), names=("no", "yes", "maybe")), dev=split()))
    fails("x/y", "x/y train:2: label 'maybe'")
    hub(monkeypatch, datasets.DatasetDict(train=split().rename_column("sentence", "text"), dev=split()))
    fails("x/y", "x/y train: no column 'sentence'", "found 'text, label'")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'x/y' on the Hub\n(details\nfollow)"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist"),
        ValueError("Config name is missing."),
        OSError(28, "No space left on device"),
        RuntimeError(""),
    ],
)
def test_hub_failures_are_one_line(monkeypatch, error):
    hub(monkeypatch, error)
    first = (str(error).splitlines() or [""])[0]
    fails("x/y", "data 'x/y': no such file or folder, and the hub does not give it", type(error).__name__, first)


def test_retries_of_the_hub_client_are_not_logged_and_its_verbosity_comes_back(monkeypatch):
    seen = []

    def load_dataset(*args):
        seen.append(hub_logging.get_verbosity())
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = hub_logging.get_verbosity()
    try:
        hub_logging.set_verbosity_info()
        fails("x/y", "no network")
        assert (seen, hub_logging.get_verbosity()) == ([logging.ERROR], logging.INFO)
    finally:
        hub_logging.set_verbosity(before)


@pytest.mark.parametrize("error", [Interrupted(15), KeyboardInterrupt()])
def test_an_interruption_is_not_a_hub_failure(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(type(error)):
        load_data(COLA, "x/y")


def test_no_network(tmp_path):
    """The hub's real client, told that it is offline; in a process of its own, as it reads that setting once."""
    code = "from fastppo.errors import UserError\nfrom fastppo.tasks import get_task, load_data\ntry:\n    load_data("
    code += "get_task('cola'), 'nobody/nothing')\nexcept UserError as error:\n    print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith("data 'nobody/nothing': no such file or folder, and the hub does not give it: "), done
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


# Tasks that are on no hub, and tasks with data of their own


def test_a_task_that_is_on_no_hub_needs_data_and_names_none():
    with pytest.raises(UserError, match=r"^task x has no built-in data: give --data .*, or a hub name$"):
        load_data(replace(COLA, name="x", hub=None, data=None))
    with pytest.raises(UserError, match=r"^data 'no/where.tsv' is missing, .*, or a hub name$"):
        load_data(replace(COLA, name="x", hub=None), "no/where.tsv")


def test_a_task_that_is_on_no_hub_takes_another_data_set_there(monkeypatch):
    calls = hub(monkeypatch, datasets.DatasetDict(train=split(), validation=split(["It."], [1])))
    assert len(load_data(replace(COLA, hub=None), "x/y:z").dev) == 1 and calls == [("x/y", "z")]


def test_data_of_the_task_itself_is_the_default(tmp_path):
    (tmp_path / "own.jsonl").write_text(JSONL)
    (tmp_path / "given.jsonl").write_text(JSONL + JSONL)
    task = replace(COLA, data=str(tmp_path / "own.jsonl"))
    assert load_data(task).summary()["train"] == 1 and load_data(task).name == str(tmp_path / "own.jsonl")
    assert load_data(task, str(tmp_path / "given.jsonl")).summary()["train"] == 3
    assert load_data(COLA).origin == "built-in"
