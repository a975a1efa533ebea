"""The Triton PPO losses against their torch twins and float64, in the interpreter where there is no GPU."""

import itertools
import math

import helpers
import pytest
import torch
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import ppo_loss, ppo_policy_loss, ppo_value_loss, reduce_metrics

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned
ESTIMATORS = ["k1", "clamped_k1", "k2", "k3", "jensen_shannon"]


def batch(shape: tuple[int, ...] | int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    names = ("logprob", "old_logprob", "advantages", "values", "old_values", "returns", "entropy", "ref_logprob")
    scales = (0.3, 0.3, 1, 1, 1, 1, 1, 0.3)
    shape = (shape,) if isinstance(shape, int) else shape
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)
        for name, scale in zip(names, scales, strict=True)
    }


def outcome(inputs: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None, **how) -> dict[str, Tensor]:
    """Loss, gradients and metrics by name."""
    inputs = {name: x.detach().to(dtype or x.dtype).clone() for name, x in inputs.items()}
    leaves = {name: inputs[name].requires_grad_() for name in ("logprob", "entropy", "values") if name in inputs}
    if "values" not in inputs:
        loss, metrics = ppo_policy_loss(**inputs, **how, backend=backend)
    elif "logprob" not in inputs:
        loss, metrics = ppo_value_loss(**inputs, **how, backend=backend)
    else:
        loss, metrics = ppo_loss(**inputs, **how, backend=backend)
    (loss * 1.5).backward()
    assert not any(value.requires_grad for value in metrics.values())
    gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach()} | gradients | metrics


def magnitudes(inputs: dict[str, Tensor], mask: Tensor | None = None, **how) -> dict[str, Tensor]:
    """Sum over tokens of 1 + |term|, in float64, for the loss and every metric that is a sum.

    The 1 because exp(x) - 1 - x, and a ratio, are made of numbers of about 1, however small the term is.
    """
    mask = torch.ones_like(next(iter(inputs.values())), dtype=torch.bool) if mask is None else mask != 0
    if how.get("denominator") is None:
        how |= {"denominator": mask.sum().clamp(min=1)}
    function = ppo_value_loss if "logprob" not in inputs else ppo_loss if "values" in inputs else ppo_policy_loss

    def term(named: dict[str, Tensor]) -> dict[str, Tensor]:
        loss, metrics = function(**named, **how, backend="torch")
        return {"loss": loss} | metrics

    if not mask.any():
        return dict.fromkeys(outcome(inputs, "torch", **how), torch.zeros((), device=mask.device))
    terms = torch.vmap(term)({name: x[mask].double() for name, x in inputs.items()})
    return {name: (1 + x.abs()).sum() for name, x in terms.items()}


