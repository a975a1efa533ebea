"""Pictures of the report: the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastppo.files import write_bytes

COLORS = {"fastppo": "#1f6fb4", "TRL": "#d9701a"}
OTHERS = ("#3a923a", "#8a5fb0", "#8c6d4f", "#c95f9e", "#7a7a7a", "#a3a028", "#2aa5b5")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fastppo", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is no formula
}  # fmt: skip


@contextmanager
def picture(path: Path, width: float, height: float, panels: int = 1) -> Iterator[Any]:
    """The figure to draw in, of `panels` axes side by side; written to `path` at the end, in the format of its suffix.

    width, height: inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user's would change the bytes
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(1, panels, sharey=True)
        yield figure
        buffer = io.BytesIO()
        kind = path.suffix.removeprefix(".")
        figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None, "Creator": None} if kind == "svg" else None)
    write_bytes(path, buffer.getvalue())


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` on each side of it, as many on either, so that a trend is not delayed."""
    smooth = []
    for i in range(len(values)):
        width = min(reach, i, len(values) - 1 - i)
        part = values[i - width : i + width + 1]
        smooth.append(sum(part) / len(part))
    return smooth


def curves(path: Path, title: str, rewards: dict[str, list[float]], seconds: dict[str, float]) -> None:
    """Mean reward of each iteration of both engines (thin, and smoothed): over iterations and, where both are timed, seconds.

    rewards: by engine; seconds: of one iteration, by engine.
    """
    timed = len(rewards) > 1 and all(seconds.get(engine, 0) > 0 for engine in rewards)
    reach = max(map(len, rewards.values())) // 15
    with picture(path, 9 if timed else 6, 3.4, 2 if timed else 1) as figure:
        for axes, by_time in zip(figure.axes, (False, True), strict=False):
            for engine, values in rewards.items():
                step = seconds[engine] if by_time else 1
                at = [step * (i + 1) for i in range(len(values))]
                axes.plot(at, values, color=COLORS[engine], alpha=0.35, linewidth=1)
                axes.plot(at, _smooth(values, reach), color=COLORS[engine], linewidth=2, label=engine)
            axes.xaxis.get_major_locator().set_params(integer=not by_time)
            axes.set_xlabel("seconds of training" if by_time else "iteration")
            axes.set_xlim(left=0)
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("mean reward")
        figure.axes[0].set_title(title)
        figure.axes[0].legend(loc="best")


def _bars(axes: Any, rows: Sequence[tuple[str, float, list[float]]], color: str, digits: int) -> None:
    """One horizontal bar a row, the first on top, with the span of the raw values and the value beside it."""
    for y, (_, value, raw) in enumerate(rows):
        axes.barh(y, value, height=0.62, color=color)
        if len(raw) > 1:
            axes.plot([min(raw), max(raw)], [y, y], color="0.15", linewidth=1.5, marker="|", markersize=7)
        text = f"{value:.{digits}f} x"
        axes.annotate(text, (max([value, *raw]), y), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.25)


def ratios(path: Path, title: str, rows: Sequence[tuple[str, float, list[float], float | None]]) -> None:
    """How many times TRL's samples/s: label, median, raw values, goal."""
    with picture(path, 7.5, 1.3 + 0.5 * len(rows)) as figure:
        axes = figure.axes[0]
        _bars(axes, [row[:3] for row in rows], COLORS["fastppo"], 1)
        goals = [(y, goal) for y, (*_, goal) in enumerate(rows) if goal is not None]
        for i, (y, goal) in enumerate(goals):
            axes.plot([goal, goal], [y - 0.42, y + 0.42], color=COLORS["TRL"], linewidth=2.5, label="goal" if not i else None)
        axes.axvline(1, color="0.4", linewidth=1, linestyle="--", label="TRL")
        axes.set_xlabel("samples/s, times TRL's")
        axes.set_title(title)
        figure.legend(loc="outside lower right", ncols=2)


def ablations(path: Path, title: str, rows: Sequence[tuple[str, float, list[float]]]) -> None:
    """What each idea brings: idea, samples/s of the full engine over those without it, raw values."""
    with picture(path, 7.5, 1.2 + 0.42 * len(rows)) as figure:
        axes = figure.axes[0]
        _bars(axes, rows, COLORS["fastppo"], 2)
        axes.axvline(1, color="0.4", linewidth=1, linestyle="--")
        axes.set_xlabel("samples/s of the full engine, times those without it")
        axes.set_title(title)


def kernels(path: Path, title: str, rows: Sequence[tuple[str, dict[str, float]]], ours: str) -> None:
    """Percent of the limit that each form of an op reaches: label, percent by form."""
    forms = list(dict.fromkeys(form for _, found in rows for form in found if form != ours))
    with picture(path, 8.5, 1.4 + 0.3 * len(rows)) as figure:
        axes = figure.axes[0]
        axes.barh(range(len(rows)), [found[ours] for _, found in rows], height=0.6, color=COLORS["fastppo"], label=ours)
        for i, form in enumerate(forms):
            at = [(found[form], y) for y, (_, found) in enumerate(rows) if form in found]
            style = {"marker": "osD^vPX"[i % 7], "color": COLORS.get(form, OTHERS[i % 7]), "markeredgecolor": "white"}
            axes.plot(*zip(*at, strict=True), linestyle="none", markersize=7, label=form, **style)
        axes.axvline(100, color="0.4", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.25)
        axes.set_xlabel("percent of the limit")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=4)
