"""linear_ppo_loss in its torch form with a frozen head: what the backward needs of the logits is made in the forward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels import _head_ops, linear_logprob, linear_ppo_loss, ppo_policy_loss
from fastppo_kernels._rows import softmax_

# Actions of 9 rows in no order: row 3 has four of them (one token twice), rows 1 and 8 have none; chunks of 2, 4 and 5 rows end
# in the middle of them.
ROWS = torch.tensor([3, 0, 7, 3, 2, 5, 3, 6, 4, 3])
TARGETS = torch.tensor([11, 0, 49, 30, 7, 7, 11, 1, 22, 3])


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (9, 8), "weight": (50, 8), "bias": (50,), "lora_A": (3, 8), "lora_B": (50, 3), "old": (10,)}
    shapes |= {"advantages": (10,), "ref": (10,)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("old", "ref"):  # near the log-probs, so that the clips leave most gradients alone
        made[name] = 0.3 * made[name] - 4
    for name in ("weight", "bias", "lora_B"):
        made[name] *= 0.2
    return {name: value.to(dtype) for name, value in made.items()}


def run(x: dict[str, Tensor], dtype: torch.dtype, *, lora: bool, rows_A: Tensor | None, mask: Tensor | None = None, **how):
    x = {name: value.to(dtype) for name, value in x.items()}
    hidden = x["hidden"].clone().requires_grad_()
    adapter = {name: x[name] for name in ("lora_A", "lora_B")} if lora else {}
    count = len(TARGETS) if rows_A is not None else len(hidden)
    loss, metrics, logprob, entropy = linear_ppo_loss(
        hidden, x["weight"], TARGETS[:count], x["old"][:count], x["advantages"][:count], rows_A=rows_A, bias=x["bias"],
        ref_logprob=x["ref"][:count], mask=None if mask is None else mask[:count], backend="torch", **adapter, **how,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(3 * loss, hidden)
    return [loss.detach(), logprob, entropy, grad, *metrics.values()]


def plain(x: dict[str, Tensor], *, lora: bool, rows_A: Tensor | None, mask: Tensor | None = None, **how) -> list[Tensor]:
    """The definition, in float64 and with the gradients of torch."""
    x = {name: value.double() for name, value in x.items()}
    hidden = x["hidden"].clone().requires_grad_()
    logits = F.linear(hidden, x["weight"], x["bias"])
    if lora:
        logits = logits + how["lora_scale"] * hidden @ x["lora_A"].t() @ x["lora_B"].t()
    log_p = torch.log_softmax(how["logit_scale"] * logits / how["temperature"], -1)
    rows = torch.arange(len(hidden)) if rows_A is None else rows_A
    count = len(rows)
    logprob, entropy = log_p[rows, TARGETS[:count]], -(log_p.exp() * log_p).sum(-1)[rows]
    settings = {name: how[name] for name in ("dual_clip", "entropy_coef", "kl_coef", "kl_estimator", "denominator")}
    loss, metrics = ppo_policy_loss(
        logprob, x["old"][:count], x["advantages"][:count], mask=None if mask is None else mask[:count], entropy=entropy,
        ref_logprob=x["ref"][:count], **settings,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(3 * loss, hidden)
    return [loss.detach(), logprob.detach(), entropy.detach(), grad, *metrics.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 4, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_the_definition(dtype, entropy_coef, lora, shared, chunk_rows, masked):
    x, rows_A = inputs(dtype), ROWS if shared else None
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 1, 1]) if masked else None
    how = {
        "lora_scale": 0.6 if lora else 1.0, "temperature": 0.8, "logit_scale": 1.3, "dual_clip": 1.5, "kl_coef": 0.2,
        "kl_estimator": "k2" if lora else "k3", "entropy_coef": entropy_coef, "denominator": 7.0 if shared else None,
    }  # fmt: skip
    ours = run(x, dtype, lora=lora, rows_A=rows_A, mask=mask, chunk_rows=chunk_rows, **how)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for value, exact in zip(ours, plain(x, lora=lora, rows_A=rows_A, mask=mask, **how), strict=True):
        torch.testing.assert_close(value.double(), exact, **close)
    again = run(x, dtype, lora=lora, rows_A=rows_A, mask=mask, chunk_rows=chunk_rows, **how)
    assert all(torch.equal(*pair) for pair in zip(ours, again, strict=True))


def made_by(monkeypatch, function) -> list[tuple[int, int]]:
    """The shapes of the products' results."""
    made, product = [], _head_ops.product
    with monkeypatch.context() as patch:
        patch.setattr(_head_ops, "product", lambda a, b, dtype: made.append((len(a), b.shape[1])) or product(a, b, dtype))
        function()
    return made


@pytest.mark.parametrize(("entropy_coef", "sums"), [(0.0, 1), (0.1, 2)])
def test_backward_has_no_product_left_and_without_gradients_the_forward_has_only_the_logits(monkeypatch, entropy_coef, sums):
    x, losses = inputs(torch.float32), []
    hidden = x["hidden"].requires_grad_()

    def forward():
        arguments = hidden, x["weight"], TARGETS[:9], x["old"][:9], x["advantages"][:9]
        losses.append(linear_ppo_loss(*arguments, chunk_rows=3, entropy_coef=entropy_coef, backend="torch")[0])

    with torch.no_grad():
        assert made_by(monkeypatch, forward) == 3 * [(3, 50)]
    assert made_by(monkeypatch, forward) == 3 * [(3, 50), *sums * [(3, 8)]]
    assert made_by(monkeypatch, losses[-1].backward) == []
    x["weight"].requires_grad_()  # its gradient takes those of the logits, which are known in the backward alone
    assert made_by(monkeypatch, forward) == 3 * [(3, 50)]
    assert made_by(monkeypatch, losses[-1].backward) == 3 * [(3, 50), (3, 8), (50, 8)]


