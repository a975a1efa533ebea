"""Minimal pairs, phenomenon by phenomenon: an acceptable sentence and its minimally different unacceptable twin.

Each function returns a `Draft`; its `key` names the words whose combination with the phenomenon is kept out of train when the
corpus reserves it for dev. `frame` says what may be put around the clause: "p" a prefix, "s" a suffix, "?" a question mark.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from fastppo.builtin import lexicon as lx
from fastppo.builtin.grammar import (
    Phrase,
    adjective,
    any_verb,
    article,
    complement,
    name,
    noun_phrase,
    obj,
    place,
    predicate,
    prefix,
    present,
    render,
    subject,
    suffix,
)


class Draft(NamedTuple):
    good: str
    bad: str
    key: str
    frame: str = "ps"


class Pair(NamedTuple):
    """An acceptable and an unacceptable sentence, finished; `key` is the word combination that decides train or dev."""

    good: str
    bad: str
    phenomenon: str
    key: str


def agreement_simple(rng: Random) -> Draft:
    if rng.random() < 0.2:
        first = name(rng)
        start = f"{first.text} and {name(rng, first.text).text}"
        good, bad, key = predicate(rng, True)
        return Draft(f"{start} {good}", f"{start} {bad}", f"and {key}")
    subj = subject(rng)
    good, bad, key = predicate(rng, subj.plural)
    return Draft(f"{subj.text} {good}", f"{subj.text} {bad}", f"{subj.head} {key}")


def agreement_prepositional(rng: Random) -> Draft:
    """A noun of the other number between the head and the verb."""
    head = noun_phrase(rng, "p")
    inner = noun_phrase(rng, rng.choice(["p", "a", "t"]), plural=not head.plural if rng.random() < 0.75 else head.plural)
    good, bad, key = predicate(rng, head.plural)
    start = f"{head.text} {rng.choice(['near', 'behind', 'with'])} {inner.text}"
    return Draft(f"{start} {good}", f"{start} {bad}", f"{head.head} {key}")


def agreement_relative(rng: Random) -> Draft:
    """A relative clause, with a noun of the other number in it, between the head and the verb."""
    head = noun_phrase(rng, "p")
    inner = noun_phrase(rng, "p", plural=not head.plural if rng.random() < 0.75 else head.plural)
    verb = rng.choice(lx.WITH_PERSON)
    if rng.random() < 0.5:
        start = f"{head.text} that {inner.text} {present(verb, inner.plural) if rng.random() < 0.5 else verb.past}"
    else:
        start = f"{head.text} who {present(verb, head.plural) if rng.random() < 0.5 else verb.past} {inner.text}"
    good, bad, key = predicate(rng, head.plural)
    return Draft(f"{start} {good}", f"{start} {bad}", f"{head.head} {key}")


def agreement_there(rng: Random) -> Draft:
    noun = rng.choice(lx.BY_KIND[rng.choice("patxf")])
    plural = rng.random() < 0.5
    det = rng.choice(["two", "several", "some", "many", "no"]) if plural else "a"
    words = f"{det} {noun.pl}" if plural else article(noun.sg)
    tense = rng.choice([("is", "are"), ("was", "were"), ("has been", "have been")])
    where = place(rng)
    good, bad = (f"there {tense[i]} {words} {where}" for i in (plural, not plural))
    return Draft(good, bad, f"{noun.sg} {tense[0]}", "p")


def existential_quantifier(rng: Random) -> Draft:
    noun = rng.choice(lx.BY_KIND[rng.choice("patxf")])
    where = place(rng)
    if rng.random() < 0.5:
        good, bad = rng.choice(["some", "no", "many", "two"]), rng.choice(["all", "most", "both"])
        verb, word = rng.choice(["are", "were"]), noun.pl
    else:
        good, bad = rng.choice([article(noun.sg).split()[0], "no"]), rng.choice(["every", "each"])
        verb, word = rng.choice(["is", "was"]), noun.sg
    bad_sentence = f"there {verb} {bad} {word} {where}"
    if rng.random() < 0.5:  # the same quantifier is fine in a plain subject
        return Draft(f"{bad} {word} {verb} {where}", bad_sentence, f"{noun.sg} {bad}", "p")
    return Draft(f"there {verb} {good} {word} {where}", bad_sentence, f"{noun.sg} {bad}", "p")


def determiner_noun(rng: Random) -> Draft:
    noun = rng.choice(lx.BY_KIND[rng.choice("paxtf")])
    plural = rng.random() < 0.5
    middle = adjective(rng, noun) + " " if rng.random() < 0.35 else ""
    if rng.random() < 0.5:  # the determiner is wrong
        good, bad = rng.choice([("this", "these"), ("that", "those"), ("every", "several"), ("each", "many")])
        if plural:
            good, bad = bad, good
        good, bad = (f"{det} {middle}{noun.pl if plural else noun.sg}" for det in (good, bad))
    else:  # the noun is wrong
        det = rng.choice(["these", "those", "several", "many", "two"] if plural else ["this", "that", "every", "each"])
        forms = (noun.pl, noun.sg) if plural else (noun.sg, noun.pl)
        good, bad = (f"{det} {middle}{form}" for form in forms)
    if rng.random() < 0.5 and noun.kind == "p":
        tail = rng.choice(lx.INTRANSITIVE).past
        return Draft(f"{good} {tail}", f"{bad} {tail}", noun.sg)
    verb = rng.choice([v for v in lx.TRANSITIVE + lx.OPTIONAL if noun.kind in v.objects])
    start = f"{subject(rng).text} {verb.past}"
    return Draft(f"{start} {good}", f"{start} {bad}", noun.sg)


def _reflexive(phrase: Phrase, rng: Random) -> str:
    if phrase.plural:
        return "themselves"
    return {"m": "himself", "f": "herself", "": rng.choice(["himself", "herself"])}[phrase.gender]


def reflexive_agreement(rng: Random) -> Draft:
    subj = subject(rng)
    verb = rng.choice(lx.WITH_REFLEXIVE)
    start = subj.text
    if rng.random() < 0.4:
        start += f" {rng.choice(['near', 'behind'])} {noun_phrase(rng, 'p', not subj.plural).text}"
    good = _reflexive(subj, rng)
    bad = "themselves"
    if subj.plural or (subj.gender and rng.random() < 0.6):
        bad = {"himself": "herself", "herself": "himself", "themselves": rng.choice(["himself", "herself"])}[good]
    return Draft(f"{start} {verb.past} {good}", f"{start} {verb.past} {bad}", f"{subj.head} {verb.base}")


def reflexive_locality(rng: Random) -> Draft:
    """The antecedent must be in the reflexive's own clause."""
    plural = rng.random() < 0.5
    outer, inner = subject(rng, plural), subject(rng, not plural)
    verb = rng.choice(lx.WITH_REFLEXIVE)
    start = f"{outer.text} {rng.choice(lx.THAT_ONLY).past} that {inner.text} {verb.past}"
    return Draft(f"{start} {_reflexive(inner, rng)}", f"{start} {_reflexive(outer, rng)}", f"{inner.head} {verb.base}", "s")


