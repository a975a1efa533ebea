"""The PPO losses: values by hand, gradients, masks, micro-batches, metrics."""

import math

import pytest
import torch
from helpers import DEVICE, TRITON_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import ppo_loss, ppo_policy_loss, ppo_value_loss, reduce_metrics

LOG = math.log
ESTIMATORS = ["k1", "clamped_k1", "k2", "k3", "jensen_shannon"]
both_backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=TRITON_MARKS)])


def policy_grad(logprob: Tensor, *arguments: Tensor, **how) -> tuple[Tensor, Tensor]:
    leaf = logprob.detach().clone().requires_grad_()
    loss, _ = ppo_policy_loss(leaf, *arguments, **how)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "how", "loss", "gradient"),
    [
        (1.0, 2.0, {}, -2.0, -2.0),
        (1.1, 2.0, {}, -2.2, -2.2),
        (1.5, 2.0, {}, -2.4, 0.0),  # clipped above
        (1.5, 2.0, {"clip_high": 0.6}, -3.0, -3.0),
        (0.5, 2.0, {}, -1.0, -1.0),  # too low for a good action: full gradient
        (0.5, -2.0, {}, 1.6, 0.0),  # clipped below
        (0.5, -2.0, {"clip_low": 0.6}, 1.0, 1.0),
        (1.5, -2.0, {}, 3.0, 3.0),
        (5.0, -2.0, {}, 10.0, 10.0),
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
        (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),
    ],
)
@both_backends
def test_surrogate_by_hand(ratio, advantage, how, loss, gradient, backend):
    """d loss / d logprob = -A ratio where not clipped."""
    one = torch.ones(1, device=DEVICE)
    value, grad = policy_grad(one * LOG(ratio), 0 * one, one * advantage, **how, backend=backend)
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert grad.item() == pytest.approx(gradient, rel=1e-6)


@both_backends
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_at_the_start_ratio_is_one_and_kl_zero(estimator, backend):
    logprob, advantages = -torch.rand(50, device=DEVICE) * 9, torch.randn(50, device=DEVICE)
    loss, metrics = ppo_policy_loss(
        logprob, logprob.clone(), advantages, ref_logprob=logprob.clone(), kl_coef=0.1, kl_estimator=estimator, backend=backend
    )
    means = reduce_metrics([metrics])
    torch.testing.assert_close(loss, -advantages.mean())
    assert means["ratio"].item() == 1.0 and means["ratio_max"].item() == 1.0
    assert means["approx_kl"].item() == 0.0 and means["clip_fraction"].item() == 0.0
    # The torch form of this one subtracts logarithms, rounded to float32.
    unavoidable = 2e-6 if (estimator, backend) == ("jensen_shannon", "torch") else 0.0
    assert means["kl_ref"].item() == pytest.approx(0.0, abs=unavoidable)


