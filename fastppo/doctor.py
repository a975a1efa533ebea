"""`fastppo doctor`: whether training can run here, why not, what would make it slow, and the facts behind that, on one page."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import rich.console
from rich.table import Table
from rich.text import Text

from fastppo import __version__, machine
from fastppo.errors import printable

Facts = Mapping[str, Any]
Row = tuple[str, str, str]  # label, text, style

GOOD, BAD, WARNING, FAINT = "green", "bold red", "yellow", "dim"
LABEL_WIDTH = 14
FREE_ENOUGH = 0.5  # of a GPU's memory: with less free, somebody else works there


def doctor(console: rich.console.Console | None) -> int:
    """Shows the page, or without a console the same facts as one JSON object.

    Returns:
        The exit code: 0 where training can run, 1 where it cannot.
    """
    if console is None:
        facts = examined(machine.look())
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        with console.status("looking at this machine"):
            facts = examined(machine.look())
        show(facts, console)
    return 0 if facts["can_train"] else 1


def examined(found: Facts) -> dict[str, Any]:
    """The facts with what follows from them in front: `can_train`, `why_not`, `warnings`."""
    why_not = list(obstacles(found))
    return {
        "fastppo": __version__, "can_train": not why_not, "why_not": why_not, "warnings": list(traps(found)), **found
    }  # fmt: skip


def obstacles(facts: Facts) -> Iterator[str]:
    """Why training cannot run, one line each."""
    if facts["training"].get("error"):
        broken = list(_required_and_broken(facts))
        yield from broken
        if broken:  # the rest fails for the same reason
            return
    for step, what in (("torch", "torch"), ("attention", "attention"), ("kernels", "kernels"), ("training", "the trainer")):
        if facts[step].get("error"):
            yield f"{what}: {facts[step]['error']}"
    kernels = facts["kernels"]
    if kernels.get("taken") == "triton" and kernels["triton"] != "usable":
        yield f"the Triton kernels would be taken and cannot run ({kernels['triton']}); FASTPPO_KERNELS=torch does without them"
    for gpu in facts["torch"].get("gpus", [])[:1]:  # the one that training takes
        if not gpu["has_kernels"]:
            yield (
                f"this torch has no kernels for {gpu['name']} (compute capability {gpu['capability']}): "
                "install another build of torch, or train with --device cpu"
            )


def _required_and_broken(facts: Facts) -> Iterator[str]:
    for name, package in facts["packages"].items():
        if package["required"] and package["error"]:
            yield f"{name} cannot be imported: {package['error']}"
        elif package["required"] and not package["installed"]:
            yield f"{name} is not installed: pip install '{name}{package['wanted'] or ''}'"


def traps(facts: Facts) -> Iterator[str]:
    """What is known to go wrong or to be slow, one line each."""
    yield from _package_traps(facts)
    yield from _gpu_traps(facts)
    yield from _cpu_traps(facts)
    measured, environment = facts["measured"], facts["environment"]
    for file in measured.get("files", []):
        if file.get("error"):
            yield f"{file['file']} cannot be read ({file['error']}): what it held will be measured again; delete it"
    if measured.get("folder") and not measured["writable"] and facts["torch"].get("gpus"):
        yield f"{measured['folder']} cannot be written: every process measures again; set FASTPPO_KERNELS_CACHE to a folder"
    for name, harm in (
        ("CUDA_LAUNCH_BLOCKING", "every launch is waited for"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "every tensor is allocated anew"),
    ):
        if environment.get(name, "0") not in ("", "0"):
            yield f"{name}={environment[name]}: {harm}, which is slow; unset it"


def _package_traps(facts: Facts) -> Iterator[str]:
    packages = facts["packages"]
    if not facts["training"].get("error"):  # what is broken is not needed for every run
        yield from _required_and_broken(facts)
    for name, package in packages.items():
        if package["in_range"] is False:
            wanted = package["wanted"]
            yield f"{name} {package['version']} is outside fastppo's range {wanted}: pip install '{name}{wanted}'"
        if package["error"] and not package["required"]:
            yield f"{name} is installed and cannot be imported: {package['error']}"
    if facts["environment"].get("TRITON_INTERPRET") == "1":
        triton, numpy = (_release(packages[name]["version"]) for name in ("triton", "numpy"))
        if triton and numpy and triton < (3, 7) and numpy >= (2, 4):
            yield "TRITON_INTERPRET=1: triton before 3.7 cannot interpret kernels with numpy 2.4 or newer; change one of them"
        if facts["torch"].get("gpus"):
            yield "TRITON_INTERPRET=1: Triton kernels run in an interpreter, far slower than on the GPU; unset it"


def _release(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version; empty for none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else ()


def _gpu_traps(facts: Facts) -> Iterator[str]:
    torch, driver, kernels, environment = (facts[step] for step in ("torch", "driver", "kernels", "environment"))
    if torch.get("no_gpu") and (driver.get("version") or driver.get("gpus")):
        cure = "; install torch's CUDA build (https://pytorch.org/get-started)" if not torch["cuda"] else ""
        yield f"an NVIDIA driver is here, and torch sees no GPU: {torch['no_gpu']}{cure}"
    for said in torch.get("said", []):
        yield f"torch: {said}"
    gpus = torch.get("gpus", [])
    for gpu in gpus:
        if gpu["memory_free"] is not None and gpu["memory_free"] < FREE_ENOUGH * gpu["memory"]:
            free = f"{_size(gpu['memory_free'])} of {_size(gpu['memory'])}"
            yield f"GPU {gpu['index']} has only {free} free: another process works there"
    if not gpus:
        return
    if float(gpus[0]["capability"]) < 8 and facts["training"].get("dtype") == "bfloat16":
        yield f"{gpus[0]['name']} computes bfloat16 slowly (compute capability below 8.0): try --dtype float16 or float32"
    for name, what in (("FASTPPO_KERNELS", "Triton kernels"), ("FASTPPO_ATTENTION", "attention kernels")):
        if environment.get(name) == "torch":
            yield f"{name}=torch switches the {what} off, which is slow; unset it"
    if kernels.get("taken") == "triton":
        if not kernels["compiler"]:
            yield "triton finds no C compiler, which it needs at the first launch: install gcc, or set CC"
        elif not kernels["headers"]:
            yield "triton finds no Python.h, which it needs at the first launch: install Python's headers (python3-dev)"


def _cpu_traps(facts: Facts) -> Iterator[str]:
    threads, system = facts["torch"].get("threads"), facts["system"]
    if not threads or "cores" not in system:
        return
    may = system["cpu_limit"] or system["cores"]
    if threads > max(1, may):
        yield f"torch uses {threads} threads where {may:g} cores may be used: set OMP_NUM_THREADS={max(1, int(may))}"
    variables = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in facts["environment"]]
    if threads < int(may) and variables and not facts["torch"].get("gpus"):
        because = ", ".join(f"{name}={facts['environment'][name]}" for name in variables)
        yield f"torch uses {threads} of {int(may)} cores ({because})"


# -- the page -------------------------------------------------------------------------------------------------------------


def show(facts: Facts, console: rich.console.Console) -> None:
    """The page: a table that folds on a terminal, elsewhere one line a fact."""
    for title, rows in page(facts):
        if title:
            console.print()
            console.print(Text(title, style="bold"))
        width = max((LABEL_WIDTH, *(len(printable(label)) for label, *_ in rows))) if any(label for label, *_ in rows) else 0
        if not console.is_terminal:
            for label, text, _ in rows:
                line = f"{printable(label):<{width}}  {printable(text)}" if width else printable(text)
                console.print(Text(line), soft_wrap=True)
            continue
        grid = Table.grid(padding=(0, 2, 0, 0))
        if width:
            grid.add_column(min_width=LABEL_WIDTH, overflow="fold")
        grid.add_column(overflow="fold")
        for label, text, style in rows:
            grid.add_row(*([Text(printable(label))] if width else []), Text(printable(text), style=style))
        console.print(grid)


def page(facts: Facts) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each part."""
    training = facts["training"]
    if facts["can_train"]:
        verdict = f"training can run here, on {training['device']} in {training['dtype']}"
    else:
        verdict = "training cannot run here"
    yield "", [("", f"fastppo {facts['fastppo']}: {verdict}", GOOD if facts["can_train"] else BAD)]
    for title, lines, style in (("why not", facts["why_not"], BAD), ("warnings", facts["warnings"], WARNING)):
        if lines:
            yield title, [("", f"- {line}", style) for line in lines]
    yield "machine", [*_machine(facts), *_gpu_rows(facts)]
    yield "packages", [_package_row(name, package) for name, package in facts["packages"].items()]
    yield "attention", _attention(facts)
    yield "kernels", _kernels(facts)
    yield "measured by the dispatcher", _measured(facts["measured"])
    if facts["environment"]:
        yield "environment", [(name, value or "(empty)", "") for name, value in facts["environment"].items()]
    yield "training, with no settings", _failed(training) or list(_training(training))


