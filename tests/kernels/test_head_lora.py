"""A head with an adapter, and how exact all gradients of a head are, on both back ends."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_good
from head_helpers import BACKENDS, HEADS, make_head, plain_head
from helpers import DEVICE, TRITON_MARKS

from fastppo_kernels import linear_logprob, linear_ppo_loss, token_logprob

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", HEADS)
@pytest.mark.parametrize("op", ["linear_logprob", "linear_ppo_loss"])
def test_errors_of_all_gradients_are_at_most_those_of_the_plain_head(op, dtypes, backend):
    """In half precision: against a head of plain torch operations in its dtype, both measured against float64."""
    torch.manual_seed(0)
    hidden_dtype, weight_dtype, logits_dtype = dtypes
    hidden, weight, bias = make_head(48, 1501, 32, hidden_dtype, weight_dtype)
    adapter = [0.2 * torch.randn(shape, device=DEVICE) for shape in ((4, 32), (1501, 4))]
    targets, rows_A = torch.randint(1501, (70,), device=DEVICE), torch.randint(48, (70,), device=DEVICE)
    weights = torch.randn(70, device=DEVICE), torch.randn(70, device=DEVICE)
    # Logits are rounded before the bias here and after it there: of 70 actions, the better one would be a matter of luck.
    bias = bias if logits_dtype or weight_dtype == torch.float32 else torch.zeros_like(bias)
    leaves, how = [hidden, weight, bias, *adapter], {"rows_A": rows_A, "temperature": 0.9, "logit_scale": 0.5}
    start = [leaf.double() for leaf in leaves]
    old = plain_head(*start[:3], (*start[3:], 0.7), targets, **how)[0] + 0.1 * weights[0].double()

    def ours(h, w, b, lora_A, lora_B):
        of_head = {"bias": b, "lora_A": lora_A, "lora_B": lora_B, "lora_scale": 0.7, "logits_dtype": logits_dtype, **how}
        of_head |= {"chunk_rows": 17, "backend": backend}
        if op == "linear_logprob":
            logprob, entropy = linear_logprob(h, w, targets, **of_head)
            return (logprob * weights[0]).sum() + (entropy * weights[1]).sum()
        return linear_ppo_loss(
            h, w, targets, old.float(), weights[1], clip_low=0.9, clip_high=9.0, entropy_coef=0.01, **of_head
        )[0]  # fmt: skip

    def plainly(h, w, b, lora_A, lora_B):
        logprob, entropy = plain_head(h, w, b, (lora_A, lora_B, 0.7), targets, **how)
        if op == "linear_logprob":
            return (logprob * weights[0]).sum() + (entropy * weights[1]).sum()
        return (-weights[1] * (logprob - old.to(logprob.dtype)).exp() - 0.01 * entropy).mean()

    def gradients(function, leaves):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        value = function(*leaves)
        return [value.detach().reshape(1), *torch.autograd.grad(value, leaves)]

    found = gradients(ours, leaves), gradients(plainly, leaves), gradients(plainly, start)
    assert_as_good(*(values[1:] for values in found), 1e-6)


def test_gradcheck_of_the_twins_with_adapter_bias_and_shared_rows():
    shapes = ((3, 2), (5, 2), (5,), (2, 2), (5, 2))
    leaves = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in shapes]
    targets, rows = torch.tensor([4, 0, 0, 2], device=DEVICE), torch.tensor([2, 0, 0, 2], device=DEVICE)
    old, advantages = torch.randn(4, device=DEVICE).double() - 1.6, torch.randn(4, device=DEVICE).double()
    how = {"rows_A": rows, "temperature": 0.8, "softcap": 3.0, "logit_scale": 0.7, "chunk_rows": 2, "lora_scale": 0.5}

    def logprob(h, w, b, lora_A, lora_B):
        return linear_logprob(h, w, targets, bias=b, lora_A=lora_A, lora_B=lora_B, **how)

    def loss(h, w, b, lora_A, lora_B):
        return linear_ppo_loss(
            h, w, targets, old, advantages, bias=b, lora_A=lora_A, lora_B=lora_B, clip_low=1.0, clip_high=1e3,
            entropy_coef=0.1, ref_logprob=old, kl_coef=0.1, **how,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(logprob, leaves)
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.skipif(DEVICE == "cuda", reason="bits of the CPU's products")
def test_float32_logits_are_those_of_peft_to_the_bit():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(24, 301, bias=False)

        def forward(self, hidden):
            return self.lm_head(hidden)

    model = get_peft_model(Model(), LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head"], init_lora_weights=False))
    layer = model.base_model.model.lm_head
    hidden, targets = torch.randn(17, 24), torch.randint(301, (17,))
    expected = token_logprob(model(hidden), targets, temperature=0.7)
    ours = linear_logprob(
        hidden, layer.base_layer.weight, targets, lora_A=layer.lora_A["default"].weight,
        lora_B=layer.lora_B["default"].weight, lora_scale=layer.scaling["default"], temperature=0.7,
    )  # fmt: skip
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed_are_made(backend, monkeypatch):
    """A frozen weight has none however the adapter is trained; a trained one beside an adapter has its own."""
    from fastppo_kernels import _head_ops

    made = []
    product = _head_ops.product
    monkeypatch.setattr(_head_ops, "product", lambda a, b, dtype: made.append((len(a), b.shape[1])) or product(a, b, dtype))
    hidden, weight, _ = make_head(6, 20, 5, torch.float32, torch.float32)
    adapter = [torch.randn(shape, device=DEVICE) for shape in ((2, 5), (20, 2))]
    targets, old = torch.randint(20, (6,), device=DEVICE), torch.zeros(6, device=DEVICE)
    of_weight = (20, 5)
    for needs in ((0, 0, 1, 1), (1, 0, 0, 0), (1, 0, 1, 1), (0, 1, 0, 1), (1, 1, 1, 1)):
        pairs = zip((hidden, weight, *adapter), needs, strict=True)
        leaves = [leaf.detach().clone().requires_grad_(bool(need)) for leaf, need in pairs]
        how = {"lora_A": leaves[2], "lora_B": leaves[3], "backend": backend}
        exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
        values = plain_head(exact[0], exact[1], None, (exact[2], exact[3], 1.0), targets)
        expected = torch.autograd.grad((values[0] - old).exp().mean() * -2, [x for x in exact if x.requires_grad])
        made.clear()
        loss, *_ = linear_ppo_loss(*leaves[:2], targets, old, old + 2, clip_low=1.0, clip_high=9.0, **how)
        found = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
        assert (of_weight in made) == bool(needs[1])
        torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-6)
        logprob, _ = linear_logprob(*leaves[:2], targets, **how)
        found = torch.autograd.grad((logprob - old).exp().mean() * -2, [x for x in leaves if x.requires_grad])
        torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_zeros_changes_no_bit_and_a_merged_one_nothing_beyond_rounding(backend, dtype):
    hidden, weight, _ = make_head(7, 300, 16, dtype, dtype)
    targets = torch.randint(300, (7,), device=DEVICE)
    lora_A, lora_B = torch.randn(4, 16, device=DEVICE), 0.1 * torch.randn(300, 4, device=DEVICE)
    base = linear_logprob(hidden, weight, targets, backend=backend)
    zeros = linear_logprob(hidden, weight, targets, lora_A=lora_A, lora_B=0 * lora_B, backend=backend)
    assert torch.equal(zeros[0], base[0]) and torch.equal(zeros[1], base[1])
    exact = torch.float64
    merged = linear_logprob(hidden.to(exact), weight.to(exact) + 2 * lora_B.to(exact) @ lora_A.to(exact), targets)
    ours = linear_logprob(
        hidden, weight, targets, lora_A=lora_A, lora_B=lora_B, lora_scale=2.0, logits_dtype=torch.float32, backend=backend
    )
    torch.testing.assert_close([x.double() for x in ours], list(merged), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_no_bit(backend):
    hidden, weight, _ = make_head(5, 30, 8, torch.float32, torch.float32)
    leaves = [hidden.requires_grad_(), *(torch.randn(s, device=DEVICE).requires_grad_() for s in ((2, 8), (30, 2)))]
    targets = torch.randint(30, (5,), device=DEVICE)

    def run():
        logprob, _ = linear_logprob(leaves[0], weight, targets, lora_A=leaves[1], lora_B=leaves[2], backend=backend)
        return logprob, *torch.autograd.grad(logprob.sum(), leaves)

    expected = run()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_the_adapter_reaches_the_loss_of_a_plain_head():
    """TRL's fused head left a LoRA of the lm_head out without a word."""
    hidden, weight, _ = make_head(4, 30, 8, torch.float32, torch.float32)
    targets, adapter = torch.randint(30, (4,), device=DEVICE), [torch.randn(s, device=DEVICE) for s in ((2, 8), (30, 2))]
    for backend in BACKENDS:
        logprob, _ = linear_logprob(hidden, weight, targets, lora_A=adapter[0], lora_B=adapter[1], backend=backend)
        logits = F.linear(hidden, weight) + F.linear(F.linear(hidden, adapter[0]), adapter[1])
        torch.testing.assert_close(logprob, token_logprob(logits, targets)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_B": None}, "lora_B must be given with lora_A, got None"),
        ({"lora_A": None}, "lora_A must be given with lora_B, got None"),
        ({"lora_A": torch.zeros(2, 5)}, r"lora_A must have shape \[K, 4\], K >= 1 .* got \[2, 5\]"),
        ({"lora_A": torch.zeros(0, 4), "lora_B": torch.zeros(9, 0)}, r"lora_A must have shape \[K, 4\].* got \[0, 4\]"),
        ({"lora_B": torch.zeros(9, 3)}, r"lora_B must have shape \[9, 2\] .* got \[9, 3\]"),
        ({"lora_B": torch.zeros(9, 2, dtype=torch.int64)}, "lora_B must have one of the dtypes float32.* got torch.int64"),
        ({"lora_A": torch.zeros(2, 4, dtype=torch.float64)}, "hidden and lora_A must both be float64 or neither"),
        ({"lora_A": torch.zeros(2, 4, device="meta")}, r"lora_A must be on the device of hidden \(cpu\), got meta"),
        ({"lora_scale": float("nan")}, "lora_scale must be a finite number, got nan"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(DEVICE == "cuda", reason="arguments on the CPU")
def test_wrong_arguments(change, message, backend):
    head = {"hidden_RH": torch.zeros(3, 4), "weight_VH": torch.zeros(9, 4), "targets_A": torch.tensor([0, 1, 8])}
    head |= {"lora_A": torch.zeros(2, 4), "lora_B": torch.zeros(9, 2), "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**head)
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**head, old_logprob_A=torch.zeros(3), advantages_A=torch.zeros(3))
