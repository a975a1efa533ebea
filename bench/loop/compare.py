"""Both engines side by side: pairs of iterations on the same prompts, medians of pairs, learning curves, peak memory."""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import peers
from bench.memory import peak
from bench.record import ROOT, Figure, Record

from .ours import FastppoLoop
from .workloads import ALPHA, EPOCHS, LR, RANK, Workload, prompts_of

if TYPE_CHECKING:
    from .trl import TrlLoop

WARM_UP = 1  # iterations that are not counted; the last one is not either: there the phases are timed
FEWEST = 3  # pairs that a ratio may rest on
MEMORY_SECONDS = 900
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|ALLOC_FAILED", re.IGNORECASE)


class TimeIsUp(Exception):
    """The time given has run out; what was measured stands."""


def settings_of(workload: Workload, model: str, dtype: torch.dtype, iterations: int) -> dict[str, Any]:
    return {
        "model": model, "dtype": str(dtype).removeprefix("torch."), "workload": workload.name,
        "template": workload.template, "own": list(workload.own), "response": workload.response, "prompts": workload.prompts,
        "samples": workload.samples, "iterations": iterations, "epochs": EPOCHS, "optimizer_steps_per_epoch": 1,
        "lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": "all-linear", "lr": LR, "kl_coef": workload.kl_coef,
    }  # fmt: skip


