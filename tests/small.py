"""Whole runs of seconds: a tiny random model, a small data folder, settings for both; in this process or in a new one."""

import importlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import save_tiny_model

REPO = Path(__file__).resolve().parents[1]
TIMINGS = {"samples_per_s", "seconds"}
SETTINGS = {
    "valid_examples": "6", "eval_every": "2", "checkpoint_every": "2",
    "lora.rank": "4", "lora.alpha": "8",
    "sft.examples": "24", "sft.epochs": "2", "sft.batch_size": "8", "sft.lr": "2e-2",
    "ppo.iterations": "4", "ppo.prompts": "8", "ppo.samples": "3", "ppo.lr": "5e-3",
    "sample.max_new_tokens": "3",
}  # fmt: skip


def write_rows(path: Path, n: int, seed: int) -> None:
    """CoLA's own format. What ends in "no" is unacceptable."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        words = [draw.choice(("The cat", "The dogs", "She", "They")), draw.choice(("sees", "sleep", "see"))]
        words += [draw.choice(("a dog", "the cat", "yes")), *(["no"] if i % 2 else [])]
        rows.append(f"src\t{1 - i % 2}\t\t{' '.join(words)}.\n")
    path.write_text("".join(rows))


@dataclass(frozen=True)
class World:
    """A folder that holds a model and data."""

    folder: Path

    @staticmethod
    def make(folder: Path) -> "World":
        world = World(folder)
        save_tiny_model("llama", world.model)
        world.data.mkdir()
        write_rows(world.data / "train.tsv", 60, seed=1)
        write_rows(world.data / "dev.tsv", 20, seed=2)
        return world

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def settings(self, **changes: object) -> dict[str, str]:
        """Texts by key; in ``changes`` two underscores stand for the point: ``ppo__lr=1``."""
        given = {"model": str(self.model), "data": str(self.data), **SETTINGS}
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        return given | {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in changed.items()}

    def argv(self, run: Path, **changes: object) -> list[str]:
        """The same as a command line."""
        words = ["train", "--out", str(run)]
        for key, value in self.settings(**changes).items():
            flag = "--" + key.replace(".", "-").replace("_", "-")
            if value in ("true", "false"):
                words.append(flag if value == "true" else flag.replace("--", "--no-", 1))
            else:
                words += [flag, value]
        return words

    def train(self, run: Path, **changes: object) -> tuple[dict[str, Any], str]:
        """A run in this process: its summary, and what it showed."""
        from fastppo.config import load_config
        from fastppo.trainer import train

        console = quiet_console()
        return train(load_config(self.settings(**changes)), run, console), console.file.getvalue()


def quiet_console() -> Any:
    from fastppo.track import Console

    return Console(file=io.StringIO(), width=120)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ppo_steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in lines(run / "metrics.jsonl") if row["stage"] == "PPO"]


def adapter(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a run computed, bit by bit, without its timings and its own name."""
    metrics = [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(run / "metrics.jsonl")]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "adapter_config": (run / "adapter" / "adapter_config.json").read_text(),
        "metrics": metrics,
        "samples": (run / "samples.jsonl").read_text(),
        "summary": {k: v for k, v in summary.items() if k not in TIMINGS},
        "report": (run / "report.html").is_file(),  # of timings too, and of the run's name
        "setup": (run / "setup.json").read_text(),
        "answers": {path.name: path.read_text() for path in (run / "answers").iterdir()},
    }


def leftovers(run: Path) -> list[str]:
    """Temporary names in a run folder."""
    return [path.name for path in run.rglob("*") if path.name.endswith((".tmp", ".old"))]


# -- commands in processes of their own ------------------------------------------------------------------------------
# A server imports torch and transformers once and forks a process for each command, before anything was computed: it
# has its own signals, descriptors and death, and starts in milliseconds.


PRELOAD = [
    "fastppo.cli", "fastppo.trainer", "fastppo.export", "fastppo.evaluate", "fastppo.predict",
    "sklearn.metrics", "transformers.models.llama.modeling_llama", "transformers.generation", "peft.tuners.lora.bnb",
]  # fmt: skip


class Command:
    """A command running in its own process."""

    def __init__(self, process: BaseProcess, folder: Path):
        self.process, self.folder = process, folder

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self) -> tuple[int, str, str]:
        """Exit code (minus the signal's number where one ended it), stdout and stderr."""
        self.process.join(60)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode, (self.folder / "out").read_text(), (self.folder / "err").read_text()


def start(
    argv: list[str], folder: Path, hook: Callable[..., None] | None = None, *args: Any, cwd: Path | None = None
) -> Command:
    """Begin ``fastppo ARGV``; ``hook(*args)`` runs in the new process before it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_command, args=(argv, folder, cwd or folder, hook, args))
    # The server, which the first process starts, looks for what it preloads on the interpreter's own path.
    path = os.pathsep.join([str(REPO), str(REPO / "kernels"), str(REPO / "tests")])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        process.start()
    return Command(process, folder)


def call(argv: list[str], folder: Path, hook: Callable[..., None] | None = None, *args: Any, cwd: Path | None = None):
    """``start`` and ``wait``."""
    return start(argv, folder, hook, *args, cwd=cwd).wait()


def _command(argv: list[str], folder: Path, cwd: Path, hook: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    os.chdir(cwd)
    if hook is not None:
        hook(*args)
    from fastppo.cli import main

    sys.exit(main(argv))


# Hooks for them.


def kill_at(module: str, name: str, count: int, signum: int = signal.SIGKILL, *, after: bool = False, then: int = 0) -> None:
    """In the new process: at the ``count``-th call of a function the process sends itself a signal (``then``: another)."""
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after else None
        if calls == count:
            os.kill(os.getpid(), signum)
            if then:
                os.kill(os.getpid(), then)
        return result if after else original(*args, **kwargs)

    setattr(owner, last, wrapper)


def kill_after(*place) -> None:
    kill_at(*place, after=True)


def signal_twice(module: str, name: str, count: int, first: int, second: int) -> None:
    kill_at(module, name, count, first, then=second)
