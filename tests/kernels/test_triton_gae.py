"""The Triton GAE and whitening against their torch twins, in the interpreter where there is no GPU."""

import sys

import pytest
import torch
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from helpers import poisoned as poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import gae, whiten

pytestmark = TRITON_MARKS


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Sequences of many blocks are then short: the interpreter scans step by step in Python."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr("fastppo_kernels._triton_gae.BLOCK", 16)
        yield


def assert_as_the_twin(ours: tuple[Tensor, ...], twin: tuple[Tensor, ...]) -> None:
    """Both keep float64 until they round to float32: a number may fall on the other side, seldom more."""
    for a, b in zip(ours, twin, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-9, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), max_size=5),
    gamma=st.sampled_from([0.0, 0.999, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0, torch.float32, torch.float64]),
    keep=st.sampled_from([None, 0.0, 0.6]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_packed_and_padded(lengths, gamma, lam, keep, index_dtype, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    total, sequences = sum(lengths), len(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, index_dtype)
    rewards, values = torch.randn(2, total, generator=generator).to(DEVICE, dtype)
    if isinstance(lam, torch.dtype):
        lam = torch.rand(sequences, generator=generator).to(DEVICE, lam)
    how = {"gamma": gamma, "lam": lam, "with_sums": True}
    mask = None
    if keep is not None:
        mask = (torch.rand(total, generator=generator) < keep).to(DEVICE)
        rewards[~mask] = values[~mask] = torch.nan
    ours, twin = (gae(rewards, values, cu_seqlens, mask=mask, **how, backend=backend) for backend in ("triton", "torch"))
    assert_as_the_twin(ours, twin)

    longest = max(lengths, default=0)
    inside = (torch.arange(longest)[None, :] < torch.tensor(lengths, dtype=torch.int64)[:, None]).to(DEVICE)
    padded = torch.full((2, sequences, longest), torch.nan, dtype=dtype, device=DEVICE)
    padded[0][inside], padded[1][inside] = rewards, values
    counted = inside.clone()
    if mask is not None:
        counted[inside] = mask
    padded_ours = gae(padded[0], padded[1], mask=counted.int() * 2, **how, backend="triton")
    assert torch.equal(padded_ours[0][inside], ours[0]) and torch.equal(padded_ours[1][inside], ours[1])
    assert (padded_ours[0][~inside] == 0).all() and (padded_ours[1][~inside] == 0).all()
    torch.testing.assert_close(padded_ours[2], ours[2])


def test_one_block_of_the_size_used_and_the_same_bits_twice(monkeypatch):
    monkeypatch.setattr("fastppo_kernels._triton_gae.BLOCK", 512)
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 1, 700, device=DEVICE)
    first, again = (gae(rewards, values, gamma=0.999, lam=0.99, with_sums=True, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_as_the_twin(first, gae(rewards, values, gamma=0.999, lam=0.99, with_sums=True, backend="torch"))


def test_a_sequence_does_not_depend_on_the_others_even_if_they_are_broken():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 60, device=DEVICE)
    alone = gae(rewards[20:40], values[20:40], torch.tensor([0, 20], device=DEVICE), backend="triton")
    rewards[:20], rewards[40:] = torch.nan, torch.inf
    together = gae(rewards, values, torch.tensor([0, 20, 40, 60], device=DEVICE), backend="triton")
    assert torch.equal(together[0][20:40], alone[0]) and torch.equal(together[1][20:40], alone[1])
    assert not together[0][:20].isfinite().any()


@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.9), (1.0, 0.0), (0.0, 0.0), (0.9, 0.9)])
def test_what_comes_later_with_weight_zero_is_not_seen(gamma, lam):
    rewards, values = torch.ones(2, 1, 20, device=DEVICE)
    rewards[0, 18] = torch.nan
    ours, twin = (gae(rewards, values, gamma=gamma, lam=lam, backend=backend) for backend in ("triton", "torch"))
    assert_as_the_twin(ours, twin)


