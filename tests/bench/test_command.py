"""How the commands of the benchmarks end where nobody reads what they print; Ctrl-C is tried in `test_gpu_parts`."""

import os
import subprocess
import sys

import pytest

from bench.record import ROOT


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "at once"])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [("bench.report", ["--results", ".", "--out", "page.md"]), ("bench.gpu", ["--list", "--device", "cpu", "--out", "."])],
)
def test_where_nobody_reads_what_it_prints_it_ends_quietly(tmp_path, module, arguments, unbuffered):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
