"""The entry point: what must happen before anything heavy is imported, and what Ctrl-C does at the edges."""

import os
import signal
import subprocess
import sys


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, **env}
    )


def test_spinning_of_openmp_is_bounded_unless_the_user_says_otherwise():
    code = (
        "import os, sys\n"
        "from fastppo.__main__ import main\n"
        "sys.argv[1:] = ['--version']\n"
        "main()\n"
        "print(os.environ['GOMP_SPINCOUNT'])\n"
    )
    assert python(code).stdout.split()[-1] == "5000"
    assert python(code, GOMP_SPINCOUNT="7").stdout.split()[-1] == "7"


def test_a_kernel_that_bitsandbytes_could_not_fetch_is_not_spoken_of():
    """On CPUs with AVX-512 BF16 it warns of that when peft imports it, with a run or not."""
    code = (
        "import logging, sys\n"
        "from fastppo.__main__ import main\n"
        "sys.argv[1:] = ['--version']\n"
        "main()\n"
        "logger = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "logger.warning('Failed to load CPU gemm_4bit_forward')\n"
        "logger.error('something else')\n"
    )
    assert python(code).stderr == "something else\n"


def test_ctrl_c_while_importing_ends_with_one_line():
    code = (
        "import builtins, sys\n"
        "from fastppo.__main__ import main\n"
        "original = builtins.__import__\n"
        "def interrupted(name, *args):\n"
        "    if name == 'fastppo.cli':\n"
        "        raise KeyboardInterrupt\n"
        "    return original(name, *args)\n"
        "builtins.__import__ = interrupted\n"
        "sys.exit(main())\n"
    )
    result = python(code)
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr == "fastppo: stopped by SIGINT\n" and result.stdout == ""
