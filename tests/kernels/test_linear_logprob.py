"""linear_logprob against the plain head in float64, its memory, its sharing of rows, and its gradients."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastppo_kernels import _head_ops, linear_logprob, token_logprob

# The package exports the function under the module's name.
module = importlib.import_module("fastppo_kernels.linear_logprob")


def reference(hidden, weight, targets, *, rows=None, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    logits = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    rows = torch.arange(len(hidden)) if rows is None else rows
    return log_p[rows, targets], entropy[rows]


def gradients(logprob: Tensor, entropy: Tensor, weights: tuple[Tensor, Tensor], leaves: list[Tensor]):
    return torch.autograd.grad((logprob * weights[0]).sum() + (entropy * weights[1]).sum(), leaves)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    actions=st.one_of(st.none(), st.integers(0, 20)),
    vocab=st.sampled_from([1, 2, 31, 100]),
    width=st.integers(1, 6),
    chunk_rows=st.sampled_from([1, 2, 3, 4, 1024]),
    temperature=st.sampled_from([0.5, 1.0]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.3]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_all_gradients_match_plain_torch_in_float64(
    rows, actions, vocab, width, chunk_rows, temperature, softcap, logit_scale, with_bias, seed
):
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, width), (vocab, width))]
    leaves += [torch.randn(vocab, generator=generator, dtype=torch.float64)] if with_bias else []
    for leaf in leaves:
        leaf.requires_grad_()
    bias = leaves[2] if with_bias else None
    if rows == 0 and actions is not None:
        actions = 0
    rows_A = None if actions is None else torch.randint(max(rows, 1), (actions,), generator=generator)
    count = rows if actions is None else actions
    targets = torch.randint(vocab, (count,), generator=generator)
    weights = tuple(torch.randn(2, count, generator=generator, dtype=torch.float64))
    how = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    ours = linear_logprob(leaves[0], leaves[1], targets, rows_A=rows_A, chunk_rows=chunk_rows, **how)
    theirs = reference(leaves[0], leaves[1], targets, rows=rows_A, **how)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(*ours, weights, leaves), gradients(*theirs, weights, leaves))


def test_gradcheck_with_shared_rows():
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (5, 2), (5,)))
    targets, rows = torch.tensor([4, 0, 0, 2]), torch.tensor([2, 0, 0, 2])

    def function(h: Tensor, w: Tensor, b: Tensor):
        return linear_logprob(h, w, targets, rows_A=rows, bias=b, temperature=0.8, softcap=3.0, chunk_rows=2)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("vocab", [1000, 50257])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_larger_than_the_plain_heads(vocab, hidden_dtype, weight_dtype):
    torch.manual_seed(0)
    hidden = torch.randn(5, 16).to(hidden_dtype).requires_grad_()
    weight = torch.randn(vocab, 16).to(weight_dtype)
    targets, weights = torch.randint(vocab, (5,)), (torch.randn(5), torch.randn(5))
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = reference(exact_hidden, weight.double(), targets)
    plain_hidden = hidden.detach().to(weight_dtype).requires_grad_()
    plain = token_logprob(F.linear(plain_hidden, weight), targets)
    ours = linear_logprob(hidden, weight, targets)
    for value, theirs, truth in zip(ours, plain, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - truth).abs().max() <= 1.2 * (theirs - truth).abs().max() + 1e-5
    (grad,) = gradients(*ours, weights, [hidden])
    (plain_grad,) = gradients(*plain, weights, [plain_hidden])
    (exact_grad,) = gradients(*exact, weights, [exact_hidden])
    assert grad.dtype == hidden_dtype
    rounding = (exact_grad.to(hidden_dtype) - exact_grad).abs().max()
    assert (grad - exact_grad).abs().max() <= 1.2 * (plain_grad - exact_grad).abs().max() + rounding + 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_same_bits_with_and_without_grad_and_on_every_run(shared):
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 24, requires_grad=True), torch.randn(500, 24)
    rows = torch.randint(70, (300,)) if shared else None
    targets = torch.randint(500, (300 if shared else 70,))

    def run() -> tuple[Tensor, ...]:
        logprob, entropy = linear_logprob(hidden, weight, targets, rows_A=rows, chunk_rows=32, temperature=0.7)
        return logprob, entropy, *torch.autograd.grad((logprob + 0.1 * entropy).sum(), hidden)

    first = run()
    with torch.no_grad():
        without = linear_logprob(hidden, weight, targets, rows_A=rows, chunk_rows=32, temperature=0.7)
    with torch.inference_mode():
        inference = linear_logprob(hidden, weight, targets, rows_A=rows, chunk_rows=32, temperature=0.7)
    assert torch.equal(first[0], without[0]) and torch.equal(first[1], without[1])
    assert torch.equal(first[0], inference[0])
    for again in (run() for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 1024])
def test_chunking_changes_nothing_beyond_rounding(chunk_rows):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 24), torch.randn(300, 24), torch.randint(300, (50,))
    one_by_one = reference(hidden.double(), weight.double(), targets)
    ours = linear_logprob(hidden, weight, targets, chunk_rows=chunk_rows)
    for value, truth in zip(ours, one_by_one, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("vocab", "dtype", "rows"),
    [
        (1, torch.float32, 1024),
        (131_072, torch.float32, 1024),
        (152_064, torch.float32, 768),
        (152_064, torch.bfloat16, 1024),
        (256_000, torch.float32, 512),
        (256_000, torch.float16, 1024),
        (152_064, torch.float64, 384),
        (10_000_000, torch.float32, 128),
    ],
)
def test_the_chunk_that_is_chosen_is_bounded_in_rows_and_bytes(vocab, dtype, rows):
    assert module.chosen_chunk_rows(vocab, dtype) == rows
    assert rows == 128 or rows * vocab * dtype.itemsize <= 512 << 20


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_without_a_number_of_rows_the_chunk_is_chosen_for_the_logits_dtype(monkeypatch, logits_dtype):
    hidden, weight = torch.randn(700, 4).bfloat16().requires_grad_(), torch.randn(9, 4).bfloat16()
    targets = torch.randint(9, (700,))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 300 * 9 * 2)
    seen, logits = [], _head_ops._Head.logits
    monkeypatch.setattr(_head_ops._Head, "logits", lambda head, rows: seen.append(len(rows)) or logits(head, rows))
    linear_logprob(hidden, weight, targets, logits_dtype=logits_dtype)[0].sum().backward()
    expected = [256, 256, 188] if logits_dtype is None else 5 * [128] + [60]
    assert seen == 2 * expected


def test_equals_token_logprob_of_the_same_logits_to_the_bit():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 24), torch.randn(300, 24), torch.randint(300, (40,))
    ours = linear_logprob(hidden, weight, targets, temperature=0.7, softcap=20.0)
    given_logits = token_logprob(F.linear(hidden, weight), targets, temperature=0.7, softcap=20.0)
    assert torch.equal(ours[0], given_logits[0]) and torch.equal(ours[1], given_logits[1])


def test_opposite_weights_on_one_row_do_not_cancel():
    """Two samples of one prompt with opposite advantages: the row's sum is 0, its gradient is not."""
    hidden, weight = torch.randn(1, 4, requires_grad=True), torch.randn(6, 4)
    logprob, _ = linear_logprob(hidden, weight, torch.tensor([1, 3]), rows_A=torch.tensor([0, 0]))
    (logprob[0] - logprob[1]).backward()
    torch.testing.assert_close(hidden.grad, weight[1:2] - weight[3:4])


