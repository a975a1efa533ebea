"""The C library's memory allocator, which a training process on a CPU asks for the same tensors again and again."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is asked for next; elsewhere nothing happens.

    By itself it returns large blocks to the system, which hands out zeroed pages for the next ones, with a page fault for every
    4 KiB. It is for programs, which own their process, not for libraries.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 << 20)
