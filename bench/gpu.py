"""Measure everything on this machine's GPU, the most important first, in the time that there is; no network is needed.

    python -m bench.gpu [--minutes N] [--only NAME ...] [--list] [--device cuda|cpu] [--out FOLDER]
    python -m bench.gpu --check [--minutes N] [--only TEXT ...] [--device cuda|cpu] [--out FILE]

The parts, by the names that `--only` takes (`--only 'loop-*-7b'`, or a piece of a name): `check`; `ceilings` (bare GEMM and
copy); `ops` (kernels at the sizes of the goals); `update-MODEL` (share of the GEMM rate); `decode-MODEL`;
`loop-WORKLOAD-MODEL`, beside TRL's PPO; `ablations-cola-MODEL`. Models have random weights and the dimensions of Qwen2.5 0.5B,
1.5B and 7B.

Each part runs in a process of its own, for a share of the time, and keeps its result file after every figure, so a run that is
cut off loses nothing and a part that hangs, dies or spoils the GPU takes no other with it. The same command goes on with what
is missing: not complete, or of other sources, versions or another machine. Out of memory is a result. `--list` says how things
stand. The exit status is 0 where all is measured and right, 1 where anything failed, 2 where there is no GPU, 3 where parts
are left. `--device cpu` runs the same with a tiny model.

`--check` holds each op against float64 and does nothing else: in each dtype it takes the error (at most 1.2 times the torch
form's), the same bits in 20 runs, no synchronisation with the host, a CUDA graph replayed with new inputs, torch.compile as one
graph, and compute-sanitizer (memcheck, racecheck) where it is installed. Every op comes once before any comes again, in other
sizes. A case that takes the GPU's context or the process with it fails; the others run in a new process. With `--device cpu`
small forms of the same cases run through triton's interpreter: that checks the checks, and the arithmetic, not the compiled
kernels.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before torch, whose import takes seconds
    from .command import on_interrupt

    on_interrupt("stopped; what is done is stored, and the same command goes on with the rest")

import torch

from . import kernels
from .command import status_of
from .gpu_checks import run as checks
from .gpu_checks.process import die_with_parent, stop
from .record import ROOT, Damaged, Record, folder_of, machine, sources

MINUTES = 9.0
# Seconds: what a part needs to begin at all; what it may take over its time; and of that, to end on being told to.
LEAST, GRACE, PATIENCE = 20.0, 30.0, 5.0
# What the figures of the parts depend on.
_ENGINE = ("fastppo", "kernels/fastppo_kernels", "bench/models.py", "bench/memory.py")
_CEILINGS = ("bench/limits.py", "bench/timing.py")
# In the order of importance; minutes: what it needs, about, and gets where others wait for their turn.
_LOOPS = (("cola", 1.5), ("gsm8k", 2.0), ("few-shot", 1.5))
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
# Kinds of parts of one model: where the memory is not enough for it, nothing is left to do.
_OF_ONE_MODEL = ("update", "decode", "loop", "ablations")
_NOT_FINISHED = "not finished: "


@dataclass(frozen=True)
class Part:
    """name: of the result file. minutes: see above. command: Python's arguments, {device}, {minutes} and {out} filled in.
    places: folders and files of the sources that its figures depend on."""

    name: str
    minutes: float
    command: tuple[str, ...]
    places: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]


def _part(name: str, minutes: float, module: str, *arguments: str, places: tuple[str, ...], timed: bool = True) -> Part:
    time = ("--minutes", "{minutes}") if timed else ()
    return Part(name, minutes, ("-m", module, *arguments, "--device", "{device}", *time, "--out", "{out}"), places)


def _of_engine(kind: str, model: str, minutes: float = 1.2) -> Part:
    places = (*_ENGINE, "bench/engine.py", *_CEILINGS)
    return _part(f"{kind}-{model}", minutes, "bench.engine", kind, "--model", model, places=places)


def _loops(model: str, factor: float = 1.0) -> dict[str, Part]:
    places = (*_ENGINE, "bench/loop")
    return {
        workload: _part(f"loop-{workload}-{model}", minutes * factor, "bench.loop", "--workload", workload, "--model", model,
                        places=places)
        for workload, minutes in _LOOPS
    }  # fmt: skip


def _ablations(model: str) -> Part:
    places = (*_ENGINE, "bench/loop")
    name = f"ablations-cola-{model}"
    return _part(name, 2.0, "bench.loop", "--ablations", "--workload", "cola", "--model", model, places=places)


def parts(device: str) -> list[Part]:
    """All parts, the most important first: what each goal is about, before any other size of it."""
    found = [
        _part("check", 10.0, "bench.gpu", "--check", places=checks.SOURCES),
        _part("ceilings", 0.6, "bench.limits", places=_CEILINGS, timed=False),
        _part("ops", 2.0, "bench.kernels", places=kernels.SOURCES),
    ]
    if device == "cpu":
        loops = _loops("tiny")
        return [*found, _of_engine("update", "tiny"), _of_engine("decode", "tiny"), *loops.values(), _ablations("tiny")]
    small, middle, large = _loops("0.5b"), _loops("1.5b", 1.5), _loops("7b", 2.0)
    return [
        *found, small["cola"], _of_engine("update", "7b"), _of_engine("decode", "0.5b"), small["gsm8k"],
        _of_engine("update", "0.5b"), _of_engine("decode", "7b"), small["few-shot"], _ablations("0.5b"),
        large["cola"], large["gsm8k"], _of_engine("update", "1.5b"), _of_engine("decode", "1.5b"), middle["cola"],
        middle["gsm8k"], middle["few-shot"], large["few-shot"],
    ]  # fmt: skip


class State(NamedTuple):
    """Of a part, as its result file has it. word: done, failed (done, and wrong), left, or missing. wrong: whether anything in
    it is. failures: how often its process came to nothing. started, seconds: of what is in the file."""

    word: str
    text: str
    wrong: bool = False
    failures: int = 0
    started: str = ""
    seconds: float = 0.0


def state_of(part: Part, folder: Path, here: dict[str, Any]) -> State:
    """here: this machine as `record.machine` has it."""
    path = folder / f"{part.name}.json"
    digest = sources(*part.places)
    if part.name == "check":
        report = checks.stored(path, here | {"sources": digest})
        if report is None:
            return State("missing", "")
        wrong = len(checks.failed(report))
        text = f"{len(report['cases'])} cases, {wrong} failed"
        return State("left" if not report["complete"] else "failed" if wrong else "done", text, wrong > 0)
    try:
        record = Record.read(path)
    except Damaged as error:
        return State("missing", f"what is there cannot be used: {error}" if path.exists() else "")
    failures, wrong = record.data.get("failures", 0), record.data.get("status") == 1
    state = State("missing", "", False, failures, record.started, record.seconds)
    if not checks.same(record.machine, here, peers=part.kind in ("ops", "loop", "ablations")):
        return state._replace(text="what is there is of another machine or other versions")
    stamp = record.data.get("sources")
    if stamp != digest and not (stamp is None and record.machine.get("commit") == here["commit"] and not here["changed"]):
        return state._replace(text="what is there is of other sources")
    text = f"{len(record.figures)} figures, {record.seconds:.0f} s" + "".join(f"; {note}" for note in record.notes[-1:])
    return state._replace(word="left" if not record.complete else "failed" if wrong else "done", text=text, wrong=wrong)


def share(name: str, waiting: list[float], left: float, total: float) -> float:
    """Minutes for the next part. waiting: what it and those after it need; left, total: of the run.

    It gets what it needs, and what nobody else does; the check at most a third of the run while others wait, for it goes on
    in the next run.
    """
    needs, others = waiting[0], sum(waiting[1:])
    given = min(left, max(needs, left - others))
    return min(given, total / 3) if name == "check" and others else given


class Ended(NamedTuple):
    """How a part's process ended: its exit status (None: it was stopped), seconds, its last lines."""

    status: int | None
    seconds: float
    lines: list[str]

    @property
    def regular(self) -> bool:
        """Whether it ended as it meant to: all done (0), something wrong (1), something left (3)."""
        return self.status in (0, 1, 3) and not any(line.startswith("Traceback (most recent call last)") for line in self.lines)

    @property
    def why(self) -> str:
        """One line on what went wrong."""
        said = [line.strip() for line in self.lines if line.strip()]
        worst = next((line for line in reversed(said) if _OUT_OF_MEMORY.search(line)), said[-1] if said else "")
        how = "ended without a complete result" if self.status == 0 else f"ended with status {self.status}"
        how = f"stopped after {self.seconds:.0f} s" if self.status is None else how
        return f"{how}{': ' if worst else ''}{worst[:200]}"


