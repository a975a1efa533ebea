"""The forms in which GLUE and SuperGLUE come: their own files, the hub's tables, and the public files beside the repository."""

import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastppo.errors import UserError
from fastppo.tasks import TASKS, load_data
from fastppo.tasks.read import read_file

# Files beside the repository: (rows, label counts); of MultiRC and ReCoRD examples, with the number of questions.
SHARED = {
    "cola": {"cola/train.tsv": (8551, {1: 6023, 0: 2528}), "cola/dev.tsv": (1043, {1: 721, 0: 322})},
    "mrpc": {"mrpc/train.tsv": (3668, {1: 2474, 0: 1194}), "mrpc/dev.tsv": (408, {1: 279, 0: 129})},
    "sst2": {"sst2/train.tsv": (60614, {1: 33828, 0: 26786}), "sst2/dev.tsv": (6735, {1: 3741, 0: 2994})},
    "stsb": {
        "stsb/train.tsv": (5749, None), "stsb/original/sts-train.tsv": (5749, None), "stsb/original/sts-dev.tsv": (1500, None),
    },
    "qqp": {"qqp/new_dev.tsv": (23496, {1: 8747, 0: 14749})},
    "wnli": {"wnli/train.tsv": (565, {1: 277, 0: 288}), "wnli/dev.tsv": (70, {1: 35, 0: 35})},
    "rte": {"rte/train.jsonl": (2490, {0: 1249, 1: 1241}), "rte/val.jsonl": (277, {0: 146, 1: 131})},
    "cb": {"cb/train.jsonl": (250, {0: 115, 1: 119, 2: 16}), "cb/val.jsonl": (56, {0: 23, 1: 28, 2: 5})},
    "boolq": {"boolq/train.jsonl": (32, {1: 18, 0: 14}), "boolq/dev32.jsonl": (32, {1: 19, 0: 13})},
    "copa": {
        "copa/train.jsonl": (32, {0: 14, 1: 18}), "copa/dev32.jsonl": (32, {0: 15, 1: 17}),
        "copa/val.jsonl": (100, {0: 55, 1: 45}),
    },
    "multirc": {
        "multirc/train.jsonl": (154, {1: 68, 0: 86}, 32), "multirc/dev32.jsonl": (167, {1: 74, 0: 93}, 32),
        "multirc/val.jsonl": (4848, {1: 2075, 0: 2773}, 953),
    },
    "wic": {
        "wic/train.jsonl": (32, {1: 17, 0: 15}), "wic/dev32.jsonl": (32, {1: 16, 0: 16}),
        "wic/val.jsonl": (638, {1: 319, 0: 319}), "wic/prompted/train.jsonl": (5228, {1: 2615, 0: 2613}),
        "wic/prompted/test.jsonl": (200, {1: 99, 0: 101}),
    },
    "wsc": {
        "wsc/train.jsonl": (32, {1: 32}), "wsc/dev32.jsonl": (32, {1: 10, 0: 22}), "wsc/val.jsonl": (104, {1: 38, 0: 66}),
    },
    "record": {"record/train.jsonl": (397, None, 32), "record/dev32.jsonl": (369, None, 32)},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHARED))
def test_public_files_have_the_rows_that_they_are_said_to_have(shared_data, name):
    task = TASKS[name]
    for file, (rows, labels, *questions) in SHARED[name].items():
        damaged: list[str] = []
        examples = read_file(task, shared_data / file, damaged)
        assert len(examples) == rows, file
        assert labels is None or Counter(example.label for example in examples) == labels, file
        assert len({example.group for example in examples}) == (questions[0] if questions else 1), file
        assert all(set(example.fields) == set(task.slots) for example in examples)
        assert len(damaged) == (1 if name == "qqp" else 0), damaged
        assert task.prompt(examples[-1]).count(examples[-1].fields[task.slots[0]]) >= 1


def test_means_of_the_scores_of_stsb(shared_data):
    for file, mean in (("train.tsv", 2.70), ("original/sts-dev.tsv", 2.36)):
        scores = [example.label for example in read_file(TASKS["stsb"], shared_data / "stsb" / file)]
        assert round(sum(scores) / len(scores), 2) == mean and min(scores) == 0 and max(scores) == 5


