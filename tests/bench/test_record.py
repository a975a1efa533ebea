"""Result files: what is kept, what of an earlier one counts, and what is worse than it was."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import record as module
from bench.record import LOSS, Damaged, Figure, Record, folder_of, machine, sources
from fastppo.errors import UserError

CPU = {"device": "Made-up CPU, 2 threads", "commit": "old", "changed": False, "versions": {}}
GPU = CPU | {"device": "Made-up GPU", "capability": "9.0"}
VALUES = st.floats(min_value=1e-3, max_value=1e6)


def record(value=10.0, unit="ratio", better="higher", *, at="new", on=CPU, **changed):
    return Record("part", on | {"commit": at}, figures={"it": Figure(value, unit, better)}, **changed)


def after(now, *earlier):
    """`now` as it is when the others were stored, one after the other, before it."""
    stored = None
    for each in (*earlier, now):
        each.follow(stored)
        stored = each
    return now


# ---- figures and files


def test_a_figure_is_the_median_of_what_was_measured():
    figure = Figure.of([3.0, 1.0, 100.0], "ms", "lower")
    assert (figure.value, figure.unit, figure.better, figure.raw) == (3.0, "ms", "lower", [3.0, 1.0, 100.0])


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "device" / "part.json"
    path.parent.mkdir()
    saved = Record(
        "part", GPU, {"model": "7b", "sizes": [1, 2]}, {"it": Figure.of([1.5, 2.5], "ms", "lower")}, {"curve": [0.5, None]},
        ["out of memory: TRL | 7b\nsecond line"], {"it": {"value": 3.0, "commit": "x"}}, "2026-01-01T00:00:00+00:00", 1.5, True,
    )  # fmt: skip
    saved.save(path)
    assert Record.load(path) == saved
    assert [file.name for file in path.parent.iterdir()] == ["part.json"]  # nothing temporary is left


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"text"', "{}", '{"figures": {}}', '{"part": "a", "machine": {}}',
     '{"part": "a", "machine": {}, "figures": []}', '{"part": "a", "machine": {}, "figures": {"x": 1}}',
     '{"part": "a", "machine": {}, "figures": {"x": {"value": 1}}}', '{"part": "a", "machine": {}, "figures": {}, "new": 1}'],
)  # fmt: skip
def test_what_is_no_record_is_none(tmp_path, text):
    path = tmp_path / "part.json"
    path.write_text(text)
    assert Record.load(path) is None


def test_neither_is_a_file_that_is_not_there_nor_bytes_that_are_no_text(tmp_path):
    assert Record.load(tmp_path / "none.json") is None
    assert Record.load(tmp_path) is None
    (tmp_path / "part.json").write_bytes(b"\xff\xfe\x00")
    assert Record.load(tmp_path / "part.json") is None


@pytest.mark.parametrize(
    ("value", "raw", "sound"),
    [
        (2.0, [1.0, 2.0, 9.0], True), (2.5, [2.0, 3.0], True), (0.1 + 0.2, [0.3], True), (7.0, [], True), (-3.0, [-3], True),
        (2.1, [1.0, 2.0, 9.0], False), (20.0, [2.0], False), (0.0, [1e-3], False), (-2.0, [2.0], False), (2.00001, [2], False),
    ],
)  # fmt: skip
def test_a_figure_that_is_not_the_median_of_its_samples_damages_the_file(tmp_path, value, raw, sound):
    """A hand with an editor changes one and leaves the other."""
    path = tmp_path / "part.json"
    Record("part", CPU, figures={"right": Figure.of([1.0], "ms"), "it": Figure(value, "ratio", "higher", raw)}).save(path)
    if sound:
        assert Record.read(path).figures["it"].value == value
        return
    with pytest.raises(Damaged, match="^the figure 'it' is .*, but the median of its samples is "):
        Record.read(path)
    now = record(1.0)
    now.follow(Record.load(path))
    assert Record.load(path) is None and now.reference == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"part": "a", "fig', "is no JSON: "), ("[]", "cannot be read as a result file"), (None, "cannot be read: ")],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, why):
    path = tmp_path / "part.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Damaged, match=f"^{why}"):
        Record.read(path)


def test_a_number_that_no_float_can_hold_damages_nothing_else(tmp_path):
    path = tmp_path / "part.json"
    path.write_text(
        json.dumps({"part": "a", "machine": {}, "figures": {"x": {"value": 10**400, "unit": "ms", "raw": [10**400]}}})
    )
    now = record(1.0)
    now.follow(Record.load(path))
    assert now.reference == {}


def test_a_file_that_cannot_be_written_is_one_line_of_its_own(tmp_path):
    path = tmp_path / "part.json"
    path.mkdir()
    with pytest.raises(UserError) as raised:
        record().save(path)
    wanted = "expected a file in a folder that exists and can be written"
    assert str(raised.value) == f"cannot write {path}: Is a directory; {wanted}"


# ---- what an earlier record is held against


@pytest.mark.parametrize(
    ("better", "old", "new", "lost"),
    [
        ("higher", 10.0, 9.4, 0.06), ("higher", 10.0, 9.6, None), ("higher", 10.0, 20.0, None),
        ("lower", 10.0, 10.6, 0.06), ("lower", 10.0, 10.4, None), ("lower", 10.0, 5.0, None),
        (None, 10.0, 1.0, None), (None, 10.0, 100.0, None),
    ],
)  # fmt: skip
def test_a_loss_is_more_than_5_percent_the_worse_way(better, old, new, lost):
    now = after(record(new, better=better), record(old, better=better))
    assert now.losses() == ({} if lost is None else {"it": pytest.approx(lost)})


@given(VALUES, VALUES, st.sampled_from(["higher", "lower"]))
def test_a_loss_is_the_share_of_the_old_value(old, new, better):
    lost = after(record(new, better=better), record(old, better=better)).losses()
    share = (old - new) / old if better == "higher" else (new - old) / old
    assert lost == ({"it": pytest.approx(share)} if share > LOSS else {})


@given(st.lists(VALUES, min_size=1, max_size=6), st.sampled_from(["higher", "lower"]))
def test_the_reference_is_the_best_that_was_ever_stored(values, better):
    """Small losses, each under the limit, add up to one that is seen."""
    earlier = [record(value, better=better, at=f"commit {i}") for i, value in enumerate(values)]
    now = after(record(1.0, better=better), *earlier)
    best = (max if better == "higher" else min)(values)
    found = now.reference["it"]
    assert (found["value"], found["commit"]) == (best, f"commit {values.index(best)}")


def test_a_slow_slide_is_seen():
    now = after(*(record(10 * 0.97**i) for i in reversed(range(4))))
    assert now.losses() == {"it": pytest.approx(1 - 0.97**3)}


def test_the_reference_survives_the_file(tmp_path):
    first, path = record(12.0), tmp_path / "part.json"
    first.save(path)
    second = record(11.0)
    second.follow(Record.load(path))
    second.save(path)
    third = record(11.8)
    third.follow(Record.load(path))
    assert third.reference["it"]["value"] == 12.0 and third.losses() == {} and second.losses().keys() == {"it"}


def measured(*raw, on=CPU):
    return Record("part", on, figures={"it": Figure.of(list(raw), "ratio", "higher")})


def test_on_a_cpu_a_difference_within_the_spread_is_none():
    """Its cores are shared; a GPU's are not, and there 5 % are 5 %."""
    wide, lower, far = (8.0, 10.0, 12.0), (7.0, 9.0, 11.0), (7.0, 7.5, 8.0)
    assert after(measured(*lower), measured(*wide)).losses() == {}
    assert after(measured(*far), measured(*wide)).losses() == {"it": 0.25}
    assert after(measured(*lower, on=GPU), measured(*wide, on=GPU)).losses() == {"it": pytest.approx(0.1)}
    assert after(measured(9.59, 9.6, 9.61), measured(9.99, 10.0, 10.01)).losses() == {}  # apart, but under 5 %


