"""The tasks of SuperGLUE but RTE, which is GLUE's (Wang et al., "SuperGLUE: A Stickier Benchmark for General-Purpose Language
Understanding Systems", NeurIPS 2019).

Label ids are those of the hub's data sets. Rows are read in the form of SuperGLUE's own files and in that of the hub.
"""

import random
import re
import string
from collections.abc import Mapping
from typing import Any, TypeVar

from fastppo.tasks.example import Example
from fastppo.tasks.glue import ENTAILS_ANSWERS, ENTAILS_QUESTION, NLI_ANSWERS, NLI_COLUMNS, NLI_INPUTS, NLI_QUESTION
from fastppo.tasks.task import INDEX, Task, Values
from fastppo.tasks.wording import prompts

SUPERGLUE = "aps/super_glue"

# The few-shot release of Schick and Schütze has 32 examples of each train set as its dev set.
FEW = {"dev": ("dev32",)}

BOOLQ = Task(
    **prompts(
        "Answer a question from what the passage says.",
        "yes or no",
        "Passage: {passage}\nQuestion: {question}?",
        "Answer",
    ),
    name="boolq",
    slots=("passage", "question"),
    labels=("no", "yes"),
    label_names=("false", "true"),
    files=FEW,
    hub=(SUPERGLUE, "boolq"),
)

CB = Task(
    **prompts(
        NLI_QUESTION,
        NLI_ANSWERS,
        NLI_INPUTS,
        "Relation",
    ),
    name="cb",
    slots=("premise", "hypothesis"),
    labels=("entailment", "contradiction", "neutral"),
    label_names=("entailment", "contradiction", "neutral"),
    metrics=("macro_f1", "accuracy"),
    files=FEW,
    hub=(SUPERGLUE, "cb"),
)

COPA = Task(
    **prompts(
        "Something is the case. Of two options, decide which one is more likely to be its cause, or its effect if that is "
        "asked for.",
        "one for the first option, two for the second",
        "The case: {premise}\nAsked for: {question}\nOption one: {choice1}\nOption two: {choice2}",
        "Option",
    ),
    name="copa",
    slots=("premise", "choice1", "choice2", "question"),
    values={"question": ("cause", "effect")},
    labels=("one", "two"),
    label_names=("choice1", "choice2"),
    files=FEW,
    hub=(SUPERGLUE, "copa"),
)


Kind = TypeVar("Kind", dict, list, str, int)


def _part(values: object, key: str, kind: type[Kind], where: str = "") -> Kind:
    """A part of a nested row. Raises ValueError where it is missing or of another kind."""
    found = values.get(key) if isinstance(values, Mapping) else None
    if not isinstance(found, kind):
        words = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
        raise ValueError(f"{where}{key} is {'missing' if found is None else repr(found)[:40]}, must be {words[kind]}")
    return found


def _filled_list(values: object, key: str, where: str = "") -> list[Any]:
    """A list with something in it. Raises ValueError."""
    found = _part(values, key, list, where)
    if not found:
        raise ValueError(f"{where}{key} is empty, must be a list of at least one")
    return found


def _multirc_rows(values: Values, number: str, labelled: bool) -> list[Values]:
    """An example for each answer. The group is its question."""
    if "passage" not in values or isinstance(values["passage"], str):  # the hub: a row is an answer
        idx = values.get("idx")
        places = [idx.get(key) for key in ("paragraph", "question", "answer")] if isinstance(idx, Mapping) else []
        return [{**values, "group": "-".join(map(str, places[:2])) or number, INDEX: tuple(places) or None}]
    rows: list[Values] = []
    text = _part(values["passage"], "text", str, "passage.")
    for q, question in enumerate(_filled_list(values["passage"], "questions", "passage."), 1):
        asked = _part(question, "question", str, f"question {q}: ")
        for a, answer in enumerate(_filled_list(question, "answers", f"question {q}: "), 1):
            if not isinstance(answer, Mapping):
                raise ValueError(f"question {q}, answer {a}: must be an object with text and label")
            rows.append({
                "passage": text, "question": asked, "candidate": answer.get("text"), "label": answer.get("label"),
                "group": f"{number}-{q}", "part": f"question {q}, answer {a}",
                INDEX: (values.get("idx"), question.get("idx"), answer.get("idx")),
            })  # fmt: skip
    return rows


MULTIRC = Task(
    **prompts(
        "A question about the passage may have several right answers. Decide whether the answer given here is one of them.",
        "true if it is right, false if it is wrong",
        "Passage: {passage}\nQuestion: {question}\nAnswer given: {candidate}",
        "This is",
    ),
    name="multirc",
    slots=("passage", "question", "candidate"),
    labels=("false", "true"),
    label_names=("false", "true"),
    metrics=("f1a", "em"),
    aliases={"passage": ("paragraph",), "candidate": ("answer",)},
    files=FEW,
    expand=_multirc_rows,
    hub=(SUPERGLUE, "multirc"),
)

