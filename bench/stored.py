"""The result files as the report reads them: what cannot be read, or is no number, is named and left out.

A file may come from another version of this project, from a run that was cut off or from a hand with an editor; the rest of
the report must come all the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gpu import parts
from .record import Damaged, Record, finite

WORKLOADS = {"cola": "CoLA-like", "few-shot": "few-shot", "gsm8k": "GSM8K-like"}
_NAMES = re.compile(rf"check|ceilings|ops|(update|decode)-[\w.]+|(loop|ablations)-({'|'.join(WORKLOADS)})(-[\w.]+)?")


def number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    return float(value) if finite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def dictionaries(value: Any) -> list[dict[str, Any]]:
    """The dictionaries among the items of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def hardware(machine: dict[str, Any]) -> list[str]:
    """What was measured on: the device's name, its threads or memory, its driver."""
    device, size = machine.get("device"), number(machine.get("gibibytes"))
    found = device.split(", ") if isinstance(device, str) else ["device unknown"]
    found += [f"{size:g} GiB"] if size is not None else []
    return found + [f"{name} {machine[name]}" for name in ("driver", "capability") if machine.get(name)]


def versions(machine: dict[str, Any]) -> list[str]:
    return [f"{name} {text}" for name, text in mapping(machine.get("versions")).items() if text] or ["unknown"]


def usual(each: Iterable[list[str]]) -> list[str]:
    """What most of them are; of as many, the first."""
    most = Counter(map(tuple, each)).most_common(1)
    return list(most[0][0]) if most else []


@dataclass
class Device:
    """What is stored of one device.

    records: by part, in the order of their names. check: ``check.json``, which has a form of its own. unreadable: of a part
    whose file could not be read, why. machines: by part, what it was measured on. kind: ``GPU`` or ``CPU``.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)
    check: dict[str, Any] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def machines(self) -> dict[str, dict[str, Any]]:
        found = {} if self.check is None else {"check": mapping(self.check["machine"])}
        return found | {part: record.machine for part, record in self.records.items()}

    @property
    def kind(self) -> str:
        if not self.machines:  # nothing but files that cannot be read
            return "CPU" if self.folder.name == "cpu" else "GPU"
        return "GPU" if any("capability" in machine for machine in self.machines.values()) else "CPU"

    @property
    def hardware(self) -> list[str]:
        """What most parts were measured on."""
        return usual(map(hardware, self.machines.values()))

    @property
    def versions(self) -> list[str]:
        """What most parts were measured with."""
        return usual(map(versions, self.machines.values()))

    def other_hardware(self, part: str) -> list[str]:
        """What the part was measured on that most are not."""
        return [fact for fact in hardware(self.machines[part]) if fact not in self.hardware]

    def other_versions(self, part: str) -> list[str]:
        """What the part was measured with that most are not."""
        found = versions(self.machines[part])
        if found == ["unknown"] != self.versions:
            return ["versions unknown"]
        names = {fact.split()[0] for fact in found}
        absent = [f"no {name}" for name in (fact.split()[0] for fact in self.versions) if name not in names]
        return [fact for fact in found if fact not in self.versions] + (absent if self.versions != ["unknown"] else [])

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
                continue
            try:
                if path.stem == "check":
                    device.check = _check(path)
                else:
                    device.records[path.stem] = record = _record(path)
                    problems += [f"{name}: {problem}" for problem in _clean(record)]
            except Damaged as error:
                device.unreadable[path.stem] = f"{name}: {error}"
                problems.append(device.unreadable[path.stem])
        if device.machines or device.unreadable:
            devices.append(device)
    return sorted(devices, key=lambda device: (device.kind, device.folder.name)), problems


def _check(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(found[name], dict) for name in ("machine", "cases", "sanitizer")):
            return found
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise Damaged("cannot be read as the figures of python -m bench.gpu --check")


def _record(path: Path) -> Record:
    record = Record.read(path)
    kinds = (
        (record.part, str), (record.machine, dict), (record.data, dict), (record.notes, list), (record.reference, dict),
    )  # fmt: skip
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise Damaged("cannot be read as a result file")
    if record.part != path.stem:
        raise Damaged(f"holds the part {record.part}")
    return record


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
