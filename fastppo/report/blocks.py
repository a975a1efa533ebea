"""Building blocks of a report: one self-contained HTML page without scripts, for a wide screen and for a phone.

Every block is a function that returns `Markup`; `page` puts them into a whole document. What a caller passes as text is
untrusted wherever it came from: it is escaped, and characters that are invisible or reorder their neighbours are written as
escapes (``\\u202e``). Only `Markup`, which the blocks themselves return, goes in as it is. The document allows no script, no
image and nothing from outside itself (Content-Security-Policy), and its only style is the style sheet beside this file, so no
markup could come alive even where it got through.

A page of several runs, for example::

    scores = table(["task", "SFT", "PPO"], [["cola", with_interval(0.31, 0.25, 0.36), with_interval(0.81, 0.77, 0.84)]])
    curves = line_chart("MCC", [Series(f"seed {s}", points[s]) for s in seeds], x="PPO iteration")
    html = page("study", "two methods, three seeds", [Section("Scores", [scores]), Section("Curves", [grid(curves)])])
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

from fastppo.errors import printable

WIDTH, HEIGHT = 360, 200  # of a chart, in units that are about a pixel on a phone and in three columns of a wide screen
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 8, 24  # of these for what stands around the plot
COLORS = 8  # different ones in the style sheet
HOVERED = 500  # points of a chart up to which each says its value
LONGEST_TEXT = 800
LARGEST, SMALLEST = 1e30, 1e-100  # what is beyond them cannot be drawn beside anything else

Cell = object  # text or a number, or `Markup` of another block


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    points: (x, y), in order; those that are not finite are left out, as if they had not been measured.
    band: (low, high) for each point, such as a 95 % interval over seeds; drawn as an area around the curve.
    marked: a dot at each point. joined: a line from point to point.
    color: 0 to 7, so that one thing can have one colour in all charts; None: by its place in the chart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] | None = None
    marked: bool = False
    joined: bool = True
    color: int | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    explained: str = "",
    percent: bool = False,
    zero: bool = False,
    at: float | None = None,
    x_range: tuple[float, float] | None = None,
    last: bool = True,
) -> Markup:
    """Curves over a common x axis, to stand in a `grid`.

    Args:
        title: what is drawn. explained: one line on how to read it.
        x: what the x axis counts.
        percent: the values are fractions of 1, shown in percent.
        zero: the y axis begins at 0 (or ends there).
        at: an x that is marked by a vertical line.
        x_range: what the x axis covers at least, so that charts beside each other have the same.
        last: the first curve's last value stands beside the title.
    """
    shown = [_drawable(one, i) for i, one in enumerate(series)]
    shown = [one for one in shown if one["points"]]
    ys = [y for one in shown for y in one["ys"]] + ([0.0] if zero else [])
    xs = [p[0] for one in shown for p in one["points"]] + list(x_range or ())
    if not shown:
        return _render("chart", title=title, explained=explained, series=[], last="", alt="")
    x_axis, y_axis = Axis.over(xs, LEFT, WIDTH - RIGHT), Axis.over(ys, HEIGHT - BOTTOM, TOP, margin=0.06, zero=zero)
    many = sum(len(one["points"]) for one in shown) > HOVERED
    for one in shown:
        places = [(x_axis.place(px), y_axis.place(py)) for px, py in one["points"]]
        one["line"] = _path(places) if one["joined"] else ""
        one["dots"] = places if one["marked"] or len(places) == 1 else []
        one["hits"] = [] if many else [
            (px, py, f"{one['name']}: {_value(value, percent)} ({x} {number(where)})")
            for (px, py), (where, value) in zip(places, one["points"], strict=True)
        ]  # fmt: skip
        if one["band"]:
            upper = [(x_axis.place(p[0]), y_axis.place(high)) for p, (_, high) in zip(one["points"], one["band"], strict=True)]
            lower = [(x_axis.place(p[0]), y_axis.place(low)) for p, (low, _) in zip(one["points"], one["band"], strict=True)]
            one["area"] = _path(upper + lower[::-1]) + "Z"
    first = shown[0]
    return _render(
        "chart",
        title=title,
        explained=explained,
        series=shown,
        last=_value(first["points"][-1][1], percent) if last and first["joined"] else "",
        alt="; ".join(_in_words(one, x, percent) for one in shown),
        x=x,
        x_ticks=[(x_axis.place(t), number(t)) for t in x_axis.ticks(5, whole=all(v == int(v) for v in xs))],
        y_ticks=[(y_axis.place(t), text) for t, text in _tick_texts(y_axis.ticks(4), percent)],
        at=x_axis.place(at) if at is not None and x_axis.low <= at <= x_axis.high else None,
    )  # fmt: skip


def interval_plot(
    title: str, rows: Sequence[tuple[str, float, float, float]], *, explained: str = "", percent: bool = False, digits: int = 3
) -> Markup:
    """One line a row: its name, a dot at its value, and its interval (name, value, low, high) on a common scale. digits: behind
    the point, where a row is said in words."""
    rows = [row for row in rows if all(map(is_number, row[1:]))]
    if not rows:
        return Markup()
    axis = Axis.over([v for _, *values in rows for v in values], 110, WIDTH - 16, margin=0.05)
    lines = [
        {"name": shortened(name, 14), "y": 18 + 30 * i, "color": i % COLORS,
         "dot": axis.place(value), "low": axis.place(low), "high": axis.place(high),
         "text": "{}: {}, from {} to {}".format(name, *(score(v, percent, digits) for v in (value, low, high)))}
        for i, (name, value, low, high) in enumerate(rows)
    ]  # fmt: skip
    ticks = [(axis.place(t), text) for t, text in _tick_texts(axis.ticks(4), percent)]
    return _render("intervals", title=title, explained=explained, rows=lines, end=30 * len(rows) + 4, ticks=ticks)


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]], *, explained: str = ""
) -> Markup:
    """A table of counts, shaded by each cell's share of its row: a confusion matrix. The columns begin with the rows' classes
    in the same order, so that what is right stands on the diagonal, which has another colour than what is wrong."""
    lines = []
    for right, (name, line) in enumerate(zip(rows, counts, strict=True)):
        total = sum(line)
        shares = [count / total if total else 0.0 for count in line]
        cells = [
            {"count": f"{count:,}", "share": f"{share:.0%}", "shade": math.ceil(10 * share), "right": i == right}
            for i, (count, share) in enumerate(zip(line, shares, strict=True))
        ]
        lines.append({"name": name, "cells": cells})
    return _render("heat_map", title=title, explained=explained, columns=columns, rows=lines)


def stacked_bar(
    title: str, parts: Sequence[tuple[str, float, str]], *, explained: str = "", rest: str | None = None
) -> Markup:
    """One bar of (name, size, how the size is shown), each as long as its share of the whole, with a legend. The part named
    ``rest`` is pale: what is left over."""
    total = sum(size for _, size, _ in parts)
    if not total > 0:
        return Markup()
    shown, start = [], 0.0
    for i, (name, size, text) in enumerate(parts):
        share = 100 * size / total
        shown.append({"name": name, "start": f"{start:.3f}", "size": f"{share:.3f}", "text": text, "share": f"{share:.0f}%",
                      "color": "rest" if name == rest else i % COLORS})  # fmt: skip
        start += share
    return _render("bar", title=title, explained=explained, parts=shown)


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, text_columns: int = 1, caption: str = "") -> Markup:
    """A table whose first ``text_columns`` columns are text and whose others are figures, aligned to the right."""
    return _render("table", heads=heads, rows=rows, text_columns=text_columns, caption=caption)


def with_interval(value: float, low: float, high: float, *, percent: bool = False, digits: int = 3) -> Markup:
    """A figure with its interval, for a cell of a `table`."""
    return Markup("<b>{}</b> <small>[{}, {}]</small>").format(*(score(v, percent, digits) for v in (value, low, high)))


def link(text: str, path: str) -> Markup:
    """A link to another file, by its path from the page's own folder."""
    return Markup('<a href="{}">{}</a>').format(urllib.parse.quote(os.fsencode(path)), shortened(visible(text)))


