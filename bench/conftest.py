"""For `pytest bench`: what was measured is kept for the tables at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

ADVICE = "pytest bench needs pytest-benchmark: pip install 'fastppo[bench]'"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(ADVICE)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable:
    """entry -> its rows; all forms of an entry are measured side by side, when the first of them is asked for."""
    import torch

    from bench.limits import main_dtype
    from bench.ops import Entry
    from bench.ops.measure import Row, measure_entry

    kept: dict[tuple[str, str, str], list[Row]] = request.config.stash.setdefault(_ROWS, {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def rows(entry: Entry) -> list[Row]:
        key = entry.op.name, entry.size, entry.direction
        if key not in kept:
            kept[key] = measure_entry(entry, device, main_dtype(device), seconds=2.0 if device.type == "cuda" else 0.5)
        return kept[key]

    return rows


_ROWS = pytest.StashKey[dict]()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    kept = config.stash.get(_ROWS, None)
    if not kept:
        return
    import torch

    from bench.ops import ops
    from bench.ops.measure import notes
    from bench.ops.summary import tables

    terminalreporter.section("fastppo and its peers")
    for line in tables(row for rows in kept.values() for row in rows):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    names = {name for name, _, _ in kept}
    for note in notes([op for op in ops() if op.name in names], torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        terminalreporter.write_line(note)