def test_all_terms_and_metrics_by_hand():
    logprob = torch.tensor([LOG(0.6), LOG(0.1), LOG(0.5)])
    old = torch.tensor([LOG(0.3), LOG(0.2), LOG(0.9)])
    reference = torch.tensor([LOG(0.4), LOG(0.1), LOG(0.9)])
    loss, metrics = ppo_policy_loss(
        logprob,
        old,
        torch.tensor([1.0, -1.0, torch.nan]),
        mask=torch.tensor([True, True, False]),
        entropy=torch.tensor([0.5, 1.5, torch.nan]),
        entropy_coef=0.1,
        ref_logprob=reference,
        kl_coef=2.0,
        kl_estimator="k2",
    )
    k2 = 0.5 * LOG(0.6 / 0.4) ** 2
    assert loss.item() == pytest.approx((-1.2 + 0.8 - 0.1 * 2.0 + 2.0 * k2) / 2, rel=1e-6)
    means = {name: value.item() for name, value in reduce_metrics([metrics]).items()}
    assert means == pytest.approx(
        {
            "count": 2,
            "ratio": 1.25,
            "ratio_max": 2.0,
            "clip_fraction": 1.0,
            "approx_kl": ((2 - 1 - LOG(2)) + (0.5 - 1 + LOG(2))) / 2,
            "policy_loss": -0.2,
            "entropy": 1.0,
            "kl_ref": k2 / 2,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator):
    torch.manual_seed(1)
    logprob, entropy = (torch.rand(8, dtype=torch.float64).requires_grad_() for _ in range(2))
    old, advantages, reference = torch.rand(8), torch.randn(8), torch.rand(8)
    mask = torch.arange(8) != 3

    def function(lp: Tensor, h: Tensor) -> Tensor:
        return ppo_policy_loss(
            lp, old.double(), advantages.double(), mask=mask, dual_clip=1.5, entropy=h, entropy_coef=0.3,
            ref_logprob=reference.double(), kl_coef=0.7, kl_estimator=estimator,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(function, (logprob, entropy))
    assert torch.autograd.gradgradcheck(function, (logprob, entropy))


def test_only_logprob_and_entropy_get_gradients():
    tensors = [torch.rand(4, requires_grad=True) for _ in range(5)]
    loss, metrics = ppo_policy_loss(
        *tensors[:3], entropy=tensors[3], entropy_coef=0.1, ref_logprob=tensors[4], kl_coef=0.1
    )
    loss.backward()
    assert [tensor.grad is not None for tensor in tensors] == [True, False, False, True, False]
    assert not any(value.requires_grad for value in metrics.values())
    assert all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize("difference", [90.0, 1e4, math.inf, -90.0, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratio_overflow_is_finite(difference, advantage):
    loss, grad = policy_grad(
        torch.tensor([difference, -1.0]),
        torch.tensor([0.0, -1.0]),
        torch.tensor([advantage, 1.0]),
        ref_logprob=torch.tensor([-difference if math.isfinite(difference) else 0.0, -1.0]),
        kl_coef=0.1,
    )
    assert loss.isfinite()
    assert grad[0].item() == 0.0 and grad[1].item() == pytest.approx(-0.5)


@both_backends
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 3)])
def test_everything_masked_or_nothing_there_gives_zero(shape, backend):
    mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    nan = torch.full(shape, torch.nan, device=DEVICE)
    loss, grad = policy_grad(
        nan, nan, nan, mask=mask, entropy=nan, entropy_coef=0.1, ref_logprob=nan, kl_coef=0.1, dual_clip=3.0, backend=backend
    )
    assert loss.item() == 0.0 and (grad == 0).all()
    leaf = nan.clone().requires_grad_()
    value_loss, value_metrics = ppo_value_loss(leaf, nan, nan, mask=mask, backend=backend)
    value_loss.backward()
    assert value_loss.item() == 0.0 and leaf.grad is not None and (leaf.grad == 0).all()
    policy_metrics = ppo_policy_loss(nan, nan, nan, mask=mask, backend=backend)[1]
    means = reduce_metrics([policy_metrics | value_metrics])
    assert means.pop("explained_variance").isnan()
    assert all(value.item() == 0.0 for value in means.values())


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), pieces=st.integers(1, 6), seed=st.integers(0, 1000))
def test_micro_batches_add_up_to_the_whole(count, pieces, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    names = ("old_logprob", "advantages", "ref_logprob")
    constants = dict(zip(names, (draw() * 0.3, draw(), draw() * 0.3), strict=True))
    old_values, returns = draw(), draw()
    leaves = [(draw() * 0.3).requires_grad_(), draw().requires_grad_(), draw().requires_grad_()]
    mask = torch.rand(count, generator=generator) < 0.7
    total = mask.sum().clamp(min=1)

    def losses(piece: slice, denominator) -> tuple[Tensor, dict[str, Tensor]]:
        policy, policy_metrics = ppo_policy_loss(
            leaves[0][piece], mask=mask[piece], entropy=leaves[1][piece], entropy_coef=0.2, kl_coef=0.5,
            denominator=denominator, dual_clip=2.0, **{name: value[piece] for name, value in constants.items()},
        )  # fmt: skip
        value, value_metrics = ppo_value_loss(
            leaves[2][piece], old_values[piece], returns[piece], mask=mask[piece], denominator=denominator
        )
        return policy + 0.1 * value, policy_metrics | value_metrics

    whole, whole_metrics = losses(slice(None), None)
    expected = torch.autograd.grad(whole, leaves)
    size = -(-count // pieces)
    parts = [losses(slice(start, start + size), total) for start in range(0, count, size)]
    for loss, _ in parts:
        loss.backward()
    torch.testing.assert_close(sum(loss.detach() for loss, _ in parts), whole.detach())
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)
    torch.testing.assert_close(
        reduce_metrics([metrics for _, metrics in parts]), reduce_metrics([whole_metrics]), equal_nan=True
    )


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float16])
def test_a_denominator_in_a_tensor_is_a_constant_and_has_no_say_in_the_dtype(dtype, backend):
    logprob = torch.randn(2, 6, device=DEVICE)
    denominator = torch.tensor(3, dtype=dtype, device=DEVICE).requires_grad_(dtype.is_floating_point)
    how = {"values": logprob[0], "old_values": None, "returns": logprob[1], "value_clip": None, "backend": backend}
    loss, _ = ppo_loss(logprob[0], logprob[1], logprob[1], **how, denominator=denominator)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    torch.testing.assert_close(loss, ppo_loss(logprob[0], logprob[1], logprob[1], **how, denominator=3)[0])


