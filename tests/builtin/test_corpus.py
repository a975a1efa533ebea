"""The built-in corpus: size, minimal pairs, held-out combinations, determinism, no artefacts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from random import Random

import pytest
import torch

from fastppo.builtin.corpus import DEV_PAIRS, TRAIN_PAIRS, Sentence, build_corpus, is_reserved
from fastppo.builtin.genres import TOPICS, Writer, change
from fastppo.builtin.phenomena import PHENOMENA, make_pair

TRAIN, DEV = build_corpus()


def words(text: str) -> list[str]:
    return text.lower().replace(",", " ,").replace(".", " .").replace("?", " ?").split()


def digest() -> str:
    return hashlib.sha256(repr(build_corpus()).encode()).hexdigest()


def matthews(gold: torch.Tensor, predicted: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([gold.float(), predicted.float()]))[0, 1])


def test_counts_and_balance() -> None:
    assert (len(TRAIN), len(DEV)) == (9000, 1000)
    for split in (TRAIN, DEV):
        assert {s.label for s in split} == {0, 1}
        assert sum(s.label for s in split) / len(split) == pytest.approx(0.55, abs=0.01)
        per_phenomenon = Counter(s.phenomenon for s in split)
        assert len(per_phenomenon) >= 12
        assert min(per_phenomenon.values()) > 0.02 * len(split)


def test_sentences_look_like_sentences() -> None:
    lengths = Counter()
    for sentence in TRAIN + DEV:
        assert sentence.text[0].isupper() and sentence.text[-1] in ".?"
        assert sentence.text == " ".join(sentence.text.split()) and sentence.text.isascii()
        lengths[len(sentence.text.split())] += 1
    assert min(lengths) >= 2 and max(lengths) <= 22
    assert sum(n for length, n in lengths.items() if 4 <= length <= 16) > 0.98 * lengths.total()
    assert len(lengths) > 10


def test_no_text_twice() -> None:
    """No sentence is in both splits, and none has two labels."""
    texts = [s.text for s in TRAIN + DEV]
    assert len(set(texts)) == len(texts)


def test_same_corpus_in_another_process() -> None:
    code = (
        "import hashlib; from fastppo.builtin.corpus import build_corpus;"
        "print(hashlib.sha256(repr(build_corpus()).encode()).hexdigest())"
    )
    for seed in ("1", "4711"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == digest()


def test_callers_cannot_change_the_corpus() -> None:
    first, _ = build_corpus()
    first.clear()
    assert len(build_corpus()[0]) == 9000


def _small_change(a: list[str], b: list[str]) -> bool:
    """Whether one stretch of at most 8 words was replaced, moved, put in or left out."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return max(len(a), len(b)) - start - end <= 8


def test_every_split_is_made_of_minimal_pairs() -> None:
    """Each unacceptable sentence has an acceptable twin of its phenomenon in the same split."""
    for split, pairs in ((TRAIN, TRAIN_PAIRS), (DEV, DEV_PAIRS)):
        good: dict[str, list[list[str]]] = {}
        for s in split:
            if s.label:
                good.setdefault(s.phenomenon, []).append(words(s.text))
        bad = [s for s in split if not s.label]
        assert len(bad) == pairs
        for s in bad[:400]:
            assert any(_small_change(words(s.text), twin) for twin in good[s.phenomenon]), s


@pytest.mark.parametrize("phenomenon", list(PHENOMENA))
def test_pairs(phenomenon: str) -> None:
    rng = Random(5)
    pairs = [make_pair(rng, phenomenon) for _ in range(300)]
    for pair in pairs:
        assert pair.good != pair.bad
        assert pair.phenomenon == phenomenon and pair.key
        assert abs(len(words(pair.good)) - len(words(pair.bad))) <= 4
    assert {p.good for p in pairs}.isdisjoint({p.bad for p in pairs}), "a sentence with both labels"
    keys = {p.key for p in pairs}
    reserved = {key for key in keys if is_reserved(phenomenon, key)}
    assert reserved and reserved != keys


