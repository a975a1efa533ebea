"""Files of a run: whole or not there, whatever happens."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastppo import files
from fastppo.errors import UserError

REPO = Path(__file__).resolve().parents[1]


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=REPO, capture_output=True, text=True, timeout=60
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "zwei é \ud800")
    assert path.read_text() == "zwei é \\ud800"
    assert names(tmp_path) == ["a.txt"]


def test_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_lines_written_whole_are_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"a": 1, "text": "one\ntwo \u2028 \ud800 <b>"}, {"b": [1.5, None]}]
    files.write_json_lines(path, [*rows, {"c": float("nan")}])
    assert path.read_bytes().count(b"\n") == 3
    assert files.read_json_lines(path) == [*rows, {"c": None}]
    files.write_json_lines(path, [])
    assert files.read_json_lines(path) == [] and names(tmp_path) == ["rows.jsonl"]


def test_json_has_plain_numbers_and_no_nan(tmp_path):
    value = {"a": np.float32(0.5), "b": [float("nan"), np.int64(3), float("inf")], "c": Path("x"), "d": True, "e": None}
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": 0.5, "b": [None, 3, None], "c": "x", "d": True, "e": None,
    }  # fmt: skip


def test_folder_takes_its_place_whole(tmp_path):
    path = tmp_path / "runs" / "adapter"
    for content in ("one", "two"):
        with files.write_folder(path) as fresh:
            assert fresh != path
            (fresh / "sub").mkdir()
            (fresh / "sub" / "weights").write_text(content)
        assert (path / "sub" / "weights").read_text() == content
        assert names(path.parent) == ["adapter"]


def test_folder_that_failed_leaves_the_old_one(tmp_path):
    path = tmp_path / "adapter"
    with files.write_folder(path) as fresh:
        (fresh / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="boom"), files.write_folder(path) as fresh:
        (fresh / "weights").write_text("new")
        raise RuntimeError("boom")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_folder_killed_between_the_two_renames_is_put_back(tmp_path):
    code = """
import os, sys
from pathlib import Path
from fastppo import files
path = Path(sys.argv[1])
for content in ("old", "new"):
    if content == "new":
        rename = os.rename
        def kill_after(source, target):
            rename(source, target)
            os.kill(os.getpid(), 9)
        os.rename = kill_after
    with files.write_folder(path) as fresh:
        (fresh / "weights").write_text(content)
"""
    run = tmp_path / "run"
    assert run_python(code, run / "adapter").returncode == -signal.SIGKILL
    assert not (run / "adapter").exists()
    with files.lock_run(run):
        assert (run / "adapter" / "weights").read_text() == "old"
        assert names(run) == [".lock", "adapter"]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "checkpoints" / ".step-10.123.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-10.123.tmp" / "weights").write_text("half")
    (tmp_path / ".summary.json.123.tmp").write_text("{")
    (tmp_path / "adapter").mkdir()
    (tmp_path / ".adapter.old").mkdir()
    (tmp_path / "mine.tmp").write_text("the user's own")
    with files.lock_run(tmp_path):
        assert names(tmp_path) == [".lock", "adapter", "checkpoints", "mine.tmp"]
        assert names(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_disk_errors_are_one_line_that_says_how_to_go_on(code, tmp_path):
    def said(path):
        with pytest.raises(UserError) as caught, files.disk_errors(path):
            raise OSError(code, os.strerror(code))
        line = str(caught.value)
        assert line.startswith(f"cannot write {path}: {os.strerror(code)}; ") and "\n" not in line
        return line

    run, config = tmp_path / "my run", "config.yaml"
    (tmp_path / config).touch()  # a user's own
    fresh = said(run), said(run / "summary.json")
    run.mkdir()
    (run / ".lock").touch()
    for line in (*fresh, said(run / config)):  # nothing to go on with
        assert "--resume" not in line and "intact" not in line and line.endswith(("space", "quota", "(ulimit -f)", "folder"))
    (run / config).touch()
    going_on = f"go on with: fastppo train --resume '{run}'"
    for path in (run, run / "summary.json", run / "checkpoints" / "1" / "model"):
        assert "everything saved before is intact; " in said(path) and said(path).endswith(f", then {going_on}")
    (tmp_path / "study.yaml").touch()
    assert said(run / "summary.json").endswith(going_on)
    (tmp_path / ".lock").touch()
    assert said(run / "summary.json").endswith(f"go on with: fastppo study --resume {tmp_path}")


def test_any_failure_of_the_disk_is_one_line_and_other_errors_pass(tmp_path):
    with pytest.raises(UserError, match="No such file or directory; choose another place"), files.disk_errors(tmp_path):
        (tmp_path / "none").read_text()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "there")
    with pytest.raises(UserError, match="File exists"), files.lock_run(tmp_path / "link"):
        pass
    with pytest.raises(ValueError, match="no disk"), files.disk_errors(tmp_path):
        raise ValueError("no disk")


def test_full_disk_for_real():
    # /dev/full: every write fails with ENOSPC, as on a full disk.
    with pytest.raises(UserError, match="No space left on device"), files.disk_errors(Path("x")):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"a")


def test_limit_on_file_size_for_real(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from fastppo import files
from fastppo.errors import UserError
run = Path(sys.argv[1])
rows = files.JsonLines(run / "metrics.jsonl")
rows.append({"step": 1})
files.write_text(run / "a", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (lambda: files.write_text(run / "a", "x" * 2000), lambda: rows.append({"text": "x" * 2000})):
    try:
        write()
    except UserError as error:
        print(error)
"""
    done = run_python(code, tmp_path)
    assert done.stderr == "" and done.stdout.count("File too large; raise the limit on file sizes (ulimit -f)\n") == 2
    assert names(tmp_path) == ["a", "metrics.jsonl"]
    assert (tmp_path / "a").read_text() == "old"
    assert files.read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_safetensors_error_is_understood():
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="No space left"), files.disk_errors(Path("x")):
        raise error


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    code = """
import sys
from pathlib import Path
from fastppo import files
from fastppo.errors import UserError
try:
    with files.lock_run(Path(sys.argv[1])):
        print("got it")
except UserError as error:
    print(error)
"""
    run = tmp_path / "run"
    with files.lock_run(run):
        refused = run_python(code, run).stdout
        assert f"in use by process {os.getpid()}" in refused and str(run) in refused
    assert run_python(code, run).stdout == "got it\n"


