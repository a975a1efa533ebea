"""Run the checks of cases one after another, in this process or in one that may die of them.

An illegal memory access leaves a process without a usable GPU, and a kernel that never ends one that cannot go on: the cases
after it are run in a new process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from .case import Case
from .checks import CHECKS, Outcome
from .process import die_with_parent, stop

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = ("error", "determinism", "compile")
# Of one case with all its checks and compilations; and of a process until it has imported what it needs.
SECONDS, SECONDS_TO_START = 150.0, 120.0
Outcomes = dict[str, Outcome]


def _checked(name: str, case: Case, device: torch.device) -> Outcome:
    """A check that raises is a check that fails."""
    try:
        with warnings.catch_warnings():  # of NaN that these cases are about, of what torch.compile ignores
            warnings.simplefilter("ignore")
            return CHECKS[name](case, device, small=device.type == "cpu")
    except Exception as error:
        lines = str(error).strip().splitlines()
        text = f"{name}: {type(error).__name__}: {lines[0] if lines else ''}"
        return Outcome(False, text, {"traceback": traceback.format_exc()})


def _usable(device: torch.device) -> bool:
    """Whether this process can still use its GPU."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def outcomes_of(case: Case, device: torch.device) -> tuple[Outcomes, bool]:
    """(what its checks found by name, whether this process can go on)."""
    on_cpu = device.type == "cpu"
    if not on_cpu and case.gibibytes * 2**30 > torch.cuda.mem_get_info(device)[0]:
        return {"memory": Outcome(True, f"left out: it needs {case.gibibytes:g} GiB of free GPU memory", {})}, True
    found: Outcomes = {}
    for name in CHECKS:
        if name not in case.checks or (on_cpu and name not in ON_CPU):
            continue
        found[name] = _checked(name, case, device)
        if not _usable(device):
            text = "the GPU is of no more use to this process: the rest is not checked"
            return found | {"process": Outcome(False, text, {})}, False
    # A capture that was broken off may leave its stream, or the allocator, as they are during one.
    return found, "graph" not in found or "traceback" not in found["graph"].figures


def in_this_process(cases: Iterable[Case], device: torch.device) -> Iterator[tuple[str, Outcomes]]:
    for case in cases:
        yield case.name, outcomes_of(case, device)[0]


class Worker:
    """A process that runs cases and says after each what it found."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None: it has ended.

        Raises:
            queue.Empty: it says nothing for so long.
        """
        line = self.lines.get(timeout=max(seconds, 0))
        return None if line is None else json.loads(line)

    def stop(self) -> int:
        """Its exit status."""
        return stop(self.process)


def in_processes(
    names: Iterable[str],
    deadline: float,
    command: tuple[str, ...] = (sys.executable, "-m", "bench.gpu_checks.worker"),
    seconds: float = SECONDS,
) -> Iterator[tuple[str, Outcomes]]:
    """As `in_this_process` on the GPU, by name, until `deadline` (of `time.monotonic`).

    Raises:
        RuntimeError: a process could not even begin.
    """
    left = list(names)
    while left and time.monotonic() < deadline:
        worker = Worker([*command, *left])
        try:
            begun = time.monotonic()
            try:
                if worker.next(min(SECONDS_TO_START, deadline - begun)) is None:
                    raise RuntimeError(f"the process that runs the checks ended with status {worker.stop()} before the first")
                while left:
                    begun = time.monotonic()
                    found = worker.next(min(seconds, deadline - begun))
                    if found is None:
                        text = f"the process ended in it (status {worker.stop()})"
                        yield left.pop(0), {"process": Outcome(False, text, {})}
                        break
                    left.remove(found["name"])
                    yield found["name"], {name: Outcome(*outcome) for name, outcome in found["outcomes"].items()}
                    if not found["usable"]:
                        break
            except queue.Empty:
                if time.monotonic() < deadline:
                    text = f"nothing came of it for {time.monotonic() - begun:.0f} s"
                    yield left.pop(0), {"process": Outcome(False, text, {})}
        finally:
            worker.stop()


def main(names: list[str], out: TextIO) -> None:
    from . import cases

    device, by_name = torch.device("cuda"), {case.name: case for case in cases()}
    torch.zeros(1, device=device)

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    say({"ready": True})
    for name in names:
        outcomes, usable = outcomes_of(by_name[name], device)
        say({"name": name, "outcomes": outcomes, "usable": usable})
        if not usable:
            os._exit(1)  # what is left of CUDA could only wait or complain


if __name__ == "__main__":
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    main(sys.argv[1:], answers)
