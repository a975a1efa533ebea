"""Every Triton kernel compiles for the GPUs it is meant for, without spilling, on machines without one."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")


def run(*arguments: str) -> str:
    """In a process of its own: in this one the kernels may be those of triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_spills_and_shared_memory_that_fits():
    """Of each kernel and type the plainest and the richest configuration; the command compiles all."""
    out = run(
        "-c",
        """
from fastppo_kernels import compile_report as report
chosen = {}
for configuration in report.every_configuration():
    key = (configuration.kernel.__name__, configuration.num_warps, configuration.signature.get("logits"))
    if key[2] in (None, "*bf16", "*fp32"):
        chosen.setdefault(key, configuration)
        chosen[key, "richest"] = configuration
rows = [report.usage(configuration, arch) for configuration in chosen.values() for arch in (80, 90)]
assert len({row.name.split()[0] for row in rows}) >= 3
for line in report.table(rows):
    print(line)
assert all(row.registers > 0 for row in rows)
assert all(row.spilled == 0 and row.shared <= {80: 163, 90: 227}[row.arch] * 1024 for row in rows)
""",
    )
    assert "statistics_kernel" in out and "ppo_kernel" in out and "does not fit" not in out


def test_a_spill_or_too_much_shared_memory_is_seen():
    out = run(
        "-c",
        """
from fastppo_kernels import _triton_head, compile_report as report
wanted = next(c for c in _triton_head.configurations() if c.name == "gradient_kernel fp32->fp32 plain 2048")
print(report.usage(wanted._replace(constants=wanted.constants | {"BLOCK_V": 32768}, num_warps=1), 90).fits)
print(report.Usage("big", 90, 32, 0, 227 * 1024, 1).fits, report.Usage("big", 80, 32, 0, 227 * 1024, 1).fits)
""",
    )
    assert out.split() == ["False", "True", "False"]


def test_the_head_kernels_address_rows_with_64_bits_and_round_and_load_as_they_should():
    """A row's offset is a 64-bit product (14,123 rows of 152,064 logits pass 2^31); aligned rows are read 16 bytes at a time;
    gradients are rounded to the nearest bfloat16, not cut off."""
    run(
        "-c",
        """
import re
from fastppo_kernels import _triton_head, compile_report as report
wanted = {c.name: c for c in _triton_head.configurations()}
for name in (
    "statistics_kernel bf16->bf16 plain 4096", "gradient_kernel bf16->bf16 plain 4096", "ppo_kernel fp32->bf16 plain 2048"
):
    kernel = report.compiled(wanted[name], 90)
    ir, ptx = kernel.asm["ttir"], kernel.asm["ptx"]
    row = re.search(r"(%\\S+) = arith.extsi (%\\S+) : i32 to i64", ir)
    assert "tt.get_program_id" in re.search(re.escape(row.group(2)) + r" = .*", ir).group(), name
    stride = re.search(r"(%\\S+) = arith.extsi %logits_stride : i32 to i64", ir).group(1)
    offset = re.search(rf"(%\\S+) = arith.muli {re.escape(row.group(1))}, {re.escape(stride)} : i64", ir)
    assert offset and re.search(rf"tt.addptr %logits, {re.escape(offset.group(1))} : !tt.ptr<\\w+>, i64", ir), name
    assert "ld.global.v4.b32" in ptx, name
    assert "atom." not in ptx and "red.global" not in ptx, name
    if not name.startswith("statistics"):
        assert re.search(r"cvt.rn(.satfinite)?.bf16", ptx), name
""",
    )


def test_the_command_prints_a_table():
    lines = run("-m", "fastppo_kernels.compile_report", "--filter", "statistics_kernel bf16->bf16 plain 1024", "--arch", "90")
    lines = lines.splitlines()
    assert lines[0].split() == ["kernel", "sm", "registers", "spilled", "shared", "PTX"]
    assert len(lines) == 4 and lines[-1] == "2 compilations, 0 that do not fit"
