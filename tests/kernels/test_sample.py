"""sample: the right distribution, the same draw wherever a sequence stands, and rows that have no distribution."""

import math

import pytest
import torch
from helpers import assert_compiles_once
from torch import Tensor

from fastppo_kernels import linear_logprob, linear_sample, sample, token_logprob
from fastppo_kernels._philox import philox_4x32_10

INF = float("inf")


def draw(logits: Tensor, seed: int = 1, step: int = 0, **how) -> tuple[Tensor, Tensor]:
    batch = len(logits)
    return sample(logits, seed=seed, sequence_ids_B=torch.arange(batch), step_B=torch.full((batch,), step), **how)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word):08x}" for word in philox_4x32_10(words, (low, high))) == expected


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """(statistic, the bound it passes once in about 10^5 times), over tokens that are possible."""
    possible = probabilities > 0
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * len(tokens)
    freedom = int(possible.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.3 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return float(((counts[possible] - expected) ** 2 / expected).sum()), bound


@pytest.mark.parametrize("vocab", [2, 7, 40])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(vocab, temperature):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    tokens, _ = draw(logits.expand(40_000, vocab), temperature=temperature)
    statistic, bound = chi_square(tokens, (logits / temperature).softmax(-1))
    assert statistic < bound


def test_draws_over_steps_and_over_seeds_follow_the_softmax_too():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    same_id = torch.full((20_000,), 2**40 + 3)
    tokens, _ = sample(logits.expand(20_000, 5), seed=5, sequence_ids_B=same_id, step_B=torch.arange(20_000))
    statistic, bound = chi_square(tokens, logits.softmax(-1))
    assert statistic < bound
    over_seeds = torch.cat([draw(logits.expand(2, 5), seed=seed)[0] for seed in range(2000)])
    statistic, bound = chi_square(over_seeds, logits.softmax(-1))
    assert statistic < bound


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 3}, [0, 2, 3, 4]),  # the third is a tie: both stay
        ({"top_k": 1}, [2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [2]),
        ({"top_p": 0.41}, [0, 2]),
        ({"top_p": 0.71}, [0, 2, 3]),  # lower index first among equals
        ({"top_p": 0.84}, [0, 2, 3, 4]),
        ({"top_p": 1e-9}, [2]),
        ({"top_k": 2, "top_p": 0.56}, [2]),  # of the two left, 0.4 / 0.7 = 0.571
        ({"top_k": 2, "top_p": 0.58}, [0, 2]),
    ],
)
def test_top_k_and_top_p_keep_the_right_tokens_and_their_proportions(how, kept):
    p = torch.tensor([0.3, 0.04, 0.4, 0.13, 0.13])
    tokens, logprob = draw(p.log().expand(20_000, 5), **how)
    restricted = torch.zeros(5).index_copy(0, torch.tensor(kept), p[kept])
    if len(kept) == 1:
        assert (tokens == kept[0]).all()
    else:
        statistic, bound = chi_square(tokens, restricted / restricted.sum())
        assert statistic < bound
    torch.testing.assert_close(logprob, p.log()[tokens])  # of the full vocabulary


def test_a_draw_depends_on_its_sequence_and_step_alone():
    torch.manual_seed(0)
    logits = torch.randn(33, 101)
    ids, steps = torch.randint(-(2**62), 2**62, (33,)), torch.randint(1000, (33,))
    how = {"seed": 2**63 + 11, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    tokens, logprob = sample(logits, sequence_ids_B=ids, step_B=steps, **how)
    order = torch.randperm(33)
    shuffled = sample(logits[order], sequence_ids_B=ids[order], step_B=steps[order], **how)
    assert torch.equal(shuffled[0], tokens[order]) and torch.equal(shuffled[1], logprob[order])
    for i in (0, 17, 32):
        row = slice(i, i + 1)
        alone = sample(logits[row], sequence_ids_B=ids[row], step_B=steps[row].int(), **how)
        assert alone[0].item() == tokens[i].item() and alone[1].item() == logprob[i].item()
    transposed = sample(logits.t().contiguous().t(), sequence_ids_B=ids, step_B=steps, **how)
    assert torch.equal(transposed[0], tokens)
    again = sample(logits, sequence_ids_B=ids, step_B=steps, **how)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logprob)


