"""`fastppo doctor`: what it finds, with stand-ins for what is not here; what follows from it; the page and the JSON object."""

import functools
import importlib
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastppo import cli, doctor, machine
from fastppo.track import Console
from fastppo_kernels import _measure, attention_backends

REPO = Path(__file__).resolve().parents[1]
GIB = 2**30
CHOICE = "lora_linear 64 x 8 -> 8 torch.bfloat16"


def command(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([env.pop("FAKES", ""), str(REPO), str(REPO / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "fastppo", *argv],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths.strip(os.pathsep), **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """`fastppo doctor --json` on this machine, where something was measured, some of it by others, and a file is damaged."""
    folder = tmp_path_factory.mktemp("measured")
    for name, software in (("this_gpu", _measure._software()), ("old_gpu", "torch 1.0")):
        (folder / f"{name}.json").write_text(json.dumps({"software": software, "choices": {CHOICE: "buffer"}}))
    (folder / "bad_gpu.json").write_text('{"software": ')
    empty = tmp_path_factory.mktemp("empty")
    return command("doctor", "--json", cwd=empty, FASTPPO_KERNELS_CACHE=str(folder), TRITON_ODD="a\x1b[31m")


@pytest.fixture
def examined(run) -> dict[str, Any]:
    return json.loads(run.stdout)


@pytest.fixture
def facts(examined) -> dict[str, Any]:
    """Without what follows from them."""
    return {key: value for key, value in examined.items() if key not in ("fastppo", "can_train", "why_not", "warnings")}


@pytest.fixture(autouse=True)
def _forgetful():
    """What is looked up once a process is looked up anew in every test."""
    for found in (machine._driver, machine._wanted):
        found.cache_clear()
    yield
    for found in (machine._driver, machine._wanted):
        found.cache_clear()


def page(facts: dict[str, Any], **options: Any) -> str:
    file = io.StringIO()
    doctor.show(facts, Console(file=file, **options))
    return file.getvalue()


# -- this machine ---------------------------------------------------------------------------------------------------------


def test_the_object_is_all_there_is_on_stdout_and_training_can_run_here(run, examined):
    assert (run.returncode, run.stderr) == (0, "")
    assert examined["can_train"] is True and examined["why_not"] == []
    assert {step.partition(".")[0] for step in machine.STEPS} <= examined.keys()
    assert examined["packages"].keys() == machine.PACKAGES.keys() and examined["backends"].keys() == set(machine.BACK_ENDS)


def test_it_finds_what_is_true_of_this_process(facts):
    assert facts["torch"]["version"] == torch.__version__ == facts["packages"]["torch"]["version"]
    assert bool(facts["torch"]["gpus"]) == torch.cuda.is_available() == (facts["torch"]["no_gpu"] is None)
    assert {name: found["state"] for name, found in facts["backends"].items()} == attention_backends()
    assert facts["environment"]["TRITON_ODD"] == "a\x1b[31m"
    assert Path(facts["python"]["path"]) == Path(sys.executable)
    assert 0 < facts["system"]["memory_free"] <= facts["system"]["memory"]
    if not torch.cuda.is_available():
        assert (facts["attention"]["taken"], facts["kernels"]["taken"]) == ("cpu", "torch")
        assert (facts["training"]["device"], facts["training"]["dtype"]) == ("cpu", "float32")


def test_what_was_measured_is_listed_with_what_is_not_used_and_what_is_damaged(examined):
    files = {file["device"]: file for file in examined["measured"]["files"]}
    assert files["this_gpu"]["choices"] == files["old_gpu"]["choices"] == {CHOICE: "buffer"}
    assert (files["this_gpu"]["current"], files["old_gpu"]["current"]) == (True, False)
    assert files["bad_gpu"]["error"].startswith("JSONDecodeError") and files["bad_gpu"]["choices"] == {}
    assert any("bad_gpu.json cannot be read" in warning for warning in examined["warnings"])


def test_the_page_holds_the_facts_of_the_object_one_a_line_and_nothing_that_moves_the_cursor(examined):
    text = page(examined)
    lines = text.splitlines()
    assert (
        lines[0]
        == f"fastppo {examined['fastppo']}: training can run here, on {examined['training']['device']} in "
        + (examined["training"]["dtype"])
    )
    assert "\x1b" not in text and any(line.split() == ["TRITON_ODD", "a\\x1b[31m"] for line in lines)
    for warning in examined["warnings"]:
        assert f"- {warning}" in lines
    for name, package in examined["packages"].items():
        [line] = [line for line in lines if line.split()[:1] == [name] and ("not installed;" in line or package["installed"])][
            :1
        ]
        assert (package["version"] or "not installed") in line
    for name, found in examined["backends"].items():
        assert any(line.split()[:1] == [name] and line.endswith(found["state"]) for line in lines)
    found = {**examined["system"], **examined["torch"], **examined["attention"], **examined["measured"]}
    shown = [found[key] for key in ("os", "cpu_capability", "taken_for", "folder")] + ["lora_linear: buffer, 1 of its shapes"]
    shown += [examined["python"]["version"], "not used: by torch 1.0", f"{examined['training']['micro_batch_tokens']:,} tokens"]
    shown += [gpu["name"] for gpu in found["gpus"]] or [found["no_gpu"]]
    for text_of_fact in shown:
        assert text_of_fact in text


def test_the_page_folds_on_a_narrow_terminal(examined):
    text = page(examined, force_terminal=True, color_system=None, width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert "".join(examined["measured"]["folder"].split()) in "".join(text.split())


@pytest.mark.parametrize("step", machine.STEPS)
def test_no_step_is_needed_for_the_page(facts, step):
    known = facts["packages"].get(step.removeprefix("packages."), {})
    machine._put(facts, step, known | {"error": "went wrong"})
    assert "went wrong" in page(doctor.examined(facts))


def test_exit_status_and_output_of_the_command(facts, monkeypatch, capsys):
    monkeypatch.setattr(machine, "look", lambda: facts)
    assert cli.main(["doctor"]) == 0
    assert "training can run here" in capsys.readouterr().out
    facts["training"] = {"error": "RuntimeError: no luck"}
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "training cannot run here" in out and "- the trainer: RuntimeError: no luck" in out
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["why_not"] == ["the trainer: RuntimeError: no luck"]


def test_a_broken_required_package_is_a_line_and_exit_status_1(tmp_path):
    fakes = tmp_path / "fakes"
    (fakes / "peft").mkdir(parents=True)
    (fakes / "peft" / "__init__.py").write_text(
        "print('noise')\nraise OSError('libx.so: \\x1b[2J cannot open\\nsecond line')\n"
    )
    done = command("doctor", cwd=tmp_path, FAKES=str(fakes))
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert lines[0].endswith("training cannot run here")
    assert lines[3] == "- peft cannot be imported: OSError: libx.so: \\x1b[2J cannot open" and lines[4] == ""
    assert "noise" not in done.stdout and "second line" not in done.stdout and "Traceback" not in done.stdout


# -- packages that are not as they should be ------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a package of this name and code that is found before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    return make


def test_what_ends_the_process_costs_its_own_step_only(fake):
    fake("flash_attn", "print('noise')\nraise RuntimeError('undefined symbol: x\\nmore')\n")
    fake("xformers", "import os, sys\nsys.stderr.write('terminate called\\n')\nsys.stderr.flush()\nos.abort()\n")
    fake("bitsandbytes", "import os\nos._exit(0)\n")
    fake("datasets", "raise SystemExit('go away')\n")
    names = ("flash-attn", "xformers", "datasets", "bitsandbytes")
    found = machine.look([*(f"packages.{name}" for name in names), "python"])
    assert {name: found["packages"][name]["error"] for name in names} == {
        "flash-attn": "RuntimeError: undefined symbol: x",
        "xformers": "ended the process with SIGABRT: terminate called",
        "datasets": "SystemExit: go away",
        "bitsandbytes": "ended the process with exit status 0",
    }
    assert found["packages"]["xformers"]["required"] is False and found["packages"]["datasets"]["required"] is True
    assert found["python"]["version"]


def test_what_never_comes_back_is_not_waited_for(fake, monkeypatch):
    fake("xformers", "import time\ntime.sleep(600)\n")
    monkeypatch.setattr(machine, "PATIENCE_S", 1)
    assert machine.look(["packages.xformers"])["packages"]["xformers"]["error"] == "no answer within 1 s"


def test_reason_names_what_an_error_came_from():
    try:
        try:
            raise OSError("libx.so\nsecond line")
        except OSError as error:
            raise ImportError("\n  cannot import y  \n") from error
    except ImportError as error:
        assert machine.reason(error) == "ImportError: cannot import y; from OSError: libx.so"
    assert machine.reason(ValueError()) == "ValueError"


def test_packages_and_back_ends_are_those_of_the_project():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(line).name): Requirement(line) for line in project["dependencies"]}
    assert needed.keys() <= machine.PACKAGES.keys()
    wanted = machine._wanted()
    for name, requirement in needed.items():
        assert wanted[name] == (str(requirement.specifier), requirement.marker is None or requirement.marker.evaluate())
    assert wanted["bitsandbytes"] == (">=0.50", False)
    assert machine.BACK_ENDS == tuple(attention_backends())


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [("2.13.0+cpu", ">=2.11", True), ("2.12.0.dev1", ">=2.11", True), ("2.10", ">=2.11", False), ("x", ">=1", None)],
)
def test_range_of_versions(version, wanted, fits):
    assert machine._in_range(version, wanted) is fits


# -- GPUs that are not here -----------------------------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path, monkeypatch) -> Path:
    """An empty /proc and /sys/fs/cgroup, and no nvidia-smi."""
    for name, folder in (("PROC", "proc"), ("CGROUP", "cgroup")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(machine, name, tmp_path / folder)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=_driver_is_for_cuda_12_4))
    return tmp_path


