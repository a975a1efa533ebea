"""`python -m bench.gpu`: parts that are right, die, hang, run out of memory or time, and what a second run makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import Part, share
from bench.record import ROOT, Figure, Record, machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")

HERE = machine(torch.device("cpu"))

# Does as a part does, by the name that it is given, and adds a figure at each call.
FAKE = """
import json, os, sys, time
how, out, log = sys.argv[1:4]
with open(log, "a") as file:
    file.write(how + " ")
try:
    record = json.load(open(out))
except OSError:
    record = {"part": how, "machine": json.loads(os.environ["HERE"]), "figures": {}, "data": {}, "notes": []}
def save(complete):
    record["figures"][f"figure {len(record['figures'])}"] = {"value": 1.0, "unit": "s"}
    record["started"], record["complete"] = repr(time.time()), complete
    with open(out + "~", "w") as file:
        json.dump(record, file)
    os.rename(out + "~", out)
print("this is", how)
if how == "raises":
    raise ValueError("no such thing")
if how == "dies":
    os.abort()
if how == "loop-of-7b":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB\\n")
if how == "hangs":
    save(False)
    time.sleep(60)
if how == "wrong":
    save(len(record["figures"]) == 1)
    sys.exit(1)
if how == "in-two":
    save(len(record["figures"]) == 1)
    sys.exit(0 if record["complete"] else 3)