def test_more_rows_than_one_block_of_noise():
    logits = torch.zeros(300, 1000)
    tokens, _ = draw(logits)
    assert torch.equal(draw(logits[:5])[0], tokens[:5])
    last = sample(logits[:1], seed=1, sequence_ids_B=torch.tensor([299]), step_B=torch.tensor([0]))
    assert last[0].item() == tokens[299].item()


def test_seed_id_and_step_each_change_the_noise_in_all_their_bits():
    """Of 64 equal tokens another draw agrees once in 64 times."""
    logits = torch.zeros(400, 64)
    ids, steps = torch.arange(400), torch.arange(400)
    base, _ = sample(logits, seed=7, sequence_ids_B=ids, step_B=steps)
    others = [
        (7 + 2**33, ids, steps),
        (8, ids, steps),
        (7, ids + 2**33, steps),
        (7, ids + 1, steps),
        (7, ids, steps + 1),
    ]
    for seed, other_ids, other_steps in others:
        tokens, _ = sample(logits, seed=seed, sequence_ids_B=other_ids, step_B=other_steps)
        assert (tokens == base).float().mean() < 0.1


def test_temperature_zero_is_greedy_with_the_lowest_index_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0], [2.0, 1.0, 2.0], [-INF, -INF, -1.0]])
    tokens, logprob = draw(logits, temperature=0)
    assert tokens.tolist() == [1, 0, 2]
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 3, 1000, 50257])
def test_logprob_is_that_of_token_logprob_to_the_bit(vocab, dtype):
    logits = (torch.randn(3, vocab) * 3).to(dtype)
    tokens, logprob = draw(logits, temperature=0.6, top_k=5)
    assert tokens.dtype == torch.int64 and ((tokens >= 0) & (tokens < vocab)).all()
    assert torch.equal(logprob, token_logprob(logits, tokens, temperature=0.6)[0])


def test_impossible_tokens_are_never_drawn_and_rows_without_distribution_are_marked():
    logits = torch.tensor(
        [
            [-INF, 0.0, -INF, -1e4],
            [-INF, -INF, -INF, -INF],
            [0.0, torch.nan, 0.0, 0.0],
            [0.0, INF, 0.0, 0.0],
            [-1e4, -1e4, -INF, -INF],
            [1e30, -1e30, -1e30, -1e30],
        ]
    )
    for how in ({}, {"temperature": 0}, {"top_k": 2, "top_p": 0.9}, {"temperature": 1e-38}):
        tokens, logprob = draw(logits, **how)
        assert tokens[[0, 1, 2, 3, 5]].tolist() == [1, 0, 0, 0, 0]
        assert tokens[4].item() in (0, 1)
        assert logprob.isnan().tolist() == [False, True, True, True, False, False]
        torch.testing.assert_close(logprob[[0, 4, 5]], torch.tensor([0.0, math.log(0.5), 0.0]))
    many, _ = sample(
        logits[:1].expand(5000, 4),
        seed=3,
        sequence_ids_B=torch.arange(5000),
        step_B=torch.zeros(5000, dtype=torch.int64),
    )
    assert (many == 1).all()


def test_an_empty_batch():
    tokens, logprob = draw(torch.zeros(0, 5), top_k=2, top_p=0.5)
    assert tokens.shape == (0,) and logprob.shape == (0,)


