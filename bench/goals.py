"""The goals, as data: what must be reached, on which kind of device, and where it is read from.

Ratios are of two things measured side by side on one machine in one run. "The limit" is what no program can beat: the bare
frozen-base GEMMs, or the bytes that must move over the measured copy bandwidth.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .record import Record
from .stored import dictionaries, mapping, number

OURS = "fastppo"  # the form of a kernel row that is this project's
LIMIT = "limit"  # the form that is no way to compute the op, but what none can beat
ENGINES = {"fastppo": "fastppo", "trl": "TRL"}


@dataclass(frozen=True)
class Reading:
    """What a record says on a goal: a value, or `why` there is none.

    which: which of several it is (a batch size, a LoRA rank). raw: what the value is the median of.
    """

    value: float | None
    which: str = ""
    raw: list[float] = field(default_factory=list)
    why: str = ""


@dataclass(frozen=True)
class Goal:
    """name: what is measured. kind: of the device. part: pattern of the records that it is read from. words: the goal."""

    name: str
    kind: str
    part: str
    limit: float
    unit: str
    words: str
    read: Callable[[Record], list[Reading]]
    at_most: bool = False

    def of(self, part: str) -> bool:
        """Whether the part's record is one to read it from."""
        return re.fullmatch(self.part, part) is not None

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def void(record: Record) -> str:
    """Why a loop's comparison does not count; empty where both engines are known to have learned its rule."""
    learned = mapping(record.data.get("learned"))
    idle = [name for engine, name in ENGINES.items() if learned.get(engine) is False]
    unknown = [name for engine, name in ENGINES.items() if not isinstance(learned.get(engine), bool)]
    why = [f"{' and '.join(idle)} did not learn the rule"] if idle else []
    why += [f"it is not known whether {' and '.join(unknown)} learned the rule"] if unknown else []
    return f"void: {'; '.join(why)}" if why else ""


def _missing(record: Record) -> Reading:
    """No figure, and what the notes say of why."""
    said = [note for note in map(str, record.notes) if re.search("trl|out of memory|not finished", note, re.I)]
    return Reading(None, why="; ".join(["not measured", *said]))


def compared(figure: str) -> Callable[[Record], list[Reading]]:
    """A figure that holds fastppo against TRL, void unless both have learned."""

    def read(record: Record) -> list[Reading]:
        if figure not in record.figures:
            return [_missing(record)]
        if why := void(record):
            return [Reading(None, why=why)]
        return [Reading(record.figures[figure].value, raw=record.figures[figure].raw)]

    return read


def plain(figure: str) -> Callable[[Record], list[Reading]]:
    """A figure as it stands."""

    def read(record: Record) -> list[Reading]:
        found = record.figures.get(figure)
        return [Reading(found.value, raw=found.raw) if found else _missing(record)]

    return read


def batches(figure: str, largest: int) -> Callable[[Record], list[Reading]]:
    """The figures ``batch N: FIGURE`` with N up to the largest that the goal speaks of."""

    def read(record: Record) -> list[Reading]:
        found = []
        for name, value in record.figures.items():
            match = re.fullmatch(rf"batch (\d+): {figure}", name)
            if match and int(match[1]) <= largest:
                found.append(Reading(value.value, f"batch {match[1]}", value.raw))
        return found or [_missing(record)]

    return read


def share_of_limit(row: dict) -> float | None:
    """Percent of the limit that a kernel row reaches."""
    said, took, limit = (number(row.get(name)) for name in ("percent_of_limit", "median_ms", "limit_ms"))
    return said if said is not None else 100 * limit / took if took and limit else None


def _over_limit(row: dict) -> float | None:
    share = share_of_limit(row)
    return 100 / share if share else None