save(True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs these parts; (exit status, lines, what was run, the records)."""
    monkeypatch.setenv("HERE", json.dumps(HERE))
    for name, seconds in (("GRACE", 0.5), ("PATIENCE", 0.5), ("LEAST", 0.0)):
        monkeypatch.setattr(gpu, name, seconds)
    log = tmp_path / "log"

    def call(*names: str, minutes: float = 0.5, device: str = "cpu"):
        log.unlink(missing_ok=True)
        parts = [Part(name, 0.02, ("-c", FAKE, name, "{out}", str(log))) for name in names]
        status = gpu.measure(parts, device, tmp_path / "out", minutes)
        ran = log.read_text().split() if log.exists() else []
        records = {name: Record.load(tmp_path / "out" / f"{name}.json") for name in names}
        return status, capsys.readouterr().out.splitlines(), ran, records

    return call


def test_no_part_takes_another_with_it_and_a_second_run_goes_on(run, monkeypatch):
    names = ("raises", "a", "dies", "loop-of-7b", "b")
    status, lines, ran, records = run(*names)
    assert status == 1 and ran == list(names)
    assert "raises: failed, ended with status 1: ValueError: no such thing" in lines and "    this is a" in lines
    assert lines[-1] == "3 parts done, 2 failed, 0 left"
    assert records["a"].complete and records["b"].complete and not records["raises"].complete
    assert records["raises"].notes == ["not finished: ended with status 1: ValueError: no such thing"]
    assert records["dies"].notes == ["not finished: ended with status -6: this is dies"]
    assert records["loop-of-7b"].complete and "CUDA out of memory. Tried to" in records["loop-of-7b"].notes[0]

    status, lines, ran, records = run(*names, "c")
    assert status == 1 and ran == ["c", "raises", "dies"]  # what has failed before comes last
    assert records["raises"].data["failures"] == 2 and len(records["raises"].notes) == 1


def test_one_that_hangs_is_stopped_and_what_it_had_is_kept(run):
    begun = time.monotonic()
    status, lines, ran, records = run("hangs", "a", minutes=0.04)
    assert status == 1 and ran == ["hangs", "a"] and time.monotonic() - begun < 20
    assert any(line.startswith("hangs: failed, stopped after ") for line in lines)
    assert list(records["hangs"].figures) == ["figure 0"] and not records["hangs"].complete and records["a"].complete


def test_time_that_is_left_is_for_those_that_are_not_complete(run):
    status, lines, ran, records = run("in-two", "a")
    assert status == 0 and ran == ["in-two", "a", "in-two"] and len(records["in-two"].figures) == 2
    status, lines, ran, _ = run("in-two", "a")
    assert status == 0 and ran == [] and lines[0].startswith("2 of 2 parts are done")


def test_a_part_that_finds_something_wrong_goes_on_and_has_failed(run):
    status, lines, ran, records = run("wrong", "a")
    assert status == 1 and ran == ["wrong", "a", "wrong"] and records["wrong"].complete and not records["wrong"].notes
    assert run("wrong", "a")[:3:2] == (1, [])  # it still has, and is not measured again


def test_without_time_parts_are_left(run):
    status, lines, ran, records = run("a", minutes=0)
    assert status == 3 and ran == [] and records["a"] is None
    assert lines[-1] == "the same command goes on with those that are left"


def test_figures_of_other_sources_or_another_machine_are_not_taken_for_these(run, monkeypatch):
    assert run("a")[2] == ["a"] and run("a")[2] == []
    monkeypatch.setattr(gpu, "sources", lambda *folders: "others")
    assert run("a")[2] == ["a"] and run("a")[2] == []
    monkeypatch.setattr(gpu, "machine", lambda device: HERE | {"device": "another"})
    assert run("a")[2] == ["a"]


def test_sources_that_change_while_a_part_runs_are_not_those_of_its_figures(run, monkeypatch):
    digests = iter(["old", "old", "new", "new", "new", "new", "new"])
    monkeypatch.setattr(gpu, "sources", lambda *folders: next(digests))
    status, _, ran, records = run("a")
    assert status == 3 and ran == ["a"] and records["a"].data["sources"] == "old"
    assert run("a")[2] == ["a"]


def test_a_peer_that_came_concerns_only_what_is_measured_beside_it(run, monkeypatch):
    run("update-a", "loop-a")
    with_peer = HERE | {"versions": HERE["versions"] | {"trl": "another"}}
    monkeypatch.setattr(gpu, "machine", lambda device: with_peer)
    assert run("update-a", "loop-a")[2] == ["loop-a"]


def test_one_that_dies_does_not_pass_off_older_figures_as_its_own(run, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    old = Record("raises", HERE, complete=True, data={"sources": "older"})
    old.save(tmp_path / "out" / "raises.json")
    status, lines, ran, records = run("raises")
    assert status == 1 and ran == ["raises"] and records["raises"].data["sources"] == "older"
    assert run("raises")[0] == 1


def test_out_of_memory_forgets_no_reference(run, tmp_path):
    (tmp_path / "out").mkdir()
    figures, settings = {"it": Figure(8.0, "ratio", "higher")}, {"tokens": 4096}
    old = Record("loop-of-7b", HERE, settings, figures, {"sources": "older"}, complete=True)
    old.reference = {"it": {"value": 9.0, "unit": "ratio", "commit": "best"}}
    old.save(tmp_path / "out" / "loop-of-7b.json")
    stored = run("loop-of-7b")[-1]["loop-of-7b"]
    assert stored.complete and not stored.figures and "out of memory" in stored.notes[0]
    later = Record("loop-of-7b", HERE, settings, figures)
    later.follow(stored)
    assert later.reference["it"]["commit"] == "best" and later.losses() == {"it": pytest.approx(1 / 9)}


def test_a_change_of_what_measures_makes_its_figures_old():
    parts = {part.name: part for part in gpu.parts("cuda")}
    for file, names in (
        ("engine.py", {"update-7b", "decode-7b"}),
        ("models.py", {"update-7b", "decode-7b", "loop-cola-7b", "ablations-cola-0.5b"}),
        ("limits.py", {"ceilings", "update-7b", "decode-7b"}),
        ("loop", {"loop-cola-7b", "ablations-cola-0.5b"}),
    ):
        chosen = ("ceilings", "update-7b", "decode-7b", "loop-cola-7b", "ablations-cola-0.5b")
        assert {name for name in chosen if f"bench/{file}" in parts[name].places} == names


def test_without_the_gpu_the_others_do_not_even_begin(run, monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda device: HERE)
    monkeypatch.setattr(gpu, "gpu_is_there", lambda: False)
    status, lines, ran, _ = run("a", "dies", "b", device="cuda")
    assert status == 1 and ran == ["a", "dies"] and lines[-1] == "the GPU cannot be used any more; the rest is left"


# A run of its own, which is killed: `hangs` must not go on without it.
KILLED = """
import sys
from pathlib import Path
from bench import gpu
parts = [gpu.Part(name, 0.5, ("-c", sys.argv[1], name, "{out}", sys.argv[3])) for name in ("a", "hangs")]
gpu.measure(parts, "cpu", Path(sys.argv[2]), 1.0)
"""


def test_a_run_that_is_killed_takes_its_part_along_and_loses_nothing(run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", KILLED, FAKE, str(out), str(log)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "this is hangs" in line:
            break
    until = time.monotonic() + 5
    while not (out / "hangs.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    child = int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 5
    while Path(f"/proc/{child}/cmdline").exists() and time.monotonic() < until:
        if not Path(f"/proc/{child}/cmdline").read_bytes():  # a zombie, which its new parent is yet to notice
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}/cmdline").exists()
    assert Record.load(out / "hangs.json").figures and run("a", "b")[2] == ["b"]


# As `python -m bench.gpu` runs, with these parts.
STOPPED = """
import sys
from bench import command, gpu
command.on_interrupt("stopped")
commands = {name: ("-c", sys.argv[1], name, "{out}", sys.argv[3]) for name in ("a", "hangs", "b")}
gpu.parts = lambda device: [gpu.Part(name, 0.5, command) for name, command in commands.items()]
sys.exit(command.status_of(lambda: gpu.main(["--device", "cpu", "--out", sys.argv[2]])))
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHONUNBUFFERED": "1"}


def interruptible() -> None:
    """Where the tests run in the background, Ctrl-C is ignored, and by what they start as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible, cwd=ROOT,
    )  # fmt: skip


def test_ctrl_c_is_one_line_and_loses_nothing_that_is_finished(run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "stopped"
    process = started("-c", STOPPED, FAKE, str(out), str(log), HERE=os.environ["HERE"])
    until = time.monotonic() + 30
    while not (out / "hangs.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "stopped\n") and log.read_text().split() == ["a", "hangs"]
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    status, lines, ran, records = run("a", "hangs", "b", minutes=0)
    assert lines[0].startswith("1 of 3 parts are done") and records["a"].complete and records["hangs"].figures
    assert records["hangs"].data["sources"] == gpu.sources() and not records["hangs"].notes  # stopped, not failed


def test_ctrl_c_while_it_still_imports_is_one_line_too(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    process = started("-m", "bench.gpu", "--list", PYTHONPATH=os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]]))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "stopped; what is done is stored, and the same command goes on with the rest\n"


def test_a_folder_of_results_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (
        ["--out", str(tmp_path / "file")],
        ["--out", str(tmp_path / "file" / "below")],
        ["--check", "--out", str(tmp_path)],
    ):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(["--device", "cpu", *arguments])
        assert stopped.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"--out: {arguments[-1]}" in line and "folder that can be written" in line


def test_a_figure_that_was_edited_by_hand_is_measured_again(run, tmp_path, capsys):
    run("a")
    path = tmp_path / "out" / "a.json"
    record = json.loads(path.read_text())
    record["figures"]["figure 0"]["raw"] = [3.0]
    path.write_text(json.dumps(record))
    state = gpu.state_of(Part("a", 1.0, ()), tmp_path / "out", HERE)
    said = "what is there cannot be used: the figure 'figure 0' is 1, but the median of its samples is 3"
    assert (state.word, state.text) == ("missing", said)
    assert run("a")[2] == ["a"]


def test_shares_of_the_time():
    assert share("check", [10, 1, 2], 9, 9) == 3  # a third, for it goes on in the next run
    assert share("check", [10], 9, 9) == 9
    assert share("ops", [2, 1, 3], 6, 9) == 2 and share("ops", [2, 1, 3], 20, 30) == 16  # and what nobody else needs
    assert share("ops", [2, 1, 3], 1.5, 9) == 1.5


def test_every_part_has_a_program_and_a_file_of_its_own():
    for device in ("cuda", "cpu"):
        parts = gpu.parts(device)
        assert parts[0].name == "check" and len({part.name for part in parts}) == len(parts)
        for part in parts:
            assert part.command[0] == "-m" and "{out}" in part.command and "{device}" in part.command
            found = find_spec(part.command[1])
            assert found is not None, part.command[1]
            assert not found.submodule_search_locations or find_spec(f"{part.command[1]}.__main__") is not None
            assert part.places and all((ROOT / place).exists() for place in part.places)
    names = {part.name for part in gpu.parts("cuda")}
    for model in ("0.5b", "1.5b", "7b"):
        of_model = {f"update-{model}", f"decode-{model}"} | {f"loop-{x}-{model}" for x in ("cola", "few-shot", "gsm8k")}
        assert of_model <= names


def test_the_list_and_what_only_takes(tmp_path, capsys):
    out = ["--device", "cpu", "--out", str(tmp_path)]
    (decode,) = (part for part in gpu.parts("cpu") if part.name == "decode-tiny")
    stamp = {"sources": gpu.sources(*decode.places)}
    Record("decode-tiny", HERE, data=stamp, complete=True).save(tmp_path / "decode-tiny.json")
    assert gpu.main(["--list", *out, "--only", "loop-*-tiny", "code"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    states = dict(line.split()[:2] for line in lines)
    assert states.pop("decode-tiny") == "done" and set(states.values()) == {"missing"}
    assert set(states) == {"loop-cola-tiny", "loop-gsm8k-tiny", "loop-few-shot-tiny"}
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*out, "--only", "nothing"])
    assert stopped.value.code == 2
    assert "no part is called nothing; there are check, " in capsys.readouterr().err.splitlines()[-1]


def test_the_check_counts_as_failed_where_a_case_is_wrong(tmp_path):
    part = gpu.parts("cpu")[0]
    here = gpu.checks.here(torch.device("cpu"))
    right, wrong = {"error": {"ok": True}}, {"error": {"ok": False}}
    both = {"a": right, "b": wrong}
    for cases, complete, word in (({"a": right}, True, "done"), (both, True, "failed"), ({}, False, "left")):
        report = gpu.checks._new(here) | {"cases": cases, "complete": complete}
        (tmp_path / "check.json").write_text(json.dumps(report), encoding="utf-8")
        assert gpu.state_of(part, tmp_path, HERE).word == word
    assert gpu.state_of(part, tmp_path, HERE | {"device": "another"}).word == "missing"