def test_the_log_probs_are_those_of_the_estimates_to_the_bit():
    x = inputs(torch.float32)
    how = {"rows_A": ROWS, "temperature": 0.7, "chunk_rows": 4, "backend": "torch"}
    with torch.no_grad():
        expected = linear_logprob(x["hidden"], x["weight"], TARGETS, **how)
    ours = linear_ppo_loss(x["hidden"].requires_grad_(), x["weight"], TARGETS, expected[0], x["advantages"], **how)
    assert torch.equal(ours[2], expected[0]) and torch.equal(ours[3], expected[1]) and ours[1]["ratio_max"] == 1


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_a_row_of_nan_or_of_impossible_tokens_is_harmless_where_masked(entropy_coef):
    x = inputs(torch.float32)
    x["hidden"][1] = torch.nan
    x["bias"][40:] = -torch.inf
    hidden, mask = x["hidden"].requires_grad_(), torch.arange(9) != 1
    how = {"bias": x["bias"], "mask": mask, "entropy_coef": entropy_coef, "chunk_rows": 4, "backend": "torch"}
    targets = torch.arange(9)
    loss, *_ = linear_ppo_loss(hidden, x["weight"], targets, x["old"][:9], x["advantages"][:9], **how)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and grad.isfinite().all() and (grad[1] == 0).all() and (grad[0] != 0).any()
    reduced = {"bias": x["bias"][:40], "mask": mask[mask], "entropy_coef": entropy_coef, "backend": "torch"}
    kept = hidden.detach()[mask].requires_grad_()
    arguments = targets[mask], x["old"][:9][mask], x["advantages"][:9][mask]
    (expected,) = torch.autograd.grad(linear_ppo_loss(kept, x["weight"][:40], *arguments, **reduced)[0], kept)
    torch.testing.assert_close(grad[mask], expected, rtol=1e-5, atol=1e-6)


def test_opposite_advantages_on_one_row_do_not_cancel():
    hidden, weight = torch.randn(1, 4, requires_grad=True), torch.randn(6, 4)
    rows_A, targets = torch.tensor([0, 0]), torch.tensor([1, 3])
    old, _ = linear_logprob(hidden.detach(), weight, targets, rows_A=rows_A)
    loss, *_ = linear_ppo_loss(hidden, weight, targets, old, torch.tensor([-1.0, 1.0]), rows_A=rows_A, denominator=1.0)
    loss.backward()
    torch.testing.assert_close(hidden.grad, weight[1:2] - weight[3:4])


def test_differentiating_twice_raises():
    x = inputs(torch.float32)
    hidden = x["hidden"].requires_grad_()
    loss, *_ = linear_ppo_loss(hidden, x["weight"], TARGETS[:9], x["old"][:9], x["advantages"][:9], backend="torch")
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_the_softmax_over_a_large_vocabulary_is_as_good_as_float32(scale):
    """`torch.softmax` alone is 4 times worse there: its sums over a row are made in too few parts."""
    torch.manual_seed(0)
    logits = torch.randn(16, 152_064) * scale
    z = logits - logits.amax(-1, keepdim=True)
    _, exact_log_sum, exact_entropy = softmax_(z.double())
    softmax, log_sum, entropy = softmax_(z.clone())
    assert (log_sum - exact_log_sum).abs().max() < 6e-7  # half a unit in the last place of 13 is 5e-7
    assert (entropy - exact_entropy).abs().max() < 1.5e-6
    p, exact = softmax.weight_RV / softmax.total_R[:, None], torch.softmax(z.double(), -1)
    seen = exact > 1e-30
    assert ((p - exact).abs() / exact)[seen].max() < 6e-7


@pytest.mark.parametrize("shared", [False, True])
def test_padding_the_last_chunk_is_not_seen(monkeypatch, shared):
    """Padded or not, the results are those of the rows that there are, the argmax and a weight's gradient included."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(21, 8, requires_grad=True), torch.randn(50, 8)
    rows_A = torch.cat([torch.arange(21), torch.tensor([20, 0])]) if shared else None
    targets = torch.randint(50, (23 if shared else 21,))
    old, advantages = torch.full(targets.shape, -4.0), torch.randn(targets.shape)
    how = {"rows_A": rows_A, "chunk_rows": 16, "backend": "torch"}

    def results(multiple: int) -> list[Tensor]:
        monkeypatch.setattr(_head_ops, "row_multiple", lambda *_: multiple)
        loss, _, *values = linear_ppo_loss(hidden, weight, targets, old, advantages, entropy_coef=0.1, **how)
        trained = weight.clone().requires_grad_()
        logprob, entropy, argmax = linear_logprob(hidden, trained, targets, argmax=True, **how)
        grads = torch.autograd.grad((logprob + entropy).sum(), [hidden, trained])
        return [loss, *values, *torch.autograd.grad(loss, hidden), logprob, entropy, argmax, *grads]

    seen, logits = [], _head_ops._Head.logits
    monkeypatch.setattr(_head_ops._Head, "logits", lambda head, rows: seen.append(len(rows)) or logits(head, rows))
    padded = results(8)
    assert seen[:2] == [16, 8]
    for value, expected in zip(padded, results(1), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
