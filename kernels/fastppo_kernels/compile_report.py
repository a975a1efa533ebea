"""Compile every Triton kernel in every configuration that the dispatcher can choose, without a GPU, and print what it takes.

    python -m fastppo_kernels.compile_report [--filter TEXT] [--arch 80 90]

Columns: registers a thread, bytes spilled a thread (local memory), shared memory and instructions of each. The exit status is 1
where something spills or asks for more shared memory than a block of the GPU has.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import _triton_gae, _triton_head, _triton_loss, _triton_sample
from ._configuration import Configuration

# Shared memory that one block may have, in bytes: 163 and 227 KiB.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
MODULES = (_triton_gae, _triton_head, _triton_loss, _triton_sample)


_MISFIT = "  <- does not fit"


class Usage(NamedTuple):
    """What one compiled kernel takes: registers and spilled bytes a thread, bytes of shared memory a block, instructions."""

    name: str
    arch: int
    registers: int
    spilled: int
    shared: int
    instructions: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.arch]


def every_configuration() -> list[Configuration]:
    return [configuration for module in MODULES for configuration in module.configurations()]


def compiled(configuration: Configuration, arch: int) -> triton.compiler.CompiledKernel:
    """The kernel for a GPU of compute capability `arch` (80: A100, 90: H100)."""
    kernel, names = configuration.kernel, configuration.kernel.arg_names
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.divisible}
    source = ASTSource(kernel, signature, constexprs=configuration.constants, attrs=attributes)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def usage(configuration: Configuration, arch: int) -> Usage:
    """Compile, and ask the `cuobjdump` that triton brings along."""
    kernel = compiled(configuration, arch)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    instructions = sum(1 for line in kernel.asm["ptx"].splitlines() if line.rstrip().endswith(";") and line.startswith("\t"))
    return Usage(
        configuration.name, arch, found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, instructions
    )  # fmt: skip


def table(usages: Iterable[Usage]) -> Iterator[str]:
    """Lines as they come, for a table that grows while kernels compile."""
    yield f"{'kernel':<72} {'sm':>3} {'registers':>9} {'spilled':>8} {'shared':>7} {'PTX':>6}"
    for row in usages:
        mark = "" if row.fits else _MISFIT
        counts = f"{row.registers:>9} {row.spilled:>8} {row.shared:>7} {row.instructions:>6}"
        yield f"{row.name:<72} {row.arch:>3} {counts}{mark}"


def _printed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, flush=True)
        yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--filter", default="", help="only kernels whose name has this in it")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    arguments = parser.parse_args()
    wanted = [configuration for configuration in every_configuration() if arguments.filter in configuration.name]
    lines = list(_printed(table(usage(configuration, arch) for configuration in wanted for arch in arguments.arch)))
    bad = sum(line.endswith(_MISFIT) for line in lines)
    print(f"{len(lines) - 1} compilations, {bad} that do not fit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
