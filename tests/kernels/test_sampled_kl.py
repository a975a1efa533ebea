"""sampled_kl: hand-computed values, expectations over all tokens, and what each form does as a loss."""

import math

import pytest
import torch
from torch import Tensor

from fastppo_kernels import sampled_kl


@pytest.mark.parametrize(
    ("estimator", "above", "below"),
    [
        ("k1", 0.693147, -0.693147),
        ("clamped_k1", 0.693147, 0.0),
        ("k3", 0.193147, 0.306853),
        ("k2", 0.240227, 0.240227),
        ("jensen_shannon", 0.143841, 0.143841),
    ],
)
def test_values_by_hand(estimator, above, below):
    """pi = 1/2 against pi_ref = 1/4, and the other way round (arXiv 2309.09055)."""
    half, quarter = torch.tensor([math.log(0.5), math.log(0.25)]), torch.tensor([math.log(0.25), math.log(0.5)])
    torch.testing.assert_close(sampled_kl(half, quarter, estimator), torch.tensor([above, below]), rtol=0, atol=1e-6)


def expected_gradient(estimator: str, policy: Tensor, reference: Tensor) -> Tensor:
    """E over tokens of pi of the gradient of the per-token loss in the policy's logits."""
    leaf = policy.clone().requires_grad_()
    lp = leaf.log_softmax(-1)
    per_token = sampled_kl(lp, reference.log_softmax(-1), estimator)
    return torch.autograd.grad((lp.detach().exp() * per_token).sum(), leaf)[0]


def exact_gradient(divergence, policy: Tensor) -> Tensor:
    leaf = policy.clone().requires_grad_()
    return torch.autograd.grad(divergence(leaf.log_softmax(-1)), leaf)[0]


def test_expectations_of_values_and_gradients():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 7, dtype=torch.float64)
    lp, lr = policy.log_softmax(-1), reference.log_softmax(-1)
    reverse = (lp.exp() * (lp - lr)).sum()
    for unbiased in ("k1", "k3"):
        torch.testing.assert_close((lp.exp() * sampled_kl(lp, lr, unbiased)).sum(), reverse)
    assert (lp.exp() * sampled_kl(lp, lr, "clamped_k1")).sum() > reverse
    assert (sampled_kl(lp, lr, "k3") >= 0).all()

    reverse_gradient = exact_gradient(lambda x: (x.exp() * (x - lr)).sum(), policy)
    forward_gradient = exact_gradient(lambda x: (lr.exp() * (lr - x)).sum(), policy)
    torch.testing.assert_close(expected_gradient("k1", policy, reference), torch.zeros_like(policy))
    torch.testing.assert_close(expected_gradient("k2", policy, reference), reverse_gradient)
    torch.testing.assert_close(expected_gradient("k3", policy, reference), forward_gradient)


@pytest.mark.parametrize("estimator", ["k1", "clamped_k1", "k2", "k3", "jensen_shannon"])
def test_gradcheck_and_zero_at_equality(estimator):
    lp = (-torch.rand(6, dtype=torch.float64) - 0.1).requires_grad_()
    lr = (-torch.rand(6, dtype=torch.float64) - 1.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sampled_kl(a, b, estimator), (lp, lr))
    same = sampled_kl(lp.detach(), lp.detach(), estimator)
    torch.testing.assert_close(same, torch.zeros_like(same))


@pytest.mark.parametrize("estimator", ["k1", "clamped_k1", "k2", "k3", "jensen_shannon"])
@pytest.mark.parametrize("far", [(-500.0, -0.1), (-0.1, -500.0)])
def test_far_apart_is_finite(estimator, far):
    lp, lr = (torch.tensor([x], requires_grad=True) for x in far)
    value = sampled_kl(lp, lr, estimator)
    value.sum().backward()
    assert value.isfinite().all() and lp.grad is not None and lp.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    assert sampled_kl(torch.zeros(2).bfloat16(), torch.full((2,), -1e-3).bfloat16(), "k3").dtype == torch.float32


def test_wrong_arguments():
    with pytest.raises(ValueError, match="estimator must be one of k1, clamped_k1, k2, k3, jensen_shannon, got 'k4'"):
        sampled_kl(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match=r"ref_logprob must have shape \[2\] \(that of logprob\), got \[3\]"):
        sampled_kl(torch.zeros(2), torch.zeros(3), "k1")
