"""selective_log_softmax takes the place of TRL's: same shapes, dtypes and values, and gradients no worse."""

import helpers
import pytest
import torch
from head_helpers import BACKENDS
from helpers import DEVICE, TRITON_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo_kernels import token_logprob
from fastppo_kernels.token_logprob import selective_log_softmax

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl.trainer.utils").selective_log_softmax


def run(function, logits, index, weights):
    leaf = logits.detach().clone().requires_grad_()
    logprob = function(leaf, index)
    (logprob * weights.to(logprob.dtype)).sum().backward()
    return logprob.detach(), leaf.grad


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(1,), (5,), (2, 3), (1, 4, 2)]),
    many=st.sampled_from([None, 0, 1, 3, 40]),
    vocab=st.sampled_from([2, 31, 1025]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
def test_as_in_trl(trl, shape, many, vocab, dtype, backend, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(*shape, vocab, device=DEVICE) * 4).to(dtype)
    index = torch.randint(vocab, shape if many is None else (*shape, many), device=DEVICE)
    weights = torch.randn(index.shape, device=DEVICE).to(dtype)
    ours = run(lambda x, i: selective_log_softmax(x, i, backend=backend), logits, index, weights)
    theirs = run(trl, logits, index, weights)
    exact = run(trl, logits.double(), index, weights.double())
    place = torch.finfo(dtype).eps
    for value, other, truth in zip(ours, theirs, exact, strict=True):
        assert value.dtype == other.dtype and value.shape == other.shape
        allowed = max(1e-6, 40 * place) if many else max(1e-6, 8 * place)  # TRL's own float32 gradient may lie beyond that
        torch.testing.assert_close(value.double(), truth, rtol=2 * place, atol=allowed)
        if value.numel():
            error, allowed = ((x.double() - truth).norm() for x in (value, other))
            assert error <= 1.2 * allowed + 2e-7 * truth.norm() + 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_strides_and_int32(backend):
    logits, index = torch.randn(7, 5, 4, device=DEVICE).permute(2, 1, 0), torch.randint(7, (4, 5, 2), device=DEVICE)
    ours = selective_log_softmax(logits, index.int(), temperature=0.7, backend=backend)
    torch.testing.assert_close(ours, (logits / 0.7).log_softmax(-1).gather(-1, index))
    one = selective_log_softmax(logits, index[..., 0], temperature=0.7, backend=backend)
    assert torch.equal(one, token_logprob(logits, index[..., 0], temperature=0.7, backend=backend)[0])
    assert torch.equal(one, ours[..., 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_no_rows_and_one(shape, backend):
    logits = torch.randn(*shape, 9, device=DEVICE, requires_grad=True)
    for many in ((), (3,), (0,)):
        logprob = selective_log_softmax(logits, torch.zeros((*shape, *many), dtype=torch.int64, device=DEVICE), backend=backend)
        assert logprob.shape == (*shape, *many)
        assert torch.autograd.grad(logprob.sum(), logits)[0].isfinite().all()


def test_repeated_tokens_of_a_row_add_up():
    logits = torch.randn(1, 9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    index = torch.tensor([[3, 3, 1]], device=DEVICE)
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, index, temperature=0.6), logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"index must have shape \[2\] or .* got \[3\]"),
        ({"index": torch.zeros(2, 3, 1, dtype=torch.int64)}, r"index must have shape .* got \[2, 3, 1\]"),
        ({"index": torch.zeros(2)}, "index must have one of the dtypes int64, int32, got torch.float32"),
        ({"index": torch.tensor([0, 5])}, r"index must be in \[0, 5\)"),
        ({"logits": torch.zeros(2, 0)}, r"logits must have shape \[\.\.\., V\] with V >= 1, got \[2, 0\]"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"logits": torch.zeros(2, 5), "index": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        selective_log_softmax(**arguments)
