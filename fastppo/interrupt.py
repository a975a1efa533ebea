"""Ctrl-C and SIGTERM that end a run at a safe point instead of anywhere."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from fastppo.errors import Interrupted

_NOTICE = b"\nfastppo: finishing this step, then saving; press Ctrl-C again to stop at once\n"


class Interruptible:
    """While the block runs, the first SIGINT or SIGTERM is only noted, for `check` to raise; a second raises at once.

    A signal that the process was started to ignore stays ignored (`nohup`, a shell's background job). Outside the main
    thread, where Python allows no handlers, signals keep their meaning.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interruptible":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._old.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            raise Interrupted(signum)
        self._noted = signum
        with contextlib.suppress(OSError):  # no print: the signal may have come in the middle of one
            os.write(2, _NOTICE)

    def check(self) -> None:
        """Call where the run can stop and be resumed.

        Raises:
            Interrupted: a signal came since the block began.
        """
        if self._noted is not None:
            raise Interrupted(self._noted)