def transitivity(rng: Random) -> Draft:
    """An object that is missing, or one that the verb cannot have."""
    subj = subject(rng)
    needs, refuses = rng.choice(lx.TRANSITIVE), rng.choice(lx.INTRANSITIVE)
    aux, form = rng.choice(
        [("", "past"), ("", "past"), ("will ", "base"), ("has " if not subj.plural else "have ", "participle")]
    )
    what = obj(rng, needs).text
    start = f"{subj.text} {aux}"
    with_object, without = f"{start}{getattr(needs, form)} {what}", f"{start}{getattr(refuses, form)}"
    roll = rng.random()
    if roll < 0.3:
        return Draft(with_object, f"{start}{getattr(needs, form)}", needs.base)
    if roll < 0.6:
        return Draft(without, f"{start}{getattr(refuses, form)} {what}", refuses.base)
    if roll < 0.8:
        return Draft(with_object, f"{start}{getattr(refuses, form)} {what}", refuses.base)
    return Draft(without, f"{start}{getattr(needs, form)}", needs.base)


def dative(rng: Random) -> Draft:
    """Verbs of giving take two objects; verbs of explaining need "to"."""
    give, explain = rng.choice(lx.GIVE), rng.choice(lx.EXPLAIN)
    giver, taker = subject(rng).text, subject(rng).text
    noun = obj(rng, explain)
    what = noun.text
    roll = rng.random()
    verb = explain
    if roll < 0.4:
        good, bad = f"{giver} {verb.past} {what} to {taker}", f"{giver} {verb.past} {taker} {what}"
    elif roll < 0.7:
        good, bad = f"{giver} {give.past} {taker} {what}", f"{giver} {explain.past} {taker} {what}"
    else:
        good, bad = f"{giver} {give.past} {taker} {what}", f"{giver} {give.past} {what} {taker}"
        verb = give
    return Draft(good, bad, f"{verb.base} {noun.head}")


