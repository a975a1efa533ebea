"""The Triton kernels of the head against their torch twins and plain float64, in the interpreter where there is no GPU."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo_kernels import linear_logprob, linear_ppo_loss, token_logprob
from fastppo_kernels._dispatch import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
# numpy warns of the NaN and infinities that these tests are about.
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="there is no triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN (and absurd integers), so that a place that no kernel writes is seen."""
    assert DEVICE == "cuda" or interpreting()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def plain(logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """In the dtype of the logits."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy


def with_gradient(function, leaves: list[Tensor], weights: tuple[Tensor, Tensor]) -> list[Tensor]:
    """(log-prob, entropy, the gradient of every leaf)."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logprob, entropy = function(*leaves)[:2]
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    return [logprob.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_good(ours: list[Tensor], twins: list[Tensor], exact: list[Tensor], tiny: float) -> None:
    """Errors at most 1.2 times the torch path's, and a little, in units of the largest entry.

    Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds it: there a bfloat16 may be a whole last place off.
    """
    for value, theirs, truth in zip(ours, twins, exact, strict=True):
        assert value.dtype == theirs.dtype and value.shape == theirs.shape
        scale = truth.abs().max().clamp(min=1) if truth.numel() else torch.tensor(1.0)
        error = (value.double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
        allowed = (theirs.double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
        cut = 2**-7 if DEVICE == "cpu" and value.dtype == torch.bfloat16 else 0.0
        assert error <= 1.2 * allowed + (tiny + cut) * scale


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
    ours = with_gradient(
        lambda x: token_logprob(x * 1, targets, inplace=inplace, backend="triton", **how), [logits], weights
    )
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


@pytest.mark.parametrize("offset", [-1e4, -1e30, 1e4, 1e30])
@pytest.mark.parametrize("vocab", [1000, 5000])
def test_equal_rows_of_any_size_are_uniform(offset, vocab):
    """Verl's kernel gave NaN for rows of -1e4, and log-probs of +123 where columns past the vocabulary were counted."""
    logits, targets = torch.full((2, vocab), offset, device=DEVICE), torch.tensor([0, vocab - 1], device=DEVICE)
    logprob, entropy = token_logprob(logits, targets, backend="triton")
    expected = torch.tensor(float(vocab), device=DEVICE).log().expand(2)
    torch.testing.assert_close(logprob, -expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("vocab", [3, 6000])
@pytest.mark.parametrize("kind", ["nothing", "nan", "inf"])
def test_a_row_without_distribution_is_nan_and_harmless_when_masked(kind, vocab):
    logits = torch.randn(2, vocab, device=DEVICE)
    if kind == "nothing":
        logits[0] = -INF
    else:
        logits[0, vocab // 2] = float(kind)
    logits.requires_grad_()
    logprob, entropy = token_logprob(logits, torch.tensor([0, 1], device=DEVICE), backend="triton")
    assert logprob.isnan().tolist() == [True, False] and entropy.isnan().tolist() == [True, False]
    mask = torch.tensor([False, True], device=DEVICE)
    (torch.where(mask, logprob, 0.0).sum() + torch.where(mask, entropy, 0.0).sum()).backward()
    assert logits.grad is not None and (logits.grad[0] == 0).all()
    assert logits.grad[1].isfinite().all() and logits.grad[1].abs().sum() > 0


def test_a_tiny_temperature_stays_finite():
    logits, target = torch.tensor([[100.0, 99.0, 0.0]], device=DEVICE), torch.tensor([0], device=DEVICE)
    for temperature in (1e-38, 1e-45):
        logprob, entropy = token_logprob(logits, target, temperature=temperature, backend="triton")
        assert logprob.tolist() == [0.0] and entropy.tolist() == [0.0]


def test_a_target_outside_of_the_vocabulary_is_nan_and_touches_nothing():
    """The public op cannot look at targets on a GPU. -100 must neither read nor write in front of the row."""
    from fastppo_kernels import _head_ops

    logits, targets = torch.randn(3, 50, device=DEVICE, requires_grad=True), torch.tensor([-100, 7, 50], device=DEVICE)
    logprob = _head_ops.token_logprob(logits, targets, 1.0, None, False)[0]
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


def test_more_rows_than_a_second_grid_dimension_has():
    if DEVICE == "cpu":  # one interpreted program a row: too slow to run, so the grid that is asked for is looked at
        from fastppo_kernels import _triton_head

        grids = []

        class Recorder:
            def __getitem__(self, grid):
                grids.append(grid)
                return lambda *_, **__: None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_triton_head, "statistics_kernel", Recorder())
            token_logprob(torch.zeros(70_000, 1), torch.zeros(70_000, dtype=torch.int64), backend="triton")
        assert grids == [(70_000,)]  # in x, which goes to 2^31 - 1; y and z end at 65,535
    else:
        logits, targets = torch.randn(70_000, 8, device=DEVICE), torch.randint(8, (70_000,), device=DEVICE)
        torch.testing.assert_close(token_logprob(logits, targets, backend="triton"), plain(logits, targets))


def test_row_offsets_past_2_31_elements():
    """Rows 2^30 elements apart, in memory that is reserved but never touched in between."""
    stride = 1 << 30
    torch.use_deterministic_algorithms(False)  # which would fill it
    try:
        memory = torch.empty(3 * stride + 16, dtype=torch.bfloat16, device=DEVICE)  # 6 GiB of addresses
    except RuntimeError:
        pytest.skip("6 GiB of address space cannot be reserved")
    logits = memory.as_strided((4, 16), (stride, 1))
    logits.copy_(torch.randn(4, 16))
    targets = torch.tensor([0, 3, 7, 15], device=DEVICE)
    ours, twin = (token_logprob(logits, targets, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, twin)


HEADS = [
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, None),
    (torch.float16, torch.float16, torch.float32),
]


def head(rows: int, vocab: int, width: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = torch.randn(rows, width, device=DEVICE), torch.randn(vocab, width, device=DEVICE)
    return [hidden.to(hidden_dtype), weight.to(weight_dtype), torch.randn(vocab, device=DEVICE).to(weight_dtype)]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 6),
    actions=st.one_of(st.none(), st.integers(0, 90)),
    vocab=st.sampled_from([2, 31, 1025]),
    dtypes=st.sampled_from(HEADS),
    chunk_rows=st.sampled_from([1, 2, 4, 1024]),
    softcap=st.sampled_from([None, 4.0]),
    logit_scale=st.sampled_from([1.0, 0.3]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_logprob(rows, actions, vocab, dtypes, chunk_rows, softcap, logit_scale, with_bias, seed):
    torch.manual_seed(seed)
    hidden_dtype, weight_dtype, logits_dtype = dtypes
    actions = 0 if rows == 0 and actions is not None else actions
    rows_A = None if actions is None else torch.randint(max(rows, 1), (actions,), device=DEVICE)
    count = rows if actions is None else actions
    targets = torch.randint(vocab, (count,), device=DEVICE)
    weights = (torch.randn(count, device=DEVICE), torch.randn(count, device=DEVICE))
    leaves = head(rows, vocab, 8, hidden_dtype, weight_dtype)[: 2 + with_bias]

    def function(backend, dtype):
        return lambda h, w, b=None: linear_logprob(
            h, w, targets, rows_A=rows_A, bias=b, temperature=0.8, softcap=softcap, logit_scale=logit_scale,
            chunk_rows=chunk_rows, logits_dtype=dtype, backend=backend,
        )  # fmt: skip

    ours = with_gradient(function("triton", logits_dtype), leaves, weights)
    twins = with_gradient(function("torch", logits_dtype), leaves, weights)
    exact = with_gradient(function("torch", None), [leaf.double() for leaf in leaves], weights)
    # The weight's gradient goes through the head's own dtype here, in one GEMM, and through float32 in the twin; a bias is
    # added after the logits are rounded, and before in the twin: of few numbers, 1.2 times the other's error says little.
    tiny = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[weight_dtype]
    assert_as_good(ours[:2], twins[:2], exact[:2], tiny if with_bias and logits_dtype is None else 4e-6)
    assert_as_good(ours[2:], twins[2:], exact[2:], tiny)


def test_argmax_and_float32_logits():
    hidden, weight, _ = head(5, 300, 16, torch.bfloat16, torch.bfloat16)
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


KL = [None, "k1", "clamped_k1", "k2", "k3", "jensen_shannon"]


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
    masking=st.sampled_from([None, 0.5, 1.0]),
    denominator=st.sampled_from([None, 7.0, "tensor"]),
    seed=st.integers(0, 1000),
)
def test_linear_ppo_loss(
    rows, actions, dtypes, chunk_rows, softcap, dual_clip, entropy_coef, kl, masking, denominator, seed
):
    torch.manual_seed(seed)
    hidden_dtype, weight_dtype, logits_dtype = dtypes
    actions = 0 if rows == 0 and actions is not None else actions
    rows_A = None if actions is None else torch.randint(max(rows, 1), (actions,), device=DEVICE)
    count = rows if actions is None else actions
    leaves = head(rows, 61, 8, hidden_dtype, weight_dtype)
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
        loss, metrics, logprob, entropy = linear_ppo_loss(
            leaves[0], leaves[1], targets, old, advantages, bias=leaves[2], logits_dtype=dtype, backend=backend, **how
        )
        assert not logprob.requires_grad and not entropy.requires_grad
        (3 * loss).backward()
        return metrics, [loss.detach(), logprob, entropy], [leaf.grad for leaf in leaves]

    ours, twins = run("triton", leaves, logits_dtype), run("torch", leaves, logits_dtype)
    if weight_dtype == torch.float32 or logits_dtype == torch.float32:  # the same logits but for rounding: exact is the twin's
        torch.testing.assert_close(ours[1], twins[1], rtol=2e-5, atol=2e-5)
        assert list(ours[0]) == list(twins[0])
        for name, value in ours[0].items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, twins[0][name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    else:  # bias is added before or after rounding
        torch.testing.assert_close(ours[1][1:], twins[1][1:], rtol=2e-2, atol=5e-2)
        return
    tiny = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[weight_dtype]
    for value, theirs in zip(ours[2], twins[2], strict=True):
        assert value.dtype == theirs.dtype and value.isfinite().all()
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(value, theirs, rtol=0, atol=tiny * scale)


def test_ppo_loss_gradient_error_against_float64():
    """bfloat16 head: hidden and weight gradients no worse than those of the torch path."""
    torch.manual_seed(0)
    leaves = head(40, 1500, 32, torch.bfloat16, torch.bfloat16)[:2]
    targets, rows_A = torch.randint(1500, (60,), device=DEVICE), torch.randint(40, (60,), device=DEVICE)
    old = linear_logprob(*leaves, targets, rows_A=rows_A)[0] + 0.1 * torch.randn(60, device=DEVICE)
    advantages, grads = torch.randn(60, device=DEVICE), []
    for backend, dtype in (("triton", None), ("torch", None), ("torch", torch.float64)):
        with_grad = [leaf.to(dtype or leaf.dtype).requires_grad_() for leaf in (x.detach().clone() for x in leaves)]
        loss, *_ = linear_ppo_loss(*with_grad, targets, old, advantages, rows_A=rows_A, entropy_coef=0.01, backend=backend)
        loss.backward()
        grads.append([leaf.grad.double() for leaf in with_grad])
    for i, slack in ((0, 1.2), (1, 2.5)):  # the weight's: one rounding of the logit gradient more, as in any mixed precision
        ours, theirs = ((grad[i] - grads[2][i]).norm() for grad in grads[:2])
        assert ours <= slack * theirs + 1e-6


def test_step_0_ratio_is_1_and_kl_0():
    hidden, weight, _ = head(6, 999, 8, torch.bfloat16, torch.bfloat16)
    targets = torch.randint(999, (6,), device=DEVICE)
    old = linear_logprob(hidden, weight, targets, backend="triton")[0]
    for kl in KL[1:]:
        _, metrics, logprob, _ = linear_ppo_loss(
            hidden, weight, targets, old, torch.ones(6, device=DEVICE), ref_logprob=old, kl_coef=1.0, kl_estimator=kl,
            backend="triton",
        )  # fmt: skip
        assert torch.equal(logprob, old)
        assert metrics["ratio_sum"] == 6 and metrics["ratio_max"] == 1 and metrics["approx_kl_sum"] == 0
        assert abs(float(metrics["kl_ref_sum"])) < 1e-6


@pytest.mark.parametrize("old", [-300.0, 300.0])
def test_a_ratio_that_overflows(old):
    hidden = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    loss, metrics, _, _ = linear_ppo_loss(
        hidden, torch.randn(9, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE), torch.full((2,), old, device=DEVICE),
        torch.tensor([1.0, -1.0], device=DEVICE), backend="triton",
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and metrics["ratio_max"].isfinite() and (hidden.grad == 0).all()


def test_masked_rows_of_nan_and_an_empty_batch_of_actions():
    hidden = torch.randn(3, 4, device=DEVICE)
    hidden[1] = torch.nan
    hidden.requires_grad_()
    weight, targets = torch.randn(9, 4, device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    old, ones = torch.full((3,), torch.nan, device=DEVICE), torch.ones(3, device=DEVICE)
    mask = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    loss, metrics, logprob, _ = linear_ppo_loss(
        hidden, weight, targets, old, ones, mask=mask, entropy_coef=0.1, backend="triton"
    )
    loss.backward()
    assert loss == 0 and all(value == 0 for value in metrics.values()) and (hidden.grad == 0).all()
    assert logprob.isnan().tolist() == [False, True, False]


def test_only_the_gradients_that_are_needed_are_made(monkeypatch):
    from fastppo_kernels import _head_ops

    made = []
    product = _head_ops._product
    monkeypatch.setattr(_head_ops, "_product", lambda a, b, dtype: made.append((len(a), b.shape[1])) or product(a, b, dtype))
    hidden, weight, bias = head(6, 20, 3, torch.float32, torch.float32)
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
    hidden, weight, _ = head(9, 300, 8, torch.bfloat16, torch.bfloat16)
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


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_graph_and_no_compilation_for_another_length(backend):
    weight = torch.randn(50, 8, device=DEVICE)

    def step(hidden, targets, old, advantages, rows, denominator):
        loss, metrics, _, _ = linear_ppo_loss(
            hidden, weight, targets, old, advantages, rows_A=rows, denominator=denominator, backend=backend
        )
        logprob, entropy = linear_logprob(hidden, weight, targets, rows_A=rows, backend=backend)
        given, _ = token_logprob(hidden @ weight.t(), rows.new_zeros(len(hidden)), backend=backend)
        return loss + logprob.sum() + 0.1 * entropy.sum() + given.sum(), metrics["ratio_sum"]

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=backend == "triton")
    compilations = []
    # The torch form has a Python loop over chunks, whose number is part of the graph; the Triton operators are opaque.
    for rows, actions in ((5, 9), (7, 4), (12, 30)) if backend == "triton" else ((5, 9),):
        hidden = torch.randn(rows, 8, device=DEVICE)
        others = (torch.randint(50, (actions,), device=DEVICE), torch.randn(actions, device=DEVICE) - 4)
        others += (torch.randn(actions, device=DEVICE), torch.randint(rows, (actions,), device=DEVICE))
        others += (torch.tensor(3.0, device=DEVICE),)
        results = []
        for function in (step, compiled):
            leaf = hidden.clone().requires_grad_()
            value, ratio = function(leaf, *others)
            value.backward()
            results.append((value.detach(), ratio, leaf.grad))
        torch.testing.assert_close(*results)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("op", ["token_logprob", "linear_logprob", "linear_ppo_loss"])
def test_operators_are_registered_as_torch_wants_them(op):
    from fastppo_kernels import _head_ops

    hidden, weight, bias = (x.requires_grad_() for x in head(3, 20, 4, torch.float32, torch.float32))
    targets = torch.randint(20, (3,), device=DEVICE)
    rows, ones = torch.tensor([2, 0, 2], device=DEVICE), torch.ones(3, device=DEVICE)
    arguments = {
        "token_logprob": (weight.detach().t()[:3].contiguous().requires_grad_(), targets, 0.7, None, False),
        "linear_logprob": (hidden, weight, bias, targets, rows, 0.7, 5.0, 1.0, 2, True, torch.float32),
        "linear_ppo_loss": (
            hidden, weight, bias, targets, rows, -ones, ones, ones.to(torch.uint8), -ones, ones.sum(), 0.7, None, 1.0, 0.2, 0.2,
            None, 0.1, 0.1, 4, 2, torch.float32, [True, True, True],
        ),
    }  # fmt: skip
    torch.library.opcheck(getattr(_head_ops, op), arguments[op])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprob_A": torch.zeros(2)}, r"old_logprob must have shape \[3\].* got \[2\]"),
        ({"advantages_A": torch.zeros(3, dtype=torch.int64)}, "advantages must have one of the dtypes"),
        ({"mask": torch.zeros(3)}, "mask must be a bool or integer tensor"),
        ({"kl_coef": 0.1}, "ref_logprob must be given for kl_coef 0.1"),
        ({"kl_estimator": "k4"}, "estimator must be one of k1, .* got 'k4'"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number > 1, got 1.0"),
        ({"denominator": 0}, "denominator must be a finite number > 0, got 0"),
        ({"logits_dtype": torch.bfloat16}, "logits_dtype must be None, float32 or the weight's torch.float32, got"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"targets_A": torch.tensor([0, 1, 9])}, r"targets must be in \[0, 9\)"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.skipif(DEVICE == "cuda", reason="arguments on the CPU")
def test_wrong_arguments(change, message, backend):
    arguments = {
        "hidden_RH": torch.zeros(3, 4), "weight_VH": torch.zeros(9, 4), "targets_A": torch.tensor([0, 1, 8]),
        "old_logprob_A": torch.zeros(3), "advantages_A": torch.zeros(3), "backend": backend,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**(arguments | change))


def test_importing_the_package_leaves_triton_alone():
    code = (
        "import torch, sys; before = 'triton' in sys.modules; import fastppo_kernels as f; "
        "f.token_logprob(torch.zeros(2, 3), torch.tensor([0, 1])); print(before or 'triton' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
