"""The building blocks of reports: geometry of charts, escaping in each block, the page and its policy."""

import base64
import hashlib
import html
import math
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from fastppo.report import blocks
from fastppo.report.blocks import Answer, Axis, Card, Section, Series

TEXT = "<script>\"'&\u202e\x00{{ 1 }}</script>"
SHOWN = "&lt;script&gt;&#34;&#39;&amp;\\u202e\\x00{{ 1 }}&lt;/script&gt;"
FLOATS = st.floats(allow_nan=True, allow_infinity=True)


def numbers(pattern: str, text: str) -> list[float]:
    return [float(x) for found in re.findall(pattern, text) for x in re.findall(r"-?[\d.]+", found)]


def paths(chart: str, kind: str) -> list[list[float]]:
    return [[float(x) for x in re.findall(r"-?[\d.]+", d)] for d in re.findall(rf'class="{kind}" d="([^"]*)"', chart)]


# -- charts ------------------------------------------------------------------------------------------------------------


def test_line_chart_places_points_on_its_axes():
    chart = blocks.line_chart("loss", [Series("a", [(0, 0.0), (5, 1.0), (10, 2.0)])], x="step")
    [line] = paths(chart, "line")
    xs, ys = line[::2], line[1::2]
    assert xs[0] == blocks.LEFT and xs[2] == blocks.WIDTH - blocks.RIGHT and xs[1] == pytest.approx(sum(xs) / 3, abs=0.1)
    assert ys[0] > ys[1] > ys[2] and ys[1] == pytest.approx(sum(ys) / 3, abs=0.1)
    assert blocks.TOP <= ys[2] and ys[0] <= blocks.HEIGHT - blocks.BOTTOM
    assert 'aria-label="loss. a: 0 at step 0, 2 at 10, between 0 and 2"' in chart
    assert "<title>a: 1 (step 5)</title>" in chart and '<span class="last">2</span>' in chart
    assert re.findall(r'class="tick middle"[^>]*>([^<]*)<', chart) == ["0", "2", "4", "6", "8", "10"]


def test_band_goes_round_the_line():
    series = Series("mean", [(1, 0.5), (2, 0.6)], band=[(0.4, 0.7), (0.5, 0.9)])
    chart = blocks.line_chart("MCC", [series], x="step")
    [band], [line] = paths(chart, "band"), paths(chart, "line")
    assert band[:8:2] == [line[0], line[2], line[2], line[0]]  # there along the upper edge, back along the lower one
    upper, lower = band[1:4:2], band[7:4:-2]
    assert all(high < y < low for high, y, low in zip(upper, line[1::2], lower, strict=True))  # y grows downwards


def test_points_without_a_number_are_left_out_with_their_band():
    series = Series("mean", [(1, 0.5), (2, math.nan), (3, 0.6), (4, 0.7)], band=[(0, 1), (0, 1), (0, math.inf), (0, 1)])
    chart = blocks.line_chart("MCC", [series], x="step")
    assert 'data-points="2"' in chart and len(paths(chart, "band")[0]) == 8
    assert "no values" in blocks.line_chart("MCC", [Series("none", [(1, math.nan)])], x="step")
    assert "no values" in blocks.line_chart("MCC", [], x="step")


def test_a_curve_of_one_point_is_a_dot_and_a_long_one_has_no_tooltips():
    assert '<circle class="dot"' in blocks.line_chart("MCC", [Series("a", [(3, 0.5)])], x="step")
    long = blocks.line_chart("MCC", [Series("a", [(i, i % 7) for i in range(5000)])], x="step")
    assert 'data-points="5000"' in long and len(paths(long, "line")[0]) == 10_000 and "<title>" not in long


def test_range_line_and_colors():
    series = [Series("a", [(4, 1)], color=6), Series("b", [(5, 2)]), Series("c", [(6, 2)], color=9)]
    chart = blocks.line_chart("x", series, x="step", at=5, x_range=(1, 9), percent=True, zero=True)
    assert [found for found in re.findall(r'<g class="c(\d)"', chart)] == ["6", "1", "1"]
    assert 'class="at"' in chart and ">0%</text>" in chart and ">200%</text>" in chart
    assert 'class="at"' not in blocks.line_chart("x", series, x="step", at=12)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(FLOATS, FLOATS), max_size=8), st.booleans(), st.booleans())
def test_whatever_the_numbers_are_all_of_a_chart_is_inside(points, percent, zero):
    chart = blocks.line_chart("t", [Series("s", points, marked=True)], x="x", percent=percent, zero=zero)
    for line in paths(chart, "line"):
        assert all(blocks.LEFT <= x <= blocks.WIDTH for x in line[::2])
        assert all(0 <= y <= blocks.HEIGHT for y in line[1::2])
    assert "nan" not in chart and "inf" not in chart


@settings(deadline=None, max_examples=500)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 6), st.booleans())
def test_ticks_are_round_few_and_inside(low, size, about, whole):
    axis = Axis(low, low + size, 0, 100)
    ticks = axis.ticks(about, whole=whole)
    assert len(ticks) <= 2 * about + 1 and (len(ticks) >= 2 or whole)
    assert all(-1e-6 <= axis.place(t) <= 100 + 1e-6 for t in ticks)
    if whole:
        assert all(t == int(t) for t in ticks)


def test_interval_plot():
    plot = blocks.interval_plot("MCC", [("a", 0.5, 0.4, 0.6), ("b", 0.9, 0.8, 1.0), ("none", math.nan, 0, 1)])
    starts, ends, dots = (
        numbers(pattern, plot) for pattern in (r'whisker" d="M([\d.]+)', r'whisker" d="M[^H]*H([\d.]+)', r'dot" cx="([\d.]+)')
    )
    assert len(dots) == 2 and all(low < dot < high for low, dot, high in zip(starts, dots, ends, strict=True))
    assert ends[0] < starts[1] and "none" not in plot and "a: 0.500, from 0.400 to 0.600" in plot
    assert blocks.interval_plot("MCC", []) == ""


