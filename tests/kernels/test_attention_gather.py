"""Sums over the occurrences of a row: the Triton kernel and the torch form against a loop in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo_kernels import _gather
from fastppo_kernels._gather import gather_rows, occurrences, sum_rows

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loop(x, index, rows):
    total = torch.zeros(rows, *x.shape[1:], dtype=torch.float64, device=x.device)
    for j, row in enumerate(index.tolist()):
        total[row] += x[j].double()
    return total


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel forgets to write is NaN."""
    from fastppo_kernels import _triton_gather

    launch, new_empty = _triton_gather.sum_rows, torch.Tensor.new_empty

    def poison(*arguments, **options):
        out = new_empty(*arguments, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    def run(*arguments):
        with monkeypatch.context() as inner:
            inner.setattr(torch.Tensor, "new_empty", poison)
            return launch(*arguments)

    monkeypatch.setattr(_triton_gather, "sum_rows", run)


@settings(max_examples=25, deadline=None)
@given(
    entries=st.integers(0, 60),
    rows=st.integers(1, 12),
    shape=st.sampled_from([(1,), (3,), (2, 8), (3, 50), (2, 64), (1, 130), (2, 96)]),
    skewed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sums(entries, rows, shape, skewed, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(1 if skewed else rows, (entries,), generator=generator)
    x = torch.randn(entries, *shape, generator=generator)
    where = occurrences(index.to(DEVICE), rows)
    exact = loop(x, index, rows)
    for backend in ("torch", "triton"):
        got = sum_rows(x.to(DEVICE), where, torch.float32, backend).cpu()
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=5e-6)  # of up to 60 terms of about 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_low_precision_are_float32(dtype):
    """300 terms added in bfloat16 would lose most digits. Looked at before rounding, which the interpreter does by cutting."""
    torch.manual_seed(0)
    index = torch.randint(3, (700,))
    x = torch.rand(700, 2, 40).to(dtype)
    where = occurrences(index.to(DEVICE), 3)
    exact = loop(x, index, 3)
    wide = sum_rows(x.to(DEVICE), where, torch.float32, "triton").cpu()
    torch.testing.assert_close(wide.double(), exact, rtol=2e-6, atol=0)
    narrow = sum_rows(x.to(DEVICE), where, dtype, "triton").cpu()
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.double(), exact, rtol=float(torch.finfo(dtype).eps), atol=0)
    torch.testing.assert_close(sum_rows(x, occurrences(index, 3), dtype, "torch"), exact.to(dtype), rtol=1e-2, atol=0)


def test_rows_without_an_occurrence_and_none_at_all():
    where = occurrences(torch.tensor([4, 1, 4], device=DEVICE), 6)
    x = torch.ones(3, 2, 5, device=DEVICE)
    for backend in ("torch", "triton"):
        assert sum_rows(x, where, x.dtype, backend)[:, 0, 0].tolist() == [0, 1, 0, 0, 2, 0]
        empty = occurrences(torch.zeros(0, dtype=torch.int64, device=DEVICE), 2)
        assert torch.equal(sum_rows(x[:0], empty, x.dtype, backend), torch.zeros(2, 2, 5, device=DEVICE))


def test_not_contiguous():
    torch.manual_seed(0)
    index = torch.randint(4, (30,))
    x = torch.randn(2, 30, 17).transpose(0, 1)
    got = sum_rows(x.to(DEVICE)[..., :9], occurrences(index.to(DEVICE), 4), torch.float32, "triton").cpu()
    torch.testing.assert_close(got.double(), loop(x[..., :9], index, 4), rtol=1e-6, atol=1e-6)


def test_the_same_in_every_run():
    torch.manual_seed(0)
    where = occurrences(torch.randint(5, (400,), device=DEVICE), 5)
    x = torch.randn(400, 3, 16, device=DEVICE)
    for backend in ("torch", "triton"):
        first = sum_rows(x, where, x.dtype, backend)
        assert all(torch.equal(first, sum_rows(x, where, x.dtype, backend)) for _ in range(5))


def test_order_of_occurrences():
    where = occurrences(torch.tensor([2, 0, 2, 1, 0, 2]), 4)
    assert where.order_N.tolist() == [1, 4, 3, 0, 2, 5] and where.start_R1.tolist() == [0, 2, 3, 6, 6]


def test_gradient_of_a_gather(monkeypatch):
    index = torch.tensor([3, 0, 0, 3, 1])
    where = occurrences(index, 4)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather_rows(t, index, where), (x,))
    torch.library.opcheck(_gather._gather_rows, (x.detach().float().requires_grad_(), index, *where))
    monkeypatch.setenv("FASTPPO_KERNELS", "triton")
    single = x.detach().float().requires_grad_()
    weight = torch.randn(5, 2, 3)
    (grad,) = torch.autograd.grad(gather_rows(single, index, where), single, weight)
    torch.testing.assert_close(grad.double(), loop(weight, index, 4), rtol=1e-6, atol=1e-6)


def test_adding_rows():
    torch.manual_seed(0)
    index, value = torch.randint(4, (50,), device=DEVICE), torch.randn(50, 2, 3, device=DEVICE)
    total = torch.zeros(4, 2, 3, device=DEVICE)
    _gather.add_rows_(total, index, value)
    torch.testing.assert_close(total.double(), loop(value, index, 4), rtol=1e-5, atol=1e-5)