def test_the_logits_are_left_as_they_were_and_get_no_gradient():
    logits = torch.randn(4, 9, requires_grad=True)
    before = logits.detach().clone()
    _, logprob = draw(logits, temperature=0.5, top_k=3, top_p=0.8)
    assert torch.equal(logits.detach(), before) and not logprob.requires_grad


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float64, None)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("plain", [True, False])
def test_the_head_and_the_draw_give_the_log_probability_of_linear_logprob_to_the_bit(dtype, logits_dtype, temperature, plain):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16).to(dtype), torch.randn(301, 16).to(dtype)
    head = {"chunk_rows": 3, "logits_dtype": logits_dtype}
    if not plain:
        head |= {"bias": torch.randn(301).to(dtype), "softcap": 5.0, "logit_scale": 0.7, "lora_scale": 2.0}
        head |= {"lora_A": torch.randn(2, 16).to(dtype), "lora_B": torch.randn(301, 2).to(dtype)}
    state = {"seed": 4, "sequence_ids_B": torch.arange(7), "step_B": torch.arange(7)}
    tokens, logprob = linear_sample(hidden, weight, **head, **state, temperature=temperature, top_k=50)
    expected = linear_logprob(hidden, weight, tokens, **head, temperature=temperature or 1.0, argmax=True)
    assert torch.equal(logprob, expected[0]) and logprob.dtype == expected[0].dtype
    if temperature == 0:
        assert torch.equal(tokens, expected[2])
    if plain and logits_dtype is None:
        from_logits = torch.cat([part @ weight.t() for part in hidden.split(3)])
        assert torch.equal(tokens, sample(from_logits, **state, temperature=temperature, top_k=50)[0])


def test_the_head_of_no_rows_of_broken_rows_and_of_inputs_that_require_grad():
    weight = torch.randn(9, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    tokens, logprob = linear_sample(torch.zeros(0, 4), weight, seed=1, sequence_ids_B=none, step_B=none)
    assert tokens.shape == logprob.shape == (0,)
    hidden, ids = torch.randn(4, 3).t().requires_grad_(), torch.arange(3)
    with torch.no_grad():
        hidden[1] = torch.nan
    tokens, logprob = linear_sample(hidden, weight, seed=1, sequence_ids_B=ids, step_B=ids.int())
    assert logprob.isnan().tolist() == [False, True, False] and tokens[1] == 0 and not logprob.requires_grad


def test_more_rows_than_a_launch_grid_has_in_its_other_dimensions():
    tokens, logprob = draw(torch.zeros(70_000, 3))
    assert tokens.bincount().min() > 22_000 and (logprob - math.log(1 / 3)).abs().max() < 1e-6


def test_compiles_without_a_break_and_once_for_all_batch_sizes():
    def function(logits: Tensor, ids: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        state = {"seed": 2**63 + 3, "sequence_ids_B": ids, "step_B": ids, "top_p": 0.9, "top_k": 10**6}
        return *sample(logits, **state), *linear_sample(hidden, weight, **state)

    weight = torch.randn(20, 4)
    calls = ((torch.randn(rows, 20), torch.arange(rows), torch.randn(rows, 4), weight) for rows in (2, 5, 900))
    assert_compiles_once(function, calls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_BV": torch.zeros(3)}, r"logits must have shape \[B, V\] with V >= 1, got \[3\]"),
        ({"logits_BV": torch.zeros(2, 0)}, r"logits must have shape \[B, V\] with V >= 1, got \[2, 0\]"),
        ({"logits_BV": torch.zeros(2, 3, dtype=torch.int32)}, "logits must have one of the dtypes"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        ({"top_k": -1}, "top_k must be an integer >= 0, got -1"),
        ({"top_k": 1.5}, "top_k must be an integer >= 0, got 1.5"),
        ({"top_p": 0.0}, "top_p must be a finite number > 0 and <= 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be a finite number > 0 and <= 1, got 1.1"),
        ({"seed": -1}, "seed must be an integer from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, "seed must be an integer from 0 to"),
        ({"sequence_ids_B": torch.zeros(3, dtype=torch.int64)}, r"sequence_ids_B must have shape \[2\].* got \[3\]"),
        ({"step_B": torch.zeros(2)}, "step_B must have one of the dtypes int64, int32, got torch.float32"),
        ({"step_B": torch.zeros(2, dtype=torch.int64, device="meta")}, "step_B must be on the device of logits"),
    ],
)
def test_wrong_arguments(change, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {"logits_BV": torch.zeros(2, 3), "seed": 0, "sequence_ids_B": zeros, "step_B": zeros} | change
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