HIGHLIGHT, PLACEHOLDER = "@highlight", "@placeholder"


def _entity(text: str, span: object, number: int) -> str:
    """What stands at a span, whose end is that of its last character. Raises ValueError."""
    where = f"passage.entities, entity {number}: "
    start, end = (_part(span, key, int, where) for key in ("start", "end"))
    if not 0 <= start <= end < len(text):
        raise ValueError(f"{where}{start} to {end} is no part of the passage, which has the characters 0 to {len(text) - 1}")
    found = text[start : end + 1]
    if found != found.strip():
        raise ValueError(f"{where}at {start} to {end} stands {found[:40]!r}, must be a name, without space around it")
    return found


def _record_rows(values: Values, number: str, labelled: bool) -> list[Values]:
    """An example for each different entity of each query, with the query's gap filled. The group is the query."""
    passage = values.get("passage")
    if isinstance(passage, str):  # the hub: a row is a query
        text, queries = passage, [values]
        entities = [entity for entity in _filled_list(values, "entities") if isinstance(entity, str)]
    else:
        text, queries = _part(passage, "text", str, "passage."), _filled_list(values, "qas")
        entities = [_entity(text, span, e) for e, span in enumerate(_filled_list(passage, "entities", "passage."), 1)]
    rows: list[Values] = []
    for q, query in enumerate(queries, 1):
        where = f"query {q}: "
        sentence = _part(query, "query", str, where)
        if PLACEHOLDER not in sentence:
            raise ValueError(f"{where}no {PLACEHOLDER} in it")
        answers = _filled_list(query, "answers", where) if labelled else []
        idx = query.get("idx")
        gold = {answer if isinstance(answer, str) else _part(answer, "text", str, f"{where}answers.") for answer in answers}
        for e, entity in enumerate(dict.fromkeys([*entities, *sorted(gold)]), 1):
            rows.append({
                "passage": text.split(HIGHLIGHT)[0].strip(), "candidate": entity, "label": int(entity in gold),
                "query": sentence.replace(PLACEHOLDER, entity), "group": f"{number}-{q}", "part": f"query {q}, entity {e}",
                INDEX: idx.get("query") if isinstance(idx, Mapping) else idx,
            })  # fmt: skip
    return rows


def _record_pairs(examples: list[Example], draw: random.Random) -> list[Example]:
    """Of each query a right and a wrong entity."""
    queries: dict[str, tuple[list[Example], list[Example]]] = {}
    for example in examples:
        queries.setdefault(example.group, ([], []))[int(example.label or 0)].append(example)
    return [draw.choice(entities) for query in queries.values() for entities in reversed(query) if entities]


RECORD = Task(
    **prompts(
        "The statement continues the text, with the name of someone or something put into a gap. Decide whether it is the "
        "right name there.",
        "yes if it is, no if it is not",
        "Text: {passage}\nStatement: {query}\nName: {candidate}",
        "Right",
    ),
    name="record",
    slots=("passage", "query", "candidate"),
    labels=("no", "yes"),
    label_names=("no", "yes"),
    metrics=("token_f1", "exact_match"),
    files=FEW,
    expand=_record_rows,
    training=_record_pairs,
    wordless_is_wrong=True,
    hub=(SUPERGLUE, "record"),
)


def _wic_row(values: Values, number: str, labelled: bool) -> list[Values]:
    """Some releases have one text of word and sentences, without the places of the word."""
    text = values.get("text")
    if "word" in values or not isinstance(text, str):
        for k in (1, 2):
            _check_place(values, f"sentence{k}", f"start{k}", f"end{k}")
        return [values]
    found = re.fullmatch(r"Word: (.+?)\. Sentence 1: (.+?) Sentence 2: (.+)", text, re.DOTALL)
    if not found:
        raise ValueError("text must be of the form 'Word: ... . Sentence 1: ... Sentence 2: ...'")
    kept: Values = {key: values[key] for key in ("label", "idx") if key in values}
    return [{"word": found[1], "sentence1": found[2], "sentence2": found[3], **kept}]


def _check_place(values: Values, sentence: str, start: str, end: str) -> None:
    """Raises ValueError for a place of the word, where one is given, that is not in its sentence."""
    if values.get(start) is None and values.get(end) is None:
        return
    first, behind = (int(str(v)) if str(v := values.get(key)).isdecimal() else -1 for key in (start, end))
    length = len(str(values.get(sentence, "")))
    if not 0 <= first < behind <= length:
        given = f"{values.get(start)!r} to {values.get(end)!r}"
        raise ValueError(f"{start} to {end} is {given[:60]}, which is no part of {sentence}, {length} characters long")


