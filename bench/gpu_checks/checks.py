"""What is checked of a case: its error, that it gives the same bits again, CUDA graphs, torch.compile, compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import Case, Inputs, Results, converted, evaluate
from .error import measure, share
from .process import die_with_parent, stop

SEED, OTHER_SEED = 1, 2


class Outcome(NamedTuple):
    """Whether a check went well, what of it is printed, and the figures that are kept."""

    ok: bool
    text: str
    figures: dict[str, Any]


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def compare(case: Case, inputs: Inputs, ours: Results, theirs: Results, exact: Results) -> dict[str, Any]:
    """By result: the error, the torch form's, and what is allowed (`error.measure`).

    Raises:
        ValueError: results of other names, shapes or dtypes than the torch form's.
    """
    if list(ours) != list(theirs) or list(ours) != list(exact):
        raise ValueError(f"results {list(ours)}, in torch {list(theirs)}, in float64 {list(exact)}")
    found: dict[str, Any] = {}
    same: Tensor | None = None
    if case.keyed_by is not None:
        same = (ours[case.keyed_by] == exact[case.keyed_by]) & (theirs[case.keyed_by] == exact[case.keyed_by])
    for name, truth in exact.items():
        value, theirs_value = ours[name], theirs[name]
        if value.shape != theirs_value.shape or value.dtype != theirs_value.dtype:
            came, wanted = (f"{x.dtype} {list(x.shape)}" for x in (value, theirs_value))
            raise ValueError(f"{name} is {came}, in torch {wanted}")
        if not value.is_floating_point():
            wrong = float((value != theirs_value).double().mean()) if value.numel() else 0.0
            found[name] = {"error": wrong, "allowed": case.ties}
            continue
        if same is not None:
            value, theirs_value, truth = value[same], theirs_value[same], truth[same]
        slack = case.slack(name, inputs) if case.slack is not None else 0.0
        found[name] = measure(value, theirs_value, truth, roundings=case.roundings, slack=slack)
    return found


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that a place that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_error(case: Case, device: torch.device, *, small: bool) -> Outcome:
    """Ours and the torch form's against the torch form in float64, in every dtype of the case."""
    shares, figures, worst = [], {}, ""
    for dtype in case.dtypes:
        inputs = case.inputs(device, dtype, SEED, small=small)
        theirs = evaluate(case, inputs, "torch", dtype)
        exact = evaluate(case, converted(inputs, torch.float64), "torch", dtype)
        with _poisoned():
            ours = evaluate(case, inputs, "triton", dtype)
        found = compare(case, inputs, ours, theirs, exact)
        del inputs, theirs, exact, ours
        figures[short(dtype)] = found
        name = max(found, key=lambda name: share(found[name]))
        shares.append(share(found[name]))
        if shares[-1] > 1:
            worst += f" ({short(dtype)} {name}: {found[name]['error']:.3g}, allowed {found[name]['allowed']:.3g})"
    text = " ".join(f"{short(dtype)} {share:.2f}" for dtype, share in zip(case.dtypes, shares, strict=True))
    return Outcome(max(shares) <= 1, f"error {text}{worst}", figures)


def _bits(x: Tensor) -> Tensor:
    """As integers, so that NaN equals NaN and -0 is not 0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def differing(a: Results, b: Results) -> list[str]:
    """Names of the results that differ in any bit."""
    return [name for name in a if not torch.equal(_bits(a[name]), _bits(b[name]))]


def check_determinism(case: Case, device: torch.device, *, small: bool) -> Outcome:
    """20 runs (3 in the interpreter) give the same bits, in every dtype."""
    times = 20 if device.type == "cuda" else 3
    for dtype in case.dtypes:
        inputs = case.inputs(device, dtype, SEED, small=small)
        first = evaluate(case, inputs, "triton", dtype)
        for run in range(1, times):
            names = differing(first, evaluate(case, inputs, "triton", dtype))
            if names:
                return Outcome(False, f"run {run + 1} differs in {short(dtype)} {', '.join(names)}", {"runs": run + 1})
        del inputs, first
    return Outcome(True, f"{times} runs equal", {"runs": times})


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of inputs, those of a module included."""
    found = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    for name, x in inputs.items():
        if isinstance(x, torch.nn.Module):
            found |= {f"{name}.{key}": value for key, value in x.state_dict(keep_vars=True).items()}
    return found


