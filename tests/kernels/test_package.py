"""The kernels package stands alone."""

import subprocess
import sys
import tomllib
from pathlib import Path

import fastppo_kernels


def test_importing_it_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import fastppo_kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(out.split()) <= {"fastppo_kernels", "torch"}


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fastppo_kernels.__version__ == project["version"]