def tiles(items: Sequence[tuple[str, str, str]]) -> Markup:
    """The figures that matter most, large: (name, figure, a line on it)."""
    return _render("tiles", items=items)


def facts(rows: Sequence[tuple[str, Cell, str]]) -> Markup:
    """Lines of (name, value, what it means): settings, versions."""
    return _render("facts", rows=rows)


@dataclass(frozen=True)
class Answer:
    """What was answered at one point: who or when, the text, and a verdict (right: True, False or None for neither)."""

    when: str
    text: str
    verdict: str
    right: bool | None


@dataclass(frozen=True)
class Card:
    """An example: where it is from, its fields by name, the right answer, and what was answered, in order."""

    heading: str
    fields: Mapping[str, object]
    right: str
    answers: Sequence[Answer]


def answer_cards(cards: Sequence[Card]) -> Markup:
    """Examples with their answers."""
    return _render("cards", cards=cards)


def beside(wide: Markup, narrow: Markup) -> Markup:
    """Two blocks beside each other, the first twice as wide; below each other where the screen has no room for that."""
    return _render("beside", wide=wide, narrow=narrow) if narrow else wide


def grid(*blocks: Markup) -> Markup:
    """Blocks beside each other, as many as the screen has room for."""
    shown = [block for block in blocks if block]
    return _render("grid", blocks=shown) if shown else Markup()


def folded(title: str, *blocks: Markup, opened: bool = False) -> Markup:
    """Blocks that are shown when the reader opens them; opened: until he closes them."""
    return _render("folded", title=title, blocks=blocks, opened=opened)


def paragraph(text: str) -> Markup:
    return Markup('<p class="text">{}</p>').format(visible(text))


@dataclass(frozen=True)
class Section:
    """A part of a page, with a heading and a place in the page's list of contents."""

    title: str
    blocks: Sequence[Markup]
    text: str = ""


