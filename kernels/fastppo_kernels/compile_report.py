"""Compile every Triton kernel in every configuration that the dispatcher can choose, without a GPU, and print what it takes.

    python -m fastppo_kernels.compile_report [--filter TEXT] [--arch 80 90] [--summary] [--jobs N]

Columns: registers a thread, bytes spilled a thread (local memory), bytes of shared memory a block, PTX instructions, and how
many of these are matrix instructions. `--summary` prints one line a kernel instead, as Markdown. The exit status is 1 where
something spills, asks for more shared memory than a block of the GPU has, multiplies matrices without its tensor cores, or
adds up with atomics, in an order that is not the same twice.

Kernels compile in parallel; what was compiled before comes from triton's own cache, whose keys cover the source, the
options, the target and the compiler itself.
"""

import argparse
import ast
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastppo_kernels

from ._configuration import Configuration

# Shared memory that one block may have, in bytes: 163 and 227 KiB.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# How PTX names the matrix instructions of a warp, and those of four warps (sm_90).
_INSTRUCTIONS = {"mma": r"\t(?:@%\w+ )?mma\.sync\.", "wgmma": r"\t(?:@%\w+ )?wgmma\.mma_async\."}
# Sums that other blocks add to come out in any order.
_ATOMIC = r"\t(?:@%\w+ )?(?:atom|red)\.(?:\w+\.)*global"
_MISFIT = "  <- "


class Usage(NamedTuple):
    """What one compiled kernel takes: registers and spilled bytes a thread, bytes of shared memory a block, instructions.

    matrix: how many matrix instructions of each kind there are among them. missing: kinds that its dots should have become.
    atomics: instructions that add to memory that other blocks add to.
    """

    name: str
    kernel: str
    arch: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    matrix: dict[str, int]
    missing: tuple[str, ...] = ()
    atomics: int = 0

    @property
    def problems(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} is all there is")
        found += [f"a dot without {kind}" for kind in self.missing]
        return found + ([f"{self.atomics} atomic operations"] if self.atomics else [])


def modules() -> list[ModuleType]:
    """Every module of the package whose name says that it holds Triton kernels."""
    names = sorted(found.name for found in pkgutil.iter_modules(fastppo_kernels.__path__))
    return [importlib.import_module(f"fastppo_kernels.{name}") for name in names if name.startswith("_triton_")]


def launched(module: ModuleType) -> set[str]:
    """Names of the kernels of a module: its jit functions that something launches, or that no other jit function calls."""
    functions = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and _made_in(value, module)}
    called, launches = set(), set()
    for function in ast.parse(inspect.getsource(module)).body:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name):
                launches.add(node.func.value.id)
            elif getattr(function, "name", None) in functions:
                # As an argument too: a scan takes the function that it combines with.
                parts = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
                called |= {part.id for part in parts if isinstance(part, ast.Name)}
    imported = {value.__name__ for other in modules() for value in vars(other).values() if _foreign(value, other)}
    return functions & (launches | (functions - called - imported))


def _made_in(function: JITFunction, module: ModuleType) -> bool:
    return function.__module__ == module.__name__


def _foreign(value: object, module: ModuleType) -> bool:
    return isinstance(value, JITFunction) and not _made_in(value, module)


@cache
def every_configuration() -> tuple[Configuration, ...]:
    return tuple(found for module in modules() if hasattr(module, "configurations") for found in module.configurations())


def left_out() -> list[str]:
    """Kernels of any module that are in no configuration."""
    listed = {(found.kernel.__module__, found.kernel.__name__) for found in every_configuration()}
    return [
        f"{module.__name__}.{name}" for module in modules() for name in sorted(launched(module))
        if (module.__name__, name) not in listed
    ]  # fmt: skip


def compiled(configuration: Configuration, arch: int) -> triton.compiler.CompiledKernel:
    """The kernel for a GPU of compute capability `arch` (80: A100, 90: H100)."""
    kernel, names = configuration.kernel, configuration.kernel.arg_names
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.divisible}
    source = ASTSource(kernel, signature, constexprs=configuration.constants, attrs=attributes)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def expected_matrix_instructions(ttir: str, arch: int, num_warps: int) -> set[str]:
    """The kinds that the dots of a kernel should become: "wgmma" where sm_90 has it for such a tile, "mma" for others.

    float32 that is not to be rounded ("ieee") has none: it is multiplied without tensor cores.
    """
    kinds = set()
    for attributes, rows, left, columns in re.findall(
        r"tt\.dot ([^:\n]*): tensor<(?:\d+x)?(\d+)x\d+x(\w+)> \* tensor<(?:\d+x)?\d+x(\d+)x\w+>", ttir
    ):
        if left == "f64" or (left == "f32" and "tf32" not in attributes):
            continue
        group = arch >= 90 and int(rows) >= 64 and int(columns) % 8 == 0 and num_warps % 4 == 0
        kinds.add("wgmma" if group else "mma")
    return kinds


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
    ptx = kernel.asm["ptx"]
    instructions = sum(1 for line in ptx.splitlines() if line.rstrip().endswith(";") and line.startswith("\t"))
    matrix = {kind: len(re.findall(pattern, ptx)) for kind, pattern in _INSTRUCTIONS.items()}
    expected = expected_matrix_instructions(kernel.asm["ttir"], arch, configuration.num_warps)
    missing = tuple(sorted(kind for kind in expected if not matrix[kind]))
    return Usage(
        configuration.name, configuration.kernel.__name__, arch, found["REG"], found["STACK"] + found["LOCAL"],
        kernel.metadata.shared, instructions, {kind: count for kind, count in matrix.items() if count}, missing,
        len(re.findall(_ATOMIC, ptx)),
    )  # fmt: skip


