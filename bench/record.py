"""Result files: what was measured, on what, and whether it is worse than what was stored before.

A record is one part of the measurements on one device, ``bench/results/DEVICE/PART.json``. It is written whole after every
figure that matters, so that a run cut off loses nothing.

A figure is worse than the stored one where it loses more than 5 % of it. The cores of a CPU are shared with whatever else runs,
so there its quartiles must also lie apart from those of the stored figure: a difference within the spread is none.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastppo.errors import UserError
from fastppo.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LOSS = 0.05  # worse than the stored figure by more than this is flagged
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "trl", "liger-kernel", "flash-attn", "xformers", "fastppo")


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


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def sources(*places: str) -> str:
    """A digest of these files, and of the Python files under these folders, of the repository: figures of other code are not
    this code's."""
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: torch.device) -> dict[str, Any]:
    """What figures mean nothing without."""
    changes = _output("git", "status", "--porcelain", "--", "fastppo", "kernels", "bench/*.py")
    found: dict[str, Any] = {
        "device": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": None if changes is None else bool(changes),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["gibibytes"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def folder_of(device: torch.device) -> Path:
    """``bench/results/cpu``, ``bench/results/nvidia-h100-80gb-hbm3``, ..."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For what writes by `fastppo.files`, whose advice is for training: one line of what is wrong with `path`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except UserError as error:
        reason = error.__cause__
        if not isinstance(reason, OSError):
            raise
        allowed = "expected a file in a folder that exists and can be written"
        raise UserError(f"cannot write {path}: {reason.strerror}; {allowed}") from reason


class Damaged(Exception):
    """A result file that cannot be used; the text says what is wrong with it."""


@dataclass
class Figure:
    """One measured number: the median of ``raw`` where it was measured several times.

    unit: ``ratio`` (of two things measured in the same run), ``ms``, ``s``, ``samples/s``, ``tokens/s``, ``TFLOP/s``, ``GB/s``,
    ``MiB``, ``percent``, ``reward``. better: ``higher``, ``lower``, or None where neither is.
    """

    value: float
    unit: str
    better: str | None = None
    raw: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, raw: list[float], unit: str, better: str | None = None) -> Figure:
        return cls(statistics.median(raw), unit, better, raw)

    @property
    def contradicts(self) -> float | None:
        """What the value should be by its samples, if it is another: a hand with an editor changes one and not the other."""
        if not isinstance(self.raw, list) or not self.raw or not all(map(finite, [self.value, *self.raw])):
            return None
        expected = Figure.of(self.raw, self.unit).value
        return None if math.isclose(self.value, expected, rel_tol=1e-9) else expected

    @property
    def quartiles(self) -> list[float]:
        """First and third; the value itself where it was measured once."""
        if len(self.raw) < 2:
            return [self.value, self.value]
        return statistics.quantiles(self.raw, n=4, method="inclusive")[::2]


@dataclass
class Record:
    """One part's results.

    figures: by name. data: whatever else a reader wants (curves, shapes, token counts). notes: lines on what is missing and
    why (a peer that is not installed, out of memory). reference: for each figure the best that was ever stored for this part
    and device, with its quartiles and its commit; on a CPU one that is better by less than the spread is no new best, or luck
    would raise it from run to run. complete: whether everything of the part was measured.
    """

    part: str
    machine: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reference: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    complete: bool = False

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record in a file.

        Raises:
            Damaged: there is none that can be read, or a figure in it is not the median of its samples.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            figures = {name: Figure(**figure) for name, figure in found.pop("figures").items()}
            record = cls(**found, figures=figures)
        except OSError as error:
            raise Damaged(f"cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise Damaged(f"is no JSON: {error}") from None
        except (LookupError, TypeError, AttributeError):
            raise Damaged("cannot be read as a result file") from None
        for name, figure in figures.items():
            if (expected := figure.contradicts) is not None:
                raise Damaged(f"the figure {name!r} is {figure.value:.10g}, but the median of its samples is {expected:.10g}")
        return record

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """`read`, or None where there is none that can be read."""
        try:
            return cls.read(path)
        except Damaged:
            return None

    def follow(self, stored: Record | None) -> None:
        """Take over what was stored before as what this record's figures are held against.

        A figure counts where it means the same again: ratios and counts of bytes everywhere, times and rates on a GPU of the
        same name. What was measured with other settings is another figure.
        """
        # As JSON has them: it knows neither tuples nor keys that are numbers.
        if stored is None or not stored._sound() or plain(stored.settings) != plain(self.settings):
            return
        if stored.machine.get("device") != self.machine["device"]:
            return
        self.reference = dict(stored.reference)
        for name, figure in stored.figures.items():
            old = self.reference.get(name)
            if figure.value is None or not figure.better or not self._counts(figure):  # None: it was not finite
                continue
            if old is None or old.get("unit") != figure.unit or (_loss(figure, old["value"]) < 0 and self._apart(figure, old)):
                commit = stored.machine.get("commit")
                self.reference[name] = {
                    "value": figure.value, "unit": figure.unit, "quartiles": figure.quartiles, "commit": commit
                }  # fmt: skip

    def losses(self) -> dict[str, float]:
        """Figures that are worse than the stored one by more than `LOSS`, and on a CPU than the spread: by what share of it.
        All of it (1) where a figure was stored and is no longer measured."""
        found = {name: 1.0 for name in self.reference if name not in self.figures}
        for name, figure in self.figures.items():
            old = self.reference.get(name)
            if figure.value is not None and figure.better and old is not None and old.get("unit") == figure.unit:
                loss = _loss(figure, old["value"])
                if loss > LOSS and self._apart(figure, old):
                    found[name] = loss
        return found

    def _counts(self, figure: Figure) -> bool:
        return figure.unit in ("ratio", "MiB", "percent") or self._on_gpu()

    def _apart(self, figure: Figure, old: dict[str, Any]) -> bool:
        """Whether the difference is more than what two runs of the same differ by."""
        stored = old.get("quartiles")  # from a file, where anything may stand
        if not (isinstance(stored, list) and len(stored) == 2 and all(map(finite, stored))):
            stored = [old["value"]] * 2
        (low, high), (old_low, old_high) = figure.quartiles, stored
        return self._on_gpu() or high < old_low or old_high < low

    def _on_gpu(self) -> bool:
        return "capability" in self.machine

    def _sound(self) -> bool:
        """Whether its figures and references can be counted with; a value that was not finite is None."""
        try:
            numbers = [figure.value for figure in self.figures.values() if figure.value is not None]
            numbers += [value for figure in self.figures.values() for value in figure.raw]
            numbers += [old["value"] for old in self.reference.values()]
        except (LookupError, TypeError, AttributeError):
            return False
        return isinstance(self.machine, dict) and all(map(finite, numbers))


def finite(value: Any) -> bool:
    """Whether it is a number that can be counted with."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def plain(settings: dict[str, Any]) -> Any:
    return json.loads(json.dumps(settings))


def _loss(figure: Figure, stored: float) -> float:
    """How much worse, as a share of the stored value; negative where it is better."""
    change = (figure.value - stored) / abs(stored) if stored else 0.0
    return -change if figure.better == "higher" else change
