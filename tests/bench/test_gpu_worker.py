"""What the checks on a GPU do where a case takes its process with it, hangs, or the time is up."""

import json
import sys
import time

import pytest
import torch

from bench import gpu
from bench.gpu_checks import run as checks
from bench.gpu_checks import worker
from bench.gpu_checks.case import Case
from bench.gpu_checks.checks import CHECKS, Outcome, Sanitizer
from bench.gpu_checks.worker import in_processes, outcomes_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")

# Does as a worker does, by the names that it is given.
FAKE = """
import json, os, sys, time
if sys.argv[1] == "never begins":
    sys.exit(4)
print(json.dumps({"ready": True}), flush=True)
for name in sys.argv[1:]:
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    usable = name != "poisons"
    print(json.dumps({"name": name, "outcomes": {"error": [usable, str(os.getpid()), {}]}, "usable": usable}), flush=True)
    if not usable:
        break
"""


def run(*names: str, minutes: float = 1.0, seconds: float = 20.0) -> list[tuple[str, dict[str, Outcome]]]:
    return list(in_processes(names, time.monotonic() + 60 * minutes, (sys.executable, "-c", FAKE), seconds))


def test_the_others_run_in_a_new_process_where_one_dies_or_leaves_the_gpu_unusable():
    found = dict(run("a", "b", "dies", "c", "poisons", "d", "dies too"))
    assert list(found) == ["a", "b", "dies", "c", "poisons", "d", "dies too"]
    processes = {name: outcomes["error"].text for name, outcomes in found.items() if name != "dies"}
    assert processes["a"] == processes["b"] != processes["c"] == processes["poisons"] != processes["d"]
    assert found["dies"] == {"process": Outcome(False, "the process ended in it (status -6)", {})}
    assert not found["poisons"]["error"].ok and found["d"]["error"].ok


def test_one_that_hangs_is_given_up_and_the_others_go_on():
    found = dict(run("a", "hangs", "b", seconds=1.0))
    assert list(found) == ["a", "hangs", "b"] and found["b"]["error"].ok
    assert not found["hangs"]["process"].ok and found["hangs"]["process"].text == "nothing came of it for 1 s"


def test_it_stops_in_time_with_what_it_has():
    begun = time.monotonic()
    assert [name for name, _ in run("a", "hangs", "b", minutes=2 / 60)] == ["a"]
    assert time.monotonic() - begun < 10
    assert run("a", minutes=0) == []


def test_a_process_that_cannot_begin_is_an_error():
    with pytest.raises(RuntimeError, match="ended with status 4 before the first"):
        run("never begins")


def case_named(name: str) -> Case:
    def make(device, dtype, seed):
        return {"x": torch.ones(3, dtype=dtype)}

    return Case(name, (name,), make, lambda inputs, backend: {"y": inputs["x"] * 2}, ("x",), make)


def test_what_follows_the_loss_of_the_gpu_is_not_checked(monkeypatch):
    answers = iter([True, False])
    monkeypatch.setattr(worker, "_usable", lambda device: next(answers))
    outcomes, usable = outcomes_of(case_named("a"), torch.device("cpu"))
    assert not usable and list(outcomes) == ["error", "determinism", "process"] and not outcomes["process"].ok


def test_a_second_run_goes_on_and_other_sources_begin_anew(tmp_path, capsys, monkeypatch):
    cases, out, ran = [case_named(name) for name in "abc"], tmp_path / "figures.json", []

    def error(case, device, *, small):
        ran.append(case.name)
        return Outcome(case.name != "a", "text", {})

    for name in worker.ON_CPU:
        monkeypatch.setitem(CHECKS, name, error if name == "error" else lambda case, device, *, small: Outcome(True, "", {}))
    cpu = torch.device("cpu")
    assert checks.check(cases, cpu, out, 0.0) == (1, 2)  # the first, and the time is up
    assert "1 failed, 2 left" in capsys.readouterr().out and not json.loads(out.read_text())["complete"]
    assert checks.check(cases, cpu, out, 1.0) == (1, 0) and ran == ["a", "b", "c"]
    assert json.loads(out.read_text())["complete"]
    assert checks.check(cases, cpu, out, 0.0) == (1, 2) and ran == ["a", "b", "c", "a"]  # of a complete one, from the start
    monkeypatch.setattr(checks, "sources", lambda *folders: "others")
    assert checks.check(cases, cpu, out, 0.0) == (1, 2) and ran == ["a", "b", "c", "a", "a"]


def test_the_exit_status_says_that_cases_are_left(tmp_path):
    arguments = ["--check", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path / "figures.json")]
    assert gpu.main([*arguments, "--only", "whiten, scaled", "ppo_loss 0 tokens"]) == 3
    assert gpu.main([*arguments, "--only", "whiten, scaled", "ppo_loss 0 tokens"]) == 0


@pytest.mark.parametrize(
    "script, found",
    [
        ("echo '== a'; echo done; echo '== b'; exit 1", {"a": True, "b": False}),  # the others are for another process
        ("echo '== a'; echo done; echo '== b'; sleep 60", {"a": True}),
        ("echo '== a'; echo done; echo '== b'; echo done; echo '== c'; echo done", {"a": True, "b": True, "c": True}),
        ("echo no such tool; exit 9", {"a": False, "b": False, "c": False}),
    ],
    ids=["ends in one", "is stopped", "all is well", "does not begin"],
)
def test_of_a_sanitizer_only_what_it_came_to_counts(tmp_path, script, found):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    sanitizer = Sanitizer(str(program), "memcheck", [case_named(name) for name in "abc"])
    try:
        outcomes = sanitizer.outcomes(time.monotonic() + 1.5)
    finally:
        sanitizer.stop()
    assert {name: outcome.ok for name, outcome in outcomes.items()} == found