def test_damaged_rows_of_qqp_are_named_and_left_out(shared_data):
    data = load_data(TASKS["qqp"], str(shared_data / "qqp" / "new_dev.tsv"))
    assert len(data.train) + len(data.dev) == 23496
    assert "; left out 1 damaged row: " in data.note
    assert "new_dev.tsv:1: malformed row: has 5 columns, must have 6 (id, qid1, qid2, question1, question2, label)" in data.note


@pytest.mark.parametrize("name", ["sst2", "mrpc", "wnli", "rte", "cb", "copa", "boolq", "multirc", "wic", "wsc", "record"])
def test_public_folders_are_data_sets(shared_data, name):
    data = load_data(TASKS[name], str(shared_data / name))
    files = list(SHARED[name].items())
    dev = {"copa": "copa/val.jsonl", "multirc": "multirc/val.jsonl", "wic": "wic/val.jsonl", "wsc": "wsc/val.jsonl"}
    assert len(data.dev) == SHARED[name][dev.get(name, files[1][0])][0]
    assert len(data.train) == (64 if name == "record" else files[0][1][0])


def test_the_original_release_of_stsb_is_a_data_set(shared_data):
    data = load_data(TASKS["stsb"], str(shared_data / "stsb" / "original"))
    assert (len(data.train), len(data.dev)) == (5749, 1500)


def test_pronouns_of_wsc_are_marked(shared_data):
    examples = read_file(TASKS["wsc"], shared_data / "wsc" / "val.jsonl")
    for example in examples:
        assert f"*{example.fields['pronoun'].lower()}*" in example.fields["text"].lower()
        assert example.fields["text"].count("*") == 2
    assert examples[0].fields["text"].endswith("could take his claim away from *him* .")


# GLUE's own files, a row or two of each


def written(tmp_path, name, *lines):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GLUE_FILES = {
    "sst2": ("sentence\tlabel", "dull \t0", {"sentence": "dull "}, 0),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said "a\tHe said b', None, 1),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tWhy?\tHow?\t0", None, 0),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\tnone\tnone\tA dog.\tA cat.\t1.250", {"sentence1": "A dog.", "sentence2": "A cat."}, 1.25,
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
        "sentence1\tsentence2\tlabel1\tlabel2\tgold_label",
        "0\t1\t1e\tx\t( a )\t( b )\t(S)\t(S)\tIt rains.\tIt is wet.\tneutral\tentailment\tentailment",
        {"premise": "It rains.", "hypothesis": "It is wet."}, 0,
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe.\tnot_entailment", {"question": "Who?", "sentence": "He."}, 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment", {"premise": "A.", "hypothesis": "B."}, 0),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", {"premise": "A.", "hypothesis": "B."}, 1),
    "ax": (
        "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis\tLabel",
        "\t\tNegation\t\tArtificial\tA.\tB.\tcontradiction", {"premise": "A.", "hypothesis": "B."}, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GLUE_FILES))
def test_files_of_glue(tmp_path, name):
    header, row, fields, label = GLUE_FILES[name]
    (example,) = read_file(TASKS[name], written(tmp_path, "t.tsv", header, row))
    assert example.label == label and example.origin == "t.tsv:2" and example.group == ""
    assert fields is None or example.fields == fields
    with pytest.raises(UserError, match="t.tsv:2: label 'maybe', task .* allows"):
        read_file(TASKS[name], written(tmp_path, "t.tsv", header, row.rpartition("\t")[0] + "\tmaybe" if name != "mrpc" else
                                       "maybe" + row[1:]))  # fmt: skip


def test_a_pair_column_by_two_names_is_refused(tmp_path):
    with pytest.raises(UserError, match="more than one column 'premise'"):
        read_file(TASKS["rte"], written(tmp_path, "t.tsv", "premise\tsentence1\thypothesis\tlabel", "a\tb\tc\tentailment"))


def test_rows_without_header_may_have_more_columns_only_where_the_data_has_them(tmp_path):
    row = "g\tf\t2012\t1\t2.5\tA.\tB."
    examples = read_file(TASKS["stsb"], written(tmp_path, "t.tsv", row, row + "\tx\ty"))
    assert [example.label for example in examples] == [2.5, 2.5]
    with pytest.raises(UserError, match="t.tsv:2: malformed row: has 10 columns, must have 7"):
        read_file(TASKS["stsb"], written(tmp_path, "t.tsv", row, row + "\tx\ty\tz"))


