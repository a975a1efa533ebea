"""The entry point: ``python -m fastppo`` and the command ``fastppo``."""

import logging
import os
import signal
import sys


def main() -> int:
    """Runs the command line. Ctrl-C ends it without a traceback, also while Python is still importing or already done."""
    # Threads of torch's OpenMP wait for each other spinning. When other programs use the cores, the default count makes a run
    # several times slower; this one costs nothing when they are free. It has to be there before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Where the CPU has AVX-512 BF16, bitsandbytes warns, when peft imports it, that a kernel is missing that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
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
