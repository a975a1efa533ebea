"""The kernels package stands alone."""

import subprocess
import sys


def test_importing_it_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import fastppo_kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(out.split()) <= {"fastppo_kernels", "torch"}