def _usage_of(place: int, arch: int) -> Usage:
    return usage(every_configuration()[place], arch)


def usages(wanted: Iterable[Configuration], archs: Iterable[int], jobs: int | None = None) -> Iterator[Usage]:
    """Of each of these of `every_configuration`, in order, as they come; `jobs` processes, by default one a core."""
    places = {id(configuration): place for place, configuration in enumerate(every_configuration())}
    pairs = [(places[id(configuration)], arch) for configuration in wanted for arch in archs]
    # Workers are forked from a process that has imported what takes long and done nothing else: no locks are held.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    with ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield from pool.map(_usage_of, *zip(*pairs, strict=True))


def _of_kinds(matrix: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in matrix.items()) or "-"


def table(rows: Iterable[Usage]) -> Iterator[str]:
    """Lines as they come, for a table that grows while kernels compile."""
    yield f"{'kernel':<72} {'sm':>3} {'registers':>9} {'spilled':>8} {'shared':>7} {'PTX':>6}  matrix"
    for row in rows:
        mark = _MISFIT + ", ".join(row.problems) if row.problems else ""
        counts = f"{row.registers:>9} {row.spilled:>8} {row.shared:>7} {row.instructions:>6}  {_of_kinds(row.matrix)}"
        yield f"{row.name:<72} {row.arch:>3} {counts}{mark}"


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]}-{found[-1]}"


def _matrix(rows: list[Usage]) -> str:
    """Such as "2-8 wgmma", of the configurations that have any."""
    kinds = sorted({kind for row in rows for kind in row.matrix})
    return ", ".join(f"{_range(row.matrix[kind] for row in rows if kind in row.matrix)} {kind}" for kind in kinds) or "-"


def summary(rows: Iterable[Usage]) -> Iterator[str]:
    """A Markdown table with one line a kernel, over all its configurations."""
    found = sorted(rows, key=lambda row: row.kernel)
    archs = sorted({row.arch for row in found})
    by_arch = [(title, arch) for title in ("registers", "shared bytes", "matrix") for arch in archs]
    yield "| kernel | configurations | spilled | PTX | " + " | ".join(f"{title} sm_{arch}" for title, arch in by_arch) + " |"
    yield "|---|" + "---|" * (3 + len(by_arch))
    for name, group in groupby(found, key=lambda row: row.kernel):
        of_kernel = list(group)
        cells = [str(len({row.name for row in of_kernel})), _range(row.spilled for row in of_kernel)]
        cells.append(_range(row.instructions for row in of_kernel))
        for title, arch in by_arch:
            here = [row for row in of_kernel if row.arch == arch]
            cells.append(
                _range(row.registers for row in here) if title == "registers"
                else _range(row.shared for row in here) if title == "shared bytes"
                else _matrix(here)
            )  # fmt: skip
        yield f"| `{name}` | " + " | ".join(cells) + " |"


def _kept(rows: Iterable[Usage], kept: list[Usage]) -> Iterator[Usage]:
    for row in rows:
        kept.append(row)
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--filter", default="", help="only configurations whose name has this in it")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--summary", action="store_true", help="one line a kernel, as Markdown")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("nothing is compiled under TRITON_INTERPRET=1")
    wanted = [configuration for configuration in every_configuration() if arguments.filter in configuration.name]
    if not wanted:
        parser.error(f"no configuration has {arguments.filter!r} in its name")
    rows: list[Usage] = []
    found = _kept(usages(wanted, arguments.arch, arguments.jobs), rows)
    for line in summary(found) if arguments.summary else table(found):
        print(line, flush=True)
    bad = [row for row in rows if row.problems]
    if arguments.summary:
        for row in bad:
            print(f"{row.name}, sm_{row.arch}: {', '.join(row.problems)}")
    unlisted = [] if arguments.filter else left_out()
    for name in unlisted:
        print(f"{name} is in no configuration")
    print(f"\ntriton {triton.__version__}: {len(rows)} compilations, {len(bad)} that do not fit")
    return int(bool(bad or unlisted))


if __name__ == "__main__":
    sys.exit(main())
