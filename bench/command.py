"""How the commands end where somebody stops them, or stops reading what they print. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType


def on_interrupt(line: str) -> None:
    """Let Ctrl-C end the program with this line and exit status 130, from now on: also while it still imports."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # of itself, Python would end as killed by the signal

    sys.excepthook = hook


def status_of(main: Callable[[], int]) -> int:
    """The exit status of `main`; where the reader of what it prints has left (`| head`), that of SIGPIPE, without a word."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has ended: a late Ctrl-C changes nothing