def locative(rng: Random) -> Draft:
    """ "put" needs an object and a place; verbs that move nothing take no object with it."""
    verb = rng.choice(lx.PUT)
    who, what, where = subject(rng).text, obj(rng, verb), place(rng)
    good = f"{who} {verb.past} {what.text} {where}"
    if rng.random() < 0.5:
        return Draft(good, f"{who} {verb.past} {rng.choice([what.text, where])}", f"{verb.base} {what.head}", "p")
    wrong = rng.choice(lx.INTRANSITIVE)
    return Draft(good, f"{who} {wrong.past} {what.text} {where}", f"{wrong.base} {verb.base}", "p")


def polarity(rng: Random) -> Draft:
    """ "ever", "any", "at all", "yet" and "anybody" need a negative word before them."""
    noun = rng.choice(lx.PEOPLE)
    verb = any_verb(rng)
    roll = rng.random()
    if roll < 0.35:
        good, bad, has = rng.choice(
            [("no", "some", "has"), ("no", "that", "has"), ("few", "many", "have"), ("no", "these", "have")]
        )
        word = noun.sg if has == "has" else noun.pl
        rest = f"{word} {has} ever {verb.participle}{complement(rng, verb)}"
        return Draft(f"{good} {rest}", f"{bad} {rest}", f"ever {noun.sg}", "p")
    subj = subject(rng)
    has = "have" if subj.plural else "has"
    if roll < 0.6:
        verb = rng.choice(lx.TRANSITIVE)
        what = rng.choice(lx.BY_KIND[rng.choice(verb.objects)]).pl
        good, bad = rng.choice([("did not", "did"), ("never", "often")])
        form = verb.base if good == "did not" else verb.past
        if bad == "did":
            return Draft(
                f"{subj.text} did not {form} any {what}", f"{subj.text} {verb.past} any {what}", f"any {verb.base}", "p"
            )
        return Draft(f"{subj.text} {good} {form} any {what}", f"{subj.text} {bad} {form} any {what}", f"any {verb.base}", "p")
    if roll < 0.8:
        item = rng.choice(["at all", "yet"])
        verb = rng.choice(lx.INTRANSITIVE)
        good, bad = f"{has} not {verb.participle} {item}", f"{has} {verb.participle} {item}"
        return Draft(f"{subj.text} {good}", f"{subj.text} {bad}", f"{item} {verb.base}", "p")
    verb = rng.choice(lx.WITH_PERSON)
    good, bad = rng.choice([("nobody", "somebody"), ("nobody", "everybody"), (f"no {noun.sg}", f"the {noun.sg}")])
    return Draft(f"{good} {verb.past} anybody", f"{bad} {verb.past} anybody", f"anybody {verb.base}", "p")


