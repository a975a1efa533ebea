"""token_logprob against float64 and plain torch, and the ways other projects' kernels have failed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import token_logprob

INF = float("inf")


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None):
    """Plain torch in the dtype of the logits."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[..., None]).squeeze(-1), entropy


def gradient(function, logits: Tensor, targets: Tensor, weights: tuple[Tensor, Tensor], **settings_) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    logprob, entropy = function(leaf, targets, **settings_)
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.sampled_from([1, 2, 3, 31, 257]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_match_plain_torch_in_float64(rows, vocab, temperature, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 4
    targets = torch.randint(vocab, (rows,), generator=generator)
    weights = tuple(torch.randn(2, rows, generator=generator, dtype=torch.float64))
    how = {"temperature": temperature, "softcap": softcap}
    torch.testing.assert_close(token_logprob(logits, targets, **how), reference(logits, targets, **how))
    torch.testing.assert_close(
        gradient(token_logprob, logits, targets, weights, **how), gradient(reference, logits, targets, weights, **how)
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, targets, temperature=0.7, softcap=softcap), (logits,))


@pytest.mark.parametrize("vocab", [1000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_larger_than_plain_torch_in_float32(vocab, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(6, vocab) * 5).to(dtype)
    targets = torch.randint(vocab, (6,))
    weights = (torch.randn(6), torch.randn(6))
    exact = reference(logits.double(), targets)
    plain = reference(logits.float(), targets)
    for ours, theirs, truth in zip(token_logprob(logits, targets), plain, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).abs().max() <= 1.2 * (theirs - truth).abs().max() + 2e-6
    exact_grad = gradient(reference, logits.double(), targets, weights)
    grad = gradient(token_logprob, logits, targets, weights)
    assert grad.dtype == dtype
    rounding = (exact_grad.to(dtype) - exact_grad).abs().max()
    assert (grad - exact_grad).abs().max() <= 1.2 * rounding + 2e-6


def test_more_rows_than_one_chunk():
    torch.manual_seed(0)
    logits, targets = torch.randn(2500, 7), torch.randint(7, (2500,))
    weights = (torch.randn(2500), torch.randn(2500))
    torch.testing.assert_close(token_logprob(logits, targets), reference(logits, targets))
    torch.testing.assert_close(
        gradient(token_logprob, logits, targets, weights), gradient(reference, logits, targets, weights)
    )


@pytest.mark.parametrize("offset", [-1e4, -1e30, 1e4, 1e30])
def test_equal_rows_of_any_size_are_uniform(offset):
    """All strongly negative rows give NaN where a running maximum starts from 0; huge ones where it is not removed."""
    logits = torch.full((2, 1000), offset)
    logprob, entropy = token_logprob(logits, torch.tensor([0, 999]))
    expected = torch.log(torch.tensor(1000.0))
    torch.testing.assert_close(logprob, -expected.expand(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, expected.expand(2), rtol=1e-6, atol=0)
    grad = gradient(token_logprob, logits, torch.tensor([0, 999]), (torch.ones(2), torch.ones(2)))
    torch.testing.assert_close(grad[0, :2], torch.tensor([1 - 1e-3, -1e-3]), rtol=1e-4, atol=0)


def test_shifting_a_row_changes_nothing():
    logits, targets = torch.randint(-9, 9, (4, 50)).float(), torch.randint(50, (4,))
    assert torch.equal(token_logprob(logits - 16384, targets)[0], token_logprob(logits, targets)[0])


def test_entries_of_minus_infinity_are_absent():
    logits = torch.tensor([[1.0, -INF, 2.0, -INF], [-INF, -INF, 3.0, -INF]])
    targets = torch.tensor([2, 2])
    logprob, entropy = token_logprob(logits, targets)
    kept = token_logprob(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    torch.testing.assert_close(logprob, torch.stack([kept[0][0], torch.tensor(0.0)]))
    torch.testing.assert_close(entropy, torch.stack([kept[1][0], torch.tensor(0.0)]))
    grad = gradient(token_logprob, logits, targets, (torch.ones(2), torch.ones(2)))
    assert grad.isfinite().all()
    assert (grad[logits == -INF] == 0).all()
    assert token_logprob(logits, torch.tensor([1, 0]))[0].tolist() == [-INF, -INF]


@pytest.mark.parametrize(
    "bad", [torch.full((3,), -INF), torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([0, INF, 0])]
)
def test_a_row_without_distribution_is_nan_and_harmless_when_masked(bad):
    logits = torch.stack([bad, torch.tensor([1.0, 2.0, 3.0])])
    targets = torch.tensor([0, 1])
    logprob, entropy = token_logprob(logits, targets)
    assert logprob.isnan().tolist() == [True, False] and entropy.isnan().tolist() == [True, False]
    leaf = logits.clone().requires_grad_()
    logprob, entropy = token_logprob(leaf, targets)
    mask = torch.tensor([False, True])
    (torch.where(mask, logprob, 0.0).sum() + torch.where(mask, entropy, 0.0).sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert leaf.grad[1].isfinite().all() and leaf.grad[1].abs().sum() > 0


def test_a_tiny_temperature_stays_finite():
    logprob, entropy = token_logprob(torch.tensor([[100.0, 99.0, 0.0]]), torch.tensor([0]), temperature=1e-38)
    assert logprob.tolist() == [0.0] and entropy.tolist() == [0.0]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3)])
def test_leading_shapes(shape):
    logits, targets = torch.randn(*shape, 11), torch.randint(11, shape)
    torch.testing.assert_close(token_logprob(logits, targets), reference(logits, targets))


def test_non_contiguous_logits_and_int32_targets():
    logits, targets = torch.randn(13, 6, 4).permute(2, 1, 0)[:, :-1], torch.randint(13, (5, 4)).t()
    weights = (torch.randn(4, 5), torch.randn(4, 5))
    torch.testing.assert_close(token_logprob(logits, targets.int()), reference(logits, targets))
    torch.testing.assert_close(
        gradient(token_logprob, logits, targets, weights), gradient(reference, logits, targets, weights)
    )


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(3, 9, requires_grad=True)
    before = logits.detach().clone()
    logprob, entropy = token_logprob(logits, torch.tensor([1, 2, 3]), temperature=0.5, softcap=2.0)
    (logprob + entropy).sum().backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_has_its_gradient(which):
    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    leaves = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_logprob(leaves[0], targets)[which].sum().backward()
    reference(leaves[1], targets)[which].sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_only_the_logits_and_row_vectors_are_saved():
    logits = torch.randn(8, 100, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprob(logits, torch.randint(100, (8,)))
    assert sorted(saved) == [8] * 5 + [800]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits_RV": torch.zeros(2, 3, dtype=torch.int64)},
            "logits must have one of the dtypes float32.* got torch.int",
        ),
        ({"logits_RV": torch.zeros(2, 0)}, r"logits must have shape \[..., V\] with V >= 1, got \[2, 0\]"),
        ({"logits_RV": [[0.0]]}, "logits must be a tensor, got list"),
        ({"targets_R": torch.zeros(3, dtype=torch.int64)}, r"targets must have shape \[2\].* got \[3\]"),
        ({"targets_R": torch.zeros(2)}, "targets must have one of the dtypes int64, int32, got torch.float32"),
        ({"targets_R": torch.tensor([0, 3])}, r"targets must be in \[0, 3\).* got values from 0 to 3"),
        ({"targets_R": torch.tensor([-100, 2])}, r"targets must be in \[0, 3\).* got values from -100 to 2"),
        ({"targets_R": torch.zeros(2, dtype=torch.int64, device="meta")}, r"device of logits \(cpu\), got meta"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": torch.nan}, "temperature must be a finite number > 0, got nan"),
        ({"softcap": -1.0}, "softcap must be a finite number > 0, got -1.0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"logits_RV": torch.zeros(2, 3), "targets_R": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        token_logprob(**arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_caller_may_write_into_what_it_gets(backend):
    """TRL's DPO sets the log-probs of masked tokens to 0 in place; backward must still know the true ones."""
    logits, targets = torch.randn(5, 33), torch.randint(33, (5,))
    weights = (torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0]), torch.zeros(5))

    def written_to(leaf: Tensor, targets: Tensor, **settings_):
        logprob, entropy = token_logprob(leaf, targets, **settings_)
        logprob[1::2] = 0.0
        entropy[:] = 0.0
        return logprob, entropy

    wanted = gradient(token_logprob, logits, targets, weights, backend=backend)
    torch.testing.assert_close(gradient(written_to, logits, targets, weights, backend=backend), wanted, rtol=0, atol=0)
