"""What this machine has for training, what of it can be used, and why the rest cannot: the facts of `fastppo doctor`.

The looking is done by a process of its own, step by step, and each step's facts come back as they are found. A library that
ends the process when it is imported (a wrong build does), or that never comes back, so costs its own step: the next process
goes on behind it. The GPU is only asked for its properties: a context, which a full GPU refuses, is never made.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastppo

PATIENCE_S = 120  # for all steps of one process: imports from a cold network disk take a minute
HEAD_SIZE = 128  # of the attention that is asked about: that of most models of 1B and more
SIGNALS = {each.value: each.name for each in signal.Signals}
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class Package(NamedTuple):
    """module: what is imported to see whether it works, None where that takes long and nothing here needs it."""

    module: str | None
    brings: str


PACKAGES = {
    "torch": Package("torch", "everything"),
    "triton": Package("triton", "the fused kernels on a GPU"),
    "numpy": Package("numpy", "arrays"),
    "transformers": Package("transformers", "the models"),
    "peft": Package("peft", "LoRA adapters"),
    "datasets": Package("datasets", "data from the hub"),
    "accelerate": Package("accelerate", "what peft is built on"),
    "safetensors": Package("safetensors", "files of weights"),
    "scikit-learn": Package("sklearn", "metrics"),
    "scipy": Package("scipy", "correlations"),
    "rich": Package("rich", "the display"),
    "pyyaml": Package("yaml", "settings from files"),
    "jinja2": Package("jinja2", "reports"),
    "markupsafe": Package("markupsafe", "reports"),
    "bitsandbytes": Package("bitsandbytes", "bases in 4 bits (NF4)"),
    "flash-attn": Package("flash_attn", "attention on a GPU in half precision, with windows and softcap"),
    "xformers": Package("xformers", "attention on a GPU in float32 and for large heads"),
    "liger-kernel": Package(None, "a peer in the benchmarks"),
    "vllm": Package(None, "nothing yet: sampling is done in process"),
}

BACK_ENDS = ("flash-attn", "varlen", "xformers", "sdpa", "cpu", "torch")  # of attention

# Beside all that begin with FASTPPO_ or TRITON_.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY", "LD_LIBRARY_PATH", "LD_PRELOAD", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CC",
)  # fmt: skip


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of its text, and the same of what it came from."""
    root = error
    for _ in range(10):
        root = root.__cause__ or root
    shown = [_first_line(error), _first_line(root)]
    return shown[0] if root is error else f"{shown[0]}; from {shown[1]}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# -- the steps: each finds one part of the facts --------------------------------------------------------------------------


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "kind": platform.python_implementation(), "path": sys.executable}


def _number(path: Path, pattern: str) -> int | None:
    """The first number that the pattern finds in a file of the system."""
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None


def memory_of_host() -> tuple[int, int | None]:
    """(bytes of the host, or of the container that this runs in; how many of them are free, if that is known)."""
    total, free = (_number(PROC / "meminfo", rf"^{key}:\s+(\d+) kB") for key in ("MemTotal", "MemAvailable"))
    limit, used = _number(CGROUP / "memory.max", r"^(\d+)"), _number(CGROUP / "memory.current", r"^(\d+)")
    spare = _number(CGROUP / "memory.stat", r"^inactive_file (\d+)")  # counted as used: copies of files, given up when needed
    memory = total * 1024 if total else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory_free = free * 1024 if free else None
    if limit is not None and limit < memory:  # a container's
        memory, left = limit, limit - (used or 0) + (spare or 0)
        memory_free = left if memory_free is None else min(left, memory_free)
    return memory, memory_free


