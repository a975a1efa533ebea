"""Products with frozen weights: the same numbers by whichever library, and when which one is asked."""

import pytest
import torch

from fastppo_kernels import frozen_linear, row_multiple

FLOAT = torch.device("cpu"), torch.float32
needs_onednn = pytest.mark.skipif(row_multiple(*FLOAT) == 1, reason="oneDNN is no faster than MKL on this CPU")


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 63, 64, 192, 250])
@pytest.mark.parametrize("weight_is", ["rows", "columns"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_the_product(dtype, rows, weight_is, bias, add):
    x, weight = make(rows, 96, dtype=dtype), make(800, 96, dtype=dtype, seed=1)
    if weight_is == "columns":
        weight = weight.t().contiguous().t()
    bias_N = make(800, dtype=dtype, seed=2) if bias else None
    add_MN = make(rows, 800, dtype=dtype, seed=3) if add else None
    wanted = x.double() @ weight.double().t()
    for each in (bias_N, add_MN):
        wanted = wanted if each is None else wanted + each.double()
    found = frozen_linear(x, weight, bias_N, add_MN=add_MN)
    assert found.dtype == dtype and found.shape == (rows, 800)
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1.5e-2}[dtype]


def test_of_wider_rows():
    """Views are multiplied as they are seen."""
    wide = make(128, 300)
    found = frozen_linear(wide[:, 50:146], make(800, 96, seed=1))
    torch.testing.assert_close(found, wide[:, 50:146].clone() @ make(800, 96, seed=1).t(), rtol=1e-5, atol=1e-4)


def test_no_gradient_is_recorded():
    x = make(128, 96).requires_grad_()
    assert not frozen_linear(x, make(800, 96)).requires_grad


def test_only_float32_on_a_cpu_is_worth_padding():
    assert row_multiple(torch.device("cpu"), torch.bfloat16) == row_multiple(torch.device("cuda"), torch.float32) == 1
    assert row_multiple(*FLOAT) in (1, 64)


@needs_onednn
def test_it_is_onednn_that_multiplies_where_rows_are_whole_multiples(monkeypatch):
    def calls(rows):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            frozen_linear(make(rows, 96), make(800, 96))
        return any("mkldnn" in event.key for event in profile.key_averages())

    assert calls(128) and not calls(127)
    with torch.backends.mkldnn.flags(enabled=False):
        assert row_multiple(*FLOAT) == 1 and not calls(128)


@needs_onednn
def test_the_same_bits_in_every_run():
    x, weight = make(256, 96), make(800, 96, seed=1)
    first = frozen_linear(x, weight)
    assert all(torch.equal(frozen_linear(x.clone(), weight.clone()), first) for _ in range(5))