def test_lock_ends_with_a_killed_process(tmp_path):
    code = """
import sys, time
from pathlib import Path
from fastppo import files
with files.lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(UserError), files.lock_run(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with files.lock_run(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_unused_folders(tmp_path):
    run = tmp_path / "run"
    assert files.is_unused(run)
    with files.lock_run(run):
        pass
    assert files.is_unused(run)
    (run / "config.yaml").write_text("")
    assert not files.is_unused(run)
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        files.is_unused(run / "config.yaml")


def test_json_lines_append_and_read(tmp_path):
    rows = files.JsonLines(tmp_path / "a.jsonl")
    rows.append({"step": 1, "kl": float("nan"), "text": "two\nlines \u2028 é \ud800"})
    rows.append({"step": 2})
    assert rows.tell() == 2
    assert files.read_json_lines(tmp_path / "a.jsonl") == [
        {"step": 1, "kl": None, "text": "two\nlines \u2028 é \ud800"},
        {"step": 2},
    ]
    rows.close()


def test_torn_last_line_is_not_read_and_not_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n{"a":')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]
    rows = files.JsonLines(path)
    assert rows.tell() == 2
    rows.append({"a": 3})
    rows.close()
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n{"a": 3}\n'


@pytest.mark.parametrize("line", [b"{", b"3", b"\xff", b""])
def test_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not a JSON object"):
        files.read_json_lines(path)


def test_truncate_to_a_checkpoint(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = files.JsonLines(path)
    for step in range(5):
        rows.append({"step": step, "text": "\u2028\x85\r"})  # no line ends, though str.splitlines takes them for such
    rows.truncate_to(2)
    assert rows.tell() == 2
    rows.append({"step": 9})
    assert [row["step"] for row in files.read_json_lines(path)] == [0, 1, 9]
    with pytest.raises(UserError, match="has 3 lines, but the checkpoint was taken after 4"):
        rows.truncate_to(4)
    rows.close()


def test_kill_while_writing_leaves_whole_files(tmp_path):
    code = """
import sys
from pathlib import Path
from fastppo import files
run = Path(sys.argv[1])
rows = files.JsonLines(run / "metrics.jsonl")
step = 0
while True:
    step += 1
    rows.append({"step": step})
    with files.write_folder(run / f"step-{step}") as fresh:
        (fresh / "a").write_text(str(step))
        (fresh / "b").write_text(str(step))
    files.write_json(run / "summary.json", {"step": step, "same": step})
    if step == 3:
        print("going", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "going\n"
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    with files.lock_run(tmp_path):
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["step"] == summary["same"] >= 2
        steps = [row["step"] for row in files.read_json_lines(tmp_path / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
        for folder in tmp_path.glob("step-*"):
            assert (folder / "a").read_text() == (folder / "b").read_text() == folder.name.removeprefix("step-")
        assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
