"""The result files as the report reads them: what cannot be read, or is no number, is named and left out.

A file may come from another version of this project, from a run that was cut off or from a hand with an editor; the rest of
the report must come all the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gpu import parts
from .record import Record

WORKLOADS = {"cola": "CoLA-like", "few-shot": "few-shot", "gsm8k": "GSM8K-like"}
_NAMES = re.compile(rf"check|ceilings|ops|(update|decode)-[\w.]+|(loop|ablations)-({'|'.join(WORKLOADS)})(-[\w.]+)?")


def number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def dictionaries(value: Any) -> list[dict[str, Any]]:
    """The dictionaries among the items of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


@dataclass
class Device:
    """What is stored of one device.

    records: by part, in the order of their names. check: ``check.json``, which has a form of its own. machines: by part, what
    it was measured on. kind: ``GPU`` or ``CPU``.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)
    check: dict[str, Any] | None = None

    @property
    def machines(self) -> dict[str, dict[str, Any]]:
        found = {} if self.check is None else {"check": mapping(self.check["machine"])}
        return found | {part: record.machine for part, record in self.records.items()}

    @property
    def kind(self) -> str:
        return "GPU" if any("capability" in machine for machine in self.machines.values()) else "CPU"

    @property
    def name(self) -> str:
        # The check names a CPU less well than the records do.
        names = [machine["device"] for machine in reversed(self.machines.values()) if isinstance(machine.get("device"), str)]
        return names[0] if names else "device unknown"

    def of(self, kind: str) -> Iterable[tuple[str, Record]]:
        """The records of the parts ``KIND-...``, each with what follows in its name."""
        for part, record in self.records.items():
            if part.startswith(f"{kind}-"):
                yield part.removeprefix(f"{kind}-"), record

    def missing(self) -> list[str]:
        """The parts that a device of this kind should have and this one does not have, or not whole."""
        whole = {part for part, record in self.records.items() if record.complete}
        if self.check is not None and self.check.get("complete") is True:
            whole.add("check")
        # On the CPU there is one model, so that it need not be in the name.
        names = [part.name for part in parts("cuda" if self.kind == "GPU" else "cpu")]
        return [name for name in names if name not in whole and name.removesuffix("-tiny") not in whole]


def workload_of(part: str) -> tuple[str, str]:
    """The workload and the model in ``WORKLOAD[-MODEL]``, as a reader knows them."""
    name = next(name for name in WORKLOADS if part == name or part.startswith(f"{name}-"))
    return WORKLOADS[name], part.removeprefix(name).removeprefix("-") or "tiny"


def read(results: Path) -> tuple[list[Device], list[str]]:
    """The devices with something stored under ``results``, and a line for everything that could not be read."""
    devices, problems = [], []
    for path in sorted(results.glob("*.json")):
        problems.append(f"{path.name}: lies in no device's folder")
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and not path.name.startswith(".")):
        device = Device(folder)
        for path in sorted(folder.glob("*.json")):
            name = f"{folder.name}/{path.name}"
            if _NAMES.fullmatch(path.stem) is None:
                problems.append(f"{name}: is none of the parts that are measured")
            elif path.stem == "check":
                device.check = _check(path)
                if device.check is None:
                    problems.append(f"{name}: cannot be read as the figures of python -m bench.gpu --check")
            else:
                record = Record.load(path)
                if record is None or not _sound(record):
                    problems.append(f"{name}: cannot be read as a result file")
                elif record.part != path.stem:
                    problems.append(f"{name}: holds the part {record.part}")
                else:
                    problems += [f"{name}: {problem}" for problem in _clean(record)]
                    device.records[record.part] = record
        if device.machines:
            devices.append(device)
    return sorted(devices, key=lambda device: (device.kind, device.folder.name)), problems


def _check(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sound = all(isinstance(found[name], dict) for name in ("machine", "cases", "sanitizer"))
        return found if sound else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _sound(record: Record) -> bool:
    kinds = (
        (record.part, str), (record.machine, dict), (record.data, dict), (record.notes, list), (record.reference, dict),
    )  # fmt: skip
    return all(isinstance(value, kind) for value, kind in kinds)


def _clean(record: Record) -> list[str]:
    """Take out figures that are no numbers, in place; a line for each."""
    problems = []
    for name, figure in list(record.figures.items()):
        if number(figure.value) is None:
            del record.figures[name]
            problems.append(f"the figure {name!r} is not a number")
        elif not isinstance(figure.raw, list) or None in map(number, figure.raw):
            figure.raw = []
            problems.append(f"the figure {name!r} has raw values that are not numbers")
    for name, old in list(record.reference.items()):
        if number(mapping(old).get("value")) is None:
            del record.reference[name]
            problems.append(f"the stored reference of {name!r} is not a number")
    return problems