def test_few_damaged_rows_are_left_out_and_many_are_an_error(tmp_path):
    good = "0\t1\t2\tWhy?\tHow?\t0"
    path = written(tmp_path, "train.tsv", *[good] * 150, "cut off", *[good] * 98, "0\t1\t2\t \tHow?\t1")
    damaged: list[str] = []
    assert len(read_file(TASKS["qqp"], path, damaged)) == 248
    assert [line.split(": ", 1)[0] for line in damaged] == [f"{path}:151", f"{path}:250"]
    assert "question1 is empty" in damaged[1]
    written(tmp_path, "dev.tsv", *[good] * 100)
    note = load_data(TASKS["qqp"], str(tmp_path)).note
    assert note.startswith("left out 2 damaged rows: ") and "train.tsv:151: malformed row: has 1 column," in note
    path = written(tmp_path, "t.tsv", *[good] * 99, "cut off", "cut off")
    with pytest.raises(UserError, match="t.tsv:100: malformed row: has 1 column, must have 6"):
        read_file(TASKS["qqp"], path)


def test_damaged_rows_of_other_tasks_are_errors(tmp_path):
    path = written(tmp_path, "t.tsv", "sentence\tlabel", *["fine\t1"] * 500, "cut off")
    with pytest.raises(UserError, match="t.tsv:502: malformed row: has 1 column,"):
        read_file(TASKS["sst2"], path)


MNLI_HEADER, MNLI_ROW = "sentence1\tsentence2\tgold_label", "A.\tB.\tneutral"


def test_both_dev_sections_of_mnli(tmp_path):
    written(tmp_path, "train.tsv", MNLI_HEADER, MNLI_ROW)
    written(tmp_path, "dev_mismatched.tsv", MNLI_HEADER, *[MNLI_ROW] * 3)
    assert [e.group for e in load_data(TASKS["mnli"], str(tmp_path)).dev] == ["mismatched"] * 3
    written(tmp_path, "dev_matched.tsv", MNLI_HEADER, *[MNLI_ROW] * 2)
    data = load_data(TASKS["mnli"], str(tmp_path))
    assert [e.group for e in data.dev] == ["matched"] * 2 + ["mismatched"] * 3 and data.train[0].group == ""
    written(tmp_path, "dev.tsv", MNLI_HEADER, MNLI_ROW)
    assert [e.group for e in load_data(TASKS["mnli"], str(tmp_path)).dev] == [""]


def test_a_missing_dev_split_says_all_that_was_looked_for(tmp_path):
    written(tmp_path, "train.tsv", MNLI_HEADER, MNLI_ROW)
    with pytest.raises(UserError, match="no dev split: looked for dev, validation, val, dev_matched, .*, val_mismatched with"):
        load_data(TASKS["mnli"], str(tmp_path))


def test_diagnostic_sets_are_dev_alone(tmp_path):
    header, row, _, _ = GLUE_FILES["ax"]
    path = written(tmp_path, "diagnostic-full.tsv", header, row, row)
    for data in (load_data(TASKS["ax"], str(tmp_path)), load_data(TASKS["ax"], str(path))):
        assert (len(data.train), len(data.dev)) == (0, 2)


# SuperGLUE's own files


def jsonl(tmp_path, name, *rows):
    return written(tmp_path, name, *map(json.dumps, rows))


