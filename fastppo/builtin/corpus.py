"""The built-in acceptability corpus: about 9,000 train and 1,000 dev sentences, deterministic."""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import NamedTuple
from zlib import crc32

from fastppo.builtin.phenomena import PHENOMENA, Pair, make_pair

TRAIN_PAIRS, TRAIN_EXTRA = 4050, 900  # 9,000 sentences, 55 % acceptable
DEV_PAIRS, DEV_EXTRA = 450, 100


class Sentence(NamedTuple):
    text: str
    label: int  # 1 acceptable, 0 not
    phenomenon: str


def is_reserved(phenomenon: str, key: str) -> bool:
    """Whether this combination of words and phenomenon is kept for dev (about one in eight)."""
    return crc32(f"{phenomenon} {key}".encode()) % 8 == 0


def _draw(rng: Random, phenomenon: str, reserved: bool) -> Pair:
    while True:
        pair = make_pair(rng, phenomenon)
        if is_reserved(phenomenon, pair.key) == reserved:
            return pair


def _split(seed: int, pairs: int, extra: int, reserved: bool, taken: dict[str, int]) -> list[Sentence]:
    """`pairs` minimal pairs and `extra` acceptable sentences; `taken` maps every text so far to its label."""
    rng = Random(seed)
    names = list(PHENOMENA)
    out: list[Sentence] = []
    for i in range(pairs + extra):
        while True:
            pair = _draw(rng, names[i % len(names)], reserved)
            if pair.good not in taken and pair.bad not in taken:
                break
        out.append(Sentence(pair.good, 1, pair.phenomenon))
        taken[pair.good] = 1
        if i < pairs:
            out.append(Sentence(pair.bad, 0, pair.phenomenon))
            taken[pair.bad] = 0
    rng.shuffle(out)
    return out


@lru_cache(maxsize=1)
def _corpus() -> tuple[tuple[Sentence, ...], tuple[Sentence, ...]]:
    taken: dict[str, int] = {}
    dev = _split(2, DEV_PAIRS, DEV_EXTRA, True, taken)
    train = _split(1, TRAIN_PAIRS, TRAIN_EXTRA, False, taken)
    return tuple(train), tuple(dev)


def build_corpus() -> tuple[list[Sentence], list[Sentence]]:
    """(train, dev): 9,000 and 1,000 sentences; no text, and no combination of key words and phenomenon, is in both."""
    train, dev = _corpus()
    return list(train), list(dev)