def test_non_contiguous_inputs_and_no_gradient():
    rewards = torch.randn(6, 4, requires_grad=True, device=DEVICE).t()
    values = torch.randn(4, 12, device=DEVICE)[:, ::2]
    mask = (torch.rand(6, 4, device=DEVICE) < 0.5).t()
    ours = gae(rewards, values, mask=mask, backend="triton")
    plain = gae(rewards.detach().contiguous(), values.contiguous(), mask=mask.contiguous(), backend="triton")
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    assert not ours[0].requires_grad


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([0, 1, 2, 16, 17, 700, (3, 5)]),
    keep=st.sampled_from([None, 0.0, 0.5]),
    offset=st.sampled_from([0.0, 1e4]),
    shift_mean=st.booleans(),
    eps=st.sampled_from([0.0, 1e-8]),
    equal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whiten(size, keep, offset, shift_mean, eps, equal, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((size,) if isinstance(size, int) else size, generator=generator) * (not equal) + offset
    mask = None if keep is None else torch.rand(x.shape, generator=generator) < keep
    if mask is not None:
        x[~mask] = torch.nan
        mask = mask.to(DEVICE)
    x = x.to(DEVICE)
    ours, twin = (whiten(x, mask, shift_mean=shift_mean, eps=eps, backend=backend) for backend in ("triton", "torch"))
    assert ours.dtype == twin.dtype
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_of_gae_whiten_as_if_they_were_read_again(backend):
    """Also of several batches at once, and of more sequences than one tile of sums, or than the kernel adds up itself."""
    torch.manual_seed(0)
    for sequences in (3, 300, 1500):
        lengths = torch.randint(0, 3, (sequences,))
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
        rewards, values = torch.randn(2, int(lengths.sum()), device=DEVICE)
        mask = torch.rand(len(rewards), device=DEVICE) < 0.7
        # The sums of the twin: the interpreter needs a while for so many programs.
        advantages, _, sums = gae(rewards, values, cu_seqlens, mask=mask, with_sums=True, backend="torch")
        expected = whiten(advantages, mask, backend="torch")
        torch.testing.assert_close(whiten(advantages, mask, sums=sums, backend=backend), expected, rtol=1e-6, atol=1e-6)
        both = whiten(torch.cat([advantages, advantages]), torch.cat([mask, mask]), backend="torch")[: len(advantages)]
        twice = torch.cat([sums, sums])
        torch.testing.assert_close(whiten(advantages, mask, sums=twice, backend=backend), both, rtol=1e-6, atol=1e-6)


def test_compiles_without_a_break_and_once_for_all_lengths():
    def padded(rewards: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        advantages, returns, sums = gae(rewards, values, with_sums=True, backend="triton")
        return whiten(advantages, sums=sums, backend="triton"), whiten(returns, backend="triton")

    assert_compiles_once(padded, (torch.randn(2, 3, length, device=DEVICE).unbind() for length in (5, 18, 40)))

    def packed(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        return gae(rewards, values, cu_seqlens, mask=rewards > 0, backend="triton")

    lengths = ([3, 2], [4, 0, 7], [20, 1, 1, 20])
    assert_compiles_once(
        packed,
        ((*torch.randn(2, sum(each), device=DEVICE), torch.tensor([0, *each], device=DEVICE).cumsum(0)) for each in lengths),
    )


def test_steps_beyond_two_to_the_31():
    """The kernel alone, in memory that is touched at its end only."""
    from fastppo_kernels import _triton_gae

    first, steps = 2**31 + 5, 20
    rewards, values, advantages, returns = (
        torch.empty(0, dtype=dtype, device=DEVICE).set_(torch.UntypedStorage(size * (first + steps), device=DEVICE))
        for dtype, size in ((torch.bfloat16, 2), (torch.bfloat16, 2), (torch.float32, 4), (torch.float32, 4))
    )
    for tensor in (rewards, values):
        tensor[first:] = torch.randn(steps)
    sums = torch.empty(1, 3, dtype=torch.float64, device=DEVICE)
    cu_seqlens = torch.tensor([first, first + steps], device=DEVICE)
    _triton_gae.gae(rewards, values, cu_seqlens, None, None, 0.9, 0.9, advantages, returns, sums)
    near = gae(rewards[first:], values[first:], cu_seqlens - first, gamma=0.9, lam=0.9, with_sums=True, backend="triton")
    for far, expected in zip((advantages[first:], returns[first:], sums), near, strict=True):
        assert torch.equal(far, expected)


def test_sequences_are_on_the_axis_of_the_grid_that_has_room_for_them(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("_gae_kernel", "_moments_kernel", "_whiten_kernel"):
        monkeypatch.setattr(f"fastppo_kernels._triton_gae.{name}", Kernel())
    rewards = torch.zeros(70_000, 3, device=DEVICE)
    gae(rewards, rewards, backend="triton")
    monkeypatch.setattr("fastppo_kernels._triton_gae.BLOCK", 2)
    whiten(rewards, backend="triton")
    assert grids == [(70_000,), (105_000,), (105_000,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3, device=DEVICE)}, r"values must have shape \[4\] \(that of rewards\), got \[3\]"),
        ({"cu_seqlens": None}, r"rewards must have shape \[B, T\] where cu_seqlens is None, got \[4\]"),
        ({"lam": torch.ones(3, device=DEVICE)}, r"lam must have shape \[2\] \(one for each sequence\), got \[3\]"),
        ({"lam": torch.ones(2, device="meta")}, "lam must be on the device of rewards"),
        ({"mask": torch.ones(4, device=DEVICE)}, "mask must be a bool or integer tensor"),
        ({"gamma": 1.5}, "gamma must be a finite number >= 0 and <= 1, got 1.5"),
    ],
)
def test_wrong_arguments(change, message):
    cu_seqlens = torch.tensor([0, 1, 4], device=DEVICE)
    arguments = {"rewards": torch.zeros(4, device=DEVICE), "values": torch.zeros(4, device=DEVICE), "cu_seqlens": cu_seqlens}
    with pytest.raises(ValueError, match=message):
        gae(**arguments | change, backend="triton")


def test_wrong_sums():
    x = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"sums must have shape \[N, 3\], N >= 1, got \[3\]"):
        whiten(x, sums=torch.zeros(3, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="sums must be a float64 tensor, got torch.float32"):
        whiten(x, sums=torch.zeros(1, 3, device=DEVICE))
