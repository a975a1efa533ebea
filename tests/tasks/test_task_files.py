import json
import os
import stat

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastppo.errors import UserError
from fastppo.tasks.cola import COLA
from fastppo.tasks.read import read_file

ALLOWED = r"task cola allows 0 \(no, unacceptable\) or 1 \(yes, acceptable\)"


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(example.fields["sentence"], example.label, example.origin) for example in read_file(COLA, path)]


def fails(tmp_path, name, content, *parts):
    """The error of a file: one line that starts with the file and has all the parts."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name) + ":"), message
    assert len(message.splitlines()) == 1 and message.isprintable()
    for part in parts:
        assert part in message, message
    return message


HOWLS = [("It howls.", 1, ":1"), ("It howl.", 0, ":2")]


def rows(name, first=1):
    return [(text, label, f"{name}:{number}") for number, (text, label, _) in enumerate(HOWLS, first)]


@pytest.mark.parametrize(
    ("content", "first"),
    [
        ("gj04\t1\t\tIt howls.\ngj04\t0\t*\tIt howl.\n", 1),
        ("gj04\t1\t\tIt howls.\ngj04\t0\t*\tIt howl.", 1),
        ("gj04\t1\t\tIt howls.\r\ngj04\t0\t*\tIt howl.\r\n", 1),
        ("\ufeffgj04\t1\t\tIt howls.\ngj04\t0\t*\tIt howl.\n\n\r\n  \n", 1),
        ("source\tlabel\tmark\tsentence\ngj04\t1\t\tIt howls.\ngj04\t0\t*\tIt howl.\n", 2),
        ("sentence\tlabel\nIt howls.\t1\nIt howl.\t0\n", 2),
        ("\ufeffLabel\t Sentence\r\nacceptable\tIt howls.\r\nunacceptable\tIt howl.\r\n", 2),
        ("index\tlabel\tsentence\n0\t1.0\tIt howls.\n1\t0.0\tIt howl.\n", 2),
    ],
)
def test_tsv(tmp_path, content, first):
    assert read(tmp_path, "train.tsv", content) == rows("train.tsv", first)


def test_tsv_quotes_are_plain_characters(tmp_path):
    text = 'x\t1\t\t"Who said\nx\t0\t*\tthat?" he "asked\nx\t1\t\t"whole"\nx\t1\t\t""\n'
    assert [sentence for sentence, _, _ in read(tmp_path, "t.tsv", text)] == [
        '"Who said',
        'that?" he "asked',
        '"whole"',
        '""',
    ]


@pytest.mark.parametrize(
    "odd", ["\0", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\r", "\x1b[31m", "é–中😀"]
)
def test_odd_characters_neither_cut_rows_nor_go_missing(tmp_path, odd):
    sentence = f"a{odd}b {{x}}"
    expected = [(sentence, 1), ("c", 0)]
    tsv = f"x\t1\t\t{sentence}\nx\t0\t*\tc\n"
    assert [row[:2] for row in read(tmp_path, "t.tsv", tsv)] == expected
    jsonl = "".join(json.dumps({"sentence": s, "label": i}, ensure_ascii=False) + "\n" for s, i in expected)
    assert [row[:2] for row in read(tmp_path, "t.jsonl", jsonl)] == expected
    csv = f'sentence,label\n"{sentence}",1\nc,0\n'
    assert [row[:2] for row in read(tmp_path, "t.csv", csv)] == expected


def test_first_row_with_a_label_is_no_header(tmp_path):
    assert read(tmp_path, "t.tsv", "label\t1\t\tsentence\n") == [("sentence", 1, "t.tsv:1")]


def test_jsonl(tmp_path):
    text = '\ufeff{"sentence": "It howls.", "label": 1, "idx": 7}\r\n\n  \n{"label": "no", "sentence": "It howl."}'
    assert read(tmp_path, "t.jsonl", text) == [("It howls.", 1, "t.jsonl:1"), ("It howl.", 0, "t.jsonl:4")]


def test_csv(tmp_path):
    text = '\ufeffidx,Label,sentence\r\n0,1,"One, ""two""\r\nthree"\r\n1,no,It howl.\r\n\r\n'
    assert read(tmp_path, "t.csv", text) == [('One, "two"\r\nthree', 1, "t.csv:2"), ("It howl.", 0, "t.csv:4")]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1, 0], pa.int8()),
        pa.array([1.0, 0.0]),
        pa.array(["acceptable", "no"]),
        pa.array(["1", "0"]).dictionary_encode(),
    ],
)
def test_parquet(tmp_path, labels):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"idx": [[1], [2]], "label": labels, "sentence": ["It howls.", "It howl."]}), path)
    assert [(e.fields["sentence"], e.label, e.origin) for e in read_file(COLA, path)] == rows("t.parquet")


def test_folder_named_like_a_partition_adds_no_column(tmp_path):
    path = tmp_path / "label=0" / "t.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"label": [1], "sentence": ["It howls."]}), path)
    assert [e.label for e in read_file(COLA, path)] == [1]


@pytest.mark.parametrize(
    ("name", "content", "row", "parts"),
    [
        # wrong number of columns, blank rows
        (
            "t.tsv",
            "x\t1\t\ta\nx\t0\t*\n",
            2,
            ["malformed row: has 3 columns", "must have 4 (source, label, mark, sentence)"],
        ),
        ("t.tsv", "x\t1\t\ta\tb\n", 1, ["malformed row: has 5 columns"]),
        ("t.tsv", "just text\n", 1, ["has 1 column,", "or a header line naming 'sentence' and 'label'"]),
        ("t.tsv", "It howls.\t1\n", 1, ["has 2 columns"]),
        ("t.tsv", "x\t1\t\ta\n\nx\t0\t*\tb\n", 2, ["malformed row: is blank, must have 4"]),
        ("t.tsv", "\nx\t1\t\ta\n", 1, ["malformed row: is blank"]),
        ("t.tsv", "x\t1\t\ta\rx\t1\t\tb\r", 1, ["malformed row: has 7 columns"]),
        ("t.tsv", "sentence\tlabel\na\t1\nb\n", 3, ["malformed row: has 1 column,", "must have 2 as in the header"]),
        ("t.csv", "sentence,label\na,1\nb, c,0\n", 3, ["malformed row: has 3 columns, must have 2"]),
        ("t.csv", "sentence,label\na,1\n\nb,0\n", 3, ["malformed row: has 0 columns"]),
        ("t.csv", 'sentence,label\n"a\nb",1\n"c\nd,0\n', 4, ["malformed row: unexpected end of data"]),
        # headers
        (
            "test.tsv",
            "index\tsentence\n0\ta\n",
            1,
            ["no column 'label' (an unlabelled test file?)", "'index, sentence'"],
        ),
        ("t.tsv", "label\ttext\n1\ta\n", 1, ["no column 'sentence'", "'label, text'"]),
        ("t.tsv", "label\tsentence\tSentence\n1\ta\tb\n", 1, ["more than one column 'sentence'"]),
        ("t.csv", "sentence;label\na;1\n", 1, ["no column 'sentence'", "'sentence;label'"]),
        ("t.csv", "a,1\nb,0\n", 1, ["no column 'sentence'"]),
        # JSON
        ("t.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"\n', 2, ["not JSON", "Expecting ',' delimiter"]),
        ("t.jsonl", '\n[{"sentence": "a", "label": 1}]\n', 2, ["malformed row: must be an object with 'sentence' and"]),
        ("t.jsonl", "null\n", 1, ["must be an object", "is None"]),
        ("t.jsonl", '{"text": "a", "label": 1}\n', 1, ["malformed row: no field 'sentence'", "found 'text, label'"]),
        ("t.jsonl", '{"sentence": "a", "idx": 1}\n', 1, ["malformed row: no field 'label'"]),
        # sentences
        ("t.tsv", "x\t1\t\t \n", 1, ["sentence is empty"]),
        ("t.csv", "sentence,label\n,1\n", 2, ["sentence is empty"]),
        ("t.jsonl", '{"sentence": null, "label": 1}\n', 1, ["sentence is missing"]),
        ("t.jsonl", '{"sentence": ["a"], "label": 1}\n', 1, ["sentence is ['a'], must be text"]),
        ("t.jsonl", '{"sentence": "ab\\ud800", "label": 1}\n', 1, ["sentence holds '\\ud800' (character 3)"]),
        # labels
        ("t.tsv", "x\t1\t\ta\nx\t2\t\tb\n", 2, ["label '2'"]),
        ("t.tsv", "x\t1\t\ta\nx\t\t\tb\n", 2, ["label ''"]),
        ("t.tsv", "sentence\tlabel\na\tmaybe\n", 2, ["label 'maybe'"]),
        ("t.tsv", "x\t1\t\ta\nx\tevil\n", 2, ["has 2 columns"]),
        ("t.csv", 'sentence,label\n"a\nb",1\nc,5\n', 4, ["label '5'"]),
        ("t.csv", 'sentence,label\na,"x\ny\x1b[31m"\n', 2, ["label 'x\\ny\\x1b[31m'"]),
        ("t.jsonl", '{"sentence": "a", "label": -1}\n', 1, ["label -1"]),
        ("t.jsonl", '{"sentence": "a", "label": null}\n', 1, ["label is missing"]),
        ("t.jsonl", '{"sentence": "a", "label": NaN}\n', 1, ["label nan"]),
        ("t.jsonl", '{"sentence": "a", "label": {"x": "y"}}\n', 1, ["label {'x': 'y'}"]),
        # encoding
        ("t.tsv", b"x\t1\t\ta\nx\t1\t\tJos\xe9\n", 2, ["not UTF-8: byte 0xe9 at position 15"]),
        ("t.jsonl", "{}".encode("utf-16"), 1, ["not UTF-8: byte 0xff at position 0"]),
        ("t.csv", b"sentence,label\n\xc3(,1\n", 2, ["not UTF-8: byte 0xc3 at position 15"]),
    ],
)
def test_errors_name_the_file_the_row_and_the_value(tmp_path, name, content, row, parts):
    message = fails(tmp_path, name, content, *parts)
    assert message.startswith(f"{tmp_path / name}:{row}: "), message
    assert len(message) < 400 + len(str(tmp_path))


def test_label_errors_say_what_is_allowed(tmp_path):
    with pytest.raises(UserError, match=ALLOWED):
        read(tmp_path, "t.tsv", "x\t7\t\ta\n")


def test_huge_values_are_cut_short(tmp_path):
    message = fails(
        tmp_path, "t.csv", "sentence,label\n" + "x" * 200_000 + ",1\n", "t.csv:2: malformed row: field larger"
    )
    assert len(message) < 200 + len(str(tmp_path))
    for row, part in [
        ('{"sentence": "a", "label": "' + "y" * 5000 + '"}', "t.jsonl:1: label 'yyyyy"),
        ('{"sentence": "a", "label": 1' + "0" * 5000 + "}", "t.jsonl:1: malformed row: not JSON"),
        ('{"sentence": "a", "label": ' + "[" * 100_000, "t.jsonl:1: malformed row: not JSON"),
        ('{"' + "z" * 5000 + '": 1}', "t.jsonl:1: malformed row: no field 'sentence'"),
    ]:
        assert len(fails(tmp_path, "t.jsonl", row, part, "...")) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("t.tsv", [b"", b"\xef\xbb\xbf", b"\n\r\n", b"sentence\tlabel\n", b"label\tsentence"]),
        ("t.csv", [b"", b"\xef\xbb\xbf", b"\n\r\n", b"sentence,label\n", b"label,sentence"]),
        ("t.jsonl", [b"", b"\xef\xbb\xbf", b"\n\r\n"]),
        ("t.parquet", [b""]),
    ],
)
def test_no_rows(tmp_path, name, contents):
    for content in contents:
        fails(tmp_path, name, content, "empty, no rows")


@given(
    st.sampled_from(["t.tsv", "t.csv", "t.jsonl"]),
    st.one_of(
        st.binary(max_size=40),
        st.text('\t\n\r ,"{}:\\\0sentence labl01é\ud7ff\u2028', max_size=60).map(str.encode),
        st.lists(st.sampled_from(['{"sentence":', '"label":', '"a"', "1", ",", "}", "\n", "\t", "sentence", "label"]))
        .map("".join)
        .map(str.encode),
    ),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_gets_past_the_reader(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    try:
        examples = read_file(COLA, tmp_path / name)
    except UserError as error:
        assert str(error).startswith(str(tmp_path / name) + ":") and str(error).isprintable()
    else:
        assert examples
        assert all(e.label in (0, 1) and e.fields["sentence"].strip() for e in examples)


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), path)
    with pytest.raises(UserError, match="t.parquet: empty, no rows"):
        read_file(COLA, path)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"sentence": ["It howls."] * 500, "label": [1] * 500}), path, compression="NONE")
    whole = path.read_bytes()
    for content in (b"no parquet at all", whole[: len(whole) // 2], whole[:-8], b"PAR1", b"\0" * 40 + whole[40:]):
        fails(tmp_path, "t.parquet", content, "damaged Parquet file: ")


def test_parquet_columns_and_values(tmp_path):
    path = tmp_path / "t.parquet"

    def error(**columns):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(UserError) as caught:
            read_file(COLA, path)
        return str(caught.value)

    assert "no column 'label' (an unlabelled test file?)" in error(sentence=["a"], idx=[1])
    assert error(sentence=["a", None], label=[1, 0]).startswith(f"{path}:2: sentence is missing")
    assert error(sentence=["a", "b"], label=[1, None]).startswith(f"{path}:2: label is missing")
    assert error(sentence=["a", "b"], label=[1, -1]).startswith(f"{path}:2: label -1, ")
    assert error(sentence=[b"a"], label=[1]).startswith(f"{path}:1: sentence is b'a', must be text")
    assert error(sentence=["a"], label=[[1]]).startswith(f"{path}:1: label [1], ")


def test_unsupported_suffix(tmp_path):
    for name in ("t.json", "t.txt", "t.tsv.gz", "train"):
        fails(tmp_path, name, "x", "unsupported file type", ".tsv .jsonl .csv .parquet")
    assert read(tmp_path, "T.TSV", "x\t1\t\ta\n") == [("a", 1, "T.TSV:1")]


@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.jsonl", "t.parquet"])
def test_unreadable_files(tmp_path, name, monkeypatch):
    path = tmp_path / name
    with pytest.raises(UserError, match=f"{name}: cannot be read: No such file or directory"):
        read_file(COLA, path)
    path.mkdir()
    with pytest.raises(UserError, match=f"{name}: not a file but a folder"):
        read_file(COLA, path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name}: not a file but a device or pipe"):
        read_file(COLA, path)
    path.unlink()
    path.touch()

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=f"{name}: cannot be read: Permission denied$"):
        read_file(COLA, path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_permission_denied(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("x\t1\t\ta\n")
    path.chmod(stat.S_IWUSR)
    with pytest.raises(UserError, match="t.tsv: cannot be read: Permission denied$"):
        read_file(COLA, path)


def test_a_file_name_with_a_line_break_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b.tsv"
    path.write_text("x\t9\t\ta\n")
    with pytest.raises(UserError) as caught:
        read_file(COLA, path)
    assert "a\\nb\\x1b.tsv:1: label '9'" in str(caught.value)