def check_graph(case: Case, device: torch.device, *, small: bool) -> Outcome:
    """No synchronisation, and a captured graph that is replayed with new inputs gives what these give without a graph."""
    dtype = case.main_dtype
    static = case.inputs(device, dtype, SEED, small=small)
    fresh = case.inputs(device, dtype, OTHER_SEED, small=small)
    expected = evaluate(case, fresh, "triton", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            evaluate(case, static, "triton", dtype)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(case, static, "triton", dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate(case, static, "triton", dtype)
    for x in results.values():  # what is left there must not pass for a result; expanded ones cannot be filled
        if all(stride or size == 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            x.fill_(0)
    with torch.no_grad():
        new = _tensors(fresh)
        for name, x in _tensors(static).items():
            x.copy_(new[name])
    graph.replay()
    torch.cuda.synchronize()
    names = differing(expected, results)
    return Outcome(not names, f"graph differs in {', '.join(names)}" if names else "graph equal, no sync", {})


def check_compile(case: Case, device: torch.device, *, small: bool) -> Outcome:
    """torch.compile makes one graph of it, which gives what the op gives (but for how the parts around it are rounded)."""
    dtype = case.main_dtype
    inputs = case.inputs(device, dtype, SEED, small=small)
    eager = evaluate(case, inputs, "triton", dtype)
    torch._dynamo.reset()
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = evaluate(case, inputs, "triton", dtype, torch.compile(case.forward, fullgraph=True, backend=compiler))
    around = replace(case, roundings=case.roundings + 1)  # inductor keeps float32 where torch rounds from op to op
    found = compare(around, inputs, compiled, eager, {name: x.double() for name, x in eager.items()})
    wrong = [name for name, figure in found.items() if share(figure) > 1]
    return Outcome(not wrong, f"compiled differs in {', '.join(wrong)}" if wrong else "compiled equal", found)


# In this order: what a graph leaves behind where it cannot be made must not spoil another check.
CHECKS = {"error": check_error, "determinism": check_determinism, "compile": check_compile, "graph": check_graph}


class Sanitizer:
    """compute-sanitizer over the small form of cases, in a process beside the other checks."""

    TOOLS = ("memcheck", "racecheck")

    def __init__(self, program: str, tool: str, cases: list[Case]) -> None:
        self.tool, self.cases = tool, cases
        self.output = tempfile.TemporaryFile("w+")
        command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99"]
        command += [sys.executable, "-m", "bench.gpu_checks.once", *(case.name for case in cases)]
        # Without torch's own pool, so that every tensor is an allocation whose ends the tool knows.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, env=environment, cwd=root, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip

    @staticmethod
    def program() -> str | None:
        usual = "/usr/local/cuda/bin/compute-sanitizer"
        return shutil.which("compute-sanitizer") or (usual if os.access(usual, os.X_OK) else None)

    def outcomes(self, deadline: float) -> dict[str, Outcome]:
        """By name of the case. Waits for the process until `deadline` (of `time.monotonic`). What it is at by then is not
        there, nor what it did not come to, unless it came to nothing at all."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(deadline - time.monotonic(), 0))
        stopped = self.process.poll() is None
        self.stop()
        self.output.seek(0)
        text = self.output.read()
        names = [case.name for case in self.cases]
        begun = re.findall(r"^== (.+)$", text, flags=re.M)
        if begun or stopped:
            names = begun[:-1] if stopped else begun
        # Libraries' kernels synchronise in ways that racecheck does not know.
        kernels = our_kernels() if self.tool == "racecheck" else None
        return read_sanitizer(text, self.process.returncode, self.tool, names, kernels)

    def stop(self) -> None:
        stop(self.process)  # the tool and what runs under it


def our_kernels() -> set[str]:
    from fastppo_kernels.compile_report import every_configuration

    return {configuration.kernel.__name__ for configuration in every_configuration()}


def read_sanitizer(text: str, status: int, tool: str, names: list[str], kernels: set[str] | None = None) -> dict[str, Outcome]:
    """What the output of `bench.gpu_checks.once` under compute-sanitizer says of each case.

    kernels: records that name none of these are not counted; None: all count.
    """
    parts = re.split(r"^== (.+)$", text, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = {}
    for name in names:
        if name not in sections:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
            found[name] = Outcome(False, f"{tool} did not come to it (status {status}): {last}", {})
            continue
        # A record begins with its kind; what follows of it is indented.
        kind = r"^========= (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY|\s)(.+(?:\n=========  .+)*)"
        records = re.findall(kind, sections[name], flags=re.M)
        if kernels is not None:
            records = [record for record in records if any(kernel in record for kernel in kernels)]
        if records:
            first = records[0].splitlines()[0]
            found[name] = Outcome(False, f"{tool}: {len(records)} errors, first: {first}", {"records": records[:20]})
        elif "\ndone" not in sections[name]:
            found[name] = Outcome(False, f"{tool} ended in it (status {status})", {})
        else:
            found[name] = Outcome(True, f"{tool} ok", {})
    return found
