"""How tasks ask: one wording for both prompts, with and without tags around the answer."""

from typing import TypedDict

from fastppo.tasks.task import CLOSING, OPENING


class Prompts(TypedDict):
    """The prompts of a `Task`."""

    template: str
    tagged: str


def prompts(question: str, answers: str, inputs: str, cue: str, one: str = "one word") -> Prompts:
    """Prompts that ask ``question``, say which ``answers`` there are (each is ``one`` word), then show ``inputs`` with slots.

    The short prompt ends with ``cue`` and a colon; the tagged one with the opening tag. What all prompts of a task share
    stands first: it is computed once.
    """
    return {
        "template": f"{question}\nAnswer with {one}: {answers}.\n\n{inputs}\n{cue}:",
        "tagged": f"{question}\nPut {one} between {OPENING} and {CLOSING}: {answers}.\n\n{inputs}\n{OPENING}",
    }