def assert_as_good(inputs: dict[str, Tensor], **how) -> dict[str, Tensor]:
    """Every number, and every entry of a gradient: error at most 1.2 times the torch path's, and what rounding cannot avoid.

    That is, for sums, a few roundings of float64, relative to the sum of the absolute terms, whatever dtype came in and however
    many there are; one rounding to float32 for the loss; four for a gradient (the entry, 1 / denominator, and two products),
    relative to that entry. Half precision gradients need no more: the last rounding is as wrong for both.
    """
    exact, twins = outcome(inputs, "torch", torch.float64, **how), outcome(inputs, "torch", **how)
    ours = outcome(inputs, "triton", **how)
    sums = magnitudes(inputs, **how)
    assert list(ours) == list(twins) == list(exact)
    for name, truth in exact.items():
        assert ours[name].dtype == twins[name].dtype and ours[name].shape == twins[name].shape
        error, allowed = ((x.double() - truth).abs() for x in (ours[name], twins[name]))
        roundings = {"loss": 1, "d": 4}.get(name.split()[0], 0)
        unavoidable = roundings * 2.0**-24 * truth.abs() + 2.0**-51 * (0 if name[:2] == "d " else sums[name])
        assert (error <= 1.2 * allowed + unavoidable).all(), (name, error.max(), allowed.max())
    return ours


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_terms_at_once(estimator, dtype):
    inputs = batch(2500, dtype=dtype)
    mask = torch.rand(2500, device=DEVICE) < 0.7
    for x in inputs.values():
        x[~mask] = torch.nan
    ours = assert_as_good(
        inputs, mask=mask, entropy_coef=0.1, kl_coef=0.3, kl_estimator=estimator, dual_clip=1.3, value_coef=0.5, huber_delta=1.0
    )
    assert all((ours[f"d {name}"][~mask] == 0).all() for name in ("logprob", "values", "entropy"))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([0, 1, 3, 1023, 1024, 1025, (3, 0), (2, 3, 5)]),
    kind=st.sampled_from(["policy", "value", "both"]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    clip=st.sampled_from([None, 0.2]),
    keep=st.sampled_from([None, 0.0, 0.5]),
    denominator=st.sampled_from([None, 7, 2.5, torch.int64, torch.float64, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_options(shape, kind, options, clip, keep, denominator, dtype, seed):
    with_entropy, with_reference, dual, huber, int_mask = options
    inputs = batch(shape, seed, dtype)
    of_tensor = isinstance(denominator, torch.dtype)
    how: dict = {"denominator": torch.tensor(9, dtype=denominator, device=DEVICE) if of_tensor else denominator}
    if keep is not None:
        mask = torch.rand(inputs["logprob"].shape, generator=torch.Generator().manual_seed(seed)) < keep
        how["mask"] = (mask.long() * 3 if int_mask else mask).to(DEVICE)
    if kind == "value":
        inputs = {name: inputs[name] for name in ("values", "old_values", "returns")}
        how |= {"clip": clip, "huber_delta": 0.5 if huber else None}
    else:
        if not with_entropy:
            del inputs["entropy"]
        if not with_reference:
            del inputs["ref_logprob"]
        how |= {"entropy_coef": 0.2 * with_entropy, "kl_coef": 0.2 * with_reference, "dual_clip": 1.1 if dual else None}
        if kind == "both":
            how |= {"value_clip": clip, "huber_delta": 0.5 if huber else None, "value_coef": 0.3}
        else:
            inputs = {name: x for name, x in inputs.items() if name not in ("values", "old_values", "returns")}
    assert_as_good(inputs, **how)


def test_the_same_choices_where_the_two_terms_of_a_maximum_are_equal():
    """Ratios on the edge, equal errors on both sides of the return, no difference to the reference: as torch.maximum."""
    inputs = {
        "logprob": [0.0, 0.0, 1.0], "old_logprob": [0.0] * 3, "advantages": [0.0, 1.0, -1.0], "values": [3.0, 1.0, 2.0],
        "old_values": [1.0, 1.0, 2.0], "returns": [2.25, 1.0, 2.0], "entropy": [1.0] * 3, "ref_logprob": [0.0, 0.0, 1.0],
    }  # fmt: skip
    tensors = {name: torch.tensor(x, device=DEVICE) for name, x in inputs.items()}
    for estimator, value_clip in itertools.product(ESTIMATORS, (0.5, None)):
        how = {"kl_coef": 1.0, "kl_estimator": estimator, "value_clip": value_clip, "clip_low": 0.0, "clip_high": 0.0}
        twin, ours = (outcome(tensors, backend, **how) for backend in ("torch", "triton"))
        torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("difference", [90.0, 1e4, math.inf, -90.0, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("estimator", ["k3", "jensen_shannon"])
def test_ratio_overflow_is_finite(difference, advantage, estimator):
    inputs = {
        "logprob": [difference, -1.0], "old_logprob": [0.0, -1.0], "advantages": [advantage, 1.0],
        "ref_logprob": [-difference if math.isfinite(difference) else 0.0, -1.0],
    }  # fmt: skip
    tensors = {name: torch.tensor(x, device=DEVICE) for name, x in inputs.items()}
    how = {"kl_coef": 0.1, "kl_estimator": estimator}
    twin, ours = (outcome(tensors, backend, **how) for backend in ("torch", "triton"))
    assert ours["loss"].isfinite() or not twin["loss"].isfinite()
    assert ours["d logprob"].isfinite().all()
    if twin["loss"].isfinite():  # the twin's Jensen-Shannon estimate of infinite log-probabilities is NaN
        torch.testing.assert_close(ours["d logprob"], twin["d logprob"])
        torch.testing.assert_close(ours["loss"], twin["loss"], rtol=1e-5, atol=0)


def test_nan_is_not_hidden():
    inputs = batch(5)
    inputs["logprob"][2] = inputs["values"][3] = torch.nan
    ours = outcome(inputs, "triton")
    assert all(ours[name].isnan() for name in ("loss", "ratio_sum", "ratio_max", "approx_kl_sum", "value_loss_sum"))


def test_small_log_ratios_keep_their_digits():
    """exp(x) - 1 - x of 1e-4 is 5e-9: the plain difference is all rounding."""
    logprob = torch.full((8,), 1e-4, device=DEVICE)
    zeros, ones = torch.zeros_like(logprob), torch.ones_like(logprob)
    _, metrics = ppo_policy_loss(logprob, zeros, ones, ref_logprob=zeros, backend="triton")
    x = logprob[0].item()
    assert metrics["approx_kl_sum"].item() == pytest.approx(8 * (math.expm1(x) - x), rel=1e-7)
    assert metrics["kl_ref_sum"].item() == pytest.approx(8 * (math.expm1(-x) + x), rel=1e-7)


def test_explained_variance_of_large_returns():
    torch.manual_seed(0)
    returns = (torch.randn(3000) + 1000).to(DEVICE)
    values = returns + 0.3 * torch.randn(3000, device=DEVICE)
    metrics = reduce_metrics([ppo_value_loss(values, None, returns, clip=None, backend="triton")[1]])
    expected = 1 - (returns.double() - values.double()).var() / returns.double().var()
    assert metrics["explained_variance"].item() == pytest.approx(expected.item(), abs=1e-4)


def test_layout_does_not_matter_and_mixed_dtypes_are_allowed():
    inputs = batch((6, 4))
    strided = {name: x.repeat_interleave(2, 1).t().contiguous().t()[:, ::2] for name, x in inputs.items()}
    assert not strided["logprob"].is_contiguous()
    mask = torch.rand(4, 6, device=DEVICE).t() < 0.6
    ours, plain = (outcome(x, "triton", mask=m) for x, m in ((strided, mask), (inputs, mask.contiguous())))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    mixed = inputs | {"advantages": inputs["advantages"].half(), "old_logprob": inputs["old_logprob"].double()}
    assert_as_good(mixed, mask=mask)


def test_the_same_bits_twice():
    inputs = batch(3000)
    first, again = (outcome(inputs, "triton", entropy_coef=0.1, kl_coef=0.1) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_more_tokens_than_16_bits_count_and_more_blocks_than_one_tile_of_sums():
    inputs = batch(65_600, dtype=torch.bfloat16)
    assert_as_good({name: inputs[name] for name in ("logprob", "old_logprob", "advantages")})


ROOM = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 0


@pytest.mark.parametrize(
    "size", [700, pytest.param(2**31 + 300, marks=pytest.mark.skipif(ROOM < 40 * 2**30, reason="needs a GPU with 40 GiB"))]
)
def test_the_last_tokens_of_more_than_31_bits_count(size):
    leaf = torch.zeros(size, dtype=torch.float16, device=DEVICE, requires_grad=True)
    loss, metrics = ppo_value_loss(leaf, None, torch.full_like(leaf, 2), clip=None, denominator=1.0, backend="triton")
    assert loss.item() == pytest.approx(2 * size) and metrics["value_count"].item() == size
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert (gradient[:300] == -2).all() and (gradient[-600:] == -2).all()


def test_differentiable_once_and_only_where_it_says():
    inputs = {name: x.requires_grad_() for name, x in batch(6).items()}
    loss, _ = ppo_loss(**inputs, entropy_coef=0.1, kl_coef=0.1, backend="triton")
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, create_graph=True)
    there = [name for name, grad in zip(inputs, grads, strict=True) if grad is not None]
    assert there == ["logprob", "values", "entropy"]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grads[0].sum(), inputs["logprob"])
    with torch.no_grad():
        assert not ppo_loss(**inputs, backend="triton")[0].requires_grad


def test_float64_takes_the_torch_form():
    loss, _ = ppo_policy_loss(*(torch.zeros(3, dtype=torch.float64, device=DEVICE) for _ in range(3)), backend="triton")
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_a_break_and_once_for_all_lengths(backend):
    names = list(batch(1))

    def losses(mask: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, inputs, strict=True))
        loss, metrics = ppo_loss(**named, mask=mask, entropy_coef=0.1, kl_coef=0.1, backend=backend)
        policy, _ = ppo_policy_loss(*inputs[:3], denominator=mask.sum() + 1, backend=backend)
        value, _ = ppo_value_loss(*inputs[3:6], denominator=10, backend=backend)
        return loss * 2, metrics["ratio_sum"], policy, value

    def call(size: int) -> tuple[Tensor, ...]:
        inputs = batch(size)
        leaves = [x.requires_grad_(name in ("logprob", "values", "entropy")) for name, x in inputs.items()]
        return torch.arange(size, device=DEVICE) % 3 > 0, *leaves

    assert_compiles_once(losses, [call(size) for size in (5, 40, 41, 300)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, device=DEVICE)}, r"values must have shape \[3\] \(that of logprob\), got \[2\]"),
        ({"returns": torch.zeros(3, device="meta")}, "returns must be on the device of logprob"),
        ({"old_values": None}, "old_values must be given for value_clip 0.2, got None"),
        ({"value_clip": 0.0}, "value_clip must be a finite number > 0, got 0.0"),
        ({"value_coef": math.nan}, "value_coef must be a finite number"),
        ({"mask": torch.ones(3, device=DEVICE)}, "mask must be a bool or integer tensor"),
        ({"kl_coef": 0.1}, "ref_logprob must be given for kl_coef 0.1, got None"),
        ({"denominator": torch.ones(1, device=DEVICE)}, r"denominator must have shape \[\]"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_wrong_arguments(change, message):
    inputs = {name: x for name, x in batch(3).items() if name not in ("entropy", "ref_logprob")}
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match=message):
            ppo_loss(**inputs | {"backend": backend} | change)
