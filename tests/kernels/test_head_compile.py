"""The head ops under torch.compile: one graph for all lengths, and operators that torch's own check accepts."""

import pytest
import torch
from head_helpers import BACKENDS, make_head
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once

from fastppo_kernels import linear_logprob, linear_ppo_loss, token_logprob
from fastppo_kernels.token_logprob import selective_log_softmax

pytestmark = TRITON_MARKS

# Rows and actions of the batches; chunks of 4 rows, so that their number differs.
LENGTHS = [(5, 9), (7, 4), (13, 30), (8, 8)]


def batches(width: int, vocab: int):
    for rows, actions in LENGTHS:
        hidden = torch.randn(rows, width, device=DEVICE, requires_grad=True)
        targets = torch.randint(vocab, (actions,), device=DEVICE)
        rows_A = torch.randint(rows, (actions,), device=DEVICE)
        yield hidden, targets, rows_A, torch.randn(actions, device=DEVICE) - 4, torch.randn(actions, device=DEVICE)


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "lora"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_head_is_one_graph_for_all_lengths(backend, dtype, lora):
    weight = torch.randn(50, 8, device=DEVICE).to(dtype)
    adapter = {"lora_A": torch.randn(3, 8, device=DEVICE), "lora_B": torch.randn(50, 3, device=DEVICE)} if lora else {}

    def step(hidden, targets, rows_A, old, advantages):
        how = {"rows_A": rows_A, "chunk_rows": 4, "backend": backend, **adapter}
        loss, metrics, *_ = linear_ppo_loss(hidden, weight, targets, old, advantages, ref_logprob=old, kl_coef=0.1, **how)
        logprob, entropy, argmax = linear_logprob(hidden, weight, targets, argmax=True, **how)
        return loss, logprob.sum() + 0.1 * entropy.sum(), metrics["ratio_sum"], argmax

    assert_compiles_once(step, batches(8, 50))


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_logits_are_one_graph_for_all_lengths(backend):
    def step(logits, targets, *_):
        chosen = targets[: len(logits)] if len(targets) >= len(logits) else targets.new_zeros(len(logits))
        logprob, entropy = token_logprob(logits * 1, chosen, temperature=0.7, inplace=True, backend=backend)
        two = torch.stack([chosen, chosen + 1], -1) % 9
        return logprob + entropy, selective_log_softmax(logits, two, backend=backend)

    calls = [(torch.randn(rows, 9, device=DEVICE, requires_grad=True), torch.randint(9, (20,))) for rows in (5, 7, 13, 8)]
    assert_compiles_once(step, calls)


def test_lengths_marked_as_dynamic_serve_a_compiled_function_that_is_not():
    """`mark_dynamic` raises where a size is made a constant of the graph."""
    weight = torch.randn(50, 8, device=DEVICE)
    torch._dynamo.reset()
    step = torch.compile(lambda h, t: linear_logprob(h, weight, t, chunk_rows=4)[0], fullgraph=True, backend="eager")
    for rows in (5, 13):
        hidden, targets = torch.randn(rows, 8, device=DEVICE), torch.randint(50, (rows,), device=DEVICE)
        expected = linear_logprob(hidden, weight, targets, chunk_rows=4)[0]
        for tensor in (hidden, targets):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(step(hidden, targets), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["token_logprob", "linear_logprob", "linear_ppo_loss"])
def test_operators_are_registered_as_torch_wants_them(op, backend):
    from fastppo_kernels import _head_ops

    hidden, weight, bias = (x.requires_grad_() for x in make_head(3, 20, 4, torch.float32, torch.float32))
    lora_A, lora_B = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 4), (20, 2)))
    targets = torch.randint(20, (3,), device=DEVICE)
    rows, ones = torch.tensor([2, 0, 2], device=DEVICE), torch.ones(3, device=DEVICE)
    head = (hidden, weight, bias, lora_A, lora_B, targets, rows, 0.5, 0.7, 5.0, 1.0, 2, torch.float32)
    triton = backend == "triton"
    logits = weight.detach().t()[:3].contiguous().requires_grad_()
    arguments = {
        "token_logprob": (logits, targets[:, None], 0.7, None, False, triton),
        "linear_logprob": (*head, True, 0, triton),
        "linear_ppo_loss": (
            *head, -ones, ones, ones.to(torch.uint8), -ones, ones.sum(), [0.2, 0.2, 3.0, 0.1, 0.1], 4, [True] * 5
        ),
    }  # fmt: skip
    torch.library.opcheck(getattr(_head_ops, op), arguments[op])