def test_dev_combinations_are_unseen_in_train_but_dev_words_are_seen() -> None:
    """Train draws from unreserved and dev from reserved combinations: check it through the words of the sentences."""
    known = {word for s in TRAIN for word in words(s.text)}
    assert {word for s in DEV for word in words(s.text)} <= known
    # Where the key is one noun, the words show it: no such noun is the determined noun of a train sentence.
    from fastppo.builtin import lexicon as lx

    held_out = {n for n in lx.THINGS + lx.ANIMALS + lx.TEXTS + lx.FOOD if is_reserved("determiner_noun", n.sg)}
    assert held_out
    starts = {"this", "these", "that", "those", "every", "each", "several", "many", "two"}
    for s in TRAIN:
        if s.phenomenon == "determiner_noun" and s.label == 0:
            text = words(s.text)
            wrong = [(a, b) for a, b in zip(text, text[1:], strict=False) if a in starts]
            singular, plural = {"this", "that", "every", "each"}, {"these", "those", "several", "many", "two"}
            for noun in held_out:
                assert not any((a in singular and b == noun.pl) or (a in plural and b == noun.sg) for a, b in wrong), s


def test_pretraining_text_holds_no_sentence_of_the_corpus_and_no_verdict() -> None:
    corpus = [s.text for s in TRAIN + DEV]
    documents = Writer(3).documents()
    text = "\n".join(next(documents) for _ in range(6000))
    seen = set()
    for line in text.split("\n"):
        for part in line.replace('"', "").replace(" [sic]", "").replace("? ", "?|").replace(". ", ".|").split("|"):
            seen.add(part.removeprefix("- ").split(": ")[-1])
    assert len(seen) > 5000
    assert seen.isdisjoint(corpus)
    assert "Acceptable:" not in text and "Grammatical:" not in text
    labels = {line.split(":")[0] for line in text.split("\n") if line.endswith((": yes", ": no"))}
    assert labels == {topic.capitalize() for topic in TOPICS}


def test_corrections_keep_away_from_the_combinations_of_dev() -> None:
    writer = Writer(4)
    for _ in range(2000):
        pair = writer.pair(twins=True)
        assert not is_reserved(pair.phenomenon, pair.key)


@pytest.mark.parametrize(
    ("bad", "good", "expected"),
    [
        ("The dogs sleeps.", "The dogs sleep.", "sleeps to sleep"),
        ("Mary devoured.", "Mary devoured the cake.", "devoured to devoured the cake"),
        ("What did he see it?", "What did he see?", "see it to see"),
        ("Red the car stopped.", "The red car stopped.", "Red the to The red"),
    ],
)
def test_margin_notes(bad: str, good: str, expected: str) -> None:
    assert change(bad, good) == expected


def features(split: list[Sentence], vocabulary: dict[str, int], kind: str) -> torch.Tensor:
    out = torch.zeros(len(split), len(vocabulary) + 4)
    for i, s in enumerate(split):
        tokens = words(s.text)
        for word in tokens if kind == "words" else []:
            if word in vocabulary:
                out[i, vocabulary[word]] = 1
        out[i, -4:] = torch.tensor([len(tokens) / 10, len(s.text) / 50, (len(tokens) / 10) ** 2, float(s.text[-1] == "?")])
    return out


@pytest.mark.parametrize("kind", ["length", "words"])
def test_words_and_length_do_not_give_the_label_away(kind: str) -> None:
    """A logistic regression on single words and length, the best of several strengths of decay, stays below 0.3 on dev."""
    counts = Counter(word for s in TRAIN for word in words(s.text))
    vocabulary = {word: i for i, word in enumerate(sorted(counts))}
    x, y = features(TRAIN, vocabulary, kind), torch.tensor([s.label for s in TRAIN])
    x_dev, y_dev = features(DEV, vocabulary, kind), torch.tensor([s.label for s in DEV])
    for decay in (1e-4, 1e-2):
        weight = torch.zeros(x.shape[1], requires_grad=True)
        bias = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=30)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023
            logits = x @ weight + bias  # noqa: B023
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.float()) + decay * weight.square().sum()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        predicted = (x_dev @ weight + bias > 0).detach()
        if predicted.float().std() > 0:
            assert matthews(y_dev, predicted) < 0.3


def test_no_word_gives_the_label_away() -> None:
    good = Counter(word for s in TRAIN if s.label for word in set(words(s.text)))
    bad = Counter(word for s in TRAIN if not s.label for word in set(words(s.text)))
    for word in good | bad:
        if good[word] + bad[word] >= 30:
            assert 0.15 < good[word] / (good[word] + bad[word]) < 0.9, word
