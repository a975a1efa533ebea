"""Every Triton kernel compiles for the GPUs it is meant for, as it should, on machines without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")

REPO = Path(__file__).resolve().parents[2]
OLDEST = Path(sys.prefix) / "triton-3.6.0"  # `make test` puts it there


def run(*arguments: str, status: int = 0, **environment: str) -> str:
    """In a process of its own: in this one the kernels may be those of triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=inherited | environment, cwd=REPO)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr * (status != 0)


def report(*arguments: str, **how) -> list[str]:
    return run("-m", "fastppo_kernels.compile_report", *arguments, **how).splitlines()


def kernels_in(lines: list[str]) -> list[str]:
    """Names in the first column of a Markdown table."""
    return [found.group(1) for line in lines if (found := re.match(r"\| `(\w+)` \| \d+ \|", line))]


@pytest.mark.parametrize("version", ["pinned", "3.6.0"])
def test_every_configuration_fits(version):
    """No spills, no more shared memory than there is, matrix instructions where a dot is: the command says so by its status."""
    where = {}
    if version != "pinned":
        if not OLDEST.is_dir():
            pytest.skip(f"triton {version} is not there: make oldest-triton")
        where["PYTHONPATH"] = os.pathsep.join([str(OLDEST), str(REPO / "kernels")])
    lines = report("--summary", **where)
    assert {"statistics_kernel", "ppo_kernel", "_gae_kernel", "_sample_kernel"} <= set(kernels_in(lines))
    assert lines[0].startswith("| kernel |") and lines[-1].endswith("compilations, 0 that do not fit")
    assert version == "pinned" or lines[-1].startswith(f"triton {version}:")


def test_the_notes_have_the_table_of_all_kernels():
    """Its figures are those of a triton that may be another by now; no kernel may be missing, or be one that is no more."""
    names = run(
        "-c",
        "from fastppo_kernels import compile_report as r; print(*{c.kernel.__name__ for c in r.every_configuration()})",
    ).split()
    assert sorted(kernels_in((REPO / "csrc_notes.md").read_text(encoding="utf-8").splitlines())) == sorted(names)


def test_no_kernel_is_left_out():
    code = "from fastppo_kernels import compile_report as r; print(*(m.__name__ for m in r.modules())); print(r.left_out())"
    out = run("-c", code)
    files = sorted((REPO / "kernels" / "fastppo_kernels").glob("*.py"))
    with_kernels = {f"fastppo_kernels.{file.stem}" for file in files if "@triton.jit" in file.read_text(encoding="utf-8")}
    found, left_out = out.splitlines()
    assert with_kernels <= set(found.split()) and left_out == "[]"