def allocated_and_multiplied(function) -> tuple[int, int]:
    """(bytes of the largest tensor that any operation made, number of matrix products), also inside of our operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = seen.events()
    products = sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in events)
    return max(event.self_cpu_memory_usage for event in events), products


def test_never_more_than_a_chunk_of_logits_and_no_weight_gradient_when_frozen():
    rows, vocab, chunk_rows = 64, 200, 8
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4)
    targets, rows_A = torch.randint(vocab, (96,)), torch.randint(rows, (96,))
    outputs = []

    def forward():
        outputs.extend(linear_logprob(hidden, weight, targets, rows_A=rows_A, chunk_rows=chunk_rows))

    # The logits of a row once, however many targets it has; in the backward logits again, and the hidden gradient.
    assert allocated_and_multiplied(forward) == (4 * chunk_rows * vocab, rows // chunk_rows)
    loss = outputs[0].sum() + outputs[1].sum()
    assert allocated_and_multiplied(loss.backward) == (4 * chunk_rows * vocab, 2 * rows // chunk_rows)


def test_trained_weight_and_bias_get_their_gradient_in_half_precision():
    """A head that is trained is never silently frozen; sums over chunks are not kept in bfloat16."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(512, 8).bfloat16(), torch.randint(20, (512,))
    weight, bias = (torch.randn(s).bfloat16().requires_grad_() for s in ((20, 8), (20,)))
    many = linear_logprob(hidden, weight, targets, bias=bias, chunk_rows=2)[0].sum()
    one = linear_logprob(hidden, weight, targets, bias=bias)[0].sum()
    for in_chunks, whole in zip(
        torch.autograd.grad(many, [weight, bias]), torch.autograd.grad(one, [weight, bias]), strict=True
    ):
        assert in_chunks.dtype == torch.bfloat16
        torch.testing.assert_close(in_chunks, whole, rtol=1e-2, atol=1e-2)


def test_weight_gradient_without_hidden_gradient():
    hidden, weight = torch.randn(3, 4), torch.randn(6, 4, requires_grad=True)
    targets = torch.tensor([0, 1, 5])
    linear_logprob(hidden, weight, targets)[0].sum().backward()
    ours = weight.grad
    weight.grad = None
    reference(hidden, weight, targets)[0].sum().backward()
    torch.testing.assert_close(ours, weight.grad)


