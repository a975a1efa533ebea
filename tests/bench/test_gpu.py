"""`python -m bench.gpu --check`: what it says of ops that are right, of ops that are wrong, and of machines without a GPU."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import fastppo_kernels
from bench import gpu
from bench.gpu_checks import cases, worker
from bench.gpu_checks.case import Case, converted, evaluate
from bench.gpu_checks.checks import CHECKS, check_error, read_sanitizer
from bench.gpu_checks.interpreter import exact_bfloat16

CPU = torch.device("cpu")
SMALL = [case for case in cases() if case.small is not None]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="there is no triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the command itself is the test there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning"),
]


def run(tmp_path, capsys, *arguments: str) -> tuple[int, list[str], dict]:
    """In this process: exit status, lines, and what was written."""
    out = tmp_path / "figures.json"
    status = gpu.main(["--check", "--device", "cpu", "--out", str(out), *arguments])
    return status, capsys.readouterr().out.splitlines(), json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_case_is_right_in_the_interpreter(case):
    """In one dtype: the tests of the kernels have the others."""
    with exact_bfloat16():
        outcome = check_error(replace(case, dtypes=(case.main_dtype,)), CPU, small=True)
    assert outcome.ok, outcome.text


# No op: the types of arguments, what says which libraries are there, what the tests of `patch_peft` have.
WITHOUT_A_CASE = {"DecoderWeights", "KLEstimator", "LoRAProjection", "NF4Weight", "TreeLayout"}
WITHOUT_A_CASE |= {"adapter_mask", "attention_backends", "unpatch_peft"}
WITHOUT_A_CASE |= {"chosen_attention_backend", "chosen_decode_backend", "chosen_kernel_backend", "kernel_backends"}
WITHOUT_A_CASE |= {"measurements"}
WITHOUT_A_CASE |= {"fold_lora"}  # for the sampler on a CPU
WITHOUT_A_CASE |= {"frozen_linear", "row_multiple"}  # on a GPU torch's own product, and 1
WITHOUT_A_CASE |= {"AttentionMemory", "attention_memory"}  # a count for CPUs


def test_every_public_name_has_a_case():
    covered = {name for case in cases() for name in case.ops}
    assert set(fastppo_kernels.__all__) <= covered | WITHOUT_A_CASE and not covered & WITHOUT_A_CASE
    assert len({case.name for case in cases()}) == len(cases())


def test_every_op_comes_once_before_any_comes_again():
    ops = [case.ops for case in cases()]
    assert len(set(ops[: len(set(ops))])) == len(set(ops)) and ops[0] == ("token_logprob",)


def test_without_a_gpu_one_line_and_status_2(capsys):
    for arguments in ([], ["--check"], ["--list"]):
        assert gpu.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("there is no CUDA GPU") and err.count("\n") == 1


def test_it_checks_only_what_it_is_told_to(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--check", "--device", "cpu", "--only", "nothing"])
    assert stopped.value.code == 2 and "no case has nothing in its name" in capsys.readouterr().err.splitlines()[-1]


def test_what_the_sanitizer_runs_can_be_imported_without_a_gpu():
    from bench.gpu_checks import once

    assert callable(once.main)


def test_what_it_prints_and_keeps(tmp_path, capsys):
    status, lines, kept = run(tmp_path, capsys, "--only", "token_logprob 1000", "ppo_loss 1 token")
    assert status == 0 and len(lines) == 3 and lines[-1].startswith("2 cases, 0 failed")
    for line in lines[:-1]:
        assert line.startswith("ok  ") and "3 runs equal" in line and "compiled equal" in line and "bf16 0." in line
    assert kept["complete"] and kept["machine"]["versions"]["torch"] == torch.__version__
    figures = kept["cases"]["token_logprob 1000 x 50257, softcap, in place"]["error"]["figures"]["fp16"]["d logits"]
    assert 0 < figures["error"] <= figures["allowed"]


def broken(monkeypatch, change) -> None:
    """Let the Triton form of `token_logprob` give what `change` makes of its log-probabilities."""
    from bench.gpu_checks import heads

    right = heads.token_logprob

    def wrong(logits, targets, *, backend, **how):
        logprob, entropy = right(logits, targets, backend=backend, **how)
        return (change(logprob), entropy) if backend == "triton" else (logprob, entropy)

    monkeypatch.setattr(heads, "token_logprob", wrong)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x + 1e-3, "fp32 logprob"),
        (lambda x: torch.where(torch.arange(len(x)) == 2, torch.nan, x), "fp32 logprob"),
        (lambda x: x.double(), "logprob is torch.float64"),
        (lambda x: x * (1 + 1e-7 * torch.rand(())), "differs in"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
        (lambda x: x if float(x.detach()[0]) < 1 else x * 2, "compile: "),
    ],
    ids=["a little off", "one NaN", "another dtype", "not the same twice", "raises", "looks at values"],
)
def test_a_broken_op_fails(tmp_path, capsys, monkeypatch, change, said):
    broken(monkeypatch, change)
    if not said.startswith("compile"):
        monkeypatch.setattr(worker, "ON_CPU", ("error", "determinism"))
    status, lines, kept = run(tmp_path, capsys, "--only", "token_logprob 1000", "whiten, scaled")
    assert status == 1 and lines[0].startswith("FAIL  token_logprob 1000") and said in lines[0]
    assert lines[1].startswith("ok    whiten") and lines[2].startswith("2 cases, 1 failed")  # the others are still checked
    assert not all(check["ok"] for check in kept["cases"]["token_logprob 1000 x 50257, softcap, in place"].values())


def test_a_gradient_that_is_off_or_not_there_fails():
    def make(device, dtype, seed):
        return {"x": torch.linspace(1, 2, 5, dtype=dtype), "y": torch.ones(5, dtype=dtype)}

    def off(inputs, backend):
        x = inputs["x"]
        return {"out": x * inputs["y"] + (x - x.detach()) * (1e-2 if backend == "triton" else 0)}

    def absent(inputs, backend):
        return {"out": inputs["x"] * (inputs["y"].detach() if backend == "triton" else inputs["y"])}

    right = Case("right", (), make, lambda inputs, backend: {"out": inputs["x"] * inputs["y"]}, ("x", "y"), make)
    assert check_error(right, CPU, small=True).ok
    outcome = check_error(replace(right, forward=off), CPU, small=True)
    assert not outcome.ok and "fp32 d x: 0.01" in outcome.text
    with pytest.raises(ValueError, match="results .*'d y'"):
        check_error(replace(right, forward=absent), CPU, small=True)


def test_a_place_that_nothing_writes_is_seen():
    def make(device, dtype, seed):
        return {"x": torch.zeros(4, dtype=dtype)}

    def forward(inputs, backend):
        return {"out": torch.empty_like(inputs["x"]) if backend == "triton" else inputs["x"].clone()}

    assert not check_error(Case("unwritten", (), make, forward, (), make), CPU, small=True).ok


def test_a_run_that_is_cut_off_has_kept_what_it_did(tmp_path, monkeypatch):
    def interrupted(case, device, *, small):
        if case.name.startswith("whiten"):
            raise KeyboardInterrupt
        return check_error(case, device, small=small)

    monkeypatch.setitem(CHECKS, "error", interrupted)
    out = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--check", "--device", "cpu", "--out", str(out), "--only", "ppo_loss 0 tokens", "whiten, scaled"])
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert list(kept["cases"]) == ["ppo_loss 0 tokens"] and not kept["complete"]


def test_inputs_depend_on_the_seed_alone():
    """A graph is replayed with the inputs of another seed: everything but their values must be the same."""
    for case in SMALL:
        if case.ops == ("patch_peft",):  # a whole model takes its time
            continue
        one, same, other = (case.inputs(CPU, case.main_dtype, seed, small=True) for seed in (1, 1, 2))
        for name, x in one.items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(x.nan_to_num(), same[name].nan_to_num())
                assert x.shape == other[name].shape and x.dtype == other[name].dtype and x.stride() == other[name].stride()
        if any(isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 1 for x in one.values()):
            assert any(isinstance(x, torch.Tensor) and not torch.equal(x, other[name]) for name, x in one.items()), case.name


def test_cotangents_do_not_depend_on_the_precision():
    case = next(case for case in cases() if case.name.startswith("ppo_loss 524287"))
    inputs = case.inputs(CPU, torch.bfloat16, 1, small=True)
    rounded = evaluate(case, inputs, "torch", torch.bfloat16)
    exact = evaluate(case, converted(inputs, torch.float64), "torch", torch.bfloat16)
    torch.testing.assert_close(rounded["d values"].double(), exact["d values"], rtol=1e-2, atol=1e-5)


SANITIZED = """========= COMPUTE-SANITIZER
== fine
done
== two errors
========= Invalid __global__ write of size 4 bytes
=========     at whiten_kernel+0x1f0 in file.py:10
=========     by thread (32,0,0) in block (0,0,0)
=========
========= Error: Race reported between Write access at a_kernel+0x10 in file.py:3
=========     and Read access at a_kernel+0x20 in file.py:4 [48 hazards]
=========
done
== killed
========= ERROR SUMMARY: 2 errors
"""


def test_what_compute_sanitizer_says_is_told_by_case():
    found = read_sanitizer(SANITIZED, 99, "memcheck", ["fine", "two errors", "killed", "not reached"])
    assert {name: outcome.ok for name, outcome in found.items()} == {
        "fine": True, "two errors": False, "killed": False, "not reached": False
    }  # fmt: skip
    assert found["two errors"].text == "memcheck: 2 errors, first: Invalid __global__ write of size 4 bytes"
    ours = read_sanitizer(SANITIZED, 99, "racecheck", ["two errors"], {"whiten_kernel"})["two errors"]
    assert len(ours.figures["records"]) == 1 and not ours.ok
    assert read_sanitizer(SANITIZED, 99, "racecheck", ["two errors"], {"another_kernel"})["two errors"].ok
    assert found["killed"].text == "memcheck ended in it (status 99)" and "did not come to it" in found["not reached"].text