def test_layout_dtype_and_mask_dtype_do_not_matter():
    torch.manual_seed(0)
    logprob, old, advantages = torch.randn(3, 6, 4).transpose(1, 2)[..., ::2] * 0.3
    mask = torch.rand(4, 3) < 0.6
    loss, _ = ppo_policy_loss(logprob, old, advantages, mask=mask)
    flat, _ = ppo_policy_loss(logprob.reshape(-1), old.reshape(-1), advantages.reshape(-1), mask=mask.long().view(-1))
    selected, _ = ppo_policy_loss(logprob[mask], old[mask], advantages[mask])
    torch.testing.assert_close(loss, flat)
    torch.testing.assert_close(loss, selected)
    half, _ = ppo_policy_loss(logprob.bfloat16(), old.bfloat16(), advantages.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "how", "loss", "gradient"),
    [
        (1.1, {}, 0.5 * 0.9**2, -0.9),
        (1.5, {}, 0.5 * 0.8**2, 0.0),  # moved 0.5 towards the return: held at 1.2
        (0.5, {}, 0.5 * 1.5**2, -1.5),  # moved away: the unclipped term is the larger
        (1.5, {"clip": None}, 0.5 * 0.5**2, -0.5),
        (1.5, {"clip": 0.6}, 0.5 * 0.5**2, -0.5),
        (-3.0, {"huber_delta": 2.0}, 2.0 * (5.0 - 1.0), -2.0),
        (1.1, {"huber_delta": 2.0}, 0.5 * 0.9**2, -0.9),
    ],
)
@both_backends
def test_value_loss_by_hand(value, how, loss, gradient, backend):
    """Old value 1, return 2."""
    one = torch.ones(1, device=DEVICE)
    leaf = (one * value).requires_grad_()
    got, _ = ppo_value_loss(leaf, one, 2 * one, **how, backend=backend)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert leaf.grad is not None and leaf.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_huber_is_torchs():
    torch.manual_seed(0)
    values, returns = torch.randn(2, 30, dtype=torch.float64) * 3
    loss, _ = ppo_value_loss(values, None, returns, clip=None, huber_delta=1.3)
    torch.testing.assert_close(loss, torch.nn.functional.huber_loss(values, returns, delta=1.3))


@pytest.mark.parametrize("huber_delta", [None, 0.8])
def test_value_gradcheck(huber_delta):
    torch.manual_seed(0)
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    old, returns = torch.randn(2, 9, dtype=torch.float64)
    mask = torch.arange(9) != 4
    assert torch.autograd.gradcheck(
        lambda v: ppo_value_loss(v, old, returns, mask=mask, huber_delta=huber_delta)[0], (values,)
    )


def test_value_metrics():
    torch.manual_seed(0)
    returns = torch.randn(40) + 100
    values = returns + 0.3 * torch.randn(40) - 1
    old = values + torch.where(torch.arange(40) < 10, 0.5, 0.0)
    _, metrics = ppo_value_loss(values, old, returns)
    means = reduce_metrics([metrics])
    expected = 1 - (returns - values).double().var() / returns.double().var()
    assert means["explained_variance"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert means["value_clip_fraction"].item() == pytest.approx(0.0)
    worse = torch.where(torch.arange(40) < 10, values - 0.5, values)
    clipped = reduce_metrics([ppo_value_loss(values, worse, returns)[1]])["value_clip_fraction"]
    assert clipped.item() == pytest.approx(0.25)
    assert means["return"].item() == pytest.approx(returns.mean().item())
    assert means["value_error"].item() == pytest.approx((returns - values).mean().item(), abs=1e-5)
    equal = ppo_value_loss(torch.randn(5), None, torch.full((5,), 0.1), clip=None)[1]
    assert reduce_metrics([equal])["explained_variance"].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprob": torch.zeros(2)}, r"old_logprob must have shape \[3\] \(that of logprob\), got \[2\]"),
        ({"advantages": torch.zeros(3, dtype=torch.int64)}, "advantages must have one of the dtypes"),
        (
            {"advantages": torch.zeros(3, device="meta")},
            r"advantages must be on the device of logprob \(cpu\), got meta",
        ),
        ({"mask": torch.ones(3)}, "mask must be a bool or integer tensor, got torch.float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must have shape \[3\]"),
        ({"clip_low": 1.5}, "clip_low must be a finite number >= 0 and <= 1, got 1.5"),
        ({"clip_high": -0.1}, "clip_high must be a finite number >= 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number > 1, got 1.0"),
        ({"entropy_coef": 0.1}, "entropy must be given for entropy_coef 0.1, got None"),
        ({"kl_coef": 0.1}, "ref_logprob must be given for kl_coef 0.1, got None"),
        ({"ref_logprob": torch.zeros(3), "kl_estimator": "kl"}, "estimator must be one of .* got 'kl'"),
        ({"denominator": 0}, "denominator must be a finite number > 0, got 0"),
        ({"denominator": torch.ones(1)}, r"denominator must have shape \[\]"),
    ],
)
def test_wrong_policy_arguments(change, message):
    arguments = {name: torch.zeros(3) for name in ("logprob", "old_logprob", "advantages")} | change
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_values": None}, "old_values must be given for clip 0.2, got None"),
        ({"returns": torch.zeros(4)}, r"returns must have shape \[3\] \(that of values\), got \[4\]"),
        ({"clip": 0.0}, "clip must be a finite number > 0, got 0.0"),
        ({"huber_delta": -1.0}, "huber_delta must be a finite number > 0, got -1.0"),
        ({"values": [0.0]}, "values must be a tensor, got list"),
    ],
)
def test_wrong_value_arguments(change, message):
    arguments = {name: torch.zeros(3) for name in ("values", "old_values", "returns")} | change
    with pytest.raises(ValueError, match=message):
        ppo_value_loss(**arguments)


def test_reducing_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        reduce_metrics([])