def page(title: str, subtitle: str, sections: Sequence[Section], *, badge: str = "", notes: Sequence[str] = ()) -> str:
    """The whole document. ``badge`` stands beside the title; ``notes`` (what is missing, damaged, unfinished) below it."""
    sections = [section for section in sections if any(section.blocks)]
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return str(
        _render(
            "page", title=title, subtitle=subtitle, sections=sections, badge=badge, notes=notes, style=Markup(style),
            digest=Markup(digest),
        )
    )  # fmt: skip


# -- text and numbers --------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """The text with what is invisible or reorders its neighbours written as escapes; lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def shortened(text: str, limit: int = LONGEST_TEXT) -> str:
    """At most ``limit`` characters of a text; how many more there were stands behind them where there is room for that."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} more characters)" if limit > 40 else text[: limit - 1] + "…"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it can be drawn: a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def number(value: float) -> str:
    """Three significant digits, whole thousands from 1,000 on."""
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def score(value: float, percent: bool = False, digits: int = 3) -> str:
    """A score for a table: so many digits behind the point, in percent one."""
    return f"{value:.1%}" if percent else f"{value:z.{digits}f}"


def _value(value: float, percent: bool) -> str:
    if percent:
        return f"{value:.1%}"
    return f"{value:z.3f}" if 0.01 <= abs(value) < 100 and value != int(value) else number(value)


def _output(value: object) -> object:
    # For every {{ }} of the templates: what is not markup becomes visible and bounded here, and is escaped after it.
    if value is None or hasattr(value, "__html__") or isinstance(value, (int, float)):
        return value
    return shortened(visible(str(value)))


# -- geometry ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """From the values ``low`` to ``high`` to the places ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, margin: float = 0.0, zero: bool = False) -> Axis:
        low, high = min(values), max(values)
        largest = max(abs(low), abs(high))
        if high - low <= max(1e-9 * largest, SMALLEST):  # one value, but for rounding
            room = largest / 2 if largest > SMALLEST else 0.5
            low, high = (low, high + room) if zero and low >= 0 else (low - room, high + room)
        room = margin * (high - low)
        return cls(low - (0 if zero and low == 0 else room), high + (0 if zero and high == 0 else room), start, end)

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, about: int, *, whole: bool = False) -> list[float]:
        """Round values inside, about so many, at least two but where they must be ``whole`` numbers."""
        step = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(step))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= step * 0.99)
        step = max(1, math.ceil(step)) if whole else step
        slack = 1e-6 * (self.high - self.low)  # a tick at the very end is one
        first, last = math.ceil((self.low - slack) / step), math.floor((self.high + slack) / step)
        return [i * step for i in range(first, last + 1)] if whole or last > first else self.ticks(2 * about)


def _drawable(series: Series, place: int) -> dict[str, Any]:
    bands: Sequence[Any] = series.band or [None] * len(series.points)
    kept = [
        (point, band)
        for point, band in zip(series.points, bands, strict=True)
        if all(map(is_number, point)) and (band is None or all(map(is_number, band)))
    ]
    points, band = [point for point, _ in kept], [band for _, band in kept if band is not None]
    return {
        "name": series.name,
        "points": points,
        "band": band,
        "ys": [y for _, y in points] + [y for pair in band for y in pair],
        "marked": series.marked,
        "joined": series.joined,
        "color": (place if series.color is None else series.color) % COLORS,
    }


def _path(places: Sequence[tuple[float, float]]) -> Markup:
    return Markup("M" + "L".join(f"{x:g} {y:g}" for x, y in places))  # of numbers alone, and as long as it has to be


def _tick_texts(ticks: Sequence[float], percent: bool) -> list[tuple[float, str]]:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    if percent:
        digits = max(0, -math.floor(math.log10(step) + 1e-9) - 2) if step else 0
        return [(t, f"{100 * t:z.{digits}f}%") for t in ticks]
    largest = max((abs(t) for t in ticks), default=0.0)
    if largest >= 1e5 or 0 < step < 1e-4:
        return [(t, f"{t:.2g}".replace("e-0", "e-").replace("e+0", "e") if t else "0") for t in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    digits += round(step * 10**digits, 6) != round(step * 10**digits)  # a step of 0.25 needs one digit more than 0.2
    return [(t, f"{t:z,.{digits}f}") for t in ticks]


def _in_words(one: Mapping[str, Any], x: str, percent: bool) -> str:
    (x0, y0), (x1, y1) = one["points"][0], one["points"][-1]
    ys = [y for _, y in one["points"]]
    begin, end, low, high = (_value(y, percent) for y in (y0, y1, min(ys), max(ys)))
    return f"{one['name']}: {begin} at {x} {number(x0)}, {end} at {number(x1)}, between {low} and {high}"


# -- templates ---------------------------------------------------------------------------------------------------------


@cache
def _blocks() -> Any:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_output,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM)
    environment.filters["one_line"] = lambda value: str(value).replace("\n", "⏎")
    environment.filters["shortened"] = lambda value, limit: shortened(str(value), limit)
    return environment.get_template("blocks.jinja").module


@cache
def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def _render(block: str, **values: Any) -> Markup:
    return Markup(getattr(_blocks(), block)(**values))
