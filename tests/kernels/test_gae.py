"""gae and whiten: hand-computed numbers, the textbook loop, masks, packing."""

import math

import pytest
import torch
from helpers import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import gae, whiten


def textbook(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The backward loop over one sequence."""
    advantages, following, next_value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = following = delta + gamma * lam * following
        next_value = values[t]
    return advantages


def test_by_hand():
    """gamma 0.9, lambda 0.5: deltas 1 + 0.9*2 - 1 = 1.8, 0 + 0.9*3 - 2 = 0.7, 4 - 3 = 1; A = 2.3175, 1.15, 1."""
    advantages, returns = gae(
        torch.tensor([1.0, 0.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3]), gamma=0.9, lam=0.5
    )
    torch.testing.assert_close(advantages, torch.tensor([2.3175, 1.15, 1.0]))
    torch.testing.assert_close(returns, torch.tensor([3.3175, 3.15, 4.0]))
    assert advantages.dtype == torch.float32


def test_gamma_and_lambda_one_is_reward_to_go_minus_value():
    rewards, values = torch.randn(2, 300, dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.tensor([0, 300]), lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(0).cumsum(0).flip(0))
    torch.testing.assert_close(advantages, returns - values)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 17), max_size=6),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0, None]),
    keep=st.sampled_from([0.0, 0.6, 1.0]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_packed_and_padded_match_the_textbook_without_the_masked_steps(lengths, gamma, lam, keep, index_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    total, sequences = sum(lengths), len(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    rewards, values = torch.randn(2, total, generator=generator, dtype=torch.float64)
    mask = torch.rand(total, generator=generator) < keep
    one_lam = lam if lam is not None else torch.rand(sequences, generator=generator)
    lams = torch.as_tensor(one_lam, dtype=torch.float64).expand(sequences)
    expected_advantages, expected_returns = torch.zeros(2, total, dtype=torch.float64)
    for i in range(sequences):
        steps = torch.arange(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        steps = steps[mask[steps]]
        alone = textbook(rewards[steps].tolist(), values[steps].tolist(), gamma, lams[i].item())
        expected_advantages[steps] = torch.tensor(alone, dtype=torch.float64)
        expected_returns[steps] = expected_advantages[steps] + values[steps]
    rewards[~mask] = torch.nan
    values[~mask] = torch.nan
    how = {"gamma": gamma, "lam": one_lam}
    advantages, returns = gae(rewards, values, cu_seqlens, mask=mask, **how)
    torch.testing.assert_close(advantages, expected_advantages)
    torch.testing.assert_close(returns, expected_returns)

    longest = max(lengths, default=0)
    inside = torch.arange(longest)[None, :] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    padded = torch.full((3, sequences, longest), torch.nan, dtype=torch.float64)
    for layer, packed in zip(padded, (rewards, values, mask.double()), strict=True):
        layer[inside] = packed
    padded_advantages, padded_returns = gae(padded[0], padded[1], mask=inside & (padded[2] == 1), **how)
    torch.testing.assert_close(padded_advantages[inside], expected_advantages)
    torch.testing.assert_close(padded_returns[inside], expected_returns)
    assert (padded_advantages[~inside] == 0).all() and (padded_returns[~inside] == 0).all()


def test_a_sequence_does_not_depend_on_the_others_even_if_they_are_broken():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 30)
    alone = gae(rewards[10:20], values[10:20], torch.tensor([0, 10]))
    rewards[:10], rewards[20:] = torch.nan, math.inf
    together = gae(rewards, values, torch.tensor([0, 10, 20, 30]))
    assert torch.equal(together[0][10:20], alone[0]) and torch.equal(together[1][10:20], alone[1])
    assert not together[0][:10].isfinite().any()


def test_long_sequence_keeps_float32_accuracy():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5000)
    advantages, _ = gae(rewards, values, torch.tensor([0, 5000]), gamma=0.999, lam=0.99)
    expected = torch.tensor(textbook(rewards.tolist(), values.tolist(), 0.999, 0.99))
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)


def test_non_contiguous_half_precision_and_no_gradient():
    rewards = torch.randn(6, 4, requires_grad=True).t()
    values = torch.randn(4, 12)[:, ::2].bfloat16()
    advantages, returns = gae(rewards, values)
    expected = gae(rewards.detach().contiguous(), values.float().contiguous())
    assert torch.equal(advantages, expected[0]) and torch.equal(returns, expected[1])
    assert not advantages.requires_grad and not returns.requires_grad


def test_many_sequences_of_one_step_of_none_and_all_masked():
    sequences = 70_000
    rewards, values = torch.randn(2, sequences)
    advantages, returns, sums = gae(rewards, values, torch.arange(sequences + 1), with_sums=True)
    torch.testing.assert_close(advantages, rewards - values)
    torch.testing.assert_close(returns, rewards)
    assert torch.equal(sums[:, 0], torch.ones(sequences, dtype=torch.float64))
    empty = gae(torch.zeros(3, 0), torch.zeros(3, 0), with_sums=True)
    assert empty[0].shape == (3, 0) and torch.equal(empty[2], torch.zeros(3, 3, dtype=torch.float64))
    broken = torch.full((2, 5), torch.nan)
    masked = gae(broken, broken, mask=torch.zeros(2, 5, dtype=torch.bool), with_sums=True)
    assert all((x == 0).all() for x in masked)


def test_compiles_without_a_break_and_once_for_all_lengths():
    def packed(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        advantages, returns, sums = gae(rewards, values, cu_seqlens, mask=rewards > 0, with_sums=True)
        return returns, whiten(advantages, rewards > 0, sums=sums), whiten(returns, shift_mean=False)

    lengths = ([3, 2], [4, 0, 7], [20, 1, 1, 20], [300] * 5)
    assert_compiles_once(packed, ((*torch.randn(2, sum(each)), torch.tensor([0, *each]).cumsum(0)) for each in lengths))

    def padded(rewards: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return gae(rewards, values, lam=rewards[:, 0].sigmoid())

    assert_compiles_once(padded, (torch.randn(2, rows, rows * 9).unbind() for rows in (2, 3, 40)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, r"values must have shape \[4\] \(that of rewards\), got \[3\]"),
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, "rewards must have one of the dtypes"),
        ({"cu_seqlens": None}, r"rewards must have shape \[B, T\] where cu_seqlens is None, got \[4\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must rise from 0 to 4, the length of rewards"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must rise from 0 to 4"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, r"cu_seqlens must have shape \[N \+ 1\], got \[1, 2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must have one of the dtypes int64, int32"),
        ({"gamma": 1.5}, "gamma must be a finite number >= 0 and <= 1, got 1.5"),
        ({"lam": -0.1}, "lam must be a finite number >= 0 and <= 1, got -0.1"),
        ({"lam": torch.ones(3)}, r"lam must have shape \[2\] \(one for each sequence\), got \[3\]"),
        ({"mask": torch.ones(4)}, "mask must be a bool or integer tensor"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"rewards": torch.zeros(4), "values": torch.zeros(4), "cu_seqlens": torch.tensor([0, 1, 4])} | change
    with pytest.raises(ValueError, match=message):
        gae(**arguments)


def test_whiten_by_hand():
    """Mean 3, unbiased variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5; the masked 100 is out of it."""
    x = torch.tensor([1.0, 2.0, 100.0, 3.0, 4.0, 5.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    scale = 1 / math.sqrt(2.5)
    expected = torch.tensor([-2 * scale, -scale, 0.0, 0.0, scale, 2 * scale])
    torch.testing.assert_close(whiten(x, mask), expected)
    torch.testing.assert_close(whiten(x[mask == 1]), expected[mask == 1])


def test_shift_mean_centres_and_its_absence_keeps_the_mean():
    """torchtune has these two the wrong way round: its advantages are scaled but not centred."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert whiten(x).mean().item() == pytest.approx(0.0, abs=1e-6)
    kept = whiten(x, shift_mean=False)
    assert kept.mean().item() == pytest.approx(3.0) and kept.std().item() == pytest.approx(1.0)


def test_whiten_of_few_equal_or_no_entries_is_zero():
    for x in (torch.zeros(0), torch.tensor([7.0]), torch.full((5,), 0.1)):
        for eps in (0.0, 1e-8):
            assert (whiten(x, eps=eps).abs() < 1e-6).all()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert (whiten(torch.full((2, 3), torch.nan), nothing) == 0).all()
    assert (whiten(torch.full((2, 3), torch.nan), nothing, shift_mean=False) == 0).all()
    assert whiten(torch.tensor([7.0]), shift_mean=False).item() == 7.0


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 50), offset=st.sampled_from([0.0, 1e4]), seed=st.integers(0, 1000))
def test_whiten_matches_torch_in_float64(count, offset, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) + offset
    expected = (x.double() - x.double().mean()) / (x.double().var() + 1e-8).sqrt()
    torch.testing.assert_close(whiten(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_wrong_whiten_arguments():
    with pytest.raises(ValueError, match=r"mask must have shape \[3\] \(that of x\), got \[2\]"):
        whiten(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="eps must be a finite number >= 0, got -1"):
        whiten(torch.zeros(3), eps=-1)
