"""The text and the splits of the study in the README, from folders of public data sets.

    python -m bench.nlu_data DATA OUT

DATA has a folder for each data set, with its own files: sst2, cola, blimp, mrpc, stsb, qqp, wnli, rte, cb, boolq, copa.
OUT gets ``text.txt`` for ``python -m fastppo.builtin.pretrain --text``, one document a line, and ``data/sst2`` and
``data/cola`` for ``fastppo study --data``.

The rows of SST-2 are phrases of parsed sentences, so its test sentences are 1,000 whole sentences of its train set, and no row
that is left for training is one of them or a part of one. CoLA keeps its own dev split; of its train split the unacceptable
sentences, three in ten, stand twice, or a policy that is rewarded for being right learns to accept every sentence. The text
has SST-2's phrases without labels and of CoLA the acceptable sentences alone; behind BLiMP's sentences stand the marks of
linguists, an asterisk where one is unacceptable.
"""

import argparse
import csv
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Words = tuple[str, ...]
ACCEPTABLE, STARRED = "OK", "*"
TEST_SENTENCES, SHORTEST = 1000, 8  # of SST-2: how many, and the fewest words of one


def rows(path: Path, *, header: bool) -> Iterator[list[str]]:
    """The cells of a TSV file, which has no quoting."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if header:
            next(lines)
        yield from lines


def objects(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def parts(sentence: Words) -> set[Words]:
    """Every run of its words, itself too."""
    n = len(sentence)
    return {sentence[i:j] for i in range(n) for j in range(i + 1, n + 1)}


def split_sst2(phrases: dict[Words, str], sentences: int = TEST_SENTENCES, seed: int = 0) -> tuple[list[Words], list[Words]]:
    """Train and test of phrases with their labels: whole sentences are tested, of which training has no part."""
    inner = {part for phrase in phrases for part in parts(phrase) - {phrase} if part in phrases}
    whole = sorted(phrase for phrase in phrases if phrase not in inner and len(phrase) >= SHORTEST)
    test = sorted(random.Random(seed).sample(whole, sentences))
    seen = {part for sentence in test for part in parts(sentence)}
    return [phrase for phrase in phrases if phrase not in seen], test


def sst2(data: Path, out: Path) -> list[str]:
    """Write the two splits; the train phrases."""
    rated = (cells for name in ("train", "dev") for cells in rows(data / f"{name}.tsv", header=True))
    phrases = {tuple(text.split()): label for text, label in rated}
    train, test = split_sst2(phrases)
    out.mkdir(parents=True)
    for name, chosen in (("train", train), ("dev", test)):
        lines = [f"{' '.join(phrase)}\t{phrases[phrase]}\n" for phrase in chosen]
        (out / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    return [" ".join(phrase) for phrase in train]


def cola(data: Path, out: Path) -> None:
    """Write the two splits; the unacceptable sentences of train twice."""
    out.mkdir()
    shutil.copyfile(data / "dev.tsv", out / "dev.tsv")
    train = list(rows(data / "train.tsv", header=False))
    again = [cells for cells in train if cells[1] == "0"]
    (out / "train.tsv").write_text("".join("\t".join(cells) + "\n" for cells in train + again), encoding="utf-8")


def documents(data: Path) -> Iterator[str]:
    """The text of the other data sets' train splits."""
    for cells in rows(data / "cola" / "train.tsv", header=False):
        if cells[1] == "1":
            yield cells[3]
    for path in sorted((data / "blimp").glob("*.jsonl")):
        for pair in objects(path):
            yield f"{pair['sentence_good']} {ACCEPTABLE}"
            yield f"{pair['sentence_bad']} {STARRED}"
    for name, header, columns in (
        ("mrpc/train.tsv", True, (3, 4)), ("stsb/train.tsv", True, (7, 8)), ("qqp/new_dev.tsv", False, (3, 4)),
        ("wnli/train.tsv", True, (1, 2)),
    ):  # fmt: skip
        for cells in rows(data / name, header=header):
            if len(cells) > max(columns):  # one row of QQP is damaged
                yield from (cells[column] for column in columns)
    for name, fields in (
        ("rte", ("premise", "hypothesis")), ("cb", ("premise", "hypothesis")), ("boolq", ("passage", "question")),
        ("copa", ("premise", "choice1", "choice2")),
    ):  # fmt: skip
        for row in objects(data / name / "train.jsonl"):
            yield from (row[field] for field in fields)


def one_line(text: str) -> str:
    return " ".join(text.split())


def make(data: Path, out: Path, say: Callable[[str], None] = print) -> None:
    lines = [*sst2(data / "sst2", out / "data" / "sst2"), *filter(None, map(one_line, documents(data)))]
    random.Random(0).shuffle(lines)
    (out / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cola(data / "cola", out / "data" / "cola")
    say(f"{out / 'text.txt'}: {len(lines):,} documents, {sum(len(line.split()) for line in lines):,} words")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.nlu_data", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("out", type=Path, help="folder to make")
    given = parser.parse_args()
    make(given.data, given.out)
