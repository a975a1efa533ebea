"""Peak memory of tensors while something runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints when it starts and stops


def peak(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that were alive at once while `call` ran, above those alive at its start; at least 0.

    On CUDA the caching allocator's count. On the CPU every allocation and release that torch's allocator reports, those of
    backward included. Not in it: what libraries take for themselves, what Python threads do that `call` starts, and releases of
    what was there before (a tensor that takes the place of an old one counts as one more).
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    return _highest(seen)


def _highest(seen: profile) -> int:
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: those of one instant stay in their order
    now = most = 0
    for _, size in changes:
        now += size
        most = max(most, now)
    return most
