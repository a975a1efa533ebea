"""The ways in which other projects' head kernels have failed, on both back ends."""

import subprocess
import sys

import helpers
import pytest
import torch
from head_helpers import BACKENDS, HEADS, INF, make_head, plain, with_gradient
from helpers import DEVICE, TRITON_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo_kernels import linear_logprob, linear_ppo_loss, token_logprob

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-1e4, -1e30, 1e4, 1e30])
@pytest.mark.parametrize("vocab", [1000, 5000])
def test_equal_rows_of_any_size_are_uniform(offset, vocab, backend):
    """Verl's kernel gave NaN for rows of -1e4, and log-probs of +123 where columns past the vocabulary were counted."""
    logits, targets = torch.full((2, vocab), offset, device=DEVICE), torch.tensor([0, vocab - 1], device=DEVICE)
    ones = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE)
    logprob, entropy, grad = with_gradient(lambda x: token_logprob(x, targets, backend=backend), [logits], ones)
    expected = torch.tensor(float(vocab), device=DEVICE).log().expand(2)
    torch.testing.assert_close(logprob, -expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[0, :2].cpu(), torch.tensor([1 - 1 / vocab, -1 / vocab]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-16384.0, 16384.0, -(2.0**60)])
def test_shifting_a_row_changes_no_bit(shift, backend):
    logits = torch.randint(-9, 9, (4, 5000), device=DEVICE).float()
    logits = logits * max(1.0, abs(shift) / 2**20)  # still exact after the shift
    targets = torch.randint(5000, (4,), device=DEVICE)
    weights = torch.randn(4, device=DEVICE), torch.randn(4, device=DEVICE)

    def run(x):
        return with_gradient(lambda y: token_logprob(y, targets, temperature=3.0, backend=backend), [x], weights)

    assert all(torch.equal(a, b) for a, b in zip(run(logits), run(logits + shift), strict=True))
    hidden = torch.eye(4, device=DEVICE)  # whose logits are the columns of the weight
    of_head = [
        linear_logprob(hidden, logits.t(), targets, bias=bias, temperature=3.0, backend=backend)
        for bias in (None, torch.full((5000,), shift, device=DEVICE))
    ]
    assert torch.equal(of_head[0][0], of_head[1][0]) and torch.equal(of_head[0][1], of_head[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocab", [3, 6000])
@pytest.mark.parametrize("kind", ["nothing", "nan", "inf"])
def test_a_row_without_distribution_is_nan_and_harmless_when_masked(kind, vocab, softcap, backend):
    logits = torch.randn(2, vocab, device=DEVICE)
    if kind == "nothing":
        logits[0] = -INF
    else:
        logits[0, vocab // 2] = float(kind)
    logits.requires_grad_()
    targets = torch.tensor([0, 1], device=DEVICE)
    logprob, entropy = token_logprob(logits, targets, softcap=softcap, backend=backend)
    bad = softcap is None or kind == "nan"  # a cap makes a number of an infinite logit
    assert logprob.isnan().tolist() == [bad, False] and entropy.isnan().tolist() == [bad, False]
    mask = torch.tensor([False, True], device=DEVICE)
    (torch.where(mask, logprob, 0.0).sum() + torch.where(mask, entropy, 0.0).sum()).backward()
    assert logits.grad is not None and (logits.grad[0] == 0).all()
    assert logits.grad[1].isfinite().all() and logits.grad[1].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", ["one", "all"])
def test_what_is_masked_out_may_be_nan_and_no_gradient_has_it(masked, dtype, backend):
    """Also not those of the weight and the adapter, to which a masked row contributes 0 times NaN."""
    hidden, weight, bias = make_head(3, 50, 4, dtype, dtype)
    hidden[1] = torch.nan
    adapter = [torch.randn(shape, device=DEVICE) for shape in ((2, 4), (50, 2))]
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias, *adapter)]
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    old = torch.tensor([-4.0, torch.nan, -3.0], device=DEVICE)
    mask = torch.tensor([masked == "one", False, masked == "one"], device=DEVICE)
    how = {"bias": bias, "lora_A": adapter[0], "lora_B": adapter[1], "softcap": 9.0, "backend": backend}
    loss, metrics, logprob, _ = linear_ppo_loss(
        hidden, weight, targets, old, old + 5, mask=mask, ref_logprob=old, kl_coef=0.1, entropy_coef=0.1, **how
    )
    assert logprob.isnan().tolist() == [False, True, False]
    grads = torch.autograd.grad(loss, leaves)
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert all(grad.isfinite().all() for grad in grads) and (grads[0][1] == 0).all()
    if masked == "all":
        assert loss == 0 and all(value == 0 for value in metrics.values()) and all((grad == 0).all() for grad in grads)
    else:
        assert all(grad.abs().sum() > 0 for grad in grads)
    logprob, entropy = linear_logprob(hidden, weight, targets, **how)
    value = torch.where(mask, logprob, 0.0).sum() + torch.where(mask, entropy, 0.0).sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_that_counts_is_seen_in_the_loss_and_its_metrics(backend):
    hidden, weight, _ = make_head(2, 50, 4, torch.float32, torch.float32)
    hidden[1] = torch.nan
    old = torch.zeros(2, device=DEVICE)
    loss, metrics, *_ = linear_ppo_loss(hidden, weight, torch.tensor([1, 2], device=DEVICE), old, old + 1, backend=backend)
    assert loss.isnan() and metrics["ratio_sum"].isnan() and metrics["ratio_max"].isnan()
    leaf = weight.requires_grad_()  # in the weight's gradient as well: `linear_logprob` has no clamp that would lose it
    logprob, _ = linear_logprob(hidden, leaf, torch.tensor([1, 2], device=DEVICE), backend=backend)
    assert torch.autograd.grad(logprob.sum(), leaf)[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", HEADS)
@pytest.mark.parametrize(("rows", "actions"), [(0, None), (0, 0), (1, None), (1, 0), (1, 1), (1, 40), (3, 0)])
def test_no_tokens_and_one(rows, actions, dtypes, backend):
    hidden, weight, bias = (leaf.requires_grad_() for leaf in make_head(rows, 9, 4, *dtypes[:2]))
    rows_A = None if actions is None else torch.zeros(actions, dtype=torch.int64, device=DEVICE)
    count = rows if actions is None else actions
    targets, ones = torch.randint(9, (count,), device=DEVICE), torch.ones(count, device=DEVICE)
    adapter = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 4), (9, 2))]
    how = {"rows_A": rows_A, "bias": bias, "lora_A": adapter[0], "lora_B": adapter[1]}
    how |= {"logits_dtype": dtypes[2], "backend": backend}
    logprob, entropy, argmax = linear_logprob(hidden, weight, targets, argmax=True, **how)
    assert logprob.shape == entropy.shape == (count,) and argmax.shape == (rows,)
    loss, metrics, logprob, entropy = linear_ppo_loss(hidden, weight, targets, -ones, ones, entropy_coef=0.1, **how)
    assert logprob.shape == entropy.shape == (count,) and metrics["count"] == count
    assert loss.isfinite() and (count or loss == 0)
    for leaf, grad in zip((hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype and grad.isfinite().all()
        assert count or (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_second_grid_dimension_has(backend, monkeypatch):
    rows = 70_000
    if DEVICE == "cpu" and backend == "triton":  # one interpreted program a row is too slow: the grids are looked at
        from fastppo_kernels import _triton_head

        grids = []

        class Recorder:
            def __getitem__(self, grid):
                grids.append(grid)
                return lambda *_, **__: None

        for kernel in ("statistics_kernel", "gradient_kernel", "ppo_kernel"):
            monkeypatch.setattr(_triton_head, kernel, Recorder())
    hidden, weight = torch.randn(rows, 1, device=DEVICE, requires_grad=True), torch.randn(5, 1, device=DEVICE)
    targets, ones = torch.randint(5, (rows,), device=DEVICE), torch.ones(rows, device=DEVICE)
    how = {"chunk_rows": rows, "backend": backend}
    logprob, entropy = linear_logprob(hidden, weight, targets, **how)
    grads = torch.autograd.grad((logprob + entropy).sum(), hidden)
    loss, *_ = linear_ppo_loss(hidden, weight, targets, -ones, ones, **how)
    grads += torch.autograd.grad(loss, hidden)
    if DEVICE == "cpu" and backend == "triton":
        assert grids == 3 * [(rows,)]  # in x, which goes to 2^31 - 1; y and z end at 65,535
        return
    exact = plain(hidden.detach() @ weight.t(), targets)
    torch.testing.assert_close((logprob.detach(), entropy.detach()), exact, rtol=1e-5, atol=1e-5)
    assert all(grad.isfinite().all() and grad[-1].abs() > 0 for grad in grads)


@pytest.fixture
def reserved():
    """rows x 16 numbers, rows 2^30 numbers apart, in memory that is reserved but never touched in between."""

    def reserve(rows: int, dtype: torch.dtype):
        torch.use_deterministic_algorithms(False)  # which would fill it
        try:
            memory = torch.empty((rows - 1) * 2**30 + 16, dtype=dtype, device=DEVICE)
        except RuntimeError:
            pytest.skip("not so much address space can be reserved")
        return memory.as_strided((rows, 16), (2**30, 1))

    return reserve


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_given_logits_past_2_31(reserved, backend):
    values, targets = torch.randn(4, 16).bfloat16().to(DEVICE), torch.tensor([0, 3, 7, 15], device=DEVICE)
    weights = torch.randn(4, device=DEVICE), torch.randn(4, device=DEVICE)
    far = reserved(4, torch.bfloat16).copy_(values).requires_grad_()
    expected = with_gradient(lambda x: token_logprob(x, targets, backend=backend), [values], weights)
    logprob, entropy = token_logprob(far, targets, inplace=True, backend=backend)  # the gradient lies as far apart
    (grad,) = torch.autograd.grad((logprob * weights[0] + entropy * weights[1]).sum(), far)
    assert grad.stride(0) == 2**30 and all(torch.equal(*pair) for pair in zip((logprob, entropy, grad), expected, strict=True))


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_offsets_in_a_chunk_of_logits_past_2_31(reserved, logits_dtype, monkeypatch):
    """The kernels of the PPO loss and of the head's backward, with a narrower gradient over the logits and without."""
    from fastppo_kernels import _head_ops

    rows = 3 if logits_dtype == torch.float32 else 4
    hidden, weight, bias = make_head(rows, 16, 4, torch.bfloat16, torch.bfloat16)
    targets, old = torch.randint(16, (rows,), device=DEVICE), torch.full((rows,), -3.0, device=DEVICE)

    def run():
        leaf, how = hidden.clone().requires_grad_(), {"bias": bias, "logits_dtype": logits_dtype, "backend": "triton"}
        loss, *_ = linear_ppo_loss(leaf, weight, targets, old, -old, entropy_coef=0.1, **how)
        logprob, entropy = linear_logprob(leaf, weight, targets, **how)
        return (
            loss.detach(), logprob.detach(), *torch.autograd.grad(loss, leaf),
            *torch.autograd.grad((logprob + entropy).sum(), leaf),
        )  # fmt: skip

    expected, logits = run(), _head_ops._Head.logits
    far = reserved(rows, logits_dtype)
    monkeypatch.setattr(_head_ops._Head, "logits", lambda *arguments: far.copy_(logits(*arguments)))
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("old", [-300.0, 300.0, -INF, 3e38])
def test_a_ratio_that_overflows(old, backend):
    hidden = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    loss, metrics, _, _ = linear_ppo_loss(
        hidden, torch.randn(9, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE), torch.full((2,), old, device=DEVICE),
        torch.tensor([1.0, -1.0], device=DEVICE), backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and metrics["ratio_max"].isfinite() and (hidden.grad == 0).all()


@settings(max_examples=10, deadline=None)
@given(
    dtypes=st.sampled_from(HEADS),
    vocab=st.sampled_from([99, 4097]),
    kl=st.sampled_from(["k1", "clamped_k1", "k2", "k3", "jensen_shannon"]),
    shared=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    with_bias=st.booleans(),
    with_adapter=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
def test_step_0_ratio_is_1_and_kl_0(dtypes, vocab, kl, shared, softcap, with_bias, with_adapter, backend, seed):
    """Old log-probs (without gradients), new ones and those of the loss have the same bits."""
    torch.manual_seed(seed)
    hidden, weight, bias = make_head(5, vocab, 8, *dtypes[:2])
    count = 9 if shared else 5
    rows_A = torch.randint(5, (count,), device=DEVICE) if shared else None
    targets, ones = torch.randint(vocab, (count,), device=DEVICE), torch.ones(count, device=DEVICE)
    adapter = [torch.randn(shape, device=DEVICE) for shape in ((2, 8), (vocab, 2))] if with_adapter else (None, None)
    how = {"rows_A": rows_A, "bias": bias if with_bias else None, "lora_A": adapter[0], "lora_B": adapter[1]}
    how |= {"softcap": softcap, "temperature": 0.7, "chunk_rows": 2, "logits_dtype": dtypes[2], "backend": backend}
    with torch.no_grad():
        old, old_entropy = linear_logprob(hidden, weight, targets, **how)
    _, metrics, logprob, entropy = linear_ppo_loss(
        hidden.requires_grad_(), weight, targets, old, ones, ref_logprob=old, kl_coef=1.0, kl_estimator=kl, **how
    )
    assert torch.equal(logprob, old) and torch.equal(entropy, old_entropy)
    assert metrics["ratio_sum"] == count and metrics["ratio_max"] == 1
    assert metrics["approx_kl_sum"] == 0 and metrics["clip_fraction_sum"] == 0
    # Not 0: the torch form of jensen_shannon takes a float32 logarithm of the mean, of numbers around 10.
    assert abs(float(metrics["kl_ref_sum"])) <= 1e-6 * count


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_int32_indices(backend):
    torch.manual_seed(0)  # strides change the order of sums: an entry that cancels out may differ by more than its share
    hidden, weight, bias = make_head(6, 40, 8, torch.float32, torch.float32)
    targets, rows_A = torch.randint(40, (7,), device=DEVICE), torch.randint(6, (7,), device=DEVICE)
    old, advantages = torch.randn(7, device=DEVICE) - 4, torch.randn(7, device=DEVICE)
    mask, lora = torch.rand(7, device=DEVICE) > 0.3, [torch.randn(s, device=DEVICE) for s in ((3, 8), (40, 3))]

    def spread(x):
        """The same numbers, every one followed by another, and the last dimension in front."""
        wide = torch.stack([x, x], -1)[..., 0]
        return wide if x.dim() == 1 else wide.transpose(0, 1).contiguous().transpose(0, 1)

    def run(change, index):
        leaves = [change(x).requires_grad_() for x in (hidden, weight, bias, *lora)]
        loss, metrics, *values = linear_ppo_loss(
            leaves[0], leaves[1], index(change(targets)), change(old), change(advantages), rows_A=index(change(rows_A)),
            bias=leaves[2], mask=change(mask), lora_A=leaves[3], lora_B=leaves[4], backend=backend,
        )  # fmt: skip
        return [loss.detach(), metrics["policy_loss_sum"], *values, *torch.autograd.grad(loss, leaves)]

    torch.testing.assert_close(run(spread, lambda x: x.int()), run(lambda x: x.clone(), lambda x: x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_RH": torch.zeros(3)}, r"hidden must have shape \[R, H\], got \[3\]"),
        ({"weight_VH": torch.zeros(9, 5)}, r"weight must have shape \[V, 4\].* got \[9, 5\]"),
        ({"weight_VH": torch.zeros(9, 4, device="meta")}, r"weight must be on the device of hidden \(cpu\), got meta"),
        ({"targets_A": torch.zeros(2, dtype=torch.int64)}, r"targets must have shape \[3\].* got \[2\]"),
        ({"targets_A": torch.tensor([0, 1, 9])}, r"targets must be in \[0, 9\)"),
        ({"rows_A": torch.tensor([0, 1, 3])}, r"rows_A must be in \[0, 3\)"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \[9\] .* got \[8\]"),
        ({"old_logprob_A": torch.zeros(2)}, r"old_logprob must have shape \[3\].* got \[2\]"),
        ({"old_logprob_A": torch.zeros(3, device="meta")}, r"old_logprob must be on the device of targets \(cpu\), got meta"),
        ({"advantages_A": torch.zeros(3, dtype=torch.int64)}, "advantages must have one of the dtypes"),
        ({"mask": torch.zeros(3)}, "mask must be a bool or integer tensor"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, r"mask must have shape \[3\].* got \[2\]"),
        ({"kl_coef": 0.1}, "ref_logprob must be given for kl_coef 0.1"),
        ({"kl_estimator": "k4"}, "estimator must be one of k1, .* got 'k4'"),
        ({"clip_low": 1.5}, "clip_low must be a finite number >= 0 and <= 1, got 1.5"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number > 1, got 1.0"),
        ({"denominator": 0}, "denominator must be a finite number > 0, got 0"),
        ({"denominator": torch.ones(2)}, r"denominator must have shape \[\] .* got \[2\]"),
        ({"logits_dtype": torch.bfloat16}, "logits_dtype must be None, float32 or the weight's torch.float32, got"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"chunk_rows": 0}, "chunk_rows must be an integer >= 1, got 0"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
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
        "print(before or 'triton' not in sys.modules); f.token_logprob(torch.zeros(2, 3), torch.tensor([0, 1])); "
        "print(any(name.startswith('fastppo_kernels._triton') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\nFalse\n"
