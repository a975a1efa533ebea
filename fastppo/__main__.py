"""The entry point: ``python -m fastppo`` and the command ``fastppo``."""

import signal
import sys


def main() -> int:
    """Runs the command line. Ctrl-C ends it without a traceback, also while Python is still importing or already done."""
    try:
        from fastppo.cli import main

        return main()
    except KeyboardInterrupt:
        print("fastppo: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