def polarity_scope(rng: Random) -> Draft:
    """The negative word must be above the polarity item, not inside a relative clause."""
    outer, inner = rng.choice(lx.PEOPLE), rng.choice(lx.PEOPLE)
    like, verb = rng.choice(lx.WITH_PERSON), any_verb(rng)
    rest = f"has ever {verb.participle}{complement(rng, verb)}"
    if rng.random() < 0.5:
        middle = [f"{outer.sg} that {det} {inner.sg} {like.past}" for det in ("the", "no")]
    else:
        middle = [f"{outer.sg} who {like.past} {det} {inner.sg}" for det in ("the", "no")]
    return Draft(f"no {middle[0]} {rest}", f"the {middle[1]} {rest}", f"{outer.sg} {like.base}", "p")


def _gap_verb(rng: Random) -> lx.Verb:
    """A verb that needs its object, and whose object is a "what"."""
    return rng.choice([v for v in lx.TRANSITIVE if v.objects != "p" and v.base != "devour"])


def filler_gap(rng: Random) -> Draft:
    """ "what" needs a gap; "that" must not have one."""
    knower, who, verb = subject(rng).text, subject(rng).text, _gap_verb(rng)
    know = rng.choice(["knew", "forgot", "heard", "saw"])
    start, what = f"{knower} {know}", obj(rng, verb).text
    tail = rng.choice(["", f" {place(rng)}"])
    full, gap = f"{who} {verb.past} {what}{tail}", f"{who} {verb.past}{tail}"
    roll = rng.random()
    if roll < 0.25:
        good, bad = f"{start} what {gap}", f"{start} what {full}"
    elif roll < 0.5:
        good, bad = f"{start} that {full}", f"{start} that {gap}"
    elif roll < 0.75:
        good, bad = f"{start} what {gap}", f"{start} that {gap}"
    else:
        good, bad = f"{start} that {full}", f"{start} what {full}"
    return Draft(good, bad, f"{know} {verb.base}", "")


def wh_island(rng: Random) -> Draft:
    """No question word out of an embedded question."""
    outer, inner, verb = subject(rng), subject(rng).text, _gap_verb(rng)
    bridge, closed = rng.choice(lx.THAT_ONLY), rng.choice(lx.WHETHER_ONLY)
    word = rng.choice(["what", f"which {rng.choice(lx.BY_KIND[verb.objects[-1]]).sg}"])
    key = f"{verb.base} {closed.base}"
    if rng.random() < 0.5:
        start = f"{word} did {outer.text}"
        good, bad = f"{start} {bridge.base} that {inner} {verb.past}", f"{start} {closed.base} whether {inner} {verb.past}"
        return Draft(good, bad, key, "?")
    start = f"{name(rng).text} knew {word} {outer.text}"
    good, bad = f"{start} {bridge.past} that {inner} {verb.past}", f"{start} {closed.past} whether {inner} {verb.past}"
    return Draft(good, bad, key, "")


def coordinate_island(rng: Random) -> Draft:
    """No question word out of one half of a coordination."""
    first, verb = name(rng), _gap_verb(rng)
    second = name(rng, first.text)
    what = obj(rng, verb).text
    roll = rng.random()
    if roll < 0.3:
        good, bad = (
            f"what did {first.text} and {second.text} {verb.base}",
            f"what did {first.text} {verb.base} and {second.text}",
        )
    elif roll < 0.6:
        start = f"did {first.text} {verb.base} {what} and"
        good, bad = f"{start} {obj(rng, verb).text}", f"what {start}"
    else:
        other = _gap_verb(rng)
        start = f"what did {first.text} {verb.base} and {second.text}"
        good, bad = f"{start} {other.base}", f"{start} {other.base} {obj(rng, other).text}"
    return Draft(good, bad, f"{verb.base} {first.text}", "?")