@dataclass(frozen=True)
class Rows:
    """What `take` reads of our rows of an op, one reading a row. op, size: patterns of their names."""

    op: str
    size: str
    take: Callable[[dict], float | None]
    direction: str = r"fwd\+bwd"

    def fits(self, op: str, size: str, direction: str) -> bool:
        """Whether the goal speaks of this measurement."""
        pairs = (self.op, op), (self.size, size), (self.direction, direction)
        return all(re.fullmatch(pattern, name) for pattern, name in pairs)

    def __call__(self, record: Record) -> list[Reading]:
        found = []
        for row in dictionaries(record.data.get("rows")):
            op, size, direction = (str(row.get(name)) for name in ("op", "size", "direction"))
            if self.fits(op, size, direction) and row.get("form") == OURS:
                value, which = self.take(row), ", ".join((size, direction, str(row.get("dtype"))))
                why = "" if value is not None else f"not measured; {row.get('note') or 'nobody noted why'}"
                found.append(Reading(value, which, why=why))
        return found or [_missing(record)]


_ANY = r"-[\w.]+"  # any model
_LAYER = (r"lora layer \(7 linears\)", "M8192 7B r(16|32|64)")  # op, size
_HEAD = ("linear_ppo_loss", "T8192 V152064.*")

GOALS = (
    Goal("CoLA-like loop, samples/s", "CPU", r"loop-cola(-tiny)?", 10, "x", "at least 10 x TRL", compared("ratio")),
    Goal("few-shot loop, samples/s", "CPU", r"loop-few-shot(-tiny)?", 15, "x", "at least 15 x TRL", compared("ratio")),
    Goal("GSM8K-like loop, samples/s", "CPU", r"loop-gsm8k(-tiny)?", 3, "x", "at least 3 x TRL", compared("ratio")),
    *(
        Goal(f"{name} loop, peak memory", "CPU", rf"loop-{part}(-tiny)?", 0.5, "x", "at most half of TRL's",
             compared("memory ratio"), at_most=True)
        for part, name in (("cola", "CoLA-like"), ("few-shot", "few-shot"), ("gsm8k", "GSM8K-like"))
    ),
    Goal("CoLA-like loop, samples/s", "GPU", rf"loop-cola{_ANY}", 20, "x", "at least 20 x TRL", compared("ratio")),
    Goal("CoLA-like loop, peak memory", "GPU", rf"loop-cola{_ANY}", 1 / 3, "x", "at most a third of TRL's",
         compared("memory ratio"), at_most=True),
    Goal("GSM8K-like loop, samples/s", "GPU", rf"loop-gsm8k{_ANY}", 8, "x", "at least 8 x TRL", compared("ratio")),
    Goal("update of a 7B model with LoRA, tokens of the tree", "GPU", "update-7b", 60, "%",
         "at least 60 % of the measured bf16 GEMM rate", plain("MFU")),
    Goal("the 7 LoRA linears of a 7B layer, 8192 tokens, rank at most 64", "GPU", "ops", 1.1, "x",
         "at most 1.1 x the bare frozen-base GEMMs", Rows(*_LAYER, _over_limit), at_most=True),
    Goal("head and PPO loss, 8192 tokens, 152064 words, time", "GPU", "ops", 1.25, "x",
         "at most 1.25 x the two bare GEMMs", Rows(*_HEAD, _over_limit), at_most=True),
    Goal("head and PPO loss, 8192 tokens, 152064 words, peak memory", "GPU", "ops", 640e6 / 2**20, "MiB",
         "at most 640 MB, which are 610 MiB", Rows(*_HEAD, lambda row: number(row.get("peak_MiB"))), at_most=True),
    Goal("log-probability and entropy of given logits", "GPU", "ops", 90, "%",
         "at least 90 % of copy bandwidth", Rows("token_logprob", "T8192 V152064", share_of_limit, ".*")),
    Goal("decoding with LoRA, batch at most 64", "GPU", rf"decode{_ANY}", 5, "%",
         "at most 5 % over merged weights", batches("overhead", 64), at_most=True),
)  # fmt: skip
