"""Write bench/RESULTS.md: what has been measured, on what, and which goals are reached.

    python -m bench.report [--results DIR] [--out FILE] [--check]

Reads every DEVICE/PART.json under bench/results and draws the pictures beside them (pip install matplotlib). With --check
nothing is written: one line for each figure that is more than 5 % worse than the best that was stored for it (on a CPU, whose
cores are shared, only where their quartiles lie apart too) and for each file that cannot be read, and exit status 1 if there is
one.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastppo.errors import UserError
from fastppo.files import write_text

from . import plots
from .command import status_of
from .goals import ENGINES, GOALS, LIMIT, OURS, Goal, Reading, share_of_limit, void
from .record import LOSS, RESULTS, Figure, Record, writing
from .stored import Device, dictionaries, mapping, number, read, workload_of

PAGE = RESULTS.parent / "RESULTS.md"
NOT = "not measured"
UNREAD = "the stored record could not be read"
HEAD = f"""# Benchmarks

What has been measured of fastppo, on what, and how far it is from the goals. Made by `python -m bench.report` from the result
files in `bench/results/`, which hold every raw figure and come from `python -m bench.gpu` (on a CPU: `--device cpu`) and
`python -m bench.loop`.

Figures with a spread are medians, with the smallest and the largest of what was measured. A ratio is of two things measured in
turn in one run. What was not measured says "{NOT}"; a comparison in which an engine is not known to have learned is void.
"""
UNCHECKED = """No result of `python -m bench.gpu --check` is stored here. The tests run small forms of its cases in triton's
interpreter (`tests/bench/test_gpu.py`), which checks the arithmetic, not the compiled kernels.
"""


def escape(value: object) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for markup."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no markup


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are escaped already; numbers stand at the right."""
    rows = list(rows)
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    right = [any(cells) and all(re.match(rf"[-\d]|{NOT}|$", cell) for cell in cells) for cells in columns]
    lines = [head, ["--:" if column else "---" for column in right], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def short(value: float | None, unit: str = "") -> str:
    """Three figures or more, as a reader wants them."""
    if value is None:
        return NOT
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.001 else None
    text = f"{value:,.{digits}f}" if digits is not None else f"{value:.2g}"
    unit = "x" if unit == "ratio" else unit
    return f"{text} {unit}".strip()


def spread(value: float | None, raw: Sequence[float], unit: str = "", of: str = "") -> str:
    if value is None or len(raw) < 2:
        return short(value, unit)
    return f"{short(value, unit)} ({short(min(raw))} to {short(max(raw))}{f', {len(raw)} {of}' if of else ''})"


def figure(record: Record, name: str, unit: str = "") -> str:
    found = record.figures.get(name)
    return spread(found.value, found.raw, unit) if found else NOT


def value_of(record: Record, name: str) -> float | None:
    found = record.figures.get(name)
    return found.value if found else None


def version_of(machine: dict[str, Any]) -> str:
    """The commit, and whether the tree had changes that are not in it."""
    commit = machine.get("commit")
    if not isinstance(commit, str):  # a copy of the tree without its history
        digest = machine.get("sources")
        return "commit unknown" + (f", sources {escape(digest)}" if isinstance(digest, str) else "")
    return escape(commit[:9]) + (" and uncommitted changes" if machine.get("changed") is True else "")


# ---- goals


def goal_row(goal: Goal, device: Device, part: str, reading: Reading) -> list[str]:
    record = device.records[part]
    what = f"{goal.name} ({reading.which})" if reading.which else goal.name
    where = ", ".join([device.folder.name, part, version_of(record.machine), *device.other_hardware(part)])
    if reading.value is None:
        reached = "void" if reading.why.startswith("void") else NOT
        return [escape(what), goal.words, escape(reading.why), escape(where), reached]
    reached = "**yes**" if goal.reached(reading.value) else "**no**"
    return [escape(what), goal.words, spread(reading.value, reading.raw, goal.unit), escape(where), reached]


def goal_table(devices: list[Device], kind: str) -> str:
    """The goals of one kind of device."""
    rows = []
    for goal in (goal for goal in GOALS if goal.kind == kind):
        found = [
            goal_row(goal, device, part, reading)
            for device in devices
            if device.kind == kind
            for part, record in device.records.items()
            if goal.of(part)
            for reading in goal.read(record)
        ]
        found += [
            [escape(goal.name), goal.words, escape(f"{UNREAD}: {why}"), escape(f"{device.folder.name}, {part}"), NOT]
            for device in devices
            if device.kind == kind
            for part, why in device.unreadable.items()
            if goal.of(part)
        ]
        rows += found or [[escape(goal.name), goal.words, NOT, f"any {kind}", NOT]]
    return table(["goal", "wanted", "measured", "device, part, commit", "reached"], rows)


# ---- one device


def measured_on(device: Device) -> str:
    """Device, driver and versions, and of each part when, at which commit, and what of the former is otherwise."""
    text = f"Device: {escape(', '.join(device.hardware) or 'unknown')}.\n\n"
    text += f"Versions: {escape(', '.join(device.versions) or 'unknown')}.\n\n"
    others = {part: device.other_hardware(part) + device.other_versions(part) for part in device.machines}
    rows = []
    for part, machine in device.machines.items():
        stored = vars(device.records[part]) if part in device.records else mapping(device.check)
        seconds, day = number(stored.get("seconds")), escape(str(stored.get("started") or "unknown")[:10])
        state = "whole" if stored.get("complete") is True else "cut off"
        rows.append([escape(part), day, short(seconds), version_of(machine), state, escape(", ".join(others[part]))])
    rows += [[escape(part), "", "", "", escape(UNREAD), ""] for part in device.unreadable]
    head = ["part", "day", "seconds", "commit", "state", "differs in"]
    n_columns = 6 if any(others.values()) else 5
    return text + table(head[:n_columns], [row[:n_columns] for row in rows])


def loops(device: Device) -> str:
    what, speeds, memory, phases, said = [], [], [], [], []
    for part, record in device.of("loop"):
        name = ", ".join(map(escape, workload_of(part)))
        workload = mapping(record.data.get("workload"))
        prompts, samples = (number(workload.get(key)) for key in ("prompts", "samples"))
        if workload.get("what") and prompts is not None and samples is not None:
            size = f"{prompts:.0f} prompts an iteration, samples of each: {samples:.0f}"
            what.append(f"- {name}: {escape(workload['what'])}; {size}")
        found = record.figures.get("ratio")
        if found and (why := void(record)):
            ratio = larger = why
        else:
            ratio = spread(found.value, found.raw, "x", "pairs") if found else NOT
            larger = figure(record, "memory ratio", "x")
        speeds.append([name, figure(record, "fastppo samples/s"), figure(record, "trl samples/s"), ratio])
        tokens = mapping(record.data.get("tokens"))
        counts = [short(number(tokens.get(kind))) for kind in ("padded", "tree", "responses")]
        memory.append([name, figure(record, "fastppo MiB"), figure(record, "trl MiB"), larger, *counts])
        stored = mapping(record.data.get("phases"))
        if (other := number(record.data.get("trl_other"))) is not None:  # what none of TRL's functions that are timed takes
            stored = stored | {"trl": mapping(stored.get("trl")) | {"all else": other}}
        phases += phase_rows(name, stored)
        share = number(record.data.get("trl_gc_share"))
        if share is not None:
            said.append(f"- {name}: {short(100 * share)} % of TRL's time is garbage collection, which it asks for itself.")
        if found is None or value_of(record, "trl samples/s") is None:
            said += [f"- {name}: {escape(note)}" for note in record.notes or ["no note says why TRL was not measured"]]
    if not speeds:
        return ""
    text = "".join(f"{line}\n" for line in [*what, ""] if what)
    text += table(["workload, model", "fastppo samples/s", "TRL samples/s", "fastppo / TRL (spread over pairs)"], speeds)
    head = ["workload, model", "fastppo peak MiB", "TRL peak MiB", "fastppo / TRL"]
    text += "\n" + table([*head, "padded tokens", "tree tokens", "response tokens"], memory)
    if phases:
        text += "\nSeconds by phase, and their share of the engine's time:\n\n"
        text += table(["workload, model", "fastppo phase", "seconds", "share", "TRL phase", "seconds", "share"], phases)
    return text + ("\n" + "\n".join(said) + "\n" if said else "")


def phase_rows(name: str, phases: dict[str, Any]) -> list[list[str]]:
    sides = []
    for engine in ENGINES:
        taken = {phase: number(seconds) for phase, seconds in mapping(phases.get(engine)).items()}
        total = sum(seconds or 0 for seconds in taken.values())
        sides.append(
            [(escape(k), short(v), f"{100 * v / total:.0f} %" if v is not None and total else NOT) for k, v in taken.items()]
        )
    pairs = zip_longest(*sides, fillvalue=("", "", ""))
    return [[name if i == 0 else "", *ours, *theirs] for i, (ours, theirs) in enumerate(pairs)]


def ablations(part: str, record: Record) -> tuple[str, list[tuple[str, float, list[float]]]]:
    """The table of one workload, and the ratios to draw."""
    rows = {name: row for row in dictionaries(record.data.get("rows")) if (name := str(row.get("idea", ""))) != "full"}
    for name in record.figures:
        if match := re.fullmatch(r"without (.+): (?:ratio|MiB)", name):
            rows.setdefault(match[1], {})
    full = record.figures.get("full samples/s")
    memory = value_of(record, "full: MiB")
    lines = [["nothing: the full engine", short(full.value) if full else NOT, "", short(memory) if memory else "", ""]]
    drawn = []
    for idea, row in rows.items():
        ratio = record.figures.get(f"without {idea}: ratio")
        if ratio is None and (value := number(row.get("ratio"))) is not None:
            ratio = Figure(value, "ratio")
        memory = value_of(record, f"without {idea}: MiB")
        memory = number(row.get("peak_MiB")) if memory is None else memory
        speed = short(number(row.get("samples_per_s")))
        note = escape(row.get("note") or "")
        lines.append([escape(idea), speed, spread(ratio.value, ratio.raw) if ratio else NOT, short(memory), note])
        if ratio:
            drawn.append((idea, ratio.value, ratio.raw))
    name = ", ".join(map(escape, workload_of(part)))
    head = [f"switched off ({name})", "samples/s", "full / without", "peak MiB", "note"]
    return table(head, lines), drawn


def kernel_groups(record: Record) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Rows that are measured of the same thing, by form, ours first."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in dictionaries(record.data.get("rows")):
        key = tuple(str(row.get(name, "")) for name in ("op", "size", "direction", "dtype"))
        groups.setdefault(key, {})[str(row.get("form", ""))] = row
    return {key: {OURS: forms[OURS], **forms} if OURS in forms else forms for key, forms in groups.items()}


def kernels(record: Record) -> str:
    groups = kernel_groups(record)
    if not groups:
        return ""
    rows, every = [], []
    for key, forms in groups.items():
        what = [escape(name) for name in key]
        ours = number(forms.get(OURS, {}).get("median_ms"))
        others = []
        for form, row in forms.items():
            taken, note = number(row.get("median_ms")), escape(row.get("note") or "")
            low, high, ratio = (number(row.get(name)) for name in ("low_ms", "high_ms", "ratio"))
            if ratio is None and taken is not None and ours:
                ratio = taken / ours
            if form not in (OURS, LIMIT):
                others.append(f"{escape(form)} {short(ratio) if ratio is not None or not note else f'({note})'}")
            span = f"{short(low)} to {short(high)}" if low is not None and high is not None else NOT
            cells = [short(x) for x in (ratio, share_of_limit(row), number(row.get("peak_MiB")))]
            every.append([*what, escape(form), short(taken), span, *cells, note])
        mine = forms.get(OURS, {})
        note = f" ({escape(mine['note'])})" if mine.get("note") else ""
        rows.append([*what, short(ours) + note, short(share_of_limit(mine)), ", ".join(others) or NOT])
    head = ["op", "size", "direction", "dtype"]
    text = table([*head, "fastppo ms", "percent of limit", "others' time, times fastppo's"], rows)
    full = table([*head, "form", "median ms", "quartiles", "times fastppo's", "percent of limit", "peak MiB", "note"], every)
    return f"{text}\n<details><summary>Every form, with spread and memory</summary>\n\n{full}\n</details>\n"


def updates(device: Device) -> str:
    rows = []
    for model, record in device.of("update"):
        # Of other sizes of micro-batch than the one that the goal is about, the names begin with the size.
        others = [match[1] for name in record.figures if (match := re.fullmatch(r"(\d+ tokens: )MFU", name))]
        for prefix in ["", *others]:
            names = (f"{prefix}{name}" for name in ("MFU", "tokens/s", "ms per micro-batch", "MiB"))
            rows.append([escape(model), prefix.removesuffix(": ") or "default", *(figure(record, name) for name in names)])
    head = ["model", "micro-batch", "percent of the measured GEMM rate", "tokens/s", "ms per micro-batch", "peak MiB"]
    return table(head, rows) if rows else ""


def decodes(device: Device) -> str:
    rows = []
    for model, record in device.of("decode"):
        sizes = {int(match[1]) for name in record.figures if (match := re.match(r"batch (\d+): ", name))}
        for size in sorted(sizes):
            names = ("tokens/s", "overhead", "share of bandwidth floor")
            rows.append([escape(model), str(size), *(figure(record, f"batch {size}: {name}") for name in names)])
    head = ["model", "batch", "tokens/s", "percent over merged weights", "percent of the bandwidth floor"]
    return table(head, rows) if rows else ""


def ceilings(device: Device) -> str:
    record = device.records.get("ceilings")
    if record is None or not record.figures:
        return ""
    rows = ([escape(name), spread(found.value, found.raw, escape(found.unit))] for name, found in record.figures.items())
    return table(["ceiling", "measured"], rows)


def correctness(device: Device) -> str:
    if device.check is None:
        return "" if "check" in device.unreadable else UNCHECKED
    cases = {name: mapping(found) for name, found in device.check["cases"].items()}
    bad = {name for name, checks in cases.items() if not all(mapping(check).get("ok") is True for check in checks.values())}
    bad |= {name for name, checks in cases.items() if not checks}
    skipped = {name for name, checks in cases.items() if "memory" in checks} - bad
    text = f"{len(cases)} cases, {len(bad)} failed, {len(skipped)} left out for want of memory"
    text += "" if device.check.get("complete") is True else "; more are left to run"
    lines = ["Small forms of the cases, in triton's interpreter."] if device.kind == "CPU" else []
    lines.append(text + ".")
    for tool, outcomes in device.check["sanitizer"].items():
        found = mapping(outcomes)
        wrong = {name for name, outcome in found.items() if mapping(outcome).get("ok") is not True}
        bad |= wrong
        lines.append(f"{escape(tool)}: {f'{len(found)} cases, {len(wrong)} with errors' if found else NOT}.")
    listed = "".join(f"- **failed**: {escape(name)}\n" for name in sorted(bad))
    return " ".join(lines) + "\n" + (f"\n{listed}" if listed else "")


# ---- pictures


class Pictures:
    """Draws beside the results and links from the page. Where matplotlib is missing, a line takes the place of each."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.missing = False

    def __call__(self, path: Path, text: str, draw: Callable[..., None], *arguments: Any) -> str:
        try:
            with writing(path):
                draw(path, *arguments)
        except ImportError:
            self.missing = True
            return f"({escape(text)}: no picture, matplotlib is not installed)\n"
        link = quote(Path(os.path.relpath(path, self.page.parent)).as_posix())
        return f"![{escape(text)}]({link})\n"


def curve_picture(device: Device, part: str, record: Record, pictures: Pictures) -> str:
    name = ", ".join(workload_of(part))
    stored = mapping(record.data.get("curves"))
    rewards, seconds = {}, {}
    for engine, label in ENGINES.items():
        values = stored.get(engine)
        if isinstance(values, list) and any(number(value) is not None for value in values):
            rewards[label] = [value if (value := number(item)) is not None else float("nan") for item in values]
        rate, samples = value_of(record, f"{engine} samples/s"), number(record.data.get("samples_per_iteration"))
        if rate and samples:
            seconds[label] = samples / rate
    if not rewards:
        return f"{escape(name)}: {NOT}.\n"
    path = device.folder / f"curves-{part}.svg"
    return pictures(path, f"Mean reward, {name}", plots.curves, f"{name}: mean reward", rewards, seconds)


def ratio_picture(device: Device, pictures: Pictures) -> str:
    rows = []
    for part, record in device.of("loop"):
        if "ratio" in record.figures and not void(record):
            found = record.figures["ratio"]
            goals = [g.limit for g in GOALS if g.kind == device.kind and g.of(f"loop-{part}") and g.words.endswith("x TRL")]
            rows.append((", ".join(workload_of(part)), found.value, found.raw, goals[0] if goals else None))
    if not rows:
        return ""
    title = "Whole loop: samples/s against TRL"
    return "\n" + pictures(device.folder / "ratios.svg", title, plots.ratios, title, rows)


def kernel_picture(device: Device, record: Record, pictures: Pictures) -> str:
    rows = []
    for key, forms in kernel_groups(record).items():
        found = {form: share_of_limit(row) for form, row in forms.items() if form != LIMIT}
        shares = {form: share for form, share in found.items() if share is not None}
        if OURS in shares:
            rows.append((", ".join(name for name in key if name), shares))
    if not rows:
        return ""
    title = "Kernels: percent of the limit"
    return "\n" + pictures(device.folder / "kernels.svg", title, plots.kernels, title, rows, OURS)


def section(device: Device, pictures: Pictures) -> str:
    drawn = [curve_picture(device, part, record, pictures) for part, record in device.of("loop")]
    off = []
    for part, record in device.of("ablations"):
        text, rows = ablations(part, record)
        title = f"Each idea switched off: {', '.join(workload_of(part))}"
        path = device.folder / f"ablations-{part}.svg"
        off.append(text + ("\n" + pictures(path, title, plots.ablations, title, rows) if rows else ""))
    ops = device.records.get("ops")
    parts = [f"## {escape(device.folder.name)}", measured_on(device)]
    for title, kind, text in (
        ("Whole loop against TRL", "loop", loops(device) + ratio_picture(device, pictures)),
        ("Learning curves", "loop", "\n".join(drawn)),
        ("Each idea switched off in turn", "ablations", "\n".join(off)),
        ("Kernels", "ops", kernels(ops) + kernel_picture(device, ops, pictures) if ops else ""),
        ("Update", "update", updates(device)),
        ("Decoding", "decode", decodes(device)),
        ("Ceilings", "ceilings", ceilings(device)),
        ("Correctness of the kernels", "check", correctness(device)),
    ):
        unread = [f"- {escape(f'{UNREAD}: {why}')}" for part, why in device.unreadable.items() if part.split("-")[0] == kind]
        if text or unread or device.kind == "GPU" or kind not in ("update", "decode"):  # of no interest on a CPU
            found = [part.rstrip("\n") for part in (text, "\n".join(unread)) if part]
            parts += [f"### {title}", "\n\n".join(found) or f"{title}: {NOT}."]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


# ---- what all devices have in common


def losses(devices: list[Device]) -> list[tuple[Device, Record, str, float]]:
    """Figures that are more than 5 % worse than stored: device, record, name, by what share."""
    return [
        (device, record, name, loss)
        for device in devices
        for record in device.records.values()
        for name, loss in record.losses().items()
    ]


def loss_table(found: list[tuple[Device, Record, str, float]]) -> str:
    if not found:
        rule = "(on a CPU, where cores are shared, only where the quartiles of the two lie apart)"
        return f"None: no figure is more than {100 * LOSS:.0f} % worse than the best that was stored for it {rule}.\n"
    rows = []
    for device, record, name, loss in found:
        old, now = record.reference[name], record.figures.get(name)
        value, worse = (
            ("", "no longer measured") if now is None else (short(now.value, escape(now.unit)), f"{100 * loss:.0f} % worse")
        )
        values = [value, short(old["value"]), escape(str(old.get("commit") or "unknown")[:9])]
        rows.append([escape(device.folder.name), escape(record.part), escape(name), *values, f"**{worse}**"])
    return table(["device", "part", "figure", "now", "best stored", "at commit", "loss"], rows)


def page(devices: list[Device], problems: list[str], results: Path, pictures: Pictures) -> str:
    found = losses(devices)
    parts = [HEAD, "## Goals"]
    for kind in ("CPU", "GPU"):
        parts += [f"### On a {kind}", goal_table(devices, kind)]
    if found:
        figures = "1 figure is" if len(found) == 1 else f"{len(found)} figures are"
        parts.append(f"> **{figures} worse than what was stored before**: see [Losses](#losses).")
    parts += [section(device, pictures) for device in devices]
    parts += ["## Losses", loss_table(found), "## Notes"]
    notes = [
        f"- {escape(device.folder.name)}, {escape(part)}: {escape(note)}"
        for device in devices
        for part, record in device.records.items()
        for note in record.notes
    ]
    parts += ["\n".join(notes) or "None.", "## Not measured yet"]
    left = [
        f"- {escape(device.folder.name)}: "
        + (", ".join(f"{part} ({UNREAD})" if part in device.unreadable else part for part in device.missing()) or "nothing")
        for device in devices
    ]
    left += [f"- {kind}: {NOT} at all" for kind in ("CPU", "GPU") if kind not in {device.kind for device in devices}]
    pending = results / "PENDING.md"
    if pending.exists():
        link = quote(Path(os.path.relpath(pending, pictures.page.parent)).as_posix())
        left.append(f"- what has never run on a GPU: [PENDING.md]({link})")
    parts.append("\n".join(left))
    if problems:
        parts += ["## Files that could not be read", "\n".join(f"- {escape(problem)}" for problem in problems)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def check(devices: list[Device], problems: list[str]) -> int:
    found = losses(devices)
    for device, record, name, loss in found:
        old, new = record.reference[name], record.figures.get(name)
        where, at = (
            f"{device.folder.name}, {record.part}, {name}",
            f"{short(old['value'])} (commit {str(old.get('commit') or 'unknown')[:9]})",
        )
        print(
            f"{where}: no longer measured; it was {at}"
            if new is None
            else f"{where}: {short(new.value)} {new.unit} is {100 * loss:.0f} % worse than {at}"
        )
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if found or problems else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="default: bench/RESULTS.md")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a figure is worse than stored, or a file damaged"
    )
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        print(f"{args.results}: no such folder of results", file=sys.stderr)
        return 2
    devices, problems = read(args.results)
    if args.check:
        return check(devices, problems)
    pictures = Pictures(args.out)
    try:
        text = page(devices, problems, args.results, pictures)
        with writing(args.out):
            write_text(args.out, text)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    if pictures.missing:
        print("matplotlib is not installed: no pictures; pip install matplotlib", file=sys.stderr)
    print(f"wrote {args.out}; devices: {len(devices)}, figures worse than stored: {len(losses(devices))}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