def adjunct_island(rng: Random) -> Draft:
    """No question word out of an adverbial clause."""
    first, verb, stay = subject(rng).text, _gap_verb(rng), rng.choice(lx.INTRANSITIVE)
    second = subject(rng).text
    link = rng.choice(["before", "after", "because"])
    word = rng.choice(["what", f"which {rng.choice(lx.BY_KIND[verb.objects[-1]]).sg}"])
    if rng.random() < 0.5:
        start = f"{word} did {first}"
        good, bad = f"{start} {verb.base} {link} {second} {stay.past}", f"{start} {stay.base} {link} {second} {verb.past}"
        return Draft(good, bad, f"{verb.base} {link}", "?")
    start = f"{name(rng).text} knew {word} {first}"
    good, bad = f"{start} {verb.past} {link} {second} {stay.past}", f"{start} {stay.past} {link} {second} {verb.past}"
    return Draft(good, bad, f"{verb.base} {link}", "")


def adverb_order(rng: Random) -> Draft:
    """Nothing between a verb and its object; no manner adverb inside a noun phrase."""
    subj, verb = subject(rng), rng.choice(lx.TRANSITIVE + lx.OPTIONAL)
    what = noun_phrase(rng, verb.objects, adjectives=0)
    adverb = rng.choice(lx.MANNER + lx.FREQUENCY)
    good = f"{subj.text} {adverb} {verb.past} {what.text}"
    if rng.random() < 0.6:
        return Draft(good, f"{subj.text} {verb.past} {adverb} {what.text}", f"{adverb} {verb.base}")
    det, word = what.text.split()
    if det in ("a", "an"):
        det = article(adverb).split()[0]
    return Draft(good, f"{subj.text} {verb.past} {det} {adverb} {word}", f"{adverb} {verb.base}")


def noun_phrase_order(rng: Random) -> Draft:
    noun = rng.choice(lx.BY_KIND[rng.choice("patxlf")])
    first, second = adjective(rng, noun), noun.pl if rng.random() < 0.4 else noun.sg
    det = rng.choice(["the", "my", "the", "some" if second == noun.pl else "this"])
    good, bad = f"{det} {first} {second}", f"{first} {det} {second}"
    if rng.random() < 0.5:
        bad = rng.choice([f"{det} {second} {first}", bad])  # after a verb this order can be a result: "painted the cup red"
        tail = f"{'were' if second == noun.pl else 'was'} {place(rng)}"
        return Draft(f"{good} {tail}", f"{bad} {tail}", f"{first} {noun.sg}")
    verb = rng.choice([v for v in lx.TRANSITIVE + lx.OPTIONAL if noun.kind in v.objects] or lx.TRANSITIVE[6:7])
    start = f"{subject(rng).text} {verb.past}"
    return Draft(f"{start} {good}", f"{start} {bad}", f"{first} {noun.sg}")


def auxiliary_order(rng: Random) -> Draft:
    subj, verb, modal = subject(rng), any_verb(rng, event=True), rng.choice(lx.MODALS)
    rest = complement(rng, verb)
    has, was = ("have", "were") if subj.plural else ("has", "was")
    good, bad = rng.choice(
        [
            (f"{modal} have {verb.participle}", f"have {modal} {verb.participle}"),
            (f"{modal} be {verb.ing}", f"be {modal} {verb.ing}"),
            (f"{has} been {verb.ing}", f"been {has} {verb.ing}"),
            (f"{modal} not {verb.base}", f"not {modal} {verb.base}"),
            (f"{was} not {verb.ing}", f"not {was} {verb.ing}"),
        ]
    )
    return Draft(f"{subj.text} {good}{rest}", f"{subj.text} {bad}{rest}", f"{modal} {verb.base}")


def question_order(rng: Random) -> Draft:
    """Inversion in a main question, none in an embedded one."""
    subj, verb, modal = subject(rng), rng.choice(lx.INTRANSITIVE), rng.choice(["did", "will", "could", "should"])
    word = rng.choice(["when", "why", "where"])
    if rng.random() < 0.5:
        good, bad = f"{word} {modal} {subj.text} {verb.base}", f"{word} {subj.text} {modal} {verb.base}"
        return Draft(good, bad, f"{word} {verb.base}", "?")
    start = f"{subject(rng).text} {rng.choice(['asked', 'knew', 'wondered', 'forgot'])} {word}"
    modal = rng.choice(["will", "could", "should", "would"])
    return Draft(
        f"{start} {subj.text} {modal} {verb.base}", f"{start} {modal} {subj.text} {verb.base}", f"{word} {verb.base}", ""
    )