def _training(facts: Facts) -> Iterator[Row]:
    yield "device", facts["device"], ""
    yield "base", facts["dtype"], ""
    yield "micro-batch", f"{facts['micro_batch_tokens']:,} tokens of the tree at most; fastppo plan says what they take", ""


def _failed(facts: Facts, label: str = "") -> list[Row]:
    return [(label, f"could not be found out: {facts['error']}", BAD)] if facts.get("error") else []


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**30:.1f} GiB"


def _machine(facts: Facts) -> Iterator[Row]:
    python, system, torch = facts["python"], facts["system"], facts["torch"]
    yield from _failed(python, "Python") or [("Python", f"{python['version']} ({python['kind']}), {python['path']}", "")]
    if failed := _failed(system, "system"):
        yield from failed
    else:
        yield "system", system["os"], ""
        limit = f", of which this container may use {system['cpu_limit']:g}" if system["cpu_limit"] else ""
        yield "CPU", f"{system['cpu'] or system['machine']}, {system['cores']} cores{limit}", ""
        yield "memory", f"{_size(system['memory'])}, {_size(system['memory_free'])} free", ""
    if failed := _failed(torch, "torch"):
        yield from failed
        return
    onednn = {True: "on", False: "off"}.get(torch["onednn"], f"unknown: {torch.get('onednn_error')}")
    yield "CPU products", f"{torch['cpu_capability']}, oneDNN products {onednn}, threads: {torch['threads']}", ""
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['rocm']}" if torch["rocm"] else "the CPU only"
    yield "torch", f"{torch['version']}, built for {build}", ""


