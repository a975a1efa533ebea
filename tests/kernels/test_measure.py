"""The choice by measurement: what is chosen, remembered, shared between processes, and survives a damaged file."""

import json
import multiprocessing
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastppo_kernels import _measure, measurements
from fastppo_kernels._measure import Chooser, bucket, choose

CPU = torch.device("cpu")


class Timer:
    """Gives the times it was made with, by calling the candidate for its name; counts the calls."""

    def __init__(self, **times: float) -> None:
        self.times, self.calls = times, 0

    def __call__(self, candidate, device):
        self.calls += 1
        return self.times[candidate()]


def candidates(*names):
    return {name: (lambda name=name: name) for name in names}


def choices(folder: Path) -> dict:
    return json.loads((folder / "cpu.json").read_text())["choices"]


def test_buckets_are_powers_of_two():
    assert [bucket(rows) for rows in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]


def test_the_fastest_is_chosen_and_measured_once(tmp_path):
    timer = Timer(a=3.0, b=1.0, c=2.0)
    chooser = Chooser(tmp_path, timer)
    assert [chooser.choose("x", candidates("a", "b", "c"), CPU) for _ in range(3)] == ["b"] * 3
    assert timer.calls == 3
    assert choices(tmp_path) == {"x": "b"}
    again = Timer()
    assert Chooser(tmp_path, again).choose("x", candidates("a", "b", "c"), CPU) == "b"
    assert again.calls == 0


def test_the_default_stays_unless_another_is_clearly_faster():
    assert Chooser(None, Timer(a=1.0, b=0.99)).choose("x", candidates("a", "b"), CPU) == "a"
    assert Chooser(None, Timer(a=1.0, b=0.97)).choose("x", candidates("a", "b"), CPU) == "b"


def test_a_single_candidate_is_never_measured(tmp_path):
    timer = Timer()
    assert Chooser(tmp_path, timer).choose("x", candidates("a"), CPU) == "a"
    assert timer.calls == 0 and not list(tmp_path.iterdir())


def test_a_candidate_that_raises_is_out():
    with pytest.warns(UserWarning, match="a cannot run and is left out"):
        assert Chooser(None, Timer(b=5.0)).choose("x", candidates("a", "b"), CPU) == "b"
    with pytest.warns(UserWarning):
        assert Chooser(None, Timer()).choose("x", candidates("a", "b"), CPU) == "a"


def test_what_failed_for_want_of_memory_is_not_kept(tmp_path):
    def timer(candidate, device):
        if candidate() == "a":
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    assert Chooser(tmp_path, timer).choose("x", candidates("a", "b"), CPU) == "b"
    assert not list(tmp_path.iterdir())
    assert Chooser(tmp_path, Timer(a=1.0, b=2.0)).choose("x", candidates("a", "b"), CPU) == "a"


def test_a_remembered_name_that_is_no_candidate_is_measured_again(tmp_path):
    Chooser(tmp_path, Timer(a=2.0, b=1.0)).choose("x", candidates("a", "b"), CPU)
    assert Chooser(tmp_path, Timer(a=2.0, c=1.0)).choose("x", candidates("a", "c"), CPU) == "c"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0\1", '{"software": "%s", "choices": 3}'])