def test_on_a_cpu_luck_does_not_raise_the_reference():
    usual, lucky, better = (8.0, 10.0, 12.0), (8.5, 10.5, 12.5), (14.0, 15.0, 16.0)
    assert after(measured(1.0), measured(*usual), measured(*lucky)).reference["it"]["value"] == 10.0
    assert after(measured(1.0), measured(*usual), measured(*better)).reference["it"]["value"] == 15.0
    on_gpu = [measured(*raw, on=GPU) for raw in (usual, lucky)]
    assert after(measured(1.0, on=GPU), *on_gpu).reference["it"]["value"] == 10.5


def test_a_reference_from_before_there_were_quartiles_counts(tmp_path):
    old = record(10.0)
    old.reference = {"it": {"value": 12.0, "unit": "ratio", "commit": "x"}}
    assert after(measured(8.9, 9.0, 9.1), old).losses() == {"it": 0.25}


@pytest.mark.parametrize(
    "change",
    [
        {"figures": {"it": {"value": "ten", "unit": "ratio", "better": "higher"}}},
        {"figures": {"it": {"value": True, "unit": "ratio", "better": "higher"}}},
        {"figures": {"it": {"value": 10.0, "unit": "ratio", "better": "higher", "raw": [1.0, "x"]}}},
        {"figures": {"it": {"value": 10.0, "unit": "ratio", "better": "higher", "raw": None}}},
        {"reference": {"it": {"value": "ten", "unit": "ratio"}}}, {"reference": {"it": 10.0}}, {"reference": []},
        {"reference": {"it": {"unit": "ratio"}}}, {"machine": []}, {"settings": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_no_reference(tmp_path, change):
    path = tmp_path / "part.json"
    record(10.0).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    now = record(5.0)
    now.follow(Record.load(path))
    assert now.reference == {} and now.losses() == {}


@pytest.mark.parametrize("junk", [None, "x", 3, [1.0], [1.0, "x"], {}])
def test_damaged_quartiles_are_as_none(tmp_path, junk):
    now = record(5.0)
    now.reference = {"it": {"value": 10.0, "unit": "ratio", "quartiles": junk}}
    assert now.losses() == {"it": 0.5}


def test_settings_that_a_file_writes_otherwise_are_the_same(tmp_path):
    """JSON has neither tuples nor keys that are numbers."""
    settings = {"sizes": (1, 2), "by rank": {16: "a"}}
    first, path = record(12.0, settings=settings), tmp_path / "part.json"
    first.save(path)
    second = record(6.0, settings=settings)
    second.follow(Record.load(path))
    assert second.losses() == {"it": 0.5}


def test_following_itself_or_nothing():
    now = record()
    now.follow(None)
    assert now.reference == {} and now.losses() == {}
    now.follow(now)
    assert now.losses() == {}


@pytest.mark.parametrize("other", [{"settings": {"model": "7b"}}, {"on": CPU | {"device": "Another"}}])
def test_other_settings_or_another_device_are_no_reference(other):
    assert after(record(1.0), record(10.0, **other)).reference == {}


def test_what_others_had_stored_is_not_handed_on():
    """A stored record of other settings has references of other settings."""
    now = after(record(1.0), record(10.0), record(5.0, settings={"model": "7b"}))
    assert now.reference == {}


@pytest.mark.parametrize("unit", ["ms", "s", "samples/s", "tokens/s", "TFLOP/s", "GB/s"])
def test_times_and_rates_count_on_a_gpu_only(unit):
    assert after(record(1.0, unit), record(10.0, unit)).losses() == {}
    assert after(record(1.0, unit, on=GPU), record(10.0, unit, on=GPU)).losses() == {"it": 0.9}


@pytest.mark.parametrize("unit", ["ratio", "MiB", "percent"])
def test_ratios_and_bytes_count_everywhere(unit):
    for on in (CPU, GPU):
        assert after(record(1.0, unit, on=on), record(10.0, unit, on=on)).losses() == {"it": 0.9}


def test_a_figure_that_is_new_is_no_loss_and_one_that_is_gone_is_a_whole_one():
    now, before = record(), record()
    before.figures["gone"] = Figure(1.0, "ratio", "higher")
    now.figures["new"] = Figure(1.0, "ratio", "higher")
    assert after(now, before).losses() == {"gone": 1.0}


def test_a_figure_that_is_gone_for_a_while_is_held_against_the_same():
    without = record()
    del without.figures["it"]
    now = after(record(6.0), record(10.0, at="first"), without)
    assert now.losses() == {"it": 0.4} and now.reference["it"]["commit"] == "first"


def test_a_figure_of_another_unit_is_another_figure():
    now = after(record(1000.0, "ms", "lower", on=GPU), record(1.0, "s", "lower", on=GPU))
    assert now.losses() == {}


def test_a_stored_zero_or_no_number_divides_nothing(tmp_path):
    assert after(record(5.0), record(0.0)).losses() == {}
    path = tmp_path / "part.json"
    record(float("nan")).save(path)  # written as null
    now = record(5.0)
    now.follow(Record.load(path))
    assert now.losses() == {}
    assert after(record(5.0, better="lower"), record(0.0, better="lower")).losses().keys() <= {"it"}


def test_a_record_whose_own_figure_is_no_number(tmp_path):
    path = tmp_path / "part.json"
    after(record(float("nan")), record(5.0)).save(path)
    loaded = Record.load(path)
    assert loaded is None or loaded.losses() == {}


def test_a_stored_record_without_device_or_commit_is_no_reference():
    for strange in ({}, {"device": CPU["device"]}):
        now = record(1.0)
        now.follow(Record("part", strange, figures={"it": Figure(10.0, "ratio", "higher")}))
        assert now.reference.get("it", {}).get("commit") is None


# ---- the machine


def test_the_machine_says_what_figures_mean_nothing_without():
    found = machine(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in found["device"]
    assert found["versions"]["torch"] == module.version("torch") and found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"].keys() >= {"triton", "transformers", "peft", "trl", "liger-kernel"}
    assert "capability" not in found and json.dumps(found)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own, in place of this one."""
    for folder in ("fastppo", "kernels", "bench/loop", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def commit(folder):
    who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=folder, check=True, env=os.environ | who)
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return found.stdout.strip()


def test_the_commit_and_whether_what_is_measured_differs_from_it(repository):
    head = commit(repository)
    found = machine(torch.device("cpu"))
    assert (found["commit"], found["changed"]) == (head, False)
    (repository / "bench" / "results" / "part.json").write_text("{}")  # what a measurement writes is no change
    (repository / "README.md").write_text("text")
    assert machine(torch.device("cpu"))["changed"] is False
    for name in ("fastppo/a.py", "kernels/a.py", "bench/loop/a.py", "bench/loop/new.py"):
        path = repository / name
        before = path.read_text() if path.exists() else None
        path.write_text("a = 2\n")
        assert machine(torch.device("cpu"))["changed"] is True, name
        path.write_text(before) if before is not None else path.unlink()
    assert machine(torch.device("cpu"))["changed"] is False


def test_where_there_is_no_repository_nothing_is_claimed(repository):
    found = machine(torch.device("cpu"))
    assert found["commit"] is None and found["changed"] is not False


def test_a_digest_of_the_sources(repository):
    first = sources("fastppo", "kernels")
    assert first == sources("fastppo", "kernels") and len(first) == 16
    (repository / "bench" / "loop" / "a.py").write_text("other")
    (repository / "fastppo" / "notes.txt").write_text("no Python")
    assert sources("fastppo", "kernels") == first
    (repository / "fastppo" / "a.py").write_text("a = 2\n")
    changed = sources("fastppo", "kernels")
    (repository / "fastppo" / "a.py").rename(repository / "fastppo" / "b.py")
    renamed = sources("fastppo", "kernels")
    (repository / "fastppo" / "sub").mkdir()
    (repository / "fastppo" / "sub" / "c.py").write_text("c = 3\n")
    assert len({first, changed, renamed, sources("fastppo", "kernels")}) == 4


def test_a_digest_of_single_files(repository):
    one = sources("fastppo", "bench/loop/a.py")
    assert one != sources("fastppo")
    (repository / "bench" / "loop" / "b.py").write_text("another\n")
    assert sources("fastppo", "bench/loop/a.py") == one
    (repository / "bench" / "loop" / "a.py").write_text("a = 2\n")
    assert sources("fastppo", "bench/loop/a.py") != one


def test_the_folder_of_a_device(monkeypatch):
    assert folder_of(torch.device("cpu")) == module.RESULTS / "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3 (x)")
    assert folder_of(torch.device("cuda")) == module.RESULTS / "nvidia-h100-80gb-hbm3-x"