MULTIRC_ROW = {
    "idx": 3,
    "passage": {
        "text": "It rained. We left.",
        "questions": [
            {"question": "Why?", "idx": 0, "answers": [{"text": "Rain", "label": 1}, {"text": "Snow", "label": 0}]},
            {"question": "Who?", "idx": 1, "answers": [{"text": "We", "label": 1}]},
        ],
    },
}
RECORD_TEXT = "Ann met Bob in Rome.\n@highlight\nBob left"
RECORD_ROW = {
    "source": "x",
    "passage": {"text": RECORD_TEXT, "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 32, "end": 34}]},
    "qas": [{"query": "Then @placeholder went home with @placeholder.", "answers": [{"start": 8, "end": 10, "text": "Bob"}]}],
}
WSC_ROW = {"text": "it saw it, I said.", "label": True,
           "target": {"span1_index": 4, "span1_text": "I", "span2_index": 2, "span2_text": "it"}}  # fmt: skip
WIC_ROW = {"word": "go", "sentence1": "Let go", "sentence2": "We go on", "start1": 4, "end1": 5, "start2": 3, "end2": 5,
           "label": True}  # fmt: skip
COPA_ROW = {"premise": "x", "choice1": "a", "choice2": "b", "question": "effect", "label": 0}
AXG_ROW = {"premise": "The nurse said she left.", "hypothesis": "Someone left.", "label": "not_entailment", "idx": 0}


def wsc(**target):
    return WSC_ROW | {"target": WSC_ROW["target"] | target}


def test_multirc_is_one_example_an_answer(tmp_path):
    examples = read_file(TASKS["multirc"], jsonl(tmp_path, "val.jsonl", MULTIRC_ROW, MULTIRC_ROW))
    assert [(e.fields["question"], e.fields["candidate"], e.label) for e in examples[:3]] == [
        ("Why?", "Rain", 1), ("Why?", "Snow", 0), ("Who?", "We", 1)
    ]  # fmt: skip
    assert [e.group for e in examples] == ["1-1", "1-1", "1-2", "2-1", "2-1", "2-2"]
    assert examples[1].origin == "val.jsonl:1 question 1, answer 2"


def test_record_is_one_example_an_entity(tmp_path):
    examples = read_file(TASKS["record"], jsonl(tmp_path, "val.jsonl", RECORD_ROW))
    assert [(e.fields["candidate"], e.label, e.group) for e in examples] == [("Ann", 0, "1-1"), ("Bob", 1, "1-1")]
    assert examples[1].fields == {
        "passage": "Ann met Bob in Rome.", "candidate": "Bob", "query": "Then Bob went home with Bob."
    }  # fmt: skip


def test_record_trains_on_a_right_and_a_wrong_entity_of_each_query(tmp_path):
    rows = [RECORD_ROW | {"idx": i} for i in range(20)]
    jsonl(tmp_path, "train.jsonl", *rows)
    jsonl(tmp_path, "val.jsonl", *rows[:2])
    data = load_data(TASKS["record"], str(tmp_path), seed=5)
    assert len(data.train) == 40 and [e.label for e in data.train[:4]] == [1, 0, 1, 0] and len(data.dev) == 4
    assert data.note == "train: 40 of 40 examples, a right and a wrong one of each query, drawn with seed 5"


def test_record_draws_depend_on_the_seed_alone(shared_data):
    folder = str(shared_data / "record")
    assert load_data(TASKS["record"], folder, 1) == load_data(TASKS["record"], folder, 1)
    assert load_data(TASKS["record"], folder, 1).train != load_data(TASKS["record"], folder, 2).train


def test_the_marked_pronoun_is_the_one_of_the_data(tmp_path):
    (example,) = read_file(TASKS["wsc"], jsonl(tmp_path, "val.jsonl", WSC_ROW))
    assert example.fields == {"text": "it saw *it*, I said.", "noun": "I", "pronoun": "it"} and example.label == 1


@pytest.mark.parametrize(
    ("text", "noun", "pronoun", "marked"),
    [
        ("Ann kept it, and it, too.", ("Ann", 0), ("it,", 4), "Ann kept it, and *it*, too."),
        ("Ann, who met Cid, saw Bob. They left.", ("Ann and Bob", 0), ("They", 6), None),
        ("Ann, met Cid, who saw Bob. They left.", ("Cid, Bob", 1), ("They", 6), "Ann, met Cid, who saw Bob. *They* left."),
        ("They came, but theyscold her.", ("her", 4), ("they", 3), "They came, but *they*scold her."),
        ("Her dog sees her.", ("the dog", 1), ("her", 2), None),
        ("Her dog sees her.", ("Dog", 0), ("her", 2), "Her dog sees *her*."),
    ],
)
def test_what_is_odd_in_the_files_of_wsc_but_not_damaged(tmp_path, text, noun, pronoun, marked):
    """Punctuation in spans, another case, words that stand apart or together, indices that are off by a word or two."""
    target = {"span1_text": noun[0], "span1_index": noun[1], "span2_text": pronoun[0], "span2_index": pronoun[1]}
    path = jsonl(tmp_path, "val.jsonl", {"text": text, "target": target, "label": False})
    if marked is None:
        with pytest.raises(UserError, match="val.jsonl:1: malformed row: span1_text: '(and|the)' is not in the text"):
            read_file(TASKS["wsc"], path)
    else:
        assert read_file(TASKS["wsc"], path)[0].fields["text"] == marked


def test_pairs_of_axg_differ_in_a_pronoun(tmp_path):
    other = AXG_ROW | {"premise": "The nurse said He left."}
    third = AXG_ROW | {"premise": "The cook said she left."}
    groups = [e.group for e in read_file(TASKS["axg"], jsonl(tmp_path, "AX-g.jsonl", AXG_ROW, other, third))]
    assert groups[0] == groups[1] != groups[2]
    assert len(load_data(TASKS["axg"], str(tmp_path)).dev) == 3


@pytest.mark.parametrize(
    ("name", "row", "part"),
    [
        ("multirc", {"passage": 3}, "malformed row: passage.text is missing"),
        ("multirc", {"passage": {"text": "x"}}, "malformed row: passage.questions is missing, must be a list"),
        ("multirc", {"passage": {"text": "x", "questions": [{"question": "y"}]}}, "question 1: answers is missing"),
        ("multirc", {"passage": {"text": "x", "questions": [{"question": "y", "answers": ["z"]}]}}, "answer 1: must be an obj"),
        ("multirc", {"passage": {"text": "x", "questions": [{"question": "y", "answers": [{"text": "z"}]}]}},
         "question 1, answer 1: label is missing, task multirc allows 0 (false) or 1 (true)"),
        ("multirc", {"passage": {"text": "x", "questions": []}}, "passage.questions is empty, must be a list of at least one"),
        ("multirc", {"passage": {"text": "x", "questions": [{"question": "y", "answers": []}]}}, "question 1: answers is emp"),
        ("record", {"passage": None}, "passage"),
        ("record", RECORD_ROW | {"qas": []}, "qas is empty, must be a list of at least one"),
        ("record", RECORD_ROW | {"qas": [{"query": "@placeholder left", "answers": []}]}, "query 1: answers is empty"),
        ("record", RECORD_ROW | {"passage": {"text": "Ann", "entities": []}}, "passage.entities is empty"),
        ("record", RECORD_ROW | {"passage": {"text": "Ann", "entities": [{"start": 0, "end": 2}, {"start": 0, "end": 3}]}},
         "passage.entities, entity 2: 0 to 3 is no part of the passage, which has the characters 0 to 2"),
        ("record", RECORD_ROW | {"passage": {"text": "Ann", "entities": [{"start": 2, "end": 1}]}}, "entity 1: 2 to 1 is no"),
        ("record", RECORD_ROW | {"passage": {"text": "Ann", "entities": [{"start": -1, "end": 1}]}}, "entity 1: -1 to 1 is no"),
        ("record", RECORD_ROW | {"passage": {"text": "Ann left", "entities": [{"start": 0, "end": 3}]}},
         "entity 1: at 0 to 3 stands 'Ann ', must be a name, without space around it"),
        ("record", {"passage": "Ann left", "query": "@placeholder left", "entities": [], "answers": ["Ann"]}, "entities is em"),
        ("wic", WIC_ROW | {"end2": 9}, "start2 to end2 is 3 to 9, which is no part of sentence2, 8 characters long"),
        ("wic", WIC_ROW | {"start1": 5}, "start1 to end1 is 5 to 5, which is no part of sentence1, 6 characters long"),
        ("wic", WIC_ROW | {"start1": -2}, "start1 to end1 is -2 to 5, which is no part"),
        ("wic", WIC_ROW | {"start1": "x"}, "start1 to end1 is 'x' to 5, which is no part"),
        ("wic", WIC_ROW | {"start1": None}, "start1 to end1 is None to 5, which is no part"),
        ("wsc", wsc(span2_text="he"), "span2_text: 'he' is not in the text"),
        ("wsc", wsc(span2_text="!"), "span2_text: '!' is not in the text"),
        ("wsc", wsc(span1_text="You"), "span1_text: 'You' is not in the text"),
        ("wsc", wsc(span1_text="I left"), "span1_text: 'left' is not in the text"),
        ("wsc", wsc(span1_index=0, span1_text="said"), "span1_index is 0, but 'said' stands at 4, counted in words from 0"),
        ("wsc", wsc(span2_index=50), "span2_index is 50, but 'it' stands at 2, counted in words from 0"),
        ("wsc", wsc(span2_index="2"), "span2_index is '2', must be a whole number"),
        ("copa", COPA_ROW | {"question": "reason"}, "question is 'reason', must be cause or effect"),
        ("record", RECORD_ROW | {"qas": [{"query": "no gap", "answers": []}]}, "query 1: no @placeholder in it"),
        ("record", RECORD_ROW | {"passage": {"text": "x", "entities": [{"start": "a"}]}}, "start is 'a', must be a whole num"),
        ("wic", {"text": "Word: x", "label": 1}, "text must be of the form"),
        ("wic", {"word": "x", "sentence1": "y", "label": 1}, "no field 'sentence2'"),
        ("wsc", {"text": "x", "target": {"span1_text": "y"}}, "span2_text is missing, must be text"),
        ("boolq", {"passage": "x", "question": "y", "label": "perhaps"}, "label 'perhaps', task boolq allows 0 (no, false) or"),
        ("cb", {"premise": "x", "hypothesis": "y", "label": 3}, "label 3"),
        ("copa", {"premise": "x", "choice1": "a", "choice2": "b", "question": "cause"}, "no field 'label'"),
    ],
)  # fmt: skip
def test_damaged_rows_of_superglue_are_named(tmp_path, name, row, part):
    good = {"multirc": MULTIRC_ROW, "record": RECORD_ROW, "wsc": WSC_ROW, "wic": WIC_ROW, "copa": COPA_ROW}.get(name)
    path = jsonl(tmp_path, "val.jsonl", *([good] if good else []), row)
    with pytest.raises(UserError) as caught:
        read_file(TASKS[name], path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{2 if good else 1}") and part in message and message.isprintable()


# One file, split so that what is scored together stays together


def test_one_file_is_split_between_questions(tmp_path):
    path = jsonl(tmp_path, "all.jsonl", *[MULTIRC_ROW] * 20)
    data = load_data(TASKS["multirc"], str(path))
    assert not {e.group for e in data.train} & {e.group for e in data.dev}
    assert len({e.group for e in data.dev}) == 4 and len(data.train) + len(data.dev) == 60
    (tmp_path / "one.jsonl").write_text(json.dumps(RECORD_ROW))
    with pytest.raises(UserError, match="one.jsonl: has 1 group of rows that are scored together: need at least 2"):
        load_data(TASKS["record"], str(tmp_path / "one.jsonl"))


# The hub's tables, as data sets and as their Parquet files


def classes(*names):
    return datasets.ClassLabel(names=list(names))


HUB = {
    "mrpc": [{"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 0}],
    "stsb": [{"sentence1": "A.", "sentence2": "B.", "label": 2.5, "idx": 0}],
    "qnli": [{"question": "A?", "sentence": "B.", "label": 1, "idx": 0}],
    "rte": [{"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 0}],
    "boolq": [{"question": "is it", "passage": "It is.", "idx": 0, "label": 1}],
    "copa": [{"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "cause", "idx": 0, "label": 1}],
    "multirc": [
        {"paragraph": "A.", "question": "B?", "answer": a, "idx": {"paragraph": 4, "question": q, "answer": i}, "label": 1}
        for i, (q, a) in enumerate([(0, "x"), (0, "y"), (1, "z")])
    ],
    "record": [
        {"passage": RECORD_TEXT, "query": "@placeholder left.", "entities": ["Ann", "Bob", "Rome"], "answers": ["Bob"],
         "idx": {"passage": 0, "query": 0}}
    ],
    "wic": [{"word": "go", "sentence1": "A.", "sentence2": "B.", "start1": 0, "start2": 0, "end1": 1, "end2": 1, "label": 1}],
    "wsc": [{"text": "it saw it", "span1_index": 0, "span2_index": 2, "span1_text": "it", "span2_text": "it", "label": 1}],
}  # fmt: skip
HUB_LABELS = {"rte": classes("entailment", "not_entailment"), "copa": classes("choice1", "choice2"),
              "multirc": classes("False", "True"), "boolq": classes("False", "True"), "wsc": classes("False", "True"),
              "qnli": classes("entailment", "not_entailment")}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HUB))
def test_tables_of_the_hub(monkeypatch, tmp_path, name):
    table = datasets.Dataset.from_list(HUB[name])
    pq.write_table(pa.table(table.data.table), tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(pa.table(table.data.table), tmp_path / "validation-00000-of-00001.parquet")
    if name in HUB_LABELS:
        table = table.cast_column("label", HUB_LABELS[name])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=table, validation=table))
    loaded, stored = load_data(TASKS[name], ":".join(TASKS[name].hub)), load_data(TASKS[name], str(tmp_path))
    assert [(e.fields, e.label, e.group) for e in loaded.dev] == [(e.fields, e.label, e.group) for e in stored.dev]
    if name == "record":
        assert [(e.fields["candidate"], e.label) for e in loaded.dev] == [("Ann", 0), ("Bob", 1), ("Rome", 0)]
        assert [e.label for e in loaded.train] == [1, 0]
    else:
        assert {e.label for e in loaded.dev} == {2.5 if name == "stsb" else 1}
    if name == "multirc":
        assert [e.group for e in loaded.dev] == ["4-0", "4-0", "4-1"]


def test_the_hubs_classes_are_believed_before_its_numbers(monkeypatch):
    table = datasets.Dataset.from_list(HUB["rte"]).cast_column("label", classes("not_entailment", "entailment"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=table, validation=table))
    assert load_data(TASKS["rte"], "x/y").dev[0].label == 0


@pytest.mark.parametrize(
    ("name", "given"),
    [("boolq", "glue"), ("boolq", "nyu-mll/glue"), ("wic", "glue"), ("rte", "super_glue"), ("sst2", "aps/super_glue")],
)
def test_the_other_benchmarks_name_alone_is_refused_before_the_hub_is_asked(monkeypatch, name, given):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=f"^data '{given}': holds many tasks; that of {name} is {':'.join(TASKS[name].hub)}$"):
        load_data(TASKS[name], given)


def test_rte_of_the_other_benchmark_by_its_whole_name(monkeypatch):
    asked = []
    table = datasets.Dataset.from_list([{"premise": "A.", "hypothesis": "B.", "label": 1, "idx": 0}])
    splits = datasets.DatasetDict(train=table, validation=table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or splits)
    assert load_data(TASKS["rte"], "super_glue:rte").dev[0].fields["premise"] == "A." and asked == [("aps/super_glue", "rte")]


def test_validation_sections_of_mnli_on_the_hub(monkeypatch):
    table = datasets.Dataset.from_list([{"premise": "A.", "hypothesis": "B.", "label": 2, "idx": 0}])
    splits = datasets.DatasetDict(train=table, validation_matched=table, validation_mismatched=table, test_matched=table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: splits)
    data = load_data(TASKS["mnli"], "glue")
    assert [(e.group, e.label, e.origin) for e in data.dev] == [
        ("matched", 2, "validation_matched:1"), ("mismatched", 2, "validation_mismatched:1")
    ]  # fmt: skip


def test_a_diagnostic_set_of_the_hub_is_its_test_split(monkeypatch):
    table = datasets.Dataset.from_list([{"premise": "A.", "hypothesis": "B.", "label": 1, "idx": 0}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(test=table))
    data = load_data(TASKS["axb"], "aps/super_glue:axb")
    assert (data.train, [e.label for e in data.dev]) == ([], [1])
    hidden = datasets.Dataset.from_list([{"premise": "A.", "hypothesis": "B.", "label": -1, "idx": 0}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(test=hidden))
    with pytest.raises(UserError, match="test:1: label -1, task ax allows 0"):
        load_data(TASKS["ax"], "glue:ax")
