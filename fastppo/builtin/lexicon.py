"""The words of the built-in grammar: forms, and the classes that decide where each word may stand.

Classes of noun: `p` person, `a` animal, `t` thing, `x` text, `f` food, `l` place, `c` clothes (a part of `t`).
A verb lists the classes its object may have.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """A countable noun; `gender` is "m", "f" or "" (either reflexive is fine)."""

    sg: str
    pl: str
    kind: str
    gender: str = ""


class Verb(NamedTuple):
    """A verb with its five forms; `objects` holds the classes of noun that fit as its direct object."""

    base: str
    third: str
    past: str
    participle: str
    ing: str
    objects: str = ""


def _nouns(kind: str, words: str, gender: str = "") -> list[Noun]:
    out = []
    for word in words.split():
        sg, _, pl = word.partition("/")
        out.append(Noun(sg, pl or sg + "s", kind, gender))
    return out


def _verb(spec: str, objects: str = "") -> Verb:
    """`base[/past[/participle[/ing]]]`; what is left out is regular."""
    base, *rest = spec.split("/")
    stem = base.removesuffix("e")
    y_stem = base[:-1] if base.endswith("y") and base[-2] not in "aeiou" else ""
    third = y_stem + "ies" if y_stem else base + ("es" if base.endswith(("s", "sh", "ch", "x", "z", "go")) else "s")
    past = rest[0] if rest else (y_stem + "ied" if y_stem else stem + "ed")
    participle = rest[1] if len(rest) > 1 else past
    ing = rest[2] if len(rest) > 2 else stem + "ing"
    return Verb(base, third, past, participle, ing, objects)


def _verbs(specs: str, objects: str = "") -> list[Verb]:
    return [_verb(spec, objects) for spec in specs.split()]


PEOPLE = (
    _nouns("p", "teacher doctor student farmer lawyer singer driver writer nurse guest neighbor artist pilot child/children")
    + _nouns("p", "woman/women girl queen mother sister", "f")
    + _nouns("p", "man/men boy king father brother", "m")
)
ANIMALS = _nouns("a", "dog cat horse bird cow rabbit mouse/mice")
CLOTHES = _nouns("t", "coat hat")
THINGS = CLOTHES + _nouns("t", "cup chair box/boxes key car window picture lamp")
TEXTS = _nouns("x", "book letter story/stories poem report")
FOOD = _nouns("f", "apple cake sandwich/sandwiches pie egg cookie")
PLACES = _nouns("l", "garden house park kitchen school office market river village room")
BY_KIND = {"p": PEOPLE, "a": ANIMALS, "t": THINGS, "x": TEXTS, "f": FOOD, "l": PLACES, "c": CLOTHES}

WOMEN_NAMES = ["Mary", "Anna", "Susan", "Linda", "Emma", "Julia"]
MEN_NAMES = ["John", "Peter", "Tom", "Bill", "David", "Paul"]
NAMES = WOMEN_NAMES + MEN_NAMES

# Verbs that need their object: without it the sentence is unacceptable.
TRANSITIVE = (
    _verbs("thank greet praise admire blame invite", "p")
    + _verbs("describe/described mention need like find/found", "paxt")
    + _verbs("fix own carry remove destroy", "t")
    + _verbs("catch/caught", "a")
    + _verbs("wear/wore/worn", "c")
    + _verbs("take/took/taken receive", "txf")
    + _verbs("devour", "f")
)
# Verbs that can do without it.
OPTIONAL = (
    _verbs("eat/ate/eaten cook", "f")
    + _verbs("read/read write/wrote/written study", "x")
    + _verbs("see/saw/seen/seeing forget/forgot/forgotten/forgetting watch", "paxt")
    + _verbs("draw/drew/drawn paint choose/chose/chosen steal/stole/stolen", "tx")
    + _verbs("visit help follow", "p")
)
# Verbs that cannot have an object.
INTRANSITIVE = _verbs(
    "sleep/slept arrive smile sneeze laugh fall/fell/fallen disappear vanish wait cough yawn faint "
    "shiver giggle come/came/come complain"
)
GIVE = _verbs("give/gave/given send/sent show/showed/shown hand lend/lent offer sell/sold", "txf")  # give John the book
EXPLAIN = _verbs("explain donate return announce describe mention", "xt")  # explain the story to John, never the other way
PUT = _verbs("put/put/put/putting place", "txf")  # need an object and a place
THAT_ONLY = _verbs("think/thought believe hope claim suspect")
WHETHER_ONLY = _verbs("wonder ask inquire")
TO_INFINITIVE = _verbs("want decide hope promise manage refuse agree/agreed/agreed/agreeing")
GERUND = _verbs("enjoy avoid finish dislike deny keep/kept")
OBJECT_TO = _verbs("persuade force order allow urge tell/told", "p")
OBJECT_BARE = _verbs("make/made let/let/let/letting see/saw/seen/seeing hear/heard", "p")

SIZES = ["big", "small", "tall", "tiny"]
COLORS = ["red", "green", "black", "white"]
TRAITS = ["old", "young", "happy", "clever", "quiet", "angry"]
LONG_TRAITS = ["careful", "famous", "patient", "polite", "generous"]
SHORT_GRADED = {"tall": "taller", "old": "older", "young": "younger", "small": "smaller", "big": "bigger", "clever": "cleverer"}
STATES = ["tired", "hungry", "late", "ready"]
MANNER = ["quickly", "slowly", "carefully", "quietly", "happily"]
FREQUENCY = ["often", "always", "never", "sometimes", "usually"]
MODALS = ["can", "will", "must", "may", "should", "could", "might", "would"]
# A head, the preposition it selects, and others that are wrong with it in every reading.
SELECTED = [
    ("depends", "on", "of to at"), ("relied", "on", "of to at"), ("listens", "to", "of on"), ("belongs", "to", "of for"),
    ("consists", "of", "on to at"), ("is afraid", "of", "on to at"), ("is proud", "of", "on to at"), ("looks", "at", "of"),
    ("was interested", "in", "of to on"), ("was similar", "to", "of on at"), ("waited", "for", "of to"),
    ("was famous", "for", "of to"), ("believes", "in", "of to at"),
]  # fmt: skip
SUBJECT_PRONOUNS = {"he": "him", "she": "her", "they": "them", "I": "me", "we": "us"}

# Verbs whose object may be any person, those that also take a reflexive, and those that have no progressive.
WITH_PERSON = TRANSITIVE[:10]
WITH_REFLEXIVE = TRANSITIVE[:7] + OPTIONAL[5:10]
STATIVE = {"need", "like", "own", "see", "forget", "receive", "find"}
NEVER_PASSIVE = [verb for verb in INTRANSITIVE if verb.base not in ("come", "fall")]  # "was fallen" is old, not wrong