def verb_form(rng: Random) -> Draft:
    """The form that an auxiliary asks for."""
    subj, verb = subject(rng), any_verb(rng, event=True)
    start = subj.text
    forms = {"base": verb.base, "past": verb.past, "participle": verb.participle, "ing": verb.ing}
    aux, want = rng.choice(
        [(rng.choice(lx.MODALS), "base"), ("did not", "base"), ("have" if subj.plural else "has", "participle")]
        + [("were" if subj.plural else "was", "ing")]
    )
    middle = rng.choice(["", "", " " + rng.choice(lx.FREQUENCY)]) if "not" not in aux else ""
    wrong = [form for form in forms.values() if form != forms[want]]
    if aux in ("was", "were"):  # "was" with a participle is a passive
        wrong = [form for form in (verb.base, verb.past) if form != verb.participle] or [verb.base]
    rest = complement(rng, verb)
    good, bad = f"{start} {aux}{middle} {forms[want]}{rest}", f"{start} {aux}{middle} {rng.choice(wrong)}{rest}"
    return Draft(good, bad, f"{aux.split()[-1]} {verb.base}")


def negation(rng: Random) -> Draft:
    """ "not" needs an auxiliary, and "do" takes the base form."""
    subj, verb = subject(rng), any_verb(rng)
    rest = complement(rng, verb)
    does = "do" if subj.plural else "does"
    good = f"{subj.text} {does} not {verb.base}{rest}"
    finite = present(verb, subj.plural)
    bad = [f"{subj.text} not {finite}{rest}", f"{subj.text} {finite} not{rest}"]
    if not subj.plural:
        bad.append(f"{subj.text} does not {finite}{rest}")
    if rng.random() < 0.5:
        good = f"{subj.text} did not {verb.base}{rest}"
        bad = [f"{subj.text} not {verb.past}{rest}", f"{subj.text} {verb.past} not{rest}"]
    return Draft(good, rng.choice(bad), f"{subj.head} {verb.base}")


def pronoun_case(rng: Random) -> Draft:
    nominative = rng.choice(list(lx.SUBJECT_PRONOUNS))
    accusative = lx.SUBJECT_PRONOUNS[nominative]
    roll = rng.random()
    if roll < 0.4:
        verb = any_verb(rng)
        rest = f"{verb.past}{complement(rng, verb)}"
        start = f"{name(rng).text} and " if roll < 0.12 else ""
        return Draft(f"{start}{nominative} {rest}", f"{start}{accusative} {rest}", f"{nominative} {verb.base}")
    verb = rng.choice(lx.WITH_PERSON)
    start = f"{subject(rng).text} {verb.past}"
    if roll > 0.75:
        verb = any_verb(rng)
        start = f"{subject(rng).text} {verb.past}{complement(rng, verb)} {rng.choice(['with', 'near', 'behind'])}"
    return Draft(f"{start} {accusative}", f"{start} {nominative}", f"{accusative} {verb.base}")


def complementizer(rng: Random) -> Draft:
    """ "think" takes "that", "wonder" takes "whether"."""
    who, inner = subject(rng), subject(rng)
    verb = any_verb(rng)
    tail = f"{inner.text} {verb.past}{complement(rng, verb)}"
    that, whether = rng.choice(lx.THAT_ONLY), rng.choice(lx.WHETHER_ONLY)
    roll = rng.random()
    if roll < 0.25:
        good, bad = f"{that.past} that", f"{that.past} whether"
    elif roll < 0.5:
        good, bad = f"{whether.past} whether", f"{whether.past} that"
    elif roll < 0.75:
        good, bad = f"{that.past} that", f"{whether.past} that"
    else:
        good, bad = f"{whether.past} whether", f"{that.past} whether"
    return Draft(
        f"{who.text} {good} {tail}", f"{who.text} {bad} {tail}", f"{who.head} {(whether if roll >= 0.25 else that).base}"
    )