def test_argmax_takes_the_first_of_equals_and_does_not_disturb():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 2.0], [3.0, 1.0], [3.0, 2.0], [-1.0, 2.0]])
    targets = torch.tensor([0, 1, 2])
    logprob, entropy, argmax = linear_logprob(hidden, weight, targets, argmax=True, chunk_rows=2, temperature=5.0)
    assert argmax.tolist() == [1, 0, 2] and argmax.dtype == torch.int64
    plain = linear_logprob(hidden, weight, targets, chunk_rows=2, temperature=5.0)
    assert torch.equal(logprob, plain[0]) and torch.equal(entropy, plain[1])
    (logprob + entropy).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    shared = linear_logprob(hidden, weight, targets[:1], rows_A=torch.tensor([1]), argmax=True)
    assert shared[2].tolist() == [1, 0, 2]


def test_non_contiguous_and_expanded_inputs():
    torch.manual_seed(0)
    hidden = torch.randn(8, 10).t()[::2].requires_grad_()
    weight, targets = torch.randn(8, 30).t(), torch.randint(30, (10,))[::2]
    weights = (torch.randn(5), torch.randn(5))
    ours, theirs = linear_logprob(hidden, weight, targets), reference(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(*ours, weights, [hidden]), gradients(*theirs, weights, [hidden]))
    row = torch.randn(1, 8, requires_grad=True)
    many = linear_logprob(row.expand(5, 8), weight, targets)[0].sum()
    plain = reference(row.expand(5, 8), weight, targets)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(many, row), torch.autograd.grad(plain, row))


def test_autocast_does_not_change_the_values():
    hidden, weight, targets = torch.randn(5, 8), torch.randn(30, 8), torch.randint(30, (5,))
    expected = linear_logprob(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, weight, targets)[0], expected[0])


def test_a_bad_row_without_weight_in_the_loss_gives_zero_gradient():
    hidden = torch.randn(3, 4)
    hidden[1] = torch.nan
    hidden.requires_grad_()
    logprob, entropy = linear_logprob(hidden, torch.randn(6, 4), torch.tensor([0, 1, 2]), chunk_rows=2)
    assert logprob.isnan().tolist() == [False, True, False]
    keep = torch.tensor([True, False, True])
    (torch.where(keep, logprob, 0.0) + torch.where(keep, entropy, 0.0)).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[1].tolist() == [0.0] * 4 and hidden.grad.isfinite().all()


INT = torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_RH": torch.zeros(2, 3, 4)}, r"hidden must have shape \[R, H\], got \[2, 3, 4\]"),
        ({"hidden_RH": torch.zeros(2, 4, dtype=torch.float64)}, "both be float64 or neither"),
        ({"weight_VH": torch.zeros(5, 3)}, r"weight must have shape \[V, 4\].* got \[5, 3\]"),
        (
            {"weight_VH": torch.zeros(5, 4, dtype=torch.int8)},
            "weight must have one of the dtypes float32.* got torch.int8",
        ),
        ({"weight_VH": torch.zeros(5, 4, device="meta")}, r"weight must be on the device of hidden \(cpu\), got meta"),
        (
            {"targets_A": torch.zeros(3, dtype=INT)},
            r"targets must have shape \[2\] \(one for each row of hidden.*\[3\]",
        ),
        ({"targets_A": torch.tensor([0, 5])}, r"targets must be in \[0, 5\)"),
        ({"targets_A": torch.tensor([0, -1])}, r"targets must be in \[0, 5\)"),
        ({"rows_A": torch.zeros(3, dtype=INT)}, r"rows_A must have shape \[2\] \(that of targets\), got \[3\]"),
        (
            {"rows_A": torch.tensor([0, 2])},
            r"rows_A must be in \[0, 2\) \(the rows of hidden\), got values from 0 to 2",
        ),
        ({"rows_A": torch.tensor([-1, 0])}, r"rows_A must be in \[0, 2\)"),
        ({"rows_A": torch.zeros(2)}, "rows_A must have one of the dtypes int64, int32, got torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\] .* got \[4\]"),
        ({"temperature": -1}, "temperature must be a finite number > 0, got -1"),
        ({"logit_scale": 0}, "logit_scale must be a finite number > 0, got 0"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0, got 0.0"),
        ({"chunk_rows": 0}, "chunk_rows must be an integer >= 1, got 0"),
        ({"chunk_rows": 2.0}, "chunk_rows must be an integer >= 1, got 2.0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "hidden_RH": torch.zeros(2, 4),
        "weight_VH": torch.zeros(5, 4),
        "targets_A": torch.zeros(2, dtype=INT),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_caller_may_write_into_what_it_gets(backend):
    hidden, weight, targets = torch.randn(4, 8, requires_grad=True), torch.randn(33, 8), torch.randint(33, (4,))
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])

    def gradient_of(write: bool) -> Tensor:
        logprob, entropy = linear_logprob(hidden, weight, targets, backend=backend)
        if write:
            logprob[1::2] = 0.0
            entropy.zero_()
        return torch.autograd.grad((logprob * weights).sum(), hidden)[0]

    torch.testing.assert_close(gradient_of(True), gradient_of(False), rtol=0, atol=0)