def run_part(part: Part, device: str, minutes: float, folder: Path) -> Ended:
    """Run it in its own process, show what it prints, and stop it where it takes much longer than it may."""
    values = {"{device}": device, "{minutes}": f"{minutes:.3f}", "{out}": str((folder / f"{part.name}.json").absolute())}
    command = [sys.executable, *(values.get(argument, argument) for argument in part.command)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
        preexec_fn=die_with_parent,
    )  # fmt: skip
    last: deque[str] = deque(maxlen=200)
    stopped = True
    try:
        for line in _lines(process, begun + 60 * minutes + GRACE):
            print(f"    {line}", flush=True)
            last.append(line)
        process.wait(max(0.1, begun + 60 * minutes + GRACE - time.monotonic()))  # it may close its output and go on
        stopped = False
    except subprocess.TimeoutExpired:
        pass
    finally:
        status = stop(process, PATIENCE)
    return Ended(None if stopped else status, time.monotonic() - begun, list(last))


def _lines(process: subprocess.Popen, until: float) -> Iterator[str]:
    """What a process prints, line by line as it comes, until it ends.

    Raises:
        subprocess.TimeoutExpired: it has not ended `until` then (of `time.monotonic`).
    """
    assert process.stdout is not None
    rest = b""
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            seconds = until - time.monotonic()
            if seconds <= 0:
                raise subprocess.TimeoutExpired(process.args, seconds)
            if not selector.select(min(seconds, 1.0)):
                if process.poll() is not None:  # a child of its own may hold the pipe
                    break
                continue
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode("utf-8", "replace").rstrip() for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace").rstrip()


