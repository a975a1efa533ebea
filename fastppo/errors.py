"""The two exceptions that the command line turns into one clear line."""

import signal


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


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor or reorder its letters written as an escape.

    For text that others wrote (model output, data, file names). The result is one line.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
