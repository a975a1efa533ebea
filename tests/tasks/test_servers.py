"""Unlabelled test splits, and the files that the servers of GLUE and SuperGLUE take."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastppo.errors import UserError
from fastppo.tasks import TASKS, Example, load_data, load_test, servers


def written(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Header and a row of each test file of GLUE, with the index, and the line for label 0 and for label 1.
GLUE = {
    "cola": ("index\tsentence", "3\tShe sleep.", "CoLA.tsv", "0", "1"),
    "sst2": ("index\tsentence", "3\tdull", "SST-2.tsv", "0", "1"),
    "mrpc": ("\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String", '3\t8\t9\tHe "a\tB', "MRPC.tsv", "0", "1"),
    "qqp": ("id\tquestion1\tquestion2", "3\tWhy?\tHow?", "QQP.tsv", "0", "1"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2", "3\tg\tf\t2012\t24\ts\ts\tA.\tB.",
        "STS-B.tsv", "0.000", "1.000",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
        "sentence1\tsentence2", "3\t1\t1\tx\t( a )\t( b )\t(S)\t(S)\tA.\tB.", "MNLI-m.tsv", "entailment", "neutral",
    ),
    "qnli": ("index\tquestion\tsentence", "3\tWho?\tHe.", "QNLI.tsv", "entailment", "not_entailment"),
    "rte": ("index\tsentence1\tsentence2", "3\tA.\tB.", "RTE.tsv", "entailment", "not_entailment"),
    "wnli": ("index\tsentence1\tsentence2", "3\tA.\tB.", "WNLI.tsv", "0", "1"),
    "ax": ("index\tsentence1\tsentence2", "3\tA.\tB.", "AX.tsv", "entailment", "neutral"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GLUE))
def test_test_files_of_glue(tmp_path, name):
    header, row, file, *labels = GLUE[name]
    stem = {"mnli": "test_matched", "ax": "diagnostic"}.get(name, "test")
    path = written(tmp_path / f"{stem}.tsv", header, row, row.replace("3", "1", 1))
    task = TASKS[name]
    for given in (path, tmp_path):
        test = load_test(task, str(given))
        ((section, examples),) = test.sections.items()
        assert section == ("matched" if name == "mnli" else "")
        assert [(e.index, e.origin) for e in examples] == [((3,), f"{stem}.tsv:2"), ((1,), f"{stem}.tsv:3")]
        assert all(e.label is None for e in examples)
        assert set(examples[0].fields) == set(task.slots) and examples[0].where == f"{path}:2"
    server = servers.server_of(task, test.superglue)
    assert server.files[name, section] == file
    expected = f"index\tprediction\n3\t{labels[0]}\n1\t{labels[1]}\n"
    assert servers.content(server, task, examples, [0, 1]) == expected


def test_what_is_unlabelled_is_an_error_everywhere_else(tmp_path):
    header, row, *_ = GLUE["cola"]
    for split in ("train", "dev"):
        written(tmp_path / f"{split}.tsv", header, row)
    with pytest.raises(UserError, match=r"train.tsv:1: no column 'label' \(an unlabelled test file\?\)"):
        load_data(TASKS["cola"], str(tmp_path))


def test_numbers_of_stsb_stay_on_the_scale():
    examples = [Example({}, None, "", index=(i,)) for i in range(4)]
    text = servers.content(servers.GLUE, TASKS["stsb"], examples, [2.66666, -1.0, 7, 0.0005])
    assert text.split("\n")[1:] == ["0\t2.667", "1\t0.000", "2\t5.000", "3\t0.001", ""]


def test_both_sections_of_mnli(tmp_path):
    header, row, *_ = GLUE["mnli"]
    written(tmp_path / "test_mismatched.tsv", header, row)
    assert list(load_test(TASKS["mnli"], str(tmp_path)).sections) == ["mismatched"]
    written(tmp_path / "test_matched.tsv", header, row)
    assert list(load_test(TASKS["mnli"], str(tmp_path)).sections) == ["matched", "mismatched"]
    other = written(tmp_path / "test.tsv", header, row)
    assert list(load_test(TASKS["mnli"], str(tmp_path)).sections) == ["matched", "mismatched"]
    with pytest.raises(UserError, match="test.tsv: its name says no section of the test split; expected test_matched, test"):
        load_test(TASKS["mnli"], str(other))


def test_every_row_of_a_test_split_counts(tmp_path):
    """What training may leave out of QQP is answered here, or an error."""
    header, row, *_ = GLUE["qqp"]
    rows = [row.replace("3", str(i), 1) for i in range(200)]
    path = written(tmp_path / "test.tsv", header, *rows[:-1], "199\t \tHow?")
    assert len(load_test(TASKS["qqp"], str(path)).sections[""]) == 200
    written(path, header, *rows[:-1], "199\tHow?")
    with pytest.raises(UserError, match="test.tsv:201: malformed row: has 2 columns, must have 3 as in the header"):
        load_test(TASKS["qqp"], str(path))


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("cola", ["index\tsentence", "0\tA.", "0\tB."], "test.tsv:3: index 0 stands at {path}:2 already; every row needs one"),
        ("cola", ["index\tsentence", "x\tA."], "test.tsv:2: index 'x', must be a whole number"),
        ("cola", ["index\tsentence", "-1\tA."], "test.tsv:2: index '-1', must be a whole number"),
        ("cola", ["sentence", "A."], "test.tsv:1: no column 'index': need 'sentence' and 'index' once each"),
        ("cola", ["0\tA.", "1\tB."], "test.tsv:1: is no header line naming 'sentence' and 'index'"),
        ("stsb", ["g\tf\t2012\t1\t2.5\tA.\tB."], "test.tsv:1: is no header line naming 'sentence1' and"),
        ("cola", ["index\tsentence", "0\t"], "test.tsv:2: sentence is empty"),
        ("cola", ["index\tsentence"], "test.tsv: empty, no rows"),
    ],
)
def test_damaged_test_files_of_glue(tmp_path, name, lines, expected):
    path = written(tmp_path / "test.tsv", *lines)
    with pytest.raises(UserError) as caught:
        load_test(TASKS[name], str(path))
    assert expected.replace("{path}", str(path)) in str(caught.value)


# A row of each test file of SuperGLUE, and its line for label 0 and for label 1.
PAIR = {"premise": "A.", "hypothesis": "B.", "idx": 5}
SUPERGLUE = {
    "boolq": ({"question": "is it", "passage": "It is.", "idx": 5}, "BoolQ.jsonl", "false", "true"),
    "cb": (PAIR, "CB.jsonl", "entailment", "contradiction"),
    "copa": ({"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "cause", "idx": 5}, "COPA.jsonl", 0, 1),
    "rte": (PAIR, "RTE.jsonl", "entailment", "not_entailment"),
    "wic": (
        {"word": "go", "sentence1": "Let go", "sentence2": "We go", "start1": 4, "end1": 6, "start2": 3, "end2": 5, "idx": 5},
        "WiC.jsonl", "false", "true",
    ),
    "wsc": (
        {"text": "Ann said she left.", "idx": 5,
         "target": {"span1_index": 0, "span1_text": "Ann", "span2_index": 2, "span2_text": "she"}},
        "WSC.jsonl", "False", "True",
    ),
    "axb": ({"sentence1": "A.", "sentence2": "B.", "idx": 5, "logic": "x"}, "AX-b.jsonl", "entailment", "not_entailment"),
    "axg": (PAIR | {"premise": "She left."}, "AX-g.jsonl", "entailment", "not_entailment"),
}  # fmt: skip


def jsonl(path, *rows):
    return written(path, *map(json.dumps, rows))


def answered(name, path, labels):
    task = TASKS[name]
    test = load_test(task, str(path))
    server = servers.server_of(task, test.superglue)
    return list(map(json.loads, servers.content(server, task, test.sections[""], labels).splitlines()))


@pytest.mark.parametrize("name", sorted(SUPERGLUE))
def test_test_files_of_superglue(tmp_path, name):
    row, file, *labels = SUPERGLUE[name]
    stem = file.partition(".")[0] if name in ("axb", "axg") else "test"
    path = jsonl(tmp_path / f"{stem}.jsonl", row, row | {"idx": 2, "label": "not looked at"})
    for given in (path, tmp_path):
        assert answered(name, given, [0, 1]) == [{"idx": 5, "label": labels[0]}, {"idx": 2, "label": labels[1]}]
    assert servers.SUPERGLUE.files[name, ""] == file
    jsonl(path, row, row)
    with pytest.raises(UserError, match=f"{stem}.jsonl:2: index 5 stands at .*{stem}.jsonl:1 already"):
        load_test(TASKS[name], str(path))
    jsonl(path, {key: value for key, value in row.items() if key != "idx"})
    with pytest.raises(UserError, match="index"):
        load_test(TASKS[name], str(path))


def passage(idx, *questions):
    asked = [
        {"idx": q, "question": f"Why {q}?", "answers": [{"idx": a, "text": f"As {a}"} for a in answers]}
        for q, answers in questions
    ]
    return {"idx": idx, "passage": {"text": "It rained.", "questions": asked}}


def test_multirc_is_nested_as_its_test_file(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", passage(4, (7, [10, 11]), (8, [12])), passage(2, (9, [13])))
    assert answered("multirc", path, [0, 1, 1, 0]) == [
        {"idx": 4, "passage": {"questions": [
            {"idx": 7, "answers": [{"idx": 10, "label": 0}, {"idx": 11, "label": 1}]},
            {"idx": 8, "answers": [{"idx": 12, "label": 1}]},
        ]}},
        {"idx": 2, "passage": {"questions": [{"idx": 9, "answers": [{"idx": 13, "label": 0}]}]}},
    ]  # fmt: skip
    jsonl(path, passage(4, (7, [10, 10])))
    with pytest.raises(UserError, match="test.jsonl:1 question 1, answer 2: index 4, 7, 10 stands at .*answer 1 already"):
        load_test(TASKS["multirc"], str(path))
    jsonl(path, passage(None, (7, [10])))
    with pytest.raises(UserError, match=r"test.jsonl:1 question 1, answer 1: index \(None, 7, 10\), must be a whole number"):
        load_test(TASKS["multirc"], str(path))


def record(idx, *queries):
    entities = [{"start": 0, "end": 2}, {"start": 8, "end": 10}]
    return {"idx": idx, "passage": {"text": "Ann met Bob.", "entities": entities}, "qas": list(queries)}


def test_record_is_the_entity_of_each_query(tmp_path):
    queries = [{"query": f"{i}: @placeholder left", "idx": i} for i in (30, 31, 9)]
    path = jsonl(tmp_path / "test.jsonl", record(5, *queries[:2]), record(6, queries[2]))
    assert answered("record", path, [0, 1, 1, 1, 0, 0]) == [
        {"idx": 30, "label": "Bob"}, {"idx": 31, "label": "Ann"}, {"idx": 9, "label": "Ann"}
    ]  # fmt: skip
    examples = load_test(TASKS["record"], str(path)).sections[""]
    assert [right for _, _, right in servers.entities(examples, [0, 1, 1, 1, 0, 0])] == [True, True, False]
    jsonl(path, record(5, queries[0]), record(6, queries[0]))
    with pytest.raises(UserError, match="test.jsonl:2 query 1, entity 1: index 30 stands at .*test.jsonl:1 query 1, "):
        load_test(TASKS["record"], str(path))


HUB = {
    "sst2": [{"sentence": "dull", "label": -1, "idx": 4}, {"sentence": "fine", "label": -1, "idx": 2}],
    "multirc": [
        {"paragraph": "A.", "question": "B?", "answer": a, "idx": {"paragraph": 4, "question": 0, "answer": i}, "label": -1}
        for i, a in enumerate("xy")
    ],
    "record": [
        {"passage": "Ann met Bob.", "query": "@placeholder left.", "entities": ["Ann", "Bob"], "answers": [],
         "idx": {"passage": 0, "query": 7}}
    ],
}  # fmt: skip
HUB_LINES = {
    "sst2": "index\tprediction\n4\t0\n2\t1\n",
    "multirc": (
        '{"idx": 4, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 0}, {"idx": 1, "label": 1}]}]}}\n'
    ),
    "record": '{"idx": 7, "label": "Bob"}\n',
}


@pytest.mark.parametrize("name", sorted(HUB))
def test_test_splits_of_the_hub(monkeypatch, tmp_path, name):
    """Tables with labels of -1, or without answers; from the hub and as its files."""
    table = datasets.Dataset.from_list(HUB[name])
    pq.write_table(pa.table(table.data.table), tmp_path / "test-00000-of-00001.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=table, test=table))
    task = TASKS[name]
    for given in (":".join(task.hub), str(tmp_path)):
        test = load_test(task, given)
        server = servers.server_of(task, test.superglue)
        assert servers.content(server, task, test.sections[""], [0, 1]) == HUB_LINES[name]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=table))
    with pytest.raises(UserError, match="no test split: looked for test, found train"):
        load_test(task, ":".join(task.hub))


def test_rte_goes_to_the_server_in_whose_form_its_data_is(monkeypatch):
    table = datasets.Dataset.from_list([PAIR | {"label": -1}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(test=table))
    found = {data: load_test(TASKS["rte"], data).superglue for data in ("glue", "super_glue:rte", "aps/super_glue:rte", "x/y")}
    assert found == {"glue": False, "super_glue:rte": True, "aps/super_glue:rte": True, "x/y": False}
    assert servers.server_of(TASKS["rte"], True) is servers.SUPERGLUE and servers.server_of(TASKS["rte"], False) is servers.GLUE
    for task, server in (("sst2", servers.GLUE), ("boolq", servers.SUPERGLUE)):
        assert servers.server_of(TASKS[task], True) is servers.server_of(TASKS[task], False) is server


def test_every_task_has_a_file_and_a_server():
    names = {name for server in (servers.GLUE, servers.SUPERGLUE) for name, _ in server.files}
    assert names == set(TASKS) and len(servers.GLUE.files) == 11 and len(servers.SUPERGLUE.files) == 10
    for server in (servers.GLUE, servers.SUPERGLUE):
        assert len(set(server.files.values())) == len(server.files)


def test_data_without_a_test_split(tmp_path):
    with pytest.raises(UserError, match="^the built-in data has no test split: give --data that of cola, such as nyu-mll"):
        load_test(TASKS["cola"], None)
    with pytest.raises(UserError, match=f"^{tmp_path}: no test split: looked for test with the ending .tsv, .jsonl, "):
        load_test(TASKS["cola"], str(tmp_path))
    with pytest.raises(UserError, match="is missing, there is no such file or folder"):
        load_test(TASKS["cola"], str(tmp_path / "none"))


@pytest.mark.parametrize(("name", "rows"), [("cola", 1063), ("mrpc", 1725)])
def test_public_test_files(shared_data, name, rows):
    folder = shared_data / name
    if not (folder / "test.tsv").is_file():
        pytest.skip(f"no {name}/test.tsv in the folder of public data")
    test = load_test(TASKS[name], str(folder))
    examples = test.sections[""]
    assert [e.index for e in examples] == [(i,) for i in range(rows)]  # the file's lines, under its header
    given = (folder / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert all(line.endswith(e.fields[TASKS[name].slots[-1]]) for line, e in zip(given, examples, strict=True))
    server = servers.server_of(TASKS[name], test.superglue)
    lines = servers.content(server, TASKS[name], examples, [i % 2 for i in range(rows)]).split("\n")
    assert lines[:3] == ["index\tprediction", "0\t0", "1\t1"] and len(lines) == rows + 2 and lines[-1] == ""
