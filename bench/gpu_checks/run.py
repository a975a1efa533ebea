"""Run the checks of many cases, keep what came out, and go on where an earlier run stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastppo.files import write_json

from ..record import machine, sources
from .case import Case
from .checks import Outcome, Sanitizer
from .interpreter import exact_bfloat16
from .worker import Outcomes, in_processes, in_this_process

SOURCES = ("kernels/fastppo_kernels", "bench/gpu_checks")
PEERS = ("trl", "liger-kernel", "accelerate")  # what is only measured beside ours


def same(one: dict[str, Any], other: dict[str, Any], *, peers: bool = False) -> bool:
    """Whether two machines, as `record.machine` has them, have the same device and versions; of peers too where they count."""
    versions = [{name: x for name, x in m.get("versions", {}).items() if peers or name not in PEERS} for m in (one, other)]
    return one.get("device") == other.get("device") and versions[0] == versions[1]


def here(device: torch.device) -> dict[str, Any]:
    return machine(device) | {"sources": sources(*SOURCES)}


def stored(out: Path, where: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier run of the same sources on the same machine."""
    try:
        old = json.loads(out.read_text(encoding="utf-8"))
        fits = same(old["machine"], where) and old["machine"]["sources"] == where["sources"]
        return old if fits and old.keys() >= _new(where).keys() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _new(where: dict[str, Any]) -> dict[str, Any]:
    new = {"command": "check", "started": datetime.now(UTC).isoformat(timespec="seconds"), "machine": where, "seconds": 0.0}
    return new | {"complete": False, "cases": {}, "sanitizer": {tool: {} for tool in Sanitizer.TOOLS}}


def failed(report: dict[str, Any]) -> set[str]:
    """The cases of a report in which anything is wrong."""
    bad = {name for name, outcomes in report["cases"].items() if not all(outcome["ok"] for outcome in outcomes.values())}
    for found in report["sanitizer"].values():
        bad |= {name for name, outcome in found.items() if not outcome["ok"]}
    return bad


def _line(name: str, outcomes: Outcomes) -> str:
    mark = "left" if "memory" in outcomes else "ok  " if all(outcome.ok for outcome in outcomes.values()) else "FAIL"
    return f"{mark}  {name:<64} {' | '.join(outcome.text for outcome in outcomes.values())}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {"ok": outcome.ok, "text": outcome.text, "figures": outcome.figures}


def check(cases: list[Case], device: torch.device, out: Path, minutes: float) -> tuple[int, int]:
    """Run the checks of these cases and write what came out to `out`; (how many cases fail, how many are left)."""
    on_cpu, begun = device.type == "cpu", time.monotonic()
    deadline = begun + 60 * minutes
    where = here(device)
    old = stored(out, where)
    report = old if old is not None and not old["complete"] else _new(where)
    before = report["seconds"]
    done, names = report["cases"], {case.name for case in cases}
    todo = [case for case in cases if case.name not in done]
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} cases are in {out}")
    program = None if on_cpu else Sanitizer.program()

    def keep() -> None:
        report["seconds"] = round(before + time.monotonic() - begun, 1)
        write_json(out, report)

    sanitizers = []
    for tool, found in report["sanitizer"].items():
        small = [case for case in cases if case.small is not None and case.name not in found]
        if program and small:
            sanitizers.append(Sanitizer(program, tool, small))
    try:
        for name, outcomes in _outcomes(todo, device, deadline):
            print(_line(f"{name}{' (small)' if on_cpu else ''}", outcomes), flush=True)
            done[name] = {check: _plain(outcome) for check, outcome in outcomes.items()}
            keep()
        for sanitizer in sanitizers:  # which may grow by others
            found = sanitizer.outcomes(deadline)
            rest = [case for case in sanitizer.cases if case.name not in found]
            if found and rest and time.monotonic() < deadline:  # it ended in one of them
                assert program is not None
                sanitizers.append(Sanitizer(program, sanitizer.tool, rest))
            report["sanitizer"][sanitizer.tool] |= {name: _plain(outcome) for name, outcome in found.items()}
            wrong = {name: outcome for name, outcome in found.items() if not outcome.ok}
            for name, outcome in wrong.items():
                print(f"FAIL  {name:<64} {outcome.text}", flush=True)
            print(f"{'FAIL' if wrong else 'ok  '}  {sanitizer.tool}: {len(found)} cases, {len(wrong)} with errors", flush=True)
            keep()
    finally:
        for sanitizer in sanitizers:
            sanitizer.stop()
    bad = failed(report) & names
    left = {case.name for case in cases if case.name not in done}
    for found in report["sanitizer"].values():
        left |= {case.name for case in cases if program and case.small is not None and case.name not in found}
    report["complete"] = not left
    keep()
    if not on_cpu and not program:
        print("compute-sanitizer is not installed: memory errors and races were not looked for")
    print(f"{len(cases)} cases, {len(bad)} failed, {len(left)} left, {report['seconds']:.0f} s; figures in {out}")
    if left:
        print("the same command goes on with those that are left")
    return len(bad), len(left)


def _outcomes(cases: list[Case], device: torch.device, deadline: float) -> Iterator[tuple[str, Outcomes]]:
    if device.type == "cuda":
        yield from in_processes([case.name for case in cases], deadline)
        return
    for name, outcomes in in_this_process(cases, device):
        yield name, outcomes
        if time.monotonic() > deadline:
            return


def run(device: torch.device, only: list[str] | None, minutes: float, out: Path) -> int:
    """Check the cases with one of these texts in their name; the exit status.

    Raises:
        ValueError: no case has.
    """
    on_cpu = device.type == "cpu"
    if on_cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # triton looks when it is imported
    os.environ.setdefault("FASTPPO_KERNELS_CACHE", "")  # what the dispatcher measures beside the checks is not to be kept
    from . import cases

    chosen = [case for case in cases() if not only or any(text in case.name for text in only)]
    if on_cpu:
        chosen = [case for case in chosen if case.small is not None]
    if not chosen:
        raise ValueError(f"no case has {' or '.join(only or [])} in its name")
    with exact_bfloat16() if on_cpu else nullcontext():
        bad, left = check(chosen, device, out, minutes)
    return 1 if bad else 3 if left else 0
