"""Check every op of `fastppo_kernels` on this machine's GPU.

    python -m bench.gpu --check [--only TEXT ...] [--out FILE] [--device cuda|cpu]

For each op, in each dtype it takes: the error against float64 (at most 1.2 times the torch form's), the same bits in 20 runs,
no synchronisation with the host, a CUDA graph replayed with new inputs, torch.compile as one graph, and compute-sanitizer
(memcheck, racecheck) where it is installed. Prints one line a case, keeps all figures as JSON after each, and exits with 1
where anything fails, with 2 where there is no GPU. `--device cpu` runs small forms of the same cases through triton's
interpreter: that checks the checks, and the arithmetic, not the compiled kernels.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastppo.files import write_json

from .gpu_checks.case import Case
from .gpu_checks.checks import CHECKS, Outcome, Sanitizer
from .gpu_checks.interpreter import exact_bfloat16

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = ("error", "determinism", "compile")


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


def machine(device: torch.device) -> dict[str, Any]:
    """What figures mean nothing without."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "fastppo")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain")),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["gibibytes"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _checked(name: str, case: Case, device: torch.device, small: bool) -> Outcome:
    """A check that raises is a check that fails."""
    try:
        with warnings.catch_warnings():  # of NaN that these cases are about, of what torch.compile ignores
            warnings.simplefilter("ignore")
            return CHECKS[name](case, device, small=small)
    except Exception as error:
        lines = str(error).strip().splitlines()
        text = f"{name}: {type(error).__name__}: {lines[0] if lines else ''}"
        return Outcome(False, text, {"traceback": traceback.format_exc()})
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _line(name: str, outcomes: dict[str, Outcome]) -> str:
    mark = "ok  " if all(outcome.ok for outcome in outcomes.values()) else "FAIL"
    return f"{mark}  {name:<64} {' | '.join(outcome.text for outcome in outcomes.values())}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {"ok": outcome.ok, "text": outcome.text, "figures": outcome.figures}


def check(cases: list[Case], device: torch.device, out: Path) -> int:
    """Run the checks of these cases and write what came out to `out`; how many cases fail."""
    on_cpu, started = device.type == "cpu", time.monotonic()
    report: dict[str, Any] = {"command": "check", "started": datetime.now(UTC).isoformat(timespec="seconds")}
    report |= {"machine": machine(device), "complete": False, "cases": {}}
    program = None if on_cpu else Sanitizer.program()
    small_cases = [case for case in cases if case.small is not None]
    sanitizers = [Sanitizer(program, tool, small_cases) for tool in Sanitizer.TOOLS if small_cases] if program else []
    failed = set()
    try:
        for case in cases:
            if not on_cpu and case.gibibytes * 2**30 > torch.cuda.mem_get_info(device)[0]:
                print(f"left  {case.name:<64} needs {case.gibibytes:g} GiB of free GPU memory", flush=True)
                report["cases"][case.name] = {"left_out": "memory"}
                continue
            names = [name for name in case.checks if not on_cpu or name in ON_CPU]
            outcomes = {name: _checked(name, case, device, on_cpu) for name in names}
            if not all(outcome.ok for outcome in outcomes.values()):
                failed.add(case.name)
            print(_line(f"{case.name}{' (small)' if on_cpu else ''}", outcomes), flush=True)
            report["cases"][case.name] = {name: _plain(outcome) for name, outcome in outcomes.items()}
            write_json(out, report)
        for sanitizer in sanitizers:
            wrong = {name: outcome for name, outcome in sanitizer.outcomes().items() if not outcome.ok}
            for case in sanitizer.cases:
                report["cases"][case.name][sanitizer.tool] = _plain(
                    wrong.get(case.name, Outcome(True, f"{sanitizer.tool} ok", {}))
                )
            for name, outcome in wrong.items():
                print(f"FAIL  {name:<64} {outcome.text}", flush=True)
            if not wrong:
                print(f"ok    {sanitizer.tool}, {len(sanitizer.cases)} cases", flush=True)
            failed |= set(wrong)
            write_json(out, report)
    finally:
        for sanitizer in sanitizers:
            sanitizer.stop()
    report |= {"complete": True, "seconds": round(time.monotonic() - started, 1)}
    write_json(out, report)
    if not on_cpu and not program:
        print("compute-sanitizer is not installed: memory errors and races were not looked for")
    print(f"{len(cases)} cases, {len(failed)} failed, {report['seconds']:.0f} s; figures in {out}")
    return len(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", required=True, help="check that the ops are right")
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
        return int(check(chosen, device, out) > 0)


if __name__ == "__main__":
    sys.exit(main())
