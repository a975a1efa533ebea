"""The Triton sampler against its torch twin, in the interpreter where there is no GPU."""

import itertools
import math

import pytest
import torch
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from helpers import poisoned as poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import linear_logprob, linear_sample, sample, token_logprob

INF = float("inf")
pytestmark = TRITON_MARKS


def draw(logits: Tensor, backend: str = "triton", seed: int = 1, step: int = 0, **how) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(logits), device=logits.device) * 2**33 - 5
    return sample(logits, seed=seed, sequence_ids_B=ids, step_B=torch.full_like(ids, step), backend=backend, **how)


def assert_same_draws(logits: Tensor, **how) -> Tensor:
    ours, twin = (draw(logits, backend, **how) for backend in ("triton", "torch"))
    assert ours[0].dtype == twin[0].dtype and ours[1].dtype == twin[1].dtype
    assert torch.equal(ours[0], twin[0])
    torch.testing.assert_close(ours[1], twin[1], rtol=3e-7, atol=1e-6, equal_nan=True)
    return ours[0]


@settings(max_examples=10, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 3, 5, 257, 1025]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 50, 10_000]),
    top_p=st.sampled_from([1e-9, 0.31, 0.9, 0.9999999999, 1.0]),
    grain=st.sampled_from([None, 2.0]),
    seed=st.sampled_from([0, 1, 2**31, 2**32 + 1, 2**63 + 11, 2**64 - 1]),
)
def test_tokens_are_those_of_the_twin(vocab, dtype, temperature, top_k, top_p, grain, seed):
    """With a grain many logits are equal, at the edges of top-k and top-p too."""
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    if grain is not None:
        logits = (logits * grain).round() / grain
    logits[1] = torch.where(torch.arange(vocab) % 2 == 0, -INF, logits[1]) if vocab > 1 else logits[1]
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "step": 2**32 + 7}
    assert_same_draws(logits.to(DEVICE, dtype), **how)


@pytest.mark.parametrize(("rows", "how"), [(100, {}), (20, {"top_k": 7, "top_p": 0.8, "temperature": 0.8})])
def test_many_rows(rows, how):
    torch.manual_seed(0)
    tokens = assert_same_draws(torch.randn(rows, 40).to(DEVICE), **how)
    assert len(tokens.unique()) > 10


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
    logits = p.log().expand(8, 5)
    # Few rows, of a seed with which the torch form draws all that may be drawn.
    seed = next(seed for seed in itertools.count() if set(draw(logits, "torch", seed, **how)[0].tolist()) == kept)
    assert_same_draws(logits, seed=seed, **how)


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


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"temperature": 0.7}])
def test_a_row_in_parts_gives_the_same_bits_as_one_program(how, monkeypatch):
    for name, value in {"BLOCK": 64, "PART": 64, "_PARTS": 2}.items():
        monkeypatch.setattr(f"fastppo_kernels._triton_sample.{name}", value)
    torch.manual_seed(0)
    logits = torch.randn(9, 300, device=DEVICE) * 2
    logits[1, 70:] = -INF
    logits[2] = -INF
    logits[3, 200] = torch.nan
    logits[4, 299] = INF
    logits[5, [63, 64, 256]] = 20.0  # equals in several parts
    logits[6, :256] = -INF
    split = draw(logits, **how)
    assert_same_draws(logits, **how)
    monkeypatch.setattr("fastppo_kernels._triton_sample.FEW_ROWS", 0)
    whole = draw(logits, **how)
    assert torch.equal(split[0], whole[0])
    assert torch.equal(split[1].nan_to_num(5.0), whole[1].nan_to_num(5.0))
    assert split[1].isnan().nonzero().flatten().tolist() == [2, 3, 4]


def test_rows_beyond_two_to_the_31():
    """The memory between the rows is never touched; the stride itself fits into 32 bits."""
    stride, vocab = 2**30 + 16, 40
    storage = torch.UntypedStorage(2 * (2 * stride + vocab), device=DEVICE)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, (3, vocab), (stride, 1))
    far.copy_(torch.randn(3, vocab))
    for how in ({}, {"top_k": 3}):
        ours, near = draw(far, **how), draw(far.clone(memory_format=torch.contiguous_format), **how)
        assert torch.equal(ours[0], near[0]) and torch.equal(ours[1], near[1])


def test_rows_are_on_the_axis_of_the_grid_that_has_room_for_them(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("_sample_kernel", "_largest_kernel", "_draw_kernel", "_winner_kernel"):
        monkeypatch.setattr(f"fastppo_kernels._triton_sample.{name}", Kernel())
    draw(torch.zeros(70_000, 3, device=DEVICE))
    draw(torch.zeros(2, 20_000, device=DEVICE))
    assert grids == [(70_000,), (2, 3), (2, 3), (2,)]


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
)
@pytest.mark.parametrize(
    "how",
    [
        {"softcap": 3.0, "logit_scale": 0.3, "bias": True, "lora": True},
        {"top_k": 9, "top_p": 0.8, "softcap": 2.0, "bias": True},
    ],
)
def test_the_head_and_the_draw(dtype, logits_dtype, how):
    torch.manual_seed(0)
    rows, width, vocab = 5, 8, 70
    hidden, weight, bias = (torch.randn(*size, device=DEVICE).to(dtype) for size in ((rows, width), (vocab, width), (vocab,)))
    head = {name: how[name] for name in ("softcap", "logit_scale") if name in how} | {"logits_dtype": logits_dtype}
    if "bias" in how:
        head["bias"] = bias
    if "lora" in how:
        head |= {"lora_A": torch.randn(2, width, device=DEVICE), "lora_B": torch.randn(vocab, 2, device=DEVICE)}
    ids = torch.arange(rows, device=DEVICE)
    drawn = {name: how[name] for name in ("temperature", "top_k", "top_p") if name in how}
    state = {"seed": 4, "sequence_ids_B": ids, "step_B": ids, **drawn}
    ours, twin = (
        linear_sample(hidden, weight, **head, **state, chunk_rows=2, backend=backend) for backend in ("triton", "torch")
    )
    assert torch.equal(ours[0], twin[0]) and ours[1].dtype == torch.float32
    temperature = how.get("temperature", 1.0) or 1.0
    of_head = linear_logprob(hidden, weight, ours[0], **head, temperature=temperature, chunk_rows=2, backend="triton")[0]
    torch.testing.assert_close(ours[1], of_head, rtol=3e-7, atol=1e-6)


def test_compiles_without_a_break_and_once_for_all_batch_sizes():
    def function(logits: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        state = {"seed": 3, "sequence_ids_B": ids, "step_B": ids, "backend": "triton"}
        return *sample(logits, top_k=3, **state), *linear_sample(hidden, weight, **state)

    weight = torch.randn(20, 4, device=DEVICE)
    calls = (
        (torch.randn(rows, 20, device=DEVICE), torch.arange(rows, device=DEVICE), torch.randn(rows, 4, device=DEVICE), weight)
        for rows in (2, 5, 9)
    )
    assert_compiles_once(function, calls)


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
