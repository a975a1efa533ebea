"""The Triton sampler against its torch twin, in the interpreter where there is no GPU."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo_kernels import sample, token_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
# numpy warns of the NaN and infinities that these tests are about.
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="there is no triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN and absurd tokens, so that a place that no kernel writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(logits: Tensor, backend: str = "triton", seed: int = 1, step: int = 0, **how) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(logits), device=logits.device) * 2**33 - 5
    return sample(logits, seed=seed, sequence_ids_B=ids, step_B=torch.full_like(ids, step), backend=backend, **how)


def assert_same_draws(logits: Tensor, **how) -> Tensor:
    ours, twin = (draw(logits, backend, **how) for backend in ("triton", "torch"))
    assert ours[0].dtype == twin[0].dtype and ours[1].dtype == twin[1].dtype
    assert torch.equal(ours[0], twin[0])
    torch.testing.assert_close(ours[1], twin[1], rtol=3e-7, atol=1e-6, equal_nan=True)
    return ours[0]


@settings(max_examples=20, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 3, 4, 5, 257, 1024, 1025]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 50, 10_000]),
    top_p=st.sampled_from([1e-9, 0.31, 0.9, 0.9999999999, 1.0]),
    grain=st.sampled_from([None, 2.0]),
    seed=st.sampled_from([0, 1, 2**31, 2**32 + 1, 2**63 + 11, 2**64 - 1]),
)
def test_tokens_are_those_of_the_twin(vocab, dtype, temperature, top_k, top_p, grain, seed):
    """With a grain many logits are equal, at the edges of top-k and top-p too."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    if grain is not None:
        logits = (logits * grain).round() / grain
    logits[2] = torch.where(torch.arange(vocab) % 2 == 0, -INF, logits[2]) if vocab > 1 else logits[2]
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "step": 2**32 + 7}
    assert_same_draws(logits.to(DEVICE, dtype), **how)


@pytest.mark.parametrize(("rows", "how"), [(300, {}), (60, {"top_k": 7, "top_p": 0.8, "temperature": 0.8})])
def test_many_rows(rows, how):
    torch.manual_seed(0)
    tokens = assert_same_draws(torch.randn(rows, 40).to(DEVICE), **how)
    assert len(tokens.unique()) > 20


def test_a_real_vocabulary():
    torch.manual_seed(0)
    logits = (torch.randn(2, 151_936) * 2).bfloat16().to(DEVICE)
    tokens = assert_same_draws(logits)
    exact = token_logprob(logits.double(), tokens)[0]
    ours, twin = draw(logits, "triton")[1], draw(logits, "torch")[1]
    assert (ours - exact).abs().max() <= 1.2 * (twin - exact).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 3}, {0, 2, 3, 4}),  # the third is a tie: both stay
        ({"top_k": 1}, {2}),
        ({"top_p": 0.3}, {2}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.71}, {0, 2, 3}),  # lower index first among equals
        ({"top_p": 0.84}, {0, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.56}, {2}),  # of the two left, 0.4 / 0.7 = 0.571
        ({"top_k": 2, "top_p": 0.58}, {0, 2}),
        ({"top_k": 3, "top_p": 0.8}, {0, 2, 3}),  # of the four left, 0.83 / 0.96 = 0.865
        ({"top_k": 3, "top_p": 1 - 2**-53}, {0, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p_keep_the_right_tokens(how, kept):
    p = torch.tensor([0.3, 0.04, 0.4, 0.13, 0.13], device=DEVICE)
    assert set(assert_same_draws(p.log().expand(40, 5), **how).tolist()) == kept


def test_temperature_zero_is_greedy_with_the_lowest_index_of_equals():
    logits = torch.zeros(3, 3000, device=DEVICE)
    logits[0, [1, 2, 2999]] = 3.0
    logits[1, [2047, 2048]] = 2.0
    logits[2] = -INF
    logits[2, 2998] = -1.0
    assert assert_same_draws(logits, temperature=0, top_k=1, top_p=0.1).tolist() == [1, 2047, 2998]


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 2, "top_p": 0.9}, {"temperature": 1e-38}])
def test_impossible_tokens_and_rows_without_distribution(how):
    logits = torch.tensor(
        [
            [-INF, 0.0, -INF, -1e4],
            [-INF, -INF, -INF, -INF],
            [0.0, torch.nan, 0.0, 0.0],
            [0.0, INF, 0.0, 0.0],
            [-1e4, -1e4, -INF, -INF],
            [1e30, -1e30, -1e30, -1e30],
        ],
        device=DEVICE,
    )
    tokens = assert_same_draws(logits, **how)
    assert tokens[[0, 1, 2, 3, 5]].tolist() == [1, 0, 0, 0, 0] and tokens[4].item() in (0, 1)
    logprob = draw(logits, **how)[1]
    assert logprob.isnan().tolist() == [False, True, True, True, False, False]
    torch.testing.assert_close(logprob[[0, 4, 5]].cpu(), torch.tensor([0.0, math.log(0.5), 0.0]))


