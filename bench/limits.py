"""Measured ceilings of a device: what its matrix products and its memory reach, which nothing else can exceed.

    python -m bench.limits [--device cuda|cpu] [--out FILE]

keeps them as the part "ceilings": `bench/results/DEVICE/ceilings.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .record import Figure, Record, folder_of, machine, sources
from .timing import samples

# (M, N, K) of the base GEMMs of Qwen2.5-7B at 8192 tokens (q and o, gate and up, down), and of a square one.
_GEMMS = ((8192, 3584, 3584), (8192, 18944, 3584), (8192, 3584, 18944), (8192, 8192, 8192))
_SMALL_GEMMS = ((512, 128, 128), (512, 352, 128), (512, 128, 352), (512, 512, 512), (1024, 1024, 1024))
_COPY, _SMALL_COPY = 2**30, 2**26  # bytes of the source


def main_dtype(device: torch.device) -> torch.dtype:
    """What models are computed in: bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def gemm(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """[m, k] [n, k]^T into a given output, as a linear layer has it."""
    a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    return bare(a, b.t())


def bare(a: Tensor, b: Tensor) -> Callable[[], Any]:
    """The product alone, into an output that is there."""
    a, b = a.detach(), b.detach()
    out = a.new_empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(a, b, out=out)


def copy(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that moves so many bytes: reads half of them and writes the other half."""
    source = torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def ceilings(device: torch.device, seconds: float = 10.0) -> dict[str, Figure]:
    """Figures by name: ``GEMM M x N x K``, ``GEMM`` (the best of them) in TFLOP/s, in the dtype of models; ``copy`` in GB/s.

    GB/s counts what is read and what is written. Measured for about `seconds`, with the L2 cache emptied before each call.
    """
    large = device.type == "cuda"
    shapes, size, dtype = _GEMMS if large else _SMALL_GEMMS, _COPY if large else _SMALL_COPY, main_dtype(device)
    share = seconds / (len(shapes) + 1)
    found: dict[str, Figure] = {}
    for m, n, k in shapes:
        taken = samples({"": gemm(m, n, k, dtype, device)}, device, share)[""]
        found[f"GEMM {m} x {n} x {k}"] = Figure.of([2 * m * n * k / ms / 1e9 for ms in taken.ms], "TFLOP/s", "higher")
    found["GEMM"] = max(found.values(), key=lambda figure: figure.value)
    taken = samples({"": copy(2 * size, device)}, device, share)[""]
    found["copy"] = Figure.of([2 * size / ms / 1e6 for ms in taken.ms], "GB/s", "higher")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.limits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/DEVICE/ceilings.json")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA GPU that torch can use: --device cpu measures this processor", file=sys.stderr)
        return 2
    device, begun = torch.device(args.device), time.monotonic()
    path = args.out or folder_of(device) / "ceilings.json"
    record = Record("ceilings", machine(device), data={"sources": sources("bench/limits.py", "bench/timing.py")})
    record.follow(Record.load(path))
    record.figures = ceilings(device)
    record.seconds, record.complete = round(time.monotonic() - begun, 1), True
    record.save(path)
    for name, figure in record.figures.items():
        print(f"{name:<28} {figure.value:10.2f} {figure.unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