def test_a_damaged_file_is_measured_again_with_one_warning(tmp_path, text):
    Chooser(tmp_path, Timer(a=2.0, b=1.0)).choose("x", candidates("a", "b"), CPU)
    (tmp_path / "cpu.json").write_text(text.replace("%s", _measure._software()))
    chooser = Chooser(tmp_path, Timer(a=1.0, b=2.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert chooser.choose("x", candidates("a", "b"), CPU) == "a"
        assert chooser.choose("y", candidates("a", "b"), CPU) == "a"
    assert len(caught) == 1
    assert choices(tmp_path) == {"x": "a", "y": "a"}


@pytest.mark.parametrize("where", ["torch.__version__", "fastppo_kernels.__version__"])
def test_choices_of_another_version_are_not_used(tmp_path, monkeypatch, where):
    Chooser(tmp_path, Timer(a=2.0, b=1.0)).choose("x", candidates("a", "b"), CPU)
    monkeypatch.setattr(where, "99")
    assert Chooser(tmp_path, Timer(a=1.0, b=2.0)).choose("x", candidates("a", "b"), CPU) == "a"


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    chooser = Chooser(tmp_path / "file" / "folder", Timer(a=2.0, b=1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [chooser.choose(key, candidates("a", "b"), CPU) for key in "xy"] == ["b", "b"]
    assert 1 <= len(caught) <= 2  # reading it, and writing it


def test_nothing_is_measured_while_tracing(tmp_path, monkeypatch):
    timer = Timer(a=2.0, b=1.0)
    chooser = Chooser(tmp_path, timer)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chooser.choose("x", candidates("a", "b"), CPU) == "a"
    assert timer.calls == 0
    monkeypatch.undo()
    assert chooser.choose("x", candidates("a", "b"), CPU) == "b"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chooser.choose("x", candidates("a", "b"), CPU) == "b"  # remembered


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    timer = Timer(a=2.0, b=1.0)
    chooser = Chooser(None, timer)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(_measure, "_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chooser.choose("x", candidates("a", "b"), cuda) == "a"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chooser.choose("x", candidates("a", "b"), cuda) == "b"
    assert timer.calls == 2


def test_the_first_process_to_write_decides_for_all(tmp_path):
    slow, fast = Chooser(tmp_path, Timer(a=1.0, b=2.0)), Chooser(tmp_path, Timer(a=2.0, b=1.0))
    assert slow.choose("w", candidates("a", "b"), CPU) == "a"  # both have read the file
    assert fast.choose("v", candidates("a", "b"), CPU) == "b"
    assert slow.choose("x", candidates("a", "b"), CPU) == "a"
    assert fast.choose("x", candidates("a", "b"), CPU) == "a"
    assert choices(tmp_path) == {"v": "b", "w": "a", "x": "a"}


def _write_many(folder: Path, worker: int) -> None:
    def timer(candidate, device):
        time.sleep(0.001)
        return 1.0

    for i in range(10):
        Chooser(folder, timer).choose(f"{worker}/{i}", candidates("a", "b"), CPU)


def test_processes_lose_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(tmp_path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(choices(tmp_path)) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.lock"]


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_measure.VARIABLE, str(tmp_path))
    assert _measure._shared(str(tmp_path)).folder == tmp_path
    assert _measure._shared("").folder is None
    assert _measure._shared(None).folder == Path.home() / ".cache" / "fastppo_kernels"
    assert choose("x", candidates("a", "b"), CPU) == "a"  # the CPU is not measured
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["~nosuchuser/x", None])
def test_without_a_home_folder_choices_are_in_memory_only(folder, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(Path, "home", lambda: no_home(None))
    _measure._shared.cache_clear()
    with pytest.warns(UserWarning, match="cannot be kept in ~.*: Could not determine home directory") as caught:
        assert [_measure._shared(folder).folder for _ in range(3)] == [None] * 3
    assert len(caught) == 1
    _measure._shared.cache_clear()


def test_what_was_measured_is_listed_with_what_is_not_used_and_what_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv(_measure.VARIABLE, str(tmp_path))
    Chooser(tmp_path, lambda candidate, device: 1.0).choose("op/1", candidates("a", "b"), CPU)
    (tmp_path / "old.json").write_text('{"software": "torch 1.0", "choices": {"op/1": "b"}}')
    (tmp_path / "bad.json").write_text('{"software": ')
    folder, software, (bad, mine, old), error = measurements()
    assert (folder, error) == (tmp_path, None) and torch.__version__ in software
    assert (mine.path, mine.software, mine.current, mine.choices) == (tmp_path / "cpu.json", software, True, {"op/1": "a"})
    assert (old.software, old.current, old.choices) == ("torch 1.0", False, {"op/1": "b"})
    assert isinstance(bad.error, ValueError) and (bad.current, bad.choices) == (False, {})


@pytest.mark.parametrize(("made", "kind"), [(False, None), (True, NotADirectoryError)])
def test_a_folder_that_is_not_there_or_cannot_be_listed(tmp_path, monkeypatch, made, kind):
    folder = tmp_path / "folder"
    if made:
        folder.write_text("")
    monkeypatch.setenv(_measure.VARIABLE, str(folder))
    found = measurements()
    assert (found.folder, found.files) == (folder, [])
    assert found.error is None if kind is None else isinstance(found.error, kind)
    monkeypatch.setenv(_measure.VARIABLE, "")
    assert measurements().folder is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_timer_orders_by_work(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(2048, 2048, device=device)
    work = {"ten": lambda: [a @ a for _ in range(10)], "one": lambda: a @ a}
    assert Chooser(tmp_path).choose("x", work, device) == "one"