def learned(curve: list[float]) -> bool:
    """Whether the mean reward rose: the last quarter above the first by 0.02 and by three of its standard errors."""
    n = max(2, len(curve) // 4)
    if len(curve) < 2 * n:
        return False
    first, last = curve[:n], curve[-n:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / n)
    return statistics.mean(last) - statistics.mean(first) > max(0.02, 3 * error)


def measure(
    record: Record, out: Path, workload: Workload, model: str, device: torch.device, dtype: torch.dtype, deadline: float
) -> None:
    """Fill and save the record; ``deadline`` is of `time.monotonic`."""
    iterations = record.settings["iterations"]
    prompts = prompts_of(workload, _vocab(model), iterations)
    data = record.data
    data["workload"] = {"what": workload.what}
    data["workload"] |= {key: record.settings[key] for key in ("template", "own", "response", "prompts", "samples")}
    data["samples_per_iteration"] = workload.batch
    missing = peers.missing("TRL")
    if missing:
        record.notes.append(missing)
        _alone(record, FastppoLoop(model, workload, iterations, device, dtype), prompts, deadline)
    else:  # a part of the time is for the memory, which is measured in processes of their own
        _pairs(record, workload, model, prompts, device, dtype, deadline - 0.25 * max(0.0, deadline - time.monotonic()))
    _free()
    record.save(out)
    for engine in ("fastppo",) if missing or record.figures.get("trl samples/s") is None else ("fastppo", "trl"):
        _memory(record, engine, workload, model, device, deadline, data.get("trl_micro_batch", workload.batch))
        record.save(out)
    trl_counts = not missing and not any("TRL: out of memory" in note for note in record.notes)
    wanted = {"fastppo samples/s", "fastppo MiB", *(("ratio", "trl MiB") if trl_counts else ())}
    record.complete = wanted <= record.figures.keys()
    if "fastppo MiB" in record.figures and "trl MiB" in record.figures:
        ratio = record.figures["fastppo MiB"].value / record.figures["trl MiB"].value
        record.figures["memory ratio"] = Figure(ratio, "ratio", "lower")


def _vocab(model: str) -> int:
    from bench.models import config_of

    return config_of(model).vocab_size


def _pairs(
    record: Record, workload: Workload, model: str, prompts: list[list[list[int]]], device: torch.device, dtype: torch.dtype,
    deadline: float,
) -> None:  # fmt: skip
    """Alternating where both fit on the device, else one after the other; TRL with the micro-batch that is fastest for it."""
    from .trl import TrlLoop

    data, figures, batch = record.data, record.figures, workload.batch
    micro_batch = _fastest_micro_batch(record, workload, model, prompts, device, dtype, deadline)
    ours = FastppoLoop(model, workload, len(prompts), device, dtype)
    if micro_batch is None:
        _alone(record, ours, prompts, deadline)
        return

    def beside(ours: FastppoLoop | None) -> Any:
        trl = TrlLoop(model, workload, prompts, device, dtype, micro_batch)
        return _alternate(record, trl, ours, prompts, deadline)

    pair = _if_it_fits(lambda: beside(ours))
    if pair is not None:
        trl, seconds = pair
        _keep_ours(record, ours, seconds[WARM_UP : len(prompts) - 1])
    else:
        record.notes.append("both engines together found no memory: measured one after the other, not alternating")
        del ours
        _free()
        seconds = _alone(record, FastppoLoop(model, workload, len(prompts), device, dtype), prompts, deadline)
        _free()
        alone = _if_it_fits(lambda: beside(None))
        if alone is None:
            record.notes.append("TRL: out of memory")
            return
        trl = alone[0]
    counted = slice(WARM_UP, min(len(prompts) - 1, len(trl.seconds), len(seconds)))
    theirs, own = trl.seconds[counted], seconds[counted]
    if len(own) < FEWEST:
        record.notes.append(f"only {len(own)} counted iterations: no ratio")
        return
    figures["ratio"] = Figure.of([a / b for a, b in zip(theirs, own, strict=True)], "ratio", "higher")
    figures["trl samples/s"] = Figure.of([batch / s for s in theirs], "samples/s")
    data["curves"]["trl"], data["learned"]["trl"] = trl.curve, learned(trl.curve)
    data["phases"]["trl"] = trl.phases
    if trl.phases and len(trl.seconds) == len(prompts):
        # The collector also walks the objects of our engine, so what it costs TRL is shown by itself.
        data["trl_gc_share"] = trl.phases.get("gc.collect", 0.0) / trl.seconds[-1]
        data["trl_other"] = trl.seconds[-1] - sum(trl.phases.values())


def _if_it_fits(call: Callable[[], Any]) -> Any:
    """What the call returns; None where the device has no memory for it, of which nothing is held any more then."""
    result = None
    try:
        result = call()
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
            raise
    if result is None:  # the error, and with it the frames that held memory, is gone by now
        _free()
    return result


def _fastest_micro_batch(
    record: Record, workload: Workload, model: str, prompts: list[list[list[int]]], device: torch.device, dtype: torch.dtype,
    deadline: float,
) -> int | None:  # fmt: skip
    """The samples a forward and backward with which TRL is quickest (the second of two iterations), of the whole batch, a
    quarter and a sixteenth of it; one sample where none of them fits; None: not even that does."""
    from .trl import TrlLoop

    found: dict[int, float] = {}
    for size in (workload.batch, workload.batch // 4, workload.batch // 16, 1):
        if size == 1 and found or size == 0 or (found and time.monotonic() > deadline):
            continue
        trl = _if_it_fits(lambda size=size: TrlLoop(model, workload, prompts[:2], device, dtype, size).all())  # type: ignore[misc]
        if trl is not None:
            found[size] = trl.seconds[-1]
        trl = None
        _free()
    record.data["trl_seconds_by_micro_batch"] = found
    if not found:
        record.notes.append("TRL: out of memory, even with one sample at a time")
        return None
    record.data["trl_micro_batch"] = best = min(found, key=found.__getitem__)
    print("TRL alone, seconds by micro-batch: " + ", ".join(f"{size}: {s:.2f}" for size, s in found.items()), flush=True)
    return best


def _alternate(
    record: Record, trl: TrlLoop, ours: FastppoLoop | None, prompts: list[list[list[int]]], deadline: float
) -> tuple[TrlLoop, list[float]]:
    """TRL runs its loop; between two of its iterations ours runs one on the same prompts. TRL, and the seconds of ours."""
    seconds: list[float] = []
    last = len(prompts) - 1

    def between(i: int) -> bool:
        if ours is not None:
            seconds.append(ours.iterate(prompts[i], timed=i == last))
            print(_line(i, trl.seconds[-1], seconds[-1], trl.curve[-1], ours.curve[-1]), flush=True)
        if time.monotonic() > deadline:
            raise TimeIsUp
        return i == last - 1

    try:
        trl.run(between)
    except TimeIsUp:
        record.notes.append(f"stopped after {len(trl.curve)} of {len(prompts)} iterations: no more time")
    return trl, seconds


def _line(i: int, trl: float, ours: float, trl_reward: float, our_reward: float) -> str:
    rewards = f"mean reward {trl_reward:.3f} and {our_reward:.3f}"
    return f"iteration {i + 1}: TRL {trl:.2f} s, fastppo {ours:.3f} s, ratio {trl / ours:.1f}, {rewards}"


def _alone(record: Record, ours: FastppoLoop, prompts: list[list[list[int]]], deadline: float) -> list[float]:
    seconds = []
    for i, of_iteration in enumerate(prompts):
        seconds.append(ours.iterate(of_iteration, timed=i == len(prompts) - 1))
        print(f"iteration {i + 1}: fastppo {seconds[-1]:.3f} s, mean reward {ours.curve[-1]:.3f}", flush=True)
        if time.monotonic() > deadline:
            record.notes.append(f"stopped after {i + 1} of {len(prompts)} iterations: no more time")
            break
    _keep_ours(record, ours, seconds[WARM_UP : len(prompts) - 1])
    return seconds


def _keep_ours(record: Record, ours: FastppoLoop, seconds: list[float]) -> None:
    if len(seconds) >= FEWEST:
        batch = record.data["samples_per_iteration"]
        record.figures["fastppo samples/s"] = Figure.of([batch / s for s in seconds], "samples/s", "higher")
    record.data["curves"] = {"fastppo": ours.curve}
    record.data["learned"] = {"fastppo": learned(ours.curve)}
    record.data["phases"] = {"fastppo": ours.phases}
    record.data["tokens"] = {
        "padded": ours.padded_tokens, "tree": ours.tree_tokens,
        "responses": record.settings["response"] * record.data["samples_per_iteration"],
    }  # fmt: skip


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- memory: each engine alone in a process of its own -----------------------------------------------------------------


def _memory(
    record: Record, engine: str, workload: Workload, model: str, device: torch.device, deadline: float, micro_batch: int
) -> None:
    """The most tensors alive at once, weights and optimizer included; and, for the record, the whole process's peak."""
    command = [
        sys.executable, "-m", "bench.loop", "--workload", workload.name, "--model", model, "--device", str(device),
        "--memory", engine, "--micro-batch", str(micro_batch),
    ]  # fmt: skip
    try:
        seconds = max(60.0, min(MEMORY_SECONDS, deadline - time.monotonic()))
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        record.notes.append(f"peak memory of {engine}: not measured (no time, or out of memory)")
        return
    record.figures[f"{engine} MiB"] = Figure(found["tensors_MiB"], "MiB", "lower" if engine == "fastppo" else None)
    record.data.setdefault("process_MiB", {})[engine] = found["process_MiB"]


def print_memory(
    engine: str, workload: Workload, model: str, device: torch.device, dtype: torch.dtype, micro_batch: int
) -> None:
    """As one line of JSON: the peak over two iterations (the first makes the optimizer's state)."""
    prompts = prompts_of(workload, _vocab(model), 2)
    if engine == "fastppo":
        ours = FastppoLoop(model, workload, 2, device, dtype)
        call: Callable[[], Any] = lambda: [ours.iterate(of_iteration) for of_iteration in prompts]  # noqa: E731
    else:
        from .trl import TrlLoop

        trl = TrlLoop(model, workload, prompts, device, dtype, micro_batch)
        call = lambda: trl.run(lambda _: False)  # noqa: E731
    alive = torch.cuda.memory_allocated(device) if device.type == "cuda" else _alive()
    tensors = alive + peak(call, device)
    print(json.dumps({"tensors_MiB": tensors / 2**20, "process_MiB": _process_peak()}))


def _alive() -> int:
    """Bytes of the CPU tensors that this process holds."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _process_peak() -> float:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024 if sys.platform == "linux" else most / 2**20