WIC = Task(
    **prompts(
        "Two sentences use a word. Decide whether it has the same sense in both.",
        "same if it has, different if not",
        "Word: {word}\nFirst sentence: {sentence1}\nSecond sentence: {sentence2}",
        "Sense",
    ),
    name="wic",
    slots=("word", "sentence1", "sentence2"),
    labels=("different", "same"),
    label_names=("false", "true"),
    files=FEW,
    expand=_wic_row,
    hub=(SUPERGLUE, "wic"),
)


NEAR = 2
"""How many words off an index into a text of WSC may be: a few places in the data are off by one."""


def _bare(word: str) -> str:
    return re.sub(r"[\W_]+", "", word).lower()


def _wsc_row(values: Values, number: str, labelled: bool) -> list[Values]:
    """The pronoun is put between asterisks: a text may have several alike. Indices count the words between spaces; words are
    compared without case and punctuation. The words of the noun phrase need not stand together ("Kamenev and Zinoviev")."""
    target = values.get("target", values)
    text = _part(values, "text", str)
    noun, pronoun = (_part(target, f"span{k}_text", str) for k in (1, 2))
    pieces = re.split(r"(\s+)", text.strip())  # words, and what is between them
    words = [_bare(word) for word in pieces[::2]]
    for word in noun.split():
        if not any(w.startswith(_bare(word)) for w in words):
            raise ValueError(f"span1_text: {word[:40]!r} is not in the text")
    if noun.strip() and isinstance(target, Mapping) and target.get("span1_index") is not None:
        _nearest(words, noun.split()[0], _part(target, "span1_index", int), 1)
    place = 2 * _nearest(words, pronoun, _part(target, "span2_index", int), 2)
    bare = pronoun.strip(string.punctuation)
    pieces[place] = re.sub(re.escape(bare), r"*\g<0>*", pieces[place], count=1, flags=re.IGNORECASE)
    return [{**values, "text": "".join(pieces), "noun": noun, "pronoun": bare}]


def _nearest(words: list[str], spelled: str, index: int, k: int) -> int:
    """Where the word that begins span ``k`` stands near its index; if it does not, a longer word there that begins with it.

    Raises:
        ValueError: nowhere, or nowhere near.
    """
    wanted = _bare(spelled)
    alike = [i for i, word in enumerate(words) if wanted and word.startswith(wanted)]
    if not alike:
        raise ValueError(f"span{k}_text: {spelled[:40]!r} is not in the text")
    near = [i for i in alike if abs(i - index) <= NEAR]
    if not near:
        stands = min(alike, key=lambda i: abs(i - index))
        raise ValueError(f"span{k}_index is {index}, but {spelled[:40]!r} stands at {stands}, counted in words from 0")
    return min(near, key=lambda i: (words[i] != wanted, abs(i - index)))


WSC = Task(
    **prompts(
        "A pronoun of the text is marked with asterisks. Decide whether it stands for the one that is named below the text.",
        "yes if it does, no if it stands for someone or something else",
        "Text: {text}\nPronoun: {pronoun}\nNamed: {noun}",
        "The same",
    ),
    name="wsc",
    slots=("text", "noun", "pronoun"),
    labels=("no", "yes"),
    label_names=("false", "true"),
    files=FEW,
    expand=_wsc_row,
    hub=(SUPERGLUE, "wsc"),
)

AXB = Task(
    **prompts(
        ENTAILS_QUESTION,
        ENTAILS_ANSWERS,
        NLI_INPUTS,
        "Follows",
    ),
    name="axb",
    slots=("premise", "hypothesis"),
    labels=("yes", "no"),
    label_names=("entailment", "not_entailment"),
    metrics=("mcc",),
    aliases=NLI_COLUMNS,
    files={"dev": ("AX-b", "test"), "test": ("AX-b",)},
    train_on="rte",
    hub=(SUPERGLUE, "axb"),
)

_PRONOUNS = re.compile(r"\b(he|she|they|him|her|them|his|hers|their|theirs|himself|herself|themselves)\b")


def _axg_row(values: Values, number: str, labelled: bool) -> list[Values]:
    """The group is what two examples share that differ only in the gender of a pronoun."""
    texts = [str(values.get(slot, "")) for slot in ("premise", "hypothesis")]
    return [{**values, "group": _PRONOUNS.sub("*", " / ".join(texts).lower())}]


AXG = Task(
    **prompts(
        ENTAILS_QUESTION,
        ENTAILS_ANSWERS,
        NLI_INPUTS,
        "Follows",
    ),
    name="axg",
    slots=("premise", "hypothesis"),
    labels=("yes", "no"),
    label_names=("entailment", "not_entailment"),
    metrics=("accuracy", "parity"),
    files={"dev": ("AX-g", "test"), "test": ("AX-g",)},
    expand=_axg_row,
    train_on="rte",
    hub=(SUPERGLUE, "axg"),
)

TASKS: tuple[Task, ...] = (BOOLQ, CB, COPA, MULTIRC, RECORD, WIC, WSC, AXB, AXG)
