"""`make install`, `make train`: the set-up happens once, and one that failed is never taken for a good one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Stands in for Python: passes the version check, "makes" an environment, and "installs" with the status in PIP_STATUS.
PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) exit "${PIP_STATUS:-0}" ;;
    "-m fastppo"*|"-m pytest"*|"-m bench.report"*) echo "ran: $*" ;;
    "-m bench.loop"*"$FAILS"*) [ -z "$FAILS" ]; exit ;;
    --version) echo "Python 3.12.0" ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, folder)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def make(folder: Path, *words: str, **env: str) -> tuple[int, str, str]:
    """Exit status, output, and what Python was asked to do."""
    log = folder.parent / "log"
    log.write_text("")
    done = subprocess.run(
        ["make", "-C", str(folder), "--no-print-directory", f"PYTHON={folder.parent / 'python'}", *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, "LOG": str(log), **env},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, log.read_text()


def test_set_up_happens_once_and_again_when_the_pins_change_or_the_folder_moves(project):
    status, _, log = make(project, "install")
    assert status == 0 and "-m venv --clear .venv" in log and "-c constraints.txt -e .[test]" in log
    assert make(project, "install") == (0, "", "")
    with open(project / "constraints.txt", "a") as file:
        file.write("# changed\n")
    status, _, log = make(project, "install")
    assert status == 0 and "pip install" in log and "venv" not in log  # the environment itself is kept
    moved = project.rename(project.with_name("moved"))
    assert "pip install" in make(moved, "install")[2]
    assert make(moved, "install") == (0, "", "")


def test_failed_installation_is_tried_again(project):
    status, output, _ = make(project, "train", PIP_STATUS="1")
    assert status == 2 and "the installation failed" in output and "ran:" not in output
    assert not (project / ".venv" / ".installed").exists()
    status, output, log = make(project, "train")
    assert status == 0 and "pip install" in log and "ran: -m fastppo train --task cola" in output


def test_broken_environment_is_made_anew(project):
    make(project, "install")
    (project / ".venv" / "bin" / "python").unlink()
    assert "-m venv --clear .venv" in make(project, "install")[2]


def test_train_passes_extra_flags(project):
    assert (
        "ran: -m fastppo train --task cola --seed 1 --out runs/mine\n"
        in make(project, "train", "ARGS=--seed 1 --out runs/mine")[1]
    )


def test_what_benchmarks_need_is_installed_once_and_on_top(project):
    status, output, log = make(project, "bench", "ARGS=-k attention")
    assert status == 0 and "ran: -m pytest bench --benchmark-only -k attention\n" in output
    assert [line.split("-e ")[1] for line in log.splitlines() if "pip install" in line] == [".[test]", ".[test,bench,peers]"]
    assert "pip install" not in make(project, "bench")[2]
    assert make(project, "install") == (0, "", "")
    with open(project / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert make(project, "bench")[2].count("pip install") == 2


def test_benchmarks_whose_needs_cannot_be_installed_do_not_run_and_are_tried_again(project):
    make(project, "install")
    status, output, _ = make(project, "bench", PIP_STATUS="1")
    assert status == 2 and "what the benchmarks need could not be installed" in output and "ran:" not in output
    assert not (project / ".venv" / ".installed-peers").exists()
    assert "ran: -m pytest bench" in make(project, "bench")[1]


def test_the_loop_is_measured_in_every_workload_before_the_report(project):
    _, output, log = make(project, "bench-loop", "ARGS=--threads 2")
    ran = [line.removeprefix("-m bench.") for line in log.splitlines() if line.startswith("-m bench.")]
    workloads = [f"loop --workload {name} --threads 2" for name in ("cola", "few-shot", "gsm8k")]
    assert ran == [*workloads, "loop --ablations --workload cola --threads 2", "report"]
    status, output, log = make(project, "bench-loop", FAILS="few-shot")
    assert status == 2 and "bench.loop --workload few-shot failed" in output and "gsm8k" not in log and "report" not in log


def test_missing_python_is_one_clear_message(project):
    status, output, _ = make(project, "install", "PYTHON=/none/python3 false")
    assert status == 2
    assert "fastppo needs Python 3.11 or newer with its venv module; tried: /none/python3 false" in output
    assert not (project / ".venv").exists()
