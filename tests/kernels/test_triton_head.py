"""The Triton kernels of the head against their torch twins and plain float64, in the interpreter where there is no GPU."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_good
from head_helpers import (
    BACKENDS,
    HEADS,
    INF,
    make_head,
    plain,
    with_gradient,
)
from helpers import DEVICE, TRITON_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo_kernels import linear_logprob, linear_ppo_loss, token_logprob

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned
KL = [None, "k1", "clamped_k1", "k2", "k3", "jensen_shannon"]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.sampled_from([1, 2, 31, 1023, 1024, 1025, 4097]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    softcap=st.sampled_from([None, 5.0]),
    inplace=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_token_logprob(rows, vocab, dtype, temperature, softcap, inplace, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(rows, vocab, device=DEVICE) * 4).to(dtype)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    weights = (torch.randn(rows, device=DEVICE), torch.randn(rows, device=DEVICE))
    how = {"temperature": temperature, "softcap": softcap}
    ours = with_gradient(lambda x: token_logprob(x * 1, targets, inplace=inplace, backend="triton", **how), [logits], weights)
    twins = with_gradient(lambda x: token_logprob(x, targets, backend="torch", **how), [logits], weights)
    exact = with_gradient(lambda x: plain(x, targets, **how), [logits.double()], weights)
    assert_as_good(ours, twins, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1000, 32000, 50257, 128256, 151936, 152064])
def test_real_vocabularies(vocab, dtype):
    logits, targets = (torch.randn(2, vocab, device=DEVICE) * 5).to(dtype), torch.tensor([0, vocab - 1], device=DEVICE)
    weights = torch.randn(2, device=DEVICE), torch.randn(2, device=DEVICE)
    ours = with_gradient(lambda x: token_logprob(x, targets, backend="triton"), [logits], weights)
    twins = with_gradient(lambda x: token_logprob(x, targets, backend="torch"), [logits], weights)
    exact = with_gradient(lambda x: plain(x, targets), [logits.double()], weights)
    assert_as_good(ours, twins, exact, 2e-6)


@pytest.mark.parametrize("vocab", [1000, 32000, 50257, 128256, 151936, 152064])
def test_real_vocabularies_in_the_whole_head(vocab):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 4, device=DEVICE), torch.randn(vocab, 4, device=DEVICE)
    targets, rows = torch.tensor([0, vocab - 1, 7], device=DEVICE), torch.tensor([1, 1, 0], device=DEVICE)
    old, advantages, results = torch.full((3,), -9.0, device=DEVICE), torch.randn(3, device=DEVICE), []
    for backend in ("triton", "torch"):
        leaf = hidden.clone().requires_grad_()
        loss, metrics, logprob, entropy = linear_ppo_loss(
            leaf, weight, targets, old, advantages, rows_A=rows, entropy_coef=0.1, chunk_rows=1, backend=backend
        )
        loss.backward()
        results.append((loss.detach(), metrics, logprob, entropy, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_late_maximum_and_long_stretches_of_minus_infinity():
    """The first blocks hold nothing at all: there is no maximum yet to rescale by."""
    logits = torch.full((3, 9000), -INF, device=DEVICE)
    logits[0, -1], logits[1, 5000:], logits[2, 0] = 3.0, torch.randn(4000, device=DEVICE), -1e38
    targets = torch.tensor([8999, 7000, 0], device=DEVICE)
    ones = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
    ours = with_gradient(lambda x: token_logprob(x, targets, backend="triton"), [logits], ones)
    twins = with_gradient(lambda x: token_logprob(x, targets, backend="torch"), [logits], ones)
    torch.testing.assert_close(ours, twins, rtol=1e-6, atol=1e-6)
    assert token_logprob(logits, targets - targets + 1, backend="triton")[0].tolist() == [-INF] * 3


def test_a_tiny_temperature_stays_finite():
    logits, target = torch.tensor([[100.0, 99.0, 0.0]], device=DEVICE), torch.tensor([0], device=DEVICE)
    for temperature in (1e-38, 1e-45):
        logprob, entropy = token_logprob(logits, target, temperature=temperature, backend="triton")
        assert logprob.tolist() == [0.0] and entropy.tolist() == [0.0]


def test_a_target_outside_of_the_vocabulary_is_nan_and_touches_nothing():
    """The public op cannot look at targets on a GPU. -100 must neither read nor write in front of the row."""
    from fastppo_kernels import _head_ops

    logits, targets = torch.randn(3, 50, device=DEVICE, requires_grad=True), torch.tensor([-100, 7, 50], device=DEVICE)
    logprob = _head_ops.token_logprob(logits, targets[:, None], 1.0, None, False, True)[0]
    assert logprob.isnan().tolist() == [True, False, True]
    torch.where(logprob.isnan(), 0.0, logprob).sum().backward()
    expected = torch.zeros_like(logits)
    expected[1] = F.one_hot(targets[1], 50) - logits[1].softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_strided_rows_and_other_shapes():
    wide = torch.randn(4, 3, 40, device=DEVICE)
    targets = torch.randint(13, (4, 3), device=DEVICE)
    for logits in (wide[..., 5:18], wide.transpose(0, 1)[..., ::3][..., :13].transpose(0, 1)):
        ours, twin = (token_logprob(logits, targets.int(), backend=backend) for backend in ("triton", "torch"))
        torch.testing.assert_close(ours, twin)
    for shape in ((), (0,), (2, 0)):
        logprob, _ = token_logprob(torch.randn(*shape, 11, device=DEVICE), targets.new_zeros(shape), backend="triton")
        assert logprob.shape == shape


def test_inplace_gradient_lies_over_the_logits_and_a_second_backward_raises():
    source = torch.randn(3, 70, device=DEVICE, requires_grad=True)
    for backend in ("triton", "torch"):
        logits = source * 1
        logprob, _ = token_logprob(logits, torch.tensor([1, 2, 3], device=DEVICE), inplace=True, backend=backend)
        (grad,) = torch.autograd.grad(logprob.sum(), logits, retain_graph=True)
        assert grad.data_ptr() == logits.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(logprob.sum(), logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_leaves_rows_alone_that_share_memory(backend):
    source, targets = torch.randn(1, 9, device=DEVICE, requires_grad=True), torch.tensor([1, 2, 3], device=DEVICE)
    grads = []
    for inplace in (False, True):
        logits = (source * 1).expand(3, 9)
        logprob, _ = token_logprob(logits, targets, inplace=inplace, backend=backend)
        grads += torch.autograd.grad(logprob.sum(), source)
    assert torch.equal(*grads)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 6),
    actions=st.one_of(st.none(), st.integers(0, 90)),
    vocab=st.sampled_from([2, 31, 1025, 2049]),
    dtypes=st.sampled_from(HEADS),
    chunk_rows=st.sampled_from([1, 2, 4, 1024]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.3]),
    with_bias=st.booleans(),
    adapter_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_linear_logprob(rows, actions, vocab, dtypes, chunk_rows, softcap, logit_scale, with_bias, adapter_dtype, seed):
    torch.manual_seed(seed)
    hidden_dtype, weight_dtype, logits_dtype = dtypes
    actions = 0 if rows == 0 and actions is not None else actions
    rows_A = None if actions is None else torch.randint(max(rows, 1), (actions,), device=DEVICE)
    count = rows if actions is None else actions
    targets = torch.randint(vocab, (count,), device=DEVICE)
    weights = (torch.randn(count, device=DEVICE), torch.randn(count, device=DEVICE))
    leaves = make_head(rows, vocab, 8, hidden_dtype, weight_dtype)
    if adapter_dtype is not None:
        leaves += [0.3 * torch.randn(s, device=DEVICE).to(adapter_dtype) for s in ((3, 8), (vocab, 3))]

    def function(backend, dtype):
        return lambda h, w, b, lora_A=None, lora_B=None: linear_logprob(
            h, w, targets, rows_A=rows_A, bias=b if with_bias else None, lora_A=lora_A, lora_B=lora_B, lora_scale=0.7,
            temperature=0.8, softcap=softcap, logit_scale=logit_scale, chunk_rows=chunk_rows, logits_dtype=dtype,
            backend=backend,
        )  # fmt: skip

    leaves = leaves if with_bias else [*leaves[:2], *leaves[3:]]
    pick = (lambda f: f) if with_bias else (lambda f: lambda h, w, *adapter: f(h, w, None, *adapter))
    ours = with_gradient(pick(function("triton", logits_dtype)), leaves, weights)
    twins = with_gradient(pick(function("torch", logits_dtype)), leaves, weights)
    exact = with_gradient(pick(function("torch", None)), [leaf.double() for leaf in leaves], weights)
    assert_as_good(ours[:2], twins[:2], exact[:2], 4e-6)
    # A logit's gradient may be rounded to either neighbour where the two forms differ in their last bit before.
    assert_as_good(
        ours[2:], twins[2:], exact[2:], {torch.float32: 4e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[weight_dtype]
    )


def test_argmax_and_float32_logits():
    hidden, weight, _ = make_head(5, 300, 16, torch.bfloat16, torch.bfloat16)
    targets = torch.randint(300, (5,), device=DEVICE)
    exact = plain(F.linear(hidden.double(), weight.double()), targets)
    rounded = linear_logprob(hidden, weight, targets, backend="triton")
    logprob, entropy, argmax = linear_logprob(
        hidden, weight, targets, argmax=True, logits_dtype=torch.float32, backend="triton"
    )
    assert torch.equal(argmax, F.linear(hidden.double(), weight.double()).argmax(-1))
    torch.testing.assert_close((logprob.double(), entropy.double()), exact, rtol=1e-5, atol=1e-5)
    assert (rounded[0] - exact[0]).abs().max() > 1e-4
    ties = torch.zeros(2, 16, device=DEVICE, dtype=torch.bfloat16)
    assert linear_logprob(ties, weight, targets[:2], argmax=True, backend="triton")[2].tolist() == [0, 0]


def test_opposite_weights_on_one_row_and_many_actions_on_one_token():
    """The sum over a row's actions may be 0 where its gradient is not; equal targets add up, over more than one block."""
    hidden, weight = torch.randn(1, 4, device=DEVICE, requires_grad=True), torch.randn(6, 4, device=DEVICE)
    targets, rows = torch.tensor([1, 3] * 50, device=DEVICE), torch.zeros(100, dtype=torch.int64, device=DEVICE)
    logprob, _ = linear_logprob(hidden, weight, targets, rows_A=rows, backend="triton")
    (logprob[::2].sum() - logprob[1::2].sum()).backward()
    torch.testing.assert_close(hidden.grad, 50 * (weight[1:2] - weight[3:4]), rtol=1e-5, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 6),
    actions=st.one_of(st.none(), st.integers(0, 70)),
    dtypes=st.sampled_from(HEADS),
    chunk_rows=st.sampled_from([1, 3, 1024]),
    softcap=st.sampled_from([None, 4.0]),
    dual_clip=st.sampled_from([None, 1.5]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
    kl=st.sampled_from(KL),
    lora=st.booleans(),
    masking=st.sampled_from([None, 0.5, 1.0]),
    denominator=st.sampled_from([None, 7.0, "tensor"]),
    seed=st.integers(0, 1000),
)
def test_linear_ppo_loss(
    rows, actions, dtypes, chunk_rows, softcap, dual_clip, entropy_coef, kl, lora, masking, denominator, seed
):
    torch.manual_seed(seed)
    hidden_dtype, weight_dtype, logits_dtype = dtypes
    actions = 0 if rows == 0 and actions is not None else actions
    rows_A = None if actions is None else torch.randint(max(rows, 1), (actions,), device=DEVICE)
    count = rows if actions is None else actions
    leaves = make_head(rows, 61, 8, hidden_dtype, weight_dtype)
    leaves += [0.3 * torch.randn(s, device=DEVICE) for s in ((3, 8), (61, 3))] if lora else []
    targets = torch.randint(61, (count,), device=DEVICE)
    exact_logprob = linear_logprob(*(leaf.double() for leaf in leaves[:2]), targets, rows_A=rows_A)[0].float()
    old = exact_logprob + 0.3 * torch.randn(count, device=DEVICE)
    advantages, mask = torch.randn(count, device=DEVICE), None
    if masking is not None:
        mask = torch.rand(count, device=DEVICE) >= masking
        old, advantages = torch.where(mask, old, torch.nan), torch.where(mask, advantages, torch.inf)
    denominator = torch.tensor(5.0, device=DEVICE) if denominator == "tensor" else denominator
    how = {
        "rows_A": rows_A, "mask": mask, "temperature": 0.9, "softcap": softcap, "dual_clip": dual_clip, "clip_high": 0.28,
        "entropy_coef": entropy_coef, "denominator": denominator, "chunk_rows": chunk_rows,
    }  # fmt: skip
    if kl is not None:
        how |= {"ref_logprob": exact_logprob + 0.5 * torch.randn(count, device=DEVICE), "kl_coef": 0.2, "kl_estimator": kl}

    def run(backend, leaves, dtype):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        adapter = dict(zip(("lora_A", "lora_B"), leaves[3:], strict=False))
        loss, metrics, logprob, entropy = linear_ppo_loss(
            leaves[0],
            leaves[1],
            targets,
            old,
            advantages,
            bias=leaves[2],
            logits_dtype=dtype,
            backend=backend,
            **adapter,
            **how,
        )
        assert not logprob.requires_grad and not entropy.requires_grad
        (3 * loss).backward()
        return metrics, [loss.detach(), logprob, entropy], [leaf.grad for leaf in leaves]

    ours, twins = run("triton", leaves, logits_dtype), run("torch", leaves, logits_dtype)
    torch.testing.assert_close(ours[1], twins[1], rtol=2e-5, atol=2e-5)
    assert list(ours[0]) == list(twins[0])
    for name, value in ours[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, twins[0][name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Two units of the last place: gradients are rounded here before they are multiplied by that of the loss, and there after.
    # How exact they are is another test's matter (test_head_lora.py).
    tiny = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[weight_dtype]
    for value, theirs in zip(ours[2], twins[2], strict=True):
        assert value.dtype == theirs.dtype and value.isfinite().all()
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(value, theirs, rtol=0, atol=tiny * scale)


def test_only_the_gradients_that_are_needed_are_made(monkeypatch):
    from fastppo_kernels import _head_ops

    made = []
    product = _head_ops.product
    monkeypatch.setattr(_head_ops, "product", lambda a, b, dtype: made.append((len(a), b.shape[1])) or product(a, b, dtype))
    hidden, weight, bias = make_head(6, 20, 3, torch.float32, torch.float32)
    targets, old = torch.randint(20, (6,), device=DEVICE), torch.zeros(6, device=DEVICE)
    logits, of_hidden, of_weight = (2, 20), (2, 3), (20, 3)
    for needs, expected in (((0, 0), []), ((1, 0), [of_hidden]), ((0, 1), [of_weight]), ((1, 1), [of_hidden, of_weight])):
        leaves = [leaf.detach().requires_grad_(bool(need)) for leaf, need in zip((hidden, weight), needs, strict=True)]
        made.clear()
        loss, *_ = linear_ppo_loss(*leaves, targets, old, old + 1, bias=bias, chunk_rows=2, backend="triton")
        assert made == 3 * [logits, *expected]
        assert loss.requires_grad == any(needs)
        made.clear()
        with torch.no_grad():
            linear_ppo_loss(*leaves, targets, old, old + 1, bias=bias, chunk_rows=2, backend="triton")
        assert made == 3 * [logits]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_same_bits_on_every_run_and_without_gradients(backend):
    torch.manual_seed(0)
    hidden, weight, _ = make_head(9, 300, 8, torch.bfloat16, torch.bfloat16)
    rows, targets = torch.randint(9, (70,), device=DEVICE), torch.randint(20, (70,), device=DEVICE)
    old, advantages = torch.randn(70, device=DEVICE) - 5, torch.randn(70, device=DEVICE)

    def run():
        x = hidden.clone().requires_grad_()
        loss, _, logprob, entropy = linear_ppo_loss(
            x, weight, targets, old, advantages, rows_A=rows, chunk_rows=4, entropy_coef=0.1, backend=backend
        )
        loss.backward()
        return loss.detach(), logprob, entropy, x.grad

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))
    alone = linear_logprob(hidden, weight, targets, rows_A=rows, chunk_rows=4, backend=backend)
    assert torch.equal(alone[0], first[1]) and torch.equal(alone[1], first[2])
