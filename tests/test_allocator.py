"""What the C library does with freed memory, in processes of their own: the setting is for a whole process."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
from fastppo.allocator import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if "keep" in sys.argv:
    keep_freed_memory()
before = resident()
block = np.ones(16 << 20, dtype=np.uint8)
del block
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_is_kept():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "plain")
    )
    assert kept >= 15 << 20 > 4 << 20 >= returned


def test_nothing_happens_elsewhere(monkeypatch):
    from fastppo import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    allocator.keep_freed_memory()
    monkeypatch.undo()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())  # a C library without it
    allocator.keep_freed_memory()