def cpu_name() -> str | None:
    """What the processor calls itself, if that is known."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", (PROC / "cpuinfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return found[1].strip() if found else platform.processor() or None


def _system() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_number(CGROUP / "cpu.max", pattern) for pattern in (r"^(\d+) \d+", r"^\d+ (\d+)"))
    memory, memory_free = memory_of_host()
    return {
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": cores,
        "cpu_limit": quota / period if quota and period and quota < cores * period else None,
        "memory": memory,
        "memory_free": memory_free,
    }


def _environment() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith(("FASTPPO_", "TRITON_")))
    return {name: os.environ[name] for name in (*names, *VARIABLES) if name in os.environ}


@functools.cache
def _driver() -> dict[str, Any]:
    """What NVIDIA's driver says, without torch. error: why it says nothing."""
    facts: dict[str, Any] = {"version": None, "cuda": None, "gpus": [], "error": None}
    try:
        text = (PROC / "driver/nvidia/version").read_text()
        found = re.search(r"Kernel Module\D*(\d+(\.\d+)+)", text)
        facts["version"] = found[1] if found else "unknown"
    except (OSError, ValueError):
        pass
    try:
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
            facts["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    except (OSError, AttributeError):
        pass
    keys = ("index", "uuid", "name", "memory.total", "memory.free", "driver_version")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=20,
        )  # fmt: skip
    except FileNotFoundError:
        facts["error"] = "no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        facts["error"] = reason(error)
    else:
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        for row in (row for row in rows if done.returncode == 0 and len(row) == len(keys)):
            index, uuid, name, total, free, facts["version"] = row
            sizes = [int(size) * 2**20 if size.isdecimal() else None for size in (total, free)]
            facts["gpus"].append({"index": index, "uuid": uuid, "name": name, "memory": sizes[0], "memory_free": sizes[1]})
        if not facts["gpus"]:
            said = (done.stdout + done.stderr).split("\n")
            facts["error"] = next((line.strip() for line in said if line.strip()), f"nvidia-smi ended with {done.returncode}")
    return facts


@functools.cache
def _wanted() -> dict[str, tuple[str, bool]]:
    """For each package that fastppo names: its range of versions, and whether it is required on this machine."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return {}
    beside = Path(fastppo.__file__).parents[1] / "pyproject.toml"
    try:
        # Of a checkout, whose metadata is older than this file, or not there.
        project = tomllib.loads(beside.read_text(encoding="utf-8"))["project"]
        if project["name"] != "fastppo":
            raise ValueError
        lines = [(line, False) for extra in project["optional-dependencies"].values() for line in extra]
        lines += [(line, True) for line in project["dependencies"]]
    except (OSError, ValueError, KeyError):
        try:
            lines = [(line, True) for line in importlib.metadata.requires("fastppo") or []]
        except importlib.metadata.PackageNotFoundError:
            return {}
    wanted: dict[str, tuple[str, bool]] = {}
    for line, required in lines:
        parsed = Requirement(line)
        here = parsed.marker is None or parsed.marker.evaluate({"extra": ""})
        wanted[canonicalize_name(parsed.name)] = str(parsed.specifier), required and here
    return wanted


def _in_range(version: str | None, wanted: str) -> bool | None:
    if not version or not wanted:
        return None
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return None


def _installed(name: str) -> dict[str, Any]:
    """What is known of a package without importing it."""
    package = PACKAGES[name]
    wanted, required = _wanted().get(name, ("", False))
    version: str | None = None
    installed = True
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = package.module is not None and _is_there(package.module)
    return {
        "installed": installed, "version": version, "wanted": wanted or None, "required": required,
        "in_range": _in_range(version, wanted), "brings": package.brings, "error": None,
    }  # fmt: skip


def _package(name: str) -> dict[str, Any]:
    """error: why it does not import; None where it does, or was not tried."""
    facts, module = _installed(name), PACKAGES[name].module
    if facts["installed"] and module:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            facts["error"] = reason(error)
    return facts


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return module in sys.modules


def _torch() -> dict[str, Any]:
    """no_gpu: why torch sees none."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    try:
        from fastppo_kernels import row_multiple

        facts["onednn"] = row_multiple(torch.device("cpu"), torch.float32) > 1
    except Exception as error:
        facts["onednn"], facts["onednn_error"] = None, reason(error)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        facts["gpus"], no_gpu = _gpus()
    lines = [str(each.message).strip().splitlines()[0] for each in said if str(each.message).strip()]
    facts["no_gpu"] = _why_no_gpu(facts, [*lines, no_gpu]) if no_gpu else None
    facts["said"] = [] if no_gpu else lines
    return facts


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """(the GPUs that torch sees, why there are none). Nothing here makes a context on a GPU."""
    import torch

    try:
        if not torch.cuda.is_available():
            torch.cuda.init()  # raises what is wrong
            return [], "torch.cuda.is_available() is false"
        kernels = torch.cuda.get_arch_list()
        free = {gpu["uuid"]: gpu["memory_free"] for gpu in _driver()["gpus"]}
        found = []
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            found.append({
                "index": index,
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory": gpu.total_memory,
                "memory_free": free.get(f"GPU-{getattr(gpu, 'uuid', None)}"),
                "has_kernels": not kernels or torch.version.cuda is None or _has_kernels((gpu.major, gpu.minor), kernels),
            })  # fmt: skip
        return found, ""
    except Exception as error:
        return [], reason(error)