def test_heat_map():
    table = blocks.heat_map("m", ["no", "yes"], ["no", "yes", "malformed"], [[3, 1, 0], [0, 0, 0]])
    assert re.findall(r'<td class="(h\d+(?: right)?)"><b>(\d+)</b> <small>(\d+%)', table) == [
        ("h8 right", "3", "75%"), ("h3", "1", "25%"), ("h0", "0", "0%"),
        ("h0", "0", "0%"), ("h0 right", "0", "0%"), ("h0", "0", "0%"),
    ]  # fmt: skip


def test_stacked_bar_has_shares_that_add_up():
    bar = blocks.stacked_bar("time", [("a", 1, "1 s"), ("b", 2, "2 s"), ("c", 1, "1 s")], rest="c")
    found = re.findall(r'x="([\d.]+)%" width="([\d.]+)%"', bar)
    assert found == [("0.000", "25.000"), ("25.000", "50.000"), ("75.000", "25.000")]
    assert "<b>2 s</b> <small>50%</small>" in bar and 'class="part crest"' in bar
    assert blocks.stacked_bar("time", []) == blocks.stacked_bar("time", [("a", 0, "")]) == ""


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [
        lambda text: blocks.line_chart(text, [Series(text, [(1, 2)]), Series(text, [(1, 2)])], x=text, explained=text),
        lambda text: blocks.interval_plot(text, [("a", 0.5, 0.4, 0.6)], explained=text),
        lambda text: blocks.heat_map(text, [text], [text, "malformed"], [[1, 2]], explained=text),
        lambda text: blocks.stacked_bar(text, [(text, 1.0, text)], explained=text),
        lambda text: blocks.table([text], [[text]], caption=text),
        lambda text: blocks.tiles([(text, text, text)]),
        lambda text: blocks.facts([(text, text, text)]),
        lambda text: blocks.answer_cards([Card(text, {text: text}, text, [Answer(text, text, text, True)])]),
        lambda text: blocks.folded(text),
        lambda text: blocks.paragraph(text),
        lambda text: blocks.page(text, text, [Section(text, [Markup("<hr>")], text)], badge=text, notes=[text]),
    ],
    ids=["chart", "intervals", "heat map", "bar", "table", "tiles", "facts", "cards", "folded", "paragraph", "page"],
)
def test_every_text_of_every_block_is_escaped(block):
    plain, hostile = str(block("x-y-z")), str(block(TEXT))
    assert plain.count("x-y-z") == hostile.count(SHOWN) >= 1
    assert hostile.replace(SHOWN, "x-y-z") == plain


def test_what_is_said_of_a_row_is_escaped_too():
    plot = blocks.interval_plot("MCC", [("</svg>" + "w" * 99, 0.5, 0.4, 0.6)])
    assert "</svg>w" not in plot and "&lt;/svg&gt;wwwwwww…" in plot


def test_only_markup_stays_markup():
    cells = blocks.table(["", "b"], [["<i>", blocks.with_interval(0.5, 0.25, 0.75)]])
    assert "&lt;i&gt;" in cells and "<b>0.500</b> <small>[0.250, 0.750]</small>" in cells
    assert blocks.with_interval(0.5, 0.25, 0.75, percent=True).striptags() == "50.0% [25.0%, 75.0%]"
    assert blocks.table(["a"], [[3], [None], [0.5]]).count("<td") == 3


@given(st.text(st.characters(codec=None) | st.sampled_from(string.printable), max_size=40))
def test_visible_text_has_nothing_hidden_and_loses_nothing(text):
    shown = blocks.visible(text)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert shown == text or not text.replace("\n", "").isprintable()
    escaped = str(blocks.paragraph(text)).removeprefix('<p class="text">').removesuffix("</p>")
    assert html.unescape(escaped) == shown and "<" not in escaped


def test_shortened_text_says_how_much_is_missing():
    assert blocks.shortened("a" * 800) == "a" * 800
    assert blocks.shortened("a" * 2000) == "a" * 800 + "… (1,200 more characters)" and blocks.shortened("abcdef", 4) == "abc…"


def test_numbers():
    shown = {0: "0", 7: "7", 1234567: "1,234,567", 1234.5: "1,234", 0.12345: "0.123", 1e-5: "1e-05", 2e12: "2e+12"}
    assert {value: blocks.number(value) for value in shown} == shown
    assert blocks.is_number(0) and blocks.is_number(-1.5)
    assert not any(map(blocks.is_number, (True, None, "1", math.nan, math.inf, 1e300, 10**400, [])))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_policy_lets_the_style_sheet_in_and_nothing_else():
    page = blocks.page("t", "s", [Section("one", [blocks.paragraph("text")])])
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert len(style) == 1 and f'content="{policy}"' in page
    assert "style=" not in page and "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_page_has_a_place_for_each_section_that_has_something():
    full = [Section(name, [blocks.paragraph("text")]) for name in ("one", "two")]
    nothing = Section("nothing", [Markup(), blocks.grid()])
    page = blocks.page("title", "below", [full[0], nothing, full[1]], badge="new", notes=["look"])
    assert re.findall(r'<a href="#(part-\d)">(\w+)</a>', page) == [("part-1", "one"), ("part-2", "two")]
    assert re.findall(r'<section id="(part-\d)">', page) == ["part-1", "part-2"] and ">nothing<" not in page
    assert "<title>title</title>" in page and "<li>look</li>" in page and page.startswith("<!doctype html>")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
