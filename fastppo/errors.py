"""The two exceptions that the command line turns into one clear line."""

import re
import signal

# What torch, Triton, CUDA and its libraries say where they raise a plain RuntimeError. cuBLAS calls a handle that found no
# memory not initialised, oneDNN says no more than that it could not create what it needed memory for.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|"
    "CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_ALLOC_FAILED|could not create a (primitive|memory)",
    re.IGNORECASE,
)


class UserError(Exception):
    """Something the user can put right: one line that names the setting, file or row, its value, and what is allowed.

    The command line prints `fastppo: error: LINE` and exits with 2, without a traceback.
    """


class Interrupted(BaseException):
    """A run was asked to stop by a signal; like KeyboardInterrupt, no handler of errors may swallow it.

    Attributes:
        signum: the signal's number; the exit code is 128 + signum (130 after Ctrl-C, 143 after SIGTERM).
    """

    def __init__(self, signum: int, how_to_go_on: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f"; {how_to_go_on}" if how_to_go_on else ""))
        self.signum = signum


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory did not suffice. Python's MemoryError, and torch's errors by name: torch need not
    be imported for that."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor or reorder its letters written as an escape.

    For text that others wrote (model output, data, file names). The result is one line.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