def test_a_draw_depends_on_its_sequence_and_step_alone_whatever_the_layout():
    torch.manual_seed(0)
    logits = torch.randn(4, 101, device=DEVICE)
    ids, steps = torch.randint(-(2**62), 2**62, (4,), device=DEVICE), torch.randint(1000, (4,), device=DEVICE)
    how = {"seed": 2**63 + 11, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "backend": "triton"}
    tokens, logprob = sample(logits, sequence_ids_B=ids, step_B=steps, **how)
    order = torch.randperm(4, device=DEVICE)
    shuffled = sample(logits[order], sequence_ids_B=ids[order], step_B=steps[order].int(), **how)
    assert torch.equal(shuffled[0], tokens[order]) and torch.equal(shuffled[1], logprob[order])
    wide = torch.full((4, 120), torch.nan, device=DEVICE)
    wide[:, 7:108] = logits
    for view in (logits.t().contiguous().t(), wide[:, 7:108]):
        again = sample(view, sequence_ids_B=torch.stack([ids, ids], 1)[:, 0], step_B=steps, **how)
        assert torch.equal(again[0], tokens) and torch.equal(again[1], logprob)


def test_an_empty_batch():
    tokens, logprob = draw(torch.zeros(0, 5, device=DEVICE), top_k=2, top_p=0.5)
    assert tokens.shape == (0,) and logprob.shape == (0,)


def test_compiles_without_a_break_and_once_for_all_batch_sizes():
    counter = CompileCounterWithBackend("aot_eager")

    def function(logits: Tensor, ids: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logprob = sample(logits, seed=3, sequence_ids_B=ids, step_B=steps, top_k=3, backend="triton")
        return tokens + 1, logprob * 2

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for rows in (2, 5, 9):
        logits, ids = torch.randn(rows, 20, device=DEVICE), torch.arange(rows, device=DEVICE)
        for a, b in zip(function(logits, ids, ids), compiled(logits, ids, ids), strict=True):
            assert torch.equal(a, b)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_BV": torch.zeros(2, 0)}, r"logits must have shape \[B, V\] with V >= 1, got \[2, 0\]"),
        ({"seed": 2**64}, "seed must be an integer from 0 to"),
        ({"sequence_ids_B": torch.zeros(3, dtype=torch.int64)}, r"sequence_ids_B must have shape \[2\].* got \[3\]"),
        ({"step_B": torch.zeros(2, dtype=torch.int64, device="meta")}, "step_B must be on the device of logits"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_wrong_arguments(change, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"logits_BV": torch.zeros(2, 3), "seed": 0, "sequence_ids_B": zeros, "step_B": zeros, "backend": "torch"}
    with pytest.raises(ValueError, match=message):
        sample(**arguments | change)