def nonfinite(rng: Random) -> Draft:
    """Infinitive, gerund or bare verb, as the verb above asks."""
    who, verb = subject(rng), any_verb(rng, event=True)
    rest = complement(rng, verb)
    roll = rng.random()
    if roll < 0.5:
        to, ing = rng.choice(lx.TO_INFINITIVE), rng.choice(lx.GERUND)
        phrases = {to: f"to {verb.base}{rest}", ing: f"{verb.ing}{rest}"}
    else:
        to, ing = rng.choice(lx.OBJECT_TO), rng.choice(lx.OBJECT_BARE)
        who2 = subject(rng).text
        phrases = {to: f"{who2} to {verb.base}{rest}", ing: f"{who2} {verb.base}{rest}"}
    if rng.random() < 0.5:
        to, ing = ing, to
    wrong = rng.random() < 0.5
    good = f"{who.text} {to.past} {phrases[to]}"
    bad = f"{who.text} {to.past} {phrases[ing]}" if wrong else f"{who.text} {ing.past} {phrases[to]}"
    return Draft(good, bad, f"{to.base} {verb.base}")


def passive(rng: Random) -> Draft:
    verb = rng.choice(lx.TRANSITIVE + lx.OPTIONAL)
    what, agent = obj(rng, verb), subject(rng).text
    was = rng.choice(["were", "have been"] if what.plural else ["was", "has been"])
    by = f" by {agent}" if rng.random() < 0.7 else ""
    good = f"{what.text} {was} {verb.participle}{by}"
    roll = rng.random()
    if roll < 0.4:
        wrong = verb.past if verb.past != verb.participle else verb.base
        return Draft(good, f"{what.text} {was} {wrong}{by}", verb.base)
    if roll < 0.75:
        return Draft(good, f"{what.text} {was} {rng.choice(lx.NEVER_PASSIVE).participle}{by}", verb.base)
    return Draft(good, f"{what.text} {was} {verb.participle} {noun_phrase(rng, verb.objects).text}{by}", verb.base)


def comparative(rng: Random) -> Draft:
    short = rng.choice(list(lx.SHORT_GRADED))
    graded = lx.SHORT_GRADED[short]
    first, second = subject(rng), subject(rng).text
    start = f"{first.text} {'were' if first.plural else 'was'}"
    long = rng.choice(lx.LONG_TRAITS)
    good, bad = rng.choice(
        [
            (f"{graded} than", f"more {graded} than"),
            (f"{graded} than", f"{short} than"),
            (f"{graded} than", f"{graded} as"),
            (f"as {short} as", f"as {graded} as"),
            (f"as {short} as", f"as {short} than"),
            (f"as {long} as", f"as {long} than"),
            (f"more {long} than", f"{long} than"),
            (f"more {long} than", f"more {long} as"),
        ]
    )
    return Draft(f"{start} {good} {second}", f"{start} {bad} {second}", f"{first.head} {long if long in good else short}")


def relative_pronoun(rng: Random) -> Draft:
    """ "who" for people, "which" for things; the gap stays empty."""
    roll = rng.random()
    if roll < 0.5:
        who = rng.choice([noun for noun in lx.PEOPLE if noun.sg != "child"])
        verb = any_verb(rng)
        tail = f"{verb.past}{complement(rng, verb)}"
        start = f"{subject(rng).text} {rng.choice(lx.WITH_PERSON).past} the {who.sg}"
        return Draft(f"{start} who {tail}", f"{start} which {tail}", who.sg)
    verb = rng.choice([v for v in lx.TRANSITIVE + lx.OPTIONAL if set(v.objects) & set("xt")])
    noun = rng.choice(lx.BY_KIND[next(kind for kind in verb.objects if kind in "xt")])
    owner = subject(rng).text
    start, tail = f"the {noun.sg}", f"{owner} {verb.past}"
    end = f"was {place(rng)}"
    if roll < 0.75:
        return Draft(f"{start} which {tail} {end}", f"{start} who {tail} {end}", noun.sg)
    that = rng.choice(["which", "that"])
    return Draft(f"{start} {that} {tail} {end}", f"{start} {that} {tail} it {end}", noun.sg)


