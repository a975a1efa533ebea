"""Processes that end with the one that started them, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

# Looked up before any fork: a child may do little before it becomes another program.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


def die_with_parent() -> None:
    """For `preexec_fn`. A parent that is killed cannot stop its children, which would go on using the GPU."""
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def stop(process: subprocess.Popen, patience: float = 0.0) -> int:
    """End a process and its group, after so many seconds to end by itself on an interrupt; its exit status."""
    if process.poll() is None and patience:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:  # inside of a driver that does not answer, a process cannot even die
        return -signal.SIGKILL
