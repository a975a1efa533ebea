"""The whole PPO loop beside TRL's, or beside itself with each of its ideas switched off.

    python -m bench.loop --workload cola|few-shot|gsm8k [--model tiny|0.5b|1.5b|7b] [--device cpu|cuda] [--minutes N]
    python -m bench.loop --ablations --workload cola ...

Same random weights, prompts, lengths, samples, epochs, LoRA, dtype and reward for both engines; pairs of iterations that
alternate, medians of their ratios, learning curves, and the peak memory of each alone. Results go to
``bench/results/DEVICE/``; a figure that is worse than the stored one by more than 5 % is named. Exit status 3:
the time was too short for a figure.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from bench.models import NAMES, config_of
from bench.record import Record, folder_of, machine, plain

from . import ablations, compare
from .workloads import WORKLOADS, prompts_of

ABLATION_ROUNDS = {"cola": 12, "few-shot": 12, "gsm8k": 5}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=tuple(WORKLOADS), required=True)
    parser.add_argument("--model", choices=NAMES, default="tiny", help="dimensions of the random model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ablations", action="store_true", help="our loop without each of its ideas, instead of TRL")
    parser.add_argument("--iterations", type=int, help="of each engine (default: the workload's)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop measuring after that")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--memory", choices=("fastppo", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.iterations is not None and args.iterations < compare.FEWEST + 2:
        parser.error(f"--iterations: {args.iterations}; expected {compare.FEWEST + 2} or more (first and last do not count)")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU that torch can use")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads: {args.threads}; expected 1 or more")
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes: {args.minutes}; expected a number above 0")
    if args.out is not None and (args.out.is_dir() or any(parent.is_file() for parent in args.out.parents)):
        parser.error(f"--out: {args.out}; expected a file, in a folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)
    device, workload = torch.device(args.device), WORKLOADS[args.workload]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda" and workload.response < 64:  # more samples of short answers: what one takes on a GPU
        workload = replace(workload, prompts=4 * workload.prompts)
    if args.memory:
        compare.print_memory(args.memory, workload, args.model, device, dtype, args.micro_batch or workload.batch)
        return 0
    iterations = args.iterations or (ABLATION_ROUNDS[workload.name] if args.ablations else workload.iterations)
    kind = "ablations" if args.ablations else "loop"
    part = f"{kind}-{workload.name}-{args.model}"
    out = args.out or folder_of(device) / f"{part}.json"
    settings = compare.settings_of(workload, args.model, dtype, iterations)
    record = Record(part, machine(device), settings)
    stored = Record.load(out)
    record.follow(stored)
    # What is stored and whole is replaced by what is whole and measured as it is measured without options, by nothing less.
    whole = stored is not None and stored.complete
    place = out.with_suffix(".unfinished") if whole else out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # an error before all the work, not after it
    except OSError as error:
        parser.error(f"--out: {out}: {error.strerror}")
    begun = time.monotonic()
    deadline = begun + 60 * args.minutes
    stopped = False
    try:
        if args.ablations:
            prompts = prompts_of(workload, config_of(args.model).vocab_size, iterations)
            ablations.measure(record, place, workload, args.model, device, dtype, deadline, prompts)
            record.complete = True
        else:
            compare.measure(record, place, workload, args.model, device, dtype, deadline)
    except KeyboardInterrupt:
        stopped = True
    record.seconds = round(time.monotonic() - begun, 1)
    record.save(place)
    same = stored is not None and plain(stored.settings) == plain(settings)
    if place != out and record.complete and (same or args.iterations is None):
        place = place.replace(out)
    if stopped:
        print(f"stopped; what was measured is in {place}", file=sys.stderr)
        return 130
    for name, figure in record.figures.items():
        print(f"{name}: {figure.value:.4g} {figure.unit}")
    for note in record.notes:
        print(note)
    for name, loss in record.losses().items():
        print(f"WORSE than stored: {name} by {loss:.0%}" if name in record.figures else f"no longer measured: {name}")
    print(f"figures in {place}")
    return 0 if record.complete else 3


if __name__ == "__main__":
    sys.exit(main())