def _has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Whether torch was compiled for such a GPU: for its generation, or as code (compute_) that its driver can compile."""
    for kind, major, minor in re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(kernels)):
        built = int(major), int(minor)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _why_no_gpu(facts: dict[str, Any], said: Sequence[str]) -> str:
    driver, visible = _driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if facts["cuda"] is None and facts["rocm"] is None:
        return "this torch is built for the CPU only"
    if facts["rocm"] is None and not driver["version"] and not driver["gpus"]:
        return f"no NVIDIA driver ({driver['error']})"
    if visible is not None and (not visible.strip() or visible.strip() == "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU"
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return said[0] + hidden


def _device() -> Any:
    from fastppo.model.load import pick_device

    return pick_device("auto")


def _back_end(name: str) -> dict[str, Any]:
    """state: "usable", or why it is not in this installation."""
    from fastppo_kernels import attention_backends

    return {"state": attention_backends(name)[name]}  # each on its own: one that breaks hides no other


def _attention() -> dict[str, Any]:
    """taken: the back end that the trainer's calls get; error: why they get none."""
    from fastppo.model.load import pick_dtype
    from fastppo_kernels import chosen_attention_backend

    dtype = pick_dtype("auto", _device())
    facts = {
        "taken": None,
        "taken_for": f"{str(dtype).removeprefix('torch.')}, head size {HEAD_SIZE}, no window",
        "error": None,
    }
    try:
        facts["taken"] = chosen_attention_backend(_device(), dtype, HEAD_SIZE)
    except ValueError as error:
        facts["error"] = str(error)
    return facts


def _kernels() -> dict[str, Any]:
    """triton: "usable", or why it is not. compiler, headers: with what triton compiles its launchers, None if not there."""
    from fastppo_kernels import chosen_kernel_backend, kernel_backends

    headers = Path(sysconfig.get_path("include"), "Python.h")
    chosen = os.environ.get("CC")
    facts: dict[str, Any] = {
        "triton": kernel_backends(_device())["triton"], "taken": None, "error": None,
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "compiler": shutil.which(chosen) if chosen else shutil.which("gcc") or shutil.which("clang"),
        "headers": str(headers) if headers.is_file() else None,
    }  # fmt: skip
    try:
        facts["taken"] = chosen_kernel_backend(_device())
    except ValueError as error:
        facts["error"] = str(error)
    return facts


def _quantisation() -> dict[str, Any]:
    """nf4: "usable", or why it is not."""
    if not _installed("bitsandbytes")["installed"]:
        return {"nf4": "bitsandbytes is not installed"}
    try:
        from fastppo.model.nf4 import obstacle

        return {"nf4": obstacle(_device()) or "usable"}
    except (Exception, SystemExit) as error:
        return {"nf4": reason(error)}


