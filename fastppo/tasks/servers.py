"""The files that the servers of GLUE and SuperGLUE take: their names, and how they spell what they hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastppo.errors import UserError
from fastppo.tasks.example import Example
from fastppo.tasks.task import Task


@dataclass(frozen=True)
class Server:
    """A benchmark's server, and the file that it wants for each task, or section of a task's test split."""

    name: str
    files: Mapping[tuple[str, str], str]


GLUE = Server(
    "GLUE",
    {
        ("cola", ""): "CoLA.tsv", ("sst2", ""): "SST-2.tsv", ("mrpc", ""): "MRPC.tsv", ("qqp", ""): "QQP.tsv",
        ("stsb", ""): "STS-B.tsv", ("mnli", "matched"): "MNLI-m.tsv", ("mnli", "mismatched"): "MNLI-mm.tsv",
        ("qnli", ""): "QNLI.tsv", ("rte", ""): "RTE.tsv", ("wnli", ""): "WNLI.tsv", ("ax", ""): "AX.tsv",
    },
)  # fmt: skip
SUPERGLUE = Server(
    "SuperGLUE",
    {
        ("boolq", ""): "BoolQ.jsonl", ("cb", ""): "CB.jsonl", ("copa", ""): "COPA.jsonl", ("multirc", ""): "MultiRC.jsonl",
        ("record", ""): "ReCoRD.jsonl", ("rte", ""): "RTE.jsonl", ("wic", ""): "WiC.jsonl", ("wsc", ""): "WSC.jsonl",
        ("axb", ""): "AX-b.jsonl", ("axg", ""): "AX-g.jsonl",
    },
)  # fmt: skip

BY_ID = ("cola", "sst2", "mrpc", "qqp", "wnli", "copa", "multirc")
"""Tasks whose labels are written as their ids; the others by name."""


def has_server(task: Task) -> bool:
    """Whether one takes a task's test answers."""
    return any(name == task.name for server in (GLUE, SUPERGLUE) for name, _ in server.files)


def server_of(task: Task, superglue: bool) -> Server:
    """The server that takes a task's test answers. superglue: which of the two, for a task of both.

    Raises:
        UserError: none does.
    """
    takes = [server for server in (GLUE, SUPERGLUE) if any(name == task.name for name, _ in server.files)]
    if not takes:
        raise UserError(f"task {task.name}: no server takes its test answers; only the tasks of GLUE and SuperGLUE have one")
    return takes[-1] if superglue else takes[0]


def content(server: Server, task: Task, examples: Sequence[Example], labels: Sequence[int | float]) -> str:
    """The file of these answers (a label id or number for each example), rows in the order of the examples.

    GLUE: two columns under a header. SuperGLUE: one JSON object a line, of MultiRC one a passage with its questions and their
    answers, of ReCoRD one a query with the entity as its label.
    """
    if server is GLUE:
        rows = zip(examples, labels, strict=True)
        return "index\tprediction\n" + "".join(f"{e.index[0]}\t{_spelled(task, label)}\n" for e, label in rows)
    objects: list[dict[str, object]]
    if task.name == "multirc":
        objects = _passages(examples, labels)
    elif task.name == "record":
        objects = [{"idx": query[0].index[0], "label": chosen} for query, chosen, _ in entities(examples, labels)]
    else:
        objects = [{"idx": e.index[0], "label": _word(task, label)} for e, label in zip(examples, labels, strict=True)]
    return "".join(json.dumps(each) + "\n" for each in objects)


def entities(examples: Sequence[Example], labels: Sequence[int | float]) -> list[tuple[list[Example], str, bool]]:
    """Of each query of ReCoRD its examples, the first entity that was judged right, and whether there was one: else it is the
    first of all."""
    queries: dict[str, list[tuple[Example, int | float]]] = {}
    for example, label in zip(examples, labels, strict=True):
        queries.setdefault(example.group, []).append((example, label))
    found = []
    for rows in queries.values():
        right = [example for example, label in rows if label == 1]
        chosen = right[0] if right else rows[0][0]
        found.append(([example for example, _ in rows], chosen.fields["candidate"], bool(right)))
    return found


def _passages(examples: Sequence[Example], labels: Sequence[int | float]) -> list[dict[str, object]]:
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for example, label in zip(examples, labels, strict=True):
        passage, question, answer = example.index
        passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": int(label)})
    return [
        {"idx": idx, "passage": {"questions": [{"idx": q, "answers": answers} for q, answers in questions.items()]}}
        for idx, questions in passages.items()
    ]


def _spelled(task: Task, label: int | float) -> str:
    if task.span is not None:
        low, high = task.span
        return f"{min(max(label, low), high):.3f}"
    return str(_word(task, label))


def _word(task: Task, label: int | float) -> int | str:
    if task.name in BY_ID:
        return int(label)
    name = task.label_names[int(label)]
    return name.capitalize() if task.name == "wsc" else name