def _gpu_rows(facts: Facts) -> Iterator[Row]:
    driver, torch = facts["driver"], facts["torch"]
    if driver.get("version") or driver.get("gpus"):
        newest = f", for CUDA up to {driver['cuda']}" if driver["cuda"] else ""
        error = f" ({driver['error']})" if driver["error"] else ""
        yield "NVIDIA driver", f"{driver['version']}{newest}{error}", ""
    else:
        yield "NVIDIA driver", f"none ({driver['error']})", FAINT
    for gpu in torch.get("gpus", []):
        memory = f"{_size(gpu['memory'])}, {_size(gpu['memory_free'])} free"
        kernels = "" if gpu["has_kernels"] else ", no kernels for it in this torch"
        yield f"GPU {gpu['index']}", f"{gpu['name']}, compute capability {gpu['capability']}, {memory}{kernels}", ""
    if torch.get("no_gpu"):
        yield "GPU", f"none for torch: {torch['no_gpu']}", FAINT
        for gpu in driver.get("gpus", []):
            yield "", f"{gpu['name']}, {_size(gpu['memory'])}, {_size(gpu['memory_free'])} free, says the driver", FAINT


def _package_row(name: str, package: Facts) -> Row:
    if not package["installed"]:
        return name, f"not installed; brings {package['brings']}", BAD if package["required"] else FAINT
    version = package["version"] or "version unknown"
    if package["error"]:
        return name, f"{version}, cannot be imported: {package['error']}", BAD
    if package["in_range"] is False:
        return name, f"{version}, outside fastppo's range {package['wanted']}", WARNING
    return name, version, ""


def _attention(facts: Facts) -> list[Row]:
    states = {name: found.get("state") or found["error"] for name, found in facts["backends"].items()}
    rows = [(name, _usable(state), "" if state == "usable" else FAINT) for name, state in states.items()]
    taken = facts["attention"]
    return [*rows, *(_failed(taken, "taken here") or [("taken here", f"{taken['taken']} ({taken['taken_for']})", GOOD)])]


def _usable(state: str) -> str:
    return state if state == "usable" else f"not usable: {state}"


def _kernels(facts: Facts) -> list[Row]:
    kernels, quantisation = facts["kernels"], facts["quantisation"]
    rows: list[Row] = []
    if "triton" in kernels:
        how = ", in the interpreter (TRITON_INTERPRET=1)" if kernels["interpreter"] else ""
        rows += [
            ("triton", _usable(kernels["triton"]) + how, "" if kernels["triton"] == "usable" else FAINT),
            ("C compiler", kernels["compiler"] or "none", ""),
            ("Python.h", kernels["headers"] or "none", ""),
        ]
    if kernels.get("taken"):
        rows.append(("taken here", kernels["taken"], GOOD))
    rows += _failed(kernels, "triton")
    nf4 = quantisation.get("nf4", quantisation.get("error", ""))
    return [*rows, ("NF4", _usable(nf4), "" if nf4 == "usable" else FAINT)]


def _measured(facts: Facts) -> list[Row]:
    if "folder" not in facts:
        return _failed(facts)
    if facts["folder"] is None:
        return [("folder", "none: FASTPPO_KERNELS_CACHE is empty, or there is no home folder", FAINT)]
    rows: list[Row] = [("folder", facts["folder"] + ("" if facts["writable"] else ", cannot be written"), "")]
    if facts["error"] or not facts["files"]:
        rows.append(("choices", facts["error"] or "none yet: only GPUs are measured, when an op first runs", FAINT))
    for file in facts["files"]:
        if file.get("error"):
            rows.append((file["device"], f"cannot be read: {file['error']}", WARNING))
            continue
        old = "" if file["current"] else f", not used: by {file['software']}, here is {facts['software']}"
        rows.append((file["device"], f"{len(file['choices'])} made{old}", ""))
        counts = Counter((key.split(" ")[0], choice) for key, choice in file["choices"].items())
        rows += [("", f"{op}: {choice}, {count} of its shapes", FAINT) for (op, choice), count in sorted(counts.items())]
    return rows