def _written(stored: Record | None, before: State) -> bool:
    """Whether a part's process has changed its result file, by how it stood before."""
    return stored is not None and (stored.started, stored.seconds) != (before.started, before.seconds)


def keep(part: Part, ended: Ended, folder: Path, here: dict[str, Any], before: State, digest: str) -> State:
    """Say in the part's result file what sources it is of and how it failed, if it did; how the part stands now.

    before: how it stood; a process that wrote nothing must not pass off older figures as its own. digest: of the sources when
    it began.
    """
    path = folder / f"{part.name}.json"
    if part.name == "check":
        state = state_of(part, folder, here)
        if not ended.regular:
            return State("failed", ended.why, True)
        return state if state.word != "missing" else State("left", "the sources have changed since it began")
    stored = Record.load(path)
    written = _written(stored, before)
    record = stored or Record(part.name, here)
    record.notes = [note for note in record.notes if not note.startswith(_NOT_FINISHED)]  # of an earlier time
    stamp = {"sources": digest, "status": ended.status, "failures": 0}
    if record.complete and (written or ended.status == 0):
        record.data |= stamp
    elif ended.status == 3 or (ended.regular and ended.status == 1 and written):
        record.data |= stamp if written else {"failures": 0}
    elif part.kind in _OF_ONE_MODEL and ended.status is not None and _OUT_OF_MEMORY.search(ended.why):
        if not written:  # what it had is of other sources, but a later run is held against the best of it
            record = Record(part.name, here, settings=stored.settings if stored else {})
            record.follow(stored)
        record.data |= stamp | {"status": 0}
        record.notes.append(f"out of memory: {ended.why}")
        record.complete = True
    else:
        record.data |= (stamp if written or stored is None else {}) | {"failures": before.failures + 1}
        record.notes.append(_NOT_FINISHED + ended.why)
    record.save(path)
    state = state_of(part, folder, here)
    return state._replace(word="failed", text=ended.why, wrong=True) if state.failures else state


