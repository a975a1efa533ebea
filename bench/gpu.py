"""Check every op of `fastppo_kernels` on this machine's GPU.

    python -m bench.gpu --check [--minutes N] [--only TEXT ...] [--out FILE] [--device cuda|cpu]

For each op, in each dtype it takes: the error against float64 (at most 1.2 times the torch form's), the same bits in 20 runs,
no synchronisation with the host, a CUDA graph replayed with new inputs, torch.compile as one graph, and compute-sanitizer
(memcheck, racecheck) where it is installed. Every op comes once before any comes again, in other sizes. Prints one line a case,
keeps all figures as JSON after each, and stops after N minutes (default 9): the same command then goes on with what is missing,
as long as neither the sources nor the machine have changed. A case that takes the GPU's context or the process with it fails;
the others run in a new process. The exit status is 1 where anything fails, 2 where there is no GPU, 3 where cases are left.
`--device cpu` runs small forms of the same cases through triton's interpreter: that checks the checks, and the arithmetic, not
the compiled kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastppo.files import write_json

from .gpu_checks.case import Case
from .gpu_checks.checks import Outcome, Sanitizer
from .gpu_checks.interpreter import exact_bfloat16
from .gpu_checks.worker import Outcomes, in_processes, in_this_process

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.0


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """A digest of the ops and their checks: figures of others are not theirs."""
    digest = hashlib.sha256()
    for folder in (ROOT / "kernels" / "fastppo_kernels", ROOT / "bench" / "gpu_checks"):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: torch.device) -> dict[str, Any]:
    """What figures mean nothing without."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "fastppo")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--", "kernels", "bench/*.py")),
        "sources": _sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["gibibytes"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _line(name: str, outcomes: Outcomes) -> str:
    mark = "left" if "memory" in outcomes else "ok  " if all(outcome.ok for outcome in outcomes.values()) else "FAIL"
    return f"{mark}  {name:<64} {' | '.join(outcome.text for outcome in outcomes.values())}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {"ok": outcome.ok, "text": outcome.text, "figures": outcome.figures}


def _begun(out: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier run of the same sources on the same machine, or a new one."""
    new = {"command": "check", "started": datetime.now(UTC).isoformat(timespec="seconds"), "machine": here, "seconds": 0.0}
    new |= {"complete": False, "cases": {}, "sanitizer": {tool: {} for tool in Sanitizer.TOOLS}}
    try:
        old = json.loads(out.read_text(encoding="utf-8"))
        same = all(old["machine"][name] == here[name] for name in ("device", "versions", "sources"))
        return old if same and not old["complete"] and old.keys() >= new.keys() else new
    except (OSError, ValueError, LookupError, TypeError):
        return new


def check(cases: list[Case], device: torch.device, out: Path, minutes: float) -> tuple[int, int]:
    """Run the checks of these cases and write what came out to `out`; (how many cases fail, how many are left)."""
    on_cpu, begun = device.type == "cpu", time.monotonic()
    deadline = begun + 60 * minutes
    report = _begun(out, machine(device))
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
    bad = {name for name in names if not all(outcome["ok"] for outcome in done.get(name, {}).values())}
    left = {case.name for case in cases if case.name not in done}
    for found in report["sanitizer"].values():
        bad |= {name for name in names if name in found and not found[name]["ok"]}
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", required=True, help="check that the ops are right")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=f"stop after that (default: {MINUTES:g})")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cases with one of these in their name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/check-DEVICE.json")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        advice = "--device cpu runs small cases through triton's interpreter"
        print(f"there is no CUDA GPU that torch can use; {advice}", file=sys.stderr)
        return 2
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # triton looks when it is imported
    os.environ.setdefault("FASTPPO_KERNELS_CACHE", "")  # what the dispatcher measures beside the checks is not to be kept
    from .gpu_checks import cases

    chosen = [case for case in cases() if not args.only or any(text in case.name for text in args.only)]
    if args.device == "cpu":
        chosen = [case for case in chosen if case.small is not None]
    if not chosen:
        parser.error(f"--only: no case has {' or '.join(args.only)} in its name")
    device = torch.device(args.device)
    name = re.sub(r"[^a-z0-9]+", "-", machine(device)["device"].lower()).strip("-") if args.device == "cuda" else "cpu"
    out = args.out or ROOT / "bench" / "results" / f"check-{name}.json"
    with exact_bfloat16() if args.device == "cpu" else nullcontext():
        failed, left = check(chosen, device, out, args.minutes)
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
