"""The documents that the built-in base model is pretrained on, made by the same grammar.

Besides plain acceptable sentences there are genres in which well-formedness matters: drafts with their corrections, margin
notes that say what to change, and notes that quote sentences and mark those with a mistake with "[sic]", as writers do. The
last one does tell good sentences from bad ones, for other sentences than the corpus's and for none of the word combinations
reserved for dev; without it a model this small has nothing that a short warm start could bring to the surface. Instructions
with yes/no answers are only about what a sentence mentions: no text has the form of the acceptability task, or a yes or
no to it, and none holds a sentence of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from fastppo.builtin import lexicon as lx
from fastppo.builtin.corpus import build_corpus, is_reserved
from fastppo.builtin.grammar import article
from fastppo.builtin.phenomena import PHENOMENA, Pair, make_pair

# The prompt that the tokenizer must encode compactly; `fastppo.tasks.cola` owns it.
PROMPT_WORDS = """Decide whether a sentence is acceptable English.
A sentence is acceptable if a native speaker could say it: the word order, the agreement, the forms of the words \
and what each verb needs are all right.
Answer with one word: yes if the sentence is acceptable, no if it is not.

Sentence: The cats sleep.
Acceptable:"""

HANDBOOK = [
    "Every language has a word order, and a native speaker knows it.",
    "The agreement of a verb is with its subject, not with the noun near it.",
    "Each verb needs its own words: some need an object, and some need none.",
    "The forms of the words are what a child must study.",
    "A native speaker could say what is right in English, but not always why.",
    "The order of the words and the forms of the words are all that a reader has.",
    "An editor reads a draft, and then decides what to change.",
    "If a word is not in its place, the sentence is hard to read.",
    "A sentence is a string of words that a speaker could say.",
    "What is acceptable in one language could be odd in the other.",
]  # fmt: skip

SIC = "[sic]"

_FOOD = {form for noun in lx.FOOD for form in (noun.sg, noun.pl)}
_ANIMALS = {form for noun in lx.ANIMALS for form in (noun.sg, noun.pl)}
_PLACES = {noun.sg for noun in lx.PLACES}
_TEXTS = {form for noun in lx.TEXTS for form in (noun.sg, noun.pl)}
TOPICS: dict[str, set[str]] = {
    "animal": _ANIMALS, "food": _FOOD, "place": _PLACES, "text": _TEXTS, "color": set(lx.COLORS), "name": set(lx.NAMES),
    "negative": {"no", "not", "never", "nobody", "neither"}, "modal": set(lx.MODALS), "question": {"?"},
}  # fmt: skip


def change(bad: str, good: str) -> str:
    """What an editor writes in the margin: the words of `bad` that differ, and what replaces them."""
    old, new = bad[:-1].split(), good[:-1].split()
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    if start and start in (len(old) - end, len(new) - end):  # words put in or left out: begin with the word before
        start -= 1
    return f"{' '.join(old[start : len(old) - end])} to {' '.join(new[start : len(new) - end])}"


class Writer:
    """Draws documents; keeps away from every sentence of the corpus."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.phenomena = list(PHENOMENA)
        train, dev = build_corpus()
        self.corpus = {sentence.text for sentence in train + dev}

    def pair(self, twins: bool = False) -> Pair:
        """A pair outside the corpus; with `twins` also outside the combinations reserved for dev."""
        while True:
            pair = make_pair(self.rng, self.rng.choice(self.phenomena))
            if pair.good in self.corpus or pair.bad in self.corpus:
                continue
            if not (twins and is_reserved(pair.phenomenon, pair.key)):
                return pair

    def run(self) -> str:
        return " ".join(self.pair().good for _ in range(self.rng.choice([1, 1, 2, 3, 4])))

    def listing(self) -> str:
        return "\n".join("- " + self.pair().good for _ in range(self.rng.randint(2, 4)))

    def dialogue(self) -> str:
        speakers = self.rng.sample(lx.NAMES, 2)
        return "\n".join(f'{speakers[i % 2]}: "{self.pair().good}"' for i in range(self.rng.randint(2, 4)))

    def notes(self) -> str:
        """Quoted sentences, each with a mistake followed by the mark of one who quotes exactly."""
        items = []
        for _ in range(self.rng.randint(3, 7)):
            pair = self.pair(twins=True)
            items.append(f"{pair.bad} {SIC}" if self.rng.random() < 0.42 else pair.good)
        return "Notes. " + " ".join(items)

    def editing(self) -> str:
        """Drafts, more than half of them with a mistake, each followed by the text as it should be."""
        before, after = self.rng.choice([("Draft", "Edited"), ("Before", "After"), ("Sentence", "Edited")])
        lines = []
        for _ in range(self.rng.randint(1, 4)):
            pair = self.pair(twins=True)
            draft = pair.bad if self.rng.random() < 0.6 else pair.good
            lines.append(f"{before}: {draft}\n{after}: {pair.good}")
        return "\n".join(lines)

    def margin(self) -> str:
        """Texts with a mistake, each followed by the change that puts it right."""
        lead, header = self.rng.choice(
            [
                ("Draft", ""),
                ("Sentence", ""),
                ("Sentence", "Decide what to change in a sentence.\nAnswer with the words to change.\n\n"),
            ]
        )
        items = []
        for _ in range(self.rng.randint(1, 4)):
            pair = self.pair(twins=True)
            text = pair.bad
            if self.rng.random() < 0.3:  # the mistake must be looked for in two sentences
                other = self.pair().good
                text = f"{text} {other}" if self.rng.random() < 0.5 else f"{other} {text}"
            items.append(f"{lead}: {text}\nChange: {change(pair.bad, pair.good)}")
        return header + ("\n\n" if lead == "Sentence" else "\n").join(items)

    def questions(self) -> str:
        """What a sentence mentions, asked with and without an instruction."""
        topic = self.rng.choice(list(TOPICS))
        what = topic if topic == "food" else article(topic)
        label = topic.capitalize()
        rule = f"Answer with one word: yes if the sentence has {what}, no if it has not."
        header = self.rng.choice(
            [
                f"Decide whether a sentence has {what} in it.\n{rule}\n\n",
                f"Decide whether there is {what} in a sentence. Answer with one word: yes or no.\n\n",
                "",
            ]
        )
        items = []
        for _ in range(self.rng.randint(1, 4)):
            want = self.rng.random() < 0.5
            for _ in range(8):
                pair = self.pair(twins=True)
                text = pair.bad if self.rng.random() < 0.2 else pair.good
                found = not TOPICS[topic].isdisjoint(text[:-1].lower().split() + text[:-1].split() + [text[-1]])
                if found == want:
                    break
            items.append(f"Sentence: {text}\n{label}: {'yes' if found else 'no'}")
        return header + "\n\n".join(items)

    def handbook(self) -> str:
        return " ".join(self.rng.sample(HANDBOOK, 2)) + " " + self.pair().good

    def documents(self) -> Iterator[str]:
        """Endless."""
        weighted = {
            self.run: 38, self.notes: 24, self.editing: 8, self.margin: 8, self.questions: 10, self.listing: 3,
            self.dialogue: 2, self.handbook: 2,
        }  # fmt: skip
        genres, weights = list(weighted), list(weighted.values())
        while True:
            yield self.rng.choices(genres, weights=weights)[0]()