def _measured() -> dict[str, Any]:
    """What the kernels' dispatcher has stored."""
    from fastppo_kernels import measurements

    folder, software, files, error = measurements()
    if folder is None:
        return {"folder": None, "writable": False, "software": software, "files": []}
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    return {
        "folder": str(folder), "writable": there.is_dir() and os.access(there, os.W_OK), "software": software,
        "files": [_measured_file(file) for file in files], "error": None if error is None else reason(error),
    }  # fmt: skip


def _measured_file(file: Any) -> dict[str, Any]:
    facts = {
        "file": str(file.path), "device": file.path.stem, "software": file.software, "current": file.current,
        "choices": file.choices,
    }  # fmt: skip
    return facts if file.error is None else facts | {"error": reason(file.error)}


def _training() -> dict[str, Any]:
    """What `fastppo train` would use with no settings."""
    from fastppo import trainer  # noqa: F401  the engine, whole: whatever does not import shows here
    from fastppo.budget import MOST_TOKENS
    from fastppo.model.load import pick_dtype

    device = _device()
    return {
        "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        "micro_batch_tokens": MOST_TOKENS[device.type],
    }


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "python": _python,
    "system": _system,
    "environment": _environment,
    "driver": _driver,
    **{f"packages.{name}": functools.partial(_package, name) for name in PACKAGES},
    "torch": _torch,
    **{f"backends.{name}": functools.partial(_back_end, name) for name in BACK_ENDS},
    "attention": _attention,
    "kernels": _kernels,
    "quantisation": _quantisation,
    "measured": _measured,
    "training": _training,
}


# -- the process that looks -----------------------------------------------------------------------------------------------

# With the paths of this process, for the command may have been started in other ways than `python -m`.
_START = "import json, sys; sys.path[:], steps = json.loads(sys.argv[1]); from fastppo.machine import report; report(steps)"


def report(steps: Sequence[str]) -> None:
    """Does the steps, writes a line of JSON to stdout before and after each, and ends the process."""
    lines = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is not to come between
    for step in steps:
        print(json.dumps([step, None]), file=lines, flush=True)
        try:
            facts = STEPS[step]()
        except (Exception, SystemExit) as error:
            facts = {"error": reason(error)}
        print(json.dumps([step, facts]), file=lines, flush=True)
    os._exit(0)  # past what libraries do at the end, which can fail as well


def look(steps: Sequence[str] = tuple(STEPS)) -> dict[str, Any]:
    """The facts of each step under its name, `packages.torch` as `["packages"]["torch"]`; `error` in those that failed."""
    facts: dict[str, Any] = {}
    left = list(steps)
    while left:
        found, end = _run(left)
        step, value = found[-1] if found else (left[0], None)
        for done, its_facts in found:
            if its_facts is not None:
                _put(facts, done, its_facts)
        if value is None:
            name = step.removeprefix("packages.")
            _put(facts, step, (_installed(name) if name in PACKAGES else {}) | {"error": end})
        left = left[left.index(step) + 1 :]
    return facts


def _put(facts: dict[str, Any], step: str, value: dict[str, Any]) -> None:
    section, _, name = step.partition(".")
    if name:
        facts.setdefault(section, {})[name] = value
    else:
        facts[section] = value


def _run(steps: Sequence[str]) -> tuple[list[list[Any]], str]:
    """(the lines that a process reported, how it ended if it did not reach the end)."""
    command = [sys.executable, "-P", "-c", _START, json.dumps([[str(path) for path in sys.path], steps])]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S)
        out, status = done.stdout, done.returncode
        said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        how = SIGNALS.get(-status, f"exit status {status}")
        end = f"ended the process with {how}" + (f": {said[-1][:300]}" if said else "")
    except subprocess.TimeoutExpired as late:
        out, end = late.stdout or b"", f"no answer within {PATIENCE_S} s"
    lines = [json.loads(line) for line in out.decode("ascii").splitlines(keepends=True) if line.endswith("\n")]
    return lines, end
