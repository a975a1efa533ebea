"""What a run shows and records: progress on the terminal, `metrics.jsonl`, `samples.jsonl`, the final table.

Text that others wrote (model output, data) reaches the terminal only through `printable`, and never as rich markup.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from fastppo.errors import printable
from fastppo.files import JsonLines
from fastppo.scores import figure, title, with_intervals

SHOWN = {  # the metrics on the progress line, in this order (valid: the task's first official one); metrics.jsonl has them all
    "loss": "loss {:.4f}",
    "reward": "reward {:+.3f}",
    "kl": "KL {:.4f}",
    "accuracy": "accuracy {:.3f}",
    "constrained_mass": "mass of the answers {:.3f}",
    "error": "error {:.3f}",
    "valid": "held-out {title} {:.3f}",
    "samples_per_s": "{:.0f} samples/s",
}
STAGES = {"zero_shot": "zero-shot", "sft": "after SFT", "ppo": "after PPO"}
PLAIN_LINES = 20  # per stage, where there is no terminal
REFRESH_S = 0.1


class Console(rich.console.Console):
    """rich's console on stdout, without colouring of numbers; a closed pipe stays the caller's to handle."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class Tracker:
    """Progress and records of one run; a context manager, so that the terminal is left in order."""

    def __init__(self, run: Path, console: rich.console.Console) -> None:
        """Opens `metrics.jsonl` and `samples.jsonl` in the run folder, which exists."""
        self._console = console
        self._metrics = JsonLines(run / "metrics.jsonl")
        self._samples = JsonLines(run / "samples.jsonl")
        self._live = console.is_terminal and not console.is_dumb_terminal and console.width >= 70  # the line needs room
        self._progress: Progress | None = None
        self._stage, self._total, self._start = "", 0, 0
        self._began = self._shown_at = 0.0

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress display and closes the files."""
        self._end_stage()
        self._metrics.close()
        self._samples.close()

    def _end_stage(self) -> None:
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.refresh()
            progress.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begins a stage of `total` steps, of which a resumed run has `done` behind it."""
        self._end_stage()
        self._stage, self._total, self._start = name, total, done
        self._began = time.monotonic()
        if self._live:
            # Drawn by `step` itself: a thread that redraws would take time from two cores.
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                console=self._console,
                auto_refresh=False,
            )
            self._progress.start()
            self._progress.add_task(printable(name), total=total, completed=done, line="")
            self._progress.refresh()

    def step(self, n: int, metrics: Mapping[str, Any]) -> None:
        """Records step `n` (1 is the stage's first) as one object: `stage`, `step`, then the metrics; and shows it."""
        self._metrics.append({"stage": self._stage, "step": n, **metrics})
        line = self._line(n, metrics)
        if self._progress is not None:
            self._progress.update(TaskID(0), completed=n, line=line)
            if n == self._total or time.monotonic() - self._shown_at >= REFRESH_S:
                self._shown_at = time.monotonic()
                self._progress.refresh()
        elif not self._live and (n == self._total or n % max(1, self._total // PLAIN_LINES) == 0):
            self.note(f"{self._stage} {n}/{self._total}  {line}")

    def _line(self, n: int, metrics: Mapping[str, Any]) -> str:
        valid = next((name for name in metrics if name.startswith("valid_") and name != "valid_reward"), "")
        metric = title(valid.removeprefix("valid_"))
        values = {**metrics, "valid": metrics.get(valid)}
        parts = [f.format(float(values[key]), title=metric) for key, f in SHOWN.items() if values.get(key) is not None]
        if self._start < n < self._total:
            seconds = (time.monotonic() - self._began) / (n - self._start) * (self._total - n)
            parts.append(f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}")
        return "  ".join(parts)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records what the policy wrote: one object a sample, as the caller gives it."""
        for row in rows:
            self._samples.append(row)

    def note(self, text: str) -> None:
        """Shows one line, above the progress if there is one. Control characters are written as escapes."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    def state(self) -> dict[str, int]:
        """Where the records stand, for a checkpoint; what was recorded so far is on the disk when this returns."""
        return {"metrics": self._metrics.tell(), "samples": self._samples.tell()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Cuts the records back to where a checkpoint was taken.

        Raises:
            UserError: a record is shorter than the checkpoint says.
        """
        self._metrics.truncate_to(state["metrics"])
        self._samples.truncate_to(state["samples"])

    def table(self, summary: Mapping[str, Any]) -> None:
        """Shows `summary["stages"]`: one row for each of zero_shot, sft and ppo that was run.

        A stage has its metrics, each with `_low` and `_high` (shown of the first), accuracy where there is one and malformed
        (fractions of 1), and `labels`, how many it has seen; of several tasks, the rows of each in `tasks`.
        """
        self._end_stage()
        rows = {name: summary["stages"][name] for name in STAGES if name in summary["stages"]}
        first: Mapping[str, Any] = next(iter(rows.values()), {})
        main, *more = with_intervals(first) or [""]
        fractions = [name for name in ("accuracy", "malformed") if name in first and name != main]
        more = [name for name in more if name not in fractions]
        table = Table("stage")
        headings = [f"{title(main)} [95 % interval]"] if main else []
        for heading in (*headings, *(title(name) for name in more), *fractions, "labels seen"):
            table.add_column(Text(heading), justify="right")
        for stage, row in rows.items():
            figures = [figure(row, main), *(f"{row[name]:z.3f}" for name in more), *(f"{row[name]:.1%}" for name in fractions)]
            table.add_row(*map(Text, (STAGES[stage], *figures, f"{row['labels']:,}")))
        self._console.print(table)
        if "tasks" in first:
            self._console.print(_of_tasks(rows))


def _of_tasks(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The first metric of each task, by stage."""
    table = Table("task")
    for stage in rows:
        table.add_column(STAGES[stage], justify="right")
    for name, of_task in next(iter(rows.values()))["tasks"].items():
        main = with_intervals(of_task)[0]
        table.add_row(*map(Text, (f"{name} ({title(main)})", *(figure(row["tasks"][name], main) for row in rows.values()))))
    return table