def gpu_is_there() -> bool:
    """Whether a new process can use the GPU."""
    try:
        script = "import torch; torch.zeros(1, device='cuda').item()"
        return subprocess.run([sys.executable, "-c", script], timeout=90, capture_output=True).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def measure(chosen: list[Part], device: str, folder: Path, minutes: float) -> int:
    """Run what is missing of these parts; the exit status."""
    deadline = time.monotonic() + 60 * minutes
    here = machine(torch.device(device))
    folder.mkdir(parents=True, exist_ok=True)
    states = {part.name: state_of(part, folder, here) for part in chosen}
    # Those that failed before come last: they must not keep the others from their turn for ever.
    todo = sorted((p for p in chosen if states[p.name].word in ("missing", "left")), key=lambda p: states[p.name].failures > 0)
    print(f"{len(chosen) - len(todo)} of {len(chosen)} parts are done; results in {folder}", flush=True)
    for again in (False, True):
        while todo and deadline - time.monotonic() > LEAST:
            part = todo[0]
            given = share(part.name, [p.minutes for p in todo], (deadline - time.monotonic()) / 60, minutes)
            print(f"{part.name}: {given:.1f} minutes", flush=True)
            digest = sources(*part.places)
            try:
                ended = run_part(part, device, given, folder)
            except KeyboardInterrupt:  # what it has got to is of these sources
                if _written(Record.load(folder / f"{part.name}.json"), states[part.name]):
                    keep(part, Ended(3, 0.0, []), folder, here, states[part.name], digest)
                raise
            state = states[part.name] = keep(part, ended, folder, here, states[part.name], digest)
            print(f"{part.name}: {state.word}, {state.text}", flush=True)
            todo.pop(0)
            if not ended.regular and device == "cuda" and not gpu_is_there():
                print("the GPU cannot be used any more; the rest is left")
                return 1
        if not again:  # time that others did not need is for those that could use more
            todo += [p for p in chosen if states[p.name].word == "left" and p not in todo]
    words = [states[part.name].word for part in chosen]
    left = words.count("left") + words.count("missing")
    print(f"{words.count('done')} parts done, {words.count('failed')} failed, {left} left")
    if left:
        print("the same command goes on with those that are left")
    return 1 if any(states[part.name].wrong for part in chosen) else 3 if left else 0


def show(chosen: list[Part], device: str, folder: Path) -> None:
    here = machine(torch.device(device))
    print(f"{here['device']}: {folder}")
    for part in chosen:
        state = state_of(part, folder, here)
        failures = f" (failed {state.failures} x)" if state.failures else ""
        print(f"{part.name:<20} {state.word:<8} {state.text}{failures}".rstrip())


def _called(part: Part, text: str) -> bool:
    return text in part.name or fnmatch.fnmatch(part.name, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="check that the ops are right, and nothing else")
    parser.add_argument("--list", action="store_true", help="say which parts there are and which are done")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=f"stop after that (default: {MINUTES:g})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these parts (--check: cases with this in their name)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    where = "folder of the results (--check: the file); default: bench/results/DEVICE"
    parser.add_argument("--out", type=Path, metavar="PATH", help=where)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        advice = "--device cpu runs small forms of everything"
        print(f"there is no CUDA GPU that torch can use; {advice}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    out = args.out or (folder_of(device) / "check.json" if args.check else folder_of(device))
    if not args.list:  # an error before all the work, not after it
        wanted = "a file in a folder that can be written" if args.check else "a folder that can be written"
        try:
            (out.parent if args.check else out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: {out}: {error.strerror}; expected {wanted}")
        if args.check and out.is_dir():
            parser.error(f"--out: {out} is a folder; expected {wanted}")
    if args.check:
        try:
            return checks.run(device, args.only, args.minutes, out)
        except ValueError as error:
            parser.error(f"--only: {error}")
    chosen = [part for part in parts(args.device) if not args.only or any(_called(part, text) for text in args.only)]
    if not chosen:
        known = ", ".join(part.name for part in parts(args.device))
        parser.error(f"--only: no part is called {' or '.join(args.only)}; there are {known}")
    if args.list:
        show(chosen, args.device, out)
        return 0
    return measure(chosen, args.device, out, args.minutes)


if __name__ == "__main__":
    sys.exit(status_of(main))
