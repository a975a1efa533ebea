"""Phrases of the built-in grammar: noun phrases, verb phrases and the frames around a clause.

Every function draws from the `random.Random` it is given and from nothing else, so a seed fixes the text.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from fastppo.builtin import lexicon as lx
from fastppo.builtin.lexicon import Noun, Verb


class Phrase(NamedTuple):
    """A noun phrase: its text, whether it is plural, its head (the key of held-out combinations), gender "m", "f" or ""."""

    text: str
    plural: bool
    head: str
    gender: str = ""


def article(word: str) -> str:
    """ "a" or "an" for the word that follows; every word of the lexicon follows the spelling."""
    return "an " + word if word[0] in "aeiou" else "a " + word


def adjective(rng: Random, noun: Noun) -> str:
    if noun.kind in "pa":
        return rng.choice(lx.TRAITS)
    return rng.choice(lx.SIZES if rng.random() < 0.5 else lx.COLORS) if noun.kind in "tlf" else rng.choice(["old", "famous"])


def noun_phrase(rng: Random, kinds: str = "p", plural: bool | None = None, adjectives: float = 0.15) -> Phrase:
    """A determiner and a noun of one of `kinds`, sometimes with an adjective."""
    noun = rng.choice(lx.BY_KIND[rng.choice(kinds)])
    if plural is None:
        plural = rng.random() < 0.4
    word = noun.pl if plural else noun.sg
    if rng.random() < adjectives:
        word = adjective(rng, noun) + " " + word
    roll = rng.random()
    if roll < 0.65:
        text = "the " + word
    elif plural:
        text = rng.choice(["the", "some", "many", "two", "these", "those", "several"]) + " " + word
    elif roll < 0.85:
        text = article(word)
    else:
        text = rng.choice(["this", "that", "my"]) + " " + word
    return Phrase(text, plural, noun.sg, noun.gender)


def name(rng: Random, other_than: str = "") -> Phrase:
    text = rng.choice(lx.NAMES)
    while text == other_than:
        text = rng.choice(lx.NAMES)
    return Phrase(text, False, text, "f" if text in lx.WOMEN_NAMES else "m")


def subject(rng: Random, plural: bool | None = None) -> Phrase:
    """A person as a full noun phrase or a name (never a pronoun)."""
    return name(rng) if not plural and rng.random() < 0.4 else noun_phrase(rng, "p", plural)


def obj(rng: Random, verb: Verb, plural: bool | None = None) -> Phrase:
    """A noun phrase that fits as the object of `verb`."""
    return noun_phrase(rng, verb.objects, plural)


def place(rng: Random) -> str:
    return f"{rng.choice(['in', 'near', 'behind'])} the {rng.choice(lx.PLACES).sg}"


def present(verb: Verb, plural: bool) -> str:
    return verb.base if plural else verb.third


def any_verb(rng: Random, event: bool = False) -> Verb:
    """A verb with or without an object; with `event` one that has a progressive."""
    roll = rng.random()
    verb = rng.choice(lx.INTRANSITIVE if roll < 0.4 else lx.TRANSITIVE if roll < 0.75 else lx.OPTIONAL)
    return any_verb(rng, event) if event and verb.base in lx.STATIVE else verb


def complement(rng: Random, verb: Verb) -> str:
    """What follows the verb: " " and an object, or nothing for an intransitive verb."""
    return " " + obj(rng, verb).text if verb.objects else ""


def predicate(rng: Random, plural: bool) -> tuple[str, str, str]:
    """A present-tense predicate as (agreeing, clashing, key)."""
    roll = rng.random()
    if roll < 0.5:
        verb = any_verb(rng)
        rest = complement(rng, verb)
        return present(verb, plural) + rest, present(verb, not plural) + rest, verb.base
    if roll < 0.65:
        verb = any_verb(rng, event=True)
        rest = f" {verb.ing}{complement(rng, verb)}"
        forms = rng.choice([("are", "is"), ("were", "was")])
    elif roll < 0.8:
        verb = any_verb(rng)
        rest = f" {verb.participle}{complement(rng, verb)}"
        forms = ("have", "has")
    else:
        state = rng.choice(lx.STATES + lx.LONG_TRAITS)
        forms = rng.choice([("are", "is"), ("were", "was")])
        return f"{forms[not plural]} {state}", f"{forms[plural]} {state}", state
    return forms[not plural] + rest, forms[plural] + rest, verb.base


def past_clause(rng: Random) -> str:
    """A short clause in the past tense."""
    verb = any_verb(rng)
    return f"{subject(rng).text} {verb.past}{complement(rng, verb)}"


def prefix(rng: Random) -> str:
    """The start of a frame that any declarative clause may follow; it licenses no polarity item."""
    roll = rng.random()
    if roll < 0.3:
        return f"{subject(rng).text} {rng.choice(['said', 'believed', 'heard', 'thought'])} that "
    if roll < 0.5:
        return rng.choice(["I know that ", "we know that ", "it is clear that ", "it is true that ", "they say that "])
    if roll < 0.7:
        return rng.choice(["perhaps ", "of course, ", "in fact, ", "luckily, "])
    if roll < 0.85:
        return f"{past_clause(rng)}, {rng.choice(['but', 'and'])} "
    return f"{place(rng)}, "


def suffix(rng: Random) -> str:
    """The end of a frame that any clause may precede, whatever it contains."""
    roll = rng.random()
    if roll < 0.45:
        return " " + place(rng)
    if roll < 0.65:
        return " " + rng.choice(["after lunch", "before dinner", "at home", "with " + name(rng).text])
    return f"{rng.choice([' because', ', but', ' when', ', and'])} {subject(rng).text} {rng.choice(lx.INTRANSITIVE).past}"


def render(clause: str, mark: str = ".") -> str:
    """A sentence: initial capital, final mark."""
    return clause[0].upper() + clause[1:] + mark