def selected_preposition(rng: Random) -> Draft:
    head, right, others = rng.choice(lx.SELECTED)
    wrong = rng.choice(others.split())
    subj, other = subject(rng, plural=False), noun_phrase(rng, "pt")
    if head in ("belongs", "consists"):
        subj = noun_phrase(rng, "tx", plural=False)
    good, bad = (f"{subj.text} {head} {prep} {other.text}" for prep in (right, wrong))
    return Draft(good, bad, f"{head} {subj.head}", "p")


def tense_adverb(rng: Random) -> Draft:
    subj, verb = subject(rng), any_verb(rng)
    rest = complement(rng, verb)
    forms = {"past": verb.past, "future": f"will {verb.base}"}
    when = {"past": rng.choice(["yesterday", "last week"]), "future": rng.choice(["tomorrow", "next week"])}
    right, wrong = rng.choice([("past", "future"), ("future", "past")])
    good = f"{subj.text} {forms[right]}{rest} {when[right]}"
    bad = rng.choice([f"{subj.text} {forms[wrong]}{rest} {when[right]}", f"{subj.text} {forms[right]}{rest} {when[wrong]}"])
    return Draft(good, bad, f"{subj.head} {verb.base}", "p")


def correlative(rng: Random) -> Draft:
    first = name(rng)
    second = name(rng, first.text)
    words = {"both": "and", "either": "or", "neither": "nor"}
    left = rng.choice(list(words))
    wrong = rng.choice([right for right in words.values() if right != words[left]])
    verb = any_verb(rng)
    rest = f"{verb.past}{complement(rng, verb)}"
    if rng.random() < 0.5:
        good, bad = (f"{left} {first.text} {w} {second.text} {rest}" for w in (words[left], wrong))
    else:
        verb = rng.choice(lx.WITH_PERSON)
        start = f"{subject(rng).text} {verb.past} {left} {first.text}"
        good, bad = (f"{start} {w} {second.text}" for w in (words[left], wrong))
    return Draft(good, bad, f"{left} {verb.base}")


PHENOMENA: dict[str, Callable[[Random], Draft]] = {
    function.__name__: function
    for function in (
        agreement_simple, agreement_prepositional, agreement_relative, agreement_there, existential_quantifier,
        determiner_noun, reflexive_agreement, reflexive_locality, transitivity, dative, locative, polarity,
        polarity_scope, filler_gap, wh_island, coordinate_island, adjunct_island, adverb_order,
        noun_phrase_order, auxiliary_order, question_order, verb_form, negation, pronoun_case, complementizer,
        nonfinite, passive, comparative, relative_pronoun, selected_preposition, tense_adverb, correlative,
    )
}  # fmt: skip


def make_pair(rng: Random, phenomenon: str, frames: float = 0.4) -> Pair:
    """A pair of the phenomenon; a share `frames` of those that allow it gets the same words around both sentences,
    and so does every very short one."""
    draft = PHENOMENA[phenomenon](rng)
    if draft.good == draft.bad:  # a verb whose forms look alike
        return make_pair(rng, phenomenon, frames)
    if min(len(draft.good.split()), len(draft.bad.split())) < 4:
        frames = 1.0
    good, bad, mark = draft.good, draft.bad, "?" if "?" in draft.frame else "."
    if "p" in draft.frame and rng.random() < frames:
        start = prefix(rng)
        good, bad = start + good, start + bad
    elif "s" in draft.frame and rng.random() < frames:
        end = suffix(rng)
        good, bad = good + end, bad + end
    return Pair(render(good, mark), render(bad, mark), phenomenon, draft.key)