def _driver_is_for_cuda_12_4(number: Any) -> int:
    number._obj.value = 12040
    return 0


def nvidia_smi(proc: Path, text: str, status: int = 0) -> None:
    (proc / "bin").mkdir(exist_ok=True)
    (proc / "text").write_text(text)
    script = proc / "bin" / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <'{proc / 'text'}'\nexit {status}\n")
    script.chmod(0o755)


def fake_gpu(monkeypatch, capability: tuple[int, int] = (9, 0)) -> None:
    """torch sees one GPU, on which nothing could be computed."""
    importlib.import_module("fastppo.trainer")  # now: some libraries look for a GPU while they are imported
    major, minor = capability
    gpu = SimpleNamespace(name="H\x07100", major=major, minor=minor, total_memory=80 * GIB, uuid="a-b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(sys.modules["fastppo_kernels.attention"], "_found", {})


def test_a_gpu_and_how_much_of_it_others_hold(proc, monkeypatch, facts):
    fake_gpu(monkeypatch)
    nvidia_smi(proc, "0, GPU-x-y, A100, 40960, [N/A], 550.1\n1, GPU-a-b, H100, 81920, 4096, 550.1\n")
    facts |= {"torch": machine._torch(), "driver": machine._driver(), "training": machine._training()}
    assert facts["driver"]["version"] == "550.1" and facts["driver"]["cuda"] == "12.4"
    assert [gpu["memory_free"] for gpu in facts["driver"]["gpus"]] == [None, 4 * GIB]
    [gpu] = facts["torch"]["gpus"]
    assert (gpu["capability"], gpu["memory"], gpu["memory_free"], gpu["has_kernels"]) == ("9.0", 80 * GIB, 4 * GIB, True)
    examined = doctor.examined(facts)
    assert examined["can_train"] is True
    assert "GPU 0 has only 4.0 GiB of 80.0 GiB free: another process works there" in examined["warnings"]
    assert "H\\x07100, compute capability 9.0, 80.0 GiB, 4.0 GiB free" in page(examined)


def test_what_training_takes_on_a_gpu_is_what_the_trainer_says(monkeypatch):
    fake_gpu(monkeypatch)
    assert machine._training() | {"micro_batch_tokens": 0} == {"device": "cuda", "dtype": "bfloat16", "micro_batch_tokens": 0}
    for name in ("FASTPPO_ATTENTION", "FASTPPO_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    states = {name: machine._back_end(name)["state"] for name in machine.BACK_ENDS}
    assert machine._attention()["taken"] == next(name for name in machine.BACK_ENDS if states[name] == "usable")
    assert machine._attention()["taken_for"].startswith("bfloat16")
    monkeypatch.setenv("FASTPPO_ATTENTION", "flash")
    assert machine._attention()["error"].startswith("FASTPPO_ATTENTION must be one of auto, flash-attn")


@pytest.mark.parametrize(
    ("capability", "usable"), [((7, 0), False), ((7, 5), True), ((8, 6), True), ((10, 0), False), ((12, 1), True)]
)
def test_a_torch_without_kernels_for_the_gpu_cannot_train(proc, monkeypatch, facts, capability, usable):
    fake_gpu(monkeypatch, capability)
    examined = doctor.examined(facts | {"torch": machine._torch()})
    assert examined["can_train"] is usable
    assert usable or examined["why_not"][0].startswith("this torch has no kernels for H\x07100 (compute capability")


@pytest.mark.parametrize(
    ("cuda", "driver", "visible", "expected", "warned"),
    [
        (None, None, None, "this torch is built for the CPU only", None),
        (None, "550.1", None, "this torch is built for the CPU only", "install torch's CUDA build"),
        ("12.6", None, None, "no NVIDIA driver (no nvidia-smi)", None),
        ("12.6", "550.1", "", "CUDA_VISIBLE_DEVICES is '', which hides every GPU", "CUDA_VISIBLE_DEVICES is ''"),
        ("12.6", "550.1", "-1", "CUDA_VISIBLE_DEVICES is '-1', which hides every GPU", "CUDA_VISIBLE_DEVICES is '-1'"),
        ("12.6", "550.1", "7", "RuntimeError: too old (CUDA_VISIBLE_DEVICES is '7')", "too old"),
        (
            "12.6",
            "550.1",
            None,
            "RuntimeError: too old",
            "an NVIDIA driver is here, and torch sees no GPU: RuntimeError: too old",
        ),
    ],
)
def test_why_torch_sees_no_gpu(proc, monkeypatch, facts, cuda, driver, visible, expected, warned):
    def fail() -> None:
        raise RuntimeError("too old\nmore")

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if driver:
        nvidia_smi(proc, f"0, GPU-a-b, H100, 81920, 4096, {driver}\n")
    facts |= {"torch": machine._torch(), "driver": machine._driver()}
    assert (facts["torch"]["gpus"], facts["torch"]["no_gpu"]) == ([], expected)
    examined = doctor.examined(facts)
    assert examined["can_train"] and expected in page(examined)
    about = [line for line in examined["warnings"] if line.startswith("an NVIDIA driver")]
    assert len(about) == (warned is not None) and all(warned in line for line in about)


def test_a_driver_that_answers_with_an_error(proc):
    nvidia_smi(proc, "\nNVIDIA-SMI has failed: no \x1b driver\nmore\n", status=9)
    (proc / "proc" / "driver" / "nvidia").mkdir(parents=True)
    (proc / "proc" / "driver" / "nvidia" / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  x\n"
    )
    found = machine._driver()
    assert (found["version"], found["gpus"], found["error"]) == ("550.54.15", [], "NVIDIA-SMI has failed: no \x1b driver")


def test_limits_of_a_container(proc, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (proc / "proc" / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    (proc / "proc" / "meminfo").write_text("MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n")
    free = machine._system()
    assert (free["cpu"], free["cores"], free["cpu_limit"]) == ("Some CPU @ 3 GHz", 8, None)
    assert (free["memory"], free["memory_free"]) == (32 * GIB, 16 * GIB)
    (proc / "cgroup" / "cpu.max").write_text("150000 100000\n")
    (proc / "cgroup" / "memory.max").write_text(f"{4 * GIB}\n")
    (proc / "cgroup" / "memory.current").write_text(f"{3 * GIB}\n")
    (proc / "cgroup" / "memory.stat").write_text(f"anon 5\ninactive_file {2 * GIB}\n")
    bound = machine._system()
    assert (bound["cpu_limit"], bound["memory"], bound["memory_free"]) == (1.5, 4 * GIB, 3 * GIB)
    (proc / "cgroup" / "cpu.max").write_text("max 100000\n")
    (proc / "cgroup" / "memory.max").write_text("max\n")
    assert machine._system() == free


# -- what follows from the facts ------------------------------------------------------------------------------------------

GPU = {"index": 0, "name": "T4", "capability": "7.5", "memory": 16 * GIB, "memory_free": 15 * GIB, "has_kernels": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"packages.torch.in_range": False, "packages.torch.version": "2.9"}, "torch 2.9 is outside fastppo's range >="),
        ({"packages.xformers.error": "OSError: x"}, "xformers is installed and cannot be imported: OSError: x"),
        (
            {"packages.triton.version": "3.6.0", "packages.numpy.version": "2.4.1", "environment.TRITON_INTERPRET": "1"},
            "triton before 3.7 cannot interpret kernels with numpy 2.4 or newer",
        ),
        ({"torch.gpus": [GPU], "environment.TRITON_INTERPRET": "1"}, "Triton kernels run in an interpreter"),
        ({"torch.gpus": [GPU], "training.dtype": "bfloat16"}, "T4 computes bfloat16 slowly"),
        ({"torch.gpus": [GPU], "environment.FASTPPO_KERNELS": "torch"}, "FASTPPO_KERNELS=torch switches"),
        ({"torch.gpus": [GPU], "environment.FASTPPO_ATTENTION": "torch"}, "FASTPPO_ATTENTION=torch switches"),
        ({"torch.gpus": [GPU], "kernels.taken": "triton", "kernels.compiler": None}, "triton finds no C compiler"),
        (
            {"torch.gpus": [GPU], "kernels.taken": "triton", "kernels.compiler": "gcc", "kernels.headers": None},
            "triton finds no Python.h",
        ),
        ({"torch.gpus": [GPU], "measured.writable": False}, "every process measures again"),
        ({"torch.said": ["GPU too old"]}, "torch: GPU too old"),
        ({"environment.CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING=1: every launch is waited for"),
        ({"system.cores": 8, "system.cpu_limit": 1.5, "torch.threads": 8}, "torch uses 8 threads where 1.5 cores may be used"),
        (
            {"system.cores": 8, "torch.threads": 1, "environment.OMP_NUM_THREADS": "1", "torch.gpus": []},
            "torch uses 1 of 8 cores (OMP_NUM_THREADS=1",
        ),
    ],
)
def test_traps_are_warned_of_and_only_then(facts, changes, expected):
    def of(facts: dict[str, Any]) -> list[str]:
        return [line for line in doctor.traps(facts) if expected in line]

    facts["environment"] = {}
    facts["system"] |= {"cpu_limit": None, "cores": 1}
    facts["torch"] |= {"gpus": [], "threads": 1, "said": []}
    facts["measured"]["writable"] = True
    assert of(facts) == []
    for key, value in changes.items():
        *path, last = key.split(".")
        functools.reduce(dict.__getitem__, path, facts)[last] = value
    assert len(of(facts)) == 1
    assert page(doctor.examined(facts)).count(expected) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"installed": False, "version": None}, "peft is not installed: pip install 'peft>=0.19'"),
        ({"error": "OSError: x"}, "peft cannot be imported: OSError: x"),
    ],
)
def test_a_required_package_that_is_not_there_is_the_only_reason_named(facts, changes, expected):
    facts["packages"]["peft"] |= changes
    facts["training"] = {"error": "ImportError: peft"}
    assert doctor.examined(facts)["why_not"] == [expected]


def test_missing_optional_packages_are_no_reason(facts):
    for name in ("xformers", "flash-attn", "bitsandbytes", "vllm", "liger-kernel"):
        facts["packages"][name] |= {"installed": False, "version": None, "error": None}
    examined = doctor.examined(facts)
    assert examined["can_train"]
    assert "not installed; brings bases in 4 bits (NF4)" in page(examined)


def test_a_required_package_that_the_trainer_does_without_is_a_warning(facts):
    facts["packages"]["triton"] |= {"installed": False, "version": None, "wanted": ">=3.6", "required": True}
    examined = doctor.examined(facts)
    assert examined["can_train"] and "triton is not installed: pip install 'triton>=3.6'" in examined["warnings"]


def test_kernels_that_would_be_taken_and_cannot_run_are_a_reason(facts):
    facts["kernels"] |= {"taken": "triton", "triton": "ImportError: libtriton.so"}
    assert doctor.examined(facts)["why_not"] == [
        "the Triton kernels would be taken and cannot run (ImportError: libtriton.so); FASTPPO_KERNELS=torch does without them"
    ]