def test_a_kernel_that_is_left_out_is_seen(tmp_path):
    """A module's launched kernels are told from the functions that kernels call."""
    (tmp_path / "_triton_new.py").write_text(
        """
import triton
import triton.language as tl
@triton.jit
def _add(a, b):
    return a + b
@triton.jit
def _sum(x):
    return tl.reduce(x, 0, combine_fn=_add)
@triton.jit
def _sum_kernel(x, out, N: tl.constexpr):
    tl.store(out, _sum(tl.load(x + tl.arange(0, N))))
@triton.jit
def _never_launched(x, out):
    pass
def total(x, out):
    _sum_kernel[(1,)](x, out, N=8)
""",
        encoding="utf-8",
    )
    out = run(
        "-c",
        """
import _triton_new
from fastppo_kernels import compile_report as r
r.modules = lambda: [_triton_new]
print(r.left_out())
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO / "kernels")]),
    )
    assert out.strip() == "['_triton_new._never_launched', '_triton_new._sum_kernel']"


def test_a_spill_or_too_much_shared_memory_is_seen():
    out = run(
        "-c",
        """
from fastppo_kernels import compile_report as report
kernels = [c for c in report.every_configuration() if c.kernel.__name__ == "gradient_kernel"]
wanted = next(c for c in kernels if c.signature["grad"] == "*fp32")
print(*report.usage(wanted._replace(constants=wanted.constants | {"BLOCK_V": 4096}, num_warps=1), 90).problems)
row = report.Usage("big", "big", 90, 32, 0, 227 * 1024, 1, {})
print(row.problems, row._replace(arch=80).problems)
""",
    )
    spill, shared = out.splitlines()
    assert re.fullmatch(r"spills \d+ bytes", spill)
    assert shared == "[] ['232448 bytes of shared memory, 166912 is all there is']"


def test_matrix_instructions_are_counted_and_missed_and_atomics_seen(tmp_path):
    """On H100 four warps multiply tiles of 64 rows together; float32 that must not be rounded has no tensor cores."""
    (tmp_path / "product.py").write_text(
        """
import triton
import triton.language as tl
from fastppo_kernels._configuration import Configuration
@triton.jit
def product(a, b, c, M: tl.constexpr, ADD: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, 64), tl.arange(0, 32)
    x, y = tl.load(a + m * 32 + k[None, :]), tl.load(b + k[:, None] * 64 + n[None, :])
    z = tl.dot(x, y, input_precision="ieee")
    if ADD:
        tl.atomic_add(c + m * 64 + n[None, :], z)
    else:
        tl.store(c + m * 64 + n[None, :], z)
def configuration(dtype, rows, add=False):
    types, constants = {"a": dtype, "b": dtype, "c": "*fp32"}, {"M": rows, "ADD": add}
    return Configuration("product", product, types, constants, 4, 1, ("a", "b", "c"))
""",
        encoding="utf-8",
    )
    out = run(
        "-c",
        """
import product
from fastppo_kernels import compile_report as r
for dtype, rows, arch in (("*bf16", 64, 80), ("*bf16", 64, 90), ("*bf16", 16, 90), ("*fp32", 64, 90)):
    row = r.usage(product.configuration(dtype, rows), arch)
    print(*row.matrix, "/", *row.problems)
print(*r.usage(product.configuration("*bf16", 16, add=True), 80).problems)
r.expected_matrix_instructions = lambda ttir, arch, num_warps: {"wgmma"}
print(r.usage(product.configuration("*bf16", 64), 80).problems)
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPO / "kernels")]),
    )
    *found, atomics, missing = out.splitlines()
    assert found == ["mma /", "wgmma /", "mma /", "/"] and missing == "['a dot without wgmma']"
    assert re.fullmatch(r"\d+ atomic operations", atomics)


def test_the_head_kernels_address_rows_with_64_bits_and_round_and_load_as_they_should():
    """A row's offset is a 64-bit product (14,123 rows of 152,064 logits pass 2^31); aligned rows are read 16 bytes at a time;
    gradients are rounded to the nearest bfloat16, not cut off."""
    run(
        "-c",
        """
import re
from fastppo_kernels import compile_report as report
for name, logits, grad in (
    ("statistics_kernel", "*bf16", None), ("gradient_kernel", "*bf16", "*bf16"), ("ppo_kernel", "*fp32", "*bf16")
):
    wanted = next(
        c for c in report.every_configuration() if c.kernel.__name__ == name and c.signature["logits"] == logits
        and c.signature.get("grad") == grad and "vocab" in c.divisible and c.constants["BLOCK_V"] >= 2048
    )
    kernel = report.compiled(wanted, 90)
    ir, ptx = kernel.asm["ttir"], kernel.asm["ptx"]
    row = re.search(r"(%\\S+) = arith.extsi (%\\S+) : i32 to i64", ir)
    assert "tt.get_program_id" in re.search(re.escape(row.group(2)) + r" = .*", ir).group(), name
    stride = re.search(r"(%\\S+) = arith.extsi %logits_stride : i32 to i64", ir).group(1)
    offset = re.search(rf"(%\\S+) = arith.muli {re.escape(row.group(1))}, {re.escape(stride)} : i64", ir)
    assert offset and re.search(rf"tt.addptr %logits, {re.escape(offset.group(1))} : !tt.ptr<\\w+>, i64", ir), name
    assert "ld.global.v4.b32" in ptx, name
    if name != "statistics_kernel":
        assert re.search(r"cvt.rn(.satfinite)?.bf16", ptx), name
""",
    )


def test_the_command_prints_a_table_and_refuses_what_it_cannot_do():
    lines = report("--filter", "sample bf16 all of a row", "--arch", "90")
    assert lines[0].split() == ["kernel", "sm", "registers", "spilled", "shared", "PTX", "matrix"]
    assert len(lines) >= 4 and lines[-1].endswith(f"{len(lines) - 3} compilations, 0 that do not fit")
    assert "no configuration has 'nothing'" in report("--filter", "nothing", status=2)[-1]
    assert "TRITON_INTERPRET" in report(status=2, TRITON_INTERPRET="1")[-1]
