"""Timing, memory, ceilings and peers do what they say."""

import os
import subprocess
import sys
import time

import pytest
import torch

from bench import limits, peers, timing
from bench.memory import peak
from bench.record import ROOT

CPU = torch.device("cpu")
MIB = 2**20


def of(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_peak_is_the_most_that_was_alive_at_once():
    def call():
        first, second = of(3), of(4)
        del first
        third = of(2)
        del second, third
        of(5)

    assert peak(call) == 7 * MIB


def test_peak_counts_from_the_start_and_never_below():
    kept = [of(8)]
    assert peak(lambda: of(2)) == 2 * MIB
    assert peak(kept.clear) == 0


def test_peak_sees_backward():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB
    # Saved: the sigmoid. In backward beside it: its gradient and that of x.
    forward, both = peak(lambda: x.sigmoid().sum()), peak(lambda: torch.autograd.grad(x.sigmoid().sum(), x))
    assert MIB <= forward < 2 * MIB < both <= 4 * MIB


def test_peak_of_many_allocations():
    def call():
        for _ in range(20_000):
            torch.empty(100)

    assert peak(call) == 400


def test_samples_are_taken_in_turn(monkeypatch):
    order = []
    found = timing.samples({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, 0.0, least=4)
    assert {name: len(each.ms) for name, each in found.items()} == {"a": 4, "b": 4}
    rounds = "".join(order)[2 * timing.WARM_UPS :]
    blocks = [block for block in rounds.replace("ab", "a b").replace("ba", "b a").split()]
    assert [block[0] for block in blocks] == ["a", "b"] * 4


def test_samples_know_the_longer_call_and_keep_to_the_budget():
    calls = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}
    begun = time.perf_counter()
    found = timing.samples(calls, CPU, 0.1, least=3)
    assert time.perf_counter() - begun < 2.0
    assert found["short"].median < found["long"].median and found["long"].median >= 10.0
    assert all(ratio > 1 for ratio in timing.ratios(found["long"], found["short"]))


def test_quartiles():
    assert timing.Samples([1.0, 2.0, 3.0, 4.0, 5.0]).quartiles == (2.0, 4.0)
    assert timing.Samples([2.0]).quartiles == (2.0, 2.0)


def test_ceilings(monkeypatch):
    monkeypatch.setattr(limits, "_SMALL_GEMMS", ((64, 32, 16), (64, 64, 64)))
    monkeypatch.setattr(limits, "_SMALL_COPY", MIB)
    found = limits.ceilings(CPU, seconds=0.0)
    assert [(name, figure.unit) for name, figure in found.items()] == [
        ("GEMM 64 x 32 x 16", "TFLOP/s"), ("GEMM 64 x 64 x 64", "TFLOP/s"), ("GEMM", "TFLOP/s"), ("copy", "GB/s")
    ]  # fmt: skip
    assert found["GEMM"].value == max(found["GEMM 64 x 32 x 16"].value, found["GEMM 64 x 64 x 64"].value)
    assert all(figure.value > 0 and figure.raw for figure in found.values())


def test_rates_are_of_what_is_multiplied_and_moved(monkeypatch):
    monkeypatch.setattr(limits, "samples", lambda calls, *args, **how: {name: timing.Samples([2.0]) for name in calls})
    monkeypatch.setattr(limits, "_SMALL_GEMMS", ((100, 200, 50),))
    found = limits.ceilings(CPU)
    assert found["GEMM"].value == pytest.approx(2 * 100 * 200 * 50 / 2e-3 / 1e12)
    assert found["copy"].value == pytest.approx(2 * 2**26 / 2e-3 / 1e9)


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    assert peers.missing("peft") is None
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.missing("TRL") == "TRL is not installed: pip install -c constraints.txt -e .[peers]"
    assert peers.missing("flash-attn") == "flash-attn is not installed: pip install -e .[flash]"


def test_pytest_bench_without_its_plugin_is_one_line():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = [line for line in (found.stdout + found.stderr).splitlines() if line.strip()]
    assert found.returncode == 4 and said == ["ERROR: pytest bench needs pytest-benchmark: pip install 'fastppo[bench]'"]


def test_pytest_bench_measures_and_prints_a_table(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:cacheprovider", "-q", "-k",
               "swiglu_lora", f"--benchmark-json={tmp_path / 'found.json'}"]  # fmt: skip
    # A worker of xdist hands on what makes pytest-benchmark think that it is one, too.
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    start = lines.index("swiglu_lora fwd M512 N352 r32 fp32")
    assert lines[start + 1].split()[:3] == ["form", "median", "IQR"]
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["fastppo", "torch", "limit"]
    assert (tmp_path / "found.json").exists()
