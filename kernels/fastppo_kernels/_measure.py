"""Chooses between implementations by timing them once, and remembers the choice for each GPU and shape.

What was chosen is kept in ``<folder>/<GPU name>.json``, so that a process that goes on with a run computes as the one before
it. The folder is the environment variable ``FASTPPO_KERNELS_CACHE``, else ``~/.cache/fastppo_kernels``; set to the empty
string, or where there is no home folder, nothing is read or written. Entries of another torch, triton or fastppo_kernels are
not used.
"""

import contextlib
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

VARIABLE = "FASTPPO_KERNELS_CACHE"

Candidate = Callable[[], Any]
Timer = Callable[[Candidate, torch.device], float]

# Below this gain the default stays: two kernels that are as fast should not swap places from one machine to the next.
_GAIN = 0.98
_WARM_UPS, _REPEATS = 3, 9
_HEAD_START = 2_000_000  # cycles of the GPU, about 1 ms: several times what the host needs for a candidate's launches


def bucket(rows: int) -> int:
    """The power of two at or above `rows` (1 for none): one measurement stands for all row counts in between."""
    return 1 << max(rows - 1, 0).bit_length()


def time_on_gpu(candidate: Candidate, device: torch.device) -> float:
    """Median time of one call in microseconds, by CUDA events, with the L2 cache overwritten before each call.

    Weights come from memory in a model, never from the cache that the call before has filled. The GPU is kept waiting while the
    host launches, so that it is the kernels that are timed: in a CUDA graph nothing else counts.
    """
    with torch.cuda.device(device):
        flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
        times = []
        for i in range(_WARM_UPS + _REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(_HEAD_START)
            start.record()
            candidate()
            end.record()
            end.synchronize()
            if i >= _WARM_UPS:
                times.append(start.elapsed_time(end) * 1000.0)
    return statistics.median(times)


def _software() -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    # At the time of the call: this module is imported by the package's own import.
    from . import __version__

    return f"fastppo_kernels {__version__}, torch {torch.__version__}, triton {triton}"


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing meanwhile, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Chooser:
    """Remembers which candidate was fastest; `choose` is the one that the ops share.

    folder: where choices are kept, None for memory only. timer: how long one call takes; None for `time_on_gpu`, and then
    only CUDA devices are measured.
    """

    def __init__(self, folder: Path | None, timer: Timer | None = None) -> None:
        self.folder, self.timer = folder, timer
        self._chosen: dict[str, dict[str, str]] = {}

    def choose(self, key: str, candidates: Mapping[str, Candidate], device: torch.device) -> str:
        """The name of the fastest candidate for `key`: remembered, or measured now.

        The first candidate is the default: it is taken without being remembered where nothing can be measured (while a CUDA
        graph is captured, while torch.compile traces, on other devices than CUDA), and it is kept unless another is at least
        2 % faster. A candidate that raises is out.

        Args:
            key: what is chosen for: the op, its shape with rows as `bucket` gives them, and the dtype.
            candidates: name -> call without arguments and without side effects. At least one.
            device: where the calls run.
        """
        default = next(iter(candidates))
        if len(candidates) == 1:
            return default
        name = _device_name(device)
        chosen = self._chosen.get(name)
        if chosen is None:
            chosen = self._chosen[name] = self._read(self._path(name))
        if chosen.get(key) in candidates:
            return chosen[key]
        if not self._can_measure(device):
            return default
        times, lasting = self._measure(candidates, device)
        if times:
            best = min(times, key=times.__getitem__)
            if default in times and times[best] > _GAIN * times[default]:
                best = default
        else:
            best = default
        chosen[key] = best
        if lasting:
            chosen[key] = self._keep(name, key, best, candidates)
        return chosen[key]

    def _can_measure(self, device: torch.device) -> bool:
        if torch.compiler.is_compiling():
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        return self.timer is not None or device.type == "cuda"

    def _measure(self, candidates: Mapping[str, Candidate], device: torch.device) -> tuple[dict[str, float], bool]:
        """(time of each candidate that ran, whether to keep the choice: want of memory passes, a missing kernel does not)."""
        times, lasting = {}, True
        timer = self.timer or time_on_gpu
        for name, candidate in candidates.items():
            try:
                times[name] = timer(candidate, device)
            except torch.OutOfMemoryError:
                lasting = False
            except Exception as error:
                warnings.warn(f"fastppo_kernels: {name} cannot run and is left out: {error}", stacklevel=3)
        return times, lasting and bool(times)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"

    def _read(self, path: Path | None) -> dict[str, str]:
        if path is None:
            return {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["software"] != _software():
                return {}
            return {str(key): str(choice) for key, choice in kept["choices"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"fastppo_kernels: {path} cannot be read, measuring again: {error!r}", stacklevel=4)
            return {}

    def _keep(self, name: str, key: str, best: str, candidates: Mapping[str, Candidate]) -> str:
        """Write the choice down and return it, or what another process wrote first: all must compute alike."""
        path = self._path(name)
        if path is None:
            return best
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a damaged file has been warned about when it was first read
                    choices = self._read(path)
                if choices.get(key) in candidates:
                    return choices[key]
                choices[key] = best
                text = json.dumps({"software": _software(), "choices": choices}, indent=1, sort_keys=True)
                handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
                try:
                    with open(handle, "w", encoding="utf-8") as file:
                        file.write(text)
                    os.replace(temporary, path)
                except BaseException:
                    os.unlink(temporary)
                    raise
        except OSError as error:
            warnings.warn(f"fastppo_kernels: what was measured cannot be kept in {path}: {error}", stacklevel=4)
            self.folder = None
        return best


@cache
def _shared(folder: str | None) -> Chooser:
    if folder == "":
        return Chooser(None)
    wanted = "~/.cache/fastppo_kernels" if folder is None else folder
    try:
        return Chooser(Path(wanted).expanduser())
    except RuntimeError as error:  # once, for what this function returns is remembered
        warnings.warn(f"fastppo_kernels: what is measured cannot be kept in {wanted}: {error}", stacklevel=3)
        return Chooser(None)


class MeasuredFile(NamedTuple):
    """What was chosen on one device: by op, shape and dtype the name of the fastest. current: whether it is used, which it is
    not where other software wrote it. error: why it cannot be read, else None."""

    path: Path
    software: str | None
    current: bool
    choices: dict[str, str]
    error: Exception | None


class Measurements(NamedTuple):
    """folder: where choices are kept, None where nothing is. software: of which they have to be. error: why the folder cannot
    be listed, else None."""

    folder: Path | None
    software: str
    files: list[MeasuredFile]
    error: OSError | None


def measurements() -> Measurements:
    """What is kept of the choices between implementations, by this process and others; nothing is measured."""
    software = _software()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = _shared(os.environ.get(VARIABLE)).folder
    try:
        paths = [] if folder is None else sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        paths = []
    except OSError as error:
        return Measurements(folder, software, [], error)
    return Measurements(folder, software, [_measured_file(path, software) for path in paths], None)


def _measured_file(path: Path, software: str) -> MeasuredFile:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        choices = {str(key): str(choice) for key, choice in kept["choices"].items()}
        return MeasuredFile(path, str(kept["software"]), kept["software"] == software, choices, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return MeasuredFile(path, None, False, {}, error)


def choose(key: str, candidates: Mapping[str, Candidate], device: torch.device) -> str:
    """`Chooser.choose` with the choices of this process, kept in the folder that ``FASTPPO_KERNELS_CACHE`` names."""
    return _shared(os.environ.get(VARIABLE)).choose(key, candidates, device)
