"""How long callables take, side by side: every round runs each of them once, so that a noisy moment hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]

WARM_UPS = 3
LEAST, MOST = 5, 50  # rounds
_SHORTEST = 1e-3  # seconds that one sample takes on the CPU at least, by calling often enough
_CYCLES = 2e9  # of a GPU in a second, about
_LONGEST_SLEEP = 0.02  # seconds


@dataclass
class Samples:
    """Times of one call in milliseconds, one a round; on a GPU also what the host needs to start it."""

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.ms) < 2:
            return self.ms[0], self.ms[0]
        low, _, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return low, high


def ratios(of: Samples, to: Samples) -> list[float]:
    """`of` / `to`, round by round."""
    return [a / b for a, b in zip(of.ms, to.ms, strict=True)]


def samples(
    calls: Mapping[str, Call], device: torch.device, seconds: float = 2.0, *, least: int = LEAST, most: int = MOST
) -> dict[str, Samples]:
    """Time these calls for about `seconds` together (after warm-up), in `least` to `most` rounds.

    On a GPU by CUDA events: the L2 cache is emptied before each call, and the GPU is kept busy while the host launches, so that
    it is the device's time, as in a CUDA graph, for a call that does not wait for the GPU. On the CPU by the wall clock; a
    short call runs several times a sample.
    """
    gpu = _Gpu(device) if device.type == "cuda" else None
    once = {name: _warm_up(call, gpu) for name, call in calls.items()}
    repeats = {name: 1 if gpu else max(1, round(_SHORTEST / max(taken, 1e-7))) for name, taken in once.items()}
    found = {name: Samples() for name in calls}
    begun = time.perf_counter()
    for i in range(most):
        if i >= least and time.perf_counter() - begun > seconds:
            break
        for name, call in calls.items():
            if gpu:
                ms, host_ms = gpu.time(call, once[name])
                found[name].host_ms.append(host_ms)
            else:
                ms = _time_on_cpu(call, repeats[name])
            found[name].ms.append(ms)
    return found


def _time_on_cpu(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def _warm_up(call: Call, gpu: _Gpu | None) -> float:
    """Seconds of the host for one warm call."""
    taken = 0.0
    for _ in range(WARM_UPS):
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        if gpu:
            torch.cuda.synchronize(gpu.device)
        elif taken > 1.0:  # warm enough
            break
    return taken


class _Gpu:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Read, not written: lines that were written to would have to be stored during the call.
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def time(self, call: Call, host_seconds: float) -> tuple[float, float]:
        """(ms on the device, ms of the host to start it)."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self.flush.max()
            torch.cuda._sleep(int(min(1.5 * host_seconds + 1e-4, _LONGEST_SLEEP) * _CYCLES))
            start.record()
            begun = time.perf_counter()
            call()
            host = time.perf_counter() - begun
            end.record()
            end.synchronize()
        return start.elapsed_time(end), host * 1e3
